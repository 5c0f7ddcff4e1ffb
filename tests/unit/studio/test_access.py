"""How the backend stands with Label Studio: each way to stand has its state and a sentence that says what to do."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler

import pytest

from celestial_backend.settings import Settings
from celestial_backend.studio import access as module
from celestial_backend.studio.access import Access, Standing
from celestial_backend.studio.client import Studio
from tests.support.picture_host import Answer, PictureHost, picture_host, redirect

TOKEN, LENT = "a" * 40, "b" * 40
WHOAMI, VERSION = "/api/current-user/whoami", "/api/version"
TASKS = "/api/tasks?project=7&page_size=20&fields=task_only"
SOON_S = 30


@pytest.fixture
def host() -> Iterator[PictureHost]:
    with picture_host() as server:
        yield server


def said(status: int, **body: object) -> Answer:
    return (status, {"Content-Type": "application/json"}, json.dumps(body).encode())


def access(url: str | None, token: str | None = TOKEN) -> Access:
    settings = Settings(label_studio_url=url, label_studio_api_key=token)
    return Access(settings, Studio(settings))


@pytest.mark.parametrize(
    ("answers", "state", "sentence"),
    [
        pytest.param({WHOAMI: said(200, id=1)}, "accepted", "answers, and accepts the token", id="accepted"),
        pytest.param({WHOAMI: said(401, detail="Invalid token.")}, "refused", "LABEL_STUDIO_API_KEY", id="wrong"),
        pytest.param({WHOAMI: said(403, detail="No.")}, "refused", "answered 403 (No)", id="forbidden"),
        pytest.param({WHOAMI: said(500, detail="Oh.")}, "silent", "answered 500 (Oh)", id="broken"),
        pytest.param({WHOAMI: b"<html>"}, "silent", "is not Label Studio. Check LABEL_STUDIO_URL", id="other"),
        pytest.param({}, "silent", "is not Label Studio. Check LABEL_STUDIO_URL", id="nothing-there"),
        pytest.param({WHOAMI: said(404, detail="Not Found.")}, "silent", "is not Label Studio. Check", id="a-backend"),
        pytest.param({WHOAMI: redirect("http://ls.example/api")}, "silent", "set LABEL_STUDIO_URL to that", id="moved"),
    ],
)
def test_with_a_token(host: PictureHost, answers: dict[str, Answer], state: str, sentence: str) -> None:
    """Label Studio is asked who the token's user is."""
    host.answers |= answers
    found = access(host.url).standing(SOON_S)
    assert (found.state, found.needs_token) == (state, state == "refused")
    assert sentence in found.sentence
    assert TOKEN not in found.sentence
    assert host.authorizations() == [f"Token {TOKEN}"]


@pytest.mark.parametrize(("status", "state"), [(200, "accepted"), (401, "refused")])
def test_with_a_personal_access_token(host: PictureHost, status: int, state: str) -> None:
    """It is seen whether it buys an access token; it is sent in the body, as Label Studio wants it."""
    key = "eyJhbGciOi.eyJ0b2tlb.signature"
    host.answers["/api/token/refresh/"] = said(status, **({"access": "x"} if status == 200 else {"detail": "Gone."}))
    found = access(host.url, key).standing(SOON_S)
    assert found.state == state
    assert key not in found.sentence
    assert host.authorizations() == [None]


def test_without_a_token(host: PictureHost) -> None:
    """It is seen whether Label Studio is there; without an address nobody is asked."""
    host.answers[VERSION] = said(200, release="1.23.2")
    found = access(host.url, None).standing(SOON_S)
    assert (found.state, found.needs_token) == ("no token", True)
    assert "LABEL_STUDIO_API_KEY" in found.sentence
    nowhere = access(None, None).standing(0)
    assert (nowhere.state, nowhere.needs_token) == ("no address", True)
    assert "connect --new-token`, which asks for it" in nowhere.sentence
    assert "set LABEL_STUDIO_URL and LABEL_STUDIO_API_KEY" in nowhere.sentence
    assert len(host.requests) == 1


@pytest.mark.parametrize("token", ["two words", "grün"])
def test_what_can_be_no_token_is_refused_here(host: PictureHost, token: str) -> None:
    found = access(host.url, token).standing(SOON_S)
    assert found.state == "refused"
    assert "LABEL_STUDIO_API_KEY must be the token alone" in found.sentence
    assert host.requests == []


def test_label_studio_is_down() -> None:
    """That is no fault of the token."""
    with picture_host() as gone:
        url = gone.url
    found = access(url).standing(SOON_S)
    assert (found.state, found.needs_token) == ("silent", False)
    assert "cannot be reached" in found.sentence


def gate(opened: threading.Event, then: Callable[[BaseHTTPRequestHandler], None]) -> Answer:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        opened.wait(SOON_S)
        then(handler)

    return answer


def fine(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b'HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{"id": 1}')


def test_nobody_waits_longer_than_asked(host: PictureHost) -> None:
    """Until Label Studio has answered it is not known; who waits gets the answer, and it is asked once."""
    opened = threading.Event()
    host.answers[WHOAMI] = gate(opened, fine)
    found = access(host.url)
    assert found.standing(0).state == found.standing(0.05).state == "unknown"
    opened.set()
    assert [found.standing(SOON_S).state for _ in range(3)] == ["accepted"] * 3
    assert len(host.requests) == 1


def test_what_was_found_is_asked_anew_when_it_is_old(host: PictureHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token that is accepted meanwhile is seen."""
    monkeypatch.setattr(module, "BAD_S", 0.0)
    host.answers[WHOAMI] = said(401, detail="Invalid token.")
    found = access(host.url)
    assert found.standing(SOON_S).state == "refused"
    host.answers[WHOAMI] = said(200, id=1)
    assert found.standing(SOON_S).state == "accepted"


def test_first_tasks_are_read_with_the_token_that_was_lent(host: PictureHost) -> None:
    """At LABEL_STUDIO_URL; what is no answer of Label Studio's gives none."""
    host.answers[TASKS] = said(200, tasks=[{"id": 1, "data": {"image": "/data/upload/1/a.png"}}])
    found = access(host.url)
    assert found.first_tasks("7", LENT) == [{"image": "/data/upload/1/a.png"}]
    assert host.authorizations() == [f"Token {LENT}"]
    for answer in (said(401, detail="No."), said(200, tasks=[{"id": 1}]), said(200, other=1), b"[]", 500):
        host.answers[TASKS] = answer
        assert found.first_tasks("7", LENT) is None
    assert found.first_tasks("7", "no token\n") is None


def test_a_standing_is_good_or_bad() -> None:
    """A Label Studio that is away says nothing about the token."""
    assert not Standing("unknown", "").needs_token
    assert not Standing("silent", "").needs_token
