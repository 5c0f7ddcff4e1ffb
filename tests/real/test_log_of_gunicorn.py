"""The log of a real web server."""

from __future__ import annotations

import re
import signal
import sys
from pathlib import Path

from tests.support import logging_kept
from tests.support.backend_server import REPOSITORY, ServerProcess, free_port, plain_environ

TIME = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}"
left_as_it_was = logging_kept.left_as_it_was


def test_gunicorn_writes_such_lines_too(tmp_path: Path) -> None:
    """Started as people start it, the web server's own records are lines like all others."""
    port = free_port()
    told = "import logging; logging.getLogger('gunicorn').error('it said %s', 'a\\nb\\x1b[31m')"
    code = (
        "from celestial_backend.web import server\n"
        "class Told(server._Arbiter):\n"
        f"    def start(self): super().start(); {told}; raise SystemExit(0)\n"
        f"server._Arbiter = Told; server.serve(['--no-worker', '-p', '{port}'])\n"
    )
    process = ServerProcess(
        [sys.executable, "-c", code], cwd=REPOSITORY, log=tmp_path / "log",
        environ=plain_environ(Path(sys.executable).parent) | {"MODEL_DIR": str(tmp_path / "state")},
    )  # fmt: skip
    try:
        assert process.process.wait(60) in (0, -signal.SIGTERM), process.log_text()
    finally:
        process.stop()
    *rest, last = process.log_text().splitlines()
    assert re.fullmatch(rf"{TIME} ERROR gunicorn: it said a\\nb\\x1b\[31m", last)
    assert rest
    assert all(re.match(rf"{TIME} [A-Z]+ [\w.]+: ", line) for line in rest)
