"""A real nginx with the project's own configuration, on a free port of this machine and before servers of a test."""

from __future__ import annotations

import os
import pwd
import re
import shutil
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from tests.support.backend_server import REPOSITORY, ServerProcess, free_port, plain_environ

HOW_TO_GET_ONE = "No nginx found for the tests of several backends; get one with: apt-get install nginx"
CONFIGURATION = REPOSITORY / "nginx.conf"
ARGUMENTS = ("-e", "stderr", "-p", "/tmp/", "-c", "/etc/nginx/nginx.conf")  # noqa: S108 - the compose file's, and compared


def find_nginx() -> str | None:
    return shutil.which("nginx", path=os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin"]))


def release(program: str) -> tuple[int, ...]:
    """Which nginx it is; only since 1.27.3 the addresses of a name are looked up again and again."""
    told = subprocess.run([program, "-v"], capture_output=True, text=True, check=True).stderr
    return tuple(map(int, re.findall(r"\d+", told)[:3]))


def configured_for(port: int, backends: Sequence[int] | Names) -> str:
    """
    The configuration with a port of its own, and with backends of this machine.

    In the compose file one name stands for all backends, and its addresses are looked up; without a name server each
    has its line.
    """
    text, listens = re.subn(r"listen \d+;", f"listen 127.0.0.1:{port};", CONFIGURATION.read_text())
    line = re.compile(r"^ *server backend:9090 resolve (.*;)$", re.MULTILINE)
    (found,) = line.finditer(text)
    assert listens == 1
    if isinstance(backends, Names):
        text = text.replace("resolver 127.0.0.11 ", f"resolver 127.0.0.1:{backends.port} ")
        return line.sub(f"server backend:{backends.of_backends} resolve {found[1]}", text)
    return line.sub("\n".join(f"server 127.0.0.1:{backend} {found[1]}" for backend in backends), text)


class Names:
    """A name server that gives one list of addresses for every name; `asked` counts how often it has given them."""

    def __init__(self, of_backends: int) -> None:
        self.addresses: list[str] = []
        self.asked = 0
        self.of_backends = of_backends  # the port that all of them listen on
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        self._socket.close()

    def _serve(self) -> None:
        while True:
            try:
                query, client = self._socket.recvfrom(512)
            except OSError:
                return
            question = query[12 : query.index(b"\0", 12) + 5]
            addresses = list(self.addresses)
            head = query[:2] + struct.pack(">5H", 0x8180, 1, len(addresses), 0, 0)
            answers = [b"\xc0\x0c" + struct.pack(">HHIH", 1, 1, 1, 4) + socket.inet_aton(each) for each in addresses]
            self._socket.sendto(head + question + b"".join(answers), client)
            self.asked += 1


class NginxServer(ServerProcess):
    """A running nginx before backends that listen on these ports; the constructor returns when it listens itself."""

    def __init__(self, program: str, folder: Path, backends: Sequence[int] | Names) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        configuration = folder / "nginx.conf"
        configuration.write_text(configured_for(self.port, backends))
        own = {"/tmp/": f"{folder}/", "/etc/nginx/nginx.conf": str(configuration)}  # noqa: S108 - as above
        command = [program, *(own.get(word, word) for word in ARGUMENTS)]
        if os.geteuid() == 0:  # or its helpers would be somebody who may not enter the folder
            command += ["-g", f"user {pwd.getpwuid(0).pw_name};"]
        super().__init__(command, cwd=folder, environ=plain_environ(Path(program).parent), log=folder / "nginx.log")
        try:
            self._wait_to_listen(10)
        except BaseException:
            self.stop()
            raise

    def _wait_to_listen(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        with socket.socket() as client:
            while client.connect_ex(("127.0.0.1", self.port)):
                assert self.process.poll() is None, f"nginx ended:\n{self.log_tail()}"
                assert time.monotonic() < deadline, f"nginx does not listen after {seconds} s:\n{self.log_tail()}"
                time.sleep(0.02)

    def answered_by(self, path: str) -> list[str]:
        """Who was asked for each answer to a path, as the log says: ports and statuses, in their order."""
        return re.findall(rf" {re.escape(path)} \d+ [0-9.]+ s, by (.*)$", self.log_text(), re.MULTILINE)
