"""
Trainings, from the request to the end: written down, queued, run one at a time for each project.

The ledger is the truth, and the queue (Huey, on SQLite or on Redis) only wakes a
worker. Each training runs in a process of its own, so that its memory goes with it,
its time can be bounded, and nothing that has loaded TensorFlow is ever forked. A
lock on a file, which the kernel frees when its holders die, tells a training that
runs from one whose worker was killed.

A person asks for a training, or a look at the labels does. An event only counts labels,
in milliseconds; the worker then asks Label Studio itself, and does so every minute too,
as events may be lost or never sent. It looks in a thread of its own, so that a Label
Studio that is silent holds up no training.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from huey import Huey, crontab
from huey.signals import SIGNAL_INTERRUPTED

from celestial_backend.errors import CelestialError, LabelConfigError, ProjectGoneError, RequestError, StateError
from celestial_backend.jobs import counting
from celestial_backend.jobs.endings import STUDIO_S, Endings
from celestial_backend.jobs.ledger import (
    FAILED,
    KNOWN_MAX,
    PUBLISHED,
    RUNNING,
    WAITING,
    WAITING_MAX,
    Job,
    Known,
    Ledger,
)
from celestial_backend.jobs.pages import Pages
from celestial_backend.jobs.processes import child_environ, death, is_shown, lock, show_life
from celestial_backend.jobs.queue import make_queue
from celestial_backend.models.store import ModelStore
from celestial_backend.settings import MODEL_NAME, NEVER, Settings, is_project, no_project, project_of
from celestial_backend.state import StateFolder
from celestial_backend.studio.client import Studio
from celestial_backend.studio.client import moment as read_moment
from celestial_backend.studio.project import StudioProject

logger = logging.getLogger(__name__)

WAKE_S = 0.2  # how long a request waits for the queue: Label Studio gives /webhook one second, the ledger 0.7
START_S = 3.0  # in which a training ends itself whose worker was killed
LOOK_S = 30.0  # while a worker trains, the looks of every minute pile up
LOOKS_S = 10.0  # in which a worker begins to look at labels, at a message and in a minute; the others have their turn
SLOW_S, REST, REST_MAX_S = 2.0, 2, 10.0  # a look that took longer is not repeated before so many times as long
TIDY_S = 20.0  # for which old predictions are removed, and for which Label Studio is left alone then
AGAIN_S = 3600.0  # a training that failed while Label Studio was away is asked for again after this long
KNOW_S = 60.0  # a project is written down as known no more often than this
KNOW_WAIT_S = 0.1  # for the list of jobs, where /setup and /webhook look a project up in it
IMPORTED = "TASKS_CREATED"  # an event of Label Studio
TRAIN = "train"  # the name of the queue's task
MESSAGES = 4  # of that task in the queue; whoever takes one puts in the next
EMBEDDED = f"{MODEL_NAME}:default-"
NOBODY_TO_ASK = "Labels are read from Label Studio, which needs LABEL_STUDIO_URL and LABEL_STUDIO_API_KEY. Set both."
PRESS = "no training begins by itself before Start Training was pressed once."
HOW_TO_START = "Start the backend, or a worker: huey_consumer celestial_backend.worker.huey. Mind the same MODEL_DIR."


def worker_lives(model_dir: Path) -> bool:
    """
    Whether a worker runs on a state folder; each holds a lock for its life.

    Raises:
        StateError: The folder cannot be used.
    """
    return is_shown(StateFolder(model_dir).worker_lock)


class Jobs:
    """The trainings of all projects; safe between threads, and nothing is opened before it is asked for."""

    def __init__(self, settings: Settings, store: ModelStore, studio: Studio) -> None:
        self.ledger = Ledger(settings.model_dir)
        self.endings = Endings(settings, self.ledger, store, studio)
        self._looker = _Looker(settings, store, studio)
        self._settings = settings
        self._studio = studio
        self._store = store
        self._hasty = Ledger(settings.model_dir, KNOW_WAIT_S)
        self._known: dict[str, float] = {}  # projects, and when they were written down
        self._too_many_known = False
        self._opening = threading.Lock()
        self._huey: Huey | None = None
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._stopping = threading.Event()
        self._looked = -LOOK_S
        self._gate = threading.Lock()
        self._rounds: set[bool] = set()  # of looks that are asked for: at labels that want one, and at all
        self._looking = False
        self._resting: dict[str, float] = {}  # projects whose labels took long to read, and until when they rest
        self._timer: threading.Timer | None = None
        self._troubles: dict[str, str] = {}  # of projects whose labels could not be read

    def request(self, project: str) -> dict[str, Any]:
        """
        Accept a training that a person asks for; from now on it is run, or shown as failed with its reason.

        Raises:
            RequestError: The project has no number.
            BusyError: Too many projects wait; nothing was accepted.
            StateError: It could not be written down; nothing was accepted.
        """
        if not is_project(project):
            raise RequestError(no_project(project))
        return self._accepted(self.ledger.request(project, pressed=True))

    def note_labels(self, project: str, count: int) -> dict[str, Any]:
        """Count new or changed labels of a project, and wake a worker where they may be enough for a training."""
        if self.ledger.note_labels(project, count, self._wants_look):
            self._wake(1, wait_s=0)
        return {"state": "counted"}

    def missing(self, project: str) -> str:
        """What labels a project lacks before anything can be learned, as a sentence; "" if none. Never raises."""
        if not self._looker.can_ask:
            return NOBODY_TO_ASK
        known = None
        with contextlib.suppress(StateError):
            known = self._hasty.known(project) if is_project(project) else None
        if known is None or known.missing is None:
            return f"{counting.LEAST.capitalize()}."
        return known.missing

    def know(self, project: str) -> None:
        """
        Remember a project whose /setup was accepted: its labels are looked at when no event comes. Never raises.

        One that was forgotten is remembered again a minute later, as Label Studio repeats its /setup.
        """
        now = time.monotonic()
        if not is_project(project) or now < self._known.get(project, -math.inf) + KNOW_S:
            return
        with contextlib.suppress(StateError):
            fresh = self._hasty.known(project) is None
            if self._hasty.know(project):
                if fresh:
                    self._wake(1, wait_s=0)
            elif not self._too_many_known:
                self._too_many_known = True
                logger.warning("%d projects are remembered, and no more are. Any other trains at its button alone.",
                               KNOWN_MAX)  # fmt: skip
            if len(self._known) >= KNOWN_MAX:
                self._known.clear()
            self._known[project] = now

    def note_event(self, project: str, action: str) -> None:
        """
        Remember for `doctor` that an event of a project's webhook came just now. Never raises.

        Only for a project that is known, has a job or a model of its own: strangers leave nothing behind.
        """
        if action == "START_TRAINING" or not is_project(project):  # which Label Studio sends past the webhook
            return
        file = self._settings.state.event(project)
        with contextlib.suppress(CelestialError, OSError):
            known = self._hasty.knows(project)
            if file.exists() or known or self._store.pointers.read(project) is not None:
                file.parent.mkdir(parents=True, exist_ok=True)
                file.touch()
            if known and action == IMPORTED and self._hasty.note_labels(project, 0, lambda _: True):
                self._wake(1, wait_s=0)  # tasks may be imported with labels, of which no other event tells

    @property
    def huey(self) -> Huey:
        """The queue, with its tasks; made once, whichever thread asks first."""
        with self._opening:
            if self._huey is None:
                self._huey = self._opened()
            return self._huey

    def _opened(self) -> Huey:
        queue = make_queue(self._settings)
        self._train_task = queue.task(name=TRAIN)(self.run_next)
        queue.periodic_task(crontab(), name="look_after")(self.look_after)
        queue.on_startup(name="show_life")(self._show_life)
        queue.on_startup(name="look_after")(self._look_first)
        queue.signal(SIGNAL_INTERRUPTED)(lambda *_: self.stop())
        self._pages = Pages(queue)
        return queue

    @property
    def pages(self) -> Pages:
        """The pages of tasks that workers predict."""
        self.huey  # noqa: B018 - makes them
        return self._pages

    def run_next(self, *_: object) -> None:
        """
        Run the job that has waited longest, of those no other worker is at; where none does, have labels looked at.

        Whatever the message says that brought the worker here; those of older releases name a project.
        """
        if not self._run_waiting():
            self._look_beside(wanted=True)

    def run(self, project: str) -> bool:
        """Run the job that waits for a project, and say whether one did; not while another worker is at one."""
        with self._lock(project) as held:
            if held is None or self._stopping.is_set():
                return False
            self._recover(project)
            job = self.ledger.start(project)
            if job is None:
                return False
            self._pass_on()
            self._train(job, held)
            ended = self.ledger.job(job.id)
            if ended is not None and ended.gone:
                self._forget(project)
        if ended is not None and ended.state == PUBLISHED and not self._settings.keep_predictions:
            threading.Thread(target=self._tidy, args=(project,), name="tidy", daemon=True).start()
        self._pass_on()
        return True

    def look(self, project: str) -> None:
        """
        Ask Label Studio for a project's labels, and for a training if they are enough; write down what is missing.

        Not while a training waits or runs, which reads all labels itself, nor while another worker looks.

        Raises:
            CelestialError: Label Studio did not say, or there is no model; all is as before.
        """
        begun = time.monotonic()
        rest = self._resting.get(project, -math.inf) - begun
        if rest > 0:
            self._wake_later(rest)
            return
        file = self._settings.state.look_lock(project)  # a training waits for no look
        with lock(file) as mine:
            if mine is None:
                return
            try:
                self._look(project)
            except ProjectGoneError:
                with self._lock(project) as held:
                    if held is not None:
                        self._forget(project)
            finally:
                file.unlink(missing_ok=True)
        spent = time.monotonic() - begun
        if spent > SLOW_S:
            self._resting[project] = begun + spent + min(REST * spent, REST_MAX_S)

    def look_after(self, patience_s: float = 0.0) -> None:
        """
        Bring everything that was accepted to its end; run at the start of a worker and every minute.

        A training whose worker died waits again, what waits is queued again, and Label Studio is
        asked, beside all that, for the labels whose events were lost.

        Args:
            patience_s: How long to wait for a training that may be about to end with its worker.
        """
        if time.monotonic() < self._looked + LOOK_S:
            return
        for job in self.ledger.jobs(states=(RUNNING,)):
            with (
                _apart(f"The training of project {job.project} cannot be looked after"),
                self._lock(job.project, patience_s) as held,
            ):
                if held is not None:
                    self._recover(job.project)
        self._pass_on()
        self._look_beside(wanted=False)
        self._looked = time.monotonic()

    def stop(self) -> None:
        """End the trainings of this worker, as at a SIGTERM; they wait again, as if they had not been begun."""
        self._stopping.set()
        for job_id, process in list(self._processes.items()):
            process.kill()
            process.wait()
            if job := self.ledger.job(job_id):
                self.endings.settle(job, "", begun=False)

    def _show_life(self) -> None:
        show_life(self._settings.state.worker_lock)

    def _look_first(self) -> None:
        """Look, and be patient, beside what the worker does: another one may be at a training of which it knows."""
        threading.Thread(target=self.look_after, args=(START_S,), name="look", daemon=True).start()

    def _accepted(self, job: Job) -> dict[str, Any]:
        if job.requests == 1:  # what was merged into a job waits with it
            self._wake(MESSAGES)
        return {"job": job.id, "state": job.state, "requests": job.requests}

    def _pass_on(self) -> None:
        """Wake another worker where more jobs wait, or labels want a look."""
        with contextlib.suppress(StateError):  # the next look makes up for it
            waiting = len(self.ledger.jobs(states=(WAITING,), limit=MESSAGES)) or bool(self.ledger.looks(wanted=True))
            if waiting:
                self._wake(waiting)

    def _wake(self, enough: int, wait_s: float = WAKE_S) -> None:
        """Wake a worker, in the background if it takes long; where that fails, he finds in the ledger what waits."""
        ringing = threading.Thread(target=self._enqueue, args=(enough,), name="wake", daemon=True)
        ringing.start()
        ringing.join(wait_s)

    def _wake_later(self, seconds: float) -> None:
        """Wake a worker once a project has rested; one timer at a time, as it looks at all that want it."""
        if self._timer is None or not self._timer.is_alive():
            self._timer = threading.Timer(seconds, self._wake, (1,))
            self._timer.daemon = True
            self._timer.start()

    def _enqueue(self, enough: int) -> None:
        """Put a message into the queue, unless enough are there."""
        try:
            there = sum(f'.{TRAIN}"'.encode() in bytes(message) for message in self.huey.storage.enqueued_items())
            if there < enough:
                self.huey.enqueue(self._train_task.s())
        except Exception as error:  # noqa: BLE001 - whatever the queue's client raises, the request is written down
            logger.warning("The queue cannot be reached (%s); the worker looks at the list of jobs every minute.",
                           type(error).__name__)  # fmt: skip

    def _train(self, job: Job, held: IO[bytes]) -> None:
        logger.info("Job %s trains project %s, attempt %d", job.id, job.project, job.attempts)
        command = [sys.executable, "-m", "celestial_backend.worker.training", job.id, str(os.getpid())]
        # It keeps the lock too, so the lock is free only when both are gone.
        process = subprocess.Popen(  # noqa: S603 - our own module
            command, pass_fds=[held.fileno()], env=child_environ(), stdin=subprocess.DEVNULL, start_new_session=True
        )
        self._processes[job.id] = process
        limit, in_time = self._settings.train_max_s, True
        deadline = time.monotonic() + limit
        self._mark(job.project)
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            in_time = False
        del self._processes[job.id]
        if not self._stopping.is_set():
            late = f"It took longer than the {limit:g} seconds of CELESTIAL_TRAIN_MAX_S."
            self.endings.settle(job, death(process.returncode) if in_time else late, again=in_time)

    def _run_waiting(self) -> bool:
        for job in reversed(self.ledger.jobs(states=(WAITING,))):
            with _apart(f"The training of project {job.project} cannot be run"):
                if self.run(job.project):
                    return True
        return False

    def _recover(self, project: str) -> None:
        """See to a job that is said to run, while its lock is ours: its worker is gone."""
        for job in self.ledger.jobs(project, (RUNNING,)):
            self.endings.settle(job, "Its worker was ended while it ran.")

    def _mark(self, project: str) -> None:
        """Remember which labels there are as a training begins."""
        with _apart(f"The labels of project {project} cannot be counted"):
            self.ledger.trained(project, *StudioProject(self._studio, project, patience_s=0).labels_now())

    def _wants_look(self, known: Known) -> bool:
        """Whether labels that came may bring a training about, or change what is missing; Label Studio knows."""
        if known.missing != "":
            return True
        every = self._settings.train_every
        enough = counting.enough_new(known.trained_labels or 0, every)
        return every != NEVER and not known.brought and known.labels >= enough

    def _look_beside(self, *, wanted: bool) -> None:
        """Have labels looked at in a thread of its own, one round after the other; who asks does not wait for it."""
        with self._gate:
            self._rounds.add(wanted)
            if not self._looking:
                self._looking = True
                threading.Thread(target=self._look_on, name="look", daemon=True).start()

    def _look_on(self) -> None:
        """Look as long as rounds are asked for; what they find wakes a worker."""
        while True:
            with self._gate:
                if not self._rounds:
                    self._looking = False
                    return
                wanted = self._rounds.pop()
            with _apart("Labels cannot be looked at"):
                self._look_round(wanted=wanted)
            if not wanted:
                self._pass_on()

    def _look_round(self, *, wanted: bool) -> None:
        """Look at the labels of all projects, or of those that want it, while there is time and somebody to ask."""
        deadline = time.monotonic() + LOOKS_S
        for project in self.ledger.looks(wanted=wanted) if self._looker.can_ask else ():
            full = len(self.ledger.jobs(states=(WAITING,))) >= WAITING_MAX
            if full or time.monotonic() > deadline or self._stopping.is_set():
                return
            known = self._troubles.pop(project, None)
            with _apart(f"The labels of project {project} cannot be counted", known) as trouble:
                self.look(project)
            if trouble.said:
                self._troubles[project] = trouble.said

    def _look(self, project: str) -> None:
        """Look at a project's labels; what was found is dropped where a training was asked for meanwhile."""
        last = self._last_job(project)
        if last is not None and not last.ended:
            return
        known = self.ledger.look(project)
        found = self._looker.look(known, last) if known else None
        if found is None or self._last_job(project) != last:
            return
        self.ledger.looked(project, labels=found.labels, missing=found.missing, brought=found.brought)
        if found.enough:
            logger.info("Project %s has enough labels for a training", project)
            self._accepted(self.ledger.request(project))
        self._looker.remember(project, found)

    def _last_job(self, project: str) -> Job | None:
        return next(iter(self.ledger.jobs(project, limit=1)), None)

    def _tidy(self, project: str) -> None:
        """Go on removing the predictions that a published training has replaced, as long as there are some."""
        with _apart(f"Old predictions of project {project} are not removed now"):
            studio = StudioProject(self._studio, project, STUDIO_S)
            while studio.remove_replaced(self._store.live_tag(project), TIDY_S).some_left:
                if self._stopping.wait(TIDY_S):
                    return

    def _forget(self, project: str) -> None:
        """Forget a project that Label Studio does not have, while its lock is ours; its jobs and its model stay."""
        logger.warning("Label Studio has no project %s for us, so it is forgotten until its next /setup", project)
        self.ledger.forget(project)
        self._known.pop(project, None)
        with contextlib.suppress(OSError):
            self._settings.state.event(project).unlink(missing_ok=True)
            self._lock_file(project).unlink(missing_ok=True)

    def _lock_file(self, project: str) -> Path:
        return self._settings.state.project_lock(project)

    def _lock(self, project: str, patience_s: float = 0.0) -> AbstractContextManager[IO[bytes] | None]:
        """The open lock of a project's training; None where another worker holds it."""
        return lock(self._lock_file(project), patience_s)


@dataclass(frozen=True)
class _Found:
    """
    What a look has found.

    Attributes:
        sight: Stands for all that it saw; the same sight says the same.
        enough: A training is to be asked for.
    """

    sight: int
    labels: int
    missing: str = ""
    brought: str = ""
    enough: bool = False


class _Looker:
    """What the labels of projects ask for; for one thread at a time."""

    def __init__(self, settings: Settings, store: ModelStore, studio: Studio) -> None:
        self._settings = settings
        self._store = store
        self._studio = studio
        self._seen: dict[str, int] = {}
        self._last: StudioProject | None = None  # that was asked for: to connect takes longer than to ask

    @property
    def can_ask(self) -> bool:
        """Whether Label Studio's address and a token are set; else no labels can be read."""
        return bool(self._settings.label_studio_url and self._settings.label_studio_api_key)

    def remember(self, project: str, found: _Found) -> None:
        """Keep in mind that what was found has been written down."""
        if len(self._seen) >= KNOWN_MAX:
            self._seen.clear()
        self._seen[project] = found.sight

    def look(self, known: Known, last: Job | None) -> _Found | None:
        """
        What the labels of a project ask for; None if all is as it was remembered.

        A project whose live model is its own has learned before, and is asked for its new labels alone.

        Args:
            known: What the ledger knows of it.
            last: Its newest job, which has ended.

        Raises:
            ProjectGoneError: Label Studio has no such project.
            CelestialError: It did not say, or there is no model.
        """
        project, tag = self._project(known.project), self._store.live_tag(known.project)
        learned = project_of(tag) == known.project
        config = "" if learned else project.label_config()
        now = project.labels_now()
        # A moment that is to come was written down before the clock was moved back.
        failed = last is not None and last.state == FAILED and 0 <= time.time() - last.requested_at < AGAIN_S
        tired = failed and known.trained_at is None and not known.missing
        written = (known.pressed, known.trained_at, known.read_until, known.missing, known.brought)
        sight = hash((tag, config, now, written, last and last.id, tired))
        if self._seen.get(known.project) == sight:
            return None
        missing, brought = ("", "") if learned else self._hindrance(known, project, tag, config)
        if missing or brought or tired or self._settings.train_every == NEVER:
            return _Found(sight, known.labels, missing, brought)
        untried = known.trained_at is None and known.read_until is None
        if self._settings.train_every is None and not learned and (untried or known.missing):
            return _Found(sight, known.labels, enough=True)
        labels = project.labels_since(_later(known.trained_at, known.read_until))
        before = now.total - labels if known.trained_labels is None else known.trained_labels
        return _Found(sight, labels, enough=labels >= counting.enough_new(before, self._settings.train_every))

    def _project(self, number: str) -> StudioProject:
        last = self._last
        self._last = last.sibling(number) if last else StudioProject(self._studio, number, STUDIO_S)
        return self._last

    def _hindrance(self, known: Known, project: StudioProject, tag: str, config: str) -> tuple[str, str]:
        """What labels are missing, and why the live model is not replaced unasked: one of both at most."""
        try:
            unasked = self._settings.train_every != NEVER and not known.pressed
            if unasked and self._is_brought(known.project, tag) and self._knows(tag, config):
                return "", f"{tag} was not trained here, and knows choices of the project: {PRESS}"
            return counting.missing(config, project.annotations()) or "", ""
        except LabelConfigError as error:
            return str(error), ""

    def _is_brought(self, project: str, tag: str) -> bool:
        """Whether a live model is the operator's: neither the embedded one, nor trained for a project."""
        chosen = self._settings.bentomodel is not None or self._settings.model != Settings.model
        if chosen and self._store.pointers.read(project) is None:
            return True
        return project_of(tag) is None and not tag.startswith(EMBEDDED)

    def _knows(self, tag: str, config: str) -> bool:
        """Whether a model knows a choice; of one that was never loaded that is taken for granted."""
        vocabulary = self._store.known(tag)
        return vocabulary is None or bool(vocabulary.choices(config).controls)


def _later(one: str | None, other: str | None) -> str | None:
    """The later of two moments as Label Studio writes them; None without any."""
    return max(filter(None, (one, other)), key=read_moment, default=None)


class _Trouble:
    """What went wrong apart; "" if nothing did."""

    said = ""


@contextmanager
def _apart(trouble: str, known: str | None = None) -> Iterator[_Trouble]:
    """Keep whatever goes wrong with one project from all others; the log tells it, unless it is known already."""
    caught = _Trouble()
    try:
        yield caught
    except CelestialError as error:
        caught.said = str(error)
        if caught.said != known:
            logger.warning("%s: %s", trouble, error)
    except Exception:  # whatever it is, the others go on
        logger.exception("%s", trouble)
