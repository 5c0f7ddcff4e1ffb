"""
Every training that was asked for, until long after it ended, and the labels of each project: the one truth about jobs.

A SQLite file in the state folder, on one machine or on a shared volume. The queue
only wakes a worker; what is written here is what is run, and looked at.
"""

from __future__ import annotations

import json
import secrets
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from celestial_backend.errors import STATE_REMEDY, BusyError, StateError
from celestial_backend.models.manifest import Manifest
from celestial_backend.settings import is_project
from celestial_backend.state import StateFolder

LOCKED_S = 0.7  # how long an operation waits for another process: Label Studio gives /webhook one second
WAITING_MAX = 100  # projects
KNOWN_MAX = 10_000  # projects
ENDED_MAX, ENDED_MAX_OF_ALL = 50, 1000  # jobs that are kept of one project, and of all
WAITING, RUNNING, PUBLISHED, KEPT, FAILED, MERGED = "waiting", "running", "published", "kept", "failed", "merged"
STATES = (WAITING, RUNNING, PUBLISHED, KEPT, FAILED, MERGED)
VERSION = 1  # of the file's tables, which it knows itself; 0 in files of older releases
SCHEMA = (
    """CREATE TABLE IF NOT EXISTS jobs (
        id TEXT PRIMARY KEY, project TEXT NOT NULL, state TEXT NOT NULL, requests INTEGER NOT NULL,
        attempts INTEGER NOT NULL, requested_at REAL NOT NULL, started_at REAL, ended_at REAL,
        reason TEXT NOT NULL, progress TEXT NOT NULL, outcome TEXT NOT NULL)""",
    "CREATE UNIQUE INDEX IF NOT EXISTS one_waits ON jobs (project) WHERE state = 'waiting'",
    "CREATE UNIQUE INDEX IF NOT EXISTS one_runs ON jobs (project) WHERE state = 'running'",
    """CREATE TABLE IF NOT EXISTS projects (
        project TEXT PRIMARY KEY, labels INTEGER NOT NULL DEFAULT 0, read_until TEXT)""",
    "CREATE TABLE IF NOT EXISTS pruned (state TEXT PRIMARY KEY, jobs INTEGER NOT NULL)",
)
SINCE_1 = {  # columns of projects
    "trained_labels": "INTEGER",
    "trained_at": "TEXT",
    "pressed": "INTEGER NOT NULL DEFAULT 0",
    "look": "INTEGER NOT NULL DEFAULT 1",
    "looked_at": "REAL NOT NULL DEFAULT 0",
    "missing": "TEXT",
    "brought": "TEXT NOT NULL DEFAULT ''",
}
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
        progress: Where it is: its `stage`, the `seconds` since it began, and how many `pictures` `of` how many.
        outcome: What it brought about, as JSON; see `manifest`, `gone` and `merged_into`.
    """

    id: str
    project: str
    state: str
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

    @property
    def manifest(self) -> Manifest:
        """What is told of the new model, and its tag; nothing if there is none."""
        return Manifest() if self.state == MERGED else Manifest.of(self.outcome)

    @property
    def gone(self) -> bool:
        """Whether Label Studio did not have the project any more."""
        return self.outcome.get("gone") is True

    @property
    def merged_into(self) -> str | None:
        """The job that does its work; None if it does that itself."""
        return Manifest.of(self.outcome).job if self.state == MERGED else None


@dataclass(frozen=True)
class Known:
    """
    What is known of a project's labels.

    Attributes:
        labels: New or changed ones since the last training began, as far as events or a look told of them.
        trained_labels: How many there were when the last training began; None if that is not known.
        trained_at: A moment of Label Studio's after which a label was changed that is newer than these; None if
            it is not known, or no training has begun.
        read_until: When the newest label was changed that a training has read.
        pressed: A person has asked for a training of it.
        look: Label Studio is to be asked for its labels.
        missing: What labels it lacks before anything can be learned, as a sentence; "" if none, None before a look.
        brought: Why its model is not replaced unasked, as a sentence; "" if it is.
    """

    project: str
    labels: int = 0
    trained_labels: int | None = None
    trained_at: str | None = None
    read_until: str | None = None
    pressed: bool = False
    look: bool = True
    missing: str | None = None
    brought: str = ""

    @property
    def hindrance(self) -> str:
        """Why no training begins by itself, as a sentence; "" if nothing hinders it, or it is not known."""
        return self.brought or self.missing or ""


class Ledger:
    """The jobs and the labels of all projects; safe between threads and processes, and across a fork."""

    def __init__(self, model_dir: Path, locked_s: float = LOCKED_S) -> None:
        self._path = StateFolder(model_dir).jobs
        self._locked_s = locked_s
        self._turn = threading.Lock()

    def request(self, project: str, *, pressed: bool = False) -> Job:
        """
        The job that will do what is asked for: a new one, or the one that waits already.

        Args:
            project: Label Studio's number of it.
            pressed: A person asks, which is remembered.

        Raises:
            BusyError: As many projects wait as may; nothing was accepted.
            StateError: It could not be written down; nothing was accepted. So for all methods that write; those
                that read raise it where the list cannot be read.
        """
        with self._transaction() as db:
            if self._is_full(db, project):
                raise BusyError(
                    f"{WAITING_MAX} projects wait for a training, and no more may, so this request was not accepted."
                    " Look at them with: python -m celestial_backend jobs. Ask again when some have ended."
                )
            self._know(db, project)
            if pressed:
                db.execute("UPDATE projects SET pressed = 1, brought = '' WHERE project = ?", (project,))
            found = db.execute(
                "UPDATE jobs SET requests = requests + 1 WHERE project = ? AND state = 'waiting' RETURNING *",
                (project,),
            ).fetchone()
            return _job(found) if found else self._new(db, project)

    def note_labels(self, project: str, count: int, wanted: Callable[[Known], bool]) -> bool:
        """
        Add labels to a project's count, and say whether its labels are to be looked at, as `wanted` finds.

        It decides within the transaction, and must be quick.
        """
        with self._transaction() as db:
            self._know(db, project)
            counted = "UPDATE projects SET labels = labels + ? WHERE project = ? RETURNING *"
            row = db.execute(counted, (count, project)).fetchone()
            if row is None or not wanted(_known(row)):
                return False
            db.execute("UPDATE projects SET look = 1 WHERE project = ?", (project,))
            return True

    def looks(self, *, wanted: bool) -> list[str]:
        """The projects, those first that were looked at longest ago; of them all, or those where a look is wanted."""
        with self._reading() as db:
            rows = db.execute("SELECT project FROM projects WHERE look >= ? ORDER BY looked_at, rowid", (wanted,))
            # Releases before `is_project` wrote down whatever a request named.
            return [row["project"] for row in rows if is_project(row["project"])]

    def look(self, project: str) -> Known | None:
        """Begin to look at a project: what is known of it; None if it is not known itself."""
        with self._transaction() as db:
            begun = "UPDATE projects SET look = 0, looked_at = ? WHERE project = ? RETURNING *"
            row = db.execute(begun, (time.time(), project)).fetchone()
            return _known(row) if row else None

    def looked(self, project: str, *, labels: int, missing: str, brought: str) -> None:
        """Write down what a look has found; see `Known`."""
        with self._transaction() as db:
            found = "UPDATE projects SET labels = ?, missing = ?, brought = ? WHERE project = ?"
            db.execute(found, (labels, missing, brought, project))

    def trained(self, project: str, labels: int, moment: str) -> None:
        """Remember the labels that there are when a training begins; see `Known`."""
        with self._transaction() as db:
            mark = "UPDATE projects SET trained_labels = ?, trained_at = ? WHERE project = ?"
            db.execute(mark, (labels, moment, project))

    def known(self, project: str) -> Known | None:
        """What is known of a project; None if it is not known itself."""
        with self._reading() as db:
            row = db.execute("SELECT * FROM projects WHERE project = ?", (project,)).fetchone()
            return _known(row) if row else None

    def hindered(self, project: str | None = None, limit: int = -1) -> list[Known]:
        """Projects that do not train by themselves, with no job that waits or runs; one of them or all, by number."""
        hindered = (
            "SELECT * FROM projects WHERE (missing != '' OR brought != '') AND project = COALESCE(?, project) AND"
            " NOT EXISTS (SELECT 1 FROM jobs WHERE jobs.project = projects.project AND state IN ('waiting', 'running'))"
            " ORDER BY LENGTH(project), project LIMIT ?"
        )
        with self._reading() as db:
            return [_known(row) for row in db.execute(hindered, (project, limit)) if is_project(row["project"])]

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
            begun = "UPDATE projects SET labels = 0, trained_labels = NULL, trained_at = NULL WHERE project = ?"
            db.execute(begun, (project,))
            return _job(found)

    def progress(self, job_id: str, **where: Any) -> None:
        """Write down where a running job is."""
        with self._transaction() as db:
            values = (json.dumps(where), job_id)
            db.execute("UPDATE jobs SET progress = ? WHERE id = ? AND state = 'running'", values)

    def end(
        self, job_id: str, state: str, reason: str, manifest: Manifest | None = None, *, gone: bool = False
    ) -> bool:
        """
        End a running job.

        Args:
            job_id: Its id.
            state: One that an ended job has.
            reason: A sentence for people.
            manifest: What is told of its model, if it has made one.
            gone: Whether Label Studio does not have the project any more.

        Returns:
            False if the job does not run, and nothing changes then.
        """
        outcome = (manifest or Manifest()).plain() | ({"gone": True} if gone else {})
        with self._transaction() as db:
            changed = db.execute(
                "UPDATE jobs SET state = ?, reason = ?, outcome = ?, ended_at = ? WHERE id = ? AND state = 'running'",
                (state, reason, json.dumps(outcome), time.time(), job_id),
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
                db.execute("UPDATE jobs SET state = 'merged', reason = ?, outcome = ?, ended_at = ? WHERE id = ?",
                           (said, json.dumps({"job": other["id"]}), time.time(), job_id))  # fmt: skip
                db.execute("UPDATE jobs SET requests = requests + ?, attempts = ? WHERE id = ?",
                           (job.requests, job.attempts - (not begun), other["id"]))  # fmt: skip
                self._prune(db, job_id)
            else:
                db.execute("UPDATE jobs SET state = 'waiting', attempts = attempts - ?, progress = '{}', "
                           "started_at = NULL WHERE id = ?", (not begun, job_id))  # fmt: skip

    def job(self, job_id: str) -> Job | None:
        """A job by its id."""
        with self._reading() as db:
            found = db.execute("SELECT * FROM jobs WHERE id = ?", (job_id,)).fetchone()
            return _job(found) if found else None

    def doing(self, job_id: str) -> Job | None:
        """The job that does what one was asked to do: itself, or the one that it was merged into."""
        job = self.job(job_id)
        while job is not None and job.merged_into is not None:
            job = self.job(job.merged_into)
        return job

    def jobs(self, project: str | None = None, states: tuple[str, ...] = (), limit: int = -1) -> list[Job]:
        """The jobs of one project or of all, in some states or in any, the newest first, whatever the clock said."""
        where = ["1"] + (["project = ?"] if project else []) + ([f"state IN ({_marks(states)})"] if states else [])
        values = [*([project] if project else []), *states, limit]
        order = f"SELECT * FROM jobs WHERE {' AND '.join(where)} ORDER BY rowid DESC LIMIT ?"  # noqa: S608 - marks only
        with self._reading() as db:
            return [_job(row) for row in db.execute(order, values)]

    def counts(self) -> dict[str, int]:
        """How many jobs of all projects are in each of the states, 0 and those that were pruned included."""
        with self._reading() as db:
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
        with self._reading() as db:
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
        with self._reading() as db:
            rows = db.execute("SELECT * FROM projects ORDER BY project")
            # Releases before `is_project` wrote down whatever a request named.
            return {row["project"]: row["read_until"] for row in rows if is_project(row["project"])}

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        """The list as it is at one moment; waits for no one who writes, but for the end of it."""
        with _told("read ({})."), self._opened(self._locked_s) as db:
            if _version(db) < VERSION:
                with self._transaction():
                    pass  # makes the tables
            db.execute("BEGIN")
            yield db

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        deadline = time.monotonic() + self._locked_s
        # One thread at a time: SQLite lets those that wait sleep longer and longer, and newcomers pass them.
        mine = self._turn.acquire(timeout=self._locked_s)
        try:
            with _told("written ({}). Nothing was accepted."):
                if not mine:
                    raise sqlite3.OperationalError("it is in use")
                with self._opened(max(0.0, deadline - time.monotonic())) as db:
                    db.execute("PRAGMA journal_mode = TRUNCATE")  # half the time of the default, and as safe
                    db.execute("BEGIN IMMEDIATE")
                    with db:
                        if _version(db) < VERSION:
                            self._migrate(db)
                        yield db
        finally:
            if mine:
                self._turn.release()

    @contextmanager
    def _opened(self, locked_s: float) -> Iterator[sqlite3.Connection]:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # Not in WAL mode, which needs memory that the machines of a shared volume do not share.
        with closing(sqlite3.connect(self._path, timeout=locked_s, isolation_level=None)) as db:
            db.row_factory = sqlite3.Row
            yield db

    @staticmethod
    def _migrate(db: sqlite3.Connection) -> None:
        """Make the tables; those of older releases get the columns that are new, and lose one that nobody needs."""
        for statement in SCHEMA:
            db.execute(statement)
        there = {row["name"] for row in db.execute("PRAGMA table_info(projects)")}
        for column, kind in SINCE_1.items():
            if column not in there:
                db.execute(f"ALTER TABLE projects ADD COLUMN {column} {kind}")
        if "from_scratch" in {row["name"] for row in db.execute("PRAGMA table_info(jobs)")}:
            db.execute("ALTER TABLE jobs DROP COLUMN from_scratch")
            # Until now the button was the way to a training, or a setting that somebody made.
            db.execute("UPDATE projects SET pressed = 1 WHERE project IN (SELECT project FROM jobs)")
        db.execute(f"PRAGMA user_version = {VERSION}")

    @staticmethod
    def _new(db: sqlite3.Connection, project: str) -> Job:
        job = Job(secrets.token_hex(4), project, WAITING, 1, 0, time.time())
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


@contextmanager
def _told(failure: str) -> Iterator[None]:
    """Say in a sentence that the list cannot be used, and how that failed."""
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        said = failure.format(error)
        raise StateError(f"The list of jobs in the state folder cannot be {said} {STATE_REMEDY}") from error


def _version(db: sqlite3.Connection) -> int:
    return int(db.execute("PRAGMA user_version").fetchone()[0])


def _job(row: sqlite3.Row) -> Job:
    values = {each.name: row[each.name] for each in fields(Job)}
    return Job(**values | {name: json.loads(row[name]) for name in ("progress", "outcome")})


def _known(row: sqlite3.Row) -> Known:
    values = {each.name: row[each.name] for each in fields(Known)}
    return Known(**values | {name: bool(row[name]) for name in ("pressed", "look")})


def _marks(values: Any) -> str:
    return ", ".join("?" for _ in values)
