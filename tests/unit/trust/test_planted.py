"""Which tasks get a wrong pre-label, and what it is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from celestial_backend.labels import Vocabulary
from celestial_backend.trust.planted import in_place_of, truth_of
from tests.support.backend_server import label_config
from tests.unit.learning.test_votes import region

CONFIG = label_config(["Mars", "Venus", "Moon"])
SEVERAL = CONFIG.replace("toName", 'choice="multiple" toName')


def labelled(choice: str, number: int = 1, **more: Any) -> dict[str, Any]:
    return {"id": number, "result": [region(choice)], "ground_truth": True, "completed_by": number} | more


@pytest.mark.parametrize(
    ("given", "done", "config", "truth"),
    [
        pytest.param([labelled("Mars")], False, CONFIG, {"choice": {"Mars"}}, id="a ground truth"),
        pytest.param([labelled("Mars"), labelled("Moon", 2, ground_truth=False)], False, CONFIG,
                     {"choice": {"Mars"}}, id="and what others said"),
        pytest.param([labelled("Mars")], True, CONFIG, {}, id="all labels are there"),
        pytest.param([labelled("Mars")], None, CONFIG, {}, id="nobody says whether all labels are there"),
        pytest.param([labelled("Mars", ground_truth=False)], False, CONFIG, {}, id="no ground truth"),
        pytest.param([], False, CONFIG, {}, id="no label"),
        pytest.param(None, False, CONFIG, {}, id="nobody says"),
        pytest.param([labelled("Mars"), labelled("Moon", 2)], False, CONFIG, {}, id="two truths"),
        pytest.param([labelled("Mars", was_cancelled=True)], False, CONFIG, {}, id="skipped"),
        pytest.param([labelled("Vulcan")], False, CONFIG, {}, id="a choice that is gone"),
        pytest.param([labelled("Mars")], False, SEVERAL, {}, id="several choices may be made"),
        pytest.param([{"ground_truth": True}, "x", None], False, CONFIG, {}, id="nothing of Label Studio's"),
    ],
)  # fmt: skip
def test_where_the_truth_is_known(given: Any, done: bool | None, config: str, truth: dict[str, set[str]]) -> None:
    """And somebody is still to label the task."""
    assert truth_of({"id": 5, "data": {}, "annotations": given, "is_labeled": done}, config) == truth


@pytest.mark.parametrize(
    ("row", "said"),
    [
        pytest.param([0.7, 0.1, 0.2], "Moon", id="the likeliest of the wrong choices"),
        pytest.param([0.2, 0.7, 0.1], "Venus", id="what the model says, where that is wrong"),
        pytest.param([0.98, 0.015, 0.005], "Venus", id="however sure it is"),
    ],
)
def test_what_is_said_when_the_truth_may_not_be(row: list[float], said: str) -> None:
    """It gets the score of the answer in whose place it stands, the region's too."""
    choices = Vocabulary(("Mars", "Venus", "Moon")).choices(CONFIG)
    answer, other = (
        dict(zip(("result", "score"), known.prediction({"image": row}), strict=True))
        for known in (choices, replace(choices, barred={"choice": {"Mars"}}))
    )
    (shown,) = in_place_of(answer, other, {"choice": {"Mars"}})
    assert shown["value"] == {"choices": [said]}
    assert shown["score"] == answer["score"] == answer["result"][0]["score"] == max(row)


def test_nothing_is_planted_where_there_is_nothing_else_to_say() -> None:
    choices = Vocabulary(("Mars", "Jupiter")).choices(CONFIG)
    other = replace(choices, barred={"choice": {"Mars"}}).prediction({"image": [0.6, 0.4]})[0]
    assert in_place_of({"result": [region("Mars")], "score": 0.6}, {"result": other}, {"choice": {"Mars"}}) == []
    assert in_place_of({"result": [region("Mars")], "score": 0.6}, [], {"choice": {"Mars"}}) == []
