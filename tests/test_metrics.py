"""The counts at /metrics: read with Prometheus' own parser, right whichever process is asked."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import requests
from backend_server import BODIES, REPOSITORY, Backends, ServerProcess, free_port, label_config, plain_environ
from flask.testing import FlaskClient
from prometheus_client.parser import text_string_to_metric_families

from celestial_backend import metrics
from celestial_backend.app import create_app
from celestial_backend.classifier import Classifier
from celestial_backend.ledger import FAILED, KEPT, MERGED, PUBLISHED
from celestial_backend.renderer import render
from celestial_backend.settings import Settings
from celestial_backend.wiring import Services, build

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


@pytest.fixture
def client(services: Services) -> FlaskClient:
    return create_app(services).test_client()


class Page:
    """What a page of metrics says."""

    def __init__(self, text: str) -> None:
        families = list(text_string_to_metric_families(text))
        self.kinds = {family.name: family.type for family in families}
        self.samples = [sample for family in families for sample in family.samples]

    def value(self, name: str, **labels: str) -> float:
        """The one sample of that name and those labels."""
        (found,) = [sample.value for sample in self.samples if sample.name == name and sample.labels == labels]
        return found

    def labels(self, name: str) -> list[dict[str, str]]:
        return [sample.labels for sample in self.samples if sample.name == name]


def page(client: FlaskClient) -> Page:
    answer = client.get("/metrics")
    assert answer.status_code == 200
    assert answer.content_type == metrics.CONTENT_TYPE
    return Page(answer.text)


def uploads(*names: str) -> list[Any]:
    values = [f"/data/upload/7/0123abcd-{name}.png" for name in names]
    return [{"id": number, "data": {"image": value}} for number, value in enumerate(values)]


def predict(client: FlaskClient, tasks: list[Any]) -> Any:
    return client.post("/predict", json={"tasks": tasks, "label_config": label_config(), "project": "7.1"})


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
    causes = {"FetchError": 1, "RequestError": 1, "DecodeError": 1}
    for cause, count in causes.items():
        assert after.value("celestial_failures_total", of="task", cause=cause) == count


def test_requests_are_counted_by_route_and_status(client: FlaskClient) -> None:
    """With their seconds; whatever strangers ask for is one route, and a failure has the name of its error alone."""
    client.post("/setup", json={"schema": label_config(["cat"])})
    client.post("/setup", json={"schema": label_config()})
    for number in range(5):
        client.get(f"/secret-{number}")
    client.get("/predict")
    seen = page(client)
    assert seen.value("celestial_requests_total", route="/setup", status="200") == 1
    assert seen.value("celestial_requests_total", route="/setup", status="422") == 1
    assert seen.value("celestial_requests_total", route="other", status="404") == 5
    assert seen.value("celestial_request_seconds_count", route="/setup") == 2
    assert seen.value("celestial_failures_total", of="request", cause="LabelConfigError") == 1
    assert seen.value("celestial_failures_total", of="request", cause="NotFound") == 5
    assert seen.value("celestial_failures_total", of="request", cause="MethodNotAllowed") == 1
    assert not any("secret" in str(sample) or "cat" in str(sample.labels.values()) for sample in seen.samples)


def test_what_nobody_foresaw_is_counted_too(client: FlaskClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the class of the exception."""

    def broken(*_: Any) -> Any:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr("celestial_backend.predictor.Predictor.predict", broken)
    assert predict(client, []).status_code == 500
    assert page(client).value("celestial_failures_total", of="request", cause="ZeroDivisionError") == 1


def test_late_tasks_and_answers_that_are_no_numbers_have_causes(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have no error, so they get a name of their own."""
    client = create_app(services).test_client()
    services.predictor.predict(uploads("Mars"), label_config(), deadline=0.0)
    nan = float("nan")
    monkeypatch.setattr(Classifier, "probabilities", lambda self, batch: [[nan] * len(self.classes)] * len(batch))
    predict(client, uploads("Mars"))
    seen = page(client)
    assert seen.value("celestial_failures_total", of="task", cause="OutOfTime") == 1
    assert seen.value("celestial_failures_total", of="task", cause="NotFinite") == 1


def test_the_live_versions_are_told(client: FlaskClient, services: Services) -> None:
    """Of all projects, and of one that has a model of its own."""
    shared = services.store.live_tag()
    assert page(client).labels("celestial_live_model") == [{"project": "default", "model_version": shared}]
    services.store.publish("7", shared)
    assert {"project": "7", "model_version": shared} in page(client).labels("celestial_live_model")


def test_the_queue_and_the_trainings_come_from_the_list_of_jobs(client: FlaskClient, services: Services) -> None:
    """As they stand when they are asked for, whichever process changed them."""
    ledger = services.jobs.ledger
    for project, state in (("1", PUBLISHED), ("2", FAILED), ("3", FAILED)):
        ledger.request(project)
        job = ledger.start(project)
        assert job is not None
        ledger.end(job.id, state, "")
    ledger.request("4")
    ledger.start("4")
    ledger.request("4")
    ledger.request("5")
    seen = page(client)
    assert (seen.value("celestial_jobs", state="waiting"), seen.value("celestial_jobs", state="running")) == (2, 1)
    for state, count in ((PUBLISHED, 1), (FAILED, 2), (KEPT, 0), (MERGED, 0)):
        assert seen.value("celestial_trainings_total", state=state) == count
    assert (seen.kinds["celestial_jobs"], seen.kinds["celestial_trainings"]) == ("gauge", "counter")


def test_what_cannot_be_read_is_left_out(services: Services, tmp_path: Path) -> None:
    """Without a state folder or a model the page tells the rest."""
    (tmp_path / "blocked").write_text("")
    broken = replace(services.settings, model_dir=tmp_path / "blocked", model="celestial_bodies_classifier_model:gone")
    seen = page(create_app(build(broken)).test_client())
    assert seen.labels("celestial_live_model") == []
    assert seen.labels("celestial_jobs") == []
    assert seen.value("celestial_tasks_total", outcome="failed") == 0


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


def test_threads_that_count_first_at_once_share_their_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the threads of pictures do: what each has counted is told, where Python has no lock for it (3.12) too."""
    made: list[Any] = []
    both = threading.Barrier(2)

    class Slow(metrics._Counters):
        def __init__(self) -> None:
            made.append(self)
            with contextlib.suppress(threading.BrokenBarrierError):
                both.wait(0.5)  # for another that is built meanwhile
            super().__init__()

    monkeypatch.setattr(metrics, "_Counters", Slow)
    counts = metrics.Metrics()
    threads = [threading.Thread(target=counts.tasks, args=(1, 0)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert Page(counts.page({}, None).decode()).value("celestial_tasks_total", outcome="predicted") == 2
