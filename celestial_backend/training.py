"""
Examples to a candidate model with its scores.

Everything random is drawn from the recipe's seed.
"""

from __future__ import annotations

import json
import platform
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL import __version__ as pillow_version

from celestial_backend import __version__, modelcard, network, robustness
from celestial_backend.augment import augment
from celestial_backend.examples import Example, check_counts, rendered, split
from celestial_backend.teaching import Course, Lesson, batches, seed_everything, set_up, teach
from celestial_backend.teaching import Progress as Progress  # callers know it by this name

RENDERED_TO_JUDGE = 40  # pictures of each body


@dataclass(frozen=True)
class Recipe:
    """Every hyper-parameter; the defaults made the shipped model. How far pictures are changed stands in `augment`."""

    size_px: tuple[int, int] = (72, 72)
    widths: tuple[int, ...] = (24, 32, 48, 64, 96, 128)
    dropout: float = 0.1
    epochs: int = 110
    batch: int = 64
    learning_rate: float = 0.003  # at its peak; rises over the first tenth, then falls as a cosine
    weight_decay: float = 0.01
    label_smoothing: float = 0.01
    held_out_share: float = 0.15
    rendered_per_class: int = 60  # pictures from `renderer`, for the classes that it knows
    calibration_rounds: int = 4  # augmented versions of each held-out picture
    seed: int = 20
    threads: int = 2


@dataclass(frozen=True)
class TrainedModel:
    """A candidate: its Keras network, its classes in the order of the logits, its card."""

    network: Any = field(repr=False)
    classes: tuple[str, ...]
    recipe: Recipe
    metrics: dict[str, Any]

    @property
    def preprocess(self) -> network.Preprocess:
        """What must happen to a picture before this network."""
        return network.Preprocess(self.recipe.size_px)

    @property
    def postprocess(self) -> network.Postprocess:
        """What must happen to this network's output."""
        return network.Postprocess(self.classes)


def train(
    examples: Sequence[Example], recipe: Recipe | None = None, progress: Callable[[Progress], None] | None = None
) -> TrainedModel:
    """
    A network trained from nothing, calibrated, and scored on pictures that it never saw.

    Args:
        examples: Two classes or more; the classes of the model are their sorted names.
        recipe: All hyper-parameters; the default ones if none.
        progress: Called after every step and every epoch, in the caller's thread.

    Raises:
        NotEnoughDataError: Too few examples of a class.
    """
    recipe, started = recipe or Recipe(), time.monotonic()
    classes = tuple(sorted({example.class_name for example in examples}))
    check_counts(examples, classes)
    seed_everything(recipe.seed)
    learn, held_out = split(examples, recipe.held_out_share)
    learn += rendered(classes, recipe.rendered_per_class, recipe.seed)
    model = network.build(len(classes), recipe.size_px, recipe.widths, recipe.dropout)
    fit(model, learn, classes, recipe, held_out, progress)
    model = network.fused(model, recipe.dropout)
    metrics = calibrate_and_score(model, held_out, classes, recipe)
    metrics["counts"] = {
        "learned_from": dict(Counter(example.class_name for example in learn)),
        "of_these_rendered": recipe.rendered_per_class,
        "held_out": dict(Counter(example.class_name for example in held_out)),
    }
    metrics["seconds"] = round(time.monotonic() - started)
    return TrainedModel(model, classes, recipe, metrics)


def fit(
    model: Any,
    examples: Sequence[Example],
    classes: Sequence[str],
    recipe: Recipe,
    held_out: Sequence[Example] = (),
    progress: Callable[[Progress], None] | None = None,
) -> None:
    """
    Teach a network, new or live, in place; it ends in logits for ``classes``, in that order.

    The pixels depend on seed, epoch and the example's place alone, never on the threads.
    """
    import keras

    batch = min(recipe.batch, len(examples))
    course = Course(recipe.epochs, len(examples) // batch)
    pictures, targets = _loaded(examples, classes)
    weights = np.array([example.weight for example in examples], np.float32)
    checks, truths = _loaded(held_out, classes)
    preprocess = network.Preprocess(recipe.size_px)

    def lessons(epoch: int) -> Iterator[Lesson]:
        def one(row: int) -> NDArray[np.float32]:
            return preprocess(augment(pictures[row], np.random.default_rng([recipe.seed, epoch, row])))

        order = np.random.default_rng([recipe.seed, epoch]).permutation(len(pictures))
        for rows, inputs in batches(one, order[: course.steps * batch], batch, recipe.threads):
            yield inputs, targets[rows], weights[rows]

    def after(_: int) -> float | None:
        if not checks:
            return None
        return float((logits_of(model, checks, recipe).argmax(axis=1) == truths.argmax(axis=1)).mean())

    loss = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=recipe.label_smoothing)
    set_up(model, course, recipe.learning_rate, recipe.weight_decay, loss)
    teach(model, course, lessons, progress, after)


def _loaded(examples: Sequence[Example], classes: Sequence[str]) -> tuple[list[Image.Image], NDArray[np.float32]]:
    columns = [classes.index(example.class_name) for example in examples]
    return [example.load() for example in examples], np.eye(len(classes), dtype=np.float32)[columns]


def logits_of(model: Any, pictures: Sequence[Image.Image], recipe: Recipe, batch: int = 64) -> NDArray[np.float32]:
    """Logits of N >= 1 pictures of any size and mode, shape (N, K)."""
    preprocess = network.Preprocess(recipe.size_px)
    groups = (pictures[start : start + batch] for start in range(0, len(pictures), batch))
    return np.concatenate(
        [model.predict_on_batch(np.concatenate([preprocess(one) for one in some])) for some in groups]
    )


def calibrate_and_score(
    model: Any, held_out: Sequence[Example], classes: Sequence[str], recipe: Recipe
) -> dict[str, Any]:
    """
    Fold the best temperature for augmented held-out pictures into a network, and say how good it is.

    Returns:
        The figures of `robustness.figures` for the held-out pictures, the accuracy on freshly
        rendered ones (None when the renderer knows none of the classes), the temperature and
        what the calibration errors were before it.
    """
    pictures = [example.load() for example in held_out]
    truths = np.array([classes.index(example.class_name) for example in held_out])
    changed = [
        augment(picture, np.random.default_rng([recipe.seed, recipe.epochs + turn, row]))
        for turn in range(recipe.calibration_rounds)
        for row, picture in enumerate(pictures)
    ]
    divisor = network.temperature(logits_of(model, changed, recipe), np.tile(truths, recipe.calibration_rounds))
    answered = robustness.answers(lambda some: logits_of(model, some, recipe), pictures, recipe.seed)
    before = robustness.figures(answered, truths)
    network.fold_temperature(model, divisor)
    fresh = rendered(classes, RENDERED_TO_JUDGE, recipe.seed + 1)
    drawn = np.array([classes.index(example.class_name) for example in fresh])
    guessed = logits_of(model, [example.load() for example in fresh], recipe).argmax(axis=1) if fresh else drawn
    return robustness.figures(answered, truths, divisor) | {
        "accuracy_rendered": round(float((guessed == drawn).mean()), 4) if fresh else None,
        "calibration_error_before": before["calibration_error"],
        "calibration_error_corrupted_before": before["calibration_error_corrupted"],
        "temperature": round(divisor, 4),
    }


def save(trained: TrainedModel, folder: Path) -> None:
    """
    Write a model as plain files, no pickle; what else is in the folder stays.

    ``config.json``, ``metadata.json`` and ``model.weights.h5`` are Keras's own, ``card.json`` is
    `network.Card`, and ``MODEL_CARD.md`` with ``confusion.png`` says the same to people.
    """
    recipe = trained.recipe
    card = network.Card(trained.classes, recipe.size_px, trained.metrics, asdict(recipe), versions())
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        trained.network.save(place, zipped=False, include_optimizer=False)
        for name in network.FILES:
            (Path(place) / name).replace(folder / name)
    modelcard.write_card(asdict(card), folder)
    (folder / network.CARD).write_text(json.dumps(asdict(card), indent=1) + "\n", "utf-8")


def versions() -> dict[str, str]:
    """What this training ran on."""
    import keras
    import tensorflow as tf

    found = {"celestial_backend": __version__, "keras": keras.__version__, "tensorflow": tf.__version__}
    return found | {"numpy": np.__version__, "pillow": pillow_version, "python": platform.python_version()}
