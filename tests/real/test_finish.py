"""Finishing a project with a real Label Studio: nothing of an audit is seen, and what it allows is accepted once."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from celestial_backend.commands import finish as command
from celestial_backend.commands.cli import main
from celestial_backend.errors import SettingsError, StudioError
from celestial_backend.labels import ChoiceMap
from celestial_backend.learning.votes import UNSEEN, votes_of
from celestial_backend.services import Services, build
from celestial_backend.settings import Settings
from celestial_backend.studio.client import CERTIFICATE
from celestial_backend.studio.desk import Desk
from celestial_backend.trust.finish import (
    CERTIFIED,
    DRAWN,
    MISSING,
    Certificates,
    Outcome,
    Wish,
)
from tests.support.backend_server import label_config
from tests.support.label_studio import LabelStudioServer

TAG = "celestial_bodies_classifier_model:one"
MARS = {"from_name": "choice", "to_name": "image", "type": "choices", "value": {"choices": ["Mars"]}}
TASKS = 48


class Model:
    """Says Mars of all, the surer the lower a task's number, and nothing of the last five."""

    def __init__(self, tasks: Sequence[int]) -> None:
        self.score = {task: 1 - place / 1000 for place, task in enumerate(sorted(tasks))}
        self.unknown = set(sorted(tasks)[-5:])

    def __call__(self, tasks: Sequence[Any], _config: str = "") -> list[Any]:
        return [
            {"result": [] if task["id"] in self.unknown else [MARS | {"score": self.score[task["id"]]}],
             "score": self.score[task["id"]], "model_version": TAG}
            for task in tasks
        ]  # fmt: skip


@pytest.fixture
def services(label_studio: LabelStudioServer, tmp_path: Path) -> Services:
    settings = {"LABEL_STUDIO_URL": label_studio.url, "LABEL_STUDIO_API_KEY": label_studio.legacy_token}
    return build(Settings.from_environ(settings | {"MODEL_DIR": str(tmp_path), "BENTOML_HOME": str(tmp_path / "b")}))


@pytest.fixture
def project(label_studio: LabelStudioServer) -> Iterator[tuple[int, list[int]]]:
    """A project with a pre-label on each task, as `prelabel` stores them."""
    number = label_studio.create_project("Finished <b>soon</b>", label_config(["Mars", "Moon"]))
    tasks = label_studio.import_tasks(number, [f"https://pictures.invalid/{name}.png" for name in range(TASKS)])
    rows = [{"task": task, "result": [MARS], "score": 0.9, "model_version": TAG} for task in tasks]
    label_studio.api("POST", f"/api/projects/{number}/import/predictions", json=rows)
    yield number, tasks
    label_studio.api("DELETE", f"/api/projects/{number}")


def run(services: Services, number: int, tasks: Sequence[int], wish: Wish = Wish()) -> Outcome:  # noqa: B008 - immutable
    return Certificates(Desk(services.studio, str(number)), services.database, services.trial, TAG, Model(tasks)).go_on(
        wish
    )


def audited(services: Services, number: int) -> list[int]:
    return [each.task for each in services.trial.kept(str(number)) if each.arm == "audited"]


def test_from_the_draw_to_the_certificate(
    services: Services, project: tuple[int, list[int]], label_studio: LabelStudioServer, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Whatever ends a run on the way; what people label meanwhile stays theirs, and nothing is there twice."""
    monkeypatch.setattr("celestial_backend.trust.finish.ASK_AGAIN_S", 0.0)
    number, tasks = project
    drawn = run(services, number, tasks, Wish(error=0.3))
    chosen = audited(services, number)
    assert (drawn.state, drawn.open, drawn.predicted) == (DRAWN, TASKS, TASKS - 5)
    assert len(chosen) == drawn.drawn >= (drawn.least or 0)

    # No page, route or export of Label Studio tells what the model says of an audited task, and others keep theirs.
    exported = label_studio.api("GET", f"/api/projects/{number}/export?exportType=JSON&download_all_tasks=true")
    told = [*exported, *label_studio.tasks(number), *label_studio.predictions(number)]
    seen = {each.get("task", each["id"]) for each in told if "Mars" in json.dumps(each)}
    assert seen == set(tasks) - set(chosen)
    bare = [{"id": task} for task in tasks]
    shown = services.trial.shown(bare, Model(tasks)(bare), str(number))
    assert {task for task, answer in zip(tasks, shown, strict=True) if answer["result"]} == seen - Model(tasks).unknown
    in_tab = label_studio.api("GET", f"/api/tasks?view={drawn.tab}&page_size=1000")["tasks"]
    assert sorted(task["id"] for task in in_tab) == sorted(chosen)

    for task in chosen[1:]:
        label_studio.annotate(task, "Mars")
    missing = run(services, number, tasks)
    assert (missing.state, missing.labelled, missing.faults, missing.accepted) == (MISSING, len(chosen) - 1, 0, 0)
    with pytest.raises(SettingsError, match="was drawn for --error"):
        run(services, number, tasks, Wish(error=0.4))
    label_studio.annotate(chosen[0], "Mars")
    others = [task for task in tasks[:20] if task not in chosen][:3]
    for task in others:
        label_studio.annotate(task, "Moon")

    with monkeypatch.context() as patch:  # killed after the decision
        patch.setattr(Desk, "predict", lambda *_: (_ for _ in ()).throw(StudioError("away")))
        with pytest.raises(StudioError):
            run(services, number, tasks)
    certified = run(services, number, tasks)
    written = [each for each in label_studio.predictions(number) if each["model_version"].startswith(CERTIFICATE)]
    assert certified.state == CERTIFIED
    assert certified.people == {label_studio.user: len(chosen)}
    assert certified.accepted == certified.written == len(written) == len({each["task"] for each in written}) > 20
    assert not {each["task"] for each in written} & {*others, *chosen, *Model(tasks).unknown}
    assert run(services, number, tasks).written == 0

    desk = Desk(services.studio, str(number))
    by_people = desk.labels_now()
    annotated = run(services, number, tasks, Wish(annotate=True))
    assert desk.labels_now().total == by_people.total + certified.accepted
    assert desk.labels_since(by_people.moment) == 0  # so no training begins for what it would not learn
    assert annotated.written == certified.accepted
    assert run(services, number, tasks, Wish(annotate=True)).written == 0
    (mine,) = [task for task in label_studio.tasks(number) if task["id"] == written[0]["task"]]
    choices = ChoiceMap.for_learning(label_config(["Mars", "Moon"]))
    assert votes_of(mine, choices) == ([], {UNSEEN: 1})
    label_studio.api("PATCH", f"/api/annotations/{mine['annotations'][0]['id']}/", json={"lead_time": 3.5})
    (looked_at,) = [task for task in label_studio.tasks(number) if task["id"] == mine["id"]]
    assert len(votes_of(looked_at, choices)[0]) == 1

    # The labels of the audit are changed: what was promised does not hold, and the page says so.
    moon = [MARS | {"value": {"choices": ["Moon"]}}]
    for task in chosen[:6]:
        (each,) = label_studio.api("GET", f"/api/tasks/{task}/annotations/")
        label_studio.api("PATCH", f"/api/annotations/{each['id']}/", json={"result": moon})
    monkeypatch.setattr(command, "build", lambda _: services)
    monkeypatch.setattr(type(services.store), "live_tag", lambda *_: TAG)
    place = tmp_path / "page.html"
    done = CliRunner().invoke(
        main, ["finish", "--project", str(number), "--output", str(place)],
        env={"LABEL_STUDIO_URL": label_studio.url, "LABEL_STUDIO_API_KEY": label_studio.legacy_token},
    )  # fmt: skip
    assert done.exit_code != 0
    assert "does not hold any more" in done.output
    page = place.read_text()
    assert "does not hold any more" in page
    assert "Finished &lt;b&gt;soon&lt;/b&gt;" in page
    assert "<script" not in page
