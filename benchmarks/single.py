"""One task per request, as Label Studio asks when a task is opened: how long until the answer is there."""

from __future__ import annotations

from typing import Any

from benchmarks.bench import Bench
from benchmarks.load import crowd
from benchmarks.servers import BACKENDS

WARM_UP = 20


def single(bench: Bench) -> dict[str, Any]:
    """Percentiles for each backend and each number of clients, beginning with one."""
    found: dict[str, Any] = {}
    for name, start in BACKENDS.items():
        with start(bench) as backend:
            backend.ready()
            calls = [backend.call(address) for address in bench.album.addresses(bench.sizes.requests)]
            crowd(backend.port, calls[:WARM_UP], 2)
            found[name] = {}
            for clients in bench.sizes.clients:
                found[name][str(clients)] = crowd(backend.port, calls, clients)
                bench.say(f"{name}, {clients} clients: p50 {found[name][str(clients)]['p50_ms']} ms")
    return found
