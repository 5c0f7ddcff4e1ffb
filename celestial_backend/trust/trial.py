"""
What people are shown of the predictor's answers: the pre-label, or for some tasks, drawn at random, none.

What pre-labels do to those who label is told by comparing the two kinds of tasks. So a task's arm must be drawn by
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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from celestial_backend.database import Database, Row, Transaction
from celestial_backend.errors import StateError
from celestial_backend.settings import Settings, project_parts

logger = logging.getLogger(__name__)

WITHHELD, AUDITED, PLANTED = "withheld", "audited", "planted"  # why people do not see what the model says
ASK_AGAIN_S = 2.0  # between two looks at the audits of a project
KEY = "arms of tasks"  # its name in the database
KEEP = """INSERT INTO unshown (project, task, version, made, arm, said, score, at)
    VALUES (:project, :task, :version, :made, :arm, :said, :score, :at)
    ON CONFLICT (project, task, version) DO UPDATE
    SET made = excluded.made, arm = excluded.arm, said = excluded.said, score = excluded.score,
    at = CASE WHEN unshown.made = excluded.made THEN unshown.at ELSE excluded.at END"""


@dataclass(frozen=True)
class Unshown:
    """
    What a model said of a task and people were not shown.

    Attributes:
        version: The model's tag.
        arm: `WITHHELD` at random, `AUDITED` as people are to label it blind, or `PLANTED`: a wrong one was shown.
        said: The regions, as the predictor gave them.
        score: The prediction's.
        at: When it was held back first, in seconds since 1970.
        made: When the project was made, as `settings.project_parts` gives it; "" if that was not known.
    """

    task: int
    version: str
    arm: str
    said: list[dict[str, Any]]
    score: float
    at: float
    made: str = ""


class Trial:
    """Decides what is shown, and keeps what is not; lives as long as the process, safe between threads."""

    def __init__(self, settings: Settings, database: Database) -> None:
        self._database = database
        self._share = settings.control_share
        self._key: bytes | None = None
        self._audited: dict[str, tuple[float, frozenset[int]]] = {}  # when the database is asked again, and the tasks

    def shown(self, tasks: Sequence[Any], answers: Sequence[Any], project: str) -> list[Any]:
        """
        The predictor's answers as people may see them; what is held back is written down first.

        In place of a pre-label that is held back stands an empty one with the same score, so that neither the order
        of the tasks nor a score tells which they are.

        Args:
            tasks: As Label Studio sends them.
            answers: As many, of `Predictor.predict`.
            project: As Label Studio sends it; without a number nothing is held back.

        Raises:
            StateError: Nothing was ever read of the database, so nobody knows what is to be held back.
        """
        number, made = project_parts(project)
        if not number:
            return list(answers)
        audited = self.audited(number)
        if not (self._share or audited):
            return list(answers)
        found, kept = list(answers), list[Unshown]()
        for place, (task, answer) in enumerate(zip(tasks, answers, strict=True)):
            task_id = task.get("id") if isinstance(task, Mapping) else None
            if not answer or not answer["result"] or not isinstance(task_id, int):
                continue
            arm = AUDITED if task_id in audited else self.arm(number, task_id)
            if arm:
                version, said, score = answer["model_version"], answer["result"], answer["score"]
                kept.append(Unshown(task_id, version, arm, said, score, time.time(), made))
                found[place] = {**answer, "result": []}
        if kept:
            try:
                self.keep(number, kept)
            except StateError as error:  # the models are kept, so that it can be asked for again
                logger.warning("Project %s: what is held back of %d tasks is not kept: %s", number, len(kept), error)
        return found

    def arm(self, number: str, task: int) -> str:
        """
        `WITHHELD`, or "" for a task that is shown with its pre-label.

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
            self._key = self._read_key()
        digest = hmac.digest(self._key, f"{purpose}\n{number}\n{task}".encode(), hashlib.sha256)
        return int.from_bytes(digest[:8]) / 2**64

    def audited(self, number: str) -> frozenset[int]:
        """The tasks of an open audit of a project; of the last seconds, or from before the database went away."""
        again, known = self._audited.get(number, (0.0, frozenset[int]()))
        if time.monotonic() < again:
            return known
        wanted = """SELECT task FROM unshown WHERE project = :project AND arm = :arm
            AND EXISTS (SELECT 1 FROM audits WHERE audits.project = :project AND state = 'open'
            AND audits.version = unshown.version)"""
        try:
            known = frozenset(int(row["task"]) for row in self._database.rows(wanted, project=number, arm=AUDITED))
        except StateError as error:
            logger.debug("%s", error)
        self._audited[number] = time.monotonic() + ASK_AGAIN_S, known
        return known

    def keep(self, number: str, unshown: Iterable[Unshown], within: Transaction | None = None) -> None:
        """
        Write down what is not shown.

        Raises:
            StateError: That cannot be done.
        """
        if within is None:
            with self._database.writing(f"unshown {number}") as transaction:
                self.keep(number, unshown, transaction)
            return
        for each in unshown:
            within.run(KEEP, project=number, task=each.task, version=each.version, made=each.made, arm=each.arm,
                       said=json.dumps(each.said), score=each.score, at=each.at)  # fmt: skip

    def kept(self, number: str, made: str = "") -> list[Unshown]:
        """
        What was not shown of a project, the oldest first.

        Args:
            number: Of the project.
            made: When it was made; what belongs to another project of the same number is left out.

        Raises:
            StateError: The database cannot be read.
        """
        rows = self._database.rows("SELECT * FROM unshown WHERE project = :project ORDER BY at, task", project=number)
        return [_read(row) for row in rows if not made or row["made"] in ("", made)]

    def _read_key(self) -> bytes:
        get = "SELECT value FROM secrets WHERE name = :name"
        row = self._database.row(get, name=KEY)
        if row is None:
            with self._database.writing(KEY) as transaction:
                put = "INSERT INTO secrets (name, value) VALUES (:name, :value) ON CONFLICT (name) DO NOTHING"
                transaction.run(put, name=KEY, value=secrets.token_hex(32))
                row = transaction.row(get, name=KEY)
        return bytes.fromhex(row["value"]) if row else b""


def _read(row: Row) -> Unshown:
    return Unshown(
        int(row["task"]), row["version"], row["arm"], json.loads(row["said"]), row["score"], row["at"], row["made"]
    )
