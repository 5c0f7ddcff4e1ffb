"""
Trainings, from the request to the end: written down, queued, run one at a time for each project.

The ledger is the truth, and the queue (Huey, on SQLite or on Redis) only wakes a
worker. Each training runs in a process of its own, so that its memory goes with it,
its time can be bounded, and nothing that has loaded TensorFlow is ever forked. A
lock on a file, which the kernel frees when its holders die, tells a training that
runs from one whose worker was killed.
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
from functools import cached_property
from pathlib import Path
from typing import IO, Any

from huey import Huey, crontab
from huey.signals import SIGNAL_INTERRUPTED

from celestial_backend.endings import STUDIO_S, Endings
from celestial_backend.errors import CelestialError, ProjectGoneError, RequestError, StateError
from celestial_backend.job_queue import make_queue
from celestial_backend.ledger import FAILED, KNOWN_MAX, RUNNING, WAITING, WAITING_MAX, Job, Ledger
from celestial_backend.pages import Pages
from celestial_backend.processes import child_environ, death, lock, show_life
from celestial_backend.project import StudioProject
from celestial_backend.reach import event_file
from celestial_backend.settings import Settings
from celestial_backend.store import ModelStore
from celestial_backend.studio import Studio
from celestial_backend.tags import is_project, no_project

logger = logging.getLogger(__name__)

WAKE_S = 0.2  # how long a request waits for the queue: Label Studio gives /webhook one second, the ledger 0.7
START_S = 3.0  # in which a training ends itself whose worker was killed
LOOK_S = 30.0  # while a worker trains, the looks of every minute pile up
WORKER_LOCK = Path("work", "worker.lock")  # in the state folder; shared by all workers that live
AGAIN_S = 3600.0  # a training that failed by itself is asked for again after this long
KNOW_S = 60.0  # a project is written down as known no more often than this
KNOW_WAIT_S = 0.1  # for the list of jobs, where /setup and /webhook look a project up in it
TRAIN = "train"  # the name of the queue's task
MESSAGES = 4  # of that task in the queue; whoever takes one puts in the next
HOW_TO_START = "Start the backend, or a worker: huey_consumer celestial_backend.worker.huey. Mind the same MODEL_DIR."


def worker_lives(model_dir: Path) -> bool:
    """
    Whether a worker runs on a state folder; each holds a lock for its life.

    Raises:
        StateError: The folder cannot be used.
    """
    if not (model_dir / WORKER_LOCK).parent.is_dir():
        return False
    with lock(model_dir / WORKER_LOCK) as free:
        return free is None


class Jobs:
    """The trainings of all projects; safe between threads, and nothing is opened before it is asked for."""

    def __init__(self, settings: Settings, store: ModelStore, studio: Studio) -> None:
        self.ledger = Ledger(settings.model_dir)
        self.endings = Endings(settings.model_dir, self.ledger, store, studio)
        self._settings = settings
        self._studio = studio
        self._pointers = store.pointers
        self._hasty = Ledger(settings.model_dir, KNOW_WAIT_S)
        self._known: dict[str, float] = {}  # projects, and when they were written down
        self._too_many_known = False
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._stopping = threading.Event()
        self._looked = -LOOK_S

    def request(self, project: str, *, from_scratch: bool = False) -> dict[str, Any]:
        """
        Accept a training of a project; from now on it is run, or shown as failed with its reason.

        Raises:
            RequestError: The project has no number.
            BusyError: Too many projects wait; nothing was accepted.
            StateError: It could not be written down; nothing was accepted.
        """
        if not is_project(project):
            raise RequestError(no_project(project))
        return self._accepted(self.ledger.request(project, from_scratch=from_scratch))

    def note_labels(self, project: str, count: int) -> dict[str, Any]:
        """Count new or changed labels of a project, and accept a training at every CELESTIAL_TRAIN_EVERY of them."""
        limit = self._settings.train_every
        if limit is None:
            return {"state": "not asked for", "reason": "Labels are not counted, as CELESTIAL_TRAIN_EVERY is not set."}
        job = self.ledger.note_labels(project, count, limit)
        return {"state": "counted"} if job is None else self._accepted(job)

    def know(self, project: str) -> None:
        """
        Remember a project whose /setup was accepted: its labels are looked at when no event comes. Never raises.

        One that was forgotten is remembered again a minute later, as Label Studio repeats its /setup.
        """
        now = time.monotonic()
        if not is_project(project) or now < self._known.get(project, -math.inf) + KNOW_S:
            return
        with contextlib.suppress(StateError):
            if not self._hasty.know(project) and not self._too_many_known:
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
        file = event_file(self._settings.model_dir, project)
        with contextlib.suppress(CelestialError, OSError):
            if file.exists() or self._pointers.read(project) is not None or self._hasty.knows(project):
                file.parent.mkdir(parents=True, exist_ok=True)
                file.touch()

    @cached_property
    def huey(self) -> Huey:
        """The queue, with its tasks."""
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
        Run the job that has waited longest, of those whose project no other worker is at.

        Whatever the message says that brought the worker here; those of older releases name a project.
        """
        for job in reversed(self.ledger.jobs(states=(WAITING,))):
            with _apart(f"The training of project {job.project} cannot be run"):
                if self.run(job.project):
                    return

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
            if ended is not None and ended.outcome.get("gone"):
                self._forget(project)
        self._pass_on()
        return True

    def look_after(self, patience_s: float = 0.0) -> None:
        """
        Bring everything that was accepted to its end; run at the start of a worker and every minute.

        A training whose worker died waits again, what waits is queued again, and where
        CELESTIAL_TRAIN_EVERY is set Label Studio is asked for the labels whose events were lost.

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
        if self._settings.train_every is not None:
            self._reconcile(self._settings.train_every)
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
        show_life(self._settings.model_dir / WORKER_LOCK)

    def _look_first(self) -> None:
        """Look, and be patient, beside what the worker does: another one may be at a training of which it knows."""
        threading.Thread(target=self.look_after, args=(START_S,), name="look", daemon=True).start()

    def _accepted(self, job: Job) -> dict[str, Any]:
        if job.requests == 1:  # what was merged into a job waits with it
            self._wake(MESSAGES)
        return {"job": job.id, "state": job.state, "requests": job.requests}

    def _pass_on(self) -> None:
        """Wake another worker where more jobs wait."""
        with contextlib.suppress(StateError):  # the next look makes up for it
            waiting = len(self.ledger.jobs(states=(WAITING,), limit=MESSAGES))
            if waiting:
                self._wake(waiting)

    def _wake(self, enough: int) -> None:
        """Wake a worker, in the background if it takes long; where that fails, he finds in the ledger what waits."""
        ringing = threading.Thread(target=self._enqueue, args=(enough,), name="wake", daemon=True)
        ringing.start()
        ringing.join(WAKE_S)

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
        command = [sys.executable, "-m", "celestial_backend.trainer", job.id, str(os.getpid())]
        # It keeps the lock too, so the lock is free only when both are gone.
        process = subprocess.Popen(  # noqa: S603 - our own module
            command, pass_fds=[held.fileno()], env=child_environ(), stdin=subprocess.DEVNULL, start_new_session=True
        )
        self._processes[job.id] = process
        limit, in_time = self._settings.train_max_s, True
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            in_time = False
        del self._processes[job.id]
        if not self._stopping.is_set():
            late = f"It took longer than the {limit:g} seconds of CELESTIAL_TRAIN_MAX_S."
            self.endings.settle(job, death(process.returncode) if in_time else late, again=in_time)

    def _recover(self, project: str) -> None:
        """See to a job that is said to run, while its lock is ours: its worker is gone."""
        for job in self.ledger.jobs(project, (RUNNING,)):
            self.endings.settle(job, "Its worker was ended while it ran.")

    def _reconcile(self, limit: int) -> None:
        """Ask for the trainings that lost events would have brought about."""
        for project, moment in self.ledger.projects().items():
            with _apart(f"The labels of project {project} cannot be counted"):
                if len(self.ledger.jobs(states=(WAITING,))) >= WAITING_MAX:
                    return
                self._count(project, moment, limit)

    def _count(self, project: str, moment: str | None, limit: int) -> None:
        last = next(iter(self.ledger.jobs(project, limit=1)), None)
        # A moment that is to come was written down before the clock was moved back.
        lately = last is not None and 0 <= time.time() - last.requested_at < AGAIN_S
        if last and (not last.ended or (last.state == FAILED and lately)):
            return
        try:
            if StudioProject(self._studio, project, STUDIO_S).labels_since(moment) >= limit:
                self.request(project)
        except ProjectGoneError:
            with self._lock(project) as held:
                if held is not None:
                    self._forget(project)

    def _forget(self, project: str) -> None:
        """Forget a project that Label Studio does not have, while its lock is ours; its jobs and its model stay."""
        logger.warning("Label Studio has no project %s for us, so it is forgotten until its next /setup", project)
        self.ledger.forget(project)
        self._known.pop(project, None)
        with contextlib.suppress(OSError):
            event_file(self._settings.model_dir, project).unlink(missing_ok=True)
            self._lock_file(project).unlink(missing_ok=True)

    def _lock_file(self, project: str) -> Path:
        return self._settings.model_dir / "work" / f"project-{project}.lock"

    def _lock(self, project: str, patience_s: float = 0.0) -> AbstractContextManager[IO[bytes] | None]:
        """The open lock of a project's training; None where another worker holds it."""
        return lock(self._lock_file(project), patience_s)


@contextmanager
def _apart(trouble: str) -> Iterator[None]:
    """Keep whatever goes wrong with one project from all others; the log tells it."""
    try:
        yield
    except CelestialError as error:
        logger.warning("%s: %s", trouble, error)
    except Exception:  # whatever it is, the others go on
        logger.exception("%s", trouble)
