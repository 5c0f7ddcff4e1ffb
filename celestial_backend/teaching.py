"""
The lessons: batches of changed pictures, made side by side, and the loop that shows them to a network.

Nothing here knows what is taught, nor by which loss.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Lesson = tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]  # inputs, targets, weights


@dataclass(frozen=True)
class Progress:
    """Where a training is: epoch from 0, steps done in it, mean loss of the epoch; the accuracy comes at its end."""

    epoch: int
    epochs: int
    step: int
    steps: int
    seconds: float
    loss: float
    held_out_accuracy: float | None = None


@dataclass(frozen=True)
class Course:
    """How long a network is taught: epochs of equally many steps."""

    epochs: int
    steps: int


@dataclass(frozen=True)
class Taught:
    """How a course went: epochs and steps that were done, and why it ended before its time, if it did."""

    epochs: int
    steps: int
    stopped_by: str | None


def seed_everything(seed: int) -> None:
    """Make Keras and TensorFlow repeatable for the rest of this process."""
    import keras
    import tensorflow as tf

    keras.utils.set_random_seed(seed)
    tf.config.experimental.enable_op_determinism()


def set_up(model: Any, course: Course, learning_rate: float, weight_decay: float, loss: Any) -> None:
    """Make a network ready for a course; the rate rises over the first tenth of it, then falls as a cosine."""
    import keras

    rising = 1 + course.epochs * course.steps // 10
    schedule = keras.optimizers.schedules.CosineDecay(
        learning_rate / 20,
        decay_steps=max(1, course.epochs * course.steps - rising),
        alpha=0.002,
        warmup_target=learning_rate,
        warmup_steps=rising,
    )
    model.compile(keras.optimizers.AdamW(schedule, weight_decay, global_clipnorm=1.0), loss)


def teach(
    model: Any,
    course: Course,
    lessons: Callable[[int], Iterable[Lesson]],
    progress: Callable[[Progress], None] | None = None,
    after: Callable[[int], float | None] = lambda _: None,
    stop: Callable[[], str | None] = lambda: None,
) -> Taught:
    """
    Show a network that is set up its lessons, in place.

    Args:
        model: As `set_up` leaves it.
        course: How many lessons there are.
        lessons: Those of one epoch; as many as the course has steps.
        progress: Called after every step, and after every epoch whose accuracy is known.
        after: Called after every epoch; gives the accuracy that is reported, if it knows one.
        stop: Asked before every step and epoch; a reason ends the course.
    """
    started, report, done = time.monotonic(), progress or (lambda _: None), 0
    for epoch in range(course.epochs):
        loss = 0.0
        for step, lesson in enumerate(lessons(epoch)):
            if reason := stop():
                return Taught(epoch, done, reason)
            loss += (float(model.train_on_batch(*lesson)) - loss) / (step + 1)
            done += 1
            report(Progress(epoch, course.epochs, step + 1, course.steps, time.monotonic() - started, loss))
        if (right := after(epoch)) is not None:
            seconds = time.monotonic() - started
            report(Progress(epoch, course.epochs, course.steps, course.steps, seconds, loss, right))
    return Taught(course.epochs, done, None)


def batches(
    one: Callable[[int], NDArray[np.float32]], order: NDArray[np.integer], batch: int, threads: int
) -> Iterator[tuple[NDArray[np.integer], NDArray[np.float32]]]:
    """
    Network inputs in batches, made by threads while the batches before them are used.

    Args:
        one: The input of one row, shape (1, ...); called by several threads.
        order: The rows that are wanted; a shorter batch at the end holds the rest.
        batch: Rows at once.
        threads: How many rows are made side by side.

    Yields:
        The rows and their inputs, shape (rows, ...).
    """
    with ThreadPoolExecutor(threads) as pool:
        parts = [order[start : start + batch] for start in range(0, len(order), batch)]
        coming = [pool.map(one, part.tolist()) for part in parts[:2]]
        for step, part in enumerate(parts):
            inputs = np.concatenate(list(coming.pop(0)))
            if step + 2 < len(parts):
                coming.append(pool.map(one, parts[step + 2].tolist()))
            yield part, inputs
