"""A real redis-server for one test: on a free port of this machine, with nothing kept on disk."""

from __future__ import annotations

import contextlib
import shutil
import time
from pathlib import Path

import redis

from tests.support.backend_server import ServerProcess, free_port

HOW_TO_GET_ONE = "No redis-server found for the tests of the queue on Redis; get one with: apt-get install redis-server"


def find_redis_server() -> str | None:
    return shutil.which("redis-server")


class RedisServer(ServerProcess):
    """A running redis-server; `url` is what `REDIS_URL` wants. The constructor returns when it answers."""

    def __init__(self, program: str, folder: Path) -> None:
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        options = ["--bind", "127.0.0.1", "--port", str(self.port), "--dir", folder]
        in_memory = ["--save", "", "--appendonly", "no"]
        super().__init__([program, *options, *in_memory], cwd=folder, environ={}, log=folder / "redis.log")
        try:
            self._wait_for_pong(10)
        except BaseException:
            self.stop()
            raise

    def _wait_for_pong(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        with redis.Redis.from_url(self.url) as client:
            while True:
                assert self.process.poll() is None, f"redis-server ended:\n{self.log_tail()}"
                assert time.monotonic() < deadline, f"redis-server gave no answer in {seconds} s:\n{self.log_tail()}"
                with contextlib.suppress(redis.ConnectionError):
                    if client.ping():
                        return
                time.sleep(0.02)

    def kill(self) -> None:
        """End it as a crash would: at once, with all that it held."""
        self.process.kill()
        self.process.wait(timeout=10)
