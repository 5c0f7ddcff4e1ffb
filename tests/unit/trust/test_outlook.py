"""What more labels are expected to bring: as much as a curve that is known brings."""

from __future__ import annotations

import numpy as np
import pytest

from celestial_backend.trust.suspects import LEAST, Outlook, outlook


def steps(labels: int, falls: float, floor: float, seed: int) -> list[tuple[float, np.ndarray]]:
    """Heads whose share of wrong answers falls to a floor; each judges what it has not learned."""
    rng = np.random.default_rng(seed)
    found = []
    for share in (0.3, 0.45, 0.65, 0.85) * 4:
        right = (rng.random(labels) > floor + falls / (share * labels)).astype(float)
        right[rng.permutation(labels)[: round(share * labels)]] = np.nan
        found.append((share * labels, right))
    last = (rng.random(labels) > floor + falls / (0.8 * labels)).astype(float)
    return [*found, (0.8 * labels, last)]


def test_what_is_gained_lies_in_the_interval() -> None:
    """In nine of ten projects, and the expectation is right on average."""
    told = [outlook(200, steps(200, 20, 0.08, seed)) for seed in range(12)]
    gained = 20 * (1 / 200 - 1 / 250)
    assert all(each is not None for each in told)
    sure = [each for each in told if each is not None]
    assert sum(each.low <= gained <= each.high for each in sure) >= 10
    assert np.mean([each.gain for each in sure]) == pytest.approx(gained, abs=0.006)


def test_where_nothing_is_gained_any_more_it_says_so() -> None:
    told = outlook(400, steps(400, 0.0, 0.1, 1))
    assert isinstance(told, Outlook)
    assert told.gain < 0.01
    assert -0.02 < told.low <= told.gain <= told.high < 0.03
    assert "of the labels that it has not learned. 50 more labels are expected to bring 0." in told.sentence
    assert told.sentence.endswith("That is little: the labels may be enough.")


def test_all_are_right() -> None:
    told = outlook(100, [(count, np.ones(100)) for count in (30.0, 60.0, 80.0)])
    assert told is not None
    assert told.right == 1
    assert 0 <= told.gain <= 0.01
    assert told.high == 0


def test_too_few_labels_say_nothing() -> None:
    assert outlook(LEAST - 1, steps(LEAST - 1, 5, 0.1, 1)) is None
    assert outlook(100, []) is None
