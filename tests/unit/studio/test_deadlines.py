"""Requests that are over in time, whatever the name service, the network and the server do."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from celestial_backend.studio import client
from celestial_backend.studio.client import punctual_client
from tests.support.picture_host import PictureHost, picture_host

SPAN_S = 60.0


class Clock:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(client, "time", made)
    return made


@pytest.fixture
def host() -> Iterator[PictureHost]:
    with picture_host() as server:
        yield server


def test_a_name_service_that_hangs_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """It knows no limit of its own."""
    stop = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: stop.wait(10) and [])
    with pytest.raises(httpx.ConnectTimeout):
        punctual_client(0.2).get("http://slow.example/")
    stop.set()


def test_a_name_that_nobody_knows_is_no_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """As httpx says it, so that those who look after errors know it."""

    def unknown(*_: Any, **__: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(httpx.ConnectError, match="Name or service not known"):
        punctual_client(SPAN_S).get("http://nowhere.example/")


def test_dead_addresses_share_the_time(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of a host's addresses is tried, and all of them in the time of one request."""
    addresses = [f"127.0.0.{number}" for number in range(1, 5)]
    resolve = socket.getaddrinfo

    def getaddrinfo(name: Any, port: int, *rest: Any, **options: Any) -> Any:
        if name != "dead.example":
            return resolve(name, port, *rest, **options)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

    asked: list[str] = []

    def connect(self: socket.socket, address: tuple[str, int]) -> None:
        asked.append(address[0])
        clock.now += self.gettimeout() or 0
        raise TimeoutError

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(socket.socket, "connect", connect)
    start = clock.now
    with pytest.raises(httpx.ConnectTimeout):
        punctual_client(SPAN_S).get("http://dead.example/")
    assert asked == addresses
    assert clock.now == pytest.approx(start + SPAN_S)


def test_a_server_that_takes_a_body_by_drops_gets_no_more_time(
    clock: Clock, host: PictureHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time is for the whole body, not for each part of it that the server takes."""
    sent: list[int] = []

    def send(_self: socket.socket, data: bytes) -> int:
        clock.now += 1
        sent.append(min(len(data), 1000))
        return sent[-1]

    monkeypatch.setattr(socket.socket, "send", send)
    with pytest.raises(httpx.WriteTimeout):
        punctual_client(SPAN_S).post(host.url, content=b"x" * 1_000_000)
    assert len(sent) < SPAN_S + 10
