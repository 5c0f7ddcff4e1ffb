"""Labels and pictures to rows: what is learned with which weight, what is left out, what is told, what is read."""

from __future__ import annotations

import json
import random
import threading
import time
import tracemalloc
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from celestial_backend.errors import DecodeError, NotEnoughDataError, StudioError, TrainingError
from celestial_backend.features import digest
from celestial_backend.labels import ChoiceMap, Control
from celestial_backend.learning import dataset as module
from celestial_backend.learning.dataset import (
    Example,
    Gallery,
    Reader,
    Wanted,
    copies_for,
    pool_of,
    ranges,
    within,
)
from celestial_backend.models.headed import GENERAL, SAID
from celestial_backend.models.manifest import Unreadable
from tests.support import colours, gatherer
from tests.support.backend_server import label_config
from tests.support.colours import Colours
from tests.support.gatherer import FakeImages, Gatherer, counted
from tests.unit.learning.test_votes import annotation, region

cache, gather, no_pause = colours.cache, gatherer.gather, gatherer.no_pause


def task(number: int, choice: str = "Mars", value: object = None, **more: Any) -> dict[str, Any]:
    """A task with one annotation; `by`, `at`, `origin` and others as for an annotation."""
    return {
        "id": number,
        "data": {"image": value or f"picture {number}"},
        "annotations": [annotation(number, choice, **more)],
        "predictions": [],
    }


def some(count: int, *choices: str, start: int = 1) -> list[dict[str, Any]]:
    """Tasks whose choices take turns."""
    return [task(number, choices[number % len(choices)]) for number in range(start, start + count)]


def key(number: int) -> bytes:
    return digest(f"picture {number}".encode())


def test_examples(gather: Gatherer) -> None:
    """Each labelled picture is one example, in the order of tasks, with its choice, weight, source and vector."""
    tasks = some(40, "Mars", "Comet")
    tasks[3]["annotations"][0]["parent_prediction"] = 7
    tasks[3]["predictions"] = [{"id": 7, "result": [region("Mars")]}]
    got = gather(tasks, accepted_weight=0.25)
    (examples,) = got.examples.values()
    assert examples == [
        Example(
            key(number), frozenset({"Comet" if number % 2 else "Mars"}), 0.25 if number == 4 else 1.0, (number,),
            (number,), "accepted" if number == 4 else "unaided",
        )
        for number in range(1, 41)
    ]  # fmt: skip
    middle = FakeImages().decoded("", b"picture 7").getpixel((4, 4))
    expected = np.array(middle) / 255
    assert got.gallery.vectors[GENERAL][key(7)] == pytest.approx(expected, abs=1e-3)
    assert got.gallery.rows([key(7)], [GENERAL]) == pytest.approx((expected / np.linalg.norm(expected))[None], abs=1e-3)
    assert got.newest == "2026-01-01T00:00:40.000001Z"
    assert json.loads(json.dumps(got.counts.plain())) == got.counts.plain()
    assert got.counts.labels == {"choice": {"Comet": 20, "Mars": 20}}
    assert got.counts.sources == {"accepted": 1, "unaided": 39}
    assert (got.counts.tasks, got.counts.annotations) == (40, 40)


def test_the_same_labels_give_the_same_rows(gather: Gatherer) -> None:
    """Neither the order of pages nor that of threads matters."""
    tasks = some(60, "Mars", "Moon", "Comet")
    tasks += [task(100 + number, "Moon", f"picture {number}", by=2) for number in range(1, 30)]
    tasks += [task(200, "Moon", "broken")]
    others = [{"id": number, "data": {"image": f"picture {number}"}} for number in range(300, 340)]
    first = gather(tasks, copies=2, others=others)
    for seed in range(3):
        shuffled = random.Random(seed).sample(tasks, len(tasks))  # noqa: S311 - an order, not a secret
        gather.threads = seed + 1
        again = gather(shuffled, copies=2, others=others[::-1])
        for name in ("examples", "pool", "counts", "newest", "digest"):
            assert getattr(again, name) == getattr(first, name)
        pictures = [example.picture for example in first.examples["choice"]]
        assert np.array_equal(again.gallery.rows(pictures, [GENERAL]), first.gallery.rows(pictures, [GENERAL]))
        for one, other in zip(
            again.gallery.copied(pictures, [GENERAL]), first.gallery.copied(pictures, [GENERAL]), strict=True
        ):
            assert np.array_equal(one, other)


def test_the_digest_stands_for_labels_and_pictures(gather: Gatherer) -> None:
    """It changes with a choice, a weight, a picture or a task that is used, and with nothing else."""

    def digested(change: Any = None, more: Iterable[dict[str, Any]] = (), **settings: Any) -> str:
        tasks = some(20, "Mars", "Moon")
        if change:
            change(tasks[4])
        return gather([*tasks, *more], **settings).digest

    plain = digested()
    assert plain == digested(more=[task(99, was_cancelled=True)])
    assert plain == digested(lambda one: one["annotations"][0].update(updated_at="2026-02-01T00:00:00Z"))
    changes: list[Any] = [
        lambda one: one["annotations"][0].update(result=[region("Comet")]),
        lambda one: one["data"].update(image="another"),
    ]
    accepted = [task(30, origin="prediction")]
    different = {plain, *map(digested, changes), digested(more=[task(99)]), digested(more=accepted)}
    different.add(digested(more=accepted, accepted_weight=0.5))
    assert len(different) == 6


# Controls of their own, and several choices


TWO = ChoiceMap.for_learning(
    '<View><Image name="front" value="$front"/><Image name="back" value="$back"/>'
    '<Choices name="kind" toName="front"><Choice value="dress"/><Choice value="shoe"/></Choices>'
    '<Choices name="flaw" toName="back" choice="multiple"><Choice value="torn"/><Choice value="wet"/></Choices></View>'
)


def both(number: int, kind: str, *flaws: str) -> dict[str, Any]:
    result = [region(kind, None, "kind", "front"), *(region(flaw, None, "flaw", "back") for flaw in flaws)]
    data = {"front": f"front {number}", "back": f"back {number}"}
    return task(number) | {"data": data, "annotations": [annotation(number) | {"result": result}]}


def test_each_control_has_examples_of_its_own_picture(gather: Gatherer) -> None:
    """With the choices that it takes; none of several is an example too."""
    others = [{"id": 50, "data": {"front": "front 50", "back": "back 50"}}, {"id": 51, "data": {"front": "front 51"}}]
    got = gather([both(1, "dress", "torn", "wet"), both(2, "shoe")], choices=TWO, others=others)
    assert {name: [(each.picture, set(each.choices)) for each in mine] for name, mine in got.examples.items()} == {
        "kind": [(digest(b"front 1"), {"dress"}), (digest(b"front 2"), {"shoe"})],
        "flaw": [(digest(b"back 1"), {"torn", "wet"}), (digest(b"back 2"), set())],
    }
    assert got.pool == {"front": sorted(map(digest, (b"front 50", b"front 51"))), "back": [digest(b"back 50")]}
    assert got.counts.labels == {"kind": {"dress": 1, "shoe": 1}, "flaw": {"torn": 1, "wet": 1}}


# Duplicates and disagreement


class Together(FakeImages):
    """Pictures that are read by several threads at once, and not before all of them have begun."""

    def __init__(self, readers: int) -> None:
        super().__init__()
        self.barrier = threading.Barrier(readers, timeout=30)

    def file(self, value: object, task_id: int | None = None) -> bytes:
        data = super().file(value, task_id)
        self.barrier.wait()
        return data


@pytest.mark.parametrize("copies", [0, 2])
def test_a_task_that_shows_one_picture_twice(gather: Gatherer, copies: int) -> None:
    """Two threads read it side by side; each control has its example, with the same vector."""
    tasks = [both(number, kind, "torn") for number, kind in enumerate(("dress", "shoe"), 1)]
    for each in tasks:
        each["data"]["back"] = each["data"]["front"]
    gather.images = Together(4)
    got = gather(tasks, copies=copies, choices=TWO)
    pictures = [digest(b"front 1"), digest(b"front 2")]
    for mine in got.examples.values():
        assert [each.picture for each in mine] == pictures
    assert got.gallery.rows(pictures, [GENERAL]).shape == (2, 3)
    assert [len(each) for each in got.gallery.copies[GENERAL].values()] == [copies] * (2 if copies else 0)
    assert got.counts.unreadable == []


def test_the_same_picture_in_several_tasks_is_one_example(gather: Gatherer) -> None:
    """Their votes are pooled: two people who disagree over two tasks are a tie, a third decides it."""
    rest = some(20, "Mars", start=10)
    tasks = [task(1, "Mars", "same", by=1), task(2, "Moon", "same", by=2), task(3, "Moon", "same", by=3), *rest]
    got = gather(tasks)
    (one,) = (one for one in got.examples["choice"] if len(one.task_ids) > 1)
    assert (one.choices, one.task_ids, one.annotation_ids) == (frozenset({"Moon"}), (1, 2, 3), (1, 2, 3))
    assert got.counts.duplicates == 2
    assert got.counts.consensus == {"majority": 1, "one vote": 20}

    got = gather([tasks[0], tasks[1], *rest])
    assert all(len(one.task_ids) == 1 for one in got.examples["choice"])
    assert got.counts.pictures_left_out == {"on which the annotators disagree": 1}
    assert got.counts.consensus == {"one vote": 20, "tie": 1}


def test_the_model_is_asked_about_pictures_that_several_people_looked_at(gather: Gatherer) -> None:
    """It weighs annotators by CROWDLAB, and is not asked about the rest."""
    asked: list[int] = []

    def say(control: Control, pictures: list[bytes]) -> tuple[tuple[str, ...], NDArray[np.floating]]:
        assert control.from_name == "choice"
        asked.append(len(pictures))
        return ("Mars", "Moon"), np.tile(np.array([0.8, 0.2]), (len(pictures), 1))

    tasks = some(90, "Mars")
    for number, one in enumerate(tasks[:70]):
        one["annotations"].append(annotation(1000 + number, "Mars", by=2))
    tasks[70]["annotations"] += [annotation(2000, "Comet", by=2), annotation(2001, "Comet", by=3)]
    got = gather(tasks, say=say)
    assert asked == [71]
    assert got.counts.consensus == {"CROWDLAB": 70, "majority": 1, "one vote": 19}


# What is left out


def test_accepted_labels_that_count_nothing(gather: Gatherer) -> None:
    """With a weight of 0 they are no examples, and are counted."""
    tasks = some(30, "Mars")
    for one in tasks[:20]:
        one["annotations"][0].update(result=[region("Mars", "prediction")])
    got = gather(tasks, accepted_weight=0.0)
    assert [each.task_ids for each in got.examples["choice"]] == [(number,) for number in range(21, 31)]
    assert got.counts.pictures_left_out == {
        "accepted as pre-labelled, which CELESTIAL_ACCEPTED_WEIGHT lets count nothing": 20
    }


def test_too_little_is_a_refusal_with_counts() -> None:
    """Before any picture is read: how many there are of each choice, and what was left out and why."""
    labels = counted([*some(4, "Mars"), task(10, "Comet"), task(11, was_cancelled=True)])
    with pytest.raises(NotEnoughDataError) as raised:
        labels.check({})
    assert str(raised.value) == (
        "Training needs at least 2 choices of a control with 2 labelled pictures each; 'choice' has Mars: 4, Comet: 1."
        " Left out: 1 annotations skipped by the annotator. Label more pictures."
    )


@pytest.mark.parametrize(
    ("tasks", "known", "enough"),
    [
        pytest.param([], [], False, id="nothing"),
        pytest.param(some(4, "Mars", "Moon"), [], True, id="two of each"),
        pytest.param(some(3, "Mars", "Moon"), [], False, id="one of one"),
        pytest.param(some(2, "Comet"), ["Mars", "Moon"], True, id="one new beside what the live model knows"),
        pytest.param(some(1, "Comet"), ["Mars", "Moon"], False, id="one label"),
        pytest.param([], ["Mars", "Moon"], False, id="no label, but a live model"),
        pytest.param(some(2, "Mars"), ["Mars"], False, id="the only choice is known"),
    ],
)
def test_what_counts_can_tell(tasks: list[dict[str, Any]], known: list[str], enough: bool) -> None:
    """Two choices with two labels each, where the live model's choices need none."""
    labels = counted(tasks)
    if enough:
        labels.check({"choice": known})
    else:
        with pytest.raises(NotEnoughDataError, match="at least 2 choices of a control with 2 labelled"):
            labels.check({"choice": known})


@pytest.mark.parametrize(
    ("flaws", "told"),
    [
        pytest.param([["wet"], ["wet"], [], []], "", id="one choice, and pictures without it"),
        pytest.param([["wet"], ["wet"], ["wet"]], "'flaw' has wet: 3, not wet: 0", id="never without it"),
        pytest.param([["wet"], ["torn"], [], []], "'flaw' has torn: 1, wet: 1", id="one label each"),
    ],
)
def test_what_counts_can_tell_of_several_choices(flaws: list[list[str]], told: str) -> None:
    """One choice is enough, if some pictures have it and others have not."""
    labels = counted([both(number, "dress", *each) for number, each in enumerate(flaws, 1)], TWO)
    if not told:
        labels.check({})
        return
    with pytest.raises(NotEnoughDataError) as raised:
        labels.check({})
    assert told in str(raised.value)


def test_of_too_many_a_fixed_choice_is_read(gather: Gatherer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same pictures in whatever order the tasks come, and the others are not read."""
    monkeypatch.setattr(module, "PICTURES_MAX", 50)
    tasks = some(400, "Mars", "Moon")
    first, second = gather(tasks), gather(tasks[::-1])
    assert first.digest == second.digest
    assert len(first.examples["choice"]) == 50
    assert first.counts.pictures_left_out == {"beyond those that one training reads": 350}
    assert len(gather.images.reads) == 100


# Pictures that cannot be had


def test_a_few_pictures_that_cannot_be_had_are_left_out(gather: Gatherer) -> None:
    """Their tasks and reasons are told; they are tried once more if that may help."""
    gather.images.away = True
    tasks = [*some(95, "Mars"), *(task(number, value=f"broken {number}") for number in (200, 201))]
    tasks += [task(300, value="away"), task(301) | {"data": {"picture": "x"}}, task(302, value="data:,broken")]
    waited: list[bool] = []
    gather.images.decoded = refusing_data(gather.images)  # type: ignore[method-assign]
    got = gather(tasks, wait=lambda: waited.append(True))
    assert len(got.examples["choice"]) == 95
    assert got.counts.pictures_left_out == {"that cannot be had": 5}
    assert got.counts.unreadable == [
        Unreadable(200, "broken 200 is no picture."),
        Unreadable(201, "broken 201 is no picture."),
        Unreadable(300, "away is away."),
        Unreadable(301, "The task has no data key 'image' that the label config names; it has ['picture']."),
        Unreadable(302, "data:,broken is no picture."),
    ]
    assert waited == [True]
    assert gather.images.reads.count("away") == 2
    assert gather.images.reads.count("data:,broken") == 1, "what stands in the task does not change"


def refusing_data(images: FakeImages) -> Any:
    decoded = images.decoded

    def refuse(value: object, data: bytes, take: Any = None) -> Image.Image:
        return decoded(value, data.removeprefix(b"data:,"), take)

    return refuse


def test_only_the_first_failures_are_told(gather: Gatherer) -> None:
    """Of very many, the manifest keeps twenty."""
    tasks = [*some(300, "Mars"), *(task(number, value=f"broken {number}") for number in range(1000, 1030))]
    told = gather(tasks).counts.unreadable or []
    assert [each.task for each in told] == list(range(1000, 1020))


@pytest.mark.parametrize("kind", ["away", "token"])
def test_label_studio_that_comes_back_costs_no_picture(gather: Gatherer, kind: str) -> None:
    """All that failed while it was away is read once it answers."""
    gather.images.away = True

    def wait() -> None:
        gather.images.away = False

    got = gather([task(number, value=f"{kind} {number}") for number in range(1, 31)], wait=wait)
    assert len(got.examples["choice"]) == 30
    assert got.counts.unreadable == []


def test_a_label_studio_that_stays_away_ends_the_training(gather: Gatherer) -> None:
    """What `wait` raises is the reason; without it, too many missing pictures are."""
    gather.images.away = True
    tasks = [*some(80, "Mars"), *(task(number, value=f"away {number}") for number in range(100, 120))]

    def wait() -> None:
        raise StudioError("Gone.")

    with pytest.raises(StudioError, match="Gone"):
        gather(tasks, wait=wait)
    with pytest.raises(TrainingError) as raised:
        gather(tasks)
    assert str(raised.value) == (
        "A training needs 90% of the labelled pictures, and 20 of 100 cannot be had. Mend them, or delete their labels."
        " Task 100: away 100 is away. Task 101: away 101 is away. Task 102: away 102 is away."
    )


# Vectors, copies and pictures without a label


def test_a_picture_is_looked_at_once(gather: Gatherer) -> None:
    """Whichever training asks, and its copies too; another embedder looks for itself."""
    tasks = some(20, "Mars", "Moon")
    first = gather(tasks, copies=2)
    assert gather.colours.seen == 60
    gather.cache.close()
    again = gather(tasks, copies=2)
    assert gather.colours.seen == 60
    pictures = [key(number) for number in range(1, 21)]
    assert np.array_equal(again.gallery.rows(pictures, [GENERAL]), first.gallery.rows(pictures, [GENERAL]))
    gather.colours.name = "colours-2"
    gather(tasks)
    assert gather.colours.seen == 80


def test_a_damaged_cache_costs_time_alone(gather: Gatherer) -> None:
    """A vector of another length is computed again."""
    gather.cache.put("colours-1", {key(number): np.ones(5, np.float32) for number in range(1, 5)})
    gather.cache.close()
    got = gather(some(4, "Mars", "Moon"))
    assert {vector.shape for vector in got.gallery.vectors[GENERAL].values()} == {(3,)}


def test_copies_belong_to_their_pictures(gather: Gatherer) -> None:
    """In the order of the pictures that are asked for; a picture without one is passed over."""
    got = gather(some(5, "Mars", "Moon"), copies=3, others=[{"id": 9, "data": {"image": "picture 9"}}])
    copies, places = got.gallery.copied([key(3), key(9), key(1)], [GENERAL])
    assert places.tolist() == [0, 0, 0, 2, 2, 2]
    assert np.linalg.norm(copies, axis=1) == pytest.approx(1)
    again, _ = got.gallery.copied([key(1)], [GENERAL])
    assert np.array_equal(copies[3:], again)
    nothing, nowhere = got.gallery.copied([key(9)], [GENERAL])
    assert (nothing.shape, nowhere.shape) == ((0, 3), (0,))


def test_spaces_stand_side_by_side() -> None:
    """Each vector has length 1 by itself."""
    one, two = {b"a": np.array([3.0, 4], np.float32)}, {b"a": np.array([0.0, 0, 9], np.float32)}
    gallery = Gallery({GENERAL: one, "own": two}, {GENERAL: {}, "own": {}})
    assert gallery.rows([b"a"], [GENERAL, "own"]).tolist() == [[pytest.approx(0.6), pytest.approx(0.8), 0, 0, 1]]


def test_the_same_labels_of_several_choices_are_others(gather: Gatherer) -> None:
    """A control that asks for one choice and for several learns other heads."""
    one = gather(some(4, "Mars", "Moon"))
    assert gather(some(4, "Mars", "Moon")).digest == one.digest
    several = ChoiceMap.for_learning(label_config(("Mars", "Moon")).replace("<Choices ", '<Choices choice="multiple" '))
    assert gather(some(4, "Mars", "Moon"), choices=several).digest != one.digest


@pytest.mark.parametrize(
    ("pictures", "copies"), [(0, 2), (1, 2), (500, 2), (501, 1), (1000, 1), (1001, 0), (20_000, 0)]
)
def test_how_many_copies(pictures: int, copies: int) -> None:
    """Two of each, and 1,000 in all."""
    assert copies_for(pictures) == copies


def test_pictures_without_a_label_are_those_of_other_tasks(gather: Gatherer) -> None:
    """A labelled picture is none of them, whichever task shows it; one that cannot be read is no harm."""
    others: list[dict[str, Any]] = [
        {"id": 2, "data": {"image": "picture 2"}}, {"id": 50, "data": {"image": "picture 1"}},
        {"id": 51, "data": {"image": "new"}}, {"id": 52, "data": {"image": "new"}},
        {"id": 53, "data": {"image": "broken"}}, {"id": 54, "data": {"text": "none"}},
    ]  # fmt: skip
    got = gather(some(4, "Mars", "Moon"), others=others)
    assert got.pool == {"image": [digest(b"new")]}
    assert got.counts.unlabelled == 1


def test_of_many_pictures_without_a_label_a_fixed_choice_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """In whatever order the tasks come; another project takes others."""
    monkeypatch.setattr(module, "POOL_MAX", 20)
    labels = counted(some(4, "Mars"))
    tasks = [{"id": number, "data": {"image": f"{number}"}} for number in range(1, 300)]
    first = [each.task_id for each in pool_of(tasks, labels, "1")]
    assert first == [each.task_id for each in pool_of(tasks[::-1], labels, "1")]
    assert len(first) == 20
    assert first != [each.task_id for each in pool_of(tasks, labels, "2")]


def test_no_picture_is_begun_after_the_deadline(gather: Gatherer) -> None:
    """Those that were not looked at are neither read nor failed."""
    wanted = [Wanted(number, "image", f"picture {number}") for number in range(1, 5)]
    gather.reader().read(wanted, until=time.monotonic() - 1)
    assert gather.images.reads == []
    assert [(each.picture, each.problem) for each in wanted] == [(None, "")] * 4


# Progress and memory


def test_progress_is_told(gather: Gatherer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Now and then while nobody knows the number, and at the end with it."""
    monkeypatch.setattr(module, "REPORT_EVERY", 10)
    told: list[tuple[int, int | None]] = []
    gather(some(45, "Mars"), report=lambda done, total: told.append((done, total)))
    assert told[-1] == (45, 45)
    assert told[:-1] == [(done, None) for done in range(10, 10 * len(told), 10)]
    assert len(told) > 2


def test_memory_stays_flat(gather: Gatherer) -> None:
    """Of five hundred big values and pictures, neither pile up, and few are on their way at a time."""
    gather.images.size_px = 48
    begun = 0
    ahead: list[int] = []

    def wanted() -> Iterator[Wanted]:
        nonlocal begun
        for number in range(1, 501):
            begun += 1
            ahead.append(begun - len(gather.images.reads))
            yield Wanted(number, "image", f"{number} " + "x" * 50_000)

    reader = gather.reader()
    tracemalloc.start()
    try:
        reader.read(wanted(), copies=1)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(reader.gallery.vectors[GENERAL]) == 500
    assert max(ahead) <= 4 * 4 + 1
    assert gather.images.most_at_once <= 4
    assert peak < 8e6, "the values alone are 25 MB"


def test_a_picture_in_the_task_is_let_go(gather: Gatherer) -> None:
    """Once it was read, or cannot be."""
    wanted = [Wanted(1, "image", "picture"), Wanted(2, "image", "data:broken"), Wanted(3, "image", "broken")]
    gather.images.decoded = lambda *_: (_ for _ in ()).throw(DecodeError("No."))  # type: ignore[method-assign]
    reader = gather.reader()
    reader.read(wanted)
    assert [each.value for each in wanted] == ["picture", None, "broken"]
    gather.images.decoded = FakeImages().decoded  # type: ignore[method-assign]
    reader.read(wanted[:1])
    assert wanted[0].value is None


def test_ranges() -> None:
    """Numbers in a row are written as their ends, and read again."""
    assert ranges([]) == ""
    assert ranges([7]) == "7"
    assert ranges([43, 3, 1, 2, 5, 6, 40]) == "1-3,5-6,40,43"
    for text in ("", "7", "1-3,5-6,40,43", "40,1-3"):
        inside = within(text)
        assert ranges(number for number in range(60) if inside(number)) == ranges(
            number for part in text.split(",") if part for number in range(int(part.split("-")[0]),
                                                                          int(part.split("-")[-1]) + 1)
        )  # fmt: skip


def test_what_a_network_says_is_kept_as_it_is(gather: Gatherer) -> None:
    """Probabilities are a space of their own beside features."""
    reader = Reader(gather.images, gather.cache, {GENERAL: gather.colours, SAID: Colours("network")}, 2)
    reader.read([Wanted(1, "image", "picture 1")], copies=1)
    assert set(reader.gallery.vectors) == set(reader.gallery.copies) == {GENERAL, SAID}
    assert np.array_equal(reader.gallery.vectors[SAID][key(1)], reader.gallery.vectors[GENERAL][key(1)])
