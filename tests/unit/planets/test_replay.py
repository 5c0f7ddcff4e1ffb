"""The sample of the default model's training pictures, which keeps what it knows."""

from __future__ import annotations

import numpy as np
import pytest

from celestial_backend.models.embedders import open_embedder
from celestial_backend.planets import network, replay
from celestial_backend.settings import MODEL_NAME, Settings
from tests.support.backend_server import BODIES

DEFAULT = replay.FILE.parent
EMBEDDER = open_embedder(Settings())
TAG = f"{MODEL_NAME}:{network.version(DEFAULT)}"
NAMES = {"general": EMBEDDER.name, "own": TAG, "said": f"{TAG} probabilities"}


def test_the_sample_inside_is_of_the_model_and_the_embedder_inside() -> None:
    """Forty pictures of each body, which the model names rightly, and changed copies of each."""
    sample = replay.load(NAMES)
    assert sample is not None
    assert {name: sample.classes.count(name) for name in sample.classes} == dict.fromkeys(BODIES, 40)
    classes = np.array(network.load_card(DEFAULT).classes)
    for rows, shown, least in (
        (sample.vectors, np.array(sample.classes), 0.99),
        (sample.copies, np.repeat(sample.classes, replay.COPIES), 0.8),  # changed as hard as in its training
    ):
        assert (classes[rows["said"].argmax(axis=1)] == shown).mean() > least
        assert rows["general"].shape == (len(shown), EMBEDDER.width)


@pytest.mark.parametrize("space", NAMES)
def test_a_sample_of_another_model_or_embedder_is_not_used(space: str) -> None:
    assert replay.load(NAMES | {space: "another one"}) is None
