"""The state folder: what lies where in it, and how files are written that others read at any moment."""

from __future__ import annotations

import errno
import os
import secrets
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class StateFolder:
    """
    What lies where in MODEL_DIR; says it, and makes nothing.

    What is in `work` is of use only while somebody works, and may be deleted when nobody does.
    """

    root: Path

    @property
    def database(self) -> Path:
        """Jobs, projects and live models, unless CELESTIAL_DATABASE_URL names another place."""
        return self.root / "celestial.db"

    @property
    def old_jobs(self) -> Path:
        """The list of jobs of releases up to 0.2, a SQLite file."""
        return self.root / "jobs.db"

    @property
    def queue(self) -> Path:
        """The queue, a SQLite file of Huey's."""
        return self.root / "queue.db"

    @property
    def old_pointers(self) -> Path:
        """The folder of releases up to 0.2 with a file for each project that has a live model of its own."""
        return self.root / "live"

    @property
    def imported(self) -> Path:
        """Which exported model was imported, and as what."""
        return self.root / "imported.json"

    @property
    def connection(self) -> Path:
        """Label Studio's address and token, as `connect` was given them; for this user alone."""
        return self.root / "label-studio.json"

    @property
    def features(self) -> Path:
        """The folder of remembered features, unless CELESTIAL_CACHE_DIR names one."""
        return self.root / "cache"

    @property
    def demo(self) -> Path:
        """Where the demonstration keeps all that is its own."""
        return self.root / "demo"

    def classes(self, tag: str) -> Path:
        """What a model names, known without loading it."""
        return self.root / "classes" / f"{tag.replace(':', '-')}.json"

    def job(self, job_id: str) -> Path:
        """The folder of a training, gone when it has ended."""
        return self.root / "work" / job_id

    def prelabel_lock(self, project: str) -> Path:
        """Held while a command predicts a project's tasks."""
        return self.root / "work" / f"prelabel-{project}.lock"

    def prelabel_sent(self, project: str) -> Path:
        """Which import of predictions is on its way."""
        return self.root / "work" / f"prelabel-{project}.sent"

    def prelabel_failures(self, project: str) -> Path:
        """The tasks of a project that could not be predicted, and why."""
        return self.root / f"prelabel-{project}-failures.jsonl"

    def report(self, project: str) -> Path:
        """The page of a project's report, unless another place is asked for."""
        return self.root / f"report-{project}.html"

    def certificate(self, project: str) -> Path:
        """The page of what was accepted in a project, unless another place is asked for."""
        return self.root / f"certificate-{project}.html"


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


def written_at(path: Path) -> int:
    """When a file was written, in nanoseconds; 0 if it is not there."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def reason(error: OSError) -> str:
    """Why a disk did not do it, also where a library has put the error into one of its own."""
    known = [os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)]
    return error.strerror or next((text for text in known if text in str(error)), type(error).__name__)
