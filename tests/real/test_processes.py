"""Locks between processes whose files come and go, and what a process hands on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from celestial_backend.jobs.processes import is_dead, lock, this_process

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
from celestial_backend.jobs.processes import show_life, this_process

show_life(Path(sys.argv[1]))
print(this_process(), flush=True)
sys.stdin.read()
"""


def test_a_life_is_shown_as_long_as_it_lasts(tmp_path: Path) -> None:
    """By a lock that others find held, and by a name of which this machine knows when nobody has it any more."""
    file = tmp_path / "life"
    process = subprocess.Popen(
        [sys.executable, "-c", SHOWS, file], cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        name = process.stdout.readline().strip()
        with lock(file) as held:
            assert held is None
        assert not is_dead(name)
        process.kill()
        process.wait()
        with lock(file, patience_s=30) as held:
            assert held is not None
        assert is_dead(name)
    finally:
        process.kill()
        process.communicate()


def test_of_processes_elsewhere_nobody_knows() -> None:
    """Those of another machine, of one with the same name, and what is no name of a process."""
    host, _, _, place = this_process().split(":")
    assert is_dead(f"{host}:{2**22 - 1}:1:{place}")
    for name in (f"elsewhere:1:1:{place}", f"{host}:1:1:elsewhere", "", "here", "a:b:c:d", f"{host}:1"):
        assert not is_dead(name)
    assert not is_dead(this_process())


def test_a_lock_is_one_for_the_threads_of_a_process_too(tmp_path: Path) -> None:
    """Whoever holds it removes the file; the next one finds it free."""
    with lock(tmp_path / "lock") as held, lock(tmp_path / "lock") as again:
        assert (held is None, again is None) == (False, True)
        (tmp_path / "lock").unlink()
    with lock(tmp_path / "lock") as held:
        assert held is not None
