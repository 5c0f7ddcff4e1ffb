"""The one place that builds the objects of a process from its settings."""

from __future__ import annotations

from dataclasses import dataclass

from celestial_backend.images import ImageReader
from celestial_backend.predictor import Predictor
from celestial_backend.settings import Settings
from celestial_backend.store import ModelStore
from celestial_backend.studio import Studio


@dataclass(frozen=True)
class Services:
    """Everything a process works with; lives as long as the process, safe between threads."""

    settings: Settings
    store: ModelStore
    predictor: Predictor


def build(settings: Settings) -> Services:
    """Build the services; opens, loads and connects nothing yet, so a fork may follow."""
    store = ModelStore(settings)
    images = ImageReader(settings, Studio(settings))
    return Services(settings, store, Predictor(settings, store, images))
