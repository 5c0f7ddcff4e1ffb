"""
gunicorn's threads, kept from clients that are slow, and its answers, sent in one piece.

gunicorn 27 waits without end for the rest of a request that has begun, lets a new
connection hold a thread for 5 seconds before it says anything, and lingers in its main
thread, which accepts everybody's connections, for up to 2 seconds with a client that
does not hang up. It sends the head of an answer before its body, and nginx can ask nobody
else for an answer whose head it has from a process that then dies. What is fixed here
holds for plain HTTP: under TLS (``--certfile``) the handshake, the rest of a request and
the taking of an answer are waited for as gunicorn does, and answers go out as it sends them.
"""

from __future__ import annotations

import errno
import math
import signal
import socket
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import gunicorn
from gunicorn.http.errors import ParseException
from gunicorn.workers import gthread

from celestial_backend.errors import SettingsError

OLDEST, TOO_NEW = (26,), (28,)  # of gunicorn, as requirements.txt has it: `Worker` builds on its internals
FIRST_BYTE_S = 0.1  # that a new connection may hold a thread; it goes on without one
REQUEST_S = 30.0  # from a request's first byte to its last
SEND_S = 30.0  # in which a client must have taken what is sent in one piece, as our answers are

MalformedBody = ParseException  # what reading a body may raise: it comes in chunks, and not as HTTP has them


def check_gunicorn() -> None:
    """
    Refuse a gunicorn on which `Worker` would answer no request.

    Raises:
        SettingsError: The one that is installed is too old, or newer than all that were tried.
    """
    if not OLDEST <= gunicorn.version_info < TOO_NEW:
        wanted = f"gunicorn>={OLDEST[0]},<{TOO_NEW[0]}"
        raise SettingsError(
            f"The web server needs {wanted}, and {gunicorn.__version__} is installed."
            f" Install it: {sys.executable} -m pip install '{wanted}'"
        )


class Worker(gthread.ThreadWorker):  # type: ignore[misc]
    """gthread, where a connection holds a thread for a bounded time, and an answer goes out in one piece."""

    @classmethod
    def check_config(cls, cfg: Any, log: Any) -> None:
        """Called by gunicorn's master before it starts a worker; ends it where the worker would answer nobody."""
        try:
            check_gunicorn()
        except SettingsError as error:
            sys.stderr.write(f"{error}\n")
            sys.exit(error.exit_code)
        super().check_config(cfg, log)

    def init_signals(self) -> None:
        """A hang-up of the terminal is the master's to answer: it ends its workers, or lets them go on."""
        super().init_signals()
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def handle(self, conn: Any) -> Any:
        """Serve one request; in a thread of the pool."""
        if not conn.initialized and not conn.data_ready and not conn.wait_for_data(FIRST_BYTE_S):
            return gthread._DEFER
        if not conn.initialized and not isinstance(conn.sock, _Connection):  # later it may be one of TLS
            conn.sock = _Connection(fileno=conn.sock.detach())
        conn.sock.read_until = time.monotonic() + REQUEST_S
        kept = super().handle(conn)
        if kept is False:
            conn.sock.read_until = math.inf  # closing has a limit of its own
            with suppress(OSError):
                conn.close(graceful=True)
        return kept

    def handle_request(self, req: Any, conn: Any) -> Any:
        """Answer one request, in one piece."""
        with conn.sock.in_one_piece() if isinstance(conn.sock, _Connection) else nullcontext():
            return super().handle_request(req, conn)

    def finish_request(self, conn: Any, done: Future[Any]) -> None:
        """Take a connection back; in the main thread."""
        if not done.cancelled() and done.exception() is None and done.result() is False:
            self.nr_conns -= 1  # `handle` has closed it
            return
        super().finish_request(conn, done)


class _Connection(socket.socket):
    """A client's connection, on which nothing is waited for without end."""

    read_until = math.inf
    held: list[bytes] | None = None  # what is to be sent, while it is gathered

    def recv(self, *args: Any) -> bytes:
        left = self.read_until - time.monotonic()
        if left <= 0:
            raise _too_slow()
        with self._within(left):
            return super().recv(*args)

    def sendall(self, *args: Any) -> None:
        if self.held is not None:
            self.held.append(args[0])
            return
        with self._within(SEND_S):
            super().sendall(*args)

    @contextmanager
    def in_one_piece(self) -> Iterator[None]:
        """
        Send at the end what is sent meanwhile, or nothing where it ends in an error.

        What is more than the socket's buffer takes can still be cut off where the process is killed.
        """
        self.held = []
        try:
            yield
            whole = b"".join(self.held)
        finally:
            self.held = None
        if whole:
            self.sendall(whole)

    @contextmanager
    def _within(self, seconds: float) -> Iterator[None]:
        """Wait for the client no longer than so many seconds, and fewer where gunicorn has set fewer."""
        own = self.gettimeout()
        self.settimeout(seconds if own is None else min(seconds, own))
        try:
            yield
        except TimeoutError as error:
            raise _too_slow() from error
        finally:
            self.settimeout(own)


def _too_slow() -> ConnectionResetError:
    return ConnectionResetError(errno.ECONNRESET, "The client was too slow.")  # gunicorn logs no traceback of these
