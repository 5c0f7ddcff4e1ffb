"""The list of jobs: what is accepted is kept, merged and ended exactly once, whoever writes beside it."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from celestial_backend.errors import StateError
from celestial_backend.ledger import FAILED, KEPT, MERGED, PUBLISHED, RUNNING, WAITING, Ledger


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "state")


def test_a_request_waits_and_the_next_ones_are_merged_into_it(ledger: Ledger) -> None:
    """Pressing the button three times trains once; another project has its own job."""
    first, second, third = (ledger.request("3") for _ in range(3))
    assert first.id == second.id == third.id
    assert (first.state, third.requests) == (WAITING, 3)
    assert ledger.request("4").id != first.id
    assert [job.project for job in ledger.jobs()] == ["4", "3"]


def test_a_request_while_one_runs_waits_for_its_turn(ledger: Ledger) -> None:
    """Labels that came after a training began are learned by the next one."""
    first = ledger.request("3")
    started = ledger.start("3")
    assert started is not None
    assert (started.id, started.state, started.attempts) == (first.id, RUNNING, 1)
    second = ledger.request("3")
    assert second.id != first.id
    assert ledger.start("3") is None, "one training at a time for a project"
    assert ledger.end(first.id, PUBLISHED, "better", {"tag": "a:b"})
    again = ledger.start("3")
    assert again is not None
    assert again.id == second.id


def test_from_scratch_is_not_lost_in_a_merge(ledger: Ledger) -> None:
    """A waiting job that one of its requests wants from scratch is trained from scratch."""
    ledger.request("3")
    assert ledger.request("3", from_scratch=True).from_scratch
    assert ledger.request("3").from_scratch


def test_a_job_ends_once(ledger: Ledger) -> None:
    """Whoever is second to say how a job ended is told so, and changes nothing."""
    job = ledger.request("3")
    assert not ledger.end(job.id, FAILED, "it never ran")
    ledger.start("3")
    assert ledger.end(job.id, KEPT, "worse", {"scores": {"champion": 0.9}})
    assert not ledger.end(job.id, PUBLISHED, "better")
    ended = ledger.job(job.id)
    assert ended is not None
    assert (ended.state, ended.reason, ended.ended) == (KEPT, "worse", True)
    assert ended.outcome == {"scores": {"champion": 0.9}}
    assert ended.requested_at <= (ended.started_at or 0) <= (ended.ended_at or 0) <= time.time()


def test_progress_is_of_running_jobs_alone(ledger: Ledger) -> None:
    """Where a training is can be read while it runs, and starts anew with the next attempt."""
    job = ledger.request("3")
    ledger.start("3")
    ledger.progress(job.id, stage="learning", epoch=2)
    found = ledger.job(job.id)
    assert found is not None
    assert found.progress == {"stage": "learning", "epoch": 2}
    ledger.give_back(job.id)
    again = ledger.start("3")
    assert again is not None
    assert (again.id, again.attempts, again.progress) == (job.id, 2, {})


def test_an_interrupted_job_waits_again(ledger: Ledger) -> None:
    """A death counts as an attempt, a stop that was asked for does not."""
    job = ledger.request("3")
    ledger.start("3")
    ledger.give_back(job.id, begun=False)
    found = ledger.job(job.id)
    assert found is not None
    assert (found.state, found.attempts) == (WAITING, 0)
    ledger.give_back(job.id)  # does not run: nothing happens
    assert ledger.job(job.id) == found


def test_an_interrupted_job_is_merged_into_one_that_waits(ledger: Ledger) -> None:
    """No request is lost: the later job stands for both, and for the deaths so far."""
    first = ledger.request("3", from_scratch=True)
    ledger.start("3")
    second = ledger.request("3")
    ledger.give_back(first.id)
    merged, waiting = ledger.job(first.id), ledger.job(second.id)
    assert merged is not None
    assert waiting is not None
    assert merged.state == MERGED
    assert second.id in merged.reason
    assert (waiting.requests, waiting.attempts, waiting.from_scratch) == (2, 1, True)


def test_labels_are_counted_for_each_project(ledger: Ledger) -> None:
    """The fifth label of one project trains it, however many came at once, and the count begins anew."""
    assert ledger.note_labels("3", 4, limit=5) is None
    assert ledger.note_labels("4", 4, limit=5) is None
    job = ledger.note_labels("3", 3, limit=5)
    assert job is not None
    assert job.project == "3"
    assert ledger.note_labels("3", 4, limit=5) is None
    assert ledger.note_labels("4", 1, limit=5) is not None


def test_a_training_sets_the_count_back(ledger: Ledger) -> None:
    """Labels that a training will read do not bring about another one."""
    ledger.note_labels("3", 4, limit=5)
    ledger.request("3")
    ledger.start("3")
    assert ledger.note_labels("3", 4, limit=5) is None


def test_projects_and_what_was_read_of_them(ledger: Ledger) -> None:
    """A project is known from its first sign on; the newest label read is remembered."""
    ledger.know("3")
    ledger.read_until("4", "2026-11-23T01:02:03Z")
    ledger.know("4")
    assert ledger.projects() == {"3": None, "4": "2026-11-23T01:02:03Z"}


def test_many_at_once_make_one_job(ledger: Ledger) -> None:
    """Forty requests from eight threads and as many connections stand in one waiting job."""
    seen: list[str] = []
    threads = [threading.Thread(target=lambda: seen.extend(ledger.request("3").id for _ in range(5))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 40
    assert len(set(seen)) == 1
    assert ledger.jobs()[0].requests == 40


def test_jobs_can_be_narrowed(ledger: Ledger) -> None:
    """By project, by state, and to the newest few."""
    for project in ("3", "4", "5"):
        ledger.request(project)
    ledger.start("4")
    assert [job.project for job in ledger.jobs("4")] == ["4"]
    assert [job.project for job in ledger.jobs(states=(WAITING,))] == ["5", "3"]
    assert [job.project for job in ledger.jobs(limit=1)] == ["5"]


def test_the_newest_job_is_the_last_that_was_asked_for(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the clock was moved back in between."""
    jobs, real = [], time.time
    for hours in (0, 1, 3):
        monkeypatch.setattr(time, "time", lambda back=hours * 3600: real() - back)
        jobs.append(ledger.request("3").id)
        ledger.start("3")
        ledger.end(jobs[-1], KEPT, "worse")
    assert [job.id for job in ledger.jobs("3")] == jobs[::-1]


def test_what_was_accepted_survives_a_kill(ledger: Ledger, tmp_path: Path) -> None:
    """A process that is killed right after its request was answered leaves the job in the list."""
    code = (
        "import os, signal, sys; from pathlib import Path; from celestial_backend.ledger import Ledger;"
        "Ledger(Path(sys.argv[1])).request('7'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "state"], cwd=Path(__file__).parents[1], check=False)
    assert done.returncode == -9
    assert [(job.project, job.state) for job in ledger.jobs()] == [("7", WAITING)]


def test_a_state_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    """Nothing is accepted that was not written down."""
    (tmp_path / "blocked").write_text("a file where the folder should be")
    with pytest.raises(StateError, match=r"Nothing was accepted. Check that this user can write to the folder"):
        Ledger(tmp_path / "blocked").request("3")


def test_a_locked_list_is_given_up_within_a_second(ledger: Ledger, tmp_path: Path) -> None:
    """Label Studio gives a webhook one second."""
    ledger.request("3")
    with sqlite3.connect(tmp_path / "state" / "jobs.db", isolation_level=None) as other:
        other.execute("BEGIN EXCLUSIVE")
        started = time.monotonic()
        with pytest.raises(StateError, match="locked"):
            ledger.request("3")
        assert time.monotonic() - started < 4  # SQLite by itself waits five
