"""The command line as people use it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from backend_server import REPOSITORY
from click.testing import CliRunner

from celestial_backend.cli import main
from celestial_backend.ledger import Ledger
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


def test_jobs_tells_where_each_training_is() -> None:
    """The stage, and within it pictures or epoch, step and loss, one line for each job."""
    ledger = Ledger(Path(os.environ["MODEL_DIR"]))
    where = {"3": {"stage": "reading pictures", "pictures": 50, "of": None},
             "4": {"stage": "reading pictures", "pictures": 60, "of": 60},
             "5": {"stage": "learning", "epoch": 2, "epochs": 20, "step": 7, "steps": 15, "loss": 0.1234}}  # fmt: skip
    for project, progress in where.items():
        job = ledger.request(project)
        ledger.start(project)
        ledger.progress(job.id, **progress)
    lines = [line.split("\t") for line in run("jobs").stdout.splitlines()]
    assert [(line[1], line[2], line[5]) for line in lines[1:]] == [
        ("5", "running", "learning epoch 3/20, step 7/15, loss 0.123"),
        ("4", "running", "reading pictures 60 of 60"),
        ("3", "running", "reading pictures 50"),
    ]


def test_train_wants_a_folder_or_a_project() -> None:
    """Options that do not go together are refused before anything is done."""
    both = ("folder", "--project", "3")
    for arguments in ((), both, ("folder", "--from-scratch"), ("--project", "3", "--epochs", "2")):
        done = run("train", *arguments)
        assert done.returncode == 2
        assert "Error: " in done.stderr


@pytest.mark.parametrize("command", ["models use m:1", "models", "jobs", "prelabel", "doctor", "train"])
def test_a_project_has_a_number_from_one_on(command: str) -> None:
    """Any other is refused before anything is done."""
    done = CliRunner().invoke(main, [*command.split(), "--project", "-1"])
    assert done.exit_code == 2
    assert "Invalid value for '--project': -1 is not in the range x>=1" in done.stderr
