"""
How often a certificate is wrong, and how much it accepts: `python -m benchmarks.certificates --runs 1000`.

Each run makes a set of predictions, draws an audit, has it labelled without a mistake, accepts what the audit allows,
and compares the errors of what was accepted with what was stated. Where nothing is allowed, the run draws more, up to
four times in all, if that promises anything; where more is wrong than stated, whatever it promises.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
from numpy.typing import NDArray

from celestial_backend.trust.audit import ACCEPTED, ALL, Audit, Ranked, Verdict, draw, judge, more, plan

CALIBRATED, OVERCONFIDENT, BLIND, EDGE = "calibrated", "overconfident", "say nothing", "say nothing, errors at the edge"
SPREAD = 2.5  # of the logarithms of odds
LOOKS_MAX = 4
FILE = "certificates.json"


@dataclass(frozen=True)
class Scenario:
    """A set of predictions, by how many there are, how many of them are right, and what their scores say."""

    tasks: int
    right: float
    scores: str
    error: float
    of: str = ACCEPTED
    meanwhile: float = 0.0  # share that people label in the meantime
    size: int | None = None  # of the audit, if it is settled
    looks: int = LOOKS_MAX


class Run(NamedTuple):
    """What came of one run: shares of the tasks, and whether more is wrong than was stated."""

    accepted: float
    audited: float
    looks: int
    broken: bool


def population(scenario: Scenario, rng: np.random.Generator) -> tuple[NDArray[np.floating], NDArray[np.bool_]]:
    """The scores, the surest first, and which predictions are wrong."""
    count = scenario.tasks
    if scenario.scores == EDGE:
        wrong: NDArray[np.bool_] = np.zeros(count, bool)
        wrong[rng.choice(count, int(count * scenario.error * 1.1) + 1, replace=False)] = True
        return np.full(count, 1 - scenario.error), wrong
    if scenario.scores == BLIND:
        return np.full(count, scenario.right), rng.random(count) >= scenario.right
    odds, low, high = SPREAD * rng.standard_normal(count), -10.0, 15.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if np.mean(1 / (1 + np.exp(-middle - odds))) < scenario.right else (low, middle)
    sure = np.sort(1 / (1 + np.exp(-low - odds)))[::-1]
    wrong = rng.random(count) >= sure
    return (1 - (1 - sure) / 4 if scenario.scores == OVERCONFIDENT else sure), wrong


def run(scenario: Scenario, seed: int, confidence: float = 0.9) -> Run:
    """One run of a scenario, always the same for a seed."""
    rng = np.random.default_rng([seed, scenario.tasks, round(1000 * scenario.right)])
    scores, wrong = population(scenario, rng)
    planned = plan(scores.tolist(), len(scores), scenario.error, confidence, scenario.of, size=scenario.size)
    if planned is None:
        return Run(0.0, 1.0, 0, broken=False)
    order = tuple(Ranked(task, float(score), 0) for task, score in enumerate(scores))
    audit = Audit(1, "", "", "", scenario.error, confidence, scenario.of, "", len(order), order, ({},), planned.groups,
                  planned.size)  # fmt: skip
    open_tasks = set(range(len(order)))
    for look in range(1, scenario.looks + 1):
        chance = rng.random(len(order))
        audit = replace(audit, rounds=(*audit.rounds, draw(audit, open_tasks, chance.__getitem__, 0.0)))
        open_tasks -= set(audit.rounds[-1].tasks)
        if scenario.meanwhile:
            open_tasks -= set(np.flatnonzero(rng.random(len(order)) < scenario.meanwhile).tolist())
        right = {task: not wrong[task] for task in audit.tasks}
        verdict = judge(audit, right, open_tasks)
        if verdict.accepted:
            accepted, audited = len(verdict.accepted) / len(order), len(right) / len(order)
            return Run(accepted, audited, look, _broken(audit, verdict, wrong))
        if scenario.scores != EDGE and more(audit, verdict, open_tasks) is None:
            break
    return Run(0.0, len(audit.tasks) / len(order), len(audit.rounds), broken=False)


def _broken(audit: Audit, verdict: Verdict, wrong: NDArray[np.bool_]) -> bool:
    faults = int(wrong[[one.task for one in verdict.accepted]].sum())
    return faults > audit.error * (len(verdict.accepted) if audit.of == ACCEPTED else audit.total) + 1e-9


def scenarios() -> Iterator[Scenario]:
    """Those of the page."""
    both = (ACCEPTED, ALL)
    for right, scores, of in product((0.87, 0.95, 0.99), (CALIBRATED, BLIND), both):
        yield Scenario(1000, right, scores, 0.03, of)
    for (tasks, right, scores), of in product(
        ((1000, 0.7, CALIBRATED), (1000, 0.95, OVERCONFIDENT), (200, 0.95, CALIBRATED), (10_000, 0.87, CALIBRATED),
         (10_000, 0.95, CALIBRATED)), both,
    ):  # fmt: skip
        yield Scenario(tasks, right, scores, 0.03, of)
    for (tasks, error), of in product(((200, 0.05), (1000, 0.01), (1000, 0.03), (1000, 0.05), (10_000, 0.03)), both):
        yield Scenario(tasks, 1 - error, EDGE, error, of)
    for error, of in product((0.01, 0.03, 0.05), both):
        yield Scenario(1000, 0.87, CALIBRATED, error, of, size=186, looks=1)
    yield Scenario(1000, 0.95, CALIBRATED, 0.03, meanwhile=0.3)


def measured(scenario: Scenario, runs: int, pool: Any = None) -> dict[str, Any]:
    """The means of a scenario's runs, and the share that ended in a certificate that does not hold."""
    found = list((pool.map if pool else map)(partial(run, scenario), range(runs)))
    return asdict(scenario) | {
        "runs": runs,
        "broken": round(sum(each.broken for each in found) / runs, 4),
        "certified": round(sum(each.accepted > 0 for each in found) / runs, 3),
        "share_accepted": round(sum(each.accepted for each in found) / runs, 3),
        "share_audited": round(sum(each.audited for each in found) / runs, 3),
        "looks": round(sum(each.looks for each in found) / runs, 2),
    }


@click.command()
@click.option("--runs", type=click.IntRange(min=1), default=1000, show_default=True, help="Of each scenario.")
@click.option("--output", type=click.Path(file_okay=False, path_type=Path), default=Path("benchmarks/results"),
              show_default=True, help="Folder for the JSON.")  # fmt: skip
def main(runs: int, output: Path) -> None:
    """Simulate runs of `finish`."""
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        rows = []
        for scenario in scenarios():
            rows.append(measured(scenario, runs, pool))
            click.echo(json.dumps(rows[-1]))
    (output / FILE).write_text(json.dumps(rows, indent=1) + "\n")
    worst = max(row["broken"] for row in rows)
    click.echo(f"At most {worst:.1%} of the runs of a scenario ended in a certificate that does not hold.")


if __name__ == "__main__":
    main()
