"""Processes of one machine that belong together: who ends with whom, who holds what, and what one died of."""

from __future__ import annotations

import fcntl
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import IO

import celestial_backend
from celestial_backend.errors import STATE_REMEDY, StateError

PLACE = str(Path(celestial_backend.__file__).parents[1])  # where `python -m celestial_backend` is found
LOOK_S = 0.5
SHELLS = ("sh", "dash", "bash")
AGAIN = 75  # the code with which a process ends whose work is to be begun again, as nothing is wrong with it
_SHOWN: list[IO[bytes]] = []  # open as long as the process lives
SECRETS = {"BASIC_AUTH_USER", "BASIC_AUTH_PASS"}  # needed to answer requests


def end_with_parent(parent: int) -> None:
    """
    End this process, half a second later at most, when the one that started it has ended, however it did.

    Args:
        parent: The process id of the one that started it, which may have ended already.
    """
    threading.Thread(target=_wait_for, args=(parent,), name="parent", daemon=True).start()


def child_environ() -> dict[str, str]:
    """The environment for a process that opens strangers' pictures: this one's, without passwords of no use to it."""
    return {name: value for name, value in os.environ.items() if name not in SECRETS}


@contextmanager
def lock(path: Path, patience_s: float = 0.0) -> Iterator[IO[bytes] | None]:
    """
    A locked file, which the kernel frees when all its holders have ended; None where another process holds it.

    Args:
        path: The file; made if need be. Who holds it may remove it.
        patience_s: How long to wait for another process to end.

    Raises:
        StateError: The file cannot be made.
    """
    deadline = time.monotonic() + patience_s
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("wb")
        except OSError as error:
            raise StateError(f"The state folder cannot be written ({error.strerror}). {STATE_REMEDY}") from error
        with file:
            taken = _taken(file, deadline)
            if not taken or _is_there(file, path):
                yield file if taken else None
                return


def show_life(path: Path) -> None:
    """Hold the lock of a file, as `lock` does, as long as this process or one that it forks lives."""
    file = path.open("wb")
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    _SHOWN.append(file)


def this_process() -> str:
    """A name of this process that no other one has or will have, on any machine."""
    return _name(os.getpid())


def starter() -> str | None:
    """
    The name of the `label-studio-ml start` that runs this process, directly or through a shell; None if none does.

    It ends at a signal without a word to what it has started.
    """
    pid = os.getppid()
    with suppress(OSError, IndexError):
        words = _command(pid)
        if Path(words[0]).name in SHELLS and words[1] == "-c":
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
            words = _command(pid)
        if "start" in words and any(Path(word).name == "label-studio-ml" for word in words[:2]):
            return _name(pid)
    return None


def is_dead(name: str) -> bool:
    """Whether a process is known to have ended: one of this machine that is not there; of another one nobody knows."""
    return _is_there_still(name) is False


def is_alive(name: str) -> bool:
    """Whether a process is known to live: one of this machine that is there."""
    return _is_there_still(name) is True


def _is_there_still(name: str) -> bool | None:
    host, pid, began, place = [*name.split(":"), "", "", "", ""][:4]
    if not began or (host, place) != (socket.gethostname(), _place()):
        return None
    return _began(int(pid)) == began


def death(code: int) -> str:
    """What a process that ended without a word is said to have died of."""
    if code >= 0:
        return f"Its process ended with code {code} and said nothing."
    hint = ", as a machine that is out of memory does" if code == -9 else ""
    return f"Its process was ended by signal {-code}{hint}."


def _name(pid: int) -> str:
    return f"{socket.gethostname()}:{pid}:{_began(pid)}:{_place()}"


def _command(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")


def _began(pid: int) -> str:
    """When a process began, as the kernel counts; "" if it is not there, or only waits to be buried."""
    try:
        told = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if told[0] in "ZX" else told[19]


@cache
def _place() -> str:
    """Where the numbers of processes are these: a machine since its start, and a container of it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot[:8]}-{os.stat('/proc/self/ns/pid').st_ino}"  # noqa: PTH116 - what the link leads to has no path
    except OSError:
        return secrets.token_hex(8)


def _taken(file: IO[bytes], deadline: float) -> bool:
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(LOOK_S / 5)
        else:
            return True


def _is_there(file: IO[bytes], path: Path) -> bool:
    """Whether an open file still has its name: whoever held the lock before may have removed it."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False


def _wait_for(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(LOOK_S)
    os._exit(1)
