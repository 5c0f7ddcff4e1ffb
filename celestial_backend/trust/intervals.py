"""
Shares, differences, ratios and typical values, with 95 % intervals that are honest where there is little.

Several people label one task, and their labels resemble each other. So tasks are what counts: the more the labels of
a task are alike, the less each says (the design effect of Kish, 1965).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95
TRIMMED = 0.2  # of the times at either end
DRAWN, SEED = 1000, 17  # resamples
MANY, DRAWN_OF_MANY = 20_000, 100  # tasks, and resamples of more, whose interval is narrow anyway
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """
    A value with its 95 % interval.

    Attributes:
        n: Labels that it rests on.
        tasks: Of so many tasks.
    """

    value: float
    low: float
    high: float
    n: int
    tasks: int = 0

    def __add__(self, number: float) -> Interval:
        return Interval(self.value + number, self.low + number, self.high + number, self.n, self.tasks)

    def __neg__(self) -> Interval:
        return Interval(-self.value, -self.high, -self.low, self.n, self.tasks)


def share(hits: Sequence[bool], tasks: Sequence[Hashable], weights: Sequence[float] | None = None) -> Interval | None:
    """
    The share of labels that are hits, by Wilson's interval for as many labels as the tasks are worth.

    Args:
        hits: Of each label.
        tasks: The task of each label.
        weights: How much each label counts, above 0; without them all count the same.

    Returns:
        None without a label.
    """
    if not hits:
        return None
    weighed = np.ones(len(hits)) if weights is None else np.asarray(weights, float)
    place, good = np.array(_numbers(tasks)), np.asarray(hits, float)
    n, count = len(hits), int(place.max()) + 1
    right, wrong = float(weighed @ good), float(weighed @ (1 - good))
    value = right / (right + wrong)  # exactly 1 where all are hits
    low, high = wilson(value, _worth(value, good, weighed, place), None if count == n else count - 1)
    return Interval(value, low, high, n, count)


def wilson(value: float, n: float, freedom: int | None = None) -> tuple[float, float]:
    """Wilson's interval for a share of n, which need not be whole; with Student's t where tasks were counted."""
    z = _critical(freedom)
    middle, spread = value + z * z / (2 * n), z * math.sqrt(value * (1 - value) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # At the ends Wilson's bound is exact, and rounding is not.
    return (0.0 if value <= 0 else max(0.0, (middle - spread) / scale),
            1.0 if value >= 1 else min(1.0, (middle + spread) / scale))  # fmt: skip


def difference(one: Interval, other: Interval) -> Interval:
    """One less another, of different tasks; Newcombe's hybrid of their intervals (1998)."""
    value = one.value - other.value
    low = value - math.hypot(one.value - one.low, other.high - other.value)
    high = value + math.hypot(one.high - one.value, other.value - other.low)
    return Interval(value, low, high, one.n + other.n, one.tasks + other.tasks)


def ratio(one: Interval, other: Interval) -> Interval | None:
    """
    One over another, both shares of different tasks; the hybrid of their intervals of Donner and Zou (2012).

    Returns:
        None where the other's is not seen at all, so that it may be as small as you like.
    """
    if other.value <= 0 or other.low <= 0:
        return None
    product = one.value * other.value

    def end(mine: float, its: float, sign: int) -> float:
        scale = its * (2 * other.value - its)
        if abs(scale) < 1e-12:
            return mine * (2 * one.value - mine) / (2 * product) if product else 0.0
        return (product + sign * math.sqrt(max(0.0, product**2 - mine * (2 * one.value - mine) * scale))) / scale

    low, high = end(one.low, other.high, -1), end(one.high, other.low, 1)
    return Interval(one.value / other.value, max(0.0, low), high, one.n + other.n, one.tasks + other.tasks)


@dataclass(frozen=True)
class Times:
    """How long somebody took: with and without a pre-label, and the task of each."""

    with_s: Sequence[float]
    with_tasks: Sequence[int]
    without_s: Sequence[float]
    without_tasks: Sequence[int]


def typical(people: Sequence[Times]) -> tuple[Interval, Interval, Interval]:
    """
    The typical seconds without a pre-label, with one, and the first less the second.

    Each person is compared with themselves, and counts by their labels. Typical is the mean of the middle three
    fifths (Yuen, 1974), so that neither a coffee nor a slip counts.

    Args:
        people: At least one, each with at least 3 times of either kind.
    """
    sizes = np.array([len(each.with_s) + len(each.without_s) for each in people], float)
    weights = sizes / sizes.sum()
    found, parts, worth = [], list[dict[int, float]](), []
    for kind in ("without", "with"):
        value, part, middle = 0.0, dict[int, float](), 0
        for weight, each in zip(weights, people, strict=True):
            mean, moved, kept = _trimmed(np.asarray(getattr(each, f"{kind}_s"), float))
            value, middle = value + weight * mean, middle + kept
            for task, by in zip(getattr(each, f"{kind}_tasks"), moved, strict=True):
                part[task] = part.get(task, 0.0) + float(weight * by)
        found.append(value)
        parts.append(part)
        worth.append(min(middle, len(part)) - 1)
    both = {task: parts[0].get(task, 0.0) - parts[1].get(task, 0.0) for task in parts[0].keys() | parts[1].keys()}
    labels = [sum(len(getattr(each, f"{kind}_s")) for each in people) for kind in ("without", "with")]
    told = [(found[0], parts[0], worth[0], labels[0]), (found[1], parts[1], worth[1], labels[1]),
            (found[0] - found[1], both, min(worth), sum(labels))]  # fmt: skip
    one, other, less = (_around(*each) for each in told)
    return one, other, less


def middle(values: Sequence[float], tasks: Sequence[int]) -> Interval | None:
    """The typical one of some seconds, as in `typical`; None of fewer than 3."""
    if len(values) < 3:
        return None
    value, moved, kept = _trimmed(np.asarray(values, float))
    part: dict[int, float] = {}
    for task, by in zip(tasks, moved, strict=True):
        part[task] = part.get(task, 0.0) + float(by)
    return _around(value, part, kept - 1, len(values))


def _around(value: float, part: dict[int, float], freedom: int, n: int) -> Interval:
    spread = _critical(max(1, freedom)) * math.sqrt(sum(by * by for by in part.values()))
    return Interval(float(value), float(value - spread), float(value + spread), n, len(part))


def _trimmed(values: Floats) -> tuple[float, Floats, int]:
    """The trimmed mean, how far each value moves it (their squares sum to its variance), and how many are left."""
    cut = int(TRIMMED * len(values))
    ordered = np.sort(values)
    kept = ordered[cut : len(values) - cut]
    drawn_in = np.clip(values, kept[0], kept[-1])
    scale = math.sqrt(len(kept) * max(1, len(kept) - 1))
    return float(kept.mean()), (drawn_in - drawn_in.mean()) / scale, len(kept)


def alpha(answers: Sequence[Sequence[Hashable]]) -> Interval | None:
    """
    Krippendorff's alpha for names: 1 is full agreement, 0 what chance gives.

    Args:
        answers: Of each task, what each person said; those with one answer say nothing.

    Returns:
        None where nobody could have disagreed: fewer than two tasks with two answers, or one answer everywhere.
    """
    several = [each for each in answers if len(each) > 1]
    names = _numbers([name for each in several for name in each])
    if len(several) < 2 or not any(names):
        return None
    size = np.array([len(each) for each in several], float)
    task, name = np.repeat(np.arange(len(several)), size.astype(int)), np.array(names)
    counts = np.unique(np.stack([task, name]), axis=1, return_counts=True)
    same = np.bincount(counts[0][0], counts[1].astype(float) ** 2)
    differing = (size**2 - same) / (size - 1)

    def of(weights: Floats) -> tuple[float, float]:
        total, n = np.bincount(name, weights[task]), float(weights @ size)
        return float(weights @ differing) / n, float(n**2 - total @ total) / (n * (n - 1))

    return _beyond_chance(of, len(several), len(names))


def kappa(pairs: Sequence[tuple[Hashable, Hashable]]) -> Interval | None:
    """
    Cohen's kappa of two people: 1 is full agreement, 0 what chance gives.

    Args:
        pairs: What each said to a task.

    Returns:
        None where they could not have disagreed by chance.
    """
    names = np.array(_numbers([name for pair in pairs for name in pair])).reshape(-1, 2)
    if len(pairs) < 2 or not names.any():
        return None
    differing, most = (names[:, 0] != names[:, 1]).astype(float), int(names.max()) + 1

    def of(weights: Floats) -> tuple[float, float]:
        one, other = (np.bincount(names[:, side], weights, most) for side in (0, 1))
        n = float(weights.sum())
        return float(weights @ differing) / n, 1 - float(one @ other) / n**2

    return _beyond_chance(of, len(pairs), 2 * len(pairs))


def _beyond_chance(of: Callable[[Floats], tuple[float, float]], tasks: int, n: int) -> Interval | None:
    """
    The agreement beyond chance: 1 less the disagreement that is seen over that which chance gives.

    The interval is the wider of a bootstrap over tasks and of Wilson's for the disagreement: of disagreement that was
    hardly ever seen a bootstrap knows nothing.

    Args:
        of: Both disagreements, by how often each task counts: shape (T,).
        tasks: T.
        n: Labels.
    """
    seen, chance = of(np.ones(tasks))
    if chance <= 0:
        return None
    rng, again = np.random.default_rng(SEED), list[float]()
    for _ in range(DRAWN if tasks <= MANY else DRAWN_OF_MANY):
        drawn, by_chance = of(np.bincount(rng.integers(tasks, size=tasks), minlength=tasks).astype(float))
        if by_chance > 0:  # else all that was drawn is one answer
            again.append(1 - drawn / by_chance)
    low, high = np.quantile(again, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    few, many = wilson(seen, tasks)
    return Interval(1 - seen / chance, float(min(low, 1 - many / chance)), float(max(high, 1 - few / chance)), n,
                    tasks)  # fmt: skip


def _worth(value: float, good: Floats, weights: Floats, place: NDArray[Any]) -> float:
    """How many labels that all count the same, each of a task of its own, would tell as much."""
    whole = float(weights.sum()) ** 2
    most = whole / float(weights @ weights)
    of_task = np.bincount(place, weights)
    if len(of_task) == len(place):
        return most
    least = whole / float(of_task @ of_task)  # as if all labels of a task were the same
    apart = np.bincount(place, weights * (good - value))
    spread = float(apart @ apart) * len(of_task) / max(1, len(of_task) - 1) / whole
    return float(np.clip(value * (1 - value) / spread, least, most)) if spread > 0 and 0 < value < 1 else least


def _numbers(tasks: Sequence[Hashable]) -> list[int]:
    known: dict[Hashable, int] = {}
    return [known.setdefault(task, len(known)) for task in tasks]


def _critical(freedom: int | None) -> float:
    from scipy.stats import norm, t

    return float(norm.ppf((1 + LEVEL) / 2) if freedom is None else t.ppf((1 + LEVEL) / 2, max(1, freedom)))
