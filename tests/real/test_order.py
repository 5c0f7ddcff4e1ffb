"""The label stream of a real Label Studio follows the order: before there is a model, and with one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from celestial_backend.commands.prelabel import Prelabelling
from celestial_backend.jobs import ahead as module
from celestial_backend.jobs.ahead import Ahead
from celestial_backend.services import Services, build
from celestial_backend.settings import CONFIDENCE, MARGIN, NEEDS_LABELS, TYPICAL, Settings
from celestial_backend.studio.project import StudioProject
from celestial_backend.studio.setup import create_project
from tests.support.backend_server import label_config
from tests.support.label_studio import LabelStudioServer
from tests.support.shapes import KINDS, data_uri, drawn
from tests.support.stand_in import stand_in

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def services(label_studio: LabelStudioServer, tmp_path: Path, model_store: Path) -> Services:
    return build(replace(
        Settings.from_environ(), bentoml_home=model_store, model_dir=tmp_path, label_studio_url=label_studio.url,
        label_studio_api_key=label_studio.legacy_token, score=TYPICAL,
    ))  # fmt: skip


def made(studio: LabelStudioServer, services: Services, choices: tuple[str, ...]) -> int:
    """A project as `connect` makes it, with eight pictures, the last of which cannot be read."""
    project = create_project(services.studio, f"Order {choices[0]}", label_config(choices), by_score=True)
    studio.import_tasks(project, [*(data_uri(drawn(KINDS[number % 4], number)) for number in range(8)), "data:x,"])
    return project


def by_score(studio: LabelStudioServer, project: int) -> list[int]:
    return [each["task"] for each in sorted(studio.predictions(project), key=lambda each: float(each["score"]))]


def labelled(studio: LabelStudioServer, project: int, count: int, choice: str) -> list[int]:
    """The tasks that the label stream gives somebody who labels each."""
    given = []
    for _ in range(count):
        given.append(int(studio.api("GET", f"/api/projects/{project}/next")["id"]))
        studio.annotate(given[-1], choice)
    return given


def test_before_there_is_a_model(
    label_studio: LabelStudioServer, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Predictions are empty and only say when a task's turn comes; what is labelled meanwhile is not asked again.

    Workers are not asked to predict with a model that there is not.
    """
    project = made(label_studio, services, KINDS)
    monkeypatch.setattr(services.jobs.ledger, "workers", lambda: 1)
    monkeypatch.setattr("celestial_backend.commands.prelabel.Distribution", None)
    run = Prelabelling(services, str(project), distribute=True)
    done = run.run()
    run.select_version()
    assert (done.predicted, done.failed) == (8, 1)
    shown = label_studio.predictions(project)
    assert {(each["model_version"], str(each["result"])) for each in shown} == {(NEEDS_LABELS, "[]")}
    assert {each["task"]: each["score"] for each in shown} == pytest.approx(
        services.order.places(str(project), [each["task"] for each in shown])
    )
    wanted = by_score(label_studio, project)
    assert labelled(label_studio, project, 4, KINDS[0]) == wanted[:4]
    assert Prelabelling(services, str(project), only_unlabelled=True).run().predicted == 0
    assert labelled(label_studio, project, 2, KINDS[1]) == wanted[4:6]


def test_with_a_model(label_studio: LabelStudioServer, services: Services) -> None:
    """The score of a prediction is its task's place, and that of its region stays the probability."""
    project = made(label_studio, services, ("Mars", "Venus"))
    run = Prelabelling(services, str(project))
    run.run()
    run.select_version()
    placed = services.order.places(str(project), list(range(1, 10**6)))
    shown = {each["task"]: each for each in label_studio.predictions(project)}
    assert {each["model_version"] for each in shown.values()} == {services.store.live_tag()}
    regions = [each["result"][0]["score"] for each in shown.values() if each["result"]]
    assert not set(regions) & {each["score"] for each in shown.values() if each["result"]}
    assert {task: shown[task]["score"] for task in shown if shown[task]["result"]} == pytest.approx(
        {task: placed[task] for task in shown if shown[task]["result"]}
    )
    assert labelled(label_studio, project, 3, "Mars") == by_score(label_studio, project)[:3]


def test_a_worker_predicts_ahead_what_the_model_has_not(
    label_studio: LabelStudioServer, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once for the same tasks, as some may never be predicted; never where tasks are not sorted by our scores."""
    asked: list[str] = []
    monkeypatch.setattr(Ahead, "predict", lambda _, project: asked.append(project))
    number = made(label_studio, services, KINDS)
    project = StudioProject(services.studio, str(number))
    with stand_in(NEEDS_LABELS) as model:
        ahead = Ahead(services.settings)
        ahead.look(project)
        assert asked == [], "no model is connected"
        label_studio.connect_backend(number, model.url, NEEDS_LABELS)
        ahead.look(project)
        ahead.look(project)
        assert asked == [str(number)]
        label_studio.import_tasks(number, [data_uri(drawn(KINDS[0], 20))])
        ahead.look(project)
        for score in (CONFIDENCE, MARGIN):  # by which nothing can be said yet
            Ahead(replace(services.settings, score=score)).look(project)
        assert asked == [str(number)] * 2


def test_what_is_asked_for_again_and_again_is_predicted_once_it_is_quiet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One project at a time, each with what came meanwhile; when a worker stops, nothing more is begun."""
    program, done = tmp_path / "program", tmp_path / "done"
    program.write_text(f'#!/bin/sh\necho "$@" >> {done}\n')
    program.chmod(0o755)
    monkeypatch.setattr(module.sys, "executable", str(program))
    monkeypatch.setattr(module, "QUIET_S", 0.3)
    ahead = Ahead(replace(Settings.from_environ(), score=TYPICAL))
    for project in ("7", "8", "7"):
        ahead.predict(project)
    wait(lambda: done.exists() and done.read_text().count("\n") == 2)
    assert [line.split()[2:5] for line in done.read_text().splitlines()] == [
        ["prelabel", "--project", "8"], ["prelabel", "--project", "7"],
    ]  # fmt: skip
    ahead.predict("9")
    ahead.stop()
    wait(lambda: not any(thread.name == "ahead" for thread in threading.enumerate()))
    assert "9" not in done.read_text().split()


def wait(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)
