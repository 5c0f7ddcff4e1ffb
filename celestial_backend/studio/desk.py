"""What is done to a project's tasks when they are audited and accepted: all of it may be done again, and harms none."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from celestial_backend.studio.labels import ProjectLabels
from celestial_backend.studio.pending import ImportFailedError, PendingTasks, Rows
from celestial_backend.studio.project import LABELLED, PAGE, PATIENCE_S, UNLABELLED
from celestial_backend.studio.tabs import show_predicted

if TYPE_CHECKING:
    from label_studio_sdk import LabelStudio

logger = logging.getLogger(__name__)
PAUSE_S = 3.0  # between two tries of an import
NUMBERS = 1000  # of tasks, that are read at once
FEW = 20  # tasks that are looked at once more right before they are annotated
PARTS = (
    "id,annotations,predictions,result,was_cancelled,ground_truth,completed_by,created_at,updated_at,lead_time,"
    "parent_prediction,unique_id,score,model_version"
)
NOT_SKIPPED = {"filter": "filter:tasks:cancelled_annotations", "operator": "equal", "type": "Number", "value": 0}
NOT_BEGUN = {"filter": "filter:tasks:draft_exists", "operator": "equal", "type": "Boolean", "value": False}


class Desk(ProjectLabels):
    """A project whose tasks are audited and accepted; for one thread."""

    def open_tasks(self) -> Iterator[dict[str, Any]]:
        """
        ``id`` and ``data`` of every task that nobody has labelled, skipped or begun to label, by id.

        Raises:
            StudioError: As for `about`.
        """
        return self._tasks([UNLABELLED, NOT_SKIPPED, NOT_BEGUN], "id,data")

    def open_numbers(self) -> set[int]:
        """
        The numbers of those tasks.

        Raises:
            StudioError: As for `about`.
        """
        found, last = set[int](), 0
        while True:
            later = {**LABELLED, "filter": "filter:tasks:id", "value": last}
            filters = {"conjunction": "and", "items": [UNLABELLED, NOT_SKIPPED, NOT_BEGUN, later]}
            page = self._listed(filters, NUMBERS, "id", lambda page: [int(task.id) for task in page.items or ()])
            found.update(page)
            if len(page) < NUMBERS:
                return found
            last = max(page)

    def chosen(self, tasks: Collection[int]) -> dict[int, dict[str, Any]]:
        """
        Of some tasks, those that are there: ``annotations``, and ``predictions`` with result and version.

        Raises:
            StudioError: As for `about`.
        """
        found: dict[int, dict[str, Any]] = {}
        wanted = sorted(tasks)
        for start in range(0, len(wanted), PAGE):
            part = wanted[start : start + PAGE]
            one = {"filter": "filter:tasks:id", "operator": "in_list", "type": "List", "value": part}
            page = self._listed({"conjunction": "and", "items": [one]}, PAGE, PARTS, _read)
            found |= {task["id"]: task for task in page if task["id"] in part}
        return found

    def remove(self, predictions: Mapping[int, Sequence[int]], *, whole: Collection[int]) -> None:
        """
        Remove predictions, those that are gone already included.

        Args:
            predictions: By task.
            whole: Tasks that hold no others, which Label Studio rids of all at once.

        Raises:
            StudioError: As for `about`; some may have been removed.
        """
        if whole:
            call = partial(_clear, project=self._number(), tasks=sorted(whole))
            self.ask(f"predictions of {len(whole)} tasks to be removed", call)
        for number in (each for task, mine in predictions.items() if task not in whole for each in mine):
            self.ask(f"prediction {number} to be removed", partial(_remove, prediction=number))

    def predict(self, rows: Rows, version: str) -> int:
        """
        Give tasks a prediction, those that nobody has labelled and that have none of this version.

        Args:
            rows: Task -> its prediction, with that version.
            version: No part of another one of the project.

        Returns:
            How many got one.

        Raises:
            StudioError: As for `about`; some may have got one.
        """
        pending, made = PendingTasks(self._studio, self.project_id, version, only_unlabelled=True, exact=False), 0
        for start in range(0, len(rows), PAGE):
            part = {task: rows[task] for task in sorted(rows)[start : start + PAGE]}
            made += self._landed(pending, part)
        return made

    def annotate(self, rows: Mapping[int, Mapping[str, Any]]) -> int:
        """
        Give tasks an annotation, those that nobody has labelled; none twice, by its ``unique_id``.

        Args:
            rows: Task -> ``result`` and ``unique_id``.

        Returns:
            How many got one.

        Raises:
            StudioError: As for `about`; some may have got one.
        """
        made, wanted = 0, sorted(rows)
        for start in range(0, len(wanted), FEW):
            free = {number for number, task in self.chosen(wanted[start : start + FEW]).items()
                    if not task["annotations"]}  # fmt: skip
            for task in sorted(free):
                call = partial(_annotate, task=task, row=rows[task])
                made += self.ask(f"an annotation of task {task}", call)
        return made

    def show_predicted(self, title: str, version: str) -> int | None:
        """As `tabs.show_predicted`."""
        return show_predicted(self, title, version)

    def _landed(self, pending: PendingTasks, rows: Rows) -> int:
        """Import predictions, each once; what an import without an answer has left behind is looked at first."""
        deadline, wanted = time.monotonic() + PATIENCE_S, pending.still(list(rows))
        left = wanted
        while left:
            try:
                pending.send({task: rows[task] for task in left})
            except ImportFailedError as failure:
                if not failure.may_pass or time.monotonic() >= deadline:
                    raise
                logger.warning("%s Looking what has come of it, and trying again.", failure)
                time.sleep(PAUSE_S)
            else:
                return len(wanted) - len(pending.still(list(wanted)))
            left = pending.still(list(wanted))
        return len(wanted)


def _read(page: Any) -> list[dict[str, Any]]:
    int(page.response.total)  # which Label Studio says of any page
    return [
        {
            "id": int(task.id),
            "annotations": [dict(each) for each in task.annotations or ()],
            "predictions": [
                {"id": int(each.id), "result": each.result or [], "version": str(each.model_version or "")}
                for each in task.predictions or ()
            ],
        }
        for task in page.items or ()
    ]


def _remove(client: LabelStudio, prediction: int) -> None:
    _unless(404, lambda: client.predictions.delete(prediction))


def _clear(client: LabelStudio, project: int, tasks: Sequence[int]) -> None:
    chosen: Any = {"all": False, "included": tasks}
    client.actions.create(id="delete_tasks_predictions", project=project, selected_items=chosen)


def _annotate(client: LabelStudio, task: int, row: Mapping[str, Any]) -> bool:
    """Whether it was made: not where it is there already, or the task was deleted."""
    return _unless(409, lambda: _unless(404, lambda: client.annotations.create(task, **row)))


def _unless(status: int, call: Any) -> bool:
    """Whether a call did what it was to do; False where Label Studio says with a status that there is nothing to do."""
    from label_studio_sdk.core.api_error import ApiError

    try:
        return call() is not False
    except ApiError as error:
        if error.status_code != status:
            raise
        return False
