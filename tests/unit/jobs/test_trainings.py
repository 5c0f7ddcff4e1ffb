"""Trainings are asked for by people, by events, by looks at the labels; and what the command line says of them."""

from __future__ import annotations

import contextlib
import fcntl
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from flask.testing import FlaskClient
from huey import Huey

from celestial_backend.doctor.machine import last_event
from celestial_backend.errors import ProjectGoneError, RequestError, StudioError
from celestial_backend.jobs import ledger as ledger_module
from celestial_backend.jobs.ledger import FAILED, KEPT, PUBLISHED, RUNNING, WAITING, WAITING_MAX, Job, Ledger
from celestial_backend.jobs.processes import lock
from celestial_backend.jobs.queue import make_queue
from celestial_backend.jobs.trainings import (
    AGAIN_S,
    KNOW_S,
    MESSAGES,
    NOBODY_TO_ASK,
    REST,
    SLOW_S,
    Jobs,
    worker_lives,
)
from celestial_backend.models.store import ModelStore, Pointer
from celestial_backend.services import build
from celestial_backend.settings import MODEL_NAME, NEVER, Settings, project_tag
from celestial_backend.studio.project import Labels
from celestial_backend.web.app import create_app
from tests.support import fake_project
from tests.support.backend_server import label_config
from tests.support.fake_project import (
    DEFAULT,
    FakeProject,
    annotation,
    look_after,
    looked,
    press,
    run_next,
    states,
)

BROUGHT = f"{MODEL_NAME}:of-somebody"
by_itself, ledger, live = fake_project.by_itself, fake_project.ledger, fake_project.live
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


Look = Callable[[], None]


@pytest.fixture
def minutes(monkeypatch: pytest.MonkeyPatch) -> Callable[[Jobs], Look]:
    """What a worker does every minute, a minute later each time."""
    moment = time.monotonic()

    def of(jobs: Jobs) -> Look:
        def look() -> None:
            nonlocal moment
            moment += 60
            monkeypatch.setattr("celestial_backend.jobs.trainings.time.monotonic", lambda: moment)
            look_after(jobs)

        return look

    return of


@pytest.fixture
def look(settings: Settings, minutes: Callable[[Jobs], Look]) -> Look:
    """That of a worker who trains at every third label."""
    return minutes(build(replace(settings, train_every=3)).jobs)


def end(ledger: Ledger, state: str = KEPT, labels: int | None = None, moment: str = "", project: str = "7") -> str:
    """Bring the waiting training of a project to its end; at its begin there were so many labels."""
    job = ledger.start(project)
    assert job is not None
    if labels is not None:
        ledger.trained(project, labels, moment)
    ledger.end(job.id, state, "as it was")
    return job.id


def missing(ledger: Ledger, project: str = "7") -> str | None:
    known = ledger.known(project)
    assert known is not None
    return known.missing


# When a training is asked for


def test_two_choices_with_three_labels_each_begin_the_first_training(
    studio: Any, by_itself: Jobs, ledger: Ledger
) -> None:
    """Not before; until then it is written down how many labels of which choices are missing."""
    studio.tasks.clear()
    ledger.know("7")
    run_next(by_itself)
    assert by_itself.missing("7") == (
        "choice: no labels yet; at least 2 choices need 3 labels each, so label 3 pictures each of 2 choices."
    )
    studio.label(Mars=4, Venus=2)
    by_itself.note_labels("7", 6)
    run_next(by_itself)
    assert by_itself.missing("7") == (
        "choice: 4 labels of 'Mars' and 2 of 'Venus'; at least 2 choices need 3 labels each, so label 1 more picture of"
        " 'Venus'."
    )
    assert states(ledger) == []
    studio.label(Venus=1)
    by_itself.note_labels("7", 1)
    by_itself.look("7")
    assert (states(ledger), by_itself.missing("7")) == ([WAITING], "")
    assert studio.asked == [], "nothing was learned, so all labels are new"


@pytest.mark.parametrize("state", [PUBLISHED, KEPT, FAILED])
def test_the_next_begins_when_the_labels_have_grown_by_a_fifth(
    studio: Any, by_itself: Jobs, live: dict[str, str], ledger: Ledger, state: str
) -> None:
    """However the last one ended; and as long as events do not tell of so many, Label Studio is not asked."""
    ledger.request("7")
    studio.label(Mars=24)
    end(ledger, state, 30, "2026-11-23T01:02:03Z")
    ledger.look("7")
    ledger.looked("7", labels=0, missing="", brought="")
    if state == PUBLISHED:
        live["7"] = project_tag("7", "ab12")
    studio.new = 5
    by_itself.note_labels("7", 5)
    run_next(by_itself)
    assert (states(ledger), studio.asked) == ([state], [])
    by_itself.note_labels("7", 1)
    by_itself.look("7")
    assert (states(ledger), studio.asked) == ([state], [("7", "2026-11-23T01:02:03Z")]), "an event came twice"
    studio.label(Mars=1)
    by_itself.note_labels("7", 1)
    by_itself.look("7")
    assert states(ledger) == [WAITING, state]


def test_few_labels_must_grow_by_five(studio: Any, by_itself: Jobs, ledger: Ledger) -> None:
    """A fifth of six would be every second one."""
    ledger.request("7")
    end(ledger, KEPT, 6, "2026-11-23T01:02:03Z")
    for labels, expected in ((4, [KEPT]), (1, [WAITING, KEPT])):
        studio.label(Mars=labels)
        by_itself.look("7")
        assert states(ledger) == expected


def test_what_was_asked_for_with_too_few_labels_is_no_attempt(studio: Any, by_itself: Jobs, ledger: Ledger) -> None:
    """Somebody pressed the button too early: as soon as there are enough a training begins, by then it can learn."""
    studio.tasks.clear()
    studio.label(Mars=3, Venus=1)
    by_itself.look("7")
    by_itself.request("7")
    end(ledger, FAILED, 4, "2026-11-23T01:02:03Z")
    by_itself.look("7")
    assert str(missing(ledger)).startswith("choice: 3 labels of 'Mars' and 1 of 'Venus'")
    studio.label(Venus=1)
    by_itself.look("7")
    assert states(ledger) == [FAILED]
    studio.label(Venus=1)
    by_itself.look("7")
    assert states(ledger) == [WAITING, FAILED]


def test_a_number_of_labels(studio: Any, look: Look, ledger: Ledger) -> None:
    """As many new or changed ones as it says, but never fewer than can be learned."""
    studio.tasks.clear()
    ledger.know("7")
    studio.label(Mars=4)
    look()
    assert states(ledger) == []
    studio.label(Venus=3)
    look()
    assert states(ledger) == [WAITING]
    end(ledger, KEPT, 7, "2026-11-23T01:02:03Z")
    for new, expected in ((2, [KEPT]), (3, [WAITING, KEPT])):
        studio.new = new
        studio.moment += "+"
        look()
        assert states(ledger) == expected


def test_a_large_number_is_waited_for_the_first_time_too(studio: Any, settings: Settings, ledger: Ledger) -> None:
    """With enough to learn from long before."""
    jobs = build(replace(settings, train_every=50)).jobs
    for labels, expected in ((43, []), (1, [WAITING])):
        studio.label(Mars=labels)
        studio.new = len(studio.tasks)
        ledger.know("7")
        jobs.look("7")
        assert states(ledger) == expected


def test_off_is_the_button_alone(
    studio: Any, settings: Settings, ledger: Ledger, minutes: Callable[[Jobs], Look]
) -> None:
    """What is missing before it can learn is told all the same."""
    jobs = build(replace(settings, train_every=NEVER)).jobs
    studio.tasks.clear()
    ledger.know("7")
    look = minutes(jobs)
    look()
    assert jobs.missing("7").startswith("choice: no labels yet")
    studio.label(Mars=50, Venus=50)
    jobs.note_labels("7", 100)
    look()
    run_next(jobs)
    assert (jobs.missing("7"), states(ledger)) == ("", [])
    jobs.request("7")
    assert states(ledger) == [WAITING]


def test_a_model_that_was_brought_waits_for_the_button(
    studio: Any, by_itself: Jobs, live: dict[str, str], ledger: Ledger
) -> None:
    """It knows the choices; once somebody has asked, trainings begin by themselves."""
    live["7"] = BROUGHT
    studio.new = 100
    by_itself.note_labels("7", 100)
    by_itself.look("7")
    known = ledger.known("7")
    assert known is not None
    assert known.hindrance == (
        f"{BROUGHT} was not trained here, and knows choices of the project: no training begins by itself before Start"
        " Training was pressed once."
    )
    assert (states(ledger), by_itself.missing("7"), studio.read) == ([], "", 0)
    by_itself.request("7")
    end(ledger, KEPT, 6, "2026-11-23T01:02:03Z")
    by_itself.look("7")
    assert states(ledger) == [WAITING, KEPT]
    known = ledger.known("7")
    assert known is not None
    assert known.hindrance == ""


def test_a_model_that_was_brought_and_knows_no_choice_is_replaced(
    studio: Any, by_itself: Jobs, live: dict[str, str], ledger: Ledger
) -> None:
    live["7"] = BROUGHT
    studio.config = label_config(["dress", "hat"])
    studio.tasks.clear()
    studio.label(dress=3, hat=3)
    ledger.know("7")
    by_itself.look("7")
    assert states(ledger) == [WAITING]


@pytest.mark.parametrize(
    ("tag", "brought"),
    [
        pytest.param(DEFAULT, False, id="the embedded default"),
        pytest.param(project_tag("7", "ab12"), False, id="its own"),
        pytest.param(project_tag("8", "ab12"), False, id="another project's"),
        pytest.param(BROUGHT, True, id="the store's latest"),
        pytest.param("another_name:1", True, id="of another name"),
    ],
)
def test_what_we_trained_ourselves_was_not_brought(
    studio: Any, by_itself: Jobs, live: dict[str, str], ledger: Ledger, tag: str, *, brought: bool
) -> None:
    live["7"] = tag
    studio.new = 100
    ledger.know("7")
    by_itself.look("7")
    assert states(ledger) == ([] if brought else [WAITING])


@pytest.mark.usefixtures("studio")
@pytest.mark.parametrize("chosen", [{"model": DEFAULT}, {"bentomodel": Path("a.bentomodel")}], ids=["tag", "file"])
def test_whatever_the_settings_name_was_brought(settings: Settings, ledger: Ledger, chosen: dict[str, Any]) -> None:
    """But for a project that has a model of its own, which goes before it."""
    services = build(replace(settings, **chosen))
    services.store.pointers.write("8", Pointer(DEFAULT))
    for project in ("7", "8"):
        ledger.know(project)
        services.jobs.look(project)
    assert (states(ledger, "7"), states(ledger, "8")) == ([], [WAITING])


@pytest.mark.usefixtures("studio")
def test_a_model_of_which_nothing_is_known_may_know_the_choices(
    by_itself: Jobs, live: dict[str, str], ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was never loaded, and a look loads nothing."""
    live["7"] = BROUGHT
    monkeypatch.setattr(ModelStore, "known", lambda *_: None)
    ledger.know("7")
    by_itself.look("7")
    assert states(ledger) == []


def test_a_config_that_cannot_be_learned_is_what_is_missing(
    studio: Any, by_itself: Jobs, live: dict[str, str], ledger: Ledger
) -> None:
    """As a new project has none; whichever model is live."""
    for tag in (DEFAULT, BROUGHT):
        live["7"] = tag
        studio.config = "<View></View>"
        ledger.know("7")
        by_itself.look("7")
        assert "has no Choices on an Image" in str(missing(ledger))
        studio.config = "<View>"
        by_itself.look("7")
        assert "not readable XML" in str(missing(ledger))
    assert states(ledger) == []


# What a look costs


def test_nothing_is_read_again_that_has_not_changed(studio: Any, by_itself: Jobs, ledger: Ledger) -> None:
    """Each minute Label Studio is asked whether there are other labels, or another config, and for no more."""
    studio.tasks.clear()
    ledger.know("7")
    for _ in range(5):
        by_itself.look("7")
    assert studio.read == 2, "and once more as now it is known what is missing"
    studio.label(Mars=1)
    by_itself.look("7")
    by_itself.look("7")
    assert studio.read == 4
    studio.config = label_config(["Mars", "Venus"])
    by_itself.look("7")
    assert "so label 2 more pictures of 'Mars' and 3 of 'Venus'" in by_itself.missing("7")


def test_many_events_are_one_look(
    studio: Any, by_itself: Jobs, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many messages they left, and not beside a training, which reads all labels itself."""
    seen: list[str] = []
    look = Jobs.look

    def counted(self: Jobs, project: str) -> None:
        seen.append(project)
        look(self, project)

    monkeypatch.setattr(Jobs, "look", counted)
    studio.tasks.clear()
    for _ in range(20):
        by_itself.note_labels("7", 1)
    for _ in range(3):
        run_next(by_itself)
    assert seen == ["7"]
    by_itself.note_labels("7", 1)
    with lock(by_itself.endings.folder("7").with_name("look-7.lock")):
        run_next(by_itself)
    assert ledger.looks(wanted=True) == ["7"], "another worker was at it: its turn is kept"
    by_itself.request("7")
    ledger.start("7")
    by_itself.look("7")
    assert studio.read == 1


@pytest.mark.usefixtures("studio")
def test_a_worker_is_woken_by_labels_that_may_be_enough(by_itself: Jobs, ledger: Ledger, trained: list[str]) -> None:
    """A message lies in the queue, and what takes it looks and trains."""
    by_itself.note_labels("7", 1)
    deadline = time.monotonic() + 30
    while not messages(by_itself):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    task = by_itself.huey.dequeue()
    by_itself.huey.execute(task)
    looked()
    while task := by_itself.huey.dequeue():
        by_itself.huey.execute(task)
    assert trained == ["7"]
    ledger.trained("7", 6, "2026-11-23T01:02:03Z")
    by_itself.note_labels("7", 4)
    assert ledger.looks(wanted=True) == []


def test_a_look_that_took_long_is_not_repeated_at_once(
    studio: Any, by_itself: Jobs, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where ten thousand labels of one choice must be read, a tenth of the time is spent on it."""
    moment = time.monotonic()

    def slow(_: FakeProject) -> Iterator[list[dict[str, Any]]]:
        nonlocal moment
        moment += SLOW_S + 1
        FakeProject.read += 1
        yield from ()

    monkeypatch.setattr("celestial_backend.jobs.trainings.time.monotonic", lambda: moment)
    monkeypatch.setattr(FakeProject, "annotations", slow)
    ledger.know("7")
    by_itself.look("7")
    studio.label(Mars=1)
    by_itself.look("7")
    assert studio.read == 1
    moment += REST * (SLOW_S + 1)
    by_itself.look("7")
    assert studio.read == 2


def test_nobody_is_asked_without_an_address_and_a_token(studio: Any, ledger: Ledger) -> None:
    """A backend that only predicts needs neither; what it lacks to learn is told where somebody asks."""
    jobs = build(Settings.from_environ()).jobs
    jobs.know("7")
    look_after(jobs)
    run_next(jobs)
    assert (studio.read, studio.asked, missing(ledger)) == (0, [], None)
    assert jobs.missing("7") == NOBODY_TO_ASK


def test_what_is_missing_is_told_without_fail(settings: Settings, ledger: Ledger) -> None:
    """The rule where nobody has looked, or the list of jobs cannot be read; it takes no time."""
    jobs = build(settings).jobs
    rule = "At least 2 choices need 3 labels each."
    assert [jobs.missing(project) for project in ("7", "", "x" * 300)] == [rule] * 3
    ledger.know("7")
    ledger.looked("7", labels=0, missing="Two more.", brought="")
    assert jobs.missing("7") == "Two more."
    with sqlite3.connect(settings.model_dir / "jobs.db", isolation_level=None) as other:
        other.execute("BEGIN EXCLUSIVE")
        assert jobs.missing("7") == rule


@pytest.mark.usefixtures("studio")
def test_a_project_that_is_new_is_looked_at_at_once(by_itself: Jobs, ledger: Ledger) -> None:
    """It may have been labelled for long before it was connected; later /setups wake nobody."""
    by_itself.know("7")
    deadline = time.monotonic() + 30
    while not messages(by_itself):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    by_itself.huey.storage.flush_queue()
    by_itself._run_waiting()
    by_itself.look("7")
    assert states(ledger) == [WAITING]
    build(by_itself._settings).jobs.know("7")
    assert messages(by_itself) <= 1, "that of the training"


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
    job = ledger.request("7")
    ledger.start("7")
    ledger.read_until("7", "2026-11-23T01:02:03Z")
    ledger.end(job.id, state, "as it was")
    look()
    assert studio.asked == [("7", "2026-11-23T01:02:03Z")]
    assert states(ledger) == [state]
    studio.label(Mars=3)
    look()
    assert states(ledger) == [WAITING, state]


def test_the_later_moment_counts(studio: Any, look: Look, ledger: Ledger) -> None:
    """That of the begin of a training, or that of the newest label that one has read."""
    for read, begun in (("2026-11-23T01:02:03Z", "2026-11-23T01:02:03.5Z"), ("2026-11-23T03:02:03Z", "")):
        ledger.request("7")
        ledger.start("7")
        ledger.read_until("7", read)
        ledger.trained("7", 6, begun)
        ledger.end(ledger.jobs("7")[0].id, FAILED, "too few")
        look()
    assert [moment for _, moment in studio.asked] == ["2026-11-23T01:02:03.5Z", "2026-11-23T03:02:03Z"]


def test_a_training_that_failed_without_labels_is_not_asked_for_every_minute(
    studio: Any, look: Look, ledger: Ledger, settings: Settings
) -> None:
    """Label Studio was away when it began, so nobody knows what it saw; an hour later it is tried again."""
    studio.new = 9
    job = ledger.request("7")
    ledger.start("7")
    ledger.end(job.id, FAILED, "away")
    for _ in range(3):
        look()
    assert (states(ledger), studio.asked) == ([FAILED], [])
    with sqlite3.connect(settings.model_dir / "jobs.db") as db:
        db.execute("UPDATE jobs SET requested_at = requested_at - ?", (AGAIN_S,))
    look()
    assert states(ledger) == [WAITING, FAILED]


def test_a_training_that_failed_is_asked_for_again_though_the_clock_was_moved_back(
    studio: Any, look: Look, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure that seems to lie ahead holds up nothing; that of the next attempt counts its hour."""
    studio.new, real = 9, time.time
    job = ledger.request("7")
    ledger.start("7")
    ledger.end(job.id, FAILED, "away")
    monkeypatch.setattr(time, "time", lambda: real() - 30 * 86400)
    look()
    assert states(ledger) == [WAITING, FAILED]
    again = ledger.start("7")
    assert again is not None
    ledger.end(again.id, FAILED, "away")
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
    with sqlite3.connect(settings.model_dir / "jobs.db") as db:
        db.executemany("INSERT INTO projects (project) VALUES (?)", [(project,) for project in STRANGE])
        row = "INSERT INTO jobs VALUES (?, ?, ?, 1, 1, 1.0, NULL, NULL, '', '{}', '{}')"
        db.executemany(row, [("a", STRANGE[0], WAITING), ("b", STRANGE[0], RUNNING), ("c", "0007", RUNNING)])
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
    look_after(jobs)
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
    look_after(jobs)
    assert list(ledger.projects()) == ["6"]
    assert not [path.name for path in (settings.model_dir / "work").iterdir() if "7" in path.name]
    jobs.note_event("7", "PROJECT_UPDATED")
    assert last_event(settings.model_dir, 7) is None
    jobs.know("7")
    assert list(ledger.projects()) == ["6", "7"]


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


def test_a_project_that_is_gone_is_kept_while_its_training_runs(
    studio: Any, look: Look, settings: Settings, ledger: Ledger
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


def test_lost_events_are_not_looked_for_while_too_many_wait(studio: Any, look: Look, ledger: Ledger) -> None:
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
        job = ledger.start("7")
        assert job is not None
        ledger.end(job.id, KEPT, "as it was")
        jobs.request("7")
    assert messages(jobs) == MESSAGES


def test_messages_that_were_lost_are_made_up_for(settings: Settings, look: Look) -> None:
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
        run_next(jobs, message)
        jobs.request("5")
    run_next(jobs)
    run_next(jobs)
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
        run_next(jobs)
    assert trained == ["5"]
    assert "The training of project 4 cannot be run: The state folder cannot be written" in caplog.text
    run_next(jobs)
    assert trained == ["5", "3"]


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


def test_any_number_may_ask_at_once_whether_a_worker_lives(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who asks is no worker to those who ask meanwhile, and leaves all files as they are."""
    file = settings.state.worker_lock
    assert not worker_lives(settings.model_dir)
    assert not file.parent.exists()
    file.parent.mkdir()
    file.write_bytes(b"of a worker that has ended")
    flock, told = fcntl.flock, [True]

    def again(*arguments: Any) -> None:
        flock(*arguments)
        if told == [True]:
            told[:] = [False]
            told[:] = [worker_lives(settings.model_dir)]

    monkeypatch.setattr("celestial_backend.jobs.processes.fcntl.flock", again)
    assert (worker_lives(settings.model_dir), told) == (False, [False])
    assert file.read_bytes() == b"of a worker that has ended"


def test_a_locked_list_refuses_within_a_second(settings: Settings, ledger: Ledger) -> None:
    """503 with a sentence: nothing was accepted, and nobody believes that it was."""
    client = create_app(build(settings)).test_client()
    ledger.request("3")
    with sqlite3.connect(settings.model_dir / "jobs.db", isolation_level=None) as other:
        other.execute("BEGIN EXCLUSIVE")
        answer, seconds = press(client)
    assert answer.status_code == 503
    assert seconds < 4  # SQLite by itself waits five
    assert "The list of jobs in the state folder cannot be written (database is locked)." in answer.status
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
    assert (settings.model_dir / "jobs.db").is_file()
