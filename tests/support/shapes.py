"""Pictures of simple things that nobody has a model of: discs, boxes, stripes, dots; in any colours."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageDraw

Draw = Callable[[ImageDraw.ImageDraw, np.random.Generator, tuple[int, int, int]], None]


def _disc(draw: ImageDraw.ImageDraw, rng: np.random.Generator, colour: tuple[int, int, int]) -> None:
    x, y, far = rng.integers(40, 56), rng.integers(40, 56), rng.integers(20, 36)
    draw.ellipse((x - far, y - far, x + far, y + far), fill=colour)


def _box(draw: ImageDraw.ImageDraw, rng: np.random.Generator, colour: tuple[int, int, int]) -> None:
    x, y, far = rng.integers(40, 56), rng.integers(40, 56), rng.integers(20, 36)
    draw.rectangle((x - far, y - far, x + far, y + far), fill=colour)


def _stripes(draw: ImageDraw.ImageDraw, rng: np.random.Generator, colour: tuple[int, int, int]) -> None:
    step = int(rng.integers(8, 16))
    for x in range(int(rng.integers(0, step)), 96, step):
        draw.rectangle((x, 0, x + step // 2, 95), fill=colour)


def _dots(draw: ImageDraw.ImageDraw, rng: np.random.Generator, colour: tuple[int, int, int]) -> None:
    for _ in range(40):
        x, y = rng.integers(0, 96, 2)
        draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=colour)


_KINDS: dict[str, Draw] = {"disc": _disc, "box": _box, "stripes": _stripes, "dots": _dots}
KINDS = tuple(_KINDS)


def drawn(kind: str, seed: int | Sequence[int]) -> Image.Image:
    """An RGB picture of one of `KINDS`, 96 pixels wide and high; the same seed gives the same pixels."""
    rng = np.random.default_rng([KINDS.index(kind), *np.atleast_1d(seed).tolist()])
    dark, light = rng.integers(0, 90, 3), rng.integers(150, 256, 3)
    picture = Image.new("RGB", (96, 96), tuple(map(int, dark)))
    red, green, blue = map(int, light)
    _KINDS[kind](ImageDraw.Draw(picture), rng, (red, green, blue))
    noisy = np.asarray(picture, float) + rng.normal(0, 4, (96, 96, 3))
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))


def data_uri(picture: Image.Image) -> str:
    """A picture as a task may hold it."""
    data = io.BytesIO()
    picture.save(data, "PNG")
    return f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
