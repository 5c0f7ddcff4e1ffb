"""What release 0.1 has left behind, a store of models and a state folder, is read and served as it was."""

from __future__ import annotations

import base64
import json
import shutil
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from celestial_backend.models.store import DEFAULT_MODEL
from celestial_backend.planets.renderer import render
from celestial_backend.services import Services, build
from celestial_backend.settings import Settings
from tests.support.backend_server import label_config

LEFT = Path(__file__).parents[1] / "support" / "release_0_1"  # made by that release, see its README.md
SAID: dict[str, Any] = json.loads((LEFT / "said.json").read_text())
DEFAULT = "bentoml/models/celestial_bodies_classifier_model/default-63ac422dab0c"

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture
def services(tmp_path: Path) -> Services:
    """Those of this release, on a copy of what is there."""
    shutil.copytree(LEFT, tmp_path / "left")
    shutil.copy(DEFAULT_MODEL / "model.weights.h5", tmp_path / "left" / DEFAULT)
    return build(Settings(bentoml_home=tmp_path / "left" / "bentoml", model_dir=tmp_path / "left" / "state"))


def pictures() -> list[dict[str, Any]]:
    tasks = []
    for number, body in enumerate(("Saturn", "Earth", "Mars")):
        stream = BytesIO()
        render(body, 5).save(stream, "PNG")
        address = f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"
        tasks.append({"id": number, "data": {"image": address}})
    return tasks


@pytest.mark.parametrize("project", SAID["said"])
def test_its_models_say_the_same(services: Services, project: str) -> None:
    """A project's heads on the default network, heads on general features, and a folder's, live for all others."""
    answers = services.predictor.predict(pictures(), label_config(), project=project)
    for answer, (choice, score, version) in zip(answers, SAID["said"][project], strict=True):
        assert answer["result"][0]["value"]["choices"] == [choice]
        assert answer["score"] == pytest.approx(score, abs=1e-3)
        assert answer["model_version"] == version


def test_its_jobs_are_kept(services: Services) -> None:
    """One that has ended is listed with its result, and one that waits is still waiting."""
    ended, waiting = services.jobs.ledger.job(SAID["published"]), services.jobs.ledger.job(SAID["waiting"])
    assert ended is not None
    assert (ended.state, ended.outcome["tag"]) == ("published", SAID["said"]["3"][0][2])
    assert waiting is not None
    assert (waiting.project, waiting.state) == ("5", "waiting")
