"""A live model taught more: how it grows, what it keeps, when it stops, and that it is the same every time."""

from __future__ import annotations

import itertools
import json
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from new_bodies import NEW_BODIES, render_new
from PIL import Image

from celestial_backend import network
from celestial_backend.classifier import Classifier, Parts, read_parts
from celestial_backend.errors import CannotGrowError, NotEnoughDataError, TrainingError
from celestial_backend.examples import Example, rendered
from celestial_backend.finetune import Candidate, finetune, from_scratch
from celestial_backend.growth import grown
from celestial_backend.lessons import SCRATCH, Lessons, Tuning
from celestial_backend.renderer import BODIES, render
from celestial_backend.teaching import Progress

DEFAULT = Path(network.__file__).parent / "default_model"
OLD = ("Mars", "Moon", "Venus")
NEW = (*OLD, "Comet")
QUICK = Tuning(pictures=60, epochs=(2, 2), batch=8, rendered_per_class=3)
BEFORE = "python -m celestial_backend train --project P --from-scratch"


def new_pictures(name: str, count: int, seed: int) -> list[Example]:
    return [Example(partial(render_new, name, (seed, index)), name, f"{name}{seed}{index}") for index in range(count)]


def probabilities(parts: Parts, pictures: list[Image.Image]) -> np.ndarray:
    classifier = Classifier(parts)
    return classifier.probabilities(np.concatenate([classifier.prepare(one) for one in pictures]))


def accuracy(parts: Parts, examples: list[Example]) -> float:
    columns = probabilities(parts, [one.load() for one in examples]).argmax(axis=1)
    classes = Classifier(parts).classes
    return float(np.mean([classes[column] == one.class_name for column, one in zip(columns, examples, strict=True)]))


def small(*top: Any, classes: tuple[str, ...] = OLD) -> Parts:
    """A small parent with random weights; ``top`` stands in place of its last layer."""
    import keras

    keras.utils.set_random_seed(5)
    built = network.build(len(classes), (32, 32), (8, 12), normalised=False)
    if top:
        x = built.get_layer("features").output
        for layer in top:
            x = layer(x)
        built = keras.Model(built.inputs, x)
    last = next(layer for layer in reversed(built.layers) if layer.weights)
    last.set_weights([one * 4 + 0.3 for one in last.get_weights()])  # as if it had opinions
    said = network.Postprocess(classes) if not top else partial(_shares, classes)
    return Parts("small:1", built, network.Preprocess((32, 32)), said)


def _shares(classes: tuple[str, ...], outputs: Any) -> dict[str, Any]:
    """For networks that end in probabilities themselves."""
    row = np.asarray(outputs)[0].tolist()
    return {"prediction": classes[int(np.argmax(row))], "probabilities": dict(zip(classes, row, strict=True))}


@pytest.fixture(scope="module")
def default() -> Parts:
    import keras

    card = network.load_card(DEFAULT)
    loaded = keras.models.load_model(DEFAULT, compile=False)
    return Parts("default:1", loaded, network.Preprocess(card.size_px), network.Postprocess(card.classes))


@pytest.fixture
def guides(guide: Path) -> Parts:
    import bentoml

    return read_parts(str(bentoml.models.import_model(str(guide / "guide.bentomodel")).tag))


@pytest.fixture(scope="module")
def project() -> list[Example]:
    """Twelve labelled comets beside the odd old body."""
    return [*new_pictures("Comet", 12, 1), *rendered(OLD, 4, 77)]


@pytest.fixture(scope="module")
def reports() -> list[Progress]:
    return []


@pytest.fixture(scope="module")
def taught(project: list[Example], reports: list[Progress]) -> Candidate:
    return finetune(small(), OLD, NEW, project, QUICK, progress=reports.append)


def same(one: Candidate, other: Candidate) -> bool:
    pairs = zip(one.network.get_weights(), other.network.get_weights(), strict=True)
    return all(np.array_equal(mine, yours) for mine, yours in pairs)


def _layers(kind: str) -> tuple[Any, ...]:
    from keras import layers

    return {
        "plain": (),
        "softmax": (layers.Dense(3, activation="softmax"),),
        "softmax layer": (layers.Dense(3), layers.Softmax()),
        "activation layer": (layers.Dense(3), layers.Activation("softmax")),
        "no bias": (layers.Dense(3, use_bias=False), layers.Softmax()),
    }[kind]


@pytest.mark.parametrize("kind", ["plain", "softmax", "softmax layer", "activation layer", "no bias"])
def test_growth_keeps_the_old_answers(kind: str) -> None:
    """Logits for the old classes give the parent's probabilities; new columns are nothing, the parent is untouched."""
    parent = small(*_layers(kind))
    before = parent.network.get_weights()
    wide = grown(parent, OLD, (*NEW, "Galaxy"), 1)
    pictures = [render(name, 3) for name in OLD]
    logits = wide.predict_on_batch(np.concatenate([parent.preprocess(one) for one in pictures]))
    assert logits.shape == (3, 5)
    assert not logits[:, 3:].any()
    assert network.Postprocess(OLD).batch(logits[:, :3]) == pytest.approx(probabilities(parent, pictures), abs=1e-6)
    last = wide.layers[-1]
    assert (type(last).__name__, last.units, last.activation.__name__) == ("Dense", 5, "linear")
    last.set_weights([one + 1 for one in last.get_weights()])
    assert all(np.array_equal(one, other) for one, other in zip(before, parent.network.get_weights(), strict=True))


def test_the_default_model_grows(default: Parts) -> None:
    """Not a bit of its logits changes."""
    wide = grown(default, BODIES, (*BODIES, "Comet"), 1)
    inputs = np.concatenate([default.preprocess(render(name, 3)) for name in BODIES])
    assert np.array_equal(wide.predict_on_batch(inputs)[:, :10], default.network.predict_on_batch(inputs))


def test_the_guides_model_is_taught(guides: Parts) -> None:
    """A Sequential with an optimizer, closures, grey pictures without an axis for it: grown, taught, the old kept."""
    classes = Classifier(guides).classes
    learn = [*new_pictures("Comet", 8, 1), *new_pictures("Galaxy", 8, 1)]
    candidate = finetune(guides, classes, (*classes, "Comet", "Galaxy"), learn, replace(QUICK, epochs=(3, 3)))
    assert candidate.preprocess is guides.preprocess
    assert Classifier(candidate.parts("guide:2")).classes == (*classes, "Comet", "Galaxy")
    assert candidate.facts["epochs"] == 3


def _sigmoid() -> Parts:
    from keras import layers

    return small(layers.Dense(3, activation="sigmoid"))


def _convolution() -> Parts:
    from keras import layers

    return small(layers.Reshape((1, 1, 12)), layers.Conv2D(3, 1), layers.Flatten())


def _calibrated() -> Parts:
    return replace(small(), postprocess=lambda logits: network.Postprocess(OLD)(np.asarray(logits) / 2))


def _renamed() -> Parts:
    return replace(small(), postprocess=network.Postprocess(("Mars", "Venus", "Moon")))


def _subclassed() -> Parts:
    import keras

    class Mine(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.middle, self.last = keras.layers.Flatten(), keras.layers.Dense(3)

        def call(self, inputs: Any) -> Any:
            return self.last(self.middle(inputs))

    made = Mine()
    made(np.zeros((1, 32, 32, 3), np.float32))
    return replace(small(), network=made)


@pytest.mark.parametrize(
    ("made", "told"),
    [
        pytest.param(_sigmoid, r"Dense layer '.*' of small:1 has the activation 'sigmoid'", id="several choices"),
        pytest.param(_convolution, r"must end in a Dense layer .* small:1 ends in a Flatten layer", id="convolution"),
        pytest.param(
            _calibrated,
            r"must be the softmax of its last layer, within 0\.0001; .* is up to 0\.\d+ away",
            id="own calibration",
        ),
        pytest.param(_renamed, "must be the softmax of its last layer", id="names in another order"),
        pytest.param(_subclassed, r"network of small:1 cannot be copied \(\w+\)", id="code of its own"),
    ],
)
def test_what_cannot_grow_is_refused(made: Callable[[], Parts], told: str) -> None:
    """The rule, the layer or the number that breaks it, and the way out."""
    with pytest.raises(CannotGrowError, match=told) as caught:
        finetune(made(), OLD, NEW, new_pictures("Comet", 6, 1), QUICK)
    assert BEFORE in str(caught.value)


def test_another_number_of_classes_cannot_grow() -> None:
    """A last layer of three units is none for two classes; and the old classes come first."""
    with pytest.raises(CannotGrowError, match=r"one unit for each of the 2 classes; .* small:1 has 3"):
        grown(small(), OLD[:2], NEW, 1)
    with pytest.raises(CannotGrowError, match=r"must begin with those of small:1, \['Mars', 'Moon', 'Venus'\], got"):
        grown(small(), OLD, ("Comet", *OLD), 1)


def test_progress_tells_every_step(taught: Candidate, reports: list[Progress]) -> None:
    """After each step and each epoch, as in any training."""
    steps = [one for one in reports if one.held_out_accuracy is None]
    assert len(steps) == taught.facts["steps"]
    assert {(one.epoch, one.epochs) for one in steps} == {(0, 2), (1, 2)}
    assert all(one.seconds <= later.seconds for one, later in itertools.pairwise(reports))


def test_facts_are_plain_values(taught: Candidate) -> None:
    """What went in is written down as JSON: counts, tuning, versions, how it ended."""
    facts = json.loads(json.dumps(taught.facts))
    assert facts["counts"]["learned_from"] == {"Comet": 10, "Mars": 3, "Moon": 3, "Venus": 3}
    assert facts["counts"]["checked_on"] == {"Comet": 2, "Mars": 1, "Moon": 1, "Venus": 1}
    assert facts["counts"]["rendered"] <= 9
    assert (facts["stopped_by"], facts["epochs"], facts["parent"]) == ("epochs", 2, "small:1")
    assert facts["tuning"]["seed"] == QUICK.seed
    assert {"keras", "tensorflow", "numpy"} < set(facts["versions"])


def test_the_same_labels_give_the_same_model(taught: Candidate, project: list[Example]) -> None:
    """To the last bit, in whatever order they come, on any number of threads."""
    assert same(taught, finetune(small(), OLD, NEW, project[::-1], replace(QUICK, threads=3)))


def test_another_seed_gives_another_model(taught: Candidate, project: list[Example]) -> None:
    """The seed decides."""
    assert not same(taught, finetune(small(), OLD, NEW, project, replace(QUICK, seed=21)))


def test_an_example_without_weight_has_no_influence(taught: Candidate, project: list[Example]) -> None:
    """As if it were not there."""
    silent = Example(partial(render, "Moon", 5), "Comet", "not to be learned", weight=0.0)
    assert same(taught, finetune(small(), OLD, NEW, [*project, silent], QUICK))


def test_a_lighter_example_teaches_less() -> None:
    """The same wrong labels, at a twentieth of the weight, convince less."""
    pictures = [render("Moon", (4, index)) for index in range(8)]
    shares = []
    for weight in (0.05, 1.0):
        wrong = [Example(one.copy, "Comet", f"wrong {row}", weight) for row, one in enumerate(pictures)]
        tuning = replace(QUICK, epochs=(4, 4), learning_rate=0.01, rendered_per_class=0)
        candidate = finetune(small(), OLD, NEW, [*wrong, *rendered(OLD, 4, 77)], tuning)
        shares.append(probabilities(candidate.parts("small:2"), pictures)[:, 3].mean())
    assert shares[0] < shares[1] - 0.05


def test_all_without_weight_is_too_little(project: list[Example]) -> None:
    """The message names the setting that may have done it."""
    with pytest.raises(NotEnoughDataError, match=r"got 24 of which none does.*CELESTIAL_ACCEPTED_WEIGHT above 0"):
        finetune(small(), OLD, NEW, [replace(one, weight=0.0) for one in project], QUICK)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that the test moves."""
    hand = SimpleNamespace(now=0.0)
    monkeypatch.setattr("celestial_backend.finetune.time", SimpleNamespace(monotonic=lambda: hand.now))
    return hand


@pytest.mark.parametrize(("until", "epochs"), [pytest.param(2, 0, id="first epoch"), pytest.param(5, 1, id="second")])
def test_the_deadline_ends_it_between_steps(
    clock: SimpleNamespace, project: list[Example], until: int, epochs: int
) -> None:
    """The steps before it count, and the model is whole."""
    reports: list[Progress] = []

    def report(progress: Progress) -> None:
        reports.append(progress)
        clock.now = 100.0 if len([one for one in reports if one.held_out_accuracy is None]) == until else clock.now

    candidate = finetune(small(), OLD, NEW, project, replace(QUICK, batch=8), 50.0, report)
    assert candidate.facts["stopped_by"] == "time"
    assert (candidate.facts["steps"], candidate.facts["epochs"]) == (until, epochs)
    assert probabilities(candidate.parts("small:2"), [render("Mars", 1)]).sum() == pytest.approx(1)


def test_no_time_at_all_is_an_error(clock: SimpleNamespace, project: list[Example]) -> None:
    """A network that was taught nothing is no candidate."""
    clock.now = 100.0
    with pytest.raises(TrainingError, match=r"at least one step.*Raise CELESTIAL_TRAIN_MAX_S"):
        finetune(small(), OLD, NEW, project, QUICK, 50.0)


def test_without_progress_it_stops(project: list[Example], monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of four epochs is the best on the checks: its weights are what is left."""
    losses, seen = iter((0.5, 0.4, 0.9, 0.4)), []

    def checked(_: Lessons, model: Any) -> tuple[float, float]:
        seen.append(model.get_weights())
        return next(losses), 0.75

    monkeypatch.setattr(Lessons, "checked", checked)
    candidate = finetune(small(), OLD, NEW, project, replace(QUICK, epochs=(9, 9), patience=2))
    facts = candidate.facts
    assert (facts["stopped_by"], facts["epochs"], facts["best_epoch"]) == ("no progress", 4, 1)
    assert (facts["check_loss"], facts["check_accuracy"]) == (0.4, 0.75)
    assert all(np.array_equal(*pair) for pair in zip(seen[1], candidate.network.get_weights(), strict=True))


def test_few_checks_leave_the_temperature(project: list[Example], taught: Candidate) -> None:
    """Five labelled checks calibrate nothing; asked to, they would."""
    assert taught.facts["temperature"] == 1.0
    other = finetune(small(), OLD, NEW, project, replace(QUICK, least_to_calibrate=5))
    assert other.facts["temperature"] != 1.0
    last, scaled = taught.network.layers[-1].get_weights()[0], other.network.layers[-1].get_weights()[0]
    assert scaled == pytest.approx(last / other.facts["temperature"], rel=1e-3)


def test_one_picture_of_a_class_is_learned() -> None:
    """Nothing is left to check on, nor to stop early by."""
    parent = replace(small(classes=("a", "b")), tag="other:1")
    learn = [Example(partial(render, "Mars", 1), "a", "1"), Example(partial(render_new, "Comet", 1), "c", "2")]
    candidate = finetune(parent, ("a", "b"), ("a", "b", "c"), learn, QUICK)
    assert (candidate.facts["check_loss"], candidate.facts["stopped_by"]) == (None, "epochs")


def test_pictures_are_not_held_in_memory() -> None:
    """Only a few batches of sixty pictures live at any time."""
    gone, most = [], []

    def load(index: int) -> Image.Image:
        picture = render_new("Comet", index, 32)
        weakref.finalize(picture, gone.append, index)
        most.append(len(most) + 1 - len(gone))
        return picture

    learn = [Example(partial(load, index), "Comet", f"{index}") for index in range(60)]
    finetune(small(), OLD, NEW, learn, replace(QUICK, batch=4, rendered_per_class=1))
    assert len(most) > 60
    assert max(most) < 20


def test_large_pictures_are_learned_in_a_smaller_size() -> None:
    """What is shown is what a picture of that size shows."""
    big, seen = Image.new("RGB", (600, 300)), []
    learn = [Example(big.copy, "Comet", f"{index}") for index in range(4)]
    lessons = Lessons(
        ("Comet",), learn, (), replace(QUICK, batch=3), lambda one: seen.append(one.size) or np.zeros((1, 2))
    )
    list(lessons.epoch(0))
    assert max(max(size) for size in seen) <= 2 * QUICK.longest_side_px
    assert big.size == (600, 300)


def test_rare_classes_are_shown_more_often() -> None:
    """Two Comets among 30 Mars: repeated up to four times, and each Mars once."""
    learn = [*new_pictures("Comet", 3, 1), *rendered(("Mars",), 30, 1)]
    tuning = replace(QUICK, check_share=0.01, batch=1)
    lessons = Lessons(("Mars", "Comet"), learn, (), tuning, network.Preprocess((8, 8)))
    shown = np.concatenate([targets for _, targets, _ in lessons.epoch(0)])
    assert shown.sum(axis=0).tolist() == [29, 8]
    assert lessons.course().steps == 37


def test_the_parent_is_believed_unless_the_label_contradicts_it() -> None:
    """Beside the label stands what the parent says of its own classes; nothing where they disagree."""
    parent = small()
    picture = render("Mars", 1)
    answer = OLD[int(probabilities(parent, [picture])[0].argmax())]
    other = next(name for name in OLD if name != answer)
    learn = [Example(picture.copy, name, f"{name}{turn}") for name in (answer, other, "Comet") for turn in range(2)]
    lessons = Lessons(NEW, learn, (), replace(QUICK, batch=1, check_share=0.01), parent.preprocess)
    teacher = SimpleNamespace(predict_on_batch=lambda _: np.eye(4, dtype=np.float32)[[NEW.index(answer)]])
    for _, targets, _ in lessons.epoch(0, teacher, 3):
        name, said = NEW[int(targets[0, :4].argmax())], targets[0, 4:]
        assert said.sum() == pytest.approx(0 if name == other else 1)
        assert name == other or int(said.argmax()) == OLD.index(answer)


def test_a_parent_is_asked_no_more_than_it_can_do(default: Parts) -> None:
    """Rendered pictures that it does not know are no rehearsal, and one that changes confuse sees plain pictures."""
    lessons = Lessons(BODIES, rendered(BODIES, 2, 5), BODIES, replace(QUICK, rendered_per_class=2), default.preprocess)
    lessons.suit(default.network, 10)
    assert lessons.changing
    assert len(lessons.shown) == len(lessons.taught) + 20
    answers = itertools.cycle(np.eye(10))

    def dice(inputs: np.ndarray) -> np.ndarray:
        return np.array([next(answers) for _ in inputs])

    lessons.suit(SimpleNamespace(predict_on_batch=dice), 10)
    assert len(lessons.shown) < len(lessons.taught) + 20
    assert not lessons.changing


def test_normalisations_of_others_stay() -> None:
    """Batch normalisation of a parent keeps its statistics and its gains."""
    from keras import layers

    parent = small(layers.BatchNormalization(name="theirs"), layers.Dense(3), layers.Softmax())
    before = parent.network.get_layer("theirs").get_weights()
    candidate = finetune(parent, OLD, NEW, new_pictures("Comet", 8, 1), QUICK)
    after = candidate.network.get_layer("theirs").get_weights()
    assert all(np.array_equal(one, other) for one, other in zip(before, after, strict=True))


def test_what_it_knew_is_kept(default: Parts, tmp_path: Path) -> None:
    """Two new classes are learned from twelve pictures each, ten old ones not forgotten; saved, it is the same."""
    import keras

    two = NEW_BODIES[:2]
    learn = [one for name in two for one in new_pictures(name, 12, 1)]
    tuning = Tuning(pictures=3000, batch=16, rendered_per_class=8)
    candidate = finetune(default, BODIES, (*BODIES, *two), learn, tuning)
    parts = candidate.parts("default:2")
    old, fresh = rendered(BODIES, 8, 991), [one for name in two for one in new_pictures(name, 15, 99)]
    assert accuracy(parts, old) >= accuracy(default, old) - 0.02
    assert accuracy(parts, fresh) > 0.75
    candidate.network.save(tmp_path / "saved.keras", include_optimizer=False)
    again = replace(parts, network=keras.models.load_model(tmp_path / "saved.keras"))
    pictures = [one.load() for one in fresh[::5]]
    assert np.array_equal(probabilities(again, pictures), probabilities(parts, pictures))
    assert not candidate.network.compiled


def test_a_model_from_nothing(project: list[Example]) -> None:
    """Our own network, its normalisations folded, for the classes in the order that was asked for."""
    classes = ("Comet", "Venus", "Mars", "Moon")
    candidate = from_scratch(classes, project, replace(SCRATCH, pictures=100, epochs=(1, 1), rendered_per_class=2))
    assert Classifier(candidate.parts("new:1")).classes == classes
    names = [type(layer).__name__ for layer in candidate.network.layers]
    assert names[-1] == "Dense"
    assert "BatchNormalization" not in names
    assert candidate.facts["parent"] is None
    assert candidate.facts["counts"]["rendered"] == 6
