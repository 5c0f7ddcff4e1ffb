"""The list of jobs: what is accepted is kept, merged and ended exactly once, whoever writes beside it."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from celestial_backend import ledger as ledger_module
from celestial_backend.errors import BusyError, StateError
from celestial_backend.ledger import (
    ENDED_MAX,
    FAILED,
    KEPT,
    MERGED,
    PUBLISHED,
    RUNNING,
    STATES,
    WAITING,
    WAITING_MAX,
    Ledger,
)

OLD_SCHEMA = """
CREATE TABLE jobs (
    id TEXT PRIMARY KEY, project TEXT NOT NULL, state TEXT NOT NULL, from_scratch INTEGER NOT NULL,
    requests INTEGER NOT NULL, attempts INTEGER NOT NULL, requested_at REAL NOT NULL, started_at REAL, ended_at REAL,
    reason TEXT NOT NULL, progress TEXT NOT NULL, outcome TEXT NOT NULL
);
CREATE UNIQUE INDEX one_waits ON jobs (project) WHERE state = 'waiting';
CREATE UNIQUE INDEX one_runs ON jobs (project) WHERE state = 'running';
CREATE TABLE projects (project TEXT PRIMARY KEY, labels INTEGER NOT NULL DEFAULT 0, read_until TEXT);
"""


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


def ended(ledger: Ledger, project: str, state: str = KEPT) -> str:
    """A job that has been run and has ended."""
    job = ledger.request(project).id
    ledger.start(project)
    ledger.end(job, state, "as it was")
    return job


def test_so_many_projects_wait_and_no_more(ledger: Ledger) -> None:
    """One more is refused with a sentence, and nothing is written; those that wait take every request."""
    for number in range(1, WAITING_MAX + 1):
        ledger.request(str(number))
    with pytest.raises(BusyError, match=f"^{WAITING_MAX} projects wait for a training.*celestial_backend jobs"):
        ledger.request("1000")
    assert (len(ledger.jobs()), ledger.knows("1000")) == (WAITING_MAX, False)
    assert ledger.request("7").requests == 2
    ledger.start("7")
    assert ledger.request("1000").state == WAITING
    with pytest.raises(BusyError):
        ledger.request("7")


def test_labels_that_come_while_too_many_wait_are_counted(ledger: Ledger) -> None:
    """The next one after a project has had its turn brings the training about."""
    for number in range(1, WAITING_MAX + 1):
        ledger.request(str(number))
    assert ledger.note_labels("1000", 5, limit=3) is None
    ledger.start("7")
    job = ledger.note_labels("1000", 1, limit=3)
    assert job is not None
    assert (job.project, job.state) == ("1000", WAITING)


def test_the_oldest_jobs_that_have_ended_go(ledger: Ledger) -> None:
    """The newest of a project stay, and all of another one; how many there were is still known."""
    other = ended(ledger, "4", FAILED)
    jobs = [ended(ledger, "3") for _ in range(ENDED_MAX + 7)]
    assert [job.id for job in ledger.jobs("3")] == jobs[: -ENDED_MAX - 1 : -1]
    assert [job.id for job in ledger.jobs("4")] == [other]
    assert ledger.counts() == dict.fromkeys(STATES, 0) | {KEPT: ENDED_MAX + 7, FAILED: 1}


def test_the_jobs_of_many_projects_are_bounded_together(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits and what runs stays, however old it is, and so does the job that has ended last."""
    monkeypatch.setattr(ledger_module, "ENDED_MAX_OF_ALL", 5)
    oldest, waiting = ledger.request("1").id, ledger.request("2").id
    ledger.start("1")
    jobs = [ended(ledger, str(number)) for number in range(3, 15)]
    assert {job.id for job in ledger.jobs()} == {oldest, waiting, *jobs[-5:]}
    ledger.end(oldest, PUBLISHED, "better")
    last = ledger.job(oldest)
    assert last is not None, "whoever waits for its end sees it"
    assert last.state == PUBLISHED
    assert ledger.counts() == dict.fromkeys(STATES, 0) | {KEPT: 12, PUBLISHED: 1, WAITING: 1}


def test_a_list_of_an_older_release_is_taken_over(tmp_path: Path) -> None:
    """All jobs are there, numbers of ended ones never fall, and what is no number of a project is passed over."""
    with sqlite3.connect(tmp_path / "state" / "jobs.db") as db:
        db.executescript(OLD_SCHEMA)
        row = "INSERT INTO jobs VALUES (?, ?, ?, 0, 1, 1, 1.0, 2.0, 3.0, 'so', '{}', '{}')"
        db.executemany(row, [(f"old{number}", "3", FAILED) for number in range(200)] + [("new", "3", RUNNING)])
        strange = [("1" * 4301,), ("0007",), ("१२",), ("7",)]
        db.executemany("INSERT INTO projects (project, labels) VALUES (?, 1)", strange)
    ledger = Ledger(tmp_path / "state")
    assert ledger.counts() == dict.fromkeys(STATES, 0) | {FAILED: 200, RUNNING: 1}
    assert list(ledger.projects()) == ["7"]
    ledger.end("new", PUBLISHED, "better")
    assert [job.id for job in ledger.jobs("3", limit=2)] == ["new", "old199"]
    assert len(ledger.jobs("3")) == ENDED_MAX
    assert ledger.counts() == dict.fromkeys(STATES, 0) | {FAILED: 200, PUBLISHED: 1}


def test_so_many_projects_are_known_and_no_more(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those beyond are not written down, and their trainings run all the same."""
    monkeypatch.setattr(ledger_module, "KNOWN_MAX", 2)
    assert [ledger.know(project) for project in ("1", "2", "3", "1")] == [True, True, False, True]
    assert ledger.note_labels("4", 9, limit=1) is None
    ledger.read_until("4", "2026-11-23T01:02:03Z")
    assert list(ledger.projects()) == ["1", "2"]
    ended(ledger, "5")
    assert (ledger.knows("5"), ledger.knows("4")) == (True, False), "a job is known too"
    ledger.forget("1")
    assert ledger.know("3")
    assert list(ledger.projects()) == ["2", "3"]
