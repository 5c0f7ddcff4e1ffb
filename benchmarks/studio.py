"""A whole project on a real Label Studio: *Retrieve Predictions* and ``prelabel``, beside constant predictions."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from benchmarks.bench import Bench
from benchmarks.label_studio import LabelStudio
from benchmarks.servers import constant, ours
from celestial_backend.settings import Settings

Ways = Mapping[str, Callable[[str], dict[str, float]]]  # by name, what measures once, with a title; seconds by name


def studio(bench: Bench) -> dict[str, Any]:
    """
    Seconds of every round, for as many tasks.

    The backend that answers with constants shows what Label Studio takes for itself, and "serving" what it
    takes to hand out the pictures, the work of the clients that ask for them included.
    """
    count = bench.sizes.tasks
    with LabelStudio(bench) as label_studio:
        reach: dict[str, object] = {"LABEL_STUDIO_URL": label_studio.url, "LABEL_STUDIO_API_KEY": label_studio.token}
        # An empty value counts as unset: then pictures come over HTTP.
        disk, http = (reach | {"CELESTIAL_LABEL_STUDIO_DATA": place} for place in (label_studio.uploads, ""))
        uploaded = label_studio.upload([bench.album.originals / name for name in bench.album.names])
        addresses = [uploaded[number % len(uploaded)] for number in range(count)]
        with constant(bench) as instant, ours(bench, **disk) as near, ours(bench, **http) as far:
            for backend in (near, far):
                backend.until_setup()
                backend.predict(addresses[:1])

            def retrieve(url: str, title: str) -> dict[str, float]:
                project = label_studio.project(title, addresses, url)
                seconds = label_studio.retrieve(project)
                label_studio.see_predictions(project, count)
                return {"s": seconds}

            def prelabel(settings: Mapping[str, object], title: str) -> dict[str, float]:
                project = label_studio.project(title, addresses, near.url)
                seconds = _prelabel(bench, project, settings)
                label_studio.see_predictions(project, count)
                return seconds

            ways: Ways = {
                "serving": lambda _: {"s": label_studio.serving(addresses, Settings().fetch_threads)},
                "constant": partial(retrieve, instant.url),
                "disk": partial(retrieve, near.url),
                "http": partial(retrieve, far.url),
                "prelabel_disk": partial(prelabel, disk),
                "prelabel_http": partial(prelabel, http),
            }
            return {"tasks": count, **in_turns(ways, bench.sizes.studio_rounds, bench.say)}


def in_turns(ways: Ways, rounds: int, say: Callable[[str], None]) -> dict[str, list[float]]:
    """
    Each way once in every round, so that a slow minute of the machine hits all of them.

    Every other round goes backwards, because Label Studio's database holds more each time.
    """
    found: dict[str, list[float]] = {}
    for number in range(rounds):
        for way in list(ways)[:: -1 if number % 2 else 1]:
            for name, seconds in ways[way](f"{way} {number}").items():
                found.setdefault(f"{way}_{name}", []).append(round(seconds, 2))
                say(f"{way}_{name}: {seconds:.2f}")
    return found


def _prelabel(bench: Bench, project: int, settings: Mapping[str, object]) -> dict[str, float]:
    """The seconds of the whole command, and of its work alone, after the model has been loaded."""
    environ = bench.environ(MODEL_DIR=bench.folder / f"prelabel-{project}", **settings)
    started = time.perf_counter()
    told = json.loads(bench.run(["celestial_backend", "prelabel", "--project", project, "--json"], environ))
    return {"s": time.perf_counter() - started, "work_s": told["seconds"]}
