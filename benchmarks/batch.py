"""Many tasks in one request, as Retrieve Predictions asks: how many a second, beside the bare work."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

from benchmarks.bench import Bench
from benchmarks.load import ask
from benchmarks.servers import BACKENDS, Backend, ours, picture_host
from benchmarks.tasks import check
from celestial_backend.demo_servers import HOST
from celestial_backend.settings import Settings

WARM_UP = 64


def batch(bench: Bench) -> dict[str, Any]:
    """Tasks a second from disk and over HTTP: ours and the limit; the peers from disk."""
    count, rounds = bench.sizes.tasks, range(bench.sizes.rounds)
    found: dict[str, Any] = {"disk": {}, "http": {}}
    with picture_host(bench) as host:
        on_host = [f"{host.url}/{name}" for name in bench.album.take(count)]
        for way, addresses, place in (
            ("disk", bench.album.addresses(count), str(bench.album.originals)),
            ("http", on_host, host.url),
        ):
            with ours(bench, CELESTIAL_ALLOWED_HOSTS=HOST) as backend:
                backend.ready().predict(addresses[:WARM_UP])
                found[way]["ours"] = _paces(count, [backend.predict(addresses) for _ in rounds])
            found[way]["limit"] = _limit(bench, place)
            bench.say(f"{way}: ours {found[way]['ours']['per_s']}, limit {found[way]['limit']['per_s']} tasks a second")
    for name, asked in (("stock", _in_one_request), ("tutorial", _one_by_one)):
        addresses = bench.album.addresses(bench.sizes.peer_tasks)
        with BACKENDS[name](bench) as backend:
            backend.ready()
            found["disk"][name] = _paces(len(addresses), [asked(backend, addresses)])
        bench.say(f"{name}: {found['disk'][name]['per_s']} tasks a second")
    return found


def _limit(bench: Bench, place: str) -> dict[str, Any]:
    """A process that does the bare work with as many threads and as large passes as ours."""
    sizes, settings = bench.sizes, Settings()
    numbers = [sizes.tasks, settings.fetch_threads, settings.batch_size, sizes.rounds]
    module = ["benchmarks.peers.bare_batch", place, *numbers, *bench.album.names]
    told = json.loads(bench.run(module, bench.environ()))
    return _paces(sizes.tasks, told["seconds"]) | {"alone_ms": round(told["alone_ms"], 2)}


def _in_one_request(backend: Backend, addresses: Sequence[str]) -> float:
    return backend.predict(addresses)


def _one_by_one(backend: Backend, addresses: Sequence[str]) -> float:
    """Label Studio drops an answer with fewer results than tasks, so each task is asked for alone."""
    started = time.perf_counter()
    for address in addresses:
        check(ask(backend.port, backend.call(address)), 1)
    return time.perf_counter() - started


def _paces(count: int, seconds: Sequence[float]) -> dict[str, Any]:
    return {
        "tasks": count, "seconds": [round(each, 3) for each in seconds], "per_s": round(count / median(seconds), 1),
    }  # fmt: skip
