"""SECURITY.md says what is held, and the promises that no other file tests."""

from __future__ import annotations

import ast
import hmac
import io
import pickle
import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

import pytest

from celestial_backend.jobs.queue import make_queue
from celestial_backend.planets.renderer import render
from celestial_backend.services import Services, build
from celestial_backend.settings import Settings
from celestial_backend.web import app
from celestial_backend.web.app import PATHS, create_app
from tests.support.backend_server import REPOSITORY, label_config

SECURITY = (REPOSITORY / "SECURITY.md").read_text()
PROMISES = SECURITY.split("## What is promised")[1].split("\n## ")[0]
ROWS = [row for row in PROMISES.splitlines() if row.startswith("| ") and not row.startswith("| promise")]
TEST = re.compile(r"`((?:\w+/)*test_\w+\.py)::(\w+(?:::\w+)?)`")


@pytest.mark.parametrize("row", ROWS, ids=[row[2:42] for row in ROWS])
def test_each_promise_names_tests_that_exist(row: str) -> None:
    """A promise without a test, or with one that was renamed or taken away, is found here."""
    named = TEST.findall(row.split(" | ")[1])
    assert named, "no test is named"
    for file, name in named:
        tree = ast.parse((REPOSITORY / "tests" / file).read_text())
        inside: list[ast.stmt] = tree.body
        for part in name.split("::"):
            found = [node for node in inside if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == part]
            assert found, f"tests/{file} has no {name}"
            inside = found[0].body


def test_all_promises_are_read() -> None:
    """The table is there, and the text beside it names no test that the table does not."""
    assert len(ROWS) > 10
    assert len(TEST.findall(SECURITY)) == len(TEST.findall("\n".join(ROWS)))


@pytest.fixture
def services(tmp_path: Path) -> Services:
    (tmp_path / "originals").mkdir()
    render("Mars", 21).save(tmp_path / "originals" / "Mars.png")
    return build(
        Settings(bentoml_home=tmp_path / "bentoml", model_dir=tmp_path / "state", data_folder=tmp_path / "originals")
    )


@pytest.mark.parametrize("path", [*sorted(PATHS), "/nowhere", "/static/x", "//health", "/health/", "/Health"])
def test_no_route_and_no_method_passes_the_password(services: Services, path: str) -> None:
    """Without it every answer is the same 401, so it does not even tell what exists."""
    settings = replace(services.settings, basic_auth_user="u", basic_auth_pass="p")
    client = create_app(replace(services, settings=settings)).test_client()
    for method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "X"):
        for headers in ({}, {"Authorization": "Basic dTpx"}, {"X-Forwarded-User": "u", "X-Original-URL": "/health"}):
            answer = client.open(path, method=method, headers=headers)
            assert answer.status_code == 401
            assert method == "HEAD" or answer.json["detail"].startswith("User name or password")
            assert method == "HEAD" or answer.json["code"] == "password"


def test_the_password_is_compared_in_constant_time(services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each request is compared with both spellings by `hmac.compare_digest`, also when the first fits."""
    compared: list[bytes] = []

    def compare_digest(given: bytes, wanted: bytes) -> bool:
        compared.append(wanted)
        return hmac.compare_digest(given, wanted)

    monkeypatch.setattr(app, "hmac", type("Watched", (), {"compare_digest": staticmethod(compare_digest)}))
    settings = replace(services.settings, basic_auth_user="ü", basic_auth_pass="p")
    client = create_app(replace(services, settings=settings)).test_client()
    for password in ("p", "wrong", ""):
        compared.clear()
        client.get("/health", auth=("ü", password))
        assert compared == ["ü:p".encode(), "ü:p".encode("latin-1")]


class Trap:
    """What leaves a file behind when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (Path.touch, (self.mark,))


def test_no_pickle_that_a_request_names_is_loaded(services: Services, tmp_path: Path) -> None:
    """Not by an attribute of the label config, a parameter, a context, a task, a project or an event."""
    mark, folder = tmp_path / "loaded", tmp_path / "originals" / "trap"
    folder.mkdir()
    trap = pickle.dumps(Trap(mark))
    for name in ("custom_objects.pkl", "model.pkl", "saved_model.keras", "trap.bentomodel", "Trap.png"):
        (folder / name).write_bytes(trap)
    client = create_app(services).test_client()
    for path in [str(folder), *map(str, sorted(folder.iterdir()))]:
        attributes = " ".join(
            f"{key}={quoteattr(path)}"
            for key in ("model_path", "model_version", "model", "modelPath", "model_dir", "custom_objects", "weights")
        )
        config = label_config().replace("<View", f"<View {attributes}").replace("<Choices", f"<Choices {attributes}")
        named = {"model_path": path, "model_version": path, "model": path, "model_dir": path, "custom_objects": path}
        task = {"id": 1, "data": {"image": "upload/1/Mars.png", **named}, "model_version": path, **named}
        setup = {"schema": config, "project": path, "extra_params": named, **named}
        assert client.post("/setup", json=setup).status_code == 200
        for value in ("upload/1/Mars.png", path, f"file://{path}", "upload/1/Trap.png"):
            task["data"]["image"] = value  # type: ignore[index]
            body = {"tasks": [task], "label_config": config, "params": {"context": named, **named}, **named}
            assert client.post("/predict", json=body).status_code == 200
        event = {"action": "START_TRAINING", "project": {"id": 1, "label_config": config, **named}, **named}
        assert client.post("/webhook", json=event).status_code == 201
    assert not mark.exists()
    assert services.store.live_tag("1") == services.store.live_tag()
    pickle.load(io.BytesIO(trap))  # noqa: S301 - our own
    assert mark.exists(), "the trap works"


def test_no_pickle_is_taken_from_the_queue(tmp_path: Path) -> None:
    """Who can write to the queue gets a message refused, and runs nothing."""
    queue = make_queue(Settings(model_dir=tmp_path))
    queue.task(name="train")(lambda: None)
    queue.storage.enqueue(pickle.dumps(Trap(tmp_path / "loaded")))
    with pytest.raises(ValueError, match=r"utf-8|JSON|value"):
        queue.dequeue()
    assert not (tmp_path / "loaded").exists()


def test_what_a_proxy_would_set_is_not_believed(services: Services) -> None:
    """Anybody can send such headers: no other host, scheme or user comes of them."""
    client = create_app(services).test_client()
    forged = {"X-Forwarded-Host": "evil.example", "X-Forwarded-Prefix": "/evil.example"}
    for path in sorted(PATHS):
        answer = client.get(path, headers=forged)
        assert "evil.example" not in f"{answer.headers}{answer.text}"
        assert answer.status_code in (200, 405)


TRAINING = {"action": "START_TRAINING", "project": {"id": 1}}
FOREIGN = [
    {"Origin": "http://evil.example"},
    {"Origin": "null"},
    {"Origin": "http://localhost:8080"},
    {"Origin": "http://localhost.evil.example"},
    {"Origin": "http://localhost@evil.example"},
    {"Origin": "localhost"},
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site"},
    {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Dest": "iframe"},
    {"Sec-Fetch-Site": "cross-site", "Origin": "http://localhost"},
    {"Sec-Fetch-Site": "same-origin", "Origin": "http://evil.example"},
]


@pytest.mark.parametrize("guarded", [False, True])
@pytest.mark.parametrize("sent", FOREIGN, ids=str)
def test_no_page_of_another_site_can_use_it(services: Services, sent: dict[str, str], guarded: bool) -> None:
    """Whatever a browser sends for it, with the password that it may remember too: 403, and nothing is done."""
    settings = replace(services.settings, **({"basic_auth_user": "u", "basic_auth_pass": "p"} if guarded else {}))
    client = create_app(replace(services, settings=settings)).test_client()
    auth = ("u", "p") if guarded else None
    for path in sorted(PATHS):
        for method in ("GET", "POST"):
            answer = client.open(path, method=method, headers=sent, json=TRAINING, auth=auth)
            assert answer.status_code == 403, path
            assert answer.json["detail"].startswith("A page of another site must not use this backend")
    assert services.jobs.ledger.jobs() == []


def test_own_pages_and_followed_links_are_let_in(services: Services) -> None:
    """What our own pages ask for, and what somebody opens, from wherever the link was."""
    client = create_app(services).test_client()
    own = {"Origin": "http://localhost", "Sec-Fetch-Site": "same-origin"}
    link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    typed = {"Sec-Fetch-Site": "none", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    assert client.post("/webhook", json={"action": "TASKS_CREATED"}, headers=own).status_code == 200
    for sent in (own, link, typed):
        assert client.get("/docs", headers=sent).status_code == 200
    assert client.post("/webhook", json={"action": "TASKS_CREATED"}, headers=link).status_code == 403


@pytest.mark.parametrize(
    ("host", "known"),
    [
        ("evil.example", False), ("evil.example:9090", False), ("127.0.0.1.evil.example", False), ("[::1", False),
        ("localhost.evil.example", False), ("evil.example.", False),
        ("ml.example.com", True), ("ML.example.com.:443", True), ("x.ml.example.com", False),
        ("127.0.0.1:9090", True), ("[::1]:9090", True), ("192.168.1.7", True), ("localhost:9090", True),
        ("backend", True), ("ml-backend.internal:9090", True), ("host.docker.internal", True), ("mac.local", True),
    ],
)  # fmt: skip
def test_without_a_password_only_known_names_are_answered(services: Services, host: str, known: bool) -> None:
    """A site can give its own name to this machine's address, and its pages are then ours to a browser."""
    app = create_app(replace(services, settings=replace(services.settings, hosts=("ml.example.com",))))
    for answer in (app.test_client().get("/health", headers={"Host": host}),
                   app.test_client().post("/webhook", json=TRAINING, headers={"Host": host})):  # fmt: skip
        assert (answer.status_code != 403) == known
    guarded = replace(services.settings, basic_auth_user="u", basic_auth_pass="p")
    client = create_app(replace(services, settings=guarded)).test_client()
    assert client.get("/health", headers={"Host": host}, auth=("u", "p")).status_code == 200

