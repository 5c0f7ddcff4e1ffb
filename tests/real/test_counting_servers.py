"""/metrics of real servers, and what a real model's predictions count."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from flask.testing import FlaskClient

from celestial_backend import metrics
from celestial_backend.models.classifier import Classifier
from celestial_backend.planets.renderer import render
from celestial_backend.services import Services, build
from celestial_backend.settings import Settings
from celestial_backend.web.app import create_app
from tests.support import metrics_page
from tests.support.backend_server import (
    BODIES,
    REPOSITORY,
    Backends,
    ServerProcess,
    free_port,
    label_config,
    plain_environ,
)
from tests.support.metrics_page import Page, page, predict

client = metrics_page.client
ASKED = 13  # of three processes, so that they cannot all have got the same number


@pytest.fixture
def originals(tmp_path: Path) -> Path:
    folder = tmp_path / "originals"
    folder.mkdir()
    for body in BODIES:
        render(body, 21).save(folder / f"{body}.png")
    return folder


@pytest.fixture
def services(tmp_path: Path, originals: Path) -> Services:
    return build(Settings(bentoml_home=tmp_path / "bentoml", model_dir=tmp_path, data_folder=originals))


def uploads(*names: str) -> list[Any]:
    values = [f"/data/upload/7/0123abcd-{name}.png" for name in names]
    return [{"id": number, "data": {"image": value}} for number, value in enumerate(values)]


def test_tasks_and_their_stages_are_counted(client: FlaskClient) -> None:
    """Predicted and failed tasks, one look at each picture for each stage, one pass of the model for the batch."""
    before = page(client)
    predict(client, [*uploads("Mars", "Venus", "gone"), "garbage", {"id": 4, "data": {"image": "data:,x"}}])
    after = page(client)
    assert before.value("celestial_tasks_total", outcome="predicted") == 0
    assert after.value("celestial_tasks_total", outcome="predicted") == 2
    assert after.value("celestial_tasks_total", outcome="failed") == 3
    stages = {name: after.value("celestial_stage_seconds_count", stage=name) for name in metrics.STAGES}
    assert stages == {"fetch": 4, "decode": 3, "prepare": 2, "model": 1}
    assert all(after.value("celestial_stage_seconds_sum", stage=name) > 0 for name in metrics.STAGES)
    causes = {"LockedError": 1, "RequestError": 1, "DecodeError": 1}
    for cause, count in causes.items():
        assert after.value("celestial_failures_total", of="task", cause=cause) == count


def test_late_tasks_and_answers_that_are_no_numbers_have_causes(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have no error, so they get a name of their own."""
    client = create_app(services).test_client()
    services.predictor.predict(uploads("Mars"), label_config(), deadline=0.0)
    rows = np.full((1, len(BODIES)), np.nan), np.zeros((1, 1))
    monkeypatch.setattr(Classifier, "answers", lambda *_: rows)
    predict(client, uploads("Mars"))
    seen = page(client)
    assert seen.value("celestial_failures_total", of="task", cause="OutOfTime") == 1
    assert seen.value("celestial_failures_total", of="task", cause="NotFinite") == 1


def test_three_workers_tell_one_truth(
    backends: Backends, originals: Path, model_store: Path, tmp_path: Path
) -> None:
    """Thirty tasks in as many requests: each of the processes tells the sum; the folder they share goes with them."""
    (tmp_path / "temporary").mkdir()
    server = backends(
        WORKERS="3", CELESTIAL_DATA_FOLDER=originals, BENTOML_HOME=model_store, TMPDIR=tmp_path / "temporary"
    )
    (folder,) = (tmp_path / "temporary").glob("celestial-metrics-*")
    for number in range(30):
        server.predict([f"/data/upload/7/0123abcd-{'gone' if number % 10 == 0 else 'Mars'}.png"])
    assert len(list(folder.glob("counter_*.db"))) > 1, "more than one process answered"
    for _ in range(12):
        seen = Page(requests.get(f"{server.url}/metrics", timeout=30).text)
        assert seen.value("celestial_tasks_total", outcome="predicted") == 27
        assert seen.value("celestial_tasks_total", outcome="failed") == 3
        assert seen.value("celestial_requests_total", route="/predict", status="200") == 30
        assert seen.value("celestial_request_seconds_count", route="/predict") == 30
        assert seen.value("celestial_stage_seconds_count", stage="model") == 27
        assert len(seen.labels("celestial_live_model")) == 1
    server.stop(60)
    assert not folder.exists()


@pytest.fixture
def plain_gunicorn(tmp_path: Path, originals: Path, model_store: Path) -> Iterator[Any]:
    """Start `gunicorn _wsgi:app` with three processes and more arguments; gives its address."""
    servers: list[ServerProcess] = []

    def start(*arguments: str) -> str:
        port = free_port()
        environ = plain_environ(Path(sys.executable).parent) | {
            "MODEL_DIR": str(tmp_path), "BENTOML_HOME": str(model_store), "CELESTIAL_DATA_FOLDER": str(originals),
        }  # fmt: skip
        command = ["gunicorn", "--bind", f"127.0.0.1:{port}", "--workers", "3", *arguments, "_wsgi:app"]
        servers.append(ServerProcess(command, cwd=REPOSITORY, environ=environ, log=tmp_path / "log"))
        servers[-1].wait_for_answer(f"http://127.0.0.1:{port}/health", 60)
        return f"http://127.0.0.1:{port}"

    yield start
    for server in servers:
        server.stop()


@pytest.mark.parametrize("shared", [True, False])
def test_a_foreign_server_tells_all_with_a_folder_and_its_own_without(
    plain_gunicorn: Any, tmp_path: Path, shared: bool
) -> None:
    """`gunicorn --env PROMETHEUS_MULTIPROC_DIR=FOLDER _wsgi:app` sums up; without, each process tells of itself."""
    (tmp_path / "shared").mkdir()
    url = plain_gunicorn(*(["--env", f"{metrics.SHARED}={tmp_path / 'shared'}"] if shared else []))
    for _ in range(ASKED):
        requests.post(f"{url}/webhook", json={"action": "TASKS_CREATED"}, timeout=60)

    def told() -> float:
        seen = Page(requests.get(f"{url}/metrics", timeout=60).text)
        mine = [labels for labels in seen.labels("celestial_requests_total") if labels["route"] == "/webhook"]
        return seen.value("celestial_requests_total", **mine[0]) if mine else 0

    if shared:
        assert {told() for _ in range(6)} == {ASKED}
    else:
        first, deadline = told(), time.monotonic() + 30
        while told() == first:
            assert time.monotonic() < deadline, f"every process tells of {first:g} requests"
