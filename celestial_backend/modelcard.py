"""The page that says what a trained model learned from, how often it is right, and where it fails."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

PAGE, CONFUSION, DATA = "MODEL_CARD.md", "confusion.png", "DATA.md"
CELL_PX, NAMES_PX = 46, 90


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

    python -m celestial_backend train FOLDER

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
The corruptions are those of `celestial_backend/robustness.py`, which the augmentation of the training does
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
Of these, {counts["of_these_rendered"]} of each class that `celestial_backend/renderer.py` can draw are rendered. Within
each class, the {_share(recipe["held_out_share"], 0)} of the files whose names have the lowest SHA-256 are held out.

{about}
"""


def _rendered(share: float | None) -> str:
    return "" if share is None else f"| freshly rendered | {_share(share)} |\n"


def _share(value: float, places: int = 2) -> str:
    return f"{value:.{places}%}".replace("%", " %")


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())
