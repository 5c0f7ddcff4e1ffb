"""A whole project on a real Label Studio: *Retrieve Predictions* and ``prelabel``, beside constant predictions."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

from benchmarks.bench import Bench
from benchmarks.label_studio import LabelStudio
from benchmarks.servers import constant, ours
from celestial_backend.settings import Settings


def studio(bench: Bench) -> dict[str, Any]:
    """
    Seconds of every round, for as many tasks.

    The backend that answers with constants shows what Label Studio takes for itself, and "serving" what it
    takes to hand out the pictures. The ways take turns, so that a slow minute of the machine hits all of them.
    """
    count = bench.sizes.tasks
    found: dict[str, Any] = {"tasks": count}
    with LabelStudio(bench) as label_studio:
        reach: dict[str, object] = {"LABEL_STUDIO_URL": label_studio.url, "LABEL_STUDIO_API_KEY": label_studio.token}
        # An empty value counts as unset: then pictures come over HTTP.
        disk, http = (reach | {"CELESTIAL_LABEL_STUDIO_DATA": place} for place in (label_studio.uploads, ""))
        uploaded = label_studio.upload([bench.album.originals / name for name in bench.album.names])
        addresses = [uploaded[number % len(uploaded)] for number in range(count)]
        _note(bench, found, "serving_s", label_studio.serving(addresses, Settings().fetch_threads))
        with constant(bench) as instant, ours(bench, **disk) as near, ours(bench, **http) as far:
            for backend in (near, far):
                backend.until_setup()
                backend.predict(addresses[:1])
            ways = {"constant": instant.url, "disk": near.url, "http": far.url}
            for number in range(bench.sizes.studio_rounds):
                for way, url in ways.items():
                    project = label_studio.project(f"{way} {number}", addresses, url)
                    _note(bench, found, f"{way}_s", label_studio.retrieve(project))
                    label_studio.see_predictions(project, count)
            for way, settings in (("prelabel_disk", disk), ("prelabel_http", http)):
                project = label_studio.project(way, addresses, near.url)
                for name, seconds in _prelabel(bench, project, settings).items():
                    _note(bench, found, f"{way}_{name}", seconds)
                label_studio.see_predictions(project, count)
    return found


def _prelabel(bench: Bench, project: int, settings: dict[str, object]) -> dict[str, float]:
    """The seconds of the whole command, and of its work alone, after the model has been loaded."""
    environ = bench.environ(MODEL_DIR=bench.folder / f"prelabel-{project}", **settings)
    started = time.perf_counter()
    told = json.loads(bench.run(["celestial_backend", "prelabel", "--project", project, "--json"], environ))
    return {"s": time.perf_counter() - started, "work_s": told["seconds"]}


def _note(bench: Bench, found: dict[str, Any], name: str, seconds: float) -> None:
    rounds: Sequence[float] = found.get(name, [])
    found[name] = [*rounds, round(seconds, 2)]
    bench.say(f"{name}: {seconds:.2f}")
