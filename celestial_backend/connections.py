"""
gunicorn's threads, kept from clients that are slow.

gunicorn 26 waits without end for the rest of a request that has begun, lets a new
connection hold a thread for 5 seconds before it says anything, and lingers in its main
thread, which accepts everybody's connections, for up to 2 seconds with a client that
does not hang up.
"""

from __future__ import annotations

import errno
import math
import socket
import time
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

from gunicorn.workers import gthread

FIRST_BYTE_S = 0.1  # that a new connection may hold a thread; it goes on without one
REQUEST_S = 30.0  # from a request's first byte to its last
SILENT_S = 30.0  # that a client may take nothing of its answer


class Worker(gthread.ThreadWorker):  # type: ignore[misc]
    """gthread, where a connection holds a thread for a bounded time."""

    def handle(self, conn: Any) -> Any:
        """Serve one request; in a thread of the pool."""
        if not conn.initialized and not conn.data_ready and not conn.wait_for_data(FIRST_BYTE_S):
            return gthread._DEFER
        if not isinstance(conn.sock, _Connection):
            conn.sock = _Connection(fileno=conn.sock.detach())
        conn.sock.read_until = time.monotonic() + REQUEST_S
        kept = super().handle(conn)
        if kept is False:
            with suppress(OSError):
                conn.close(graceful=True)
        return kept

    def finish_request(self, conn: Any, done: Future[Any]) -> None:
        """Take a connection back; in the main thread."""
        if not done.cancelled() and done.exception() is None and done.result() is False:
            self.nr_conns -= 1  # `handle` has closed it
            return
        super().finish_request(conn, done)


class _Connection(socket.socket):
    """A client's connection, on which nothing is waited for without end."""

    read_until = math.inf

    def recv(self, *args: Any) -> bytes:
        left = self.read_until - time.monotonic()
        if left <= 0:
            raise _too_slow()
        self.settimeout(left)
        try:
            return super().recv(*args)
        except TimeoutError as error:
            raise _too_slow() from error

    def sendall(self, *args: Any) -> None:
        self.settimeout(SILENT_S)
        try:
            super().sendall(*args)
        except TimeoutError as error:
            raise _too_slow() from error


def _too_slow() -> ConnectionResetError:
    return ConnectionResetError(errno.ECONNRESET, "The client was too slow.")  # gunicorn logs no traceback of these
