"""What releases up to 0.2 have left in the state folder: their list of jobs, a SQLite file, is taken over once."""

from __future__ import annotations

import json
import logging
import sqlite3
import time
from collections.abc import Iterable, Mapping
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from celestial_backend.database import Transaction, why
from celestial_backend.jobs.ledger import MERGED, PUBLISHED, RUNNING, WAITING
from celestial_backend.settings import Settings, is_project

logger = logging.getLogger(__name__)

JOB = ("id", "project", "state", "requests", "attempts", "requested_at", "started_at", "ended_at", "reason", "progress",
       "outcome", "told")  # fmt: skip
PROJECT = ("project", "labels", "read_until", "trained_labels", "trained_at", "pressed", "look", "looked_at", "missing",
           "brought", "event_at")  # fmt: skip
PRUNED = ("state", "jobs")


def take_over_jobs(settings: Settings, work: Transaction) -> bool:
    """Jobs, what is known of projects, and the numbers of jobs that were pruned: for `Database.old`."""
    file = settings.state.old_jobs
    try:
        jobs, projects, pruned = (_rows(file, table) for table in ("jobs", "projects", "pruned"))
    except sqlite3.Error as error:
        logger.warning("The list of jobs of an older release, %s, cannot be read: %s", file.name, why(error))
        return False
    jobs, projects = ([row for row in rows if is_project(row["project"])] for rows in (jobs, projects))
    for project in projects:
        _add(work, "projects", project | {"event_at": _event_at(settings, project["project"])}, PROJECT)
    pressed = {} if not jobs or "from_scratch" not in jobs[0] else {job["project"] for job in jobs}
    for project in pressed:  # until 0.1 the button was the way to a training
        work.run("UPDATE projects SET pressed = 1 WHERE project = :project", project=project)
    waits = {job["project"]: job["id"] for job in jobs if job["state"] == WAITING}
    for job in jobs:
        _add(work, "work", _settled(settings, job, waits), JOB)
    for each in pruned:
        _add(work, "pruned", each, PRUNED)
    logger.info("%d jobs of an older release were taken over", len(jobs))
    return True


def _rows(file: Path, table: str) -> list[dict[str, Any]]:
    """The rows of a table, in the order in which they were written; none where there is no such table."""
    # Not read-only: where its writer was killed, SQLite puts the file in order first.
    with closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=rw", uri=True)) as old:
        old.row_factory = sqlite3.Row
        if not old.execute("SELECT 1 FROM sqlite_master WHERE name = ?", (table,)).fetchone():
            return []
        return [dict(row) for row in old.execute(f"SELECT * FROM {table} ORDER BY rowid")]  # noqa: S608 - our own name


def _settled(settings: Settings, job: dict[str, Any], waits: dict[str, str]) -> dict[str, Any]:
    """A job that ran has published, waits again, or is done by the one that waits by now."""
    if job["state"] != RUNNING:
        return job
    tag = _published(settings.state.old_pointers / f"{job['project']}.json", job["id"])
    if tag is not None:
        return job | {"state": PUBLISHED, "reason": "It was interrupted when its model was live.",
                      "outcome": json.dumps({"tag": tag}), "ended_at": time.time(), "told": 0}  # fmt: skip
    other = waits.setdefault(job["project"], job["id"])
    if other == job["id"]:
        return job | {"state": WAITING, "started_at": None, "progress": "{}"}
    return job | {"state": MERGED, "reason": f"It was interrupted, and job {other} does its work.",
                  "outcome": json.dumps({"job": other}), "ended_at": time.time()}  # fmt: skip


def _published(pointer: Path, job: str) -> str | None:
    """The model that a job made the live one; None if it did not."""
    try:
        found = json.loads(pointer.read_bytes())
        return str(found["tag"]) if found["job"] == job else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _event_at(settings: Settings, project: str) -> float | None:
    """When the last event of a project's webhook came: until 0.2 it touched a file."""
    with suppress(OSError):
        return (settings.state.root / "work" / f"webhook-{project}").stat().st_mtime
    return None


def _add(work: Transaction, table: str, row: Mapping[str, Any], names: Iterable[str]) -> None:
    """Add a row, unless it is there."""
    values = {name: row[name] for name in names if name in row}
    marks = ", ".join(f":{name}" for name in values)
    put = f"INSERT INTO {table} ({', '.join(values)}) VALUES ({marks}) ON CONFLICT DO NOTHING"  # noqa: S608 - our own
    work.run(put, **values)
