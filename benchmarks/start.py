"""How long a backend takes from its start to its first answer of /setup, and to its first prediction."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

from benchmarks.bench import Bench
from benchmarks.servers import Backend, ours, stock, tutorial


def start(bench: Bench) -> dict[str, Any]:
    """The middle of some starts; "first" is ours with nothing there yet, neither state nor model store."""
    ways: dict[str, Callable[[Bench], Backend]] = {
        "ours": ours,
        "first": lambda bench: ours(bench, BENTOML_HOME=_fresh(bench)),
        "stock": stock,
        "tutorial": tutorial,
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(bench.sizes.rounds):
        for name, way in ways.items():
            with way(bench) as backend:
                times[name].append((backend.until_setup(), backend.until_prediction()))
    found = {}
    for name, answers in times.items():
        setup_s, predict_s = (median(column) for column in zip(*answers, strict=True))
        found[name] = {"setup_s": round(setup_s, 3), "predict_s": round(predict_s, 3)}
        bench.say(f"{name}: /setup after {setup_s:.2f} s, a prediction after {predict_s:.2f} s")
    return found


def _fresh(bench: Bench) -> str:
    number = sum(1 for _ in bench.folder.glob("fresh-store-*"))
    folder = bench.folder / f"fresh-store-{number}"
    folder.mkdir()
    return str(folder)
