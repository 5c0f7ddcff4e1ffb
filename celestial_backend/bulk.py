"""
Predictions for a whole project: tasks read page by page, predicted, and imported in bulk.

Label Studio makes a second prediction of the same version without a word, and goes on with
an import whose sender has died. So what tasks hold is read again right before each import,
and a note says which import is on its way, for the run after one that was killed.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from celestial_backend.distribution import Answers, Distribution, Page
from celestial_backend.errors import ModelError, StateError
from celestial_backend.jobs import HOW_TO_START, worker_lives
from celestial_backend.outbox import FailureList, Outbox
from celestial_backend.pending import Conditions, ImportFailedError, PendingTasks, Rows
from celestial_backend.processes import lock
from celestial_backend.project import PAGE, PATIENCE_S
from celestial_backend.studio import ANSWER_TIMEOUT_S
from celestial_backend.wiring import Services

logger = logging.getLogger(__name__)

SETTLE_S = ANSWER_TIMEOUT_S  # an import without an answer gets as long as its answer would have had
LOOK_S = 0.5
Note = Callable[["Summary"], None]


@dataclass
class Summary:
    """
    How far a run is, in tasks.

    Attributes:
        already: Held a prediction of the version before.
        wanted: Are to be predicted in this run.
        meanwhile: Were wanted, and were predicted by others, labelled or deleted before their import.
        workers: How many each worker was through with, where they were distributed.
    """

    project: str
    version: str
    already: int = 0
    wanted: int = 0
    predicted: int = 0
    failed: int = 0
    meanwhile: int = 0
    seconds: float = 0.0
    workers: dict[str, int] = field(default_factory=dict)

    @property
    def done(self) -> int:
        """The wanted tasks that the run is through with, one way or the other."""
        return self.predicted + self.failed + self.meanwhile


class Prelabelling:
    """
    One run over a project's tasks, which may be killed at any moment and started again.

    Memory holds one page of tasks at a time, or with `distribute` those that the workers have.
    """

    def __init__(
        self,
        services: Services,
        project_id: str,
        *,
        conditions: Conditions = Conditions(),  # noqa: B008 - immutable
        only_unlabelled: bool = False,
        limit: int | None = None,
        rate: float | None = None,
        failures: Path | None = None,
        distribute: bool = False,
    ) -> None:
        self._services = services
        self._project = project_id
        self._limit = math.inf if limit is None else limit
        self._rate = rate
        self._distribute = distribute
        work = services.settings.model_dir / "work"
        self._lock, self._outbox = work / f"prelabel-{project_id}.lock", Outbox(work / f"prelabel-{project_id}.sent")
        listed = failures or services.settings.model_dir / f"prelabel-{project_id}-failures.jsonl"
        self.failures = FailureList(listed)
        version = services.store.live_tag(project_id)
        tags = [model.tag for model in services.store.registry.models()]
        exact = not any(version.lower() in tag.lower() for tag in tags if tag != version)
        self._tasks = PendingTasks(
            services.studio, project_id, version, conditions, only_unlabelled=only_unlabelled, exact=exact
        )
        self.summary = Summary(project_id, version)

    def plan(self) -> Summary:
        """Count what there is to do, and do nothing."""
        fitting, pending = self._tasks.count()
        self.summary.already = fitting - pending
        self.summary.wanted = int(min(pending, self._limit))
        return self.summary

    def run(self, on_progress: Note | None = None) -> Summary:
        """
        Give every pending task its prediction.

        Args:
            on_progress: Called with the summary as it is after each page.

        Raises:
            CelestialError: Nothing more could be done; what is done stays, and the next run goes on from there.
        """
        with lock(self._lock) as held:
            if held is None:
                raise StateError(
                    f"One prelabel at a time may run on a project, and another one runs on project {self._project}."
                    " Wait until it has ended."
                )
            if self._distribute and not worker_lives(self._services.settings.model_dir):
                raise StateError(f"--distribute needs a worker, and none runs on this MODEL_DIR. {HOW_TO_START}")
            started = time.monotonic()
            config = self._tasks.label_config()
            self._services.store.current(self._project)
            self._services.predictor.check(config, self._project)
            self._settle()
            self.plan()
            self.failures.clear()
            for page, answers in self._answered(config):
                self._import(self._rows(page, answers))
                self.summary.seconds = time.monotonic() - started
                if on_progress is not None:
                    on_progress(self.summary)
                self._keep_pace()
            self.summary.seconds = time.monotonic() - started
            return self.summary

    def select_version(self) -> list[str]:
        """Make the project show these predictions; sentences that say what was found and changed."""
        if not self.summary.predicted + self.summary.already + self.summary.meanwhile:
            return []  # Label Studio refuses a version of which a project has no prediction
        return self._tasks.select()

    def _pages(self) -> Iterator[Page]:
        left = self._limit
        for page in self._tasks.pages(min(PAGE, math.ceil(self._rate)) if self._rate else PAGE):
            if left < len(page):
                page = page[: int(left)]
            left -= len(page)
            if page:
                yield page
            if left <= 0:
                return

    def _answered(self, config: str) -> Iterator[tuple[Page, Answers]]:
        """Every page with its answers, predicted here or by the workers."""

        def here(page: Page) -> Answers:
            return self._services.predictor.predict(page, config, project=self._project, on_failure=self._fail)

        if not self._distribute:
            yield from ((page, here(page)) for page in self._pages())
            return
        about = {"project": self._project, "version": self.summary.version, "config": config}
        pages = self._services.jobs.pages
        distribution = Distribution(pages, f"prelabel-{self._project}-", about, here, self._fail)
        self.summary.workers = distribution.workers
        yield from distribution.predict(self._pages())

    def _rows(self, page: Page, answers: Answers) -> Rows:
        versions = {answer["model_version"] for answer in answers if answer} - {self.summary.version}
        if versions:
            raise ModelError(
                f"The live model of project {self._project} changed from {self.summary.version} to {versions.pop()}"
                " while its tasks were predicted. Run prelabel again, and all tasks get predictions of the new one."
            )
        return {task["id"]: answer for task, answer in zip(page, answers, strict=True) if answer}

    def _import(self, rows: Rows) -> None:
        """Import each prediction whose task still has none; each once, whatever happens on the way."""
        deadline, sent = time.monotonic() + PATIENCE_S, False
        while rows:
            still = self._tasks.still(list(rows))
            if sent:  # without an answer: what is not pending any more is what has landed
                self.summary.predicted += len(rows) - len(still)
            else:
                self.summary.meanwhile += len(rows) - len(still)
            rows = {task: row for task, row in rows.items() if task in still}
            if not rows:
                return
            try:
                self._sent(rows)
            except ImportFailedError as failure:
                if failure.refused:
                    self._import_halves(rows, failure)
                    return
                if not failure.may_pass or time.monotonic() >= deadline:
                    raise
                logger.warning("%s Looking what has come of it, and trying again.", failure)
                self._settle()
                sent = True
            else:
                return

    def _sent(self, rows: Rows) -> None:
        self._outbox.note(self.summary.version, next(iter(rows)))
        try:
            created = self._tasks.send(rows)
        except ImportFailedError as failure:
            if not failure.may_pass:
                self._outbox.strike()
            raise
        self._outbox.strike()
        dropped = self._tasks.still(list(rows)) if created < len(rows) else set()
        self.summary.predicted += len(rows) - len(dropped)
        for task in dropped:
            self._fail(task, "Label Studio did not take the prediction. Look whether its label config has changed.")

    def _import_halves(self, rows: Rows, failure: ImportFailedError) -> None:
        """Find the prediction for which Label Studio refuses all others that come with it."""
        if len(rows) == 1:
            self._fail(next(iter(rows)), str(failure))
            return
        pairs, middle = list(rows.items()), len(rows) // 2
        self._import(dict(pairs[:middle]))
        self._import(dict(pairs[middle:]))

    def _settle(self) -> None:
        """Wait until an import that was on its way has landed, or can land no more."""
        sent = self._outbox.sent()
        if sent is None:
            return
        left = min(sent.at, time.time()) + SETTLE_S - time.time()
        until = time.monotonic() + left  # the clock may be moved while this waits
        if sent.version == self.summary.version:
            logger.info("An import was sent and has no answer; waiting %.0f s at most for it to land", SETTLE_S)
            while time.monotonic() < until and not self._tasks.holds(sent.task):
                time.sleep(LOOK_S)
        self._outbox.strike()

    def _keep_pace(self) -> None:
        if self._rate:
            time.sleep(max(0.0, self.summary.done / self._rate - self.summary.seconds))

    def _fail(self, task: object, reason: str) -> None:
        self.summary.failed += 1
        self.failures.add(task, reason)
