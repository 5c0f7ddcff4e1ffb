"""Trainings are asked for, waited for and run, and nothing that was accepted or counted is lost."""

from __future__ import annotations

import contextlib
import socket
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
from flask.testing import FlaskClient
from huey import Huey

from celestial_backend.database import Database
from celestial_backend.errors import ProjectGoneError, RequestError, StudioError
from celestial_backend.jobs import ledger as ledger_module
from celestial_backend.jobs.ledger import FAILED, KEPT, PUBLISHED, RUNNING, WAITING, WAITING_MAX, Ending, Job, Ledger
from celestial_backend.jobs.looker import AGAIN_S
from celestial_backend.jobs.queue import make_queue
from celestial_backend.jobs.trainings import KNOW_S, MESSAGES, Jobs
from celestial_backend.services import build
from celestial_backend.settings import NEVER, Settings
from celestial_backend.studio.project import Labels, StudioProject
from celestial_backend.trust.trial import PLANTED, Unshown
from celestial_backend.web.app import create_app
from tests.support import fake_project
from tests.support.backend_server import label_config
from tests.support.fake_project import (
    FakeProject,
    Look,
    annotation,
    begun,
    change,
    die,
    end,
    event_at,
    look_after,
    looked,
    messages,
    press,
    run_next,
    states,
)

by_itself, ledger, live, look = fake_project.by_itself, fake_project.ledger, fake_project.live, fake_project.look
minutes, trained = fake_project.minutes, fake_project.trained
settings, studio = fake_project.settings, fake_project.studio


@pytest.fixture
def every_three(settings: Settings) -> FlaskClient:
    """A backend that trains at every third label."""
    return create_app(build(replace(settings, train_every=3))).test_client()


def send(client: FlaskClient, action: str, project: int = 7, **more: Any) -> Any:
    body = {"action": action, "project": {"id": project, "title": "Bodies", "label_config": label_config()}} | more
    answer = client.post("/webhook", json=body)
    assert answer.status_code == 201, answer.text
    return answer.json["result"]


def created(client: FlaskClient, project: int = 7, **more: Any) -> Any:
    return send(client, "ANNOTATION_CREATED", project, annotation=annotation(**more), task={"id": 1})


def test_events_count_labels_whatever_the_setting(settings: Settings, ledger: Ledger) -> None:
    """In milliseconds, for each project by itself; new ones and changed ones, and all of those that came together."""
    for every in (None, NEVER, 3):
        client = create_app(build(replace(settings, train_every=every))).test_client()
        assert created(client) == {"event": "ANNOTATION_CREATED", "state": "counted"}
    send(client, "ANNOTATION_UPDATED", annotation=annotation(), task={"id": 1})
    made = [annotation(number) for number in range(2)]
    send(client, "ANNOTATIONS_CREATED", annotation=made, task=[{"id": 0}, {"id": 1}])
    created(client, project=8)
    assert [known.labels for project in "78" if (known := ledger.known(project))] == [6, 1]
    assert ledger.jobs() == [], "a worker asks Label Studio first"


def test_skips_and_deletions_are_no_labels(every_three: FlaskClient, ledger: Ledger) -> None:
    """There is nothing to learn from them."""
    for _ in range(4):
        created(every_three, was_cancelled=True)
        send(every_three, "ANNOTATIONS_DELETED", annotations=[{"id": 1}])
    known = ledger.known("7")
    assert known is not None
    assert known.labels == 0


@pytest.mark.parametrize("project", ["..", "7/../8", None, "x", [7], {"id": 7}, 7.5])
def test_a_project_without_a_number_is_refused(every_three: FlaskClient, ledger: Ledger, project: Any) -> None:
    """What stands in an event becomes no path and no job."""
    body = {"action": "START_TRAINING", "project": {"id": project, "label_config": label_config()}}
    assert every_three.post("/webhook", json=body).status_code == 400
    assert ledger.jobs() == []


# Lost events


def test_labels_whose_events_were_lost_are_found(studio: Any, look: Look, ledger: Ledger) -> None:
    """Label Studio is asked how many came since the last training, and enough of them bring one about."""
    ledger.know("7")
    studio.new = 2
    look()
    assert states(ledger) == []
    studio.label(Mars=1)
    look()
    assert states(ledger) == [WAITING]
    look()
    assert ledger.jobs()[0].requests == 1, "one that waits is not asked for again"
    assert studio.asked == [("7", None), ("7", None)]


@pytest.mark.parametrize("state", [PUBLISHED, KEPT])
def test_a_training_is_not_asked_for_again_without_new_labels(
    studio: Any, look: Look, ledger: Ledger, state: str
) -> None:
    """The count is of those that are newer than the newest it has read."""
    ledger.request("7")
    ledger.read_until("7", "2026-11-23T01:02:03Z")
    end(ledger, state)
    look()
    assert studio.asked == [("7", "2026-11-23T01:02:03Z")]
    assert states(ledger) == [state]
    studio.label(Mars=3)
    look()
    assert states(ledger) == [WAITING, state]


def test_the_later_moment_counts(studio: Any, look: Look, ledger: Ledger) -> None:
    """That of the begin of a training, or that of the newest label that one has read."""
    for read, moment in (("2026-11-23T01:02:03Z", "2026-11-23T01:02:03.5Z"), ("2026-11-23T03:02:03Z", "")):
        ledger.request("7")
        ledger.read_until("7", read)
        end(ledger, FAILED, 6, moment)
        look()
    assert [moment for _, moment in studio.asked] == ["2026-11-23T01:02:03.5Z", "2026-11-23T03:02:03Z"]


def test_a_training_that_failed_without_labels_is_not_asked_for_every_minute(
    studio: Any, look: Look, ledger: Ledger, settings: Settings
) -> None:
    """Label Studio was away when it began, so nobody knows what it saw; an hour later it is tried again."""
    studio.new = 9
    ledger.request("7")
    end(ledger, FAILED)
    for _ in range(3):
        look()
    assert (states(ledger), studio.asked) == ([FAILED], [])
    change(settings, "UPDATE work SET requested_at = requested_at - :seconds", seconds=AGAIN_S)
    look()
    assert states(ledger) == [WAITING, FAILED]


def test_a_training_that_failed_is_asked_for_again_though_the_clock_was_moved_back(
    studio: Any, look: Look, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure that seems to lie ahead holds up nothing; that of the next attempt counts its hour."""
    studio.new, real = 9, time.time
    ledger.request("7")
    end(ledger, FAILED)
    monkeypatch.setattr(time, "time", lambda: real() - 30 * 86400)
    look()
    assert states(ledger) == [WAITING, FAILED]
    end(ledger, FAILED)
    look()
    assert states(ledger) == [FAILED, FAILED]


def test_a_label_studio_that_is_away_is_asked_again(
    studio: Any, look: Look, ledger: Ledger, caplog: pytest.LogCaptureFixture
) -> None:
    """The log says so once, the other projects and the worker go on."""
    ledger.know("7")
    studio.new = StudioError("Label Studio gave no answer.")
    look()
    look()
    assert caplog.text.count("The labels of project 7 cannot be counted: Label Studio gave no answer.") == 1
    studio.new = 3
    look()
    assert states(ledger) == [WAITING]


def test_setup_makes_a_project_known(every_three: FlaskClient, ledger: Ledger) -> None:
    """So its labels are looked at even if no event of it ever comes; what has no number is none."""
    for project in ("12.1", "nonsense.1", "", None):
        assert every_three.post("/setup", json={"project": project, "schema": label_config()}).status_code == 200
    assert list(ledger.projects()) == ["12"]


def test_a_setup_that_is_refused_makes_no_project_known(every_three: FlaskClient, ledger: Ledger) -> None:
    """What no model can serve leaves nothing behind."""
    body = {"project": "12.1", "schema": '<View><Image name="i" value="$i"/><Rating name="r" toName="i"/></View>'}
    assert every_three.post("/setup", json=body).status_code == 422
    assert ledger.projects() == {}


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
    studio: Any, look: Look, ledger: Ledger, settings: Settings
) -> None:
    """Texts that are no numbers, as projects and as jobs: the others are looked at all the same."""
    ledger.know("7")
    ledger.request("8")
    for project in STRANGE:
        change(settings, "INSERT INTO projects (project) VALUES (:project)", project=project)
    row = (
        "INSERT INTO work (id, project, state, requests, attempts, requested_at, reason, progress, outcome)"
        " VALUES (:id, :project, :state, 1, 1, 1.0, '', '{}', '{}')"
    )
    for number, (project, state) in enumerate([(STRANGE[0], WAITING), (STRANGE[0], RUNNING), ("0007", RUNNING)]):
        change(settings, row, id=str(number), project=project, state=state)
    studio.new = 3
    look()
    assert studio.asked == [("7", None)]
    assert states(ledger) == [WAITING]


@pytest.mark.parametrize("trouble", [StudioError("Oh."), ValueError("Oh."), OSError("Oh.")], ids=repr)
def test_one_project_in_trouble_stops_no_other(
    studio: Any, look: Look, ledger: Ledger, caplog: pytest.LogCaptureFixture, trouble: Exception
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
    for project in ("6", "7", "9"):
        ledger.request(project)
        begun(ledger, project)
    ledger.know("8")
    give_back = jobs.ledger.give_back

    def troubled(job: Job, **more: Any) -> bool:
        if job.project == "7":
            raise ValueError("Oh.")
        return give_back(job, **more)

    monkeypatch.setattr(jobs.ledger, "give_back", troubled)
    die(settings)
    look_after(jobs)
    assert [states(ledger, project) for project in ("6", "7", "9")] == [[WAITING], [RUNNING], [WAITING]]
    assert studio.asked == [("8", None)]


@pytest.mark.usefixtures("studio")
def test_planted_errors_are_looked_after_every_minute(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the worker, in the thread that asks Label Studio."""
    services, asked = build(settings), []
    services.trial.keep("7", [Unshown(5, "one", PLANTED, [], 0.9, at=1.0)])
    remove = lambda project, wanted: asked.append((project.project_id, wanted)) or wanted  # noqa: E731
    monkeypatch.setattr(StudioProject, "remove_of_done", remove)
    look_after(services.jobs)
    assert asked == [("7", {(5, "one")})]
    assert services.trial.standing() == {}


def test_a_project_that_is_gone_is_forgotten(studio: Any, settings: Settings, ledger: Ledger) -> None:
    """With its event, until /setup names it again; one that is there stays."""
    jobs = build(replace(settings, train_every=3)).jobs
    for project in ("6", "7"):
        jobs.know(project)
        jobs.note_event(project, "PROJECT_UPDATED")
        assert event_at(ledger, project) is not None
    studio.troubles = {"7": ProjectGoneError("No.")}
    look_after(jobs)
    assert list(ledger.projects()) == ["6"]
    jobs.note_event("7", "PROJECT_UPDATED")
    assert ledger.known("7") is None
    jobs.know("7")
    assert list(ledger.projects()) == ["6", "7"]
    assert event_at(ledger, "7") is None


def test_a_project_that_was_forgotten_elsewhere_comes_back(
    settings: Settings, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A web process writes a project down once a minute, however often /setup comes."""
    jobs, moment = build(settings).jobs, time.monotonic()
    monkeypatch.setattr("celestial_backend.jobs.trainings.time.monotonic", lambda: moment)
    jobs.know("7")
    ledger.forget("7")
    jobs.know("7")
    assert list(ledger.projects()) == []
    moment += KNOW_S
    jobs.know("7")
    assert list(ledger.projects()) == ["7"]


def test_a_project_that_is_gone_is_kept_while_its_training_runs(studio: Any, look: Look, ledger: Ledger) -> None:
    """Its worker finds out by himself."""
    ledger.request("7")
    studio.new = ProjectGoneError("No.")
    look()
    job = begun(ledger)
    look()
    assert list(ledger.projects()) == ["7"]
    ledger.end(job, Ending(KEPT, "worse"))
    look()
    assert list(ledger.projects()) == []


def test_foreign_events_leave_nothing(settings: Settings, ledger: Ledger) -> None:
    """An event is noted for a project that /setup or a job has made known, and for no other."""
    jobs = build(settings).jobs
    for number in range(1, 101):
        jobs.note_event(str(number), "ANNOTATION_CREATED")
    assert ledger.projects() == {}
    jobs.know("1001")
    ledger.request("1002")
    for action, noted in (("START_TRAINING", False), ("ANNOTATION_CREATED", True)):
        for number in range(1000, 1004):
            jobs.note_event(str(number), action)
        assert [event_at(ledger, project) is not None for project in ("1001", "1002")] == [noted] * 2, action
    assert list(ledger.projects()) == ["1001", "1002"]


def test_an_event_is_never_held_up_by_the_note_of_it(settings: Settings, ledger: Ledger) -> None:
    """By a database into which another process writes, or that cannot be read; later it is noted."""
    jobs = build(settings).jobs
    jobs.know("7")
    with Database(settings).writing("7"):
        started = time.monotonic()
        jobs.know("6")
        jobs.note_event("7", "ANNOTATION_CREATED")
        assert time.monotonic() - started < 4
    away = build(replace(settings, database_url="postgresql+psycopg://127.0.0.1:1/celestial")).jobs
    away.know("6")
    away.note_event("7", "ANNOTATION_CREATED")
    assert (list(ledger.projects()), event_at(ledger, "7")) == (["7"], None)
    jobs.note_event("7", "ANNOTATION_CREATED")
    assert event_at(ledger, "7") is not None


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


def test_lost_events_are_not_looked_for_while_too_many_wait(studio: Any, look: Look, ledger: Ledger) -> None:
    """Nothing more would be accepted; the next look after one has ended goes on."""
    for number in range(1, WAITING_MAX + 1):
        ledger.request(str(number))
    ledger.know("1000")
    studio.new = 3
    look()
    assert studio.asked == []
    end(ledger, FAILED)
    look()
    assert states(ledger, "1000") == [WAITING]


def test_the_queue_does_not_grow(settings: Settings, ledger: Ledger, look: Look) -> None:
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
        end(ledger)
        jobs.request("7")
    assert messages(jobs) == MESSAGES


def test_messages_that_were_lost_are_made_up_for(settings: Settings, look: Look) -> None:
    """Pages of tasks and what strangers put there are no messages for trainings."""
    jobs = build(settings).jobs
    jobs.request("7")
    jobs.huey.storage.flush_queue()
    for message in (b"", b"\xff", b'{"train"}'):
        jobs.huey.storage.enqueue(message)
    jobs.pages.wake(1)
    look()
    look()
    assert messages(jobs) == 5


def test_who_has_waited_longest_has_his_turn(settings: Settings, trained: list[str]) -> None:
    """Whatever the messages say, and however often somebody asks again."""
    jobs = build(settings).jobs
    for project in ("5", "3", "4"):
        jobs.request(project)
    for message in ("4", "4", "3"):  # as those of older releases
        jobs.request("4")
        run_next(jobs, message)
        jobs.request("5")
    run_next(jobs)
    run_next(jobs)
    assert trained == ["5", "3", "4", "5"]


def test_a_project_that_is_trained_elsewhere_is_passed_over(
    settings: Settings, trained: list[str], ledger: Ledger
) -> None:
    """Its turn is kept."""
    jobs = build(settings).jobs
    jobs.request("3")
    elsewhere = begun(ledger, "3")
    for project in ("3", "4"):
        jobs.request(project)
    run_next(jobs)
    run_next(jobs)
    assert trained == ["4"]
    ledger.end(elsewhere, Ending(KEPT, "as it was"))
    run_next(jobs)
    assert trained == ["4", "3"]


def test_the_queue_is_made_once(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where two requests are the first to want it at the same time: its tasks belong to one queue."""
    made, both = [], threading.Barrier(2)

    def make(wanted: Settings) -> Huey:
        made.append(wanted)
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(0.5)  # for another one that is being made
        return make_queue(wanted)

    monkeypatch.setattr("celestial_backend.jobs.trainings.make_queue", make)
    jobs = build(settings).jobs
    with ThreadPoolExecutor(2) as threads:
        one, other = threads.map(lambda _: jobs.huey, range(2))
    assert one is other
    assert made == [settings]


def test_the_next_message_is_there_when_a_training_begins(settings: Settings, trained: list[str]) -> None:
    """So another worker that has nothing to do begins the next one, and when all is done none is left."""
    jobs = build(settings).jobs
    for number in range(1, MESSAGES + 3):
        jobs.ledger.request(str(number))
    look_after(jobs)
    while messages(jobs):
        jobs.huey.storage.dequeue()
        run_next(jobs)
    assert len(trained) == MESSAGES + 2


@pytest.mark.parametrize("wanted", ["7", "8", "9"])
def test_a_silent_label_studio_holds_up_no_training(
    settings: Settings, trained: list[str], wanted: str
) -> None:
    """What is asked for while a look gets no answer begins at once, of the project that is looked at and of others."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        jobs = build(replace(settings, label_studio_url=url)).jobs
        for project in ("7", "8"):
            jobs.ledger.know(project)
        jobs.look_after()
        with silent.accept()[0] as asked:
            (looking,) = (thread for thread in threading.enumerate() if thread.name == "look")
            jobs.request(wanted)
            jobs.run_next()
            assert trained == [wanted]
            assert looking.is_alive()
            assert asked.recv(4) == b"GET "
            jobs.stop()  # after this project no other is looked at
    looked()


@pytest.mark.usefixtures("studio")
def test_a_project_whose_version_cannot_be_changed_trains_all_the_same(
    by_itself: Jobs, ledger: Ledger, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What Label Studio shows is no condition of a training; that it refuses is said once."""

    def refused(_: FakeProject) -> None:
        raise StudioError("Label Studio refuses live predictions: no.")

    monkeypatch.setattr(FakeProject, "ask_for_new_tasks", refused)
    ledger.know("7")
    by_itself.look("7")
    by_itself.look("7")
    assert states(ledger) == [WAITING]
    said = "What project 7 shows cannot be changed: Label Studio refuses live predictions: no."
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [said]


def test_what_a_look_finds_is_dropped_where_a_training_was_asked_for_meanwhile(
    studio: Any, by_itself: Jobs, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reads all labels itself, and a second one would learn the same."""
    now = studio.labels_now

    def pressed(self: FakeProject) -> Labels:
        end(ledger, KEPT) if ledger.request("7") and states(ledger) == [WAITING] else None
        return now(self)

    monkeypatch.setattr(FakeProject, "labels_now", pressed)
    ledger.know("7")
    by_itself.look("7")
    assert states(ledger) == [KEPT]


def test_a_database_that_others_write_into_refuses_within_a_second(settings: Settings, ledger: Ledger) -> None:
    """503 with a sentence: nothing was accepted, and nobody believes that it was."""
    client = create_app(build(settings)).test_client()
    created(client, 3)
    with Database(settings).writing("7"):
        answer, seconds = press(client)
    assert answer.status_code == 503
    assert seconds < 4  # Label Studio gives a webhook one second
    assert "The database in the state folder cannot be written (it is in use)." in answer.status
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


def test_jobs_of_this_process_open_nothing_before_they_are_asked(settings: Settings) -> None:
    """A fork may follow, as gunicorn's."""
    jobs: Jobs = build(settings).jobs
    assert list(settings.model_dir.iterdir()) == []
    jobs.request("3")
    assert settings.state.database.is_file()
