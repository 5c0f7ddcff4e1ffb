"""Trainings as the command line shows them, beside real processes and on a full disk."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from celestial_backend.database import Database
from celestial_backend.jobs.ledger import FAILED, KEPT, PUBLISHED, WAITING, Ending, Job, Ledger
from celestial_backend.jobs.processes import this_process
from celestial_backend.jobs.trainings import Jobs
from celestial_backend.models.manifest import Manifest
from celestial_backend.services import build
from celestial_backend.settings import Settings, project_tag
from celestial_backend.studio.project import Removed
from celestial_backend.web.app import create_app
from tests.support import fake_project
from tests.support.backend_server import REPOSITORY
from tests.support.disks import fill
from tests.support.fake_project import FakeProject, look_after, press, run_next, states
from tests.support.stores import store_of

by_itself, ledger, live = fake_project.by_itself, fake_project.ledger, fake_project.live
settings, studio = fake_project.settings, fake_project.studio


# After a training


class Tidied(FakeProject):
    """A Label Studio with predictions of old models, of which each removal leaves fewer."""

    left = 0
    tidied: list[tuple[str, str]]
    shown: list[tuple[str, bool]]

    def remove_replaced(self, tag: str, _seconds: float) -> Removed:
        type(self).left -= 1
        self.tidied.append((self.project, tag))
        return Removed(1, some_left=self.left > 0)

    def in_step(self, tag: str, *, keep_predictions: bool) -> list[str]:
        self.shown.append((tag, keep_predictions))
        return []


@pytest.fixture
def tidied(studio: type[FakeProject], monkeypatch: pytest.MonkeyPatch) -> type[Tidied]:
    studio.new = 0
    monkeypatch.setattr("celestial_backend.jobs.trainings.StudioProject", Tidied)
    monkeypatch.setattr("celestial_backend.jobs.trainings.TIDY_S", 0.01)
    Tidied.left, Tidied.tidied, Tidied.shown = 3, [], []
    return Tidied


def finish(monkeypatch: pytest.MonkeyPatch, state: str) -> None:
    monkeypatch.setattr(Jobs, "_train", lambda self, job: self.ledger.end(job, Ending(state, "as it was")))


def test_old_predictions_go_while_the_worker_goes_on(
    settings: Settings, live: dict[str, str], tidied: type[Tidied], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a training that was published, until none is left; not where they are kept."""
    live["7"] = project_tag("7", "ab12")
    for keeps, state in ((False, KEPT), (True, PUBLISHED), (False, PUBLISHED)):
        jobs = build(replace(settings, keep_predictions=keeps)).jobs
        finish(monkeypatch, state)
        jobs.request("7")
        run_next(jobs)
    for thread in threading.enumerate():
        if thread.name == "tidy":
            thread.join(30)
    assert tidied.tidied == [("7", live["7"])] * 3


def test_a_worker_that_stops_leaves_the_rest_to_the_next_training(
    by_itself: Jobs, tidied: type[Tidied], monkeypatch: pytest.MonkeyPatch
) -> None:
    finish(monkeypatch, PUBLISHED)
    by_itself.stop()
    by_itself._tidy("7")
    assert len(tidied.tidied) == 1


@pytest.mark.parametrize("keeps", [False, True])
def test_a_training_whose_worker_died_is_shown_like_any_other(
    settings: Settings, ledger: Ledger, live: dict[str, str], tidied: type[Tidied], monkeypatch: pytest.MonkeyPatch,
    *, keeps: bool,
) -> None:
    """It had published before: Label Studio is told when nobody else can be about to."""
    services = build(replace(settings, keep_predictions=keeps))
    tag = live["7"] = project_tag("7", "ab12")
    ended(ledger, PUBLISHED, manifest=Manifest(tag=tag), project="7")
    look_after(services.jobs)
    assert tidied.shown == []
    monkeypatch.setattr(Database, "now", lambda self: self.rows("SELECT lease FROM work")[0]["lease"] + 1)
    look_after(services.jobs)
    look_after(services.jobs)
    assert (states(ledger), tidied.shown) == ([PUBLISHED], [(tag, keeps)])


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


def ended(ledger: Ledger, state: str, reason: str = "as it was", project: str = "3", **more: Any) -> Job:
    """A job that has been run, and has ended."""
    ledger.request(project)
    job = ledger.start("here", project)
    assert job is not None
    ledger.end(job, Ending(state, reason, **more))
    return job


def test_jobs_lists_what_waits_runs_and_has_ended(ledger: Ledger) -> None:
    """With where it is or why it ended so; as lines in a pipe, as JSON for a script."""
    done = ended(ledger, KEPT, "The new model is worse.", manifest=Manifest(tag="celestial_bodies_classifier_model:x"))
    ledger.request("4")
    running = ledger.start("here", "4")
    assert running is not None
    ledger.progress(running, stage="reading pictures", seconds=5, pictures=3, of=40)
    waiting = ledger.request("3")
    listed = cli("jobs")
    assert listed.returncode == 0
    rows = {line.split()[0]: re.split(r"  +", line.strip()) for line in listed.stdout.splitlines() if "─" not in line}
    assert list(rows) == ["job", waiting.id, running.id, done.id]
    assert rows[done.id][1:3] == ["3", KEPT]
    assert rows[done.id][-1] == "The new model is worse."
    assert rows[running.id][-1] == "reading pictures 3 of 40"
    told = json.loads(cli("jobs", "--project", "3", "--limit", "5", "--json").stdout)
    assert [(job["id"], job["state"]) for job in told] == [(waiting.id, WAITING), (done.id, KEPT)]
    assert told[1]["tag"] == "celestial_bodies_classifier_model:x"
    assert told[1]["reason"] == "The new model is worse."


def test_jobs_lists_projects_where_none_begins(ledger: Ledger) -> None:
    """Below the trainings, with the reason; in JSON in the place of a job, with all that a job has."""
    ended(ledger, FAILED, "too few")
    for project in ("12", "3", "4"):
        ledger.know(project)
        ledger.looked(project, labels=0, missing="Two more.", brought="")
    ledger.request("4")
    lines = [re.split(r"  +", line.strip()) for line in cli("jobs").stdout.splitlines()]
    assert [line[1:3] for line in lines[2:4]] == [["4", WAITING], ["3", FAILED]]
    assert lines[4:] == [[project, "not begun", "Two more."] for project in ("3", "12")]
    told = json.loads(cli("jobs", "--json", "--project", "3").stdout)
    assert [(each["state"], each["reason"]) for each in told] == [(FAILED, "too few"), ("not begun", "Two more.")]
    assert told[0].keys() == told[1].keys()
    assert (told[1]["id"], told[1]["requested_at"], told[1]["stalled"]) == ("", None, False)
    assert len(json.loads(cli("jobs", "--json", "--limit", "1").stdout)) == 2


def test_jobs_says_when_what_waits_has_no_worker(ledger: Ledger) -> None:
    """On stderr, with what fixes it; in JSON each job tells. With a worker, or where nothing waits, it is silent."""
    done = ended(ledger, KEPT)
    assert cli("jobs").stderr == ""
    waiting = ledger.request("3")
    ask = ("jobs", "--json")
    for listed in (cli("jobs"), cli(*ask)):
        assert listed.returncode == 0
        assert listed.stderr.startswith("No worker runs on this database")
        assert "huey_consumer celestial_backend.worker.huey" in listed.stderr
    stalled = {job["id"]: job["stalled"] for job in json.loads(cli(*ask).stdout)}
    assert stalled == {waiting.id: True, done.id: False}
    ledger.show_life(this_process())
    listed = cli(*ask)
    assert listed.stderr == ""
    assert not any(job["stalled"] for job in json.loads(listed.stdout))


def test_a_list_that_cannot_be_read_is_a_sentence(settings: Settings) -> None:
    """Exit code 6, the sentence on stderr, nothing on stdout."""
    settings.state.database.write_text("no list of jobs at all, and longer than the head of one" * 9)
    failed = cli("jobs")
    assert failed.returncode == 6
    start = "Error: The database in the state folder cannot be read (its file is no database)"
    assert failed.stderr.startswith(start)
    assert "accepted" not in failed.stderr
    assert "Traceback" not in failed.stderr
    assert failed.stdout == ""


def test_models_use_goes_back_in_a_moment(settings: Settings) -> None:
    """The tag is live at once; an unknown one changes nothing and names those there are."""
    listed = json.loads(cli("models", "--json").stdout)
    assert [model["live"] for model in listed] == [["all others"]]
    tag = listed[0]["tag"]
    store = store_of(settings)
    unknown = cli("models", "use", "nowhere", "--project", "3")
    assert unknown.returncode == 3
    assert f"The model celestial_bodies_classifier_model:nowhere is not in the BentoML store, which holds {tag}" in (
        unknown.stderr
    )
    assert store.pointers.read("3") is None
    used = cli("models", "use", tag.partition(":")[2], "--project", "3")
    assert used.returncode == 0, used.stderr
    assert used.stdout == f"Project 3 is served {tag} from now on.\n"
    assert "Label Studio was not told" in used.stderr
    assert store.pointers.projects() == {"3": tag}
    assert json.loads(cli("models", "--json").stdout)[0]["live"] == ["all others", "3"]
    assert re.search(rf"^{tag.partition(':')[2]}  +all others, project 3 ", cli("models").stdout, re.MULTILINE)
