"""Heads on clouds of numbers: what is learned, how honest cross-validation is, and what makes no difference."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from celestial_backend.learning import heads
from celestial_backend.learning.heads import Fitted, Lessons, fit, folds
from celestial_backend.models.headed import Head, unit

WIDTH = 1280
GENERAL = {"general": slice(0, WIDTH)}

Floats = NDArray[np.floating]


def clouds(
    classes: int, each: int, *, apart: float = 0.5, seed: int = 1, draw: int = 0, width: int = WIDTH
) -> tuple[NDArray[np.float32], NDArray[np.integer]]:
    """
    Vectors of length 1 around one middle for each class, in some directions wider than in others; and the classes.

    `apart` is how far the middles lie from each other, `seed` decides where, and `draw` the vectors around them.
    """
    rng = np.random.default_rng([seed, classes])
    middles = rng.standard_normal((classes, width)) * apart
    wide = np.linalg.qr(rng.standard_normal((width, 20)))[0] * 4
    rng = np.random.default_rng([seed, classes, 5, draw])
    right = np.repeat(np.arange(classes), each)
    noise = rng.standard_normal((len(right), 20)) @ wide.T + rng.standard_normal((len(right), width))
    return unit((2.0 + middles[right] + noise).astype(np.float32)), right


def lessons(vectors: NDArray[np.float32], right: NDArray[np.integer], classes: int = 0, **more: object) -> Lessons:
    count = classes or int(right.max()) + 1
    width = vectors.shape[1]
    plain = Lessons(
        vectors, np.eye(count, dtype=np.float32)[right], np.ones(len(right), np.float32), GENERAL,
        np.zeros((0, width), np.float32), np.zeros(0, int), np.zeros((0, width), np.float32),
    )  # fmt: skip
    return replace(plain, **more)  # type: ignore[arg-type]


def says(fitted: Fitted, vectors: NDArray[np.float32], *, multiple: bool = False) -> NDArray[np.float64]:
    """What the head says as it is served."""
    names = tuple(f"{column}" for column in range(len(fitted.bias)))
    return Head("c", names, fitted.weights, fitted.bias, multiple=multiple).probabilities(vectors)


def right_of(said: Floats, right: NDArray[np.integer]) -> float:
    return float((said.argmax(axis=1) == right).mean())


@pytest.mark.parametrize(
    ("classes", "each"),
    [
        pytest.param(2, 3, id="two choices, three labels each"),
        pytest.param(2, 60, id="two choices, many labels"),
        pytest.param(5, 8, id="five choices"),
        pytest.param(40, 3, id="many choices, few labels"),
    ],
)
def test_what_lies_apart_is_learned(classes: int, each: int) -> None:
    """Pictures that it never saw are said right, and cross-validation knew."""
    fitted = fit(lessons(*clouds(classes, each)))
    assert right_of(says(fitted, clouds(classes, 20, draw=1)[0]), clouds(classes, 20, draw=1)[1]) > 0.97
    assert right_of(fitted.unseen, clouds(classes, each)[1]) > 0.9
    assert fitted.weights.dtype == fitted.bias.dtype == np.float32
    assert fitted.weights.shape == (WIDTH, classes)
    assert fitted.unseen.sum(axis=1) == pytest.approx(1)
    assert fitted.loss == fitted.losses[fitted.kind]


def test_unseen_labels_were_not_seen() -> None:
    """A wrong label is not given back by the head that judges it: it says what the picture shows."""
    vectors, right = clouds(4, 15)
    given = right.copy()
    wrong = np.arange(0, 60, 6)
    given[wrong] = (right[wrong] + 1) % 4
    fitted = fit(lessons(vectors, given))
    said = fitted.unseen.argmax(axis=1)
    assert (said[wrong] == right[wrong]).mean() >= 0.9
    assert (said[wrong] == given[wrong]).mean() <= 0.1


def test_unseen_labels_of_nothing_are_guessed() -> None:
    """Labels that have nothing to do with the pictures are said right as often as by chance, over many draws."""
    shares = []
    for seed in range(12):
        vectors, _ = clouds(1, 40, seed=seed)
        given = np.random.default_rng(seed).permutation(np.arange(40) % 4)
        shares.append(right_of(fit(lessons(vectors, given)).unseen, given))
    assert np.mean(shares) < 0.33, "a quarter by chance"


def test_copies_of_a_judged_picture_are_not_shown() -> None:
    """Else each label would be given back: here each picture has three copies that are nearly itself."""
    vectors, _ = clouds(1, 30)
    given = np.random.default_rng(3).permutation(np.arange(30) % 2)
    originals = np.repeat(np.arange(30), 3)
    noise = np.random.default_rng(4).standard_normal((90, WIDTH)) * 1e-4
    copies = unit((vectors[originals] + noise).astype(np.float32))
    fitted = fit(lessons(vectors, given, copies=copies, originals=originals))
    assert right_of(fitted.unseen, given) < 0.75


def test_the_order_of_rows_does_not_matter() -> None:
    """Within rounding, where the classes lie apart; and the same rows give the same numbers to the last bit."""
    vectors, right = clouds(4, 12)
    order = np.random.default_rng(5).permutation(len(right))
    one, other = fit(lessons(vectors, right)), fit(lessons(vectors[order], right[order]))
    fresh, _ = clouds(4, 10, draw=1)
    assert says(other, fresh).argmax(axis=1).tolist() == says(one, fresh).argmax(axis=1).tolist()
    assert np.abs(says(other, fresh) - says(one, fresh)).max() < 0.1, "the folds are others"
    again = fit(lessons(vectors, right))
    assert np.array_equal(again.weights, one.weights)
    assert np.array_equal(again.unseen, one.unseen)


def test_weights_matter() -> None:
    """Twenty right labels and twenty wrong ones: those of a hundredth of the weight are outvoted."""
    vectors, right = clouds(2, 20)
    given = right.copy()
    wrong = np.concatenate([np.arange(0, 20, 2), np.arange(20, 40, 2)])
    given[wrong] = 1 - right[wrong]
    fresh, truth = clouds(2, 30, draw=1)
    shares = []
    for light in (1.0, 0.01):
        weights = np.ones(40, np.float32)
        weights[wrong] = light
        shares.append(right_of(says(fit(lessons(vectors, given, weights=weights)), fresh), truth))
    assert shares[1] > 0.95
    assert shares[0] < shares[1] - 0.1


def test_pictures_without_a_label_help() -> None:
    """Two labels of each of six choices, among three hundred pictures whose clouds are tight."""
    gains = []
    for seed in range(3):
        vectors, right = clouds(6, 2, apart=0.3, seed=seed)
        pool, _ = clouds(6, 50, apart=0.3, seed=seed, draw=2)
        fresh, truth = clouds(6, 40, apart=0.3, seed=seed, draw=3)
        alone = right_of(says(fit(lessons(vectors, right)), fresh), truth)
        helped = right_of(says(fit(lessons(vectors, right, pool=pool)), fresh), truth)
        gains.append(helped - alone)
    assert np.mean(gains) > 0.15, str(gains)


def test_pictures_without_a_label_do_no_harm() -> None:
    """Where they show something else altogether."""
    vectors, right = clouds(4, 10)
    pool, _ = clouds(9, 30, seed=7)
    fresh, truth = clouds(4, 25, draw=3)
    assert right_of(says(fit(lessons(vectors, right, pool=pool)), fresh), truth) > 0.95


def test_copies_teach_what_a_change_looks_like() -> None:
    """Pictures that are all changed in one direction are said right by a head that has seen such copies."""
    vectors, right = clouds(3, 12)
    direction = np.random.default_rng(6).standard_normal(WIDTH).astype(np.float32)
    direction /= np.linalg.norm(direction)
    direction += vectors[right == 1].mean(axis=0) - vectors[right == 0].mean(axis=0)

    def change(plain: NDArray[np.float32]) -> NDArray[np.float32]:
        return unit(plain + direction)

    fresh, truth = clouds(3, 40, draw=1)
    plain = fit(lessons(vectors, right))
    taught = fit(lessons(vectors, right, copies=change(vectors), originals=np.arange(len(right))))
    assert right_of(says(taught, fresh), truth) > 0.9
    assert right_of(says(taught, change(fresh)), truth) > right_of(says(plain, change(fresh)), truth) + 0.1


@pytest.mark.parametrize(("few", "least"), [pytest.param(1, 0.0, id="one label"), pytest.param(5, 0.95, id="five")])
def test_a_choice_with_few_labels_beside_others(few: int, least: float) -> None:
    """One label is no trouble to the others; five are enough."""
    vectors, right = clouds(3, 20)
    fitted = fit(lessons(vectors[: 40 + few], right[: 40 + few]))
    fresh, truth = clouds(3, 20, draw=1)
    assert np.isfinite(fitted.weights).all()
    assert np.isfinite(fitted.unseen).all()
    assert right_of(says(fitted, fresh[:40]), truth[:40]) > 0.95
    assert right_of(says(fitted, fresh[40:]), truth[40:]) >= least


def test_several_choices_of_one_picture() -> None:
    """Each by itself: a picture may have two, one or none; probabilities are of each."""
    rng = np.random.default_rng(8)
    directions = rng.standard_normal((3, WIDTH))

    def made(count: int, draw: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        rng = np.random.default_rng([9, draw])
        has = rng.random((count, 3)) < (0.5, 0.3, 0.2)
        noise = rng.standard_normal((count, WIDTH))
        return unit((3 + has @ directions + noise).astype(np.float32)), has.astype(np.float32)

    vectors, targets = made(60, 0)
    plain = lessons(vectors, np.zeros(60, int), 3)
    fitted = fit(replace(plain, targets=targets, multiple=True))
    fresh, truth = made(100, 1)
    said = says(fitted, fresh, multiple=True)
    assert ((said >= 0.5) == (truth > 0)).mean() > 0.93
    assert ((fitted.unseen >= 0.5) == (targets > 0)).mean() > 0.85
    assert said[:, 0].mean() == pytest.approx(0.5, abs=0.15)


def test_one_of_several_choices_that_all_pictures_have() -> None:
    """It is said of all."""
    vectors, _ = clouds(1, 20)
    targets = np.zeros((20, 2), np.float32)
    targets[:, 0], targets[::2, 1] = 1, 1
    fitted = fit(replace(lessons(vectors, np.zeros(20, int), 2), targets=targets, multiple=True))
    assert (says(fitted, vectors, multiple=True)[:, 0] > 0.9).all()


@pytest.mark.parametrize(
    ("each", "apart"),
    [
        pytest.param(6, 0.3, id="few labels"),
        pytest.param(40, 0.13, id="many labels, hard"),
        pytest.param(40, 0.2, id="many labels, easy"),
    ],
)
def test_probabilities_are_those_of_being_right(each: int, apart: float) -> None:
    """How sure a head is of fresh pictures is how often it is right, within a tenth, over some draws."""
    sure, right = [], []
    for seed in range(4):
        fitted = fit(lessons(*clouds(4, each, apart=apart, seed=seed)))
        fresh, truth = clouds(4, 150, apart=apart, seed=seed, draw=1)
        said = says(fitted, fresh)
        sure.append(said.max(axis=1).mean())
        right.append(right_of(said, truth))
    assert np.mean(sure) == pytest.approx(np.mean(right), abs=0.1), f"{sure} {right}"


def test_a_temperature_makes_as_sure_as_right() -> None:
    """On average, and of a hundred right answers no surer than Laplace's rule."""
    rng = np.random.default_rng(2)
    logits = 9 * rng.normal(size=(400, 3))
    right = logits.argmax(axis=1)
    right[:100] = (right[:100] + 1) % 3
    found = heads.probabilities(logits / heads.temperature(logits, np.eye(3)[right]), multiple=False)
    assert found.max(axis=1).mean() == pytest.approx(0.75, abs=0.01)
    all_right = heads.temperature(logits[:100], np.eye(3)[logits[:100].argmax(axis=1)])
    assert heads.probabilities(logits[:100] / all_right, multiple=False).max(axis=1).mean() <= 101 / 102


def test_a_few_labels_do_not_make_sure() -> None:
    """Six labels that were all said right are no proof of certainty: a wrong answer is seldom sure."""
    lost = []
    for seed in range(6):
        fitted = fit(lessons(*clouds(2, 3, apart=0.38, seed=seed)))
        fresh, truth = clouds(2, 100, apart=0.38, seed=seed, draw=1)
        said = says(fitted, fresh)
        lost.append(-np.log(np.maximum(said[np.arange(len(truth)), truth], 1e-12)).mean())
    assert max(lost) < np.log(2) + 0.01, "worse than to know nothing"


def test_numbers_on_columns_are_those_on_axes() -> None:
    """A head is fitted on the principal axes of all rows, and served on the columns themselves."""
    vectors, right = clouds(4, 40)
    given = lessons(vectors, right)
    fitted = fit(given)
    order = np.random.default_rng(10).permutation(WIDTH)
    turned = fit(lessons(vectors[:, order], right))
    fresh, _ = clouds(4, 20, draw=1)
    assert says(turned, fresh[:, order]) == pytest.approx(says(fitted, fresh), abs=1e-3)


def test_more_rows_than_columns() -> None:
    """As a network's own features are: a few dozen."""
    vectors, right = clouds(3, 60, width=24, apart=3)
    fitted = fit(lessons(vectors, right, spaces={"own": slice(0, 24)}))
    fresh, truth = clouds(3, 30, width=24, apart=3, draw=1)
    assert fitted.weights.shape == (24, 3)
    assert right_of(says(fitted, fresh), truth) > 0.9


def test_the_space_that_tells_is_chosen() -> None:
    """One of two is noise: the head takes the other, alone or beside it, and its columns fit."""
    telling, right = clouds(3, 12, width=200, apart=1.5)
    noise, _ = clouds(1, 36, width=100, seed=5)
    spaces = {"general": slice(0, 100), "own": slice(100, 300)}
    fitted = fit(lessons(np.concatenate([noise, telling], axis=1), right, spaces=spaces))
    assert "own" in fitted.spaces
    assert len(fitted.weights) == sum(spaces[name].stop - spaces[name].start for name in fitted.spaces)
    assert right_of(fitted.unseen, right) > 0.9


def test_only_the_named_combinations_are_tried() -> None:
    """Where somebody knows which."""
    vectors, right = clouds(3, 10, width=200)
    spaces = {"general": slice(0, 100), "own": slice(100, 200)}
    fitted = fit(lessons(vectors, right, spaces=spaces), [("general", "own")])
    assert fitted.spaces == ("general", "own")


def test_pictures_that_are_all_the_same() -> None:
    """Nothing can be learned of them, and nothing breaks."""
    vectors = np.repeat(clouds(1, 1)[0], 8, axis=0)
    fitted = fit(lessons(vectors, np.arange(8) % 2))
    assert np.isfinite(fitted.weights).all()
    assert np.isfinite(fitted.unseen).all()
    assert says(fitted, vectors).max() < 0.9


@pytest.mark.parametrize(
    ("counts", "most"),
    [pytest.param((30, 30), 20, id="few"), pytest.param((2, 3, 50), 20, id="uneven"), pytest.param((900, 100), 5)],
)
def test_folds_share_out_each_choice(counts: tuple[int, ...], most: int) -> None:
    """Each fold has as many rows of a choice as any other, give or take one; and of all rows."""
    right = np.repeat(np.arange(len(counts)), counts)
    found = folds(np.eye(len(counts))[right])
    assert len(np.unique(found)) <= most
    for rows in [right >= 0, *(right == number for number in range(len(counts)))]:
        shares = np.bincount(found[rows], minlength=found.max() + 1)
        assert shares.max() - shares.min() <= 1
    assert np.array_equal(found, folds(np.eye(len(counts))[right]))


def test_logits_that_are_huge() -> None:
    """They are no trouble."""
    logits = np.array([[1e6, 0.0], [-1e6, 0.0]])
    assert heads.probabilities(logits, multiple=False).tolist() == [[1, 0], [0, 1]]
    assert np.isfinite(heads.probabilities(logits, multiple=True)).all()
