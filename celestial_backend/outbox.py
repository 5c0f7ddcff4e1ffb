"""What a run over a project's tasks writes down: the import that is on its way, and the tasks that failed."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from celestial_backend.errors import StateError
from celestial_backend.files import replace_text


@dataclass(frozen=True)
class Sent:
    """An import: the version of its predictions, one of its tasks, and when it was sent, in seconds since 1970."""

    version: str
    task: int
    at: float


class Outbox:
    """The one import of a run that may be on its way; what is noted outlives the run. All raise `StateError`."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def note(self, version: str, task: int) -> None:
        """Write down that an import is on its way; one of its tasks is enough, because all land or none."""
        with _written(self._path):
            replace_text(self._path, json.dumps(asdict(Sent(version, task, time.time()))))

    def sent(self) -> Sent | None:
        """The import that was noted last and not struck out."""
        try:
            with _written(self._path):
                return Sent(**json.loads(self._path.read_text())) if self._path.exists() else None
        except (ValueError, TypeError) as error:
            raise StateError(
                f"{self._path.name} must tell of an import and does not ({type(error).__name__}). Wait a minute, for an"
                f" import that may be on its way, remove {self._path} and run prelabel again."
            ) from error

    def strike(self) -> None:
        """Forget the import: it has landed, or can land no more."""
        with _written(self._path):
            self._path.unlink()


class FailureList:
    """The tasks that failed and why, one JSON object a line; the file is there only if there are any."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def clear(self) -> None:
        """Begin anew."""
        with _written(self.path):
            self.path.unlink(missing_ok=True)

    def add(self, task: object, reason: str) -> None:
        """Add a task."""
        with _written(self.path), self.path.open("a") as file:
            file.write(json.dumps({"task": task, "reason": reason}, ensure_ascii=False) + "\n")


@contextmanager
def _written(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StateError(
            f"{path.name} cannot be written ({error.strerror}). See that its folder belongs to this user and that its"
            " disk has space, and run prelabel again; or give another file with --failures, if it is that one."
        ) from error
