"""Small files that others read at any moment."""

from __future__ import annotations

import errno
import os
import secrets
from pathlib import Path


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
