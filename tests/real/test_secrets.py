"""A real server at DEBUG with secrets everywhere: none of them is in its log or in an answer."""

from __future__ import annotations

import base64
import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from PIL import Image

from celestial_backend.web.app import PATHS
from tests.support.backend_server import REPOSITORY, Backends, BackendServer, free_port, label_config
from tests.support.picture_host import PictureHost, picture_host
from tests.unit.pictures.test_decode import saved

USER, PASSWORD = "user-s3cr3t-1", "pass-s3cr3t-2"
KEY = "token-s3cr3t-3"
DATABASE_PASSWORD = "database-s3cr3t-4"
PIXELS = base64.b64encode(saved(Image.new("RGB", (32, 32), (90, 200, 30)), "PNG")).decode()
SECRETS = {
    "password": PASSWORD,
    "password as sent": base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()[8:],
    "Label Studio's token": KEY,
    "database's password": DATABASE_PASSWORD,
    "wrong password": "wrong-s3cr3t-5",
    "wrong password as sent": base64.b64encode(b"x:wrong-s3cr3t-5").decode()[8:-4],
    "cookie": "cookie-s3cr3t-6",
    "query": "query-s3cr3t-7",
    "token in a body": "body-s3cr3t-8",
    "signature": "signed-s3cr3t-9",
    "password in an address": "address-s3cr3t-10",
    "picture": PIXELS[60:100],
    "damaged picture": "damaged-s3cr3t-11",
    "unread picture": "PIXELS-s3cr3t-12",
    "broken header": "header-s3cr3t-13",
    "Label Studio's answer": "answer-s3cr3t-14",
}
UNFORESEEN = """
import sys
sys.path.insert(0, {repository!r})
import celestial_backend.web.protocol

read = celestial_backend.web.protocol.read


def broken(path, body):
    if b"UNFORESEEN" in body:
        raise RuntimeError("nobody foresaw this")
    return read(path, body)


celestial_backend.web.protocol.read = broken
"""


@pytest.fixture
def studio() -> Iterator[PictureHost]:
    """A Label Studio that refuses everything, and tells a secret of its own."""
    with picture_host() as server:
        server.answers["/data/upload/1/refused.png"] = (401, {"Set-Cookie": SECRETS["Label Studio's answer"]}, b"{}")
        server.answers["/data/upload/1/broken.png"] = (500, {}, SECRETS["Label Studio's answer"].encode())
        server.answers["/data/upload/1/away.png"] = (302, {"Location": f"http://x:{KEY}@127.0.0.1/?{KEY}"}, b"")
        yield server


def ask_everything(server: BackendServer, studio: PictureHost, port: int) -> list[str]:
    """All that a client gets to see: each route with each method, with bodies that work and bodies that do not."""
    seen: list[str] = []
    headers = {"Cookie": f"session={SECRETS['cookie']}", "X-Api-Key": SECRETS["cookie"]}
    good, wrong = (USER, PASSWORD), ("x", SECRETS["wrong password"])
    values = [
        f"data:image/png;base64,{PIXELS}",
        f"data:image/png;base64,{SECRETS['damaged picture']}",
        f"data:{SECRETS['unread picture']}",
        f"http://127.0.0.1:{port}/x.png?X-Amz-Signature={SECRETS['signature']}",
        f"http://10.0.0.1/x.png?sig={SECRETS['signature']}#{SECRETS['signature']}",
        f"http://u:{SECRETS['password in an address']}@127.0.0.1:{port}/x.png",
        f"http://u:{SECRETS['password in an address']}/x@127.0.0.1/x.png",
        f"https://{SECRETS['password in an address']}@127.0.0.1:{port}/x.png",
        f"file:///x.png?{SECRETS['signature']}",
        f"s3://bucket/x.png?versionId={SECRETS['signature']}",
        "/data/upload/1/refused.png", "/data/upload/1/broken.png", "/data/upload/1/away.png",
        f"{studio.url}/data/upload/1/refused.png?token={SECRETS['query']}",
        "/data/upload/../../etc/passwd",
    ]  # fmt: skip
    tasks = [{"id": number, "data": {"image": value}} for number, value in enumerate(values)]
    tasks += [{"id": f"data:{SECRETS['unread picture']}", "data": {}}, {"data": SECRETS["token in a body"]}]
    token = SECRETS["token in a body"]
    bodies = {
        "/setup": [
            {"project": "7.1", "schema": label_config(), "access_token": token, "extra_params": token},
            {"project": "7.1", "schema": f"<View {token}", "access_token": token},
            {"project": 7, "access_token": token},
        ],
        "/predict": [
            {"project": "7.1", "label_config": label_config(), "tasks": tasks, "params": {"login": token}},
            {"tasks": tasks},
            {"tasks": f"{token}"},
        ],
        "/webhook": [
            {"action": "START_TRAINING", "project": {"id": 7, "title": token}, "token": token},
            {"action": "ANNOTATION_CREATED", "project": {"id": 7}, "annotation": {"result": [{"value": token}]}},
            {"action": "UNFORESEEN", "project": {"id": 7}, "token": token},
            {"project": token},
        ],
    }
    for path in [*sorted(PATHS), "/nowhere", "/static/../../etc/passwd"]:
        for method in ("GET", "POST", "PUT", "DELETE", "OPTIONS"):
            for auth in (good, wrong, None):
                for body in bodies.get(path, [{}]):
                    data = json.dumps(body)
                    kind = {"Content-Type": "application/json"}
                    url = f"{server.url}{path}?access_token={SECRETS['query']}"
                    answer = requests.request(method, url, data=data, auth=auth, headers=headers | kind, timeout=60)
                    seen.append(f"{method} {path} {answer.status_code} {answer.reason} {answer.headers} {answer.text}")
    for broken in (
        f"GET /health?{SECRETS['query']} HTTP/9.9\r\n\r\n",
        f"GET /health HTTP/1.1\r\nAuthorization : Basic {SECRETS['broken header']}\r\n\r\n",
        f"GET /health HTTP/1.1\r\nAuthorization\0: {SECRETS['broken header']}\r\n\r\n",
        f"GET /health HTTP/1.1\r\nAuthorization: Basic \0{SECRETS['broken header']}\r\n\r\n",
        f"GET /health HTTP/1.1\r\nCookie: a\r\n {SECRETS['broken header']}\r\n\r\n",
        f"POST /setup HTTP/1.1\r\nContent-Length: {SECRETS['broken header']}\r\n\r\n",
        "POST /setup HTTP/1.1\r\nTransfer-Encoding: chunked, identity\r\n\r\n",
        "POST /setup HTTP/1.1\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        "POST /setup HTTP/1.1\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabc",
    ):
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
            connection.sendall(broken.encode("latin-1"))
            seen.append("raw " + connection.makefile("rb").read().decode("latin-1"))
    return seen


def test_no_secret_leaves_the_server(backends: Backends, studio: PictureHost, tmp_path: Path) -> None:
    """Settings, bodies, headers, addresses and pictures, with Label Studio, database, store and code failing too."""
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "sitecustomize.py").write_text(UNFORESEEN.format(repository=str(REPOSITORY)))
    common = {
        "BASIC_AUTH_USER": USER, "BASIC_AUTH_PASS": PASSWORD, "LABEL_STUDIO_URL": studio.url,
        "LABEL_STUDIO_API_KEY": KEY, "LOG_LEVEL": "DEBUG", "CELESTIAL_ALLOWED_HOSTS": "127.0.0.1",
        "PYTHONPATH": tmp_path / "broken",
    }  # fmt: skip
    (tmp_path / "no-store").write_text("a file where a folder should be")
    failing = {
        "CELESTIAL_DATABASE_URL": f"postgresql://me:{DATABASE_PASSWORD}@127.0.0.1:{free_port()}/it",
        "BENTOML_HOME": tmp_path / "no-store" / "bentoml", "CELESTIAL_TRAIN_EVERY": "1",
    }  # fmt: skip
    answers: list[str] = []
    for more in ({}, failing):
        server = backends(**common, **more)
        answers += ask_everything(server, studio, free_port())
        server.stop()
        assert "nobody foresaw this" in server.log_text(), "the failure was real"
        assert {name for name, secret in SECRETS.items() if secret in server.log_text()} == set(), server.log
        lines = server.log_text().splitlines()
        with_paths = [line for line in lines if str(tmp_path) in line or "site-packages" in line]
        assert all(line.startswith('      File "') for line in with_paths), "paths are in tracebacks and nowhere else"
    statuses = {line.split()[2] for line in answers if not line.startswith("raw")}
    assert {"200", "201", "400", "401", "404", "405", "422", "500", "503"} <= statuses
    text = "\n".join(answers)
    assert {name for name, secret in SECRETS.items() if secret in text} == set()
    for place in ("Traceback", 'File "', str(tmp_path), str(REPOSITORY), "site-packages", "/celestial_backend/"):
        assert place not in text, place
