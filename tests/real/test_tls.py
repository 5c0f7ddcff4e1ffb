"""gunicorn with a certificate, and our threads."""

from __future__ import annotations

import os
import shutil
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.backend_server import REPOSITORY, ServerProcess, free_port, plain_environ

APP = "def app(environ, start_response):\n    start_response('200 OK', [('Content-Length', '2')])\n    return [b'ok']\n"
WORKER = "celestial_backend.web.connections.Worker"
WAIT_S = 30


@pytest.fixture
def port(tmp_path: Path) -> Iterator[int]:
    """A gunicorn of one app that says ok, over TLS."""
    if shutil.which("openssl") is None:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)("making a certificate needs openssl")
    make = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -keyout key.pem -out cert.pem"
    subprocess.run(make.split(), cwd=tmp_path, capture_output=True, check=True)
    (tmp_path / "ok.py").write_text(APP)
    port = free_port()
    options = f"-m gunicorn ok:app -b 127.0.0.1:{port} --certfile cert.pem --keyfile key.pem --worker-class {WORKER}"
    environ = plain_environ(Path(sys.executable).parent) | {"PYTHONPATH": str(REPOSITORY)}
    server = ServerProcess([sys.executable, *options.split()], cwd=tmp_path, environ=environ, log=tmp_path / "log")
    try:
        server.wait_for_log("Booting worker")
        yield port
    finally:
        server.stop()


def connect(port: int, folder: Path) -> ssl.SSLSocket:
    trusting = ssl.create_default_context(cafile=folder / "cert.pem")
    deadline = time.monotonic() + WAIT_S
    while True:
        try:
            link = socket.create_connection(("127.0.0.1", port), WAIT_S)
            return trusting.wrap_socket(link, server_hostname="localhost")
        except ConnectionRefusedError:
            assert time.monotonic() < deadline
            time.sleep(0.1)


def test_a_connection_is_kept_under_tls(port: int, tmp_path: Path) -> None:
    """Each request on it is answered, and as a client of TLS can read it."""
    with connect(port, tmp_path) as link:
        for _ in range(3):
            link.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            said = b""
            while not said.endswith(b"\r\n\r\nok"):
                part = link.recv(4096)
                assert part
                said += part
            assert said.startswith(b"HTTP/1.1 200 OK")
