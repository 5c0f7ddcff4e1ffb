"""
Whether scores mean what they say: of 100 answers with 0.8, about 80 are right.

Answers are grouped by their confidence, as many in each group as can be. The calibration error is how far the mean
confidence of a group is from the share that is right in it, on average over all answers (Naeini et al., 2015).

A model from outside is calibrated by one number, fitted on pictures that it did not learn (temperature scaling, Guo et
al., 2017). What it answers stays the same. The new version is a copy of the model with a record of that number beside
it; its own files are not changed.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from celestial_backend.errors import ImageError, ModelError, NotEnoughDataError
from celestial_backend.labels import some
from celestial_backend.learning import heads
from celestial_backend.learning.folder import Files
from celestial_backend.models.classifier import INDEPENDENT, Model
from celestial_backend.models.manifest import Calibration
from celestial_backend.models.store import ModelStore
from celestial_backend.pictures.hooks import LEAST_SHARE, tempered
from celestial_backend.planets.examples import files_by_class
from celestial_backend.settings import Settings
from celestial_backend.trust.intervals import LEVEL, wilson

logger = logging.getLogger(__name__)
Floats = NDArray[np.float64]
BINS, EACH = 10, 20  # groups at the most, and answers that each has on average at least
DRAWN, SEED = 500, 47  # resamples
LEAST_PICTURES = 50
BATCH = 32
Report = Callable[[int, int], None]  # pictures that were answered, and how many there are


@dataclass(frozen=True)
class Bin:
    """
    Answers of about the same confidence.

    Attributes:
        confidence: Their mean.
        right: The share that is right.
        low: Where the interval of that share begins (Wilson).
        high: Where it ends.
        count: How many they are.
    """

    confidence: float
    right: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class CalibrationError:
    """
    How far confidence is from accuracy, 0 to 1.

    Attributes:
        value: As it is measured; of few answers it is never 0, however right the scores are.
        low: Where the interval begins; 0 where right scores would show as much by chance.
        high: Where it ends.
        chance: What scores that are right would show of so many answers, on average.
        count: Of answers.
    """

    value: float
    low: float
    high: float
    chance: float
    count: int


def reliability(confidence: ArrayLike, right: ArrayLike, bins: int = BINS) -> list[Bin]:
    """
    Answers in groups of about the same size, the least sure first.

    Args:
        confidence: Shape (N,), 0 to 1, of what was answered.
        right: Shape (N,), whether that is right.
        bins: Groups at the most; answers of one confidence are never parted, and of few there are fewer groups.

    Raises:
        ValueError: The two differ in length, or a confidence is none.
    """
    given, true = _checked(confidence, right)
    found = []
    for rows in _groups(given, bins):
        share = float(true[rows].mean())
        found.append(Bin(float(given[rows].mean()), share, *wilson(share, len(rows)), len(rows)))
    return found


def calibration_error(confidence: ArrayLike, right: ArrayLike, bins: int = BINS) -> CalibrationError | None:
    """
    The expected calibration error, with an interval.

    Its end is that of a bootstrap. Its begin is the bootstrap's too, turned round (the basic one), but 0 where scores
    that are right show as much in one of forty cases: noise makes the error larger, never smaller. Where all answers
    are right, or none, a bootstrap knows nothing, and the interval is as wide as Wilson's for their share.

    Args:
        confidence: As for `reliability`.
        right: As there.
        bins: As there.

    Returns:
        None without an answer.

    Raises:
        ValueError: As for `reliability`.
    """
    given, true = _checked(confidence, right)
    if not len(given):
        return None
    place = np.empty(len(given), int)
    for number, rows in enumerate(_groups(given, bins)):
        place[rows] = number
    rng, count = np.random.default_rng(SEED), len(given)
    value = _error(place, given - true)
    again = [_error(place[rows], (given - true)[rows]) for rows in _draws(rng, count)]
    by_chance = [_error(place, given - (rng.random(count) < given)) for _ in range(DRAWN)]
    large, usual = (float(np.quantile(drawn, (1 + LEVEL) / 2)) for drawn in (again, by_chance))
    low = 0.0 if value <= usual else max(0.0, min(value, 2 * value - large))
    if true.min() == true.max():
        few, many = wilson(float(true[0]), count)
        low, large = max(0.0, min(low, value - (many - few))), max(large, min(1.0, value + many - few))
    return CalibrationError(value, low, max(value, large), float(np.mean(by_chance)), count)


def _checked(confidence: ArrayLike, right: ArrayLike) -> tuple[Floats, Floats]:
    given, true = np.asarray(confidence, np.float64), np.asarray(right, np.float64)
    if given.ndim != 1 or given.shape != true.shape:
        raise ValueError(f"Each answer must have a confidence and be right or not, got {given.shape} and {true.shape}.")
    if not ((given >= 0) & (given <= 1)).all() or not np.isin(true, (0, 1)).all():
        raise ValueError("A confidence must be a number from 0 to 1, and an answer is right or not.")
    return given, true


def _groups(given: Floats, bins: int) -> Iterator[NDArray[Any]]:
    """The rows of each group."""
    if not len(given):
        return
    count = max(1, min(bins, len(given) // EACH))
    edges = np.unique(np.quantile(given, np.arange(1, count) / count))
    place = np.searchsorted(edges, given, side="right")
    for number in np.unique(place):
        yield np.flatnonzero(place == number)


def _draws(rng: np.random.Generator, count: int) -> Iterator[NDArray[Any]]:
    return (rng.integers(count, size=count) for _ in range(DRAWN))


def _error(place: NDArray[Any], gaps: Floats) -> float:
    return float(np.abs(np.bincount(place, gaps)).sum() / len(gaps))


@dataclass(frozen=True)
class Calibrated:
    """
    A model's calibrated version.

    Attributes:
        tag: Of the new version.
        of: The tag of the model that it was before.
        temperature: What the logarithms of its probabilities are divided by.
        pictures: It was fitted on.
        before: The calibration error of the model as it was.
        after: The same of the new version, each picture asked before it was fitted on.
        missing: Classes of the model that the folder has no picture of.
        left_out: Files that are no pictures, or lie in two classes.
        everywhere: Whether all machines find it; only files of this machine are it otherwise.
    """

    tag: str
    of: str
    temperature: float
    pictures: int
    before: CalibrationError
    after: CalibrationError
    missing: tuple[str, ...]
    left_out: tuple[str, ...]
    everywhere: bool


def calibrate(
    store: ModelStore, settings: Settings, tag: str, folder: Path, report: Report | None = None
) -> Calibrated:
    """
    Fit a temperature to a model from outside, and put the calibrated version beside it.

    Args:
        store: Holds the model.
        settings: Its limits for pictures hold for these too.
        tag: Of the model, as ``name:version``.
        folder: One sub-folder for each class, under the names that the model uses.
        report: Told how far it is.

    Raises:
        ModelError: The model is none from outside, cannot be loaded, or its classes are others than the folder's.
        TrainingError: The folder is none, or has too few pictures.
    """
    _check_from_outside(store, tag)
    files_of = files_by_class(folder)
    _check_enough([name for name, mine in files_of.items() for _ in mine], folder)
    model = store.model(tag)
    classes = model.vocabulary.classes
    if unknown := sorted(set(files_of) - set(classes)):
        raise ModelError(
            f"Each sub-folder must be named after a class of {tag}, and {some(unknown)} is none. It knows "
            f"{some(classes)}. Rename the sub-folders."
        )
    class_of = {path: name for name, mine in files_of.items() for path in mine}
    answers = _answers(model, Files(settings), list(class_of), report)
    shown, left_out = _once(answers, class_of)
    _check_enough([class_of[path] for path in shown], folder)
    said = np.array([answers[path].row for path in shown])
    if not np.isfinite(said).all():
        raise ModelError(f"{tag} must give finite probabilities for all pictures. Look at its postprocess.")
    truths = np.array([classes.index(class_of[path]) for path in shown])
    temperature, unseen = _fitted(said, truths)
    right = said.argmax(axis=1) == truths
    before, after = (calibration_error(rows.max(axis=1), right) for rows in (said, unseen))
    if before is None or after is None:
        raise NotEnoughDataError("A calibration needs pictures.")
    record = Calibration(tag, round(temperature, 4), len(truths), round(before.value, 4), round(after.value, 4))
    made, everywhere = store.add_calibrated(record)
    missing = tuple(name for name in classes if name not in files_of)
    return Calibrated(made, tag, record.temperature, len(truths), before, after, missing, left_out, everywhere)


@dataclass(frozen=True)
class _Answer:
    """What a model says of a file, shape (K,), and what tells it from other files."""

    digest: bytes
    row: Floats


def _check_from_outside(store: ModelStore, tag: str) -> None:
    """
    Refuse, without loading it, a model that must not be calibrated here.

    Raises:
        ModelError: The message says why.
    """
    found = store.registry.describe(store.held(tag))
    of = found.manifest.calibration
    if of is not None:
        raise ModelError(f"{tag} is calibrated already. Calibrate the model that it was before, {of.of}, once more.")
    if found.calibrated:
        raise ModelError(
            f"Only a model from outside can be calibrated, and {tag} was when it was trained. "
            "Label pictures that it gets wrong, and train it again."
        )
    if found.metadata.get(INDEPENDENT):
        raise ModelError(
            f"The classes of {tag} may hold at once, each with a probability by itself, and a folder tells one class "
            "of each picture. Such a model cannot be calibrated here."
        )


def _check_enough(names: Sequence[str], folder: Path) -> None:
    if len(names) < LEAST_PICTURES or len(set(names)) < 2:
        raise NotEnoughDataError(
            f"A calibration needs {LEAST_PICTURES} pictures, of two classes or more, that the model did not learn. "
            f"{folder} has {len(names)}, of {len(set(names))}. Add pictures."
        )


def _answers(model: Model, files: Files, paths: Sequence[Path], report: Report | None) -> dict[Path, _Answer]:
    """What a model says of all files that are pictures."""

    def prepared(path: Path) -> tuple[bytes, NDArray[np.float32]] | None:
        try:
            data = files.file(path)
            return hashlib.sha256(data).digest(), model.prepare(files.decoded(path, data))
        except ImageError as error:
            logger.warning("%s is left out: %s", path, error)
            return None

    found: dict[Path, _Answer] = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(paths), BATCH):
            part = paths[start : start + BATCH]
            ready = {path: each for path, each in zip(part, pool.map(prepared, part), strict=True) if each is not None}
            if ready:
                rows = model.answers(np.concatenate([inputs for _, inputs in ready.values()]))[0]
                found |= {path: _Answer(ready[path][0], row) for path, row in zip(ready, rows, strict=True)}
            if report is not None:
                report(start + len(part), len(paths))
    return found


def _once(answers: Mapping[Path, _Answer], class_of: Mapping[Path, str]) -> tuple[list[Path], tuple[str, ...]]:
    """Each picture once, and the files that are none or whose picture lies in two classes."""
    alike: dict[bytes, list[Path]] = {}
    for path, answer in answers.items():
        alike.setdefault(answer.digest, []).append(path)
    one_class = [paths for paths in alike.values() if len({class_of[path] for path in paths}) == 1]
    kept = {path for paths in one_class for path in paths}
    return [paths[0] for paths in one_class], tuple(str(path) for path in class_of if path not in kept)


def _fitted(said: Floats, truths: NDArray[np.integer]) -> tuple[float, Floats]:
    """The temperature for all pictures, and the probabilities of each with one that was fitted on others, (N, K)."""
    targets = np.eye(said.shape[1])[truths]
    logs, fold_of = np.log(np.clip(said, LEAST_SHARE, None)), heads.folds(targets)
    unseen = np.empty_like(logs)
    for fold in np.unique(fold_of):
        judged = fold_of == fold
        unseen[judged] = tempered(said[judged], heads.temperature(logs[~judged], targets[~judged]))
    return heads.temperature(logs, targets), unseen
