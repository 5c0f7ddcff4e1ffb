"""A model from outside whose scores are made to say how often it is right; its own files stay as they are."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import bentoml
import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray
from PIL import Image

from celestial_backend.commands.cli import main
from celestial_backend.settings import MODEL_NAME, Settings
from tests.support.outside_models import NAMES, folder_of, save
from tests.support.stores import store_of

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
PICTURES = 400


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Settings:
    monkeypatch.setenv("BENTOML_HOME", str(tmp_path / "bentoml"))
    monkeypatch.setenv("MODEL_DIR", str(tmp_path / "state"))
    return Settings.from_environ()


def pictures(folder: Path, count: int = PICTURES) -> Path:
    """Colours, called by one that is likelier, no more: the model is twice as sure as it may be."""
    rng = np.random.default_rng(5)
    for number, colour in enumerate(rng.integers(0, 256, (count, 3))):
        likely = np.exp(2.5 * colour / 255)
        name = NAMES[int(rng.choice(3, p=likely / likely.sum()))]
        (folder / name).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), tuple(map(int, colour))).save(folder / name / f"{number}.png")
    return folder


def run(*words: str) -> Any:
    done = CliRunner().invoke(main, [*words])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout) if "--json" in words else done.stdout


def says(settings: Settings, tag: str) -> NDArray[np.float64]:
    """What a model says of some colours, in a process of its own."""
    model = store_of(settings).model(tag)
    colours = ("red", "navy", "purple", "white", "#112233")
    return model.answers(np.concatenate([model.prepare(Image.new("RGB", (8, 8), colour)) for colour in colours]))[0]


def test_scores_are_as_sure_as_they_are_right(settings: Settings, tmp_path: Path) -> None:
    """On this machine and others, after a restart and in an exported file; and the model itself is not changed."""
    tag = save()
    files = {path.name: path.read_bytes() for path in folder_of(settings, tag).iterdir() if path.is_file()}
    before = says(settings, tag)
    assert [each["calibrated"] for each in run("models", "--json")] == [False]
    assert "Uncalibrated" in run("models")

    found = run("models", "calibrate", tag, str(pictures(tmp_path / "folder")), "--json")
    assert found["temperature"] == pytest.approx(2.0, rel=0.35)
    assert found["after"]["value"] < 0.5 * found["before"]["value"]
    assert found["after"]["low"] <= found["after"]["value"] <= found["after"]["high"]
    assert (found["of"], found["pictures"], found["served"]) == (tag, PICTURES, True)
    assert {path.name: path.read_bytes() for path in folder_of(settings, tag).iterdir() if path.is_file()} == files
    listed = {each["tag"]: each for each in run("models", "--json")}
    assert listed[found["tag"]]["calibration"]["of"] == tag
    assert [listed[each]["calibrated"] for each in (tag, found["tag"])] == [False, True]
    assert listed[found["tag"]]["live"] == ["all others"]

    after = says(settings, found["tag"])
    assert after == pytest.approx(tempered_on_paper(before, found["temperature"]), abs=1e-5)
    run("models", "use", found["tag"], "--project", "3")
    elsewhere = replace(settings, bentoml_home=tmp_path / "another machine")
    assert store_of(elsewhere).live_tag("3") == found["tag"]
    assert says(elsewhere, found["tag"]) == pytest.approx(after)

    file = tmp_path / "alone.bentomodel"
    run("models", "export", found["tag"], str(file))
    third = replace(settings, bentoml_home=tmp_path / "third", model_dir=tmp_path / "third", bentomodel=file)
    assert says(third, store_of(third).live_tag()) == pytest.approx(after), "it is brought to a temperature once"
    stored = bentoml.models.get(tag)
    with pytest.raises(bentoml.exceptions.NotFound):
        bentoml.models.get(f"{MODEL_NAME}:none")
    assert stored.custom_objects["postprocess"](np.zeros((1, 3)))["probabilities"]["red"] == pytest.approx(1 / 3)


def tempered_on_paper(rows: NDArray[np.float64], temperature: float) -> NDArray[np.float64]:
    powers = rows ** (1 / temperature)
    return powers / powers.sum(axis=1, keepdims=True)


def sure(outputs: Any) -> dict[str, Any]:
    """Says 1 of one class and 0 of all others."""
    row = np.eye(3)[int(outputs[0].argmax())].tolist()
    return {"prediction": "", "probabilities": dict(zip(("red", "green", "blue"), row, strict=True))}


def test_a_model_that_is_always_sure(settings: Settings, tmp_path: Path) -> None:
    """Probabilities of exactly 0 and 1 become the share that is right."""
    found = run("models", "calibrate", save(postprocess=sure), str(pictures(tmp_path / "folder")), "--json")
    rows = says(settings, found["tag"])
    assert rows.max(axis=1) == pytest.approx(1 - found["before"]["value"], abs=0.02)
    assert rows.sum(axis=1) == pytest.approx(1)
    assert found["before"]["value"] > 0.2 > 0.06 > found["after"]["value"]


def put(settings: Settings, version: str, **metadata: Any) -> str:
    """An entry of the store that says something of itself, and holds nothing."""
    (folder := settings.model_dir / "empty").mkdir()
    return store_of(settings).registry.add_files(f"{MODEL_NAME}:{version}", folder, metadata)


def refused(*words: str) -> str:
    done = CliRunner().invoke(main, ["models", "calibrate", *words])
    assert done.exit_code not in (0, 1), done.output
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    return done.stderr


@pytest.mark.parametrize(
    ("metadata", "why"),
    [
        pytest.param({"embedder": "lite0", "choices": {"a": ["b"]}}, "Only a model from outside", id="heads"),
        pytest.param({"versions": {"celestial_backend": "0.3"}}, "Only a model from outside", id="the model inside"),
        pytest.param({"independent": True}, "may hold at once", id="each class by itself"),
        pytest.param(
            {"calibration": {"of": "m:1", "temperature": 2.0, "pictures": 90, "before": 0.1, "after": 0.0}},
            "is calibrated already. Calibrate the model that it was before, m:1", id="calibrated",
        ),
    ],
)  # fmt: skip
def test_what_is_not_calibrated_here(settings: Settings, tmp_path: Path, metadata: dict[str, Any], why: str) -> None:
    """It is told at once; nothing of the model is loaded."""
    assert why in refused(put(settings, "mine", **metadata), str(pictures(tmp_path / "folder", 60)))


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    assert "is not in the BentoML store" in refused("none", str(pictures(tmp_path / "folder", 60)))


def test_folders_that_do_not_fit(tmp_path: Path) -> None:
    """Too few pictures, one class, another class's name, files that are no pictures, one picture in two classes."""
    tag, few = save(), pictures(tmp_path / "few", 20)
    assert "needs 50 pictures" in refused(tag, str(few))
    assert "Sort them into one sub-folder for each class" in refused(tag, str(few / "red"))
    odd = pictures(tmp_path / "odd", 80)
    (odd / "red").rename(odd / "scarlet")
    assert "'scarlet'" in refused(tag, str(odd))
    broken = pictures(tmp_path / "broken", 80)
    for path in sorted(broken.rglob("*.png"))[:35]:
        path.write_bytes(b"no picture")
    assert "has 45, of" in refused(tag, str(broken))
    alike = pictures(tmp_path / "alike", 80)
    one = next((alike / "red").glob("*.png"))
    (alike / "blue" / "again.png").write_bytes(one.read_bytes())
    found = run("models", "calibrate", tag, str(alike), "--json")
    assert sorted(found["left_out"]) == sorted([str(alike / "blue" / "again.png"), str(one)])
    assert found["pictures"] == 79
