"""The command prelabel as a process, projects of a real Label Studio for it, and what came of it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from tests.support.backend_server import REPOSITORY, plain_environ
from tests.support.label_studio import LabelStudioServer


class Command:
    """The command with the settings of one test, as a process of its own."""

    def __init__(self, studio: LabelStudioServer, state: Path, model_store: Path) -> None:
        self.settings = {
            "LABEL_STUDIO_URL": studio.url,
            "LABEL_STUDIO_API_KEY": studio.legacy_token,
            "MODEL_DIR": str(state),
            "BENTOML_HOME": str(model_store),
            "LOCAL_FILES_DOCUMENT_ROOT": str(studio.local_files_root),
            "LOG_LEVEL": "WARNING",
        }

    def __call__(
        self, project: int, *options: str, code: int = 0, how: Sequence[str] = ("-m", "celestial_backend")
    ) -> dict[str, Any]:
        command = [sys.executable, *how, "prelabel", "--project", str(project), "--json", *options]
        environ = plain_environ(Path(sys.executable).parent) | self.settings
        done = subprocess.run(
            command, cwd=REPOSITORY, env=environ, capture_output=True, text=True, check=False, timeout=300
        )
        assert done.returncode == code, done.stderr
        return dict(json.loads(done.stdout)) if done.stdout else {"error": done.stderr}


def small_pictures(studio: LabelStudioServer, name: str) -> list[str]:
    """Addresses of a few small pictures in a folder of this name below the local-files folder."""
    folder = studio.local_files_root / name
    folder.mkdir()
    for number in range(4):
        Image.new("RGB", (64, 64), (60 * number, 120, 200 - 40 * number)).save(folder / f"{number}.png")
    return [f"/data/local-files/?d={name}/{number}.png" for number in range(4)]


def project_with(studio: LabelStudioServer, values: Sequence[str], count: int) -> tuple[int, list[int]]:
    project = studio.create_project("Prelabel")
    return project, studio.import_tasks(project, [values[number % len(values)] for number in range(count)])


def held(studio: LabelStudioServer, project: int) -> Counter[int]:
    """How many predictions each task has."""
    return Counter(int(each["task"]) for each in studio.predictions(project))
