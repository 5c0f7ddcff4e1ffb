"""What people made of a project's predictions in Label Studio: read to be measured, not to be learned."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from celestial_backend.studio.client import Studio
from celestial_backend.studio.project import LABELLED, PAGE, UNLABELLED, StudioProject

if TYPE_CHECKING:
    from label_studio_sdk import LabelStudio

PARTS = (  # of tasks, annotations and predictions alike
    "id,data,annotations,predictions,result,was_cancelled,ground_truth,completed_by,parent_prediction,created_at,"
    "updated_at,updated_by,lead_time,import_id,bulk_created,score,model_version"
)
PATIENCE_S = 10.0  # a person waits for the report


@dataclass(frozen=True)
class About:
    """
    A project.

    Attributes:
        made: When, as `StudioProject.made` has it.
        link: Where people open it.
        tasks: How many it has.
    """

    title: str
    config: str
    made: str
    link: str
    tasks: int


class ProjectLabels(StudioProject):
    """The labels of a project with all that is told of their making; for one thread."""

    def __init__(self, studio: Studio, project_id: str, patience_s: float = PATIENCE_S) -> None:
        super().__init__(studio, project_id, patience_s)

    def about(self) -> About:
        """
        The project itself.

        Raises:
            ProjectGoneError: Label Studio has no such project.
            StudioError: It stayed away, or refused.
        """
        number = self._number()

        def call(client: LabelStudio) -> About:
            found = client.projects.get(number)
            if found.id != number:
                raise TypeError
            made = str(int(found.created_at.timestamp())) if found.created_at else ""
            link = f"{self._studio.link}/projects/{number}/data"
            return About(str(found.title or ""), str(found.label_config or ""), made, link, int(found.task_number or 0))

        return self.ask(f"project {self.project_id}", call)

    def judged(self) -> Iterator[dict[str, Any]]:
        """
        Every task with a label, by id, as `StudioProject.labelled_tasks`; page by page.

        Yields:
            ``id``, ``data``, ``annotations`` with their times and where they came from, and ``predictions`` with
            ``id``, ``result``, ``score`` and ``model_version``. An annotation that started from a prediction that is
            gone has Label Studio's copy of it as ``prediction``, if there is one: only exports hold it.

        Raises:
            StudioError: As for `about`.
        """
        last = 0
        while True:
            conditions = [LABELLED, {**LABELLED, "filter": "filter:tasks:id", "value": last}]
            page = self._listed({"conjunction": "and", "items": conditions}, PAGE, PARTS, _read)
            self._add_copies(page)
            yield from page
            if len(page) < PAGE:
                return
            last = max(task["id"] for task in page)

    def unlabelled(self, most: int) -> dict[int, dict[str, Any]]:
        """
        The newest tasks without a label: id -> data.

        Args:
            most: How many at the most; one request, however many there are.

        Raises:
            StudioError: As for `about`.
        """

        def read(page: Any) -> dict[int, dict[str, Any]]:
            int(page.response.total)
            return {int(task.id): dict(task.data) for task in page.items or ()}

        return self._listed({"conjunction": "and", "items": [UNLABELLED]}, most, "id,data", read, "-tasks:id")

    def people(self) -> dict[str, str]:
        """
        Everybody's number -> e-mail address, or name.

        Raises:
            StudioError: As for `about`.
        """

        def call(client: LabelStudio) -> dict[str, str]:
            return {str(user.id): str(user.email or user.username or user.id) for user in client.users.list()}

        return self.ask("the people of Label Studio", call)

    def _add_copies(self, page: Sequence[dict[str, Any]]) -> None:
        orphans = {each["id"]: each for task in page for each in task["annotations"] if _is_orphan(each)}
        if not orphans:
            return
        wanted = sorted({task["id"] for task in page for each in task["annotations"] if each["id"] in orphans})
        number = self._number()

        def call(client: LabelStudio) -> list[dict[str, Any]]:
            ids: Any = {"additional_query_parameters": {"ids[]": wanted}}
            parts = client.projects.exports.download_sync(number, export_type="JSON", request_options=ids)
            found = json.loads(b"".join(parts))
            if not isinstance(found, list):
                raise TypeError
            return found

        for task in self.ask(f"an export of {len(wanted)} tasks of project {self.project_id}", call):
            for each in task.get("annotations") or ():
                if each.get("id") in orphans:
                    orphans[each["id"]]["prediction"] = each.get("prediction")


def origins(annotation: Mapping[str, Any]) -> set[str]:
    """What Label Studio's editor says of where the regions of an annotation came from; none of what it did not make."""
    result = annotation.get("result")
    regions = result if isinstance(result, list) else []
    return {str(each["origin"]) for each in regions if isinstance(each, Mapping) and each.get("origin")}


def _is_orphan(annotation: Mapping[str, Any]) -> bool:
    """Whether an annotation started from a prediction that is gone."""
    started = any(origin.startswith("prediction") for origin in origins(annotation))
    return started and annotation.get("parent_prediction") is None


def _read(page: Any) -> list[dict[str, Any]]:
    int(page.response.total)  # which Label Studio says of any page
    return [
        {
            "id": int(task.id),
            "data": dict(task.data),
            "annotations": [dict(each) for each in task.annotations or ()],
            "predictions": [
                {"id": each.id, "result": each.result, "score": each.score, "model_version": each.model_version}
                for each in task.predictions or ()
            ],
        }
        for task in page.items or ()
    ]
