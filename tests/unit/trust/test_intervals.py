"""Intervals: published values, and how often they hold the truth of simulated labels."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.metrics import cohen_kappa_score

from celestial_backend.trust.intervals import Interval, Times, alpha, difference, kappa, middle, ratio, share, typical


def of(right: int, n: int) -> Interval:
    found = share([place < right for place in range(n)], range(n))
    assert found is not None
    return found


def test_a_share_of_tasks_is_wilsons() -> None:
    """Also at its ends, where others give an interval without a width."""
    for right, n in ((0, 10), (3, 10), (10, 10), (81, 263)):
        told = binomtest(right, n).proportion_ci(0.95, "wilson")
        assert (of(right, n).low, of(right, n).high) == pytest.approx((told.low, told.high))
    assert share([], []) is None


def test_labels_of_one_task_that_are_alike_count_once() -> None:
    """Three people who agree on everything tell no more than one; three who do not tell more."""
    rng = np.random.default_rng(1)
    tasks = np.repeat(np.arange(100), 3)
    alike = share(list(np.repeat(rng.random(100) < 0.7, 3)), list(tasks))
    apart = share(list(rng.random(300) < 0.7), list(tasks))
    assert alike is not None
    assert apart is not None
    assert alike.high - alike.low > 1.5 * (apart.high - apart.low)
    assert alike.high - alike.low == pytest.approx(of(70, 100).high - of(70, 100).low, rel=0.15)
    sure = share([True] * 300, list(tasks))
    assert sure is not None
    assert sure.low < 0.97, "as 100 tasks tell, not as 300"


def test_a_difference_is_newcombes() -> None:
    """Method 10 of Newcombe (1998), table II, and his example at the end of what is possible."""
    for (a, m), (b, n), low, high in (
        ((56, 70), (48, 80), 0.0524, 0.3339), ((9, 10), (3, 10), 0.1705, 0.8090), ((10, 10), (0, 10), 0.6075, 1.0),
    ):  # fmt: skip
        found = difference(of(a, m), of(b, n))
        assert (found.low, found.high) == pytest.approx((low, high), abs=2e-4)


def test_a_ratio_of_rare_events() -> None:
    """It reaches far where the lower of the two is hardly seen, and is none where it is not seen at all."""
    found = ratio(of(30, 300), of(3, 30))
    assert found is not None
    assert found.value == pytest.approx(1)
    assert found.low < 0.45
    assert found.high > 2.5
    assert ratio(of(30, 300), of(0, 30)) is None


def test_alpha_is_krippendorffs() -> None:
    """The example of Krippendorff (2011), "Computing Krippendorff's alpha-reliability", C: 0.743; and two people."""
    people = [
        "1 2 3 3 2 1 4 1 2 . . .", "1 2 3 3 2 2 4 1 2 5 . 3", ". 3 3 3 2 3 4 2 2 5 1 .", "1 2 3 3 2 4 4 1 2 5 1 .",
    ]  # fmt: skip
    tasks = [[each for each in task if each != "."] for task in zip(*map(str.split, people), strict=True)]
    found = alpha(tasks)
    assert found is not None
    assert found.value == pytest.approx(0.743, abs=5e-4)
    assert found.low < 0.743 < found.high


def test_kappa_is_cohens() -> None:
    """As scikit-learn has it."""
    rng = np.random.default_rng(2)
    one = rng.integers(3, size=200)
    other = np.where(rng.random(200) < 0.7, one, rng.integers(3, size=200))
    found = kappa([(str(a), str(b)) for a, b in zip(one, other, strict=True)])
    assert found is not None
    assert found.value == pytest.approx(cohen_kappa_score(one, other))
    assert 0.08 < found.high - found.low < 0.25


def test_full_agreement_is_not_certainty() -> None:
    found = alpha([["a", "a"]] * 10 + [["b", "b"]] * 10)
    assert found is not None
    assert found.value == found.high == 1
    assert found.low < 0.75
    assert alpha([["a", "a"]] * 20) is None, "nobody could have disagreed"
    assert alpha([["a"], ["b"]]) is None
    assert kappa([("a", "a")] * 20) is None
    assert kappa([]) is None


def test_typical_times_are_not_moved_by_a_coffee() -> None:
    """Each person is compared with themselves: who is slow and gets more of one kind does not move the difference."""
    rng = np.random.default_rng(3)

    def times(n: int, seconds: float) -> list[float]:
        return [*(seconds * rng.lognormal(0, 0.3, n)), 3000.0]

    quick = Times(times(200, 4), range(201), times(20, 6), range(300, 321))
    slow = Times(times(20, 10), range(21), times(200, 12), range(300, 501))
    without, with_one, saved = typical([quick, slow])
    assert saved.low < 2 < saved.high
    assert saved.high - saved.low < 2
    assert saved.value == pytest.approx(without.value - with_one.value)


def test_times_of_one_task_count_together() -> None:
    """Those of several people whose accounts are gone are taken for one person's."""
    times = [1.0, 2.0, 3.0, 4.0, 5.0]
    apart, twice = middle(times * 2, range(10)), middle(times * 2, [*range(5), *range(5)])
    assert apart is not None
    assert twice is not None
    assert twice.high - twice.low > 1.3 * (apart.high - apart.low)


def test_intervals_hold_the_truth() -> None:
    """In about 95 of 100 simulated projects, with three people on each task, few of them without a pre-label."""
    rng = np.random.default_rng(4)
    held = {"difference": 0, "unlooked": 0, "saved": 0}
    runs, counted = 300, 0
    for _ in range(runs):
        right = rng.random(300) < 0.85
        withheld = rng.random(300) < 0.15
        blind = np.where(right[:, None], rng.random((300, 3)) < 0.95, rng.random((300, 3)) < 0.2)
        given = np.where(withheld[:, None], blind, blind | (rng.random((300, 3)) < 0.3))
        q = 0.85 * 0.95 + 0.15 * 0.2
        s = q + 0.3 * (1 - q)
        tasks = np.repeat(np.arange(300), 3).reshape(300, 3)
        seen, unseen = (share(list(given[rows].ravel()), list(tasks[rows].ravel())) for rows in (~withheld, withheld))
        assert seen is not None
        assert unseen is not None
        less = difference(seen, unseen)
        held["difference"] += less.low <= s - q <= less.high
        many = ratio(-seen + 1, -unseen + 1)
        if many is not None:
            counted += 1
            held["unlooked"] += (-many + 1).low <= 0.3 <= (-many + 1).high
        hard = rng.lognormal(0, 0.3, 300)[:, None] * rng.lognormal(0, 0.4, (300, 3)) * np.where(withheld, 6, 4)[:, None]
        people = [Times(list(hard[~withheld, who]), list(np.flatnonzero(~withheld)), list(hard[withheld, who]),
                        list(np.flatnonzero(withheld))) for who in range(3)]  # fmt: skip
        spread = rng.lognormal(0, 0.5, 20_000)  # the trimmed mean of one person's times, over their median
        centre = float(np.sort(spread)[4000:16_000].mean())
        saved = typical(people)[2]
        held["saved"] += saved.low <= 2 * centre <= saved.high
    assert counted > 0.9 * runs
    least = 0.95 - 2.6 * math.sqrt(0.95 * 0.05 / runs)
    assert held["difference"] / runs > least
    assert held["unlooked"] / counted > least
    assert held["saved"] / runs > least
