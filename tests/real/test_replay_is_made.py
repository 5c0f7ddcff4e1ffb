"""The sample of the default model's training pictures is made again."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from celestial_backend.features import unit
from celestial_backend.planets import network, replay
from celestial_backend.planets.examples import rendered
from tests.support.backend_server import BODIES
from tests.unit.planets.test_replay import DEFAULT, EMBEDDER, NAMES


def test_what_makes_the_model_makes_its_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its features are those of the pictures, within a two-hundredth of their range."""
    for name in (*network.FILES, network.CARD):
        shutil.copy(DEFAULT / name, tmp_path)
    examples = rendered(BODIES[:2], 3, 5)
    replay.make(tmp_path, examples, EMBEDDER)
    monkeypatch.setattr(replay, "FILE", tmp_path / replay.FILE.name)
    sample = replay.load(NAMES)
    assert sample is not None
    assert sample.classes == tuple(BODIES[:2][row // 3] for row in range(6))
    made = [EMBEDDER.vectors(EMBEDDER.prepare(example.load()))[0] for example in examples]
    assert sample.vectors["general"] == pytest.approx(np.stack(made), abs=float(np.ptp(made)) / 200)
    assert sample.copies["own"].shape[0] == 6 * replay.COPIES
    known = replay.familiar(NAMES["own"])
    assert known is not None
    assert (known.strangeness(unit(sample.vectors["own"])) == 0).all(), "what it was made of is familiar"
    assert (known.strangeness(unit(-sample.vectors["own"])) > 0).all()
