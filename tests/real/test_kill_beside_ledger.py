"""The list of jobs, and a process that is killed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from celestial_backend.jobs.ledger import (
    WAITING,
    Ledger,
)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "state")


def test_what_was_accepted_survives_a_kill(ledger: Ledger, tmp_path: Path) -> None:
    """A process that is killed right after its request was answered leaves the job in the list."""
    code = (
        "import os, signal, sys; from pathlib import Path; from celestial_backend.jobs.ledger import Ledger;"
        "Ledger(Path(sys.argv[1])).request('7'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "state"], cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == -9
    assert [(job.project, job.state) for job in ledger.jobs()] == [("7", WAITING)]
