"""Embedders that an operator brings: put into the store, learned with, served, and what is said of others."""

from __future__ import annotations

import inspect
import json
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import bentoml
import keras
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from celestial_backend.commands.cli import main
from celestial_backend.errors import ModelError, ModelLoadError, ModelNotFoundError, SettingsError
from celestial_backend.features.embedder import Lite0
from celestial_backend.models import embedders
from celestial_backend.models.embedders import StoredNetwork, open_embedder
from celestial_backend.settings import Settings
from tests.support.colours import plain, png
from tests.support.stores import store_of

COLOURS = {"warm": ("red", "orange", "tomato", "gold", "coral", "brown"), "cool": ("blue", "navy", "teal", "cyan")}


def tiny(*, include_top: bool = True, weights: str | None = "imagenet", input_shape: Any = None, pooling: Any = None):
    """A network made as those of `keras.applications` are."""
    inputs = keras.Input(input_shape or (20, 32, 3))
    x = keras.layers.Conv2D(8, 3, 2, activation="relu")(inputs)
    x = keras.layers.GlobalAveragePooling2D()(x) if include_top or pooling == "avg" else x
    network = keras.Model(inputs, keras.layers.Dense(10)(x) if include_top else x)
    if weights == "imagenet":
        raise OSError("URL fetch failure")
    if weights:
        network.load_weights(weights)
    return network


tiny.__module__ = "keras.src.applications.mobilenet_v2"  # whose pixels are -1 to 1


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has begun just now; where Keras has one network more."""
    monkeypatch.setattr(embedders, "_opened", {})
    monkeypatch.setattr(keras.applications, "Tiny", tiny, raising=False)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(bentoml_home=tmp_path / "bentoml", model_dir=tmp_path / "state", embedder="Tiny")


@pytest.fixture
def weights(tmp_path: Path) -> Callable[[int], Path]:
    """A file as an operator has it."""

    def made(seed: int) -> Path:
        keras.utils.set_random_seed(seed)
        tiny(include_top=False, pooling="avg", weights=None).save_weights(tmp_path / f"{seed}.weights.h5")
        return tmp_path / f"{seed}.weights.h5"

    return made


def run(*arguments: object) -> str:
    done = CliRunner().invoke(main, [str(each) for each in arguments])
    assert done.exit_code == 0, done.output
    return done.stdout


def save(name: str, network: Any, **custom: Any) -> StoredNetwork:
    tag = bentoml.keras.save_model(name, network, custom_objects=custom or None).tag
    return StoredNetwork(str(tag), Path(bentoml.models.get(tag).path).parents[2])


def test_a_network_is_added_learned_with_and_served(
    settings: Settings, weights: Callable[[int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a pickle, and with the pixels that it wants; after other weights its model says what to do."""
    assert "celestial_embedder:tiny gives 8 features" in run("features", "add", "tiny", "--weights", weights(1))
    stored = bentoml.models.get("celestial_embedder:tiny")
    assert sorted(path.name for path in Path(stored.path).iterdir()) == [
        "config.json", "metadata.json", "model.weights.h5", "model.yaml"
    ]  # fmt: skip
    assert stored.info.metadata == {"preprocessing": "mobilenet_v2", "weights": "1.weights.h5"}
    assert bentoml.keras.load_model(stored).output_shape == (None, 8)

    embedder = open_embedder(settings)
    assert embedder.prepare(plain("white")).shape == (1, 20, 32, 3)
    assert embedder.prepare(plain("white")) == pytest.approx(1)
    folder = tmp_path / "colours"
    for name, colours in COLOURS.items():
        (folder / name).mkdir(parents=True)
        for colour in colours:
            (folder / name / f"{colour}.png").write_bytes(png(colour))
    monkeypatch.setenv("CELESTIAL_EMBEDDER", "Tiny")
    told = json.loads(run("train", folder, "--json"))
    store = store_of(settings)
    assert store.live_tag() == told["tag"]
    model = store.current()
    assert model.vocabulary.classes == ("cool", "warm")
    said = model.probabilities(np.concatenate([model.prepare(plain("crimson")), model.prepare(plain("mediumblue"))]))
    assert said.argmax(axis=1).tolist() == [1, 0]

    run("features", "add", "Tiny", "--weights", weights(2))
    assert open_embedder(settings) is embedder, "until the process ends"
    embedders._opened.clear()
    assert open_embedder(settings).name != embedder.name
    with pytest.raises(ModelLoadError, match=rf"learned on features of the embedder {embedder.name}, and tiny-\w+ is"):
        store_of(settings).current()


def test_a_name_depends_on_the_files_alone(settings: Settings, weights: Callable[[int], Path]) -> None:
    """The same weights added again have the same name, on any machine."""
    names = set()
    for _ in range(2):
        keras.utils.clear_session()  # as in another process
        run("features", "add", "Tiny", "--weights", weights(1))
        names.add(StoredNetwork("Tiny", settings.bentoml_home).name)
    assert len(names) == 1


def test_there_is_one_for_the_whole_process(settings: Settings, weights: Callable[[int], Path]) -> None:
    """Loaded once, however many threads ask first; each gets its own picture's vector."""
    run("features", "add", "Tiny", "--weights", weights(1))
    pictures = [plain(colour) for colours in COLOURS.values() for colour in colours]
    found: dict[int, Any] = {}

    def look(place: int) -> None:
        embedder = open_embedder(settings)
        found[place] = (embedder, embedder.vectors(embedder.prepare(pictures[place])))

    threads = [threading.Thread(target=look, args=(place,)) for place in range(len(pictures))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    embedder = open_embedder(settings)
    assert all(each is embedder for each, _ in found.values())
    for place, picture in enumerate(pictures):
        assert found[place][1] == pytest.approx(embedder.vectors(embedder.prepare(picture)), abs=2e-3)
    vector = embedder.vectors(embedder.prepare(pictures[0]))
    assert vector.astype(np.float16).astype(np.float32).tolist() == vector.tolist(), "as the cache keeps it"


def test_the_one_inside_is_the_default(tmp_path: Path) -> None:
    """Nothing is read for it before it is used."""
    inside = open_embedder(Settings(model_dir=tmp_path))
    assert isinstance(inside, Lite0)
    assert open_embedder(Settings(model_dir=tmp_path / "other")) is inside


def test_a_network_may_bring_its_own_preprocess() -> None:
    """It decides what is made of a picture, and its pickle belongs to the name."""

    def corner(picture: Image.Image) -> Any:
        return np.array([picture.getpixel((0, 0))]) / 255

    network = keras.Sequential([keras.layers.Input((3,)), keras.layers.Dense(2, use_bias=False)])
    network.layers[0].set_weights([np.array([[1, 0], [0, 1], [0, 1]])])
    embedder = save("mine", network, preprocess=corner)
    assert (embedder.width, embedder.vectors(embedder.prepare(plain("yellow"))).tolist()) == (2, [[1, 1]])
    other = save("mine", network, preprocess=lambda picture: corner(picture) * 2)
    assert embedder.name.split("-")[-1] != other.name.split("-")[-1]


@pytest.mark.parametrize(
    ("shape", "preprocess", "sentence"),
    [
        pytest.param((None, None, 3), None, r"one row of finite numbers \(N, D\) .* it gave the shape \(2,", id="map"),
        pytest.param((8,), None, r"must take pictures \(N, H, W, 3\), and takes \(None, 8\)", id="no picture"),
        pytest.param((4, 4, 1), None, r"must take pictures \(N, H, W, 3\), and takes", id="grey"),
        pytest.param((8,), lambda _: np.zeros((1, 9)), r"does not take what is made of .* \(1, 9\)", id="9"),
        pytest.param((8,), lambda _: np.full((1, 8), np.nan), r"one row of finite numbers", id="not a number"),
        pytest.param((8,), lambda _: 1 / 0, r"failed on a 300x200 picture: ZeroDivisionError", id="fails"),
        pytest.param((8,), lambda _: np.zeros(8), r"a batch axis of 1, got shape \(8,\)", id="flat"),
    ],
)  # fmt: skip
def test_a_network_that_does_not_fit_says_how(shape: Any, preprocess: Any, sentence: str) -> None:
    """When it is used, with what is to be done."""
    network = keras.Sequential([keras.layers.Input(shape), keras.layers.Dense(2)])
    embedder = save("odd", network, **({"preprocess": preprocess} if preprocess else {}))
    with pytest.raises(ModelLoadError, match=sentence):
        _ = embedder.width


def test_a_network_of_any_size_is_shown_the_usual_one() -> None:
    """224 pixels, values 0 to 255."""
    network = keras.Sequential([keras.layers.Input((None, None, 3)), keras.layers.GlobalMaxPooling2D()])
    embedder = save("any", network)
    assert embedder.prepare(plain("white")).shape == (1, 224, 224, 3)
    assert embedder.vectors(embedder.prepare(plain("white"))).tolist() == [[255, 255, 255]]


def test_an_embedder_that_is_not_there_is_named(tmp_path: Path) -> None:
    """With the command that makes it, or what else there is; nothing is remembered of the failure."""
    settings = Settings(bentoml_home=tmp_path / "bentoml", embedder="EfficientNetV2B0")
    for _ in range(2):
        with pytest.raises(ModelNotFoundError, match="Make it: python -m celestial_backend features add EfficientNetV"):
            _ = open_embedder(settings).name
    save("mine", keras.Sequential([keras.layers.Input((None, None, 3)), keras.layers.GlobalMaxPooling2D()]))
    with pytest.raises(ModelNotFoundError, match=r"has no mine:gone \(of this name: \w+\). Save it with bentoml.keras"):
        _ = StoredNetwork("mine:gone", settings.bentoml_home).name


@pytest.mark.parametrize("damage", ["gone", "half", "description"])
def test_a_damaged_embedder_is_a_sentence(damage: str) -> None:
    """Whichever file it is."""
    network = keras.Sequential([keras.layers.Input((4, 4, 3)), keras.layers.Conv2D(2, 4), keras.layers.Flatten()])
    embedder = save("mine", network)
    folder = Path(bentoml.models.get(embedder.tag).path)
    if damage == "gone":
        (folder / "model.weights.h5").unlink()
    elif damage == "half":
        (folder / "model.weights.h5").write_bytes((folder / "model.weights.h5").read_bytes()[:500])
    else:
        (folder / "model.yaml").write_text("[")
    with pytest.raises(ModelLoadError, match=f"(?i)the (description of the )?embedder {embedder.tag} "):
        _ = embedder.width


def test_a_network_that_is_replaced_while_it_is_loaded_is_not_used(
    settings: Settings, weights: Callable[[int], Path]
) -> None:
    """Its vectors would be remembered under the name of another."""
    run("features", "add", "Tiny", "--weights", weights(1))
    embedder = open_embedder(settings)
    assert embedder.name
    run("features", "add", "Tiny", "--weights", weights(2))
    with pytest.raises(ModelLoadError, match=r"The embedder celestial_embedder:tiny was replaced meanwhile. Start the"):
        _ = embedder.width


def test_the_files_of_a_network_are_read_once_for_its_name(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where two threads are the first to ask: they may be hundreds of megabytes."""
    read, both = [], threading.Barrier(2)

    def name(embedder: StoredNetwork) -> str:
        read.append(embedder)
        with suppress(threading.BrokenBarrierError):
            both.wait(0.5)  # for another one that is read
        return f"tiny-{len(read)}"

    monkeypatch.setattr(StoredNetwork, "_name", name)
    embedder = StoredNetwork("Tiny", settings.bentoml_home)
    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(lambda _: embedder.name, range(2))) == ["tiny-1", "tiny-1"]
    assert len(read) == 1


def test_what_cannot_be_added_is_said(tmp_path: Path) -> None:
    """A name that Keras does not know, weights that nobody can fetch here, a file of something else."""
    (tmp_path / "junk.h5").write_bytes(b"junk")
    for arguments, error, sentence in (
        (["Tinny"], SettingsError, "A network of keras.applications is wanted, got 'Tinny'; there are ConvNeXtB"),
        (["Tiny"], ModelError, "The weights of Tiny could not be fetched .* give it with --weights FILE.h5"),
        (["Tiny", "--weights", tmp_path / "junk.h5"], ModelError, "junk.h5 must hold the weights of Tiny without"),
    ):
        done = CliRunner().invoke(main, ["features", "add", *map(str, arguments)])
        assert done.exit_code == error.exit_code
        assert re.search(sentence, done.stderr), done.stderr
    assert not (tmp_path / "bentoml" / "models" / "celestial_embedder").exists()


def test_keras_knows_the_pixels_of_each_of_its_networks() -> None:
    """By the module that the network comes from, which is what the metadata keep."""
    makers = [made for name, made in inspect.getmembers(keras.applications, inspect.isfunction) if name != "Tiny"]
    assert len(makers) > 30
    for made in makers:
        module = getattr(keras.applications, made.__module__.rpartition(".")[2])
        assert callable(module.preprocess_input)


@pytest.mark.parametrize("text", ["two words", "../up", "name:", ":version", "a:b:c", "name:Ä"])
def test_a_setting_that_can_name_nothing_is_refused(text: str) -> None:
    with pytest.raises(SettingsError, match=r"CELESTIAL_EMBEDDER must be lite0, a BentoML tag .*, or the name of a "):
        Settings.from_environ({"CELESTIAL_EMBEDDER": text})
