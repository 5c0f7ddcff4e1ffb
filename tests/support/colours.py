"""An embedder whose vectors are worked out on paper: how red, green and blue a picture is in the middle."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from celestial_backend.features import FeatureCache
from celestial_backend.settings import Settings


class Colours:
    """Gives each of the three as a share of 255; remembers how many pictures it was shown."""

    width = 3

    def __init__(self, name: str = "colours-1") -> None:
        self.name = name
        self.seen = 0

    def prepare(self, picture: Image.Image) -> NDArray[np.uint8]:
        return np.array([picture.getpixel((picture.width // 2, picture.height // 2))], np.uint8)

    def vectors(self, batch: NDArray[np.uint8]) -> NDArray[np.float32]:
        self.seen += len(batch)
        return batch.astype(np.float32) / np.float32(255)


def plain(colour: str, *, side_px: int = 8) -> Image.Image:
    """A picture that is one colour all over."""
    return Image.new("RGB", (side_px, side_px), colour)


def png(colour: str, *, side_px: int = 8) -> bytes:
    stream = io.BytesIO()
    plain(colour, side_px=side_px).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[FeatureCache]:
    """Features that are remembered for the one test."""
    cache = FeatureCache(Settings(model_dir=tmp_path / "state"))
    yield cache
    cache.close()
