"""
Examples to learn from: a folder of pictures, the split into learned and held out, rendered ones.

A picture of a folder is decoded as one of a task is, so training sees the pixels that serving sees.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import Image

from celestial_backend.errors import ImageError, NotEnoughDataError, TrainingError
from celestial_backend.labels import by_class, some
from celestial_backend.pictures.decode import decode
from celestial_backend.planets.renderer import BODIES, render

logger = logging.getLogger(__name__)

LEAST_CLASSES = 2
LEAST_PER_CLASS = 3  # pictures: fewer leave nothing to learn from once some are held out
LONGEST_SIDE_PX = 512  # pictures are kept in memory while training, no larger than this
MAX_PIXELS = 100_000_000


@dataclass(frozen=True)
class Example:
    """One picture to learn from; ``load`` is called once or twice in a training, by its thread."""

    load: Callable[[], Image.Image]
    class_name: str
    name: str  # decides whether it is held out, whatever folder it is in
    weight: float = 1.0


def read_folder(folder: Path) -> list[Example]:
    """
    The examples of a folder with one sub-folder for each class, in the order of their names.

    Files that cannot be read as pictures are left out and reported in the log. The pictures
    are decoded here, once, and kept in memory.

    Raises:
        TrainingError: The folder is none.
        NotEnoughDataError: Fewer than two classes, or a class with too few pictures.
    """
    examples, skipped = [], []
    files_of = files_by_class(folder)
    for class_name, files in files_of.items():
        for path in files:
            try:
                picture = _open(path)
            except (OSError, ImageError):
                skipped.append(f"{class_name}/{path.name}")
            else:
                examples.append(Example(picture.copy, class_name, path.name))
    if skipped:
        logger.warning("%d files are no pictures and were left out: %s", len(skipped), ", ".join(skipped[:20]))
    check_counts([example.class_name for example in examples], list(files_of))
    return examples


def files_by_class(folder: Path) -> dict[str, list[Path]]:
    """
    The files of each class by its name, all in the order of their names; see `labels.by_class`.

    What was passed over or understood is reported in the log.

    Raises:
        TrainingError: It is no folder, cannot be read, or its sub-folders are no classes.
    """
    if not folder.is_dir():
        raise TrainingError(f"The training data must be a folder with one sub-folder for each class, got {folder}.")
    try:
        found = by_class(folder)
        for name in found.classes:
            name.encode()
    except UnicodeEncodeError as error:
        raise TrainingError(f"A class must have a name in UTF-8, and {error.object!r} is none. Rename it.") from error
    except OSError as error:
        raise TrainingError(f"The training data in {folder} cannot be read ({error.strerror}).") from error
    if found.doubt:
        raise TrainingError(found.doubt)
    for note in found.notes:
        logger.warning("%s", note)
    if found.loose:
        logger.warning("%d files lie in no class, and are left out: %s", len(found.loose),
                       some(str(path.relative_to(folder)) for path in found.loose))  # fmt: skip
    return {name: list(files) for name, files in found.classes.items()}


def _open(path: Path) -> Image.Image:
    picture = decode(path.read_bytes(), MAX_PIXELS)
    picture.thumbnail((LONGEST_SIDE_PX, LONGEST_SIDE_PX))
    return picture


def check_counts(class_names: Iterable[str], classes: Sequence[str]) -> None:
    """
    Make sure that every class has enough to learn from and to hold out.

    Args:
        class_names: Of each readable picture.
        classes: All that there are.

    Raises:
        NotEnoughDataError: The message gives the counts.
    """
    counts = Counter(class_names)
    if len(classes) < LEAST_CLASSES or any(counts[name] < LEAST_PER_CLASS for name in classes):
        seen = ", ".join(f"{name}: {counts[name]}" for name in classes) or "no class at all"
        raise NotEnoughDataError(
            f"Training needs at least {LEAST_CLASSES} classes with {LEAST_PER_CLASS} readable pictures each, "
            f"got {seen}. Add pictures or remove the class."
        )


def split(examples: Sequence[Example], share: float) -> tuple[list[Example], list[Example]]:
    """
    To learn from, and held out; decided within each class by the hash of the names alone.

    Args:
        examples: In any order.
        share: Of each class to hold out; at least one example is, and at least one is not.
    """
    ranked: dict[str, list[Example]] = {}
    for example in sorted(examples, key=lambda one: (hashlib.sha256(one.name.encode()).hexdigest(), one.name)):
        ranked.setdefault(example.class_name, []).append(example)
    learn, held_out = [], []
    for class_name in sorted(ranked):
        mine = ranked[class_name]
        count = min(len(mine) - 1, max(1, round(share * len(mine))))
        held_out += mine[:count]
        learn += mine[count:]
    return learn, held_out


def rendered(classes: Sequence[str], per_class: int, seed: int) -> list[Example]:
    """Examples from the renderer, ``per_class`` for each of those classes that it knows."""
    return [
        Example(partial(render, name, (seed, index)), name, f"rendered {seed} {name} {index}")
        for name in classes
        if name in BODIES
        for index in range(per_class)
    ]
