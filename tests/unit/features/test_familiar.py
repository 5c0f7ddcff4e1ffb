"""What is unlike all that was learned."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from celestial_backend.features import Familiar, Nearest, familiar, unit
from celestial_backend.features.familiar import Relative

WIDTH = 64


def clouds(kinds: int, each: int, seed: int, spread: float = 0.06) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Pictures of some kinds, each a cloud on the sphere; a kind has the same middle whatever the seed."""
    middles = unit(np.random.default_rng(1).normal(size=(kinds, WIDTH)).astype(np.float32))
    rng, kind_of = np.random.default_rng(seed), np.repeat(np.arange(kinds), each)
    return unit(middles[kind_of] + rng.normal(scale=spread, size=(len(kind_of), WIDTH)).astype(np.float32)), kind_of


def crescents(kinds: int, each: int, seed: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Kinds that are curves and no clouds: the middle of one is as far from its pictures as another kind is."""
    rng, kind_of = np.random.default_rng(seed), np.repeat(np.arange(kinds), each)
    turn = rng.uniform(0, 2 * np.pi, len(kind_of))
    found = np.zeros((len(kind_of), WIDTH), np.float32)
    found[:, 0], found[:, 1] = np.cos(turn), np.sin(turn)
    found[np.arange(len(kind_of)), 2 + kind_of] = 0.35
    return unit(found + rng.normal(scale=0.01, size=found.shape).astype(np.float32)), kind_of


def known_of(vectors: NDArray[np.float32], kind_of: NDArray[np.int64], kinds: int) -> Familiar:
    found = Familiar.of(vectors[kind_of < kinds], kind_of[kind_of < kinds])
    assert found is not None
    return found


@pytest.mark.parametrize("each", [20, 40, 120])
@pytest.mark.parametrize("make", [clouds, crescents])
def test_kinds_that_were_not_learned_are_strange(make: object, each: int) -> None:
    """And of those that were, hardly more than one in fifty, however few there are to learn from."""
    familiar = known_of(*make(7, each, 2), 5)  # type: ignore[operator]
    vectors, kind_of = make(7, 100, 3)  # type: ignore[operator]
    strange = familiar.strangeness(vectors)
    assert ((strange >= 0) & (strange <= 1)).all()
    assert (strange[kind_of >= 5] > 0).mean() > 0.95
    assert (strange[kind_of < 5] > 0).mean() < 0.05


def test_the_stranger_the_more() -> None:
    """So that what nobody can know comes first where tasks are sorted by their scores."""
    vectors, kind_of = clouds(6, 60, 2)
    familiar = known_of(vectors, kind_of, 5)
    away = unit(vectors[0] + np.linspace(0.3, 1.5, 6)[:, None].astype(np.float32) * vectors[-1])
    strange = familiar.strangeness(away)
    assert (np.diff(strange) >= 0).all()
    assert strange[-1] > strange[0]


@pytest.mark.parametrize(
    ("kinds", "each"), [pytest.param(1, 50, id="one choice"), pytest.param(2, 5, id="ten pictures")]
)
def test_too_few_make_nothing_familiar(kinds: int, each: int) -> None:
    """Then nothing is withheld."""
    assert Familiar.of(*clouds(kinds, each, 2)) is None


def test_where_classes_cannot_be_told_nothing_is_familiar() -> None:
    """Labels that say nothing about the pictures are no ground to call one strange."""
    vectors, _ = clouds(1, 200, 2)
    assert Familiar.of(vectors, np.random.default_rng(0).integers(0, 4, len(vectors))) is None


@pytest.mark.parametrize("make", [clouds, crescents])
def test_what_was_saved_says_the_same(make: object, tmp_path: Path) -> None:
    """Within what three digits change."""
    before = known_of(*make(6, 40, 2), 5)  # type: ignore[operator]
    np.savez(tmp_path / "arrays.npz", **before.arrays())
    with np.load(tmp_path / "arrays.npz", allow_pickle=False) as arrays:
        after = Familiar.from_arrays(dict(arrays), WIDTH)
    assert after is not None
    vectors, _ = make(6, 30, 3)  # type: ignore[operator]
    assert type(after.measure) is type(before.measure)
    assert after.strangeness(vectors) == pytest.approx(before.strangeness(vectors), abs=0.05)


def test_both_measures_are_needed() -> None:
    """Each is chosen where it is the better one."""
    chosen = {make.__name__: known_of(*make(6, 60, 2), 5).measure.name for make in (clouds, crescents)}
    assert chosen["crescents"] == "nearest"
    assert isinstance(known_of(*clouds(6, 60, 2, spread=0.15), 5).measure, Relative)


@pytest.mark.parametrize("measure", [Nearest, Relative])
@pytest.mark.parametrize("each", [10, 20])
def test_what_was_learned_is_familiar(
    each: int, measure: type[Nearest | Relative], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but the oddest, also where the pictures are fewer than the directions in which they differ."""
    monkeypatch.setattr(familiar, "MEASURES", (measure,))
    rng, kind_of = np.random.default_rng(2), np.repeat(np.arange(5), each)
    vectors = unit(np.asarray(np.eye(5, 512)[kind_of] + rng.normal(scale=0.02, size=(5 * each, 512)), np.float32))
    known = Familiar.of(vectors, kind_of)
    assert known is not None
    assert (known.strangeness(vectors) > 0).mean() <= 0.03


@pytest.mark.parametrize("noise", [0.0, 1e-5, 1e-4])
def test_what_was_learned_is_familiar_though_all_pictures_of_a_class_are_nearly_one(noise: float) -> None:
    """As screenshots are, and what a camera that stands still takes: rounding moves them more than they differ."""
    centres, kind_of = clouds(3, 1, 5)[0], np.repeat(np.arange(3), 20)
    rng = np.random.default_rng(6)
    vectors = unit(np.asarray(centres[kind_of] + noise * rng.normal(size=(60, WIDTH)), np.float32))
    known = Familiar.of(vectors, kind_of)
    assert known is not None
    known = Familiar.from_arrays(known.arrays(), WIDTH)
    assert known is not None
    assert known.strangeness(vectors).max() == 0
    assert known.strangeness(clouds(5, 1, 5)[0][3:]).min() > 0


@pytest.mark.parametrize("broken", ["measure", "numbers", "bank", "reach"])
def test_damaged_arrays_are_refused(broken: str) -> None:
    """Whatever part is missing, of another shape, or no number."""
    arrays = known_of(*crescents(6, 40, 2), 5).arrays()
    assert Familiar.from_arrays(arrays, WIDTH) is not None
    lost = {name: array for name, array in arrays.items() if name != broken}
    numberless = arrays | {broken: np.full(arrays[broken].shape, np.nan)}
    for damaged in (lost, numberless, arrays | {broken: np.zeros((3, 3, 3))}):
        with pytest.raises((ValueError, TypeError)):
            Familiar.from_arrays(damaged, WIDTH)
    with pytest.raises((ValueError, TypeError)):
        Familiar.from_arrays(arrays, WIDTH + 1)


@pytest.mark.parametrize("make", [clouds, crescents])
def test_arrays_that_only_seem_to_fit_are_refused(make: object) -> None:
    """Numpy spreads what has an axis too many; that would show at the first picture that is asked for."""
    vectors, kind_of = make(6, 60, 2)  # type: ignore[operator]
    for measure in (Nearest.of(vectors, kind_of), Relative.of(vectors, kind_of)):
        arrays = Familiar(measure, 0.5, 0.2).arrays()
        for name in set(arrays) - {"measure", "numbers"}:
            for shape in ((*arrays[name].shape, 1), (1, *arrays[name].shape), (2, *arrays[name].shape)):
                with suppress(ValueError, TypeError):
                    found = Familiar.from_arrays(arrays | {name: np.resize(arrays[name], shape)}, WIDTH)
                    assert found is not None
                    assert found.strangeness(vectors[:5]).shape == (5,)


def test_a_measure_of_old_is_passed_over() -> None:
    """The model is served, and withholds nothing until it is trained again."""
    arrays = known_of(*crescents(6, 40, 2), 5).arrays()
    assert Familiar.from_arrays(arrays | {"measure": np.array("relative")}, WIDTH) is None
    with pytest.raises(ValueError, match="a measure that is known"):
        Familiar.from_arrays(arrays | {"measure": np.array("absolute")}, WIDTH)


def test_what_differs_where_nothing_learned_does_is_strange() -> None:
    """A picture of a wholly other kind lies beside the axes along which the learned ones differ."""
    rng, kind_of = np.random.default_rng(3), np.repeat(np.arange(4), 40)
    flat = np.zeros((160, 256), np.float32)
    flat[:, :16] = np.eye(4, 16)[kind_of] + rng.normal(scale=0.3, size=(160, 16))
    vectors = unit(flat + rng.normal(scale=0.01, size=flat.shape).astype(np.float32))
    beside = np.zeros((20, 256), np.float32)
    beside[:, 100:] = rng.normal(size=(20, 156))
    found = Relative.of(vectors, kind_of)
    assert found.distance(unit(beside)).min() > np.quantile(found.distance(vectors), 0.98)
