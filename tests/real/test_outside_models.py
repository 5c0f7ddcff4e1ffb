"""Models from outside: each is served as its own code says, or refused with the cause and a way that works."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import bentoml
import keras
import numpy as np
import pytest
import tensorflow as tf
from click.testing import CliRunner

from celestial_backend.commands.cli import main
from celestial_backend.doctor import machine
from celestial_backend.errors import ModelError, ModelLoadError
from celestial_backend.models import store as store_module
from celestial_backend.models.classifier import Classifier, NetworkFeatures
from celestial_backend.models.embedders import StoredNetwork
from celestial_backend.models.passes import rows_of
from celestial_backend.models.saved import HERE
from celestial_backend.models.store import DEFAULT_MODEL
from celestial_backend.pictures.hooks import USUAL_PX
from celestial_backend.planets.renderer import render
from celestial_backend.services import build
from celestial_backend.settings import MODEL_NAME, Settings
from celestial_backend.web.app import create_app
from tests.support import outside_models as outside
from tests.support.backend_server import BODIES, REPOSITORY
from tests.support.colours import plain
from tests.support.outside_models import NAMES, folder_of, layers, network, preprocess, save, save_files
from tests.support.stores import store_of

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
OTHER = "3.12" if HERE != "3.12" else "3.13"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(bentoml_home=tmp_path / "bentoml", model_dir=tmp_path / "state")


def refused(settings: Settings) -> str:
    """The sentences for the model that is live; for people, on one line, without a path of this machine."""
    with pytest.raises(ModelLoadError) as raised:
        store_of(settings).current()
    return fit_for_people(str(raised.value), settings)


def fit_for_people(text: str, settings: Settings) -> str:
    assert "\n" not in text
    assert len(text) < 700
    assert str(settings.bentoml_home) not in text
    assert "site-packages" not in text
    assert "Traceback" not in text
    assert text.endswith((".", "}."))
    return text


def served(settings: Settings, *colours: str) -> list[dict[str, float]]:
    """What the live model says of pictures, as named probabilities."""
    model = store_of(settings).current()
    rows = model.probabilities(np.concatenate([model.prepare(plain(colour)) for colour in colours]))
    return [dict(zip(model.vocabulary.classes, row.tolist(), strict=True)) for row in rows]


def said(settings: Settings, colour: str) -> str:
    """The likeliest class of a picture."""
    (row,) = served(settings, colour)
    return max(row, key=row.__getitem__)


# Another Python

EVERYWHERE = """
import sys
from click.testing import CliRunner
from pathlib import Path
from celestial_backend.web.app import create_app
from celestial_backend.commands.cli import main
from celestial_backend.errors import ModelError
from celestial_backend.settings import Settings
from celestial_backend.models.standalone import export
from celestial_backend.services import build

settings = Settings.from_environ()
services = build(settings)
services.store.warm_up()
client = create_app(services).test_client()
config, picture, file = sys.argv[1:]
print("setup", (answer := client.post("/setup", json={"project": "1.1", "schema": config})).status_code, answer.json)
body = {"project": "1.1", "label_config": config, "tasks": [{"id": 1, "data": {"image": picture}}]}
print("predict", (answer := client.post("/predict", json=body)).status_code, answer.json)
for command in (["doctor"], ["models"], ["models", "export", services.store.live_tag(), file]):
    done = CliRunner().invoke(main, command)
    print(command[0], done.exit_code, " ".join(done.output.split()), done.exception)
print("alive")
"""
CONFIG = (
    '<View><Image name="image" value="$image"/><Choices name="choice" toName="image">'
    + "".join(f'<Choice value="{name}"/>' for name in (*NAMES, "Saturn")) + "</Choices></View>"
)  # fmt: skip


def everywhere(settings: Settings, picture: Path, file: Path, **more: str) -> dict[str, str]:
    """Do all that loads a model, in a process that may die of it."""
    folders = {"MODEL_DIR": str(settings.model_dir), "BENTOML_HOME": str(settings.bentoml_home)}
    folders |= {"CELESTIAL_LABEL_STUDIO_DATA": str(picture.parent)}
    done = subprocess.run(
        [sys.executable, "-c", EVERYWHERE, CONFIG, data_url(picture), str(file)],
        cwd=REPOSITORY, env=os.environ | folders | more, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stdout.splitlines()[-1:]) == (0, ["alive"]), done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    return {line.split()[0]: line for line in done.stdout.splitlines()}


def data_url(picture: Path) -> str:
    import base64

    return f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"


@pytest.fixture
def saturn(tmp_path: Path) -> Path:
    render("Saturn", 5).save(tmp_path / "saturn.png")
    return tmp_path / "saturn.png"


def test_what_another_python_has_pickled_is_never_read(settings: Settings, saturn: Path, tmp_path: Path) -> None:
    """Served pages, `doctor` and all commands live on, and say which two versions they are and what helps."""
    folder = folder_of(settings, tag := save())
    outside.describe(folder, python_version=f"{OTHER}.1")
    (folder / "custom_objects.pkl").write_bytes(outside.deadly())
    told = everywhere(settings, saturn, tmp_path / "out.bentomodel")
    sentence = (
        f"Python {OTHER} has saved {tag}, and this is Python {HERE}, which cannot read its custom objects. Save the "
        f"model again under Python {HERE}, run the backend under Python {OTHER}, or serve another model with "
        "CELESTIAL_MODEL."
    )
    assert told["setup"].startswith("setup 503")
    assert told["predict"].startswith("predict 503")
    assert all(sentence in told[name] for name in ("setup", "predict", "doctor"))
    assert told["models"].startswith("models 0")
    assert (tmp_path / "out.bentomodel").is_file(), "it is a copy, for whoever has that Python"
    fit_for_people(sentence, settings)


@pytest.mark.parametrize(
    ("context", "seen"),
    [
        pytest.param({"python_version": None}, "it says none", id="none"),
        pytest.param({"python_version": "three"}, "it says 'three'", id="no number"),
        pytest.param({"python_version": ""}, "it says ''", id="empty"),
        pytest.param({"python_version": ["3.11"]}, r"it says \"\['3.11'\]\"", id="a list"),
    ],
)
def test_a_model_that_does_not_say_its_python_is_refused(settings: Settings, context: Any, seen: str) -> None:
    """Nothing is tried."""
    folder = folder_of(settings, tag := save())
    outside.describe(folder, **context)
    (folder / "custom_objects.pkl").write_bytes(outside.telling())
    assert re.match(rf"model.yaml of {tag} must say which Python .*{seen}\. Save the model again", refused(settings))


@pytest.mark.parametrize("text", ["[]", "name: x", "context: 3\nname: x\n", "metadata: 3\ncontext: []"])
def test_a_strange_description_is_a_sentence(settings: Settings, text: str) -> None:
    """Whatever stands in it."""
    folder = folder_of(settings, save())
    (folder / "model.yaml").write_text(text)
    assert re.search(r"cannot be read from the BentoML store|must say which Python", refused(settings))


def test_the_same_minor_version_is_enough(settings: Settings) -> None:
    """Also where YAML reads it as a number."""
    for told in (f"{HERE}.99", f"{HERE}.0rc1", float(HERE)):
        outside.describe(folder_of(settings, save()), python_version=told)
        assert max(served(settings, "red")[0].values()) > 0.9


def test_a_file_of_another_python_does_not_get_into_the_store(settings: Settings, tmp_path: Path) -> None:
    """Whoever takes the setting back finds the store as it was."""
    other = replace(settings, bentoml_home=tmp_path / "bentoml")
    tag = save()
    outside.describe(folder_of(other, tag), python_version=f"{OTHER}.0")
    (folder_of(other, tag) / "custom_objects.pkl").write_bytes(outside.telling())
    bentoml.models.export_model(tag, str(tmp_path / "other.bentomodel"))
    file, empty = tmp_path / "other.bentomodel", tmp_path / "empty"
    here = Settings(model_dir=empty, bentoml_home=empty, bentomodel=file)
    store = store_of(here)
    for _ in range(2):
        with pytest.raises(ModelLoadError, match=f"Python {OTHER} has saved {tag}, and this is Python {HERE}"):
            store.live_tag()
    assert not store.registry.holds(tag)
    found, classes = machine.model(build(here))
    assert (found.state, classes) == ("fail", ())
    assert f"Python {OTHER} has saved {tag}" in found.what
    assert "CELESTIAL_BENTOMODEL" in found.mend


def test_our_network_needs_no_pickle(settings: Settings, saturn: Path, tmp_path: Path) -> None:
    """One store serves all versions of Python, and what is exported under this one holds code of this one."""
    store = store_of(settings)
    folder = folder_of(settings, tag := store.live_tag())
    outside.describe(folder, python_version=f"{OTHER}.1")
    (folder / "custom_objects.pkl").write_bytes(outside.deadly())
    told = everywhere(settings, saturn, tmp_path / "out.bentomodel")
    assert tag in told["setup"]
    assert "'choices': ['Saturn']" in told["predict"]
    assert f"{tag} loads, with 10 classes" in told["doctor"]
    empty = tmp_path / "empty"
    elsewhere = Settings(model_dir=empty, bentoml_home=empty, bentomodel=tmp_path / "out.bentomodel")
    assert store_of(elsewhere).live_tag() == tag
    outside.describe(folder_of(elsewhere, tag), python_version=HERE)
    import cloudpickle

    own = cloudpickle.loads((folder_of(elsewhere, tag) / "custom_objects.pkl").read_bytes())
    assert own["preprocess"](render("Saturn", 5)).shape == (1, *USUAL_PX, 3)


def test_an_embedder_of_another_python_is_not_read(settings: Settings) -> None:
    """Its custom objects and its Lambda layers are not, and without these it serves all versions."""

    def embedder(model: Any, version: str = OTHER, **custom: Any) -> StoredNetwork:
        tag = str(bentoml.keras.save_model("mine", model, custom_objects=custom or None).tag)
        outside.describe(folder_of(settings, tag), python_version=f"{version}.1")
        if custom:
            (folder_of(settings, tag) / "custom_objects.pkl").write_bytes(outside.telling())
        return StoredNetwork(tag, settings.bentoml_home)

    def pooled(*more: Any) -> Any:
        return keras.Sequential([keras.Input((4, 4, 3)), *more, layers.GlobalAveragePooling2D()])

    assert embedder(pooled()).width == 3
    assert embedder(pooled(layers.Lambda(lambda x: x)), HERE).width == 3
    for found in (embedder(pooled(), preprocess=preprocess), embedder(pooled(layers.Lambda(lambda x: x)))):
        with pytest.raises(ModelLoadError) as raised:
            found.loaded()
        told = fit_for_people(str(raised.value), settings)
        assert told.startswith(f"Python {OTHER} has saved the embedder {found.tag}, and this is Python {HERE}")
        assert told.endswith(", or unset CELESTIAL_EMBEDDER.")


@pytest.mark.parametrize(
    ("facts", "parent"),
    [
        pytest.param({}, "", id="registered"),
        pytest.param({"from_scratch": True}, "gone", id="from nothing"),
        pytest.param({"from_scratch": False}, "default", id="from the default"),
        pytest.param({"from_scratch": False}, "default-0123456789ab", id="from a default that is gone"),
    ],
)
def test_networks_of_earlier_releases_need_no_pickle(settings: Settings, facts: dict[str, Any], parent: str) -> None:
    """Those that were registered, and those that were taught a project's labels, by what was said of them then."""
    store = store_of(settings)
    default = store.live_tag()
    told = dict(store.registry.describe(default).metadata)
    told.pop("pixels")
    if parent:
        tag = default if parent == "default" else f"{MODEL_NAME}:{parent}"
        training = {"versions": told["versions"], "seconds": 3}
        told = {"classes": told["classes"], "parent": tag, "project": "3", "job": "ab", "training": training} | facts
    never = (lambda _: None, lambda _: None)
    made = store.registry.add(f"{MODEL_NAME}:project-3-ab", DEFAULT_MODEL, *never, told)
    folder = folder_of(settings, made)
    outside.describe(folder, python_version=f"{OTHER}.1")
    (folder / "custom_objects.pkl").write_bytes(outside.telling())
    assert store_of(settings).classes(made, 0) == BODIES
    model = store_of(settings).model(made)
    assert BODIES[int(model.probabilities(model.prepare(render("Saturn", 5)))[0].argmax())] == "Saturn"


@pytest.mark.parametrize("parent", ["own", "x:y", "../..", "stranger"])
def test_a_strangers_network_is_not_taken_for_ours(settings: Settings, parent: str) -> None:
    """Whatever it says of its parents."""
    tag = save()
    told = {"classes": list(NAMES), "training": {"versions": {"celestial_backend": "0.1.0"}}}
    made = save(metadata=told | {"parent": {"own": tag, "stranger": tag}.get(parent, f"{MODEL_NAME}:{parent}")})
    assert store_of(settings).live_tag() == made
    assert said(settings, "red") == "red"


def test_pixels_of_another_release_are_not_guessed(settings: Settings) -> None:
    """Other numbers than it has learned from would give wrong answers."""
    store = store_of(settings)
    told = dict(store.registry.describe(store.live_tag()).metadata) | {"pixels": 2}
    store.registry.add(f"{MODEL_NAME}:later", DEFAULT_MODEL, lambda _: None, lambda _: None, told)
    assert re.search(r"must be 1, and model.yaml says 2: .* Install the newest release", refused(settings))


def test_what_our_preprocess_gives_has_a_number() -> None:
    """Who changes it must count PIXELS up, and keep what networks of the old number need."""
    from celestial_backend.pictures.hooks import Preprocess
    from celestial_backend.planets.network import PIXELS

    given = Preprocess((8, 8))(render("Saturn", 5))
    assert PIXELS == 1
    assert given.mean(axis=(0, 1, 2)) == pytest.approx(PIXELS_1, abs=2e-3)


PIXELS_1 = (0.1791, 0.1641, 0.1360)


# What postprocess gives


def probabilities(give: Any) -> Any:
    """A postprocess that gives what `give` makes of the row of shares."""

    def postprocess(outputs: Any) -> Any:
        row = np.exp(outputs[0]) / np.exp(outputs[0]).sum()
        return {"prediction": "red", "probabilities": give(row)}

    return postprocess


def whole(give: Any) -> Any:
    return lambda outputs: give(outputs[0])


TWICE = "must give each class another name, and '0' is there twice. Let it use texts as names, or numbers, not both."


@pytest.mark.parametrize(
    ("postprocess", "sentence"),
    [
        pytest.param(
            probabilities(lambda row: dict(zip(NAMES, np.log(row), strict=True))),
            r"numbers from 0 to 1 that are 1 together; it gave -\S+ to -\S+, together -\S+\. Let it end with softmax",
            id="logits",
        ),
        pytest.param(
            probabilities(lambda row: dict(zip(NAMES, 100 * row, strict=True))),
            "together 100. .*divide percents by 100",
            id="percents",
        ),
        pytest.param(
            probabilities(lambda row: dict(zip(NAMES, row / 2, strict=True))), "together 0.5", id="halves"
        ),
        pytest.param(
            probabilities(lambda _: dict.fromkeys(NAMES, 1.0)), "together 3. .*\"independent\": True", id="all one"
        ),
        pytest.param(
            probabilities(lambda row: {0: row[0], "0": row[1], 1: row[2]}), re.escape(TWICE), id="0 and '0'"
        ),
        pytest.param(
            probabilities(lambda _: dict.fromkeys(NAMES, "much")), "a number for each class, got 'much' for 'red'",
            id="texts",
        ),
        pytest.param(
            probabilities(lambda row: dict(zip(NAMES, map(str, row), strict=True))),
            r"a number for each class, got '0\.\d+' for 'red'. Turn it into one with float\(\)",
            id="numbers as texts",
        ),
        pytest.param(
            probabilities(lambda _: dict.fromkeys(NAMES)), "a number for each class, got a NoneType for 'red'",
            id="none",
        ),
        pytest.param(
            probabilities(lambda row: dict.fromkeys(NAMES, row)), "a number for each class, got a ndarray for 'red'",
            id="rows",
        ),
        pytest.param(probabilities(list), "got a list as probabilities", id="a list of numbers"),
        pytest.param(probabilities(lambda _: {}), "got no class at all", id="no class"),
        pytest.param(whole(lambda _: {"prediction": 1, "scores": 2}), r"keys \['prediction', 'scores'\]", id="keys"),
        pytest.param(whole(lambda _: {}), "got an empty dict", id="empty"),
        pytest.param(whole(lambda _: "red"), "got a str. Let it return such a dict", id="text"),
        pytest.param(whole(lambda _: None), "got a NoneType", id="nothing"),
        pytest.param(whole(lambda _: [{"probabilities": {}}]), "got a list", id="a batch"),
        pytest.param(whole(lambda row: row[7]), r"of shape \(1, 3\) for one picture: IndexError", id="fails"),
        pytest.param(whole(lambda _: sys.exit(3)), "for one picture: SystemExit", id="ends the process"),
        pytest.param(
            whole(lambda _: __import__("no_such_module_here")),
            "ModuleNotFoundError: it needs the Python module no_such_module_here, which is not installed. Install it",
            id="needs a module",
        ),
        pytest.param(whole(lambda _: nowhere), "NameError: a function of it uses the name nowhere", id="a name"),  # noqa: F821
        pytest.param(
            probabilities(lambda _: dict(zip("ab", (0.5, 0.5), strict=True))),
            "gives 3 numbers and its postprocess names 2 classes",
            id="fewer classes",
        ),
    ],
)  # fmt: skip
def test_a_postprocess_that_gives_something_else_is_refused(
    settings: Settings, postprocess: Any, sentence: str
) -> None:
    """When the model is loaded, with what was seen and what is wanted; never a wrong score, never a 500."""
    save(postprocess=postprocess)
    assert re.search(sentence, refused(settings))


@pytest.mark.parametrize(
    ("give", "names"),
    [
        pytest.param(lambda row: dict(enumerate(row)), ("0", "1", "2"), id="int"),
        pytest.param(lambda row: {np.int64(k): v for k, v in enumerate(row)}, ("0", "1", "2"), id="numpy int"),
        pytest.param(lambda row: {True: row[0], False: row[1], "x": row[2]}, ("True", "False", "x"), id="bool"),
        pytest.param(lambda row: {np.str_(k): v for k, v in enumerate(row)}, ("0", "1", "2"), id="numpy str"),
        pytest.param(lambda row: {k: np.float32(v) for k, v in enumerate(row)}, ("0", "1", "2"), id="numpy float"),
        pytest.param(lambda row: {k: np.array(v) for k, v in enumerate(row)}, ("0", "1", "2"), id="array without axes"),
        pytest.param(lambda row: {k: np.array([v]) for k, v in enumerate(row)}, ("0", "1", "2"), id="array of one"),
        pytest.param(lambda row: {k: tf.constant(v) for k, v in enumerate(row)}, ("0", "1", "2"), id="tensor"),
        pytest.param(lambda row: {k: tf.cast(v, "bfloat16") for k, v in enumerate(row)}, ("0", "1", "2"), id="bfloat"),
        pytest.param(lambda row: {k: Decimal(float(v)) for k, v in enumerate(row)}, ("0", "1", "2"), id="decimal"),
        pytest.param(lambda row: {k: 1.0005 * v for k, v in enumerate(row)}, ("0", "1", "2"), id="rounded"),
        pytest.param(
            lambda row: dict(sorted(enumerate(row), key=lambda each: -each[1])), ("0", "1", "2"), id="by likelihood"
        ),
    ],
)  # fmt: skip
def test_names_and_numbers_may_have_any_form(settings: Settings, give: Any, names: tuple[str, ...]) -> None:
    """Values follow their names, whatever their order is for a picture, and are numbers from 0 to 1."""
    save(postprocess=probabilities(give))
    for row, best in zip(served(settings, "red", "lime", "blue"), names, strict=True):
        assert set(row) == set(names)
        assert max(row, key=row.__getitem__) == best
        assert row[best] == pytest.approx(0.9867, abs=5e-3)
        assert 0 <= min(row.values()) <= max(row.values()) <= 1


def test_several_classes_may_hold_at_once(settings: Settings) -> None:
    """Where the model says so."""

    def postprocess(outputs: Any) -> Any:
        return {"probabilities": dict(zip(NAMES, 1 / (1 + np.exp(-outputs[0])), strict=True))}

    save(postprocess=postprocess, metadata={"independent": True})
    (row,) = served(settings, "white")
    assert list(row.values()) == pytest.approx([0.9933] * 3, abs=1e-3)
    save(postprocess=postprocess)
    assert "together" in refused(settings)


def changing(give: Any) -> Any:
    """A postprocess that gives shares for the probes, and what `give` makes of them where a picture is all red."""
    return probabilities(lambda row: give(row) if row[0] > 0.98 else dict(zip(NAMES, row, strict=True)))


@pytest.mark.parametrize(
    ("give", "sentence"),
    [
        pytest.param(lambda _: {"red": 7.0, "green": 0, "blue": 0}, "it gave 0 to 7, together 7", id="too much"),
        pytest.param(lambda row: {"red": row[0]}, r"names? the same classes .* \['red'\] for another", id="top"),
        pytest.param(lambda _: {"red": 1.0, "green": 0, "pink": 0}, r"same classes for every picture", id="others"),
        pytest.param(lambda _: {"red": "1", "green": 0, "blue": 0}, r"got '1' for 'red'", id="text"),
        pytest.param(lambda row: row["x"], "for one picture: IndexError", id="fails"),
        pytest.param(lambda _: None, "got a NoneType as probabilities", id="nothing"),
    ],
)
def test_a_picture_that_breaks_the_rule_costs_its_request(settings: Settings, give: Any, sentence: str) -> None:
    """The probe alone may miss it; other requests are answered."""
    save(postprocess=changing(give))
    model = store_of(settings).current()
    good, bad = (model.prepare(plain(colour)) for colour in ("blue", "red"))
    assert model.probabilities(np.concatenate([good, good])).argmax(axis=1).tolist() == [2, 2]
    with pytest.raises(ModelError, match=sentence) as raised:
        model.probabilities(np.concatenate([good, bad]))
    fit_for_people(str(raised.value), settings)
    assert not isinstance(raised.value, ModelLoadError)
    assert model.probabilities(good).argmax() == 2


def test_a_row_that_is_not_finite_is_left_to_its_task(settings: Settings) -> None:
    """It costs that task its prediction, and no other; an infinite number is no certainty."""
    for strange in (np.nan, np.inf):
        save(postprocess=changing(lambda _, strange=strange: {"red": strange, "green": 0.0, "blue": 0.0}))
        model = store_of(settings).current()
        rows = model.probabilities(np.concatenate([model.prepare(plain(colour)) for colour in ("blue", "red")]))
        assert np.isfinite(rows).all(axis=1).tolist() == [True, False]


def test_a_request_is_told_what_postprocess_gave(settings: Settings) -> None:
    """503 and the sentence over HTTP, and the log has no traceback."""
    save(postprocess=changing(lambda _: {"red": 700.0, "green": 0, "blue": 0}))
    client = create_app(build(settings)).test_client()
    for colour, status in (("blue", 200), ("red", 503), ("blue", 200)):
        path = settings.model_dir / f"{colour}.png"
        plain(colour).save(path)
        body = {"project": "1.1", "label_config": CONFIG, "tasks": [{"id": 1, "data": {"image": data_url(path)}}]}
        answer = client.post("/predict", json=body)
        assert answer.status_code == status, answer.json
        assert status == 200 or "it gave 0 to 700, together 700" in answer.json["detail"]


def test_a_method_batch_is_used_where_it_says_the_same(settings: Settings) -> None:
    """A number, or a method for something else, that a stranger has called so, is let alone."""

    class Post:
        def __init__(self, batch: Any) -> None:
            self.calls = 0
            self.batch = batch

        def __call__(self, outputs: Any) -> Any:
            self.calls += 1
            row = np.exp(outputs[0]) / np.exp(outputs[0]).sum()
            return {"probabilities": dict(zip(NAMES, row.tolist(), strict=True))}

    def same(outputs: Any) -> Any:
        return np.exp(outputs) / np.exp(outputs).sum(axis=1, keepdims=True)

    for batch in (32, lambda _: 3, lambda _: 1 / 0, lambda _: np.zeros((2, 3)), same):
        save(postprocess=Post(batch))
        rows = served(settings, "red", "blue", "lime")
        assert [max(row, key=row.__getitem__) for row in rows] == ["red", "blue", "green"]


# What the network gives


def functional(outputs: Any) -> Any:
    """A network from a colour to what `outputs` makes of its logits."""
    inputs = keras.Input((3,))
    colours = layers.Dense(3, use_bias=False, name="colours")
    model = keras.Model(inputs, outputs(colours(inputs)))
    colours.set_weights([5 * np.eye(3)])
    return model


class Own(keras.Model):
    """A subclassed network, without layers in a row."""

    def __init__(self, **more: Any) -> None:
        super().__init__(**more)
        self.dense = layers.Dense(3, use_bias=False)

    def call(self, inputs: Any) -> Any:
        return {"far": [self.dense(inputs) * 5], "near": (self.dense(inputs),)}


def shares(logits: Any) -> dict[str, float]:
    row = np.exp(logits) / np.exp(logits).sum()
    return dict(zip(NAMES, row.tolist(), strict=True))


NETWORKS = [
    pytest.param(
        lambda: functional(lambda x: layers.Dense(1, activation="sigmoid")(x)),
        lambda outputs: {"yes": float(outputs[0][0]), "no": 1 - float(outputs[0, 0])},
        id="one sigmoid",
    ),
    pytest.param(
        lambda: functional(lambda x: [x, layers.Dense(2, name="more")(x)]),
        lambda outputs: shares(outputs[0][0]) if [each.shape for each in outputs] == [(1, 3), (1, 2)] else {},
        id="list",
    ),
    pytest.param(
        lambda: functional(lambda x: {"a": x, "b": layers.Dense(1, name="more")(x)}),
        lambda outputs: shares(outputs["a"][0]) if outputs["b"].shape == (1, 1) else {},
        id="dict",
    ),
    pytest.param(
        lambda: functional(lambda x: (x, x)),
        lambda outputs: shares(outputs[1][0]) if len(outputs) == 2 else {},
        id="tuple",
    ),
    pytest.param(
        lambda: functional(lambda x: layers.Reshape((1, 1, 3))(x)),
        lambda outputs: shares(outputs[0, 0, 0]) if outputs.shape == (1, 1, 1, 3) else {},
        id="four axes",
    ),
    pytest.param(
        lambda: functional(lambda x: layers.Reshape(())(layers.Dense(1, activation="sigmoid")(x))),
        lambda outputs: {"yes": float(outputs[0]), "no": 1 - float(outputs[0])} if outputs.shape == (1,) else {},
        id="one axis",
    ),
    pytest.param(
        lambda: functional(lambda x: layers.Activation("softmax", dtype="float16")(x)),
        lambda outputs: dict(zip(NAMES, outputs[0], strict=True)),
        id="half precision",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("make", "give"), NETWORKS)
def test_postprocess_gets_what_predict_gives(settings: Settings, make: Any, give: Any) -> None:
    """For one picture, in the same lists and dicts, with a batch axis of 1: alone, in a batch and in any order."""
    model = make()
    save(model, postprocess=lambda outputs: {"probabilities": give(outputs)})
    colours = ["red", "lime", "blue", "tan"]
    told = [give(model.predict(preprocess(plain(colour)), verbose=0)) for colour in colours]
    assert [pytest.approx(each, abs=1e-3) for each in told] == served(settings, *colours)
    assert pytest.approx(told[2], abs=1e-3) == served(settings, "blue")[0]
    assert served(settings, *colours[::-1]) == [pytest.approx(each, abs=1e-3) for each in told[::-1]]


def test_requests_share_passes_of_any_network() -> None:
    """Rows of lists and dicts go back to those who asked."""
    outputs = {"a": np.arange(6).reshape(3, 2), "b": [np.arange(3), (np.arange(3) * 2,)]}
    part = rows_of(outputs, 1, 3)
    assert part["a"].tolist() == [[2, 3], [4, 5]]
    assert part["b"][0].tolist() == [1, 2]
    assert part["b"][1][0].tolist() == [2, 4]


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        pytest.param(
            lambda: functional(lambda x: keras.ops.sum(x, axis=0)),
            r"one row of numbers for each picture, and for two pictures it gave shape \(3,\)\. Let its outputs keep",
            id="no batch axis",
        ),
        pytest.param(
            lambda: functional(lambda x: keras.ops.reshape(x, (1, 3))),
            "must take several pictures at once, and takes one only",
            id="one picture",
        ),
    ],
)
def test_a_network_that_cannot_be_asked_is_refused(settings: Settings, make: Any, sentence: str) -> None:
    """With what it gave."""
    save(make())
    assert re.search(sentence, refused(settings))


@pytest.mark.parametrize(("make", "give"), [*NETWORKS[1:5]])
def test_features_are_those_before_the_one_last_layer(settings: Settings, make: Any, give: Any) -> None:
    """A training goes on without those of a network that has several outputs, or ends otherwise."""
    save(make(), postprocess=lambda outputs: {"probabilities": give(outputs)})
    model = store_of(settings).current()
    assert isinstance(model, Classifier)
    with pytest.raises(ModelLoadError, match="has no features"):
        NetworkFeatures(model)


def test_a_network_of_one_number_has_features(settings: Settings) -> None:
    """What stands before its last layer, as for any other."""
    give = NETWORKS[0].values[1]
    model = functional(lambda x: layers.Dense(1, activation="sigmoid")(x))
    save(model, postprocess=lambda outputs: {"probabilities": give(outputs)})
    model = store_of(settings).current()
    assert isinstance(model, Classifier)
    features = NetworkFeatures(model)
    assert (features.width, features.vectors(model.prepare(plain("red"))).tolist()) == (3, [[5, 0, 0]])


def test_a_subclassed_network_is_served_and_has_no_features(settings: Settings) -> None:
    """With its class among the custom objects."""
    model = Own()
    model(np.zeros((1, 3)))
    model.dense.set_weights([np.eye(3)])
    save(model, Own=Own, postprocess=lambda outputs: {"probabilities": shares(outputs["far"][0][0])})
    assert said(settings, "lime") == "green"
    loaded = store_of(settings).current()
    assert isinstance(loaded, Classifier)
    with pytest.raises(ModelLoadError, match="has no features"):
        NetworkFeatures(loaded)


# What lies in the folder


@pytest.mark.parametrize(
    "place", ["model.keras", "any name.keras", "network.h5", "old.hdf5", "deep/er/model.keras", "dir/"]
)
def test_one_file_of_keras_is_served(settings: Settings, place: str) -> None:
    """As `bentoml.models.create` leaves it, wherever it lies."""

    def write(folder: Path) -> None:
        path = folder / place
        path.parent.mkdir(parents=True, exist_ok=True)
        if place.endswith("/"):
            path.mkdir()
        network().save(path, **({"zipped": False} if place.endswith("/") else {}))

    save_files(write)
    assert said(settings, "lime") == "green"


def several(folder: Path) -> None:
    network().save(folder / "a.keras")
    network().save(folder / "b.h5")


@pytest.mark.parametrize(
    ("write", "sentence"),
    [
        pytest.param(several, r"must hold one network, and holds 2: \['a.keras', 'b.h5'\]. Save it", id="two"),
        pytest.param(lambda _: None, r"does not hold a Keras 3 network .*Save it again with", id="none"),
        pytest.param(
            lambda folder: network().export(folder / "saved", verbose=False),
            "does not hold a Keras 3 network .*but a SavedModel of TensorFlow. Load it with the Keras 2 that",
            id="SavedModel",
        ),
        pytest.param(lambda folder: (folder / "model.onnx").write_bytes(b"x"), "but a network for ONNX", id="ONNX"),
        pytest.param(lambda folder: (folder / "model.pt").write_bytes(b"x"), "but a network for PyTorch", id="torch"),
        pytest.param(
            lambda folder: network().save_weights(folder / "x.weights.h5"), "but weights without th", id="weights"
        ),
        pytest.param(lambda folder: (folder / "saved_model.pkl").write_bytes(b"x"), "but a pickle", id="sklearn"),
        pytest.param(lambda folder: (folder / "x.keras").write_bytes(b"x"), "network of .* cannot be loaded", id=".k"),
        pytest.param(lambda folder: (folder / "model.h5").write_bytes(b"x"), "network of .* cannot be loaded", id="h5"),
    ],
)  # fmt: skip
def test_what_is_no_network_of_keras_is_named(settings: Settings, write: Any, sentence: str) -> None:
    """With a way that works; told at /setup too, before anything is loaded, where the files tell it."""
    tag = save_files(write)
    assert re.search(sentence, told := refused(settings))
    if "cannot be loaded" not in sentence:
        with pytest.raises(ModelLoadError) as raised:
            store_of(settings).classes(tag, 0)
        assert str(raised.value) == told


def test_weights_in_a_file_of_keras_2_are_named(settings: Settings) -> None:
    """A .h5 without the network's configuration."""
    import h5py

    def write(folder: Path) -> None:
        with h5py.File(folder / "model.h5", "w") as file:
            file.create_group("model_weights")

    save_files(write)
    assert 'holds weights without their network. Save the whole: model.save("model.keras")' in refused(settings)


# What it needs


@keras.saving.register_keras_serializable(package="Mine")
class Twice(layers.Layer):
    """A layer of its maker's own, registered."""

    def call(self, inputs: Any) -> Any:
        return 2 * inputs


class Half(layers.Layer):
    """A layer of its maker's own."""

    def call(self, inputs: Any) -> Any:
        return inputs / 2


def own_activation(values: Any) -> Any:
    return values * 2


def own_loss(truths: Any, said: Any) -> Any:
    return keras.ops.mean((truths - said) ** 2)


@pytest.fixture
def forgetful() -> Any:
    """Keras as another process has it, which does not know what was registered here."""
    known = keras.saving.get_custom_objects()
    before = dict(known)
    known.clear()
    yield
    known.update(before)


WRITERS = {"folder": None, "keras": "model.keras", "h5": "model.h5"}


def keep(form: str, model: Any, **custom: Any) -> str:
    name = WRITERS[form]
    return save(model, **custom) if name is None else save_files(lambda folder: model.save(folder / name), **custom)


@pytest.mark.usefixtures("forgetful")
@pytest.mark.parametrize("form", WRITERS)
@pytest.mark.parametrize(
    ("last", "name"),
    [
        pytest.param(lambda: Half(), "Half", id="layer"),
        pytest.param(lambda: Twice(), "Twice", id="registered layer"),
        pytest.param(lambda: layers.Activation(own_activation), "own_activation", id="function"),
        pytest.param(lambda: layers.Lambda(own_activation), "own_activation", id="function of a Lambda"),
    ],
)
def test_what_keras_does_not_know_is_named(settings: Settings, form: str, last: Any, name: str) -> None:
    """And served once it is saved with the model, as the sentence says."""
    keep(form, network(last()))
    remedy = f'Save it again with custom_objects={{"preprocess": …, "postprocess": …, "{name}": {name}}}, or serve'
    told = refused(settings)
    assert f"it needs {name}, which Keras does not know and its custom objects do not hold. {remedy}" in told
    keep(form, network(last()), **{name: globals()[name]})
    assert said(settings, "lime") == "green"


@pytest.mark.usefixtures("forgetful")
@pytest.mark.parametrize("form", WRITERS)
def test_what_a_training_needs_is_not_needed(settings: Settings, form: str) -> None:
    """An own loss, metric or optimizer, as the model is not trained here."""
    model = network()
    model.compile(keras.optimizers.Adam(1e-3), own_loss, [own_loss])
    keep(form, model)
    assert said(settings, "lime") == "green"


@pytest.mark.parametrize("form", WRITERS)
def test_a_lambda_layer_is_served(settings: Settings, form: str) -> None:
    """The store is trusted, and this Python has saved it."""
    keep(form, network(layers.Lambda(lambda x: x * 1)))
    assert said(settings, "lime") == "green"


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: network(layers.Lambda(lambda x: tf.nn.relu(x))), id="in a row"),
        pytest.param(lambda: functional(layers.Lambda(lambda x: tf.nn.relu(x))), id="functional"),
    ],
)
def test_a_name_that_a_lambda_layer_misses_is_named(settings: Settings, make: Any) -> None:
    """Keras keeps its code, and not what stands around it; a named function among the custom objects has it."""

    def relu(values: Any) -> Any:
        import tensorflow as tf

        return tf.nn.relu(values)

    save(make())
    told = refused(settings)
    assert "a function of it uses the name tf, which is not known where it is loaded. Import tf inside" in told
    save(network(layers.Lambda(relu)), relu=relu)
    assert said(settings, "lime") == "green"


def test_a_module_that_is_missing_is_named(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the model is served once it is there."""
    (tmp_path / "modules").mkdir()
    source = (
        "def postprocess(outputs):\n"
        "    return {'probabilities': dict(zip(('red', 'green', 'blue'), (0.2, 0.3, 0.5)))}\n"
    )
    (tmp_path / "modules" / "my_helpers.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    import my_helpers  # type: ignore[import-not-found]

    save(postprocess=my_helpers.postprocess)
    del sys.modules["my_helpers"]
    (tmp_path / "modules" / "my_helpers.py").rename(tmp_path / "modules" / "elsewhere.py")
    sentence = (
        "it needs the Python module my_helpers, which is not installed. Install it where the backend runs, add the "
        "folder that holds it to PYTHONPATH, save the model again with external_modules=[my_helpers], or serve"
    )
    assert sentence in refused(settings)
    (tmp_path / "modules" / "my_helpers.py").write_text("# empty\n")
    told = refused(settings)
    assert "it needs postprocess of the Python module my_helpers, which has no such name here. Install the my_h" in told
    (tmp_path / "modules" / "my_helpers.py").write_text(source)
    sys.modules.pop("my_helpers", None)
    assert served(settings, "red")[0] == {"red": 0.2, "green": 0.3, "blue": 0.5}


class Raises:
    """Raises something as soon as it is unpickled."""

    def __init__(self, error: Any) -> None:
        self.error = error

    def __reduce__(self) -> Any:
        return _raise, (self.error,)


def _raise(error: BaseException) -> Any:
    raise error


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        pytest.param(ValueError("/etc/secret\nTraceback"), r"loaded \(ValueError\)\. It was saved with", id="any"),
        pytest.param(SystemExit(3), r"cannot be loaded \(SystemExit\)", id="ends the process"),
        pytest.param(ModuleNotFoundError("No module named '/etc/x y'"), r"\(ModuleNotFoundError\)", id="no name"),
        pytest.param(NameError("name 'cv2' is not defined"), "uses the name cv2, which is not known", id="a name"),
        pytest.param(RecursionError("x" * 9999), r"\(RecursionError\)", id="long"),
    ],
)
def test_errors_give_names_alone(settings: Settings, error: BaseException, sentence: str) -> None:
    """Never their text, which may hold anything."""
    save(thing=Raises(error))
    assert re.search(sentence, told := refused(settings))
    assert "/etc" not in told


def test_doctor_says_the_same(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is wrong, with a remedy, and it goes on to the end."""
    for name, value in (("MODEL_DIR", settings.model_dir), ("BENTOML_HOME", settings.bentoml_home)):
        monkeypatch.setenv(name, str(value))
    for made in ({"postprocess": whole(lambda _: None)}, {"thing": Raises(SystemExit(3))}, {"preprocess": None}):
        tag = save(**made)
        told = refused(settings)
        done = CliRunner().invoke(main, ["doctor", "--json"])
        assert done.exit_code == 1
        (found,) = [each for each in json.loads(done.stdout)["checks"] if each["name"] == "Model"]
        assert (found["state"], found["what"]) == ("fail", told)
        assert tag in found["mend"]


def test_a_failure_is_told_without_another_try(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a model of ours."""
    save(postprocess=whole(lambda _: None))
    store, tries = store_of(settings), []
    load = store_module.classifier.load
    monkeypatch.setattr(store_module.classifier, "load", lambda *given: tries.append(1) or load(*given))
    for _ in range(3):
        with pytest.raises(ModelLoadError):
            store.current()
    assert len(tries) == 1
