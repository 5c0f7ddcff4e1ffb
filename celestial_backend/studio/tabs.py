"""A tab of Label Studio's Data Manager that shows chosen tasks, for whoever opens the project."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from celestial_backend.studio.project import StudioProject

if TYPE_CHECKING:
    from label_studio_sdk import LabelStudio

Filter = dict[str, Any]  # as the Data Manager has them
FIRST = "Default"  # the tab that Label Studio's page makes where there is none
HIDDEN = tuple(  # as Label Studio hides them in a new tab; and all that tells of predictions
    f"tasks:{column}"
    for column in (
        "inner_id", "annotations_results", "annotations_ids", "total_predictions", "predictions_score",
        "predictions_model_versions", "predictions_results", "file_upload", "storage_filename", "created_at",
        "updated_at", "updated_by", "avg_lead_time", "draft_exists",
    )
)  # fmt: skip


def show_tasks(project: StudioProject, title: str, tasks: Mapping[int, int | None]) -> int | None:
    """
    Make or renew the tab of a title, so that it shows these tasks and no others; without tasks, remove it.

    Label Studio's API has a filter for a list of tasks, but its page does not know that one, and shows nothing of the
    whole project where a tab has it. The page does have one for a list of annotations, so labelled tasks are named by
    one of theirs. The others have a filter each, of which the page bears some dozen: with 100 it stands still.

    Args:
        project: Of the tasks.
        title: Of the tab; another one of that title is taken for it.
        tasks: Their ids, each with one of the task's annotations; None where it has none.

    Returns:
        The number of the tab; None without tasks.

    Raises:
        StudioError: As for `StudioProject.label_config`.
    """
    return _asked(project, title, _filters(tasks))


def show_predicted(project: StudioProject, title: str, version: str) -> int | None:
    """
    Make or renew the tab of a title, so that it shows the tasks with a prediction of a version, however many.

    Otherwise as `show_tasks`.
    """
    column = "filter:tasks:predictions_model_versions"
    return _asked(project, title, [{"filter": column, "operator": "contains", "type": "List", "value": [version]}])


def _asked(project: StudioProject, title: str, filters: Sequence[Filter]) -> int | None:
    number = int(project.project_id) if project.project_id.isdecimal() else 0
    return project.ask(
        f"the tabs of project {project.project_id}", lambda client: _show(client, number, title, filters)
    )


def _show(client: LabelStudio, project: int, title: str, filters: Sequence[Filter]) -> int | None:
    tabs = client.views.list(project=project)
    mine = [int(tab.id or 0) for tab in tabs if isinstance(tab.data, dict) and tab.data.get("title") == title]
    for tab in mine if not filters else mine[1:]:
        client.views.delete(str(tab))
    if not filters:
        return None
    first: Any = _tab(FIRST)
    if not tabs:  # else people would find no other tasks than these
        client.views.create(project=project, data=first)
    data: Any = _tab(title) | {"filters": {"conjunction": "or", "items": list(filters)}}
    if not mine:
        return int(client.views.create(project=project, data=data).id or 0)
    client.views.update(str(mine[0]), project=project, data=data)
    return mine[0]


def _filters(tasks: Mapping[int, int | None]) -> list[Filter]:
    labelled = " ".join(str(annotation) for annotation in tasks.values() if annotation is not None)
    of_annotations = {"filter": "filter:tasks:annotations_ids", "operator": "contains", "type": "String"}
    return [
        *([of_annotations | {"value": labelled}] if labelled else []),
        *(
            {"filter": "filter:tasks:id", "operator": "equal", "type": "Number", "value": task}
            for task, annotation in tasks.items()
            if annotation is None
        ),
    ]


def _tab(title: str) -> dict[str, Any]:
    return {"title": title, "type": "list", "target": "tasks",
            "hiddenColumns": {"explore": HIDDEN, "labeling": HIDDEN}}  # fmt: skip
