"""Requests and answers, written as Label Studio 1.23 writes and reads them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from benchmarks.bench import BenchmarkError
from celestial_backend.planets.renderer import BODIES
from celestial_backend.studio.setup import config_for

PROJECT = "1.1795374408"
LABEL_CONFIG = config_for(BODIES)
MOMENT = "2026-01-01T12:00:00.000000Z"


def setup_body() -> bytes:
    """The body of /setup."""
    about = {"hostname": "http://127.0.0.1:8080", "access_token": "", "extra_params": None}
    return json.dumps({"project": PROJECT, "schema": LABEL_CONFIG, **about}).encode()


def predict_body(addresses: Sequence[str]) -> bytes:
    """The body of /predict for tasks with these pictures."""
    tasks = [_task(number, address) for number, address in enumerate(addresses, 1)]
    params = {"login": None, "password": None, "context": None}
    return json.dumps({"tasks": tasks, "project": PROJECT, "label_config": LABEL_CONFIG, "params": params}).encode()


def check(answer: bytes, count: int) -> None:
    """
    See that an answer of /predict holds a prediction for each task.

    Raises:
        BenchmarkError: It does not, so its time says nothing.
    """
    results = json.loads(answer)["results"]
    choices = [result["result"][0]["value"]["choices"] for result in results if result]
    if len(choices) != count or not all(choice[0] in BODIES for choice in choices):
        raise BenchmarkError(f"{count} tasks must have {count} predictions, got {len(choices)}: {answer[:300]!r}")


def _task(number: int, address: str) -> dict[str, Any]:
    return {
        "id": number, "data": {"image": address}, "meta": {}, "created_at": MOMENT, "updated_at": MOMENT,
        "is_labeled": False, "overlap": 1, "inner_id": number, "total_annotations": 0, "cancelled_annotations": 0,
        "total_predictions": 0, "comment_count": 0, "unresolved_comment_count": 0, "comment_authors": [],
        "last_comment_updated_at": None, "project": 1, "updated_by": 1, "file_upload": None, "annotations": [],
        "predictions": [],
    }  # fmt: skip
