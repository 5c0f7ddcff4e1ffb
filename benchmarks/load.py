"""Clients that ask a backend, each over a new connection for each request, as Label Studio does."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPConnection

from benchmarks.bench import BenchmarkError
from celestial_backend.commands.demo import HOST

HEADERS = {"Content-Type": "application/json", "User-Agent": "heartex/benchmark"}


@dataclass(frozen=True)
class Call:
    """One request to be made: a POST of a body to a path."""

    path: str
    body: bytes


def ask(port: int, call: Call, timeout: float = 300) -> bytes:
    """
    The body of an answer.

    Raises:
        BenchmarkError: The status is not 200.
        OSError: There was no answer.
    """
    connection = HTTPConnection(HOST, port, timeout=timeout)
    try:
        connection.request("POST", call.path, call.body, HEADERS)
        answer = connection.getresponse()
        body = answer.read()
    finally:
        connection.close()
    if answer.status != 200:
        raise BenchmarkError(f"POST {call.path} must be answered with 200, got {answer.status}: {body[:300]!r}")
    return body


def crowd(port: int, calls: Sequence[Call], clients: int) -> tuple[list[float], float]:
    """The seconds of each call, and of all together, made by so many clients that each wait for their answer."""
    left, lock, seconds = iter(calls), threading.Lock(), list[float]()

    def client(_: int) -> None:
        while True:
            with lock:
                call = next(left, None)
            if call is None:
                return
            started = time.perf_counter()
            ask(port, call)
            seconds.append(time.perf_counter() - started)

    started = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(client, range(clients)))
    return seconds, time.perf_counter() - started


def summary(seconds: Sequence[float], total_s: float) -> dict[str, float]:
    """Percentiles in milliseconds, and calls in a second."""
    shares = {"p50_ms": 0.5, "p95_ms": 0.95, "p99_ms": 0.99}
    return {
        **{name: round(percentile(seconds, share) * 1000, 2) for name, share in shares.items()},
        "calls": len(seconds), "per_s": round(len(seconds) / total_s, 2),
    }  # fmt: skip


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of the values do not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]
