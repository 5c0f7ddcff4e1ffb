"""
What stands before and after a network: from a decoded picture to its input, and from its output to an answer.

These are the custom objects of saved models. An exported model carries this file with it and works where this
package is not, so it imports nothing of the package, and every change of what it computes is a change of what
models say.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

SHARE = 224 / 256  # of the shorter side: what a classifier for ImageNet looks at
GRID = 32  # cells per side in which the body is looked for
BODY_LEVEL = 0.15  # of the strongest difference from the background counts as body
MARGIN = 0.25  # of the longer side of the body stays free around it: room for faint rings
TAIL = 0.02  # of the pixels may lie below the dark level, and as many above the bright one
LEAST_SPREAD = 0.02  # between the two, so that next to nothing is not blown up
FAINT = 3.0  # grey levels: below this difference there is nothing to find
USUAL_PX = (72, 72)
LOOK_PX = 1024  # a picture of numbers is looked at in no more rows and columns, to find its range
LEAST_SHARE = 1e-7  # a probability of 0 may be any below it, as numbers are rounded
NO_NUMBER = 1e30  # what is as large stands for a missing value, as infinity and NaN do
RARE = 0.001  # so many of the numbers may be far off, as hot pixels and missing values are
FAINTEST = 16  # a picture in less than this part of its range would be left with a few dark shades


class NotFiniteError(ValueError):
    """A picture of numbers has only such as are none; the sentence is for people."""


def rgb(image: Image.Image) -> Image.Image:
    """
    A decoded picture of any mode in RGB, as `pictures.decode` says.

    Raises:
        NotFiniteError: None of its numbers is finite.
    """
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        image = _scaled(image, *_range(image))
    if image.has_transparency_data:
        # Pasting on black also hides the colours that were stored under transparent pixels.
        rgba = image.convert("RGBA")
        image = Image.new("RGB", rgba.size)
        image.paste(rgba, mask=rgba)
    return image if image.mode == "RGB" else image.convert("RGB")


def _range(image: Image.Image) -> tuple[float, float]:
    """What becomes black and what becomes white."""
    side = min(image.width, LOOK_PX), min(image.height, LOOK_PX)
    seen = np.asarray(image if side == image.size else image.resize(side, Image.Resampling.NEAREST), np.float64)
    seen = seen[np.abs(seen) < NO_NUMBER]
    if not seen.size:
        raise NotFiniteError(
            "the picture's numbers must be finite, and none is. Save it with 8 or 16 bits per channel."
        )
    low, high = float(seen.min()), float(seen.max())
    dark, bright = (float(value) for value in np.percentile(seen, (100 * RARE, 100 * (1 - RARE))))
    for top in (1.0, 255.0, 65535.0)[image.mode != "F" :]:
        if low >= 0 and high <= top and bright >= top / FAINTEST:
            return 0.0, top
    return (dark, bright) if dark < bright else (min(0.0, low), high)


def _scaled(image: Image.Image, low: float, high: float) -> Image.Image:
    factor = 255 / (high - low) if high > low else 0.0
    # Pillow takes such a function of these modes apart into a factor and an offset.
    return image.convert("F").point(lambda value: value * factor + (0.5 - low * factor)).convert("L")


def middle(picture: Image.Image, size_px: tuple[int, int], share: float = SHARE) -> NDArray[np.uint8]:
    """
    The middle of a picture of any size and mode.

    Args:
        picture: It is not changed.
        size_px: Height and width of what is wanted; no more is cut off than its shape needs, and `share`.
        share: Of the picture's shorter side.

    Returns:
        Shape (1, H, W, 3), RGB.
    """
    picture, (height_px, width_px) = rgb(picture), size_px
    width = min(picture.width, picture.height * width_px / height_px) * share
    height = width * height_px / width_px
    left, top = (picture.width - width) / 2, (picture.height - height) / 2
    box = (left, top, left + width, top + height)
    return np.asarray(picture.resize((width_px, height_px), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0))[None]


@dataclass(frozen=True)
class Middle:
    """
    Picture to network input: its middle, as floats; immutable, safe to share between threads.

    Attributes:
        size_px: Height and width.
        scaling: The module of `keras.applications` that brings the values 0 to 255 to the network's range, or "".
        share: Of the picture's shorter side.
    """

    size_px: tuple[int, int]
    scaling: str = ""
    share: float = SHARE

    def __call__(self, picture: Image.Image) -> NDArray[np.float32]:
        """Shape (1, H, W, 3)."""
        values = middle(picture, self.size_px, self.share).astype(np.float32)
        if not self.scaling:
            return values
        import keras

        return np.asarray(getattr(keras.applications, self.scaling).preprocess_input(values), np.float32)


def find_body(picture: Image.Image) -> tuple[tuple[float, float, float, float], tuple[int, int, int]]:
    """
    Where the main body is, and the colour behind it.

    Args:
        picture: RGB, any size.

    Returns:
        A square (left, top, right, bottom) in pixels around the body, which may reach over the
        picture's edge, and the background's colour. The whole picture when nothing stands out.
    """
    width, height = picture.size
    cells = np.asarray(picture.resize((GRID, GRID), Image.Resampling.BOX, reducing_gap=1.0)).astype(np.float32)
    border = np.concatenate((cells[0], cells[-1], cells[1:-1, 0], cells[1:-1, -1]))
    sky = _median(border)
    wide = np.empty((GRID + 2, GRID + 2), np.float32)
    wide[1:-1, 1:-1] = np.abs(cells - sky).max(axis=2)
    wide[0], wide[-1] = wide[1], wide[-2]
    wide[:, 0], wide[:, -1] = wide[:, 1], wide[:, -2]
    sums = wide[:-2] + 2 * wide[1:-1] + wide[2:]
    away = (sums[:, :-2] + 2 * sums[:, 1:-1] + sums[:, 2:]) / 16
    unrest = float(_median(np.abs(border - sky).max(axis=1)))
    mask = away > max(BODY_LEVEL * float(away.max()), 2 * unrest, FAINT)
    colour = (int(sky[0]), int(sky[1]), int(sky[2]))
    rows = _blob(mask, *divmod(int(np.argmax(away * mask)), GRID))
    if not rows:
        left, top, right, bottom = 0.0, 0.0, float(width), float(height)
    else:
        columns = functools.reduce(operator.or_, rows.values())
        left, right = ((columns & -columns).bit_length() - 1) * width / GRID, columns.bit_length() * width / GRID
        top, bottom = min(rows) * height / GRID, (max(rows) + 1) * height / GRID
    side = max(right - left, bottom - top)
    half = max(side, min(side * (1 + 2 * MARGIN), width, height)) / 2  # no margin beyond the picture's own size
    x, y = (left + right) / 2, (top + bottom) / 2
    return (x - half, y - half, x + half, y + half), colour


def _median(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """The median of an even number of rows, as `np.median` gives it at four times the cost."""
    half = len(values) // 2
    middle = np.partition(values, (half - 1, half), axis=0)
    return np.asarray((middle[half - 1] + middle[half]) / np.float32(2))


def _blob(mask: NDArray[np.bool_], row: int, column: int) -> dict[int, int]:
    """The rows of the mask's part around a cell, diagonal neighbours too: number -> its columns as bits."""
    free = [int.from_bytes(bits.tobytes(), "little") for bits in np.packbits(mask, axis=1, bitorder="little")]
    found = [0] * (GRID + 1)  # the last one stands beyond both edges
    found[row] = 1 << column & free[row]
    grows = True
    while grows:
        grows = False
        for number in (*range(GRID), *reversed(range(GRID))):
            near = found[number - 1] | found[number] | found[number + 1]
            while (more := (near | near << 1 | near >> 1) & free[number]) != found[number]:
                found[number] = near = more
                grows = True
    return {number: bits for number, bits in enumerate(found) if bits}


def level(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """
    The same picture in plain light: the colour of the haze taken away, and what is dark made bright.

    Args:
        values: Shape (H, W, 3), 0 to 1.

    Returns:
        The dark level of each channel is 0, the bright level of their mean is 1; a few pixels lie beyond.
    """
    flat = values.reshape(-1, 3)
    tail = int(len(flat) * TAIL)
    flat = flat - np.partition(flat, tail, axis=0)[tail]
    mean = (flat[:, 0] + flat[:, 1] + flat[:, 2]) / np.float32(3)  # flat.mean(axis=1) gives the same, slowly
    bright = np.partition(mean, len(flat) - 1 - tail)[len(flat) - 1 - tail]
    return np.asarray(flat.reshape(values.shape) / np.float32(max(LEAST_SPREAD, float(bright))), np.float32)


@dataclass(frozen=True)
class Preprocess:
    """Picture to network input; small, immutable, safe to share between threads."""

    size_px: tuple[int, int] = USUAL_PX

    def __call__(self, picture: Image.Image) -> NDArray[np.float32]:
        """
        The body, cut out, brought to one size and to one brightness.

        Args:
            picture: Decoded, any size and mode.

        Returns:
            Shape (1, H, W, 3), RGB, about 0 to 1 (see `level`).
        """
        picture = rgb(picture)
        (left, top, right, bottom), colour = find_body(picture)
        height_px, width_px = self.size_px
        box = (max(0.0, left), max(0.0, top), min(float(picture.width), right), min(float(picture.height), bottom))
        across, down = width_px / (right - left), height_px / (bottom - top)
        place = (round((box[0] - left) * across), round((box[1] - top) * down))
        size = (max(1, round((box[2] - box[0]) * across)), max(1, round((box[3] - box[1]) * down)))
        part = picture.resize(size, Image.Resampling.BILINEAR, box=box, reducing_gap=2.0)
        if size != (width_px, height_px):
            canvas = Image.new("RGB", (width_px, height_px), colour)
            canvas.paste(part, place)
            part = canvas
        return level(np.asarray(part).astype(np.float32) / np.float32(255))[None]


@dataclass(frozen=True)
class Postprocess:
    """Network output to named probabilities; immutable, safe to share between threads."""

    classes: tuple[str, ...]

    def __call__(self, logits: ArrayLike) -> dict[str, Any]:
        """
        The prediction for one image.

        Args:
            logits: Shape (1, K), array or tensor; column k belongs to ``classes[k]``.

        Returns:
            ``{"prediction": class, "probabilities": {class: float}}``, in the order of the classes.

        Raises:
            ValueError: The network's output does not have K columns.
        """
        row = self.batch(logits)[0]
        return {
            "prediction": self.classes[int(row.argmax())],
            "probabilities": dict(zip(self.classes, row.tolist(), strict=True)),
        }

    def batch(self, logits: ArrayLike) -> NDArray[np.float64]:
        """
        Probabilities for N images, shape (N, K); rows sum to 1 within 1e-12.

        Raises:
            ValueError: The network's output does not have K columns.
        """
        values = np.asarray(logits, np.float64)
        if values.ndim != 2 or values.shape[1] != len(self.classes):
            raise ValueError(
                f"The network's output must have {len(self.classes)} columns, one for each class, "
                f"got shape {values.shape}. Save the model with its own classes."
            )
        values = np.exp(values - values.max(axis=1, keepdims=True))
        return np.asarray(values / values.sum(axis=1, keepdims=True))


@dataclass(frozen=True)
class Both:
    """Picture to the inputs of several networks, side by side; immutable, safe to share between threads."""

    prepares: tuple[Callable[[Image.Image], Any], ...]

    def __call__(self, picture: Image.Image) -> NDArray[np.float32]:
        """Shape (1, the numbers of all inputs)."""
        inputs = [np.asarray(prepare(picture), np.float32).reshape(1, -1) for prepare in self.prepares]
        return np.concatenate(inputs, axis=1)


@dataclass(frozen=True)
class EachByItself:
    """Network output to named probabilities that do not depend on each other; as `Postprocess`."""

    classes: tuple[str, ...]

    def __call__(self, logits: ArrayLike) -> dict[str, Any]:
        """The probabilities for one image, and the likeliest class."""
        row = self.batch(logits)[0]
        return {
            "prediction": self.classes[int(row.argmax())],
            "probabilities": dict(zip(self.classes, row.tolist(), strict=True)),
        }

    def batch(self, logits: ArrayLike) -> NDArray[np.float64]:
        """Those for N images, shape (N, K)."""
        return np.asarray(np.exp(-np.logaddexp(0, -np.asarray(logits, np.float64))))


def tempered(rows: ArrayLike, temperature: float) -> NDArray[np.float64]:
    """
    Probabilities that are less sure, or surer, in the same order.

    Args:
        rows: Shape (N, K), each 1 together; they may be 0 and 1.
        temperature: Divides their logarithms: above 1 makes them less sure.

    Returns:
        Shape (N, K); rows sum to 1, those without a finite number to NaN.
    """
    logs = np.log(np.clip(np.asarray(rows, np.float64), LEAST_SHARE, None)) / temperature
    values = np.exp(logs - logs.max(axis=1, keepdims=True))
    return np.asarray(values / values.sum(axis=1, keepdims=True))


@dataclass(frozen=True)
class Calibrated:
    """A model's own postprocess, whose probabilities are then brought to a temperature; as safe to share as that is."""

    postprocess: Callable[[Any], Any]
    temperature: float

    def __call__(self, outputs: Any) -> dict[str, Any]:
        """The prediction for one image, as `postprocess` names it."""
        answer = self.postprocess(outputs)
        given = answer["probabilities"]
        row = tempered([[float(value) for value in given.values()]], self.temperature)[0]
        return {**answer, "probabilities": dict(zip(given, row.tolist(), strict=True))}
