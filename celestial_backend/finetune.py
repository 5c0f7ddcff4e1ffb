"""
A live model, taught what people have labelled, and kept from forgetting the rest.

Everything random is drawn from the tuning's seed: the same labels give the same model again.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from celestial_backend import network
from celestial_backend.classifier import Parts
from celestial_backend.errors import TrainingError
from celestial_backend.examples import Example
from celestial_backend.growth import copied, freeze_normalisations, grown, head_start, uncompiled
from celestial_backend.lessons import SCRATCH, Lessons, Prepare, Tuning
from celestial_backend.teaching import Course, Lesson, Progress, Taught, seed_everything, set_up, teach
from celestial_backend.training import Recipe, versions

logger = logging.getLogger(__name__)

Report = Callable[[Progress], None] | None


@dataclass(frozen=True)
class Candidate:
    """
    What came of a training on a project's labels.

    Attributes:
        network: Ends in a plain ``Dense`` layer of logits.
        preprocess: The parent's own, or ours for a network from nothing.
        postprocess: The softmax, with the names.
        classes: In the order of the logits.
        facts: How it was made, in plain values that JSON can hold.
    """

    network: Any = field(repr=False)
    preprocess: Prepare = field(repr=False)
    postprocess: network.Postprocess
    classes: tuple[str, ...]
    facts: dict[str, Any]

    def parts(self, tag: str) -> Parts:
        """The same as a model of the store, to be asked or saved under this tag."""
        return Parts(tag, self.network, self.preprocess, self.postprocess)


def finetune(
    parent: Parts,
    parent_classes: Sequence[str],
    classes: Sequence[str],
    learn: Sequence[Example],
    tuning: Tuning | None = None,
    deadline: float = float("inf"),
    progress: Report = None,
) -> Candidate:
    """
    A copy of a model, its last layer grown for the new classes, taught the examples.

    What it knew is kept in two ways: rendered pictures of its old classes are shown between the
    labelled ones, and of every picture it is asked to say of its old classes what its parent
    says, unless the label contradicts the parent.

    Args:
        parent: The model to start from; it stays as it is.
        parent_classes: Its classes, in the order of its outputs.
        classes: The same, and behind them the new ones.
        learn: Pictures that may be learned; those with a weight of 0 are left out. Their order is of no account.
        tuning: All hyper-parameters; the default ones if none.
        deadline: By `time.monotonic`; when it comes, the best so far is kept.
        progress: Called after every step, in the caller's thread.

    Raises:
        CannotGrowError: The network cannot be taught more; the message offers a training from nothing.
        NotEnoughDataError: No example is left to learn from.
        TrainingError: The deadline came before the first step.
    """
    tuning, started = tuning or Tuning(), time.monotonic()
    seed_everything(tuning.seed)
    teacher = grown(parent, parent_classes, classes, tuning.seed)
    student = copied(teacher)
    freeze_normalisations(student)
    lessons, known = Lessons(classes, learn, parent_classes, tuning, parent.preprocess), len(parent_classes)
    lessons.suit(teacher, known)
    if len(classes) > known:
        head_start(student, *lessons.first(), known)
    facts = _taught(student, lessons, lambda epoch: lessons.epoch(epoch, teacher, known), deadline, progress)
    facts |= _calibrated(student, lessons)
    return _candidate(student, parent.preprocess, lessons, facts | {"parent": parent.tag}, started)


def from_scratch(
    classes: Sequence[str],
    learn: Sequence[Example],
    tuning: Tuning | None = None,
    deadline: float = float("inf"),
    progress: Report = None,
) -> Candidate:
    """
    A new network, trained on the project's labels and on rendered pictures of the bodies among its classes.

    Args:
        classes: In the order that the logits shall have.
        learn: As for `finetune`, like what follows.
        tuning: All hyper-parameters; `lessons.SCRATCH` if none.
        deadline: By `time.monotonic`.
        progress: Called after every step.

    Raises:
        NotEnoughDataError: No example is left to learn from.
        TrainingError: The deadline came before the first step.
    """
    tuning, recipe, started = tuning or SCRATCH, Recipe(), time.monotonic()
    seed_everything(tuning.seed)
    preprocess = network.Preprocess(recipe.size_px)
    student = network.build(len(classes), recipe.size_px, recipe.widths, recipe.dropout)
    lessons = Lessons(classes, learn, classes, tuning, preprocess)
    facts = _taught(student, lessons, lessons.epoch, deadline, progress)
    student = network.fused(student, recipe.dropout)
    facts |= _calibrated(student, lessons)
    return _candidate(student, preprocess, lessons, facts | {"parent": None}, started)


class _Best:
    """The best weights so far, by the loss on the checks; stops a training that finds no better ones."""

    def __init__(self, model: Any, lessons: Lessons, deadline: float) -> None:
        self._model, self._lessons, self._deadline = model, lessons, deadline
        self._weights: list[NDArray[np.floating]] | None = None
        self.loss, self.accuracy, self.epoch, self._last = float("inf"), 0.0, 0, 0

    def after(self, epoch: int) -> float | None:
        figures = self._lessons.checked(self._model)
        if figures is None:
            return None
        (loss, accuracy), self._last = figures, epoch
        if loss < self.loss:
            self.loss, self.accuracy, self.epoch, self._weights = loss, accuracy, epoch, self._model.get_weights()
        return accuracy

    def stop(self) -> str | None:
        if time.monotonic() >= self._deadline:
            return "time"
        return "no progress" if self._last - self.epoch >= self._lessons.tuning.patience else None

    def keep(self) -> None:
        if self._weights is not None:
            self._model.set_weights(self._weights)


def _taught(
    student: Any,
    lessons: Lessons,
    epoch: Callable[[int], Iterable[Lesson]],
    deadline: float,
    progress: Report,
) -> dict[str, Any]:
    """Teach a network in place and leave it at its best; gives what is to be told about it."""
    tuning, course = lessons.tuning, lessons.course()
    set_up(student, course, tuning.learning_rate, tuning.weight_decay, _loss(len(lessons.classes), tuning))
    best = _Best(student, lessons, deadline)
    taught = teach(student, course, epoch, progress, best.after, best.stop)
    if not taught.steps:
        raise TrainingError(
            "A training must have time for at least one step; its deadline came before. "
            "Raise CELESTIAL_TRAIN_MAX_S, or make the project's pictures faster to fetch."
        )
    best.keep()
    return _told(course, taught, best)


def _told(course: Course, taught: Taught, best: _Best) -> dict[str, Any]:
    judged = best.loss < float("inf")
    return {
        "epochs": taught.epochs,
        "epochs_planned": course.epochs,
        "best_epoch": best.epoch if judged else None,
        "steps": taught.steps,
        "stopped_by": taught.stopped_by or "epochs",
        "check_loss": round(best.loss, 4) if judged else None,
        "check_accuracy": round(best.accuracy, 4) if judged else None,
    }


def _loss(total: int, tuning: Tuning) -> Callable[[Any, Any], Any]:
    """Cross entropy with the label, and with what the teacher says of the classes that it knows."""
    from keras import ops

    def loss(targets: Any, logits: Any) -> Any:
        right = targets[:, :total] * (1 - tuning.label_smoothing) + tuning.label_smoothing / total
        lost = -ops.sum(right * ops.log_softmax(logits), axis=-1)
        known = targets.shape[1] - total
        if known:
            soft = ops.log_softmax(logits[:, :known] / tuning.soften)
            lost -= tuning.keep * tuning.soften**2 * ops.sum(targets[:, total:] * soft, axis=-1)
        return lost

    return loss


def _calibrated(student: Any, lessons: Lessons) -> dict[str, Any]:
    divisor = lessons.temperature(student)
    network.fold_temperature(student, divisor)
    return {"temperature": round(divisor, 4)}


def _candidate(student: Any, preprocess: Prepare, lessons: Lessons, facts: dict[str, Any], started: float) -> Candidate:
    counts = {
        "learned_from": dict(Counter(one.class_name for one in lessons.taught)),
        "checked_on": dict(Counter(one.class_name for one in lessons.checks)),
        "rendered": len(lessons.shown) - len(lessons.taught),
    }
    seconds = round(time.monotonic() - started, 1)
    facts |= {
        "seconds": seconds,
        "counts": counts,
        "changed": lessons.changing,
        "tuning": asdict(lessons.tuning),
        "versions": versions(),
    }
    logger.info(
        "Taught %d examples in %d epochs and %.0f s, stopped by %s",
        len(lessons.taught),
        facts["epochs"],
        seconds,
        facts["stopped_by"],
    )
    bare = uncompiled(student)  # the course's loss and optimizer are nobody else's
    return Candidate(bare, preprocess, network.Postprocess(lessons.classes), lessons.classes, facts)
