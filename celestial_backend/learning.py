"""
One training of one project, from its labels to the live model, or to the reason why there is none.

Nothing that is served changes before the last step, and that step is one: the new
model is whole in the store, compared with the live one, and then one small file is
replaced.
"""

from __future__ import annotations

import logging
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from celestial_backend import __version__, contest, finetune, network
from celestial_backend.classifier import Classifier, Parts, read_parts
from celestial_backend.collect import Collection, collect
from celestial_backend.errors import CelestialError, StateError
from celestial_backend.examples import Example, rendered
from celestial_backend.images import ImageReader
from celestial_backend.labels import for_learning
from celestial_backend.ledger import KEPT, PUBLISHED, Job, Ledger
from celestial_backend.project import StudioProject
from celestial_backend.registry import project_tag
from celestial_backend.settings import Settings
from celestial_backend.store import ModelStore
from celestial_backend.studio import Studio
from celestial_backend.training import Progress

logger = logging.getLogger(__name__)

JUDGED_PER_CLASS = 20  # freshly drawn pictures of each old class that the renderer knows
JUDGE_SEED = 977_001  # no training draws with it
TIME_FOR_LEARNING = 0.8  # of CELESTIAL_TRAIN_MAX_S; the rest is for comparing and saving
REPORT_S = 1.0


@dataclass(frozen=True)
class Outcome:
    """How a job ends: its state, the reason for people, and the tag and scores if there are any."""

    state: str
    reason: str
    facts: dict[str, Any] = field(default_factory=dict)


class Learner:
    """Trains projects; one per process, used by one thread."""

    def __init__(
        self, settings: Settings, store: ModelStore, studio: Studio, images: ImageReader, ledger: Ledger
    ) -> None:
        self._settings = settings
        self._store = store
        self._studio = studio
        self._images = images
        self._ledger = ledger
        self._reported = -math.inf

    def learn(self, job: Job, folder: Path) -> Outcome:
        """
        Train the project's live model on the project's labels, and publish what comes of it if it is not worse.

        Args:
            job: It runs; where it is stands in the ledger from now on.
            folder: For the pictures; whoever made it removes it.

        Raises:
            CelestialError: There is no new model, and the message says why.
        """
        started = time.monotonic()
        self._report(job, "reading the live model")
        parent = read_parts(self._store.live_tag(job.project))
        champion = Classifier(parent)
        project = StudioProject(self._studio, job.project)
        collection = self._collect(job, project, champion, folder)
        if same := self._tried_before(job, parent.tag, collection):
            return Outcome(KEPT, same, {"labels": collection.counts})
        candidate = self._train(job, parent, champion, collection, started)
        tag = project_tag(job.project, job.id)
        challenger = Classifier(candidate.parts(tag))
        self._report(job, "comparing")
        verdict = self._judge(champion, challenger, collection)
        self._report(job, "saving")
        facts = self._manifest(job, parent.tag, collection, candidate, verdict)
        candidate.network.save(folder / "network", zipped=False, include_optimizer=False)
        self._store.registry.remove(tag)  # left by an attempt that was killed
        self._store.registry.add(tag, folder / "network", candidate.preprocess, candidate.postprocess, facts)
        outcome = self._publish(job, project, parent.tag, Outcome(PUBLISHED, verdict.reason, {"tag": tag, **facts}),
                                publish=verdict.publish)  # fmt: skip
        self._store.prune(job.project)
        return outcome

    def _collect(self, job: Job, project: StudioProject, champion: Classifier, folder: Path) -> Collection:
        choices = for_learning(project.label_config(), champion.classes)
        collection = collect(
            project.labelled_tasks(), choices, self._images, folder / "pictures", ...
        )
        if collection.newest:
            self._ledger.read_until(job.project, collection.newest)
        return collection
