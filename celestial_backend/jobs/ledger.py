"""
Every training that was asked for, until long after it ended, and the labels of each project: the one truth about jobs.

It lies in the database. The queue only wakes a worker; what is written here is what is run, and looked at. Who runs
a job has a lease on it, and a token that is new with each lease: whoever was taken for dead and is not can write
nothing more of it.
"""

from __future__ import annotations

import json
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from celestial_backend.database import Database, Row, Transaction
from celestial_backend.errors import BusyError
from celestial_backend.jobs.processes import is_alive, is_dead
from celestial_backend.models.manifest import Manifest
from celestial_backend.settings import is_project

WRITE_S = 0.7  # how long an operation waits for another one: Label Studio gives /webhook one second
LEASE_S = 20.0  # after its last sign of life, a worker is taken for dead
WAITING_MAX = 100  # projects
KNOWN_MAX = 10_000  # projects
ENDED_MAX, ENDED_MAX_OF_ALL = 50, 1000  # jobs that are kept of one project, and of all
WAITING, RUNNING, PUBLISHED, KEPT, FAILED, MERGED = "waiting", "running", "published", "kept", "failed", "merged"
STATES = (WAITING, RUNNING, PUBLISHED, KEPT, FAILED, MERGED)
NO_LIMIT = 2**62
# Of another project of the same number; one that was forgotten has left them. All but the first are the room trust's.
STRANGE = tuple(
    f"DELETE FROM {table} WHERE project = :project AND made != :made AND (:new = 1 OR made != '')"  # noqa: S608 - ours
    for table in ("live", "unshown", "places", "audits")
)
PRUNE = """
DELETE FROM work WHERE id != :ended AND (
    seq IN (SELECT seq FROM work WHERE state NOT IN ('waiting', 'running')
            AND project = (SELECT project FROM work WHERE id = :ended)
            ORDER BY seq DESC LIMIT :no_limit OFFSET :of_one)
    OR seq IN (SELECT seq FROM work WHERE state NOT IN ('waiting', 'running')
               ORDER BY seq DESC LIMIT :no_limit OFFSET :of_all)
) RETURNING state
"""
CLAIM = """
UPDATE work SET state = 'running', token = :token, worker = :worker, lease = :lease, attempts = attempts + 1,
    started_at = :moment, progress = '{}'
WHERE state = 'waiting' AND seq = (
    SELECT MIN(seq) FROM work AS waiting WHERE state = 'waiting' AND project = COALESCE(CAST(:project AS TEXT), project)
    AND NOT EXISTS (SELECT 1 FROM work AS other WHERE other.project = waiting.project AND other.state = 'running')
) RETURNING *
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
        token: Of the lease under which it runs; whoever has it may write of the job.
        worker: Who runs it, or ran it last.
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
    token: str = field(default="", repr=False)
    worker: str = ""

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
class Ending:
    """
    How a job ends.

    Attributes:
        state: One that an ended job has.
        reason: A sentence for people.
        manifest: What is told of its model, if it has made one.
        gone: Whether Label Studio does not have the project any more.
    """

    state: str
    reason: str
    manifest: Manifest = field(default_factory=Manifest)
    gone: bool = False


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
        event_at: When the last event of its webhook came, in seconds since 1970; None if none has.
        made: When it was made, as `settings.project_parts` gives it; "" if Label Studio has not said so.
        doubted: A request told of a project of the same number that was made at another time.
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
    event_at: float | None = None
    made: str = ""
    doubted: bool = False

    @property
    def hindrance(self) -> str:
        """Why no training begins by itself, as a sentence; "" if nothing hinders it, or it is not known."""
        return self.brought or self.missing or ""


class Ledger:
    """
    The jobs and the labels of all projects; safe between threads, processes and machines, and across a fork.

    All methods raise `StateError` where the database cannot be used; nothing was accepted then.
    """

    def __init__(self, database: Database, wait_s: float = WRITE_S) -> None:
        self._database = database
        self._wait_s = wait_s

    def request(self, project: str, *, pressed: bool = False) -> Job:
        """
        The job that will do what is asked for: a new one, or the one that waits already.

        Args:
            project: Label Studio's number of it.
            pressed: A person asks, which is remembered.

        Raises:
            BusyError: As many projects wait as may; nothing was accepted.
        """
        with self._writing(project) as work:
            if _is_full(work, project):
                raise BusyError(
                    f"{WAITING_MAX} projects wait for a training, and no more may, so this request was not accepted."
                    " Look at them with: python -m celestial_backend jobs. Ask again when some have ended."
                )
            _know(work, project)
            found = work.row(
                "UPDATE work SET requests = requests + 1 WHERE project = :project AND state = 'waiting' RETURNING *",
                project=project,
            )
            if pressed:  # only now: `start` changes the job before the project too, and would wait for who waits for it
                work.run("UPDATE projects SET pressed = 1, brought = '' WHERE project = :project", project=project)
            return _job(found) if found else _new(work, project)

    def note_labels(self, project: str, count: int, wanted: Callable[[Known], bool]) -> bool:
        """
        Add labels to a project's count, and say whether its labels are to be looked at, as `wanted` finds.

        It decides within the transaction, and must be quick.
        """
        with self._writing(project) as work:
            _know(work, project)
            counted = (
                "UPDATE projects SET labels = labels + :count, event_at = :moment WHERE project = :project RETURNING *"
            )
            row = work.row(counted, count=count, moment=time.time(), project=project)
            if row is None or not wanted(_known(row)):
                return False
            work.run("UPDATE projects SET look = 1 WHERE project = :project", project=project)
            return True

    def note_event(self, project: str, *, look: bool) -> bool:
        """Remember that an event of a project's webhook came just now; False if the project is not known."""
        noted = "UPDATE projects SET event_at = :moment, look = CASE WHEN :look = 1 THEN 1 ELSE look END"
        with self._writing(project) as work:
            values = {"moment": time.time(), "look": int(look), "project": project}
            return work.run(f"{noted} WHERE project = :project", **values) == 1

    def looks(self, *, wanted: bool) -> list[str]:
        """The projects, those first that were looked at longest ago; of them all, or those where a look is wanted."""
        order = "SELECT project FROM projects WHERE look >= :wanted ORDER BY looked_at, seq"
        # Releases before `is_project` wrote down whatever a request named.
        return [row["project"] for row in self._database.rows(order, wanted=int(wanted)) if is_project(row["project"])]

    def look(self, project: str) -> Known | None:
        """Begin to look at a project: what is known of it; None if it is not known itself, or somebody looks at it."""
        begun = (
            "UPDATE projects SET look = 0, looked_at = :moment, looking = :lease WHERE project = :project"
            " AND NOT looking BETWEEN :now AND :lease RETURNING *"
        )
        with self._writing(project) as work:
            now = work.now()
            row = work.row(begun, moment=time.time(), now=now, lease=now + LEASE_S, project=project)
            return _known(row) if row else None

    def let_look(self, project: str) -> None:
        """Let others look at a project."""
        with self._writing(project) as work:
            work.run("UPDATE projects SET looking = 0 WHERE project = :project", project=project)

    def looked(self, project: str, *, labels: int, missing: str, brought: str) -> None:
        """Write down what a look has found; see `Known`."""
        found = "UPDATE projects SET labels = :labels, missing = :missing, brought = :brought WHERE project = :project"
        with self._writing(project) as work:
            work.run(found, labels=labels, missing=missing, brought=brought, project=project)

    def trained(self, project: str, labels: int, moment: str) -> None:
        """Remember the labels that there are when a training begins; see `Known`."""
        mark = "UPDATE projects SET trained_labels = :labels, trained_at = :moment WHERE project = :project"
        with self._writing(project) as work:
            work.run(mark, labels=labels, moment=moment, project=project)

    def known(self, project: str) -> Known | None:
        """What is known of a project; None if it is not known itself."""
        row = self._database.row("SELECT * FROM projects WHERE project = :project", project=project)
        return _known(row) if row else None

    def hindered(self, project: str | None = None, limit: int = NO_LIMIT) -> list[Known]:
        """Projects that do not train by themselves, with no job that waits or runs; one of them or all, by number."""
        hindered = (
            "SELECT * FROM projects WHERE (missing != '' OR brought != '')"
            " AND project = COALESCE(CAST(:project AS TEXT), project) AND NOT EXISTS"
            " (SELECT 1 FROM work WHERE work.project = projects.project AND state IN ('waiting', 'running'))"
            " ORDER BY LENGTH(project), project LIMIT :limit"
        )
        rows = self._database.rows(hindered, project=project, limit=limit)
        return [_known(row) for row in rows if is_project(row["project"])]

    def start(self, worker: str, project: str | None = None) -> Job | None:
        """
        The job that has waited longest, which runs from now on under a lease of the worker's; None if none can run.

        Args:
            worker: Its name.
            project: The only one whose job is wanted.
        """
        with self._writing("start") as work:
            lease = work.now() + LEASE_S
            found = work.row(CLAIM, token=secrets.token_hex(8), worker=worker, lease=lease, moment=time.time(),
                             project=project)  # fmt: skip
            if found is None:
                return None
            begun = "UPDATE projects SET labels = 0, trained_labels = NULL, trained_at = NULL WHERE project = :project"
            work.run(begun, project=found["project"])
            return _job(found)

    def show_life(self, worker: str, jobs: Iterable[Job] = ()) -> list[Job]:
        """
        A sign of life: of a worker, and of the jobs that it runs.

        Returns:
            Those that are not its own any more: it was taken for dead, or they have ended.
        """
        sign = (
            "INSERT INTO workers (name, lease) VALUES (:worker, :lease)"
            " ON CONFLICT (name) DO UPDATE SET lease = excluded.lease"
        )
        renew = "UPDATE work SET lease = :lease WHERE id = :id AND state = 'running' AND token = :token"
        with self._writing(f"worker {worker}") as work:
            now = work.now()
            work.run("DELETE FROM workers WHERE lease < :now", now=now - LEASE_S)
            work.run(sign, worker=worker, lease=now + LEASE_S)
            return [job for job in jobs if not work.run(renew, lease=now + LEASE_S, id=job.id, token=job.token)]

    def leave(self, worker: str) -> None:
        """Forget a worker that ends."""
        with self._writing(f"worker {worker}") as work:
            work.run("DELETE FROM workers WHERE name = :worker", worker=worker)

    def workers(self) -> int:
        """How many workers have shown that they live."""
        now = self._database.now()
        rows = self._database.rows("SELECT name, lease FROM workers")
        return sum(_lasts(row["lease"], now) and not is_dead(row["name"]) for row in rows)

    def works_here(self) -> bool:
        """Whether a worker of this machine, or of this container, shows that it lives."""
        now = self._database.now()
        rows = self._database.rows("SELECT name, lease FROM workers")
        return any(_lasts(row["lease"], now) and is_alive(row["name"]) for row in rows)

    def lost(self) -> list[Job]:
        """The jobs that are said to run, and whose workers have ended, or shown no life for too long."""
        running = self._database.rows("SELECT * FROM work WHERE state = 'running' ORDER BY seq")
        now = self._database.now() if running else 0.0
        return [_job(row) for row in running if _is_lost(row, now)]

    def progress(self, job: Job, **where: Any) -> None:
        """Write down where a running job is."""
        put = "UPDATE work SET progress = :where WHERE id = :id AND state = 'running' AND token = :token"
        with self._writing(job.project) as work:
            work.run(put, where=json.dumps(where), id=job.id, token=job.token)

    def end(
        self, job: Job, ending: Ending, within: Callable[[Transaction], Ending] | None = None, *, lost: bool = False
    ) -> Ending | None:
        """
        End a running job.

        Args:
            job: As it was started.
            ending: How it ends, unless `within` says otherwise.
            within: Does in the same transaction what goes with it, such as to publish, and says how the job ends then.
            lost: Its worker is taken for dead, and it ends only if that still holds.

        Returns:
            How it ended; None if it is not this lease's any more, and nothing changes then.
        """
        with self._writing(job.project) as work:
            if _held(work, job, lost=lost) is None:
                return None
            ended = within(work) if within else ending
            outcome = ended.manifest.plain() | ({"gone": True} if ended.gone else {})
            work.run(
                "UPDATE work SET state = :state, reason = :reason, outcome = :outcome, ended_at = :moment,"
                " told = :told, lease = :lease WHERE id = :id",
                state=ended.state, reason=ended.reason, outcome=json.dumps(outcome), moment=time.time(),
                told=int(ended.state != PUBLISHED), lease=work.now() + LEASE_S, id=job.id,
            )  # fmt: skip
            _prune(work, job.id)
            return ended

    def untold(self) -> list[Job]:
        """The jobs that have published, and of which Label Studio has not been told in as long as a lease lasts."""
        rows = self._database.rows("SELECT * FROM work WHERE state = 'published' AND told = 0 ORDER BY seq")
        now = self._database.now() if rows else 0.0
        return [_job(row) for row in rows if not _lasts(row["lease"], now)]

    def told(self, job: Job, said: str) -> None:
        """Remember that Label Studio was told of a job's model, or cannot be, and what came of that, for people."""
        put = "UPDATE work SET told = 1, reason = reason || :said WHERE id = :id AND told = 0"
        with self._writing(job.project) as work:
            work.run(put, said=f" {said}" if said else "", id=job.id)

    def give_back(self, job: Job, *, begun: bool = True, lost: bool = False) -> bool:
        """
        Let a running job wait again; where another one waits by now, that one does its work.

        Args:
            job: As it was started.
            begun: Whether this attempt counts.
            lost: As for `end`.

        Returns:
            False if it is not this lease's any more, and nothing changes then.
        """
        with self._writing(job.project) as work:
            held = _held(work, job, lost=lost)
            if held is None:
                return False
            other = work.row("SELECT id FROM work WHERE project = :project AND state = 'waiting'", project=job.project)
            if other:
                work.run(
                    "UPDATE work SET state = 'merged', reason = :reason, outcome = :outcome, ended_at = :moment"
                    " WHERE id = :id",
                    reason=f"It was interrupted, and job {other['id']} does its work.",
                    outcome=json.dumps({"job": other["id"]}), moment=time.time(), id=job.id,
                )  # fmt: skip
                work.run(
                    "UPDATE work SET requests = requests + :requests, attempts = :attempts WHERE id = :id",
                    requests=held["requests"], attempts=held["attempts"] - (not begun), id=other["id"],
                )  # fmt: skip
                _prune(work, job.id)
            else:
                work.run(
                    "UPDATE work SET state = 'waiting', token = '', attempts = attempts - :none, progress = '{}',"
                    " started_at = NULL WHERE id = :id",
                    none=int(not begun), id=job.id,
                )  # fmt: skip
            return True

    def job(self, job_id: str) -> Job | None:
        """A job by its id."""
        found = self._database.row("SELECT * FROM work WHERE id = :id", id=job_id)
        return _job(found) if found else None

    def doing(self, job_id: str) -> Job | None:
        """The job that does what one was asked to do: itself, or the one that it was merged into."""
        job = self.job(job_id)
        while job is not None and job.merged_into is not None:
            job = self.job(job.merged_into)
        return job

    def jobs(self, project: str | None = None, states: tuple[str, ...] = STATES, limit: int = NO_LIMIT) -> list[Job]:
        """The jobs of one project or of all, in some states or in any, the newest first, whatever the clock said."""
        values: dict[str, Any] = {f"state{number}": state for number, state in enumerate(states)}
        marks = ", ".join(f":{name}" for name in values)
        mine = " AND project = :project" if project else ""
        order = f"SELECT * FROM work WHERE state IN ({marks}){mine} ORDER BY seq DESC LIMIT :limit"  # noqa: S608 - marks
        values |= {"limit": limit} | ({"project": project} if project else {})
        rows = self._database.rows(order, **values)
        return [_job(row) for row in rows]

    def counts(self) -> dict[str, int]:
        """How many jobs of all projects are in each of the states, 0 and those that were pruned included."""
        counted = self._database.rows(
            "SELECT state, CAST(SUM(jobs) AS INTEGER) AS jobs FROM"
            " (SELECT state, 1 AS jobs FROM work UNION ALL SELECT state, jobs FROM pruned) AS each GROUP BY state"
        )
        return dict.fromkeys(STATES, 0) | {row["state"]: row["jobs"] for row in counted}

    def know(self, project: str) -> bool:
        """Remember that a project works with this backend; False if that would be one too many."""
        with self._writing(project) as work:
            return _know(work, project)

    def doubt(self, project: str) -> None:
        """Let Label Studio be asked whether a project is still the one that is known."""
        with self._writing(project) as work:
            work.run("UPDATE projects SET doubted = 1, look = 1 WHERE project = :project", project=project)

    def confirm(self, project: str, made: str, by: str = "") -> bool:
        """
        Remember when a project was made, as Label Studio says.

        Args:
            project: Its number.
            made: As `settings.project_parts` gives it.
            by: The job that asked, if one did.

        Returns:
            Whether it is another project than the one that was known by its number. That one's live model is not
            live any more, what its people were not shown is removed, a job that may have read its labels has lost its
            lease and is begun again, and nothing is known of the new one's labels.
        """
        with self._writing(project) as work:
            _know(work, project)
            mine = "SELECT made FROM projects WHERE project = :project"
            before = (work.row(mine, project=project) or {"made": made})["made"]
            new = before not in ("", made)
            forgotten = (
                "UPDATE projects SET labels = 0, read_until = NULL, trained_labels = NULL, trained_at = NULL,"
                " pressed = 0, look = 1, missing = NULL, brought = '' WHERE project = :project"
            )
            put = "UPDATE projects SET made = :made, doubted = 0 WHERE project = :project"
            work.run(put, made=made, project=project)
            for old in STRANGE:
                work.run(old, project=project, new=int(new), made=made)
            if new:
                lost = "UPDATE work SET token = '' WHERE project = :project AND state = 'running' AND id != :by"
                work.run(lost, project=project, by=by)
                work.run(forgotten, project=project)
            else:
                work.run("UPDATE live SET made = :made WHERE project = :project AND made = ''", made=made,
                         project=project)  # fmt: skip
            return new

    def knows(self, project: str) -> bool:
        """Whether a project is remembered, or has a job."""
        one = "SELECT 1 FROM projects WHERE project = :project UNION ALL SELECT 1 FROM work WHERE project = :project"
        return self._database.row(one, project=project) is not None

    def forget(self, project: str) -> None:
        """Forget a project that is gone; its jobs, its model and what its people were not shown stay."""
        with self._writing(project) as work:
            work.run("DELETE FROM projects WHERE project = :project", project=project)

    def read_until(self, project: str, moment: str) -> None:
        """Remember the newest label that a training of the project has read."""
        with self._writing(project) as work:
            _know(work, project)
            put = "UPDATE projects SET read_until = :moment WHERE project = :project"
            work.run(put, moment=moment, project=project)

    def projects(self) -> dict[str, str | None]:
        """The projects that are known, and the moment of the newest label that a training has read."""
        rows = self._database.rows("SELECT project, read_until FROM projects ORDER BY project")
        # Releases before `is_project` wrote down whatever a request named.
        return {row["project"]: row["read_until"] for row in rows if is_project(row["project"])}

    def _writing(self, key: str) -> AbstractContextManager[Transaction]:
        return self._database.writing(key, self._wait_s)


def _held(work: Transaction, job: Job, *, lost: bool) -> Row | None:
    """A running job whose lease is the one of this start, and which has run out if it is said to be lost."""
    running = "SELECT * FROM work WHERE id = :id AND state = 'running' AND token = :token"
    found = work.row(running, id=job.id, token=job.token)
    return None if found is None or (lost and not _is_lost(found, work.now())) else found


def _is_lost(running: Row, now: float) -> bool:
    return not _lasts(running["lease"], now) or is_dead(running["worker"])


def _lasts(lease: float, now: float) -> bool:
    """Whether a lease has not run out; one that would last longer than they do is of a clock that was moved back."""
    return now <= lease <= now + 2 * LEASE_S


def _new(work: Transaction, project: str) -> Job:
    job = Job(secrets.token_hex(4), project, WAITING, 1, 0, time.time())
    values = {name: json.dumps(value) if isinstance(value, dict) else value for name, value in asdict(job).items()}
    marks = ", ".join(f":{name}" for name in values)
    work.run(f"INSERT INTO work ({', '.join(values)}) VALUES ({marks})", **values)  # noqa: S608 - our own names
    return job


def _know(work: Transaction, project: str) -> bool:
    """Remember a project, unless it is one too many; whether it is remembered."""
    if work.row("SELECT 1 FROM projects WHERE project = :project", project=project):
        return True
    add = (
        "INSERT INTO projects (project) SELECT CAST(:project AS TEXT) WHERE (SELECT COUNT(*) FROM projects) < :most"
        " ON CONFLICT (project) DO NOTHING"
    )
    return work.run(add, project=project, most=KNOWN_MAX) == 1


def _is_full(work: Transaction, project: str) -> bool:
    """Whether a job of the project would be one too many; one that waits already takes every request."""
    waiting = work.rows("SELECT project FROM work WHERE state = 'waiting'")
    return len(waiting) >= WAITING_MAX and project not in {row["project"] for row in waiting}


def _prune(work: Transaction, ended: str) -> None:
    """Remove the oldest ended jobs but for the one that has just ended, and keep their number."""
    bounds = {"of_one": ENDED_MAX, "of_all": ENDED_MAX_OF_ALL, "no_limit": NO_LIMIT}
    removed = Counter(row["state"] for row in work.rows(PRUNE, ended=ended, **bounds))
    add = (
        "INSERT INTO pruned (state, jobs) VALUES (:state, :jobs)"
        " ON CONFLICT (state) DO UPDATE SET jobs = pruned.jobs + excluded.jobs"
    )
    for state, jobs in sorted(removed.items()):  # in one order, so that nobody waits for who waits for him
        work.run(add, state=state, jobs=jobs)


def _job(row: Row) -> Job:
    values = {each.name: row[each.name] for each in fields(Job)}
    return Job(**values | {name: json.loads(row[name]) for name in ("progress", "outcome")})


def _known(row: Row) -> Known:
    values = {each.name: row[each.name] for each in fields(Known)}
    return Known(**values | {name: bool(row[name]) for name in ("pressed", "look", "doubted")})
