"""
One control's head: its rows put together, fitted, and compared with what the live model says of them.

What the live model knows and nobody has labelled here is learned too, from pictures that show it. Labels that look
wrong count little. The comparison says whether the new head may answer in the place of the live model.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from celestial_backend.features import Familiar, unit
from celestial_backend.labels import Control
from celestial_backend.learning import heads
from celestial_backend.learning.comparison import Bench, Verdict, judge
from celestial_backend.learning.dataset import LEAST_LABELS, Dataset, Example
from celestial_backend.models.headed import GENERAL, OWN, Head, Space
from celestial_backend.models.manifest import Fit

logger = logging.getLogger(__name__)
KEPT_WEIGHT = 20.0  # what all pictures of a choice count that nobody labelled here
KEPT_EACH = 40  # pictures of such a choice, at most
SURE = 0.9  # a live model's probability of one
AGREED = 0.5  # of the labels of a choice that a live model must say too, or it means something else by the word
SUSPECTS_MAX, SUSPECTS_LABELS, SUSPECTS_SKILL = 10, 20, 0.6
SUSPECT, SUSPECT_TIMES = 0.02, 1.5  # see `_doubted`
DOUBTED_SHARE, DOUBTED_WEIGHT = 0.04, 0.02  # of the labels, from which on they count less; and what they count then
FEWER, FEWER_TIMES = (0.3, 0.45, 0.65, 0.85), 4  # shares of the labels that heads learn, to see what more of them bring
TICKED = 0.5  # the probability from which on a choice is said, where several may be right
DOUBT_SKILL = 0.3  # that a head needs to doubt labels
Vectors = NDArray[np.float32]


@dataclass(frozen=True)
class Kept:
    """
    Pictures of choices that the live model knows and that this project need not label.

    Attributes:
        choices: What each of R pictures shows.
        vectors: By space, shape (R, D).
        copies: By space, shape (M, D): changed copies.
        originals: Shape (M,), the row of each copy's picture.
    """

    choices: tuple[str, ...] = ()
    vectors: Mapping[str, Vectors] = field(default_factory=dict)
    copies: Mapping[str, Vectors] = field(default_factory=dict)
    originals: NDArray[np.integer] = field(default_factory=lambda: np.zeros(0, int))


class Champion:
    """What the live model says of pictures; one that knows nothing of a control says nothing."""

    def known(self, control: str) -> tuple[str, ...]:
        """The choices of a control that it knows, none if it does not answer it."""
        del control
        return ()

    def says(self, control: str, vectors: Mapping[str, Vectors]) -> NDArray[np.float64]:
        """The probabilities of these choices, shape (N, K), for pictures as vectors of each space."""
        raise NotImplementedError

    def learned(self, control: str, example: Example) -> bool:
        """Whether what answers a control has learned from an example."""
        del control, example
        return False

    def once_right(self, control: str, example: Example) -> bool | None:
        """Whether its own cross-validation said rightly what it has learned; None where that is not known."""
        del control, example
        return None

    def kept(self, control: str) -> Kept:
        """The sample of what it knows that travels with it."""
        del control
        return Kept()

    def is_network(self, control: str) -> bool:
        """Whether what answers a control is no head of ours."""
        del control
        return True

    def before(self, control: str) -> tuple[int, int] | None:
        """Right answers and labels of its own cross-validation."""
        del control
        return None


@dataclass(frozen=True)
class Lesson:
    """
    A control's new head, and whether it may take the old one's place.

    Attributes:
        fit: How it was fitted.
        suspects: Tasks whose labels look wrong, the likeliest first.
        right: Annotations that a head said rightly that had not learned them; none where several choices may be right.
    """

    head: Head
    verdict: Verdict
    fit: Fit
    suspects: tuple[int, ...] = ()
    right: tuple[int, ...] = ()


def teach(
    control: Control, data: Dataset, champion: Champion, spaces: Sequence[Space] = (GENERAL,)
) -> Lesson | None:
    """
    Learn one control.

    Args:
        control: As `ChoiceMap.for_learning` reads it.
        data: Of the project.
        champion: The live model.
        spaces: Whose vectors the gallery has, to choose from.

    Returns:
        None where it has too few labels; the live model goes on to answer it.
    """
    course = _course(control, data, champion, spaces)
    if course is None:
        return None
    examples, rare, kept, choices, lessons = course
    pictures = [example.picture for example in examples]
    fitted, count = heads.fit(lessons), len(examples)
    doubted = _doubted(fitted.unseen[:count], lessons, count)
    # What is judged is the head that believes all labels: one that does not would agree with itself.
    best = fitted if len(doubted) <= DOUBTED_SHARE * count else heads.fit(_without(lessons, doubted))
    head = Head(
        control.from_name, choices, best.weights, best.bias, tuple(best.spaces),  # type: ignore[arg-type]
        control.multiple, control.multiple and all(example.choices for example in examples),
        None if control.multiple else _familiar(control, lessons, best.spaces, choices),
    )  # fmt: skip
    bench = Bench(
        lessons.targets,
        fitted.unseen,
        _said(control.from_name, champion, choices, data.gallery.given(pictures), kept),
        np.array([not champion.learned(control.from_name, each) for each in examples] + [True] * len(kept.choices)),
        np.arange(len(lessons.targets)) >= count,
        control.multiple,
        _once_right(control.from_name, champion, examples, kept),
    )
    verdict = judge(
        choices,
        bench,
        replaces_network=champion.is_network(control.from_name),
        before=champion.before(control.from_name),
    )
    knows = verdict.scores.skill >= SUSPECTS_SKILL
    suspects = tuple(examples[place].task_ids[0] for place in doubted[: SUSPECTS_MAX * knows])
    fit = Fit(
        kind=best.kind, features=list(best.spaces), loss=best.loss, losses=dict(best.losses), folds=best.folds,
        too_few=rare, kept=dict(Counter(kept.choices)), doubted=len(doubted),
    )  # fmt: skip
    right = fitted.unseen[:count].argmax(axis=1) == lessons.targets[:count].argmax(axis=1)
    said = [number for each, fine in zip(examples, right, strict=True) if fine for number in each.annotation_ids]
    return Lesson(head, verdict, fit, suspects, () if control.multiple else tuple(said))


@dataclass(frozen=True)
class Unseen:
    """
    What heads that did not learn a label say of its picture.

    Attributes:
        examples: N labels of choices with enough of them.
        choices: K choices.
        said: Shape (N, K); their probabilities.
        steps: How many labels a head learned, and whether it says rightly what it did not learn, shape (N,), NaN for
            what it learned; of fewer labels and of more.
    """

    examples: tuple[Example, ...]
    choices: tuple[str, ...]
    said: NDArray[np.float64]
    steps: tuple[tuple[float, NDArray[np.float64]], ...] = ()


def unseen(control: Control, data: Dataset, champion: Champion, spaces: Sequence[Space] = (GENERAL,)) -> Unseen | None:
    """What cross-validation says of the labels of a control, as `teach` does it; None where they are too few."""
    course = _course(control, data, champion, spaces)
    if course is None:
        return None
    fitted, count = heads.fit(course.lessons), len(course.examples)
    said = fitted.unseen[:count]
    steps = (*_fewer(course.lessons, fitted, count), (count * (1 - 1 / fitted.folds), _is_right(said, course.lessons)))
    return Unseen(tuple(course.examples), course.choices, said, steps)


def _fewer(lessons: heads.Lessons, fitted: heads.Fitted, count: int) -> Iterator[tuple[float, NDArray[np.float64]]]:
    """What heads of fewer labels say rightly, as `Unseen.steps` has it; what nobody labelled here all of them learn."""
    rng = np.random.default_rng(heads.SEED)
    shown = []
    for share in FEWER * FEWER_TIMES:
        shown.append(np.ones(len(lessons.targets), bool))
        shown[-1][rng.permutation(count)[max(1, round(share * count)) :]] = False
    for each, logits in zip(shown, heads.of_fewer(lessons, fitted, shown), strict=True):
        right = _is_right(heads.probabilities(logits[:count], multiple=lessons.multiple), lessons)
        right[each[:count]] = np.nan
        yield float(each[:count].sum()), right


def _is_right(said: NDArray[np.float64], lessons: heads.Lessons) -> NDArray[np.float64]:
    """Of each label 1 where it is said rightly, else 0; shape (N,)."""
    wanted = lessons.targets[: len(said)]
    if lessons.multiple:
        return np.asarray(((said >= TICKED) == (wanted >= TICKED)).all(axis=1), np.float64)
    return np.asarray(said.argmax(axis=1) == wanted.argmax(axis=1), np.float64)


class _Course(NamedTuple):
    """What a control's head learns."""

    examples: list[Example]
    rare: dict[str, int]  # choices with too few labels, and how many
    kept: Kept
    choices: tuple[str, ...]
    lessons: heads.Lessons


def _course(control: Control, data: Dataset, champion: Champion, spaces: Sequence[Space]) -> _Course | None:
    examples, rare = _usable(control, data.examples[control.from_name])
    kept = _kept(control, data, champion, examples)
    choices = _choices(control, examples, kept)
    if not examples or len(choices) < (1 if control.multiple else 2):
        return None
    own = [space for space in spaces if space != OWN or champion.known(control.from_name)]
    return _Course(examples, rare, kept, choices, _lessons(control, data, examples, kept, choices, own))


def _usable(control: Control, examples: Sequence[Example]) -> tuple[list[Example], dict[str, int]]:
    """The examples of choices with enough labels, and how many labels the others have."""
    counts: dict[str, int] = {}
    for example in examples:
        for choice in example.choices:
            counts[choice] = counts.get(choice, 0) + 1
    rare = {choice: count for choice, count in sorted(counts.items()) if count < LEAST_LABELS}
    if control.multiple:
        return [each._replace(choices=each.choices - set(rare)) for each in examples], rare
    return [each for each in examples if not each.choices & set(rare)], rare


def _choices(control: Control, examples: Sequence[Example], kept: Kept) -> tuple[str, ...]:
    known = {choice for example in examples for choice in example.choices} | set(kept.choices)
    return tuple(choice for choice in control.choices if choice in known)


def _kept(control: Control, data: Dataset, champion: Champion, examples: Sequence[Example]) -> Kept:
    """What the champion knows and nobody has labelled here, or not otherwise than it says."""
    known = champion.known(control.from_name)
    if not known or control.multiple:
        return Kept()
    labelled = {choice for example in examples for choice in example.choices}
    sample = champion.kept(control.from_name)
    if sample.choices:
        means = {choice for choice in labelled & set(known) if not _agrees(control, data, champion, examples, choice)}
        rows = np.array([place for place, choice in enumerate(sample.choices) if choice not in means], int)
        return _chosen(sample, rows)
    pool = data.pool.get(control.data_key, [])
    wanted = [choice for choice in known if choice not in labelled]
    if not pool or not wanted:
        return Kept()
    vectors = data.gallery.given(pool)
    said = champion.says(control.from_name, vectors)
    rows_: list[int] = []
    names: list[str] = []
    for choice in wanted:
        sure = said[:, known.index(choice)]
        best = [int(row) for row in np.argsort(-sure, kind="stable")[:KEPT_EACH] if sure[row] >= SURE]
        if len(best) < LEAST_LABELS:
            continue
        rows_ += best
        names += [choice] * len(best)
    return Kept(tuple(names), {space: array[rows_] for space, array in vectors.items()})


def _agrees(
    control: Control, data: Dataset, champion: Champion, examples: Sequence[Example], choice: str
) -> bool:
    mine = [example.picture for example in examples if choice in example.choices]
    said = champion.says(control.from_name, data.gallery.given(mine))
    right = said.argmax(axis=1) == champion.known(control.from_name).index(choice)
    return bool(right.mean() >= AGREED)


def _chosen(kept: Kept, rows: NDArray[np.integer]) -> Kept:
    place = np.full(len(kept.choices), -1)
    place[rows] = np.arange(len(rows))
    copies = np.flatnonzero(place[kept.originals] >= 0) if len(kept.originals) else np.zeros(0, int)
    return Kept(
        tuple(kept.choices[row] for row in rows),
        {space: array[rows] for space, array in kept.vectors.items()},
        {space: array[copies] for space, array in kept.copies.items()},
        place[kept.originals[copies]],
    )


def _lessons(
    control: Control,
    data: Dataset,
    examples: Sequence[Example],
    kept: Kept,
    choices: Sequence[str],
    spaces: Sequence[str],
) -> heads.Lessons:
    pictures = [example.picture for example in examples]
    shown = [example.choices for example in examples] + [frozenset({choice}) for choice in kept.choices]
    targets = np.array([[choice in each for choice in choices] for each in shown], np.float32)
    counts = {choice: kept.choices.count(choice) for choice in set(kept.choices)}
    weights = [example.weight for example in examples]
    weights += [min(1.0, KEPT_WEIGHT / counts[choice]) for choice in kept.choices]
    vectors = data.gallery.rows(pictures, spaces)
    copies, originals = data.gallery.copied(pictures, spaces)
    if kept.choices:
        vectors = np.concatenate([vectors, _joined(kept.vectors, spaces)])
        if len(kept.originals):
            copies = np.concatenate([copies, _joined(kept.copies, spaces)])
            originals = np.concatenate([originals, kept.originals + len(pictures)])
    pool = [] if control.multiple else data.pool.get(control.data_key, [])
    width, places, start = vectors.shape[1], {}, 0
    for space in spaces:
        size = next(iter(data.gallery.vectors[space].values())).shape[0]
        places[space] = slice(start, start := start + size)
    return heads.Lessons(
        vectors, targets, np.array(weights, np.float32), places, copies, originals,
        data.gallery.rows(pool, spaces) if pool else np.zeros((0, width), np.float32), control.multiple,
    )  # fmt: skip


def _joined(vectors: Mapping[str, Vectors], spaces: Sequence[str]) -> Vectors:
    return np.concatenate([unit(np.asarray(vectors[space], np.float32)) for space in spaces], axis=1)


def _said(
    control: str, champion: Champion, choices: Sequence[str], vectors: Mapping[str, Vectors], kept: Kept
) -> NDArray[np.float64] | None:
    """What the champion says of labelled and kept pictures, in the columns of the new head's choices."""
    known = champion.known(control)
    if not known:
        return None
    parts = [champion.says(control, vectors)]
    if kept.choices:
        parts.append(champion.says(control, {space: np.asarray(each) for space, each in kept.vectors.items()}))
    said = np.concatenate(parts)
    found = np.zeros((len(said), len(choices)))
    for column, choice in enumerate(choices):
        if choice in known:
            found[:, column] = said[:, known.index(choice)]
    return found


def _once_right(
    control: str, champion: Champion, examples: Sequence[Example], kept: Kept
) -> NDArray[np.bool_] | None:
    """What the champion's own cross-validation said of what it learned, False elsewhere; None where it is not known."""
    said = [champion.once_right(control, each) for each in examples]
    if all(each is None for each in said):
        return None
    return np.array([bool(each) for each in said] + [False] * len(kept.choices))


def _doubted(unseen: NDArray[np.floating], lessons: heads.Lessons, count: int) -> NDArray[np.integer]:
    """
    Labels that cleanlab (Northcutt et al., 2021) takes for wrong, likeliest first.

    None of a head that knows little, and none where cleanlab fails.

    Of those, the ones that have hardly more probability than any wrong answer has on average: on photographs of
    clothes cleanlab alone named 7 of 30 right labels, and with this it names two.

    Args:
        unseen: Shape (`count`, K).
        lessons: Begin with as many labels.
        count: Of labels.
    """
    columns = np.flatnonzero(lessons.targets[:count].any(axis=0))
    if lessons.multiple or count < SUSPECTS_LABELS or len(columns) < 2:
        return np.zeros(0, int)
    said = unseen[:, columns] / unseen[:, columns].sum(axis=1, keepdims=True)
    right = lessons.targets[:count, columns].argmax(axis=1)
    wrong, guessed = float(np.mean(said.argmax(axis=1) != right)), np.bincount(right).max() / count
    if 1 - wrong < guessed + DOUBT_SKILL * (1 - guessed):
        return np.zeros(0, int)
    try:
        from cleanlab.filter import find_label_issues

        ranked = find_label_issues(right, said, return_indices_ranked_by="self_confidence", n_jobs=1)
    except Exception as error:  # noqa: BLE001 - whatever cleanlab meets, the labels can be learned
        logger.warning("cleanlab cannot look for wrong labels among %d (%s: %.200s); none is doubted.",
                       count, type(error).__name__, error)  # fmt: skip
        return np.zeros(0, int)
    least = max(SUSPECT, SUSPECT_TIMES * wrong / (len(columns) - 1))
    return np.array([place for place in ranked if said[place, right[place]] < least], int)


def _familiar(
    control: Control, lessons: heads.Lessons, spaces: Sequence[str], choices: Sequence[str]
) -> Familiar | None:
    """What all pictures show but those that are labelled as showing nothing of it."""
    shown = lessons.targets.argmax(axis=1)
    rows = np.flatnonzero([choices[each] != control.unknown for each in shown])
    vectors = np.concatenate([lessons.vectors[:, lessons.spaces[name]] for name in spaces], axis=1)
    return Familiar.of(vectors[rows], shown[rows])


def _without(lessons: heads.Lessons, doubted: NDArray[np.integer]) -> heads.Lessons:
    """The same lessons, in which some labels count next to nothing."""
    weights = lessons.weights.copy()
    weights[doubted] *= DOUBTED_WEIGHT
    return replace(lessons, weights=weights)
