"""The prelabel command, on a real Label Studio: every task once, whatever happens on the way."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from backend_server import REPOSITORY, plain_environ
from label_studio import LabelStudioServer
from PIL import Image

pytestmark = pytest.mark.timeout(600)
MANY = 320


class Command:
    """The command with the settings of one test, as a process of its own."""

    def __init__(self, studio: LabelStudioServer, state: Path, model_store: Path) -> None:
        self.state = state
        self.environ = plain_environ(Path(sys.executable).parent) | {
            "LABEL_STUDIO_URL": studio.url,
            "LABEL_STUDIO_API_KEY": studio.legacy_token,
            "MODEL_DIR": str(state),
            "BENTOML_HOME": str(model_store),
            "LOCAL_FILES_DOCUMENT_ROOT": str(studio.local_files_root),
            "LOG_LEVEL": "WARNING",
        }

    def start(self, project: int, *options: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "celestial_backend", "prelabel", "--project", str(project), *options]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=REPOSITORY, env=self.environ, stdout=pipe, stderr=pipe, text=True)

    def __call__(self, project: int, *options: str, code: int = 0) -> dict[str, Any]:
        process = self.start(project, "--json", *options)
        out, err = process.communicate(timeout=300)
        assert process.returncode == code, err
        return dict(json.loads(out)) if out else {"error": err}


@pytest.fixture
def command(label_studio: LabelStudioServer, tmp_path: Path, model_store: Path) -> Command:
    return Command(label_studio, tmp_path / "state", model_store)


@pytest.fixture(scope="module")
def pictures(label_studio: LabelStudioServer) -> list[str]:
    """Addresses of a few small pictures in the local-files folder."""
    folder = label_studio.local_files_root / "prelabel"
    folder.mkdir()
    for number in range(4):
        Image.new("RGB", (64, 64), (60 * number, 120, 200 - 40 * number)).save(folder / f"{number}.png")
    return [f"/data/local-files/?d=prelabel/{number}.png" for number in range(4)]


def project_with(studio: LabelStudioServer, pictures: list[str], count: int, title: str) -> tuple[int, list[int]]:
    project = studio.create_project(title)
    values = [f"{pictures[number % len(pictures)]}" for number in range(count)]
    studio.add_local_files(project, studio.local_files_root / "prelabel") if False else None
    return project, studio.import_tasks(project, values)


def held(studio: LabelStudioServer, project: int) -> Counter[int]:
    """How many predictions each task has."""
    return Counter(int(each["task"]) for each in studio.predictions(project))


def test_all_tasks_get_one_prediction_and_the_project_uses_it(
    label_studio: LabelStudioServer, pictures: list[str], command: Command
) -> None:
    """A second run makes nothing; the version is selected and the score column filled and sortable."""
    project, tasks = project_with(label_studio, pictures, MANY, "Prelabel all")
    plan = command(project, "--dry-run")
    assert (plan["wanted"], plan["already"]) == (MANY, 0)
    assert not label_studio.predictions(project)

    first = command(project)
    assert (first["predicted"], first["failed"], first["failures"]) == (MANY, 0, None)
    assert held(label_studio, project) == dict.fromkeys(tasks, 1)
    assert {each["model_version"] for each in label_studio.predictions(project)} == {first["version"]}
    assert label_studio.api("GET", f"/api/projects/{project}")["model_version"] == first["version"]

    again = command(project)
    assert (again["predicted"], again["already"]) == (0, MANY)
    assert held(label_studio, project) == dict.fromkeys(tasks, 1)
