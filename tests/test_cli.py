"""The command line as people use it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from backend_server import REPOSITORY

from celestial_backend.network import FILES
from celestial_backend.renderer import render
from celestial_backend.settings import Settings
from celestial_backend.store import ModelStore


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "celestial_backend", *map(str, arguments)],
        cwd=REPOSITORY, env=os.environ, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one sub-folder for each of two classes."""
    folder = tmp_path_factory.mktemp("pictures")
    for body in ("Saturn", "Earth"):
        (folder / body).mkdir()
        for seed in range(8):
            render(body, seed).save(folder / body / f"{seed}.png")
    return folder


def test_train_registers_a_model_that_is_served(pictures: Path, tmp_path: Path) -> None:
    """`train FOLDER` ends with a tag of the store that is from then on the latest, and with plain files if asked."""
    done = run("train", pictures, "--epochs", "2", "--export", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    assert "epoch 1/2, held-out" in done.stderr
    told = json.loads(done.stdout)
    store = ModelStore(Settings.from_environ())
    assert store.live_tag() == told["tag"]
    assert store.current().classes == ("Earth", "Saturn")
    assert 0 <= told["accuracy"] <= 1
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {*FILES, "card.json"}


def test_train_refuses_a_folder_without_classes(tmp_path: Path) -> None:
    """A sentence on stderr with the counts, exit code 5, nothing on stdout."""
    done = run("train", tmp_path)
    assert done.returncode == 5
    assert done.stderr.startswith("Error: Training needs at least 2 classes")
    assert done.stdout == ""


def test_a_bad_setting_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 2, no traceback."""
    monkeypatch.setenv("CELESTIAL_TYPO", "1")
    done = run("train", ".")
    assert done.returncode == 2
    assert "CELESTIAL_TYPO is not a setting of this backend" in done.stderr
    assert "Traceback" not in done.stderr


def test_help_names_the_commands() -> None:
    """`--help` works without any setting, for the whole and for each command."""
    assert "train" in run("--help").stdout
    assert "FOLDER" in run("train", "--help").stdout
