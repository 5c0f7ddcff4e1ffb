"""The queue that wakes workers: Huey, on a file in the state folder or on Redis, and the same on both."""

from __future__ import annotations

import json
import logging
import math
import sqlite3
import time
from typing import Any

from huey import Huey, RedisHuey, SqliteHuey
from huey.registry import Message
from huey.serializer import Serializer

from celestial_backend.errors import STATE_REMEDY, StateError
from celestial_backend.settings import Settings

NAME = "celestial"
TIMEOUT_S = 0.5  # for a queue that does not answer
SAY_S = 60.0  # between two lines of the log about a queue that is away; Huey writes some each second


def make_queue(settings: Settings) -> Huey:
    """
    A queue without tasks; what goes through it is plain JSON, never a pickle.

    Raises:
        StateError: Its file cannot be opened.
    """
    for name in ("Worker", "Scheduler"):
        logging.getLogger(f"huey.consumer.{name}").addFilter(_Away())
    options: dict[str, Any] = {"results": False, "serializer": _JsonSerializer()}
    if settings.database_url is None:
        try:
            settings.model_dir.mkdir(parents=True, exist_ok=True)
            return SqliteHuey(NAME, filename=str(settings.state.queue), timeout=TIMEOUT_S, **options)
        except (sqlite3.Error, OSError) as error:
            raise StateError(f"The queue in the state folder cannot be opened ({error}). {STATE_REMEDY}") from error
    from redis import ConnectionPool

    pool = ConnectionPool.from_url(
        settings.database_url, socket_connect_timeout=TIMEOUT_S, socket_timeout=TIMEOUT_S + 1
    )  # the worker's own reading waits a second for a message
    return RedisHuey(NAME, connection_pool=pool, **options)


class _JsonSerializer(Serializer):  # type: ignore[misc]
    """Messages as JSON: who can write into Redis can ask for work and answer for workers, and run no code of theirs."""

    def _serialize(self, data: Any) -> bytes:
        return json.dumps(data).encode()

    def _deserialize(self, data: bytes) -> Any:
        return Message(*json.loads(data))


class _Away(logging.Filter):
    """Says in one sentence, now and then, that the queue is away, where Huey writes a traceback each time."""

    def __init__(self) -> None:
        super().__init__()
        self._said = -math.inf

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if type(error).__module__.partition(".")[0] not in ("redis", "sqlite3"):
            return True
        if time.monotonic() < self._said + SAY_S:
            return False
        self._said = time.monotonic()
        record.msg, record.args = "The queue cannot be reached (%s); it is tried again.", (type(error).__name__,)
        record.exc_info = record.exc_text = None
        return True
