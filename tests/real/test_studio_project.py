"""StudioProject: what is read of a real Label Studio while people work in it, and what a training sets there."""

from __future__ import annotations

import base64
import json
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import requests

from celestial_backend.errors import ProjectGoneError, StudioError
from celestial_backend.settings import MODEL_NAME, Settings
from celestial_backend.studio import project as project_module
from celestial_backend.studio.client import Studio
from celestial_backend.studio.pending import PendingTasks
from celestial_backend.studio.project import Labels, Removed, StudioProject
from tests.support.backend_server import label_config
from tests.support.bounds import wait_for
from tests.support.gate import gate
from tests.support.label_studio import LabelStudioServer
from tests.support.picture_host import PictureHost, dripping, picture_host
from tests.support.stand_in import stand_in
from tests.unit.studio.test_client import LEGACY, PAT, REFRESH, issuing, refreshes, token

OLD, NEW = f"{MODEL_NAME}:old", f"{MODEL_NAME}:new"
IMAGE = "http://127.0.0.1/a.png"


def connect(url: str, key: str | None, project: object, patience_s: float = 20) -> StudioProject:
    return StudioProject(Studio(Settings(label_studio_url=url, label_studio_api_key=key)), str(project), patience_s)


def read(studio: LabelStudioServer, project: object) -> StudioProject:
    return connect(studio.url, studio.legacy_token, project)


def labelled(studio: LabelStudioServer, count: int, more: int = 0) -> tuple[int, list[int]]:
    """A project with some labelled tasks and then some without a label; its id and the tasks'."""
    project = studio.create_project("labelled")
    region = {"from_name": "choice", "to_name": "image", "type": "choices", "value": {"choices": ["Mars"]}}
    body: list[dict[str, Any]] = [{"data": {"image": IMAGE}} for _ in range(count + more)]
    for task in body[:count]:
        task["annotations"] = [{"result": [region], "ground_truth": False}]
    answer = studio.api("POST", f"/api/projects/{project}/import?return_task_ids=true", json=body)
    return project, answer["task_ids"]


# Reading


@pytest.mark.parametrize("kind", ["legacy", "personal"])
def test_either_kind_of_token_reads_a_project(label_studio: LabelStudioServer, kind: str) -> None:
    """The label config and the labelled tasks come with a legacy token and with a personal access token."""
    key = label_studio.legacy_token if kind == "legacy" else label_studio.personal_access_token
    project, tasks = labelled(label_studio, 2, more=1)
    subject = connect(label_studio.url, key, project)
    assert subject.label_config() == label_config()
    assert [task["id"] for task in subject.labelled_tasks()] == tasks[:2]


def test_no_task_is_lost_or_doubled_while_people_label(
    label_studio: LabelStudioServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Pages follow the ids: labels that come and go on read and unread tasks shift nothing.

    With page numbers, a label that is deleted from a page already read pulls a task of the next page into it.
    """
    monkeypatch.setattr(project_module, "PAGE", 10)
    project, tasks = labelled(label_studio, 35, more=5)
    reading = read(label_studio, project).labelled_tasks()
    seen = [next(reading)["id"] for _ in range(10)]
    for annotation in label_studio.annotations(project)[:3]:
        label_studio.api("DELETE", f"/api/annotations/{annotation['id']}/")
    label_studio.annotate(tasks[36], "Venus")
    seen += [task["id"] for task in reading]
    assert seen == [*tasks[:35], tasks[36]]


def test_what_a_task_brings(label_studio: LabelStudioServer) -> None:
    """Annotations with result, author, marks and parent; predictions with id and result."""
    project = label_studio.create_project("one task")
    (task,) = label_studio.import_tasks(project, ["s3://bucket/a b.png"])
    region = {"from_name": "choice", "to_name": "image", "type": "choices", "value": {"choices": ["Mars"]}}
    body = {"task": task, "result": [region], "score": 0.5, "model_version": OLD}
    prediction = label_studio.api("POST", "/api/predictions/", json=body)["id"]
    body = {"result": [region | {"origin": "prediction"}], "parent_prediction": prediction}
    annotation = label_studio.api("POST", f"/api/tasks/{task}/annotations/", json=body)

    (seen,) = read(label_studio, project).labelled_tasks()

    assert set(seen) == {"id", "data", "annotations", "predictions"}
    assert seen["predictions"] == [{"id": prediction, "result": [region]}]
    (given,) = seen["annotations"]
    expected = {
        "id": annotation["id"],
        "result": body["result"],
        "completed_by": 1,
        "was_cancelled": False,
        "ground_truth": False,
        "parent_prediction": prediction,
        "updated_at": annotation["updated_at"],
    }
    assert {name: given[name] for name in expected} == expected
    assert seen["data"] == {"image": "s3://bucket/a b.png"}


def test_labels_since(label_studio: LabelStudioServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """New and changed labels count; predictions, skips, deletions and labels that were read do not."""
    project, tasks = labelled(label_studio, 4, more=3)
    subject = read(label_studio, project)
    assert subject.labels_since(None) == 4
    moment = max(each["updated_at"] for each in label_studio.annotations(project))
    assert subject.labels_since(moment) == 0

    with stand_in(OLD) as model:
        label_studio.connect_backend(project, model.url)
        label_studio.retrieve(project)  # touches every task
    assert subject.labels_since(moment) == 0

    first, second, third, _ = label_studio.annotations(project)
    label_studio.api("PATCH", f"/api/annotations/{first['id']}/", json={"result": second["result"]})
    assert subject.labels_since(moment) == 1
    created = label_studio.annotate(tasks[4], "Venus")
    assert subject.labels_since(moment) == 2
    label_studio.api("POST", f"/api/tasks/{tasks[5]}/annotations/", json={"result": [], "was_cancelled": True})
    label_studio.api("DELETE", f"/api/annotations/{third['id']}/")
    assert subject.labels_since(moment) == 2
    assert subject.labels_since(created["updated_at"]) == 0

    monkeypatch.setattr(project_module, "MOST_COUNTED", 1)
    assert subject.labels_since(moment) == 1, "of too many touched tasks those are counted that were completed since"


def test_labels_now(label_studio: LabelStudioServer) -> None:
    """Their number, and a moment after which no label is new until one is made or changed."""
    project, tasks = labelled(label_studio, 0, more=4)
    subject = read(label_studio, project)
    assert subject.labels_now() == Labels(0, "")
    assert subject.labels_since("") == 0
    for task in tasks[:3]:
        given = label_studio.annotate(task, "Mars")
    label_studio.api("POST", f"/api/tasks/{tasks[3]}/annotations/", json={"result": [], "was_cancelled": True})
    total, moment = subject.labels_now()
    assert (total, subject.labels_since(moment)) == (3, 0)
    label_studio.api("PATCH", f"/api/annotations/{given['id']}/", json={"result": given["result"]})
    assert (subject.labels_now().total, subject.labels_since(moment)) == (3, 1)
    label_studio.api("DELETE", f"/api/annotations/{given['id']}/")
    assert subject.labels_now().total == 2


def test_a_sibling_is_another_project_over_the_same_connection(label_studio: LabelStudioServer) -> None:
    """Its own tasks, and not a second client, which takes longer to make than most answers."""
    first, second = (labelled(label_studio, count)[0] for count in (1, 2))
    subject = read(label_studio, first)
    assert subject.labels_now().total == 1
    sibling = subject.sibling(str(second))
    assert (sibling.labels_now().total, sibling._client) == (2, subject._client)


def test_annotations_are_those_of_labelled_tasks(label_studio: LabelStudioServer) -> None:
    """As far as labels are counted by them."""
    project, _ = labelled(label_studio, 3, more=2)
    label_studio.annotate(label_studio.tasks(project)[0]["id"], "Venus")
    subject = read(label_studio, project)
    counted = ("id", "result", "was_cancelled", "ground_truth", "completed_by", "updated_at")
    whole = [task["annotations"] for task in subject.labelled_tasks()]
    assert [len(each) for each in whole] == [2, 1, 1]

    def parts(tasks: Iterable[list[dict[str, Any]]]) -> list[list[dict[str, Any]]]:
        return [[{name: each[name] for name in counted} for each in task] for task in tasks]

    assert parts(whole) == parts(subject.annotations())


# Patience


def test_a_label_studio_that_is_away_for_seconds_costs_nothing(
    label_studio: LabelStudioServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Connections cut and refused in the middle of a listing: it goes on where it was, and the log tells."""
    monkeypatch.setattr(project_module, "PAGE", 10)
    monkeypatch.setattr(project_module, "FIRST_PAUSE_S", 0.2)
    project, tasks = labelled(label_studio, 25)
    for key in (label_studio.legacy_token, label_studio.personal_access_token):
        with gate(label_studio.url) as door, caplog.at_level(logging.WARNING, "celestial_backend"):
            caplog.clear()
            reading = connect(door.url, key, project).labelled_tasks()
            seen = [next(reading)["id"]]
            door.shut()
            threading.Timer(2, door.open).start()
            seen += [task["id"] for task in reading]
        assert seen == tasks
        assert "cannot be reached" in caplog.text
        assert key not in caplog.text


def test_patience_ends(label_studio: LabelStudioServer) -> None:
    """A Label Studio that stays away is an error after the patience, with what to look at."""
    with gate(label_studio.url) as door:
        door.shut()
        started = time.monotonic()
        with pytest.raises(StudioError, match=r"cannot be reached at http://127\.0\.0\.1:\d+ \(ConnectError\)"):
            connect(door.url, LEGACY, 1, patience_s=1.5).label_config()
        assert 1.4 < time.monotonic() - started < 5


@pytest.fixture
def host() -> Iterator[PictureHost]:
    with picture_host() as server:
        yield server


@pytest.mark.parametrize("answer", [(503, {}, b"<html>"), (429, {}, b"{}"), (500, {}, b'{"detail": "Oh."}')])
def test_statuses_that_pass_are_tried_again(host: PictureHost, answer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an overloaded or starting server says is no reason to give up."""
    monkeypatch.setattr(project_module, "FIRST_PAUSE_S", 0.05)
    path = "/api/projects/7/"
    host.answers[path] = answer

    def recover() -> None:
        wait_for(lambda: len(host.requests) > 1)
        host.answers[path] = b'{"id": 7, "title": "t", "label_config": "<View/>"}'

    threading.Thread(target=recover).start()
    assert connect(host.url, LEGACY, 7).label_config() == "<View/>"


def test_a_proxy_that_answers_for_the_token_is_waited_for(host: PictureHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page instead of an access token, as a proxy gives while Label Studio restarts, may pass too."""
    monkeypatch.setattr(project_module, "FIRST_PAUSE_S", 0.05)
    host.answers["/api/projects/7/"] = b'{"id": 7, "title": "t", "label_config": "<View/>"}'
    host.answers[REFRESH] = (502, {}, b"<html>")
    threading.Timer(0.3, lambda: host.answers.update({REFRESH: issuing(host)})).start()
    assert connect(host.url, PAT, 7).label_config() == "<View/>"


def test_access_tokens_are_renewed(host: PictureHost) -> None:
    """An access token that has run out is replaced before the next call, and one that is refused is once."""
    host.answers["/api/projects/7/"] = b'{"id": 7, "title": "t", "label_config": "<View/>"}'
    host.answers[REFRESH] = issuing(host, life_s=-1)
    subject = connect(host.url, PAT, 7)
    assert subject.label_config() == subject.label_config()
    assert refreshes(host) == 2

    host.answers[REFRESH] = issuing(host)
    subject = connect(host.url, PAT, 7)
    subject.label_config()
    host.answers["/api/projects/7/"] = (401, {"Set-Cookie": "sessionid=s3cret"}, b'{"detail": "Token expired."}')
    before = len(host.requests)
    assert "answered 401 (Token expired)" in said(subject)
    assert len(host.requests) - before == 3  # refused, renewed, refused


# Errors at once


def said(subject: StudioProject) -> str:
    started = time.monotonic()
    with pytest.raises(StudioError) as raised:
        subject.label_config()
    assert time.monotonic() - started < 20, "what needs a person is not waited for"
    for secret in (LEGACY, PAT, "sessionid", "s3cret"):
        assert secret not in str(raised.value)
    return str(raised.value)


def test_refusals(label_studio: LabelStudioServer) -> None:
    """A wrong token and a project that is not there are said at once, with what to do."""
    assert said(connect(label_studio.url, "0" * 40, 1)) == (
        f"Label Studio at {label_studio.url} answered 401 (Invalid token) when asked for project 1."
        " Set LABEL_STUDIO_API_KEY to a valid token, from Account & Settings."
    )
    assert said(read(label_studio, 987654)) == (
        f"Label Studio at {label_studio.url} answered 404 (No Project matches the given query) when asked for"
        " project 987654. The project was deleted, or the token's user may not see it. Check both in Label Studio."
    )


def test_a_project_that_is_gone(label_studio: LabelStudioServer) -> None:
    """Deleted or never there, in every call that an unattended training makes: an error of its own, at once."""
    project, _ = labelled(label_studio, 1)
    assert read(label_studio, project).labels_since(None) == 1
    label_studio.api("DELETE", f"/api/projects/{project}/")
    calls: list[Callable[[StudioProject], object]] = [
        StudioProject.label_config,
        lambda subject: next(subject.labelled_tasks()),
        lambda subject: subject.labels_since(None),
        StudioProject.labels_now,
        lambda subject: next(subject.annotations()),
        lambda subject: subject.in_step(NEW, keep_predictions=False),
        lambda subject: subject.remove_replaced(NEW, 9),
    ]
    for number in (project, 987654, 2**63 - 1):
        for call in calls:
            with pytest.raises(ProjectGoneError, match="answered 404"):
                call(read(label_studio, number))


NO_PROJECT = b'{"id": "1", "status_code": 404, "version": "1.23.2", "detail": "No Project matches the given query."}'


@pytest.mark.parametrize(
    ("answers", "gone"),
    [
        pytest.param({"/api/projects/7/": NO_PROJECT}, True, id="Label Studio says so"),
        pytest.param({"/api/projects/7/": b"<html>Not Found</html>"}, False, id="a proxy says so"),
        pytest.param({"/api/projects/7/": b'{"detail": "Not Found"}'}, False, id="another program says so"),
        pytest.param({"/api/projects/7/": b""}, False, id="nobody knows who says so"),
    ],
)
def test_only_label_studio_itself_says_that_a_project_is_gone(host: PictureHost, answers: Any, gone: bool) -> None:
    """A proxy or a wrong LABEL_STUDIO_URL answers 404 to everything, and no project is forgotten for that."""
    host.answers |= {path: (404, {"Content-Type": "application/json"}, body) for path, body in answers.items()}
    with pytest.raises(StudioError, match="answered 404") as raised:
        connect(host.url, LEGACY, 7).label_config()
    assert isinstance(raised.value, ProjectGoneError) == gone


def test_another_404_is_no_lost_project(host: PictureHost) -> None:
    """Something of the project is not there, and the project is."""
    host.answers["/api/projects/7/"] = b'{"id": 7, "title": "t", "label_config": "<View/>"}'
    host.other = (404, {"Content-Type": "application/json"}, NO_PROJECT)
    with pytest.raises(StudioError, match="answered 404") as raised:
        connect(host.url, LEGACY, 7).labels_since(None)
    assert not isinstance(raised.value, ProjectGoneError)


def test_other_refusals(host: PictureHost) -> None:
    """A user without access, and a server that is something else."""
    host.answers["/api/projects/7/"] = (403, {"Set-Cookie": "sessionid=s3cret"}, b'{"detail": "No."}')
    assert said(connect(host.url, LEGACY, 7)) == (
        f"Label Studio at {host.url} answered 403 (No) when asked for project 7."
        " Give the token's user access to the project."
    )
    host.answers["/api/projects/7/"] = b"<html>"
    assert said(connect(host.url.replace("//", "//me:s3cret@"), LEGACY, 7)) == (
        f"What answers at {host.url} is not Label Studio: it did not give project 7. Check LABEL_STUDIO_URL."
    )
    host.answers["/api/projects/7/"] = 418
    assert said(connect(host.url, LEGACY, 7)).endswith("Check LABEL_STUDIO_URL, sub-path included.")


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(lambda _: time.sleep(1), id="silence"),
        pytest.param(dripping(0.1, b"HTTP/1.1 200 OK\r\nX-Slow: "), id="a head that drips"),
        pytest.param(dripping(0.1), id="a body that drips"),
        pytest.param((302, {"Location": "/api/projects/7/"}, b""), id="redirects"),
    ],
)
def test_too_slow(host: PictureHost, answer: Any) -> None:
    """An answer that does not come whole in time is given up, and after the patience said."""
    host.answers["/api/projects/7/"] = answer
    waits_s = 60 if isinstance(answer, tuple) else 0.4
    studio = Studio(Settings(label_studio_url=host.url, label_studio_api_key=LEGACY), answer_s=waits_s)
    started = time.monotonic()
    with pytest.raises(StudioError) as raised:
        StudioProject(studio, "7", patience_s=0).label_config()
    assert time.monotonic() - started < 20
    if isinstance(answer, tuple):
        assert str(raised.value).startswith(f"Label Studio cannot be reached at {host.url} (TooManyRedirects).")
        return
    assert str(raised.value).startswith(
        f"Label Studio at {host.url} must answer within 0.4 seconds and did not, when asked for project 7."
        " Check that it runs and is not overloaded."
    )


GARBAGE = [b"", b"<html>", b"null", b"5", b'"x"', b"[]", b"{", b"{}", b"[5]", b"\xff\xfe\x00", b'{"tasks": 5}',
           b'{"tasks": [5], "total": 1}', b'{"tasks": [{"id": "x"}], "total": 1}', b'{"tasks": [{"id": 1}]}',
           b'{"tasks": [{"id": 1, "data": {}, "predictions": [3]}], "total": 1}', b'{"id": 7, "label_config": 5}',
           b'{"tasks": [], "total": "many"}']  # fmt: skip
NO_HTTP = [b"SSH-2.0-OpenSSH_9.6\r\n", b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 4\r\n\r\nabcd",
           b'HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"id": 7']  # fmt: skip


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
@pytest.mark.parametrize("answer", [*GARBAGE, *NO_HTTP], ids=ascii)
def test_garbage_is_said(host: PictureHost, answer: bytes) -> None:
    """Whatever answers in Label Studio's place: a sentence that names the place, never another error."""
    host.other = answer if answer in GARBAGE else lambda handler: handler.wfile.write(answer)
    subject = connect(host.url, LEGACY, 7, patience_s=0)
    pending = PendingTasks(subject._studio, "7", "v", exact=True)
    pending._patience_s = 0
    calls = (subject.label_config, lambda: list(subject.labelled_tasks()), lambda: subject.labels_since(None),
             subject.labels_now, lambda: list(subject.annotations()), lambda: subject.remove_replaced(NEW, 9),
             lambda: pending.count(), lambda: pending.still([1]))  # fmt: skip
    for call in calls:
        with pytest.raises(StudioError) as raised:
            call()
        assert host.url in str(raised.value)
    try:
        told = " ".join(subject.show_version(NEW))
    except StudioError as error:
        told = str(error)
    assert host.url in told or "nothing was changed" in told


def pages(host: PictureHost, refused: int, *, once: bool) -> None:
    """Serve a project's tasks in two pages of 200 and one of 5; 401 to a page, once or from then on."""
    asked = []

    def answer(handler: BaseHTTPRequestHandler) -> None:
        asked.append(handler.path)
        filters = json.loads(parse_qs(urlsplit(handler.path).query)["query"][0])["filters"]["items"]
        last = next(item["value"] for item in filters if item["filter"] == "filter:tasks:id")
        tasks = [{"id": number, "data": {"image": IMAGE}, "annotations": []} for number in range(last + 1, 406)[:200]]
        status, body = 200, {"tasks": tasks, "total": 405 - last}
        if len(asked) == refused or (len(asked) > refused and not once):
            status, body = 401, {"detail": "Token expired."}
        handler.send_response(status)
        handler.end_headers()
        handler.wfile.write(json.dumps(body).encode())

    host.other = answer


def test_a_401_in_the_middle_of_a_listing_loses_no_task(host: PictureHost) -> None:
    """An access token that is refused is renewed, and the page asked for again."""
    host.answers[REFRESH] = issuing(host)
    pages(host, 2, once=True)
    assert [task["id"] for task in connect(host.url, PAT, 7).labelled_tasks()] == list(range(1, 406))
    assert refreshes(host) == 2


def test_a_token_that_is_withdrawn_in_the_middle_is_said(host: PictureHost) -> None:
    """At once, with what to do; half a listing is never taken for the whole."""
    pages(host, 2, once=False)
    reading, started = connect(host.url, LEGACY, 7).labelled_tasks(), time.monotonic()
    assert [next(reading)["id"] for _ in range(200)] == list(range(1, 201))
    with pytest.raises(StudioError, match=r"answered 401 \(Token expired\).* Set LABEL_STUDIO_API_KEY to a valid"):
        next(reading)
    assert time.monotonic() - started < 20


def test_a_token_that_ran_out_is_known_without_asking(host: PictureHost) -> None:
    """A personal access token past its date is said so at once."""
    assert "refused the personal access token (API key has expired" in said(connect(host.url, token("refresh", -5), 7))
    assert host.requests == []


def test_settings_that_are_missing() -> None:
    """Both settings are named, whichever is missing."""
    for url, key in ((None, LEGACY), ("http://127.0.0.1:1", None)):
        text = said(StudioProject(Studio(Settings(label_studio_url=url, label_studio_api_key=key)), "1"))
        assert text.endswith("needs LABEL_STUDIO_URL and LABEL_STUDIO_API_KEY. Set both, or run `connect --new-token`.")
    assert "must be the token alone" in said(connect("http://127.0.0.1:1", "Token abc", 1))


@pytest.mark.parametrize("project", ["1" * 4301, "0007", "१२", "", "../users"], ids=lambda text: text[:9])
def test_a_project_has_a_number(host: PictureHost, project: str) -> None:
    """What is no number is not asked for: a sentence of ours, never an error of Python's."""
    with pytest.raises(StudioError, match="must be a whole number from 1 to 9223372036854775807"):
        connect(host.url, LEGACY, project).labels_since(None)
    assert host.requests == []


# After a training


def versions(studio: LabelStudioServer, project: int) -> tuple[str, str, str]:
    """What Label Studio shows: the project's version, the model's title, the model's version."""
    shown = studio.api("GET", f"/api/projects/{project}/")["model_version"]
    (record,) = studio.api("GET", f"/api/ml?project={project}")
    return shown, record["title"], record["model_version"]


def opened(studio: LabelStudioServer, project: int) -> tuple[int, list[tuple[str, str]]]:
    """The task that Label All Tasks opens, and the versions and choices that it shows."""
    task = studio.api("GET", f"/api/projects/{project}/next")
    return task["id"], [
        (each["model_version"], each["result"][0]["value"]["choices"][0]) for each in task["predictions"]
    ]


@pytest.mark.parametrize(
    ("title", "static", "shown", "said_too"),
    [
        pytest.param("my model", False, ("my model", "my model", NEW), "", id="a title that a person chose stays"),
        pytest.param(OLD, False, (NEW, NEW, NEW), "title is the same now", id="a title that is a tag"),
        pytest.param("my model", True, ("my model", "my model", NEW), f"showed predictions of {OLD}", id="static mode"),
        pytest.param(OLD, True, (NEW, NEW, NEW), "title is the same now", id="static mode by title"),
    ],
)
@pytest.mark.parametrize("guarded", [False, True], ids=["open", "basic auth"])
def test_label_studio_in_step(
    label_studio: LabelStudioServer, title: str, static: bool, shown: tuple[str, str, str], said_too: str, guarded: bool
) -> None:
    """The new version is shown, opened tasks bring its predictions alone, and Retrieve adds them to every task."""
    credentials = {"auth_method": "BASIC_AUTH", "basic_auth_user": "me", "basic_auth_pass": "s3cret"} if guarded else {}
    header = "Basic " + base64.b64encode(b"me:s3cret").decode() if guarded else None
    project = label_studio.create_project("in step")
    tasks = label_studio.import_tasks(project, [IMAGE, IMAGE])
    with stand_in(OLD, header) as model:
        label_studio.connect_backend(project, model.url, title, extra_params='{"a": 1}', **credentials)
        label_studio.retrieve(project)
        if static:
            label_studio.api("PATCH", f"/api/projects/{project}/", json={"model_version": OLD})
        assert opened(label_studio, project) == (tasks[0], [(OLD, "Mars")])
        model.version, model.choice = NEW, "Venus"

        told = read(label_studio, project).show_version(NEW)

        assert versions(label_studio, project) == shown
        assert said_too in " ".join(told)
        assert told[0] == f"Label Studio shows model version {NEW}."
        assert opened(label_studio, project) == (tasks[0], [(NEW, "Venus")])
        label_studio.retrieve(project)
        predicted = {(each["task"], each["model_version"]) for each in label_studio.predictions(project)}
        assert predicted == {(task, version) for task in tasks for version in (OLD, NEW)}
        assert read(label_studio, project).show_version(NEW) == told[:1], "the second time there is nothing to change"
        (record,) = label_studio.api("GET", f"/api/ml?project={project}")
        assert (record["extra_params"], record["basic_auth_pass_is_set"]) == ('{"a": 1}', guarded)


def test_a_choice_of_the_person_stays(label_studio: LabelStudioServer) -> None:
    """A project that shows no predictions, or another model's, is left as it is."""
    project = label_studio.create_project("chosen")
    (task,) = label_studio.import_tasks(project, [IMAGE])
    body = {"task": task, "result": "Mars", "score": 0.5, "model_version": "somebody else's"}
    label_studio.api("POST", "/api/predictions/", json=body)
    with stand_in(NEW) as model:
        label_studio.connect_backend(project, model.url, "my model")
        for chosen in ("", "somebody else's"):
            label_studio.api("PATCH", f"/api/projects/{project}/", json={"model_version": chosen})
            assert read(label_studio, project).show_version(NEW) == [f"Label Studio shows model version {NEW}."]
            assert versions(label_studio, project)[0] == chosen


def test_no_model_or_another_one_is_connected(label_studio: LabelStudioServer) -> None:
    """Then nothing is changed, and a sentence says so."""
    project = label_studio.create_project("nobody")
    (told,) = read(label_studio, project).show_version(NEW)
    assert told == "The project has no model connected in Label Studio, so nothing was changed there."
    with stand_in(OLD) as model:
        label_studio.connect_backend(project, model.url, OLD)
        (told,) = read(label_studio, project).show_version(NEW)
        only = f"only '{OLD}' with version {OLD}; nothing was changed"
        assert told.startswith(f"No connected model of the project says version {NEW}, {only}")
        assert versions(label_studio, project) == (OLD, OLD, OLD)


# Old predictions


def version(number: int) -> str:
    return f"{MODEL_NAME}:project-7-{number:04}"


def predict(studio: LabelStudioServer, project: int, tasks: Sequence[int], named: str) -> None:
    """Predictions of a version, as `prelabel` and others import them."""
    region = {"from_name": "choice", "to_name": "image", "type": "choices", "value": {"choices": ["Mars"]}}
    body = [{"task": task, "result": [region], "score": 0.5, "model_version": named} for task in tasks]
    studio.api("POST", f"/api/projects/{project}/import/predictions", json=body)


def held(studio: LabelStudioServer, project: int) -> dict[int, list[str]]:
    """The versions of each task's predictions, the oldest first."""
    found: dict[int, list[str]] = {}
    for each in sorted(studio.predictions(project), key=lambda each: int(each["id"])):
        found.setdefault(each["task"], []).append(each["model_version"])
    return found


def accept(studio: LabelStudioServer, task: int, named: str, **more: Any) -> dict[str, Any]:
    """A person's answer to a task that was pre-labelled by a version."""
    predictions = studio.api("GET", f"/api/tasks/{task}/")["predictions"]
    (parent,) = [each for each in predictions if each["model_version"] == named]
    body = {"result": parent["result"], "parent_prediction": parent["id"], **more}
    return dict(studio.api("POST", f"/api/tasks/{task}/annotations/", json=body))


def test_thirty_trainings_leave_two_predictions_a_task(label_studio: LabelStudioServer) -> None:
    """
    With all tasks predicted after each, by a live model that Label Studio asks; some labelled in between.

    Every annotation keeps the prediction that it refers to, and the live model's predictions go on.
    """
    project = label_studio.create_project("thirty")
    tasks = label_studio.import_tasks(project, [IMAGE] * 6)
    parents = {}
    with stand_in(version(0)) as model:
        label_studio.connect_backend(project, model.url, "celestial")
        label_studio.retrieve(project)
        subject = read(label_studio, project)
        for number in range(1, 31):
            model.version = version(number)
            said = subject.in_step(version(number), keep_predictions=False)
            assert max(map(len, held(label_studio, project).values())) <= 2
            label_studio.retrieve(project)
            now = held(label_studio, project)
            assert max(map(len, now.values())) <= 2
            assert all(version(number) in versions for versions in now.values())
            if number % 10 == 5:
                task = tasks[number // 10]
                parents[accept(label_studio, task, version(number))["id"]] = version(number)
        assert "Predictions of older models were removed: " in " ".join(said)
        assert versions(label_studio, project)[0] == "celestial", "live predictions go on"
    by_number = {each["id"]: each["model_version"] for each in label_studio.predictions(project)}
    given = {each["id"]: by_number[each["parent_prediction"]] for each in label_studio.annotations(project)}
    assert given == parents


def test_what_stays_of_old_predictions(label_studio: LabelStudioServer) -> None:
    """The live model's, the newest other one, what an annotation refers to, and all that is none of ours."""
    project = label_studio.create_project("what stays")
    plain, skipped, done, foreign, once, _ = label_studio.import_tasks(project, [IMAGE] * 6)
    for number in range(3):
        predict(label_studio, project, [plain, skipped, done, foreign], version(number))
    predict(label_studio, project, [once], version(0))
    predict(label_studio, project, [foreign], "somebody else's")
    accept(label_studio, skipped, version(0), was_cancelled=True)
    accept(label_studio, done, version(1))
    predict(label_studio, project, [plain, done], version(3))

    removed = read(label_studio, project).remove_replaced(version(3), 60)

    v0, v1, v2, v3 = map(version, range(4))
    assert held(label_studio, project) == {
        plain: [v2, v3],
        skipped: [v0, v2],
        done: [v1, v3],
        foreign: [v2, "somebody else's"],
        once: [v0],
    }
    assert removed == Removed(2 + 1 + 2 + 2, some_left=False)
    assert read(label_studio, project).remove_replaced(version(3), 60) == Removed(0, some_left=False)


def test_a_task_that_waits_for_more_annotations_keeps_a_pre_label(label_studio: LabelStudioServer) -> None:
    """The next annotator may have it open, and Label Studio would refuse what is made of one that is gone."""
    project = label_studio.create_project("two annotators")
    label_studio.api("PATCH", f"/api/projects/{project}/", json={"maximum_annotations": 2})
    (task,) = label_studio.import_tasks(project, [IMAGE])
    for number in range(3):
        predict(label_studio, project, [task], version(number))
    accept(label_studio, task, version(0))
    read(label_studio, project).remove_replaced(version(3), 60)
    assert held(label_studio, project) == {task: [version(0), version(2)]}
    gone = {"result": [], "parent_prediction": 10**9}
    headers = {"Authorization": f"Token {label_studio.legacy_token}"}
    refused = requests.post(f"{label_studio.url}/api/tasks/{task}/annotations/", json=gone, headers=headers, timeout=30)
    assert (refused.status_code, "object does not exist" in refused.text) == (400, True)


def test_what_the_project_shows_stays(label_studio: LabelStudioServer) -> None:
    """A person chose the predictions of an older version: they are the other one that stays."""
    project = label_studio.create_project("shown")
    (task,) = label_studio.import_tasks(project, [IMAGE])
    for number in range(4):
        predict(label_studio, project, [task], version(number))
    label_studio.api("PATCH", f"/api/projects/{project}/", json={"model_version": version(1)})
    read(label_studio, project).remove_replaced(version(3), 60)
    assert held(label_studio, project) == {task: [version(1), version(3)]}
    assert label_studio.api("GET", f"/api/projects/{project}/")["model_version"] == version(1)


def test_predictions_can_be_kept(label_studio: LabelStudioServer) -> None:
    """Then Label Studio is brought in step all the same."""
    project = label_studio.create_project("kept")
    tasks = label_studio.import_tasks(project, [IMAGE])
    for number in range(3):
        predict(label_studio, project, tasks, version(number))
    with stand_in(version(3)) as model:
        label_studio.connect_backend(project, model.url, "celestial")
        told = read(label_studio, project).in_step(version(3), keep_predictions=True)
    assert told == [f"Label Studio shows model version {version(3)}."]
    assert len(held(label_studio, project)[tasks[0]]) == 3


def test_many_old_predictions_are_removed_bit_by_bit(
    label_studio: LabelStudioServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While there is time; the next time goes on where this one has stopped, over all pages."""
    monkeypatch.setattr(project_module, "REMOVE_PAGE", 2)
    project = label_studio.create_project("many")
    tasks = label_studio.import_tasks(project, [IMAGE] * 5)
    for number in range(2):
        predict(label_studio, project, tasks, version(number))
    assert read(label_studio, project).remove_replaced(version(2), 0) == Removed(0, some_left=True)
    real, calls = project_module._remove, []

    def remove(client: Any, prediction: int) -> None:
        calls.append(prediction)
        real(client, prediction)
        if len(calls) == 3:
            monkeypatch.setattr(time, "monotonic", lambda: moment + 1e6)

    moment = time.monotonic()
    monkeypatch.setattr(project_module, "_remove", remove)
    assert read(label_studio, project).remove_replaced(version(2), 60) == Removed(3, some_left=True)
    assert read(label_studio, project).remove_replaced(version(2), 60) == Removed(2, some_left=False)
    assert set(map(len, held(label_studio, project).values())) == {1}


def test_a_label_studio_that_goes_away_keeps_old_predictions(
    label_studio: LabelStudioServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In the middle of it: a sentence and a warning, no error; the next training takes up what is left."""
    monkeypatch.setattr(project_module, "REMOVE_PATIENCE_S", 0)
    project = label_studio.create_project("away")
    tasks = label_studio.import_tasks(project, [IMAGE] * 4)
    for number in range(2):
        predict(label_studio, project, tasks, version(number))
    real = project_module._remove
    with gate(label_studio.url) as door, stand_in(version(2)) as model:
        label_studio.connect_backend(project, model.url, "celestial")

        def remove(client: Any, prediction: int) -> None:
            if len(label_studio.predictions(project)) < 7:
                door.shut()
            real(client, prediction)

        monkeypatch.setattr(project_module, "_remove", remove)
        told = connect(door.url, label_studio.legacy_token, project).in_step(version(2), keep_predictions=False)
        assert told[0] == f"Label Studio shows model version {version(2)}."
        assert told[1].startswith("Old predictions are removed after the next training: Label Studio cannot be reached")
        assert f"Project {project}: old predictions are not removed now" in caplog.text
        monkeypatch.setattr(project_module, "_remove", real)
        model.version = version(3)
        told = read(label_studio, project).in_step(version(3), keep_predictions=False)
    assert told[1:] == ["Predictions of older models were removed: 2."]
    assert held(label_studio, project) == {task: [version(1)] for task in tasks}


def test_a_prediction_that_somebody_else_removed_is_no_trouble(
    label_studio: LabelStudioServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As another worker may be at it, or a person."""
    project = label_studio.create_project("both")
    tasks = label_studio.import_tasks(project, [IMAGE] * 2)
    for number in range(2):
        predict(label_studio, project, tasks, version(number))
    real = project_module._remove

    def remove(client: Any, prediction: int) -> None:
        real(client, prediction)
        real(client, prediction)

    monkeypatch.setattr(project_module, "_remove", remove)
    assert read(label_studio, project).remove_replaced(version(2), 60) == Removed(2, some_left=False)
