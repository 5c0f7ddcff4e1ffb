"""The prelabel command, on a real Label Studio: every task once, whatever happens on the way."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from celestial_backend.commands import prelabel
from celestial_backend.commands.prelabel import FailureList, Outbox, Prelabelling
from celestial_backend.errors import RequestError, StateError, StudioError
from celestial_backend.jobs.processes import lock
from celestial_backend.models.store import ModelStore
from celestial_backend.services import Services, build
from celestial_backend.settings import Settings
from celestial_backend.studio import pending
from celestial_backend.studio.client import Studio
from celestial_backend.studio.pending import Conditions, ImportFailedError, PendingTasks, Rows, read_filter
from celestial_backend.studio.project import LIVE, StudioProject
from tests.support.backend_server import Backends, label_config
from tests.support.label_studio import LabelStudioServer
from tests.support.prelabelling import Command, held, project_with, small_pictures

pytestmark = pytest.mark.timeout(600)

# The command, with small pages and a predictor that takes no time, killed at a moment of its third import.
KILLED = """
import os, signal, sys, threading
from celestial_backend import predictor
from celestial_backend.commands import prelabel as bulk
from celestial_backend.commands.cli import main
from celestial_backend.models import store
from celestial_backend.studio import pending

moment, send, sent = sys.argv.pop(1), pending.PendingTasks.send, []
bulk.PAGE, bulk.SETTLE_S = 40, 5.0

def die(*_): os.kill(os.getpid(), signal.SIGKILL)

def sending(self, rows):
    sent.append(rows)
    if len(sent) == 3 and moment == "before": die()
    if len(sent) == 3 and moment == "during": threading.Timer(0.03, die).start()
    made = send(self, rows)
    if len(sent) == 3 and moment == "after": die()
    return made

def predict(self, tasks, config, project="", on_failure=None):
    if len(sent) == 2 and moment == "predicting": die()
    region = {"from_name": "choice", "to_name": "image", "type": "choices", "value": {"choices": ["Mars"]}}
    return [{"result": [region], "score": 0.5, "model_version": self._store.live_tag(project)} for task in tasks]

pending.PendingTasks.send, predictor.Predictor.predict = sending, predict
store.ModelStore.current = lambda *_: None
main()
"""


@pytest.fixture
def command(label_studio: LabelStudioServer, tmp_path: Path, model_store: Path) -> Command:
    return Command(label_studio, tmp_path / "state", model_store)


class AllMars:
    """A predictor that takes no time; it gives some tasks a choice that the label config has not, and some nothing."""

    def __init__(self, store: ModelStore) -> None:
        self.store = store
        self.unknown: set[int] = set()
        self.unreadable: set[int] = set()

    def check(self, _config: str, _project: str) -> None: ...

    def version(self, _config: str, project: str) -> str:
        return self.store.live_tag(project)

    def predict(
        self,
        tasks: list[Any],
        _config: str,
        project: str,
        on_failure: Callable[[Any, str], None],
    ) -> list[Any]:
        region = {"from_name": "choice", "to_name": "image", "type": "choices"}
        for task in tasks:
            if task["id"] in self.unreadable:
                on_failure(task["id"], "no picture")
        return [
            []
            if task["id"] in self.unreadable
            else {
                "result": [region | {"value": {"choices": ["Xenu" if task["id"] in self.unknown else "Mars"]}}],
                "score": 0.5,
                "model_version": self.store.live_tag(project),
            }
            for task in tasks
        ]


@pytest.fixture
def services(command: Command, monkeypatch: pytest.MonkeyPatch) -> Services:
    """Everything real but the predictor."""
    monkeypatch.setattr(ModelStore, "current", lambda *_: None)
    built = build(Settings.from_environ(command.settings))
    return replace(built, predictor=AllMars(built.store))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def pictures(label_studio: LabelStudioServer) -> list[str]:
    return small_pictures(label_studio, "prelabel")


def by_score(studio: LabelStudioServer, project: int, column: str) -> list[float | None]:
    """The column Prediction score, in the order that the Data Manager gives when it sorts by it."""
    query = json.dumps({"filters": {"conjunction": "and", "items": []}, "ordering": [column]})
    options = {"project": project, "page_size": 50, "fields": "all", "query": query}
    return [task["predictions_score"] for task in studio.api("GET", "/api/tasks", params=options)["tasks"]]


def test_all_tasks_get_one_prediction_and_the_project_uses_it(
    label_studio: LabelStudioServer, pictures: list[str], command: Command
) -> None:
    """A picture that is broken costs its task alone; a second run tries that one and no other."""
    broken = label_studio.local_files_root / "prelabel" / "broken.png"
    broken.write_bytes(b"no picture")
    project, tasks = project_with(label_studio, pictures, 300)
    (bad,) = label_studio.import_tasks(project, ["/data/local-files/?d=prelabel/broken.png"])
    plan = command(project, "--dry-run")
    assert (plan["wanted"], plan["already"]) == (301, 0)
    assert not label_studio.predictions(project)

    first = command(project, code=1)
    assert (first["predicted"], first["failed"]) == (300, 1)
    (failure,) = [json.loads(line) for line in Path(first["failures"]).read_text().splitlines()]
    assert failure["task"] == bad
    assert "picture" in failure["reason"]
    assert held(label_studio, project) == dict.fromkeys(tasks, 1)
    assert {each["model_version"] for each in label_studio.predictions(project)} == {first["version"]}
    assert label_studio.api("GET", f"/api/projects/{project}")["model_version"] == first["version"]
    rising = by_score(label_studio, project, "tasks:predictions_score")
    scores = [score for score in rising if score is not None]
    assert len(scores) >= 49
    assert scores == sorted(scores)

    Image.new("RGB", (64, 64)).save(broken)
    again = command(project)
    assert (again["predicted"], again["already"], again["failures"]) == (1, 300, None)
    assert not Path(first["failures"]).exists()
    assert held(label_studio, project) == dict.fromkeys([*tasks, bad], 1)


def test_a_project_of_which_nothing_is_learned_is_told(label_studio: LabelStudioServer, command: Command) -> None:
    """Before a task is read, with what to do."""
    project = label_studio.create_project("Animals", label_config(["cat", "dog"]))
    said = command(project, code=3)["error"]
    assert f"knows no choice of project {project} yet. Label a few pictures of each choice" in said


def test_a_run_that_was_killed_is_completed(
    label_studio: LabelStudioServer, pictures: list[str], command: Command
) -> None:
    """Killed while predicting, right before, during and after an import: no task is missing, none has two."""
    project, tasks = project_with(label_studio, pictures, 480)
    for moment in ("predicting", "before", "during", "after"):
        command(project, code=-signal.SIGKILL, how=("-c", KILLED, moment))
    assert 0 < len(held(label_studio, project)) < 480
    last = command(project, how=("-c", KILLED, "never"))
    assert last["predicted"] + last["already"] == 480
    assert held(label_studio, project) == dict.fromkeys(tasks, 1)


def test_an_import_without_an_answer_is_not_repeated(
    label_studio: LabelStudioServer, pictures: list[str], services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What has landed though Label Studio never said so counts as done; what has not is sent again."""
    send, landed = PendingTasks.send, iter([True, False, True])
    monkeypatch.setattr(prelabel, "SETTLE_S", 1.0)
    monkeypatch.setattr(prelabel, "PAGE", 20)

    def unanswered(self: PendingTasks, rows: Rows) -> int:
        lands = next(landed, None)
        made = send(self, rows) if lands is not False else 0
        if lands is not None:
            raise ImportFailedError("No answer.", refused=False, may_pass=True)
        return made

    monkeypatch.setattr(PendingTasks, "send", unanswered)
    project, tasks = project_with(label_studio, pictures, 50)
    done = Prelabelling(services, str(project)).run()
    assert (done.predicted, done.failed, done.meanwhile) == (50, 0, 0)
    assert held(label_studio, project) == dict.fromkeys(tasks, 1)


def test_options_choose_the_tasks(label_studio: LabelStudioServer, pictures: list[str], services: Services) -> None:
    """A limit, labels that are there, a filter of the Data Manager: each leaves the other tasks alone."""
    project, tasks = project_with(label_studio, pictures, 30)
    for task in tasks[:5]:
        label_studio.annotate(task, "Earth")
    run = Prelabelling(services, str(project), only_unlabelled=True, limit=4)
    assert run.plan().wanted == 4
    assert run.run().predicted == 4
    assert set(held(label_studio, project)) == set(tasks[5:9])

    item = {"filter": "filter:tasks:data.image", "operator": "contains", "type": "String", "value": "/2.png"}
    chosen = {task for number, task in enumerate(tasks) if number % 4 == 2}
    filters = json.dumps({"filters": {"conjunction": "and", "items": [item]}})
    done = Prelabelling(services, str(project), conditions=read_filter(filters)).run()
    assert (done.predicted, done.already) == (len(chosen - set(tasks[5:9])), len(chosen & set(tasks[5:9])))
    assert set(held(label_studio, project)) == set(tasks[5:9]) | chosen

    done = Prelabelling(services, str(project), rate=10, limit=10).run()
    assert done.seconds >= 0.9
    Prelabelling(services, str(project)).run()
    assert held(label_studio, project) == dict.fromkeys(tasks, 1)


def test_conditions_may_be_joined_by_or(
    label_studio: LabelStudioServer, pictures: list[str], services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task that fulfils one or several of them is predicted once; others, and with an option labelled ones, never."""
    monkeypatch.setattr(prelabel, "PAGE", 7)
    monkeypatch.setattr(pending, "PAGE", 7)
    project, tasks = project_with(label_studio, pictures, 40)
    label_studio.annotate(tasks[2], "Earth")
    label_studio.annotate(tasks[2], "Mars")
    other, _ = project_with(label_studio, pictures, 4)

    def item(column: str, operator: str, kind: str, value: object) -> dict[str, object]:
        return {"filter": f"filter:tasks:{column}", "operator": operator, "type": kind, "value": value}

    items = [
        item("data.image", "contains", "String", "/2.png"),
        item("id", "less", "Number", tasks[8]),
        item("annotations_results", "contains", "String", "a"),
        item("annotators", "contains", "List", 1),
    ]
    conditions = read_filter(json.dumps({"conjunction": "or", "items": items}))
    chosen = {task for number, task in enumerate(tasks) if number % 4 == 2 or number < 8}
    run = Prelabelling(services, str(project), conditions=conditions, only_unlabelled=True)
    if label_studio.is_before("1.23"):
        with pytest.raises(StudioError, match="Run once for each of the conditions"):
            run.plan()
        return
    assert run.plan().wanted == len(chosen) - 1
    done = run.run()
    assert (done.predicted, done.already, done.meanwhile) == (len(chosen) - 1, 0, 0)
    assert held(label_studio, project) == dict.fromkeys(chosen - {tasks[2]}, 1)
    done = Prelabelling(services, str(project), conditions=conditions).run()
    assert (done.predicted, done.already) == (1, len(chosen) - 1)
    assert held(label_studio, project) == dict.fromkeys(chosen, 1)
    assert not held(label_studio, other)


def test_an_older_label_studio_is_not_asked_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that knows no children of conditions gives the first page again and again; that ends with a sentence."""
    tasks = [SimpleNamespace(id=number, data={}, predictions=[], total_annotations=0) for number in (1, 2)]
    page = SimpleNamespace(items=tasks, response=SimpleNamespace(total=9))
    monkeypatch.setattr(PendingTasks, "_listed", lambda *rest: rest[-1](page))
    pages = PendingTasks(Studio(Settings()), "1", "m:1", Conditions(({}, {}), either=True), exact=True).pages(2)
    assert len(next(pages)) == 2
    with pytest.raises(StudioError, match="Run once for each"):
        next(pages)


def test_what_label_studio_does_not_take_is_listed(
    label_studio: LabelStudioServer, pictures: list[str], services: Services
) -> None:
    """A choice that the label config has not costs its own task the prediction, and no other."""
    project, tasks = project_with(label_studio, pictures, 30)
    services.predictor.unknown = {tasks[7], tasks[20]}  # type: ignore[attr-defined]
    run = Prelabelling(services, str(project))
    done = run.run()
    if label_studio.is_before("1.23"):
        assert (done.predicted, done.failed) == (30, 0), "it takes whatever it is sent"
        return
    listed = [json.loads(line)["task"] for line in run.failures.path.read_text().splitlines()]
    assert set(held(label_studio, project)) | set(listed) == set(tasks)
    assert (done.predicted, done.failed) == (len(held(label_studio, project)), len(listed))
    assert max(held(label_studio, project).values()) == 1


def test_others_may_predict_meanwhile(
    label_studio: LabelStudioServer, pictures: list[str], services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task that got its prediction, or was deleted, between its page's reading and its import is left out."""
    project, tasks = project_with(label_studio, pictures, 10)
    predict = services.predictor.predict

    def slow(page: list[Any], *rest: Any, **options: Any) -> list[Any]:
        answers = predict(page, *rest, **options)
        label_studio.api("POST", "/api/predictions/", json={"task": tasks[3], "project": project, **answers[3]})
        label_studio.api("DELETE", f"/api/tasks/{tasks[4]}/")
        return answers

    monkeypatch.setattr(services.predictor, "predict", slow)
    done = Prelabelling(services, str(project)).run()
    assert (done.predicted, done.meanwhile, done.failed) == (8, 2, 0)
    assert held(label_studio, project) == dict.fromkeys(set(tasks) - {tasks[4]}, 1)


def test_a_version_that_is_part_of_another_is_told_apart(
    label_studio: LabelStudioServer, pictures: list[str], services: Services
) -> None:
    """Label Studio's filter compares parts; where that matters, tasks are read and compared whole."""
    project, tasks = project_with(label_studio, pictures, 3)
    label_studio.api("POST", "/api/predictions/", json={"task": tasks[0], "model_version": "m:10", "result": []})
    assert PendingTasks(services.studio, str(project), "m:1", exact=False).count() == (3, 3)
    assert PendingTasks(services.studio, str(project), "m:10", exact=False).count() == (3, 2)
    assert PendingTasks(services.studio, str(project), "m:10", exact=True).count() == (3, 2)


def test_a_project_has_one_run_at_a_time(
    label_studio: LabelStudioServer, pictures: list[str], services: Services
) -> None:
    """The second of two says so; it waits for nothing."""
    project, _ = project_with(label_studio, pictures, 3)
    path = services.settings.model_dir / "work" / f"prelabel-{project}.lock"
    with lock(path), pytest.raises(StateError, match="another one runs"):
        Prelabelling(services, str(project)).run()


@pytest.mark.parametrize("title", ["My model", None])
def test_a_connected_backend_goes_with_the_predictions(
    label_studio: LabelStudioServer,
    pictures: list[str],
    services: Services,
    backends: Backends,
    title: str | None,
    command: Command,
) -> None:
    """Whatever the backend's title, the score column is filled, sorts, and the next task shows its prediction."""
    backend = backends(**{name: command.settings[name] for name in ("BENTOML_HOME", "LOCAL_FILES_DOCUMENT_ROOT")})
    project, tasks = project_with(label_studio, pictures, 6)
    version = services.store.live_tag(str(project))
    label_studio.connect_backend(project, backend.url, title=title or version)
    run = Prelabelling(services, str(project))
    run.run()
    said = run.select_version()
    assert label_studio.api("GET", f"/api/projects/{project}")["model_version"] == version, said
    assert label_studio.model(project)["title"] == (title or version + LIVE)
    assert by_score(label_studio, project, "tasks:predictions_score") == [0.5] * 6
    label_studio.api("PATCH", f"/api/projects/{project}", json={"sampling": "Uncertainty sampling"})
    (shown,) = label_studio.api("GET", f"/api/projects/{project}/next")["predictions"]
    assert shown["model_version"] == version
    assert held(label_studio, project) == dict.fromkeys(tasks, 1)
    subject = StudioProject(services.studio, str(project), patience_s=0)
    subject.ask_for_new_tasks()
    assert label_studio.api("GET", f"/api/projects/{project}")["model_version"] == version
    assert label_studio.model(project)["title"] == (title or version + LIVE), "as long as no tasks have come"
    label_studio.import_tasks(project, pictures[:1])
    subject.ask_for_new_tasks()
    assert label_studio.api("GET", f"/api/projects/{project}")["model_version"] == (title or version)
    assert label_studio.model(project)["title"] == (title or version)


def test_a_part_of_the_tasks_leaves_the_others_to_the_model(
    label_studio: LabelStudioServer, pictures: list[str], services: Services, backends: Backends, command: Command
) -> None:
    """However many of those could not be predicted: they are not the ones that wait for a prediction."""
    backend = backends(**{name: command.settings[name] for name in ("BENTOML_HOME", "LOCAL_FILES_DOCUMENT_ROOT")})
    project, tasks = project_with(label_studio, pictures, 5)
    services.predictor.unreadable = set(tasks[:2])  # type: ignore[attr-defined]
    for task in tasks[:2]:
        label_studio.api("POST", f"/api/tasks/{task}/annotations/", json={"result": []})
    version = services.store.live_tag(str(project))
    label_studio.connect_backend(project, backend.url, title=version)
    run = Prelabelling(services, str(project), limit=4)
    done = run.run()
    assert (done.predicted, done.failed) == (2, 2)
    run.select_version()
    assert label_studio.model(project)["title"] == version, "the task that is left is asked for when it is opened"


def test_what_cannot_be_written_down_is_a_sentence(tmp_path: Path) -> None:
    """Neither a full disk nor a folder of another user ends a run with a stack trace."""
    (tmp_path / "file").touch()
    nowhere = tmp_path / "file" / "work" / "prelabel-1.sent"
    for write in (lambda: Outbox(nowhere).note("m:1", 1), lambda: FailureList(nowhere).add(1, "no picture")):
        with pytest.raises(StateError, match=r"prelabel-1\.sent cannot be written \(Not a directory\)"):
            write()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": "m:1"}', "\0"])
def test_a_note_that_is_damaged_is_a_sentence(tmp_path: Path, text: str) -> None:
    """It is not taken for none: the import that it told of might be made twice."""
    (tmp_path / "prelabel-1.sent").write_text(text)
    with pytest.raises(StateError, match=r"prelabel-1\.sent must tell of an import and does not .* and run prelabel"):
        Outbox(tmp_path / "prelabel-1.sent").sent()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "no JSON"),
        ("3", "no list of items"),
        ('{"items": []}', "no list of items"),
        ('{"items": [{"filter": "filter:tasks:id"}]}', "not all four parts"),
        ('[{"filter": "id", "operator": "equal", "type": "Number", "value": 1}]', "no column of tasks"),
    ],
)
def test_a_filter_that_is_none_is_explained(text: str, problem: str) -> None:
    with pytest.raises(RequestError, match=problem):
        read_filter(text)


def test_conditions_joined_by_or_have_no_children() -> None:
    """There is room for one, and the ids are looked for there. Of one condition nothing need be joined."""
    item = {"filter": "filter:tasks:id", "operator": "equal", "type": "Number", "value": 1}
    with pytest.raises(RequestError, match="run once for each"):
        read_filter(json.dumps({"conjunction": "or", "items": [item, item | {"child_filter": item}]}))
    with pytest.raises(RequestError, match="'xor'"):
        read_filter(json.dumps({"conjunction": "xor", "items": [item, item]}))
    assert read_filter(json.dumps({"conjunction": "or", "items": [item]})) == Conditions((item,))
    assert read_filter(json.dumps({"conjunction": "or", "items": [item, item]})).either
