"""The command that makes the default model again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from celestial_backend.models.store import DEFAULT_MODEL
from celestial_backend.planets.network import FILES, load_card
from celestial_backend.planets.renderer import render
from tests.support.backend_server import REPOSITORY


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "celestial_backend.planets", *map(str, arguments)],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def test_it_writes_plain_files_and_tells_the_figures(tmp_path: Path) -> None:
    """What is written has the card and the page of the default model; the seed is in it, the default untouched."""
    for body in ("Saturn", "Earth"):
        (tmp_path / "pictures" / body).mkdir(parents=True)
        for seed in range(8):
            render(body, seed).save(tmp_path / "pictures" / body / f"{seed}.png")
    before = {path.name: path.read_bytes() for path in DEFAULT_MODEL.iterdir()}
    done = run(tmp_path / "pictures", "--export", tmp_path / "out", "--epochs", "2", "--seed", "7", "--json")
    assert done.returncode == 0, done.stderr
    assert "epoch 1/2, held-out" in done.stderr
    card = load_card(tmp_path / "out")
    assert json.loads(done.stdout) == card.metrics
    assert (card.classes, card.recipe["epochs"], card.recipe["seed"]) == (("Earth", "Saturn"), 2, 7)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *FILES, "card.json", "MODEL_CARD.md", "confusion.png", "features.npz"
    }  # fmt: skip
    assert {path.name: path.read_bytes() for path in DEFAULT_MODEL.iterdir()} == before


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        ((".",), 2, "Missing option '--export'"),
        (("nowhere", "--export", "out"), 5, "Error: The training data must be a folder"),
    ],
)
def test_what_is_missing_is_a_sentence(arguments: tuple[str, ...], code: int, sentence: str) -> None:
    """Nothing on stdout, no traceback."""
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (code, "")
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
