"""Many tasks in one request, as Retrieve Predictions asks: how many a second, beside the bare work."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any

from benchmarks.bench import Bench
from benchmarks.load import ask
from benchmarks.servers import BACKENDS, Backend, BareBatch, ours, picture_host
from benchmarks.tasks import check
from celestial_backend.commands.demo import HOST

WARM_UP = 64
Ways = Mapping[str, Callable[[], float]]  # by a backend's name, what measures once, in seconds


def batch(bench: Bench) -> dict[str, Any]:
    """
    Tasks a second from disk and over HTTP: ours and the limit, in turns; the peers from disk.

    The limit is the bare work in one process, with as many threads and as large forward passes as ours.
    """
    found: dict[str, Any] = {"disk": {}, "http": {}}
    with picture_host(bench) as host:
        names = bench.album.take(bench.sizes.tasks)
        on_host = [f"{host.url}/{name}" for name in names]
        for way, addresses, place in (
            ("disk", bench.album.addresses(len(names)), str(bench.album.originals)),
            ("http", on_host, host.url),
        ):
            with ours(bench, CELESTIAL_ALLOWED_HOSTS=HOST) as backend, BareBatch(bench, place, names) as bare:
                backend.ready().predict(addresses[:WARM_UP])
                ways: Ways = {"ours": partial(backend.predict, addresses), "limit": bare.round}
                found[way] = _in_turns(bench, len(names), ways)
                found[way]["limit"]["alone_ms"] = bare.alone_ms
            bench.say(f"{way}: ours {found[way]['ours']['per_s']}, limit {found[way]['limit']['per_s']} tasks a second")
    addresses = bench.album.addresses(bench.sizes.peer_tasks)
    with BACKENDS["stock"](bench) as stock, BACKENDS["tutorial"](bench) as tutorial:
        stock.ready()
        tutorial.ready()
        ways = {"stock": partial(stock.predict, addresses), "tutorial": partial(_one_by_one, tutorial, addresses)}
        found["disk"] |= _in_turns(bench, len(addresses), ways)
    return found


def _in_turns(bench: Bench, count: int, ways: Ways) -> dict[str, Any]:
    """Each way once in every round, so that a slow minute of the machine hits all of them."""
    rounds = [{name: way() for name, way in ways.items()} for _ in range(bench.sizes.rounds)]
    return {name: _paces(count, [turn[name] for turn in rounds]) for name in ways}


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
