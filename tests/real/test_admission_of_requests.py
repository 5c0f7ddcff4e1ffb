"""Admission of real requests, with a real model behind it."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from flask import Flask
from flask.testing import FlaskClient

from celestial_backend.planets.renderer import render
from celestial_backend.services import Services, build
from celestial_backend.settings import Settings
from celestial_backend.web.admission import LINE, Admission
from celestial_backend.web.app import create_app
from tests.support.backend_server import label_config
from tests.support.bounds import MB, WAIT_S, wait_for
from tests.support.picture_host import PictureHost, picture_host

SETUP = {"project": "7.1", "schema": label_config()}


EVENT = {"action": "ANNOTATION_CREATED", "project": {"id": 7}, "annotation": {}}


TASKS = {"tasks": [], "label_config": label_config(), "project": "7.1"}


@pytest.fixture
def host() -> PictureHost:
    with picture_host() as host:
        yield host


@pytest.fixture
def services(tmp_path: Path) -> Services:
    settings = Settings(
        bentoml_home=tmp_path / "bentoml", model_dir=tmp_path, threads=1, predict_max_s=2 * WAIT_S,
        request_max_mb=0.01, allowed_hosts=("127.0.0.1",),
    )  # fmt: skip
    return build(settings)


@pytest.fixture
def admission(services: Services) -> Admission:
    return Admission(services.settings)


@pytest.fixture
def app(services: Services, admission: Admission) -> Flask:
    return create_app(services, admission)


@pytest.mark.parametrize(("path", "most"), [("/predict", 10_000), ("/setup", 1_000), ("/webhook", 1_000)])
def test_a_body_may_have_so_many_megabytes(app: Flask, path: str, most: int) -> None:
    """CELESTIAL_REQUEST_MAX_MB, and a tenth of it: more is refused with a sentence in the status line."""
    client = app.test_client()
    refused = client.post(path, data=b"x" * (most + 1), content_type="application/json")
    sentence = f"413 A request to {path} may have {most / MB:g} MB, and this one has more. Send less at once, or raise"
    assert refused.status.startswith(sentence)
    assert client.post(path, data=b"x" * most, content_type="application/json").status_code == 400
    assert client.post("/predict", json=TASKS | {"more": "x" * 9000}).status_code == 200


def test_past_the_bounds_predictions_are_refused_and_all_else_is_answered(app: Flask, admission: Admission) -> None:
    """503 with Retry-After and a sentence in the status line; /health, /setup and webhooks never see it."""
    client = app.test_client()
    with admission.predictions.place() as place:
        place.take(MB)
        refused = client.post("/predict", json=TASKS)
        assert refused.status_code == 503
        assert refused.status.startswith("503 Too many predictions are asked for at once: 1 with 1.0 MB are here")
        assert int(refused.headers["Retry-After"]) > 0
        assert client.get("/health").status_code == 200
        assert client.post("/setup", json=SETUP).status_code == 200
        assert client.post("/webhook", json=EVENT).status_code in (200, 201)
    assert client.post("/predict", json=TASKS).status_code == 200


@pytest.mark.parametrize(("path", "body"), [("/setup", SETUP), ("/webhook", EVENT)])
def test_setups_and_events_are_bounded_apart_from_predictions(
    app: Flask, admission: Admission, path: str, body: dict[str, object]
) -> None:
    """They hold places of their own, which are given back; past them it is 503, and predictions never see it."""
    client = app.test_client()
    with admission.others.place() as place:
        place.take(MB)
        refused = client.post(path, json=body)
        assert refused.status.startswith("503 Too many answers of /setup and /webhook are asked for at once: 1 with 1")
        assert client.post("/predict", json=TASKS).status_code == 200
    assert client.post(path, json=body).status_code != 503
    assert admission.others.requests == admission.others.bytes == 0


def test_a_refused_request_holds_nothing(app: Flask, admission: Admission) -> None:
    """Whatever comes of requests, bad ones included, all places are free again."""
    client = app.test_client()
    for body in (b"{", b"x" * 20_000, b"[]", b'{"tasks": 1}'):
        for _ in range(LINE + 10):
            assert client.post("/predict", data=body, content_type="application/json").status_code in (400, 413)
    assert client.post("/predict", json=TASKS).status_code == 200
    assert admission.predictions.requests == admission.predictions.bytes == 0


def test_batches_wait_for_their_turn(app: Flask, admission: Admission, host: PictureHost, tmp_path: Path) -> None:
    """With one of THREADS the second batch is begun when the first has ended; a single task and /health do not wait."""
    begun, go_on = threading.Event(), threading.Event()
    render("Mars", 1).save(tmp_path / "mars.png")
    picture = (tmp_path / "mars.png").read_bytes()

    def slow(handler: object) -> None:
        begun.set()
        assert go_on.wait(WAIT_S)
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(picture)

    host.answers = {"/slow": slow, "/fast": picture, "/single": picture}

    def ask(client: FlaskClient, *paths: str) -> list[object]:
        tasks = [{"id": number, "data": {"image": host.url + path}} for number, path in enumerate(paths)]
        return client.post("/predict", json=TASKS | {"tasks": tasks}).json["results"]

    assert ask(app.test_client()) == []  # the model is loaded
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(ask, app.test_client(), "/slow", "/slow")
        assert begun.wait(60)
        second = threads.submit(ask, app.test_client(), "/fast", "/fast")
        wait_for(lambda: admission.predictions.requests == 2)
        (single,) = ask(app.test_client(), "/single")
        assert {path for path, _ in host.requests} == {"/slow", "/single"}
        assert app.test_client().get("/health").status_code == 200
        go_on.set()
        answers = [single, *first.result(WAIT_S), *second.result(WAIT_S)]
        assert [each["result"][0]["value"]["choices"] for each in answers] == [["Mars"]] * 5


def test_pictures_that_drip_keep_no_other_request_waiting(host: PictureHost, tmp_path: Path) -> None:
    """64 tasks of one request that take all the time there is: a request beside it is predicted meanwhile."""
    settings = Settings(
        bentoml_home=tmp_path / "bentoml", model_dir=tmp_path, threads=2, image_timeout_s=WAIT_S,
        predict_max_s=WAIT_S, allowed_hosts=("127.0.0.1",), fetch_threads=4,
    )  # fmt: skip
    services = build(settings)
    app, stop = create_app(services), threading.Event()
    render("Mars", 1).save(tmp_path / "mars.png")
    host.answers = {"/slow": lambda _: stop.wait(WAIT_S), "/fast": (tmp_path / "mars.png").read_bytes()}

    def ask(path: str, number: int) -> list[object]:
        tasks = [{"id": n, "data": {"image": host.url + path}} for n in range(number)]
        return list(app.test_client().post("/predict", json=TASKS | {"tasks": tasks}).json["results"])

    assert all(ask("/fast", 2))
    with ThreadPoolExecutor(1) as threads:
        dripping = threads.submit(ask, "/slow", 64)
        wait_for(lambda: sum(path == "/slow" for path, _ in host.requests) == 4)
        assert all(ask("/fast", 2))
        assert not dripping.done()
        stop.set()
        assert dripping.result(2 * WAIT_S) == [[]] * 64
