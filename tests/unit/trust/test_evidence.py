"""What is read of labels: who saw what, what the model had said, and what is no judgement of a person."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from celestial_backend.settings import NEEDS_LABELS
from celestial_backend.studio.labels import About
from celestial_backend.trust.evidence import SHOWN, UNPREDICTED, Evidence, Given, read_evidence
from celestial_backend.trust.trial import AUDITED, PLANTED, WITHHELD, Unshown
from tests.support.backend_server import label_config
from tests.unit.learning.test_votes import region

CREATED = "2026-01-01T12:00:00.000001Z"
NOON = 1767268800.0  # the same moment
SEVERAL = (
    '<View><Image name="image" value="$image"/>'
    '<Choices name="choice" toName="image"><Choice value="Mars"/><Choice value="Venus"/></Choices>'
    '<Choices name="flaw" toName="image" choice="multiple"><Choice value="torn"/><Choice value="wet"/></Choices></View>'
)


class ReadLabels:
    """The edge to Label Studio."""

    project_id = "7"

    def __init__(self, tasks: list[dict[str, Any]], config: str) -> None:
        self.tasks, self.config = tasks, config

    def about(self) -> About:
        return About("planets", self.config, "5", "http://127.0.0.1/projects/7/data", 10)

    def judged(self) -> Iterator[dict[str, Any]]:
        return iter(self.tasks)

    def people(self) -> dict[str, str]:
        return {"1": "one@example.com"}


def given(*choices: str, origin: str | None = "manual", by: int | None = 1, **more: Any) -> dict[str, Any]:
    plain = {"id": 1, "completed_by": by, "created_at": CREATED, "updated_at": CREATED, "lead_time": 2.5,
             "parent_prediction": None}  # fmt: skip
    return plain | {"result": [region(each, origin) for each in choices]} | more


def said(choice: str | None, number: int = 3, version: str = "v1", score: float = 0.9) -> dict[str, Any]:
    result = [region(choice) | {"score": score}] if choice else []
    return {"id": number, "result": result, "score": score, "model_version": version}


def evidence(
    *annotations: dict[str, Any],
    predictions: tuple[dict[str, Any], ...] = (),
    unshown: tuple[Unshown, ...] = (),
    config: str = label_config(),
) -> Evidence:
    task = {"id": 5, "data": {"image": "a.png"}, "annotations": list(annotations), "predictions": list(predictions)}
    trial: Any = SimpleNamespace(kept=lambda number, made: list(unshown) if (number, made) == ("7", "5") else [])
    labels: Any = ReadLabels([task], config)
    return read_evidence(labels, trial)


def only(found: Evidence) -> Given:
    (one,) = found.given
    return one


def held(arm: str = WITHHELD, version: str = "v1", choice: str = "Mars", at: float = NOON - 60) -> Unshown:
    return Unshown(5, version, arm, [region(choice) | {"score": 0.8}], 0.8, at, "5")


def test_an_answer_to_a_pre_label() -> None:
    """Who, what, what was said, by which model and how surely, and how long it took."""
    found = evidence(given("Venus", origin="prediction-changed", parent_prediction=3), predictions=(said("Mars"),))
    assert only(found) == Given(5, 1, "1", "choice", frozenset({"Venus"}), SHOWN, frozenset({"Mars"}), 0.9, "v1", 2.5,
                                at=CREATED)  # fmt: skip
    assert (found.title, found.tasks, found.people) == ("planets", 10, {"1": "one@example.com"})


@pytest.mark.parametrize(
    ("annotation", "predictions", "unshown", "arm", "kept"),
    [
        pytest.param(given("Mars", parent_prediction=3), [said("Mars")], [], SHOWN, True, id="changed back"),
        pytest.param(given("Mars", origin="prediction"), [], [], SHOWN, True, id="kept, and the prediction is gone"),
        pytest.param(given("Moon", origin="prediction-changed"), [], [], SHOWN, False, id="changed, and it is gone"),
        pytest.param(
            given("Mars", origin="prediction-changed", prediction=said("Mars")), [], [], SHOWN, True,
            id="its copy says that it was changed back",
        ),
        pytest.param(given("Mars", prediction=said("Mars")), [], [], UNPREDICTED, False, id="a copy that nobody saw"),
        pytest.param(given("Mars"), [], [], UNPREDICTED, False, id="before there was a model"),
        pytest.param(given("Mars"), [said(None)], [held()], WITHHELD, True, id="withheld"),
        pytest.param(given("Moon", parent_prediction=3), [said(None)], [held()], WITHHELD, False, id="an empty parent"),
        pytest.param(given("Mars"), [], [held(at=NOON + 60)], UNPREDICTED, False, id="withheld only later"),
        pytest.param(
            given("Venus"), [],
            [held(), held(version="v2", choice="Venus", at=NOON - 1), held(version="v3", at=NOON + 1)],
            WITHHELD, True, id="withheld of the version of that time",
        ),
        pytest.param(
            given("Mars", parent_prediction=3), [said(None)], [held(), held(version="v2", choice="Venus", at=NOON - 1)],
            WITHHELD, True, id="withheld of the version that its prediction has",
        ),
        pytest.param(given("Moon"), [], [held(AUDITED)], AUDITED, False, id="audited"),
        pytest.param(
            given("Moon", origin="prediction", parent_prediction=3), [said("Moon")], [held(PLANTED)], PLANTED, True,
            id="a planted error, kept",
        ),
        pytest.param(
            given("Moon", origin="prediction-changed"), [], [replace(held(PLANTED), shown=[region("Venus")])],
            PLANTED, False, id="a planted error, changed, and removed since",
        ),
        pytest.param(
            given("Mars", origin="prediction", parent_prediction=3), [said("Mars", version="v0")], [held()],
            SHOWN, True, id="seen of an older version",
        ),
        pytest.param(given("Mars", parent_prediction=3), [said(None)], [], UNPREDICTED, False, id="unlike all known"),
    ],
)  # fmt: skip
def test_who_saw_what(
    annotation: dict[str, Any], predictions: list[Any], unshown: list[Unshown], arm: str, kept: bool
) -> None:
    one = only(evidence(annotation, predictions=tuple(predictions), unshown=tuple(unshown)))
    assert (one.arm, one.kept) == (arm, kept)


def test_an_empty_prediction_that_only_orders_tasks_is_of_no_model() -> None:
    """Else all that is labelled before the first training would be unknown to a model."""
    one = only(evidence(given("Mars", parent_prediction=3), predictions=(said(None, version=NEEDS_LABELS),)))
    assert (one.arm, one.said, one.version) == (UNPREDICTED, None, "")


@pytest.mark.parametrize(
    ("annotation", "why"),
    [
        (given("Mars", import_id=9), "imported"),
        (given("Mars", bulk_created=True), "made for many tasks at once"),
        (given("Mars", origin=None, lead_time=None, parent_prediction=3), "made of predictions, without a look"),
        (given("Mars", origin=None, lead_time=None), "imported"),
        (given("Mars", was_cancelled=True), "skipped by the annotator"),
        (given("Vulcan"), "with a choice that the label config does not offer"),
        (given(), "without a choice"),
    ],
)
def test_what_is_no_judgement_is_counted(annotation: dict[str, Any], why: str) -> None:
    found = evidence(annotation, predictions=(said("Mars"),))
    assert (found.given, found.left_out) == ((), {why: 1})


def test_truths_stand_beside_what_people_answered() -> None:
    """Other than for learning, where people beside a ground truth do not count."""
    found = evidence(given("Mars", id=1), given("Venus", id=2, by=2), given("Moon", id=3, by=2, ground_truth=True))
    assert [(each.annotator, *each.chosen, each.truth) for each in found.given] == [
        ("2", "Moon", True), ("1", "Mars", False), ("2", "Venus", False),
    ]  # fmt: skip
    assert found.people == {"1": "one@example.com", "2": "person 2"}


def test_accounts_that_are_gone_are_people_without_a_name() -> None:
    found = evidence(given("Mars", by=None), given("Moon", id=2, by=None))
    assert len({each.annotator for each in found.given}) == 2
    assert found.people == {}


def test_each_control_is_told_apart() -> None:
    """Of several choices the whole set is compared; where the model said nothing of a control, nothing was shown."""
    both = [region("Mars", "prediction"), region("torn", "prediction-changed", "flaw"),
            region("wet", "prediction-changed", "flaw")]  # fmt: skip
    shown = said("Mars") | {"result": [region("Mars") | {"score": 0.7}, region("torn", None, "flaw") | {"score": 0.6}]}
    found = evidence(given(result=both, parent_prediction=3), predictions=(shown,), config=SEVERAL)
    assert [(each.control, each.kept, each.confidence) for each in found.given] == [
        ("choice", True, 0.7), ("flaw", False, 0.6),
    ]  # fmt: skip
    found = evidence(given(result=both, parent_prediction=3), predictions=(said("Mars"),), config=SEVERAL)
    assert [(each.control, each.arm) for each in found.given] == [("choice", SHOWN), ("flaw", UNPREDICTED)]


def test_taxonomies_and_answers_that_are_odd() -> None:
    """Paths are choices; a score that is none, and a result that is no list, are nothing."""
    config = (
        '<View><Image name="image" value="$image"/><Taxonomy name="kind" toName="image"><Choice value="animal">'
        '<Choice value="cat"/><Choice value="dog"/></Choice></Taxonomy></View>'
    )

    def tree(leaf: str, **more: Any) -> dict[str, Any]:
        value = {"taxonomy": [["animal", leaf]]}
        return {"from_name": "kind", "to_name": "image", "type": "taxonomy", "value": value, **more}

    prediction = said(None) | {"result": [tree("cat", score="much")], "score": 7.5}
    annotation = given(result=[tree("dog", origin="prediction-changed")], parent_prediction=3)
    one = only(evidence(annotation, predictions=(prediction,), config=config))
    assert (one.arm, one.said, one.chosen, one.confidence) == (
        SHOWN, frozenset({"animal / cat"}), frozenset({"animal / dog"}), None,
    )  # fmt: skip
    odd = evidence(given(result="nothing"), given(result=None, id=2, by=2), given("Mars", id=3, by=3, lead_time=None))
    assert [each.annotation for each in odd.given] == [3]
