"""
Heads: how they are fitted, and chosen by cross-validation.

A head is linear in a picture's features. Which one is fitted (discriminant analysis or logistic regression, how
strongly it is regularised, how much pictures without a label count, which features it takes) is what says the
labels best that it did not see. Everything is drawn from fixed seeds: the same rows give the same head.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

DIMENSIONS = 256  # of the features' principal axes that are fitted on; more cost time and gain nothing
SHRINKS = (0.3, 0.6)  # of the classes' common scatter towards a sphere
POOLS = (  # what a picture without a label counts, beside 1 of one with
    ("discriminant", (0.0,)),
    ("with neighbours", (0.0, 0.3, 1.0)),
    ("with neighbours above all", (0.3, 1.0)),
)
STRENGTHS = (1.0, 5.0)  # C of the logistic regression
LOGISTIC_MAX = 3000  # rows up to which it is tried
SPREAD_MAX = 6000  # pictures among which labels are spread
NEIGHBOURS, SPREAD, TURNS = 10, 0.9, 20
FOLDS_LEAST, FOLDS_MOST, FITTED = 5, 20, 4000  # folds, and labels that all of them together are fitted on at most
TEMPERATURES, HALVINGS = (0.05, 50.0), 20
USUAL = 0.03  # of the log loss, that another kind must be better than the usual one: less is chance
ALONE = 0.01  # of log loss, that some spaces must be better than all together: these know more of what no label shows
COPIES_SHARE = 0.15  # of what a picture counts, all its changed copies together
SEED = 20


@dataclass(frozen=True)
class Lessons:
    """
    What one head is fitted on. Vectors have length 1 in each space.

    Attributes:
        vectors: Shape (N, D); the labelled pictures.
        targets: Shape (N, K); 1 where a choice is right, else 0. One 1 in each row, unless `multiple`.
        weights: Shape (N,); what each label counts, above 0.
        spaces: The columns of each space of features.
        copies: Shape (M, D); changed copies of labelled pictures.
        originals: Shape (M,); the row in `vectors` of each copy's picture.
        pool: Shape (P, D); pictures without a label.
        multiple: Whether several choices may be right, each by itself.
    """

    vectors: NDArray[np.float32]
    targets: NDArray[np.float32]
    weights: NDArray[np.float32]
    spaces: Mapping[str, slice]
    copies: NDArray[np.float32]
    originals: NDArray[np.integer]
    pool: NDArray[np.float32]
    multiple: bool = False


@dataclass(frozen=True)
class Fitted:
    """
    A head, and what cross-validation says of it.

    Attributes:
        weights: Shape (D', K), for the columns of `spaces` in their order.
        bias: Shape (K,).
        spaces: The names of the spaces that it takes.
        unseen: Shape (N, K); probabilities of each labelled picture by a head that did not learn it.
        kind: Of those that were tried, the one that was chosen.
        loss: The log loss of that kind on labels that it had not learned.
        losses: The same of every kind that was tried.
        folds: Of the cross-validation.
    """

    weights: NDArray[np.float32]
    bias: NDArray[np.float32]
    spaces: tuple[str, ...]
    unseen: Floats
    kind: str
    loss: float
    losses: Mapping[str, float]
    folds: int


class Recipe(NamedTuple):
    """One way to fit a head."""

    kind: str  # "discriminant" or "logistic"
    pool_weight: float
    strength: float  # the shrinkage, or C
    prior: bool  # whether frequent choices are likelier


def fit(lessons: Lessons, spaces: Sequence[tuple[str, ...]] | None = None) -> Fitted:
    """
    The head that cross-validation prefers, fitted on all rows.

    Args:
        lessons: At least two choices have a row.
        spaces: Combinations of spaces to choose from; each by itself and all together if None.
    """
    from threadpoolctl import threadpool_limits

    names = tuple(lessons.spaces)
    tried = spaces or [*([names] if len(names) > 1 else []), *((name,) for name in names)]
    most = max(map(len, tried))
    with threadpool_limits(1):  # on a busy machine several threads of one product wait for each other for minutes
        fitted = [_best(lessons, each) for each in tried]
    return min(fitted, key=lambda each: each.loss + ALONE * (len(each.spaces) < most))


def of_fewer(lessons: Lessons, fitted: Fitted, shown: Sequence[NDArray[np.bool_]]) -> Iterator[Floats]:
    """
    Logits of all labelled pictures, shape (N, K), by heads that learned some of the labels alone.

    Args:
        lessons: Of `fitted`, whose kind and spaces they have.
        fitted: What cross-validation has chosen.
        shown: Shape (N,) each; the labels that one head learns.
    """
    from threadpoolctl import threadpool_limits

    width = np.arange(lessons.vectors.shape[1])
    columns = np.concatenate([width[lessons.spaces[name]] for name in fitted.spaces])
    with threadpool_limits(1):
        rows = _Rows.of(lessons, _Axes.of(lessons, columns))
        recipes = _blends(rows)[fitted.kind]
        for each in shown:
            yield np.asarray(np.mean([head(rows.labelled) for _, head in rows.heads(each, recipes)], axis=0))


def probabilities(logits: Floats, *, multiple: bool) -> Floats:
    """Of logits, shape (N, K): of each choice by itself, or of the one that is right."""
    if multiple:
        return np.asarray(1 / (1 + np.exp(-np.clip(logits, -50, 50))))
    values = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(values / values.sum(axis=1, keepdims=True))


def temperature(logits: Floats, targets: NDArray[np.floating], *, multiple: bool = False) -> float:
    """
    The number that logits must be divided by to be as sure, on average, as they are right (Clarté et al., 2023).

    However few and right the answers are, they are no surer than they can tell: n right ones of n tell
    (n + 1) / (n + 2), by Laplace's rule.

    Args:
        logits: Shape (N, K), of rows that were not learned.
        targets: Shape (N, K), as in `Lessons`.
        multiple: As there.
    """
    right = _is_right(probabilities(logits, multiple=multiple), targets, multiple=multiple)
    surest = (right.sum() + 1) / (right.size + 2)
    low, high = TEMPERATURES
    for _ in range(HALVINGS):
        divisor = (low * high) ** 0.5
        sure = _confidence(probabilities(logits / divisor, multiple=multiple), multiple=multiple)
        low, high = (divisor, high) if sure > surest else (low, divisor)
    return high


def folds(targets: NDArray[np.floating]) -> NDArray[np.integer]:
    """
    The fold of each row, shape (N,): of each combination of choices, as many rows in every fold as can be.

    Of few labels there are many folds, as a head that learned four fifths of them knows less than the one of all, and
    is surer of what it knows: its scores would be too low.
    """
    count = min(FOLDS_MOST, max(FOLDS_LEAST, FITTED // max(1, len(targets))))
    rng = np.random.default_rng(SEED)
    found = np.zeros(len(targets), int)
    _, groups = np.unique(targets, axis=0, return_inverse=True)
    start = 0
    for group in np.unique(groups):
        rows = rng.permutation(np.flatnonzero(groups.ravel() == group))
        found[rows] = (start + np.arange(len(rows))) % count
        start += len(rows)
    return found


def _best(lessons: Lessons, names: tuple[str, ...]) -> Fitted:
    columns = np.concatenate([np.arange(lessons.vectors.shape[1])[lessons.spaces[name]] for name in names])
    axes = _Axes.of(lessons, columns)
    rows = _Rows.of(lessons, axes)
    fold_of = folds(lessons.targets)
    blends = _blends(rows)
    recipes = sorted({recipe for recipes in blends.values() for recipe in recipes})
    unseen: dict[Recipe, Floats] = {}
    for fold in np.unique(fold_of):
        judged = fold_of == fold
        for recipe, head in rows.heads(~judged, recipes):
            unseen.setdefault(recipe, np.zeros(lessons.targets.shape))[judged] = head(rows.labelled[judged])
    divisors = {recipe: _scored(logits, lessons)[1] for recipe, logits in unseen.items()}
    said = {
        name: np.mean([unseen[recipe] / divisors[recipe] for recipe in mine], axis=0) for name, mine in blends.items()
    }
    scored = {name: _scored(logits, lessons) for name, logits in said.items()}
    usual = "with neighbours" if "with neighbours" in blends else "discriminant"
    chosen = min(scored, key=lambda name: scored[name][0] * (1 - USUAL * (name == usual)))
    loss, divisor = scored[chosen]
    mine = blends[chosen]
    weights, bias = axes.back(
        [
            (head, divisors[recipe] * divisor * len(mine))
            for recipe, head in rows.heads(np.ones(len(fold_of), bool), mine)
        ]
    )
    unseen_said = probabilities(said[chosen] / divisor, multiple=lessons.multiple)
    losses = {name: round(found, 4) for name, (found, _) in scored.items()}
    return Fitted(weights, bias, names, unseen_said, chosen, round(loss, 4), losses, int(fold_of.max()) + 1)


def _blends(rows: _Rows) -> dict[str, list[Recipe]]:
    """
    What is chosen from: means of heads of one kind.

    The mean of several strengths is better than the one that a few labels seem to prefer, and linear too.
    """
    found = {}
    for name, weights in (POOLS if rows.spread is not None else POOLS[:1]):
        for prior in (False,) if rows.multiple else (False, True):
            each = [Recipe("discriminant", weight, shrink, prior) for weight in weights for shrink in SHRINKS]
            found[f"{name}, as frequent as labelled" if prior else name] = each
    if len(rows.labelled) + len(rows.copies) <= LOGISTIC_MAX:
        found["logistic"] = [Recipe("logistic", 0.0, strength, prior=True) for strength in STRENGTHS]
    return found


def _scored(logits: Floats, lessons: Lessons) -> tuple[float, float]:
    """The log loss of unseen labels, and the number that the logits must be divided by for it."""
    divisor = temperature(logits, lessons.targets, multiple=lessons.multiple)
    return _loss(probabilities(logits / divisor, multiple=lessons.multiple), lessons), divisor


def _is_right(said: Floats, targets: NDArray[np.floating], *, multiple: bool) -> NDArray[np.bool_]:
    """Of each row, or of each choice of each row where several may be right."""
    if multiple:
        return np.asarray((said >= 0.5) == (targets >= 0.5))
    return np.asarray(targets[np.arange(len(said)), said.argmax(axis=1)] > 0)


def _confidence(said: Floats, *, multiple: bool) -> float:
    return float((np.maximum(said, 1 - said) if multiple else said.max(axis=1)).mean())


def _loss(said: Floats, lessons: Lessons) -> float:
    said = np.clip(said, 1e-6, 1 - 1e-6)
    right = lessons.targets
    lost = -(right * np.log(said)).sum(axis=1)
    if lessons.multiple:
        lost -= ((1 - right) * np.log(1 - said)).sum(axis=1)
    return float(np.average(lost, weights=lessons.weights))


class _Head(NamedTuple):
    """Logits of rows on the principal axes."""

    weights: Floats
    bias: Floats

    def __call__(self, rows: Floats) -> Floats:
        return np.asarray(rows @ self.weights + self.bias)


class _Axes(NamedTuple):
    """The principal axes of some columns: a head fitted on a few hundred of them is as good, and quick."""

    columns: NDArray[np.integer]
    mean: Floats
    axes: Floats  # shape (D', d)

    @classmethod
    def of(cls, lessons: Lessons, columns: NDArray[np.integer]) -> _Axes:
        everything = np.concatenate([lessons.vectors, lessons.copies, lessons.pool])[:, columns].astype(np.float64)
        mean = everything.mean(axis=0)
        everything -= mean
        wanted = min(DIMENSIONS, len(everything) - 1, len(columns))
        if len(everything) < len(columns):
            values, vectors = np.linalg.eigh(everything @ everything.T)
            wanted = max(1, min(wanted, int((values > values[-1] * 1e-10).sum())))
            top = everything.T @ vectors[:, -wanted:]
            return cls(columns, mean, top / np.maximum(np.linalg.norm(top, axis=0), 1e-12))
        return cls(columns, mean, np.linalg.eigh(everything.T @ everything)[1][:, -max(1, wanted) :])

    def __call__(self, vectors: NDArray[np.float32]) -> Floats:
        return np.asarray((vectors[:, self.columns] - self.mean) @ self.axes)

    def back(self, heads: Sequence[tuple[_Head, float]]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Heads on the axes as one on the columns: the sum of their logits, each divided by its number."""
        weights = self.axes @ np.sum([head.weights / divisor for head, divisor in heads], axis=0)
        bias = np.sum([head.bias / divisor for head, divisor in heads], axis=0) - self.mean @ weights
        return weights.astype(np.float32), bias.astype(np.float32)


@dataclass(frozen=True)
class _Rows:
    """All rows on the principal axes, and how labels are spread over pictures without one."""

    labelled: Floats
    copies: Floats
    pool: Floats
    targets: Floats
    weights: Floats
    originals: NDArray[np.integer]
    multiple: bool
    spread: _Spread | None

    @classmethod
    def of(cls, lessons: Lessons, axes: _Axes) -> _Rows:
        labelled, pool = axes(lessons.vectors), axes(lessons.pool)
        many = len(labelled) + len(pool)
        spread = _Spread.over(np.concatenate([labelled, pool])) if len(pool) and many <= SPREAD_MAX else None
        return cls(
            labelled, axes(lessons.copies), pool, lessons.targets.astype(np.float64),
            lessons.weights.astype(np.float64), lessons.originals, lessons.multiple, spread,
        )  # fmt: skip

    def heads(self, shown: NDArray[np.bool_], recipes: Sequence[Recipe]) -> Iterator[tuple[Recipe, _Head]]:
        """The heads of some recipes, fitted on the labels that are shown."""
        moments: dict[float, _Moments] = {}
        for recipe in recipes:
            if recipe.kind == "logistic":
                yield recipe, self._logistic(shown, recipe.strength)
                continue
            if recipe.pool_weight not in moments:
                moments[recipe.pool_weight] = self._moments(shown, recipe.pool_weight)
            yield recipe, moments[recipe.pool_weight].head(recipe.strength, prior=recipe.prior)

    def _taught(self, shown: NDArray[np.bool_]) -> tuple[Floats, Floats, Floats]:
        """Rows, targets and weights of the labelled pictures that are shown, and of their copies."""
        copied = shown[self.originals] if len(self.originals) else np.zeros(0, bool)
        counts = np.bincount(self.originals, minlength=len(self.labelled))
        weights = self.weights * np.where(counts, 1 - COPIES_SHARE, 1.0)
        of_copies = (self.weights * COPIES_SHARE / np.maximum(counts, 1))[self.originals[copied]]
        return (
            np.concatenate([self.labelled[shown], self.copies[copied]]),
            np.concatenate([self.targets[shown], self.targets[self.originals[copied]]]),
            np.concatenate([weights[shown], of_copies]),
        )

    def _moments(self, shown: NDArray[np.bool_], pool_weight: float) -> _Moments:
        rows, targets, weights = self._taught(shown)
        if pool_weight and self.spread is not None:
            guessed = self.spread(self.targets, shown)[len(self.labelled) :]
            sure = guessed.max(axis=1)
            rows = np.concatenate([rows, self.pool])
            targets = np.concatenate([targets, guessed])
            weights = np.concatenate([weights, pool_weight * sure])
        return _Moments.of(rows, targets, weights, self.targets[shown], multiple=self.multiple)

    def _logistic(self, shown: NDArray[np.bool_], strength: float) -> _Head:
        rows, targets, weights = self._taught(shown)
        scale = 1 / max(float(rows.std()), 1e-9) / np.sqrt(rows.shape[1])
        found = _Head(np.zeros((rows.shape[1], targets.shape[1])), np.full(targets.shape[1], -20.0))
        if self.multiple:
            for column in range(targets.shape[1]):
                found.weights[:, [column]], found.bias[[column]] = _regression(
                    rows * scale, targets[:, column].astype(int), weights, strength
                )
        else:
            right = targets.argmax(axis=1)
            present = np.unique(right)
            weights_, bias = _regression(rows * scale, right, weights, strength)
            found.weights[:, present], found.bias[present] = _both_sides(weights_, bias, len(present))
        return _Head(found.weights * scale, found.bias)


def _regression(rows: Floats, right: NDArray[np.integer], weights: Floats, strength: float) -> tuple[Floats, Floats]:
    from sklearn.linear_model import LogisticRegression

    if len(np.unique(right)) < 2:
        return np.zeros((rows.shape[1], 1)), np.array([20.0 if right[0] else -20.0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a head that has not quite converged is judged like any other
        found = LogisticRegression(C=strength, max_iter=100).fit(rows, right, weights)
    return found.coef_.T, found.intercept_


def _both_sides(weights: Floats, bias: Floats, count: int) -> tuple[Floats, Floats]:
    """Logits of all classes; of two, scikit-learn gives one column."""
    if count != 2 or weights.shape[1] == 2:
        return weights, bias
    return np.concatenate([-weights, weights], axis=1) / 2, np.concatenate([-bias, bias]) / 2


class _Moments(NamedTuple):
    """What a discriminant analysis needs of the rows: sizes and means of the classes, and the scatter of all."""

    sizes: Floats  # (K,)
    means: Floats  # (K, d)
    rest: Floats  # (K, d): the means of all rows without the choice; used where several may be right
    scatter: Floats  # (d, d), around zero, by weight
    variances: Floats  # (d,): within the choices, along the axes that follow; of one right choice
    axes: Floats  # (d, d)
    labels: Floats  # (K,): how many labels each choice has
    total: float
    multiple: bool

    @classmethod
    def of(cls, rows: Floats, targets: Floats, weights: Floats, labels: Floats, *, multiple: bool) -> _Moments:
        weighed = targets * weights[:, None]
        sizes, total = weighed.sum(axis=0), float(weights.sum())
        sums = weighed.T @ rows
        everything = weights @ rows
        others = total - sizes
        means = sums / np.maximum(sizes, 1e-9 * total)[:, None]  # nothing where nothing is shown
        rest = np.where(others > 1e-9 * total, 1.0, 0.0)[:, None] * (everything - sums)
        rest /= np.maximum(others, 1e-9 * total)[:, None]
        scatter = (rows * weights[:, None]).T @ rows
        within = (scatter - (means * sizes[:, None]).T @ means) / total
        variances, axes = (np.zeros(0), np.zeros((0, 0))) if multiple else np.linalg.eigh(within)
        return cls(sizes, means, rest, scatter, np.maximum(variances, 0), axes, labels.sum(axis=0), total, multiple)

    def head(self, shrink: float, *, prior: bool) -> _Head:
        return self._several(shrink) if self.multiple else self._one(shrink, prior=prior)

    def _one(self, shrink: float, *, prior: bool) -> _Head:
        shrunk = (1 - shrink) * self.variances + shrink * max(float(self.variances.mean()), 1e-9)
        weights = self.axes @ ((self.means @ self.axes) / shrunk).T
        bias: Floats = -(self.means.T * weights).sum(axis=0) / 2
        # A mean of few rows is noisy, and its noise counts against the choice as if it were distance.
        bias += (self.variances / shrunk).sum() / np.maximum(self.sizes, 1) / 2
        if prior:
            bias = bias + np.log(np.maximum(self.labels, 0.5) / self.labels.sum())
        return _Head(np.asarray(weights, np.float64), np.where(self.labels > 0, bias, -1e4))

    def _several(self, shrink: float) -> _Head:
        found = []
        for size, mean, rest in zip(self.sizes, self.means, self.rest, strict=True):
            others = self.total - size
            within = (self.scatter - size * np.outer(mean, mean) - others * np.outer(rest, rest)) / self.total
            weights = np.linalg.solve(_shrunk(within, shrink), mean - rest)
            bias = -(mean + rest) @ weights / 2 + np.log(max(size, 1e-3) / max(others, 1e-3))
            found.append((weights, bias))
        return _Head(np.stack([weights for weights, _ in found], axis=1), np.array([bias for _, bias in found]))


def _shrunk(within: Floats, shrink: float) -> Floats:
    spread = max(float(np.trace(within)) / len(within), 1e-9)
    return np.asarray((1 - shrink) * within + shrink * spread * np.eye(len(within)))


class _Spread(NamedTuple):
    """Labels spread from picture to picture along their nearest neighbours (Zhou et al., 2003)."""

    links: Any  # sparse, (N, N), normalised

    @classmethod
    def over(cls, rows: Floats) -> _Spread:
        from scipy import sparse

        unit = (rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)).astype(np.float32)
        near, close = [], []
        count = min(NEIGHBOURS, len(unit) - 1)
        for start in range(0, len(unit), 512):
            alike = unit[start : start + 512] @ unit.T
            alike[np.arange(len(alike)), start + np.arange(len(alike))] = -1
            nearest = np.argpartition(-alike, count - 1, axis=1)[:, :count]
            near.append(nearest)
            close.append(np.maximum(np.take_along_axis(alike, nearest, axis=1), 1e-3) ** 4)
        places = np.repeat(np.arange(len(unit)), count), np.concatenate(near).ravel()
        links = sparse.csr_matrix((np.concatenate(close).ravel(), places), (len(unit), len(unit)))
        links = links + links.T
        scale = sparse.diags(1 / np.sqrt(np.asarray(links.sum(axis=1)).ravel() + 1e-12))
        return cls(scale @ links @ scale)

    def __call__(self, targets: Floats, shown: NDArray[np.bool_]) -> Floats:
        """What each picture shows, shape (N, K), from the labels that are shown; rows sum to 1 at most."""
        given = np.zeros((self.links.shape[0], targets.shape[1]))
        given[: len(targets)][shown] = targets[shown]
        given /= np.maximum(given.sum(axis=0), 1e-9)
        found = given
        for _ in range(TURNS):
            found = SPREAD * (self.links @ found) + (1 - SPREAD) * given
        found = found / np.maximum(found.sum(axis=0), 1e-12)
        return np.asarray(found / np.maximum(found.sum(axis=1, keepdims=True), 1e-12))
