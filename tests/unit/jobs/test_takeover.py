"""The list of jobs of an older release: it is taken over once, whatever it is like and whoever starts together."""

from __future__ import annotations

import os
import shutil
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest

from celestial_backend.database import Database
from celestial_backend.jobs.ledger import (
    FAILED,
    KEPT,
    MERGED,
    PUBLISHED,
    RUNNING,
    STATES,
    WAITING,
    Ending,
    Known,
    Ledger,
)
from celestial_backend.jobs.takeover import take_over_jobs
from celestial_backend.settings import Settings

OF_0_1 = """
CREATE TABLE jobs (
    id TEXT PRIMARY KEY, project TEXT NOT NULL, state TEXT NOT NULL, from_scratch INTEGER NOT NULL,
    requests INTEGER NOT NULL, attempts INTEGER NOT NULL, requested_at REAL NOT NULL, started_at REAL, ended_at REAL,
    reason TEXT NOT NULL, progress TEXT NOT NULL, outcome TEXT NOT NULL
);
CREATE TABLE projects (project TEXT PRIMARY KEY, labels INTEGER NOT NULL DEFAULT 0, read_until TEXT);
"""
OF_0_2 = """
CREATE TABLE jobs (
    id TEXT PRIMARY KEY, project TEXT NOT NULL, state TEXT NOT NULL,
    requests INTEGER NOT NULL, attempts INTEGER NOT NULL, requested_at REAL NOT NULL, started_at REAL, ended_at REAL,
    reason TEXT NOT NULL, progress TEXT NOT NULL, outcome TEXT NOT NULL
);
CREATE TABLE projects (
    project TEXT PRIMARY KEY, labels INTEGER NOT NULL DEFAULT 0, read_until TEXT, trained_labels INTEGER,
    trained_at TEXT, pressed INTEGER NOT NULL DEFAULT 0, look INTEGER NOT NULL DEFAULT 1,
    looked_at REAL NOT NULL DEFAULT 0, missing TEXT, brought TEXT NOT NULL DEFAULT ''
);
CREATE TABLE pruned (state TEXT PRIMARY KEY, jobs INTEGER NOT NULL);
"""


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(model_dir=tmp_path / "state")


def write(settings: Settings, script: str, *jobs: tuple[str, str, str]) -> None:
    """Leave a list as a release did, with jobs of an id, a project and a state."""
    with closing(sqlite3.connect(settings.state.old_jobs)) as db:
        db.executescript(script)
        more = ("from_scratch, ", "1, ") if "from_scratch" in script else ("", "")
        names = f"{more[0]}requests, attempts, requested_at, started_at, reason, progress, outcome"
        values = f"{more[1]}2, 1, 1.0, 2.0, 'so', '{{\"stage\": \"learning\"}}', '{{}}'"
        db.executemany(f"INSERT INTO jobs (id, project, state, {names}) VALUES (?, ?, ?, {values})", jobs)  # noqa: S608
        db.commit()


def started(settings: Settings) -> Ledger:
    """As a process of this release has it."""
    database = Database(settings)
    database.old[settings.state.old_jobs] = partial(take_over_jobs, settings)
    return Ledger(database, wait_s=30)


def states(ledger: Ledger) -> dict[str, str]:
    return {job.id: job.state for job in ledger.jobs()}


def test_the_list_of_0_1_is_taken_over(settings: Settings) -> None:
    """All jobs are there in their order, and what is no number of a project is passed over."""
    strange = ", ".join(f"('{text}', 1, NULL)" for text in ("1" * 4301, "0007", "१२", "7"))
    rows = f"INSERT INTO projects VALUES {strange}, ('3', 4, '2026-11-23T01:02:03Z');"  # noqa: S608 - our own
    jobs = [(f"old{number}", "3", FAILED) for number in range(200)]
    write(settings, OF_0_1 + rows, *jobs, ("next", "3", WAITING))
    ledger = started(settings)
    assert [job.id for job in ledger.jobs("3", limit=3)] == ["next", "old199", "old198"]
    assert ledger.counts() == dict.fromkeys(STATES, 0) | {FAILED: 200, WAITING: 1}
    assert ledger.projects() == {"3": "2026-11-23T01:02:03Z", "7": None}
    assert not ledger.knows("0007"), "PostgreSQL would not take all that was written down"
    assert ledger.known("3") == Known("3", 4, read_until="2026-11-23T01:02:03Z", pressed=True), "it has been trained"
    assert ledger.known("7") == Known("7", 1)
    assert sorted(ledger.looks(wanted=True)) == ["3", "7"], "each is looked at once"
    assert ledger.request("3").requests == 3


def test_the_list_of_0_2_is_taken_over(settings: Settings) -> None:
    """With all that a look has found, and the numbers of jobs that are there no more."""
    pruned = "INSERT INTO pruned VALUES ('kept', 30);"
    row = "INSERT INTO projects VALUES ('3', 4, 'r', 20, 't', 0, 0, 9.0, 'Two more.', '');"
    write(settings, OF_0_2 + pruned + row, ("a", "3", KEPT))
    ledger = started(settings)
    assert ledger.known("3") == Known("3", 4, 20, "t", "r", look=False, missing="Two more.")
    assert ledger.counts() == dict.fromkeys(STATES, 0) | {KEPT: 31}


def test_what_ran_is_settled(settings: Settings) -> None:
    """Published if its model is live, and Label Studio is told then; else it waits, or another one does its work."""
    running = [(name, project, RUNNING) for project, name in enumerate(("live", "other", "damaged", "none", "both"), 1)]
    write(settings, OF_0_2, *[(name, str(project), state) for name, project, state in running], ("next", "5", WAITING))
    settings.state.old_pointers.mkdir()
    for project, text in {"1": '{"tag": "a:b", "job": "live"}', "2": '{"tag": "a:b", "job": "x"}', "3": "{"}.items():
        (settings.state.old_pointers / f"{project}.json").write_text(text)
    ledger = started(settings)
    assert states(ledger) == {
        "live": PUBLISHED, "other": WAITING, "damaged": WAITING, "none": WAITING, "both": MERGED, "next": WAITING,
    }  # fmt: skip
    assert [(job.id, job.manifest.tag) for job in ledger.untold()] == [("live", "a:b")]
    assert [ledger.job(name).progress for name in ("other", "none")] == [{}, {}]
    assert ledger.doing("both") == ledger.job("next")
    assert {job.id for job in ledger.jobs() if job.ended_at} == {"live", "both"}


def test_it_is_done_once(settings: Settings, tmp_path: Path) -> None:
    """The old file goes; where it came back, or a process was killed before it went, nothing begins again."""
    write(settings, OF_0_2, ("a", "3", RUNNING), ("b", "4", WAITING))
    shutil.copy(settings.state.old_jobs, tmp_path / "copy")
    ledger = started(settings)
    assert states(ledger) == {"a": WAITING, "b": WAITING}
    assert not settings.state.old_jobs.exists()
    assert settings.state.old_jobs.with_name("jobs.db.old").is_file()
    job = ledger.start("one", "3")
    assert job is not None
    ledger.end(job, Ending(KEPT, "worse"))
    shutil.copy(tmp_path / "copy", settings.state.old_jobs)
    assert states(started(settings)) == {"a": KEPT, "b": WAITING}
    assert not settings.state.old_jobs.exists()


def test_what_an_older_release_accepts_afterwards_is_taken_over_too(settings: Settings) -> None:
    """It was started again by mistake; what was taken over before is kept beside."""
    write(settings, OF_0_2, ("a", "3", KEPT))
    assert states(started(settings)) == {"a": KEPT}
    write(settings, OF_0_2, ("b", "4", WAITING))
    assert states(started(settings)) == {"a": KEPT, "b": WAITING}
    assert sorted(path.name for path in settings.model_dir.glob("jobs.db*")) == ["jobs.db.old", "jobs.db.old2"]


def test_a_list_whose_writer_was_killed_is_put_in_order(settings: Settings, tmp_path: Path) -> None:
    """In the midst of a transaction, which is undone."""
    write(settings, OF_0_2, ("a", "3", WAITING))
    with closing(sqlite3.connect(settings.state.old_jobs, isolation_level=None)) as db:
        for statement in ("PRAGMA journal_mode = TRUNCATE", "PRAGMA cache_size = 1", "BEGIN IMMEDIATE"):
            db.execute(statement)
        db.executemany("INSERT INTO pruned VALUES (?, 1)", [(f"{number:0100}",) for number in range(1000)])
        for path in settings.model_dir.glob("jobs.db*"):
            shutil.copy(path, tmp_path)
    for path in tmp_path.glob("jobs.db*"):
        path.replace(settings.model_dir / path.name)
    assert settings.state.old_jobs.with_name("jobs.db-journal").stat().st_size
    assert states(started(settings)) == {"a": WAITING}


def test_an_event_is_remembered(settings: Settings) -> None:
    """So that nobody is told that none has come."""
    rows = "INSERT INTO projects (project) VALUES ('3'), ('4');"
    write(settings, OF_0_2 + rows)
    (settings.model_dir / "work").mkdir()
    (settings.model_dir / "work" / "webhook-3").touch()
    os.utime(settings.model_dir / "work" / "webhook-3", (5.0, 7.0))
    ledger = started(settings)
    assert [known and known.event_at for known in map(ledger.known, "34")] == [7.0, None]


def test_many_take_it_over_at_once(settings: Settings) -> None:
    """As web processes and workers of a new release start together: one does it, and nobody fails."""
    write(settings, OF_0_1, ("a", "3", WAITING))
    with ThreadPoolExecutor(8) as threads:
        made = list(threads.map(lambda each: each.request("3").id, [started(settings) for _ in range(8)]))
    assert made == ["a"] * 8
    assert started(settings).jobs()[0].requests == 10


def test_a_list_that_is_damaged_is_left_and_stops_nothing(settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    """The log says so; whoever can mend it has it still."""
    settings.state.old_jobs.write_text("no list, but long enough to be taken for one" * 100)
    ledger = started(settings)
    assert ledger.jobs() == []
    assert "The list of jobs of an older release, jobs.db, cannot be read: its file is no database" in caplog.text
    assert settings.state.old_jobs.is_file()
