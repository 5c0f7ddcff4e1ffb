"""What the backend says of itself: true, complete, and readable in a browser without anything from elsewhere."""

from __future__ import annotations

import json
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
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright
from schemathesis.specs.openapi.checks import negative_data_rejection
from werkzeug.serving import make_server

from celestial_backend import __version__
from celestial_backend.errors import CelestialError
from celestial_backend.planets.renderer import render
from celestial_backend.services import Services, build
from celestial_backend.settings import Settings
from celestial_backend.web import openapi, pages, protocol
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


def passed_over(case: schemathesis.Case) -> list[Any]:
    """What more there is in a query is not refused."""
    return [negative_data_rejection] if case.operation.path == "/versions" else []


@OPEN.parametrize()
@seed(1)
@cases(30)
def test_every_answer_is_as_described(case: schemathesis.Case, app: Flask) -> None:
    """Bodies that fit and bodies that do not: no 5xx, and statuses, types and shapes as the document says."""
    case.operation.schema.app = app
    case.call_and_validate(app=app, excluded_checks=passed_over(case))


@GUARDED.parametrize()
@seed(2)
@cases(5)
def test_every_answer_is_as_described_with_basic_auth(case: schemathesis.Case, guarded: Flask) -> None:
    """The same where a name and a password are asked for; without them there is a 401 and nothing else."""
    case.operation.schema.app = guarded
    case.call_and_validate(app=guarded, headers={"Authorization": "Basic dTpw"}, excluded_checks=passed_over(case))


def test_every_path_is_described(app: Flask, document: dict[str, Any]) -> None:
    """What is served is what is described, path by path and method by method; and the version is the package's."""
    assert document["openapi"].startswith("3.1")
    assert document["info"]["version"] == __version__
    assert document == DOCUMENT
    client = app.test_client()
    served = {
        path: {method for method in ("get", "post") if client.open(path, method=method).status_code != 405}
        for path in PATHS
    }
    assert {path: set(methods) for path, methods in document["paths"].items()} == served


def test_what_is_read_is_described() -> None:
    """Every key that is read of a body, with its kind, its bounds and its sentence, as the protocol has it."""
    read = [get_origin(kind) or kind for kind, _ in protocol.KINDS.values()]
    _, schemas = msgspec.json.schema_components(read, ref_template=pages.REFERENCE + "{name}")
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


@pytest.mark.parametrize("path", ["/docs", "/openapi.json", "/metrics", "/versions", "/"])
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
        assert tag != "script" or attrs == []
        assert not any(name.startswith("on") for name, _ in attrs)


def test_the_page_holds_all_of_the_document(client: FlaskClient, document: dict[str, Any]) -> None:
    """Each path, schema, key and description; each link leads somewhere on the page, or to the document."""
    page = client.get("/docs").text
    links = Links(page)
    assert {link.removeprefix("#") for link in links.to if link.startswith("#")} <= links.ids
    assert {link for link in links.to if not link.startswith(("#", "data:image/"))} == {".", "openapi.json", "data:,"}
    assert "`" not in page.partition("<script>")[0], "what a description has between backticks is shown as code"
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


SIZES = [(scheme, width) for scheme in ("light", "dark") for width in (380, 1280)]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    program = find_chromium()
    if program is None:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(HOW_TO_GET_ONE)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=list(ARGUMENTS))
        yield browser
        browser.close()


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 380)])
def test_a_person_sends_a_first_prediction_from_the_page(
    address: str, chromium: Browser, tmp_path: Path, scheme: str, width: int
) -> None:
    """
    The picture on it is said to be a Saturn by the model inside; each other request is answered below its form.

    All requests go to the one address; nothing is wider than the window; no word of the console.
    """
    tab = chromium.new_page(color_scheme=scheme, viewport={"width": width, "height": 900})
    asked: list[str] = []
    said: list[str] = []
    tab.on("request", lambda request: asked.append(request.url))
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.goto(f"{address}/docs")
    assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    for form in tab.locator("form").all():
        form.get_by_role("button", name="Send").click()
        expect(form.locator("pre")).to_contain_text("200 OK", timeout=60_000)
    predict = tab.locator("form", has=tab.locator("img"))
    expect(predict.locator("pre")).to_contain_text('"Saturn"')
    predict.locator("textarea").fill("{")
    predict.get_by_role("button", name="Send").click()
    expect(predict.locator("pre")).to_contain_text("must be a JSON object")
    predict.locator("textarea").fill(json.dumps(example_of("/predict", "tried")))
    predict.get_by_role("button", name="Send").click()
    expect(predict.locator("pre")).to_contain_text('"Saturn"')
    assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    keep(tab, f"docs-{scheme}-{width}", tmp_path, of=predict)
    tab.close()
    assert {url.rsplit("/", 1)[0] for url in asked if not url.startswith("data:")} == {address}
    assert not [text for text in said if "400" not in text], "the one that a half body gets"


@pytest.mark.parametrize(("scheme", "width"), SIZES)
def test_a_person_reads_what_runs(
    address: str, services: Services, chromium: Browser, tmp_path: Path, scheme: str, width: int
) -> None:
    """At the address alone: a page that fits, asks nothing else, and leads to the others."""
    services.jobs.request("7")
    tab = chromium.new_page(color_scheme=scheme, viewport={"width": width, "height": 900})
    asked: list[str] = []
    said: list[str] = []
    tab.on("request", lambda request: asked.append(request.url))
    tab.on("console", lambda message: said.append(message.text))
    tab.goto(address)
    assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    expect(tab.get_by_text(services.store.live_tag()).first).to_be_visible()
    keep(tab, f"home-{scheme}-{width}", tmp_path)
    assert {url for url in asked if not url.startswith("data:")} == {f"{address}/"}
    tab.get_by_role("link", name="Try it").click()
    expect(tab.get_by_role("heading", name="POST /predict")).to_be_visible()
    tab.close()
    assert said == []


def keep(tab: Page, name: str, place: Path, of: Locator | None = None) -> None:
    """Keep what is seen; for the pages, by daylight and on a desk."""
    if of is not None:
        of.evaluate("form => form.scrollIntoView()")
    wanted = os.environ.get("TEST_SCREENSHOTS") if name.endswith("-light-1280") else None
    seen = Path(wanted, f"{name.partition('-')[0]}.png") if wanted else place / f"{name}.png"
    tab.screenshot(path=seen, full_page=of is None)
    shrink(seen)
