"""What a process writes into its log beside the lines of its own."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.support.backend_server import REPOSITORY


def run(*lines: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "\n".join(lines)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False)


def test_a_thread_that_fails_is_a_line_of_json() -> None:
    """As all else is; one that ends by itself says nothing."""
    done = run(
        "import sys, threading",
        "from celestial_backend import logs",
        "logs.configure('INFO', 'json')",
        "for work in (lambda: 1 / 0, sys.exit):",
        "    thread = threading.Thread(target=work, name='work')",
        "    thread.start()",
        "    thread.join()",
    )
    (line,) = done.stderr.splitlines()
    told = json.loads(line)
    assert told["message"] == "The thread work ends"
    assert "ZeroDivisionError" in told["traceback"]


def test_nothing_is_hushed_where_stderr_was_closed() -> None:
    """Number 2 may be any file then; and TensorFlow has to be imported all the same."""
    done = run(
        "import os, sys",
        "from celestial_backend import logs",
        "logs.configure('INFO')",
        "os.close(2)",
        "sys.stderr = None",  # as Python has it that was started with 2>&-
        "with logs.hushed():",
        "    print('imported')",
        "assert os.open('/', os.O_RDONLY) == 2",
        "with logs.hushed():",
        "    print(os.path.sameopenfile(2, os.open('/', os.O_RDONLY)))",
    )
    assert done.stdout.split() == ["imported", "True"]
