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
import os
import subprocess
import sys
import threading
import time
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import IO, Any

from huey import Huey, crontab
from huey.signals import SIGNAL_INTERRUPTED

from celestial_backend.endings import STUDIO_S, Endings
from celestial_backend.errors import CelestialError, StateError
from celestial_backend.job_queue import make_queue
from celestial_backend.ledger import FAILED, RUNNING, WAITING, Job, Ledger
from celestial_backend.pages import Pages
from celestial_backend.processes import death, lock, show_life
from celestial_backend.project import StudioProject
from celestial_backend.settings import Settings
from celestial_backend.store import ModelStore
from celestial_backend.studio import Studio

logger = logging.getLogger(__name__)

WAKE_S = 0.2  # how long a request waits for the queue: Label Studio gives /webhook one second, the ledger 0.7
START_S = 3.0  # in which a training ends itself whose worker was killed
LOOK_S = 30.0  # while a worker trains, the looks of every minute pile up
WORKER_LOCK = Path("work", "worker.lock")  # in the state folder; shared by all workers that live
AGAIN_S = 3600.0  # a training that failed by itself is asked for again after this long
HOW_TO_START = (
    "Start the backend, or a worker: huey_consumer celestial_backend.worker.huey. Mind the same MODEL_DIR."
)


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
        self._known: set[str] = set()
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._stopping = threading.Event()
        self._looked = -LOOK_S

    def request(self, project: str, *, from_scratch: bool = False) -> dict[str, Any]:
        """
        Accept a training of a project; from now on it is run, or shown as failed with its reason.

        Raises:
            StateError: It could not be written down; nothing was accepted.
        """
        job = self.ledger.request(project, from_scratch=from_scratch)
        self._wake(project)
        return {"job": job.id, "state": job.state, "requests": job.requests}

    def note_labels(self, project: str, count: int) -> dict[str, Any]:
        """Count new or changed labels of a project, and accept a training at every CELESTIAL_TRAIN_EVERY of them."""
        limit = self._settings.train_every
        if limit is None:
            return {"state": "not asked for", "reason": "Labels are not counted, as CELESTIAL_TRAIN_EVERY is not set."}
        job = self.ledger.note_labels(project, count, limit)
        if job is None:
            return {"state": "counted"}
        self._wake(project)
        return {"job": job.id, "state": job.state, "requests": job.requests}

    def know(self, project: str) -> None:
        """Remember a project that works with this backend, so that its labels are looked at when no event comes."""
        if self._settings.train_every is None or not project.isdecimal() or project in self._known:
            return
        with contextlib.suppress(StateError):
            self.ledger.know(project)
            self._known.add(project)

    @cached_property
    def huey(self) -> Huey:
        """The queue, with its tasks; its messages name projects."""
        queue = make_queue(self._settings)
        self._train_task = queue.task(name="train")(self.run)
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

    def run(self, project: str) -> None:
        """Run the job that waits for a project; not while another worker is at one, which comes back here then."""
        with self._lock(project) as held:
            if held is None or self._stopping.is_set():
                return
            self._recover(project)
            job = self.ledger.start(project)
            if job is not None:
                self._train(job, held)
        if self.ledger.jobs(project, (WAITING,)):
            self._wake(project)

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
            with self._lock(job.project, patience_s) as held:
                if held is not None:
                    self._recover(job.project)
        for job in reversed(self.ledger.jobs(states=(WAITING,))):
            self._wake(job.project)
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

    def _wake(self, project: str) -> None:
        """Queue a project, in the background if it takes long; where that fails, the worker finds it in the ledger."""
        ringing = threading.Thread(target=self._enqueue, args=(project,), name="wake", daemon=True)
        ringing.start()
        ringing.join(WAKE_S)

    def _enqueue(self, project: str) -> None:
        try:
            self.huey.enqueue(self._train_task.s(project))
        except Exception as error:  # noqa: BLE001 - whatever the queue's client raises, the request is written down
            logger.warning("The queue cannot be reached (%s); the worker looks at the list of jobs every minute.",
                           type(error).__name__)  # fmt: skip

    def _train(self, job: Job, held: IO[bytes]) -> None:
        logger.info("Job %s trains project %s, attempt %d", job.id, job.project, job.attempts)
        command = [sys.executable, "-m", "celestial_backend.trainer", job.id, str(os.getpid())]
        # It keeps the lock too, so the lock is free only when both are gone.
        process = subprocess.Popen(command, pass_fds=[held.fileno()], stdin=subprocess.DEVNULL, start_new_session=True)  # noqa: S603 - our own module
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
            last = next(iter(self.ledger.jobs(project, limit=1)), None)
            # A moment that is to come was written down before the clock was moved back.
            lately = last is not None and 0 <= time.time() - last.requested_at < AGAIN_S
            if last and (not last.ended or (last.state == FAILED and lately)):
                continue
            try:
                if StudioProject(self._studio, project, STUDIO_S).labels_since(moment) >= limit:
                    self.request(project)
            except CelestialError as error:
                logger.warning("The labels of project %s cannot be counted: %s", project, error)

    def _lock(self, project: str, patience_s: float = 0.0) -> AbstractContextManager[IO[bytes] | None]:
        """The open lock of a project's training; None where another worker holds it."""
        return lock(self._settings.model_dir / "work" / f"project-{project}.lock", patience_s)
