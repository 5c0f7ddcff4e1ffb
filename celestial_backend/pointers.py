"""
Which model is live for a project: one small file each, replaced in one step.

A project without a file works with the model that the settings name. A file holds
the tag, and the job that published it, so that a job whose worker died right after
the step is known to have done its work.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from celestial_backend.errors import STATE_REMEDY, RequestError, StateError
from celestial_backend.files import replace_text
from celestial_backend.tags import is_project, no_project


@dataclass(frozen=True)
class Pointer:
    """A live tag, and the job that published it; no job where a person chose it."""

    tag: str
    job: str = ""


class Pointers:
    """The pointers of all projects; safe between threads and processes."""

    def __init__(self, model_dir: Path) -> None:
        self._folder = model_dir / "live"

    def read(self, project: str) -> Pointer | None:
        """A project's pointer, None without one; costs some 20 µs."""
        if not is_project(project):  # a request may carry anything
            return None
        try:
            return Pointer(**json.loads(self._path(project).read_bytes()))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, TypeError) as error:
            raise StateError(
                f"The pointer to the live model of project {project} cannot be read ({type(error).__name__}). "
                f"Write it anew with: python -m celestial_backend models use TAG --project {project}"
            ) from error

    def write(self, project: str, pointer: Pointer) -> None:
        """
        Make a tag the live one of a project, at once and for every process.

        Raises:
            RequestError: The project is no number.
            StateError: It could not be written; the old one is live.
        """
        try:
            replace_text(self._path(project), json.dumps(asdict(pointer)))
        except OSError as error:
            raise _unchanged(project, error) from error

    @contextmanager
    def alone(self, project: str) -> Iterator[None]:
        """
        Keep others from changing a project's pointer meanwhile: who publishes looks first at what is live.

        Raises:
            RequestError: The project is no number.
            StateError: The state folder cannot be written.
        """
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            lock = self._path(project).with_suffix(".lock").open("w")
        except OSError as error:
            raise _unchanged(project, error) from error
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def projects(self) -> dict[str, str]:
        """The projects that have a pointer, and the tags, in the order of their numbers."""
        found = sorted(filter(is_project, (path.stem for path in self._folder.glob("*.json"))), key=int)
        return {project: pointer.tag for project in found if (pointer := self.read(project))}

    def _path(self, project: str) -> Path:
        if not is_project(project):
            raise RequestError(no_project(project))
        return self._folder / f"{project}.json"


def _unchanged(project: str, error: OSError) -> StateError:
    return StateError(f"The live model of project {project} cannot be changed ({error.strerror}). {STATE_REMEDY}")
