"""Connecting a project whose pictures need a token, without one that works; and what the backend says of itself."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from flask.testing import FlaskClient

from celestial_backend import __version__
from celestial_backend.planets.renderer import render
from celestial_backend.services import build
from celestial_backend.settings import Settings
from celestial_backend.studio import access
from celestial_backend.web import app
from celestial_backend.web.app import create_app
from tests.support.backend_server import label_config
from tests.support.picture_host import PictureHost, picture_host

TOKEN, LENT = "a" * 40, "b" * 40
PROJECT = "7.1795374408"
UPLOAD, OTHER = "/data/upload/7/0123abcd-Mars.png", "/data/upload/7/0123abce-Earth.png"
WEB = "https://pictures.example/Mars.png"
LOCAL, CLOUD = "/data/local-files/?d=a/Mars.png", "s3://bucket/Mars.png"


def inline() -> str:
    stream = io.BytesIO()
    render("Mars", 21).save(stream, "PNG")
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"


class Studio:
    """A Label Studio that refuses our token, shows first tasks for the one it lends, and keeps a picture."""

    def __init__(self, host: PictureHost, values: list[str] | None) -> None:
        self.host, self.values = host, values
        host.answers["/api/version"] = self._said({"release": "1.23.2"})
        refusal = {"detail": "Invalid token."}
        host.answers["/api/current-user/whoami"] = lambda handler: self._send(handler, 401, refusal)
        host.answers["/api/tasks?project=7&page_size=20&fields=task_only"] = self._tasks
        host.answers[UPLOAD] = 401

    @staticmethod
    def _said(body: object) -> Callable[[BaseHTTPRequestHandler], None]:
        return lambda handler: Studio._send(handler, 200, body)

    @staticmethod
    def _send(handler: BaseHTTPRequestHandler, status: int, body: object) -> None:
        data = json.dumps(body).encode()
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    def _tasks(self, handler: BaseHTTPRequestHandler) -> None:
        if self.values is None or handler.headers.get("Authorization") != f"Token {LENT}":
            self._send(handler, 401, {"detail": "legacy token authentication has been disabled"})
            return
        tasks = [{"id": number, "data": {"image": value}} for number, value in enumerate(self.values)]
        self._send(handler, 200, {"tasks": tasks})


@pytest.fixture
def host() -> Iterator[PictureHost]:
    with picture_host() as server:
        yield server


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """However busy the machine is, what is asked is waited for."""
    for name in ("SETUP_S", "TOKEN_S"):
        monkeypatch.setattr(app, name, 60.0)
    for name in ("LOOK_S", "ANSWER_S"):
        monkeypatch.setattr(access, name, 30.0)


def client(tmp_path: Path, **more: Any) -> FlaskClient:
    return create_app(build(Settings(bentoml_home=tmp_path / "bentoml", model_dir=tmp_path, **more))).test_client()


def setup(client: FlaskClient) -> tuple[int, str]:
    body = {"project": PROJECT, "schema": label_config(), "hostname": "http://ls", "access_token": LENT}
    answer = client.post("/setup", json=body)
    return answer.status_code, answer.status


@pytest.mark.parametrize("token", [TOKEN, None], ids=["refused", "missing"])
@pytest.mark.parametrize(
    ("values", "taken"),
    [
        pytest.param([UPLOAD, OTHER], False, id="uploads"),
        pytest.param([LOCAL], False, id="local-files"),
        pytest.param([CLOUD], False, id="cloud"),
        pytest.param(["http://localhost/data/upload/7/0123abcd-Mars.png"], False, id="under-another-name"),
        pytest.param([inline(), WEB], True, id="pictures-that-need-none"),
        pytest.param([UPLOAD, WEB], True, id="some-that-need-none"),
        pytest.param([], True, id="no-tasks-yet"),
        pytest.param(None, False, id="nobody-shows-them"),
    ],
)
def test_the_first_tasks_decide(
    host: PictureHost, tmp_path: Path, token: str | None, values: list[str] | None, taken: bool
) -> None:
    """Label Studio shows a person the status line, which names the setting; no prediction that would work is lost."""
    Studio(host, values)
    status, line = setup(client(tmp_path, label_studio_url=host.url, label_studio_api_key=token))
    assert status == (200 if taken else 422)
    if not taken:
        assert "LABEL_STUDIO_API_KEY" in line
        assert TOKEN not in line
        assert LENT not in line


@pytest.mark.parametrize("values", [[UPLOAD], None])
def test_pictures_on_a_disk_here_need_no_token(host: PictureHost, tmp_path: Path, values: list[str] | None) -> None:
    """Whether Label Studio shows the tasks or not."""
    Studio(host, values)
    path = tmp_path / "media" / UPLOAD.removeprefix("/data/")
    path.parent.mkdir(parents=True)
    render("Mars", 21).save(path)
    given = {"label_studio_url": host.url, "label_studio_api_key": TOKEN, "label_studio_data": tmp_path}
    assert setup(client(tmp_path, **given))[0] == 200


def test_a_project_that_is_known_is_not_lost_on_suspicion(host: PictureHost, tmp_path: Path) -> None:
    """Where nobody shows its tasks, only its own predictions speak against it."""
    Studio(host, None)
    backend = client(tmp_path, label_studio_url=host.url, label_studio_api_key=TOKEN)
    services = build(Settings(bentoml_home=tmp_path / "bentoml", model_dir=tmp_path))
    services.jobs.know(PROJECT.replace(".", "@"))
    assert setup(backend)[0] == 200
    predict(backend, UPLOAD)
    assert setup(backend)[0] == 422


def predict(client: FlaskClient, *values: str) -> list[Any]:
    tasks = [{"id": 1, "data": {"image": value}} for value in values]
    body = {"project": PROJECT, "label_config": label_config(), "tasks": tasks}
    answer = client.post("/predict", json=body)
    assert answer.status_code == 200
    return list(answer.json["results"])


@pytest.mark.parametrize("value", [UPLOAD, f"http://127.0.0.1:1{UPLOAD}"])
def test_a_backend_that_is_told_nothing_learns_from_its_predictions(tmp_path: Path, value: str) -> None:
    """It is taken at first; once no picture could be had for want of a token, Label Studio is told so."""
    backend = client(tmp_path)
    assert setup(backend)[0] == 200
    assert predict(backend, value) == [[]]
    status, line = setup(backend)
    assert status == 422
    assert "set LABEL_STUDIO_URL and LABEL_STUDIO_API_KEY" in line


def test_a_request_without_tasks_tells_nothing_of_the_token(tmp_path: Path) -> None:
    """No picture was asked for, so none is locked."""
    backend = client(tmp_path)
    assert predict(backend) == []
    assert setup(backend)[0] == 200


def test_one_picture_that_comes_is_enough(tmp_path: Path) -> None:
    """Others may want a token then; the project goes on."""
    backend = client(tmp_path)
    assert predict(backend, inline()) != [[]]
    assert predict(backend, UPLOAD) == [[]]
    assert setup(backend)[0] == 200


def test_a_label_studio_that_is_away_is_no_fault_of_the_token(tmp_path: Path) -> None:
    with picture_host() as gone:
        url = gone.url
    assert setup(client(tmp_path, label_studio_url=url, label_studio_api_key=TOKEN))[0] == 200


# What `doctor` asks


def test_what_is_told_holds_no_secret_and_no_path(host: PictureHost, tmp_path: Path) -> None:
    """Two with the same settings tell the same digests, and one with another token tells it by that one alone."""
    Studio(host, [])
    given = {"label_studio_url": host.url, "label_studio_api_key": TOKEN}
    settings = Settings(bentoml_home=tmp_path / "bentoml", model_dir=tmp_path, **given)
    answer = create_app(build(settings)).test_client().get("/doctor")
    assert answer.status_code == 200
    assert (answer.json["version"], answer.json["label_studio"]["state"]) == (__version__, "refused")
    assert TOKEN not in answer.text
    assert str(tmp_path) not in answer.text
    told, salt = answer.json["settings"], answer.json["salt"]
    assert told == settings.digests(salt)
    assert told != settings.digests("another salt")
    other = Settings(bentoml_home=tmp_path / "bentoml", model_dir=tmp_path, label_studio_api_key=LENT,
                     label_studio_url=host.url).digests(salt)  # fmt: skip
    assert {name for name in told if told[name] != other[name]} == {"LABEL_STUDIO_API_KEY"}


def test_a_database_is_compared_without_its_password() -> None:
    """Two users of one database have the same; and the names of settings that are passwords are missing."""
    one, other, third = (
        Settings(database_url=f"postgresql+psycopg://{place}", basic_auth_user="u", basic_auth_pass="p")
        for place in ("a:b@host/name", "c:d@host/name", "a:b@host/other")
    )
    assert one.digests("x") == other.digests("x")
    assert one.digests("x") != third.digests("x")
    assert not [name for name in one.digests("x") if name.startswith("BASIC_AUTH")]


@pytest.mark.parametrize(
    ("sender", "headers", "status"),
    [
        ("127.0.0.1", {}, 200),
        ("::1", {}, 200),
        ("203.0.113.9", {}, 403),
        ("", {}, 403),
        ("127.0.0.1", {"X-Forwarded-For": "203.0.113.9"}, 403),
        ("127.0.0.1", {"Forwarded": "for=203.0.113.9"}, 403),
        ("127.0.0.1", {"X-Request-Start": "1"}, 403),
    ],
)
def test_without_a_password_only_this_machine_may_ask(
    tmp_path: Path, sender: str, headers: dict[str, str], status: int
) -> None:
    """What a proxy passes on comes from elsewhere."""
    answer = client(tmp_path).get("/doctor", headers=headers, environ_base={"REMOTE_ADDR": sender})
    assert answer.status_code == status
    if status == 403:
        assert "Set BASIC_AUTH_USER and BASIC_AUTH_PASS" in answer.json["detail"]


def test_with_a_password_whoever_knows_it_may_ask(tmp_path: Path) -> None:
    """From wherever."""
    backend, elsewhere = client(tmp_path, basic_auth_user="u", basic_auth_pass="p"), {"REMOTE_ADDR": "203.0.113.9"}
    assert backend.get("/doctor", environ_base=elsewhere).status_code == 401
    assert backend.get("/doctor").status_code == 401
    assert backend.get("/doctor", environ_base=elsewhere, auth=("u", "p")).status_code == 200
