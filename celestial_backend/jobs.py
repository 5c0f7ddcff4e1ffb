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
import fcntl
import json
import logging
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import IO, Any

from huey import Huey, RedisHuey, SqliteHuey, crontab
from huey.registry import Message
from huey.serializer import Serializer
from huey.signals import SIGNAL_INTERRUPTED

from celestial_backend.errors import CelestialError, StateError
from celestial_backend.ledger import FAILED, PUBLISHED, RUNNING, WAITING, Job, Ledger
from celestial_backend.project import StudioProject
from celestial_backend.settings import Settings
from celestial_backend.store import ModelStore
from celestial_backend.studio import Studio

logger = logging.getLogger(__name__)

ATTEMPTS_MAX = 3  # begun and died: the fourth would die too
QUEUE_TIMEOUT_S = 0.5  # for a Redis that does not answer; Label Studio gives /webhook one second
AGAIN_S = 3600.0  # a training that failed by itself is asked for again after this long


class Jobs:
    """The trainings of all projects; safe between threads, and nothing is opened before it is asked for."""

    def __init__(self, settings: Settings, store: ModelStore, studio: Studio) -> None:
        self.ledger = Ledger(settings.model_dir)
        self._settings = settings
        self._store = store
        self._studio = studio
        self._known: set[str] = set()
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._stopping = threading.Event()

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
        if self._settings.train_every is None or not project or project in self._known:
            return
        with contextlib.suppress(StateError):
            self.ledger.know(project)
            self._known.add(project)

    @cached_property
    def huey(self) -> Huey:
        """The queue, with its tasks; its messages are project numbers as JSON, never pickles."""
        settings, options = self._settings, {"results": False, "serializer": _JsonSerializer()}
        if settings.redis_url:
            from redis import ConnectionPool

            pool = ConnectionPool.from_url(
                settings.redis_url, socket_connect_timeout=QUEUE_TIMEOUT_S, socket_timeout=QUEUE_TIMEOUT_S + 1
            )  # the worker's own reading waits a second for a message
            queue: Huey = RedisHuey("celestial", connection_pool=pool, **options)
        else:
            settings.model_dir.mkdir(parents=True, exist_ok=True)
            queue = SqliteHuey("celestial", filename=str(settings.model_dir / "queue.db"), **options)
        self._train_task = queue.task(name="train")(self.run)
        queue.periodic_task(crontab(), name="look_after")(self.look_after)
        queue.on_startup(name="look_after")(self.look_after)
        queue.signal(SIGNAL_INTERRUPTED)(lambda *_: self.stop())
        return queue

    def run(self, project: str) -> None:
        """Run the job that waits for a project; not while another worker is at one, which comes back here then."""
        with self._lock(project) as lock:
            if lock is None:
                return
            self._recover(project)
            job = self.ledger.start(project)
            if job is not None:
                self._train(job, lock)
        if self.ledger.jobs(project, (WAITING,)):
            self._wake(project)

    def look_after(self) -> None:
        """
        Bring everything that was accepted to its end; run at the start of a worker and every minute.

        A training whose worker died waits again, what waits is queued again, and where
        CELESTIAL_TRAIN_EVERY is set Label Studio is asked for the labels whose events were lost.
        """
        for job in self.ledger.jobs(states=(RUNNING,)):
            with self._lock(job.project) as lock:
                if lock is not None:
                    self._recover(job.project)
        if self._settings.train_every is not None:
            self._reconcile(self._settings.train_every)
        for job in self.ledger.jobs(states=(WAITING,)):
            self._wake(job.project)

    def stop(self) -> None:
        """End the trainings of this worker, as at a SIGTERM; they wait again, as if they had not been begun."""
        self._stopping.set()
        for job_id, process in list(self._processes.items()):
            process.kill()
            process.wait()
            if job := self.ledger.job(job_id):
                self._settle(job, "", begun=False)

    def _wake(self, project: str) -> None:
        """Queue a project; where that fails, the worker finds what waits in the ledger within a minute."""
        try:
            self.huey.enqueue(self._train_task.s(project))
        except Exception as error:  # noqa: BLE001 - whatever the queue's client raises, the request is written down
            logger.warning("The queue cannot be reached (%s); the worker looks at the list of jobs every minute.",
                           type(error).__name__)  # fmt: skip

    def _train(self, job: Job, lock: IO[bytes]) -> None:
        logger.info("Job %s trains project %s, attempt %d", job.id, job.project, job.attempts)
        command = [sys.executable, "-m", "celestial_backend.trainer", job.id]
        # It keeps the lock too, so the lock is free only when both are gone.
        process = subprocess.Popen(command, pass_fds=[lock.fileno()], stdin=subprocess.DEVNULL, start_new_session=True)  # noqa: S603 - our own module
        self._processes[job.id] = process
        try:
            process.wait(self._settings.train_max_s)
            why = _death(process.returncode)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            why = f"It took longer than the {self._settings.train_max_s:g} seconds of CELESTIAL_TRAIN_MAX_S."
            job = replace(job, attempts=ATTEMPTS_MAX)  # it would again
        del self._processes[job.id]
        if not self._stopping.is_set():
            self._settle(job, why)

    def _recover(self, project: str) -> None:
        """See to a job that is said to run, while its lock is ours: its worker is gone."""
        for job in self.ledger.jobs(project, (RUNNING,)):
            self._settle(job, "Its worker was ended while it ran.")

    def _settle(self, job: Job, why: str, *, begun: bool = True) -> None:
        """Bring a job whose process is gone to where it belongs; one that ended by itself stays as it is."""
        found = self.ledger.job(job.id)
        if found is None or found.state != RUNNING:
            return
        shutil.rmtree(self.folder(job.id), ignore_errors=True)
        pointer = self._store.pointers.read(job.project)
        if pointer is not None and pointer.job == job.id:
            outcome = self._store.registry.describe(pointer.tag).metadata
            self.ledger.end(job.id, PUBLISHED, str(outcome.get("reason", "")), {"tag": pointer.tag} | outcome)
            with contextlib.suppress(CelestialError):
                StudioProject(self._studio, job.project).show_version(pointer.tag)
        elif job.attempts >= ATTEMPTS_MAX:
            said = f"{why} It was begun {found.attempts} times. The worker's log tells more."
            self.ledger.end(job.id, FAILED, said)
            logger.error("Job %s failed: %s", job.id, said)
        else:
            logger.warning("Job %s waits again. %s", job.id, why)
            self.ledger.give_back(job.id, begun=begun)

    def _reconcile(self, limit: int) -> None:
        """Ask for the trainings that lost events would have brought about."""
        for project, moment in self.ledger.projects().items():
            last = next(iter(self.ledger.jobs(project, limit=1)), None)
            if last and (not last.ended or (last.state == FAILED and time.time() < last.requested_at + AGAIN_S)):
                continue
            try:
                if StudioProject(self._studio, project).labels_since(moment) >= limit:
                    self.ledger.request(project)
            except CelestialError as error:
                logger.warning("The labels of project %s cannot be counted: %s", project, error)

    def folder(self, job_id: str) -> Path:
        """Where a training keeps its pictures while it runs."""
        return self._settings.model_dir / "work" / job_id

    @contextlib.contextmanager
    def _lock(self, project: str) -> Iterator[IO[bytes] | None]:
        """The open lock of a project's training; None where another worker holds it."""
        path = self._settings.model_dir / "work" / f"project-{project}.lock"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = path.open("wb")
        except OSError as error:
            raise StateError(
                f"The state folder cannot be written ({error.strerror}). Check that the folder that MODEL_DIR names "
                "belongs to this user and that its disk has space."
            ) from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield None
            else:
                yield lock


class _JsonSerializer(Serializer):  # type: ignore[misc]
    """Messages as JSON: who can write into Redis can ask for a training, and run no code of their own."""

    def _serialize(self, data: Any) -> bytes:
        return json.dumps(data).encode()

    def _deserialize(self, data: bytes) -> Any:
        return Message(*json.loads(data))


def _death(code: int) -> str:
    """What a process that ended without a word is said to have died of."""
    if code >= 0:
        return f"Its process ended with code {code} and said nothing."
    hint = ", as a machine that is out of memory does" if code == -9 else ""
    return f"Its process was ended by signal {-code}{hint}."
