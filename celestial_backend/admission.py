"""How much a process takes on: predictions are worked at side by side, others wait in line, more are refused."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

from celestial_backend.errors import BusyError
from celestial_backend.settings import Settings

LINE = 128  # predictions that may wait; each holds one thread of the web server and next to no memory
OTHERS_SHARE = 0.1  # of the bytes of predictions, for /setup and /webhook; 10,000 choices have a megabyte
RETRY_S = 5  # what a refused client is told to wait


class Admission:
    """
    Guards one process; lives as long as it, safe between threads.

    Predictions have places of their own: however many wait, /health, /setup and /webhook
    are answered. Where THREADS is 2 or more, large requests may take half of the turns, so
    that a single task of somebody who labels is never behind a line of them.
    """

    def __init__(self, settings: Settings) -> None:
        requests, max_bytes = settings.threads + LINE, settings.request_max_mb * 1_000_000
        self.predictions = Places("predictions", requests, int(max_bytes))
        self.others = Places("answers of /setup and /webhook", requests, int(max_bytes * OTHERS_SHARE))
        self._small = settings.batch_size
        self._work = threading.Semaphore(settings.threads)
        self._large_work = threading.Semaphore(max(1, settings.threads // 2))

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
                        f"{self.predictions.requests} predictions are asked for at once, and this one's turn did not "
                        f"come in time. Ask again in {RETRY_S} seconds, or raise WORKERS."
                    )
                held.callback(turns.release)
            yield


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


class FairPool:
    """
    Threads that requests share fairly; lives as long as the process, safe between threads.

    A thread that is free goes to the request that has the fewest. No request has more than `most`, so
    where there are more threads than that, one that comes later need not wait for an earlier one.
    """

    def __init__(self, most: int, name: str, spare: int = 0) -> None:
        self._most = most
        self._pool = ThreadPoolExecutor(most + spare, thread_name_prefix=name)
        self._lock = threading.Lock()
        self._waiting: list[Share] = []  # those that have work to do
        self._owed = 0  # threads that came free where nobody might have one more

    def share(self) -> Share:
        """What one request has of the threads; lives as long as the request."""
        return Share(self)

    def _add(self, share: Share, call: _Call) -> None:
        with self._lock:
            if not share.calls:
                self._waiting.append(share)
            share.calls.append(call)
        self._pool.submit(self._work)

    def _work(self) -> None:
        with self._lock:
            share = min((one for one in self._waiting if one.running < self._most), key=_running, default=None)
            if share is None:
                self._owed += 1
                return
            future, work, args = share.calls.popleft()
            self._waiting.remove(share)
            if share.calls:
                self._waiting.append(share)  # behind those that have as few
            share.running += 1
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(work(*args))
            except BaseException as error:  # noqa: BLE001 - whoever waits for it gets it
                future.set_exception(error)
        del future, work, args  # else an error and its frames keep each other alive
        with self._lock:
            share.running -= 1
            again, self._owed = self._owed > 0, max(0, self._owed - 1)
        if again:
            self._pool.submit(self._work)


_Call = tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]


class Share:
    """The calls of one request, done by threads that others use too."""

    def __init__(self, pool: FairPool) -> None:
        self._pool = pool
        self.calls: deque[_Call] = deque()
        self.running = 0

    def submit(self, work: Callable[..., Any], *args: Any) -> Future[Any]:
        """Let a thread do it; as `Executor.submit`."""
        future: Future[Any] = Future()
        self._pool._add(self, (future, work, args))
        return future


def _running(share: Share) -> int:
    return share.running
