"""Tasks of a project that hold no prediction of a version yet, and the import of predictions for them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from celestial_backend.errors import RequestError, StudioError
from celestial_backend.project import PAGE, StudioProject
from celestial_backend.studio import Studio

if TYPE_CHECKING:
    from label_studio_sdk import LabelStudio

PARTS = "id,data,predictions,model_version"
UNLABELLED = {"filter": "filter:tasks:total_annotations", "operator": "equal", "type": "Number", "value": 0}
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


def read_filter(text: str) -> list[dict[str, Any]]:
    """
    The conditions of a Data Manager query.

    Raises:
        RequestError: It is no JSON, has no conditions, or joins them by "or".
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
    if query.get("conjunction", "and") != "and" and len(items) > 1:
        raise RequestError(
            f"{FILTER_RULE}. Items joined by {str(query['conjunction'])[:20]!r} are not known; run once for each item."
        )
    return items


class PendingTasks(StudioProject):
    """
    The tasks that fit a filter and hold no prediction of a version; for one thread.

    `exact` says that Label Studio may look for the version itself. It compares parts of
    versions, so it may not when there is a version that holds this one as a part.
    """

    def __init__(
        self, studio: Studio, project_id: str, version: str, items: Sequence[dict[str, Any]], *, exact: bool
    ) -> None:
        super().__init__(studio, project_id)
        self._version = version
        self._fitting = list(items)
        self._pending = list(items)
        if exact:
            column = "filter:tasks:predictions_model_versions"
            self._pending.append({"filter": column, "operator": "not_contains", "type": "List", "value": [version]})
        self._exact = exact

    def count(self) -> tuple[int, int]:
        """How many tasks fit the filter, and how many of those are pending."""
        _, fitting = self._read(self._fitting, 1)
        pending = self._read(self._pending, 1)[1] if self._exact else sum(map(len, self.pages(PAGE)))
        return fitting, pending

    def pages(self, size: int) -> Iterator[list[dict[str, Any]]]:
        """The pending tasks, ``id`` and ``data``, by id; a page holds those after the last of the page before."""
        last, more = 0, True
        while more:
            found, total = self._read([*self._pending, _id("greater", last)], size)
            more, last = total > len(found), max((task["id"] for task in found), default=last)
            page = [task for task in found if not task["held"]]
            if page:
                yield page

    def still(self, ids: Sequence[int]) -> set[int]:
        """Which of the tasks of one page are pending at this moment."""
        wanted, after, more = set(ids), min(ids) - 1, True
        pending: set[int] = set()
        while more:
            bounds = [_id("greater", after), _id("less", max(ids) + 1)]
            found, total = self._read([*self._pending, *bounds], PAGE)
            more, after = total > len(found), max((task["id"] for task in found), default=after)
            pending |= {task["id"] for task in found if not task["held"]}
        return pending & wanted

    def holds(self, task: int) -> bool:
        """Whether a task holds a prediction of the version, or is not there any more."""
        found, _ = self._read([_id("equal", task)], 1)
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

    def select(self) -> list[str]:
        """
        Make the project show its predictions of the version, and sort and sample by their scores.

        Label Studio does so when the project's version, or the title of its backend, is the version of the
        predictions. A title that a person chose stays; then the project is set to the predictions themselves.

        Returns:
            Sentences that say what was found and changed.
        """
        number, version = self._number(), self._version
        records = self._ask("the models of the project", lambda client: client.ml.list(project=number))
        said = self.show_version(version) if records else []
        project = self._ask("the project", lambda client: client.projects.get(number))
        shown = project.model_version or ""
        if shown != version:
            self._ask("another version", lambda client: client.projects.update(number, model_version=version))
            said.append(f"The project showed {shown!r} and" if shown else "The project showed no predictions and")
            said[-1] += f" shows those of {version} now. For tasks that come later, run prelabel again."
        if project.show_collab_predictions is False:
            said.append("People who label see none before the project's settings, Annotation, allow it.")
        return said

    def _read(self, filters: list[dict[str, Any]], size: int) -> tuple[list[dict[str, Any]], int]:
        """The first tasks by id, and how many there are in all."""
        query = json.dumps({"filters": {"conjunction": "and", "items": filters}, "ordering": ["tasks:id"]})

        def call(client: LabelStudio) -> tuple[list[dict[str, Any]], int]:
            page: Any = client.tasks.list(
                project=self._number(), page=1, page_size=size, fields="all", include=PARTS, query=query
            )
            tasks = [
                {
                    "id": int(task.id),
                    "data": task.data,
                    "held": any(each.model_version == self._version for each in task.predictions or ()),
                }
                for task in page.items
            ]
            return tasks, int(page.response.total)

        return self._ask(f"the tasks of project {self.project_id}", call)


def _id(operator: str, value: int) -> dict[str, Any]:
    return {"filter": "filter:tasks:id", "operator": operator, "type": "Number", "value": value}
