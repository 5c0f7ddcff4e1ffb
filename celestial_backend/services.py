"""The one place that builds the objects of a process from its settings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from celestial_backend.database import Database
from celestial_backend.jobs.takeover import take_over_jobs
from celestial_backend.jobs.trainings import Jobs
from celestial_backend.metrics import Metrics
from celestial_backend.models.pointers import take_over_pointers
from celestial_backend.models.store import ModelStore
from celestial_backend.pictures.reader import ImageReader
from celestial_backend.predictor import Predictor
from celestial_backend.settings import NEEDS_LABELS, Settings
from celestial_backend.studio.access import Access
from celestial_backend.studio.client import Studio
from celestial_backend.studio.labels import ProjectLabels
from celestial_backend.trust.order import TASKS_MAX, Order
from celestial_backend.trust.planted import in_place_of, take_away, truth_of
from celestial_backend.trust.trial import Trial

if TYPE_CHECKING:
    from celestial_backend.trust.evidence import Evidence


@dataclass(frozen=True)
class Services:
    """Everything a process works with; lives as long as the process, safe between threads."""

    settings: Settings
    database: Database
    store: ModelStore
    studio: Studio
    images: ImageReader
    predictor: Predictor
    jobs: Jobs
    metrics: Metrics
    access: Access
    trial: Trial
    order: Order

    def shown(
        self, tasks: Sequence[Any], answers: Sequence[Any], project: str, config: str, deadline: float = math.inf
    ) -> list[Any]:
        """
        The predictor's answers as Label Studio gets them; whoever predicts for it goes through here.

        Raises:
            StateError: As for `Trial.shown`.
        """
        if self.order.is_kept:
            needs_labels = self.predictor.version(config, project) == NEEDS_LABELS
            answers = self.order.placed(tasks, answers, project, needs_labels=needs_labels)

        def wrong(task: Any, answer: Any) -> list[dict[str, Any]]:
            if not (truth := truth_of(task, config)):
                return []
            (other,) = self.predictor.predict([task], config, deadline, project, barred=truth)
            return in_place_of(answer, other, truth)

        return self.trial.shown(tasks, answers, project, wrong)

    def arrange(self, project: str) -> Mapping[int, str]:
        """
        Put the tasks of a project in the order in which they are to be labelled; reads all their pictures.

        Returns:
            The tasks whose pictures cannot be read, and why.

        Raises:
            CelestialError: Label Studio or the database is away, or there is no model.
        """
        from celestial_backend.trust.seen import see

        seen = see(self.settings, self.store, self.studio, self.images, project, TASKS_MAX)
        self.order.arrange(project, seen)
        return seen.failed

    def evidence(self, project: str) -> Evidence:
        """
        All that people answered in a project of Label Studio, and what the models had said of it.

        Raises:
            CelestialError: As for `read_evidence`.
        """
        from celestial_backend.trust.evidence import read_evidence

        return read_evidence(ProjectLabels(self.studio, project), self.trial)


def build(settings: Settings, *, look_only: bool = False) -> Services:
    """Build the services; opens, loads and connects nothing yet, so a fork may follow. As for `ModelStore`."""
    database = Database(settings, look_only=look_only)
    # The jobs first: the pointers say which of them have published.
    database.old[settings.state.old_jobs] = partial(take_over_jobs, settings)
    database.old[settings.state.old_pointers] = partial(take_over_pointers, settings)
    return _build_on(settings, database, ModelStore(settings, database, look_only=look_only), Metrics(),
                     Trial(settings, database))  # fmt: skip


def rebuild(services: Services, settings: Settings) -> Services:
    """Build the services anew for another token of Label Studio; database, models, counts and the trial stay."""
    return _build_on(settings, services.database, services.store, services.metrics, services.trial)


def _build_on(
    settings: Settings, database: Database, store: ModelStore, metrics: Metrics, trial: Trial
) -> Services:
    studio = Studio(settings)
    images = ImageReader(settings, studio, metrics)
    jobs = Jobs(settings, database, store, studio)
    jobs.beside.append(partial(take_away, trial, studio))
    predictor = Predictor(settings, store, images, metrics, missing=jobs.missing)
    return Services(settings, database, store, studio, images, predictor, jobs, metrics, Access(settings, studio),
                    trial, Order(settings, database, trial))  # fmt: skip
