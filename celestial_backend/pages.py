"""
Pages of tasks between a command that wants them predicted and the workers that predict them.

A page lies in the store of the queue, and a message names it. Whoever takes the page out has it,
a worker or the command that takes it back, so no two do the same work. While a worker is at a page
it gives signs of life, and a page whose worker is silent is lost, however the worker ended.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any

from huey import Huey
from huey.constants import EmptyData

from celestial_backend.errors import StateError
from celestial_backend.processes import child_environ, death

logger = logging.getLogger(__name__)

SIGN_S = 2.0  # between two signs of life
END_S = 1.0  # for a process that is about to end
PARTS = "page", "sign", "answer"


class QueueError(StateError):
    """The queue cannot be reached."""


@dataclass(frozen=True)
class Seen:
    """
    What the store tells of a page.

    Attributes:
        sign: The last sign of life: the worker's name, a blank, and a number that changes; "" if there is none.
        answer: ``answers`` and ``failures``, or ``error``; None if there is none.
    """

    sign: str
    answer: dict[str, Any] | None


class Pages:
    """
    The pages in one queue, for those that offer them and for the workers; safe between threads.

    All methods but `predict` raise `QueueError` where the queue cannot be reached.
    """

    def __init__(self, queue: Huey) -> None:
        self._queue = queue
        self._task = queue.task(name="predict")(self.predict)
        self._mine = threading.local()

    def offer(self, name: str, page: dict[str, Any]) -> str:
        """Lay out a page for the workers; the key by which it is known, which begins with the name."""
        key = f"{name}{secrets.token_hex(8)}"
        with _reached():
            self._queue.storage.put_data(f"{key}.page", json.dumps(page).encode())
            self._queue.enqueue(self._task.s(key))
        return key

    def look(self, keys: Sequence[str]) -> list[Seen]:
        """What there is of each page, in order."""
        names = [f"{key}.{part}" for key in keys for part in ("sign", "answer")]
        with _reached():
            found = self._queue.storage.peek_many(names) if names else {}
        texts = [bytes(found.get(name, b"")).decode(errors="replace") for name in names]
        return [Seen(sign, _read(answer)) for sign, answer in zip(texts[::2], texts[1::2], strict=True)]

    def take(self, key: str) -> dict[str, Any] | None:
        """A page, which nobody else gets from now on; None if somebody has it."""
        with _reached():
            page = self._queue.storage.pop_data(f"{key}.page")
        return None if page is EmptyData else json.loads(bytes(page))

    def remove(self, key: str) -> None:
        """Remove what there is of a page."""
        with _reached():
            for part in PARTS:
                self._queue.storage.delete_data(f"{key}.{part}")

    def remove_all(self, name: str) -> None:
        """Remove what there is of all pages whose keys begin with the name."""
        with _reached():
            keys = {each.partition(".")[0] for each in self._queue.storage.result_items()}
        for key in keys:
            if key.startswith(name):
                self.remove(key)

    def predict(self, key: str) -> None:
        """What a worker does at a message: nothing, if the page was taken back or its command has ended."""
        if not hasattr(self._mine, "process"):
            self._mine.process = _PageProcess()
        name, numbers = f"{socket.gethostname()}:{os.getpid()}", count()
        try:
            page = self.take(key)
            if page is None:
                return
            self._show_life(key, name, numbers)
            answer = self._mine.process.answer(json.dumps(page), lambda: self._show_life(key, name, numbers))
            with _reached():
                self._queue.storage.put_data(f"{key}.answer", answer.encode())
        except QueueError as error:
            logger.warning("A page of tasks was predicted in vain. %s", error)

    def _show_life(self, key: str, name: str, numbers: Iterator[int]) -> None:
        with _reached():
            self._queue.storage.put_data(f"{key}.sign", f"{name} {next(numbers)}".encode())


class _PageProcess:
    """
    The process in which a thread of a worker has its pages predicted, started when one comes.

    The worker starts other processes, so TensorFlow stays out of its own. This one ends by itself
    when no page comes for a while, and with its worker.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def answer(self, page: str, meanwhile: Callable[[], None]) -> str:
        """The answer to a page, one line of JSON; `meanwhile` is called again and again until it is there."""
        if self._process is None or self._process.poll() is not None:
            command = [sys.executable, "-m", "celestial_backend.page_predictor", str(os.getpid())]
            self._process = subprocess.Popen(  # noqa: S603 - our own module
                command, env=child_environ(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                start_new_session=True,
            )  # fmt: skip
        process, line = self._process, ""
        try:
            line = _asked(process, page, meanwhile)
        except BrokenPipeError:
            pass  # it has ended
        finally:
            if not line:  # also where `meanwhile` fails: an answer that comes later would be taken for the next page's
                _end(process)
        return line or json.dumps({"error": f"Its process that predicts has ended. {death(process.returncode)}"})


def _end(process: subprocess.Popen[str]) -> None:
    try:
        process.wait(END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _asked(process: subprocess.Popen[str], page: str, meanwhile: Callable[[], None]) -> str:
    to, answers = process.stdin, process.stdout
    if to is None or answers is None:
        return ""
    to.write(f"{page}\n")
    to.flush()
    while not select.select([answers], [], [], SIGN_S)[0]:
        meanwhile()
    return answers.readline()


@contextmanager
def _reached() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise QueueError(
            f"The queue cannot be reached ({type(error).__name__}). Start it, or correct REDIS_URL; without REDIS_URL"
            " the queue is a file in the state folder."
        ) from error


def _read(answer: str) -> dict[str, Any] | None:
    """An answer as it is used; one that is no answer counts as an error."""
    if not answer:
        return None
    try:
        read = json.loads(answer)
    except ValueError:
        read = None
    return read if isinstance(read, dict) else {"error": "What came as an answer is none."}
