"""The worker and its trainings as processes: what is killed, and when, and what becomes of the job."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from backend_server import REPOSITORY, plain_environ
from trainings import BIN, Place

from celestial_backend.ledger import PUBLISHED


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model store with the default model in it."""
    folder = tmp_path_factory.mktemp("store")
    environ = plain_environ(BIN) | {"MODEL_DIR": str(folder / "state"), "BENTOML_HOME": str(folder / "bentoml")}
    subprocess.run(
        [sys.executable, "-m", "celestial_backend", "models"], cwd=REPOSITORY, env=environ, check=True, timeout=60
    )
    return folder / "bentoml"


@pytest.fixture
def place(tmp_path: Path, store: Path) -> Iterator[Place]:
    """With the queue in a file of the state folder."""
    place = Place(tmp_path, store)
    yield place
    place.stop()


@pytest.fixture(params=["sqlite", "redis"])
def either(request: pytest.FixtureRequest, tmp_path: Path, store: Path) -> Iterator[Place]:
    """With the queue in a file, and with the queue in Redis."""
    settings = {"REDIS_URL": request.getfixturevalue("redis_server").url} if request.param == "redis" else {}
    place = Place(tmp_path, store, **settings)
    yield place
    place.stop()


MOMENTS = {
    "queued": ("celestial_backend.ledger:Ledger.start:before", "self", 1),
    "begun": ("celestial_backend.ledger:Ledger.start:after", "self", 2),
    "started": ("celestial_backend.learning:Learner.learn:before", "worker", 2),
    "reading-labels": ("celestial_backend.learning:Learner._report:before:reading labels", "worker", 2),
    "epoch-1": ("celestial_backend.learning:Learner._report:after:epoch 1", "worker", 2),
    "comparing": ("celestial_backend.learning:Learner._report:after:comparing", "worker", 2),
    "saving": ("celestial_backend.registry:Registry.add:before", "worker", 2),
    "half-saved": ("shutil:copyfile:after:bentoml/models", "worker", 2),
    "before-pointer": ("celestial_backend.pointers:Pointers.write:before", "worker", 2),
    "after-pointer": ("celestial_backend.pointers:Pointers.write:after", "worker", 1),
    "telling": ("celestial_backend.project:StudioProject.show_version:before", "worker", 1),
    "before-end": ("celestial_backend.ledger:Ledger.end:before", "worker", 1),
    "after-end": ("celestial_backend.ledger:Ledger.end:after", "worker", 1),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_worker_that_is_killed_costs_no_job(place: Place, moment: str) -> None:
    """Whenever the kill comes, the next worker brings the job to its end, and it is published exactly once."""
    at, what, attempts = MOMENTS[moment]
    worker = place.worker(FAULT_AT=at, FAULT_DO=what)
    job = place.request()
    worker.process.wait(20)
    assert worker.process.returncode == -signal.SIGKILL
    place.worker()
    ended = place.ended(job)
    assert (ended.state, ended.attempts) == (PUBLISHED, attempts)
    assert place.publications() == [job]
    pointer = place.services.store.pointers.read("3")
    assert pointer is not None
    assert (pointer.tag, pointer.job) == (ended.outcome["tag"], job)
    assert [model.tag for model in place.services.store.registry.models() if model.project] == [pointer.tag]
    place.wait_for(lambda: not place.trainers() and not place.left_over(), 5)
