"""
What a network is shown when it is taught a project's labels, and how it is checked on the way.

Labelled pictures are loaded batch by batch; only the rendered ones, a bounded number, stay in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from celestial_backend.augment import augment
from celestial_backend.errors import NotEnoughDataError
from celestial_backend.examples import Example, rendered, split
from celestial_backend.network import Postprocess, temperature
from celestial_backend.teaching import Course, Lesson, batches

Prepare = Callable[[Image.Image], NDArray[np.float32]]
RENDERED_CHECKS = 3  # of each body, so that forgetting is seen where nobody has labelled it
KEPT_BYTES = 100_000_000  # inputs of checks are made once where all of them take no more than this


@dataclass(frozen=True)
class Tuning:
    """Every hyper-parameter of a training on a project's labels. How far pictures are changed stands in `augment`."""

    pictures: int = 10_000  # shown in all, repeated and changed ones too
    epochs: tuple[int, int] = (8, 30)  # fewest and most that these may become
    batch: int = 32
    learning_rate: float = 0.002
    weight_decay: float = 0.0
    label_smoothing: float = 0.01
    keep: float = 1.0  # weight of what the parent says of its own classes, beside the labels
    soften: float = 3.0  # divides both networks' logits for that, so that more than the surest class is kept
    rendered_per_class: int = 30  # pictures of the parent's classes that the renderer knows
    most_repeats: int = 4  # times that one epoch may show a picture of a rare class
    longest_side_px: int = 256  # larger pictures are shown in this size
    check_share: float = 0.15  # of each class, for the early stop and the temperature
    most_checks: int = 300
    check_rounds: int = 4  # of each of these: as it is, and changed
    least_to_calibrate: int = 20  # labelled checks; with fewer the temperature stays as it was
    patience: int = 10  # epochs without a better one
    seed: int = 20
    threads: int = 2


SCRATCH = Tuning(pictures=40_000, epochs=(12, 80), learning_rate=0.003, weight_decay=0.01, rendered_per_class=60)


CALIBRATION_ROUNDS = 4
CHECK_BATCH = 64
SURER = 0.5  # no divisor is below this: a few checks that are all right would make any network too sure
MOST_FIRST = 40
FOLLOWED = 0.7  # of a parent's answers stay the same when pictures are changed, or they are not
NO_EPOCH = 1_000_000  # changes of checks are drawn apart from those of any epoch


class Lessons:
    """
    The lessons of one training; the same examples and tuning give the same ones, on any number of threads.

    Attributes:
        taught: Labelled examples that are learned.
        checks: Labelled examples that are kept for the early stop and the temperature.
        shown: All examples that are learned, the rendered ones behind the labelled.
        changing: Whether pictures are changed as `augment` does it, or mirrored only.
    """

    def __init__(
        self, classes: Sequence[str], learn: Sequence[Example], drawn: Sequence[str], tuning: Tuning, prepare: Prepare
    ) -> None:
        self.classes, self.tuning, self._prepare = tuple(classes), tuning, prepare
        counted = sorted((one for one in learn if one.weight > 0), key=lambda one: (one.class_name, one.name))
        if not counted:
            raise NotEnoughDataError(
                f"Training needs at least one example that counts, got {len(learn)} of which none does. "
                "Label pictures, or set CELESTIAL_ACCEPTED_WEIGHT above 0."
            )
        self.taught, checks = split(counted, tuning.check_share)
        every = max(1, -(-len(checks) // tuning.most_checks))
        self.checks = checks[::every]
        self.taught += [one for place, one in enumerate(checks) if place % every]
        self.shown = self.taught + _held(rendered(drawn, tuning.rendered_per_class, tuning.seed), tuning)
        self._checked = self.checks + _held(rendered(drawn, RENDERED_CHECKS, tuning.seed + 1), tuning)
        self._kept: list[NDArray[np.float32]] = []
        self.changing = True
        self._count()

    def _count(self) -> None:
        self._columns = np.array([self.classes.index(one.class_name) for one in self.shown])
        self._weights = np.array([one.weight for one in self.shown], np.float32)

    def suit(self, teacher: Any, known: int) -> None:
        """
        Ask of a parent's child no more than the parent can do.

        Rendered pictures that the parent does not know are left out: they would be no rehearsal.
        If it cannot follow how pictures are changed, they are mirrored only.
        """
        self.shown = self.taught + self._known(teacher, known, self.shown[len(self.taught) :])
        self._checked = self.checks + self._known(teacher, known, self._checked[len(self.checks) :])
        self._count()
        inputs, truths = self.first()
        said = np.concatenate([teacher.predict_on_batch(one) for one in inputs])[:, :known].argmax(axis=1)
        half = len(truths) // 2
        self.changing = bool((said[:half] == said[half:]).mean() >= FOLLOWED)

    def _known(self, teacher: Any, known: int, examples: list[Example]) -> list[Example]:
        if not examples:
            return []
        said = np.concatenate([teacher.predict_on_batch(one) for one in self._inputs(examples, range(1))])
        right = said[:, :known].argmax(axis=1) == self._truths(examples, range(1))
        return [one for one, yes in zip(examples, right, strict=True) if yes]

    def course(self) -> Course:
        """As many epochs as the wanted number of pictures makes, within their limits."""
        rows = len(self._order(0))
        fewest, most = self.tuning.epochs
        epochs = min(max(round(self.tuning.pictures / rows), fewest), most)
        return Course(epochs, rows // min(self.tuning.batch, rows))

    def epoch(self, epoch: int, teacher: Any = None, known: int = 0) -> Iterator[Lesson]:
        """
        The lessons of one epoch.

        Args:
            epoch: From 0; decides the order and how each picture is changed.
            teacher: A network whose first ``known`` logits say what shall be kept.
            known: K', how many classes the teacher knows.

        Yields:
            Inputs; targets of shape (N, K + K'), the right class and then what the teacher
            says of its own, nothing where the label contradicts it; weights.
        """
        order = self._order(epoch)
        batch = min(self.tuning.batch, len(order))

        def one(place: int) -> NDArray[np.float32]:
            return self._changed(self.shown[order[place]], (epoch, place))

        for places, inputs in batches(one, np.arange(len(order) // batch * batch), batch, self.tuning.threads):
            rows = order[places]
            targets = np.eye(len(self.classes), dtype=np.float32)[self._columns[rows]]
            if teacher is not None:
                logits = teacher.predict_on_batch(inputs)[:, :known] / self.tuning.soften
                said = Postprocess(self.classes[:known]).batch(logits)
                agreed = (self._columns[rows] >= known) | (said.argmax(axis=1) == self._columns[rows])
                targets = np.concatenate([targets, (said * agreed[:, None]).astype(np.float32)], axis=1)
            yield inputs, targets, self._weights[rows]

    def first(self) -> tuple[Iterator[NDArray[np.float32]], NDArray[np.integer]]:
        """Some examples of each class, as they are and changed: batches of inputs, and the columns of all of them."""
        groups = [np.flatnonzero(self._columns == column)[:MOST_FIRST] for column in np.unique(self._columns)]
        some, rounds = [self.shown[row] for row in np.concatenate(groups)], range(2)
        return self._inputs(some, rounds), self._truths(some, rounds)

    def checked(self, model: Any) -> tuple[float, float] | None:
        """Mean log loss and share of right answers for the checks, every class counting the same; None without any."""
        if not self._checked:
            return None
        rounds = range(self.tuning.check_rounds)
        if not self._kept:
            made = self._inputs(self._checked, rounds)
            size = self._prepared(self._checked[0].load()).nbytes * len(self._checked) * len(rounds)
            self._kept = list(made) if size <= KEPT_BYTES else []
        logits = np.concatenate([model.predict_on_batch(one) for one in self._kept or made])
        truths = self._truths(self._checked, rounds)
        sure = Postprocess(self.classes).batch(logits)
        losses = -np.log(np.maximum(sure[np.arange(len(truths)), truths], 1e-7))
        right = sure.argmax(axis=1) == truths
        present = np.unique(truths)
        each = [(losses[truths == column].mean(), right[truths == column].mean()) for column in present]
        return float(np.mean([loss for loss, _ in each])), float(np.mean([share for _, share in each]))

    def temperature(self, model: Any) -> float:
        """The best divisor of the logits for changed pictures among the labelled checks; 1 with too few."""
        if len(self.checks) < self.tuning.least_to_calibrate:
            return 1.0
        rounds = range(1, 1 + CALIBRATION_ROUNDS)
        logits = [model.predict_on_batch(one) for one in self._inputs(self.checks, rounds)]
        return max(SURER, temperature(np.concatenate(logits), self._truths(self.checks, rounds)))

    def _order(self, epoch: int) -> NDArray[np.integer]:
        """Rows of one epoch: each once, and those of rare classes again, towards the mean of the classes."""
        rng = np.random.default_rng([self.tuning.seed, epoch])
        groups = [np.flatnonzero(self._columns == column) for column in np.unique(self._columns)]
        mean = len(self._columns) // len(groups)
        order = [
            np.resize(rng.permutation(rows), max(len(rows), min(mean, len(rows) * self.tuning.most_repeats)))
            for rows in groups
        ]
        return rng.permutation(np.concatenate(order))

    def _changed(self, example: Example, turn: tuple[int, int]) -> NDArray[np.float32]:
        picture = _smaller(example.load(), self.tuning.longest_side_px)
        rng = np.random.default_rng([self.tuning.seed, *turn])
        if self.changing:
            return self._prepared(augment(picture, rng))
        return self._prepared(picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else picture)

    def _inputs(self, examples: Sequence[Example], rounds: range) -> Iterator[NDArray[np.float32]]:
        """Inputs of all examples, as they are in round 0 and changed in later ones, in batches."""

        def one(place: int) -> NDArray[np.float32]:
            turn, row = rounds[place // len(examples)], place % len(examples)
            return self._changed(examples[row], (NO_EPOCH + turn, row)) if turn else self._plain(examples[row])

        order = np.arange(len(rounds) * len(examples))
        return (inputs for _, inputs in batches(one, order, CHECK_BATCH, self.tuning.threads))

    def _truths(self, examples: Sequence[Example], rounds: range) -> NDArray[np.integer]:
        return np.tile([self.classes.index(one.class_name) for one in examples], len(rounds))

    def _plain(self, example: Example) -> NDArray[np.float32]:
        return self._prepared(_smaller(example.load(), self.tuning.longest_side_px))

    def _prepared(self, picture: Image.Image) -> NDArray[np.float32]:
        return np.asarray(self._prepare(picture), np.float32)


def _smaller(picture: Image.Image, longest_side_px: int) -> Image.Image:
    if max(picture.size) > longest_side_px:
        picture = picture.copy()
        picture.thumbnail((longest_side_px, longest_side_px))
    return picture


def _held(examples: Sequence[Example], tuning: Tuning) -> list[Example]:
    """The same examples, their pictures made once and kept."""
    with ThreadPoolExecutor(tuning.threads) as pool:
        pictures = list(pool.map(lambda one: one.load(), examples))
    return [replace(one, load=picture.copy) for one, picture in zip(examples, pictures, strict=True)]
