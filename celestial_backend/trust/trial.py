"""
What people are shown of the predictor's answers: the pre-label, or for tasks that are drawn none, or a wrong one.

What pre-labels do to those who label is told by comparing these tasks with the others. So a task's arm must be drawn by
chance, be the same for all models and processes, and be guessed by nobody: it comes of a keyed hash of project and
task, whose key lies in the database. What was held back lies there too.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from typing import Any

from celestial_backend.database import Database, Row, Transaction
from celestial_backend.errors import StateError
from celestial_backend.settings import Settings, project_parts

logger = logging.getLogger(__name__)

WITHHELD, AUDITED, PLANTED = "withheld", "audited", "planted"  # why people do not see what the model says
ASK_AGAIN_S, AWAY_S = 2.0, 10.0  # between two looks at the open audits, and after one that failed
WARN_S = 60.0
KEY = "arms of tasks"  # its name in the database
# `prelabel` knows a project by its number alone. What was drawn for an audit stays that, whatever is predicted later.
KEEP = """INSERT INTO unshown (project, task, version, made, arm, said, shown, score, at) VALUES
    (:project, :task, :version, COALESCE(NULLIF(CAST(:made AS TEXT), ''), (SELECT projects.made FROM projects
    WHERE projects.project = :project), ''), :arm, :said, :shown, :score, :at)
    ON CONFLICT (project, task, version, made) DO UPDATE SET said = excluded.said, shown = excluded.shown,
    arm = CASE WHEN excluded.arm = 'withheld' AND unshown.arm = 'audited' THEN unshown.arm ELSE excluded.arm END,
    score = excluded.score, removed_at = NULL"""
# Without a moment, that of the project as it is known now.
OF_PROJECT = """unshown.project = :project AND (unshown.made = '' OR unshown.made = COALESCE(NULLIF(CAST(:made AS TEXT),
    ''), (SELECT NULLIF(projects.made, '') FROM projects WHERE projects.project = :project), unshown.made))"""
AUDITS = """SELECT unshown.project, unshown.task, unshown.made FROM audits JOIN unshown
    ON unshown.project = audits.project AND unshown.version = audits.version AND unshown.arm = 'audited'
    WHERE audits.state = 'open'"""
Regions = list[dict[str, Any]]
Wrong = Callable[[Any, Any], Regions]  # a task and its answer -> regions with a likely wrong choice; none without any


@dataclass(frozen=True)
class Unshown:
    """
    What a model said of a task and people were not shown.

    Attributes:
        version: The model's tag.
        arm: `WITHHELD` at random, `AUDITED` as people are to label it blind, or `PLANTED`: a wrong one was shown.
        said: The regions, as the predictor gave them.
        score: The prediction's, which people were shown.
        at: When it was held back first, in seconds since 1970.
        made: When the project was made, as `settings.project_parts` gives it; "" if that was not known.
        shown: The regions that stood in their place; none but for `PLANTED`.
        removed_at: When `removed` was told that Label Studio does not show them any more; None before.
    """

    task: int
    version: str
    arm: str
    said: Regions
    score: float
    at: float
    made: str = ""
    shown: Regions = field(default_factory=list)
    removed_at: float | None = None


class Trial:
    """Decides what is shown, and keeps what is not; lives as long as the process, safe between threads."""

    def __init__(self, settings: Settings, database: Database) -> None:
        self._database = database
        self._share = settings.control_share
        self._planted = settings.planted_share
        self._key: bytes | None = None
        self._audited: dict[str, list[tuple[int, str]]] = {}  # project -> tasks of open audits, and when it was made
        self._look_again = self._warn_again = 0.0  # on the monotonic clock

    def shown(
        self, tasks: Sequence[Any], answers: Sequence[Any], project: str, wrong: Wrong = lambda *_: []
    ) -> list[Any]:
        """
        The predictor's answers as people may see them; what is held back is written down first.

        In place of a pre-label that is held back stands an empty one with the same score, so that neither the order
        of the tasks nor a score tells what it was. Where it cannot be written down there is no answer, so that Label
        Studio keeps none and asks again.

        Args:
            tasks: As Label Studio sends them.
            answers: As many, of `Predictor.predict`.
            project: As Label Studio sends it; without a number nothing is held back.
            wrong: Asked for the tasks that are to get a wrong pre-label.

        Raises:
            StateError: The key was never read, so nobody knows what is to be held back.
        """
        number, made = project_parts(project)
        audited = self.audited(number, made) if number else frozenset()
        if not number or not (self._share or self._planted or audited):
            return list(answers)
        found, kept = list(answers), dict[int, Unshown]()
        for place, (task, answer) in enumerate(zip(tasks, answers, strict=True)):
            task_id = number_of(task)
            if task_id is None or not answer or not answer["result"]:
                continue
            arm, shown = AUDITED if task_id in audited else self.arm(number, task_id), Regions()
            if not arm and self._planted and self.drawn(number, task_id, PLANTED) < self._planted:
                shown = wrong(task, answer)
                arm = PLANTED if shown else ""
            if arm:
                kept[place] = Unshown(task_id, answer["model_version"], arm, answer["result"], answer["score"],
                                      time.time(), made, shown)  # fmt: skip
                found[place] = {**answer, "result": shown}
        try:
            self.keep(number, kept.values())
        except StateError as error:
            self._warn(number, len(kept), error)
            return [[] if place in kept else answer for place, answer in enumerate(found)]
        return found

    def arm(self, number: str, task: int) -> str:
        """
        `WITHHELD`, or "" for a task that is shown with a pre-label.

        Raises:
            StateError: The key cannot be read and never was.
        """
        return WITHHELD if self._share and self.drawn(number, task) < self._share else ""

    def drawn(self, number: str, task: int, purpose: str = "control") -> float:
        """
        A number from 0 to 1 that chance gave a task, always the same; for each purpose another one.

        Raises:
            StateError: As for `arm`.
        """
        if self._key is None:
            try:
                self._key = self._read_key()
            except StateError as error:
                raise StateError(f"Which tasks get no pre-label cannot be drawn without its key. {error}") from error
        digest = hmac.digest(self._key, f"{purpose}\n{number}\n{task}".encode(), hashlib.sha256)
        return int.from_bytes(digest[:8]) / 2**64

    def audited(self, number: str, made: str = "") -> frozenset[int]:
        """The tasks of an open audit of a project; of the last seconds, or from before the database went away."""
        now = time.monotonic()
        if now >= self._look_again:
            self._look_again, pause = now + AWAY_S, ASK_AGAIN_S  # meanwhile others go on with what is known
            try:
                found: dict[str, list[tuple[int, str]]] = {}
                for row in self._database.rows(AUDITS):
                    found.setdefault(row["project"], []).append((int(row["task"]), row["made"]))
                self._audited = found
            except StateError as error:
                logger.debug("%s", error)
                pause = AWAY_S
            self._look_again = time.monotonic() + pause
        known = self._audited.get(number)
        return frozenset(task for task, of in known if not (made and of) or of == made) if known else frozenset()

    def keep(self, number: str, unshown: Iterable[Unshown], within: Transaction | None = None) -> None:
        """
        Write down what is not shown.

        Raises:
            StateError: That cannot be done, and nothing was written.
        """
        rows: list[dict[str, Any]] = [
            {"project": number, "task": each.task, "version": each.version, "made": each.made, "arm": each.arm,
             "said": json.dumps(each.said), "shown": json.dumps(each.shown), "score": float(each.score), "at": each.at}
            for each in unshown
        ]  # fmt: skip
        if not rows:
            return
        with nullcontext(within) if within else self._database.writing(f"unshown {number}") as transaction:
            transaction.run_all(KEEP, sorted(rows, key=lambda row: row["task"]))

    def kept(self, number: str, made: str = "") -> list[Unshown]:
        """
        What was not shown of a project, the oldest first.

        Args:
            number: Of the project.
            made: When it was made, if that is known better than from the database; what belongs to another project
                of the same number is left out.

        Raises:
            StateError: The database cannot be read.
        """
        select = f"SELECT * FROM unshown WHERE {OF_PROJECT} ORDER BY at, task"  # noqa: S608 - our own words
        return [_read(row) for row in self._database.rows(select, project=number, made=made)]

    def misled(self, number: str) -> frozenset[int]:
        """
        The tasks of a project in which something was planted, whether it still stands or not.

        Raises:
            StateError: The database cannot be read.
        """
        select = f"SELECT task FROM unshown WHERE {OF_PROJECT} AND arm = 'planted'"  # noqa: S608 - our own words
        return frozenset(int(row["task"]) for row in self._database.rows(select, project=number, made=""))

    def standing(self) -> dict[str, list[Unshown]]:
        """
        By project, what was planted and may still stand in Label Studio.

        Raises:
            StateError: The database cannot be read.
        """
        found: dict[str, list[Unshown]] = {}
        for row in self._database.rows("SELECT * FROM unshown WHERE arm = 'planted' AND removed_at IS NULL"):
            found.setdefault(row["project"], []).append(_read(row))
        return found

    def removed(self, number: str, planted: Iterable[Unshown]) -> None:
        """
        Remember that what was planted does not stand in Label Studio any more.

        Raises:
            StateError: That cannot be written.
        """
        put = "UPDATE unshown SET removed_at = :now WHERE project = :project AND task = :task AND version = :version"
        with self._database.writing(f"unshown {number}") as transaction:
            for each in planted:
                transaction.run(put, now=time.time(), project=number, task=each.task, version=each.version)

    def _read_key(self) -> bytes:
        get = "SELECT value FROM secrets WHERE name = :name"
        row = self._database.row(get, name=KEY)
        if row is None:
            with self._database.writing(KEY) as transaction:
                put = "INSERT INTO secrets (name, value) VALUES (:name, :value) ON CONFLICT (name) DO NOTHING"
                transaction.run(put, name=KEY, value=secrets.token_hex(32))
                (row,) = transaction.rows(get, name=KEY)
        return bytes.fromhex(row["value"])

    def _warn(self, number: str, tasks: int, error: StateError) -> None:
        now = time.monotonic()
        if now >= self._warn_again:
            self._warn_again = now + WARN_S
            logger.warning("Project %s: %d tasks get no prediction for now, as what is held back of them cannot be"
                           " written down: %s", number, tasks, error)  # fmt: skip


def number_of(task: Any) -> int | None:
    """A task's number, None without one that Label Studio can have given."""
    number = task.get("id") if isinstance(task, Mapping) else None
    return number if isinstance(number, int) and not isinstance(number, bool) and 0 <= number < 2**63 else None


def _read(row: Row) -> Unshown:
    values = {each.name: row[each.name] for each in fields(Unshown)}
    return Unshown(**values | {name: json.loads(row[name]) for name in ("said", "shown")})
