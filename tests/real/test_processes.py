"""Locks between processes whose files come and go, and what a process hands on."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from celestial_backend.jobs.processes import is_shown, lock

REPOSITORY = Path(__file__).parents[2]
TURNS = """
import os, sys
from pathlib import Path
from celestial_backend.jobs.processes import lock

path, inside = Path(sys.argv[1], "lock"), Path(sys.argv[1], "inside")
for _ in range(200):
    with lock(path, patience_s=60) as held:
        assert held is not None
        inside.mkdir()  # fails where somebody else is inside
        inside.rmdir()
        path.unlink()
"""


def test_a_lock_whose_file_is_removed_is_held_by_one(tmp_path: Path) -> None:
    """Who waited for a file that the holder has removed does not take it for the new one."""
    command = [sys.executable, "-c", TURNS, tmp_path]
    several = [subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    told = [process.communicate(timeout=300)[1] for process in several]
    assert ([process.returncode for process in several], told) == ([0] * 4, [""] * 4)
    assert not (tmp_path / "lock").exists()


SHOWS = """
import sys, time
from pathlib import Path
from celestial_backend.jobs.processes import show_life

show_life(Path(sys.argv[1]))
print("shown", flush=True)
sys.stdin.read()
"""


def test_a_life_is_shown_as_long_as_one_of_several_lives(tmp_path: Path) -> None:
    """The second takes over when the first is killed."""
    file = tmp_path / "work" / "life"
    assert not is_shown(file)
    several = [
        subprocess.Popen(
            [sys.executable, "-c", SHOWS, file], cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for _ in range(2)
    ]  # fmt: skip
    try:
        assert [process.stdout.readline() for process in several if process.stdout] == [b"shown\n"] * 2
        for process in several:
            assert is_shown(file)
            process.kill()
            process.wait()
            if process is several[0]:
                deadline = time.monotonic() + 30
                while not is_shown(file):  # the second waits in a thread, which a busy machine lets sleep
                    assert time.monotonic() < deadline
        assert not is_shown(file)
    finally:
        for process in several:
            process.kill()
            process.communicate()


def test_a_lock_is_one_for_the_threads_of_a_process_too(tmp_path: Path) -> None:
    """Whoever holds it removes the file; the next one finds it free."""
    with lock(tmp_path / "lock") as held, lock(tmp_path / "lock") as again:
        assert (held is None, again is None) == (False, True)
        (tmp_path / "lock").unlink()
    with lock(tmp_path / "lock") as held:
        assert held is not None
