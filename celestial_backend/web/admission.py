"""How much a process takes on: some batches are predicted side by side, others wait in line, more are refused."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from celestial_backend.errors import BusyError
from celestial_backend.settings import Settings

LINE = 128  # predictions that may wait; each holds one thread of the web server and next to no memory
OTHERS_SHARE = 0.1  # of the bytes of predictions, for /setup and /webhook; 10,000 choices have a megabyte
RETRY_S = 5  # what a refused client is told to wait


class Admission:
    """
    Guards one process; lives as long as it, safe between threads.

    Predictions have places of their own: however many wait, /health, /setup and /webhook
    are answered. Batches wait in line for one of THREADS turns. A single task takes none,
    so somebody who labels never waits behind batches.
    """

    def __init__(self, settings: Settings) -> None:
        requests, max_bytes = settings.threads + LINE, settings.request_max_mb * 1_000_000
        self.predictions = Places("predictions", requests, int(max_bytes))
        self.others = Places("answers of /setup and /webhook", requests, int(max_bytes * OTHERS_SHARE))
        self._turns = threading.Semaphore(settings.threads)

    @contextmanager
    def turn(self, tasks: int, until: float) -> Iterator[None]:
        """
        Wait in line for a turn to work, and keep it; a single task goes on at once.

        Args:
            tasks: How many the request asks for.
            until: On the monotonic clock, how long to wait.

        Raises:
            BusyError: No turn came in time.
        """
        if tasks <= 1:
            yield
            return
        if not self._turns.acquire(timeout=max(0.0, until - time.monotonic())):
            raise BusyError(
                f"{self.predictions.requests} predictions are asked for at once, and this one's turn did not "
                f"come in time. Ask again in {RETRY_S} seconds, or raise WORKERS."
            )
        try:
            yield
        finally:
            self._turns.release()


class Places:
    """
    Bounds the requests of one kind and the bytes of their bodies; safe between threads.

    Bytes count as they come. All that are here together have less than twice `max_bytes`,
    which one request may have.
    """

    def __init__(self, kind: str, max_requests: int, max_bytes: int) -> None:
        self.requests, self.bytes, self.max_bytes = 0, 0, max_bytes
        self._lock = threading.Lock()
        self._kind, self._max_requests = kind, max_requests

    @contextmanager
    def place(self) -> Iterator[Place]:
        """
        Hold a place for a request, from before its body is read until it is answered.

        Raises:
            BusyError: Too many requests, or too many bytes, are here already.
        """
        place = Place(self)
        self._add(requests=1)
        try:
            yield place
        finally:
            with self._lock:
                self.requests -= 1
                self.bytes -= place.bytes

    def _add(self, requests: int = 0, size: int = 0, own: int = 0) -> None:
        """Let in a request, or more bytes of one that has its own; whatever their number, where others have few."""
        with self._lock:
            if self.requests + requests > self._max_requests or self.bytes - own >= self.max_bytes:
                raise BusyError(
                    f"Too many {self._kind} are asked for at once: {self.requests} with {self.bytes / 1e6:.1f} MB are "
                    f"here already. Ask again in {RETRY_S} seconds, or raise WORKERS."
                )
            self.requests += requests
            self.bytes += size


class Place:
    """What one request holds of the places."""

    def __init__(self, places: Places) -> None:
        self._places = places
        self.bytes = 0

    def take(self, size: int) -> None:
        """
        Count bytes of the body that have come.

        Raises:
            BusyError: The other requests have as many as one may have.
        """
        self._places._add(size=size, own=self.bytes)
        self.bytes += size
