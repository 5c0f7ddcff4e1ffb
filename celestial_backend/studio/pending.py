"""
Tasks without a prediction of a version, by the Data Manager's conditions, and predictions for them in bulk.

Label Studio makes a second prediction of the same version without a word, so who sends asks first what is pending.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from celestial_backend.errors import RequestError, StudioError
from celestial_backend.settings import is_tag
from celestial_backend.studio.client import Studio
from celestial_backend.studio.project import LIVE, PAGE, UNLABELLED, StudioProject, project_models, update_record

LISTED_PARTS = "id,data,predictions,model_version,total_annotations"
TRUTHS = ",is_labeled,annotations,result,was_cancelled,ground_truth,completed_by,updated_at"
LAST = 2**31 - 1  # no task of Label Studio has a larger id
FILTER_RULE = (
    'A filter must be like the Data Manager\'s: {"conjunction": "and", "items": [{"filter": "filter:tasks:…",'
    ' "operator": "…", "type": "…", "value": …}]}'
)
Rows = dict[int, dict[str, Any]]  # task id -> prediction


class ImportFailedError(StudioError):
    """An import of predictions that was not answered with a count; `may_pass` says that it may have landed."""

    def __init__(self, message: str, *, refused: bool, may_pass: bool) -> None:
        super().__init__(message)
        self.refused = refused
        self.may_pass = may_pass


@dataclass(frozen=True)
class Conditions:
    """Conditions as the Data Manager has them, all of which a task must fulfil, or with `either` one of them."""

    items: tuple[dict[str, Any], ...] = ()
    either: bool = False


def read_filter(text: str) -> Conditions:
    """
    The conditions of a Data Manager query.

    Raises:
        RequestError: It is no JSON, or has no conditions that can be used.
    """
    try:
        query = json.loads(text)
    except ValueError as error:
        raise RequestError(f"{FILTER_RULE}. What was given is no JSON: {error}.") from None
    query = query.get("filters", query) if isinstance(query, dict) else {"items": query}
    items = query.get("items") if isinstance(query, dict) else None
    if not isinstance(items, list) or not items:
        raise RequestError(f"{FILTER_RULE}. What was given has no list of items.")
    for item in items:
        if not isinstance(item, dict) or not {"filter", "operator", "type", "value"} <= item.keys():
            raise RequestError(f"{FILTER_RULE}. This item has not all four parts: {json.dumps(item)[:200]}.")
        if not str(item["filter"]).startswith("filter:tasks:"):
            raise RequestError(f"{FILTER_RULE}. This item names no column of tasks: {json.dumps(item)[:200]}.")
    conjunction = query.get("conjunction", "and")
    if conjunction not in ("and", "or"):
        raise RequestError(f'{FILTER_RULE}. Items are joined by "and" or "or", not {str(conjunction)[:20]!r}.')
    either = conjunction == "or" and len(items) > 1
    if either and any(item.get("child_filter") for item in items):
        raise RequestError(f'{FILTER_RULE}. Items joined by "or" cannot have a child_filter; run once for each item.')
    return Conditions(tuple(items), either)


class PendingTasks(StudioProject):
    """
    The tasks that fulfil conditions and hold no prediction of a version; for one thread.

    Label Studio joins conditions in one way only. Where it is "or", it compares ids besides, each as a child of
    a condition, and whether tasks are predicted and labelled is compared here. It compares parts of versions,
    so that too is done here unless `exact` says that no other version holds this one as a part.
    """

    def __init__(
        self,
        studio: Studio,
        project_id: str,
        version: str,
        conditions: Conditions = Conditions(),
        *,
        only_unlabelled: bool = False,
        exact: bool,
        truths: bool = False,
    ) -> None:
        super().__init__(studio, project_id)
        self._version = version
        self._parts = LISTED_PARTS + (TRUTHS if truths else "")
        self._either = conditions.either
        self._only_unlabelled = only_unlabelled
        self._asked = exact and not self._either  # Label Studio, for the version
        more = [UNLABELLED] if only_unlabelled and not self._either else []
        self._fitting = [*conditions.items, *more]
        column = "filter:tasks:predictions_model_versions"
        without = {"filter": column, "operator": "not_contains", "type": "List", "value": [version]}
        self._pending = [*self._fitting, *([without] if self._asked else [])]

    def count(self) -> tuple[int, int]:
        """How many tasks fit, and how many of those are pending."""
        if self._asked:
            return self._read(self._fitting, 1, LAST, 1)[1], self._read(self._pending, 1, LAST, 1)[1]
        fitting = pending = 0
        for page in self._pages(1, LAST, PAGE):
            fitting += len(page)
            pending += sum(not task["held"] for task in page)
        return fitting, pending

    def pages(self, size: int) -> Iterator[list[dict[str, Any]]]:
        """
        The pending tasks by id; a page holds those after the last of the page before.

        Each has ``id`` and ``data``, and where truths are wanted, ``is_labeled`` and ``annotations``, as far as these
        are a ground truth.
        """
        for found in self._pages(1, LAST, size):
            page = [task for task in found if not task["held"]]
            if page:
                yield page

    def still(self, ids: Sequence[int]) -> set[int]:
        """Which of the tasks of one page are pending at this moment."""
        pages = self._pages(min(ids), max(ids), PAGE)
        return {task["id"] for page in pages for task in page if not task["held"]} & set(ids)

    def holds(self, task: int) -> bool:
        """Whether a task holds a prediction of the version, or is not there any more."""
        found, _ = self._read([], task, task, 1)
        return all(each["held"] for each in found)

    def send(self, rows: Rows) -> int:
        """
        Import predictions, in one request that makes all or none of the valid ones.

        Returns:
            How many Label Studio says it has made; of several predictions it drops those that it cannot read.

        Raises:
            ImportFailedError: It did not say that.
        """
        from label_studio_sdk import PredictionRequest

        request = [PredictionRequest(task=task, **row) for task, row in rows.items()]
        failures = self._studio.failures()
        try:
            if self._client is None:
                self._client = self._studio.client()
            return int(self._client.projects.import_predictions(self._number(), request=request).created or 0)
        except failures as error:
            problem, may_pass = self._studio.problem(error, f"an import of {len(rows)} predictions")
            status = getattr(error, "status_code", None)
            self._client = None
            # Of the error itself nothing is kept: it holds cookies.
            raise ImportFailedError(problem, refused=status == 400, may_pass=may_pass or status == 401) from None

    def select(self, failed: int = 0) -> list[str]:
        """
        Make the project show its predictions of the version, and sort and sample by their scores.

        Label Studio asks a model for each task that is opened where the project's version is the model's title, and
        then shows nothing while the backend is down. Any other version stands for stored predictions. So these are
        chosen once each task to be labelled has one, and the title ends in `LIVE`, if a person chose no other;
        `ask_for_new_tasks` chooses the model again.

        Args:
            failed: Tasks that cannot be predicted.

        Returns:
            Sentences that say what was found and changed.
        """
        number, version, said = self._number(), self._version, list[str]()
        records = self.ask("the models of the project", lambda client: project_models(client, number))
        ours = next((record for record in records if record.model_version == version), None)
        stored = ours is None or self.without_predictions(version) <= failed
        title = "" if ours is None else ours.title or ""
        if stored and ours is not None and is_tag(title):
            if title != version + LIVE:
                self.ask("the title", lambda client: update_record(client, ours, title=version + LIVE))
        elif records:
            said = self.show_version(version)
        project = self.ask("the project", lambda client: client.projects.get(number))
        shown, wanted = project.model_version or "", version if stored or is_tag(title) else title
        if shown != wanted:
            self.ask("another version", lambda client: client.projects.update(number, model_version=wanted))
            if shown != version + LIVE:
                said.append(f"The project showed {shown!r} and" if shown else "The project showed no predictions and")
                said[-1] += f" shows those of {wanted} now."
        if ours is None:
            said.append("For tasks that come later, run prelabel again.")
        elif stored:
            said.append("Label Studio shows them while the backend is down, too. It asks it again once tasks come.")
        if project.show_collab_predictions is False:
            said.append("People who label see none before the project's settings, Annotation, allow it.")
        return said

    def _pages(self, first: int, last: int, size: int) -> Iterator[list[dict[str, Any]]]:
        """The tasks that fit, by id, those that are predicted included where Label Studio does not leave them out."""
        total = size + 1
        while total > size and first <= last:
            found, total = self._read(self._pending, first, last, size)
            first = max((task["id"] for task in found), default=last) + 1
            yield [task for task in found if not (self._only_unlabelled and task["labelled"])]

    def _read(
        self, items: Sequence[dict[str, Any]], first: int, last: int, size: int
    ) -> tuple[list[dict[str, Any]], int]:
        """The first tasks with ids from `first` to `last`, by id, and how many there are in all."""
        ids = {"filter": "filter:tasks:id", "operator": "in", "type": "Number", "value": {"min": first, "max": last}}
        if self._either and items:
            filters: dict[str, Any] = {"conjunction": "or", "items": [item | {"child_filter": ids} for item in items]}
        else:
            filters = {"conjunction": "and", "items": [*items, ids]}

        def read(page: Any) -> tuple[dict[int, dict[str, Any]], int]:
            tasks = {
                int(task.id): {
                    "id": int(task.id),
                    "data": task.data,
                    "held": any(each.model_version == self._version for each in task.predictions or ()),
                    "labelled": bool(task.total_annotations),
                    **(_truth(task) if self._parts != LISTED_PARTS else {}),
                }
                for task in page.items or ()  # a condition on annotations gives a task once for each of them
            }
            return tasks, int(page.response.total)

        tasks, total = self._listed(filters, size, self._parts, read)
        if not all(first <= task <= last for task in tasks):
            raise StudioError(
                'This Label Studio cannot join conditions by "or" and look for ids besides (1.23.2 can). Run once for'
                " each of the conditions instead: what is predicted already is passed over."
            )
        return list(tasks.values()), total


def _truth(task: Any) -> dict[str, Any]:
    """What is known of a task's ground truth, in the form of a request of Label Studio's."""
    true = [dict(each) for each in task.annotations or () if each.get("ground_truth")]
    return {"is_labeled": bool(task.is_labeled), "annotations": true} if true else {}
