"""Web server, workers and trainings are killed at random moments: what was accepted comes to its end, and once."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
import requests

from celestial_backend.jobs.ledger import FAILED, PUBLISHED, STATES
from tests.project.test_docker import arguments
from tests.support.backend_server import REPOSITORY, ServerProcess, free_port, label_config
from tests.support.cases import TIMES
from tests.support.trainings import Place

KILLS = 8 * TIMES
PROJECTS = [str(number) for number in range(3, 9)]
WORKERS = 2


class Stage(Place):
    """A web server, two workers, and somebody who presses *Start Training* again and again."""

    def __init__(self, folder: Path, store: Path, database_url: str) -> None:
        super().__init__(folder, store, CELESTIAL_DATABASE_URL=database_url)
        self.faults["FAULT_LEARN"] = "0.5"
        self.port = free_port()
        self.web = self.serve()
        self.accepted: list[str] = []
        self.over = threading.Event()

    def serve(self) -> ServerProcess:
        environ = self.environ | {"PORT": str(self.port)}
        command = json.loads(arguments("CMD")[0])
        return ServerProcess(command, cwd=REPOSITORY, environ=environ, log=self.folder / "web.log")

    def press(self) -> None:
        """Ask for trainings; those that are accepted are kept in mind."""
        chosen = random.Random(2)  # noqa: S311 - the same ones each time
        while not self.over.wait(0.3):
            project = {"id": int(chosen.choice(PROJECTS)), "label_config": label_config()}
            body = {"action": "START_TRAINING", "project": project}
            try:
                answer = requests.post(f"http://127.0.0.1:{self.port}/webhook", json=body, timeout=10)
            except requests.RequestException:
                continue  # the server was killed
            if answer.status_code == 201:
                self.accepted.append(answer.json()["result"]["job"])

    def restart(self) -> None:
        if self.web.process.poll() is not None:
            self.web = self.serve()
            self.web.wait_for_answer(f"http://127.0.0.1:{self.port}/health", 60)
        while len([worker for worker in self.workers if worker.process.poll() is None]) < WORKERS:
            self.worker()

    def kill(self, what: str, chosen: random.Random) -> bool:
        """End one with signal 9; False if there is none."""
        if what == "web":
            os.killpg(self.web.process.pid, signal.SIGKILL)
            self.web.process.wait(10)
            return True
        if what == "worker":
            worker = chosen.choice([each for each in self.workers if each.process.poll() is None])
            worker.process.kill()
            worker.process.wait(10)
            return True
        trainers = self.trainers()
        if not trainers:
            return False
        try:
            chosen.choice(trainers).kill()
        except psutil.NoSuchProcess:
            return False
        return True

    def stop(self) -> None:
        super().stop()
        self.web.stop()


@pytest.mark.timeout(120 + 15 * KILLS)
def test_what_was_accepted_comes_to_its_end_once(tmp_path: Path, model_store: Path, database_url: str) -> None:
    """As the marks of the trainings tell, and not the table alone."""
    stage, chosen = Stage(tmp_path, model_store, database_url), random.Random(1)  # noqa: S311
    stage.restart()
    presser = threading.Thread(target=stage.press)
    presser.start()
    killed: Counter[str] = Counter()
    try:
        stage.wait_for(lambda: stage.accepted)
        while killed.total() < KILLS:
            time.sleep(chosen.uniform(0.2, 2))
            what = chosen.choice(["web", "worker", "training", "training", "training"])
            if stage.kill(what, chosen):
                killed[what] += 1
                stage.restart()
        asked = len(stage.accepted)
        stage.wait_for(lambda: len(stage.accepted) >= asked + 3)  # which nobody disturbs
        stage.over.set()
        presser.join()
        jobs = list(dict.fromkeys(stage.accepted))
        ended = {job: stage.ended(doing.id, 120) for job in jobs if (doing := stage.ledger.doing(job))}
    finally:
        stage.over.set()
        presser.join()
        stage.stop()
    assert list(ended) == jobs
    print(f"{len(stage.accepted)} requests, {len(jobs)} jobs, killed: {dict(killed)}")  # noqa: T201 - shown with -s
    states = {job: found.state for job, found in ended.items()}
    assert set(states.values()) <= {PUBLISHED, FAILED}
    # One that fails was begun three times, and each time something was killed.
    assert all(ended[job].attempts == 3 for job, state in states.items() if state == FAILED)
    marked = stage.publications()
    assert max(Counter(marked).values()) == 1, "none was published twice"
    published = {found.id for found in stage.ledger.jobs(states=STATES) if found.state == PUBLISHED}
    assert set(marked) <= published
    assert len(published) - len(marked) <= killed["training"] + killed["worker"], "killed between commit and mark"
    live = stage.services.store.pointers.projects()
    newest = {found.project: found for found in reversed(stage.ledger.jobs(states=(PUBLISHED,)))}
    assert {project: found.manifest.tag for project, found in newest.items()} == live
