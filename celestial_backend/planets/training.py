"""
Examples to a candidate model, with its scores and the page that says where it fails.

Everything random is drawn from the recipe's seed.
"""

from __future__ import annotations

import json
import platform
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from PIL import __version__ as pillow_version

from celestial_backend import __version__
from celestial_backend.pictures.hooks import Postprocess, Preprocess
from celestial_backend.planets import network, robustness
from celestial_backend.planets.augment import augment
from celestial_backend.planets.examples import Example, check_counts, rendered, split

PAGE, CONFUSION, DATA = "MODEL_CARD.md", "confusion.png", "DATA.md"
CELL_PX, NAMES_PX = 46, 90
RENDERED_TO_JUDGE = 40  # pictures of each body
Lesson = tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]  # inputs, targets, weights


def write_card(card: Mapping[str, Any], folder: Path) -> None:
    """
    Write the page and its picture into a folder.

    Args:
        card: The contents of ``card.json``.
        folder: What its `DATA.md` says about the data, if there is one, becomes part of the page.
    """
    about = (folder / DATA).read_text("utf-8").strip() if (folder / DATA).is_file() else ""
    confusion_picture(card["metrics"]["confusion"], card["classes"]).save(folder / CONFUSION, optimize=True)
    (folder / PAGE).write_text(_page(card, about), "utf-8")


def confusion_picture(counts: Sequence[Sequence[int]], classes: Sequence[str]) -> Image.Image:
    """The confusion matrix as a picture: a row for each truth, a column for each answer, darker for more."""
    font = ImageFont.load_default(13)
    side = NAMES_PX + CELL_PX * len(classes)
    picture = Image.new("RGB", (side + 10, side + 10), "white")
    pen = ImageDraw.Draw(picture)
    for row, (name, line) in enumerate(zip(classes, counts, strict=True)):
        top = NAMES_PX + row * CELL_PX
        pen.text((NAMES_PX - 8, top + CELL_PX / 2), name, "black", font, anchor="rm")
        upright = Image.new("RGB", (NAMES_PX, CELL_PX), "white")
        ImageDraw.Draw(upright).text((6, CELL_PX / 2), name, "black", font, anchor="lm")
        picture.paste(upright.rotate(90, expand=True), (top, 0))
        for column, count in enumerate(line):
            share = (count / max(1, sum(line))) ** 0.4  # a few mistakes must be seen beside hundreds of right answers
            left, ink = NAMES_PX + column * CELL_PX, "white" if share > 0.6 else "black"
            colour = (int(255 - 225 * share), int(255 - 165 * share), int(255 - 100 * share))
            pen.rectangle((left, top, left + CELL_PX - 2, top + CELL_PX - 2), colour)
            pen.text((left + CELL_PX / 2 - 1, top + CELL_PX / 2 - 1), str(count), ink, font, anchor="mm")
    return picture


def _page(card: Mapping[str, Any], about: str) -> str:
    metrics, recipe = card["metrics"], card["recipe"]
    counts = metrics["counts"]
    held_out = sum(counts["held_out"].values())
    corrupted = "\n".join(
        f"| {name.replace('_', ' ')} | {_share(value)} |" for name, value in metrics["accuracy_corrupted"].items()
    )
    return f"""# Model card

<!-- Written by the training run that made the weights beside it. Do not edit: edit {DATA} or the recipe. -->

A convolutional network of {len(recipe["widths"])} layers that says which of {len(card["classes"])} bodies a picture
shows. Before it, the body is found and cut out, and brought to {card["size_px"][0]} × {card["size_px"][1]} pixels.
It is made again, with the same data, by

    python -m celestial_backend.planets FOLDER --export DIR

which takes {metrics["seconds"] / 60:.0f} minutes on two cores of the machine that made it.
Seed {recipe["seed"]}; {", ".join(f"{name} {number}" for name, number in card["versions"].items())}.

## How often it is right

On {held_out} pictures that it never learned from
({_counted(counts["held_out"])}),
and on three severities of each corruption of them:

| pictures | right |
|---|---|
| as they are | {_share(metrics["accuracy"])} |
{corrupted}
| mean over the corruptions | {_share(metrics["accuracy_corrupted_mean"])} |
{_rendered(metrics["accuracy_rendered"])}
The corruptions are those of `celestial_backend/planets/robustness.py`, which the augmentation of the training does
not use. Rows are what a picture shows, columns what the network says, all pictures of the table together:

![Confusion matrix]({CONFUSION})

## How far its probabilities can be trusted

The logits are divided by a temperature of {metrics["temperature"]}, folded into the last layer and fitted on
augmented versions of the held-out pictures. Expected calibration error, before and after:

| pictures | before | after |
|---|---|---|
| as they are | {metrics["calibration_error_before"]:.4f} | {metrics["calibration_error"]:.4f} |
| corrupted | {metrics["calibration_error_corrupted_before"]:.4f} | {metrics["calibration_error_corrupted"]:.4f} |

## What it learned from

{_counted(counts["learned_from"])}.
Of these, {counts["of_these_rendered"]} of each class that `celestial_backend/planets/renderer.py` can draw are
rendered. Within each class, the {_share(recipe["held_out_share"], 0)} of the files whose names have the lowest SHA-256
are held out.

{about}
"""


def _rendered(share: float | None) -> str:
    return "" if share is None else f"| freshly rendered | {_share(share)} |\n"


def _share(value: float, places: int = 2) -> str:
    return f"{value:.{places}%}".replace("%", " %")


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())


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
class TrainedModel:
    """A candidate: its Keras network, its classes in the order of the logits, its card."""

    network: Any = field(repr=False)
    classes: tuple[str, ...]
    recipe: Recipe
    metrics: dict[str, Any]

    @property
    def preprocess(self) -> Preprocess:
        """What must happen to a picture before this network."""
        return Preprocess(self.recipe.size_px)

    @property
    def postprocess(self) -> Postprocess:
        """What must happen to this network's output."""
        return Postprocess(self.classes)


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
    check_counts([example.class_name for example in examples], classes)
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
    preprocess = Preprocess(recipe.size_px)

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
) -> None:
    """
    Show a network that is set up its lessons, in place.

    Args:
        model: As `set_up` leaves it.
        course: How many lessons there are.
        lessons: Those of one epoch; as many as the course has steps.
        progress: Called after every step, and after every epoch whose accuracy is known.
        after: Called after every epoch; gives the accuracy that is reported, if it knows one.
    """
    started, report = time.monotonic(), progress or (lambda _: None)
    for epoch in range(course.epochs):
        loss = 0.0
        for step, lesson in enumerate(lessons(epoch)):
            loss += (float(model.train_on_batch(*lesson)) - loss) / (step + 1)
            report(Progress(epoch, course.epochs, step + 1, course.steps, time.monotonic() - started, loss))
        if (right := after(epoch)) is not None:
            seconds = time.monotonic() - started
            report(Progress(epoch, course.epochs, course.steps, course.steps, seconds, loss, right))


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


def _loaded(examples: Sequence[Example], classes: Sequence[str]) -> tuple[list[Image.Image], NDArray[np.float32]]:
    columns = [classes.index(example.class_name) for example in examples]
    return [example.load() for example in examples], np.eye(len(classes), dtype=np.float32)[columns]


def logits_of(model: Any, pictures: Sequence[Image.Image], recipe: Recipe, batch: int = 64) -> NDArray[np.float32]:
    """Logits of N >= 1 pictures of any size and mode, shape (N, K)."""
    preprocess = Preprocess(recipe.size_px)
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
    write_card(asdict(card), folder)
    (folder / network.CARD).write_text(json.dumps(asdict(card), indent=1) + "\n", "utf-8")


def versions() -> dict[str, str]:
    """What this training ran on."""
    import keras
    import tensorflow as tf

    found = {"celestial_backend": __version__, "keras": keras.__version__, "tensorflow": tf.__version__}
    return found | {"numpy": np.__version__, "pillow": pillow_version, "python": platform.python_version()}
