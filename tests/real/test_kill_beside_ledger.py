"""The list of jobs, and a process that is killed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from celestial_backend.database import Database
from celestial_backend.jobs.ledger import WAITING, Ledger
from celestial_backend.settings import Settings

CODE = """
import os, signal
from celestial_backend.database import Database
from celestial_backend.jobs.ledger import Ledger
from celestial_backend.settings import Settings
Ledger(Database(Settings.from_environ())).request("7")
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_was_accepted_survives_a_kill(database_url: str) -> None:
    """A process that is killed right after its request was answered leaves the job in the list."""
    environ = os.environ | {"CELESTIAL_DATABASE_URL": database_url}
    done = subprocess.run([sys.executable, "-c", CODE], cwd=Path(__file__).parents[2], env=environ, check=False)
    assert done.returncode == -9
    ledger = Ledger(Database(Settings.from_environ(environ)))
    assert [(job.project, job.state) for job in ledger.jobs()] == [("7", WAITING)]
