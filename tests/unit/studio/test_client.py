"""Studio: which header opens Label Studio, and how seldom it is fetched."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import urlsplit

import jwt
import pytest

from celestial_backend.errors import FetchError, StudioError
from celestial_backend.pictures.download import Downloader
from celestial_backend.settings import Settings
from celestial_backend.studio.client import Studio, localhost_hint, moment
from celestial_backend.studio.project import StudioProject
from tests.support.picture_host import PictureHost, dripping, picture_host, redirect

LEGACY = "abcdef0123456789abcdef0123456789abcdef01"
REFRESH = "/api/token/refresh/"
SECRET = "a secret of thirty-two letters, or more"


def token(kind: str, life_s: float, number: int = 0) -> str:
    """A token with the claims that Label Studio 1.23.2 puts into its own."""
    now = int(time.time())
    claims = {"token_type": kind, "exp": now + life_s, "iat": now, "jti": f"{number:032x}", "user_id": "1"}
    return jwt.encode(claims, SECRET)


PAT = token("refresh", 1e9)


@pytest.fixture
def host() -> Iterator[PictureHost]:
    with picture_host() as server:
        yield server


def issuing(host: PictureHost, life_s: float = 300, delay_s: float = 0) -> Callable[[BaseHTTPRequestHandler], None]:
    """Answers as /api/token/refresh/ does, with another token each time."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        time.sleep(delay_s)
        body = f'{{"access": "{token("access", life_s, refreshes(host))}"}}'.encode()
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)
        handler.close_connection = False  # as HTTP/1.1 says where no header says otherwise

    return answer


def refreshes(host: PictureHost) -> int:
    return sum(path.endswith(REFRESH) for path, _ in host.requests)


def studio(host: PictureHost, key: str | None = PAT, path: str = "", **limits: float) -> Studio:
    return Studio(Settings(label_studio_url=host.url + path, label_studio_api_key=key), **limits)


def test_legacy_token(host: PictureHost) -> None:
    """A legacy token is sent as it is; without a key there is no header; nobody is asked for either."""
    assert studio(host, LEGACY).authorization() == {"Authorization": f"Token {LEGACY}"}
    assert studio(host, None).authorization() == {}
    assert studio(host, LEGACY).url == host.url
    assert host.requests == []


@pytest.mark.parametrize("path", ["", "/label-studio"])
def test_personal_access_token(host: PictureHost, path: str) -> None:
    """A personal access token buys a bearer token, under Label Studio's sub-path too, and is never sent itself."""
    host.answers[path + REFRESH] = issuing(host)
    header = studio(host, path=path).authorization()["Authorization"]
    kind, _, bought = header.partition(" ")
    assert kind == "Bearer"
    assert jwt.decode(bought, options={"verify_signature": False})["token_type"] == "access"
    assert [asked for asked, _ in host.requests] == [path + REFRESH]


def test_refreshed_once_for_all_threads(host: PictureHost) -> None:
    """Many threads share one exchange, and later calls use its result."""
    host.answers[REFRESH] = issuing(host, delay_s=0.1)
    shared = studio(host)
    with ThreadPoolExecutor(16) as threads:
        headers = list(threads.map(lambda _: shared.authorization()["Authorization"], range(64)))
    assert len(set(headers)) == 1
    assert refreshes(host) == 1


def test_refreshed_when_it_ran_out(host: PictureHost) -> None:
    """A token that has run out is replaced."""
    host.answers[REFRESH] = issuing(host, life_s=-1)
    shared = studio(host)
    assert shared.authorization() != shared.authorization()
    assert refreshes(host) == 2


def test_a_connection_closed_for_idleness_costs_nothing(host: PictureHost) -> None:
    """Label Studio closes the connection that the last renewal left open: the next one opens another."""
    renew, asked = issuing(host, life_s=-1), []

    def once_silent(handler: BaseHTTPRequestHandler) -> None:
        asked.append(handler)
        if len(asked) == 2:
            return  # and the connection is closed
        renew(handler)

    host.answers[REFRESH] = once_silent
    shared = studio(host)
    assert shared.authorization() != shared.authorization()
    assert len(asked) >= 3


def test_forget(host: PictureHost) -> None:
    """A refused access token is dropped once, however many threads report it; a legacy token stays."""
    host.answers[REFRESH] = issuing(host)
    shared = studio(host)
    old = shared.authorization()
    assert shared.forget(old)
    new = shared.authorization()
    assert new != old
    assert shared.forget(old)
    assert shared.authorization() == new
    assert not studio(host, LEGACY).forget({"Authorization": f"Token {LEGACY}"})


def test_a_stale_token_costs_no_picture(host: PictureHost) -> None:
    """Label Studio refuses an access token early (its clock is ahead): a new one is bought, and the picture read."""
    host.answers[REFRESH] = issuing(host)

    def once(handler: BaseHTTPRequestHandler) -> None:
        asked = [headers.get("Authorization") for path, headers in host.requests if path == "/data/upload/1/a.jpg"]
        handler.wfile.write(
            b"HTTP/1.1 401 No\r\nContent-Length: 0\r\n\r\n"
            if handler.headers["Authorization"] == asked[0]
            else b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nhere"
        )

    host.answers["/data/upload/1/a.jpg"] = once
    settings = Settings(label_studio_url=host.url, label_studio_api_key=PAT)
    assert Downloader(settings, Studio(settings)).get(f"{host.url}/data/upload/1/a.jpg") == b"here"
    assert refreshes(host) == 2
    host.answers["/data/upload/1/a.jpg"] = 401
    with pytest.raises(FetchError, match="the token is wrong or was withdrawn"):
        Downloader(settings, Studio(settings)).get(f"{host.url}/data/upload/1/a.jpg")


def said(what: Studio) -> str:
    with pytest.raises(StudioError) as raised:
        what.authorization()
    assert PAT not in str(raised.value)
    return str(raised.value)


def test_refused(host: PictureHost) -> None:
    """A token that Label Studio does not know, with the words it says (1.23.2), and what to do."""
    host.answers[REFRESH] = (401, {}, b'{"status_code": 401, "version": "1.23.2", "detail": "Token is invalid"}')
    assert said(studio(host)) == (
        f"Label Studio at {host.url} refused the personal access token (Token is invalid)."
        " Make a new one under Account & Settings and set LABEL_STUDIO_API_KEY to it."
    )


def test_expired_token(host: PictureHost) -> None:
    """A personal access token past its date is known without asking."""
    assert "refused the personal access token (API key has expired" in said(studio(host, token("refresh", -5)))
    assert host.requests == []


@pytest.mark.parametrize("body", [b"<html>", b"[]", b'{"token": 1}', b""])
def test_something_else_answers(host: PictureHost, body: bytes) -> None:
    """A server that is not Label Studio is said so."""
    host.answers[REFRESH] = body
    assert said(studio(host)) == (
        f"What answers at {host.url} is not Label Studio: it gave no access token. Check LABEL_STUDIO_URL."
    )


def test_other_statuses(host: PictureHost) -> None:
    """Any other status points at the address."""
    host.answers[REFRESH] = (404, {}, b"{}")
    assert said(studio(host)) == (
        f"Label Studio at {host.url} answered 404 when asked for an access token."
        " Check LABEL_STUDIO_URL, sub-path included."
    )


def test_nobody_there() -> None:
    """A Label Studio that is down is said so, with the classic of containers; a password in its address is not."""
    with picture_host() as gone:
        url = gone.url
    text = said(Studio(Settings(label_studio_url=url.replace("//", "//me:s3cret@"), label_studio_api_key=PAT)))
    assert text.startswith(f"Label Studio cannot be reached at {url} (ConnectError).")
    assert "Inside a container localhost is the container itself" in text
    assert "s3cret" not in text


def test_too_slow(host: PictureHost) -> None:
    """A Label Studio that does not answer is left after a while."""
    host.answers[REFRESH] = issuing(host, delay_s=1)
    assert "must answer within 0.2 seconds and did not" in said(studio(host, refresh_s=0.2))


@pytest.mark.parametrize("start", [b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n", b"HTTP/1.1 200 OK\r\nX: "])
def test_a_token_that_drips_is_not_waited_for(host: PictureHost, start: bytes) -> None:
    """A byte now and then stretches no limit, for those who wait for the same token neither."""
    host.answers[REFRESH] = dripping(0.1, start)
    shared, started = studio(host, refresh_s=0.5), time.monotonic()
    with ThreadPoolExecutor(4) as threads:
        told = set(threads.map(lambda _: said(shared), range(4)))
    assert time.monotonic() - started < 5
    assert len(told) == 1
    assert "must answer within 0.5 seconds and did not" in told.pop()


def test_a_failure_is_remembered_for_a_while(host: PictureHost) -> None:
    """A batch of pictures does not knock a thousand times; later it is tried again."""
    host.answers[REFRESH] = (401, {}, b"{}")
    shared, forgetful = studio(host), studio(host, failure_kept_s=0)
    assert len({said(shared) for _ in range(5)}) == 1
    assert refreshes(host) == 1
    assert said(forgetful) == said(shared)
    host.answers[REFRESH] = issuing(host)
    assert forgetful.authorization()["Authorization"].startswith("Bearer ")
    assert said(shared)


@pytest.mark.parametrize("key", ["Token abc", "ключ", "a\nb"])
def test_keys_that_cannot_be(host: PictureHost, key: str) -> None:
    """A key with blanks or foreign letters is a copying mistake, not a header."""
    assert said(studio(host, key)).startswith("LABEL_STUDIO_API_KEY must be the token alone")


def test_an_address_is_needed() -> None:
    """A personal access token without LABEL_STUDIO_URL cannot be exchanged."""
    assert said(Studio(Settings(label_studio_api_key=PAT))).endswith("Set LABEL_STUDIO_URL.")


def test_localhost_hint() -> None:
    """Only this machine's own names call for the hint."""
    assert localhost_hint("http://localhost:8080") != ""
    assert localhost_hint("http://label-studio:8080") == ""


def test_moments_compare_as_time_goes() -> None:
    """Label Studio writes no fraction for whole seconds, and may write another zone; what is no moment came first."""
    texts = ["", "2026-01-01T00:00:00Z", "2026-01-01T00:00:00.000001Z", "2026-01-01T01:00:00.5+01:00"]
    texts += ["2026-01-01T00:00:01", "2026-01-01T00:00:01.250000Z"]
    backwards = texts[::-1]
    assert sorted(backwards, key=moment) == texts
    assert moment(None) < moment(texts[1])


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("key", [PAT, LEGACY])
@pytest.mark.parametrize("kind", ["port", "scheme", "user", "path"])
def test_no_redirect_takes_the_token_elsewhere(host: PictureHost, status: int, key: str, kind: str) -> None:
    """Neither a renewal nor a call of the API follows to another place; the sentence says what to set instead."""
    with picture_host() as other:
        base = {"port": other.url, "scheme": other.url.replace("http:", "https:"), "path": f"{other.url}/ls",
                "user": other.url.replace("//", "//user:s3cret@")}[kind]  # fmt: skip

        def moved(handler: BaseHTTPRequestHandler) -> None:
            head = f"HTTP/1.1 {status} Moved\r\nLocation: {base}{handler.path}\r\nContent-Length: 0\r\n\r\n"
            handler.wfile.write(head.encode())

        host.other = moved
        project = StudioProject(studio(host, key), "1", patience_s=0)
        for ask in (studio(host, key).authorization, project.label_config) if key == PAT else (project.label_config,):
            with pytest.raises(StudioError) as raised:
                ask()
            said = str(raised.value)
            shown = base.replace("user:s3cret@", "")
            assert said.endswith(f" If Label Studio is at {shown}, set LABEL_STUDIO_URL to that."), said
            assert "s3cret" not in said
        assert host.requests
        assert other.requests == []


def test_a_redirect_within_label_studio_is_followed(host: PictureHost) -> None:
    """Such as one to the same address with a slash at its end."""
    host.answers["/api/projects/1/"] = (
        200, {"Content-Type": "application/json"}, b'{"id": 1, "label_config": "<View/>"}'
    )  # fmt: skip
    host.other = redirect("/api/projects/1/", 307)
    assert StudioProject(studio(host, LEGACY), "1", patience_s=0).label_config() == "<View/>"


def connections_to(url: str) -> int:
    """How many connections to an address of this machine are open at the end that has asked for them."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(row[2].endswith(f":{urlsplit(url).port:04X}") and row[3] == "01" for row in rows)


@pytest.mark.parametrize("key", [PAT, LEGACY])
def test_no_connection_stays_open_that_nobody_uses(host: PictureHost, key: str) -> None:
    """However often Label Studio is asked; garbage that is never collected does not matter."""

    def project(handler: BaseHTTPRequestHandler) -> None:
        body = b'{"id": 1, "label_config": "<View/>"}'
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 36\r\n\r\n" + body)
        handler.close_connection = False

    host.answers |= {REFRESH: issuing(host), "/api/projects/1/": project}
    gc.disable()
    try:
        for _ in range(3):
            asked = StudioProject(studio(host, key), "1", patience_s=0)
            assert asked.label_config() == "<View/>"
            assert connections_to(host.url) == 1
            del asked
            assert studio(host, key).ask("a project", lambda client: client.projects.get(1)).id == 1
        shared = studio(host, key)
        assert shared.authorization()
        shared.forget(shared.authorization())
        assert connections_to(host.url) == 0
    finally:
        gc.enable()
