"""Disks of a test's own: mounted, filled, and made read-only."""

from __future__ import annotations

import contextlib
import subprocess
from pathlib import Path


def mount(folder: Path) -> bool:
    """Make a folder a disk of its own, of 256 KB; False where nobody may."""
    with contextlib.suppress(OSError):
        return not _run("mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder)
    return False


def unmount(folder: Path) -> None:
    assert not _run("umount", "-l", folder)


def remount(folder: Path, options: str) -> None:
    """Make a disk read-only, `ro`, or writable again, `rw`; perhaps of another size."""
    assert not _run("mount", "-o", f"remount,{options}", folder)


def fill(folder: Path) -> Path:
    """Leave no space on a disk; gives the file to remove."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1024))
    return filler


def _run(*command: str | Path) -> int:
    return subprocess.run(command, capture_output=True, check=False).returncode
