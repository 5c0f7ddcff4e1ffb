"""What the drawn bodies must be: repeatable, different, and each like itself."""

from __future__ import annotations

import numpy as np
import pytest

from celestial_backend.planets.renderer import BODIES, render


def test_it_knows_the_ten_bodies() -> None:
    """The names are the classes of the shipped model."""
    assert BODIES == ("Earth", "Jupiter", "Mars", "Mercury", "Moon", "Neptune", "Pluto", "Saturn", "Uranus", "Venus")


@pytest.mark.parametrize("body", BODIES)
def test_the_seed_alone_decides_the_pixels(body: str) -> None:
    """The same seed draws the same picture, another seed another one."""
    assert render(body, 5, 48).tobytes() == render(body, 5, 48).tobytes()
    assert render(body, 5, 48).tobytes() != render(body, 6, 48).tobytes()


@pytest.mark.parametrize("body", BODIES)
def test_a_lit_body_stands_on_black(body: str) -> None:
    """Corners are black, the middle is not, and size and mode are as asked for."""
    picture = render(body, 1, 80)
    values = np.asarray(picture)
    assert (picture.mode, picture.size) == ("RGB", (80, 80))
    assert values[[0, 0, -1, -1], [0, -1, 0, -1]].max() == 0
    assert values[35:45, 35:45].mean() > 25


def test_each_body_has_its_own_colour() -> None:
    """Red Mars, blue Neptune, cyan Uranus, yellow Venus, grey Moon: by the mean over several sides."""
    mean = {
        body: np.mean([np.asarray(render(body, seed, 48))[16:32, 16:32].mean(axis=(0, 1)) for seed in range(4)], axis=0)
        for body in BODIES
    }
    red, green, blue = 0, 1, 2
    assert mean["Mars"][red] > 1.5 * mean["Mars"][blue]
    assert mean["Neptune"][blue] > 1.8 * mean["Neptune"][red]
    assert mean["Uranus"][green] > 1.1 * mean["Uranus"][red]
    assert mean["Venus"][red] > 1.3 * mean["Venus"][blue]
    assert np.ptp(mean["Moon"]) < 0.1 * mean["Moon"].max()


def test_only_saturn_has_rings() -> None:
    """Saturn is at least 1.5 times as wide as high for some seeds; every other body is about round."""
    for body in BODIES:
        lit = [np.asarray(render(body, seed, 64).convert("L")) > 12 for seed in range(5)]
        ratios = [np.ptp(np.flatnonzero(one.any(0))) / np.ptp(np.flatnonzero(one.any(1))) for one in lit]
        assert (max(ratios) > 1.5) == (body == "Saturn")


def test_an_unknown_body_is_refused() -> None:
    """The message lists what can be drawn."""
    with pytest.raises(ValueError, match=r"Earth, Jupiter.*got 'Ceres'"):
        render("Ceres", 0)
