"""Where the body is in a picture, and the picture in plain light."""

from __future__ import annotations

import functools
import operator

import numpy as np
from numpy.typing import NDArray
from PIL import Image

GRID = 32  # cells per side in which the body is looked for
BODY_LEVEL = 0.15  # of the strongest difference from the background counts as body
MARGIN = 0.25  # of the longer side of the body stays free around it: room for faint rings
TAIL = 0.02  # of the pixels may lie below the dark level, and as many above the bright one
LEAST_SPREAD = 0.02  # between the two, so that next to nothing is not blown up
FAINT = 3.0  # grey levels: below this difference there is nothing to find


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
