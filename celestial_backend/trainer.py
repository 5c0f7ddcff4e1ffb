"""One training in a process of its own: `python -m celestial_backend.trainer JOB`, started by the worker alone."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import sys
import time

from celestial_backend import logs
from celestial_backend.errors import CelestialError, StateError
from celestial_backend.learning import Learner, Outcome
from celestial_backend.ledger import FAILED, RUNNING, Job
from celestial_backend.processes import end_with_parent
from celestial_backend.settings import Settings
from celestial_backend.wiring import Services, build

logger = logging.getLogger(__name__)

NICE = 10  # predictions go first
AGAIN_S = 2.0


def main(job_id: str) -> None:
    """Run a job that the worker has begun, and write down how it ended."""
    end_with_parent()
    os.nice(NICE)
    settings = Settings.from_environ()
    logs.configure(settings.log_level)
    services = build(settings)
    job = services.jobs.ledger.job(job_id)
    if job is None or job.state != RUNNING:
        sys.exit(f"Job {job_id} does not run.")
    outcome = _outcome(services, job)
    logger.info("Job %s: %s. %s", job.id, outcome.state, outcome.reason)
    while True:  # until the disk has space again; the worker bounds the time
        try:
            services.jobs.ledger.end(job.id, outcome.state, outcome.reason, outcome.facts)
        except StateError as error:
            logger.error("%s", error)  # noqa: TRY400 - the sentence says it
            time.sleep(AGAIN_S)
        else:
            return


def _outcome(services: Services, job: Job) -> Outcome:
    folder = services.jobs.folder(job.id)
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        learner = Learner(services.settings, services.store, services.studio, services.images, services.jobs.ledger)
        return learner.learn(job, folder)
    except CelestialError as error:
        return Outcome(FAILED, str(error))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            logger.exception("Job %s failed unexpectedly", job.id)
            return Outcome(FAILED, f"It failed unexpectedly ({type(error).__name__}). The worker's log tells more.")
        return Outcome(FAILED, "The disk is full. Make space where MODEL_DIR and BENTOML_HOME are, and train again.")
    except Exception as error:  # the border of the process: whatever it was, the job must not hang
        logger.exception("Job %s failed unexpectedly", job.id)
        return Outcome(FAILED, f"It failed unexpectedly ({type(error).__name__}). The worker's log tells more.")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(sys.argv[1])
