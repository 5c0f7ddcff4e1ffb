"""What the backend says of itself: true, complete, and readable in a browser without anything from elsewhere."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, get_origin

import msgspec
import pytest
import schemathesis
from flask import Flask
from flask.testing import FlaskClient
from hypothesis import seed
from playwright.sync_api import sync_playwright
from werkzeug.serving import make_server

from celestial_backend import __version__
from celestial_backend.errors import CelestialError
from celestial_backend.planets.renderer import render
from celestial_backend.services import Services, build
from celestial_backend.settings import Settings
from celestial_backend.web import openapi, protocol
from celestial_backend.web.app import PATHS, create_app
from tests.support.backend_server import label_config
from tests.support.browser import ARGUMENTS, HOW_TO_GET_ONE, find_chromium, shrink
from tests.support.cases import cases


@pytest.fixture
def services(tmp_path: Path) -> Services:
    """The default model, and the one picture that the document's example names."""
    (tmp_path / "originals").mkdir()
    render("Mars", 21).save(tmp_path / "originals" / "Mars.png")
    return build(
        Settings(bentoml_home=tmp_path / "bentoml", model_dir=tmp_path, data_folder=tmp_path / "originals")
    )


@pytest.fixture
def app(services: Services) -> Flask:
    return create_app(services)


@pytest.fixture
def client(app: Flask) -> FlaskClient:
    return app.test_client()


@pytest.fixture
def document(client: FlaskClient) -> dict[str, Any]:
    return dict(client.get("/openapi.json").json)


@pytest.fixture
def guarded(services: Services) -> Flask:
    return create_app(replace(services, settings=replace(services.settings, basic_auth_user="u", basic_auth_pass="p")))


DOCUMENT = openapi.document(guarded=False)
ERRORS = DOCUMENT["components"]["responses"]
OPEN, GUARDED = (schemathesis.openapi.from_dict(openapi.document(guarded=guarded)) for guarded in (False, True))
for described in (OPEN, GUARDED):
    described.config.update(base_url="http://127.0.0.1")
    # Text that is no label config fits the description of a body, and is refused with 422.
    described.config.checks.positive_data_acceptance.expected_statuses += ["422"]


@OPEN.parametrize()
@seed(1)
@cases(30)
def test_every_answer_is_as_described(case: schemathesis.Case, app: Flask) -> None:
    """Bodies that fit and bodies that do not: no 5xx, and statuses, types and shapes as the document says."""
    case.operation.schema.app = app
    case.call_and_validate(app=app)


@GUARDED.parametrize()
@seed(2)
@cases(5)
def test_every_answer_is_as_described_with_basic_auth(case: schemathesis.Case, guarded: Flask) -> None:
    """The same where a name and a password are asked for; without them there is a 401 and nothing else."""
    case.operation.schema.app = guarded
    case.call_and_validate(app=guarded, headers={"Authorization": "Basic dTpw"})


def test_every_path_is_described(app: Flask, document: dict[str, Any]) -> None:
    """What is served is what is described, path by path and method by method; and the version is the package's."""
    assert document["openapi"].startswith("3.1")
    assert document["info"]["version"] == __version__
    assert document == DOCUMENT
    served: dict[str, set[str]] = {path: set() for path in PATHS}
    for rule in app.url_map.iter_rules():
        served.get(rule.rule, set()).update(method.lower() for method in rule.methods or ())
    described = {path: set(methods) for path, methods in document["paths"].items()}
    assert described == {path: methods - {"head", "options"} for path, methods in served.items()}


def test_what_is_read_is_described() -> None:
    """Every key that is read of a body, with its kind, its bounds and its sentence, as the protocol has it."""
    read = [get_origin(kind) or kind for kind, _ in protocol.KINDS.values()]
    _, schemas = msgspec.json.schema_components(read, ref_template=openapi.REFERENCE + "{name}")
    described = DOCUMENT["components"]["schemas"]
    assert {"SetupRequest", "PredictRequest", "WebhookRequest", "OtherEvent"} <= schemas.keys() <= described.keys()
    for name, schema in schemas.items():
        assert described[name] == schema


def test_every_status_of_an_error_is_described() -> None:
    """Of those that a request may meet: our errors, and what Flask refuses by itself."""
    waiting, ours = [CelestialError], set()
    while waiting:
        kind = waiting.pop()
        ours.add(kind.status)
        waiting += kind.__subclasses__()
    assert ours - {500, 502} | {401, 404, 405, 415} == {int(status) for status in ERRORS}


def example_of(path: str, name: str) -> Any:
    content = DOCUMENT["paths"][path]["post"]["requestBody"]["content"]["application/json"]
    return content["examples"][name]["value"]


def answer_of(path: str, status: str) -> Any:
    return DOCUMENT["paths"][path]["post"]["responses"][status]["content"]["application/json"]["example"]


def test_the_examples_are_what_happens(client: FlaskClient, services: Services) -> None:
    """Each example request is answered as its example says, apart from numbers that a model and a clock make."""
    tag = services.store.live_tag()
    assert client.post("/setup", json=example_of("/setup", "project")).json == {"model_version": tag}
    first, second = client.post("/predict", json=example_of("/predict", "two_tasks")).json["results"]
    told = answer_of("/predict", "200")["results"][0]
    assert second == []
    assert first["result"][0].keys() == told["result"][0].keys()
    assert first["result"][0]["value"] == {"choices": ["Mars"]}
    assert first.keys() == told.keys()
    training = client.post("/webhook", json=example_of("/webhook", "train"))
    assert (training.status_code, training.json["status"]) == (201, "ok")
    assert training.json["result"].keys() == answer_of("/webhook", "201")["result"].keys()


@pytest.mark.parametrize("status", sorted(ERRORS))
def test_an_error_is_of_the_one_shape(client: FlaskClient, guarded: Flask, status: str) -> None:
    """Each described error can be had, and looks like its example."""
    answer = {
        "400": lambda: client.post("/predict", json={}),
        "401": lambda: guarded.test_client().get("/docs"),
        "403": lambda: client.get("/docs", headers={"Origin": "http://evil.example"}),
        "404": lambda: client.get("/nowhere"),
        "405": lambda: client.get("/predict"),
        "408": lambda: client.post(
            "/predict", data=b"{", content_type="application/json", environ_overrides={"CONTENT_LENGTH": "9"}
        ),
        "413": lambda: create_app(build(Settings(request_max_mb=0.001))).test_client().post(
            "/setup", data=b" " * 2000, content_type="application/json"
        ),
        "415": lambda: client.post("/predict", data=b"{}", content_type="text/plain"),
        "422": lambda: client.post("/setup", json={"schema": label_config([])}),
        "503": lambda: create_app(
            build(Settings(model="celestial_bodies_classifier_model:7"))
        ).test_client().post("/setup", json=example_of("/setup", "project")),
    }[status]()  # fmt: skip
    assert answer.status_code == int(status)
    example = ERRORS[status]["content"]["application/json"]
    assert answer.json.keys() == example["example"].keys()
    assert answer.json["detail"].split()[:3] == example["example"]["detail"].split()[:3]
    assert answer.json["code"] == example["example"]["code"]


def test_only_json_is_taken(client: FlaskClient) -> None:
    """As the document says; a web page's form cannot send it without asking first."""
    body = b'{"action": "TASKS_CREATED"}'
    for kind in ("application/json", "application/json; charset=utf-8", "Application/JSON"):
        assert client.post("/webhook", data=body, content_type=kind).status_code == 200
    forms = ("text/plain", "multipart/form-data", "application/x-www-form-urlencoded")
    for kind in (*forms, "application/jsonp", "", None):
        assert client.post("/webhook", data=body, content_type=kind).status_code == 415


@pytest.mark.parametrize("path", ["/docs", "/openapi.json", "/metrics"])
def test_the_same_credentials_guard_the_pages(guarded: Flask, path: str) -> None:
    """Without them nothing is told, with them the page is there."""
    client = guarded.test_client()
    assert client.get(path).status_code == 401
    assert client.get(path, auth=("u", "p")).status_code == 200


def test_the_document_tells_of_credentials_where_they_are_asked_for(client: FlaskClient, guarded: Flask) -> None:
    """And only there."""
    told = guarded.test_client().get("/openapi.json", auth=("u", "p")).json
    assert told["security"] == [{"basic": []}]
    assert "user name and a password" in guarded.test_client().get("/docs", auth=("u", "p")).text
    assert "security" not in client.get("/openapi.json").json


class Links(HTMLParser):
    """The places that a page refers to, and those that it has."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.to: set[str] = set()
        self.ids: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.to |= {value for name, value in attrs if name in ("href", "src") and value}
        self.ids |= {value for name, value in attrs if name == "id" and value}
        assert tag != "script"


def test_the_page_holds_all_of_the_document(client: FlaskClient, document: dict[str, Any]) -> None:
    """Each path, schema, key and description; each link leads somewhere on the page, or to the document."""
    page = client.get("/docs").text
    links = Links(page)
    assert {link.removeprefix("#") for link in links.to if link.startswith("#")} <= links.ids
    assert {link for link in links.to if not link.startswith("#")} == {"openapi.json", "data:,"}
    assert "`" not in page, "what a description has between backticks is shown as code"
    text = re.sub(r"&#?\w+;", "?", page)
    for path in document["paths"]:
        assert path in links.ids
    for name, schema in document["components"]["schemas"].items():
        assert name in links.ids
        for key, field in schema["properties"].items():
            assert f"<code>{key}</code>" in text
            described = re.sub(r"[\"'&<>]", "?", field.get("description", ""))
            assert re.sub(r"`(.+?)`", r"<code>\1</code>", described) in text
    assert "&#34;label_config&#34;: &#34;&lt;View&gt;" in page, "the examples are shown"


@pytest.fixture
def address(app: Flask) -> Iterator[str]:
    """The app on a port."""
    server = make_server("127.0.0.1", 0, app, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.port}"
    server.shutdown()
    server.server_close()


def test_a_browser_shows_the_page_with_nothing_from_elsewhere(address: str, tmp_path: Path) -> None:
    """All requests go to the one address; nothing is wider than the window; no word of the console."""
    program = find_chromium()
    if program is None:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(HOW_TO_GET_ONE)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=program, args=list(ARGUMENTS))
        tab = chromium.new_page(viewport={"width": 800, "height": 900})
        asked: list[str] = []
        said: list[str] = []
        tab.on("request", lambda request: asked.append(request.url))
        tab.on("console", lambda message: said.append(message.text))
        tab.goto(f"{address}/docs")
        assert tab.get_by_role("heading", name="POST /predict").is_visible()
        assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        tab.get_by_role("heading", name="POST /predict").evaluate("heading => heading.scrollIntoView()")
        seen = Path(os.environ.get("TEST_SCREENSHOTS") or tmp_path) / "docs.png"
        tab.screenshot(path=seen)
        shrink(seen)
        chromium.close()
    assert {url for url in asked if not url.startswith("data:")} == {f"{address}/docs"}
    assert said == []
