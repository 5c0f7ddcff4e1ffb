"""What an audit allows: the numbers that are known, and that certificates hold as often as they say."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.certificates import CALIBRATED, EDGE, Scenario, measured
from celestial_backend.trust.audit import ACCEPTED, ALL, Audit, Ranked, draw, judge, least, more, plan, reachable

MANY = 1_000_000


def audit(scores: list[float], error: float = 0.03, of: str = ACCEPTED, size: int | None = None) -> Audit:
    planned = plan(scores, len(scores), error, 0.9, of, size=size)
    assert planned is not None
    order = tuple(Ranked(100 + place, score, 0) for place, score in enumerate(scores))
    return Audit(
        1,
        "m:1",
        "",
        "open",
        error,
        0.9,
        of,
        "",
        len(order),
        order,
        ({"choice": ["Mars"]},),
        planned.groups,
        planned.size,
    )


def drawn(of: Audit, open_tasks: set[int], seed: int = 1) -> Audit:
    chance = np.random.default_rng(seed).random(MANY)
    return replace(of, rounds=(*of.rounds, draw(of, open_tasks, chance.__getitem__, 0.0)))


@pytest.mark.parametrize(("error", "whole", "with_reserve"), [(0.01, 230, 240), (0.03, 76, 80), (0.05, 45, 48)])
def test_so_many_labels_without_a_fault_are_the_least(error: float, whole: int, with_reserve: int) -> None:
    """As known for one look at 90 %; a tenth of the risk is kept for later looks, which takes a few more."""
    found = least(error, 0.9, ACCEPTED, MANY, MANY)
    assert found == with_reserve >= whole
    assert (1 - error) ** found <= 0.09 < (1 - error) ** (whole - 1)


def test_small_sets_take_as_many_or_are_labelled_whole() -> None:
    """What is claimed is about the tasks themselves, of which few are left."""
    assert least(0.03, 0.9, ACCEPTED, 200, 200) == 95
    assert least(0.01, 0.9, ACCEPTED, 200, 200) is None
    assert plan([0.9] * 50, 50, 0.03, 0.9, ACCEPTED) is None
    assert plan([], 0, 0.03, 0.9, ALL) is None


def test_the_sure_are_accepted_down_to_the_first_doubt() -> None:
    """Nothing of those that were drawn, and nothing that somebody has labelled; never what is below a doubt."""
    scores = sorted((0.999 if place % 4 else 0.4 for place in range(2000)), reverse=True)
    asked = audit(scores)
    tasks = {one.task for one in asked.order}
    asked = drawn(asked, tasks)
    assert len(asked.tasks) == len(set(asked.tasks)) == asked.size
    sure = {one.task for one in asked.order if one.score > 0.9}
    open_tasks = tasks - set(asked.tasks) - {100, 101}
    verdict = judge(asked, {task: task in sure for task in asked.tasks}, open_tasks)
    accepted = {one.task for one in verdict.accepted}
    assert accepted
    assert accepted <= open_tasks
    assert len(accepted - sure) <= 0.03 * len(accepted)
    assert verdict.threshold is not None
    assert min(one.score for one in verdict.accepted) >= verdict.threshold
    assert judge(asked, dict.fromkeys(asked.tasks, False), open_tasks).accepted == ()


def test_what_was_not_labelled_blind_counts_for_nothing() -> None:
    """The fewer were labelled of a group, the less is known of it; without any of the first, nothing is accepted."""
    asked = audit([0.99] * 3000)
    tasks = {one.task for one in asked.order}
    asked = drawn(asked, tasks)
    right = dict.fromkeys(asked.tasks, True)
    assert judge(asked, right, tasks).accepted
    for task in asked.rounds[0].drawn[0]:
        del right[task]
    assert judge(asked, right, tasks).accepted == ()


def test_more_is_drawn_as_often_as_it_takes() -> None:
    """Each time as many as so far, none twice; the look at them may err less often than the first."""
    asked = audit([0.97] * 5000)
    tasks = {one.task for one in asked.order}
    asked = drawn(asked, tasks)
    right = {task: place % 20 > 0 for place, task in enumerate(asked.tasks)}
    verdict = judge(asked, right, tasks - set(asked.tasks))
    assert verdict.accepted == ()
    assert 0.03 < (reachable(asked, right, tasks) or 0) < 0.12
    assert more(asked, verdict, tasks) is None  # one in twenty is more than three in a hundred
    again = drawn(asked, tasks - set(asked.tasks))
    assert len(again.tasks) == len(set(again.tasks)) == 2 * len(asked.tasks)
    assert again.risk < asked.risk / 10
    busy = set(sorted(tasks - set(asked.tasks))[::50])
    away = drawn(asked, tasks - set(asked.tasks) - busy)
    sure = dict.fromkeys(away.tasks, True)
    assert {one.task for one in judge(away, sure, tasks).accepted} == tasks - set(away.tasks) - busy
    assert asked.risk + sum(replace(again, looks=looks).risk for looks in range(30)) == pytest.approx(0.1)


@pytest.mark.parametrize(
    "scenario",
    [
        pytest.param(Scenario(1000, 0.95, CALIBRATED, 0.03), id="calibrated scores"),
        pytest.param(Scenario(1000, 0.95, EDGE, 0.05), id="worse than stated by a little, and drawn again and again"),
        pytest.param(Scenario(200, 0.95, EDGE, 0.05, ALL), id="of a small whole"),
    ],
)
def test_certificates_hold_as_often_as_they_say(scenario: Scenario) -> None:
    """In nine of ten runs; `python -m benchmarks.certificates` makes a thousand of many more kinds."""
    found = measured(scenario, 60)
    assert found["broken"] <= 0.1
    if scenario.scores == CALIBRATED:
        assert found["share_accepted"] > 0.4
