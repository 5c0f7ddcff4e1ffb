"""Gathers labels and pictures that are made up as a training gathers those of a project."""

from __future__ import annotations

import hashlib
import random
import threading
import time
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from celestial_backend.errors import DecodeError, FetchError, StudioError
from celestial_backend.features import FeatureCache
from celestial_backend.labels import ChoiceMap
from celestial_backend.learning import dataset as module
from celestial_backend.learning.dataset import Dataset, Labels, Reader, dataset, pool_of
from celestial_backend.models.headed import GENERAL
from celestial_backend.pictures.reader import ImageReader
from tests.support.backend_server import label_config
from tests.support.colours import Colours

MAP = ChoiceMap.for_learning(label_config(("Moon", "Mars", "Comet", "Nebula")))


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RETRY_PAUSE_S", 0)


class FakeImages(ImageReader):
    """A picture of its own for every value; some values have troubles. Counts how many are read at once."""

    def __init__(self, size_px: int = 8) -> None:
        self.size_px = size_px
        self.reads: list[str] = []
        self.away = False
        self.now = self.most_at_once = 0
        self._lock = threading.Lock()

    def file(self, value: object, task_id: int | None = None) -> bytes:  # noqa: ARG002
        with self._lock:
            self.reads.append(str(value)[:20])
            self.now += 1
            self.most_at_once = max(self.most_at_once, self.now)
        try:
            time.sleep(random.random() * 0.002)  # noqa: S311 - whoever comes first must not matter
            text = str(value)
            if text.startswith("away") and self.away:
                raise FetchError(f"{text} is away.")
            if text.startswith("token") and self.away:
                raise StudioError("The token was not renewed.")
            return text.encode()
        finally:
            with self._lock:
                self.now -= 1

    def decoded(self, value: object, data: bytes, take: Any = None) -> Image.Image:  # noqa: ARG002
        if data.startswith(b"broken"):
            raise DecodeError(f"{value} is no picture.")
        seed = int.from_bytes(hashlib.sha256(data).digest()[:4])
        noise = np.random.default_rng(seed).integers(0, 255, (self.size_px, self.size_px, 3), np.uint8)
        return Image.fromarray(noise)

    def close(self) -> None:
        return


def counted(tasks: Iterable[dict[str, Any]], choices: ChoiceMap = MAP) -> Labels:
    labels = Labels(choices, "1")
    for each in tasks:
        labels.add(each)
    return labels


class Gatherer:
    """Gathers the examples of tasks as a training does."""

    def __init__(self, cache: FeatureCache) -> None:
        self.images = FakeImages()
        self.colours = Colours()
        self.cache = cache
        self.threads = 4

    def reader(self) -> Reader:
        return Reader(self.images, self.cache, {GENERAL: self.colours}, self.threads)

    def __call__(
        self, tasks: Iterable[dict[str, Any]], *, copies: int = 0, wait: Any = None, report: Any = None,
        others: Iterable[dict[str, Any]] = (), choices: ChoiceMap = MAP, **more: Any,
    ) -> Dataset:  # fmt: skip
        labels, reader = counted(tasks, choices), self.reader()
        wanted = [each for each in labels.wanted.values() if not each.problem]
        reader.read(wanted, copies, report)
        reader.try_again(wanted, copies, wait or (lambda: None))
        pool = list(pool_of(others, labels, "1"))
        reader.read(pool)
        return dataset(labels, reader, pool, **more)


@pytest.fixture
def gather(cache: FeatureCache) -> Gatherer:
    return Gatherer(cache)
