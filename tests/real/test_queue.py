"""The queue that wakes workers, in a file and in a real PostgreSQL: it brings what it takes, and comes back."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from huey import Huey

from celestial_backend.database import SCHEMA
from celestial_backend.jobs.queue import make_queue
from celestial_backend.settings import Settings
from tests.support.backend_server import free_port
from tests.support.postgres_server import PostgresServer


def with_task(queue: Huey) -> Any:
    """A queue's task as each process makes it."""
    return queue.task(name="train")(lambda: None)


@pytest.fixture
def settings(database_url: str, tmp_path: Path) -> Settings:
    return Settings.from_environ({"CELESTIAL_DATABASE_URL": database_url, "MODEL_DIR": str(tmp_path / "state")})


@pytest.fixture
def on_postgres(postgres_server: PostgresServer) -> Iterator[Settings]:
    """Settings on a server that lives again after the test."""
    yield Settings.from_environ({"CELESTIAL_DATABASE_URL": postgres_server.fresh()})
    if not postgres_server.alive:
        postgres_server.start()


def test_a_message_is_taken_once(settings: Settings) -> None:
    """By one of two who wait for it, as a process that did not put it in."""
    queue = make_queue(settings)
    queue.enqueue(with_task(queue).s())
    others = [make_queue(settings), make_queue(settings)]
    for other in others:
        with_task(other)
    taken = [task for other in others if (task := other.dequeue()) is not None]
    assert [task.name for task in taken] == ["train"]


def test_the_tables_are_made_by_many_at_once_in_our_schema(postgres_server: PostgresServer) -> None:
    """And nothing is made in the one that Label Studio uses."""
    settings = Settings.from_environ({"CELESTIAL_DATABASE_URL": postgres_server.fresh()})
    failed: list[Exception] = []

    def use() -> None:
        try:
            assert make_queue(settings).storage.queue_size() == 0
        except Exception as error:  # noqa: BLE001 - whatever it is, it is shown
            failed.append(error)

    threads = [threading.Thread(target=use) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    with psycopg.connect(str(settings.database_url).replace("+psycopg", "")) as connection:
        made = connection.execute("SELECT DISTINCT schemaname FROM pg_tables WHERE tablename LIKE 'huey%'").fetchall()
    assert made == [("celestial",)]


def test_a_server_that_is_away_is_no_hindrance_at_the_start() -> None:
    """The queue is made without it, and says so only when it is used."""
    settings = Settings.from_environ({"CELESTIAL_DATABASE_URL": f"postgresql://me:it@127.0.0.1:{free_port()}/here"})
    queue = make_queue(settings)
    with pytest.raises(psycopg.OperationalError):
        queue.enqueue(with_task(queue).s())


def test_the_first_message_after_a_restart_comes_through(
    postgres_server: PostgresServer, on_postgres: Settings
) -> None:
    """The connection that the server has ended is known to be dead before it is used."""
    queue = make_queue(on_postgres)
    task = with_task(queue)
    queue.enqueue(task.s())
    postgres_server.kill()
    with pytest.raises(psycopg.OperationalError):
        queue.enqueue(task.s())
    postgres_server.start()
    queue.enqueue(task.s())
    assert queue.storage.queue_size() == 2
    postgres_server.kill()
    postgres_server.start()
    assert queue.storage.queue_size() == 2
    assert queue.dequeue().name == "train"


def test_tables_that_were_removed_are_made_again(on_postgres: Settings) -> None:
    """As by somebody who puts a copy of the database back: those who are connected fail once at most."""
    queue = make_queue(on_postgres)
    assert queue.dequeue() is None
    with psycopg.connect(str(on_postgres.database_url).replace("+psycopg", ""), autocommit=True) as administrator:
        administrator.execute(f"DROP SCHEMA {SCHEMA} CASCADE")
    with pytest.raises(psycopg.errors.UndefinedTable):
        queue.dequeue()
    queue.enqueue(with_task(queue).s())
    assert queue.dequeue().name == "train"


def test_a_server_that_is_away_is_a_sentence_now_and_then(
    on_postgres: Settings, postgres_server: PostgresServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Huey tries twice a second, each time with a traceback; the worker's log has one line of it."""
    queue = make_queue(on_postgres)
    queue.storage.queue_size()
    postgres_server.kill()
    logger = logging.getLogger("huey.consumer.Worker")
    with caplog.at_level(logging.ERROR, logger.name):
        for _ in range(3):
            try:
                queue.dequeue()
            except psycopg.Error:
                logger.exception("Error reading from queue")
    assert [record.getMessage() for record in caplog.records] == [
        "The queue cannot be reached (it does not answer); it is tried again."
    ]
    assert not any(record.exc_info for record in caplog.records)


def test_a_worker_writes_each_line_once(tmp_path: Path) -> None:
    """`huey_consumer` gives Huey a log of its own, beside ours; one that goes to a file was asked for, and stays."""
    log = logging.getLogger("huey")
    before, file = log.handlers[:], logging.FileHandler(tmp_path / "log")
    log.handlers = [logging.StreamHandler(), file]
    try:
        make_queue(Settings(model_dir=tmp_path / "state")).create_consumer()
        assert log.handlers == [file]
        assert not log.isEnabledFor(logging.INFO)
    finally:
        log.handlers = before
        file.close()
