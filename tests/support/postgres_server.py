"""A real PostgreSQL for tests: on a free port of this machine, as safe on its disk as any, so that it may be killed."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import psycopg

from tests.support.backend_server import ServerProcess, free_port

HOW_TO_GET_ONE = "No PostgreSQL found for the tests of the database; get one with: apt-get install postgresql"
ADDRESS = "127.0.0.1"
PASSWORD = "s3cret-of-postgres"


def find_postgres() -> Path | None:
    """The folder of its programs, the newest one's; Debian keeps them out of the PATH."""
    found = shutil.which("initdb")
    places = [Path(found).resolve().parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    return next((place for place in reversed(places) if (place / "postgres").exists()), None)


class PostgresServer:
    """
    A PostgreSQL that runs when the constructor returns, by password and over TCP alone.

    Attributes:
        url: Of the database that it has from the start; `fresh` gives others.
    """

    def __init__(self, programs: Path, folder: Path) -> None:
        """
        Args:
            programs: From `find_postgres`.
            folder: An empty one, for its data and its log. It runs as no root; root's folders let its user through.
        """
        self.port = free_port()
        self.url = self._url("postgres")
        self._programs, self._folder, self._numbers = programs, folder, count(1)
        self._user = _unprivileged()
        password = folder / "password"
        password.write_text(PASSWORD)
        if self._user is not None:
            shutil.chown(folder, self._user)
            shutil.chown(password, self._user)
        with self._let_in():
            command = [
                *(programs / "initdb", "--no-sync", "--no-locale", "--encoding=UTF8", "--auth=scram-sha-256"),
                *(f"--pgdata={folder / 'data'}", "--username=celestial", f"--pwfile={password}"),
            ]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, user=self._user, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        self.start()

    def _url(self, name: str) -> str:
        return f"postgresql://celestial:{PASSWORD}@{ADDRESS}:{self.port}/{name}"

    @contextlib.contextmanager
    def _let_in(self) -> Iterator[None]:
        """Let the user of the server through the folders above its own, as far as they are ours."""
        for parent in self._folder.parents if self._user is not None else ():
            if not parent.stat().st_mode & 0o001:
                parent.chmod(parent.stat().st_mode | 0o011)
        yield

    def start(self) -> None:
        """Start it, or start it again after `kill` or `stop`; returns when it answers."""
        options = {"listen_addresses": ADDRESS, "port": self.port, "unix_socket_directories": ""}
        command = [self._programs / "postgres", "-D", self._folder / "data"]
        with self._let_in():
            self.process = ServerProcess(
                [*command, *(f"--{name}={value}" for name, value in options.items())],
                cwd=self._folder,
                environ={"PATH": os.environ["PATH"], "LC_ALL": "C"},
                log=self._folder / "postgres.log",
                user=self._user,
            )
        try:
            self._wait_until_it_answers(30)
        except BaseException:
            self.stop()
            raise

    def _wait_until_it_answers(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while True:
            assert self.alive, f"PostgreSQL ended:\n{self.log_tail()}"
            assert time.monotonic() < deadline, f"PostgreSQL gave no answer in {seconds} s:\n{self.log_tail()}"
            with contextlib.suppress(psycopg.OperationalError), psycopg.connect(self.url, connect_timeout=5):
                return
            time.sleep(0.02)

    @property
    def alive(self) -> bool:
        return self.process.process.poll() is None

    def fresh(self) -> str:
        """The url of a new and empty database; a server that a test has left dead is started."""
        if not self.alive:
            self.start()
        name = f"test_{next(self._numbers)}"
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return self._url(name)

    def kill(self) -> None:
        """End it as a failure of the power would, but for what the disk has: at once, with all its processes."""
        self.signal(signal.SIGSTOP)  # nothing is started any more
        children = self.signal(signal.SIGKILL)
        self.process.process.wait(timeout=10)
        deadline = time.monotonic() + 10
        while any(_state(child) not in ("Z", "") for child in children):  # they hold the memory that they share
            assert time.monotonic() < deadline, "processes of PostgreSQL do not end"
            time.sleep(0.01)

    def signal(self, sign: signal.Signals) -> list[int]:
        """Send it to the server and its processes, which have groups of their own; SIGSTOP makes it hang."""
        pid = self.process.process.pid
        children = [child for child, (_state, parent) in _processes() if parent == pid]
        for each in (pid, *children):
            with contextlib.suppress(ProcessLookupError):
                os.kill(each, sign)
        return children

    def stop(self) -> None:
        """End it as an administrator does, without waiting for those who are connected."""
        if not self.alive:
            return
        self.signal(signal.SIGCONT)
        self.process.process.send_signal(signal.SIGINT)
        try:
            self.process.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.kill()

    def log_tail(self) -> str:
        return self.process.log_tail()


def _unprivileged() -> str | None:
    """The user to run it as where the tests run as root, which it refuses."""
    if os.geteuid() != 0:
        return None
    return "postgres" if any(user.pw_name == "postgres" for user in pwd.getpwall()) else "nobody"


def _processes() -> Iterator[tuple[int, tuple[str, int]]]:
    """All processes of this machine: number, state, and number of the parent."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent, *_ = stat.read_text().rpartition(")")[2].split()
            yield int(stat.parent.name), (state, int(parent))


def _state(pid: int) -> str:
    return dict(_processes()).get(pid, ("", 0))[0]
