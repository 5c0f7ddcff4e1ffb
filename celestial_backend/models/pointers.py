"""
Which model a project has of its own: a row of the database, which every process reads in every request.

A project without one works with the model that the settings name. While the database is away, the last pointer that
this process has read goes on to count, so that a project is served the model that it was served before.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

from celestial_backend.database import Database, Row, Transaction
from celestial_backend.errors import ModelError, RequestError, StateError
from celestial_backend.models.kept import keep
from celestial_backend.models.registry import Registry
from celestial_backend.settings import Settings, is_project, no_project, project_parts

logger = logging.getLogger(__name__)
LAST_MAX = 10_000  # projects whose last pointer is remembered
AWAY_S = 1.0  # a database that did not answer is asked again after this long, where a last pointer is known
WARN_S = 60.0
READ = "SELECT tag, job, made FROM live WHERE project = :project"
UNFINISHED = "SELECT 1 FROM work WHERE id = :job AND state NOT IN ('published', 'kept')"


@dataclass(frozen=True)
class Pointer:
    """
    A live tag.

    Attributes:
        job: That published it; "" where a person chose it.
        made: When the project was made, which tells it from others of the same number; "" if that is not known.
    """

    tag: str
    job: str = ""
    made: str = ""


NEVER = Pointer("")  # read: in the place of the last pointer


class Pointers:
    """The pointers of all projects; safe between threads and processes."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._last: OrderedDict[str, Pointer | None] = OrderedDict()
        self._noting = threading.Lock()
        self._ask_again = self._warn_again = 0.0  # on the monotonic clock

    def read(self, project: str, within: Transaction | None = None) -> Pointer | None:
        """
        A project's pointer, None without one; while the database is away the last one that was read.

        Args:
            project: Anything that a request may carry; one that tells of another project of the same number has none.
            within: Whose pointer is asked for, without any that is remembered.

        Raises:
            StateError: The database cannot be read, and the pointer of the project never was.
        """
        number, made = project_parts(project)
        if not number:
            return None
        found = _pointer(within.row(READ, project=number)) if within is not None else self._last_known(number)
        return None if found and made and found.made not in ("", made) else found

    def _last_known(self, project: str) -> Pointer | None:
        known = self._last.get(project, NEVER)
        if known is not NEVER and time.monotonic() < self._ask_again:
            return known
        try:
            found = _pointer(self._database.row(READ, project=project))
        except StateError as error:
            if known is NEVER:
                raise
            self._note_away(error)
            return known
        with self._noting:
            self._last[project] = found
            self._last.move_to_end(project)
            while len(self._last) > LAST_MAX:
                self._last.popitem(last=False)
        return found

    def write(self, project: str, pointer: Pointer, transaction: Transaction) -> None:
        """
        Make a tag the live one of a project, for every process as soon as the transaction has ended.

        Raises:
            RequestError: The project is no number.
        """
        if not is_project(project):
            raise RequestError(no_project(project))
        transaction.run(
            "INSERT INTO live (project, tag, job, made) VALUES (:project, :tag, :job,"
            " COALESCE((SELECT made FROM projects WHERE project = :project), ''))"
            " ON CONFLICT (project) DO UPDATE SET tag = excluded.tag, job = excluded.job, made = excluded.made",
            project=project, tag=pointer.tag, job=pointer.job,
        )  # fmt: skip
        self._ask_again = 0.0

    def projects(self) -> dict[str, str]:
        """
        The projects that have a pointer, and the tags, in the order of their numbers.

        Raises:
            StateError: The database cannot be read.
        """
        found = {row["project"]: row["tag"] for row in self._database.rows("SELECT project, tag FROM live")}
        return {project: found[project] for project in sorted(filter(is_project, found), key=int)}

    def _note_away(self, error: StateError) -> None:
        now = time.monotonic()
        self._ask_again = now + AWAY_S
        if now >= self._warn_again:
            self._warn_again = now + WARN_S
            logger.warning("Projects are served the models that were live when that was last known: %s", error)


def take_over_pointers(settings: Settings, transaction: Transaction) -> bool:
    """
    Put the pointer files of releases up to 0.2 into the database, and the models that projects were trained to.

    A pointer that is there already stays. What a training that was killed has saved is not taken: its labels are
    learned again. It is for `Database.old`, after the jobs.
    """
    for path in sorted(settings.state.old_pointers.glob("*.json")):
        pointer = _in_file(path)
        if pointer is not None:
            transaction.run(
                "INSERT INTO live (project, tag, job) VALUES (:project, :tag, :job) ON CONFLICT (project) DO NOTHING",
                project=path.stem, tag=pointer.tag, job=pointer.job,
            )  # fmt: skip
    registry = Registry(settings.bentoml_home)
    for model in registry.models():
        if model.project is not None and not transaction.row(UNFINISHED, job=model.manifest.job or ""):
            _keep(registry, model.tag, transaction)
    return True


def _keep(registry: Registry, tag: str, transaction: Transaction) -> None:
    """Put a model into the database; a line in the log where this machine alone goes on to serve it."""
    try:
        keep(registry, tag, transaction)
    except ModelError as error:
        logger.warning("%s stays on this machine alone: %s", tag, error)


def _in_file(path: Path) -> Pointer | None:
    """The pointer in a file of an older release; a line in the log of one that is none."""
    try:
        told = json.loads(path.read_bytes())
        if is_project(path.stem):
            return Pointer(_text(told["tag"]), _text(told.get("job", "")))
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        logger.warning("The pointer to the live model in live.old/%s cannot be read (%s). Write it anew with: "
                       "python -m celestial_backend models use TAG --project %s",
                       path.name, type(error).__name__, path.stem)  # fmt: skip
    return None


def _text(told: object) -> str:
    if not isinstance(told, str):
        raise TypeError
    return told


def _pointer(row: Row | None) -> Pointer | None:
    return None if row is None else Pointer(row["tag"], row["job"], row["made"])
