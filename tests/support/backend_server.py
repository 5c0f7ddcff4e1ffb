"""Our backend as a user starts it, and what any server needs that a test starts: a port, a log, a clean end."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import requests

REPOSITORY = Path(__file__).resolve().parents[2]
SHOWN_PORT = 9090
BODIES = ("Earth", "Jupiter", "Mars", "Mercury", "Moon", "Neptune", "Pluto", "Saturn", "Uranus", "Venus")


def label_config(choices: Sequence[str] = BODIES) -> str:
    """The MLOps guide's label config with the given choices."""
    lines = "".join(f'<Choice value="{choice}"/>' for choice in choices)
    return f'<View><Image name="image" value="$image"/><Choices name="choice" toName="image">{lines}</Choices></View>'


def free_port(wanted: int = 0) -> int:
    """A TCP port of 127.0.0.1 that nothing listens on at this moment: the wanted one, if it can be had."""
    with socket.socket() as probe:
        if wanted:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: old connections are no matter
            with contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", wanted))
                return wanted
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class ServerProcess:
    """
    A server in a process group of its own, so that it is stopped with all its children and nothing else.

    Everything it prints goes to the file `log`.
    """

    def __init__(
        self,
        command: Sequence[str | Path],
        *,
        cwd: Path,
        environ: Mapping[str, str],
        log: Path,
        user: str | None = None,
    ) -> None:
        self.log = log
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                [str(part) for part in command],
                cwd=cwd,
                env=dict(environ),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                user=user,
            )

    def log_text(self) -> str:
        return self.log.read_text(errors="replace")

    def log_tail(self, lines: int = 60) -> str:
        return "\n".join(self.log_text().splitlines()[-lines:])

    def wait_for_log(self, text: str, since: int = 0, seconds: float = 30) -> None:
        """Return when `text` stands in the log after its first `since` characters."""
        deadline = time.monotonic() + seconds
        while text not in self.log_text()[since:]:
            assert time.monotonic() < deadline, f"{text!r} did not appear in {self.log}:\n{self.log_tail()}"
            time.sleep(0.05)

    def wait_for_answer(self, url: str, seconds: float, **options: Any) -> None:
        """Return when `url` answers below 500; fail with the log when the process ends or time is up."""
        deadline = time.monotonic() + seconds
        while True:
            ended = self.process.poll() is not None
            assert not ended, f"the server ended with code {self.process.returncode}:\n{self.log_tail()}"
            assert time.monotonic() < deadline, f"no answer from {url} in {seconds} s:\n{self.log_tail()}"
            with contextlib.suppress(requests.RequestException):
                if requests.get(url, timeout=5, **options).status_code < 500:
                    return
            time.sleep(0.1)

    def stop(self, seconds: float = 10) -> None:
        """End the whole group: asked first, forced after `seconds`."""
        self._end((signal.SIGTERM, signal.SIGKILL), seconds)

    def kill_group(self) -> None:
        """End the whole group at once."""
        self._end((signal.SIGKILL,), seconds=10)

    def _end(self, signs: Sequence[signal.Signals], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        for sign in signs:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, sign)
            while self._group_lives() and time.monotonic() < deadline:
                time.sleep(0.05)
        self.process.wait(timeout=seconds)

    def _group_lives(self) -> bool:
        self.process.poll()
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                state, _parent, group = stat.read_text().rpartition(")")[2].split()[:3]
                if int(group) == self.process.pid and state != "Z":
                    return True
        return False


class BackendServer(ServerProcess):
    """
    `label-studio-ml start . -p PORT` in the repository, with the settings that a test gives and no others.

    The constructor returns when `/health` answers, after `start_s` seconds. For the pictures of the pages
    (`TEST_SCREENSHOTS`) the port is the pages', if nothing else is there; otherwise it is `PORT`, or any.
    """

    def __init__(self, folder: Path, **settings: str | Path) -> None:
        """Start it; its log and, if not set, its state and its model store go into `folder`."""
        wanted = SHOWN_PORT if os.environ.get("TEST_SCREENSHOTS") else 0
        self.port = int(settings.get("PORT") or free_port(wanted))
        self.url = f"http://127.0.0.1:{self.port}"
        bin_folder = Path(sys.executable).parent
        settings = {"MODEL_DIR": folder / "state", "BENTOML_HOME": folder / "bentoml"} | settings
        self.state, self.store = Path(settings["MODEL_DIR"]), Path(settings["BENTOML_HOME"])
        super().__init__(
            [bin_folder / "label-studio-ml", "start", ".", "-p", str(self.port)],
            cwd=REPOSITORY,
            environ=plain_environ(bin_folder) | {name: str(value) for name, value in settings.items()},
            log=folder / "backend.log",
        )
        user, password = settings.get("BASIC_AUTH_USER"), settings.get("BASIC_AUTH_PASS")
        self.auth = (str(user), str(password)) if user and password else None
        started = time.monotonic()
        try:
            self.wait_for_answer(f"{self.url}/health", 60, auth=self.auth)
        except BaseException:
            self.stop()
            raise
        self.start_s = time.monotonic() - started

    def post(self, path: str, body: object, timeout: float = 100) -> requests.Response:
        return requests.post(f"{self.url}{path}", json=body, auth=self.auth, timeout=timeout)

    @property
    def model_version(self) -> str:
        """What `/setup` says."""
        answer = self.post("/setup", {"project": "1.1", "schema": label_config()})
        assert answer.status_code == 200, answer.text
        return str(answer.json()["model_version"])

    def predict(self, values: Sequence[str]) -> list[Any]:
        """What `/predict` says about picture addresses, in their order, with no Label Studio in between."""
        tasks = [{"id": number, "data": {"image": value}} for number, value in enumerate(values, start=1)]
        answer = self.post("/predict", {"project": "1.1", "label_config": label_config(), "tasks": tasks})
        assert answer.status_code == 200, answer.text
        return list(answer.json()["results"])


class Backends:
    """Starts backends for one test and kills them all: `backends(NAME=value, …)` gives a running one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: list[BackendServer] = []

    def __call__(self, **settings: str | Path) -> BackendServer:
        folder = self.folder / f"backend-{len(self.started) + 1}"
        folder.mkdir()
        self.started.append(BackendServer(folder, **settings))
        return self.started[-1]

    def log_tail(self) -> str:
        return "\n".join(server.log_tail() for server in self.started)

    def kill(self) -> None:
        """End them without the time that a stop takes; tests of what a stop does call it themselves."""
        for server in self.started:
            server.kill_group()


def plain_environ(bin_folder: Path) -> dict[str, str]:
    """The environment of a fresh login with a virtual environment's programs first on the path."""
    home = os.environ.get("HOME", str(Path.home()))
    path = os.pathsep.join([str(bin_folder), os.environ.get("PATH", os.defpath)])
    return {
        "HOME": home,
        "PATH": path,
        "LANG": "C.UTF-8",
        "PYTHONUNBUFFERED": "1",
        "BENTOML_DO_NOT_TRACK": "True",
        "NO_PROXY": "127.0.0.1,localhost",
        "TMPDIR": tempfile.gettempdir(),
    }
