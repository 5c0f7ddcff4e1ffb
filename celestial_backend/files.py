"""Files that others read at any moment, and nobody else."""

from __future__ import annotations

import errno
import os
import secrets
import stat
from contextlib import suppress
from pathlib import Path


def private(folder: Path) -> None:
    """
    Keep what this process and its children make to their user; called at the start of each program.

    Args:
        folder: The state folder. If it is there and ours, nobody else gets into it from now on. One of another
            user, such as a volume, or one that all may write to, such as /tmp, is left as it is.
    """
    os.umask(0o077)
    with suppress(OSError):
        found = folder.stat()
        if found.st_uid == os.geteuid() and not found.st_mode & stat.S_ISVTX:
            folder.chmod(0o700)


def replace_text(path: Path, text: str) -> None:
    """
    Put text into a file in one step: whoever reads sees the old or the new, whatever ends this process.

    Raises:
        OSError: It could not be written; the old file is there as before.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}-{secrets.token_hex(4)}")  # process ids are not unique between containers
    try:
        with fresh.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
    except OSError:
        fresh.unlink(missing_ok=True)
        raise


def reason(error: OSError) -> str:
    """Why a disk did not do it, also where a library has put the error into one of its own."""
    known = [os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)]
    return error.strerror or next((text for text in known if text in str(error)), type(error).__name__)
