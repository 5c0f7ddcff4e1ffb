"""What the log says when a server has started."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from celestial_backend.metrics import SHARED
from celestial_backend.settings import Settings
from celestial_backend.studio import access as access_module
from celestial_backend.studio.access import Access
from celestial_backend.studio.client import Studio
from celestial_backend.web import start
from tests.support.picture_host import PictureHost, picture_host

WHOAMI = "/api/current-user/whoami"
FINE = (200, {}, json.dumps({"id": 1}).encode())


@pytest.fixture
def host() -> Iterator[PictureHost]:
    with picture_host() as server:
        yield server


def lines(caplog: pytest.LogCaptureFixture, settings: Settings) -> list[tuple[int, str]]:
    caplog.set_level(logging.INFO)
    start.tell(settings, Access(settings, Studio(settings)))
    return [(record.levelno, record.getMessage()) for record in caplog.records if record.name == start.__name__]


def test_three_lines(host: PictureHost, caplog: pytest.LogCaptureFixture) -> None:
    """The address to connect, how it stands with Label Studio, and whether a password is set."""
    host.answers[WHOAMI] = FINE
    settings = Settings(label_studio_url=host.url, label_studio_api_key="a" * 40, port=9191)
    connect, studio, password = lines(caplog, settings)
    assert connect == (logging.INFO, "To connect: type http://127.0.0.1:9191 into Connect Model in Label Studio.")
    assert studio == (logging.INFO, f"Label Studio at {host.url} answers, and accepts the token.")
    assert password[1].startswith("No password is set")


def test_what_is_missing_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    """And the address is the one that Label Studio sees."""
    settings = Settings(
        backend_url="http://ml-backend.internal:9090", basic_auth_user="mars", basic_auth_pass="sesame"
    )
    connect, studio, password = lines(caplog, settings)
    assert "http://ml-backend.internal:9090" in connect[1]
    assert studio[0] == logging.WARNING
    assert "set LABEL_STUDIO_URL and LABEL_STUDIO_API_KEY" in studio[1]
    assert "user name and the password" in password[1]
    assert "sesame" not in caplog.text


def test_a_label_studio_that_comes_later_is_told(
    host: PictureHost, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with `docker compose up`: it is asked again until it is there."""
    monkeypatch.setattr(start, "AGAIN_S", 0.0)
    monkeypatch.setattr(access_module, "BAD_S", 0.0)
    host.answers[WHOAMI] = 502

    def settle() -> None:
        host.answers[WHOAMI] = FINE

    monkeypatch.setattr(start.time, "sleep", lambda _: settle())
    settings = Settings(label_studio_url=host.url, label_studio_api_key="a" * 40)
    _, missing, _, come = lines(caplog, settings)
    assert missing[0] == logging.WARNING
    assert missing[1].endswith("It is asked again.")
    assert come == (logging.INFO, f"Label Studio at {host.url} answers, and accepts the token.")


def test_one_process_of_a_server_says_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever comes first; a server of one process, which shares nothing, says it too."""
    told: list[object] = []
    monkeypatch.setattr(start, "tell", lambda *_: told.append(1))
    settings = Settings()
    monkeypatch.setenv(SHARED, str(tmp_path))
    for _ in range(3):
        start.tell_in_background(settings, Access(settings, Studio(settings)))
    monkeypatch.delenv(SHARED)
    start.tell_in_background(settings, Access(settings, Studio(settings)))
    for thread in start.threading.enumerate():
        if thread.name == "start":
            thread.join(10)
    assert len(told) == 2
