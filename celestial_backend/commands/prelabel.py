"""
The command that gives all tasks of a project their predictions, without Label Studio's time limit.

Tasks are read page by page, predicted, and imported in bulk. Label Studio makes a second prediction of the same
version without a word, and goes on with an import whose sender has died. So what tasks hold is read again right
before each import, and a note says which import is on its way, for the run after one that was killed.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import click

from celestial_backend.commands.shown import Shown
from celestial_backend.errors import CelestialError, ModelError, StateError
from celestial_backend.jobs.pages import Answers, Distribution, Page
from celestial_backend.jobs.processes import lock
from celestial_backend.jobs.trainings import HOW_TO_START
from celestial_backend.services import Services, build
from celestial_backend.settings import NEEDS_LABELS, Settings
from celestial_backend.state import replace_text
from celestial_backend.studio.client import ANSWER_TIMEOUT_S
from celestial_backend.studio.pending import Conditions, ImportFailedError, PendingTasks, Rows, read_filter
from celestial_backend.studio.project import PAGE, PATIENCE_S, StudioProject

logger = logging.getLogger(__name__)
SETTLE_S = ANSWER_TIMEOUT_S  # an import without an answer gets as long as its answer would have had
LOOK_S = 0.5
Note = Callable[["Summary"], None]


@dataclass(frozen=True)
class Sent:
    """An import: the version of its predictions, one of its tasks, and when it was sent, in seconds since 1970."""

    version: str
    task: int
    at: float


class Outbox:
    """The one import of a run that may be on its way; what is noted outlives the run. All raise `StateError`."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def note(self, version: str, task: int) -> None:
        """Write down that an import is on its way; one of its tasks is enough, because all land or none."""
        with _written(self._path):
            replace_text(self._path, json.dumps(asdict(Sent(version, task, time.time()))))

    def sent(self) -> Sent | None:
        """The import that was noted last and not struck out."""
        try:
            with _written(self._path):
                return Sent(**json.loads(self._path.read_text())) if self._path.exists() else None
        except (ValueError, TypeError) as error:
            raise StateError(
                f"{self._path.name} must tell of an import and does not ({type(error).__name__}). Wait a minute, for an"
                f" import that may be on its way, remove {self._path} and run prelabel again."
            ) from error

    def strike(self) -> None:
        """Forget the import: it has landed, or can land no more."""
        with _written(self._path):
            self._path.unlink()


class FailureList:
    """The tasks that failed and why, one JSON object a line; the file is there only if there are any."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def clear(self) -> None:
        """Begin anew."""
        with _written(self.path):
            self.path.unlink(missing_ok=True)

    def add(self, task: object, reason: str) -> None:
        """Add a task."""
        with _written(self.path), self.path.open("a") as file:
            file.write(json.dumps({"task": task, "reason": reason}, ensure_ascii=False) + "\n")


@contextmanager
def _written(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StateError(
            f"{path.name} cannot be written ({error.strerror}). See that its folder belongs to this user and that its"
            " disk has space, and run prelabel again; or give another file with --failures, if it is that one."
        ) from error


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
        self._all = limit is None and not conditions.items  # that are to be labelled
        self._rate = rate
        self._distribute = distribute
        state = services.settings.state
        self._lock, self._outbox = state.prelabel_lock(project_id), Outbox(state.prelabel_sent(project_id))
        self.failures = FailureList(failures or state.prelabel_failures(project_id))
        version = self._version()
        tags = [model.tag for model in services.store.registry.models()]
        exact = not any(version.lower() in tag.lower() for tag in tags if tag != version)
        self._tasks = PendingTasks(
            services.studio, project_id, version, conditions, only_unlabelled=only_unlabelled, exact=exact,
            truths=services.settings.planted_share > 0,
        )  # fmt: skip
        self.summary = Summary(project_id, version)
        self._unplaced: Mapping[int, str] = {}  # tasks that have no place in the order, and why

    def _version(self) -> str:
        """The live model's tag; where tasks are put in order, `NEEDS_LABELS` as long as nothing can be predicted."""
        if not self._services.order.is_kept:
            return self._services.store.live_tag(self._project)
        config = StudioProject(self._services.studio, self._project).label_config()
        return self._services.predictor.version(config, self._project)

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
                    " Wait until it has ended. With CELESTIAL_SCORE=margin or typical, the worker runs it by itself."
                )
            if self._distribute and not self._services.jobs.ledger.workers():
                raise StateError(f"--distribute needs a worker, and none runs on this database. {HOW_TO_START}")
            started = time.monotonic()
            config = self._tasks.label_config()
            self._services.store.current(self._project)
            self._services.predictor.check(config, self._project)
            version = self._services.predictor.version(config, self._project)
            if version == NEEDS_LABELS and version != self.summary.version:
                raise ModelError(
                    f"{self.summary.version} knows no choice of project {self._project} yet. Label a few pictures of "
                    "each choice, wait for the training, and run prelabel again."
                )
            self._settle()
            self.plan()
            if self._services.order.is_kept and self.summary.wanted:
                self._unplaced = self._services.arrange(self._project)
            self.failures.clear()
            for page, answers in self._answered(config):
                self._import(self._rows(page, answers, config))
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
        return self._tasks.select(self.summary.failed if self._all else 0)

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

        if not self._distribute or self.summary.version == NEEDS_LABELS:  # then there is nothing to predict
            yield from ((page, here(page)) for page in self._pages())
            return
        about = {"project": self._project, "version": self.summary.version, "config": config}
        distribution = Distribution(self._services.jobs.pages, about, here, self._fail)
        self.summary.workers = distribution.workers
        yield from distribution.predict(self._pages())

    def _rows(self, page: Page, answers: Answers, config: str) -> Rows:
        versions = {answer["model_version"] for answer in answers if answer} - {self.summary.version}
        if versions:
            raise ModelError(
                f"The live model of project {self._project} changed from {self.summary.version} to {versions.pop()}"
                " while its tasks were predicted. Run prelabel again, and all tasks get predictions of the new one."
            )
        rows: Rows = {}
        for task, said, shown in zip(page, answers, self._services.shown(page, answers, self._project, config),
                                     strict=True):  # fmt: skip
            if shown:
                rows[task["id"]] = shown
            elif self.summary.version == NEEDS_LABELS:
                self._fail(task["id"], self._unplaced.get(task["id"], "It came while the others were put in order."))
            elif said:
                self._fail(task["id"], "What is held back of it cannot be written down. Run prelabel again.")
        return rows

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


@click.command(short_help="Predict all tasks of a project, however many.")
@click.option(
    "--project", type=click.IntRange(min=1), required=True, help="Label Studio's number of the project."
)  # fmt: skip
@click.option("--only-unlabelled", is_flag=True, help="Only tasks that nobody has labelled.")
@click.option("--limit", type=click.IntRange(min=1), help="At most this many tasks.")
@click.option("--filter", "filters", metavar="JSON", help="Only tasks that fit these filters of the Data Manager.")
@click.option("--rate", type=click.FloatRange(min=0, min_open=True), help="At most this many tasks per second.")
@click.option(
    "--failures",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Where failed tasks are listed, one JSON object a line.  [default: a file in the state folder]",
)
@click.option("--distribute", is_flag=True, help="Let all workers predict, on other machines too.")
@click.option("--dry-run", is_flag=True, help="Only count the tasks.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.pass_obj
def prelabel(
    settings: Settings,
    project: int,
    limit: int | None,
    filters: str | None,
    rate: float | None,
    failures: Path | None,
    *,
    only_unlabelled: bool,
    distribute: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """
    Give every task of a project a prediction of its live model.

    Tasks that have one are skipped, so a run that was ended can be started again. The exit code is 1 if tasks failed.
    """
    run = Prelabelling(
        build(settings),
        str(project),
        conditions=read_filter(filters) if filters else Conditions(),
        only_unlabelled=only_unlabelled,
        limit=limit,
        rate=rate,
        failures=failures,
        distribute=distribute,
    )
    if dry_run:
        at = run.plan()
        click.echo(json.dumps(asdict(at)) if as_json else f"{at.wanted} tasks would get a prediction of {at.version}"
                   f", {at.already} have one.")  # fmt: skip
        return
    with Shown(f"Predicting project {project}") as shown:
        at = run.run(lambda at: shown(at.done, at.wanted, words=f"{_pace(at)}, {at.failed} failed"))
    for sentence in run.select_version():
        click.echo(sentence, err=True)
    listed = str(run.failures.path) if at.failed else None
    click.echo(json.dumps(asdict(at) | {"failures": listed}) if as_json else _told(at, listed))
    if at.failed:
        sys.exit(CelestialError.exit_code)


def _told(at: Summary, listed: str | None) -> str:
    said = f"{at.predicted} tasks got a prediction of {at.version} in {at.seconds:.0f} s ({_pace(at)})"
    said += f", {sum(at.workers.values())} of them by {len(at.workers)} workers" if at.workers else ""
    said += f", {at.already} had one" if at.already else ""
    said += f", {at.meanwhile} were predicted, labelled or deleted by others meanwhile" if at.meanwhile else ""
    return said + (f". {at.failed} failed; {listed} says why." if listed else ".")


def _pace(at: Summary) -> str:
    return f"{at.done / at.seconds:.0f} per second" if at.seconds else "0 per second"
