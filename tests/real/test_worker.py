"""The worker and its trainings as processes: what is killed, and when, and what becomes of the job."""

from __future__ import annotations

import contextlib
import json
import pickle
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from celestial_backend.errors import StateError
from celestial_backend.jobs.ledger import FAILED, MERGED, PUBLISHED, RUNNING, WAITING
from tests.support.backend_server import REPOSITORY
from tests.support.picture_host import PictureHost, picture_host
from tests.support.postgres_server import PostgresServer
from tests.support.trainings import BIN, Place

CONSUMER = [BIN / "huey_consumer", "--quiet", "--logfile=/dev/null", "--max-delay=1", "celestial_backend.worker.huey"]


@pytest.fixture
def place(tmp_path: Path, model_store: Path) -> Iterator[Place]:
    """With the database in a file of the state folder."""
    place = Place(tmp_path, model_store)
    yield place
    place.stop()


@pytest.fixture
def on_postgresql(tmp_path: Path, model_store: Path, postgres_server: PostgresServer) -> Iterator[Place]:
    """With a PostgreSQL."""
    place = Place(tmp_path, model_store, CELESTIAL_DATABASE_URL=postgres_server.fresh())
    yield place
    place.stop()


@pytest.fixture(params=["place", "on_postgresql"])
def either(request: pytest.FixtureRequest) -> Place:
    """With the database in a file, and with a PostgreSQL."""
    chosen: Place = request.getfixturevalue(request.param)
    return chosen


MOMENTS = {
    "queued": ("celestial_backend.jobs.ledger:Ledger.start:before", "self", 1),
    "begun": ("celestial_backend.jobs.ledger:Ledger.start:after", "self", 2),
    "started": ("celestial_backend.learning.project:Learner.learn:before", "worker", 2),
    "reading-labels": ("celestial_backend.jobs.ledger:Ledger.progress:before:reading labels", "worker", 2),
    "learning": ("celestial_backend.jobs.ledger:Ledger.progress:after:learning", "worker", 2),
    "saving": ("celestial_backend.models.registry:Registry.add_heads:before", "worker", 2),
    "half-saved": ("shutil:copyfile:after:/bentoml/", "both", 2),
    "before-pointer": ("celestial_backend.models.pointers:Pointers.write:before", "both", 2),
    "after-pointer": ("celestial_backend.models.pointers:Pointers.write:after", "both", 2),
    "ended": ("celestial_backend.jobs.ledger:Ledger.end:after", "both", 1),
    "telling": ("celestial_backend.studio.project:StudioProject.show_version:before", "worker", 1),
    "before-end": ("celestial_backend.jobs.ledger:Ledger.end:before", "worker", 2),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_worker_that_is_killed_costs_no_job(either: Place, moment: str) -> None:
    """Whenever the kill comes, the next worker brings the job to its end, and it is published exactly once."""
    at, what, attempts = MOMENTS[moment]
    worker = either.worker(FAULT_AT=at, FAULT_DO=what)
    job = either.request()
    worker.process.wait(20)
    assert worker.process.returncode == -signal.SIGKILL
    either.worker()
    ended = either.ended(job)
    assert (ended.state, ended.attempts) == (PUBLISHED, attempts)
    assert either.publications() == [job]
    pointer = either.services.store.pointers.read("3")
    assert pointer is not None
    assert (pointer.tag, pointer.job) == (ended.outcome["tag"], job)
    assert [model.tag for model in either.services.store.registry.models() if model.project] == [pointer.tag]
    either.wait_for(lambda: not either.trainers() and not either.left_over(), 5)


def test_a_killed_job_is_merged_into_the_one_that_waits(place: Place) -> None:
    """Both requests end, with one training and one publication for both."""
    worker = place.worker(FAULT_LEARN="60")
    first = place.request()
    place.stage(first, "reading labels")
    second = place.request()
    worker.process.kill()
    place.worker()
    ended = place.ended(second)
    assert (ended.state, ended.requests, ended.attempts) == (PUBLISHED, 2, 2)
    assert (place.job(first).state, place.job(first).reason) == (
        MERGED,
        f"It was interrupted, and job {second} does its work.",
    )
    assert place.publications() == [second]


def test_a_request_is_run_merged_or_run_next(either: Place) -> None:
    """Those that come while one waits are one training with it; those that come while one runs are the next."""
    first = [either.request() for _ in range(3)]
    assert len(set(first)) == 1
    either.worker(FAULT_LEARN="2")  # long enough to be seen at it
    either.stage(first[0], "learning")
    second = [either.request() for _ in range(2)]
    assert len(set(second)) == 1
    assert second[0] != first[0]
    one, two = either.ended(first[0]), either.ended(second[0])
    assert [(job.state, job.attempts, job.requests) for job in (one, two)] == [(PUBLISHED, 1, 3), (PUBLISHED, 1, 2)]
    assert (two.started_at or 0) >= (one.ended_at or time.time())
    assert two.outcome["parent"] == one.outcome["tag"]
    assert either.publications() == [first[0], second[0]]


@pytest.mark.parametrize(
    ("place_name", "workers"),
    [
        pytest.param("on_postgresql", [(), ()], id="two processes, PostgreSQL"),
        pytest.param("place", [[*CONSUMER, "-w", "2"]], id="two threads, SQLite"),
    ],
)
def test_two_workers_train_two_projects_and_never_one_twice(
    request: pytest.FixtureRequest, place_name: str, workers: list[list[str]]
) -> None:
    """Twenty requests for one project are trained one after the other, and another project beside them."""
    place: Place = request.getfixturevalue(place_name)
    for command in workers:
        place.worker(command, FAULT_LEARN="1")
    jobs = [place.request("4"), *(place.request("3") for _ in range(10))]
    place.wait_for(lambda: len(place.ledger.jobs(states=(RUNNING,))) == 2)
    for _ in range(10):
        jobs.append(place.request("3"))
        time.sleep(0.02)
    ended = [place.ended(job) for job in dict.fromkeys(jobs)]
    assert {job.state for job in ended} == {PUBLISHED}
    assert sum(job.requests for job in ended if job.project == "3") == 20
    assert sorted(place.publications()) == sorted(dict.fromkeys(jobs))
    times = {name: [float(at) for project, at in place.marked(name) if project == "3"] for name in ("began", "ended")}
    assert len(times["began"]) == len(times["ended"]) == len(ended) - 1
    assert all(end < begin for end, begin in zip(times["ended"], times["began"][1:], strict=False))


def test_who_asks_again_and_again_waits_for_the_others(place: Place) -> None:
    """One worker trains the projects in the order in which they came to wait."""
    for project in ("3", "4", "5"):
        place.request(project)
    place.worker()
    place.wait_for(lambda: place.marked("began"))
    jobs = [place.request("3") for _ in range(5)]
    assert place.ended(jobs[-1]).requests == 5
    assert [project for project, _ in place.marked("began")] == ["3", "4", "5", "3"]


@pytest.fixture
def empty_studio() -> Iterator[PictureHost]:
    """A Label Studio without a project."""
    with picture_host() as server:
        said = b'{"id": "1", "status_code": 404, "version": "1.23.2", "detail": "No Project matches the given query."}'
        server.other = (404, {"Content-Type": "application/json"}, said)
        yield server


def test_trainings_of_projects_that_are_gone_fail_and_leave_nothing(
    tmp_path: Path, model_store: Path, empty_studio: PictureHost
) -> None:
    """With Label Studio's reason, before any model is loaded; the list of jobs alone tells of them."""
    given = {"LABEL_STUDIO_URL": empty_studio.url, "LABEL_STUDIO_API_KEY": "0" * 40}
    place = Place(tmp_path, model_store, **given)
    try:
        jobs = [place.request(project) for project in ("3", "4")]
        place.worker()
        for job in jobs:
            ended = place.ended(job)
            assert (ended.state, ended.attempts) == (FAILED, 1)
            assert "answered 404 (No Project matches the given query)" in ended.reason
        place.wait_for(lambda: not place.ledger.projects())
        place.wait_for(lambda: not list((place.settings.model_dir / "work").iterdir()))
        assert place.marked("began") == []
    finally:
        place.stop()


def test_processes_for_strangers_pictures_hold_no_password(tmp_path: Path, model_store: Path) -> None:
    """They answer no requests; Label Studio's token they need."""
    secret = {"BASIC_AUTH_USER": "me", "BASIC_AUTH_PASS": "s3cret"}
    place = Place(tmp_path, model_store, LABEL_STUDIO_API_KEY="needed", **secret)
    try:
        worker = place.worker(FAULT_LEARN="20")
        place.stage(place.request(), "reading labels")
        place.jobs.pages.offer("page", {"project": "3", "version": "", "tasks": [], "config": ""})
        module, parent = "celestial_backend.worker.pages", psutil.Process(worker.process.pid)

        def predictors() -> list[psutil.Process]:
            with contextlib.suppress(psutil.Error):  # one has just ended
                return [child for child in parent.children() if module in child.cmdline()]
            return []

        (trainer,) = place.trainers()
        trainer_environ = trainer.environ()
        assert trainer_environ["LABEL_STUDIO_API_KEY"] == "needed"
        assert not secret.keys() & trainer_environ.keys()
        assert secret.items() <= parent.environ().items()
        trainer.kill()
        (predictor,) = place.wait_for(predictors)
        assert predictor.environ()["LABEL_STUDIO_API_KEY"] == "needed"
        assert not secret.keys() & predictor.environ().keys()
    finally:
        place.stop()


def test_a_training_that_dies_is_tried_again(place: Place) -> None:
    """Its process is killed once, as by a machine without memory: the next attempt publishes."""
    place.worker(FAULT_AT="celestial_backend.jobs.ledger:Ledger.progress:after:learning", FAULT_DO="self")
    ended = place.ended(place.request())
    assert (ended.state, ended.attempts) == (PUBLISHED, 2)
    assert place.left_over() == []


def test_a_training_that_always_dies_fails_with_its_reason(place: Place) -> None:
    """Three deaths are enough; the worker lives, and another project is trained."""
    at = "celestial_backend.learning.project:Learner.learn:before"
    worker = place.worker(FAULT_AT=at, FAULT_DO="self", FAULT_TIMES="3")
    ended = place.ended(place.request())
    assert (ended.state, ended.attempts) == (FAILED, 3)
    assert ended.reason == (
        "Its process was ended by signal 9, as a machine that is out of memory does. It was begun 3 times. "
        "The worker's log tells more."
    )
    assert place.publications() == []
    assert place.left_over() == []
    assert worker.process.poll() is None
    assert place.ended(place.request("4")).state == PUBLISHED


def test_a_training_that_takes_too_long_is_ended(tmp_path: Path, model_store: Path) -> None:
    """After CELESTIAL_TRAIN_MAX_S it is killed and failed, not tried again; the reason names the setting."""
    place = Place(tmp_path, model_store, CELESTIAL_TRAIN_MAX_S="1.5")
    try:
        place.worker(FAULT_LEARN="60")
        ended = place.ended(place.request())
        assert (ended.state, ended.attempts) == (FAILED, 1)
        assert "longer than the 1.5 seconds of CELESTIAL_TRAIN_MAX_S" in ended.reason
        assert place.trainers() == []
        assert place.left_over() == []
    finally:
        place.stop()


@pytest.mark.parametrize("command", [(), CONSUMER], ids=["worker", "huey_consumer"])
def test_a_stop_lets_the_job_wait_again(place: Place, command: list[str]) -> None:
    """SIGTERM ends the training within two seconds; this attempt does not count, not even as the third."""
    job = place.request()
    for _ in range(2):  # it was begun and died
        begun = place.ledger.start("here")
        assert begun is not None
        place.ledger.give_back(begun)
    worker = place.worker(command, FAULT_LEARN="60")
    assert place.stage(job, "reading labels").attempts == 3
    worker.process.send_signal(signal.SIGTERM)
    place.wait_for(lambda: place.job(job).state == WAITING and not place.trainers(), 2)
    worker.process.wait(5)
    assert (place.job(job).attempts, place.left_over()) == (2, [])
    place.worker()
    assert place.ended(job).state == PUBLISHED


def test_sigint_lets_the_training_end_first(place: Place) -> None:
    """As `docker compose stop` does with the worker's service."""
    worker = place.worker(CONSUMER, FAULT_LEARN="1")
    job = place.request()
    place.stage(job, "learning")
    worker.process.send_signal(signal.SIGINT)
    assert worker.process.wait(20) == 0
    assert (place.job(job).state, place.job(job).attempts) == (PUBLISHED, 1)


def test_a_trainer_without_its_worker_ends_before_it_begins(place: Place) -> None:
    """A worker that was killed in the first moment of its training leaves nobody who trains on his own."""
    job = place.request()
    begun = place.ledger.start("here")
    assert begun is not None
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    command = [sys.executable, "-m", "celestial_backend.worker.training", job, begun.token, str(gone.pid)]
    environ = place.environ | place.faults | {"FAULT_LEARN": "8"}
    assert subprocess.run(command, cwd=REPOSITORY, env=environ, timeout=30, check=False).returncode == 1
    assert (place.job(job).state, place.publications()) == (RUNNING, [])


class Executed:
    """A pickle that writes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.path,)


def test_what_strangers_put_into_the_queue_is_not_run(either: Place, tmp_path: Path) -> None:
    """A pickle runs no code, other rubbish does no harm, and the job behind it is run."""
    rubbish = [b"", b"{}", b"[1]", json.dumps(["1", "os.system", None, 0, 0, None, ["true"], {}]).encode()]
    for message in (pickle.dumps(Executed(tmp_path / "executed")), *rubbish):
        either.jobs.huey.storage.enqueue(message)
    worker = either.worker()
    assert either.ended(either.request()).state == PUBLISHED
    assert not (tmp_path / "executed").exists()
    assert worker.process.poll() is None


def test_lost_messages_are_found_again(either: Place) -> None:
    """A queue that forgets everything costs nothing that was accepted."""
    jobs = [either.request("3"), either.request("4")]
    assert either.jobs.huey.pending_count() == 2
    either.jobs.huey.flush()
    either.worker()
    assert [either.ended(job).state for job in jobs] == [PUBLISHED, PUBLISHED]


def test_a_database_that_is_away_delays_and_loses_nothing(
    on_postgresql: Place, postgres_server: PostgresServer
) -> None:
    """Killed while one job runs and another one waits: workers live on, and end both once it is back."""
    worker = on_postgresql.worker(FAULT_LEARN="4")
    jobs = [on_postgresql.request("3"), on_postgresql.request("4")]
    on_postgresql.stage(jobs[0], "reading pictures")
    postgres_server.kill()
    with pytest.raises(StateError, match=r"Nothing was accepted\. Start the database"):
        on_postgresql.jobs.request("5")
    time.sleep(6)  # in which the training wants to end
    postgres_server.start()
    ended = [on_postgresql.ended(job, 90) for job in jobs]
    assert [(job.state, job.attempts) for job in ended] == [(PUBLISHED, 1), (PUBLISHED, 1)]
    assert on_postgresql.publications() == jobs
    assert worker.process.poll() is None
    assert "Traceback" not in worker.log_text()


def test_locked_files_delay_and_lose_nothing(place: Place) -> None:
    """Database and queue are held by another program while a training ends: it ends once, later; the worker lives."""
    worker = place.worker(FAULT_LEARN="1")
    job = place.request()
    place.stage(job, "learning")
    files = [place.settings.model_dir / name for name in ("celestial.db", "queue.db")]
    others = [sqlite3.connect(file, timeout=5, isolation_level=None) for file in files]
    for other in others:
        other.execute("BEGIN EXCLUSIVE")
    time.sleep(3)  # in which it wants to write down where it is, and that it has ended
    for other in others:
        other.execute("ROLLBACK")
        other.close()
    ended = place.ended(job)
    assert (ended.state, ended.attempts) == (PUBLISHED, 1)
    assert place.ended(place.request()).state == PUBLISHED
    assert len(place.publications()) == 2
    assert worker.process.poll() is None
    assert "Traceback" not in worker.log_text()


FULL = {
    "saving": ("shutil:copyfile:before:/bentoml/", "The BentoML store cannot be written (No space left on device)"),
}


@pytest.mark.parametrize("moment", FULL)
def test_a_full_disk_fails_with_a_sentence_and_keeps_the_old_model(place: Place, moment: str) -> None:
    """Nothing is published by halves; when there is space again the same labels are learned."""
    before = place.services.store.live_tag("3")
    at, sentence = FULL[moment]
    place.worker(FAULT_AT=at, FAULT_DO="disk")
    failed = place.ended(place.request())
    assert failed.state == FAILED
    assert sentence in failed.reason
    assert place.services.store.live_tag("3") == before
    assert [model.tag for model in place.services.store.registry.models()] == [before]
    assert place.left_over() == []
    assert place.ended(place.request()).state == PUBLISHED
