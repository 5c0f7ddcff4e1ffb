"""The one place that builds the objects of a process from its settings."""

from __future__ import annotations

from dataclasses import dataclass

from celestial_backend.images import ImageReader
from celestial_backend.jobs import Jobs
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


def build(settings: Settings) -> Services:
    """Build the services; opens, loads and connects nothing yet, so a fork may follow."""
    store = ModelStore(settings)
    studio = Studio(settings)
    images = ImageReader(settings, studio)
    predictor, jobs = Predictor(settings, store, images), Jobs(settings, store, studio)
    return Services(settings, store, studio, images, predictor, jobs)
