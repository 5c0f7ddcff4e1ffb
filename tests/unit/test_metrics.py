"""The counts at /metrics: read with Prometheus' own parser, right whichever process is asked."""

from __future__ import annotations

import contextlib
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from flask.testing import FlaskClient

from celestial_backend import metrics
from celestial_backend.jobs.ledger import FAILED, KEPT, MERGED, PUBLISHED, Ending
from celestial_backend.services import Services, build
from celestial_backend.settings import Settings
from celestial_backend.web.app import create_app
from tests.support import metrics_page
from tests.support.backend_server import label_config
from tests.support.metrics_page import Page, page, predict

client = metrics_page.client


@pytest.fixture
def services(tmp_path: Path) -> Services:
    """They read no picture and load no model."""
    return build(Settings(bentoml_home=tmp_path / "bentoml", model_dir=tmp_path))


def test_requests_are_counted_by_route_and_status(client: FlaskClient) -> None:
    """With their seconds; whatever strangers ask for is one route, and a failure has the name of its error alone."""
    client.post("/setup", json={"schema": label_config([])})
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
        job = ledger.start("here", project)
        assert job is not None
        ledger.end(job, Ending(state, ""))
    ledger.request("4")
    ledger.start("here", "4")
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
