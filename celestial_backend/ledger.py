"""
Every training that was asked for, until long after it ended: the one truth about jobs.

A SQLite file in the state folder, on one machine or on a shared volume. The queue
only wakes a worker; what is written here is what is run.
"""

from __future__ import annotations

import json
import secrets
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from celestial_backend.errors import STATE_REMEDY, BusyError, StateError
from celestial_backend.tags import is_project

LOCKED_S = 0.7  # how long an operation waits for another process: Label Studio gives /webhook one second
WAITING_MAX = 100  # projects
KNOWN_MAX = 10_000  # projects
ENDED_MAX, ENDED_MAX_OF_ALL = 50, 1000  # jobs that are kept of one project, and of all
WAITING, RUNNING, PUBLISHED, KEPT, FAILED, MERGED = "waiting", "running", "published", "kept", "failed", "merged"
STATES = (WAITING, RUNNING, PUBLISHED, KEPT, FAILED, MERGED)
SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    id TEXT PRIMARY KEY, project TEXT NOT NULL, state TEXT NOT NULL, from_scratch INTEGER NOT NULL,
    requests INTEGER NOT NULL, attempts INTEGER NOT NULL, requested_at REAL NOT NULL, started_at REAL, ended_at REAL,
    reason TEXT NOT NULL, progress TEXT NOT NULL, outcome TEXT NOT NULL
);
CREATE UNIQUE INDEX IF NOT EXISTS one_waits ON jobs (project) WHERE state = 'waiting';
CREATE UNIQUE INDEX IF NOT EXISTS one_runs ON jobs (project) WHERE state = 'running';
CREATE TABLE IF NOT EXISTS projects (project TEXT PRIMARY KEY, labels INTEGER NOT NULL DEFAULT 0, read_until TEXT);
CREATE TABLE IF NOT EXISTS pruned (state TEXT PRIMARY KEY, jobs INTEGER NOT NULL);
"""
PRUNE = """
DELETE FROM jobs WHERE id != :ended AND (
    rowid IN (SELECT rowid FROM jobs WHERE state NOT IN ('waiting', 'running')
              AND project = (SELECT project FROM jobs WHERE id = :ended) ORDER BY rowid DESC LIMIT -1 OFFSET :of_one)
    OR rowid IN (SELECT rowid FROM jobs WHERE state NOT IN ('waiting', 'running')
                 ORDER BY rowid DESC LIMIT -1 OFFSET :of_all)
) RETURNING state
"""


@dataclass(frozen=True)
class Job:
    """
    One training of one project, as it stood when it was read.

    Attributes:
        state: ``waiting``, ``running``; or ended: ``published``, ``kept`` (the old model stays),
            ``failed``, ``merged`` (another job does its work).
        requests: How many requests it stands for.
        attempts: How often it was begun.
        requested_at: Seconds since 1970, as are the other two moments.
        reason: A sentence for people, once it has ended.
        progress: Where it is: step, epoch, seconds.
        outcome: The new model's tag and both models' scores, once there are any.
    """

    id: str
    project: str
    state: str
    from_scratch: bool
    requests: int
    attempts: int
    requested_at: float
    started_at: float | None = None
    ended_at: float | None = None
    reason: str = ""
    progress: dict[str, Any] = field(default_factory=dict)
    outcome: dict[str, Any] = field(default_factory=dict)

    @property
    def ended(self) -> bool:
        """Whether nothing more will happen to it."""
        return self.state not in (WAITING, RUNNING)


class Ledger:
    """The jobs and the label counts of all projects; safe between threads and processes, and across a fork."""

    def __init__(self, model_dir: Path, locked_s: float = LOCKED_S) -> None:
        self._path = model_dir / "jobs.db"
        self._locked_s = locked_s
        self._turn = threading.Lock()

    def request(self, project: str, *, from_scratch: bool = False) -> Job:
        """
        The job that will do what is asked for: a new one, or the one that waits already.

        Raises:
            BusyError: As many projects wait as may; nothing was accepted.
            StateError: It could not be written down; nothing was accepted. So for all methods.
        """
        with self._transaction() as db:
            if self._is_full(db, project):
                raise BusyError(
                    f"{WAITING_MAX} projects wait for a training, and no more may, so this request was not accepted."
                    " Look at them with: python -m celestial_backend jobs. Ask again when some have ended."
                )
            return self._request(db, project, from_scratch=from_scratch)

    def note_labels(self, project: str, count: int, limit: int) -> Job | None:
        """
        Add labels to a project's count; the job that they bring about when the count reaches the limit.

        Where as many projects wait as may, the next labels bring it about.
        """
        with self._transaction() as db:
            self._know(db, project)
            counted = "UPDATE projects SET labels = labels + ? WHERE project = ? RETURNING labels"
            known = db.execute(counted, (count, project)).fetchone()
            if known is None or known["labels"] < limit or self._is_full(db, project):
                return None
            db.execute("UPDATE projects SET labels = 0 WHERE project = ?", (project,))
            return self._request(db, project)

    def start(self, project: str) -> Job | None:
        """The project's waiting job, running from now on; None if none waits, or one runs already."""
        with self._transaction() as db:
            if db.execute("SELECT 1 FROM jobs WHERE project = ? AND state = 'running'", (project,)).fetchone():
                return None
            found = db.execute(
                "UPDATE jobs SET state = 'running', attempts = attempts + 1, started_at = ?, progress = '{}' "
                "WHERE project = ? AND state = 'waiting' RETURNING *",
                (time.time(), project),
            ).fetchone()
            if not found:
                return None
            db.execute("UPDATE projects SET labels = 0 WHERE project = ?", (project,))
            return _job(found)

    def progress(self, job_id: str, **where: Any) -> None:
        """Write down where a running job is."""
        with self._transaction() as db:
            values = (json.dumps(where), job_id)
            db.execute("UPDATE jobs SET progress = ? WHERE id = ? AND state = 'running'", values)

    def end(self, job_id: str, state: str, reason: str, outcome: dict[str, Any] | None = None) -> bool:
        """End a running job; False if it does not run, and nothing changes then."""
        with self._transaction() as db:
            changed = db.execute(
                "UPDATE jobs SET state = ?, reason = ?, outcome = ?, ended_at = ? WHERE id = ? AND state = 'running'",
                (state, reason, json.dumps(outcome or {}), time.time(), job_id),
            )
            self._prune(db, job_id)
            return changed.rowcount == 1

    def give_back(self, job_id: str, *, begun: bool = True) -> None:
        """Let a running job wait again; where another one waits by now, that one does its work."""
        with self._transaction() as db:
            job = _job(db.execute("SELECT * FROM jobs WHERE id = ?", (job_id,)).fetchone())
            other = db.execute("SELECT id FROM jobs WHERE project = ? AND state = 'waiting'", (job.project,)).fetchone()
            if job.state != RUNNING:
                return
            if other:
                said = f"It was interrupted, and job {other['id']} does its work."
                db.execute("UPDATE jobs SET state = 'merged', reason = ?, ended_at = ? WHERE id = ?",
                           (said, time.time(), job_id))  # fmt: skip
                db.execute("UPDATE jobs SET requests = requests + ?, attempts = ?, from_scratch = from_scratch OR ? "
                           "WHERE id = ?",
                           (job.requests, job.attempts - (not begun), job.from_scratch, other["id"]))  # fmt: skip
                self._prune(db, job_id)
            else:
                db.execute("UPDATE jobs SET state = 'waiting', attempts = attempts - ?, progress = '{}', "
                           "started_at = NULL WHERE id = ?", (not begun, job_id))  # fmt: skip

    def job(self, job_id: str) -> Job | None:
        """A job by its id."""
        with self._transaction() as db:
            found = db.execute("SELECT * FROM jobs WHERE id = ?", (job_id,)).fetchone()
            return _job(found) if found else None

    def jobs(self, project: str | None = None, states: tuple[str, ...] = (), limit: int = -1) -> list[Job]:
        """The jobs of one project or of all, in some states or in any, the newest first, whatever the clock said."""
        where = ["1"] + (["project = ?"] if project else []) + ([f"state IN ({_marks(states)})"] if states else [])
        values = [*([project] if project else []), *states, limit]
        order = f"SELECT * FROM jobs WHERE {' AND '.join(where)} ORDER BY rowid DESC LIMIT ?"  # noqa: S608 - marks only
        with self._transaction() as db:
            return [_job(row) for row in db.execute(order, values)]

    def counts(self) -> dict[str, int]:
        """How many jobs of all projects are in each of the states, 0 and those that were pruned included."""
        with self._transaction() as db:
            all_jobs = "SELECT state, 1 AS jobs FROM jobs UNION ALL SELECT state, jobs FROM pruned"
            counted = db.execute(f"SELECT state, SUM(jobs) FROM ({all_jobs}) GROUP BY state")  # noqa: S608 - our own text
            return dict.fromkeys(STATES, 0) | dict(counted)

    def know(self, project: str) -> bool:
        """Remember that a project works with this backend; False if that would be one too many."""
        with self._transaction() as db:
            self._know(db, project)
            return bool(db.execute("SELECT 1 FROM projects WHERE project = ?", (project,)).fetchone())

    def knows(self, project: str) -> bool:
        """Whether a project is remembered, or has a job."""
        with self._transaction() as db:
            one = "SELECT 1 FROM projects WHERE project = ?1 UNION ALL SELECT 1 FROM jobs WHERE project = ?1"
            return bool(db.execute(one, (project,)).fetchone())

    def forget(self, project: str) -> None:
        """Forget a project that is gone; its jobs stay."""
        with self._transaction() as db:
            db.execute("DELETE FROM projects WHERE project = ?", (project,))

    def read_until(self, project: str, moment: str) -> None:
        """Remember the newest label that a training of the project has read."""
        with self._transaction() as db:
            self._know(db, project)
            db.execute("UPDATE projects SET read_until = ? WHERE project = ?", (moment, project))

    def projects(self) -> dict[str, str | None]:
        """The projects that are known, and the moment of the newest label that a training has read."""
        with self._transaction() as db:
            rows = db.execute("SELECT * FROM projects ORDER BY project")
            # Releases before `is_project` wrote down whatever a request named.
            return {row["project"]: row["read_until"] for row in rows if is_project(row["project"])}

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        deadline = time.monotonic() + self._locked_s
        # One thread at a time: SQLite lets those that wait sleep longer and longer, and newcomers pass them.
        mine = self._turn.acquire(timeout=self._locked_s)
        try:
            if not mine:
                raise sqlite3.OperationalError("it is in use")
            self._path.parent.mkdir(parents=True, exist_ok=True)
            # Not in WAL mode, which needs memory that the machines of a shared volume do not share.
            left = max(0.0, deadline - time.monotonic())
            with closing(sqlite3.connect(self._path, timeout=left, isolation_level=None)) as db:
                db.row_factory = sqlite3.Row
                db.execute("PRAGMA journal_mode = TRUNCATE")  # half the time of the default, and as safe
                if not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'pruned'").fetchone():
                    db.executescript(f"BEGIN IMMEDIATE; {SCHEMA} COMMIT;")
                db.execute("BEGIN IMMEDIATE")
                with db:
                    yield db
        except (sqlite3.Error, OSError) as error:
            raise StateError(
                f"The list of jobs in the state folder cannot be read or written ({error}). Nothing was accepted. "
                f"{STATE_REMEDY}"
            ) from error
        finally:
            if mine:
                self._turn.release()

    def _request(self, db: sqlite3.Connection, project: str, *, from_scratch: bool = False) -> Job:
        self._know(db, project)
        found = db.execute(
            "UPDATE jobs SET requests = requests + 1, from_scratch = from_scratch OR ? "
            "WHERE project = ? AND state = 'waiting' RETURNING *",
            (from_scratch, project),
        ).fetchone()
        if found:
            return _job(found)
        job = Job(secrets.token_hex(4), project, WAITING, from_scratch, 1, 0, time.time())
        values = {name: json.dumps(value) if isinstance(value, dict) else value for name, value in asdict(job).items()}
        db.execute(f"INSERT INTO jobs ({', '.join(values)}) VALUES ({_marks(values)})", list(values.values()))  # noqa: S608 - our own names
        return job

    @staticmethod
    def _know(db: sqlite3.Connection, project: str) -> None:
        one = "INSERT OR IGNORE INTO projects (project) SELECT ? WHERE (SELECT COUNT(*) FROM projects) < ?"
        db.execute(one, (project, KNOWN_MAX))

    @staticmethod
    def _is_full(db: sqlite3.Connection, project: str) -> bool:
        """Whether a job of the project would be one too many; one that waits already takes every request."""
        waiting = [row["project"] for row in db.execute("SELECT project FROM jobs WHERE state = 'waiting'")]
        return len(waiting) >= WAITING_MAX and project not in waiting

    @staticmethod
    def _prune(db: sqlite3.Connection, ended: str) -> None:
        """Remove the oldest ended jobs but for the one that has just ended, and keep their number."""
        bounds = {"ended": ended, "of_one": ENDED_MAX, "of_all": ENDED_MAX_OF_ALL}
        removed = Counter(row["state"] for row in db.execute(PRUNE, bounds))
        add = "INSERT INTO pruned VALUES (?, ?) ON CONFLICT (state) DO UPDATE SET jobs = jobs + excluded.jobs"
        db.executemany(add, removed.items())


def _job(row: sqlite3.Row) -> Job:
    values = {name: row[name] for name in row.keys()}  # noqa: SIM118 - a row iterates over its values
    values |= {"from_scratch": bool(row["from_scratch"])}
    return Job(**values | {name: json.loads(row[name]) for name in ("progress", "outcome")})


def _marks(values: Any) -> str:
    return ", ".join("?" for _ in values)
