"""
One Label Studio project, through label-studio-sdk: its labels, and the model version that it shows.

A training reads for minutes, and Label Studio may be restarted meanwhile: what may pass
is tried again for a while, what needs a person is said at once.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from celestial_backend.errors import ProjectGoneError, StudioError
from celestial_backend.studio import Studio
from celestial_backend.studio import moment as read_moment
from celestial_backend.tags import is_project, is_tag, no_project

if TYPE_CHECKING:
    from label_studio_sdk import LabelStudio
    from label_studio_sdk.types.ml_backend import MlBackend

logger = logging.getLogger(__name__)
Answer = TypeVar("Answer")

PATIENCE_S = 180.0  # a restart of Label Studio takes less
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 15.0
PAGE = 200  # tasks; larger pages are no faster, and are held in memory here and there
PARTS = (  # of tasks, annotations and predictions alike; all fields would take Label Studio up to three times as long
    "id,data,annotations,predictions,result,was_cancelled,ground_truth,completed_by,parent_prediction,updated_at"
)
MOST_COUNTED = 1000  # tasks that `labels_since` reads one by one: six seconds


def _where(column: str, kind: str, least: object) -> dict[str, Any]:
    """A filter of Label Studio's Data Manager: a column of tasks is greater than something."""
    return {"filter": f"filter:tasks:{column}", "operator": "greater", "type": kind, "value": least}


LABELLED = _where("total_annotations", "Number", 0)


class _Page(NamedTuple):
    tasks: list[dict[str, Any]]
    total: int  # tasks that fit the filters
    labels: int  # of those


class StudioProject:
    """A project of Label Studio; for one thread. Nothing is asked before the first call."""

    def __init__(self, studio: Studio, project_id: str, patience_s: float = PATIENCE_S) -> None:
        self.project_id = project_id
        self._studio = studio
        self._patience_s = patience_s
        self._client: LabelStudio | None = None

    def label_config(self) -> str:
        """
        The label config as it is now; waits for a Label Studio that is away.

        Raises:
            ProjectGoneError: It has no such project.
            StudioError: It stayed away, or refused.
        """
        return self._ask(f"project {self.project_id}", lambda client: _config(client, self._number()))

    def labelled_tasks(self) -> Iterator[dict[str, Any]]:
        """
        Every task with a label, by id, each once, while people go on labelling.

        A page holds the tasks after the last id of the page before, so none is lost or
        doubled when others come or go. Tasks whose every annotation was skipped have no label.

        Yields:
            ``id``, ``data`` (cloud addresses as Label Studio resolves them, if a storage of the
            project fits), ``annotations`` as ``/api/tasks`` gives them, and of the ``predictions``
            ``id`` and ``result``.

        Raises:
            StudioError: As for `label_config`.
        """
        return self._tasks([LABELLED])

    def data(self) -> Iterator[dict[str, Any]]:
        """
        The data of every task, by id.

        Raises:
            StudioError: As for `label_config`.
        """
        return (task["data"] for task in self._tasks([], "id,data"))

    def labels_since(self, moment: str | None) -> int:
        """
        How many labels are new or were changed since a moment.

        Label Studio touches a task when it is labelled, but also when it is predicted, so the
        touched ones are read. When they are more than `MOST_COUNTED`, tasks that were completed
        since are counted instead, which passes over labels that were only changed.

        Args:
            moment: The largest ``updated_at`` of an annotation that was read, as Label Studio
                writes it, or None to count all labels.

        Raises:
            StudioError: As for `label_config`.
        """
        if moment is None:
            return self._page([LABELLED], 1).labels
        since = read_moment(moment)
        text = since.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        touched = [LABELLED, _where("updated_at", "Datetime", text)]
        if self._page(touched, 1).total > MOST_COUNTED:
            return self._page([LABELLED, _where("completed_at", "Datetime", text)], 1).total
        given = (annotation for task in self._tasks(touched) for annotation in task["annotations"])
        return sum(not each.get("was_cancelled") and read_moment(each.get("updated_at")) > since for each in given)

    def show_version(self, tag: str) -> list[str]:
        """
        Bring Label Studio in step with a model that has just become live.

        Asking for the project's backends makes Label Studio ask them for their versions. A title
        that is a tag of ours follows the version, so that scores and sampling by them keep working;
        a project that shows the predictions of an old version is set to the backend instead, so that
        opened tasks are predicted anew. Titles that a person chose stay.

        Returns:
            Sentences that say what was found and changed.

        Raises:
            StudioError: As for `label_config`.
        """
        number = self._number()
        records = self._ask("the model of the project", lambda client: _models(client, number))
        ours = next((record for record in records if record.model_version == tag), None)
        if ours is None:
            return [self._not_connected(tag, records)]
        said = [f"Label Studio shows model version {tag}."]
        title = ours.title or ""
        if is_tag(title) and title != tag:
            self._ask("another title of the model", lambda client: update_record(client, ours, title=tag))
            said.append(f"The model's title was {title} and is {tag} now.")
            title = tag
        shown = self._ask("the project", lambda client: client.projects.get(number).model_version) or ""
        titles = {record.title for record in records} | {title}
        if is_tag(shown) and shown not in titles and shown != tag:
            self._ask("live predictions", lambda client: client.projects.update(number, model_version=title))
            said.append(f"The project showed predictions of {shown} and shows those of the model {title!r} now.")
        return said

    def _tasks(self, filters: list[dict[str, Any]], parts: str = PARTS) -> Iterator[dict[str, Any]]:
        last = 0
        while True:
            tasks = self._page([*filters, _where("id", "Number", last)], PAGE, parts).tasks
            yield from tasks
            if len(tasks) < PAGE:
                return
            last = max(task["id"] for task in tasks)

    def _not_connected(self, tag: str, records: Sequence[MlBackend]) -> str:
        if not records:
            return "The project has no model connected in Label Studio, so nothing was changed there."
        seen = ", ".join(f"{record.title!r} with version {record.model_version}" for record in records)
        return (
            f"No connected model of the project says version {tag}, only {seen}; nothing was changed in Label Studio."
            " Look at the project's settings, Model."
        )

    def _page(self, conditions: list[dict[str, Any]], size: int, parts: str = PARTS) -> _Page:
        def read(page: Any) -> _Page:
            told = page.response
            return _Page([_plain(task) for task in page.items or ()], int(told.total), int(told.total_annotations or 0))

        return self._listed({"conjunction": "and", "items": conditions}, size, parts, read)

    def _listed(self, filters: dict[str, Any], size: int, parts: str, read: Callable[[Any], Answer]) -> Answer:
        """What `read` makes of the first tasks by id that pass the Data Manager's filters, and of their count."""
        query, number = json.dumps({"filters": filters, "ordering": ["tasks:id"]}), self._number()

        def call(client: LabelStudio) -> Answer:
            return read(
                client.tasks.list(project=number, page=1, page_size=size, fields="all", include=parts, query=query)
            )

        return self._ask(f"the tasks of project {self.project_id}", call)

    def _number(self) -> int:
        if not is_project(self.project_id):
            raise StudioError(no_project(self.project_id))
        return int(self.project_id)

    def _ask(self, wanted: str, call: Callable[[LabelStudio], Answer]) -> Answer:
        """What a call gives; tried again, with growing pauses, while patience lasts."""
        failures = self._studio.failures()
        deadline, pause, renewed = time.monotonic() + self._patience_s, FIRST_PAUSE_S, False
        while True:
            try:
                if self._client is None:
                    self._client = self._studio.client()
                return call(self._client)
            except failures as error:
                problem, may_pass = self._studio.problem(error, wanted)
                if getattr(error, "status_code", None) == 401 and self._client is not None and not renewed:
                    self._client, renewed = None, True  # an access token that ran out early; the next one may do
                    continue
                left = deadline - time.monotonic()
                if not may_pass or left <= 0:
                    cause = ProjectGoneError if self._is_gone(error) else StudioError
                    raise cause(problem) from None  # the SDK's own text holds cookies
                pause = min(pause, left)
                logger.warning("Project %s: %s Trying again in %.2g s.", self.project_id, problem, pause)
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)

    def _is_gone(self, error: Exception) -> bool:
        """Whether a call failed as the project is not there: Label Studio itself says so, not a server before it."""
        if getattr(error, "status_code", None) != 404 or self._client is None or not is_project(self.project_id):
            return False
        try:
            self._client.projects.get(self._number())
        except self._studio.failures() as refusal:
            body = getattr(refusal, "body", None)
            return isinstance(body, dict) and body.get("status_code") == 404
        return False


# These run inside `StudioProject._ask`: what they trip over is an answer that is not Label Studio's.


def _plain(task: Any) -> dict[str, Any]:
    """The parts of a task that are used, so that a page does not keep the SDK's objects alive."""
    predictions = [{"id": each.id, "result": each.result} for each in task.predictions or ()]
    annotations = [dict(each) for each in task.annotations or ()]
    return {"id": int(task.id), "data": dict(task.data), "annotations": annotations, "predictions": predictions}


def _config(client: LabelStudio, number: int) -> str:
    project = client.projects.get(number)
    config = project.label_config or ""
    if project.id != number or not isinstance(config, str):
        raise TypeError
    return config


def _models(client: LabelStudio, number: int) -> list[MlBackend]:
    return [record for record in client.ml.list(project=number) if record.id]


def update_record(client: LabelStudio, record: MlBackend, **changes: Any) -> None:
    """Change some of a model's record; Label Studio checks the whole record again, its credentials included."""
    kept = {"title": record.title, "url": record.url, "project": record.project, "extra_params": record.extra_params}
    if record.auth_method == "BASIC_AUTH":  # an empty password stands for the one that is stored
        kept |= {"auth_method": record.auth_method, "basic_auth_user": record.basic_auth_user, "basic_auth_pass": ""}
    client.ml.update(record.id, **kept | changes)
