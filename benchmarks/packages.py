"""The packages that only a peer needs, in a folder of their own that is made on first use."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.bench import BenchmarkError

REQUIREMENTS = Path(__file__).with_name("requirements.txt")


def cache_folder() -> Path:
    """Where what is made once is kept; the tests keep their Label Studio there too."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "celestial-backend"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def peer_packages(say: Callable[[str], None]) -> Path:
    """
    The folder with `requirements.txt`, to be put before all others on the path of imports.

    It counts only once the note that it is complete has been written; a killed installation is made again.

    Raises:
        BenchmarkError: They could not be installed.
    """
    digest = hashlib.sha256(REQUIREMENTS.read_bytes() + sys.version.encode()).hexdigest()[:12]
    cache = cache_folder()
    folder, complete = cache / f"benchmarks-{digest}", cache / f"benchmarks-{digest}.complete"
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not complete.exists():
            say(f"Installing {REQUIREMENTS} into {folder}, once")
            shutil.rmtree(folder, ignore_errors=True)
            command = ["-m", "pip", "install", "--no-deps", "--target", str(folder), "-r", str(REQUIREMENTS)]
            done = subprocess.run(  # noqa: S603 - Python's own pip
                [sys.executable, *command], capture_output=True, text=True, check=False
            )
            if done.returncode:
                raise BenchmarkError(f"The packages of {REQUIREMENTS} cannot be installed: {done.stderr[-800:]}")
            complete.touch()
    return folder
