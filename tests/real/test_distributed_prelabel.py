"""`prelabel --distribute` with real workers, on a real Label Studio: every task once, whoever is killed."""

from __future__ import annotations

import contextlib
import json
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from celestial_backend.jobs.ledger import PUBLISHED
from tests.support.label_studio import LabelStudioServer
from tests.support.prelabelling import Command, held, project_with, small_pictures
from tests.support.trainings import Place

pytestmark = pytest.mark.timeout(600)

TASKS, RATE = 200, "40"  # a page holds a second's tasks, so that there are enough pages to divide

# The command, killed right after its third import.
KILLED = """
import os, signal
from celestial_backend.commands.cli import main
from celestial_backend.studio import pending

send, sent = pending.PendingTasks.send, []

def sending(self, rows):
    sent.append(send(self, rows))
    if len(sent) == 3: os.kill(os.getpid(), signal.SIGKILL)
    return sent[-1]

pending.PendingTasks.send = sending
main()
"""


@pytest.fixture(scope="module")
def pictures(label_studio: LabelStudioServer) -> list[str]:
    return small_pictures(label_studio, "distribute")


@pytest.fixture(params=["postgresql"])
def place(
    request: pytest.FixtureRequest, label_studio: LabelStudioServer, tmp_path: Path, model_store: Path
) -> Iterator[Place]:
    """Where workers and the command meet: on PostgreSQL, or `sqlite`, a file in their state folder."""
    settings = Command(label_studio, tmp_path, model_store).settings
    for name in ("MODEL_DIR", "BENTOML_HOME"):
        del settings[name]
    if request.param == "postgresql":
        settings["CELESTIAL_DATABASE_URL"] = request.getfixturevalue("postgres_server").fresh()
    place = Place(tmp_path, model_store, **settings)
    yield place
    place.stop()


@pytest.fixture
def command(label_studio: LabelStudioServer, place: Place) -> Command:
    command = Command(label_studio, place.settings.model_dir, place.settings.bentoml_home)
    if place.settings.database_url is not None:
        command.settings["CELESTIAL_DATABASE_URL"] = place.settings.database_url
    return command


def wait_for_workers(place: Place) -> None:
    """Until each has shown that it lives."""
    place.wait_for(lambda: place.ledger.workers() == len(place.workers), 60)


def maps(process: int) -> str:
    """The files that a process has in memory."""
    return Path(f"/proc/{process}/maps").read_text()


def test_two_workers_share_the_tasks(
    label_studio: LabelStudioServer, pictures: list[str], place: Place, command: Command
) -> None:
    """
    All are predicted once, a broken picture costs its task alone, and no worker has TensorFlow in its process.

    The database is all that they share, so one of them may be on another machine.
    """
    (label_studio.local_files_root / "distribute" / "broken.png").write_bytes(b"no picture")
    project, tasks = project_with(label_studio, pictures, TASKS)
    (bad,) = label_studio.import_tasks(project, ["/data/local-files/?d=distribute/broken.png"])
    workers = [place.worker(), place.worker(MODEL_DIR=str(place.folder / "another"))]
    wait_for_workers(place)
    done = command(project, "--distribute", "--rate", RATE, code=1)
    assert (done["predicted"], done["failed"]) == (TASKS, 1)
    (failure,) = [json.loads(line) for line in Path(done["failures"]).read_text().splitlines()]
    assert failure["task"] == bad
    assert "picture" in failure["reason"]
    assert held(label_studio, project) == dict.fromkeys(tasks, 1)
    assert sorted(int(name.rpartition(":")[2]) for name in done["workers"]) == sorted(
        worker.process.pid for worker in workers
    )
    assert sum(done["workers"].values()) == TASKS + 1
    assert not any("tensorflow" in maps(worker.process.pid) for worker in workers)
    assert place.jobs.pages.look(str(project)) == {}


def test_a_worker_that_is_killed_costs_no_task(
    label_studio: LabelStudioServer, pictures: list[str], place: Place, command: Command
) -> None:
    """SIGKILL, while it has a page: another one predicts that."""
    project, tasks = project_with(label_studio, pictures, TASKS)
    fault = {"FAULT_AT": "celestial_backend.predictor:Predictor.predict:before", "FAULT_DO": "worker"}
    workers = [place.worker(**fault), place.worker(**fault)]  # the fault strikes once
    wait_for_workers(place)
    done = command(project, "--distribute", "--rate", RATE)
    assert sorted(worker.process.poll() or 0 for worker in workers) == [-signal.SIGKILL, 0]
    assert done["predicted"] == TASKS
    assert held(label_studio, project) == dict.fromkeys(tasks, 1)


def test_a_command_that_is_killed_is_completed(
    label_studio: LabelStudioServer, pictures: list[str], place: Place, command: Command
) -> None:
    """The next run does the rest, and the database holds no page of either."""
    project, tasks = project_with(label_studio, pictures, TASKS)
    place.worker()
    wait_for_workers(place)
    command(project, "--distribute", "--rate", RATE, code=-signal.SIGKILL, how=("-c", KILLED))
    assert 0 < len(held(label_studio, project)) < TASKS
    done = command(project, "--distribute", "--rate", RATE)
    assert done["predicted"] + done["already"] == TASKS
    assert held(label_studio, project) == dict.fromkeys(tasks, 1)
    assert place.jobs.pages.look(str(project)) == {}


def test_trainings_and_pages_wait_for_each_other_and_not_for_ever(
    label_studio: LabelStudioServer, pictures: list[str], place: Place, command: Command
) -> None:
    """
    What a training worker has no time for, the command predicts, and no more.

    The next training is asked for as soon as the worker has time for pages; it is run while some are left. Both are of
    projects other than the one that is predicted.
    """
    project, tasks = project_with(label_studio, pictures, TASKS)
    first, second = (str(project_with(label_studio, pictures, 1)[0]) for _ in range(2))
    worker = psutil.Process(place.worker(FAULT_LEARN="12").process.pid)  # longer than the command waits for a worker
    place.stage(place.request(first), "reading labels")
    later: list[str] = []

    def predicts() -> bool:
        with contextlib.suppress(psutil.Error):  # a training that has just ended
            return any("celestial_backend.worker.pages" in child.cmdline() for child in worker.children())
        return False

    def ask() -> None:
        place.wait_for(predicts)
        later.append(place.request(second))

    asking = threading.Thread(target=ask)
    asking.start()
    done = command(project, "--distribute", "--rate", "8")  # takes twice as long as the first training
    begun = [place.job(job).started_at for job in later]
    asking.join()
    assert any(begun), "the second training waited until all tasks were predicted"
    assert done["predicted"] == TASKS
    assert 0 < sum(done["workers"].values()) < TASKS
    assert held(label_studio, project) == dict.fromkeys(tasks, 1)
    assert place.ended(later[0], 60).state == PUBLISHED


def test_without_a_worker_it_says_how_to_start_one(
    label_studio: LabelStudioServer, pictures: list[str], command: Command
) -> None:
    """Exit code 6, and no task is predicted."""
    project, _ = project_with(label_studio, pictures, 4)
    said = command(project, "--distribute", code=6)["error"]
    assert "--distribute needs a worker" in said
    assert "huey_consumer celestial_backend.worker.huey" in said
    assert not held(label_studio, project)


@pytest.mark.parametrize("place", ["sqlite"], indirect=True)
def test_without_postgresql_the_workers_of_this_machine_predict(
    label_studio: LabelStudioServer, pictures: list[str], place: Place, command: Command
) -> None:
    """Through the database in the state folder."""
    project, tasks = project_with(label_studio, pictures, 100)
    place.worker()
    wait_for_workers(place)
    done = command(project, "--distribute")
    assert sum(done["workers"].values()) == done["predicted"] == 100
    assert held(label_studio, project) == dict.fromkeys(tasks, 1)
