"""
Examples to a candidate model with its scores.

An example is a picture that can be loaded, a class and a weight; where it comes from is the
caller's affair. Everything random is drawn from the recipe's seed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL import __version__ as pillow_version

from celestial_backend import __version__, network, robustness
from celestial_backend.augment import augment
from celestial_backend.errors import NotEnoughDataError, TrainingError
from celestial_backend.renderer import BODIES, render

logger = logging.getLogger(__name__)

LEAST_CLASSES = 2
LEAST_PER_CLASS = 3  # pictures: fewer leave nothing to learn from once some are held out
LONGEST_SIDE_PX = 512  # pictures are kept in memory while training, no larger than this
RENDERED_TO_JUDGE = 40  # pictures of each body


@dataclass(frozen=True)
class Recipe:
    """Every number that decides what a training does; the defaults made the shipped model."""

    size_px: tuple[int, int] = (72, 72)
    widths: tuple[int, ...] = (24, 32, 48, 64, 96, 128)
    dropout: float = 0.1
    epochs: int = 75
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
class Example:
    """One picture to learn from; ``load`` is called once or twice in a training, by its thread."""

    load: Callable[[], Image.Image]
    class_name: str
    name: str  # decides whether it is held out, whatever folder it is in
    weight: float = 1.0


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


def read_folder(folder: Path) -> list[Example]:
    """
    The examples of a folder with one sub-folder for each class, in the order of their names.

    Files that cannot be read as pictures are left out and reported in the log. The pictures
    are decoded here, once, and kept in memory.

    Raises:
        TrainingError: The folder is none.
        NotEnoughDataError: Fewer than two classes, or a class with too few pictures.
    """
    if not folder.is_dir():
        raise TrainingError(f"The training data must be a folder with one sub-folder for each class, got {folder}.")
    examples, skipped = [], []
    classes = sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    for class_folder in classes:
        for path in sorted(entry for entry in class_folder.iterdir() if entry.is_file()):
            try:
                picture = _open(path)
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
                skipped.append(f"{class_folder.name}/{path.name}")
            else:
                examples.append(Example(picture.copy, class_folder.name, path.name))
    if skipped:
        logger.warning("%d files are no pictures and were left out: %s", len(skipped), ", ".join(skipped[:20]))
    check_counts(examples, [entry.name for entry in classes])
    return examples


def _open(path: Path) -> Image.Image:
    with Image.open(path) as opened:
        opened.draft("RGB", (LONGEST_SIDE_PX, LONGEST_SIDE_PX))
        opened.load()
        picture = network.rgb(opened)
    picture.thumbnail((LONGEST_SIDE_PX, LONGEST_SIDE_PX))
    return picture


def check_counts(examples: Sequence[Example], classes: Sequence[str]) -> None:
    """
    Make sure that every class has enough to learn from and to hold out.

    Raises:
        NotEnoughDataError: The message gives the counts.
    """
    counts = Counter(example.class_name for example in examples)
    if len(classes) < LEAST_CLASSES or any(counts[name] < LEAST_PER_CLASS for name in classes):
        seen = ", ".join(f"{name}: {counts[name]}" for name in classes) or "no class at all"
        raise NotEnoughDataError(
            f"Training needs at least {LEAST_CLASSES} classes with {LEAST_PER_CLASS} readable pictures each, "
            f"got {seen}. Add pictures or remove the class."
        )


def split(examples: Sequence[Example], share: float) -> tuple[list[Example], list[Example]]:
    """
    To learn from, and held out; decided within each class by the hash of the names alone.

    Args:
        examples: In any order.
        share: Of each class to hold out; at least one example is, and at least one is not.
    """
    ranked: dict[str, list[Example]] = {}
    for example in sorted(examples, key=lambda one: (hashlib.sha256(one.name.encode()).hexdigest(), one.name)):
        ranked.setdefault(example.class_name, []).append(example)
    learn, held_out = [], []
    for class_name in sorted(ranked):
        mine = ranked[class_name]
        count = min(len(mine) - 1, max(1, round(share * len(mine))))
        held_out += mine[:count]
        learn += mine[count:]
    return learn, held_out


def rendered(classes: Sequence[str], per_class: int, seed: int) -> list[Example]:
    """Examples from the renderer, ``per_class`` for each of those classes that it knows."""
    return [
        Example(partial(render, name, (seed, index)), name, f"rendered {seed} {name} {index}")
        for name in classes
        if name in BODIES
        for index in range(per_class)
    ]


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


def seed_everything(seed: int) -> None:
    """Make Keras and TensorFlow repeatable for the rest of this process."""
    import keras
    import tensorflow as tf

    keras.utils.set_random_seed(seed)
    tf.config.experimental.enable_op_determinism()


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
    batch = min(recipe.batch, len(examples))
    steps = len(examples) // batch
    pictures, targets = _loaded(examples, classes)
    weights = np.array([example.weight for example in examples], np.float32)
    checks, truths = _loaded(held_out, classes)
    _compile(model, recipe, steps)
    started, report = time.monotonic(), progress or (lambda _: None)
    for epoch in range(recipe.epochs):
        loss = 0.0
        for step, (rows, inputs) in enumerate(_batches(pictures, epoch, batch, steps, recipe)):
            one = float(model.train_on_batch(inputs, targets[rows], weights[rows]))
            loss += (one - loss) / (step + 1)
            report(Progress(epoch, recipe.epochs, step + 1, steps, time.monotonic() - started, loss))
        if checks:
            right = float((logits_of(model, checks, recipe).argmax(axis=1) == truths.argmax(axis=1)).mean())
            report(Progress(epoch, recipe.epochs, steps, steps, time.monotonic() - started, loss, right))


def _loaded(examples: Sequence[Example], classes: Sequence[str]) -> tuple[list[Image.Image], NDArray[np.float32]]:
    columns = [classes.index(example.class_name) for example in examples]
    return [example.load() for example in examples], np.eye(len(classes), dtype=np.float32)[columns]


def _compile(model: Any, recipe: Recipe, steps: int) -> None:
    import keras

    rising = 1 + recipe.epochs * steps // 10
    schedule = keras.optimizers.schedules.CosineDecay(
        recipe.learning_rate / 20,
        decay_steps=max(1, recipe.epochs * steps - rising),
        alpha=0.002,
        warmup_target=recipe.learning_rate,
        warmup_steps=rising,
    )
    model.compile(
        keras.optimizers.AdamW(schedule, recipe.weight_decay, global_clipnorm=1.0),
        keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=recipe.label_smoothing),
    )


def _batches(
    pictures: Sequence[Image.Image], epoch: int, batch: int, steps: int, recipe: Recipe
) -> Iterator[tuple[NDArray[np.integer], NDArray[np.float32]]]:
    preprocess = network.Preprocess(recipe.size_px)
    order = np.random.default_rng([recipe.seed, epoch]).permutation(len(pictures))

    def one(row: int) -> NDArray[np.float32]:
        return preprocess(augment(pictures[row], np.random.default_rng([recipe.seed, epoch, row])))

    with ThreadPoolExecutor(recipe.threads) as pool:
        parts = [order[step * batch : (step + 1) * batch] for step in range(steps)]
        coming = [pool.map(one, part.tolist()) for part in parts[:2]]
        for step, part in enumerate(parts):
            inputs = np.concatenate(list(coming.pop(0)))
            if step + 2 < steps:
                coming.append(pool.map(one, parts[step + 2].tolist()))
            yield part, inputs


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
    import keras
    import tensorflow as tf

    versions = {"celestial_backend": __version__, "keras": keras.__version__, "tensorflow": tf.__version__}
    versions |= {"numpy": np.__version__, "pillow": pillow_version, "python": platform.python_version()}
    recipe = trained.recipe
    card = network.Card(trained.classes, recipe.size_px, trained.metrics, asdict(recipe), versions)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        trained.network.save(place, zipped=False, include_optimizer=False)
        for name in network.FILES:
            (Path(place) / name).replace(folder / name)
    robustness.write_card(asdict(card), folder)
    (folder / network.CARD).write_text(json.dumps(asdict(card), indent=1) + "\n", "utf-8")
