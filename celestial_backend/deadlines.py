"""
Connections whose timeouts are points in time, not spans.

HTTP libraries bound each read, so a server that sends a byte every few seconds may keep
a thread for ever. Here what is given as a timeout is the moment, on the monotonic clock,
by which everything must be over.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import httpcore

if TYPE_CHECKING:
    import httpx


def left(deadline: float | None, late: type[Exception]) -> float:
    """
    Seconds until a moment.

    Raises:
        late: It is past, or there is none.
    """
    seconds = 0.0 if deadline is None else deadline - time.monotonic()
    if seconds <= 0:
        raise late
    return seconds


def timed(stream: httpcore.NetworkStream) -> httpcore.NetworkStream:
    """The same stream, with timeouts that are points in time."""
    return _TimedStream(stream)


class _TimedStream(httpcore.NetworkStream):
    def __init__(self, stream: httpcore.NetworkStream) -> None:
        self._stream = stream

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, left(timeout, httpcore.ReadTimeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, left(timeout, httpcore.WriteTimeout))

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        seconds = left(timeout, httpcore.ConnectTimeout)
        return _TimedStream(self._stream.start_tls(ssl_context, server_hostname, seconds))

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


class _Timed(httpcore.NetworkBackend):
    def __init__(self) -> None:
        self._plain = httpcore.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.NetworkStream:
        seconds = left(timeout, httpcore.ConnectTimeout)
        return timed(self._plain.connect_tcp(host, port, seconds, local_address, socket_options))


def punctual_client(timeout_s: float) -> httpx.Client:
    """A client, with the proxies of the environment, each of whose requests is over in time, redirects included."""
    import httpx

    client = httpx.Client(timeout=timeout_s, follow_redirects=True, event_hooks={"request": [_bound]})
    for transport in (client._transport, *client._mounts.values()):
        if isinstance(transport, httpx.HTTPTransport):
            transport._pool._network_backend = _Timed()  # httpx has no public way to choose it
    return client


def _bound(request: httpx.Request) -> None:
    spans = request.extensions["timeout"]
    until = request.extensions.setdefault("deadline", time.monotonic() + spans["read"])
    request.extensions["timeout"] = {**dict.fromkeys(("connect", "read", "write"), until), "pool": spans["pool"]}
