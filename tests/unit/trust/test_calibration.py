"""Whether scores mean what they say, in groups and in one number."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from celestial_backend.trust.calibration import calibration_error, reliability


def test_groups_on_paper() -> None:
    """Forty answers: twenty say 0.6 and twelve are right, twenty say 0.9 and sixteen are."""
    confidence, right = [0.6] * 20 + [0.9] * 20, [1] * 12 + [0] * 8 + [1] * 16 + [0] * 4
    low, high = reliability(confidence, right)
    assert (low.confidence, low.right, low.count) == pytest.approx((0.6, 0.6, 20))
    assert (high.confidence, high.right, high.count) == pytest.approx((0.9, 0.8, 20))
    assert (low.low, low.high) == pytest.approx((0.3866, 0.7812), abs=1e-4)  # Wilson's interval, as tables have it
    found = calibration_error(confidence, right)
    assert found is not None
    assert found.value == pytest.approx(0.05)
    assert (found.low, found.count) == (0.0, 40)  # right scores show as much by chance


def test_answers_of_one_confidence_are_never_parted() -> None:
    """Else their order would make an error out of nothing."""
    confidence = [1.0] * 90 + [0.5] * 10
    assert [each.count for each in reliability(confidence, [1] * 95 + [0] * 5)] == [10, 90]


@pytest.mark.parametrize(
    ("count", "share"),
    [
        pytest.param(60, lambda said: said, id="as said"),
        pytest.param(300, lambda said: said - 0.1, id="a tenth less"),
    ],
)
def test_the_interval_holds_the_truth(share: Callable[[np.ndarray], np.ndarray], count: int) -> None:
    """In nine of ten cases at least, for scores that are right and for such as are too high."""
    held = 0
    for seed in range(30):
        rng = np.random.default_rng(seed)
        said = rng.uniform(0.4, 1.0, count)
        found = calibration_error(said, rng.random(count) < share(said))
        assert found is not None
        held += found.low <= float(np.mean(np.abs(said - share(said)))) + 1e-9 <= found.high + 1e-9
    assert held >= 27


def test_chance_is_what_right_scores_show() -> None:
    """So that nobody blames a model for the noise of few answers."""
    rng = np.random.default_rng(3)
    said = rng.uniform(0.4, 1.0, 200)
    found = list(filter(None, (calibration_error(said, rng.random(200) < said) for _ in range(30))))
    assert np.mean([each.value for each in found]) == pytest.approx(found[0].chance, abs=0.01)


@pytest.mark.parametrize("right", [0, 1])
def test_answers_that_are_all_right_are_no_certainty(right: int) -> None:
    """Nor are such that are all wrong: resamples of them are the same, and the next answers need not be."""
    found = calibration_error([float(right)] * 50, [right] * 50)
    assert found is not None
    assert (found.value, found.low) == (0, 0)
    assert 0.05 < found.high < 0.1


def test_nothing_is_said_of_no_answers() -> None:
    assert reliability([], []) == []
    assert calibration_error([], []) is None


@pytest.mark.parametrize(
    ("confidence", "right"),
    [
        pytest.param([0.5, 0.5], [1], id="lengths"),
        pytest.param([1.5], [1], id="beyond one"),
        pytest.param([float("nan")], [0], id="no number"),
        pytest.param([0.5], [2], id="neither right nor wrong"),
        pytest.param([[0.5]], [[1]], id="a table"),
    ],
)
def test_what_is_no_confidence_is_refused(confidence: list[float], right: list[int]) -> None:
    for of in (reliability, calibration_error):
        with pytest.raises(ValueError, match="must"):
            of(confidence, right)
