"""Which model is live: the store's files, imports, the default, and what is said when it cannot be served."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import bentoml
import keras
import numpy as np
import pytest
from backend_server import BODIES, label_config
from PIL import Image

from celestial_backend import store as store_module
from celestial_backend.errors import ModelError, ModelLoadError, ModelNotFoundError
from celestial_backend.network import FILES
from celestial_backend.renderer import render
from celestial_backend.settings import MODEL_NAME, Settings
from celestial_backend.store import DEFAULT_MODEL, ModelStore
from celestial_backend.tags import project_tag

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
    store = ModelStore(settings)
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
    threads = [threading.Thread(target=lambda: tags.append(ModelStore(settings).live_tag())) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(tags) == 6
    assert len(set(tags)) == 1
    assert len(list((settings.bentoml_home / "models" / MODEL_NAME).glob("*/model.yaml"))) == 1


def test_a_registration_cut_short_is_done_again(settings: Settings) -> None:
    """A start that was killed while it copied the default leaves nothing that is served half."""
    tag = ModelStore(settings).live_tag()
    folder = settings.bentoml_home / "models" / MODEL_NAME
    half = folder / tag.partition(":")[2]
    (half / "model.yaml").unlink()
    (half / "model.weights.h5").write_bytes(b"half")
    (folder / "latest").unlink()
    store = ModelStore(settings)
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
    tests = Path(__file__).parent
    code = (
        "from celestial_backend.settings import Settings; from celestial_backend.store import ModelStore;"
        "ModelStore(Settings.from_environ()).live_tag()"
    )
    killed = subprocess.run(
        [sys.executable, "-c", code, "celestial_backend.worker"], check=False, cwd=tests.parent,
        env=os.environ | folders | faults | {"PYTHONPATH": os.pathsep.join([str(tests / "faults"), str(tests.parent)])},
    )  # fmt: skip
    assert killed.returncode == -9
    store = ModelStore(settings)
    assert store.registry.holds(store.live_tag())
    assert store.current().classes == BODIES


def test_bentoml_itself_can_load_what_is_registered(settings: Settings) -> None:
    """`bentoml.keras.load_model` and the custom objects give the numbers that are served."""
    store = ModelStore(settings)
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
    tag = ModelStore(settings).live_tag()
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
    assert float(probability) == pytest.approx(probabilities(ModelStore(settings), [picture]).max(), abs=1e-6)


def test_the_default_of_another_release_gives_way(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """An upgrade brings its own default where the store's latest is an older one, and leaves own models alone."""
    with monkeypatch.context() as older:
        older.setattr(store_module, "_default_version", lambda: "default-0123456789ab")
        assert ModelStore(settings).live_tag() == f"{MODEL_NAME}:default-0123456789ab"
    upgraded = ModelStore(settings).live_tag()
    assert upgraded.startswith(f"{MODEL_NAME}:default-")
    assert upgraded != f"{MODEL_NAME}:default-0123456789ab"
    own = save()
    assert ModelStore(settings).live_tag() == own


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
        older.setattr(store_module, "_default_version", lambda: "default-0123456789ab")
        store = ModelStore(settings)
        made_next_year(store, store.live_tag())
    for _ in range(2):
        upgraded = ModelStore(settings).live_tag()
        assert upgraded.startswith(f"{MODEL_NAME}:default-")
        assert upgraded != f"{MODEL_NAME}:default-0123456789ab"
    made_next_year(store, upgraded)
    own = store.registry.add_folder(DEFAULT_MODEL)
    assert ModelStore(settings).live_tag() == str(bentoml.models.get(MODEL_NAME).tag) == own


def test_the_default_ships_without_a_pickle() -> None:
    """Weights and plain JSON only: nothing in the package runs code when it is read."""
    assert {path.name for path in DEFAULT_MODEL.iterdir()} >= {*FILES, "card.json", "MODEL_CARD.md"}
    assert not [path for path in DEFAULT_MODEL.rglob("*") if path.suffix in (".pkl", ".pickle", ".keras")]


def test_an_exported_guide_model_answers_as_it_did(settings: Settings, guide: Path) -> None:
    """An imported `.bentomodel` gives what its own preprocess, predict and postprocess gave."""
    told = json.loads((guide / "answers.json").read_text())
    store = ModelStore(replace(settings, bentomodel=guide / "guide.bentomodel"))
    assert store.live_tag() == told["tag"]
    served = probabilities(store, guide_pictures(guide))
    for row, answer in zip(served, told["answers"], strict=True):
        assert dict(zip(store.current().classes, row, strict=True)) == pytest.approx(answer["probabilities"], abs=1e-6)


def test_an_imported_model_is_imported_once(settings: Settings, guide: Path) -> None:
    """The second start finds the model of the file in the store, also beside a newer one."""
    with_file = replace(settings, bentomodel=guide / "guide.bentomodel")
    tag = ModelStore(with_file).live_tag()
    save()
    assert ModelStore(with_file).live_tag() == tag


def test_classes_are_remembered_without_tensorflow(settings: Settings, guide: Path) -> None:
    """A model that only its postprocess describes is loaded once; later starts know its classes at once."""
    with_file = replace(settings, bentomodel=guide / "guide.bentomodel")
    first = ModelStore(with_file)
    classes = first.current().classes
    later = ModelStore(with_file)
    assert later.classes(later.live_tag(), 0) == classes
    shutil.rmtree(settings.model_dir)
    forgetful = ModelStore(with_file)
    assert forgetful.classes(forgetful.live_tag(), 0) is None


def test_a_newer_model_is_served_at_the_next_call(settings: Settings) -> None:
    """`latest` is read anew each time, so a model saved by another process needs no restart."""
    store = ModelStore(settings)
    first = store.current()
    tag = save()
    assert store.live_tag() == tag
    assert store.current().classes == ("day", "night")
    assert first.classes != ("day", "night")


def test_a_named_tag_is_served_beside_a_newer_one(settings: Settings) -> None:
    """CELESTIAL_MODEL pins a version."""
    pinned = save()
    save()
    assert ModelStore(replace(settings, model=pinned)).live_tag() == pinned
    assert ModelStore(replace(settings, model=MODEL_NAME)).live_tag() != pinned


def test_a_missing_tag_is_named_with_those_that_are_there(settings: Settings) -> None:
    """The sentence holds what was asked for, what the store holds, and what to set."""
    held = save()
    with pytest.raises(ModelNotFoundError, match=rf"{MODEL_NAME}:gone is not .* holds {held}\. Set CELESTIAL_MODEL"):
        ModelStore(replace(settings, model=f"{MODEL_NAME}:gone")).live_tag()


def test_a_file_that_is_no_export_is_refused(settings: Settings, tmp_path: Path) -> None:
    """CELESTIAL_BENTOMODEL must be what export_model wrote."""
    broken = tmp_path / "broken.bentomodel"
    broken.write_bytes(b"no archive")
    with pytest.raises(ModelLoadError, match=r"CELESTIAL_BENTOMODEL names broken.bentomodel, .* Export it again"):
        ModelStore(replace(settings, bentomodel=broken)).live_tag()


def test_an_export_cut_in_half_is_refused(settings: Settings, guide: Path, tmp_path: Path) -> None:
    """A file that was not copied whole is no model, and leaves none behind."""
    half = tmp_path / "half.bentomodel"
    half.write_bytes((guide / "guide.bentomodel").read_bytes()[:300_000])
    with pytest.raises(ModelLoadError, match=r"half.bentomodel"):
        ModelStore(replace(settings, bentomodel=half)).live_tag()


@pytest.mark.parametrize(
    ("made", "sentence"),
    [
        pytest.param({"preprocess": None}, "has no custom object preprocess", id="no preprocess"),
        pytest.param({"preprocess": None, "postprocess": None}, "custom object preprocess and no post", id="no hooks"),
        pytest.param({"preprocess": lambda _: np.zeros(4)}, "a batch axis of 1, got shape", id="no batch axis"),
        pytest.param({"preprocess": lambda _: 1 / 0}, "preprocess of .* failed on .*ZeroDivision", id="preprocess"),
        pytest.param({"preprocess": lambda _: np.zeros((1, 7))}, "does not take what its preprocess", id="other input"),
        pytest.param({"postprocess": lambda _: {}}, "must give .*prediction.*probabilities", id="postprocess"),
        pytest.param({"outputs": 3}, "postprocess of .* failed on the network's output of 3 numbers", id="too wide"),
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
        ModelStore(settings).current()


def test_a_pickle_of_another_python_says_which(settings: Settings) -> None:
    """Custom objects that cannot be read name the versions they were saved with and those that run."""
    folder = settings.bentoml_home / "models" / MODEL_NAME / save().partition(":")[2]
    (folder / "custom_objects.pkl").write_bytes(b"\x80\x05cgone_module\nthing\n.")
    with pytest.raises(ModelLoadError, match=r"ModuleNotFoundError.*saved with .*Python 3.*here run tensorflow"):
        ModelStore(settings).current()


def test_broken_weights_are_a_sentence(settings: Settings) -> None:
    """A weights file cut in half is refused with the model's tag."""
    tag = save()
    weights = settings.bentoml_home / "models" / MODEL_NAME / tag.partition(":")[2] / "model.weights.h5"
    weights.write_bytes(weights.read_bytes()[:500])
    with pytest.raises(ModelLoadError, match=rf"The network of {tag} cannot be loaded"):
        ModelStore(settings).current()


def test_a_damaged_description_is_a_sentence(settings: Settings) -> None:
    """A model.yaml that is no YAML is refused with the command that removes the model."""
    tag = save()
    (settings.bentoml_home / "models" / MODEL_NAME / tag.partition(":")[2] / "model.yaml").write_text("name: [")
    with pytest.raises(ModelLoadError, match=rf"{tag} cannot be read .*bentoml models delete {tag}"):
        ModelStore(settings).current()


def test_a_network_of_another_keras_is_refused_without_loading(settings: Settings) -> None:
    """A SavedModel folder, as Keras 2 wrote it, is told at once, when the classes are asked for."""
    tag = save()
    folder = settings.bentoml_home / "models" / MODEL_NAME / tag.partition(":")[2]
    (folder / "config.json").unlink()
    store = ModelStore(settings)
    with pytest.raises(ModelLoadError, match="does not hold a Keras 3 network"):
        store.classes(tag, 0)


def test_a_failed_load_is_told_again_without_another_try(settings: Settings) -> None:
    """A broken model costs one attempt, not one per request, and a newer model ends the matter."""
    save(outputs=3)
    store = ModelStore(settings)
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
    store = ModelStore(settings)
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
from celestial_backend.app import create_app
from celestial_backend.settings import Settings
from celestial_backend.wiring import build

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
        command, cwd=Path(__file__).parents[1], env=os.environ | folders, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    tag, *told = done.stdout.splitlines()
    refused = "503 The BentoML store cannot be read (Permission denied). Set BENTOML_HOME to a folder that this user "
    refused += "can read and write, with space on its disk."
    assert told == [refused, refused, tag] * 2
    assert "Traceback" not in done.stderr


def test_a_load_that_failed_is_told_though_the_classes_are_known(settings: Settings) -> None:
    """Metadata with class names does not hide, in /setup, that the weights behind it are broken."""
    store = ModelStore(settings)
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
        ModelStore(replace(settings, bentoml_home=tmp_path / "file")).live_tag()


def test_rows_do_not_depend_on_their_batch(settings: Settings) -> None:
    """A picture gets the same probabilities alone, in a batch, and in any order; rows sum to 1."""
    store = ModelStore(settings)
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
    store = ModelStore(settings)
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
    store = ModelStore(settings)
    for_project(store, "3", "0badcafe")
    assert store.live_tag("4").startswith(f"{MODEL_NAME}:default-")


def test_another_process_is_served_at_its_next_request(settings: Settings) -> None:
    """Nothing is told to it, and nothing is started anew; the way back is as short."""
    web, worker = ModelStore(settings), ModelStore(settings)
    shared = web.live_tag("3")
    before = web.current("3")
    tag = for_project(worker, "3", "0badcafe", shared)
    worker.publish("3", tag)
    assert web.live_tag("3") == web.current("3").tag == tag
    worker.publish("3", shared)
    assert web.current("3") is before


def test_who_publishes_must_have_beaten_what_is_live(settings: Settings) -> None:
    """A model that a person chose while a training ran is not overwritten by it."""
    store = ModelStore(settings)
    shared = store.live_tag()
    chosen, trained = (for_project(store, "3", job, shared) for job in ("0000aaaa", "0000bbbb"))
    store.publish("3", chosen)
    assert not store.publish("3", trained, job="0000bbbb", instead_of=shared)
    assert store.live_tag("3") == chosen
    with pytest.raises(ModelNotFoundError, match="project-3-0000cccc is not in the BentoML store"):
        store.publish("3", f"{MODEL_NAME}:project-3-0000cccc")


def test_a_pointer_to_a_model_that_is_gone_is_passed_over(settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    """Predictions go on with the model of the settings, under its own version, and the log says it once."""
    store = ModelStore(settings)
    shared = store.live_tag()
    tag = for_project(store, "3", "0badcafe", shared)
    store.publish("3", tag)
    store.registry.remove(tag)
    assert store.live_tag("3") == store.live_tag("3") == shared
    assert caplog.text.count(f"The live model of project 3, {tag}, is not in the store") == 1


def test_old_models_are_kept_to_a_limit(settings: Settings) -> None:
    """The live one, its parents and what belongs to all projects stay; the oldest others go."""
    store = ModelStore(replace(settings, keep_models=2))
    shared = store.live_tag()
    first = for_project(store, "3", "00000001", shared)
    live = for_project(store, "3", "00000002", first)
    refused = [for_project(store, "3", f"0000000{number}", live) for number in range(3, 7)]
    other = for_project(store, "4", "00000009", shared)
    store.publish("3", live)
    assert store.prune("3") == refused[:2]
    assert {model.tag for model in store.registry.models()} == {shared, first, live, *refused[2:], other}
    assert store.prune("3") == []


def test_a_removed_model_is_nobodys_latest(settings: Settings) -> None:
    """BentoML's own commands go on working with what is left."""
    store = ModelStore(settings)
    shared = store.live_tag()
    tag = for_project(store, "3", "0badcafe")
    store.registry.remove(tag)
    assert str(bentoml.models.get(MODEL_NAME).tag) == shared
    store.registry.remove(tag)


def test_a_description_that_cannot_be_read_is_said(settings: Settings) -> None:
    """One damaged model does not hide the others."""
    store = ModelStore(settings)
    shared = store.live_tag()
    tag = for_project(store, "3", "0badcafe")
    (store.registry.path(tag) / "model.yaml").write_text("{")
    with pytest.raises(ModelError, match=r"The description of .*0badcafe cannot be read"):
        store.registry.describe(tag)
    assert [model.tag for model in store.registry.models()] == [shared]
