"""The report reads from a real Label Studio who saw what, and what is no person's judgement."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from click.testing import CliRunner

from celestial_backend.commands.cli import main
from celestial_backend.errors import StudioError
from celestial_backend.services import build
from celestial_backend.settings import MODEL_NAME, Settings
from celestial_backend.trust.evidence import SHOWN
from celestial_backend.trust.trial import WITHHELD
from tests.real.test_studio_project import IMAGE
from tests.support.label_studio import LabelStudioServer
from tests.unit.learning.test_votes import region

VERSION = f"{MODEL_NAME}:v1"


def test_report_of_a_real_label_studio(label_studio: LabelStudioServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Predictions that are deleted are told by the copy in the annotation, which exports alone show."""
    monkeypatch.setenv("LABEL_STUDIO_URL", label_studio.url)
    monkeypatch.setenv("LABEL_STUDIO_API_KEY", label_studio.legacy_token)
    services = build(replace(Settings.from_environ(), control_share=0.5))
    person = {"email": "judge@example.com", "username": "judge", "password": "a passw0rd of hers"}
    judge = label_studio.api("POST", "/api/users/", json=person)["id"]
    project = label_studio.create_project("judged")
    tasks = label_studio.import_tasks(project, [IMAGE] * 40)
    made = int(label_studio.sdk.projects.get(project).created_at.timestamp())  # type: ignore[union-attr]
    said = {"result": [region("Mars") | {"score": 0.8}], "score": 0.8, "model_version": VERSION}
    shown = services.trial.shown([{"id": task} for task in tasks], [said] * len(tasks), f"{project}.{made}")
    rows = [{"task": task, **each} for task, each in zip(tasks, shown, strict=True)]
    label_studio.api("POST", f"/api/projects/{project}/import/predictions", json=rows)
    label_studio.api("PATCH", f"/api/projects/{project}/", json={"model_version": VERSION})
    parents = {each["task"]: each["id"] for each in label_studio.predictions(project)}
    seen = [task for task, each in zip(tasks, shown, strict=True) if each["result"]]
    unseen = [task for task in tasks if task not in seen]
    assert min(len(seen), len(unseen)) > 7

    def answer(task: int, choice: str, origin: str | None = None, **more: Any) -> int:
        body = {"result": [region(choice, origin)], "lead_time": 2.5} | more
        if origin != "manual":
            body["parent_prediction"] = parents[task]
        return int(label_studio.api("POST", f"/api/tasks/{task}/annotations/", json=body)["id"])

    answer(seen[0], "Mars", "prediction")
    answer(seen[0], "Venus", "prediction-changed", completed_by=judge)
    answer(seen[1], "Mars", "prediction")
    answer(seen[2], "Moon", "prediction-changed")
    for task in seen[1:3]:
        label_studio.api("DELETE", f"/api/predictions/{parents[task]}/")
    bulk = {"selectedItems": {"all": False, "included": [seen[3]]}}
    label_studio.api("POST", f"/api/dm/actions?id=predictions_to_annotations&project={project}", json=bulk)
    answer(seen[4], "Mars", "prediction", was_cancelled=True)
    answer(seen[4], "Venus", None, lead_time=None, completed_by=judge)  # of another page than Label Studio's
    imported = {"result": [region("Moon")], "ground_truth": False, "completed_by": judge}
    rows = [{"data": {"image": IMAGE}, "annotations": [imported]}]
    label_studio.api("POST", f"/api/projects/{project}/import", json=rows)
    truth = answer(seen[5], "Mars", "prediction")
    label_studio.api("PATCH", f"/api/annotations/{truth}/", json={"ground_truth": True})
    answer(unseen[0], "Moon", "manual")
    answer(unseen[0], "Mars", "manual", completed_by=judge, parent_prediction=parents[unseen[0]])

    found = services.evidence(str(project))
    mars = frozenset({"Mars"})
    read = [(each.task, *each.chosen, each.arm, each.said, each.version, each.truth) for each in found.given]
    assert read == sorted([
        (seen[0], "Mars", SHOWN, mars, VERSION, False),
        (seen[0], "Venus", SHOWN, mars, VERSION, False),
        (seen[1], "Mars", SHOWN, mars, VERSION, False),
        (seen[2], "Moon", SHOWN, mars, VERSION, False),
        (seen[4], "Venus", SHOWN, mars, VERSION, False),
        (seen[5], "Mars", SHOWN, mars, VERSION, True),
        (unseen[0], "Moon", WITHHELD, mars, VERSION, False),
        (unseen[0], "Mars", WITHHELD, mars, VERSION, False),
    ], key=lambda row: row[0])  # fmt: skip
    assert {each.seconds for each in found.given} == {2.5, None}
    assert found.people == {"1": label_studio.user, str(judge): "judge@example.com"}

    done = CliRunner().invoke(main, ["report", "--project", str(project), "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert (told["title"], told["tasks"], told["labelled"], told["annotators"]) == ("judged", 41, 5, 2)
    assert told["controls"][0]["labels"] == {SHOWN: 5, WITHHELD: 2}
    assert told["left_out"] == {
        "imported": 1, "made of predictions, without a look": 1, "marked as ground truth": 1,
        "skipped by the annotator": 1,
    }  # fmt: skip

    empty = label_studio.create_project("empty")
    done = CliRunner().invoke(main, ["report", "--project", str(empty), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["controls"][0]["kept"]["missing"] == 20
    done = CliRunner().invoke(main, ["report", "--project", "999999", "--json"])
    assert done.exit_code == StudioError.exit_code
    assert "404" in done.stderr
