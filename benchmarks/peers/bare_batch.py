"""
The limit for many tasks: all pictures decoded and preprocessed by threads, forward passes as they come.

Usage: ``python -m benchmarks.peers.bare_batch FOLDER_OR_URL THREADS CHUNK NAME...``. Prints the milliseconds in
the middle of one picture after the other in one thread; then, for each line on its standard input, the seconds of
all pictures.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from itertools import islice
from pathlib import Path
from statistics import median
from urllib.parse import urlsplit

from benchmarks.peers.bare import Bare

ALONE = 100


def main(place: str, threads: int, chunk: int, names: Sequence[str]) -> None:
    """Measure when told to."""
    bare, read = Bare(), _reader(place)
    alone = []
    for name in names[:ALONE]:
        started = time.perf_counter()
        bare.forward([bare.prepare(read(name))])
        alone.append(time.perf_counter() - started)
    with ThreadPoolExecutor(threads) as pool:
        _round(bare, pool, read, names, chunk)  # the first is slower, and counts nowhere
        _say(median(alone) * 1000)
        for _ in sys.stdin:
            _say(_round(bare, pool, read, names, chunk))


def _round(
    bare: Bare, pool: ThreadPoolExecutor, read: Callable[[str], bytes], names: Sequence[str], chunk: int
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


def _say(number: float) -> None:
    sys.stdout.write(f"{number}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
