"""Votes: which annotations count, for which class, and where a label came from."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from backend_server import label_config
from label_studio import LabelStudioServer
from stand_in import stand_in
from test_project import IMAGE, read

from celestial_backend.labels import ChoiceMap
from celestial_backend.settings import MODEL_NAME
from celestial_backend.votes import Vote, votes_of

MAP = ChoiceMap.for_learning(label_config(), ["Mars", "Moon"])
TWO = ChoiceMap.for_learning(
    '<View><Image name="a" value="$left"/><Image name="b" value="$right"/>'
    '<Choices name="kind" toName="a"><Choice value="Mars"/></Choices>'
    '<Choices name="other" toName="a"><Choice value="MARS"/><Choice value="Moon"/></Choices>'
    '<Choices name="second" toName="b"><Choice value="Moon"/></Choices></View>',
    ["Mars", "Moon"],
)


def region(choice: str, origin: str | None = None, control: str = "choice", image: str = "image") -> dict[str, Any]:
    made = {"from_name": control, "to_name": image, "type": "choices", "value": {"choices": [choice]}}
    return made | ({"origin": origin} if origin else {})


def annotation(number: int, *choices: str, by: int | None = 1, at: str | None = None, **more: Any) -> dict[str, Any]:
    updated_at = at or f"2026-01-01T{number // 3600:02}:{number // 60 % 60:02}:{number % 60:02}.000001Z"
    result = [region(choice, more.pop("origin", None)) for choice in choices]
    plain = {"was_cancelled": False, "ground_truth": False, "parent_prediction": None}
    return plain | {"id": number, "completed_by": by, "updated_at": updated_at, "result": result} | more


def said(*annotations: dict[str, Any], choices: ChoiceMap = MAP, **task: Any) -> tuple[list[str], dict[str, int]]:
    """Each vote as `annotation id: class, source`, and what was left out."""
    votes, left_out = votes_of({"id": 5, "annotations": annotations, "predictions": []} | task, choices)
    return [f"{vote.annotation_id}: {vote.class_name}, {vote.source}" for vote in votes], dict(left_out)


def test_a_vote() -> None:
    """It says who said what about which picture, when, and whether it is the truth."""
    votes, left_out = votes_of({"id": 5, "annotations": [annotation(3, "Venus", by=7, ground_truth=True)]}, MAP)
    assert votes == [Vote(3, 5, "7", "image", "Venus", "unaided", True, "2026-01-01T00:00:03.000001Z")]
    assert left_out == Counter()


@pytest.mark.parametrize(
    ("given", "votes", "left_out"),
    [
        pytest.param([], [], {}, id="no annotation"),
        pytest.param([annotation(1, "Mars", was_cancelled=True)], [], {"skipped by the annotator": 1}, id="skipped"),
        pytest.param(
            [annotation(1, "Mars"), annotation(2, "Moon", by=2, ground_truth=True), annotation(3, "Mars", by=3)],
            ["2: Moon, unaided"],
            {"beside a ground truth": 2},
            id="ground truth",
        ),
        pytest.param(
            [annotation(1, "Mars", ground_truth=True, was_cancelled=True), annotation(2, "Moon", by=2)],
            ["2: Moon, unaided"],
            {"skipped by the annotator": 1},
            id="skipped ground truth",
        ),
        pytest.param(
            [annotation(1, "Mars", at="2026-01-02T00:00:00Z"), annotation(2, "Moon", at="2026-01-01T23:59:59.9Z")],
            ["1: Mars, unaided"],
            {"replaced by a later one of the same annotator": 1},
            id="the newest of one person, by moment, with and without a fraction",
        ),
        pytest.param(
            [annotation(1, "Mars"), annotation(2)],
            [],
            {"replaced by a later one of the same annotator": 1, "without a class": 1},
            id="taken back",
        ),
        pytest.param(
            [annotation(1, "Mars"), annotation(2, "Moon", by=2)],
            ["1: Mars, unaided", "2: Moon, unaided"],
            {},
            id="two people",
        ),
        pytest.param(
            [annotation(2, "Moon", by=None), annotation(1, "Mars", by=None)],
            ["1: Mars, unaided", "2: Moon, unaided"],
            {},
            id="deleted accounts are not one person",
        ),
        pytest.param([annotation(1, "Mars", "Moon")], [], {"with several classes": 1}, id="several classes"),
        pytest.param([annotation(1, "Mars", "Mars")], ["1: Mars, unaided"], {}, id="the same class twice"),
        pytest.param(
            [annotation(1, "Vulcan")],
            [],
            {"with a choice that the label config does not offer": 1},
            id="a choice that is gone",
        ),
        pytest.param([annotation(1) | {"result": None}], [], {"without a class": 1}, id="no result"),
        pytest.param(
            [annotation(1) | {"result": [{"value": {"choices": []}, "from_name": "choice", "to_name": "image"}, 3]}],
            [],
            {"without a class": 1},
            id="an empty list and garbage",
        ),
    ],
)
def test_which_annotations_count(given: list[dict[str, Any]], votes: list[str], left_out: dict[str, int]) -> None:
    """One class per person and picture; all else is left out and counted."""
    assert said(*given) == (votes, left_out)


def test_several_pictures_and_controls() -> None:
    """All controls about a picture must name one class together; each picture of a task has its own votes."""
    both = [region("Mars", None, "kind", "a"), region("MARS", None, "other", "a"), region("Moon", None, "second", "b")]
    votes, left_out = votes_of({"id": 1, "annotations": [annotation(1) | {"result": both}]}, TWO)
    assert [(vote.data_key, vote.class_name) for vote in votes] == [("left", "Mars"), ("right", "Moon")]
    assert not left_out
    both[1] = region("Moon", None, "other", "a")
    votes, left_out = votes_of({"id": 1, "annotations": [annotation(1) | {"result": both}]}, TWO)
    assert [vote.data_key for vote in votes] == ["right"]
    assert left_out == Counter({"with several classes": 1})


PREDICTED = {"id": 9, "result": [region("Mars")]}


@pytest.mark.parametrize(
    ("class_name", "more", "source"),
    [
        pytest.param("Mars", {"origin": "manual"}, "unaided", id="no pre-label"),
        pytest.param("Mars", {}, "unaided", id="through the API"),
        pytest.param(
            "Mars", {"origin": "manual", "prediction": PREDICTED}, "unaided", id="a copy that nobody started from"
        ),
        pytest.param("Mars", {"origin": "prediction", "parent_prediction": 9}, "accepted", id="accepted"),
        pytest.param("Moon", {"origin": "prediction-changed", "parent_prediction": 9}, "corrected", id="corrected"),
        pytest.param("Mars", {"origin": "prediction-changed", "parent_prediction": 9}, "accepted", id="changed back"),
        pytest.param("Moon", {"origin": "manual", "parent_prediction": 9}, "corrected", id="unselected and made anew"),
        pytest.param("Mars", {"parent_prediction": 9}, "accepted", id="bulk action"),
        pytest.param("Moon", {"parent_prediction": 9}, "corrected", id="bulk action, changed later"),
        pytest.param("Mars", {"parent_prediction": 10}, "unaided", id="the prediction said nothing"),
        pytest.param("Mars", {"origin": "prediction"}, "accepted", id="prediction deleted"),
        pytest.param("Moon", {"origin": "prediction-changed"}, "corrected", id="prediction deleted, corrected"),
        pytest.param(
            "Mars",
            {"origin": "prediction-changed", "prediction": PREDICTED},
            "accepted",
            id="prediction deleted, changed back",
        ),
        pytest.param("Mars", {"origin": "prediction", "prediction": {}}, "accepted", id="prediction deleted, no copy"),
        pytest.param("Mars", {"parent_prediction": 8}, "accepted", id="unknown prediction"),
    ],
)
def test_where_a_label_came_from(class_name: str, more: dict[str, Any], source: str) -> None:
    """The classes decide while the prediction is known, and Label Studio's word only when it is gone."""
    predictions = [{"id": 7, "result": [region("Moon")]}, PREDICTED, {"id": 10, "result": []}]
    votes, _ = said(annotation(1, class_name, **more), predictions=predictions)
    assert votes == [f"1: {class_name}, {source}"]


def test_where_labels_came_from_on_a_real_label_studio(label_studio: LabelStudioServer) -> None:
    """What the editor and the bulk action submit, stored and read through the API, tells where labels came from."""
    project = label_studio.create_project("sources")
    rows = [
        ("accepted", region("Mars", "prediction"), True, "Mars, accepted"),
        ("changed", region("Venus", "prediction-changed"), True, "Venus, corrected"),
        ("changed and changed back", region("Mars", "prediction-changed"), True, "Mars, accepted"),
        ("unselected all", None, True, None),
        ("no pre-label", region("Mars", "manual"), False, "Mars, unaided"),
        ("accepted, then the prediction is deleted", region("Mars", "prediction"), True, "Mars, accepted"),
        ("changed, then the prediction is deleted", region("Venus", "prediction-changed"), True, "Venus, corrected"),
        ("bulk action", None, None, "Mars, accepted"),
        ("skipped", region("Mars", "prediction"), True, None),
    ]
    tasks = label_studio.import_tasks(project, [IMAGE] * len(rows))
    with stand_in(f"{MODEL_NAME}:v1") as model:
        label_studio.connect_backend(project, model.url, f"{MODEL_NAME}:v1")
        label_studio.retrieve(project)
    parents = {each["task"]: each["id"] for each in label_studio.predictions(project)}
    for task, (name, made, parent, _) in zip(tasks, rows, strict=True):
        body = {"result": [made] if made else [], "was_cancelled": name == "skipped"}
        body |= {"parent_prediction": parents[task]} if parent else {}
        if parent is not None:
            label_studio.api("POST", f"/api/tasks/{task}/annotations/", json=body)
        if "deleted" in name:
            label_studio.api("DELETE", f"/api/predictions/{parents[task]}/")
    bulk = {"selectedItems": {"all": False, "included": [tasks[7]]}}
    label_studio.api("POST", f"/api/dm/actions?id=predictions_to_annotations&project={project}", json=bulk)

    seen: dict[str, str | None] = dict.fromkeys((name for name, *_ in rows), None)
    left_out: Counter[str] = Counter()
    for task in read(label_studio, project).labelled_tasks():
        votes, out = votes_of(task, MAP)
        left_out += out
        for vote in votes:
            seen[rows[tasks.index(vote.task_id)][0]] = f"{vote.class_name}, {vote.source}"
    assert seen == {name: source for name, _, _, source in rows}
    assert left_out == Counter({"without a class": 1}), "a task that was only skipped has no label and is not read"


def test_several_people_on_a_real_label_studio(label_studio: LabelStudioServer) -> None:
    """Two annotators have two votes, one that labels twice has one, and a ground truth goes before both."""
    person = {"email": "second@example.com", "username": "second", "password": "a second passw0rd"}
    second = label_studio.api("POST", "/api/users/", json=person)["id"]
    project = label_studio.create_project("people")
    (task,) = label_studio.import_tasks(project, [IMAGE])

    def annotate(choice: str, **more: Any) -> int:
        path = f"/api/tasks/{task}/annotations/"
        return int(label_studio.api("POST", path, json={"result": [region(choice)], **more})["id"])

    def votes() -> list[tuple[str, str]]:
        (seen,) = read(label_studio, project).labelled_tasks()
        return [(vote.annotator, vote.class_name) for vote in votes_of(seen, MAP)[0]]

    first = annotate("Mars")
    annotate("Venus", completed_by=second)
    assert votes() == [("1", "Mars"), (str(second), "Venus")]
    annotate("Moon")
    assert votes() == [(str(second), "Venus"), ("1", "Moon")]
    label_studio.api("PATCH", f"/api/annotations/{first}/", json={"ground_truth": True})
    assert votes() == [("1", "Mars")]
