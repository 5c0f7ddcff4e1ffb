"""The short ways of the search for the body give what the plain ways give, to the last bit."""

from __future__ import annotations

import numpy as np
import pytest

from celestial_backend.pictures.hooks import GRID, _blob, _median, level


@pytest.mark.parametrize("share", [0.1, 0.4, 0.6, 0.9])
def test_the_blob_is_what_hangs_together(share: float) -> None:
    """From any cell, the cells that can be reached over neighbours, diagonal ones too; from a free cell none."""
    rng = np.random.default_rng(7)
    for _ in range(50):
        mask = rng.random((GRID, GRID)) < share
        row, column = (int(number) for number in rng.integers(0, GRID, 2))
        reached, ahead = set(), [(row, column)]
        while ahead:
            y, x = ahead.pop()
            if (y, x) not in reached and 0 <= y < GRID and 0 <= x < GRID and mask[y, x]:
                reached.add((y, x))
                ahead += [(y + down, x + right) for down in (-1, 0, 1) for right in (-1, 0, 1)]
        found = _blob(mask, row, column)
        assert {(y, x) for y, bits in found.items() for x in range(GRID) if bits >> x & 1} == reached


def test_the_median_is_numpys() -> None:
    """To the last bit, by columns and alone."""
    rng = np.random.default_rng(7)
    for _ in range(200):
        values = rng.random((124, 3), dtype=np.float32) * 255
        assert np.array_equal(_median(values), np.median(values, axis=0))
        assert _median(values[:, 0]) == np.median(values[:, 0])


def test_the_levels_are_those_of_sorted_values() -> None:
    """The dark level of each channel becomes 0 and the bright level of the mean becomes 1, to the last bit."""
    rng = np.random.default_rng(7)
    for _ in range(50):
        values = rng.random((72, 72, 3), dtype=np.float32)
        flat = values.reshape(-1, 3)
        dark = flat - np.sort(flat, axis=0)[103]
        expected = dark / np.sort(dark.mean(axis=1))[-104]
        assert np.array_equal(level(values).reshape(-1, 3), expected)
