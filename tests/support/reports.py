"""A report of a project with drawn planets, as simulated people have labelled it."""

from __future__ import annotations

import base64
import io
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.annotators import BODIES, World
from celestial_backend.metrics import Metrics
from celestial_backend.pictures.reader import ImageReader
from celestial_backend.planets.renderer import render
from celestial_backend.settings import Settings
from celestial_backend.studio.client import Studio
from celestial_backend.trust import album, report
from celestial_backend.trust.evidence import Evidence
from celestial_backend.trust.measures import measure

NEW, STRANGE = 160, 12  # tasks without a label, and how many of them, the newest, show something else


def planets_report(state: Path) -> str:
    """The page; of 400 tasks, and three people who accept three tenths of the pre-labels without looking."""
    settings = replace(Settings(), model_dir=state)
    images = ImageReader(settings, Studio(settings), Metrics())
    evidence = World(accepted=0.3, tasks=400, people=3, withheld=0.2).evidence(seed=13)
    people = dict(zip(evidence.people, ("ada@example.com", "bob@example.com", "cleo@example.com"), strict=True))
    evidence = replace(evidence, title="Planets", people=people, link="http://localhost:8080/projects/1/data")
    seen = _album(evidence)
    told = album.telling(evidence, album.twins(evidence, seen), seen.new[-STRANGE:])
    bodies = {given.task: min(given.said or {"Saturn"}) for given in evidence.given}
    data = {
        task: {"image": _drawn(bodies.get(each.tasks[0], "Saturn"), each.tasks[0])}
        for each in told
        for task in each.tasks
    }
    evidence = replace(evidence, data=data)
    return report.page(measure(evidence), album.sights(evidence, seen, images))


def _album(evidence: Evidence) -> album.Album:
    """Vectors as of pictures that look like what most people say of them; two of them of one picture."""
    rng, agreed = np.random.default_rng(6), album.agreed(evidence, "body")
    kinds = [BODIES.index(min(agreed.get(task, {"Mars"}))) for task in range(evidence.tasks)]
    rows = np.eye(64)[[*kinds, *rng.integers(0, 5, NEW - STRANGE), *[40] * STRANGE]]
    rows = rows + rng.normal(0, 0.06, rows.shape)
    one = next(task for task in agreed if kinds[task] == 0)
    other = next(task for task in agreed if kinds[task] == 3)
    rows[other] = rows[one]
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    keys = [task.to_bytes(2) for task in range(len(rows))]
    new = tuple(range(evidence.tasks, len(rows)))
    places = {(task, "image"): key for task, key in enumerate(keys)}
    return album.Album(places, dict(zip(keys, rows, strict=True)), new=new)


def _drawn(body: str, seed: int) -> str:
    stream = io.BytesIO()
    render(body, seed=seed, size_px=168).save(stream, "PNG")
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"
