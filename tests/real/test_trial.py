"""
What people are not shown of pre-labels, on a real Label Studio: it is told nowhere, and kept in the database.

Every choice stands in the label config as often as any other, so a page or an export that names the choices that the
model said more often than one that it did not say tells them.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import requests

from celestial_backend.commands.prelabel import Prelabelling
from celestial_backend.database import Database
from celestial_backend.planets.renderer import render
from celestial_backend.services import build
from celestial_backend.settings import Settings
from celestial_backend.studio.pending import PendingTasks
from celestial_backend.trust.planted import take_away
from celestial_backend.trust.planted import told as told_of
from celestial_backend.trust.trial import PLANTED, WITHHELD, Trial, Unshown
from tests.support.backend_server import Backends, BackendServer, label_config
from tests.support.browser import Annotator
from tests.support.label_studio import LabelStudioServer, labelled

pytestmark = pytest.mark.timeout(600)
HELD, OTHER = ("Saturn", "Jupiter", "Mars"), "Neptune"  # what the model says, and what nobody does
MARS = {"from_name": "body", "to_name": "image", "type": "choices", "value": {"choices": ["Mars"]}, "score": 0.9}


def test_all_who_share_a_database_draw_alike(database_url: str) -> None:
    """Also where several ask for the key at the same moment before there is one."""
    shared = replace(Settings.from_environ(), database_url=database_url)
    with ThreadPoolExecutor(8) as threads:
        drawn = list(threads.map(lambda _: Trial(shared, Database(shared)).drawn("7", 1), range(8)))
    assert len(set(drawn)) == 1
    trial = Trial(replace(shared, control_share=0.5), Database(shared))
    said = {"result": [MARS], "score": 0.9, "model_version": "one"}
    shown = trial.shown([{"id": number} for number in range(1, 251)], [said for _ in range(250)], "7.5")
    assert len(trial.kept("7", "5")) == sum(not each["result"] for each in shown) > 80
    trial.keep("7", [Unshown(2**40, "one", PLANTED, [MARS], 0.9, 1.0, "5", [MARS])])
    ((number, (planted,)),) = trial.standing().items()
    assert (number, planted.task, planted.shown) == ("7", 2**40, [MARS])
    trial.removed("7", [planted])
    assert trial.standing() == {}
    assert trial.misled("7") == {2**40}


def draw(folder: Path, bodies: tuple[str, ...] = HELD) -> list[Path]:
    """Pictures whose names say nothing of what they show."""
    paths = [folder / f"{number}.png" for number, _ in enumerate(bodies)]
    for body, path in zip(bodies, paths, strict=True):
        render(body, seed=5, size_px=300).save(path)
    return paths


def settings_of(server: BackendServer, **more: Any) -> Settings:
    return replace(Settings.from_environ(), model_dir=server.state, bentoml_home=server.store, **more)


def told(text: str) -> list[str]:
    """The choices that a text names more often than one that nobody said."""
    return [body for body in HELD if text.count(body) != text.count(OTHER)]


def answers_of(studio: LabelStudioServer, project: int, record: int) -> Iterator[tuple[str, str]]:
    """All that Label Studio tells somebody who labels: addresses, and what they answer."""
    one = studio.tasks(project)[0]["id"]
    said = [{"filter": "filter:tasks:predictions_results", "operator": "contains", "type": "String", "value": HELD[0]}]
    addresses = [
        *(f"/api/projects/{project}/export?download_all_tasks=true&exportType={name}"
          for name in ("JSON", "JSON_MIN", "CSV", "TSV")),
        f"/api/tasks?project={project}&fields=all&page_size=100",
        f"/api/tasks?project={project}&fields=all&query={json.dumps({'ordering': ['-tasks:predictions_score']})}",
        f"/api/tasks/{one}", f"/api/tasks/{one}?project={project}", f"/api/tasks/{one}/annotations/",
        f"/api/predictions/?project={project}", f"/api/predictions/?task={one}",
        f"/api/dm/views?project={project}", f"/api/dm/columns?project={project}", f"/api/dm/project?project={project}",
        f"/api/projects/{project}", f"/api/projects/{project}/next", f"/api/projects/{project}/model-versions",
        f"/api/projects/{project}/summary", f"/api/projects/{project}/sample-task", f"/api/projects/{project}/exports/",
        f"/api/ml?project={project}", f"/api/ml/{record}", f"/api/ml/{record}/versions",
    ]  # fmt: skip
    for address in addresses:
        yield address, studio.session.get(studio.url + address, timeout=60).text
    found = studio.api("GET", f"/api/tasks?project={project}&query=" + json.dumps(
        {"filters": {"conjunction": "and", "items": said}}))  # fmt: skip
    yield "what is found by it", HELD[0] * len(found["tasks"])
    everything = {"predictions": {"only_id": False}, "drafts": {"only_id": False}, "annotations__completed_by": {}}
    export = studio.api("POST", f"/api/projects/{project}/exports/", json={"serialization_options": everything})
    address = f"{studio.url}/api/projects/{project}/exports/{export['id']}/download?exportType=JSON"
    yield "a snapshot", studio.session.get(address, timeout=60).text
    path, asked = f"/api/ml/{record}/predict/test?random=true", f"/api/ml/{record}/interactive-annotating"
    yield path, json.dumps(studio.api("POST", path, json={}))
    yield asked, json.dumps(studio.api("POST", asked, json={"task": one, "context": {"result": []}}))


def own_answers(server: BackendServer, project: int, tasks: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """What the backend's own pages tell; `/docs` is the same for all but for its button, which sends to `/predict`."""
    for path in ("/", "/health", "/metrics", "/versions", f"/versions?project={project}", "/doctor"):
        for accepted in ("text/html", "application/json"):
            yield path, requests.get(server.url + path, headers={"Accept": accepted}, timeout=30).text
    sent = {"tasks": tasks, "label_config": label_config()}
    for named in (project, str(project), f"{project}.1795374408", f"{project}@1"):
        yield f"/predict of {named}", server.post("/predict", sent | {"project": named}).text
    assert HELD[0] in server.post("/predict", sent).text, "asked for no project, it says what it sees in any picture"


def test_nothing_tells_what_was_held_back(
    label_studio: LabelStudioServer, backends: Backends, person: Annotator, tmp_path: Path
) -> None:
    """
    No route, export or page of Label Studio or of the backend, in the label stream, the quick view and beside them.

    Its score stays, so that tasks come in the same order. The database has what the model said.
    """
    backend = backends(
        LABEL_STUDIO_URL=label_studio.url, LABEL_STUDIO_API_KEY=label_studio.legacy_token, CELESTIAL_CONTROL_SHARE="1"
    )
    project = label_studio.create_project("Blind", label_config())
    label_studio.upload(project, draw(tmp_path))
    record = label_studio.connect_backend(project, backend.url, backend.model_version)["id"]
    first, second, third = sorted(task["id"] for task in label_studio.tasks(project))

    person.label_all_tasks(project)  # asks the backend
    person.sees_task(first)
    assert person.selected() == []
    person.photograph("withheld")
    person.choose(OTHER)
    person.submit()
    person.sees_task(second)
    assert person.selected() == []
    label_studio.retrieve(project)
    person.quick_view(project, third)
    assert person.selected() == []
    person.choose(OTHER)
    person.submit()

    made = label_studio.predictions(project)
    assert [each["result"] for each in made] == [[]] * 3
    assert all(0.9 < each["score"] <= 1 for each in made)
    person.open_project(project)
    seen = person.page.locator("body").inner_text()
    assert not any(body in seen for body in HELD)
    for answer in label_studio.annotations(project):  # what was said by people is no secret
        label_studio.api("DELETE", f"/api/annotations/{answer['id']}/")
    for address, answer in answers_of(label_studio, project, record):
        assert told(answer) == [], address
    bulk = {"selectedItems": {"all": True, "excluded": []}}
    label_studio.api("POST", f"/api/dm/actions?id=predictions_to_annotations&project={project}", json=bulk)
    assert [each["result"] for each in label_studio.annotations(project)] == [[]] * 3
    for address, answer in own_answers(backend, project, label_studio.tasks(project)):
        assert told(answer) == [], address
    assert not any(body in backend.log_text() for body in HELD)
    kept = build(settings_of(backend)).trial.kept(str(project))
    assert {each.task: each.said[0]["value"]["choices"] for each in kept} == {
        task: [body] for task, body in zip((first, second, third), HELD, strict=True)
    }
    assert {(each.arm, each.made != "") for each in kept} == {(WITHHELD, True)}
    assert {each.task: each.score for each in kept} == {each["task"]: each["score"] for each in made}


def test_planted_errors_stand_until_a_task_has_all_its_labels(
    label_studio: LabelStudioServer, tmp_path: Path, model_store: Path
) -> None:
    """
    They are shown where somebody is still to label a task whose truth is known, so not where one label is enough.

    What people say of them is known as such. Afterwards they are removed, and the model's own answer takes their place.
    """
    second = {"email": "planted@example.com", "username": "planted", "password": "a second passw0rd"}
    knows = label_studio.api("POST", "/api/users/", json=second)["id"]
    project = label_studio.create_project("Planted", label_config())
    truth = [labelled("Saturn") | {"ground_truth": True, "completed_by": knows}]
    values = [f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
              for path in draw(tmp_path, ("Saturn",) * 3)]  # fmt: skip
    body = [{"data": {"image": value}} | ({"annotations": truth} if place < 2 else {})
            for place, value in enumerate(values)]  # fmt: skip
    answer = label_studio.api("POST", f"/api/projects/{project}/import?return_task_ids=true", json=body)
    known, also, other = sorted(map(int, answer["task_ids"]))
    services = build(replace(
        Settings.from_environ(), bentoml_home=model_store, label_studio_url=label_studio.url,
        label_studio_api_key=label_studio.legacy_token, planted_share=1.0,
    ))  # fmt: skip

    def shown() -> dict[int, str]:
        Prelabelling(services, str(project)).run()
        return {each["task"]: each["result"][0]["value"]["choices"][0] for each in label_studio.predictions(project)}

    def next_task() -> int:
        return int(label_studio.api("GET", f"/api/projects/{project}/next")["id"])

    (page,) = PendingTasks(services.studio, str(project), "another", exact=True, truths=True).pages(10)
    assert [bool(task.get("annotations")) for task in json.loads(json.dumps(page))] == [True, True, False]
    assert next_task() == other, "one label is enough, and the truth is one"
    assert shown() == dict.fromkeys((known, also, other), "Saturn")
    assert services.trial.misled(str(project)) == set()

    everything = {"selectedItems": {"all": True, "excluded": []}}
    label_studio.api("POST", f"/api/dm/actions?id=delete_tasks_predictions&project={project}", json=everything)
    label_studio.api("PATCH", f"/api/projects/{project}/", json={"maximum_annotations": 2})
    label_studio.annotate(other, "Saturn")  # else it is the next one again
    assert next_task() in (known, also)
    wrong = shown()
    assert wrong.pop(other) == "Saturn"
    assert wrong.keys() == services.trial.misled(str(project)) == {known, also}
    assert "Saturn" not in wrong.values()
    made = {each["task"]: each for each in label_studio.predictions(project)}
    assert {each["model_version"] for each in made.values()} == {services.store.live_tag()}
    assert made[known]["score"] == made[known]["result"][0]["score"] > 0.9

    mine = made[known]["result"][0] | {"origin": "prediction"}
    given = {"result": [mine], "parent_prediction": made[known]["id"], "lead_time": 2.0}
    label_studio.api("POST", f"/api/tasks/{known}/annotations/", json=given)
    take_away(services.trial, services.studio)
    assert {each["task"] for each in label_studio.predictions(project)} == {also, other}
    assert [each.task for each in services.trial.standing()[str(project)]] == [also]
    assert shown() == {known: "Saturn", also: wrong[also], other: "Saturn"}
    (accepted,) = [each for each in services.evidence(str(project)).given if not each.truth and each.task == known]
    assert (accepted.arm, accepted.said, accepted.kept) == (PLANTED, {wrong[known]}, True)

    listed = {each["task"]: each for each in told_of(services.trial.kept(str(project)))}
    assert {task: each["stands"] for task, each in listed.items()} == {known: False, also: True}
    assert listed[also]["shown"][0]["value"]["choices"] == [wrong[also]]
    assert listed[also]["said"][0]["value"]["choices"] == ["Saturn"]

    label_studio.api("POST", f"/api/dm/actions?id=delete_tasks_predictions&project={project}", json=everything)
    blind = build(replace(services.settings, control_share=1.0))
    assert Prelabelling(blind, str(project)).run().predicted == 3
    assert [each["result"] for each in label_studio.predictions(project)] == [[]] * 3, "before any planted error"
    at = Prelabelling(blind, str(project)).plan()
    assert (at.already, at.wanted) == (3, 0)
