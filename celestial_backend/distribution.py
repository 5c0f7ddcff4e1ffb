"""Pages of tasks that are predicted by all workers, and here where no worker has time for them."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from celestial_backend.pages import Pages, QueueError, Seen

logger = logging.getLogger(__name__)

WAITING = 2  # pages that no worker has taken yet, so that each finds its next one
MOST = 32  # pages in memory, those that workers have included
TAKE_S = 10.0  # in which a page is taken or some worker gives a sign of life, unless all of them train
SILENT_S = 15.0  # after which a worker that gives no sign of life is taken for dead
ANSWER_S = 900.0  # after which one that does is taken for stuck
TURNS = 2  # of workers that lose a page; then it is predicted here
LOOK_S = 0.2

Page = list[dict[str, Any]]
Answers = list[Any]


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
