"""Votes read from a real Label Studio; and what reading them loads."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from typing import Any

from celestial_backend.learning import votes as module
from celestial_backend.learning.votes import Vote, votes_of
from celestial_backend.settings import MODEL_NAME
from tests.real.test_studio_project import IMAGE, read
from tests.support.label_studio import LabelStudioServer
from tests.support.stand_in import stand_in
from tests.unit.learning.test_votes import MAP, region


def test_import_is_light() -> None:
    """The libraries cleanlab and pandas stay out until there is a crowd to weigh."""
    code = (
        f"import sys; import {module.__name__} as c; c.agree({{}}, ()); "
        "sys.exit(bool({'cleanlab', 'pandas', 'sklearn'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# A real Label Studio


def only_of(vote: Vote) -> str:
    (choice,) = vote.choices
    return choice


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
            seen[rows[tasks.index(vote.task_id)][0]] = f"{only_of(vote)}, {vote.source}"
    assert seen == {name: source for name, _, _, source in rows}
    assert left_out == Counter({"without a choice": 1}), "a task that was only skipped has no label and is not read"


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
        return [(vote.annotator, only_of(vote)) for vote in votes_of(seen, MAP)[0]]

    first = annotate("Mars")
    annotate("Venus", completed_by=second)
    assert votes() == [("1", "Mars"), (str(second), "Venus")]
    annotate("Moon")
    assert votes() == [(str(second), "Venus"), ("1", "Moon")]
    label_studio.api("PATCH", f"/api/annotations/{first}/", json={"ground_truth": True})
    assert votes() == [("1", "Mars")]
