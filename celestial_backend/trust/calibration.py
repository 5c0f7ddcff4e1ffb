"""
Whether scores mean what they say: of 100 answers with 0.8, about 80 are right.

Answers are grouped by their confidence, as many in each group as can be. The calibration error is how far the mean
confidence of a group is from the share that is right in it, on average over all answers (Naeini et al., 2015).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from celestial_backend.trust.intervals import LEVEL, wilson

Floats = NDArray[np.float64]
BINS, EACH = 10, 20  # groups at the most, and answers that each has on average at least
DRAWN, SEED = 500, 47  # resamples


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
