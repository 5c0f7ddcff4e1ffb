"""
Trainings that begin by themselves: a real Label Studio whose labels come by webhook, or are found without one.

The backend and its worker run in this process, so that each label can be waited for; trainings end at once.
"""

from __future__ import annotations

import math
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from werkzeug.serving import make_server

from celestial_backend.jobs.ledger import KEPT, PUBLISHED, Ending, Job
from celestial_backend.jobs.looker import NOT_CONNECTED
from celestial_backend.jobs.trainings import Jobs
from celestial_backend.services import build
from celestial_backend.settings import MODEL_NAME, NEVER, Settings, project_tag
from celestial_backend.web.app import create_app
from tests.support.backend_server import label_config
from tests.support.label_studio import LabelStudioServer

CLOTHES, PLANETS = ("dress", "hat", "shoe"), ("Mars", "Venus")
OF_SOMEBODY = f"{MODEL_NAME}:of-somebody"


class Backend:
    """A backend and its worker as threads, and a project that is connected to it."""

    def __init__(self, studio: LabelStudioServer, settings: Settings, choices: tuple[str, ...]) -> None:
        self.studio = studio
        self.services = build(settings)
        self.jobs, self.ledger = self.services.jobs, self.services.jobs.ledger
        self._server = make_server("127.0.0.1", 0, create_app(self.services), threaded=True)
        self._stopped, self._busy = threading.Event(), threading.Lock()
        self._threads = [threading.Thread(target=run) for run in (self._server.serve_forever, self._work)]
        for thread in self._threads:
            thread.start()
        self.number = studio.create_project("By itself", label_config(choices))
        self.tasks = iter(studio.import_tasks(self.number, ["http://127.0.0.1/a.png"] * 40))
        self.url = f"http://127.0.0.1:{self._server.port}"
        studio.connect_backend(self.number, self.url, "celestial")
        self.settle()

    def _work(self) -> None:
        while not self._stopped.wait(0.02):
            with self._busy:
                task = self.jobs.huey.dequeue()
                if task is not None:
                    self.jobs.huey.execute(task)

    def stop(self) -> None:
        self._stopped.set()
        self._server.shutdown()
        for thread in self._threads:
            thread.join(30)
        self._server.server_close()

    def settle(self) -> None:
        """Return when the worker has done all that it was woken for."""
        deadline, project = time.monotonic() + 60, str(self.number)
        while True:
            with self._busy:
                unlooked = project in self.ledger.looks(wanted=True) or any(
                    thread.name == "look" for thread in threading.enumerate()
                )
                if not unlooked and all(job.ended for job in self.ledger.jobs(project)):
                    return
            assert time.monotonic() < deadline, self.ledger.jobs(project)
            time.sleep(0.02)

    def label(self, *choices: str) -> list[str]:
        """Let a person label one picture after the other; the states of the trainings after each, as a sum."""
        seen = []
        for choice in choices:
            self.studio.annotate(next(self.tasks), choice)
            self.settle()
            seen.append(len(self.states()))
        return [str(count) for count in seen]

    def look_after(self) -> None:
        """What a worker does every minute, a minute later."""
        self.jobs._looked = -math.inf
        self.jobs.look_after()

    def states(self) -> list[str]:
        return [job.state for job in self.ledger.jobs(str(self.number))]

    @property
    def missing(self) -> str:
        return self.jobs.missing(str(self.number))


Start = Callable[..., Backend]


@pytest.fixture
def start(
    label_studio: LabelStudioServer, model_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Start]:
    """Start a backend with settings of its own; its trainings publish at once."""
    monkeypatch.setattr(Jobs, "_train", publish)
    started: list[Backend] = []

    def begin(choices: tuple[str, ...] = CLOTHES, *, brought: bool = False, **settings: Any) -> Backend:
        shutil.copytree(model_store, tmp_path / "bentoml", dirs_exist_ok=True)
        given = {"label_studio_url": label_studio.url, "label_studio_api_key": label_studio.legacy_token} | settings
        chosen = replace(Settings.from_environ(), **given)
        if brought:
            copy_model(build(chosen).jobs, OF_SOMEBODY)
            (tmp_path / "bentoml" / "models" / MODEL_NAME / "latest").write_text("of-somebody")
        started.append(Backend(label_studio, chosen, choices))
        return started[-1]

    yield begin
    for backend in started:
        backend.stop()


def copy_model(jobs: Jobs, tag: str, **about: Any) -> None:
    """Put the default model into the store a second time, under another tag, and say something else of it."""
    registry, live = jobs._store.registry, jobs._store.live_tag()
    shutil.copytree(registry.path(live), registry.path(tag))
    file = registry.path(tag) / "model.yaml"
    described = yaml.safe_load(file.read_text()) | {"version": tag.split(":")[1]}
    described["metadata"] |= about
    file.write_text(yaml.safe_dump(described))


def publish(self: Jobs, job: Job) -> None:
    """In place of a training: a model of the project's own that knows its choices, live and shown."""
    self._mark(job.project)
    tag = project_tag(job.project, job.id)
    copy_model(self, tag, classes=[*CLOTHES])
    self._store.publish(job.project, tag, job=job.id)
    self.ledger.end(job, Ending(PUBLISHED, "It is better."))
    self.tell(job, tag)


def keep(self: Jobs, job: Job) -> None:
    """In place of a training: one whose model is not better."""
    self._mark(job.project)
    self.ledger.end(job, Ending(KEPT, "The new model is worse."))


def test_it_begins_when_it_can_and_again_when_the_labels_have_grown(start: Start) -> None:
    """
    With labels that come one by one: at two choices with three labels each, and not before; then at five more.

    Until then it is told how many of which choices are missing.
    """
    backend = start()
    assert backend.missing == (
        "choice: no labels yet; at least 2 choices need 3 labels each, so label 3 pictures each of 2 choices."
    )
    assert backend.label("dress", "dress", "dress", "dress", "hat", "shoe", "hat") == ["0"] * 7
    assert backend.missing == (
        "choice: 4 labels of 'dress', 2 of 'hat' and 1 of 'shoe'; at least 2 choices need 3 labels each, so label 1"
        " more picture of 'hat'."
    )
    assert backend.label("hat") == ["1"]
    assert (backend.states(), backend.missing) == ([PUBLISHED], "")
    assert f"Label Studio shows model version {MODEL_NAME}:project-{backend.number}-" in backend.ledger.jobs()[0].reason
    assert backend.label("hat", "dress", "shoe", "shoe", "dress") == ["1"] * 4 + ["2"]
    known = backend.ledger.known(str(backend.number))
    assert known is not None
    assert (known.labels, known.trained_labels) == (0, 13)


def test_one_that_was_kept_out_waits_for_more_labels(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same labels would end the same way."""
    monkeypatch.setattr(Jobs, "_train", keep)
    backend = start()
    backend.label("dress", "dress", "dress", "hat", "hat", "hat")
    assert backend.states() == [KEPT]
    backend.look_after()
    assert backend.label("dress", "hat", "dress", "hat", "dress") == ["1"] * 4 + ["2"]


def test_a_label_studio_without_a_webhook_is_looked_at(start: Start) -> None:
    """What a worker does every minute finds the labels, also those that were there before the project was connected."""
    backend = start()
    for hook in backend.studio.webhooks(backend.number):
        backend.studio.api("DELETE", f"/api/webhooks/{hook['id']}/")
    assert backend.label("dress", "dress", "dress", "hat", "hat", "hat") == ["0"] * 6
    backend.look_after()
    backend.settle()
    assert backend.states() == [PUBLISHED]


def test_a_number_of_labels_is_waited_for(start: Start) -> None:
    """Also where there is enough to learn from before."""
    backend = start(train_every=8)
    assert backend.label("dress", "dress", "dress", "hat", "hat", "hat", "hat", "hat") == ["0"] * 7 + ["1"]
    assert backend.label(*["shoe"] * 8) == ["1"] * 7 + ["2"]


def test_switched_off_the_button_alone_trains(start: Start) -> None:
    """What is missing is told, and then nothing happens."""
    backend = start(train_every=NEVER)
    backend.label("dress", "dress", "dress", "hat")
    assert "so label 2 more pictures of 'hat'" in backend.missing
    assert backend.label("hat", "hat", *["shoe"] * 6) == ["0"] * 8
    backend.look_after()
    backend.settle()
    assert (backend.missing, backend.states()) == ("", [])
    backend.studio.start_training(backend.number)
    backend.settle()
    assert backend.states() == [PUBLISHED]


def test_a_model_that_the_operator_brought_waits_for_the_button(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """It knows the choices, and is asked about; after Start Training was pressed once, trainings begin as ever."""
    monkeypatch.setattr(Jobs, "_train", keep)
    backend = start(PLANETS, brought=True)
    assert backend.label(*["Mars", "Venus"] * 4) == ["0"] * 8
    known = backend.ledger.known(str(backend.number))
    assert known is not None
    assert known.hindrance.startswith(f"{OF_SOMEBODY} was not trained here")
    backend.studio.start_training(backend.number)
    backend.settle()
    assert backend.states() == [KEPT]
    assert backend.label(*["Mars"] * 5) == ["1"] * 4 + ["2"]


def test_a_model_that_the_operator_brought_for_something_else_is_replaced(start: Start) -> None:
    """It knows no choice of the project, so there is nothing to lose."""
    backend = start(brought=True)
    assert backend.label("dress", "dress", "dress", "hat", "hat", "hat") == ["0"] * 5 + ["1"]


def test_a_project_that_was_disconnected_trains_no_more(start: Start) -> None:
    """Settings > Model > Delete leaves the webhook; its events train nothing until the model is connected again."""
    backend = start()
    backend.studio.api("DELETE", f"/api/ml/{backend.studio.model(backend.number)['id']}")
    assert len(backend.studio.webhooks(backend.number)) == 1
    assert backend.label("dress", "dress", "dress", "hat", "hat", "hat") == ["0"] * 6
    backend.look_after()
    backend.settle()
    known = backend.ledger.known(str(backend.number))
    assert known is not None
    assert (backend.states(), known.hindrance) == ([], NOT_CONNECTED)
    backend.studio.connect_backend(backend.number, backend.url, "again")
    backend.look_after()
    backend.settle()
    assert backend.states() == [PUBLISHED]
