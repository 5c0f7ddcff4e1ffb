"""A model that was learned from labels: one task, and a whole project, with pictures seen before and new ones."""

from __future__ import annotations

import itertools
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.album import drawn, label_folders
from benchmarks.bench import Bench
from benchmarks.label_studio import LabelStudio
from benchmarks.load import crowd, summary
from benchmarks.packages import cache_folder
from benchmarks.servers import Backend, bare_head, constant, ours
from benchmarks.studio import in_turns

TAUGHT = 80  # pictures that the model learns from
WARM_UP = 20
SEEN = 50  # pictures of single tasks whose features are known


def learned(bench: Bench) -> dict[str, Any]:
    """
    Percentiles of one task, and seconds of *Retrieve Predictions*, with features known and not.

    A picture is new to a backend that never saw its bytes, so the same pictures come with other last bytes.
    """
    store = bench.folder / "learned-bentoml"
    labels = label_folders(bench.folder / "labels", drawn(cache_folder() / "benchmark-pictures", TAUGHT))
    bench.run(
        ["celestial_backend", "train", labels],
        bench.environ(BENTOML_HOME=store, MODEL_DIR=bench.folder / "learned-state"),
    )
    return {"single": _single(bench, store), "studio": _studio(bench, store)}


def _single(bench: Bench, store: Path) -> dict[str, Any]:
    """One client, asking in turns, so that a slow minute of the machine hits all."""
    rounds, each = bench.sizes.rounds, bench.sizes.requests
    new = iter(bench.album.variants("3", WARM_UP + SEEN + rounds * each))
    with ExitStack() as running:
        mine = running.enter_context(ours(bench, BENTOML_HOME=store)).ready()
        limit = running.enter_context(bare_head(bench, store)).ready()

        def ask(backend: Backend, addresses: list[str]) -> tuple[list[float], float]:
            return crowd(backend.port, [backend.call(address) for address in addresses], 1)

        for backend in (mine, limit):
            ask(backend, bench.album.addresses(WARM_UP))
        ask(mine, list(itertools.islice(new, WARM_UP)))
        seen = list(itertools.islice(new, SEEN))
        ask(mine, seen)
        found: dict[str, list[tuple[list[float], float]]] = {"ours, new": [], "limit": [], "ours, known": []}
        for _ in range(rounds):
            addresses = list(itertools.islice(new, each))
            found["ours, new"].append(ask(mine, addresses))
            found["limit"].append(ask(limit, addresses))
            found["ours, known"].append(ask(mine, [*itertools.islice(itertools.cycle(seen), each)]))
    summed = {
        name: summary([second for seconds, _ in turns for second in seconds], sum(total for _, total in turns))
        for name, turns in found.items()
    }
    for name, told in summed.items():
        bench.say(f"one task, {name}: p50 {told['p50_ms']} ms")
    return summed


def _studio(bench: Bench, store: Path) -> dict[str, Any]:
    """A project of Label Studio; its pictures lie on a disk here."""
    count, rounds = bench.sizes.tasks, bench.sizes.studio_rounds
    addresses = bench.album.variants("4", count * (rounds + 1))
    with LabelStudio(bench) as label_studio, constant(bench) as instant, ours(bench, BENTOML_HOME=store) as mine:
        mine.ready().predict(addresses[:count])

        def retrieve(url: str, title: str) -> dict[str, float]:
            way, number = title.split()
            start = count * (1 + int(number)) if way == "new" else 0
            project = label_studio.project(title, addresses[start : start + count], url)
            seconds = label_studio.retrieve(project)
            label_studio.see_predictions(project, count)
            return {"s": seconds}

        ways = {
            "constant": lambda title: retrieve(instant.url, title),
            "new": lambda title: retrieve(mine.url, title),
            "known": lambda title: retrieve(mine.url, title),
        }
        return {"tasks": count, **in_turns(ways, rounds, bench.say)}
