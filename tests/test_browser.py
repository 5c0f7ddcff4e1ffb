"""What a person sees in Label Studio's own pages, in a real browser."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from backend_server import BODIES, Backends, label_config
from browser import HOW_TO_GET_ONE, Annotator, annotator, find_chromium
from label_studio import LabelStudioServer
from PIL import Image
from playwright.sync_api import expect

from celestial_backend.renderer import render

pytestmark = pytest.mark.timeout(600)


@pytest.fixture
def person(label_studio: LabelStudioServer, tmp_path: Path) -> Iterator[Annotator]:
    """Somebody signed in to Label Studio; TEST_SCREENSHOTS names a folder that keeps what they saw."""
    program = find_chromium()
    if program is None:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(HOW_TO_GET_ONE)
    with annotator(program, label_studio, Path(os.environ.get("TEST_SCREENSHOTS") or tmp_path)) as someone:
        yield someone


def draw(folder: Path, bodies: Sequence[str]) -> list[Path]:
    """A picture file of each body; wide, so that all choices are seen below it."""
    paths = [folder / f"{body}_{number}.png" for number, body in enumerate(bodies)]
    for number, (body, path) in enumerate(zip(bodies, paths, strict=True)):
        picture = Image.new("RGB", (640, 360))
        picture.paste(render(body, seed=number, size_px=360), (140, 0))
        picture.save(path)
    return paths


def test_a_person_gets_pre_selected_choices_and_submits_them(
    label_studio: LabelStudioServer, backends: Backends, person: Annotator, tmp_path: Path
) -> None:
    """
    In a project made in the browser, with the model connected there, the backend's choice is ticked when a task opens.

    One task is submitted as it comes, the other with another choice; both annotations name the prediction they
    came from, so a report can tell later how often the model was right.
    """
    backend = backends(LABEL_STUDIO_URL=label_studio.url, LABEL_STUDIO_API_KEY=label_studio.legacy_token)
    project = person.create_project("Celestial bodies", draw(tmp_path, ("Saturn", "Jupiter")), label_config())
    first, second = sorted(task["id"] for task in label_studio.tasks(project))

    person.fill_in_connect_model(project, "celestial-backend", backend.url)
    person.photograph("connect-model")
    person.validate_and_save()
    expect(person.page.get_by_text("Connected", exact=True)).to_be_visible()
    person.photograph("connected")

    person.label_all_tasks(project)
    person.sees_task(first)
    expect(person.page.locator(".lsf-choices input:checked")).to_have_count(1)
    accepted = person.selected()
    person.photograph("pre-labelled")
    person.submit()

    person.sees_task(second)
    expect(person.page.locator(".lsf-choices input:checked")).to_have_count(1)
    suggested = person.selected()
    changed = next(body for body in BODIES if body not in suggested)
    person.choose(changed)
    assert person.selected() == [changed]
    person.submit()

    tasks = {task["id"]: task for task in label_studio.tasks(project)}
    assert_recorded(tasks[first], backend.model_version, accepted, accepted, origin="prediction")
    assert_recorded(tasks[second], backend.model_version, suggested, [changed], origin="prediction-changed")
    assert person.refused == [], "Label Studio's page asked for something outside this machine"


def assert_recorded(task: dict[str, Any], version: str, shown: list[str], submitted: list[str], origin: str) -> None:
    """The task holds what was shown as a prediction, what was submitted as an annotation, and the way between them."""
    (prediction,), (annotation,) = task["predictions"], task["annotations"]
    assert prediction["result"][0]["value"]["choices"] == shown
    assert prediction["model_version"] == version
    assert annotation["result"][0]["value"]["choices"] == submitted
    assert annotation["result"][0]["origin"] == origin
    assert annotation["parent_prediction"] == prediction["id"]


def test_the_dialog_says_which_choices_the_model_lacks(
    label_studio: LabelStudioServer, backends: Backends, person: Annotator
) -> None:
    """A label config without any class of the model is refused, and the dialog shows both lists of names."""
    backend = backends()
    project = label_studio.create_project("Animals", label_config(["cat", "dog"]))

    person.fill_in_connect_model(project, "celestial-backend", backend.url)
    person.validate_and_save()
    reason = person.page.get_by_text("422 Client Error").last  # the form behind the dialog says it too
    expect(reason).to_be_visible()
    person.photograph("refused")

    told = reason.inner_text()
    assert "'cat', 'dog'" in told
    assert "'Earth'" in told
    assert "'Venus'" in told
    assert label_studio.api("GET", f"/api/ml?project={project}") == []
