"""
How unlike a picture is to all that was learned, by its features.

There are two measures, and none is the better one everywhere: the distance to the nearest learned picture, and the
distance to the nearest class less most of the distance to the middle of all (after Ren et al., 2021, arXiv
2106.09022; but both in the metric of the classes, and what lies outside the principal axes counts). The labels
themselves choose: each class is left out in turn, and the measure that tells its pictures from the others' is taken.
Beyond a limit, which `FALSE_ALARMS` of the learned pictures would pass if they were new, a picture is unknown.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.float32]
Floats = NDArray[np.float64]

FALSE_ALARMS = 0.02
LEAST_ROWS, LEAST_SKILL = 12, 0.6  # pictures, and area under the curve for classes left out, for there to be a limit
FOLDS, TURNS, ROWS_MAX = 5, 8, 600  # of pictures, of classes left out, and of rows that are looked at
DIMENSIONS, SHRINK, OF_ALL = 128, 0.6, 0.8  # principal axes; towards a sphere; of the distance to all that is taken off
REACH = 0.9  # of the pictures of a group have a neighbour within it
COUNTED = 100  # known pictures from which on the limit is counted; for fewer their distances are taken for normal
LEAST_DISTANCE = 0.003  # of vectors of length 1: ten times what rounding makes of equal ones
OLD = "relative"  # a measure of old
SEED = 41


def unit(vectors: Vectors) -> Vectors:
    """Vectors of length 1, shape (N, D), in the same directions; heads are learned on such."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.maximum(lengths, 1e-12), np.float32)


@dataclass(frozen=True)
class Nearest:
    """
    The distance to the nearest of the learned pictures.

    Attributes:
        bank: Shape (M, D), those pictures.
        reach: Shape (M,), what each one's distances are divided by.
    """

    bank: Vectors
    reach: Vectors

    name: ClassVar[str] = "nearest"

    @classmethod
    def of(cls, vectors: Vectors, classes: NDArray[np.integer]) -> Nearest:
        """For N pictures of the given classes."""
        del classes
        return cls(vectors, np.ones(len(vectors), np.float32))

    def distance(self, vectors: Vectors) -> Floats:
        """Shape (N,)."""
        squares = (vectors**2).sum(axis=1)[:, None] + self._squares - 2 * (vectors @ self.bank.T)
        return np.asarray((np.sqrt(np.maximum(squares, 0)) / self.reach).min(axis=1), np.float64)

    @cached_property
    def _squares(self) -> Vectors:
        return np.asarray((self.bank**2).sum(axis=1))


@dataclass(frozen=True)
class Relative:
    """
    The distance to the nearest class, less most of that to the middle of all; in units of how classes scatter.

    Attributes:
        mean: Shape (D,).
        axes: Shape (D, d), orthonormal: those along which the learned pictures differ most.
        within: Shape (d, d); after this product, classes scatter alike along all axes.
        centres: Shape (K, d), of the classes, after `within`.
        beyond: Shape (), what the distance to all axes counts.
    """

    mean: Vectors
    axes: Vectors
    within: Vectors
    centres: Vectors
    beyond: Vectors

    name: ClassVar[str] = "relative to all"

    @classmethod
    def of(cls, vectors: Vectors, classes: NDArray[np.integer]) -> Relative:
        """For N pictures of the given classes."""
        mean = vectors.mean(axis=0)
        centred = vectors - mean
        axes = np.linalg.svd(centred, full_matrices=False)[2][:DIMENSIONS].T
        rows = (centred @ axes).astype(np.float64)
        names, row_of = np.unique(classes, return_inverse=True)
        centres = np.stack([rows[row_of == each].mean(axis=0) for each in range(len(names))])
        own = rows - centres[row_of]
        scatter = own.T @ own / len(own)
        sphere = SHRINK * max(float(np.trace(scatter)) / len(scatter), 1e-9)
        values, turned = np.linalg.eigh((1 - SHRINK) * scatter + sphere * np.eye(len(scatter)))
        within = turned / np.sqrt(np.maximum(values, 1e-12))
        beyond = np.sqrt((1 - OF_ALL) / sphere)
        return cls(*(np.asarray(each, np.float32) for each in (mean, axes, within, centres @ within, beyond)))

    def distance(self, vectors: Vectors) -> Floats:
        """Shape (N,); may be below 0."""
        centred = vectors - self.mean
        rows = (centred @ self.axes).astype(np.float64)
        rest = np.maximum((centred.astype(np.float64) ** 2).sum(axis=1) - (rows**2).sum(axis=1), 0)
        near = rows @ self.within
        whole = (near**2).sum(axis=1)
        squares = whole[:, None] + (self.centres**2).sum(axis=1) - 2 * (near @ self.centres.T)
        return np.asarray(squares.min(axis=1) - OF_ALL * whole + self.beyond**2 * rest)


Measure = Nearest | Relative
MEASURES: tuple[type[Measure], ...] = (Nearest, Relative)


@dataclass(frozen=True)
class Familiar:
    """
    What was learned, as far as it takes to tell what is unlike all of it; never changes, safe between threads.

    Attributes:
        measure: Gives the distance of a picture.
        limit: The distance beyond which a picture is unknown.
        usual: That of a known picture; smaller than `limit`.
        skill: The area under the curve, of classes that were left out.
    """

    measure: Measure
    limit: float
    usual: float
    skill: float = 0.0

    @classmethod
    def of(cls, vectors: Vectors, classes: NDArray[np.integer]) -> Familiar | None:
        """
        What these pictures make familiar; takes a second or two for some hundred.

        Args:
            vectors: Shape (N, D), of learned pictures.
            classes: Shape (N,), what each shows; any whole numbers.

        Returns:
            None where there are too few, or where no measure finds classes that were left out.
        """
        if len(vectors) < LEAST_ROWS or len(np.unique(classes)) < 2:
            return None
        rng = np.random.default_rng(SEED)
        rows = rng.permutation(len(vectors))[:ROWS_MAX]
        vectors, classes = vectors[rows], classes[rows]
        fold_of = np.arange(len(rows)) % FOLDS
        skills = {kind: _skill(kind, vectors, classes, fold_of == 0, rng) for kind in MEASURES}
        best = max(skills, key=lambda kind: skills[kind])
        if skills[best] < LEAST_SKILL:
            return None
        limit, usual = _limit(_of_new(best, vectors, classes, fold_of))
        if best is Nearest:
            limit = max(limit, LEAST_DISTANCE)
        return cls(best.of(vectors, classes), limit, usual, round(skills[best], 4))

    @classmethod
    def nearest(cls, vectors: Vectors, groups: NDArray[np.integer]) -> Familiar:
        """
        What these pictures make familiar, by the nearest alone.

        Args:
            vectors: Shape (N, D).
            groups: Shape (N,); how far a picture reaches is what is usual in its group, which has two or more.
        """
        reach = np.ones(len(vectors), np.float32)
        fold_of = np.arange(len(vectors)) % FOLDS
        for group in np.unique(groups):
            mine = np.flatnonzero(groups == group)
            usual = float(np.quantile(_of_new(Nearest, vectors[mine], mine, fold_of[mine]), REACH))
            reach[mine] = max(usual, LEAST_DISTANCE)
        known = np.concatenate(
            [Nearest(vectors[fold_of != fold], reach[fold_of != fold]).distance(vectors[fold_of == fold])
             for fold in range(FOLDS)]
        )  # fmt: skip
        limit, usual = _limit(known)
        return cls(Nearest(vectors, reach), max(limit, 1.0), usual)

    def strangeness(self, vectors: Vectors) -> Floats:
        """
        How unlike pictures are to all that was learned.

        Args:
            vectors: Shape (N, D), as those that it was made of.

        Returns:
            Shape (N,), from 0 to 1: 0 for what may be known, and above 0 for what is not.
        """
        beyond = (self.measure.distance(vectors) - self.limit) / max(self.limit - self.usual, 1e-9)
        return np.clip(beyond, 0.0, 1.0)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """What `from_arrays` takes; of the pictures' numbers three digits are enough."""
        numbers = np.array([self.limit, self.usual, self.skill])
        parts = {part.name: getattr(self.measure, part.name).astype(np.float16) for part in fields(self.measure)}
        return {"measure": np.array(self.measure.name), "numbers": numbers, **parts}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]], width: int) -> Familiar | None:
        """
        What `arrays` gave; None if that was a measure that is used no more, until the model is trained again.

        Raises:
            ValueError, TypeError: They are not of vectors of this width, or damaged.
        """
        given = {name: np.asarray(array) for name, array in arrays.items()}
        name, numbers = str(given.pop("measure", "")), given.pop("numbers", np.zeros(0))
        if name == OLD:
            return None
        kind = next((each for each in MEASURES if each.name == name), None)
        if kind is None or numbers.shape != (3,) or not all(map(math.isfinite, numbers)):
            raise ValueError("it must have a measure that is known, and three numbers")
        measure = kind(**{part: array.astype(np.float32) for part, array in given.items()})
        for count in (2, 3):  # what fits both is no array that was only spread to fit
            distances = measure.distance(np.zeros((count, width), np.float32))
            if distances.shape != (count,) or not np.isfinite(distances).all():
                raise ValueError("its numbers must be finite, one for each picture")
        return cls(measure, *map(float, numbers))


def _of_new(
    kind: type[Measure], vectors: Vectors, classes: NDArray[np.integer], fold_of: NDArray[np.integer]
) -> Floats:
    """The distances that known pictures have which are new."""
    return np.concatenate(
        [kind.of(vectors[fold_of != fold], classes[fold_of != fold]).distance(vectors[fold_of == fold])
         for fold in range(FOLDS)]
    )  # fmt: skip


def _skill(
    kind: type[Measure], vectors: Vectors, classes: NDArray[np.integer], judged: NDArray[np.bool_],
    rng: np.random.Generator,
) -> float:  # fmt: skip
    """The mean area under the curve, of classes that are left out in turn, against pictures that are not shown."""
    found: list[float] = []
    for left_out in rng.permutation(np.unique(classes))[:TURNS]:
        strange, known = classes == left_out, judged & (classes != left_out)
        shown = ~strange & ~judged
        if not (strange.any() and known.any() and shown.any()):
            continue
        measure = kind.of(vectors[shown], classes[shown])
        distances = np.concatenate([measure.distance(vectors[strange]), measure.distance(vectors[known])])
        found.append(_area(distances, int(strange.sum())))
    return float(np.mean(found)) if found else 0.0


def _area(distances: Floats, first: int) -> float:
    """How often one of the first is larger than one of the others."""
    from scipy.stats import rankdata

    others = len(distances) - first
    return float((rankdata(distances)[:first].sum() - first * (first + 1) / 2) / (first * others))


def _limit(known: Floats) -> tuple[float, float]:
    """The distance that `FALSE_ALARMS` of new pictures pass which are known, and the usual one."""
    usual = float(np.median(known))
    if len(known) >= COUNTED:
        rank = math.ceil((len(known) + 1) * (1 - FALSE_ALARMS))
        return max(float(np.sort(known)[rank - 1]), usual + 1e-6), usual
    from scipy.stats import t as student

    count, spread = len(known), float(known.std(ddof=1))
    far = float(student.ppf(1 - FALSE_ALARMS, count - 1)) * spread * math.sqrt(1 + 1 / count)
    return float(known.mean()) + max(far, 1e-6), usual
