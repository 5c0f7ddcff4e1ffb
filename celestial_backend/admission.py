"""How many predictions a process takes on: some are worked at side by side, others wait in line, more are refused."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from celestial_backend.errors import BusyError
from celestial_backend.settings import Settings

LINE = 128  # predictions that may wait; each holds one thread of the web server and next to no memory
RETRY_S = 5  # what a refused client is told to wait


class Admission:
    """
    Guards one process; lives as long as it, safe between threads.

    Only predictions pass here: /health, /setup and /webhook are always answered. Large
    requests may take half of the places, so that a single task of somebody who labels
    is never behind a line of them.
    """

    def __init__(self, settings: Settings) -> None:
        self._lock = threading.Lock()
        self._requests, self._bytes = 0, 0
        self._max_requests = settings.threads + LINE
        self._max_bytes = settings.request_max_mb * 1_000_000
        self._small = settings.batch_size
        self._work = threading.Semaphore(settings.threads)
        self._large_work = threading.Semaphore(max(1, settings.threads // 2))

    @contextmanager
    def place(self, size: int) -> Iterator[None]:
        """
        Hold a place for a request, from before its body is read until it is answered.

        Whatever its size, it is let in where the others hold less than CELESTIAL_REQUEST_MAX_MB.

        Args:
            size: Bytes of its body.

        Raises:
            BusyError: Too many requests, or too many bytes, are here already.
        """
        with self._lock:
            if self._requests >= self._max_requests or self._bytes >= self._max_bytes:
                raise BusyError(
                    f"Too many predictions are asked for at once: {self._requests} with {self._bytes / 1e6:.1f} MB are "
                    f"here already. Ask again in {RETRY_S} seconds, or raise WORKERS."
                )
            self._requests += 1
            self._bytes += size
        try:
            yield
        finally:
            with self._lock:
                self._requests -= 1
                self._bytes -= size

    @contextmanager
    def turn(self, tasks: int, until: float) -> Iterator[None]:
        """
        Wait in line for a turn to work, and keep it.

        Args:
            tasks: How many the request asks for.
            until: On the monotonic clock, how long to wait.

        Raises:
            BusyError: No turn came in time.
        """
        with ExitStack() as held:
            for turns in (self._large_work, self._work) if tasks > self._small else (self._work,):
                if not turns.acquire(timeout=max(0.0, until - time.monotonic())):
                    raise BusyError(
                        f"{self._requests} predictions are asked for at once, and this one's turn did not come in time."
                        f" Ask again in {RETRY_S} seconds, or raise WORKERS."
                    )
                held.callback(turns.release)
            yield


class Bench:
    """
    Bounds the pictures that are decoded and prepared at one moment; safe between threads.

    As many as there are cores: more would only take turns, at a cost. And of the largest that
    the settings allow, two; a picture is let in whatever its size where there is no other.
    """

    def __init__(self, settings: Settings, pictures: int | None = None) -> None:
        self._free = threading.Condition()
        self._pictures, self._pixels = 0, 0
        self._max_pictures = pictures or max(2, os.cpu_count() or 2)
        self._max_pixels = 2e6 * settings.image_max_megapixels

    @contextmanager
    def room(self) -> Iterator[Room]:
        """Room for one picture, given back at the end whatever happens."""
        room = Room(self)
        try:
            yield room
        finally:
            if room.pixels is not None:
                self._leave(room.pixels)

    def _enter(self, pixels: int) -> None:
        with self._free:
            while self._pictures and (
                self._pictures >= self._max_pictures or self._pixels + pixels > self._max_pixels
            ):
                self._free.wait()
            self._pictures += 1
            self._pixels += pixels

    def _leave(self, pixels: int) -> None:
        with self._free:
            self._pictures -= 1
            self._pixels -= pixels
            self._free.notify_all()  # the next in line may not fit, and one behind it may


class Room:
    """What one picture holds of the bench."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self.pixels: int | None = None

    def take(self, pixels: int) -> None:
        """Wait until there is room for so many pixels, and hold it; called once, before decoding."""
        self._bench._enter(pixels)
        self.pixels = pixels
