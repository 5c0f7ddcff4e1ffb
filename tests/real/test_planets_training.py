"""From examples to a model: what is read, what is held out, what is learned, what is written."""

from __future__ import annotations

import itertools
import json
import logging
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from celestial_backend.errors import NotEnoughDataError, TrainingError
from celestial_backend.pictures.hooks import Postprocess
from celestial_backend.planets import network, robustness
from celestial_backend.planets.examples import Example, read_folder, rendered, split
from celestial_backend.planets.renderer import render
from celestial_backend.planets.training import Progress, Recipe, TrainedModel, fit, logits_of, save, train

TINY = Recipe(
    size_px=(32, 32), widths=(8, 16, 24), epochs=4, batch=10, rendered_per_class=0, calibration_rounds=1, dropout=0.0
)
CLASSES = ("Mars", "Neptune", "Venus")


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    return rendered(CLASSES, 14, 1)


@pytest.fixture(scope="module")
def reports() -> list[Progress]:
    return []


@pytest.fixture(scope="module")
def trained(examples: list[Example], reports: list[Progress]) -> TrainedModel:
    return train(examples, TINY, reports.append)


def _folder(place: Path, counts: dict[str, int]) -> Path:
    place = place / "pictures"
    place.mkdir()
    for class_name, count in counts.items():
        (place / class_name).mkdir()
        for index in range(count):
            render("Mars", index, 24).save(place / class_name / f"{index}.png")
    return place


def test_a_folder_becomes_examples_in_the_order_of_their_names(tmp_path: Path) -> None:
    """One for each picture, its class the sub-folder's name; hidden folders are none."""
    folder = _folder(tmp_path, {"b": 3, "a": 4})
    (folder / ".cache").mkdir()
    read = read_folder(folder)
    assert [(one.class_name, one.name) for one in read] == [
        *(("a", f"{index}.png") for index in range(4)),
        *(("b", f"{index}.png") for index in range(3)),
    ]
    assert {one.load().mode for one in read} == {"RGB"}
    assert read[0].load().tobytes() == render("Mars", 0, 24).tobytes()


def test_files_that_are_no_pictures_are_left_out_and_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A text file and half a JPEG cost nothing but themselves, and are named in the log."""
    folder = _folder(tmp_path, {"a": 3, "b": 3})
    (folder / "a" / "notes.txt").write_text("not a picture")
    render("Mars", 1).save(folder / "b" / "half.jpg")
    (folder / "b" / "half.jpg").write_bytes((folder / "b" / "half.jpg").read_bytes()[:900])
    with caplog.at_level(logging.WARNING):
        assert len(read_folder(folder)) == 6
    assert "2 files are no pictures and were left out: a/notes.txt, b/half.jpg" in caplog.text


@pytest.mark.parametrize(
    ("counts", "seen"),
    [
        pytest.param({"a": 3, "b": 2}, "a: 3, b: 2", id="too few of one"),
        pytest.param({"a": 3, "b": 0}, "a: 3", id="none of one"),
        pytest.param({"a": 3}, "a: 3", id="one class"),
        pytest.param({}, "no class at all", id="nothing"),
    ],
)
def test_too_little_is_refused_with_the_counts(tmp_path: Path, counts: dict[str, int], seen: str) -> None:
    """The rule, the number of each class, and the remedy."""
    with pytest.raises(NotEnoughDataError, match=f"at least 2 classes with 3 readable.*got {seen}. Add pictures"):
        read_folder(_folder(tmp_path, counts))


def test_what_is_no_folder_is_refused(tmp_path: Path) -> None:
    """The message names what was given."""
    with pytest.raises(TrainingError, match=r"must be a folder with one sub-folder for each class, got .*missing"):
        read_folder(tmp_path / "missing")


def test_the_split_is_by_name_and_by_class() -> None:
    """The order and the folder of the files change nothing; each class gives the same share."""
    files = [Example(Image.Image, name, f"{name}_{index}.jpg") for name in "abc" for index in range(20)]
    learn, held_out = split(files, 0.15)
    assert Counter(one.class_name for one in held_out) == {"a": 3, "b": 3, "c": 3}
    assert len(learn) + len(held_out) == 60
    again = split([*reversed(files)], 0.15)
    assert [one.name for one in again[1]] == [one.name for one in held_out]
    other = split([*files, *(Example(Image.Image, "d", f"d_{index}.jpg") for index in range(9))], 0.15)
    assert {one.name for one in held_out} < {one.name for one in other[1]}


def test_the_smallest_class_is_both_learned_and_held_out() -> None:
    """Three pictures: one held out, whatever the share says."""
    files = [Example(Image.Image, name, f"{name}{index}") for name in "ab" for index in range(3)]
    for share in (0.01, 0.99):
        learn, held_out = split(files, share)
        assert set("ab") == {one.class_name for one in learn} == {one.class_name for one in held_out}


def test_a_short_training_learns(trained: TrainedModel) -> None:
    """A few seconds on drawn pictures are far above chance, and the card's numbers hang together."""
    metrics = trained.metrics
    assert trained.classes == CLASSES
    assert metrics["accuracy_rendered"] > 0.6
    assert metrics["counts"]["held_out"] == dict.fromkeys(CLASSES, 2)
    assert metrics["counts"]["learned_from"] == dict.fromkeys(CLASSES, 12)
    assert set(metrics["accuracy_corrupted"]) == set(robustness.CORRUPTIONS)
    assert np.sum(metrics["confusion"]) == 6 + 6 * 3 * len(robustness.CORRUPTIONS)


@pytest.mark.usefixtures("trained")
def test_progress_tells_where_it_is(reports: list[Progress]) -> None:
    """After each step, and once more with the accuracy after each epoch; time does not go back."""
    steps = 36 // TINY.batch
    assert len(reports) == TINY.epochs * (steps + 1)
    assert [one.epoch for one in reports if one.held_out_accuracy is not None] == list(range(TINY.epochs))
    assert [one.step for one in reports[:steps]] == list(range(1, steps + 1))
    assert all(one.seconds <= later.seconds for one, later in itertools.pairwise(reports))


def test_the_same_again_gives_the_same_weights(examples: list[Example], trained: TrainedModel) -> None:
    """Same examples and recipe, other number of threads: the same to the last bit."""
    again = train(examples, replace(TINY, threads=1))
    for one, other in zip(trained.network.get_weights(), again.network.get_weights(), strict=True):
        assert np.array_equal(one, other)
    assert {**again.metrics, "seconds": 0} == {**trained.metrics, "seconds": 0}


def test_saved_and_loaded_it_says_the_same(trained: TrainedModel, tmp_path: Path) -> None:
    """Plain files that any Keras reads; no optimizer, no pickle, and what else is in the folder stays."""
    import keras

    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "mine.txt").write_text("keep me")
    save(trained, folder)
    names = {"card.json", "config.json", "metadata.json", "model.weights.h5", "MODEL_CARD.md", "confusion.png"}
    assert {file.name for file in folder.iterdir()} == {*names, "mine.txt"}
    card = network.load_card(folder)
    assert (card.classes, card.size_px) == (trained.classes, TINY.size_px)
    assert json.loads((folder / "card.json").read_text())["recipe"]["seed"] == TINY.seed
    pictures = [render(name, (9, index)) for name in CLASSES for index in range(3)]
    loaded = keras.models.load_model(folder, compile=False)
    assert np.array_equal(logits_of(loaded, pictures, TINY), logits_of(trained.network, pictures, TINY))
    with Image.open(folder / "confusion.png") as picture:
        assert picture.width > 100


def test_a_live_network_can_be_taught_more(trained: TrainedModel) -> None:
    """`fit` changes a given network in place, and an example without weight teaches nothing."""
    live = _copied(trained.network)
    pictures = [render("Mars", (3, index), 64) for index in range(8)]
    wrong = [Example(picture.copy, "Venus", f"{index}") for index, picture in enumerate(pictures)]
    quick = replace(TINY, epochs=3, weight_decay=0.0)
    before = live.get_weights()
    fit(live, [replace(one, weight=0.0) for one in wrong], CLASSES, quick)
    assert all(np.allclose(one, other, atol=1e-7) for one, other in zip(before, live.get_weights(), strict=True))
    share = Postprocess(CLASSES).batch(logits_of(live, pictures, TINY))[:, 2].mean()
    fit(live, wrong, CLASSES, quick)
    assert Postprocess(CLASSES).batch(logits_of(live, pictures, TINY))[:, 2].mean() > share


def _copied(live: Any) -> Any:
    import keras

    copy = keras.models.clone_model(live)
    copy.set_weights(live.get_weights())
    return copy
