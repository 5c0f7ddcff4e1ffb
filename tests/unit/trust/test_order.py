"""The order in which tasks are labelled: typical pictures, small leads, and some at random among them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from celestial_backend.database import Database
from celestial_backend.errors import StateError
from celestial_backend.labels import UNKNOWN_SCORE
from celestial_backend.settings import NEEDS_LABELS, TYPICAL, Settings
from celestial_backend.trust.order import EXPLORED, Order, places
from celestial_backend.trust.seen import Seen
from celestial_backend.trust.trial import Trial

NOBODY, FIRST = np.full(300, np.nan), 60


def crowd(count: int = 300, kinds: int = 6, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Pictures of some kinds, of which the last is rare, and their kinds."""
    rng = np.random.default_rng(seed)
    sizes = np.array([*[count // kinds * 11 // 10] * (kinds - 1), 0])
    sizes[-1] = count - sizes.sum()
    kind = np.repeat(np.arange(kinds), sizes)
    vectors = np.eye(40)[kind] + rng.normal(0, 0.12, (count, 40))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32), kind


def first(place_of: dict[int, float], count: int) -> list[int]:
    return sorted(place_of, key=place_of.__getitem__)[:count]


def test_before_any_label_each_kind_comes_early() -> None:
    """Of 12 pictures at random, one of the rare kind is often missing; of 12 typical ones none is."""
    vectors, kind = crowd()
    place_of = places(vectors, np.zeros(300, bool), NOBODY, NOBODY, FIRST)
    assert set(kind[first(place_of, 20)]) == set(range(6))
    assert len(place_of) == 300
    assert all(0 < place < 1 for place in place_of.values())


def test_what_is_labelled_is_covered() -> None:
    """A kind that has labels already waits for the others."""
    vectors, kind = crowd()
    labelled = kind == 0
    place_of = places(vectors, labelled, NOBODY, NOBODY, first=70)
    assert 0 not in kind[first(place_of, 10)]
    assert not set(place_of) & set(np.flatnonzero(labelled))


def test_then_the_least_sure_come() -> None:
    """A few of them that are unlike each other, and then all by their leads."""
    vectors, _ = crowd()
    leads = np.random.default_rng(2).random(300)
    labelled = np.arange(300) < FIRST
    place_of = places(vectors, labelled, leads, NOBODY, FIRST)
    ranked = sorted(range(FIRST, 300), key=leads.__getitem__)
    assert set(first(place_of, 9)) < set(ranked[:48])
    assert [row for row in first(place_of, 240) if row not in ranked[:48]] == ranked[48:]
    assert min(place_of.values()) == pytest.approx(FIRST / 300, abs=0.01)


def test_the_share_at_random_holds_at_any_moment() -> None:
    """Label in the order, learn, order anew: among the first 100, 200, 300 labels a tenth was drawn by chance."""
    rng = np.random.default_rng(5)
    vectors, _ = crowd(600)
    chance = np.where(rng.random(600) < EXPLORED, rng.random(600), np.nan)
    labelled, given = np.zeros(600, bool), list[int]()
    for _ in range(10):
        place_of = places(vectors, labelled, rng.random(600), chance, FIRST)
        given += first(place_of, 50)
        labelled[given] = True
    shares = [float(np.mean(~np.isnan(chance[given[:count]]))) for count in (100, 200, 300, 400, 500)]
    assert all(abs(share - EXPLORED) < 0.05 for share in shares), shares


@pytest.mark.parametrize("count", [1, 2, 3, 30])
def test_few_pictures_have_an_order_too(count: int) -> None:
    vectors, _ = crowd(300)
    assert len(places(vectors[:count], np.zeros(count, bool), NOBODY[:count], NOBODY[:count], FIRST)) == count
    same = np.tile(vectors[:1], (count, 1))
    assert len(places(same, np.zeros(count, bool), NOBODY[:count], NOBODY[:count], FIRST)) == count


# What Label Studio gets


@pytest.fixture
def order() -> Order:
    settings = replace(Settings.from_environ(), score=TYPICAL)
    database = Database(settings)
    return Order(settings, database, Trial(settings, database))


def answered(score: float, *said: str) -> dict[str, Any]:
    return {"result": list(said), "score": score, "model_version": "v"}


def seen(*tasks: int, labelled: tuple[int, ...] = ()) -> Seen:
    vectors = crowd()[0]
    return Seen({task: vectors[task] for task in tasks}, {}, set(labelled), {}, "17", 3)


def test_the_place_is_the_score(order: Order) -> None:
    order.arrange("7", seen(*range(1, 40), labelled=(39,)))
    place_of = order.places("7", [1, 2, 39, 40], "17")
    assert set(place_of) == {1, 2}
    tasks = [{"id": number} for number in (1, 2, 40)]
    found = order.placed(tasks, [answered(0.9, "x"), [], answered(0.5, "x")], "7@17", needs_labels=False)
    assert found == [answered(place_of[1], "x"), [], answered(0.5, "x")]


def test_before_there_is_a_model_predictions_are_empty(order: Order) -> None:
    """So that there is something to sort by; a task without a place is asked for again."""
    order.arrange("7", seen(1, 2, 3))
    found = order.placed([{"id": 1}, {"id": 9}, "no task"], [[], [], []], "7.17", needs_labels=True)
    assert found == [{"result": [], "score": order.places("7", [1])[1], "model_version": NEEDS_LABELS}, [], []]


def test_a_picture_unlike_all_comes_first_unless_chance_placed_it(order: Order) -> None:
    tasks = list(range(1, 200))
    order.arrange("7", seen(*tasks))
    low = answered(UNKNOWN_SCORE / 2)
    found = order.placed([{"id": task} for task in tasks], [low] * len(tasks), "7", needs_labels=False)
    kept = sum(each["score"] == low["score"] for each in found)
    assert 0.8 < kept / len(tasks) < 0.97


def test_numbers_that_label_studio_gives_to_no_task_have_no_place(order: Order) -> None:
    """They cost neither the request nor the others of it their answers."""
    order.arrange("7", seen(1))
    strange: list[Any] = [[1], {"a": 1}, 2**70, -1, True, "1", None, 1.0]
    given = [answered(0.9, "x")] * (len(strange) + 1)
    found = order.placed([*({"id": each} for each in strange), {"id": 1}], given, "7", needs_labels=False)
    assert found[:-1] == given[:-1]
    assert found[-1]["score"] == order.places("7", [1])[1]


def test_two_that_put_a_project_in_order_at_once(order: Order, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a worker and a person on another machine may; the later one counts."""
    monkeypatch.setattr("celestial_backend.trust.order.AT_ONCE", 1)
    own = Database.writing
    calls = iter(range(9))

    def writing(self: Database, key: str) -> Any:
        if next(calls) == 1:  # the places of old are gone, and the new ones are not there yet
            order.keep("7", "17", {1: 0.2, 2: 0.8})
        return own(self, key)

    monkeypatch.setattr(Database, "writing", writing)
    order.keep("7", "17", {1: 0.3, 2: 0.4})
    assert order.places("7", [1, 2]) == {1: 0.3, 2: 0.4}


def test_another_project_of_the_same_number_has_no_order_yet(order: Order) -> None:
    order.arrange("7", seen(1, 2, 3))
    assert order.places("7", [1, 2], "18") == {}
    order.arrange("7", seen(2))
    assert set(order.places("7", [1, 2, 3])) == {2}


def test_an_empty_project(order: Order) -> None:
    assert order.arrange("7", seen()) == 0
    assert order.places("7", []) == {}


def test_without_its_database_people_label_in_any_order(order: Order, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: object, **__: object) -> None:
        raise StateError("The database cannot be read.")

    order.arrange("7", seen(1, 2))
    monkeypatch.setattr(Database, "rows", away)
    given = [answered(0.9, "x"), []]
    assert order.placed([{"id": 1}, {"id": 2}], given, "7", needs_labels=False) == given


def test_other_scores_stay_as_they_are() -> None:
    settings = Settings.from_environ()
    database = Database(settings)
    order = Order(settings, database, Trial(settings, database))
    assert order.placed([{"id": 1}], [answered(0.9, "x")], "7", needs_labels=False) == [answered(0.9, "x")]
