"""One task per request, as Label Studio asks when a task is opened: how long until the answer is there."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from benchmarks.bench import Bench
from benchmarks.load import crowd, summary
from benchmarks.servers import BACKENDS, Backend

WARM_UP = 20


def single(bench: Bench) -> dict[str, Any]:
    """
    Percentiles for each backend and each number of clients.

    All backends run; they are asked in turns, so that a slow minute of the machine hits all of them.
    """
    found: dict[str, Any] = {name: {} for name in BACKENDS}
    with ExitStack() as running:
        backends: dict[str, Backend] = {}
        for name, start in BACKENDS.items():
            backends[name] = running.enter_context(start(bench)).ready()
            _ask(bench, backends[name], WARM_UP, 2)
        for clients in bench.sizes.clients:
            rounds = [
                {name: _ask(bench, backend, bench.sizes.requests, clients) for name, backend in backends.items()}
                for _ in range(bench.sizes.rounds)
            ]
            for name in BACKENDS:
                seconds = [each for turn in rounds for each in turn[name][0]]
                found[name][str(clients)] = summary(seconds, sum(turn[name][1] for turn in rounds))
                bench.say(f"{clients} clients, {name}: p50 {found[name][str(clients)]['p50_ms']} ms")
    return found


def _ask(bench: Bench, backend: Backend, count: int, clients: int) -> tuple[list[float], float]:
    return crowd(backend.port, [backend.call(address) for address in bench.album.addresses(count)], clients)
