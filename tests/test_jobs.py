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

from celestial_backend.app import create_app
from celestial_backend.errors import StudioError
from celestial_backend.jobs import AGAIN_S, WORKER_LOCK, Jobs
from celestial_backend.ledger import FAILED, KEPT, PUBLISHED, RUNNING, WAITING, Ledger
from celestial_backend.processes import lock
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
    asked: list[tuple[str, str | None]]

    def __init__(self, _studio: object, project: str, _patience_s: float = 0) -> None:
        self.project = project

    def labels_since(self, moment: str | None) -> int:
        self.asked.append((self.project, moment))
        if isinstance(self.new, Exception):
            raise self.new
        return self.new


@pytest.fixture
def studio(monkeypatch: pytest.MonkeyPatch) -> type[FakeProject]:
    monkeypatch.setattr("celestial_backend.jobs.StudioProject", FakeProject)
    FakeProject.new, FakeProject.asked = 0, []
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
