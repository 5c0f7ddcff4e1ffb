"""Trainings are asked for by events, by counts of labels and by lost events; and what the command line says of them."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from backend_server import REPOSITORY, label_config
from disks import fill
from flask.testing import FlaskClient

from celestial_backend import ledger as ledger_module
from celestial_backend.app import create_app
from celestial_backend.errors import ProjectGoneError, RequestError, StudioError
from celestial_backend.jobs import AGAIN_S, KNOW_S, MESSAGES, WORKER_LOCK, Jobs
from celestial_backend.ledger import FAILED, KEPT, PUBLISHED, RUNNING, WAITING, WAITING_MAX, Job, Ledger
from celestial_backend.pointers import Pointer
from celestial_backend.processes import lock
from celestial_backend.reach import last_event
from celestial_backend.settings import Settings
from celestial_backend.store import ModelStore
from celestial_backend.wiring import build


@pytest.fixture
def settings() -> Settings:
    return Settings.from_environ()


@pytest.fixture
def every_three(settings: Settings) -> FlaskClient:
    """A backend that trains at every third label."""
    return create_app(build(replace(settings, train_every=3))).test_client()


@pytest.fixture
def ledger(settings: Settings) -> Ledger:
    return Ledger(settings.model_dir)


def annotation(number: int = 1, **more: Any) -> dict[str, Any]:
    """As Label Studio sends it, as far as it matters."""
    region = {"from_name": "choice", "to_name": "image", "type": "choices", "value": {"choices": ["Mars"]}}
    return {"id": number, "task": number, "result": [region], "was_cancelled": False, "ground_truth": False} | more


def send(client: FlaskClient, action: str, project: int = 7, **more: Any) -> Any:
    body = {"action": action, "project": {"id": project, "title": "Bodies", "label_config": label_config()}} | more
    answer = client.post("/webhook", json=body)
    assert answer.status_code == 201, answer.text
    return answer.json["result"]


def created(client: FlaskClient, project: int = 7, **more: Any) -> Any:
    return send(client, "ANNOTATION_CREATED", project, annotation=annotation(**more), task={"id": 1})


def states(ledger: Ledger, project: str = "7") -> list[str]:
    return [job.state for job in ledger.jobs(project)]


def test_every_third_label_asks_for_a_training(every_three: FlaskClient, ledger: Ledger) -> None:
    """The count is of one project, and begins anew when it has brought about a training."""
    for _ in range(2):
        assert created(every_three)["state"] == "counted"
        assert created(every_three, project=8)["state"] == "counted"
    assert states(ledger) == []
    assert created(every_three)["state"] == WAITING
    assert (states(ledger), states(ledger, "8")) == ([WAITING], [])
    for _ in range(2):
        created(every_three)
    assert ledger.jobs("7")[0].requests == 1
    created(every_three)
    assert (states(ledger), ledger.jobs("7")[0].requests) == ([WAITING], 2), "merged into the one that waits"


def test_a_changed_label_counts_as_a_new_one(every_three: FlaskClient, ledger: Ledger) -> None:
    created(every_three)
    for _ in range(2):
        send(every_three, "ANNOTATION_UPDATED", annotation=annotation(), task={"id": 1})
    assert states(ledger) == [WAITING]


def test_a_bulk_event_counts_each_of_its_labels(every_three: FlaskClient, ledger: Ledger) -> None:
    """Label Studio sends one event for many annotations that were made together."""
    made = [annotation(number) for number in range(2)]
    send(every_three, "ANNOTATIONS_CREATED", annotation=made, task=[{"id": 0}, {"id": 1}])
    assert states(ledger) == []
    send(every_three, "ANNOTATIONS_CREATED", annotation=made, task=[{"id": 0}, {"id": 1}])
    assert states(ledger) == [WAITING]


def test_skips_and_deletions_are_no_labels(every_three: FlaskClient, ledger: Ledger) -> None:
    """There is nothing to learn from them."""
    for _ in range(4):
        created(every_three, was_cancelled=True)
        send(every_three, "ANNOTATIONS_DELETED", annotations=[{"id": 1}])
    assert states(ledger) == []


def test_labels_are_not_counted_unless_it_is_asked_for(settings: Settings, ledger: Ledger) -> None:
    """Without CELESTIAL_TRAIN_EVERY the button alone trains."""
    client = create_app(build(settings)).test_client()
    for _ in range(5):
        assert created(client)["state"] == "not asked for"
    assert states(ledger) == []
    assert send(client, "START_TRAINING")["state"] == WAITING


def test_a_worker_that_finds_nothing_to_do_leaves_the_count(every_three: FlaskClient, ledger: Ledger) -> None:
    """Merged requests leave messages behind; they must not swallow labels that were counted since."""
    created(every_three)
    created(every_three)
    assert ledger.start("7") is None
    created(every_three)
    assert states(ledger) == [WAITING]


def test_a_training_begins_the_count_anew(every_three: FlaskClient, ledger: Ledger) -> None:
    """It reads all labels that are there, so they ask for no other; those that come later do."""
    created(every_three)
    created(every_three)
    send(every_three, "START_TRAINING")
    ledger.start("7")
    created(every_three)
    created(every_three)
    assert states(ledger) == [RUNNING]
    created(every_three)
    assert states(ledger) == [WAITING, RUNNING]


@pytest.mark.parametrize("project", ["..", "7/../8", None, "x", [7], {"id": 7}, 7.5])
def test_a_project_without_a_number_is_refused(every_three: FlaskClient, ledger: Ledger, project: Any) -> None:
    """What stands in an event becomes no path and no job."""
    body = {"action": "START_TRAINING", "project": {"id": project, "label_config": label_config()}}
    assert every_three.post("/webhook", json=body).status_code == 400
    assert ledger.jobs() == []


class FakeProject:
    """The edge to Label Studio: a number of new labels, or an error."""

    new: int | Exception = 0
    troubles: dict[str, Exception]  # of single projects
    asked: list[tuple[str, str | None]]

    def __init__(self, _studio: object, project: str, _patience_s: float = 0) -> None:
        self.project = project

    def labels_since(self, moment: str | None) -> int:
        self.asked.append((self.project, moment))
        trouble = self.troubles.get(self.project, self.new)
        if isinstance(trouble, Exception):
            raise trouble
        return trouble


@pytest.fixture
def studio(monkeypatch: pytest.MonkeyPatch) -> type[FakeProject]:
    monkeypatch.setattr("celestial_backend.jobs.StudioProject", FakeProject)
    FakeProject.new, FakeProject.asked, FakeProject.troubles = 0, [], {}
    return FakeProject


@pytest.fixture
def look(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """What the worker does every minute, a minute later each time."""
    jobs = build(replace(settings, train_every=3)).jobs
    moment = time.monotonic()

    def look() -> None:
        nonlocal moment
        moment += 60
        monkeypatch.setattr("celestial_backend.jobs.time.monotonic", lambda: moment)
        jobs.look_after()

    return look


def test_labels_whose_events_were_lost_are_found(studio: Any, look: Callable[[], None], ledger: Ledger) -> None:
    """Label Studio is asked how many came since the last training, and enough of them bring one about."""
    ledger.know("7")
    studio.new = 2
    look()
    assert states(ledger) == []
    studio.new = 3
    look()
    assert states(ledger) == [WAITING]
    look()
    assert ledger.jobs()[0].requests == 1, "one that waits is not asked for again"
    assert studio.asked == [("7", None), ("7", None)]


@pytest.mark.parametrize("state", [PUBLISHED, KEPT])
def test_a_training_is_not_asked_for_again_without_new_labels(
    studio: Any, look: Callable[[], None], ledger: Ledger, state: str
) -> None:
    """The count is of those that are newer than the newest it has read."""
    job = ledger.request("7")
    ledger.start("7")
    ledger.read_until("7", "2026-11-23T01:02:03Z")
    ledger.end(job.id, state, "as it was")
    look()
    assert studio.asked == [("7", "2026-11-23T01:02:03Z")]
    assert states(ledger) == [state]
    studio.new = 3
    look()
    assert states(ledger) == [WAITING, state]


def test_a_training_that_failed_is_not_asked_for_every_minute(
    studio: Any, look: Callable[[], None], ledger: Ledger, settings: Settings
) -> None:
    """Too few labels stay too few; an hour later it is tried again."""
    studio.new = 9
    job = ledger.request("7")
    ledger.start("7")
    ledger.end(job.id, FAILED, "too few")
    for _ in range(3):
        look()
    assert (states(ledger), studio.asked) == ([FAILED], [])
    with sqlite3.connect(settings.model_dir / "jobs.db") as db:
        db.execute("UPDATE jobs SET requested_at = requested_at - ?", (AGAIN_S,))
    look()
    assert states(ledger) == [WAITING, FAILED]


def test_a_training_that_failed_is_asked_for_again_though_the_clock_was_moved_back(
    studio: Any, look: Callable[[], None], ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure that seems to lie ahead holds up nothing; that of the next attempt counts its hour."""
    studio.new, real = 9, time.time
    job = ledger.request("7")
    ledger.start("7")
    ledger.end(job.id, FAILED, "too few")
    monkeypatch.setattr(time, "time", lambda: real() - 30 * 86400)
    look()
    assert states(ledger) == [WAITING, FAILED]
    again = ledger.start("7")
    assert again is not None
    ledger.end(again.id, FAILED, "too few")
    look()
    assert states(ledger) == [FAILED, FAILED]


def test_a_label_studio_that_is_away_is_asked_again(
    studio: Any, look: Callable[[], None], ledger: Ledger, caplog: pytest.LogCaptureFixture
) -> None:
    """The log says so, the other projects and the worker go on."""
    ledger.know("7")
    studio.new = StudioError("Label Studio gave no answer.")
    look()
    assert "The labels of project 7 cannot be counted: Label Studio gave no answer." in caplog.text
    studio.new = 3
    look()
    assert states(ledger) == [WAITING]


def test_setup_makes_a_project_known(every_three: FlaskClient, ledger: Ledger) -> None:
    """So its labels are looked at even if no event of it ever comes; what has no number is none."""
    for project in ("12.1", "nonsense.1", "", None):
        assert every_three.post("/setup", json={"project": project, "schema": label_config()}).status_code == 200
    assert list(ledger.projects()) == ["12"]


def test_a_setup_that_is_refused_makes_no_project_known(every_three: FlaskClient, ledger: Ledger) -> None:
    """What the model cannot serve leaves nothing behind."""
    body = {"project": "12.1", "schema": label_config(["cat"])}
    assert every_three.post("/setup", json=body).status_code == 422
    assert ledger.projects() == {}


def test_a_project_is_known_though_its_labels_are_not_counted(settings: Settings, ledger: Ledger) -> None:
    """Its events are noted, and its labels looked at when CELESTIAL_TRAIN_EVERY is set later."""
    client = create_app(build(settings)).test_client()
    assert client.post("/setup", json={"project": "12.1", "schema": label_config()}).status_code == 200
    assert list(ledger.projects()) == ["12"]


STRANGE = ["1" * 4301, "0007", "१२", "x" * 300]


@pytest.mark.parametrize("project", STRANGE, ids=lambda text: text[:9])
def test_what_is_no_number_is_neither_known_nor_trained(settings: Settings, project: str) -> None:
    """Nothing is written down, and nothing is raised where nobody waits for an answer."""
    jobs = build(settings).jobs
    jobs.know(project)
    jobs.note_event(project, "ANNOTATION_CREATED")
    with pytest.raises(RequestError, match="must be a whole number from 1 to"):
        jobs.request(project)
    assert list(settings.model_dir.iterdir()) == []


def test_what_older_releases_wrote_down_stops_nothing(
    studio: Any, look: Callable[[], None], ledger: Ledger, settings: Settings
) -> None:
    """Texts that are no numbers, as projects and as jobs: the others are looked at all the same."""
    ledger.know("7")
    ledger.request("8")
    with sqlite3.connect(settings.model_dir / "jobs.db") as db:
        db.executemany("INSERT INTO projects (project) VALUES (?)", [(project,) for project in STRANGE])
        row = "INSERT INTO jobs VALUES (?, ?, ?, 0, 1, 1, 1.0, NULL, NULL, '', '{}', '{}')"
        db.executemany(row, [("a", STRANGE[0], WAITING), ("b", STRANGE[0], RUNNING), ("c", "0007", RUNNING)])
    studio.new = 3
    look()
    assert studio.asked == [("7", None)]
    assert states(ledger) == [WAITING]


@pytest.mark.parametrize("trouble", [StudioError("Oh."), ValueError("Oh."), OSError("Oh.")], ids=repr)
def test_one_project_in_trouble_stops_no_other(
    studio: Any, look: Callable[[], None], ledger: Ledger, caplog: pytest.LogCaptureFixture, trouble: Exception
) -> None:
    """Whatever it is, the log tells it once, with the project; at the next look it is tried again."""
    for project in ("6", "7", "8"):
        ledger.know(project)
    studio.new, studio.troubles = 3, {"6": trouble}
    look()
    assert [states(ledger, project) for project in ("6", "7", "8")] == [[], [WAITING], [WAITING]]
    assert caplog.text.count("project 6") == 1
    studio.troubles = {}
    look()
    assert states(ledger, "6") == [WAITING]


def test_a_training_that_cannot_be_recovered_stops_no_other(
    studio: Any, settings: Settings, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others wait again, and labels are looked at."""
    jobs = build(replace(settings, train_every=3)).jobs
    for project in ("6", "7"):
        ledger.request(project)
        ledger.start(project)
    ledger.know("8")
    settle = jobs.endings.settle

    def troubled(job: Job, *rest: Any, **more: Any) -> None:
        if job.project == "7":
            raise ValueError("Oh.")
        settle(job, *rest, **more)

    monkeypatch.setattr(jobs.endings, "settle", troubled)
    jobs.look_after()
    assert (states(ledger, "6"), states(ledger, "7")) == ([WAITING], [RUNNING])
    assert studio.asked == [("8", None)]


def test_a_project_that_is_gone_is_forgotten(studio: Any, settings: Settings, ledger: Ledger) -> None:
    """With its event and its lock, until /setup names it again; one that is there stays."""
    jobs = build(replace(settings, train_every=3)).jobs
    for project in ("6", "7"):
        jobs.know(project)
        jobs.note_event(project, "PROJECT_UPDATED")
        assert last_event(settings.model_dir, int(project)) is not None
    studio.troubles = {"7": ProjectGoneError("No.")}
    jobs.look_after()
    assert list(ledger.projects()) == ["6"]
    assert [path.name for path in (settings.model_dir / "work").iterdir()] == ["webhook-6"]
    jobs.note_event("7", "PROJECT_UPDATED")
    assert last_event(settings.model_dir, 7) is None
    jobs.know("7")
    assert list(ledger.projects()) == ["6", "7"]


def test_a_project_that_was_forgotten_elsewhere_comes_back(
    settings: Settings, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A web process writes a project down once a minute, however often /setup comes."""
    jobs, moment = build(settings).jobs, time.monotonic()
    monkeypatch.setattr("celestial_backend.jobs.time.monotonic", lambda: moment)
    jobs.know("7")
    ledger.forget("7")
    jobs.know("7")
    assert list(ledger.projects()) == []
    moment += KNOW_S
    jobs.know("7")
    assert list(ledger.projects()) == ["7"]


def test_a_project_that_is_gone_is_kept_while_its_training_runs(
    studio: Any, look: Callable[[], None], settings: Settings, ledger: Ledger
) -> None:
    """Its lock is another worker's, who finds out by himself."""
    ledger.know("7")
    studio.new = ProjectGoneError("No.")
    with lock(settings.model_dir / "work" / "project-7.lock"):
        look()
    assert list(ledger.projects()) == ["7"]
    look()
    assert list(ledger.projects()) == []


def test_a_thousand_foreign_events_leave_nothing(settings: Settings) -> None:
    """An event is noted for a project that /setup, a job or a model of its own has made known, and for no other."""
    services = build(settings)
    jobs = services.jobs
    for number in range(1, 1001):
        jobs.note_event(str(number), "ANNOTATION_CREATED")
    assert not (settings.model_dir / "work").exists()
    jobs.know("1001")
    services.jobs.ledger.request("1002")
    services.store.pointers.write("1003", Pointer("a:1"))
    for number in range(1000, 1005):
        jobs.note_event(str(number), "START_TRAINING")
    assert not (settings.model_dir / "work").exists(), "which comes past the webhook"
    for number in range(1000, 1005):
        jobs.note_event(str(number), "ANNOTATION_CREATED")
    files = sorted(path.name for path in (settings.model_dir / "work").iterdir())
    assert files == ["webhook-1001", "webhook-1002", "webhook-1003"]
    assert last_event(settings.model_dir, 1001) is not None


def test_an_event_is_never_held_up_by_the_note_of_it(settings: Settings, ledger: Ledger) -> None:
    """A list that is locked, a pointer that is damaged, a folder that is a file."""
    jobs = build(settings).jobs
    ledger.know("7")
    (settings.model_dir / "live").mkdir()
    (settings.model_dir / "live" / "8.json").write_text("{")
    (settings.model_dir / "work").write_text("in the way")
    with sqlite3.connect(settings.model_dir / "jobs.db", isolation_level=None) as other:
        other.execute("BEGIN EXCLUSIVE")
        started = time.monotonic()
        for project in ("6", "8"):
            jobs.know(project)
            jobs.note_event(project, "ANNOTATION_CREATED")
        assert time.monotonic() - started < 4  # SQLite by itself waits five
    jobs.note_event("7", "ANNOTATION_CREATED")
    assert list(ledger.projects()) == ["7"]


def test_too_many_known_projects_are_said_once(
    settings: Settings, ledger: Ledger, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those beyond are not written down."""
    monkeypatch.setattr(ledger_module, "KNOWN_MAX", 3)
    jobs = build(settings).jobs
    for number in range(1, 10):
        jobs.know(str(number))
    assert list(ledger.projects()) == ["1", "2", "3"]
    assert caplog.text.count("projects are remembered") == 1


def messages(jobs: Jobs) -> int:
    return int(jobs.huey.storage.queue_size())


def test_so_many_projects_may_wait(settings: Settings, ledger: Ledger) -> None:
    """The next one gets 503 with a sentence, and nothing of it is kept; one that waits is merged as ever."""
    client = create_app(build(settings)).test_client()
    for number in range(1, WAITING_MAX + 1):
        ledger.request(str(number))
    body = {"action": "START_TRAINING", "project": {"id": 1000, "label_config": label_config()}}
    answer = client.post("/webhook", json=body)
    assert answer.status_code == 503
    assert answer.json["detail"].startswith(f"{WAITING_MAX} projects wait for a training, and no more may")
    assert "python -m celestial_backend jobs" in answer.json["detail"]
    assert (states(ledger, "1000"), ledger.knows("1000")) == ([], False)
    assert send(client, "START_TRAINING", project=7)["requests"] == 2


def test_lost_events_are_not_looked_for_while_too_many_wait(
    studio: Any, look: Callable[[], None], ledger: Ledger
) -> None:
    """Nothing more would be accepted; the next look after one has ended goes on."""
    for number in range(1, WAITING_MAX + 1):
        ledger.request(str(number))
    ledger.know("1000")
    studio.new = 3
    look()
    assert studio.asked == []
    job = ledger.start("7")
    assert job is not None
    ledger.end(job.id, FAILED, "too few")
    look()
    assert states(ledger, "1000") == [WAITING]


def test_the_queue_does_not_grow(settings: Settings, ledger: Ledger, look: Callable[[], None]) -> None:
    """Neither by requests that are merged, nor by looks, nor by many projects, nor by jobs that others run."""
    jobs = build(settings).jobs
    for _ in range(20):
        jobs.request("7")
    jobs.request("8")
    for _ in range(5):
        look()
    assert messages(jobs) == 2
    for number in range(10, 40):
        jobs.request(str(number))
    look()
    assert messages(jobs) == MESSAGES
    for _ in range(20):  # as the command line trains, without a worker
        job = ledger.start("7")
        assert job is not None
        ledger.end(job.id, KEPT, "as it was")
        jobs.request("7")
    assert messages(jobs) == MESSAGES


def test_messages_that_were_lost_are_made_up_for(settings: Settings, look: Callable[[], None]) -> None:
    """Pages of tasks and what strangers put there are no messages for trainings."""
    jobs = build(settings).jobs
    jobs.request("7")
    jobs.huey.storage.flush_queue()
    for message in (b"", b"\xff", b'{"train"}'):
        jobs.huey.storage.enqueue(message)
    jobs.pages.offer("name", {})
    look()
    look()
    assert messages(jobs) == 5


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The projects that were trained, by trainings that end at once."""
    projects: list[str] = []

    def train(self: Jobs, job: Job, _held: object) -> None:
        projects.append(job.project)
        self.ledger.end(job.id, KEPT, "as it was")

    monkeypatch.setattr(Jobs, "_train", train)
    return projects


def test_who_has_waited_longest_has_his_turn(settings: Settings, trained: list[str]) -> None:
    """Whatever the messages say, and however often somebody asks again."""
    jobs = build(settings).jobs
    for project in ("5", "3", "4"):
        jobs.request(project)
    for message in ("4", "4", "3"):  # as those of older releases
        jobs.request("4")
        jobs.run_next(message)
        jobs.request("5")
    jobs.run_next()
    jobs.run_next()
    assert trained == ["5", "3", "4", "5"]


def test_a_project_that_is_trained_elsewhere_is_passed_over(
    settings: Settings, trained: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """And one that cannot be run at all; its turn is kept."""
    jobs = build(settings).jobs
    for project in ("3", "4", "5"):
        jobs.request(project)
    (settings.model_dir / "work" / "project-4.lock").mkdir(parents=True)
    with lock(settings.model_dir / "work" / "project-3.lock"):
        jobs.run_next()
    assert trained == ["5"]
    assert "The training of project 4 cannot be run: The state folder cannot be written" in caplog.text
    jobs.run_next()
    assert trained == ["5", "3"]


def test_the_next_message_is_there_when_a_training_begins(settings: Settings, trained: list[str]) -> None:
    """So another worker that has nothing to do begins the next one, and when all is done none is left."""
    jobs = build(settings).jobs
    for number in range(1, MESSAGES + 3):
        jobs.ledger.request(str(number))
    jobs.look_after()
    while messages(jobs):
        jobs.huey.storage.dequeue()
        jobs.run_next()
    assert len(trained) == MESSAGES + 2


def press(client: FlaskClient) -> tuple[Any, float]:
    """What START_TRAINING is answered, and after how many seconds."""
    started = time.monotonic()
    body = {"action": "START_TRAINING", "project": {"id": 7, "label_config": label_config()}}
    return client.post("/webhook", json=body), time.monotonic() - started


def test_a_locked_list_refuses_within_a_second(settings: Settings, ledger: Ledger) -> None:
    """503 with a sentence: nothing was accepted, and nobody believes that it was."""
    client = create_app(build(settings)).test_client()
    ledger.request("3")
    with sqlite3.connect(settings.model_dir / "jobs.db", isolation_level=None) as other:
        other.execute("BEGIN EXCLUSIVE")
        answer, seconds = press(client)
    assert answer.status_code == 503
    assert seconds < 4  # SQLite by itself waits five
    assert "The list of jobs in the state folder cannot be read or written (database is locked)." in answer.status
    assert states(ledger) == []


def test_a_locked_queue_does_not_hold_up_a_request(settings: Settings, ledger: Ledger) -> None:
    """It is written down, and the worker finds it."""
    services = build(settings)
    client = create_app(services).test_client()
    services.jobs.huey.storage.queue_size()
    with sqlite3.connect(settings.model_dir / "queue.db", isolation_level=None) as other:
        other.execute("BEGIN EXCLUSIVE")
        answer, seconds = press(client)
        time.sleep(0.6)
    assert answer.status_code == 201
    assert seconds < 4  # SQLite by itself waits five
    assert states(ledger) == [WAITING]


def test_a_full_disk_accepts_nothing(settings: Settings, small_disk: Path) -> None:
    """The answer is an error with a sentence; with space again the same request is accepted."""
    services = build(replace(settings, model_dir=small_disk / "state"))
    client = create_app(services).test_client()
    filler = fill(small_disk)
    answer, seconds = press(client)
    assert answer.status_code == 503
    assert seconds < 4  # SQLite by itself waits five
    assert "Nothing was accepted. Check that this user can write to the folder" in answer.json["detail"]
    filler.unlink()
    assert press(client)[0].status_code == 201
    assert states(services.jobs.ledger) == [WAITING]


def cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "celestial_backend", *arguments],
        cwd=REPOSITORY, env=os.environ, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def test_jobs_lists_what_waits_runs_and_has_ended(ledger: Ledger) -> None:
    """With where it is or why it ended so; as lines in a pipe, as JSON for a script."""
    done = ledger.request("3")
    ledger.start("3")
    ledger.end(done.id, KEPT, "The new model is worse.", {"tag": "celestial_bodies_classifier_model:x"})
    running = ledger.request("4")
    ledger.start("4")
    ledger.progress(running.id, stage="learning", seconds=5, epoch=1, epochs=8, step=3, steps=40, loss=0.25)
    waiting = ledger.request("3")
    listed = cli("jobs")
    assert listed.returncode == 0
    rows = {line.split("\t")[0]: line.split("\t") for line in listed.stdout.splitlines()}
    assert list(rows) == ["job", waiting.id, running.id, done.id]
    assert rows[done.id][1:3] == ["3", KEPT]
    assert rows[done.id][-1] == "The new model is worse."
    assert rows[running.id][-1] == "learning epoch 2/8, step 3/40, loss 0.250"
    told = json.loads(cli("jobs", "--project", "3", "--limit", "5", "--json").stdout)
    assert [(job["id"], job["state"]) for job in told] == [(waiting.id, WAITING), (done.id, KEPT)]
    assert told[1]["tag"] == "celestial_bodies_classifier_model:x"
    assert told[1]["reason"] == "The new model is worse."


def test_jobs_says_when_what_waits_has_no_worker(ledger: Ledger, settings: Settings) -> None:
    """On stderr, with what mends it; in JSON each job tells. With a worker, or where nothing waits, it is silent."""
    done = ledger.request("3")
    ledger.start("3")
    ledger.end(done.id, KEPT, "as it was")
    assert cli("jobs").stderr == ""
    waiting = ledger.request("3")
    ask = ("jobs", "--json")
    for listed in (cli("jobs"), cli(*ask)):
        assert listed.returncode == 0
        assert listed.stderr.startswith("No worker runs on this MODEL_DIR")
        assert "huey_consumer celestial_backend.worker.huey" in listed.stderr
    stalled = {job["id"]: job["stalled"] for job in json.loads(cli(*ask).stdout)}
    assert stalled == {waiting.id: True, done.id: False}
    with lock(settings.model_dir / WORKER_LOCK):
        listed = cli(*ask)
    assert listed.stderr == ""
    assert not any(job["stalled"] for job in json.loads(listed.stdout))


def test_a_list_that_cannot_be_read_is_a_sentence(settings: Settings) -> None:
    """Exit code 6, the sentence on stderr, nothing on stdout."""
    (settings.model_dir / "jobs.db").write_text("no list of jobs at all, and longer than the head of one" * 9)
    failed = cli("jobs")
    assert failed.returncode == 6
    assert failed.stderr.startswith("Error: The list of jobs in the state folder cannot be read or written")
    assert "Traceback" not in failed.stderr
    assert failed.stdout == ""


def test_models_use_goes_back_in_a_moment(settings: Settings) -> None:
    """The tag is live at once, in less than five seconds; an unknown one changes nothing and names those there are."""
    listed = json.loads(cli("models", "--json").stdout)
    assert [model["live"] for model in listed] == [["all others"]]
    tag = listed[0]["tag"]
    store = ModelStore(settings)
    unknown = cli("models", "use", "nowhere", "--project", "3")
    assert unknown.returncode == 3
    assert f"The model celestial_bodies_classifier_model:nowhere is not in the BentoML store, which holds {tag}" in (
        unknown.stderr
    )
    assert store.pointers.read("3") is None
    started = time.monotonic()
    used = cli("models", "use", tag.partition(":")[2], "--project", "3")
    assert time.monotonic() - started < 5
    assert used.returncode == 0, used.stderr
    assert used.stdout == f"Project 3 is served {tag} from now on.\n"
    assert "Label Studio was not told" in used.stderr
    assert store.pointers.projects() == {"3": tag}
    assert json.loads(cli("models", "--json").stdout)[0]["live"] == ["all others", "3"]
    assert f"{tag.partition(':')[2]}\tall others, project 3\t" in cli("models").stdout


def test_jobs_of_this_process_open_nothing_before_they_are_asked(settings: Settings) -> None:
    """A fork may follow, as gunicorn's."""
    jobs: Jobs = build(settings).jobs
    assert list(settings.model_dir.iterdir()) == []
    jobs.request("3")
    assert (settings.model_dir / "jobs.db").is_file()
