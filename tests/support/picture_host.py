"""A web server on this machine that gives the answers a test wants and remembers what it was asked."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Answer = bytes | int | tuple[int, dict[str, str], bytes] | Callable[[BaseHTTPRequestHandler], None]


class PictureHost:
    """
    Answers by path and query, exactly as sent; `other` for every other, 404 unless it is set.

    An answer is a body, a status, (status, headers, body), or a function that writes
    to the handler itself.
    """

    def __init__(self, address: str = "127.0.0.1", port: int = 0) -> None:
        self.answers: dict[str, Answer] = {}
        self.other: Answer = 404
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.connections = 0
        self._server = _Server((address, port), _Handler)
        self._server.host = self
        self.port = self._server.server_port
        self.url = f"http://{address}:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        with contextlib.suppress(OSError):
            self._server.socket.shutdown(socket.SHUT_RDWR)  # wakes the thread, which else looks every 20 ms
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def authorizations(self) -> list[str | None]:
        """The Authorization header of every request, in their order."""
        return [headers.get("Authorization") for _, headers in self.requests]


@contextmanager
def picture_host(address: str = "127.0.0.1", port: int = 0) -> Iterator[PictureHost]:
    host = PictureHost(address, port)
    try:
        yield host
    finally:
        host.stop()


def redirect(location: str, status: int = 302) -> Answer:
    return (status, {"Location": location}, b"")


def dripping(pause_s: float, start: bytes = b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n") -> Answer:
    """A start, and then a byte after each pause, until nobody listens."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(start)
        with contextlib.suppress(OSError):
            for _ in range(1000):
                time.sleep(pause_s)
                handler.wfile.write(b" ")

    return answer


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64
    host: PictureHost

    def handle_error(self, *_: object) -> None:
        return  # clients that hang up early are what is tested


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def setup(self) -> None:
        super().setup()
        self.server.host.connections += 1

    def do_GET(self) -> None:
        host = self.server.host
        host.requests.append((self.path, dict(self.headers.items())))
        answer = host.answers.get(self.path, host.other)
        if callable(answer):
            self.close_connection = True
            answer(self)
            return
        if isinstance(answer, bytes):
            answer = (200, {}, answer)
        elif isinstance(answer, int):
            answer = (answer, {}, b"")
        status, headers, body = answer
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.do_GET()

    def log_message(self, *_: object) -> None:
        return
