"""Changed copies: the same picture under another light, and always the same copy."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from celestial_backend.features import digest
from celestial_backend.learning.dataset import AREA_PX, SHORT_PX, changed
from tests.support.shapes import KINDS, drawn

KEY = digest(b"a picture")


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture, float)


def test_the_same_key_and_number_give_the_same_copy() -> None:
    """Another number another one, and so does another key; the picture itself stays as it is."""
    picture = drawn("disc", 1)
    before = pixels(picture)
    copies = [changed(picture, key, number) for key in (KEY, digest(b"another")) for number in range(6)]
    assert np.array_equal(pixels(picture), before)
    assert np.array_equal(pixels(copies[3]), pixels(changed(picture, KEY, 3)))
    assert len({copy.tobytes() for copy in copies}) == 12


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_shows_the_same(kind: str) -> None:
    """It is nearer to its picture than to pictures of other things, most of the time; and differs from it."""
    shown = {each: [pixels(drawn(each, seed).convert("L")) for seed in range(5)] for each in KINDS}

    def alike(one: np.ndarray, other: np.ndarray) -> float:
        return float(max(abs(np.corrcoef(one.ravel(), each.ravel())[0, 1]) for each in (other, other[:, ::-1])))

    own, others = [], []
    for number in range(30):
        copy = pixels(changed(drawn(kind, 0), KEY, number).convert("L"))
        own.append(alike(copy, shown[kind][0]))
        others.append(max(alike(copy, each) for name, mine in shown.items() if name != kind for each in mine))
    assert np.median(own) > np.median(others)
    assert min(own) < 0.99


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        pytest.param((1, 1), (1, 1), id="one pixel"),
        pytest.param((96, 64), (96, 64), id="small"),
        pytest.param((3000, 2000), (384, 256), id="a photograph"),
        pytest.param((40_000, 300), (5912, 44), id="a strip"),
        pytest.param((300, 40_000), (44, 5912), id="a high strip"),
    ],
)
def test_size_and_mode(size: tuple[int, int], expected: tuple[int, int]) -> None:
    """No larger than an embedder looks at, whatever the shape; memory is bounded."""
    assert expected[0] * expected[1] <= AREA_PX
    assert min(expected) <= SHORT_PX
    for number in range(12):
        copy = changed(Image.new("RGB", size, "teal"), KEY, number)
        assert (copy.size, copy.mode) == (expected, "RGB")
