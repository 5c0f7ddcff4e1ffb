"""
What becomes of a job whose process is gone: its work is done, or it is done again, or it has failed.

The pointer decides. Where it names the job, the job has published, whatever it did not
live to write down.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import threading
from pathlib import Path

from msgspec.structs import replace

from celestial_backend.errors import CelestialError
from celestial_backend.jobs.ledger import FAILED, PUBLISHED, RUNNING, Job, Ledger
from celestial_backend.models.manifest import Manifest
from celestial_backend.models.store import ModelStore
from celestial_backend.settings import Settings, project_tag
from celestial_backend.studio.client import Studio
from celestial_backend.studio.project import StudioProject

logger = logging.getLogger(__name__)

ATTEMPTS_MAX = 3  # begun and died: the fourth would die too
STUDIO_S = 3.0  # for a Label Studio that is away, as other projects want a look too


class Endings:
    """Ends jobs; safe between threads. Nothing is opened before it is asked for."""

    def __init__(self, settings: Settings, ledger: Ledger, store: ModelStore, studio: Studio) -> None:
        self._settings = settings
        self._ledger = ledger
        self._store = store
        self._studio = studio

    def settle(self, job: Job, why: str, *, begun: bool = True, again: bool = True) -> None:
        """
        Bring a job whose process is gone to where it belongs; one that ended by itself stays as it is.

        Args:
            job: As it was begun.
            why: A sentence: what its process died of.
            begun: Whether this attempt counts.
            again: Whether another attempt may do better.
        """
        found = self._ledger.job(job.id)
        if found is None or found.state != RUNNING:
            return
        shutil.rmtree(self.folder(job.id), ignore_errors=True)
        try:
            made = self.published(job)
            if made is None:
                self.withdraw(job)
        except CelestialError as error:
            self._ledger.end(job.id, FAILED, f"{why} {error}".strip())
            return
        if made is not None:
            self._ledger.end(job.id, PUBLISHED, made.reason or "", made)
            if begun:
                # Nobody waits for a Label Studio that is silent.
                threading.Thread(target=self._tell, args=(job.project, made.tag), name="tell").start()
        elif begun and (job.attempts >= ATTEMPTS_MAX or not again):
            times = f"It was begun {found.attempts} times. " if found.attempts > 1 else ""
            said = f"{why} {times}The worker's log tells more."
            self._ledger.end(job.id, FAILED, said)
            logger.error("Job %s failed: %s", job.id, said)
        else:
            logger.warning("Job %s waits again. %s", job.id, why)
            self._ledger.give_back(job.id, begun=begun)

    def published(self, job: Job) -> Manifest | None:
        """
        What is told of a job's model, and its tag, if that is the live one; None if it has published nothing.

        Raises:
            StateError: The pointer cannot be read.
        """
        pointer = self._store.pointers.read(job.project)
        if pointer is None or pointer.job != job.id:
            return None
        try:
            return replace(self._store.registry.describe(pointer.tag).manifest, tag=pointer.tag)
        except CelestialError:
            return Manifest(tag=pointer.tag)

    def withdraw(self, job: Job) -> None:
        """Remove the model of a job that has not published it, so that the same labels can be learned again."""
        tag = project_tag(job.project, job.id)
        if tag not in self._store.pointers.projects().values():
            with contextlib.suppress(OSError):
                self._store.registry.remove(tag)

    def folder(self, job_id: str) -> Path:
        """Where a training keeps its pictures while it runs."""
        return self._settings.state.job(job_id)

    def _tell(self, project: str, tag: str) -> None:
        keep = self._settings.keep_predictions
        try:
            StudioProject(self._studio, project, STUDIO_S).in_step(tag, keep_predictions=keep)
        except CelestialError as error:
            logger.warning("Label Studio could not be told of %s: %s", tag, error)
