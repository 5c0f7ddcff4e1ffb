"""
Connections whose timeouts are points in time, not spans.

HTTP libraries bound each read, so a server that sends a byte every few seconds may keep
a thread for ever. Here what is given as a timeout is the moment, on the monotonic clock,
by which everything must be over.
"""

from __future__ import annotations

import queue
import socket
import ssl
import threading
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import httpcore

if TYPE_CHECKING:
    import httpx

PART = 4096  # bytes that a socket takes at once, if it takes any: httpcore gives each time the whole span


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


class _TimedStream(httpcore.NetworkStream):
    def __init__(self, stream: httpcore.NetworkStream) -> None:
        self._stream = stream

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, left(timeout, httpcore.ReadTimeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        for start in range(0, len(buffer), PART):
            self._stream.write(buffer[start : start + PART], left(timeout, httpcore.WriteTimeout))

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        seconds = left(timeout, httpcore.ConnectTimeout)
        return _TimedStream(self._stream.start_tls(ssl_context, server_hostname, seconds))

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


class TimedBackend(httpcore.NetworkBackend):
    """Opens connections whose timeouts are points in time; safe to share between threads."""

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
        """A connection to the first of the host's addresses that answers."""
        addresses = self.resolve(host, port, timeout)
        for others, address in zip(range(len(addresses) - 1, -1, -1), addresses, strict=True):
            share = left(timeout, httpcore.ConnectTimeout) / (others + 1)  # one dead address must not eat it all
            try:
                return _TimedStream(self._plain.connect_tcp(address, port, share, local_address, socket_options))
            except (httpcore.ConnectError, httpcore.ConnectTimeout):
                if not others:
                    raise
        raise httpcore.ConnectError(f"{host} has no address")

    def resolve(self, host: str, port: int, deadline: float | None) -> list[str]:
        """
        Every address of a host; asked for in a thread of its own, because the resolver knows no deadline.

        Raises:
            httpcore.ConnectError: The name is not known.
            httpcore.ConnectTimeout: The resolver did not answer in time.
        """
        answers: queue.SimpleQueue[list[str] | OSError | UnicodeError] = queue.SimpleQueue()

        def ask() -> None:
            try:
                found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
                answers.put(list(dict.fromkeys(str(entry[4][0]) for entry in found)))
            except (OSError, UnicodeError) as error:
                answers.put(error)

        threading.Thread(target=ask, daemon=True, name="resolve").start()
        try:
            answer = answers.get(timeout=left(deadline, httpcore.ConnectTimeout))
        except queue.Empty as error:
            raise httpcore.ConnectTimeout from error
        if isinstance(answer, list):
            return answer
        raise httpcore.ConnectError(str(answer)) from answer


def punctual_client(timeout_s: float) -> httpx.Client:
    """A client, with the proxies of the environment, each of whose requests is over in time, redirects included."""
    import httpx

    client = httpx.Client(timeout=timeout_s, follow_redirects=True, event_hooks={"request": [_bound]})
    for transport in (client._transport, *client._mounts.values()):
        if isinstance(transport, httpx.HTTPTransport):
            transport._pool._network_backend = TimedBackend()  # httpx has no public way to choose it
    return client


def _bound(request: httpx.Request) -> None:
    spans = request.extensions["timeout"]
    until = request.extensions.setdefault("deadline", time.monotonic() + spans["read"])
    request.extensions["timeout"] = {**dict.fromkeys(("connect", "read", "write"), until), "pool": spans["pool"]}
