"""A folder of pictures, one sub-folder for each class, made into a head that answers any control of any project."""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from celestial_backend.errors import FetchError, NotEnoughDataError, TrainingError, file_too_large
from celestial_backend.features import FeatureCache
from celestial_backend.labels import Columns, Control
from celestial_backend.learning.control import Champion, Lesson, teach
from celestial_backend.learning.dataset import PICTURES_MAX, Dataset, Example, Reader, Report, Wanted, copies_for, rank
from celestial_backend.learning.votes import UNAIDED
from celestial_backend.models import headed
from celestial_backend.models.embedders import open_embedder
from celestial_backend.models.headed import GENERAL
from celestial_backend.models.manifest import Counts, FolderCounts, Manifest, Scores
from celestial_backend.models.registry import Registry
from celestial_backend.pictures.decode import decode
from celestial_backend.planets.examples import check_counts, files_by_class
from celestial_backend.settings import MODEL_NAME, Settings

logger = logging.getLogger(__name__)

ANY = ""  # the control that the head is of
KEY = "image"
NAMED_MAX = 20  # files in a line of the log


@dataclass(frozen=True)
class Learned:
    """A model of the store, what cross-validation says of it, and the files that it did not learn, or doubts."""

    tag: str
    classes: tuple[str, ...]
    scores: Scores
    left_out: tuple[str, ...]
    suspects: tuple[str, ...]


def learn_folder(folder: Path, settings: Settings, report: Report | None = None) -> Learned:
    """
    Learn a folder, and make what comes of it the store's latest model, which all projects get.

    Files that cannot be read as pictures are left out and reported in the log.

    Args:
        folder: One sub-folder for each class.
        settings: Its limits for pictures hold for these too.
        report: As for `Reader.read`.

    Raises:
        TrainingError: The folder is none, or what was learned is no better than guessing.
        NotEnoughDataError: Fewer than two classes, or a class with too few pictures.
        ModelError: The embedder, or the store, cannot be used.
    """
    files_of, cache = files_by_class(folder), FeatureCache(settings)
    classes, embedder = tuple(files_of), open_embedder(settings)
    check_counts([name for name, mine in files_of.items() for _ in mine], classes)
    files = _chosen([path for mine in files_of.values() for path in mine])
    wanted = [Wanted(number, KEY, path) for number, path in enumerate(files)]
    reader = Reader(Files(settings), cache, {GENERAL: embedder}, os.cpu_count() or 2)
    reader.read(wanted, copies_for(len(wanted)), report)
    cache.close()
    class_of = {path: name for name, mine in files_of.items() for path in mine}
    examples, left_out = _examples(files, wanted, class_of)
    check_counts([choice for example in examples for choice in example.choices], classes)
    data = Dataset({ANY: examples}, reader.gallery, {}, Counts(), None, _digest(examples))
    lesson = teach(_control(classes), data, Champion())
    if lesson is None:
        raise NotEnoughDataError("Training needs two classes that differ. Add pictures.")
    if not lesson.verdict.publish:
        raise TrainingError(f"No model was made of {folder}: {lesson.verdict.reason}.")
    counts = FolderCounts(dict(Counter(choice for example in examples for choice in example.choices)), len(left_out))
    manifest = Manifest(
        reason=f"{lesson.verdict.reason}.",
        scores={ANY: lesson.verdict.scores},
        training={ANY: lesson.fit},
        labels=counts,
        digest=data.digest,
    )
    tag = _save(lesson, embedder.name, manifest, Registry(settings.bentoml_home))
    suspects = tuple(_name(files[number]) for number in lesson.suspects)
    return Learned(tag, lesson.head.classes, lesson.verdict.scores, left_out, suspects)


class Files:
    """Files of this machine, within the limits for pictures; safe between threads."""

    def __init__(self, settings: Settings) -> None:
        self._max_mb = settings.image_max_mb
        self._max_pixels = settings.image_max_megapixels * 1e6

    def file(self, value: object, task_id: int | None = None) -> bytes:  # noqa: ARG002 - as of a task's picture
        """
        The bytes of a path.

        Raises:
            TooLargeError: They are too many.
            FetchError: They cannot be read.
        """
        path = Path(str(value))
        try:
            size_mb = path.stat().st_size / 1e6
            if size_mb > self._max_mb:
                raise file_too_large(self._max_mb, size_mb)
            return path.read_bytes()
        except OSError as error:
            raise FetchError(f"it cannot be read ({error.strerror}).") from error

    def decoded(self, value: object, data: bytes) -> Image.Image:  # noqa: ARG002
        """
        The picture in a file's bytes.

        Raises:
            ImageError: As `decode`.
        """
        return decode(data, self._max_pixels)

    def close(self) -> None:
        """Nothing is open."""


def _chosen(files: Sequence[Path]) -> list[Path]:
    if len(files) <= PICTURES_MAX:
        return list(files)
    logger.warning("Of %d files, %d are learned, by the hashes of their names", len(files), PICTURES_MAX)
    return sorted(sorted(files, key=lambda path: rank("chosen", _name(path)))[:PICTURES_MAX])


def _examples(
    files: Sequence[Path], wanted: Sequence[Wanted], class_of: Mapping[Path, str]
) -> tuple[list[Example], tuple[str, ...]]:
    """The examples, each picture once, and the files that are none; one that is in two classes is in neither."""
    places: dict[bytes, list[int]] = {}
    left_out = {}
    for number, each in enumerate(wanted):
        if each.picture is None:
            left_out[_name(files[number])] = each.problem
        else:
            places.setdefault(each.picture, []).append(number)
    examples = []
    for picture, numbers in places.items():
        names = {class_of[files[number]] for number in numbers}
        if len(names) > 1:
            left_out |= {_name(files[number]): f"it is in {' and '.join(sorted(names))}" for number in numbers}
        else:
            examples.append(Example(picture, frozenset(names), 1.0, tuple(numbers), (), UNAIDED))
    _tell(left_out)
    return examples, tuple(left_out)


def _tell(left_out: Mapping[str, str]) -> None:
    for name, problem in list(left_out.items())[:NAMED_MAX]:
        logger.warning("%s is left out: %s", name, problem)
    if len(left_out) > NAMED_MAX:
        logger.warning("%d more files are left out", len(left_out) - NAMED_MAX)


def _control(classes: tuple[str, ...]) -> Control:
    itself = {name: name for name in classes}
    return Control(ANY, "", KEY, False, 1, None, classes, itself, itself, Columns(ANY, 0, classes))


def _save(lesson: Lesson, embedder: str, manifest: Manifest, registry: Registry) -> str:
    with tempfile.TemporaryDirectory() as place:
        manifest = headed.save(Path(place), [lesson.head], embedder, manifest=manifest)
        return registry.add_heads(f"{MODEL_NAME}:folder-{secrets.token_hex(4)}", Path(place), manifest)


def _digest(examples: Sequence[Example]) -> str:
    lines = sorted(f"{example.picture.hex()} {''.join(example.choices)}" for example in examples)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:32]


def _name(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"
