"""A Label Studio project that is made up, and a backend's jobs beside it: what trainings are asked for with."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from flask.testing import FlaskClient

from celestial_backend.database import Database
from celestial_backend.jobs import looker, trainings
from celestial_backend.jobs.ledger import KEPT, Ending, Job, Ledger
from celestial_backend.jobs.trainings import Jobs
from celestial_backend.labels import Vocabulary
from celestial_backend.models.store import ModelStore
from celestial_backend.services import build
from celestial_backend.settings import MODEL_NAME, Settings
from celestial_backend.studio.project import Labels
from tests.support.backend_server import BODIES, label_config

DEFAULT = f"{MODEL_NAME}:default-0"


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> Settings:
    """
    With a Label Studio that could be asked, and is given up at once: nobody is there, however long one waits.

    What a worker does beside its work, as long as it lives, is left to the tests.
    """
    monkeypatch.setattr(Jobs, "_live", lambda _: None)
    for module in (trainings, looker):
        monkeypatch.setattr(module, "STUDIO_S", 0.0)
    return replace(Settings.from_environ(), label_studio_url="http://127.0.0.1:9", label_studio_api_key="0" * 40)


@pytest.fixture
def ledger(settings: Settings) -> Ledger:
    return Ledger(Database(settings))


def annotation(number: int = 1, **more: Any) -> dict[str, Any]:
    """As Label Studio sends it, as far as it matters."""
    region = {"from_name": "choice", "to_name": "image", "type": "choices", "value": {"choices": ["Mars"]}}
    return {"id": number, "task": number, "result": [region], "was_cancelled": False, "ground_truth": False} | more


class FakeProject:
    """The edge to Label Studio: a config, labels, and of those the new ones; or an error."""

    config = label_config()
    tasks: list[list[dict[str, Any]]]  # the annotations of each
    new: int | Exception = 0
    moment = "2026-11-23T01:02:03Z"
    born = ""
    troubles: dict[str, Exception]  # of single projects
    asked: list[tuple[str, str | None]]  # for new labels: the project, and since when
    read: int
    connected = True

    def __init__(self, _studio: object, project: str, patience_s: float = 0) -> None:
        assert patience_s == 0, "nobody waits"
        self.project = self.project_id = project

    def sibling(self, project: str) -> FakeProject:
        return type(self)(None, project)

    @classmethod
    def label(cls, **choices: int) -> None:
        """Let people make so many labels of each choice."""
        for choice, count in choices.items():
            region = annotation()["result"][0] | {"value": {"choices": [choice]}}
            cls.tasks += [[annotation(len(cls.tasks)) | {"result": [region]}]] * count
            cls.new, cls.moment = cls.new + count if isinstance(cls.new, int) else count, f"{cls.moment}+"

    def made(self) -> str:
        return self.born

    def label_config(self) -> str:
        if self.project in self.troubles:
            raise self.troubles[self.project]
        return self.config

    def has_our_model(self) -> bool:
        return self.connected

    def ask_for_new_tasks(self) -> None: ...

    def labels_now(self) -> Labels:
        if isinstance(self.new, Exception):
            raise self.new
        return Labels(len(self.tasks), self.moment)

    def annotations(self) -> Iterator[list[dict[str, Any]]]:
        type(self).read += 1
        yield from self.tasks

    def labels_since(self, moment: str | None) -> int:
        self.asked.append((self.project, moment))
        if isinstance(self.new, Exception):
            raise self.new
        return self.new


@pytest.fixture
def studio(monkeypatch: pytest.MonkeyPatch) -> type[FakeProject]:
    """A project with enough labels to learn from, none of them new."""
    for module in (trainings, looker):
        monkeypatch.setattr(module, "StudioProject", FakeProject)
    FakeProject.asked, FakeProject.troubles, FakeProject.read, FakeProject.tasks = [], {}, 0, []
    FakeProject.config, FakeProject.born = label_config(), ""
    FakeProject.label(Mars=3, Venus=3)
    FakeProject.new, FakeProject.connected = 0, True
    return FakeProject


@pytest.fixture(autouse=True)
def live(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The live tags of projects, the embedded default for all others, which know the ten bodies; nothing is loaded."""
    tags: dict[str, str] = {}
    monkeypatch.setattr(ModelStore, "live_tag", lambda _, project="": tags.get(project, DEFAULT))
    monkeypatch.setattr(ModelStore, "known", lambda *_: Vocabulary(BODIES))
    return tags


@pytest.fixture
def by_itself(settings: Settings) -> Jobs:
    """Of a worker as he is by default."""
    return build(settings).jobs


def looked() -> None:
    """Return when the labels have been looked at that a worker looks at beside its work."""
    for thread in threading.enumerate():
        if thread.name == "look":
            thread.join(30)


def run_next(jobs: Jobs, *message: str) -> None:
    jobs.run_next(*message)
    looked()


def look_after(jobs: Jobs) -> None:
    """What a worker does every minute, a minute later."""
    jobs._looked = -math.inf
    jobs.look_after()
    looked()


def states(ledger: Ledger, project: str = "7") -> list[str]:
    return [job.state for job in ledger.jobs(project)]


def press(client: FlaskClient) -> tuple[Any, float]:
    """What START_TRAINING is answered, and after how many seconds."""
    started = time.monotonic()
    body = {"action": "START_TRAINING", "project": {"id": 7, "label_config": label_config()}}
    return client.post("/webhook", json=body), time.monotonic() - started


def event_at(ledger: Ledger, project: str) -> float | None:
    known = ledger.known(project)
    assert known is not None
    return known.event_at


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


def begun(ledger: Ledger, project: str = "7") -> Job:
    """The training of a project that waits, which a worker runs from now on."""
    job = ledger.start("somebody", project)
    assert job is not None
    return job


def end(ledger: Ledger, state: str = KEPT, labels: int | None = None, moment: str = "", project: str = "7") -> None:
    """Bring the waiting training of a project to its end; at its begin there were so many labels."""
    job = begun(ledger, project)
    if labels is not None:
        ledger.trained(project, labels, moment)
    ledger.end(job, Ending(state, "as it was"))


def change(settings: Settings, statement: str, **values: Any) -> None:
    """Change the database as only time or an older release does."""
    with Database(settings).writing("7") as work:
        work.run(statement, **values)


def die(settings: Settings) -> None:
    """Let the workers of all that runs have shown no life for long."""
    change(settings, "UPDATE work SET lease = 0 WHERE state = 'running'")


def missing(ledger: Ledger, project: str = "7") -> str | None:
    known = ledger.known(project)
    assert known is not None
    return known.missing


def messages(jobs: Jobs) -> int:
    return int(jobs.huey.storage.queue_size())


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The projects that were trained, by trainings that end at once."""
    projects: list[str] = []

    def train(self: Jobs, job: Job) -> None:
        projects.append(job.project)
        self.ledger.end(job, Ending(KEPT, "as it was"))

    monkeypatch.setattr(Jobs, "_train", train)
    return projects
