"""
Pages of tasks that are predicted by all workers, and by the command itself where no worker has time for them.

A page is a row of the database, and a message in the queue only wakes a worker. Whoever claims a page has it, until it
is answered or its lease has run out. The worker that predicts it renews the lease, so the page of a worker that is
silent goes to another one, however the worker ended.
"""

from __future__ import annotations

import json
import logging
import math
import os
import secrets
import select
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from huey import Huey, crontab
from huey.signals import SIGNAL_INTERRUPTED

from celestial_backend.database import Database, Row, why
from celestial_backend.errors import StateError
from celestial_backend.jobs.processes import child_environ, death, is_dead, this_process

logger = logging.getLogger(__name__)

WRITE_S = 5.0  # for others that write; nobody waits for a page as for an answer to a request
SIGN_S = 2.0  # between two signs of life
LEASE_S = 15.0  # after which a worker that gives none is taken for dead
ANSWER_S = 900.0  # after which one that does is taken for stuck
END_S = 1.0  # for a process that is about to end
KEEP_S = 86_400.0  # pages whose command never came back
READY = 2  # pages that no worker has taken yet, so that each finds its next one
MOST = 32  # pages in memory, those that workers have included
TAKE_S = 10.0  # in which a page is taken or some worker gives a sign of life, unless all of them train
TURNS = 2  # of workers that lose a page; then it is predicted here
WAKE_S = 2.0  # between two looks whether messages were lost
LOOK_S = 0.2
PREDICT = "predict"  # the name of the queue's task
SEEN = "id, state, token, worker, lease, turn, answer"  # of a row; the page itself is its body
# A lease that ends later than any can is one from before a restart of the machine.
FREE = "turn < :turns AND (state = 'waiting' OR state = 'running' AND lease NOT BETWEEN :now AND :now + :lease_s)"
CLAIM = f"""UPDATE pages
    SET state = 'running', token = :token, worker = :worker, lease = :now + :lease_s, turn = turn + 1
    WHERE {FREE} AND id = (SELECT id FROM pages WHERE {FREE} ORDER BY seq LIMIT 1)
    RETURNING {SEEN}, body"""  # noqa: S608 - our own text
TAKEN = "Its command has ended, or has given it to another worker."
AS_SEEN = "WHERE id = :id AND state = :state AND token = :token"
Page = list[dict[str, Any]]
Answers = list[Any]
Done = tuple[Page, Answers, list[tuple[Any, str]]]  # the last are the tasks that failed, and why


class Pages:
    """
    The pages in the database, for those that offer them and for the workers; safe between threads.

    All methods but `predict`, `stop` and `wake` raise `StateError` where the database cannot be used.
    """

    def __init__(self, queue: Huey, database: Database) -> None:
        self._queue = queue
        self._database = database
        self._task = queue.task(name=PREDICT)(self.predict)
        queue.periodic_task(crontab(minute="0"), name="remove_old_pages")(self.remove_old)
        queue.signal(SIGNAL_INTERRUPTED)(lambda *_: self.stop())
        self._process = _PageProcess()
        self._claimed: dict[str, Row] = {}

    def offer(self, run: str, page: dict[str, Any]) -> Row:
        """Lay out a page for the workers, and wake one; what is seen of it, as in `look`."""
        offer = "INSERT INTO pages (id, run, state, lease, body) VALUES (:id, :run, 'waiting', :now, :body)"
        key = secrets.token_hex(8)
        with self._database.writing(key, WRITE_S) as to:
            (row,) = to.rows(f"{offer} RETURNING {SEEN}", id=key, run=run, now=to.now(), body=json.dumps(page))
        self.wake()
        return row

    def wake(self, enough: float = math.inf) -> None:
        """Put a message into the queue, unless enough are there; where that fails, the next one makes up for it."""
        try:
            there = sum(f'.{PREDICT}"'.encode() in bytes(each) for each in self._queue.storage.enqueued_items())
            if there < enough:
                self._queue.enqueue(self._task.s())
        except Exception as error:  # noqa: BLE001 - whatever the queue's client raises, the page is written down
            logger.warning("The queue cannot be reached (%s), so no worker is woken.", why(error))

    def look(self, run: str) -> dict[str, Row]:
        """What is seen of the pages of a run, by their ids; not the pages themselves."""
        rows = self._database.rows(f"SELECT {SEEN} FROM pages WHERE run = :run", run=run)  # noqa: S608 - our own text
        return {row["id"]: row for row in rows}

    def claim(self, worker: str) -> Row | None:
        """The page that has waited longest, which is this worker's from now on; None where none waits."""
        with self._database.writing("pages", WRITE_S) as to:
            return to.row(CLAIM, token=secrets.token_hex(8), worker=worker, now=to.now(), turns=TURNS, lease_s=LEASE_S)

    def renew(self, row: Row) -> bool:
        """Give a sign of life for a claimed page; False if it is not this worker's any more, as in `answer`."""
        return self._change("UPDATE pages SET lease = :now + :lease_s", row, lease_s=LEASE_S)

    def answer(self, row: Row, answer: str) -> bool:
        """Write down the answer to a claimed page: JSON with ``answers`` and ``failures``, or ``error``."""
        return self._change("UPDATE pages SET state = 'done', lease = :now, answer = :answer", row, answer=answer)

    def give_back(self, row: Row, turn: int) -> None:
        """Let a page wait again, as one that so many workers have tried, and wake one."""
        again = "UPDATE pages SET state = 'waiting', token = '', lease = :now, turn = :turn, answer = ''"
        self._change(again, row, turn=turn)
        self.wake()

    def take(self, row: Row) -> bool:
        """Take a page out, unless something has happened to it since it was seen."""
        return self._change("DELETE FROM pages", row, "AND lease = :lease", lease=row["lease"])

    def remove_all(self, run: str) -> None:
        """Remove all pages of a run."""
        with self._database.writing(run, WRITE_S) as to:
            to.run("DELETE FROM pages WHERE run = :run", run=run)

    def remove_old(self) -> None:
        """Remove the pages of commands that never came back."""
        with self._database.writing("pages", WRITE_S) as to:
            now = to.now()
            to.run("DELETE FROM pages WHERE lease NOT BETWEEN :first AND :last", first=now - KEEP_S, last=now + LEASE_S)

    def predict(self, *_: object) -> None:
        """What a worker does at a message, whatever that says: predict the page that has waited longest."""
        try:
            row = self.claim(this_process())
            if row is not None:
                self._claimed[row["id"]] = row
                try:
                    self._predict(row, time.monotonic() + ANSWER_S)
                finally:
                    del self._claimed[row["id"]]
        except StateError as error:
            logger.warning("A page of tasks was predicted in vain. %s", error)

    def stop(self) -> None:
        """Give back the pages that this worker has, as at a SIGTERM; they wait as if it had not begun with them."""
        for row in list(self._claimed.values()):
            with suppress(StateError):  # its lease runs out
                self.give_back(row, row["turn"] - 1)

    def _predict(self, row: Row, until: float) -> None:
        def meanwhile() -> None:
            if time.monotonic() > until:
                raise StateError(f"It takes longer than {ANSWER_S:g} s.")
            if not self.renew(row):
                raise StateError(TAKEN)

        if not self.answer(row, self._process.answer(row["body"], meanwhile)):
            raise StateError(TAKEN)

    def _change(self, change: str, row: Row, more: str = "", **values: Any) -> bool:
        mine = {name: row[name] for name in ("id", "state", "token")}
        with self._database.writing(row["id"], WRITE_S) as to:
            return to.run(f"{change} {AS_SEEN} {more}", now=to.now(), **mine, **values) == 1


class _PageProcess(threading.local):
    """
    The process in which a thread of a worker has its pages predicted, each in its own, started when one comes.

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


def _read(answer: str) -> dict[str, Any]:
    """An answer as it is used; one that is no answer counts as an error."""
    try:
        read = json.loads(answer)
    except ValueError:
        read = None
    return read if isinstance(read, dict) else {"error": "What came as an answer is none."}


@dataclass
class _Offer:
    """A page in the hands of the workers, and its row as it was seen last, which had changed at `heard`."""

    page: Page
    row: Row
    heard: float


class Distribution:
    """
    The pages of one run; for one thread.

    Attributes:
        workers: How many tasks each worker has predicted.
    """

    def __init__(
        self,
        pages: Pages,
        about: dict[str, Any],
        here: Callable[[Page], Answers],
        on_failure: Callable[[Any, str], None],
    ) -> None:
        """
        Args:
            pages: The database's.
            about: ``project``, ``version`` and ``config`` of the tasks; no other run of the project goes on meanwhile.
            here: Predicts a page in this process.
            on_failure: Told each task that a worker could not predict, and why.
        """
        self.workers: dict[str, int] = {}
        self._pages = pages
        self._run = str(about["project"])
        self._about = about
        self._here = here
        self._on_failure = on_failure
        self._offers: list[_Offer] = []
        self._own: deque[Page] = deque()
        self._patience_s = TAKE_S
        self._heard = self._woken = -math.inf  # when any worker has given a sign of life, and when one was woken
        self._over = False

    def predict(self, pages: Iterator[Page]) -> Iterator[tuple[Page, Answers]]:
        """
        Every page with its answers, as they come.

        Raises:
            StateError: The database cannot be used at the start. If that is so later, pages are predicted here.
        """
        self._over = False
        self._pages.remove_all(self._run)  # what a run that was killed has left
        try:
            while self._offers or self._own or not self._over:
                done: list[Done] = []
                try:
                    self._offer(pages)
                    self._collect(done)
                    self._take_back()
                except StateError as error:
                    logger.warning("%s Pages are predicted here meanwhile.", error)
                    self._own.extend(offer.page for offer in self._offers)
                    self._offers.clear()
                for page, answers, failures in done:
                    for task, reason in failures:
                        self._on_failure(task, reason)
                    yield page, answers
                if self._own:
                    page = self._own.popleft()
                    yield page, self._here(page)
                elif not done:
                    time.sleep(LOOK_S)
        finally:
            with suppress(StateError):  # the next run removes what this one has left
                self._pages.remove_all(self._run)

    def _offer(self, pages: Iterator[Page]) -> None:
        """Keep some pages waiting for the next worker that has time, and a message for each."""
        while len(self._waiting()) < READY and len(self._offers) < MOST and not self._over:
            page = next(pages, None)
            if page is None:
                self._over = True
                break
            self._own.append(page)  # before anything can fail
            if not self._offers:
                self._pages.remove_all(self._run)  # those that were given up while the database was away
            row = self._pages.offer(self._run, self._about | {"tasks": page})
            self._offers.append(_Offer(self._own.pop(), row, time.monotonic()))
        if time.monotonic() > self._woken + WAKE_S:
            self._woken = time.monotonic()
            self._pages.wake(len(self._waiting()))

    def _waiting(self) -> list[_Offer]:
        return [offer for offer in self._offers if offer.row["state"] == "waiting"]

    def _collect(self, done: list[Done]) -> None:
        """Look what has become of the offers; those that are done are none any more."""
        rows, now = self._pages.look(self._run), time.monotonic()
        for offer in list(self._offers):
            row = rows.get(offer.row["id"])
            if row is None:  # it was removed, as one that is too old is
                self._predict_here(offer)
                continue
            if row["lease"] != offer.row["lease"]:
                offer.row, offer.heard = row, now
                if row["state"] != "waiting":
                    self._heard, self._patience_s = now, TAKE_S
            if row["state"] == "done":
                self._use(offer, done)
            elif row["state"] == "running" and (is_dead(row["worker"]) or now > offer.heard + LEASE_S):
                self._lost(offer, "It has ended, or is stuck.")

    def _use(self, offer: _Offer, done: list[Done]) -> None:
        answer = _read(offer.row["answer"])
        answers, failures = answer.get("answers"), answer.get("failures", [])
        if not isinstance(answers, list) or len(answers) != len(offer.page):
            self._lost(offer, str(answer.get("error", "Its answers are not as many as the tasks.")))
            return
        self._pages.take(offer.row)  # while it is an offer still, because this can fail
        self._offers.remove(offer)
        worker = _name(offer.row)
        self.workers[worker] = self.workers.get(worker, 0) + len(answers)
        done.append((offer.page, answers, failures))

    def _lost(self, offer: _Offer, why: str) -> None:
        """Give a page to another worker, or predict it here if that was tried."""
        logger.warning("The worker %s did not predict a page of tasks: %s", _name(offer.row), why)
        if offer.row["turn"] < TURNS:
            self._pages.give_back(offer.row, offer.row["turn"])
        elif self._pages.take(offer.row):
            self._predict_here(offer)

    def _take_back(self) -> None:
        """Predict here what no worker takes, and without waiting for it again as long as none takes any."""
        oldest = next(iter(self._waiting()), None)
        if oldest is None or self._own or time.monotonic() < max(oldest.heard, self._heard) + self._patience_s:
            return
        if self._pages.take(oldest.row):  # else a worker has it by now
            if self._patience_s:
                logger.info("No worker has taken a page in %.0f s, so it is predicted here.", TAKE_S)
            self._patience_s = 0.0
            self._predict_here(oldest)

    def _predict_here(self, offer: _Offer) -> None:
        self._offers.remove(offer)
        self._own.append(offer.page)


def _name(row: Row) -> str:
    """The worker that has a page, for people: the names of its machine and of its process."""
    return ":".join(row["worker"].split(":")[:2])
