"""
Pages of tasks that are predicted by all workers, and by the command itself where no worker has time for them.

A page lies in the store of the queue, and a message names it. Whoever takes the page out has it, a worker or the
command that takes it back, so no two do the same work. While a worker is at a page it gives signs of life, and a page
whose worker is silent is lost, however the worker ended.
"""

from __future__ import annotations

import json
import logging
import math
import os
import secrets
import select
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any

from huey import Huey
from huey.constants import EmptyData

from celestial_backend.errors import StateError
from celestial_backend.jobs.processes import child_environ, death

logger = logging.getLogger(__name__)

SIGN_S = 2.0  # between two signs of life
END_S = 1.0  # for a process that is about to end
PARTS = "page", "sign", "answer"
WAITING = 2  # pages that no worker has taken yet, so that each finds its next one
MOST = 32  # pages in memory, those that workers have included
TAKE_S = 10.0  # in which a page is taken or some worker gives a sign of life, unless all of them train
SILENT_S = 15.0  # after which a worker that gives no sign of life is taken for dead
ANSWER_S = 900.0  # after which one that does is taken for stuck
TURNS = 2  # of workers that lose a page; then it is predicted here
LOOK_S = 0.2
Page = list[dict[str, Any]]
Answers = list[Any]


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
            command = [sys.executable, "-m", "celestial_backend.worker.pages", str(os.getpid())]
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


@dataclass
class _Offer:
    """A page in the hands of the workers; `sign` is the last sign of life, and came at `heard`."""

    page: Page
    key: str = ""
    turn: int = 0
    at: float = 0.0
    taken: float | None = None
    heard: float = 0.0
    sign: str = ""


class Distribution:
    """
    The pages of one run; for one thread.

    Attributes:
        workers: How many tasks each worker has predicted.
    """

    def __init__(
        self,
        pages: Pages,
        name: str,
        about: dict[str, Any],
        here: Callable[[Page], Answers],
        on_failure: Callable[[Any, str], None],
    ) -> None:
        """
        Args:
            pages: The queue's.
            name: What keys of this run begin with, and those of no other run at the same time.
            about: ``project``, ``version`` and ``config`` of the tasks.
            here: Predicts a page in this process.
            on_failure: Told each task that a worker could not predict, and why.
        """
        self.workers: dict[str, int] = {}
        self._pages = pages
        self._name = name
        self._about = about
        self._here = here
        self._on_failure = on_failure
        self._offers: list[_Offer] = []
        self._own: deque[Page] = deque()
        self._patience_s = TAKE_S
        self._heard = -math.inf  # when any worker has given its last sign of life
        self._over = False

    def predict(self, pages: Iterator[Page]) -> Iterator[tuple[Page, Answers]]:
        """
        Every page with its answers, as they come.

        Raises:
            QueueError: The queue cannot be reached at the start. If that is so later, pages are predicted here.
        """
        self._over = False
        self._pages.remove_all(self._name)  # what a run that was killed has left
        try:
            while True:
                answered = 0
                try:
                    self._offer(pages)
                    for answer in self._answered():
                        answered += 1
                        yield answer
                    self._take_back()
                except QueueError as error:
                    logger.warning("%s Pages are predicted here meanwhile.", error)
                    self._own.extend(offer.page for offer in self._offers)
                    self._offers.clear()
                if self._own:
                    page = self._own.popleft()
                    yield page, self._here(page)
                elif not self._offers and self._over:
                    return
                elif not answered:
                    time.sleep(LOOK_S)
        finally:
            self._forget()

    def _offer(self, pages: Iterator[Page]) -> None:
        """Keep some pages waiting for the next worker that has time."""
        while sum(offer.taken is None for offer in self._offers) < WAITING and len(self._offers) < MOST:
            page = next(pages, None)
            if page is None:
                self._over = True
                return
            self._lay_out(_Offer(page))

    def _lay_out(self, offer: _Offer) -> None:
        self._offers.append(offer)  # before anything can fail
        offer.key = self._pages.offer(self._name, self._about | {"tasks": offer.page})
        offer.turn, offer.at, offer.taken, offer.sign = offer.turn + 1, time.monotonic(), None, ""

    def _answered(self) -> Iterator[tuple[Page, Answers]]:
        offers, looked = list(self._offers), self._pages.look([each.key for each in self._offers])
        now = time.monotonic()  # once: the caller may import for minutes between two of them
        for offer, seen in zip(offers, looked, strict=True):
            if seen.sign != offer.sign:
                offer.sign, offer.heard, offer.taken = seen.sign, now, offer.taken or now
                self._heard, self._patience_s = now, TAKE_S
            if seen.answer is not None:
                answers = self._use(offer, seen)
                if answers is not None:
                    yield offer.page, answers
            elif offer.taken is not None and now > min(offer.heard + SILENT_S, offer.taken + ANSWER_S):
                self._lost(offer, "It has ended, or is stuck.")

    def _use(self, offer: _Offer, seen: Seen) -> Answers | None:
        answer = seen.answer or {}
        answers, failures = answer.get("answers"), answer.get("failures", [])
        if not isinstance(answers, list) or len(answers) != len(offer.page):
            self._lost(offer, str(answer.get("error", "Its answers are not as many as the tasks.")))
            return None
        self._pages.remove(offer.key)  # while it is an offer still, because this can fail
        self._offers.remove(offer)
        worker = _worker(seen.sign)
        self.workers[worker] = self.workers.get(worker, 0) + len(answers)
        for task, reason in failures:
            self._on_failure(task, reason)
        return answers

    def _lost(self, offer: _Offer, why: str) -> None:
        """Give a page to another worker, or predict it here if that was tried."""
        self._offers.remove(offer)
        logger.warning("The worker %s did not predict a page of tasks: %s", _worker(offer.sign), why)
        if offer.turn < TURNS:
            self._lay_out(offer)
        else:
            self._own.append(offer.page)

    def _take_back(self) -> None:
        """Predict here what no worker takes, and without waiting for it again as long as none takes any."""
        waiting = [offer for offer in self._offers if offer.taken is None]
        oldest = min((offer for offer in waiting), key=lambda offer: offer.at, default=None)
        if oldest is None or self._own or time.monotonic() < max(oldest.at, self._heard) + self._patience_s:
            return
        if self._pages.take(oldest.key) is None:  # a worker has it, and has not said so yet
            oldest.taken = oldest.heard = time.monotonic()
            return
        if self._patience_s:
            logger.info("No worker has taken a page in %.0f s, so it is predicted here.", TAKE_S)
        self._patience_s = 0.0
        self._offers.remove(oldest)
        self._own.append(oldest.page)

    def _forget(self) -> None:
        try:
            self._pages.remove_all(self._name)
        except QueueError as error:
            logger.warning("%s The next run removes what this one has left there.", error)


def _worker(sign: str) -> str:
    return sign.partition(" ")[0]
