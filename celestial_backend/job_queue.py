"""The queue that wakes workers: Huey, on a file in the state folder or on Redis, and the same on both."""

from __future__ import annotations

import json
from typing import Any

from huey import Huey, RedisHuey, SqliteHuey
from huey.registry import Message
from huey.serializer import Serializer

from celestial_backend.settings import Settings

NAME = "celestial"
TIMEOUT_S = 0.5  # for a queue that does not answer


def make_queue(settings: Settings) -> Huey:
    """A queue without tasks; what goes through it is plain JSON, never a pickle."""
    options: dict[str, Any] = {"results": False, "serializer": _JsonSerializer()}
    if settings.redis_url is None:
        settings.model_dir.mkdir(parents=True, exist_ok=True)
        return SqliteHuey(NAME, filename=str(settings.model_dir / "queue.db"), timeout=TIMEOUT_S, **options)
    from redis import ConnectionPool

    pool = ConnectionPool.from_url(
        settings.redis_url, socket_connect_timeout=TIMEOUT_S, socket_timeout=TIMEOUT_S + 1
    )  # the worker's own reading waits a second for a message
    return RedisHuey(NAME, connection_pool=pool, **options)


class _JsonSerializer(Serializer):  # type: ignore[misc]
    """Messages as JSON: who can write into Redis can ask for a training, and run no code of their own."""

    def _serialize(self, data: Any) -> bytes:
        return json.dumps(data).encode()

    def _deserialize(self, data: bytes) -> Any:
        return Message(*json.loads(data))
