"""The audits of projects, in the database; each with all that is needed to judge it later."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, replace
from typing import Any

from celestial_backend.database import Database, Transaction
from celestial_backend.errors import StateError
from celestial_backend.trust.audit import Audit, Ranked, Round
from celestial_backend.trust.trial import Trial, Unshown

OPEN, GIVEN_UP, ACCEPTING, DONE = "open", "given up", "accepting", "done"  # states of an audit
ROWS = "SELECT * FROM audits WHERE project = :project AND made IN ('', :made) ORDER BY seq"
SHOW = """DELETE FROM unshown WHERE project = :project AND task = :task AND version = :version AND made = :made
    AND arm = 'audited'"""


class Audits:
    """The audits of a project in the database; all raise `StateError`."""

    def __init__(self, database: Database, project: str) -> None:
        self._database, self._project = database, project

    def last(self, made: str) -> tuple[Audit, dict[str, Any]] | None:
        """The newest audit, and what was accepted by it."""
        rows = self._database.rows(ROWS, project=self._project, made=made)
        if not rows:
            return None
        row, about = rows[-1], json.loads(rows[-1]["about"])
        rounds = tuple(
            Round(each["at"], tuple(map(tuple, each["drawn"])), tuple(each["among"]), each["start"],
                  frozenset(each["away"]))
            for each in about["rounds"]
        )
        audit = Audit(
            int(row["seq"]), row["version"], row["made"], row["state"], about["error"], about["confidence"],
            about["of"], about["control"], about["total"], tuple(Ranked(*each) for each in about["order"]),
            tuple(about["said"]), about["groups"], about["size"], rounds, about["looks"],
        )  # fmt: skip
        return audit, about["facts"]

    def looks(self, audit: Audit) -> int:
        """
        How often labels were judged in earlier audits of any of the same tasks and controls.

        Those that ended in a certificate count too: else one of a large share of errors would let all begin anew.
        """
        count, tasks = 0, {one.task for one in audit.order}
        for row in self._database.rows(ROWS, project=self._project, made=audit.made):
            about = json.loads(row["about"])
            same = not audit.control or about["control"] in ("", audit.control)
            if same and any(task in tasks for task, *_ in about["order"]):
                judged = row["state"] in (ACCEPTING, DONE) or about["facts"].get("judged", False)
                count += len(about["rounds"]) - (not judged)
        return count

    def add(self, audit: Audit, before: int, unshown: Callable[[Audit], list[Unshown]], trial: Trial) -> Audit:
        """
        Open an audit, and write down what people are not shown from now on.

        Args:
            audit: Without a number.
            before: The number of the one before, 0 without any.
            unshown: What people are not shown, of the audit with its number.
            trial: Keeps that.
        """
        with self._database.writing(f"audits {self._project}") as transaction:
            rows = transaction.rows(ROWS, project=self._project, made=audit.made)
            if rows and rows[-1]["seq"] != before:
                raise StateError(f"Somebody else has just drawn audit {rows[-1]['seq']}. Run finish again.")
            row = transaction.row(
                "INSERT INTO audits (project, made, version, state, at, about)"
                " VALUES (:project, :made, :version, :state, :at, :about) RETURNING seq",
                project=self._project, made=audit.made, version=audit.version, state=OPEN, at=time.time(),
                about=_written(audit, {}),
            )  # fmt: skip
            audit = replace(audit, number=int(row["seq"]) if row else 0)
            trial.keep(self._project, unshown(audit), transaction)
        return audit

    def draw_more(self, audit: Audit, unshown: list[Unshown], trial: Trial) -> None:
        """Write down another draw of an open audit."""
        with self._database.writing(f"audits {self._project}") as transaction:
            self._put(transaction, audit, OPEN, {})
            trial.keep(self._project, unshown, transaction)

    def turn(self, audit: Audit, state: str, facts: Mapping[str, Any]) -> Audit:
        """Bring an audit into another state."""
        with self._database.writing(f"audits {self._project}") as transaction:
            self._put(transaction, audit, state, facts)
        return replace(audit, state=state)

    def give_up(self, audit: Audit, unlabelled: Collection[int]) -> None:
        """End an audit without a certificate; what was judged stays known, and its other tasks are shown again."""
        with self._database.writing(f"audits {self._project}") as transaction:
            transaction.run("UPDATE audits SET state = :state WHERE seq = :seq", state=GIVEN_UP, seq=audit.number)
            rows = [{"project": self._project, "task": task, "version": audit.version, "made": audit.made}
                    for task in sorted(unlabelled)]  # fmt: skip
            if rows:
                transaction.run_all(SHOW, rows)

    def _put(self, transaction: Transaction, audit: Audit, state: str, facts: Mapping[str, Any]) -> None:
        transaction.run("UPDATE audits SET state = :state, about = :about WHERE seq = :seq",
                        state=state, about=_written(audit, facts), seq=audit.number)  # fmt: skip


def _written(audit: Audit, facts: Mapping[str, Any]) -> str:
    told = {name: getattr(audit, name) for name in
            ("error", "confidence", "of", "control", "total", "order", "said", "groups", "size", "looks")}  # fmt: skip
    rounds = [asdict(each) | {"away": sorted(each.away)} for each in audit.rounds]
    return json.dumps(told | {"rounds": rounds, "facts": facts})
