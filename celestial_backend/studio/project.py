"""
One Label Studio project, through label-studio-sdk: labels, tasks, predictions, and the model version that it shows.

A training reads for minutes, and Label Studio may be restarted meanwhile: what may pass is tried again for a while,
what needs a person is said at once.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from datetime import UTC
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from celestial_backend.errors import ProjectGoneError, StudioError
from celestial_backend.settings import is_project, is_tag, no_project
from celestial_backend.studio.client import Studio, is_certified
from celestial_backend.studio.client import moment as read_moment

if TYPE_CHECKING:
    from label_studio_sdk import LabelStudio
    from label_studio_sdk.types.ml_backend import MlBackend

logger = logging.getLogger(__name__)
Answer = TypeVar("Answer")

PATIENCE_S = 180.0  # a restart of Label Studio takes less
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 15.0
PAGE = 200  # tasks; larger pages are no faster, and are held in memory here and there
PARTS = (  # of tasks, annotations and predictions alike; all fields would take Label Studio up to three times as long
    "id,data,annotations,predictions,result,was_cancelled,ground_truth,completed_by,parent_prediction,updated_at,"
    "lead_time"
)
LABELS = "id,data,annotations,result,was_cancelled,ground_truth,completed_by,updated_at,lead_time"
PREDICTED = "id,is_labeled,predictions,model_version,annotations,parent_prediction"
MOST_COUNTED = 1000  # tasks that `labels_since` reads one by one: six seconds
REMOVE_S = 10.0  # a training goes on for so long after it was published, to remove old predictions
REMOVE_PATIENCE_S = 3.0  # for a Label Studio that is away meanwhile; there is another time
REMOVE_PAGE = 50  # tasks; what is read of them is done at once, while people go on labelling
UNLABELLED = {"filter": "filter:tasks:total_annotations", "operator": "equal", "type": "Number", "value": 0}
OPEN = {"filter": "filter:tasks:completed_at", "operator": "empty", "type": "Datetime", "value": True}
LIVE = " (live)"  # ends the title of a model whose version's stored predictions are shown, so that it is another one


def _where(column: str, kind: str, least: object) -> dict[str, Any]:
    """A filter of Label Studio's Data Manager: a column of tasks is greater than something."""
    return {"filter": f"filter:tasks:{column}", "operator": "greater", "type": kind, "value": least}


def _all_of(*conditions: dict[str, Any]) -> dict[str, Any]:
    return {"conjunction": "and", "items": conditions}


LABELLED = _where("total_annotations", "Number", 0)
PREDICTED_TWICE = _where("total_predictions", "Number", 1)


class Labels(NamedTuple):
    """How many labels a project has; and a moment, "" without labels, after which a task is touched by a newer one."""

    total: int
    moment: str


class Removed(NamedTuple):
    """How many old predictions were removed, and whether time was up before all were."""

    total: int
    some_left: bool


class _Page(NamedTuple):
    tasks: list[dict[str, Any]]
    total: int  # tasks that fit the filters
    labels: int  # of those


class _Predicted(NamedTuple):
    """
    A task with predictions.

    Attributes:
        ours: The numbers of our models' predictions, and their versions.
        referred: The numbers of those that annotations refer to.
        is_done: It has as many annotations as it shall have.
    """

    number: int
    ours: tuple[tuple[int, str], ...]
    referred: frozenset[int]
    is_done: bool

    def replaced(self, live: str, shown: str) -> list[int]:
        """The predictions that go, as `StudioProject.remove_replaced` says, the newest first."""
        others = [each for each in self.ours if each[1] != live and each[0] not in self.referred]
        others.sort(key=lambda each: (each[1] == shown, each[0]), reverse=True)
        needs_none = self.is_done and not self.referred.isdisjoint(number for number, _ in self.ours)
        return [number for number, _ in (others if needs_none else others[1:])]


class StudioProject:
    """A project of Label Studio; for one thread. Nothing is asked before the first call."""

    def __init__(self, studio: Studio, project_id: str, patience_s: float = PATIENCE_S) -> None:
        self.project_id = project_id
        self._studio = studio
        self._patience_s = patience_s
        self._client: LabelStudio | None = None

    def sibling(self, project_id: str) -> StudioProject:
        """Another project of the same Label Studio, asked over the same connection, by the same thread."""
        other = StudioProject(self._studio, project_id, self._patience_s)
        other._client = self._client
        return other

    def label_config(self) -> str:
        """
        The label config as it is now; waits for a Label Studio that is away.

        Raises:
            ProjectGoneError: It has no such project.
            StudioError: It stayed away, or refused.
        """
        return self.ask(f"project {self.project_id}", lambda client: _config(client, self._number()))

    def made(self) -> str:
        """
        When it was made, in whole seconds since 1970, as Label Studio tells its backends; "" if it does not say.

        Raises:
            ProjectGoneError: It has no such project.
            StudioError: As for `label_config`.
        """
        made = self.ask(f"project {self.project_id}", lambda client: _project(client, self._number()).created_at)
        return str(int(made.timestamp())) if made else ""

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

    def annotations(self) -> Iterator[list[dict[str, Any]]]:
        """
        The annotations of every labelled task, as those of `labelled_tasks`; in half its time.

        Raises:
            StudioError: As for `label_config`.
        """
        return (task["annotations"] for task in self._tasks([LABELLED], LABELS))

    def data(self) -> Iterator[dict[str, Any]]:
        """
        The data of every task, by id.

        Raises:
            StudioError: As for `label_config`.
        """
        return (task["data"] for task in self._tasks([], "id,data"))

    def tasks(self) -> Iterator[dict[str, Any]]:
        """
        ``id`` and ``data`` of every task, by id.

        Raises:
            StudioError: As for `label_config`.
        """
        return self._tasks([], "id,data")

    def labelled(self) -> Iterator[int]:
        """
        The id of every task with a label.

        Raises:
            StudioError: As for `label_config`.
        """
        return (task["id"] for task in self._tasks([LABELLED], "id,data"))

    def labels_now(self) -> Labels:
        """
        The labels as they are at this moment; one quick request, however many there are.

        Raises:
            StudioError: As for `label_config`.
        """

        def read(page: Any) -> Labels:
            touched = [task.updated_at.isoformat() for task in page.items or ()]
            labels = int(page.response.total) and int(page.response.total_annotations)
            return Labels(labels, touched[0] if touched else "")

        return self._listed(_all_of(LABELLED), 1, "id,updated_at", read, "-tasks:updated_at")

    def labels_since(self, moment: str | None) -> int:
        """
        How many labels are new or were changed since a moment, but for those that `finish` has accepted.

        Label Studio touches a task when it is labelled, but also when it is predicted, so the
        touched ones are read. When they are more than `MOST_COUNTED`, tasks that were completed
        since are counted instead, which passes over labels that were only changed.

        Args:
            moment: The largest ``updated_at`` of an annotation that was read, or that of `labels_now`,
                as Label Studio writes it; without one all labels are counted.

        Raises:
            StudioError: As for `label_config`.
        """
        if not moment:
            return self._page([LABELLED], 1).labels
        since = read_moment(moment)
        text = since.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        touched = [LABELLED, _where("updated_at", "Datetime", text)]
        if self._page(touched, 1).total > MOST_COUNTED:
            return self._page([LABELLED, _where("completed_at", "Datetime", text)], 1).total
        given = (annotation for task in self._tasks(touched) for annotation in task["annotations"])
        counted = (each for each in given if not each.get("was_cancelled") and not is_certified(each))
        return sum(read_moment(each.get("updated_at")) > since for each in counted)

    def in_step(self, tag: str, *, keep_predictions: bool) -> list[str]:
        """
        Bring Label Studio in step with a model that a training has just made live: `show_version`, `remove_replaced`.

        Old predictions are removed for some seconds. What is left of them, also where Label Studio
        goes away, is no error: the worker goes on later, and so does the next training.

        Args:
            tag: The live model.
            keep_predictions: CELESTIAL_KEEP_PREDICTIONS: none is removed.

        Returns:
            Sentences that say what was found and changed.

        Raises:
            StudioError: As for `label_config`, where the version could not be shown.
        """
        said = self.show_version(tag)
        if keep_predictions:
            return said
        try:
            hasty = StudioProject(self._studio, self.project_id, REMOVE_PATIENCE_S)
            removed = hasty.remove_replaced(tag, REMOVE_S)
        except StudioError as error:
            logger.warning("Project %s: old predictions are not removed now: %s", self.project_id, error)
            return [*said, f"Old predictions are removed after the next training: {error}"]
        if removed.total:
            more = ", and more follow" if removed.some_left else ""
            said.append(f"Predictions of older models were removed: {removed.total}{more}.")
        return said

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
        records = self.ask("the model of the project", lambda client: project_models(client, number))
        ours = next((record for record in records if record.model_version == tag), None)
        if ours is None:
            return [self._not_connected(tag, records)]
        said = [f"Label Studio shows model version {tag}."]
        title = ours.title or ""
        if is_tag(title) and title != tag:
            self.ask("another title of the model", lambda client: update_record(client, ours, title=tag))
            said.append("The model's title is the same now.")
            title = tag
        shown = self.ask("the project", lambda client: client.projects.get(number).model_version) or ""
        titles = {record.title for record in records} | {title}
        if is_tag(shown) and shown not in titles and shown != tag:
            self.ask("live predictions", lambda client: client.projects.update(number, model_version=title))
            named = f"The project showed predictions of {shown} and shows those of the model {title!r} now."
            said.append("The project shows its predictions now." if title == tag else named)
        return said

    def ask_for_new_tasks(self) -> None:
        """
        Have the model asked again where stored predictions are shown that it has outgrown.

        That is where tasks have come since, or where `PendingTasks.select` chose a version that is not live any more.

        Raises:
            StudioError: As for `label_config`.
        """
        number = self._number()
        shown = self.ask("the project", lambda client: client.projects.get(number).model_version) or ""
        if not is_tag(shown):
            return
        records = self.ask("the model of the project", lambda client: project_models(client, number))
        ours = next((record for record in records if is_tag(record.model_version or "")), None)
        if ours is None or shown in {record.title for record in records}:
            return
        chosen, title = (ours.title or "") == shown + LIVE, ours.title or ""
        if ours.model_version != shown:
            said = self.show_version(ours.model_version or "") if chosen else []
        elif not self._has_newer_tasks(shown):
            return
        elif chosen:
            said = self.show_version(shown)
        else:
            said = [f"The model {title!r} is asked again, as tasks have come."]
            self.ask("live predictions", lambda client: client.projects.update(number, model_version=title))
        if said:
            logger.info("Project %s: %s", self.project_id, " ".join(said))

    def _has_newer_tasks(self, tag: str) -> bool:
        """Whether tasks are to be labelled that are newer than the newest with a prediction of a version."""
        column = "filter:tasks:predictions_model_versions"
        of_tag = {"filter": column, "operator": "contains", "type": "List", "value": [tag]}

        def newest(page: Any) -> int:
            return max((int(task.id) for task in page.items or ()), default=0)

        last = self._listed(_all_of(of_tag), 1, "id", newest, "-tasks:id")
        return self._listed(_all_of(OPEN, _where("id", "Number", last)), 1, "id", newest) > 0

    def unpredicted(self) -> tuple[str, int]:
        """
        The version that a model of ours told last, and how many tasks to be labelled hold no prediction of it.

        Raises:
            StudioError: As for `label_config`.
        """
        records = self.ask("the models of the project", lambda client: project_models(client, self._number()))
        version = next((record.model_version for record in records if is_tag(record.model_version or "")), "") or ""
        return version, self.without_predictions(version) if version else 0

    def without_predictions(self, version: str) -> int:
        """
        How many tasks are to be labelled and hold no prediction of a version.

        Raises:
            StudioError: As for `label_config`.
        """
        column = "filter:tasks:predictions_model_versions"
        without = {"filter": column, "operator": "not_contains", "type": "List", "value": [version]}
        return self._listed(_all_of(OPEN, without), 1, "id", lambda page: int(page.response.total))

    def has_our_model(self) -> bool:
        """
        Whether a model of ours is connected, be it by what address; Label Studio keeps the version each told last.

        Raises:
            StudioError: As for `label_config`.
        """
        records = self.ask("the models of the project", lambda client: project_models(client, self._number()))
        return any(is_tag(record.model_version or "") for record in records)

    def remove_replaced(self, tag: str, seconds: float) -> Removed:
        """
        Remove the predictions of our older models that newer ones have replaced, so that they do not pile up.

        Label Studio keeps every prediction and sends all of a task along with each request. Of a
        task with several, these stay:

        - the live model's;
        - those that an annotation refers to, be it skipped, as their parent prediction;
        - one other of ours: of the version that the project shows, or else the newest. It is what
          the quick view and the Data Manager show until the task is predicted anew (the label
          stream asks a live model whenever a task is opened), and what somebody may have open at
          this moment: Label Studio refuses an annotation whose parent prediction is gone. A task
          that has all its annotations, and one among them that refers to a prediction, needs none;
        - all whose version is no tag of ours.

        So a task has at most two of ours, and beyond those only what annotations refer to. They are
        removed one by one, each in a moment. Label Studio can remove all of a version at once, but takes
        those along that annotations refer to, lets nobody submit meanwhile (SQLite; 2,000 took
        55 s), and switches live predictions off.

        Args:
            tag: The live model.
            seconds: How long to go on at most.

        Raises:
            StudioError: As for `label_config`; some may have been removed.
        """
        deadline, total, last, number = time.monotonic() + seconds, 0, 0, self._number()
        shown = self.ask("the project", lambda client: _project(client, number).model_version) or ""
        while True:
            filters = _all_of(PREDICTED_TWICE, _where("id", "Number", last))
            tasks = self._listed(filters, REMOVE_PAGE, PREDICTED, _predicted)
            for prediction in (each for task in tasks for each in task.replaced(tag, shown)):
                if time.monotonic() > deadline:
                    return Removed(total, some_left=True)
                self.ask(f"prediction {prediction} to be removed", partial(_remove, prediction=prediction))
                total += 1
            if len(tasks) < REMOVE_PAGE:
                return Removed(total, some_left=False)
            last = max(task.number for task in tasks)

    def remove_of_done(self, wanted: Collection[tuple[int, str]]) -> set[tuple[int, str]]:
        """
        Remove predictions from those tasks that have as many annotations as they shall have.

        Args:
            wanted: Tasks, and of each the version of its prediction.

        Returns:
            Those that are not there any more; with their tasks, too.

        Raises:
            StudioError: As for `label_config`; some may have been removed.
        """
        over, left = set[tuple[int, str]](), sorted({task for task, _ in wanted})
        while left:
            some, left = left[:REMOVE_PAGE], left[REMOVE_PAGE:]
            one = {"filter": "filter:tasks:id", "operator": "equal", "type": "Number"}
            these = {"conjunction": "or", "items": [one | {"value": task} for task in some]}
            found = self._listed(these, REMOVE_PAGE, PREDICTED, _predicted)
            over |= {each for each in wanted if each[0] in set(some) - {task.number for task in found}}
            for task in (task for task in found if task.is_done):
                for prediction, version in task.ours:
                    if (task.number, version) in wanted:
                        self.ask(f"prediction {prediction} to be removed", partial(_remove, prediction=prediction))
                over |= {each for each in wanted if each[0] == task.number}
        return over

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

        return self._listed(_all_of(*conditions), size, parts, read)

    def _listed(
        self, filters: dict[str, Any], size: int, parts: str, read: Callable[[Any], Answer], order: str = "tasks:id"
    ) -> Answer:
        """What `read` makes of the first tasks in an order that pass the Data Manager's filters, and of their count."""
        query, number = json.dumps({"filters": filters, "ordering": [order]}), self._number()

        def call(client: LabelStudio) -> Answer:
            return read(
                client.tasks.list(project=number, page=1, page_size=size, fields="all", include=parts, query=query)
            )

        return self.ask(f"the tasks of project {self.project_id}", call)

    def _number(self) -> int:
        if not is_project(self.project_id):
            raise StudioError(no_project(self.project_id))
        return int(self.project_id)

    def ask(self, wanted: str, call: Callable[[LabelStudio], Answer]) -> Answer:
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


# These run inside `StudioProject.ask`: what they trip over is an answer that is not Label Studio's.


def _plain(task: Any) -> dict[str, Any]:
    """The parts of a task that are used, so that a page does not keep the SDK's objects alive."""
    predictions = [{"id": each.id, "result": each.result} for each in task.predictions or ()]
    annotations = [dict(each) for each in task.annotations or ()]
    return {"id": int(task.id), "data": dict(task.data), "annotations": annotations, "predictions": predictions}


def _predicted(page: Any) -> list[_Predicted]:
    int(page.response.total)  # which Label Studio says of any page
    return [
        _Predicted(
            int(task.id),
            tuple(
                (int(each.id), each.model_version) for each in task.predictions or () if is_tag(str(each.model_version))
            ),
            frozenset(int(parent) for each in task.annotations or () if (parent := each.get("parent_prediction"))),
            bool(task.is_labeled),
        )
        for task in page.items or ()
    ]


def _remove(client: LabelStudio, prediction: int) -> None:
    from label_studio_sdk.core.api_error import ApiError

    try:
        client.predictions.delete(prediction)
    except ApiError as error:
        if error.status_code != 404:  # others were quicker
            raise


def _project(client: LabelStudio, number: int) -> Any:
    project = client.projects.get(number)
    if project.id != number:
        raise TypeError
    return project


def _config(client: LabelStudio, number: int) -> str:
    config = _project(client, number).label_config or ""
    if not isinstance(config, str):
        raise TypeError
    return config


def project_models(client: LabelStudio, number: int) -> list[MlBackend]:
    """The models that are connected to a project."""
    return [record for record in client.ml.list(project=number) if record.id]


def update_record(client: LabelStudio, record: MlBackend, **changes: Any) -> None:
    """Change some of a model's record; Label Studio checks the whole record again, its credentials included."""
    kept = {"title": record.title, "url": record.url, "project": record.project, "extra_params": record.extra_params}
    if record.auth_method == "BASIC_AUTH":  # an empty password stands for the one that is stored
        kept |= {"auth_method": record.auth_method, "basic_auth_user": record.basic_auth_user, "basic_auth_pass": ""}
    client.ml.update(record.id, **kept | changes)
