"""
The servers that a demonstration runs: a Label Studio of its own, and the backend.

Each is a process group with a file that it keeps locked while it lives. So one that was left
behind, because the demonstration was killed, is found and ended by the next one, and nothing else is.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path

from celestial_backend.errors import StateError, StudioError
from celestial_backend.processes import death

VERSION = "1.23.2"
HOST = "127.0.0.1"
STOP_S = 10.0
LOOK_S = 0.1
PLACE = str(Path(__file__).parents[1])  # where the package is found
OURS = ("CELESTIAL_", "LABEL_STUDIO_", "HEARTEX_", "BENTOML_", "BASIC_AUTH_", "LOCAL_FILES_", "TEST_")
OURS_BY_NAME = {"MODEL_DIR", "REDIS_URL", "LOG_LEVEL", "PORT", "WORKERS", "THREADS", "HOST", "PYTHONPATH"}

# Label Studio's own list of reserved networks (core/utils/io.py in 1.23.2). It has no list of exceptions, so the one
# address that the backend listens on is left out of a copy of the list, and all other protection stays on.
RESERVED_NETWORKS = (
    "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24",
    "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24",
    "224.0.0.0/4", "233.252.0.0/24", "240.0.0.0/4", "255.255.255.255/32", "::/128", "::1/128", "::ffff:0:0/96",
    "::ffff:0:0:0/96", "64:ff9b::/96", "64:ff9b:1::/48", "100::/64", "2001::/32", "2001:20::/28", "2001:db8::/32",
    "2002::/16", "fc00::/7", "fe80::/10", "ff00::/8",
)  # fmt: skip


def refused_networks(address: str = HOST) -> str:
    """The networks that Label Studio shall refuse, as it wants them, with a hole for one address."""
    hole = ip_network(address)
    parts: list[IPv4Network | IPv6Network] = []
    for network in map(ip_network, RESERVED_NETWORKS):
        if isinstance(network, IPv4Network) and isinstance(hole, IPv4Network) and hole.subnet_of(network):
            parts += network.address_exclude(hole)
        else:
            parts.append(network)
    return ",".join(map(str, parts))


def free_port(wanted: int = 0) -> int:
    """A port of this machine that nothing listens on: the wanted one, if it can be had."""
    for port in (wanted, 0):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # old connections are no matter
            probe.bind((HOST, port))
            return int(probe.getsockname()[1])
    raise StateError(f"A free port of {HOST} is needed, and there is none. End some other servers.")


def plain_environ() -> dict[str, str]:
    """The environment without any setting of ours or of Label Studio's: the demonstration has its own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(OURS)}
    return {name: value for name, value in kept.items() if name not in OURS_BY_NAME} | {"NO_PROXY": HOST}


class Server:
    """A server of the demonstration; everything it prints goes to a file."""

    def __init__(self, folder: Path, name: str) -> None:
        self.name = name
        self.log = folder / f"{name}.log"
        self._group = folder / f"{name}.pid"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, command: Sequence[str | Path], environ: Mapping[str, str], cwd: Path) -> None:
        """Start it in a process group of its own; one that was left behind is ended first."""
        self.end_leftover()
        with self._group.open("a+b") as held, self.log.open("wb") as output:
            fcntl.flock(held, fcntl.LOCK_EX)
            self._process = subprocess.Popen(  # noqa: S603 - our own module, or the Label Studio that was asked for
                [str(part) for part in command], cwd=cwd, env=dict(environ), stdin=subprocess.DEVNULL,
                stdout=output, stderr=subprocess.STDOUT, start_new_session=True, pass_fds=(held.fileno(),),
            )  # fmt: skip
            held.truncate(0)
            held.write(str(self._process.pid).encode())

    def end_leftover(self) -> None:
        """End what a demonstration that was killed has left behind."""
        if not self._group.exists() or not self._held():
            return
        with contextlib.suppress(ValueError):
            _end(int(self._group.read_text()), lambda: not self._held())

    def wait_for_answer(self, url: str, seconds: float) -> None:
        """
        Wait until `url` answers.

        Raises:
            StudioError: The server ended, or was silent for too long.
        """
        deadline = time.monotonic() + seconds
        while not _answers(url):
            self.see_that_it_runs()
            if time.monotonic() > deadline:
                raise StudioError(f"{self.name} must answer within {seconds:g} seconds and did not. See {self.log}.")
            time.sleep(LOOK_S)

    def see_that_it_runs(self) -> None:
        """
        Say so when the server has ended.

        Raises:
            StudioError: It has.
        """
        code = None if self._process is None else self._process.poll()
        if code is not None:
            raise StudioError(f"{self.name} has ended. {death(code)} See {self.log}.")

    def stop(self) -> None:
        """End it with all its processes: asked first, forced after ten seconds."""
        process = self._process
        if process is not None:
            _end(process.pid, lambda: process.poll() is not None and not self._held())
            process.wait()
            self._process = None

    def _held(self) -> bool:
        """Whether a process of the server lives: the lock is freed when the last one has ended."""
        with self._group.open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False


def start_label_studio(server: Server, program: Path, port: int, data: Path, account: Mapping[str, str]) -> str:
    """Start a Label Studio with its data in a folder, and ``user``, ``password`` and ``token`` of its user; its URL."""
    url = f"http://{HOST}:{port}"
    data.mkdir(exist_ok=True)
    own = {
        "LABEL_STUDIO_BASE_DATA_DIR": str(data),
        "LABEL_STUDIO_HOST": url,
        "LABEL_STUDIO_USERNAME": account["user"],
        "LABEL_STUDIO_PASSWORD": account["password"],
        "LABEL_STUDIO_USER_TOKEN": account["token"],
        "LABEL_STUDIO_ENABLE_LEGACY_API_TOKEN": "true",
        "LABEL_STUDIO_DISABLE_SIGNUP_WITHOUT_LINK": "true",
        "USE_DEFAULT_BANNED_SUBNETS": "false",
        "USER_ADDITIONAL_BANNED_SUBNETS": refused_networks(),
        "COLLECT_ANALYTICS": "false",
        "LATEST_VERSION_CHECK": "false",
        "SENTRY_DSN": "",
        "FRONTEND_SENTRY_DSN": "",
        "FEATURE_FLAGS_OFFLINE": "true",
    }
    command: list[str | Path] = [program, "start", "--no-browser", "--internal-host", HOST, "--port", str(port)]
    server.start(command, plain_environ() | own, data.parent)
    return url


def label_studio_program(folder: Path, given: Path | None, say: Callable[[str], None]) -> Path:
    """
    Label Studio's start program, in a virtual environment that is given, or made in `folder` on first use.

    It counts only once the note that it is complete has been written; a killed installation is made again.

    Raises:
        StudioError: There is none, or it could not be installed.
    """
    if given is not None:
        program = given.absolute() / "bin" / "label-studio"
        if not program.is_file():
            raise StudioError(
                f"--label-studio-venv must name a virtual environment with Label Studio, and {given} is none."
            )
        return program
    place, complete = folder / f"label-studio-{VERSION}", folder / f"label-studio-{VERSION}.complete"
    if not complete.exists():
        shutil.rmtree(place, ignore_errors=True)
        log = folder / "install.log"
        python = place / "bin" / "python"
        commands: list[list[str | Path]] = [
            [sys.executable, "-m", "venv", place],
            [python, "-m", "pip", "install", "--progress-bar", "off", f"label-studio=={VERSION}"],
        ]
        for command in commands:
            for line in _lines_of(command, log):
                say(f"Installing Label Studio {VERSION}, once: {line}")
        complete.write_text(VERSION)
    return place / "bin" / "label-studio"


def _lines_of(command: Sequence[str | Path], log: Path) -> Iterator[str]:
    """What a command prints, line by line, while it runs; also kept in a file."""
    process = subprocess.Popen(  # noqa: S603 - Python's own venv and pip
        [str(part) for part in command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, errors="replace", start_new_session=True,
    )  # fmt: skip
    last = ""
    try:
        with log.open("a") as file:
            for line in process.stdout or ():
                file.write(line)
                last = line.strip() or last
                yield last
    finally:
        if process.poll() is None and sys.exc_info()[0] is not None:
            os.killpg(process.pid, signal.SIGTERM)
        process.wait()
    if process.returncode:
        raise StudioError(f"Label Studio could not be installed: {last[:300]} See {log}, and do this again.")


def _answers(url: str) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # this machine, whatever the proxies
    try:
        with opener.open(url, timeout=5) as answer:
            return bool(answer.status < 400)
    except (OSError, urllib.error.URLError):
        return False


def _end(group: int, ended: Callable[[], bool]) -> None:
    for sign, seconds in ((signal.SIGTERM, STOP_S), (signal.SIGKILL, STOP_S)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, sign)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if ended():
                return
            time.sleep(LOOK_S)
