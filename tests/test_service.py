"""What one machine runs, `label-studio-ml start .`: its worker, its ends, and its manners while it trains."""

from __future__ import annotations

import contextlib
import os
import signal
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
from backend_server import BackendServer, label_config
from trainings import FAULTS, Place

from celestial_backend.ledger import PUBLISHED, RUNNING, WAITING

WEBHOOK_S, SETUP_S = 1, 3  # what Label Studio gives


class Service(Place):
    """A place with the server in front of it; started and ended as a test likes."""

    server: BackendServer

    def start(self, **more: str) -> BackendServer:
        given = {name: self.environ[name] for name in self.environ if name in ("MODEL_DIR", "BENTOML_HOME")}
        self.server = BackendServer(self.folder, **given | self.faults | {"PYTHONPATH": str(FAULTS)} | more)
        return self.server

    def processes(self, module: str) -> list[psutil.Process]:
        """The processes of the server that run something."""
        found = []
        for process in psutil.Process(self.server.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):  # it has just ended
                if module in process.cmdline():
                    found.append(process)
        return found

    def training_worker(self) -> psutil.Process:
        found: list[psutil.Process] = self.wait_for(lambda: self.processes("celestial_backend.worker"))
        return found[0]

    def press(self, project: int = 3) -> str:
        """Press *Start training*; gives the job."""
        body = {"action": "START_TRAINING", "project": {"id": project, "label_config": label_config()}}
        answer = self.server.post("/webhook", body, timeout=WEBHOOK_S)
        assert answer.status_code == 201, answer.text
        return str(answer.json()["result"]["job"])

    def stop(self) -> None:
        super().stop()
        self.server.stop()


@pytest.fixture
def service(tmp_path: Path, model_store: Path) -> Iterator[Service]:
    service = Service(tmp_path, model_store)
    yield service
    service.stop()


def gone(*processes: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes)
    return False  # one has just ended; the next look finds it so


def test_a_worker_that_is_killed_is_started_anew(service: Service) -> None:
    """Within ten seconds, and it finishes the job."""
    service.start(FAULT_LEARN="2")
    job = service.press()
    service.stage(job, "epoch 1")
    before = service.training_worker()
    before.kill()
    service.wait_for(lambda: gone(before) and service.processes("celestial_backend.worker"), 10)
    ended = service.ended(job, 30)
    assert (ended.state, ended.attempts) == (PUBLISHED, 2)
    assert service.publications() == [job]
    assert (
        service.server.post("/setup", {"project": "3.1", "schema": label_config()}).json()["model_version"]
        == (ended.outcome["tag"])
    )


def test_what_the_server_accepted_is_run_whatever_ends_it(service: Service) -> None:
    """A kill takes worker and training along, a stop lets the job wait; after each the next server goes on."""
    service.start(FAULT_LEARN="60")
    job = service.press()
    service.stage(job, "reading labels")
    worker, trainers = service.training_worker(), service.trainers()
    os.killpg(service.server.process.pid, signal.SIGKILL)
    service.wait_for(lambda: gone(worker, *trainers), 3)
    assert service.job(job).state == RUNNING

    service.start(FAULT_LEARN="60")
    other = service.press(4)
    os.killpg(service.server.process.pid, signal.SIGKILL)
    service.wait_for(lambda: not service.trainers(), 5)

    service.start(FAULT_LEARN="60")
    service.wait_for(lambda: service.ledger.jobs(states=(RUNNING,)) and service.trainers())
    worker, trainers = service.training_worker(), service.trainers()
    attempts = {one.id: one.attempts for one in service.ledger.jobs()}
    running = service.ledger.jobs(states=(RUNNING,))[0]
    os.killpg(service.server.process.pid, signal.SIGTERM)
    service.wait_for(lambda: gone(worker, *trainers), 10)
    assert service.job(running.id).state == WAITING
    assert service.job(running.id).attempts == attempts[running.id] - 1

    service.start()
    assert {service.ended(one, 30).state for one in (job, other)} == {PUBLISHED}
    assert sorted(service.publications()) == sorted([job, other])


def test_webhooks_are_answered_in_time_while_a_training_runs(service: Service, record_property: Any) -> None:
    """Two hundred in ten seconds: each within Label Studio's second, one more training waits, people are served."""
    service.start(FAULT_LEARN="120", FAULT_BURN="2", CELESTIAL_TRAIN_EVERY="10")
    service.server.wait_for_log("Loaded", seconds=60)
    first = service.press()
    service.stage(first, "reading labels")
    project = {"id": 3, "label_config": label_config()}
    label = {"id": 1, "result": [], "was_cancelled": False}
    bodies = [{"action": "START_TRAINING", "project": project},
              {"action": "ANNOTATION_CREATED", "project": project, "annotation": label, "task": {"id": 1}}]  # fmt: skip
    url, took, started = f"{service.server.url}/webhook", [], time.monotonic()

    def send(number: int) -> None:
        time.sleep(max(0.0, started + number * 0.05 - time.monotonic()))
        before = time.monotonic()
        answer = requests.post(url, json=bodies[number % 2], timeout=10)
        took.append(time.monotonic() - before)
        assert answer.status_code == 201, answer.text

    with ThreadPoolExecutor(20) as people:
        sent = [people.submit(send, number) for number in range(200)]
        while not all(one.done() for one in sent):
            assert requests.get(f"{service.server.url}/health", timeout=WEBHOOK_S).status_code == 200
            setup = service.server.post("/setup", {"project": "3.1", "schema": label_config()}, timeout=SETUP_S)
            assert setup.status_code == 200
            assert service.server.predict(["data:image/png;base64,"]) == [[]]
            time.sleep(0.2)
        for one in sent:
            one.result()
    figures = f"p50 {statistics.median(took):.3f} s, most {max(took):.3f} s"
    record_property("webhooks", figures)
    print(figures)  # noqa: T201 - shown with -s, and with a failure
    assert max(took) < WEBHOOK_S
    assert service.job(first).state == RUNNING
    (waiting,) = service.ledger.jobs(states=(WAITING,))
    assert waiting.requests == 100 + 100 // 10
