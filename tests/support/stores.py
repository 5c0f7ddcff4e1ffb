"""A store of models as a process has it, with a database of its own."""

from __future__ import annotations

from functools import partial

from celestial_backend.database import Database
from celestial_backend.models.pointers import take_over_pointers
from celestial_backend.models.store import ModelStore
from celestial_backend.settings import Settings


def store_of(settings: Settings) -> ModelStore:
    """The store, with what an older release has left taken over."""
    database = Database(settings)
    database.old[settings.state.old_pointers] = partial(take_over_pointers, settings)
    return ModelStore(settings, database)
