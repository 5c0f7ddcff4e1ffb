"""The pictures of a project, labelled or not, as vectors, and how sure the live model is of each."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from celestial_backend.errors import FetchError
from celestial_backend.labels import ChoiceMap, value_of
from celestial_backend.learning.control import Vectors
from celestial_backend.learning.dataset import Reader, Wanted
from celestial_backend.learning.project import Live
from celestial_backend.models.headed import GENERAL
from celestial_backend.models.store import ModelStore
from celestial_backend.pictures.reader import ImageReader
from celestial_backend.settings import Settings
from celestial_backend.studio.client import Studio
from celestial_backend.studio.project import StudioProject


class Seen(NamedTuple):
    """
    The pictures of a project, labelled or not, by task.

    Attributes:
        vectors: The general features of its first picture, shape (D,), of length 1.
        leads: How far the live model prefers one choice over the next, 0 to 1, in the control where it is least.
        labelled: Tasks with a label, also those beyond what was read.
        failed: Why a picture cannot be read.
        made: When the project was, as `StudioProject.made` says.
        choices: How many a control offers, at most.
    """

    vectors: Mapping[int, Vectors]
    leads: Mapping[int, float]
    labelled: Collection[int]
    failed: Mapping[int, str]
    made: str
    choices: int


def see(settings: Settings, store: ModelStore, studio: Studio, images: ImageReader, project_id: str, most: int) -> Seen:
    """
    The pictures of a project's tasks, and what the live model says of them.

    Args:
        settings: Of the process.
        store: Of the live model, and of features that are known.
        studio: Label Studio.
        images: Reads the pictures.
        project_id: Label Studio's number of the project.
        most: Tasks without a label, the first by their ids; and as many with one.

    Raises:
        CelestialError: Label Studio is away, or there is no model.
    """
    project = StudioProject(studio, project_id)
    config = project.label_config()
    choices = ChoiceMap.for_learning(config)
    live = Live(settings, store, store.live_tag(project_id), config)
    made, labelled = project.made(), set(project.labelled())
    reader = Reader(images, store.features, live.spaces(), settings.fetch_threads)
    failed = dict[int, str]()
    wanted: list[Wanted] = []
    reader.read(_noted(_pictures(project.tasks(), labelled, most, choices.data_keys, failed), wanted))
    failed |= {each.task_id: each.problem for each in wanted if each.problem}
    read = [each for each in wanted if each.picture is not None]
    first = {each.task_id: each.picture for each in reversed(read) if each.picture is not None}
    vectors = reader.gallery.given(list(first.values()))[GENERAL] if first else ()
    most_choices = max(len(control.choices) for control in choices.controls)
    return Seen(
        dict(zip(first, vectors, strict=True)), _leads(live, choices, reader, read), labelled,
        {task: why for task, why in failed.items() if task not in first}, made, most_choices,
    )  # fmt: skip


def _noted(pictures: Iterable[Wanted], noted: list[Wanted]) -> Iterator[Wanted]:
    """Pictures one by one: a task may hold a whole one, which is let go once it was read."""
    for each in pictures:
        noted.append(each)
        yield each


def _pictures(
    tasks: Iterable[Mapping[str, Any]],
    labelled: Collection[int],
    most: int,
    keys: Sequence[str],
    failed: dict[int, str],
) -> Iterator[Wanted]:
    """The pictures of tasks, of so many without a label and so many with one at most; those that are named wrongly."""
    left = {True: most, False: most}
    for task in tasks:
        is_labelled = task["id"] in labelled
        if not left[False]:
            return
        if left[is_labelled]:
            left[is_labelled] -= 1
            for key in keys:
                try:
                    yield Wanted(task["id"], key, value_of(task["data"], key))
                except FetchError as error:
                    failed[task["id"]] = str(error)


def _leads(live: Live, choices: ChoiceMap, reader: Reader, read: Sequence[Wanted]) -> dict[int, float]:
    """Of each task, as `Control.lead`, the lowest of the controls that the live model answers."""
    found = dict[int, float]()
    for control in choices.controls:
        mine = [each for each in read if each.data_key == control.data_key and each.picture is not None]
        if not mine or not live.known(control.from_name):
            continue
        said = live.says(control.from_name, reader.gallery.given([each.picture or b"" for each in mine]))
        if control.multiple:
            leads = np.abs(2 * said - 1).min(axis=1)
        else:
            ranked = np.sort(np.pad(said, ((0, 0), (1, 0))), axis=1)
            leads = ranked[:, -1] - ranked[:, -2]
        for each, lead in zip(mine, leads.tolist(), strict=True):
            found[each.task_id] = min(lead, found.get(each.task_id, 1.0))
    return found
