"""Where the body is in a picture, and the picture in plain light."""

from __future__ import annotations

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
    sky = np.median(border, axis=0)
    away = np.pad(np.abs(cells - sky).max(axis=2), 1, mode="edge")
    away = away[:-2] + 2 * away[1:-1] + away[2:]
    away = (away[:, :-2] + 2 * away[:, 1:-1] + away[:, 2:]) / 16
    unrest = float(np.median(np.abs(border - sky).max(axis=1)))
    mask = np.pad(away > max(BODY_LEVEL * float(away.max()), 2 * unrest, FAINT), 1)
    blob = np.zeros_like(mask)
    blob.flat[np.argmax(np.pad(away, 1) * mask)] = True
    size = 0
    while size < (size := int(blob.sum())):
        blob[1:-1] |= blob[:-2] | blob[2:]
        blob[:, 1:-1] |= blob[:, :-2] | blob[:, 2:]
        blob &= mask
    colour = (int(sky[0]), int(sky[1]), int(sky[2]))
    rows, columns = np.flatnonzero(blob.any(axis=1)), np.flatnonzero(blob.any(axis=0))
    if len(rows) == 0:
        left, top, right, bottom = 0.0, 0.0, float(width), float(height)
    else:
        left, right = (columns[0] - 1) * width / GRID, columns[-1] * width / GRID
        top, bottom = (rows[0] - 1) * height / GRID, rows[-1] * height / GRID
    side = max(right - left, bottom - top)
    half = max(side, min(side * (1 + 2 * MARGIN), width, height)) / 2  # no margin beyond the picture's own size
    x, y = (left + right) / 2, (top + bottom) / 2
    return (x - half, y - half, x + half, y + half), colour


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
    bright = np.partition(flat.mean(axis=1), len(flat) - 1 - tail)[len(flat) - 1 - tail]
    return np.asarray(flat.reshape(values.shape) / np.float32(max(LEAST_SPREAD, float(bright))), np.float32)
