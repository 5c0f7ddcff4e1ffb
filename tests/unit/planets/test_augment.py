"""What the augmentation must keep, and what it must change."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from celestial_backend.planets.augment import augment
from celestial_backend.planets.renderer import BODIES, render


def _rng(*key: int) -> np.random.Generator:
    return np.random.default_rng(key)


def test_the_generator_alone_decides_the_pixels() -> None:
    """The same state gives the same picture, the next state another one."""
    picture = render("Mars", 1)
    assert augment(picture, _rng(3)).tobytes() == augment(picture, _rng(3)).tobytes()
    assert augment(picture, _rng(3)).tobytes() != augment(picture, _rng(4)).tobytes()


def test_threads_do_not_change_the_pixels() -> None:
    """Many at once on four threads are what they are one after another."""
    picture = render("Earth", 1, 64)
    alone = [augment(picture, _rng(index)).tobytes() for index in range(40)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda index: augment(picture, _rng(index)).tobytes(), range(40)))
    assert together == alone


def test_the_picture_handed_in_stays_as_it_is() -> None:
    """An example is used again in every epoch, so it must not be painted on."""
    picture = render("Venus", 1, 64)
    before = picture.tobytes()
    for index in range(30):
        augment(picture, _rng(index))
    assert picture.tobytes() == before


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK"])
@pytest.mark.parametrize("size", [(128, 128), (90, 51), (7, 300)])
def test_any_mode_and_size_gives_rgb_of_about_that_size(mode: str, size: tuple[int, int]) -> None:
    """Whatever people label can be learned from, also when it is half or twice as large."""
    picture = render("Moon", 1).resize(size).convert(mode)
    seen = [augment(picture, _rng(index)) for index in range(25)]
    assert {changed.mode for changed in seen} == {"RGB"}
    assert len({changed.size for changed in seen}) > 3
    for changed in seen:
        assert all(0.5 * side - 1 <= now <= 2 * side + 1 for now, side in zip(changed.size, size, strict=True))


def test_what_comes_out_is_varied_but_seldom_lost() -> None:
    """Brightness, colour and background all vary; fewer than one in twenty pictures is a plain area."""
    pluto = render("Pluto", 1, 96)
    pictures = [augment(pluto, _rng(index)) for index in range(100)]
    values = [np.asarray(picture, np.float64) for picture in pictures]
    means = np.array([one.mean() for one in values])
    borders = np.array([np.median(np.concatenate((one[0], one[-1]))) for one in values])
    tints = np.array([np.ptp(one.mean(axis=(0, 1))) / (one.mean() + 1) for one in values])
    assert means.min() < 0.3 * means.max()
    assert (borders > 20).mean() > 0.1
    assert (borders < 5).mean() > 0.3
    assert (tints > 0.25).mean() > 0.1
    assert np.mean([one.std() < 2 for one in values]) < 0.05


def test_a_clean_share_is_only_turned() -> None:
    """Some examples of every class stay plain: their brightness is that of the original."""
    for body in BODIES:
        picture = render(body, 1, 64)
        mean = np.asarray(picture).mean()
        near = [abs(np.asarray(augment(picture, _rng(index))).mean() / mean - 1) < 0.12 for index in range(20)]
        assert 0.05 < np.mean(near) < 0.8


def test_a_picture_without_black_sky_gets_no_stars_painted_over_it() -> None:
    """A body that fills the picture is not mistaken for background: nothing new and bright appears on plain grey."""
    grey = Image.new("RGB", (64, 64), (120, 120, 120))
    plain = [np.asarray(augment(grey, _rng(index)), np.float64) for index in range(60)]
    assert np.mean([one[16:48, 16:48].std() < 1 for one in plain]) > 0.15
