"""The list of jobs: what is accepted is kept, merged and ended exactly once, whoever writes beside it; and labels."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from celestial_backend.errors import BusyError, StateError
from celestial_backend.jobs import ledger as ledger_module
from celestial_backend.jobs.ledger import (
    ENDED_MAX,
    FAILED,
    KEPT,
    MERGED,
    PUBLISHED,
    RUNNING,
    STATES,
    WAITING,
    WAITING_MAX,
    Known,
    Ledger,
)
from celestial_backend.models.manifest import Manifest

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
PRUNED = "CREATE TABLE pruned (state TEXT PRIMARY KEY, jobs INTEGER NOT NULL);"


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
    assert ledger.end(first.id, PUBLISHED, "better", Manifest(tag="a:b"))
    again = ledger.start("3")
    assert again is not None
    assert again.id == second.id


def test_a_job_ends_once(ledger: Ledger) -> None:
    """Whoever is second to say how a job ended is told so, and changes nothing."""
    job = ledger.request("3")
    assert not ledger.end(job.id, FAILED, "it never ran")
    ledger.start("3")
    assert ledger.end(job.id, KEPT, "worse", Manifest(tag="a:b", tried=None))
    assert not ledger.end(job.id, PUBLISHED, "better")
    ended = ledger.job(job.id)
    assert ended is not None
    assert (ended.state, ended.reason, ended.ended) == (KEPT, "worse", True)
    assert ended.outcome == {"tag": "a:b", "tried": None}
    assert (ended.manifest, ended.gone, ended.merged_into) == (Manifest(tag="a:b", tried=None), False, None)
    assert ended.requested_at <= (ended.started_at or 0) <= (ended.ended_at or 0) <= time.time()


def test_a_project_that_is_gone_is_told_with_the_end(ledger: Ledger) -> None:
    """So that whoever has run the training can forget the project."""
    job = ledger.request("3")
    ledger.start("3")
    ledger.end(job.id, FAILED, "Label Studio has no project 3.", gone=True)
    (ended,) = ledger.jobs("3")
    assert (ended.gone, ended.outcome, ended.manifest) == (True, {"gone": True}, Manifest())


def test_progress_is_of_running_jobs_alone(ledger: Ledger) -> None:
    """Where a training is can be read while it runs, and starts anew with the next attempt."""
    job = ledger.request("3")
    ledger.start("3")
    ledger.progress(job.id, stage="reading pictures", pictures=2)
    found = ledger.job(job.id)
    assert found is not None
    assert found.progress == {"stage": "reading pictures", "pictures": 2}
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
    first = ledger.request("3")
    ledger.start("3")
    second = ledger.request("3")
    ledger.give_back(first.id)
    merged, waiting = ledger.job(first.id), ledger.job(second.id)
    assert merged is not None
    assert waiting is not None
    assert ledger.doing(first.id) == ledger.doing(second.id) == waiting
    assert (merged.state, merged.merged_into, merged.manifest) == (MERGED, second.id, Manifest())
    assert second.id in merged.reason
    assert (waiting.requests, waiting.attempts) == (2, 1)


def known(ledger: Ledger, project: str = "3") -> Known:
    found = ledger.known(project)
    assert found is not None
    return found


def fifth(known: Known) -> bool:
    """A rule by which five labels want a look."""
    return known.labels >= 5


def test_labels_are_counted_for_each_project(ledger: Ledger) -> None:
    """The fifth label of one project wants a look, however many came at once."""
    for project in ("3", "4"):
        ledger.know(project)
        ledger.look(project)  # a new one wants the first
    assert not ledger.note_labels("3", 4, fifth)
    assert not ledger.note_labels("4", 4, fifth)
    assert ledger.looks(wanted=True) == []
    assert ledger.note_labels("3", 3, fifth)
    assert ledger.looks(wanted=True) == ["3"]
    assert (known(ledger, "3").labels, known(ledger, "4").labels) == (7, 4)


def test_a_training_sets_the_count_back(ledger: Ledger) -> None:
    """Labels that a training will read do not bring about another one; what the last one found is of no use."""
    ledger.note_labels("3", 4, fifth)
    ledger.trained("3", 20, "2026-11-23T01:02:03Z")
    ledger.request("3")
    assert (known(ledger).labels, known(ledger).trained_labels) == (4, 20)
    ledger.start("3")
    assert known(ledger) == Known("3")
    ledger.trained("3", 24, "2026-11-23T02:02:03Z")
    assert (known(ledger).trained_labels, known(ledger).trained_at) == (24, "2026-11-23T02:02:03Z")


def test_a_look_is_wanted_once(ledger: Ledger) -> None:
    """Many events before it are one look; one that comes after it has begun is the next."""
    for _ in range(3):
        ledger.note_labels("3", 9, fifth)
    begun = ledger.look("3")
    assert begun is not None
    assert (begun.labels, ledger.looks(wanted=True)) == (27, [])
    ledger.note_labels("3", 1, fifth)
    ledger.looked("3", labels=9, missing="Two more.", brought="")
    assert ledger.looks(wanted=True) == ["3"]
    assert known(ledger) == Known("3", 9, missing="Two more.")
    assert ledger.look("4") is None, "it is not known"


def test_who_was_looked_at_longest_ago_comes_first(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that each has its turn where there is no time for all."""
    for moment, project in enumerate(("3", "4", "5")):
        ledger.know(project)
        monkeypatch.setattr(time, "time", lambda moment=moment: 100.0 - moment)
        ledger.look(project)
    assert ledger.looks(wanted=False) == ["5", "4", "3"]
    assert ledger.looks(wanted=True) == []


def test_that_somebody_asked_is_remembered(ledger: Ledger) -> None:
    """With it a model that was brought may be replaced; a training that comes by itself changes nothing."""
    ledger.know("3")
    ledger.looked("3", labels=0, missing="", brought="It was brought.")
    ledger.request("3")
    assert known(ledger).brought == "It was brought."
    assert not known(ledger).pressed
    ledger.request("3", pressed=True)
    ledger.request("3")
    assert (known(ledger).pressed, known(ledger).brought) == (True, "")


def test_projects_that_do_not_train_by_themselves(ledger: Ledger) -> None:
    """By their number, with the reason; not while a training waits or runs, and not where nobody has looked."""
    for project in ("12", "3", "4", "5", "6"):
        ledger.know(project)
    ledger.looked("12", labels=1, missing="Two more.", brought="")
    ledger.looked("3", labels=1, missing="", brought="It was brought.")
    ledger.looked("4", labels=1, missing="", brought="")
    ledger.looked("5", labels=1, missing="Three more.", brought="")
    job = ledger.request("5")
    assert [(each.project, each.hindrance) for each in ledger.hindered()] == [
        ("3", "It was brought."),
        ("12", "Two more."),
    ]
    assert [each.project for each in ledger.hindered("12")] == ["12"]
    assert [each.project for each in ledger.hindered(limit=1)] == ["3"]
    ledger.start("5")
    ledger.end(job.id, FAILED, "too few")
    assert [each.project for each in ledger.hindered()] == ["3", "5", "12"]


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


@pytest.mark.parametrize("more", ["", PRUNED], ids=["before pruned", "before version 1"])
def test_a_list_of_an_older_release_is_taken_over(tmp_path: Path, more: str) -> None:
    """All jobs are there, numbers of ended ones never fall, and what is no number of a project is passed over."""
    with sqlite3.connect(tmp_path / "state" / "jobs.db") as db:
        db.executescript(OLD_SCHEMA + more)
        row = "INSERT INTO jobs VALUES (?, ?, ?, 1, 1, 1, 1.0, 2.0, 3.0, 'so', '{}', '{\"tag\": \"a:b\"}')"
        db.executemany(row, [(f"old{number}", "3", FAILED) for number in range(200)])
        db.executemany(row, [("new", "3", RUNNING), ("next", "3", WAITING)])
        strange = [("1" * 4301,), ("0007",), ("१२",), ("7",)]
        db.executemany("INSERT INTO projects (project, labels) VALUES (?, 1)", strange)
        db.execute("INSERT INTO projects VALUES ('3', 4, '2026-11-23T01:02:03Z')")
    ledger = Ledger(tmp_path / "state")
    assert ledger.counts() == dict.fromkeys(STATES, 0) | {FAILED: 200, RUNNING: 1, WAITING: 1}
    assert ledger.projects() == {"3": "2026-11-23T01:02:03Z", "7": None}
    assert known(ledger) == Known("3", 4, read_until="2026-11-23T01:02:03Z", pressed=True), "it has been trained"
    assert known(ledger, "7") == Known("7", 1)
    assert sorted(ledger.looks(wanted=True)) == ["3", "7"], "each is looked at once"
    ledger.end("new", PUBLISHED, "better")
    assert [job.id for job in ledger.jobs("3", limit=3)] == ["next", "new", "old199"]
    assert len(ledger.jobs("3")) == ENDED_MAX + 1
    assert ledger.counts() == dict.fromkeys(STATES, 0) | {FAILED: 200, PUBLISHED: 1, WAITING: 1}
    assert ledger.request("3").requests == 2
    assert ledger.request("4").outcome == {}
    assert ledger.job("next") is not None


def test_many_take_an_older_list_over_at_once(tmp_path: Path) -> None:
    """As web processes and workers of a new release start together: one does it, and nobody fails."""
    with sqlite3.connect(tmp_path / "jobs.db") as db:
        db.executescript(OLD_SCHEMA + PRUNED)
    ledgers, seen = [Ledger(tmp_path, locked_s=30) for _ in range(8)], []
    threads = [threading.Thread(target=lambda each=each: seen.append(each.request("3").id)) for each in ledgers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(seen), len(set(seen))) == (8, 1)


def test_so_many_projects_are_known_and_no_more(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those beyond are not written down, and their trainings run all the same."""
    monkeypatch.setattr(ledger_module, "KNOWN_MAX", 2)
    assert [ledger.know(project) for project in ("1", "2", "3", "1")] == [True, True, False, True]
    assert not ledger.note_labels("4", 9, fifth)
    ledger.read_until("4", "2026-11-23T01:02:03Z")
    assert list(ledger.projects()) == ["1", "2"]
    ended(ledger, "5")
    assert (ledger.knows("5"), ledger.knows("4")) == (True, False), "a job is known too"
    ledger.forget("1")
    assert ledger.know("3")
    assert list(ledger.projects()) == ["2", "3"]


READS: dict[str, Callable[[Ledger], Any]] = {
    "looks": lambda ledger: ledger.looks(wanted=True),
    "known": lambda ledger: ledger.known("3"),
    "hindered": lambda ledger: ledger.hindered(),
    "job": lambda ledger: ledger.job("0"),
    "jobs": lambda ledger: [job.project for job in ledger.jobs()],
    "counts": lambda ledger: ledger.counts()[WAITING],
    "knows": lambda ledger: ledger.knows("4"),
    "projects": lambda ledger: list(ledger.projects()),
}


@pytest.mark.parametrize("name", READS)
def test_the_list_is_read_while_another_writes(tmp_path: Path, ledger: Ledger, name: str) -> None:
    """As it was before; only the end of a transaction is waited for."""
    ledger.request("3")
    before = READS[name](ledger)
    with closing(sqlite3.connect(tmp_path / "state" / "jobs.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        other.execute("INSERT INTO projects (project) VALUES ('4')")
        other.execute("UPDATE jobs SET state = 'failed', project = '4'")
        assert READS[name](ledger) == before


def test_a_list_that_cannot_be_read_or_written_says_which(tmp_path: Path, ledger: Ledger) -> None:
    """Who only reads asks for nothing that could be accepted."""
    ledger.request("3")
    with closing(sqlite3.connect(tmp_path / "state" / "jobs.db", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(StateError) as read:
            ledger.jobs()
        with pytest.raises(StateError) as written:
            ledger.request("3")
    start = "The list of jobs in the state folder cannot be"
    assert str(read.value).startswith(f"{start} read (database is locked). Check that this user")
    assert str(written.value).startswith(f"{start} written (database is locked). Nothing was accepted. Check that this")
