"""The queue that wakes workers: Huey, on a file in the state folder or on PostgreSQL, wherever the database is."""

from __future__ import annotations

import json
import logging
import math
import select
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
from huey import Huey
from huey.registry import Message
from huey.serializer import Serializer
from huey.storage import PostgresStorage, SqliteStorage

from celestial_backend.database import ALIVE, CONNECT_S, SCHEMA, address_of, why
from celestial_backend.errors import STATE_REMEDY, CelestialError, StateError
from celestial_backend.settings import Settings

logger = logging.getLogger(__name__)
NAME = "celestial"
TIMEOUT_S = 0.5  # for a file that another process writes into
SAY_S = 60.0  # between two lines of the log about a queue that is away; Huey writes some each second


def make_queue(settings: Settings) -> Huey:
    """
    A queue without tasks; what goes through it is plain JSON, never a pickle. PostgreSQL is asked when it is used.

    Raises:
        StateError: Its file cannot be opened.
    """
    for name in ("huey", "huey.consumer", "huey.consumer.Worker", "huey.consumer.Scheduler"):
        logging.getLogger(name).addFilter(_Away())
    options: dict[str, Any] = {"results": False, "serializer": _JsonSerializer()}
    if not (settings.database_url or "").startswith("postgresql"):
        try:
            settings.model_dir.mkdir(parents=True, exist_ok=True)
            file = str(settings.state.queue)
            return _Queue(NAME, storage_class=SqliteStorage, filename=file, timeout=TIMEOUT_S, **options)
        except (sqlite3.Error, OSError) as error:
            said = f"The queue in the state folder cannot be opened ({why(error)}). {STATE_REMEDY}"
            raise StateError(said) from error
    address = address_of(str(settings.database_url))
    return _Queue(NAME, storage_class=_Postgres, dsn=address, create_tables=False, **options)


class _Queue(Huey):  # type: ignore[misc]
    """Huey, whose worker writes into our log."""

    def create_consumer(self, **options: Any) -> Any:
        """What takes messages from the queue; `huey_consumer` has just given it a log of its own beside ours."""
        log = logging.getLogger("huey")
        log.handlers = [handler for handler in log.handlers if type(handler) is not logging.StreamHandler]
        log.setLevel(max(log.getEffectiveLevel(), logging.WARNING))
        logger.info("This worker takes trainings and pages of tasks, one at a time")
        return super().create_consumer(**options)


class _Postgres(PostgresStorage):  # type: ignore[misc]
    """Huey's tables in the schema that is ours, made by whoever finds none."""

    def _connect(self) -> Any:
        options: dict[str, Any] = {"connect_timeout": CONNECT_S, "options": f"-c search_path={SCHEMA}", **ALIVE}
        connection = psycopg.connect(self.dsn, autocommit=True, **options)
        found = connection.execute("SELECT to_regclass(%s)", (f"{SCHEMA}.{self.table_counter}",)).fetchone()
        if found == (None,):
            with connection.transaction():
                connection.execute("SELECT pg_advisory_xact_lock(hashtext('celestial tables'))")
                there = connection.execute("SELECT to_regnamespace(%s)", (SCHEMA,)).fetchone() != (None,)
                for statement in (*([] if there else [f"CREATE SCHEMA {SCHEMA}"]), *self.ddl):
                    connection.execute(statement)
        return connection

    _create_connection = _connect

    @property
    def conn(self) -> Any:
        """The connection of this process; a new one after the server has ended the old one, which shows on it."""
        if self._conn is not None and not self._conn.closed:
            said = select.poll()  # `select` takes no number of a file above 1023
            said.register(self._conn, select.POLLIN)
            if said.poll(0):
                self._conn.close()
        return super().conn

    @contextmanager
    def db(self, *how: Any, **also: Any) -> Iterator[Any]:
        """As Huey's; after tables were removed while it was connected, the next use makes them."""
        try:
            with super().db(*how, **also) as cursor:
                yield cursor
        except psycopg.errors.UndefinedTable:
            self.close()
            raise


class _JsonSerializer(Serializer):  # type: ignore[misc]
    """Messages as JSON: who can write into the queue can wake workers, and run no code of theirs."""

    def _serialize(self, data: Any) -> bytes:
        return json.dumps(data).encode()

    def _deserialize(self, data: bytes) -> Any:
        return Message(*json.loads(data))


class _Away(logging.Filter):
    """Says in a sentence what went wrong, and only now and then that the queue is away; Huey writes a traceback."""

    def __init__(self) -> None:
        super().__init__()
        self._said = -math.inf

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, CelestialError):
            record.msg, record.args, record.exc_info, record.exc_text = "%s", (str(error),), None, None
            return True
        if error is None or type(error).__module__.partition(".")[0] not in ("psycopg", "sqlite3"):
            return True
        if time.monotonic() < self._said + SAY_S:
            return False
        self._said = time.monotonic()
        record.msg, record.args = "The queue cannot be reached (%s); it is tried again.", (why(error),)
        record.exc_info = record.exc_text = None
        return True
