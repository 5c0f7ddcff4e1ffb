"""
One training in a process of its own: `python -m celestial_backend.worker.training JOB TOKEN WORKER`.

It joins what learns and what lasts: the new model becomes the live one, and the job ends, in one transaction. A
process that has lost its job meanwhile, as its worker was taken for dead, changes nothing.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial

from celestial_backend import logs
from celestial_backend.database import Transaction
from celestial_backend.errors import CelestialError, ModelError, ProjectGoneError, StateError, StudioError
from celestial_backend.jobs.ledger import FAILED, KEPT, PUBLISHED, RUNNING, Ending, Job, Ledger
from celestial_backend.jobs.processes import AGAIN, end_with_parent
from celestial_backend.learning.project import Learner, Outcome, Request
from celestial_backend.services import Services, build
from celestial_backend.settings import Settings
from celestial_backend.state import private
from celestial_backend.studio.project import StudioProject

logger = logging.getLogger("celestial_backend.worker.training")  # this file is started by name

NICE = 10  # predictions go first
AGAIN_S = 2.0
PATIENCE_S = 30.0  # for a database that others write into: nobody waits for a training
REPORT_S = 1.0


class ProgressOfJob:
    """Writes down where a training is: every new stage, and within one at most once a second; for one thread."""

    def __init__(self, ledger: Ledger, job: Job) -> None:
        self._ledger = ledger
        self._job = job
        self._reported = ("", 0.0)
        self._began = time.monotonic()

    def __call__(self, stage: str, **where: int | None) -> None:
        """A database that is away stops no training."""
        before, at = self._reported
        if stage != before or time.monotonic() > at + REPORT_S:
            self._reported = (stage, time.monotonic())
            try:
                self._ledger.progress(self._job, stage=stage, seconds=round(time.monotonic() - self._began), **where)
            except StateError as error:
                logger.warning("%s", error)


def main(job_id: str, token: str, worker: int) -> None:
    """Run a job that a worker (its process id) has started, and write down how it ended."""
    end_with_parent(worker)
    os.nice(NICE)
    settings = Settings.from_environ()
    private(settings.model_dir)
    logs.configure(settings.log_level, settings.log_format)
    services = build(settings)
    ledger = Ledger(services.database, PATIENCE_S)
    try:
        job = ledger.job(job_id)
        if job is None or job.state != RUNNING or job.token != token:
            sys.exit(f"Job {job_id} does not run.")
        outcome = _learned(services, ledger, job)
    except StateError as error:
        logger.error("%s", error)  # noqa: TRY400 - the sentence says it
        sys.exit(AGAIN)
    ended = _ended(services, ledger, job, outcome)
    if ended is None:
        sys.exit(f"Job {job_id} was taken over by another worker, and nothing was published.")
    logger.info("Job %s: %s. %s", job.id, ended.state, ended.reason)
    try:
        if ended.state == PUBLISHED:
            services.jobs.tell(job, ended.manifest.tag or "")
        services.store.prune(job.project)
    except CelestialError as error:  # a worker tells what was not told, and the next training prunes
        logger.warning("%s", error)


def _ended(services: Services, ledger: Ledger, job: Job, outcome: Outcome | Ending) -> Ending | None:
    """End the job, with patience: until the database is there again, and has space; the worker bounds the time."""
    said = ""
    while True:
        try:
            return end(services, ledger, job, outcome)
        except ModelError as error:
            outcome = Ending(FAILED, str(error))
        except StateError as error:
            if str(error) != said:
                logger.warning("The end of job %s is written down later: %s", job.id, error)
            said = str(error)
            time.sleep(AGAIN_S)


def end(services: Services, ledger: Ledger, job: Job, outcome: Outcome | Ending) -> Ending | None:
    """
    Publish what a training has brought, if it is better, and end its job, in one transaction.

    Returns:
        How it ended; None if the job is another worker's by now, and nothing changed then.

    Raises:
        StateError: The database cannot be written; nothing changed.
    """
    if isinstance(outcome, Ending):
        return ledger.end(job, outcome)
    kept, tag = Ending(KEPT, outcome.reason, outcome.manifest), outcome.manifest.tag
    if tag is None:
        return ledger.end(job, kept)
    return ledger.end(job, kept, partial(_publish, services, job, outcome, tag, kept))


def _publish(
    services: Services, job: Job, outcome: Outcome, tag: str, kept: Ending, work: Transaction
) -> Ending:
    services.store.keep(tag, work)
    if not outcome.better:
        return kept
    if services.store.publish(job.project, tag, job=job.id, instead_of=outcome.instead_of, within=work):
        return replace(kept, state=PUBLISHED)
    said = f"Kept out: {outcome.instead_of} was live when the training began, and another model is now. Train again."
    return replace(kept, reason=said)


def _learned(services: Services, ledger: Ledger, job: Job) -> Outcome | Ending:
    """
    Train, and say what came of it, whatever happens.

    Raises:
        StateError: The database is away, which says nothing of the training.
    """
    folder = services.settings.state.job(job.id)
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        tempfile.tempdir = str(folder)  # what BentoML and others leave behind goes with it
        _withdraw(services, job)
        _see_project(services, job)
        learner = Learner(services.settings, services.store, services.studio, services.images, services.trial.misled)
        request = Request(job.project, job.id, job.attempts, folder)
        return learner.learn(request, ProgressOfJob(ledger, job), partial(ledger.read_until, job.project))
    except ProjectGoneError as error:
        return Ending(FAILED, str(error), gone=True)
    except StateError:
        raise
    except Exception as error:  # noqa: BLE001 - the border of the process: whatever it was, the job must not hang
        _withdraw(services, job)
        return Ending(FAILED, _reason(job, error))
    finally:
        tempfile.tempdir = None
        shutil.rmtree(folder, ignore_errors=True)


def _withdraw(services: Services, job: Job) -> None:
    """Remove what an attempt that ended too early has saved, so that the same labels can be learned again."""
    with suppress(CelestialError, OSError):
        for model in services.store.registry.models():
            if model.project == job.project and model.manifest.job == job.id:
                services.store.registry.remove(model.tag)


def _see_project(services: Services, job: Job) -> None:
    """End at once where the project is gone; a model takes seconds to load."""
    try:
        services.jobs.confirm(StudioProject(services.studio, job.project, patience_s=0), job.id)
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


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
