"""Real workers and trainers on a state folder of one test, with trainings that take a moment (`faults`)."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

from celestial_backend.errors import StateError
from celestial_backend.jobs.ledger import Job
from celestial_backend.services import build
from celestial_backend.settings import Settings
from tests.support.backend_server import REPOSITORY, ServerProcess, plain_environ

BIN = Path(sys.executable).parent
FAULTS = Path(__file__).with_name("faults")
SHORT_S = "0.2"  # a training that learns nothing; what starts it and saves takes two seconds more


class Place:
    """A state folder and a model store, the workers that share them, and this process as the web server."""

    def __init__(self, folder: Path, store: Path, **settings: str) -> None:
        shutil.copytree(store, folder / "bentoml", dirs_exist_ok=True)
        self.marks = folder / "marks"
        self.marks.mkdir()
        self.folder = folder
        given = {"MODEL_DIR": str(folder / "state"), "BENTOML_HOME": str(folder / "bentoml")} | settings
        self.settings = Settings.from_environ(given)
        self.services = build(self.settings)
        self.jobs, self.ledger = self.services.jobs, self.services.jobs.ledger
        self.faults = {"FAULT_MARKS": str(self.marks), "FAULT_LEARN": SHORT_S}
        self.environ = plain_environ(BIN) | given | {"PYTHONPATH": os.pathsep.join([str(FAULTS), str(REPOSITORY)])}
        self.workers: list[ServerProcess] = []

    def worker(self, command: Sequence[str | Path] = (), **faults: str) -> ServerProcess:
        """Start a worker as the server does, or with a command of its own."""
        command = command or [sys.executable, "-m", "celestial_backend.worker", str(os.getpid())]
        environ = self.environ | self.faults | faults
        self.workers.append(ServerProcess(command, cwd=REPOSITORY, environ=environ, log=self.folder / "worker.log"))
        return self.workers[-1]

    def request(self, project: str = "3") -> str:
        """Ask for a training as a person does: again, where a busy machine kept the database in use."""
        deadline = time.monotonic() + 30
        while True:
            try:
                return str(self.jobs.request(project)["job"])
            except StateError as error:
                if not any(why in str(error) for why in ("locked", "in use")) or time.monotonic() > deadline:
                    raise

    def job(self, job_id: str) -> Job:
        found = self.ledger.job(job_id)
        assert found is not None
        return found

    def wait_for(self, what: Callable[[], Any], seconds: float = 60) -> Any:
        """What comes of it, as soon as it is true."""
        deadline = time.monotonic() + seconds
        while not (found := what()):
            assert time.monotonic() < deadline, f"not within {seconds} s: {self.ledger.jobs()}\n{self.log_tail()}"
            time.sleep(0.03)
        return found

    def ended(self, job_id: str, seconds: float = 60) -> Job:
        self.wait_for(lambda: self.job(job_id).ended, seconds)
        return self.job(job_id)

    def stage(self, job_id: str, stage: str) -> Job:
        """The job as soon as it is somewhere."""
        self.wait_for(lambda: stage in self.job(job_id).progress.get("stage", ""))
        return self.job(job_id)

    def marked(self, name: str) -> list[list[str]]:
        path = self.marks / name
        return [line.split() for line in path.read_text().splitlines()] if path.exists() else []

    def publications(self) -> list[str]:
        """The jobs that have changed a pointer, once for each time."""
        return [line[-1] for line in self.marked("published")]

    def trainers(self) -> list[psutil.Process]:
        """The trainings that run on this state folder."""
        found = []
        for process in psutil.process_iter(["cmdline"]):
            words = process.info["cmdline"] or []
            if "celestial_backend.worker.training" in words and self.ledger.job(words[-3]):
                found.append(process)
        return found

    def left_over(self) -> list[str]:
        """Folders of trainings that are still there."""
        return [path.name for path in (self.settings.model_dir / "work").glob("*") if path.is_dir()]

    def log_text(self) -> str:
        return "".join(path.read_text(errors="replace") for path in self.folder.glob("*.log"))

    def log_tail(self, lines: int = 60) -> str:
        return "\n".join(self.log_text().splitlines()[-lines:])

    def stop(self) -> None:
        for worker in self.workers:
            worker.stop()
