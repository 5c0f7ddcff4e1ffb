"""
The limit for many tasks: all pictures decoded and preprocessed by threads, forward passes as they come.

Usage: ``python -m benchmarks.peers.bare_batch FOLDER_OR_URL COUNT THREADS CHUNK ROUNDS NAME...``. Prints, as JSON,
the seconds of each round, and the milliseconds in the middle of one picture after the other in one thread.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from itertools import islice
from pathlib import Path
from statistics import median
from urllib.parse import urlsplit

from benchmarks.peers.bare import Bare

ALONE = 100


def main(place: str, numbers: list[int], names: list[str]) -> None:
    """Measure, and print what was found."""
    count, threads, chunk, rounds = numbers
    bare, read = Bare(), _reader(place)
    taken = [names[number % len(names)] for number in range(count)]
    alone = []
    for name in taken[:ALONE]:
        started = time.perf_counter()
        bare.forward([bare.prepare(read(name))])
        alone.append(time.perf_counter() - started)
    with ThreadPoolExecutor(threads) as pool:
        seconds = [_round(bare, pool, read, taken, chunk) for _ in range(rounds + 1)][1:]  # the first warms up
    sys.stdout.write(json.dumps({"seconds": seconds, "alone_ms": median(alone) * 1000}))


def _round(
    bare: Bare, pool: ThreadPoolExecutor, read: Callable[[str], bytes], names: list[str], chunk: int
) -> float:
    started = time.perf_counter()
    prepared = pool.map(lambda name: bare.prepare(read(name)), names)
    done = 0
    while batch := list(islice(prepared, chunk)):
        done += len(bare.forward(batch))
    assert done == len(names)  # noqa: S101 - a picture left out would make it faster
    return time.perf_counter() - started


def _reader(place: str) -> Callable[[str], bytes]:
    """From a folder, or from a web server over one lasting connection for each thread."""
    if not place.startswith("http"):
        folder = Path(place)
        return lambda name: (folder / name).read_bytes()
    host, local = urlsplit(place).netloc, threading.local()

    def fetch(name: str) -> bytes:
        if not hasattr(local, "connection"):
            local.connection = HTTPConnection(host, timeout=30)
        local.connection.request("GET", f"/{name}")
        return bytes(local.connection.getresponse().read())

    return fetch


if __name__ == "__main__":
    main(sys.argv[1], [int(text) for text in sys.argv[2:6]], sys.argv[6:])
