"""Collecting examples: which pictures are learned and which held out, what is left out, what is told."""

from __future__ import annotations

import hashlib
import json
import random
import threading
import time
import tracemalloc
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from backend_server import label_config
from gate import gate
from label_studio import LabelStudioServer
from numpy.typing import NDArray
from PIL import Image
from test_project import connect
from test_votes import annotation, region

from celestial_backend import album, collect, project, tally
from celestial_backend.collect import Collection, held_out
from celestial_backend.errors import DecodeError, FetchError, NotEnoughDataError, StateError, StudioError, TrainingError
from celestial_backend.images import ImageReader
from celestial_backend.labels import ChoiceMap
from celestial_backend.renderer import render
from celestial_backend.settings import Settings
from celestial_backend.studio import Studio
from celestial_backend.tally import ranges

KNOWN = ("Mars", "Moon")
MAP = ChoiceMap.for_learning(label_config(("Moon", "Mars", "Comet", "Nebula")), KNOWN)


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(album, "RETRY_PAUSE_S", 0)


class FakeImages(ImageReader):
    """A picture of its own for every value; some values have troubles. Counts how many are read at once."""

    def __init__(self, size_px: int = 8) -> None:
        self.size_px = size_px
        self.reads: list[str] = []
        self.away = False
        self.now = self.most_at_once = 0
        self._lock = threading.Lock()

    def read(self, value: object, task_id: int | None = None) -> Image.Image:  # noqa: ARG002
        with self._lock:
            self.reads.append(str(value)[:20])
            self.now += 1
            self.most_at_once = max(self.most_at_once, self.now)
        try:
            time.sleep(random.random() * 0.002)  # noqa: S311 - whoever comes first must not matter
            text = str(value)
            if text.startswith("broken"):
                raise DecodeError(f"{text} is no picture.")
            if text.startswith("away") and self.away:
                raise FetchError(f"{text} is away.")
            if text.startswith("token") and self.away:
                raise StudioError("The token was not renewed.")
            seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4])
            noise = np.random.default_rng(seed).integers(0, 255, (self.size_px, self.size_px, 3), np.uint8)
            return Image.fromarray(noise)
        finally:
            with self._lock:
                self.now -= 1

    def close(self) -> None:
        return


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


def gather(tasks: Iterable[dict[str, Any]], folder: Path, images: ImageReader | None = None, **more: Any) -> Collection:
    target = folder / f"pictures-{len(list(folder.iterdir()))}"
    target.mkdir()
    settings: dict[str, Any] = {"project_id": "1", "known": KNOWN, "threads": 4} | more
    return collect.collect(tasks, MAP, images or FakeImages(), target, **settings)


def on_side(held: bool, count: int) -> list[int]:
    """The first ids of tasks that are held out, or are not."""
    numbers = [number for number in range(1, 60 * count) if held_out("1", number) == held]
    return numbers[:count]


def test_examples(tmp_path: Path) -> None:
    """Each labelled picture is one example, on the side of its task, with its class, weight, source and pixels."""
    tasks = some(40, "Mars", "Comet")
    tasks[3]["annotations"][0]["parent_prediction"] = 7
    tasks[3]["predictions"] = [{"id": 7, "result": [region("Mars")]}]
    got = gather(tasks, tmp_path, accepted_weight=0.25)
    every = [*got.learn, *got.held_out]
    assert got.classes == ("Mars", "Moon", "Comet")
    assert sorted(one.task_ids for one in every) == [(number,) for number in range(1, 41)]
    assert {one.task_ids[0] for one in got.held_out} == {number for number in range(1, 41) if held_out("1", number)}
    for side in (got.learn, got.held_out):
        assert list(side) == sorted(side, key=lambda one: one.task_ids)
    for one in every:
        (number,) = one.task_ids
        assert one.annotation_ids == (number,)
        expected = ("Mars" if number % 2 == 0 else "Comet", 0.25 if number == 4 else 1.0)
        assert (one.class_name, one.weight) == expected
        assert one.source == ("accepted" if number == 4 else "unaided")
        assert one.load().mode == "RGB"
        assert one.load().tobytes() == FakeImages().read(f"picture {number}").tobytes()
    assert len({one.name for one in every}) == 40
    assert got.newest == "2026-01-01T00:00:40.000001Z"
    assert got.annotation_ids == "1-40"
    assert json.loads(json.dumps(got.counts)) == got.counts
    learned = sum(got.counts["learn"].values())
    assert (learned, sum(got.counts["held out"].values())) == (len(got.learn), len(got.held_out))
    assert got.counts["sources"] == {"accepted": 1, "unaided": 39}


def test_pictures_are_kept_small(tmp_path: Path) -> None:
    """The longest side of what is kept is 512 pixels."""
    got = gather(some(10, "Mars"), tmp_path, FakeImages(size_px=600))
    assert got.learn[0].load().size == (512, 512)


FROZEN = {"1": [2, 7, 24, 29], "23": [7, 11, 12, 14, 27, 28, 35, 37]}


def test_what_is_held_out_is_frozen() -> None:
    """These tasks are held out, for ever, whatever else changes: a fifth of many, by project and id."""
    assert [number for number in range(1, 41) if held_out("1", number)] == FROZEN["1"]
    assert [number for number in range(1, 41) if held_out("23", number)] == FROZEN["23"]
    assert sum(held_out("5", number) for number in range(10_000)) == pytest.approx(2000, abs=120)


def test_the_same_labels_give_the_same_collection(tmp_path: Path) -> None:
    """Neither the order of pages nor that of threads matters."""
    tasks = some(60, "Mars", "Moon", "Comet")
    tasks += [task(100 + number, "Moon", f"picture {number}", by=2) for number in range(1, 30)]
    tasks += [task(200, "Moon", "broken")]
    first = gather(tasks, tmp_path)
    for seed in range(3):
        shuffled = random.Random(seed).sample(tasks, len(tasks))  # noqa: S311 - an order, not a secret
        again = gather(shuffled, tmp_path, threads=seed + 1)
        for field in ("classes", "counts", "newest", "digest", "annotation_ids"):
            assert getattr(again, field) == getattr(first, field)
        for side in ("learn", "held_out"):
            facts = [
                [(one.name, one.class_name, one.weight, one.source, one.task_ids, one.annotation_ids) for one in ones]
                for ones in (getattr(first, side), getattr(again, side))
            ]
            assert facts[0] == facts[1] != []


def test_the_digest_stands_for_labels_and_pictures(tmp_path: Path) -> None:
    """It changes with a class, a moment, a picture or a task that is used, and with nothing else."""

    def digest(change: Any = None, more: Iterable[dict[str, Any]] = ()) -> str:
        tasks = some(20, "Mars", "Moon")
        if change:
            change(tasks[4])
        return gather([*tasks, *more], tmp_path).digest

    plain = digest()
    assert plain == digest(more=[task(99, was_cancelled=True)])
    changes: list[Any] = [
        lambda one: one["annotations"][0].update(result=[region("Comet" if one["id"] % 2 else "Mars")]),
        lambda one: one["annotations"][0].update(updated_at="2026-02-01T00:00:00Z"),
        lambda one: one["data"].update(image="another"),
    ]
    assert len({plain, *map(digest, changes), digest(more=[task(99)])}) == 5


# Duplicates and disagreement


def test_the_same_picture_in_several_tasks_is_one_example(tmp_path: Path) -> None:
    """Their votes are pooled: two people who disagree over two tasks are a tie, a third decides it."""
    first, second, third, *rest = on_side(False, 20)
    tasks = [
        task(first, "Mars", "same", by=1),
        task(second, "Moon", "same", by=2),
        task(third, "Moon", "same", by=3),
        *(task(number) for number in (*rest, *on_side(True, 3))),
    ]
    got = gather(tasks, tmp_path)
    (one,) = (one for one in got.learn if len(one.task_ids) > 1)
    assert one.class_name == "Moon"
    assert one.task_ids == one.annotation_ids == (first, second, third)
    assert got.counts["duplicates merged"] == 2
    assert got.counts["consensus"] == {"majority": 1, "one vote": 20}

    got = gather([tasks[0], tasks[1], *tasks[3:]], tmp_path)
    assert all(len(one.task_ids) == 1 for one in got.learn)
    assert got.counts["pictures left out"] == {"on which the annotators disagree": 1}
    assert got.counts["consensus"] == {"one vote": 20, "tie": 1}


def test_a_picture_on_both_sides_is_used_for_neither(tmp_path: Path) -> None:
    """An older model may have learned what would be held out now."""
    learned, held = on_side(False, 20), on_side(True, 5)
    tasks = [*(task(number) for number in (*learned, *held)), task(held[0] + 100_000, value=f"picture {learned[0]}")]
    number = next(n for n in range(100_000, 200_000) if held_out("1", n))
    tasks[-1] = task(number, value=f"picture {learned[0]}")
    got = gather(tasks, tmp_path)
    used = {number for one in (*got.learn, *got.held_out) for number in one.task_ids}
    assert used == {*learned[1:], *held}
    assert got.counts["pictures left out"] == {"that are held out in one task and learned in another": 1}


def test_the_model_is_asked_about_pictures_that_several_people_looked_at(tmp_path: Path) -> None:
    """It weighs annotators by CROWDLAB, and is not asked about the rest."""
    asked: list[int] = []

    def probabilities(pictures: list[Image.Image]) -> NDArray[np.float32]:
        asked.append(len(pictures))
        return np.tile(np.array([0.8, 0.2], np.float32), (len(pictures), 1))

    tasks = some(90, "Mars")
    for number, one in enumerate(tasks[:70]):
        one["annotations"].append(annotation(1000 + number, "Mars", by=2))
    tasks[70]["annotations"] += [annotation(2000, "Comet", by=2), annotation(2001, "Comet", by=3)]
    got = gather(tasks, tmp_path, probabilities=probabilities)
    assert asked == [64, 7]
    assert got.counts["consensus"] == {"CROWDLAB": 70, "majority": 1, "one vote": 19}


# What is left out


def test_new_classes_need_examples(tmp_path: Path) -> None:
    """With fewer than five, a new class is left out with its examples; a class of the model never is."""
    tasks = [*some(20, "Mars"), *some(5, "Comet", start=50), *some(4, "Nebula", start=60), task(70, "Moon")]
    got = gather(tasks, tmp_path)
    assert got.classes == ("Mars", "Moon", "Comet")
    assert {one.class_name for one in (*got.learn, *got.held_out)} == {"Mars", "Moon", "Comet"}
    assert got.counts["new classes with too few examples"] == {"Nebula": 4}
    assert got.counts["pictures left out"] == {"of new classes with too few examples": 4}


def test_a_new_class_that_is_all_held_out_is_left_out(tmp_path: Path) -> None:
    """There would be nothing to learn it from."""
    held = on_side(True, 8)
    tasks = [*(task(number) for number in on_side(False, 20)), *(task(number, "Comet") for number in held[:6])]
    got = gather([*tasks, task(held[6]), task(held[7])], tmp_path)
    assert got.classes == ("Mars", "Moon")
    assert got.counts["new classes with too few examples"] == {"Comet": 6}


def test_accepted_labels_that_count_nothing(tmp_path: Path) -> None:
    """With a weight of 0 they are not learned, but still held out."""
    tasks = some(30, "Mars")
    for one in tasks[:20]:
        one["annotations"][0].update(result=[region("Mars", "prediction")])
    got = gather(tasks, tmp_path, accepted_weight=0.0)
    assert {one.source for one in got.learn} == {"unaided"}
    assert {number for one in got.held_out for number in one.task_ids} == {n for n in range(1, 31) if held_out("1", n)}
    (count,) = got.counts["pictures left out"].values()
    assert count == sum(not held_out("1", number) for number in range(1, 21))


def test_too_little_is_a_refusal_with_counts(tmp_path: Path) -> None:
    """The sentence says how many there are of each class, and what was left out and why."""
    tasks = [
        *some(4, "Mars", "Moon"),
        task(10, "Comet"),
        task(11, was_cancelled=True),
        task(12, "Mars", value="same", by=1),
        task(13, "Moon", value="same", by=2),
    ]
    sides = {number: held_out("1", number) for number in (1, 2, 3, 4, 12, 13)}
    with pytest.raises(NotEnoughDataError) as raised:
        gather(tasks, tmp_path)
    text = str(raised.value)
    held = sum(sides[number] for number in (1, 2, 3, 4))
    assert text.startswith(
        "Training needs at least 10 labelled pictures, some to learn from and some to compare models on, and project 1"
        f" gives {4 - held} to learn from and {held} to compare on (Mars: 2, Moon: 2)."
        " A new class needs 5 pictures (Comet: 1). Left out: 1 annotations skipped by the annotator; 1 pictures "
    )
    assert "1 pictures of new classes with too few examples" in text
    assert text.endswith("Label more pictures.")


@pytest.mark.parametrize("held", [False, True])
def test_both_sides_are_needed(tmp_path: Path, held: bool) -> None:
    """Without anything to learn, or to compare models on, there is no training."""
    with pytest.raises(NotEnoughDataError, match=f"gives {30 * (not held)} to learn from and {30 * held} to compare"):
        gather([task(number) for number in on_side(held, 30)], tmp_path)


def test_nothing_at_all(tmp_path: Path) -> None:
    """A project without labels."""
    with pytest.raises(NotEnoughDataError, match=r"0 to learn from and 0 to compare on \(none\)\. Label more pictures"):
        gather([], tmp_path)


def test_of_too_many_a_fixed_choice_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same pictures in whatever order the tasks come, and not all others are read in vain."""
    monkeypatch.setattr(collect, "MOST_EXAMPLES", 50)
    tasks = some(400, "Mars", "Moon")
    images = FakeImages()
    first, second = gather(tasks, tmp_path, images), gather(tasks[::-1], tmp_path)
    assert first.digest == second.digest
    assert len(first.learn) + len(first.held_out) == 50
    assert first.counts["pictures left out"] == {"beyond those that one training reads": 350}
    assert len(images.reads) < 250


# Pictures that cannot be had


def test_a_few_pictures_that_cannot_be_had_are_left_out(tmp_path: Path) -> None:
    """Their tasks and reasons are told; they are tried once more if that may help."""
    images = FakeImages()
    images.away = True
    tasks = [*some(95, "Mars"), *(task(number, value=f"broken {number}") for number in (200, 201))]
    tasks += [task(300, value="away"), task(301) | {"data": {"picture": "x"}}, task(302, value="data:,broken")]
    waited: list[bool] = []
    got = gather(tasks, tmp_path, images, wait=lambda: waited.append(True))
    assert len(got.learn) + len(got.held_out) == 95 + 1
    assert got.counts["pictures left out"] == {"that cannot be had": 4}
    assert got.counts["pictures that cannot be had"] == [
        {"task": 200, "reason": "broken 200 is no picture."},
        {"task": 201, "reason": "broken 201 is no picture."},
        {"task": 300, "reason": "away is away."},
        {"task": 301, "reason": "The task has no data key 'image' that the label config names; it has ['picture']."},
    ]
    assert waited == [True]
    assert images.reads.count("away") == 2


def test_only_the_first_failures_are_told(tmp_path: Path) -> None:
    """Of very many, the manifest keeps twenty."""
    tasks = [*some(300, "Mars"), *(task(number, value=f"broken {number}") for number in range(1000, 1030))]
    told = gather(tasks, tmp_path).counts["pictures that cannot be had"]
    assert [each["task"] for each in told] == list(range(1000, 1000 + tally.SHOWN_FAILURES))


@pytest.mark.parametrize("kind", ["away", "token"])
def test_label_studio_that_comes_back_costs_no_picture(tmp_path: Path, kind: str) -> None:
    """All that failed while it was away is read once it answers."""
    images = FakeImages()
    images.away = True

    def wait() -> None:
        images.away = False

    got = gather([task(number, value=f"{kind} {number}") for number in range(1, 31)], tmp_path, images, wait=wait)
    assert len(got.learn) + len(got.held_out) == 30
    assert got.counts["pictures that cannot be had"] == []


def test_a_label_studio_that_stays_away_ends_the_training(tmp_path: Path) -> None:
    """What `wait` raises is the reason; without it, too many missing pictures are."""
    images = FakeImages()
    images.away = True
    tasks = [*some(80, "Mars"), *(task(number, value=f"away {number}") for number in range(100, 120))]

    def wait() -> None:
        raise StudioError("Gone.")

    with pytest.raises(StudioError, match="Gone"):
        gather(tasks, tmp_path, images, wait=wait)
    with pytest.raises(TrainingError) as raised:
        gather(tasks, tmp_path, images)
    assert str(raised.value) == (
        "A training needs 90% of the labelled pictures, and 20 of 100 cannot be had. Mend them, or delete their labels."
        " Task 100: away 100 is away. Task 101: away 101 is away. Task 102: away 102 is away."
    )


def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture that cannot be kept ends the training, with the reason."""

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(StateError, match=r"must hold the pictures of a training, and does not \(No space left on dev"):
        gather(some(20, "Mars"), tmp_path)


# Progress and memory


def test_progress_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Now and then while nobody knows the number, and at the end with it."""
    monkeypatch.setattr(album, "REPORT_EVERY", 10)
    told: list[tuple[int, int | None]] = []
    gather(some(45, "Mars"), tmp_path, report=lambda done, total: told.append((done, total)))
    assert told[-1] == (45, 45)
    assert told[:-1] == [(done, None) for done in range(10, 10 * len(told), 10)]
    assert len(told) > 2


def test_memory_stays_flat(tmp_path: Path) -> None:
    """Three thousand tasks with big values and pictures: neither piles up, and few are on their way at a time."""
    taken = 0
    images = FakeImages(size_px=48)
    ahead: list[int] = []

    def tasks() -> Iterator[dict[str, Any]]:
        nonlocal taken
        for number in range(1, 3001):
            taken += 1
            ahead.append(taken - len(images.reads))
            yield task(number, "Mars", f"{number} " + "x" * 50_000)

    tracemalloc.start()
    try:
        got = gather(tasks(), tmp_path, images)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(got.learn) + len(got.held_out) == 3000
    assert max(ahead) <= 4 * 4 + 1
    assert images.most_at_once <= 4
    assert peak < 30e6, "the values alone are 150 MB"


def test_ranges() -> None:
    """Numbers in a row are written as their ends."""
    assert ranges([]) == ""
    assert ranges([7]) == "7"
    assert ranges([43, 3, 1, 2, 5, 6, 40]) == "1-3,5-6,40,43"


# A real Label Studio


def test_label_studio_away_in_the_middle(
    label_studio: LabelStudioServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Uploads are read over HTTP while Label Studio goes away for two seconds: every picture is there in the end."""
    monkeypatch.setattr(project, "PAGE", 20)
    monkeypatch.setattr(project, "FIRST_PAUSE_S", 0.2)
    monkeypatch.setattr(album, "REPORT_EVERY", 10)
    number = label_studio.create_project("away")
    paths = [tmp_path / f"{seed}.png" for seed in range(36)]
    for seed, path in enumerate(paths):
        render("Mars", seed=seed, size_px=32).save(path)
    label_studio.upload(number, paths)
    for each in label_studio.tasks(number):
        label_studio.annotate(each["id"], "Mars")
    with gate(label_studio.url) as door:
        settings = Settings(label_studio_url=door.url, label_studio_api_key=label_studio.legacy_token)
        reader = connect(door.url, label_studio.legacy_token, number)

        def report(done: int, _: int | None) -> None:
            if done == 10:
                door.shut()
                threading.Timer(2, door.open).start()

        images = ImageReader(settings, Studio(settings))
        choices = ChoiceMap.for_learning(reader.label_config(), KNOWN)
        (tmp_path / "pictures").mkdir()
        got = collect.collect(
            reader.labelled_tasks(),
            choices,
            images,
            tmp_path / "pictures",
            project_id=str(number),
            known=KNOWN,
            wait=reader.label_config,
            report=report,
        )
        images.close()
        assert reader.labels_since(got.newest) == 0
    assert len(got.learn) + len(got.held_out) == 36
    assert got.counts["pictures that cannot be had"] == []
