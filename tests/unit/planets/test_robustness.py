"""The judge itself: repeatable, harder step by step, and right in its arithmetic."""

from __future__ import annotations

import numpy as np
import pytest

from celestial_backend.planets.renderer import render
from celestial_backend.planets.robustness import (
    CORRUPTIONS,
    SEVERITIES,
    answers,
    corrupt,
    expected_calibration_error,
    figures,
)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_corruption_is_repeatable_and_changes_the_picture(name: str) -> None:
    """Same arguments, same pixels; size and mode stay; something is different at every severity."""
    picture = render("Jupiter", 1)
    for severity in SEVERITIES:
        changed = corrupt(picture, name, severity, 7)
        assert (changed.mode, changed.size) == ("RGB", picture.size)
        assert changed.tobytes() == corrupt(picture, name, severity, 7).tobytes()
        assert changed.tobytes() != picture.tobytes()


@pytest.mark.parametrize("name", sorted(set(CORRUPTIONS) - {"rotate"}))
def test_the_third_severity_is_worse_than_the_first(name: str) -> None:
    """Further from the original, on average over some seeds."""
    picture = render("Jupiter", 1)
    original = np.asarray(picture, np.float64)

    def away(severity: int) -> float:
        return float(np.mean([np.abs(corrupt(picture, name, severity, s) - original).mean() for s in range(12)]))

    assert away(3) > away(1)


def test_stars_leave_the_body_alone() -> None:
    """The sky changes, the middle of the body does not."""
    picture = render("Venus", 1)
    starry, original = (np.asarray(one) for one in (corrupt(picture, "stars_behind", 3, 1), picture))
    assert np.array_equal(starry[44:84, 44:84], original[44:84, 44:84])
    assert starry[:12].max() > 60


def test_figures_on_paper() -> None:
    """A judge whose network always says the first class: right as often as that class is there."""
    pictures = [render("Mars", 1, 32), render("Venus", 1, 32), render("Mars", 2, 32), render("Mars", 3, 32)]
    answered = answers(lambda some: np.tile([[3.0, 0.0]], (len(some), 1)), pictures)
    found = figures(answered, np.array([0, 1, 0, 0]))
    assert found["accuracy"] == 0.75
    assert set(found["accuracy_corrupted"].values()) == {0.75}
    assert found["accuracy_corrupted_mean"] == 0.75
    rounds = 1 + len(SEVERITIES) * len(CORRUPTIONS)
    assert found["confusion"] == [[3 * rounds, 0], [rounds, 0]]
    assert found["calibration_error"] == pytest.approx(1 / (1 + np.exp(-3)) - 0.75, abs=1e-4)


def test_calibration_error_on_paper() -> None:
    """Four answers at 0.75, three of them right: no error. All right: an error of 0.25."""
    rows = np.array([[0.75, 0.25]] * 4)
    assert expected_calibration_error(rows, np.array([0, 0, 0, 1])) == pytest.approx(0)
    assert expected_calibration_error(rows, np.array([0, 0, 0, 0])) == pytest.approx(0.25)
    assert expected_calibration_error(np.array([[1.0, 0.0]]), np.array([0])) == pytest.approx(0)
