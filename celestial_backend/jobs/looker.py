"""What the labels of a project ask for: a training, a sentence about what is missing, or nothing yet."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

from celestial_backend.errors import LabelConfigError
from celestial_backend.jobs import counting
from celestial_backend.jobs.ledger import FAILED, KNOWN_MAX, Job, Known
from celestial_backend.models.store import ModelStore
from celestial_backend.settings import MODEL_NAME, NEVER, Settings, project_of
from celestial_backend.studio.client import Studio
from celestial_backend.studio.client import moment as read_moment
from celestial_backend.studio.project import StudioProject

STUDIO_S = 3.0  # for a Label Studio that is away, as other projects want a look too
AGAIN_S = 3600.0  # a training that failed while Label Studio was away is asked for again after this long
EMBEDDED = f"{MODEL_NAME}:default-"
NOT_CONNECTED = (
    "No training begins by itself, as the project has no model of this backend any more. Connect it again in the"
    " project's settings, Model; `train --project` trains once."
)
PRESS = "no training begins by itself before Start Training was pressed once."


@dataclass(frozen=True)
class Found:
    """
    What a look has found.

    Attributes:
        sight: Stands for all that it saw; the same sight says the same.
        enough: A training is to be asked for.
    """

    sight: int
    labels: int
    missing: str = ""
    brought: str = ""
    enough: bool = False


class Looker:
    """What the labels of projects ask for; for one thread at a time."""

    def __init__(self, settings: Settings, store: ModelStore, studio: Studio) -> None:
        self._settings = settings
        self._store = store
        self._studio = studio
        self._seen: dict[str, int] = {}
        self._last: StudioProject | None = None  # that was asked for: to connect takes longer than to ask

    @property
    def can_ask(self) -> bool:
        """Whether Label Studio's address and a token are set; else no labels can be read."""
        return bool(self._settings.label_studio_url and self._settings.label_studio_api_key)

    def remember(self, project: str, found: Found) -> None:
        """Keep in mind that what was found has been written down."""
        if len(self._seen) >= KNOWN_MAX:
            self._seen.clear()
        self._seen[project] = found.sight

    def look(self, known: Known, last: Job | None) -> Found | None:
        """
        What the labels of a project ask for; None if all is as it was remembered.

        A project whose live model is its own has learned before, and is asked for its new labels alone.

        Args:
            known: What the ledger knows of it.
            last: Its newest job, which has ended.

        Raises:
            ProjectGoneError: Label Studio has no such project.
            CelestialError: It did not say, or there is no model.
        """
        project, tag = self.project(known.project), self._store.live_tag(known.project)
        learned = project_of(tag) == known.project
        config = "" if learned else project.label_config()
        now = project.labels_now()
        # A moment that is to come was written down before the clock was moved back.
        failed = last is not None and last.state == FAILED and 0 <= time.time() - last.requested_at < AGAIN_S
        tired = failed and known.trained_at is None and not known.missing
        written = (known.pressed, known.trained_at, known.read_until, known.missing, known.brought)
        sight = hash((tag, config, now, written, last and last.id, tired))
        if self._seen.get(known.project) == sight:
            return None
        missing, brought = ("", "") if learned else self._hindrance(known, project, tag, config)
        if missing or brought or tired or self._settings.train_every == NEVER:
            return Found(sight, known.labels, missing, brought)
        untried = known.trained_at is None and known.read_until is None
        if self._settings.train_every is None and not learned and (untried or known.missing):
            return self._if_connected(project, Found(sight, known.labels, enough=True))
        labels = project.labels_since(_later(known.trained_at, known.read_until))
        before = now.total - labels if known.trained_labels is None else known.trained_labels
        enough = labels >= counting.enough_new(before, self._settings.train_every)
        return self._if_connected(project, Found(sight, labels, enough=enough))

    def project(self, number: str) -> StudioProject:
        """A project of Label Studio, asked over the connection that there is."""
        last = self._last
        self._last = last.sibling(number) if last else StudioProject(self._studio, number, STUDIO_S)
        return self._last

    def _if_connected(self, project: StudioProject, found: Found) -> Found:
        """What was found; no training of it where Label Studio has no model of ours: events outlive a connection."""
        if not found.enough or project.has_our_model():
            return found
        return replace(found, enough=False, brought=NOT_CONNECTED)

    def _hindrance(self, known: Known, project: StudioProject, tag: str, config: str) -> tuple[str, str]:
        """What labels are missing, and why the live model is not replaced unasked: one of both at most."""
        try:
            unasked = self._settings.train_every != NEVER and not known.pressed
            if unasked and self._is_brought(known.project, tag) and self._knows(tag, config):
                return "", f"{tag} was not trained here, and knows choices of the project: {PRESS}"
            return counting.missing(config, project.annotations()) or "", ""
        except LabelConfigError as error:
            return str(error), ""

    def _is_brought(self, project: str, tag: str) -> bool:
        """Whether a live model is the operator's: neither the embedded one, nor trained for a project."""
        chosen = self._settings.bentomodel is not None or self._settings.model != Settings.model
        if chosen and self._store.pointers.read(project) is None:
            return True
        return project_of(tag) is None and not tag.startswith(EMBEDDED)

    def _knows(self, tag: str, config: str) -> bool:
        """Whether a model knows a choice; of one that was never loaded that is taken for granted."""
        vocabulary = self._store.known(tag)
        return vocabulary is None or bool(vocabulary.choices(config).controls)


def _later(one: str | None, other: str | None) -> str | None:
    """The later of two moments as Label Studio writes them; None without any."""
    return max(filter(None, (one, other)), key=read_moment, default=None)
