"""
An audit: which tasks people label blind, and how much may be accepted of what they did not see.

The predictions are sorted by their scores into groups of the same size, and as many tasks are drawn by chance from
each. From the surest group down, more is accepted as long as few enough faults were found (fixed-sequence testing,
Angelopoulos et al., arXiv 2110.01052). Nothing is assumed of the scores, but that better ones first let more pass.

What is claimed is a share of the tasks themselves, and not of all pictures that might have come. Of W wrong
predictions in some groups, each is drawn with a chance of at least s, and the draws of one group exclude each other.
So the number of faults found is a sum of independent trials whose mean is sW or more, and "at most k" is no likelier
than for W trials of chance s, or for n of chance sW / n, as long as k <= sW - 1 (Hoeffding, 1956, theorem 4).

Audits lie in the database, each with all that is needed to judge it later.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from celestial_backend.database import Database, Transaction
from celestial_backend.errors import StateError
from celestial_backend.trust.trial import Trial, Unshown

ACCEPTED, ALL = "accepted", "all"  # of what a share of errors is stated
FIRST_LOOK = 0.9  # of the risk, for the labels that were drawn at once; all later looks share the rest
GROUPS = range(8, 21)
SIZES = 1.0, 1.2, 1.5, 1.8, 2.2, 2.7, 3.3, 4.0, 5.0  # that are weighed, in the least number of tasks
ROUNDS_MAX = 6  # draws that are thought ahead; each doubles what was drawn
PESSIMISM = 1.5  # by which predictions are taken to be worse for each look that has brought nothing
STILL_OPEN = 0.9  # of the other tasks, when the labels are judged: people go on labelling
LEAST_RATE = 0.2  # of the stated error: no prediction is planned to be surer than that
Counts = NDArray[np.floating]
OPEN, GIVEN_UP, ACCEPTING, DONE = "open", "given up", "accepting", "done"  # states of an audit
ROWS = "SELECT * FROM audits WHERE project = :project AND made IN ('', :made) ORDER BY seq"
SHOW = """DELETE FROM unshown WHERE project = :project AND task = :task AND version = :version AND made = :made
    AND arm = 'audited'"""


class Ranked(NamedTuple):
    """A task with a prediction; `said` numbers what was said, in the list of an audit."""

    task: int
    score: float
    said: int


@dataclass(frozen=True)
class Round:
    """
    What was drawn at one time.

    Attributes:
        at: Seconds since 1970.
        drawn: The tasks, by group.
        among: Of how many, by group.
        start: The first group at which it is looked, counted from 0: it and those above are accepted together, or none.
        away: Tasks that could not be drawn then, as they were not open; none of them can be accepted later.
    """

    at: float
    drawn: tuple[tuple[int, ...], ...]
    among: tuple[int, ...]
    start: int
    away: frozenset[int] = frozenset()

    @property
    def tasks(self) -> list[int]:
        """All that were drawn."""
        return [task for group in self.drawn for task in group]


@dataclass(frozen=True)
class Audit:
    """
    An audit as it was drawn, with all that is needed to judge it later, whatever model is live then.

    Attributes:
        number: Of the row in the database.
        version: The model's tag.
        made: When the project was made, as `settings.project_parts` gives it.
        state: See `audits`.
        error: The share that may be wrong.
        confidence: With which that is to hold.
        of: `ACCEPTED`, or `ALL` tasks that were open.
        control: The only one that counts, or "" for all.
        total: Tasks that were open at the draw, those without a prediction included.
        order: Tasks with a prediction, the surest first; equal scores in an order of chance.
        said: What was said, by control.
        groups: How many.
        size: Of the first draw.
        rounds: The first draw, and those that followed.
        looks: How often labels were judged in earlier audits of any of these tasks.
    """

    number: int
    version: str
    made: str
    state: str
    error: float
    confidence: float
    of: str
    control: str
    total: int
    order: tuple[Ranked, ...]
    said: tuple[Mapping[str, Sequence[str]], ...]
    groups: int
    size: int
    rounds: tuple[Round, ...] = ()
    looks: int = 0

    @property
    def tasks(self) -> list[int]:
        """All that people are to label."""
        return [task for each in self.rounds for task in each.tasks]

    @property
    def risk(self) -> float:
        """The chance of a wrong certificate that this look may take."""
        return risk(self.confidence, self.looks + len(self.rounds) - 1)

    def members(self, group: int) -> tuple[Ranked, ...]:
        """The tasks of a group."""
        edges = _edges(len(self.order), self.groups)
        return self.order[edges[group] : edges[group + 1]]


@dataclass(frozen=True)
class Verdict:
    """
    What an audit allows.

    Attributes:
        certified: How many groups may be accepted, from the surest on; 0 for none.
        audited: Labelled blind, in the groups that are accepted, or in all.
        faults: Wrong ones among those.
        threshold: The lowest score that is accepted; None without any.
        accepted: The tasks, the surest first.
        counts: By group, tasks that were labelled blind and faults among them.
    """

    certified: int
    audited: int
    faults: int
    threshold: float | None
    accepted: tuple[Ranked, ...]
    counts: tuple[tuple[int, int], ...]


class Plan(NamedTuple):
    """How many tasks to draw, in how many groups, where to look first, and how many may then be accepted."""

    size: int
    groups: int
    start: int
    expected: float


def risk(confidence: float, look: int) -> float:
    """The chance of a wrong certificate that one look at the labels may take; all looks together may take the whole."""
    return (1 - confidence) * (FIRST_LOOK if look == 0 else (1 - FIRST_LOOK) / 2**look)


def allowed(wrong: Counts, share: Counts, audited: Counts, chance: float) -> Counts:
    """
    How many faults may be found at most where fewer than so many wrong predictions are claimed; -1 for not even none.

    Args:
        wrong: Predictions that would be too many.
        share: With which each of them was drawn, at least.
        audited: Tasks that were drawn.
        chance: Of a wrong claim, at most.
    """
    from scipy.stats import binom

    rate = np.divide(share * wrong, audited, out=np.ones_like(share), where=audited > 0)
    most = np.maximum(binom.ppf(chance, wrong, share), binom.ppf(chance, audited, np.minimum(rate, 1))) - 1
    least_likely: Counts = np.minimum(most, np.floor(share * wrong - 1 + 1e-9))
    return np.maximum(least_likely, -1)


def least(error: float, confidence: float, of: str, total: int, tasks: int, look: int = 0) -> int | None:
    """How many tasks must be audited without a fault, so that all may be accepted; None where labelling all is less."""
    size = max(1, math.floor(math.log(risk(confidence, look)) / math.log1p(-error)) * tasks // (total + 1))
    while size < tasks:
        groups, each = _groups(size, tasks)
        sizes = np.diff(_edges(tasks, groups)).astype(float)
        if each > sizes.min():
            return None
        counts = np.full(groups, float(each))
        if _limits(sizes, counts, counts / sizes, sizes - counts, error, of, total, risk(confidence, look))[-1] >= 0:
            return groups * each
        size = max(size + 1, groups * each)
    return None


def plan(
    scores: Sequence[float], total: int, error: float, confidence: float, of: str, *, size: int | None = None,
    look: int = 0,
) -> Plan | None:  # fmt: skip
    """
    The audit that is expected to leave people the least to label, if the scores are right.

    Args:
        scores: From the surest on.
        total: Open tasks, those without a score included.
        error: Share that may be wrong.
        confidence: With which that is to hold.
        of: `ACCEPTED` or `ALL`.
        size: Tasks to draw, if that is settled; a few more make the groups even.
        look: How often labels were judged before.

    Returns:
        None where labelling all is less.
    """
    tasks = len(scores)
    if size is None:
        floor = least(error, confidence, of, total, tasks, look)
        if floor is None:
            return None
        sizes = [round(floor * times) for times in SIZES if times == 1 or floor * times <= tasks / 2]
    else:
        sizes = [size]
    found: list[Plan] = []
    for wanted in sizes:
        groups, each = _groups(wanted, tasks)
        members = np.diff(_edges(tasks, groups)).astype(float)
        if each <= members.min():
            counts = np.full(groups, float(each))
            start, expected = _start(scores, members, counts, counts / members, error, of, total,
                                     risk(confidence, look))  # fmt: skip
            found.append(Plan(groups * each, groups, start, expected))
    return max(found, key=lambda each: (round(each.expected), -each.size), default=None)


def draw(audit: Audit, open_tasks: Collection[int], chance: Callable[[int], float], at: float) -> Round:
    """
    Draw tasks from every group, among those that nobody has labelled.

    The first time as many as were planned, and each time after that as many as were drawn so far: who knows the faults
    could choose a number that suits them.

    Args:
        audit: To be drawn for.
        open_tasks: That nobody has labelled.
        chance: A task's number from 0 to 1, by which it is drawn.
        at: Now.
    """
    before, among, drawn = set(audit.tasks), list[int](), list[tuple[int, ...]]()
    each = math.ceil((len(before) or audit.size) / audit.groups)
    for group in range(audit.groups):
        free = [one.task for one in audit.members(group) if one.task in open_tasks and one.task not in before]
        among.append(len(free))
        drawn.append(tuple(sorted(sorted(free, key=chance)[:each])))
    away = frozenset(one.task for one in audit.order if one.task not in open_tasks) - before
    fresh = Round(at, tuple(drawn), tuple(among), 0, away)
    look = audit.looks + len(audit.rounds)
    start, _ = _start([one.score for one in audit.order], *_drawn(audit, (*audit.rounds, fresh)), audit.error, audit.of,
                      audit.total, risk(audit.confidence, look), PESSIMISM ** len(audit.rounds))  # fmt: skip
    return replace(fresh, start=start)


def judge(audit: Audit, right: Mapping[int, bool], open_tasks: Collection[int], error: float | None = None) -> Verdict:
    """
    What may be accepted, by what people said of the tasks that were drawn.

    Args:
        audit: As it was drawn.
        right: Task -> whether people say what the model says; a task that is missing counts for nothing.
        open_tasks: That nobody has labelled; only those can be accepted.
        error: Another share than the audit's.
    """
    error = audit.error if error is None else error
    drawn = set(audit.tasks)
    taken = set(open_tasks).difference(drawn, *(each.away for each in audit.rounds))
    _, _, shares = _drawn(audit, audit.rounds, right)
    groups = [audit.members(group) for group in range(audit.groups)]
    counts = [
        (sum(one.task in right for one in group if one.task in drawn),
         sum(not right[one.task] for one in group if one.task in drawn and one.task in right))
        for group in groups
    ]  # fmt: skip
    left = [[one for one in group if one.task in taken] for group in groups]
    sizes, audited, remaining = (
        np.array(numbers, float) for numbers in (list(map(len, groups)), [n for n, _ in counts], list(map(len, left)))
    )
    limits = _limits(sizes, audited, shares, remaining, error, audit.of, audit.total, audit.risk)
    faults, certified = np.cumsum([wrong for _, wrong in counts]), 0
    for group in range(audit.rounds[-1].start, audit.groups):
        if faults[group] > limits[group]:
            break
        certified = group + 1
    within = certified or audit.groups
    accepted = tuple(one for group in left[:certified] for one in group)
    threshold = groups[certified - 1][-1].score if certified else None
    return Verdict(
        certified, sum(n for n, _ in counts[:within]), int(faults[within - 1]), threshold, accepted, tuple(counts)
    )


def reachable(audit: Audit, right: Mapping[int, bool], open_tasks: Collection[int]) -> float | None:
    """The smallest share of errors, in steps of a tenth of a percent, that these labels would have been enough for."""
    shares = [step / 1000 for step in range(1, 500) if step / 1000 > audit.error]
    low, high = 0, len(shares)
    while low < high:
        middle = (low + high) // 2
        if judge(audit, right, open_tasks, shares[middle]).accepted:
            high = middle
        else:
            low = middle + 1
    return shares[low] if low < len(shares) else None


def more(audit: Audit, verdict: Verdict, open_tasks: Collection[int]) -> int | None:
    """
    How many more tasks must be labelled blind, about, for a certificate, if faults are found as often as so far.

    None where even all that can be drawn would not do.
    """
    free = _free(audit, open_tasks)
    added = np.zeros_like(free)
    sizes, before, shares = _drawn(audit, audit.rounds)
    found = np.cumsum([wrong for _, wrong in verdict.counts]).astype(float)
    rates = (found + 0.5) / (np.cumsum([n for n, _ in verdict.counts]) + 1)
    for look in range(audit.looks + len(audit.rounds), audit.looks + len(audit.rounds) + ROUNDS_MAX):
        added = np.minimum(2 * added + before, free)
        drawn = 1 - (1 - shares) * (1 - added / np.maximum(free, 1))
        limits = _limits(sizes, before + added, drawn, free - added, audit.error, audit.of, audit.total,
                         risk(audit.confidence, look))  # fmt: skip
        if (np.ceil(found + rates * np.cumsum(added)) <= limits).any():
            return int(added.sum())
    return None


def _free(audit: Audit, open_tasks: Collection[int]) -> Counts:
    """By group, the tasks that can still be drawn."""
    drawn = set(audit.tasks)
    return np.array([
        float(sum(one.task in open_tasks and one.task not in drawn for one in audit.members(group)))
        for group in range(audit.groups)
    ])  # fmt: skip


def _start(
    scores: Sequence[float], sizes: Counts, counts: Counts, shares: Counts, error: float, of: str, total: int,
    chance: float, pessimism: float = 1.0,
) -> tuple[int, float]:  # fmt: skip
    """Where to look first, chosen by the scores alone, and how many are then expected to be accepted."""
    from scipy.stats import binom

    limits = _limits(sizes, counts, shares, STILL_OPEN * (sizes - counts), error, of, total, chance)
    if hopeless := bool((limits < 0).all()):
        limits = _limits(sizes, counts, shares, sizes - counts, error, of, total, chance)
    rates = np.clip(pessimism * (1 - np.asarray(scores, float)), LEAST_RATE * error, 1)
    edges = np.cumsum(sizes).astype(int)
    faults = np.cumsum(counts * np.add.reduceat(rates, np.r_[0, edges[:-1]]) / np.maximum(sizes, 1))
    audited = np.maximum(np.cumsum(counts), 1)
    passes = np.where(limits < 0, 0.0, binom.cdf(np.maximum(limits, 0), audited, np.minimum(faults / audited, 1)))
    accepted = np.cumsum(sizes - counts)
    gains = [
        float(np.diff(accepted[first:], prepend=0.0) @ np.minimum.accumulate(passes[first:]))
        for first in range(len(sizes))
    ]
    best = int(np.argmax(gains))
    return best, 0.0 if hopeless else gains[best]


def _limits(
    sizes: Counts, counts: Counts, shares: Counts, left: Counts, error: float, of: str, total: int, chance: float
) -> Counts:
    """By group, how many faults may be found in it and those above, at most, for all of them to be accepted."""
    wrong = np.floor(error * (np.cumsum(left) if of == ACCEPTED else np.full(len(left), float(total))) + 1e-9) + 1
    audited = np.cumsum(counts)
    found = allowed(wrong, np.minimum.accumulate(shares), audited, chance)
    return np.where(wrong > np.cumsum(sizes), audited, found)  # there are not as many tasks as may be wrong


def _drawn(audit: Audit, rounds: Sequence[Round], kept: Collection[int] | None = None) -> tuple[Counts, Counts, Counts]:
    """By group: tasks, those that were drawn, and the chance with which each was; of the drawn ones only those kept."""
    edges = _edges(len(audit.order), audit.groups)
    counts, missed = np.zeros(audit.groups), np.ones(audit.groups)
    for each in rounds:
        drawn = np.array([float(sum(kept is None or task in kept for task in group)) for group in each.drawn])
        counts += drawn
        missed *= 1 - drawn / np.maximum(np.array(each.among, float), 1)
    return np.diff(edges).astype(float), counts, 1 - missed


def _groups(size: int, tasks: int) -> tuple[int, int]:
    """Groups, and tasks of each, that make up a size with as few more as can be."""
    fit = [groups for groups in GROUPS if groups <= tasks] or [1]
    groups = min(fit, key=lambda each: (math.ceil(size / each) * each, -each))
    return groups, math.ceil(size / groups)


def _edges(tasks: int, groups: int) -> NDArray[np.int64]:
    return np.array([tasks * group // groups for group in range(groups + 1)])


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
