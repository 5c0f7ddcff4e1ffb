"""What people see while a command works."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

import pytest

from tests.support.backend_server import REPOSITORY

PROGRAM = (
    "from celestial_backend.commands.shown import Shown\n"
    "with Shown({what!r}) as shown:\n    shown(1, 2, words='so far')\n    shown._bar.refresh()\nprint('done')\n"
)


@pytest.mark.parametrize(
    ("encoding", "what"),
    [
        pytest.param("latin-1", "Reading", id="a terminal without the signs of the bar"),
        pytest.param("utf-8", "Reading mod\udce8le", id="a name that is no UTF-8"),
    ],
)
def test_no_sign_that_a_terminal_lacks_ends_the_command(encoding: str, what: str) -> None:
    """It stands there in another form."""
    mine, terminal = pty.openpty()
    try:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM.format(what=what)], stdout=subprocess.PIPE, stderr=terminal, timeout=60,
            check=False, cwd=REPOSITORY, env={**os.environ, "PYTHONIOENCODING": encoding, "TERM": "xterm"},
        )  # fmt: skip
        seen = os.read(mine, 100_000)
    finally:
        os.close(mine)
        os.close(terminal)
    assert done.stdout == b"done\n"
    assert b"1 of 2, so far" in seen
