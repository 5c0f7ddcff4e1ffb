"""What is read of a task: no more than somebody needs."""

from __future__ import annotations

import json
from typing import Any

import pytest

from celestial_backend.web import protocol


def read(**parts: Any) -> Any:
    body = {"tasks": [{"id": 5, "data": {"image": "a.png"}, "predictions": [{"id": 1}], **parts}], "label_config": ""}
    found = protocol.read("/predict", json.dumps(body).encode())
    assert isinstance(found, protocol.PredictRequest)
    return protocol.Tasks(found.tasks)[0]


PLAIN = {"id": 5, "data": {"image": "a.png"}}
TRUE = {"id": 1, "ground_truth": True, "result": []}


@pytest.mark.parametrize(
    ("parts", "task"),
    [
        pytest.param({}, PLAIN, id="no annotations"),
        pytest.param({"annotations": [TRUE | {"ground_truth": False}], "is_labeled": False}, PLAIN, id="no truth"),
        pytest.param(
            {"annotations": [TRUE], "is_labeled": False}, PLAIN | {"annotations": [TRUE], "is_labeled": False},
            id="a ground truth",
        ),
        pytest.param({"annotations": [TRUE]}, PLAIN | {"annotations": [TRUE], "is_labeled": None}, id="nothing else"),
        pytest.param(
            {"annotations": [TRUE], "is_labeled": ["long" * 9]}, PLAIN | {"annotations": [TRUE], "is_labeled": None},
            id="not Label Studio's",
        ),
        pytest.param({"annotations": [TRUE] * 9000, "is_labeled": False}, PLAIN, id="too much of it"),
    ],
)  # fmt: skip
def test_a_ground_truth_is_read_and_other_labels_are_not(parts: dict[str, Any], task: dict[str, Any]) -> None:
    assert read(**parts) == task
