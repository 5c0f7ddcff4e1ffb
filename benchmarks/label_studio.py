"""A real Label Studio of the benchmark's own, asked over its API."""

from __future__ import annotations

import fcntl
import os
import secrets
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import requests

from benchmarks.bench import Bench, BenchmarkError
from benchmarks.packages import cache_folder
from benchmarks.tasks import LABEL_CONFIG
from celestial_backend.commands.demo import HOST, Server, free_port, label_studio_program, start_label_studio
from celestial_backend.settings import Settings
from celestial_backend.studio.client import Studio
from celestial_backend.studio.project import StudioProject
from celestial_backend.studio.setup import create_project, register, upload

START_S = 300.0
CALL_S = 1800.0


class LabelStudio(Server):
    """Runs while its ``with`` block does."""

    def __init__(self, bench: Bench) -> None:
        place = bench.folder / "studio"
        place.mkdir()
        super().__init__(place, "Label-Studio")
        self.port, self.token = free_port(), secrets.token_hex(20)
        self.url = f"http://{HOST}:{self.port}"
        self._headers = {"Authorization": f"Token {self.token}"}
        self.uploads = place / "data"
        self.studio = Studio(Settings(label_studio_url=self.url, label_studio_api_key=self.token))
        account = {"user": "benchmark@example.com", "password": secrets.token_urlsafe(12), "token": self.token}
        start_label_studio(self, program(bench), self.port, self.uploads, account)

    def __enter__(self) -> Self:
        try:
            self.wait_for_answer(f"{self.url}/health", START_S)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def upload(self, paths: Sequence[Path]) -> list[str]:
        """Upload pictures, into a project of their own; what stands in its tasks."""
        project = create_project(self.studio, "Pictures", LABEL_CONFIG)
        upload(self.studio, project, paths, lambda done, total: None)  # noqa: ARG005 - nobody watches
        return [str(data["image"]) for data in StudioProject(self.studio, str(project)).data()]

    def project(self, title: str, addresses: Sequence[str], backend_url: str) -> int:
        """A project with a task for each address, connected with a backend."""
        project = create_project(self.studio, title, LABEL_CONFIG)
        self.call("POST", f"/api/projects/{project}/import", [{"data": {"image": address}} for address in addresses])
        register(self.studio, project, backend_url, title)
        return project

    def retrieve(self, project: int) -> float:
        """The seconds of the Data Manager's *Retrieve Predictions* for all tasks."""
        body = {"selectedItems": {"all": True, "excluded": []}}
        started = time.perf_counter()
        self.call("POST", f"/api/dm/actions?id=retrieve_tasks_predictions&project={project}", body)
        return time.perf_counter() - started

    def serving(self, addresses: Sequence[str], clients: int) -> float:
        """
        The seconds in which it hands out pictures to so many clients, and nothing else is done.

        The clients run on the same machine and take about a twentieth of them; requests would take three.
        """
        started = time.perf_counter()
        with ThreadPoolExecutor(clients) as pool:
            list(pool.map(self._take, addresses))
        return time.perf_counter() - started

    def see_predictions(self, project: int, count: int) -> None:
        """
        See that a project has so many predictions.

        Raises:
            BenchmarkError: It has not, so no time of it counts.
        """
        had = self.call("GET", f"/api/projects/{project}/")["total_predictions_number"]
        if had != count:
            raise BenchmarkError(f"{count} tasks must have got as many predictions, got {had}. See {self.log}.")

    def _take(self, address: str) -> None:
        with closing(HTTPConnection(HOST, self.port, timeout=CALL_S)) as connection:
            connection.request("GET", address, headers=self._headers)
            answer = connection.getresponse()
            answer.read()
        if answer.status != 200:
            raise BenchmarkError(f"Label Studio must hand out {address}, and answered with {answer.status}.")

    def call(self, method: str, path: str, body: object = None) -> Any:
        """The JSON of one answer of its API."""
        answer = requests.request(method, self.url + path, json=body, headers=self._headers, timeout=CALL_S)
        if not answer.ok:
            raise BenchmarkError(f"Label Studio must take {method} {path}, and said {answer.text[:500]}")
        return answer.json()


def program(bench: Bench) -> Path:
    """Label Studio's start program, made on first use; it is the one that the tests use too."""
    given = os.environ.get("TEST_LABEL_STUDIO_VENV")
    with (cache_folder() / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return label_studio_program(cache_folder(), Path(given) if given else None, bench.say)
