"""One training in a process of its own: `python -m celestial_backend.worker.training JOB WORKER`."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, field
from functools import partial

from celestial_backend import logs
from celestial_backend.errors import CelestialError, ProjectGoneError, StateError, StudioError
from celestial_backend.jobs.ledger import FAILED, PUBLISHED, RUNNING, Job, Ledger
from celestial_backend.jobs.processes import end_with_parent
from celestial_backend.learning.project import Learner, Request
from celestial_backend.models.manifest import Manifest
from celestial_backend.services import Services, build
from celestial_backend.settings import Settings
from celestial_backend.state import private
from celestial_backend.studio.project import StudioProject

logger = logging.getLogger(__name__)

NICE = 10  # predictions go first
AGAIN_S = 2.0
PATIENCE_S = 30.0  # for a list of jobs that others write into: nobody waits for a training
REPORT_S = 1.0


class ProgressOfJob:
    """Writes down where a training is: every new stage, and within one at most once a second; for one thread."""

    def __init__(self, ledger: Ledger, job_id: str) -> None:
        self._ledger = ledger
        self._job_id = job_id
        self._reported = ("", 0.0)
        self._began = time.monotonic()

    def __call__(self, stage: str, **where: int | None) -> None:
        """A list of jobs that cannot be written stops no training."""
        before, at = self._reported
        if stage != before or time.monotonic() > at + REPORT_S:
            self._reported = (stage, time.monotonic())
            try:
                self._ledger.progress(self._job_id, stage=stage, seconds=round(time.monotonic() - self._began), **where)
            except StateError as error:
                logger.warning("%s", error)


@dataclass(frozen=True)
class Ending:
    """How a job ends, as `Ledger.end` takes it."""

    state: str
    reason: str
    manifest: Manifest = field(default_factory=Manifest)
    gone: bool = False


def main(job_id: str, worker: int) -> None:
    """Run a job that a worker (its process id) has begun, and write down how it ended."""
    end_with_parent(worker)
    os.nice(NICE)
    settings = Settings.from_environ()
    private(settings.model_dir)
    logs.configure(settings.log_level)
    services = build(settings)
    ledger = Ledger(settings.model_dir, PATIENCE_S)
    job = ledger.job(job_id)
    if job is None or job.state != RUNNING:
        sys.exit(f"Job {job_id} does not run.")
    ending = _ending(services, ledger, job)
    logger.info("Job %s: %s. %s", job.id, ending.state, ending.reason)
    while True:  # until the disk has space again; the worker bounds the time
        try:
            ledger.end(job.id, ending.state, ending.reason, ending.manifest, gone=ending.gone)
        except StateError as error:
            logger.error("%s", error)  # noqa: TRY400 - the sentence says it
            time.sleep(AGAIN_S)
        else:
            return


def _ending(services: Services, ledger: Ledger, job: Job) -> Ending:
    """Train, and say how it ended, whatever happens."""
    folder = services.jobs.endings.folder(job.id)
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        tempfile.tempdir = str(folder)  # what BentoML and others leave behind goes with it
        _see_project(services, job)
        learner = Learner(services.settings, services.store, services.studio, services.images)
        request, read_until = Request(job.project, job.id, folder), partial(ledger.read_until, job.project)
        outcome = learner.learn(request, ProgressOfJob(ledger, job.id), read_until)
        return Ending(outcome.state, outcome.reason, outcome.manifest)
    except ProjectGoneError as error:
        return _stopped_short(services, job, str(error), gone=True)
    except Exception as error:  # noqa: BLE001 - the border of the process: whatever it was, the job must not hang
        return _stopped_short(services, job, _reason(job, error))
    finally:
        tempfile.tempdir = None
        shutil.rmtree(folder, ignore_errors=True)


def _see_project(services: Services, job: Job) -> None:
    """End at once where the project is gone; a model takes seconds to load."""
    try:
        StudioProject(services.studio, job.project, patience_s=0).label_config()
    except ProjectGoneError:
        raise
    except StudioError as error:
        logger.info("%s", error)  # the training asks again, with patience


def _reason(job: Job, error: Exception) -> str:
    if isinstance(error, CelestialError):
        return str(error)
    if any(os.strerror(code) in str(error) for code in (errno.ENOSPC, errno.EDQUOT)):  # libraries wrap it in their own
        return "The disk is full. Make space where MODEL_DIR and BENTOML_HOME are, and train again."
    logger.error("Job %s failed unexpectedly", job.id, exc_info=error)
    return f"It failed unexpectedly ({type(error).__name__}). The worker's log tells more."


def _stopped_short(services: Services, job: Job, reason: str, *, gone: bool = False) -> Ending:
    """How a job ends that was stopped by an error: failed, unless its model is live already."""
    try:
        done = services.jobs.endings.published(job)
        if done is not None:
            return Ending(PUBLISHED, f"{done.reason or ''} Afterwards: {reason}".strip(), done)
        services.jobs.endings.withdraw(job)
    except StateError as error:
        logger.error("%s", error)  # noqa: TRY400 - the sentence says it
    return Ending(FAILED, reason, gone=gone)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
