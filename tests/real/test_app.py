"""The four endpoints, as Label Studio calls them; the same on every generation of label-studio-ml."""

from __future__ import annotations

import base64
import io
import json
import logging
import re
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flask.testing import FlaskClient
from label_studio_sdk.label_interface import LabelInterface

from celestial_backend import __version__, logs
from celestial_backend.models import headed
from celestial_backend.models.classifier import Classifier
from celestial_backend.models.headed import Head
from celestial_backend.models.store import DEFAULT_MODEL
from celestial_backend.pictures.hooks import Postprocess, Preprocess
from celestial_backend.pictures.reader import ImageReader
from celestial_backend.planets.network import load_card
from celestial_backend.planets.renderer import render
from celestial_backend.predictor import Predictor
from celestial_backend.services import Services, build
from celestial_backend.settings import NEEDS_LABELS, Settings, project_tag
from celestial_backend.web.app import create_app
from celestial_backend.web.backend import CelestialBodiesBackend
from tests.support.backend_server import BODIES, label_config
from tests.support.colours import Colours, png
from tests.support.new_bodies import NEW_BODIES, render_new
from tests.support.shapes import data_uri

MARS_ONLY = label_config(["Mars", "Moon base"])
PROJECT = "7.1795374408"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Originals of one picture per body, a model store and a state folder."""
    folder = tmp_path_factory.mktemp("app")
    (folder / "originals").mkdir()
    for body in BODIES:
        render(body, 21).save(folder / "originals" / f"{body}.png")
    return folder


@pytest.fixture
def settings(folder: Path, tmp_path: Path) -> Settings:
    return Settings(bentoml_home=tmp_path / "bentoml", model_dir=tmp_path, data_folder=folder / "originals")


@pytest.fixture
def services(settings: Settings) -> Services:
    return build(settings)


@pytest.fixture
def client(services: Services) -> FlaskClient:
    return create_app(services).test_client()


def tasks_of(bodies: Any) -> list[dict[str, Any]]:
    return [
        {"id": 100 + i, "data": {"image": f"/data/upload/7/0123abcd-{body}.png"}} for i, body in enumerate(bodies)
    ]


def predict(client: FlaskClient, tasks: list[Any], config: str = label_config(), **more: Any) -> Any:
    body = {"tasks": tasks, "label_config": config, "project": PROJECT, "params": {"context": None}} | more
    return client.post("/predict", json=body)


def setup(client: FlaskClient, config: str = label_config(), **more: Any) -> Any:
    return client.post("/setup", json={"project": PROJECT, "schema": config, "extra_params": None} | more)


def event(action: str, **project: Any) -> dict[str, Any]:
    return {"action": action, "project": {"id": 7, "label_config": label_config()} | project}


def kept_in_store(services: Services, job: str) -> str:
    """A model of project 7 that differs from the default in its tag alone, as a training leaves it in the store."""
    folder = services.store.registry.path(services.store.live_tag())
    card = load_card(DEFAULT_MODEL)
    hooks = (Preprocess(card.size_px), Postprocess(card.classes))
    return services.store.registry.add(project_tag("7", job), folder, *hooks, {"classes": list(card.classes)})


def test_health_says_up_and_nothing_of_the_server(client: FlaskClient) -> None:
    """Label Studio wants JSON with a 2xx; no path stands in it."""
    answer = client.get("/health")
    assert answer.status_code == 200
    assert answer.json == {"status": "UP", "model_class": "CelestialBodiesBackend", "version": __version__}
    assert client.get("/").json == answer.json


def test_setup_tells_the_tag_that_predictions_carry(client: FlaskClient, services: Services) -> None:
    """One version string everywhere: Label Studio stores another copy at every call otherwise."""
    version = setup(client).json["model_version"]
    assert version == services.store.live_tag()
    assert {one["model_version"] for one in predict(client, tasks_of(BODIES)).json["results"]} == {version}


def test_a_published_model_answers_from_the_next_request(client: FlaskClient, services: Services) -> None:
    """In /setup and in predictions alike, for its own project alone, and the way back is as short."""
    shared = setup(client).json["model_version"]
    tag = kept_in_store(services, "0badcafe")
    for live in (tag, shared):
        build(services.settings).store.publish("7", live)  # by another process
        assert setup(client).json["model_version"] == live
        (answer,) = predict(client, tasks_of(["Mars"])).json["results"]
        assert (answer["model_version"], answer["result"][0]["value"]["choices"]) == (live, ["Mars"])
        assert setup(client, project="8.1795374408").json["model_version"] == shared


def test_no_batch_is_answered_by_two_models(services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that is published in the middle of a batch answers the next one."""
    client = create_app(build(replace(services.settings, batch_size=2))).test_client()
    shared = setup(client).json["model_version"]
    tag = kept_in_store(services, "0badcafe")
    asked = Classifier.answers

    def published_meanwhile(self: Classifier, batch: np.ndarray) -> Any:
        services.store.publish("7", tag)
        return asked(self, batch)

    monkeypatch.setattr(Classifier, "answers", published_meanwhile)
    assert {one["model_version"] for one in predict(client, tasks_of(BODIES)).json["results"]} == {shared}
    assert {one["model_version"] for one in predict(client, tasks_of(BODIES)).json["results"]} == {tag}


@pytest.mark.parametrize("extra", [None, "", '{"threshold": 0.5}', {"a": 1}])
def test_setup_takes_every_form_of_extra_params(client: FlaskClient, extra: Any) -> None:
    """The UI sends JSON text, the API an object, some calls null."""
    assert setup(client, extra_params=extra, hostname="http://ls", access_token="t").status_code == 200


def test_predictions_stand_in_the_order_of_their_tasks(client: FlaskClient) -> None:
    """Every body is recognised in its own place, in whatever order the tasks come."""
    for bodies in (BODIES, BODIES[::-1], [*BODIES[4:], *BODIES[:4]]):
        results = predict(client, tasks_of(bodies)).json["results"]
        assert [one["result"][0]["value"]["choices"] for one in results] == [[body] for body in bodies]


def test_a_prediction_is_what_label_studio_accepts(client: FlaskClient) -> None:
    """Label Studio's own validation finds no fault, and score is the model's probability of the choice."""
    interface = LabelInterface(label_config())
    for one in predict(client, tasks_of(BODIES)).json["results"]:
        assert interface.validate_prediction(one, return_errors=True) == []
        region = one["result"][0]
        assert (region["from_name"], region["to_name"], region["type"]) == ("choice", "image", "choices")
        assert region["id"]
        assert 0 <= one["score"] <= 1


def test_the_score_is_the_models_own_probability(client: FlaskClient, services: Services) -> None:
    """Fewer choices do not make the model surer: the score is not spread anew over what is offered."""
    model = services.store.current()
    row = model.probabilities(model.prepare(render("Mars", 21)))[0]
    one = predict(client, tasks_of(["Mars"]), label_config(["Mars", "Venus"])).json["results"][0]
    assert one["score"] == pytest.approx(row[model.classes.index("Mars")], abs=1e-6)
    other = predict(client, tasks_of(["Mars"]), label_config(["Venus", "Earth"])).json["results"][0]
    assert other["result"] == [], "it is neither"
    assert other["score"] == pytest.approx(max(row[model.classes.index(name)] for name in ("Venus", "Earth")), abs=1e-6)


def test_bodies_that_the_default_model_never_saw_get_no_pre_label(services: Services) -> None:
    """Unless the operator wants one; those that it knows keep theirs, each with a higher score than any of those."""
    pictures = [data_uri(render_new(name, 7)) for name in NEW_BODIES]
    new = [{"id": 200 + place, "data": {"image": picture}} for place, picture in enumerate(pictures)]
    for unknown, ticked in (("withhold", 0), ("label", len(NEW_BODIES))):
        given = (replace(services.settings, unknown=unknown), services.store, services.images, services.metrics)
        predictor = Predictor(*given)
        answers = predictor.predict([*tasks_of(BODIES), *new], label_config())
        known, strange = answers[: len(BODIES)], answers[len(BODIES) :]
        assert sum(bool(each["result"]) for each in strange) == ticked
        assert all(each["result"] for each in known)
        if not ticked:
            assert max(each["score"] for each in strange) < min(each["score"] for each in known)
            choice = '<Choice value="Other" predicted_values="__unknown__"/></Choices>'
            other = label_config().replace("</Choices>", choice)
            results = [each["result"] for each in predictor.predict(new, other)]
            assert [result[0]["value"]["choices"] for result in results] == [["Other"]] * len(new)


def test_two_pictures_of_a_task_are_each_looked_at(client: FlaskClient) -> None:
    """A config with two images and two Choices gets a region for each, from its own picture."""
    choices = "".join(f'<Choice value="{body}"/>' for body in BODIES)
    config = (
        '<View><Image name="a" value="$left"/><Image name="b" value="$right"/>'
        f'<Choices name="one" toName="a">{choices}</Choices><Choices name="two" toName="b">{choices}</Choices></View>'
    )
    data = {"left": "/data/upload/7/0123abcd-Saturn.png", "right": "/data/upload/7/0123abcd-Earth.png"}
    (one,) = predict(client, [{"id": 1, "data": data}], config).json["results"]
    assert {r["from_name"]: r["value"]["choices"] for r in one["result"]} == {"one": ["Saturn"], "two": ["Earth"]}


@pytest.mark.parametrize("batch", [1, 3])
def test_a_broken_picture_costs_the_other_one_of_its_task_nothing(
    client: FlaskClient, caplog: pytest.LogCaptureFixture, batch: int
) -> None:
    """What is about the good one is answered, with its score; the log tells of the other. Of two such, nothing is."""
    choices = "".join(f'<Choice value="{body}"/>' for body in BODIES)
    config = (
        '<View><Image name="a" value="$left"/><Image name="b" value="$right"/>'
        f'<Choices name="one" toName="a">{choices}</Choices><Choices name="two" toName="b">{choices}</Choices></View>'
    )
    good, bad = "/data/upload/7/0123abcd-Saturn.png", "data:image/png;base64,aGVsbG8="
    for data, said in (
        ({"left": good, "right": bad}, {"one": ["Saturn"]}),
        ({"left": 7, "right": good}, {"two": ["Saturn"]}),
        ({"right": good}, {"two": ["Saturn"]}),
        ({"left": bad, "right": bad}, None),
    ):
        caplog.clear()
        results = predict(client, [{"id": 5, "data": data}] * batch, config).json["results"]
        for one in results:
            if said is None:
                assert one == []
                continue
            assert {region["from_name"]: region["value"]["choices"] for region in one["result"]} == said
            assert one["score"] == one["result"][0]["score"] > 0.5
        told = [message for message in caplog.messages if message.startswith("Task 5: ")]
        assert len(told) == batch
        assert ("nothing is said of its picture" in told[0]) == (said is not None)


def test_a_task_that_fails_costs_no_other_its_prediction(
    client: FlaskClient, caplog: pytest.LogCaptureFixture
) -> None:
    """`[]` in its own place, a log line with its id and the reason, everybody else predicted."""
    text = base64.b64encode(b"I am no picture").decode()
    tasks = tasks_of(BODIES)
    tasks[1]["data"] = {"image": f"data:image/jpeg;base64,{text}"}
    tasks[3]["data"] = {"picture": "/data/upload/7/0123abcd-Mars.png"}
    tasks[5] = "garbage"  # type: ignore[call-overload]
    tasks[7]["data"] = {"image": None}
    tasks[8] = {"id": 108}
    with caplog.at_level(logging.WARNING):
        results = predict(client, tasks).json["results"]
    failed = [i for i, one in enumerate(results) if one == []]
    assert failed == [1, 3, 5, 7, 8]
    assert [one["result"][0]["value"]["choices"][0] for one in results if one] == [
        body for i, body in enumerate(BODIES) if i not in failed
    ]
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("Task ")]
    assert sorted(line.split(":")[0] for line in lines) == [
        "Task 101", "Task 103", "Task 107", "Task 108", "Task without an id",
    ]  # fmt: skip
    assert not any("Traceback" in record.getMessage() or record.exc_info for record in caplog.records)


def test_an_unforeseen_failure_of_one_task_is_its_own(
    client: FlaskClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What nobody foresaw is logged with its traceback, and the other tasks are predicted all the same."""
    prepare = Classifier.prepare

    def broken(self: Classifier, picture: Any, key: None) -> Any:
        if picture.getpixel((0, 0)) == (255, 0, 255):
            raise ZeroDivisionError
        return prepare(self, picture, key)

    monkeypatch.setattr(Classifier, "prepare", broken)
    pink = io.BytesIO()
    picture = render("Mars", 21)
    picture.putpixel((0, 0), (255, 0, 255))
    picture.save(pink, "PNG")
    tasks = tasks_of(["Venus", "Mars"])
    tasks[1]["data"]["image"] = "data:image/png;base64," + base64.b64encode(pink.getvalue()).decode()
    results = predict(client, tasks).json["results"]
    assert results[1] == []
    assert results[0]["result"][0]["value"]["choices"] == ["Venus"]
    assert any(record.exc_info for record in caplog.records)


def test_a_model_that_gives_no_numbers_stores_nothing(
    client: FlaskClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row of NaN would lose Label Studio's whole batch; it becomes `[]`."""

    def answers(self: Classifier, batch: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rows = np.full((len(batch), len(self.classes)), 0.1)
        rows[0] = np.nan
        return rows, np.zeros((len(batch), 1))

    monkeypatch.setattr(Classifier, "answers", answers)
    results = predict(client, tasks_of(["Venus", "Mars"])).json["results"]
    assert results[0] == []
    assert results[1]["score"] == pytest.approx(0.1)


def test_no_tasks_give_no_results(client: FlaskClient) -> None:
    """An empty batch is answered by an empty list."""
    assert predict(client, []).json["results"] == []


def test_a_process_predicts_before_it_was_set_up(services: Services) -> None:
    """/setup may have gone to another worker: nothing is kept from one request to the next."""
    first, second = create_app(services).test_client(), create_app(services).test_client()
    setup(first, MARS_ONLY)
    (one,) = predict(second, tasks_of(["Earth"])).json["results"]
    assert one["result"][0]["value"]["choices"] == ["Earth"]


def test_requests_side_by_side_keep_to_their_own_config(services: Services) -> None:
    """Two projects at the same moment each get choices of their own label config."""
    seen: dict[str, set[str]] = {"Mars": set(), "Earth": set()}
    app = create_app(services)

    def ask(choice: str) -> None:
        own = app.test_client()
        for _ in range(10):
            for one in predict(own, tasks_of(BODIES), label_config([choice, "none"])).json["results"]:
                seen[choice].update(name for region in one["result"] for name in region["value"]["choices"])

    threads = [threading.Thread(target=ask, args=(choice,)) for choice in seen]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {"Mars": {"Mars"}, "Earth": {"Earth"}}


def test_any_choices_on_a_picture_can_be_connected(client: FlaskClient, caplog: pytest.LogCaptureFixture) -> None:
    """Until there are labels the version says so, tasks are answered without a look, and the log names both lists."""
    with caplog.at_level(logging.INFO):
        answer = setup(client, label_config(["cat", "dog"]))
        results = predict(client, [{"id": 1, "data": {"image": "http://nowhere.example/x.png"}}] * 3,
                          label_config(["cat", "dog"])).json["results"]  # fmt: skip
    assert (answer.status_code, answer.json) == (200, {"model_version": NEEDS_LABELS})
    assert results == [[], [], []]
    lists = "None of the choices ['cat', 'dog'] is a class of the model ['Earth', 'Jupiter', 'Mars'"
    assert any(message.startswith(lists) for message in caplog.messages)
    assert not any(message.startswith("Task ") for message in caplog.messages), "no picture was read"


@pytest.mark.parametrize("config", ["<View></View>", "", '<View><Image name="image" value="$image"/></View>'])
def test_a_project_without_a_label_config_can_be_connected(client: FlaskClient, config: str) -> None:
    """Label Studio makes new projects so; whoever asks for predictions gets none, and no error."""
    answer = setup(client, config)
    assert (answer.status_code, answer.json) == (200, {"model_version": NEEDS_LABELS})
    assert predict(client, tasks_of(["Mars"]), config).json["results"] == [[]]
    bare = client.post("/predict", json={"tasks": tasks_of(["Mars"])})
    assert (bare.status_code, bare.json["results"]) == (200, [[]])


def test_what_is_missing_stands_in_the_log_at_setup(
    services: Services, caplog: pytest.LogCaptureFixture
) -> None:
    """Once for each config and count, so that it is told anew when labels were added."""
    said = "cat has 1 of 3 labels."
    given = (services.settings, services.store, services.images, services.metrics, lambda number: f"{number}: {said}")
    client = create_app(replace(services, predictor=Predictor(*given))).test_client()
    for _ in range(2):
        setup(client, label_config(["cat", "dog"]))
        setup(client, label_config(["Mars"]))
    assert caplog.text.count(f"Nothing can be predicted in project 7 yet. 7: {said}") == 1
    said = "cat has 2 of 3 labels."
    setup(client, label_config(["cat", "dog"]))
    assert caplog.text.count(f"Nothing can be predicted in project 7 yet. 7: {said}") == 1


@pytest.mark.parametrize("config", ["<View", label_config([]), label_config(["Erde\nÖ"]).replace("<Image", "<Text")])
def test_setup_refuses_a_config_that_cannot_be_served(client: FlaskClient, config: str) -> None:
    """The reason phrase is what Label Studio shows; a line break or a foreign letter in it would break the answer."""
    answer = setup(client, config)
    assert answer.status_code == 422
    assert answer.status.startswith("422 The label config ")
    assert answer.status.isascii()
    assert answer.status.isprintable()


def test_what_is_only_partly_served_is_told_once(client: FlaskClient, caplog: pytest.LogCaptureFixture) -> None:
    """A choice that can never be predicted is named in the log at the first /setup, not at every one."""
    with caplog.at_level(logging.WARNING):
        assert setup(client, MARS_ONLY).status_code == 200
        told = [record.getMessage() for record in caplog.records]
        setup(client, MARS_ONLY)
        predict(client, tasks_of(["Mars"]), MARS_ONLY)
    assert any("Moon base" in line for line in told)
    assert [record.getMessage() for record in caplog.records] == told


@pytest.mark.parametrize("action", ["TASKS_CREATED", "PROJECT_UPDATED", "NEVER_HEARD_OF"])
def test_events_of_no_interest_are_waved_through(client: FlaskClient, action: str) -> None:
    """Label Studio sends every event of a project; those that train nothing get a 2xx."""
    answer = client.post("/webhook", json=event(action))
    assert answer.status_code == 200
    assert answer.json == {"status": "Unknown event"}


@pytest.mark.parametrize(
    "action",
    ["START_TRAINING", "ANNOTATION_CREATED", "ANNOTATIONS_CREATED", "ANNOTATION_UPDATED", "ANNOTATIONS_DELETED"],
)
def test_training_events_reach_fit(client: FlaskClient, action: str) -> None:
    """Label Studio's names, plural ones included, arrive in `fit`, also for a config that matches nothing."""
    answer = client.post("/webhook", json=event(action, label_config=label_config(["cat"])))
    assert answer.status_code == 201
    assert answer.json["status"] == "ok"
    assert answer.json["result"]["event"] == action


def test_a_training_is_written_down_before_it_is_answered(client: FlaskClient, services: Services) -> None:
    """What was asked for three times is one job of one project, which the answer names."""
    answers = [client.post("/webhook", json=event("START_TRAINING")).json["result"] for _ in range(3)]
    (job,) = services.jobs.ledger.jobs()
    assert {answer["job"] for answer in answers} == {job.id}
    assert (job.project, job.state, job.requests) == ("7", "waiting", 3)
    assert services.jobs.huey.pending_count() == 1


def test_a_training_that_cannot_be_written_down_is_not_accepted(settings: Settings, tmp_path: Path) -> None:
    """A full or foreign disk: an error with what to do, and no job that nobody will run."""
    (tmp_path / "blocked").write_text("")
    client = create_app(build(replace(settings, model_dir=tmp_path / "blocked"))).test_client()
    answer = client.post("/webhook", json=event("START_TRAINING"))
    assert answer.status_code == 503
    assert "Nothing was accepted" in answer.json["detail"]
    assert "Nothing was accepted" in answer.status


@pytest.mark.parametrize(
    ("path", "body", "sentence"),
    [
        pytest.param("/predict", {"label_config": "x"}, "missing required field 'tasks'", id="no tasks"),
        pytest.param("/predict", {"tasks": 3, "label_config": "x"}, "got 'int' - at '$.tasks'", id="tasks"),
        pytest.param("/predict", {"tasks": [], "label_config": 1}, "got 'int' - at '$.label_config'", id="config"),
        pytest.param("/predict", [], "must be a JSON object, got list", id="a list"),
        pytest.param("/setup", {"project": "1.2"}, "missing required field 'schema'", id="no schema"),
        pytest.param("/setup", {"project": {}, "schema": "x"}, "got 'object' - at '$.project'", id="project"),
        pytest.param("/webhook", {"project": {"id": 1}}, "missing required field 'action'", id="no action"),
        pytest.param("/webhook", {"action": "START_TRAINING"}, "missing required field 'project'", id="no project"),
        pytest.param(
            "/webhook", {"action": "START_TRAINING", "project": {"id": "x"}}, "- at '$.project.id'", id="bad id"
        ),
    ],
)
def test_a_malformed_body_gets_a_sentence(client: FlaskClient, path: str, body: Any, sentence: str) -> None:
    """4xx with the key that is wrong, in the body and in the status line."""
    answer = client.post(path, json=body)
    assert answer.status_code == 400
    assert sentence in answer.json["detail"]
    assert sentence in answer.status


@pytest.mark.parametrize("path", ["/setup", "/predict", "/webhook"])
@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b"null"])
def test_what_is_no_json_gets_a_sentence(client: FlaskClient, path: str, data: bytes) -> None:
    """Bytes that are no JSON object are the sender's fault, and are told so."""
    answer = client.post(path, data=data, content_type="application/json")
    assert answer.status_code == 400
    assert "must be a JSON object" in answer.json["detail"]


def test_params_cannot_reach_into_the_sdk(client: FlaskClient) -> None:
    """Whatever stands in `params`, null included, the tasks of the body are those that are predicted."""
    for params in (None, {"tasks": [], "project": "x", "login": "a"}, {"context": {"result": []}}):
        assert len(predict(client, tasks_of(["Mars"]), params=params).json["results"]) == 1
    assert predict(client, tasks_of(["Mars"]), params=[1]).status_code == 400


def test_only_the_protocols_routes_are_served(client: FlaskClient) -> None:
    """Old routes of one SDK generation are as absent as unknown ones; a wrong method names the right one."""
    for path in ("/train", "/is_training", "/nowhere"):
        assert client.post(path, json={}).status_code == 404
    for path, right, method in (("/predict", "POST", "GET"), ("/versions", "GET", "POST")):
        wrong = client.open(path, method=method, json={})
        assert wrong.status_code == 405
        assert right in wrong.headers["Allow"]


def test_an_unforeseen_failure_shows_a_request_id_and_no_traceback(
    client: FlaskClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The client gets an id, the log the traceback under the same id."""

    def broken(*_: Any) -> Any:
        raise FileNotFoundError(2, "No such file", "/srv/secret/place")

    monkeypatch.setattr("celestial_backend.predictor.Predictor.predict", broken)
    answer = predict(client, tasks_of(["Mars"]))
    assert answer.status_code == 500
    assert "Traceback" not in answer.get_data(as_text=True)
    assert "secret" not in answer.get_data(as_text=True)
    request_id = answer.json["request_id"]
    assert answer.headers["X-Request-ID"] == request_id
    logged = [record for record in caplog.records if request_id in record.getMessage() and record.exc_info]
    assert len(logged) == 1


def test_a_model_that_is_gone_is_told_in_setup_and_predict(settings: Settings) -> None:
    """503 with what to set; the process goes on."""
    client = create_app(build(replace(settings, model="celestial_bodies_classifier_model:gone"))).test_client()
    for answer in (setup(client), predict(client, tasks_of(["Mars"]))):
        assert answer.status_code == 503
        assert "Set CELESTIAL_MODEL" in answer.status
        assert "Traceback" not in answer.get_data(as_text=True)
    assert client.get("/health").status_code == 200


@pytest.mark.parametrize("path", ["/health", "/", "/metrics", "/setup", "/predict", "/webhook", "/nowhere"])
def test_basic_auth_guards_every_route(services: Services, path: str) -> None:
    """Without, with wrong and with other credentials nothing is told; with the right ones all is as ever."""
    guarded = replace(services, settings=replace(services.settings, basic_auth_user="ü", basic_auth_pass="p:w"))
    client = create_app(guarded).test_client()
    send = client.get if path in ("/health", "/", "/metrics", "/nowhere") else client.post
    wrong: list[dict[str, Any]] = [
        {}, {"auth": ("ü", "wrong")}, {"auth": ("someone", "p:w")},
        {"headers": {"Authorization": "Bearer p:w"}}, {"headers": {"Authorization": "Basic !!"}},
    ]  # fmt: skip
    for given in wrong:
        answer = send(path, **given)
        assert answer.status_code == 401
        assert answer.headers["WWW-Authenticate"].startswith("Basic")
        assert "model_class" not in answer.get_data(as_text=True)
    for pair in ("ü:p:w".encode(), "ü:p:w".encode("latin-1")):  # browsers send the first, Label Studio the second
        right = {"Authorization": "Basic " + base64.b64encode(pair).decode()}
        assert send(path, headers=right).status_code != 401


def test_a_webhook_gets_through_basic_auth_with_a_header(services: Services) -> None:
    """Label Studio's events carry no basic auth by themselves; a header set on the webhook does."""
    guarded = replace(services, settings=replace(services.settings, basic_auth_user="u", basic_auth_pass="p"))
    client = create_app(guarded).test_client()
    assert client.post("/webhook", json=event("START_TRAINING")).status_code == 401
    right = {"Authorization": "Basic " + base64.b64encode(b"u:p").decode()}
    assert client.post("/webhook", json=event("START_TRAINING"), headers=right).status_code == 201


def test_batch_size_bounds_the_forward_pass(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """CELESTIAL_BATCH_SIZE pictures go through the network at once, and no more."""
    sizes: list[int] = []
    plain = Classifier.answers

    def counted(self: Classifier, batch: np.ndarray) -> Any:
        sizes.append(len(batch))
        return plain(self, batch)

    monkeypatch.setattr(Classifier, "answers", counted)
    for size, expected in ((4, [4, 4, 2]), (64, [10])):
        sizes.clear()
        client = create_app(build(replace(settings, batch_size=size))).test_client()
        assert all(predict(client, tasks_of(BODIES)).json["results"])
        assert sizes == expected


def test_fetch_threads_bound_the_pictures_fetched_at_once(
    settings: Settings, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CELESTIAL_FETCH_THREADS pictures are fetched side by side, and no more."""
    running, most, lock = 0, 0, threading.Lock()
    enough = threading.Event()

    def read(*_: Any, **__: Any) -> Any:
        nonlocal running, most
        with lock:
            running, most = running + 1, max(most, running + 1)
        enough.wait(0.05)
        with lock:
            running -= 1
        return (folder / "originals" / "Mars.png").read_bytes()

    monkeypatch.setattr(ImageReader, "near_file", lambda *_: None)
    monkeypatch.setattr(ImageReader, "file", read)
    for threads in (1, 3):
        most = 0
        client = create_app(build(replace(settings, fetch_threads=threads))).test_client()
        predict(client, tasks_of(BODIES))
        assert most == threads


def test_each_picture_of_a_task_is_prepared_once(
    settings: Settings, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where one is here and the other has to be fetched."""
    config = label_config().replace("<View>", '<View><Image name="other" value="$far"/>').replace(
        "</View>", '<Choices name="also" toName="other"><Choice value="Mars"/></Choices></View>'
    )  # fmt: skip
    tasks = [{**task, "data": task["data"] | {"far": "http://far.example/mars.png"}} for task in tasks_of(["Mars"] * 2)]
    mars = (folder / "originals" / "Mars.png").read_bytes()
    monkeypatch.setattr("celestial_backend.pictures.download.Downloader.get", lambda *_: mars)
    prepared: list[Any] = []
    prepare = Classifier.prepare
    monkeypatch.setattr(Classifier, "prepare", lambda *given: prepared.append(1) or prepare(*given))
    results = predict(create_app(build(settings)).test_client(), tasks, config).json["results"]
    assert [{region["from_name"] for region in one["result"]} for one in results] == [{"choice", "also"}] * 2
    assert len(prepared) == 4


def test_a_batch_is_answered_in_time_with_what_is_done(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """After CELESTIAL_PREDICT_MAX_S the rest gets `[]`: Label Studio keeps what came, and asks for the rest again."""
    read = ImageReader.file
    stuck = threading.Event()

    def slow(self: ImageReader, value: Any, task_id: Any) -> Any:
        if "Jupiter" in value:
            stuck.wait(30)
        return read(self, value, task_id)

    monkeypatch.setattr(ImageReader, "near_file", lambda *_: None)
    monkeypatch.setattr(ImageReader, "file", slow)
    client = create_app(build(replace(settings, predict_max_s=1.0, batch_size=4))).test_client()
    predict(client, tasks_of(["Mars"]))  # loads the model
    try:
        with caplog.at_level(logging.WARNING):
            results = predict(client, tasks_of(["Mars", "Jupiter", "Venus", "Jupiter", *BODIES])).json["results"]
    finally:
        stuck.set()
    assert len(results) == 14
    assert [bool(one) for one in results[:8]] == [True, False, True, False, True, False, True, True]
    assert results[8:] == [[]] * 6, "two batches were read already, the third is not begun"
    assert any("9 tasks were not reached in time" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize(
    ("told", "hurries"),
    [("t={:.3f}", True), ("{:.3f}", True), ("t=9{:.3f}", False), ("t=-{:.3f}", False), ("t=nan", False)],
)
def test_a_request_that_a_proxy_repeats_is_answered_while_label_studio_waits(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, told: str, hurries: bool
) -> None:
    """The time counts from `X-Request-Start`; what cannot be a time of now tells nothing."""
    left: list[float] = []

    def look(_: Predictor, tasks: list[Any], _config: str, deadline: float, _project: str) -> list[Any]:
        left.append(deadline - time.monotonic())
        return [[] for _ in tasks]

    monkeypatch.setattr(Predictor, "predict", look)
    client = create_app(build(replace(settings, predict_max_s=60.0))).test_client()
    client.environ_base["HTTP_X_REQUEST_START"] = told.format(time.time() - 40)
    predict(client, tasks_of(["Mars"]))
    (seconds,) = left
    assert 0 < seconds <= 60
    assert (seconds <= 20) is hurries


def test_the_time_that_a_body_takes_counts_once(client: FlaskClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy hands a request on at once, and half a second later its body is there: it was asked when it came."""
    asked: list[float] = []
    monkeypatch.setattr(CelestialBodiesBackend, "predict", lambda *_, asked_at, **__: asked.append(asked_at) or [])
    body = json.dumps({"tasks": [], "label_config": label_config(), "project": "1.1"}).encode()

    class Slow(io.RawIOBase):
        def readinto(self, buffer: Any) -> int:
            time.sleep(0.5)
            buffer[: len(body)] = body
            return len(body)

    came, headers = time.monotonic(), {"X-Request-Start": f"t={time.time():.6f}"}
    sent = {"wsgi.input": Slow(), "CONTENT_LENGTH": str(len(body)), "CONTENT_TYPE": "application/json"}
    assert client.post("/predict", headers=headers, environ_overrides=sent).status_code == 200
    assert asked[0] == pytest.approx(came, abs=0.25)


def test_each_request_leaves_one_line_with_counts(client: FlaskClient, caplog: pytest.LogCaptureFixture) -> None:
    """At INFO the log has one line with project, tasks, failed and seconds, for programs by name; and what failed."""
    with caplog.at_level(logging.INFO):
        predict(client, tasks_of(["Mars", "nowhere"]))
        setup(client)
        client.post("/webhook", json=event("START_TRAINING"))
        client.post("/webhook", json={"action": "TASKS_\n" + "x" * 1000, "project": {"id": 7}})
        client.get("/health")
    records = [record for record in caplog.records if record.name == "celestial_backend.web.app"]
    lines = [re.sub(r"[0-9.]+ s|\[[0-9a-f]{12}\]", "_", record.getMessage()) for record in records]
    assert lines == [
        "POST /predict 200 _ project=7 tasks=2 failed=1 _",
        "POST /setup 200 _ project=7 _",
        "POST /webhook 201 _ project=7 event=START_TRAINING _",
        f"POST /webhook 200 _ event=TASKS_\n{'x' * 93} _",
    ]
    assert not any(record.levelno == logging.INFO and record.name.endswith("predictor") for record in caplog.records)
    facts = vars(records[0])[logs.FACTS]
    assert {name: facts[name] for name in ("project", "tasks", "failed", "path", "status")} == {
        "project": "7", "tasks": 2, "failed": 1, "path": "/predict", "status": 200,
    }  # fmt: skip
    assert facts["seconds"] >= 0
    assert len(facts["request"]) == 12


def test_no_secret_of_a_request_is_logged(client: FlaskClient, caplog: pytest.LogCaptureFixture) -> None:
    """Label Studio hands out a token in /setup and in every event; no line holds it at any level."""
    with caplog.at_level(logging.DEBUG):
        setup(client, access_token="s3cret-token")
        client.post("/webhook", json=event("START_TRAINING", token="s3cret-token"))
        client.post("/predict", json={"tasks": "s3cret-token"})
    assert "s3cret-token" not in caplog.text


# A model of heads


CLOTHES = (
    '<View><Image name="image" value="$image"/><Choices name="kind" toName="image"><Choice value="shirt"/>'
    '<Choice value="hat"/></Choices><Choices name="flaws" toName="image" choice="multiple"><Choice value="torn"/>'
    '<Choice value="dirty"/></Choices></View>'
)
KIND = Head("kind", ("shirt", "hat"), np.array([[9, 0], [0, 0], [0, 9]], np.float32), np.zeros(2, np.float32))
FLAWS = Head("flaws", ("torn", "dirty"), np.array([[9, 9], [0, 0], [0, 0]], np.float32), np.array([-5, -5], np.float32),
             multiple=True)  # fmt: skip


@pytest.fixture
def colours(monkeypatch: pytest.MonkeyPatch) -> Colours:
    """The embedder of this process."""
    embedder = Colours()
    monkeypatch.setattr("celestial_backend.models.store.open_embedder", lambda _: embedder)
    return embedder


def train(services: Services, job: str, *heads: Head) -> str:
    """A model of heads for project 7, made live as a training does."""
    folder = services.settings.model_dir / job
    folder.mkdir()
    manifest = headed.save(folder, heads, "colours-1")
    tag = services.store.registry.add_heads(project_tag("7", job), folder, manifest)
    services.store.publish("7", tag)
    return tag


def pictures(*names: str) -> list[dict[str, Any]]:
    return [
        {"id": number, "data": {"image": "data:image/png;base64," + base64.b64encode(png(name)).decode()}}
        for number, name in enumerate(names, 1)
    ]


@pytest.mark.usefixtures("colours")
def test_learned_choices_are_predicted_from_the_next_request(services: Services) -> None:
    """Control by control, under one version; a control that is not learned yet stays empty."""
    client = create_app(services).test_client()
    assert setup(client, CLOTHES).json["model_version"] == NEEDS_LABELS
    first = train(services, "0badcafe", KIND)
    (red,) = predict(client, pictures("red"), CLOTHES).json["results"]
    assert {region["from_name"]: region["value"]["choices"] for region in red["result"]} == {"kind": ["shirt"]}
    second = train(services, "0badcaff", KIND, FLAWS)
    assert setup(client, CLOTHES).json["model_version"] == second != first
    red, blue = predict(client, pictures("red", "blue"), CLOTHES).json["results"]
    assert {region["from_name"]: region["value"]["choices"] for region in red["result"]} == {
        "kind": ["shirt"], "flaws": ["torn", "dirty"]
    }  # fmt: skip
    assert {region["from_name"]: region["value"]["choices"] for region in blue["result"]} == {"kind": ["hat"]}
    assert {red["model_version"], blue["model_version"]} == {second}
    for answer in (red, blue):
        assert LabelInterface(CLOTHES).validate_prediction(answer, return_errors=True) == []


@pytest.mark.usefixtures("colours")
def test_nothing_ticked_is_an_answer_too(services: Services) -> None:
    """Where several may be ticked and none is: a prediction without regions, whose score says how sure it is."""
    tag = train(services, "0badcafe", FLAWS)
    (blue,) = predict(create_app(services).test_client(), pictures("blue"), CLOTHES).json["results"]
    assert (blue["result"], blue["model_version"]) == ([], tag)
    assert blue["score"] == pytest.approx(1 - 1 / (1 + np.exp(5)))


def test_a_known_picture_is_not_decoded_again(
    services: Services, colours: Colours, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its bytes are read, as somebody may have changed it; nothing else is done, by the next model either."""
    train(services, "0badcafe", KIND)
    client = create_app(services).test_client()
    before = predict(client, pictures("red", "blue"), CLOTHES).json["results"]
    services.store.features.close()
    decoded: list[Any] = []
    plain_decoded = ImageReader.decoded
    monkeypatch.setattr(ImageReader, "decoded", lambda *given: decoded.append(given[1]) or plain_decoded(*given))
    assert predict(client, pictures("red", "blue"), CLOTHES).json["results"] == before
    train(services, "0badcaff", KIND, FLAWS)
    assert all(predict(client, pictures("blue", "red"), CLOTHES).json["results"])
    assert (decoded, colours.seen) == ([], 2)
    assert all(predict(client, pictures("red", "tan"), CLOTHES).json["results"])
    assert (len(decoded), colours.seen) == (1, 3)


@pytest.mark.usefixtures("colours")
def test_a_picture_that_fails_costs_no_other_its_answer(services: Services, caplog: pytest.LogCaptureFixture) -> None:
    """With a model of heads as with any other, also where it fails in the embedder."""
    train(services, "0badcafe", KIND)
    tasks = pictures("red", "red", "blue")
    tasks[1]["data"]["image"] = "data:image/png;base64,AAAA"
    results = predict(create_app(services).test_client(), tasks, CLOTHES).json["results"]
    assert [bool(result) for result in results] == [True, False, True]
    assert "Task 2: The picture data:image/png;base64,... cannot be used" in caplog.text


def test_features_of_another_embedder_are_told(services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    """A setting that was changed under a live model: what to set back, in /predict and then in /setup."""
    train(services, "0badcafe", KIND)
    monkeypatch.setattr("celestial_backend.models.store.open_embedder", lambda _: Colours("colours-2"))
    client = create_app(services).test_client()
    for answer in (predict(client, pictures("red"), CLOTHES), setup(client, CLOTHES)):
        assert answer.status_code == 503
        assert "learned on features of the embedder colours-1, and colours-2 is set now. Set" in answer.status


def test_plain_networks_remember_no_picture(client: FlaskClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing is computed to know one by."""

    def never(*_: Any) -> Any:
        raise AssertionError

    monkeypatch.setattr("celestial_backend.models.headed.digest", never)
    monkeypatch.setattr("celestial_backend.features.FeatureCache.get", never)
    assert all(predict(client, tasks_of(BODIES)).json["results"])
