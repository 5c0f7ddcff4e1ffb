"""Exported models: they work where this package is not, and say what was served."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import keras
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from celestial_backend.commands.cli import main
from celestial_backend.errors import ModelError, ModelNotFoundError
from celestial_backend.features.embedder import Lite0
from celestial_backend.models import headed
from celestial_backend.models.headed import GENERAL, OWN, Head, Space
from celestial_backend.models.standalone import export, lite0_network
from celestial_backend.models.store import ModelStore
from celestial_backend.planets.renderer import render
from celestial_backend.settings import MODEL_NAME, Settings
from tests.support.backend_server import plain_environ
from tests.support.stores import store_of

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
WIDTHS = {GENERAL: Lite0.width, OWN: 128}  # of the default model's features
TWO, THREE = ("Earth", "Saturn"), ("day", "dawn", "night")


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(bentoml_home=tmp_path / "bentoml", model_dir=tmp_path / "state")


def head(control: str, classes: tuple[str, ...], *spaces: Space, multiple: bool = False) -> Head:
    """A head that is drawn by lot, sharp enough to say something."""
    rng = np.random.default_rng(len(control))
    weights = 20 * rng.standard_normal((sum(WIDTHS[space] for space in spaces), len(classes)))
    bias = rng.standard_normal(len(classes)).astype(np.float32)
    return Head(control, classes, weights.astype(np.float32), bias, spaces, multiple)


def add(store: ModelStore, version: str, *heads: Head, base: str | None = None) -> str:
    with tempfile.TemporaryDirectory() as folder:
        manifest = headed.save(Path(folder), heads, Lite0.name, base)
        return store.registry.add_heads(f"{MODEL_NAME}:{version}", Path(folder), manifest)


ALONE = """
import json, sys, bentoml
from pathlib import Path
from PIL import Image
said = {}
for file in sorted(Path().glob("*.bentomodel")):
    stored = bentoml.models.import_model(str(file.resolve()))
    network, hooks = bentoml.keras.load_model(stored), stored.custom_objects
    inputs = [hooks["preprocess"](Image.open(path)) for path in sorted(Path().glob("*.png"))]
    said[file.stem] = [str(stored.tag), [hooks["postprocess"](network.predict(each, verbose=0)) for each in inputs]]
print(json.dumps(said))
assert "celestial_backend" not in sys.modules
try:
    import celestial_backend
except ImportError:
    sys.exit(0)
sys.exit("the package is here")
"""


def said_alone(folder: Path) -> dict[str, tuple[str, list[dict]]]:
    """What a folder's exported files say of its pictures in a process that cannot import this package."""
    environ = plain_environ(Path(sys.executable).parent) | {"BENTOML_HOME": str(folder / "elsewhere")}
    (folder / "elsewhere").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", ALONE], cwd=folder, env=environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def said_here(store: ModelStore, tag: str, pictures: list[Image.Image]) -> np.ndarray:
    model = store.model(tag)
    return model.probabilities(np.concatenate([model.prepare(picture) for picture in pictures]))


def test_what_was_exported_says_the_same_alone(settings: Settings, tmp_path: Path) -> None:
    """
    A head on general features, on a network's own and on both; with choices that are independent; and a network.

    Served by this package again, from the file, it says the same too.
    """
    store = store_of(settings)
    base = store.live_tag()
    shared = add(store, "folder-1", head("", TWO, GENERAL))
    kind, mood = head("kind", TWO, OWN), head("mood", THREE, GENERAL, OWN, multiple=True)
    heads = add(store, "project-7-ab12", kind, mood, base=base)
    rng = np.random.default_rng(3)
    noise = Image.fromarray(rng.integers(0, 255, (301, 207, 3), np.uint8))
    pictures = [render("Saturn", 5), render("Earth", 2).resize((500, 333)), noise]
    place = tmp_path / "alone"
    place.mkdir()
    for number, picture in enumerate(pictures):
        picture.save(place / f"{number}.png")
    for tag, name, *control in ((base, "network"), (shared, "any"), (heads, "kind", "kind"), (heads, "mood", "mood")):
        export(settings, tag, place / f"{name}.bentomodel", *control)
    alone = said_alone(place)
    columns = {"network": (base, slice(None)), "any": (shared, slice(None)),
               "kind": (heads, slice(0, 2)), "mood": (heads, slice(2, 5))}  # fmt: skip
    for name, (tag, columns_) in columns.items():
        here, (_, answers) = said_here(store, tag, pictures)[:, columns_], alone[name]
        rows = np.array([list(answer["probabilities"].values()) for answer in answers])
        assert rows == pytest.approx(here, abs=1e-3), name
        names = list(answers[0]["probabilities"])
        assert [answer["prediction"] for answer in answers] == [names[row.argmax()] for row in here]
    assert {name: tag.partition(":")[2] for name, (tag, _) in alone.items()} == {
        "network": base.partition(":")[2], "any": "folder-1-alone",
        "kind": "project-7-ab12-alone-0", "mood": "project-7-ab12-alone-1",
    }  # fmt: skip
    again = store_of(replace(settings, bentomodel=place / "mood.bentomodel"))
    tag = again.live_tag("7")
    assert (tag, again.classes(tag, 0)) == (alone["mood"][0], THREE)
    assert said_here(again, tag, pictures) == pytest.approx(said_here(store, heads, pictures)[:, 2:], abs=1e-3)


def test_one_of_several_controls_is_named(settings: Settings, tmp_path: Path) -> None:
    """And it must have been learned."""
    store, file = store_of(settings), tmp_path / "mood.bentomodel"
    base = store.live_tag()
    classes = store.classes(base, 0) or ()
    tag = add(store, "project-7-ab12", head("kind", TWO, GENERAL), Head.of_network("sky", classes), base=base)
    for control in (None, "other"):
        with pytest.raises(ModelError, match=r"One file holds one control; .* has \['kind', 'sky'\]. Name one"):
            export(settings, tag, file, control)
    with pytest.raises(ModelError, match=f"has not learned the control 'sky': the network {base} answers it. Export"):
        export(settings, tag, file, "sky")
    assert not file.exists()


def test_what_cannot_be_exported_is_said(settings: Settings, tmp_path: Path) -> None:
    """A tag that is not there, a name that BentoML would not know, a folder that is not there."""
    store = store_of(settings)
    tag = store.live_tag()
    for asked, file, sentence in (
        (f"{MODEL_NAME}:gone", "a.bentomodel", "gone is not in the BentoML store, which holds celestial"),
        (tag, "a.zip", "must end in .bentomodel, got a.zip"),
        (tag, "gone/a.bentomodel", r"cannot be written: there is no folder .*/gone\. Make it, or choose another one\."),
    ):
        with pytest.raises(ModelError, match=sentence):
            export(settings, asked, tmp_path / file)
    other = add(store, "folder-1", head("", TWO, GENERAL))
    with pytest.raises(ModelNotFoundError, match="CELESTIAL_EMBEDDER names Tiny, and the BentoML store has no"):
        export(replace(settings, embedder="Tiny"), other, tmp_path / "a.bentomodel")


def test_the_command_says_what_the_file_holds(settings: Settings, tmp_path: Path) -> None:
    """The version alone names a model of ours."""
    tag, file = store_of(settings).live_tag(), tmp_path / "network.bentomodel"
    done = CliRunner().invoke(main, ["models", "export", tag.partition(":")[2], str(file)])
    assert (done.exit_code, done.stdout) == (0, f"{file} holds {tag}.\n")


def test_a_file_may_be_named_from_here(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a folder that is not there is told before there is any work."""
    tag = store_of(settings).live_tag()
    monkeypatch.chdir(tmp_path)
    Path("sub").mkdir()
    for name in ("here.bentomodel", "sub/there.bentomodel"):
        export(settings, tag, Path(name))
        assert Path(name).is_file()
    with pytest.raises(ModelError, match=r"there is no folder .*/missing\. Make it, or choose another one\."):
        export(settings, f"{MODEL_NAME}:never-made", Path("missing/a.bentomodel"))


def test_keras_says_what_litert_says() -> None:
    """The network in exported files is the one that is served: features of a picture to three digits."""
    embedder, network = Lite0(), lite0_network()
    assert isinstance(network, keras.Model)
    prepared = embedder.prepare(render("Jupiter", 3))
    assert network(prepared.astype(np.float32)).numpy() == pytest.approx(embedder.vectors(prepared), abs=2e-3)
