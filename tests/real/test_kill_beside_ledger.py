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
from celestial_backend.jobs.processes import this_process
from celestial_backend.settings import Settings
ledger = Ledger(Database(Settings.from_environ()))
{what}
os.kill(os.getpid(), signal.SIGKILL)
"""


def killed_after(what: str, database_url: str) -> Ledger:
    """What a process has left in the list that was killed as soon as it had done something."""
    environ = os.environ | {"CELESTIAL_DATABASE_URL": database_url}
    command = [sys.executable, "-c", CODE.format(what=what)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], env=environ, check=False)
    assert done.returncode == -9
    return Ledger(Database(Settings.from_environ(environ)))


def test_what_was_accepted_survives_a_kill(database_url: str) -> None:
    """A process that is killed right after its request was answered leaves the job in the list."""
    ledger = killed_after("ledger.request('7')", database_url)
    assert [(job.project, job.state) for job in ledger.jobs()] == [("7", WAITING)]


def test_a_worker_of_this_machine_that_was_killed_is_missed_at_once(database_url: str) -> None:
    """Its job waits for no lease to run out; of one on another machine nobody knows until then."""
    begins = "ledger.request('7'); ledger.show_life(this_process()); ledger.start(this_process())"
    ledger = killed_after(begins, database_url)
    ledger.request("8")
    other = ledger.start("elsewhere:1:1:1", "8")
    ledger.show_life("elsewhere:1:1:1")
    assert other is not None
    assert ([job.project for job in ledger.lost()], ledger.workers()) == (["7"], 1)
    assert ledger.give_back(ledger.lost()[0], lost=True)
    assert not ledger.give_back(other, lost=True)
