"""What a demonstration shows: pictures that it draws, and a project with a prediction for each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from celestial_backend.errors import StudioError
from celestial_backend.linking import ask, config_for, create_project, find_project, register
from celestial_backend.renderer import BODIES, render
from celestial_backend.settings import Settings
from celestial_backend.studio import Studio
from celestial_backend.uploads import pictures_of, upload

TITLE = "Celestial bodies"
SEED = 2026  # of pictures that no model has learned from
SIZE_PX = 256
RETRIEVE_S = 600


def draw(place: Path, count: int) -> list[Path]:
    """Pictures of the bodies in turn; those that are there from before stay."""
    place.mkdir(exist_ok=True)
    for number in range(count):
        body = BODIES[number % len(BODIES)]
        path = place / f"{number:04}-{body.lower()}.png"
        if not path.exists():
            part = path.with_suffix(".part")
            render(body, (SEED, number), SIZE_PX).save(part, format="png")
            part.replace(path)
    return pictures_of(place)


def prelabelled(url: str, backend_url: str, token: str, pictures: list[Path]) -> dict[str, Any]:
    """A project with a prediction for each picture, through the same steps as `connect`."""
    studio = Studio(Settings(label_studio_url=url, label_studio_api_key=token))
    project = find_project(studio, TITLE)
    if project is None:
        project = create_project(studio, TITLE, config_for(BODIES))
    _forget_others(studio, project, backend_url)
    upload(studio, project, pictures, lambda done, total: None)  # noqa: ARG005 - too few to show
    model = register(studio, project, backend_url, TITLE)
    chosen: Any = {"all": True, "excluded": []}
    ask(
        studio, "predictions",
        lambda client: client.actions.create(
            id="retrieve_tasks_predictions", project=project, selected_items=chosen,
            request_options={"timeout_in_seconds": RETRIEVE_S},
        ),
    )  # fmt: skip
    counted = ask(studio, "the project", lambda client: client.projects.get(project))
    told = {"tasks": counted.task_number or 0, "predictions": counted.total_predictions_number or 0}
    if not told["predictions"]:
        raise StudioError("Label Studio has no predictions of the pictures. See the logs in the folder.")
    return {"project": project, "model_version": model.version, **told}


def _forget_others(studio: Studio, project: int, backend_url: str) -> None:
    """Remove the record of a backend at a port of an earlier day; Label Studio would ask that one only."""
    for record in ask(studio, "the models", lambda client: client.ml.list(project=project)):
        if record.url != backend_url:
            number = int(record.id or 0)
            ask(studio, "the models", lambda client, number=number: client.ml.delete(number))  # type: ignore[misc]
