"""What a person sees in Label Studio's own pages, in a real browser."""

from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from playwright.sync_api import expect

from celestial_backend.commands.report import report
from celestial_backend.planets.renderer import render
from celestial_backend.settings import NEEDS_LABELS, Settings
from celestial_backend.studio.setup import config_for
from celestial_backend.trust import album
from tests.support.backend_server import BODIES, Backends, label_config
from tests.support.browser import Annotator
from tests.support.label_studio import LabelStudioServer, labelled
from tests.support.prelabelling import Command
from tests.support.reports import planets_report

pytestmark = pytest.mark.timeout(600)


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
    if not label_studio.is_before("1.23"):  # 1.20.0 asks for Google's tag manager, whatever is set
        assert person.refused == [], "Label Studio's page asked for something outside this machine"


def test_stored_predictions_are_seen_while_the_backend_is_down(
    label_studio: LabelStudioServer, backends: Backends, person: Annotator, tmp_path: Path
) -> None:
    """In the label stream and in the quick view. Once it is up again, it is asked for the tasks that come."""
    backend = backends(LABEL_STUDIO_URL=label_studio.url, LABEL_STUDIO_API_KEY=label_studio.legacy_token)
    project = label_studio.create_project("Stored", label_config())
    label_studio.upload(project, draw(tmp_path, ("Saturn", "Jupiter")))
    first, second = sorted(task["id"] for task in label_studio.tasks(project))
    version = backend.model_version
    label_studio.connect_backend(project, backend.url, version)
    command = Command(label_studio, backend.state, backend.store)
    assert command(project)["predicted"] == 2
    assert command(project)["predicted"] == 0, "a second time changes nothing"
    backend.kill_group()

    person.label_all_tasks(project)
    person.sees_task(first)
    expect(person.page.locator(".lsf-choices input:checked")).to_have_count(1)
    person.photograph("stored")
    person.submit()
    person.sees_task(second)
    expect(person.page.locator(".lsf-choices input:checked")).to_have_count(1)
    person.quick_view(project, second)
    expect(person.page.locator(".lsf-choices input:checked")).to_have_count(1)

    again = backends(**command.settings | {"PORT": str(backend.port), "LOG_LEVEL": "INFO"})
    label_studio.upload(project, draw(tmp_path, ("Mars",)))
    third = max(task["id"] for task in label_studio.tasks(project))
    again.wait_for_log(f"Project {project}: ")
    person.label_all_tasks(project)
    person.sees_task(second)
    person.submit()
    person.sees_task(third)
    expect(person.page.locator(".lsf-choices input:checked")).to_have_count(1)
    assert [each["model_version"] for each in label_studio.predictions(project)] == [version] * 3


def assert_recorded(task: dict[str, Any], version: str, shown: list[str], submitted: list[str], origin: str) -> None:
    """The task holds what was shown as a prediction, what was submitted as an annotation, and the way between them."""
    (prediction,), (annotation,) = task["predictions"], task["annotations"]
    assert prediction["result"][0]["value"]["choices"] == shown
    assert prediction["model_version"] == version
    assert annotation["result"][0]["value"]["choices"] == submitted
    assert annotation["result"][0]["origin"] == origin
    assert annotation["parent_prediction"] == prediction["id"]


def test_the_dialog_says_why_a_label_config_cannot_be_served(
    label_studio: LabelStudioServer, backends: Backends, person: Annotator
) -> None:
    """A label config that has controls, and none that can be served, is refused; choices that are new are not."""
    backend = backends()
    config = label_config(["cat", "dog"])
    texts = config.replace("<Choices", "<Labels").replace("</Choices", "</Labels").replace("<Choice ", "<Label ")
    project = label_studio.create_project("Boxes", texts)

    person.fill_in_connect_model(project, "celestial-backend", backend.url)
    person.validate_and_save()
    reason = person.page.get_by_text("422 Client Error").last  # the form behind the dialog says it too
    expect(reason).to_be_visible()
    person.photograph("refused")
    assert "no Choices on an Image" in reason.inner_text()
    assert label_studio.api("GET", f"/api/ml?project={project}") == []

    label_studio.api("PATCH", f"/api/projects/{project}/", json={"label_config": config})
    person.fill_in_connect_model(project, "celestial-backend", backend.url)
    person.validate_and_save()
    expect(person.page.get_by_text("Connected", exact=True)).to_be_visible()
    assert label_studio.model(project)["model_version"] == NEEDS_LABELS


FRUITS = (
    "apple", "banana", "cherry", "date", "elderberry", "fig", "grape", "hazelnut", "lemon", "mango", "nectarine",
    "orange", "papaya", "quince", "raspberry", "strawberry", "tangerine", "walnut", "watermelon", "zucchini",
)  # fmt: skip
SCREENS = {"1366x768": (1366, 768, (2, 14, 60)), "1920x1080": (1920, 1080, (10, 30, 60))}  # with counts of choices
SHAPES = {"landscape": (1600, 900), "portrait": (900, 1600)}
BOXES = """() => {
    const boxes = selector => [...document.querySelectorAll(`.lsf-main-view ${selector}`)].map(element => {
        const box = element.getBoundingClientRect();
        return [box.left, box.top, box.right, box.bottom];
    });
    const room = document.querySelector(".lsf-main-content")?.getBoundingClientRect();
    const bar = document.querySelector(".lsf-bottombar")?.getBoundingClientRect();
    return room && bar && {  // nothing while the editor is drawn anew
        pictures: boxes("img"), choices: boxes(".lsf-choice"), drawn: boxes("canvas").length,
        room: [room.left, room.top, Math.min(room.right, innerWidth), Math.min(bar.top, innerHeight)],
    };
}"""


def names(count: int) -> list[str]:
    """As many names of choices, of up to twelve letters."""
    return [FRUITS[n % len(FRUITS)] + (f" {n // len(FRUITS) + 1}" if n >= len(FRUITS) else "") for n in range(count)]


def shapes(folder: Path) -> list[Path]:
    """A wide and a high picture."""
    for shape, size in SHAPES.items():
        Image.new("RGB", size, "teal").save(folder / f"{shape}.png")
    return [folder / f"{shape}.png" for shape in SHAPES]


def settled_boxes(person: Annotator, count: int) -> dict[str, Any]:
    """Left, top, right and bottom of what the open task shows, once nothing moves any more."""
    deadline, seen = time.monotonic() + 60, {}
    expect(person.page.locator(".lsf-main-view .lsf-choice")).to_have_count(count)
    while time.monotonic() < deadline:
        person.page.wait_for_timeout(500)
        seen, before = person.page.evaluate(BOXES), seen
        if seen and seen == before and seen["drawn"] > 2 and len(seen["choices"]) == count:
            return seen
    pytest.fail(f"the page does not come to rest: {seen}")


def is_inside(box: Sequence[float], room: Sequence[float]) -> bool:
    return box[0] >= room[0] and box[1] >= room[1] and box[2] <= room[2] and box[3] <= room[3]


@pytest.mark.parametrize("screen", SCREENS.values(), ids=SCREENS)
def test_picture_and_all_choices_are_in_sight(
    label_studio: LabelStudioServer, person: Annotator, tmp_path: Path, screen: tuple[int, int, tuple[int, ...]]
) -> None:
    """Of two to sixty choices, beside pictures of any shape, with the list of tasks and Label Studio's panels open."""
    width, height, counts = screen
    person.page.set_viewport_size({"width": width, "height": height})
    for count in counts:
        project = label_studio.create_project(f"{count} choices at {width}", config_for(names(count)))
        label_studio.upload(project, shapes(tmp_path))
        person.sees_project(project)
        for task in label_studio.tasks(project):
            person.page.goto(f"{label_studio.url}/projects/{project}/data?task={task['id']}")
            seen = settled_boxes(person, count)
            (picture,) = seen["pictures"]
            assert is_inside(picture, seen["room"])
            assert max(picture[2] - picture[0], picture[3] - picture[1]) > 300
            assert [box for box in seen["choices"] if not is_inside(box, seen["room"])] == []
            assert min(box[0] for box in seen["choices"]) >= picture[2]
    person.page.keyboard.press("2")
    assert person.selected() == [names(2)[1]]


def test_what_is_ticked_of_very_many_choices_is_in_sight(
    label_studio: LabelStudioServer, person: Annotator, tmp_path: Path
) -> None:
    """They scroll beside the picture, a field filters them, and the prediction stays where it is seen."""
    person.page.set_viewport_size({"width": 1366, "height": 768})
    project = label_studio.create_project("Very many choices", config_for(names(200)))
    label_studio.upload(project, shapes(tmp_path))
    task, other = (each["id"] for each in label_studio.tasks(project))
    region = {"from_name": "choice", "to_name": "image", "type": "choices", "value": {"choices": [names(200)[150]]}}
    rows = [{"task": each, "result": [region], "model_version": "v"} for each in (task, other)]
    label_studio.api("POST", f"/api/projects/{project}/import/predictions", json=rows)
    label_studio.api("PATCH", f"/api/projects/{project}/", json={"model_version": "v"})

    person.sees_project(project)
    for each in (task, other):
        person.page.goto(f"{label_studio.url}/projects/{project}/data?task={each}")
        expect(person.page.locator(".lsf-choices input:checked")).to_have_count(1)
        seen = settled_boxes(person, 200)
        expect(person.page.locator(f'.lsf-choices input[name="{names(200)[150]}"]')).to_be_checked()
        expect(person.page.locator(".lsf-choices input:checked")).to_have_count(1)
        assert is_inside(seen["choices"][150], seen["room"])
        assert is_inside(seen["pictures"][0], seen["room"])
    field = person.page.get_by_placeholder("Quick Filter")
    field.fill("zucchini 7")
    expect(person.page.locator(".lsf-choice:visible")).to_have_count(1)
    person.page.locator(".lsf-choice:visible input").check()
    field.fill("")
    seen = settled_boxes(person, 200)
    assert person.selected() == ["zucchini 7"]
    assert is_inside(seen["choices"][names(200).index("zucchini 7")], seen["room"])


def noise(seed: int) -> str:
    """A small picture that stands in the task itself; another one for each seed."""
    picture = Image.fromarray(np.random.default_rng(seed).integers(0, 255, (4, 4, 3), np.uint8)).resize((64, 64))
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"


def test_a_report_makes_a_tab_of_exactly_the_tasks_to_look_at_again(
    label_studio: LabelStudioServer, model_store: Path, person: Annotator, tmp_path: Path
) -> None:
    """
    As many as a tab takes; it is renewed, stands behind the tab of all tasks, and shows nothing of predictions.

    Here the same pictures stand in many tasks, and people have labelled them differently.
    """
    project = label_studio.create_project("Looked at again", label_config())
    settings = replace(
        Settings(), model_dir=tmp_path, bentoml_home=model_store, label_studio_url=label_studio.url,
        label_studio_api_key=label_studio.legacy_token,
    )  # fmt: skip

    def reported(labels: Sequence[tuple[int, str]]) -> dict[str, Any]:
        """What the command says once these pictures have got these labels too."""
        body = [
            {"data": {"image": noise(seed)}, "annotations": [labelled(choice) | {"ground_truth": True}]}
            for seed, choice in labels
        ]
        label_studio.api("POST", f"/api/projects/{project}/import", json=body)
        arguments = ["--project", str(project), "--quality-tab", "--json", "--output", str(tmp_path / "report.html")]
        done = CliRunner().invoke(report, arguments, obj=settings)
        assert done.exit_code == 0, done.output
        return dict(json.loads(done.stdout))

    def seen(shown: int, of: int) -> tuple[set[str], list[str]]:
        """The tasks of the tab as far as they fit the window, and the words of the page; all tasks are seen first."""
        found: set[str] = set()
        person.open_project(project)
        expect(person.page.get_by_text(f"Tasks: {of} / {of}")).to_be_visible()
        with person.page.expect_response(lambda answer: "/api/tasks?" in answer.url) as answer:
            person.page.get_by_text("To look at again", exact=True).click()
        expect(person.page.get_by_text(f"Tasks: {shown} / {of}")).to_be_visible()
        found |= {str(task["id"]) for task in answer.value.json()["tasks"]}
        return found, person.page.inner_text("body").split("\n")

    again = reported([(1, "Mars"), (1, "Moon"), (2, "Saturn"), (2, "Saturn")])["again"]
    tasks, words = seen(2, 4)
    assert tasks == set(again)
    assert {"Default", "ID", "Completed"} <= set(words)
    assert not [word for word in words if word.startswith("Prediction ")]

    again = reported([(3, choice) for _ in range(55) for choice in ("Mars", "Moon")])["again"]
    assert len(again) == 100
    tasks, _ = seen(100, 114)
    assert tasks
    assert tasks <= set(again)
    tabs = {tab["data"]["title"]: tab["id"] for tab in label_studio.api("GET", f"/api/dm/views/?project={project}")}
    assert list(tabs) == ["Default", "To look at again"]
    query = f"/api/tasks?project={project}&view={tabs['To look at again']}&page_size=200"
    assert {str(task["id"]) for task in label_studio.api("GET", query)["tasks"]} == set(again)
    assert (tmp_path / "report.html").read_text().count("<img ") == 4


def test_a_report_fits_every_screen_and_needs_nothing_from_elsewhere(person: Annotator, tmp_path: Path) -> None:
    """A phone's and a wide one, light and dark, and paper: only tables may be wider, which are moved by themselves."""
    page, colours = person.page, set()
    page.goto("about:blank")  # away from Label Studio, which asks for more itself up to 1.20
    person.refused.clear()
    page.set_content(planets_report(tmp_path))
    for width in (400, 1100):
        page.set_viewport_size({"width": width, "height": 1400})
        for scheme in ("dark", "light"):
            page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
            assert page.evaluate("document.documentElement.scrollWidth") == width
            colours.add(page.evaluate("getComputedStyle(document.querySelector('a')).color"))
    person.photograph("report")
    assert len(colours) == 2
    assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    assert page.evaluate("document.images.length") >= album.TELLING_MAX
    page.emulate_media(media="print")
    page.set_viewport_size({"width": 688, "height": 1000})  # what A4 holds
    assert page.evaluate("[...document.querySelectorAll('table')].every(one => one.scrollWidth <= 688)")
    assert person.refused == []
