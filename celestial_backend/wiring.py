"""The one place that builds the objects of a process from its settings."""

from __future__ import annotations

from dataclasses import dataclass

from celestial_backend.admission import Admission
from celestial_backend.images import ImageReader
from celestial_backend.jobs import Jobs
from celestial_backend.metrics import Metrics
from celestial_backend.predictor import Predictor
from celestial_backend.settings import Settings
from celestial_backend.store import ModelStore
from celestial_backend.studio import Studio


@dataclass(frozen=True)
class Services:
    """Everything a process works with; lives as long as the process, safe between threads."""

    settings: Settings
    store: ModelStore
    studio: Studio
    images: ImageReader
    predictor: Predictor
    jobs: Jobs
    metrics: Metrics
    admission: Admission


def build(settings: Settings) -> Services:
    """Build the services; opens, loads and connects nothing yet, so a fork may follow."""
    store = ModelStore(settings)
    studio = Studio(settings)
    metrics = Metrics()
    images = ImageReader(settings, studio, metrics)
    predictor, jobs = Predictor(settings, store, images, metrics), Jobs(settings, store, studio)
    return Services(settings, store, studio, images, predictor, jobs, metrics, Admission(settings))
