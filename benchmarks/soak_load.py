"""Clients that ask the backend for everything at once: predictions, batches, /health, /setup, events and a training."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import requests

from benchmarks.soak_record import Record
from celestial_backend.planets.renderer import BODIES
from celestial_backend.studio.setup import config_for

CHOICES = [*BODIES, "Comet"]
CONFIG = config_for(CHOICES)
LIMITS_S = {"health": 1.0, "setup": 3.0, "webhook": 1.0, "train": 100.0, "predict 1": 100.0, "predict 100": 100.0}
EVENTS = (
    "ANNOTATION_CREATED", "ANNOTATION_UPDATED", "ANNOTATIONS_CREATED", "ANNOTATIONS_DELETED", "TASKS_CREATED",
    "TASKS_DELETED", "PROJECT_UPDATED",
)  # fmt: skip


class Load:
    """Clients that ask until they are told to stop."""

    def __init__(self, url: str, record: Record, project: int, pictures: Sequence[str]) -> None:
        self.url, self.record, self.project, self.pictures = url, record, project, pictures
        self.over = threading.Event()
        self.threads: list[threading.Thread] = []

    def start(self) -> None:
        """Begin to ask, in threads."""
        for number in range(4):
            self._repeat(0.05, lambda number=number: self._predict(1, number))  # type: ignore[misc]
        self._repeat(1.0, lambda: self._predict(100, 9))
        self._repeat(0.5, lambda: self._ask("health", "GET", "/health"))
        self._repeat(0.5, lambda: self._ask("setup", "POST", "/setup", {"project": self.name(), "schema": CONFIG}))
        events = itertools.cycle(EVENTS)
        self._repeat(0.3, lambda: self._ask("webhook", "POST", "/webhook", event(next(events), self.project)))

    def stop(self) -> None:
        """Ask no more, and wait for the last answers."""
        self.over.set()
        for thread in self.threads:
            thread.join(120)

    def name(self) -> str:
        """The project, without the moment at which it was made, which Label Studio names too."""
        return str(self.project)

    def train(self) -> None:
        """Ask for a training."""
        body = {"action": "START_TRAINING", "project": {"id": self.project, "label_config": CONFIG}}
        self._ask("train", "POST", "/webhook", body)

    def _predict(self, count: int, seed: int) -> None:
        values = random.Random(f"{seed} {time.monotonic()}").choices(self.pictures, k=count)  # noqa: S311 - a choice of pictures
        tasks = [{"id": number, "data": {"image": value}} for number, value in enumerate(values, 1)]
        body = {"tasks": tasks, "label_config": CONFIG, "project": self.name(), "params": {"context": None}}
        answer = self._ask(f"predict {count}", "POST", "/predict", body)
        if answer is None:
            return
        results = answer.get("results", [])
        empty = sum(not result for result in results)
        self.record.predicted(len(results) - empty)
        if len(results) != count or empty:
            self.record.problem(f"Of {count} tasks {len(results)} were answered, {empty} of them with nothing.")
        elif len({result["model_version"] for result in results}) != 1:
            self.record.problem("One batch was answered by several models.")

    def _ask(self, kind: str, method: str, path: str, body: Any = None) -> dict[str, Any] | None:
        at = time.monotonic()
        answer: dict[str, Any] | None = None
        try:
            got = requests.request(method, self.url + path, json=body, timeout=LIMITS_S[kind])
            outcome = str(got.status_code)
            if got.status_code < 300:
                answer = got.json()
            else:
                self.record.problem(f"{kind}: {got.status_code} {got.reason[:200]}")
        except (requests.RequestException, ValueError) as error:
            outcome = type(error).__name__
            self.record.problem(f"{kind}: {outcome}: {str(error)[:200]}")
        self.record.answer(kind, at, time.monotonic() - at, outcome)
        return answer

    def _repeat(self, pause_s: float, work: Callable[[], object]) -> None:
        def run() -> None:
            while not self.over.wait(pause_s):
                work()

        self.threads.append(threading.Thread(target=run, daemon=True))
        self.threads[-1].start()


def event(action: str, project: int) -> dict[str, Any]:
    """An event of a webhook as Label Studio sends it, as far as it is read."""
    one = {"id": 1, "result": [], "was_cancelled": False}
    return {"action": action, "project": {"id": project}, "annotation": [one, one] if "S_CREATED" in action else one}


