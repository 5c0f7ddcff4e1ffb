"""Which model is live: the store's files, imports, the default, and what is said when it cannot be served."""

from __future__ import annotations

import json
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import bentoml
import keras
import numpy as np
import pytest
from PIL import Image

from celestial_backend.database import Database
from celestial_backend.errors import ModelError, ModelLoadError, ModelNotFoundError
from celestial_backend.models import classifier, headed, kept, registry
from celestial_backend.models import store as store_module
from celestial_backend.models.classifier import read_parts
from celestial_backend.models.headed import Head
from celestial_backend.models.manifest import Manifest
from celestial_backend.models.store import DEFAULT_MODEL, ModelStore
from celestial_backend.planets import network
from celestial_backend.planets.network import FILES
from celestial_backend.planets.renderer import render
from celestial_backend.services import build
from celestial_backend.settings import MODEL_NAME, Settings, project_tag
from celestial_backend.web.app import create_app
from tests.support.backend_server import BODIES, REPOSITORY, label_config
from tests.support.colours import Colours, plain
from tests.support.stores import store_of

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(bentoml_home=tmp_path / "bentoml", model_dir=tmp_path / "state")


def guide_pictures(guide: Path) -> list[Image.Image]:
    return [Image.open(guide / f"picture-{i}.png").convert("RGB") for i in range(12)]


def probabilities(store: ModelStore, pictures: list[Image.Image]) -> np.ndarray:
    model = store.current()
    return model.probabilities(np.concatenate([model.prepare(picture) for picture in pictures]))


def save(name: str = MODEL_NAME, *, outputs: int = 2, **custom: object) -> str:
    """Save a tiny network whose hooks are given; by default they fit each other."""
    network = keras.Sequential([keras.layers.Input((4,)), keras.layers.Dense(outputs)])
    hooks = {"preprocess": lambda _: np.zeros((1, 4)), "postprocess": two_classes} | custom
    given = {hook: function for hook, function in hooks.items() if function is not None}
    return str(bentoml.keras.save_model(name, network, custom_objects=given).tag)


def two_classes(outputs):
    shares = np.exp(outputs[0]) / np.exp(outputs[0]).sum()
    names = ("day", "night")
    return {"prediction": "day", "probabilities": {names[i]: float(share) for i, share in enumerate(shares)}}


def test_an_empty_store_gets_the_default_model(settings: Settings) -> None:
    """The first start serves the embedded model, under a tag that says which weights it holds."""
    store = store_of(settings)
    tag = store.live_tag()
    assert tag.startswith(f"{MODEL_NAME}:default-")
    assert store.current().tag == tag
    assert (
        store.classes(tag, 0)
        == store.current().classes
        == tuple(json.loads((DEFAULT_MODEL / "card.json").read_text())["classes"])
    )


def test_the_default_model_is_registered_once(settings: Settings) -> None:
    """Many processes that start at the same moment on one empty store agree on one tag."""
    tags: list[str] = []
    threads = [threading.Thread(target=lambda: tags.append(store_of(settings).live_tag())) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(tags) == 6
    assert len(set(tags)) == 1
    assert len(list((settings.bentoml_home / "models" / MODEL_NAME).glob("*/model.yaml"))) == 1


def test_a_registration_cut_short_is_done_again(settings: Settings) -> None:
    """A start that was killed while it copied the default leaves nothing that is served half."""
    tag = store_of(settings).live_tag()
    folder = settings.bentoml_home / "models" / MODEL_NAME
    half = folder / tag.partition(":")[2]
    (half / "model.yaml").unlink()
    (half / "model.weights.h5").write_bytes(b"half")
    (folder / "latest").unlink()
    store = store_of(settings)
    assert store.live_tag() == tag
    assert (half / "model.weights.h5").read_bytes() == (DEFAULT_MODEL / "model.weights.h5").read_bytes()


def test_a_registration_that_is_killed_is_done_again(settings: Settings, tmp_path: Path) -> None:
    """Whatever BentoML has copied by then, a model is there whole or not at all."""
    (tmp_path / "marks").mkdir()
    faults = {
        "FAULT_MARKS": str(tmp_path / "marks"),
        "FAULT_AT": "shutil:copyfile:after:model.yaml",
        "FAULT_DO": "self",
    }
    folders = {"MODEL_DIR": str(settings.model_dir), "BENTOML_HOME": str(settings.bentoml_home)}
    support = REPOSITORY / "tests" / "support"
    code = (
        "from celestial_backend.settings import Settings; from tests.support.stores import store_of;"
        "store_of(Settings.from_environ()).live_tag()"
    )
    killed = subprocess.run(
        [sys.executable, "-c", code, "celestial_backend.worker"], check=False, cwd=REPOSITORY,
        env=os.environ | folders | faults | {"PYTHONPATH": os.pathsep.join([str(support / "faults"), str(REPOSITORY)])},
    )  # fmt: skip
    assert killed.returncode == -9
    store = store_of(settings)
    assert store.registry.holds(store.live_tag())
    assert store.current().classes == BODIES


def test_bentoml_itself_can_load_what_is_registered(settings: Settings) -> None:
    """`bentoml.keras.load_model` and the custom objects give the numbers that are served."""
    store = store_of(settings)
    picture = render("Saturn", 5)
    stored = bentoml.models.get(store.live_tag())
    network = bentoml.keras.load_model(stored)
    hooks = stored.custom_objects
    answer = hooks["postprocess"](network.predict(hooks["preprocess"](picture), verbose=0))
    served = dict(zip(store.current().classes, probabilities(store, [picture])[0], strict=True))
    assert answer["prediction"] == "Saturn"
    assert served == pytest.approx(answer["probabilities"], abs=1e-6)


def test_a_registered_model_carries_its_own_code(settings: Settings, tmp_path: Path) -> None:
    """It works in a process without this package, so another release of it cannot change what the model sees."""
    tag = store_of(settings).live_tag()
    picture = render("Jupiter", 3)
    picture.save(tmp_path / "picture.png")
    code = (
        "import sys, bentoml, keras; from PIL import Image\n"
        f"model = bentoml.models.get({tag!r}); hooks = model.custom_objects\n"
        f"inputs = hooks['preprocess'](Image.open({str(tmp_path / 'picture.png')!r}))\n"
        "answer = hooks['postprocess'](keras.models.load_model(model.path).predict(inputs, verbose=0))\n"
        "print(answer['prediction'], answer['probabilities'][answer['prediction']], 'celestial_backend' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    prediction, probability, imported = done.stdout.split()
    assert (prediction, imported) == ("Jupiter", "False")
    assert float(probability) == pytest.approx(probabilities(store_of(settings), [picture]).max(), abs=1e-6)


def test_the_default_of_another_release_gives_way(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """An upgrade brings its own default where the store's latest is an older one, and leaves own models alone."""
    with monkeypatch.context() as older:
        older.setattr(network, "version", lambda _: "default-0123456789ab")
        assert store_of(settings).live_tag() == f"{MODEL_NAME}:default-0123456789ab"
    upgraded = store_of(settings).live_tag()
    assert upgraded.startswith(f"{MODEL_NAME}:default-")
    assert upgraded != f"{MODEL_NAME}:default-0123456789ab"
    own = save()
    assert store_of(settings).live_tag() == own


def made_next_year(store: ModelStore, tag: str) -> None:
    """Let a model have been made before the clock was moved back by a year."""
    path = store.registry.path(tag) / "model.yaml"
    year = datetime.now(UTC).year
    path.write_text(path.read_text().replace(f"creation_time: '{year}", f"creation_time: '{year + 1}"))
    assert store.registry.describe(tag).created.startswith(str(year + 1))


def test_an_upgrade_is_served_though_the_clock_was_moved_back(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was saved last is the latest, for BentoML too, whatever times stand in the models."""
    with monkeypatch.context() as older:
        older.setattr(network, "version", lambda _: "default-0123456789ab")
        store = store_of(settings)
        made_next_year(store, store.live_tag())
    for _ in range(2):
        upgraded = store_of(settings).live_tag()
        assert upgraded.startswith(f"{MODEL_NAME}:default-")
        assert upgraded != f"{MODEL_NAME}:default-0123456789ab"
    made_next_year(store, upgraded)
    own = store.registry.add_folder(DEFAULT_MODEL)
    assert store_of(settings).live_tag() == str(bentoml.models.get(MODEL_NAME).tag) == own


def test_the_default_ships_without_a_pickle() -> None:
    """Weights and plain JSON only: nothing in the package runs code when it is read."""
    assert {path.name for path in DEFAULT_MODEL.iterdir()} >= {*FILES, "card.json", "MODEL_CARD.md"}
    assert not [path for path in DEFAULT_MODEL.rglob("*") if path.suffix in (".pkl", ".pickle", ".keras")]


def test_an_exported_guide_model_answers_as_it_did(settings: Settings, guide: Path) -> None:
    """An imported `.bentomodel` gives what its own preprocess, predict and postprocess gave."""
    told = json.loads((guide / "answers.json").read_text())
    store = store_of(replace(settings, bentomodel=guide / "guide.bentomodel"))
    assert store.live_tag() == told["tag"]
    served = probabilities(store, guide_pictures(guide))
    for row, answer in zip(served, told["answers"], strict=True):
        assert dict(zip(store.current().classes, row, strict=True)) == pytest.approx(answer["probabilities"], abs=1e-6)


def test_an_imported_model_is_imported_once(settings: Settings, guide: Path) -> None:
    """The second start finds the model of the file in the store, also beside a newer one."""
    with_file = replace(settings, bentomodel=guide / "guide.bentomodel")
    tag = store_of(with_file).live_tag()
    save()
    assert store_of(with_file).live_tag() == tag


@pytest.fixture
def slow_import(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Imports of files that go on until this is set, as those of large files do."""
    done, real = threading.Event(), registry.import_into

    def slow(store: object, archive: Path) -> None:
        done.wait(60)
        real(store, archive)

    monkeypatch.setattr(registry, "import_into", slow)
    yield done
    done.set()


def served(store: ModelStore, tag: str) -> bool:
    """Whether a tag is served before long."""
    deadline = time.monotonic() + 60
    while store.live_tag() != tag:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def test_requests_do_not_wait_for_an_import(
    settings: Settings, guide: Path, slow_import: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    """A server with nothing else in its store answers with the default model until the file is imported."""
    caplog.set_level(logging.INFO)
    tag = json.loads((guide / "answers.json").read_text())["tag"]
    services = build(replace(settings, bentomodel=guide / "guide.bentomodel"))
    store, client = services.store, create_app(services).test_client()
    store.warm_up()
    meanwhile = client.post("/setup", json={"project": "3.1", "schema": label_config()}).json["model_version"]
    assert meanwhile == store.live_tag() == f"{MODEL_NAME}:{network.version(DEFAULT_MODEL)}"
    assert store.current("3").classes == BODIES
    assert f"imported in the background; until then {meanwhile} is served" in caplog.text
    slow_import.set()
    assert served(store, tag)
    assert f"{tag} of CELESTIAL_BENTOMODEL is served from now on" in caplog.text
    assert store_of(settings).live_tag() == tag, "the default of the meantime is not the store's latest"


def test_what_was_live_is_served_while_a_file_is_imported(
    settings: Settings, guide: Path, slow_import: threading.Event
) -> None:
    """And no default model is put beside it."""
    own = save()
    store = store_of(replace(settings, bentomodel=guide / "guide.bentomodel"))
    store.warm_up()
    assert store.live_tag() == own
    assert [model.tag for model in store.registry.models()] == [own]
    slow_import.set()
    assert served(store, json.loads((guide / "answers.json").read_text())["tag"])


def test_a_file_that_was_imported_is_not_read_again(
    settings: Settings, guide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tag stands at the end of what has to be unpacked; a file that was written anew is read."""
    file = tmp_path / "model.bentomodel"
    shutil.copy(guide / "guide.bentomodel", file)
    with_file, read, tag_of = replace(settings, bentomodel=file), [], registry.tag_of
    monkeypatch.setattr(registry, "tag_of", lambda archive: read.append(archive) or tag_of(archive))
    tag = store_of(with_file).live_tag()
    assert file in read
    read.clear()
    again = store_of(with_file)
    again.warm_up()
    assert again.live_tag() == tag
    assert read == []
    file.write_bytes(b"no archive")
    with pytest.raises(ModelLoadError, match="Export it again"):
        store_of(with_file).live_tag()


def test_a_server_tells_that_a_file_cannot_be_imported(
    settings: Settings, guide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each request once it is known, and no longer than until the file is fixed."""
    file = tmp_path / "model.bentomodel"
    file.write_bytes(b"no archive")
    monkeypatch.setattr(store_module, "RETRY_S", 0.0)
    store = store_of(replace(settings, bentomodel=file))
    store.warm_up()
    with pytest.raises(ModelLoadError, match="Export it again"):
        served(store, "never")
    shutil.copy(guide / "guide.bentomodel", file)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with suppress(ModelLoadError):
            tag = store.live_tag()
            break
        time.sleep(0.05)
    assert tag == json.loads((guide / "answers.json").read_text())["tag"]


def test_classes_are_remembered_without_tensorflow(settings: Settings, guide: Path) -> None:
    """A model that only its postprocess describes is loaded once; later starts know its classes at once."""
    with_file = replace(settings, bentomodel=guide / "guide.bentomodel")
    first = store_of(with_file)
    classes = first.current().classes
    later = store_of(with_file)
    assert later.classes(later.live_tag(), 0) == classes
    shutil.rmtree(settings.model_dir)
    forgetful = store_of(with_file)
    assert forgetful.classes(forgetful.live_tag(), 0) is None


def test_a_newer_model_is_served_at_the_next_call(settings: Settings) -> None:
    """`latest` is read anew each time, so a model saved by another process needs no restart."""
    store = store_of(settings)
    first = store.current()
    tag = save()
    assert store.live_tag() == tag
    assert store.current().classes == ("day", "night")
    assert first.classes != ("day", "night")


def test_a_named_tag_is_served_beside_a_newer_one(settings: Settings) -> None:
    """CELESTIAL_MODEL pins a version."""
    pinned = save()
    save()
    assert store_of(replace(settings, model=pinned)).live_tag() == pinned
    assert store_of(replace(settings, model=MODEL_NAME)).live_tag() != pinned


def test_a_missing_tag_is_named_with_those_that_are_there(settings: Settings) -> None:
    """The sentence holds what was asked for, what the store holds, and what to set."""
    held = save()
    with pytest.raises(ModelNotFoundError, match=rf"{MODEL_NAME}:gone is not .* holds {held}\. Set CELESTIAL_MODEL"):
        store_of(replace(settings, model=f"{MODEL_NAME}:gone")).live_tag()


def test_a_file_that_is_no_export_is_refused(settings: Settings, tmp_path: Path) -> None:
    """CELESTIAL_BENTOMODEL must be what export_model wrote."""
    broken = tmp_path / "broken.bentomodel"
    broken.write_bytes(b"no archive")
    with pytest.raises(ModelLoadError, match=r"export_model wrote, and broken.bentomodel is none .* Export it again"):
        store_of(replace(settings, bentomodel=broken)).live_tag()


def test_an_export_cut_in_half_is_refused(settings: Settings, guide: Path, tmp_path: Path) -> None:
    """A file that was not copied whole is no model, and leaves none behind."""
    half = tmp_path / "half.bentomodel"
    half.write_bytes((guide / "guide.bentomodel").read_bytes()[:300_000])
    with pytest.raises(ModelLoadError, match=r"half.bentomodel"):
        store_of(replace(settings, bentomodel=half)).live_tag()


@pytest.mark.parametrize(
    ("made", "sentence"),
    [
        pytest.param({"preprocess": None}, "has no custom object preprocess", id="no preprocess"),
        pytest.param({"preprocess": None, "postprocess": None}, "custom object preprocess and no post", id="no hooks"),
        pytest.param({"preprocess": lambda _: np.zeros(4)}, "a batch axis of 1, got shape", id="no batch axis"),
        pytest.param({"preprocess": lambda _: 1 / 0}, "preprocess of .* failed on .*ZeroDivision", id="preprocess"),
        pytest.param({"preprocess": lambda _: np.zeros((1, 7))}, "does not take what its preprocess", id="other input"),
        pytest.param({"postprocess": lambda _: {}}, "must give .*prediction.*probabilities", id="postprocess"),
        pytest.param({"outputs": 3}, r"output of shape \(1, 3\) for one picture: IndexError", id="too wide"),
        pytest.param(
            {"postprocess": lambda _: {"probabilities": dict.fromkeys("abc", 0.3)}},
            "gives 2 numbers and its postprocess names 3 classes",
            id="too narrow",
        ),
    ],
)
def test_a_model_that_does_not_fit_together_says_how(settings: Settings, made: dict, sentence: str) -> None:
    """Each way in which hooks and network can be at odds has a sentence of its own."""
    save(**made)
    with pytest.raises(ModelLoadError, match=sentence):
        store_of(settings).current()


def test_a_pickle_that_needs_another_module_names_it(settings: Settings) -> None:
    """Custom objects that cannot be read say what is missing, and what helps."""
    folder = settings.bentoml_home / "models" / MODEL_NAME / save().partition(":")[2]
    (folder / "custom_objects.pkl").write_bytes(b"\x80\x05cgone_module\nthing\n.")
    with pytest.raises(ModelLoadError, match=r"the Python module gone_module, which is not installed\. Install"):
        store_of(settings).current()


def test_broken_weights_are_a_sentence(settings: Settings) -> None:
    """A weights file cut in half is refused with the model's tag."""
    tag = save()
    weights = settings.bentoml_home / "models" / MODEL_NAME / tag.partition(":")[2] / "model.weights.h5"
    weights.write_bytes(weights.read_bytes()[:500])
    with pytest.raises(ModelLoadError, match=rf"The network of {tag} cannot be loaded"):
        store_of(settings).current()


def test_a_damaged_description_is_a_sentence(settings: Settings) -> None:
    """A model.yaml that is no YAML is refused with the command that removes the model."""
    tag = save()
    (settings.bentoml_home / "models" / MODEL_NAME / tag.partition(":")[2] / "model.yaml").write_text("name: [")
    with pytest.raises(ModelLoadError, match=rf"{tag} cannot be read .*bentoml models delete {tag}"):
        store_of(settings).current()


def test_a_network_of_another_keras_is_refused_without_loading(settings: Settings) -> None:
    """A SavedModel folder, as Keras 2 wrote it, is told at once, when the classes are asked for."""
    tag = save()
    folder = settings.bentoml_home / "models" / MODEL_NAME / tag.partition(":")[2]
    (folder / "config.json").unlink()
    store = store_of(settings)
    with pytest.raises(ModelLoadError, match="does not hold a Keras 3 network"):
        store.classes(tag, 0)


def test_a_failed_load_is_told_again_without_another_try(settings: Settings) -> None:
    """A broken model costs one attempt, not one per request, and a newer model ends the matter."""
    save(outputs=3)
    store = store_of(settings)
    with pytest.raises(ModelLoadError) as first:
        store.current()
    with pytest.raises(ModelLoadError) as second:
        store.current()
    assert second.value is first.value
    with pytest.raises(ModelLoadError):
        store.classes(store.live_tag(), 5)
    save()
    assert store.current().classes == ("day", "night")


def test_a_model_that_was_mended_is_served_without_a_new_start(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Label Studio asks /setup before it predicts, so a failure that is told there must be looked at again."""
    store = store_of(settings)
    tag = store.live_tag()
    weights = store.registry.path(tag) / "model.weights.h5"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    for _ in range(2):
        with pytest.raises(ModelLoadError, match="The network of"):
            store.current()
        with pytest.raises(ModelLoadError, match="The network of"):
            store.classes(tag, 0)
    weights.write_bytes(whole)
    later = time.monotonic() + store_module.RETRY_S
    monkeypatch.setattr(store_module.time, "monotonic", lambda: later)
    assert store.classes(tag, 60) == tuple(BODIES)
    assert store.current().tag == tag


UNREADABLE = """
import os, stat, sys
from celestial_backend.web.app import create_app
from celestial_backend.settings import Settings
from celestial_backend.services import build

settings = Settings.from_environ()
client, models = create_app(build(settings)).test_client(), settings.bentoml_home / "models"
body = {"project": "1.1", "schema": sys.argv[1]}
print(client.post("/setup", json=body).json["model_version"])
for place in (models, models / "celestial_bodies_classifier_model"):
    place.chmod(0)
    for _ in range(2):
        answer = client.post("/setup", json=body)
        print(answer.status_code, answer.json["detail"])
    place.chmod(stat.S_IRWXU)
    print(client.post("/setup", json=body).json["model_version"])
"""


def test_a_store_that_cannot_be_read_is_a_sentence(settings: Settings) -> None:
    """503 as long as it lasts, no other model in its place, and nothing to start anew afterwards."""
    command = [sys.executable, "-c", UNREADABLE, label_config()]
    if os.geteuid() == 0:  # who may read everything, until that is taken away
        capabilities = "-dac_override,-dac_read_search"
        command = ["setpriv", f"--bounding-set={capabilities}", f"--inh-caps={capabilities}", *command]
    folders = {"MODEL_DIR": str(settings.model_dir), "BENTOML_HOME": str(settings.bentoml_home)}
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], env=os.environ | folders, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    tag, *told = done.stdout.splitlines()
    refused = "503 The BentoML store cannot be read (Permission denied). Set BENTOML_HOME to a folder that this user "
    refused += "can read and write, with space on its disk."
    assert told == [refused, refused, tag] * 2
    assert "Traceback" not in done.stderr


def test_a_load_that_failed_is_told_though_the_classes_are_known(settings: Settings) -> None:
    """Metadata with class names does not hide, in /setup, that the weights behind it are broken."""
    store = store_of(settings)
    tag = store.live_tag()
    assert store.classes(tag, 0)
    weights = settings.bentoml_home / "models" / MODEL_NAME / tag.partition(":")[2] / "model.weights.h5"
    weights.write_bytes(b"broken")
    with pytest.raises(ModelLoadError):
        store.current()
    with pytest.raises(ModelLoadError, match="The network of"):
        store.classes(tag, 0)


def test_a_store_that_cannot_be_written_says_so(settings: Settings, tmp_path: Path) -> None:
    """Without a model and without a place to put one, the sentence names BENTOML_HOME."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="BENTOML_HOME"):
        store_of(replace(settings, bentoml_home=tmp_path / "file")).live_tag()


def test_rows_do_not_depend_on_their_batch(settings: Settings) -> None:
    """A picture gets the same probabilities alone, in a batch, and in any order; rows sum to 1."""
    store = store_of(settings)
    pictures = [render(body, 11) for body in store.current().classes]
    together = probabilities(store, pictures)
    backwards = probabilities(store, pictures[::-1])
    alone = np.concatenate([probabilities(store, [picture]) for picture in pictures])
    assert together == pytest.approx(backwards[::-1], abs=1e-5)
    assert together == pytest.approx(alone, abs=1e-5)
    assert together.sum(axis=1) == pytest.approx(1, abs=1e-6)


def for_project(store: ModelStore, project: str, job: str, parent: str | None = None, **more: object) -> str:
    """A model of a project, as a training leaves it in the store."""
    network = keras.Sequential([keras.layers.Input((4,)), keras.layers.Dense(2)])
    with tempfile.TemporaryDirectory() as folder:
        network.save(folder, zipped=False)
        described = {"classes": ["day", "night"], "parent": parent, **more}
        hooks = (lambda _: np.zeros((1, 4)), two_classes)
        return store.registry.add(project_tag(project, job), Path(folder), *hooks, described)


def test_a_projects_model_is_live_for_that_project_alone(settings: Settings) -> None:
    """Other projects, and other tools that share the store's folder, keep the model that the settings name."""
    store = store_of(settings)
    shared = store.live_tag()
    tag = for_project(store, "3", "0badcafe", shared)
    assert store.live_tag("3") == shared, "a model that lies in the store is not live yet"
    assert store.publish("3", tag, job="0badcafe", instead_of=shared)
    assert (store.live_tag("3"), store.live_tag("4"), store.live_tag()) == (tag, shared, shared)
    assert store.current("3").classes == ("day", "night")
    assert store.classes(tag, 0) == ("day", "night")
    assert len(store.current("4").classes) == 10
    own = save()
    assert (store.live_tag("3"), store.live_tag("4")) == (tag, own)


def test_a_store_with_projects_models_alone_gets_the_default(settings: Settings) -> None:
    """The model of one project never becomes that of all."""
    store = store_of(settings)
    for_project(store, "3", "0badcafe")
    assert store.live_tag("4").startswith(f"{MODEL_NAME}:default-")


def test_another_process_is_served_at_its_next_request(settings: Settings) -> None:
    """Nothing is told to it, and nothing is started anew; the way back is as short."""
    web, worker = store_of(settings), store_of(settings)
    shared = web.live_tag("3")
    before = web.current("3")
    tag = for_project(worker, "3", "0badcafe", shared)
    worker.publish("3", tag)
    assert web.live_tag("3") == web.current("3").tag == tag
    worker.publish("3", shared)
    assert web.current("3") is before


def test_who_publishes_must_have_beaten_what_is_live(settings: Settings) -> None:
    """A model that a person chose while a training ran is not overwritten by it."""
    store = store_of(settings)
    shared = store.live_tag()
    chosen, trained = (for_project(store, "3", job, shared) for job in ("0000aaaa", "0000bbbb"))
    store.publish("3", chosen)
    assert not store.publish("3", trained, job="0000bbbb", instead_of=shared)
    assert store.live_tag("3") == chosen
    with pytest.raises(ModelNotFoundError, match="project-3-0000cccc is not in the BentoML store"):
        store.publish("3", f"{MODEL_NAME}:project-3-0000cccc")


def test_a_pointer_to_a_model_that_is_gone_is_passed_over(settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    """Predictions go on with the model of the settings, under its own version, and the log says it once."""
    store = store_of(settings)
    shared = store.live_tag()
    tag = for_project(store, "3", "0badcafe", shared)
    store.publish("3", tag)
    store.registry.remove(tag)
    with Database(settings).writing("3") as transaction:
        kept.remove(tag, transaction)
    assert store.live_tag("3") == store.live_tag("3") == shared
    assert caplog.text.count(f"The live model of project 3, {tag}, is not in the store") == 1


def test_old_models_are_kept_to_a_limit(settings: Settings) -> None:
    """The live one, its parents and what belongs to all projects stay; the oldest others go."""
    store = store_of(replace(settings, keep_models=2))
    shared = store.live_tag()
    first = for_project(store, "3", "00000001", shared)
    live = for_project(store, "3", "00000002", first)
    refused = [for_project(store, "3", f"0000000{number}", live) for number in range(3, 7)]
    other = for_project(store, "4", "00000009", shared)
    store.publish("3", live)
    assert store.prune("3") == refused[:2]
    assert {model.tag for model in store.registry.models()} == {shared, first, live, *refused[2:], other}
    assert store.prune("3") == []


def heads_for(
    store: ModelStore, project: str, job: str, *heads: Head, base: str | None = None, manifest: Manifest | None = None
) -> str:
    """A model of heads of a project, as a training leaves it in the store."""
    with tempfile.TemporaryDirectory() as folder:
        manifest = headed.save(Path(folder), heads or [KIND], "colours-1", base, manifest)
        return store.registry.add_heads(project_tag(project, job), Path(folder), manifest)


KIND = Head("kind", ("apple", "leaf", "sky"), 9 * np.eye(3, dtype=np.float32), np.zeros(3, np.float32))
OTHER = Head("mood", ("warm", "cool"), np.array([[9, 0], [0, 0], [0, 9]], np.float32), np.zeros(2, np.float32))


@pytest.fixture
def colours(monkeypatch: pytest.MonkeyPatch) -> Colours:
    """The embedder of this process."""
    embedder = Colours()
    monkeypatch.setattr(store_module, "open_embedder", lambda _: embedder)
    return embedder


@pytest.mark.usefixtures("colours")
def test_a_model_of_heads_is_served_as_any_other(settings: Settings) -> None:
    """Saved, published and loaded by what lies in its folder; what it can say is known before it is loaded."""
    store = store_of(settings)
    shared = store.live_tag()
    tag = heads_for(store, "3", "0badcafe", KIND, OTHER, manifest=Manifest(parent=shared))
    store.publish("3", tag)
    web = store_of(settings)
    known = web.vocabulary(web.live_tag("3"), 0)
    assert known is not None
    assert [(own.control, own.classes) for own in known.own] == [("kind", KIND.classes), ("mood", OTHER.classes)]
    assert web.classes(tag, 0) == ("apple", "leaf", "sky", "warm", "cool")
    model = web.current("3")
    assert (model.tag, model.vocabulary) == (tag, known)
    assert model.probabilities(model.prepare(plain("red"))).round().tolist() == [[1, 0, 0, 1, 0]]
    assert (web.registry.describe(tag).parent, web.live_tag("4")) == (shared, shared)


def test_bentoml_knows_a_model_of_heads(settings: Settings, tmp_path: Path) -> None:
    """Its own commands show, read, export and remove it, and no pickle lies in it."""
    store = store_of(settings)
    shared = store.live_tag()
    tag = heads_for(store, "3", "0badcafe", manifest=Manifest(accepted_weight=0.9, tried=None))
    stored = bentoml.models.get(tag)
    assert sorted(path.name for path in Path(stored.path).iterdir()) == ["heads.json", "heads.npz", "model.yaml"]
    assert stored.info.metadata == {
        "choices": {"kind": list(KIND.classes)}, "embedder": "colours-1", "accepted_weight": 0.9,
    }  # fmt: skip
    assert stored.custom_objects == {}
    assert (stored.info.context.framework_name, stored.info.context.python_version) == (
        "celestial_backend", platform.python_version()
    )  # fmt: skip
    assert {str(model.tag) for model in bentoml.models.list()} == {tag, shared}
    assert store.registry.describe(tag).created == stored.creation_time.isoformat()
    listed = subprocess.run(
        [sys.executable, "-m", "bentoml", "models", "list", "--output", "json"], capture_output=True, text=True,
        env=os.environ | {"BENTOML_HOME": str(settings.bentoml_home)}, check=True,
    )  # fmt: skip
    assert {model["tag"] for model in json.loads(listed.stdout)} == {tag, shared}
    bentoml.models.export_model(tag, str(tmp_path / "heads.bentomodel"))
    bentoml.models.delete(tag)
    assert not store.registry.holds(tag)
    store.registry.import_archive(tmp_path / "heads.bentomodel", tag)
    assert (store.registry.describe(tag).manifest.accepted_weight, store.live_tag("4")) == (0.9, shared)


def test_a_model_of_heads_for_all_projects_is_the_latest(settings: Settings) -> None:
    """For BentoML too, unless it is a project's."""
    store = store_of(settings)
    shared = store.live_tag()
    with tempfile.TemporaryDirectory() as folder:
        manifest = headed.save(Path(folder), [KIND], "colours-1")
        tag = store.registry.add_heads(f"{MODEL_NAME}:mine", Path(folder), manifest)
    heads_for(store, "3", "0badcafe")
    assert store.live_tag() == str(bentoml.models.get(MODEL_NAME).tag) == tag != shared


def test_heads_cannot_be_taken_apart(settings: Settings) -> None:
    """They hold no network: the sentence says what is wanted."""
    tag = heads_for(store_of(settings), "3", "0badcafe")
    with pytest.raises(ModelLoadError, match=rf"{tag} holds heads on features, and no network, .* Name a model that"):
        read_parts(tag, settings.bentoml_home.joinpath("models", *tag.split(":")))


HEADS_ALONE = """
import sys
from tests.support.colours import Colours, plain
from celestial_backend.models import store as store_module
from celestial_backend.settings import Settings
from tests.support.stores import store_of

store_module.open_embedder = lambda _: Colours()
store = store_of(Settings.from_environ())
model = store.current("3")
print(model.probabilities(model.prepare(plain("blue"))).argmax())
print({"tensorflow", "keras", "bentoml", "sklearn", "ai_edge_litert"} & set(sys.modules))
"""


def test_heads_are_served_without_heavy_libraries(settings: Settings) -> None:
    """Neither TensorFlow nor BentoML, nor what they were learned with."""
    store = store_of(settings)
    store.live_tag()
    store.publish("3", heads_for(store, "3", "0badcafe"))
    folders = {"MODEL_DIR": str(settings.model_dir), "BENTOML_HOME": str(settings.bentoml_home)}
    done = subprocess.run(
        [sys.executable, "-c", HEADS_ALONE], capture_output=True, text=True, check=False, cwd=REPOSITORY,
        env=os.environ | folders | {"PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    assert (done.returncode, done.stdout.split()) == (0, ["2", "set()"]), done.stderr


@pytest.mark.usefixtures("colours")
def test_heads_do_not_wait_for_another_model(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network takes seconds to load; a project with heads is served meanwhile."""
    store, begun, done = store_of(settings), threading.Event(), threading.Event()
    store.publish("3", heads_for(store, "3", "0badcafe"))
    load = classifier.load

    def slow(tag: str, folder: Path) -> classifier.Classifier:
        begun.set()
        done.wait(30)
        return load(tag, folder)

    monkeypatch.setattr(classifier, "load", slow)
    store.warm_up()
    assert begun.wait(30)
    assert store.current("3").tag == store.live_tag("3")
    done.set()
    assert store.current("4").tag == store.live_tag("4")


@pytest.mark.usefixtures("colours")
def test_many_trainings_push_no_network_out(settings: Settings) -> None:
    """Models of heads are kept in memory to a limit of their own."""
    store = store_of(settings)
    network = store.current("4")
    tags = [heads_for(store, "3", f"{number:08x}") for number in range(store_module.LOADED_MAX + 2)]
    first = store.model(tags[0])
    loaded = [store.model(tag) for tag in tags]
    assert store.current("4") is network
    assert store.model(tags[-1]) is loaded[-1]
    assert store.model(tags[0]) is not first


@pytest.fixture
def networks(monkeypatch: pytest.MonkeyPatch) -> Callable[[ModelStore, str], str]:
    """Makes a model of a project out of nothing but a description; each, and the default, is loaded in no time."""
    parts = {"classes": BODIES, "base": None, "prepare": None, "probabilities": None}
    monkeypatch.setattr(classifier, "load", lambda tag, _: SimpleNamespace(tag=tag, **parts))
    monkeypatch.setattr(classifier, "check_files", lambda *_: None)
    monkeypatch.setattr(classifier, "classes_in", lambda _: BODIES)

    def make(store: ModelStore, project: str) -> str:
        place = store.registry.path(project_tag(project, "0badcafe"))
        place.mkdir(parents=True)
        (place / "model.yaml").write_text("{}")
        return project_tag(project, "0badcafe")

    return make


def test_the_default_model_stays_while_it_is_used(settings: Settings, networks: Callable[..., str]) -> None:
    """Of more networks than are kept in memory the one goes that was not used for longest."""
    store = store_of(settings)
    default, first = store.current(), store.model(networks(store, "1"))
    for number in range(2, store_module.LOADED_MAX + 3):
        assert store.current() is default
        store.model(networks(store, str(number)))
    assert store.current() is default
    assert store.model(first.tag) is not first


@pytest.mark.usefixtures("colours")
def test_a_network_is_used_as_long_as_its_heads_are(settings: Settings, networks: Callable[..., str]) -> None:
    """Else it would be loaded a second time, beside the one that the heads hold."""
    store = store_of(settings)
    default, shared = store.current(), store.live_tag()
    heads = heads_for(store, "100", "0badcafe", Head.of_network("choice", BODIES), base=shared)
    for number in range(1, store_module.LOADED_MAX + 2):
        store.model(heads)
        store.model(networks(store, str(number)))
    assert store.current() is default


@pytest.mark.usefixtures("colours")
def test_heads_on_a_network_share_it(settings: Settings) -> None:
    """The network is in memory once; one that is gone, or is none, is a sentence."""
    store = store_of(settings)
    shared = store.live_tag()
    answers = Head.of_network("choice", BODIES)
    store.publish("3", heads_for(store, "3", "0badcafe", KIND, answers, base=shared))
    picture = render("Saturn", 5)
    row = store.current("3").probabilities(store.current("3").prepare(picture))[0]
    assert row[3:] == pytest.approx(probabilities(store, [picture])[0], abs=1e-3)
    for base, said in ((f"{MODEL_NAME}:gone", "is not in the BentoML store"), (store.live_tag("3"), "and no network")):
        store.publish("5", heads_for(store, "5", "0badcafe", answers, base=base))
        with pytest.raises(ModelError, match=rf"{base} .*{said}"):
            store.current("5")
        store.registry.remove(store.live_tag("5"))
        store = store_of(settings)


def test_damaged_heads_are_told_at_setup(settings: Settings) -> None:
    """Before anything is loaded."""
    store = store_of(settings)
    tag = heads_for(store, "3", "0badcafe")
    (store.registry.path(tag) / "heads.json").write_text("{")
    with pytest.raises(ModelLoadError, match=r"The file heads\.json of .* is damaged"):
        store.vocabulary(tag, 0)


def test_the_network_that_heads_need_is_kept(settings: Settings) -> None:
    """Also that of a model which is not live, and may be made so."""
    store = store_of(replace(settings, keep_models=1))
    shared = store.live_tag()
    bases = [for_project(store, "3", f"0000000{number}", shared) for number in range(3)]
    live = heads_for(store, "3", "00000003", base=bases[0], manifest=Manifest(parent=shared))
    newest = heads_for(store, "3", "00000004", base=bases[1], manifest=Manifest(parent=live))
    store.publish("3", live)
    assert store.prune("3") == [bases[2]]
    assert {model.tag for model in store.registry.models()} == {shared, *bases[:2], live, newest}


def test_a_removed_model_is_nobodys_latest(settings: Settings) -> None:
    """BentoML's own commands go on working with what is left."""
    store = store_of(settings)
    shared = store.live_tag()
    tag = for_project(store, "3", "0badcafe")
    store.registry.remove(tag)
    assert str(bentoml.models.get(MODEL_NAME).tag) == shared
    store.registry.remove(tag)


def test_the_latest_is_replaced_in_one_step(settings: Settings) -> None:
    """Whoever has opened the file reads the old version to its end, when a model comes and when one goes."""
    store = store_of(settings)
    shared = store.live_tag()
    latest = store.registry.path(shared).with_name("latest")
    with latest.open() as before:
        own = store.registry.add_folder(DEFAULT_MODEL)
        assert f"{MODEL_NAME}:{before.read()}" == shared
    with latest.open() as before:
        store.registry.remove(own)
        assert f"{MODEL_NAME}:{before.read()}" == own
    assert f"{MODEL_NAME}:{latest.read_text()}" == shared


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("{", id="cut off"),
        pytest.param("[]", id="no mapping"),
        pytest.param("a: !!bool x", id="no truth"),
        pytest.param("a: !!timestamp x", id="no moment"),
        pytest.param("[" * 3000 + "]" * 3000, id="nested without end"),
    ],
)
def test_a_description_that_cannot_be_read_is_said(settings: Settings, text: str) -> None:
    """One damaged model does not hide the others, whoever asks for it."""
    store = store_of(settings)
    shared = store.live_tag()
    tag = for_project(store, "3", "0badcafe")
    (store.registry.path(tag) / "model.yaml").write_text(text)
    for ask in (store.registry.describe, store.known, store.model):
        with pytest.raises(ModelError, match=r"The description of .*0badcafe cannot be read"):
            ask(tag)
    assert [model.tag for model in store.registry.models()] == [shared]
