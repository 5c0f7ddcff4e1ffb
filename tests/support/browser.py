"""
A person at a Chromium: what the browser tests let it do in Label Studio, in the person's words.

Where buttons of 1.20.0 have other names than those of 1.23.2, either is pressed.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from playwright.sync_api import Locator, Page, expect, sync_playwright

from tests.support.label_studio import LabelStudioServer

HOW_TO_GET_ONE = "No Chromium found for the browser tests; get one with: apt-get install chromium"
ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)
SLOW_MS = 20_000  # longer than anything here takes on a busy machine


def find_chromium() -> str | None:
    programs = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return next(filter(None, map(shutil.which, programs)), None)


class Annotator:
    """One signed-in person at one page; `refused` lists the addresses outside Label Studio that the page asked for."""

    def __init__(self, page: Page, studio: LabelStudioServer, pictures: Path) -> None:
        self.page, self.studio, self.pictures = page, studio, pictures
        self.refused: list[str] = []

    def sign_in(self) -> None:
        self.page.goto(f"{self.studio.url}/user/login/")
        self.page.fill("input[name=email]", self.studio.user)
        self.page.fill("input[name=password]", self.studio.password)
        self.page.keyboard.press("Enter")
        self.page.wait_for_url(lambda address: "login" not in address)

    def create_project(self, title: str, pictures: Sequence[Path], config: str) -> int:
        """Create Project: a name, picture files, a custom template's code; the number of the project, which is open."""
        self.page.goto(f"{self.studio.url}/projects")
        self.page.get_by_role("button", name=re.compile("^Create( (new )?project)?$", re.IGNORECASE)).first.click()
        name = self.page.get_by_label("Project Name")
        expect(name).to_have_value(re.compile("New Project"))  # what the dialog proposes, once it is ready
        name.fill(title)

        self.page.get_by_text("Data Import").click()
        self.page.locator("#file-input").set_input_files(pictures)
        expect(self.page.get_by_text(f"{len(pictures)} files uploaded")).to_be_visible()

        self.page.get_by_text("Labeling Setup").click()
        custom = self.page.get_by_role("button", name="Create custom template")
        custom.or_(self.page.get_by_text("Custom template", exact=True)).first.click()
        self.page.get_by_text("Code", exact=True).click()
        self.page.locator(".CodeMirror").click()
        self.page.keyboard.press("Control+A")
        self.page.keyboard.insert_text(config)
        expect(self.choices).to_have_count(config.count("<Choice "))  # the preview

        self.page.get_by_role("button", name="Save", exact=True).click()
        self.page.wait_for_url(re.compile(r"/projects/\d+/data"))
        return int(self.page.url.split("/")[4])

    def open_project(self, project: int) -> None:
        self.page.goto(f"{self.studio.url}/projects/{project}/data")

    def sees_project(self, project: int) -> None:
        """Its list of tasks; a task that is opened before there is one is drawn twice, the second time empty."""
        self.open_project(project)
        expect(self.page.get_by_text("Label All Tasks")).to_be_visible()

    def open_model_page(self, project: int) -> None:
        self.open_project(project)
        self.page.get_by_role("link", name="Settings", exact=True).click()
        self.page.get_by_role("link", name="Model", exact=True).click()

    def fill_in_connect_model(self, project: int, title: str, url: str) -> None:
        """Settings > Model > Connect Model, with name and address."""
        self.open_model_page(project)
        self.page.get_by_role("button", name=re.compile("Add machine learning model|Connect Model")).click()
        self.page.fill("input[name=title]", title)
        self.page.fill("input[name=url]", url)

    def validate_and_save(self) -> None:
        self.page.get_by_text("Validate and Save").click()

    def open_model_menu(self, project: int) -> None:
        """Settings > Model, and the menu of the model that is connected."""
        self.open_model_page(project)
        self.page.get_by_role("button", name="Machine learning model options").click()
        expect(self.page.get_by_text("Start Training", exact=True)).to_be_visible()

    def start_training(self) -> None:
        """Start Training in the model's menu, which is open, and again in the dialog that asks."""
        self.page.get_by_text("Start Training", exact=True).click()
        with self.page.expect_response(lambda answer: answer.url.endswith("/train") and answer.ok):
            self.page.get_by_role("button", name="Start Training").click()
        expect(self.page.get_by_text("Request Sent!")).to_be_visible()

    def label_all_tasks(self, project: int) -> None:
        self.open_project(project)
        self.page.get_by_text("Label All Tasks").click()

    def quick_view(self, project: int, task: int) -> None:
        """The task beside the list of tasks, as a click on its row opens it."""
        self.page.goto(f"{self.studio.url}/projects/{project}/data?task={task}")
        expect(self.choices.first).to_be_visible()

    def sees_task(self, task: int) -> None:
        expect(self.page.locator(".lsf-current-task__task-id")).to_contain_text(re.compile(rf"^\s*{task}\s*\d+ of"))
        expect(self.choices.first).to_be_visible()

    @property
    def choices(self) -> Locator:
        return self.page.locator(".lsf-choices input[type=checkbox]")

    def selected(self) -> list[str]:
        return [box.get_attribute("name") or "" for box in self.choices.all() if box.is_checked()]

    def choose(self, choice: str) -> None:
        self.page.locator(f".lsf-choices input[name={choice}]").check()

    def submit(self) -> None:
        with self.page.expect_response(lambda answer: "/annotations" in answer.url and answer.ok):
            self.page.get_by_role("button", name=re.compile("^submit( current annotation)?$", re.IGNORECASE)).click()

    def wait_until(self, happens: Callable[[], bool]) -> None:
        """Until the page has come to something."""
        deadline = time.monotonic() + SLOW_MS / 1000
        while not happens():
            assert time.monotonic() < deadline, "the page did not come to it"
            self.page.wait_for_timeout(200)

    def photograph(self, name: str) -> None:
        """Keep what is seen."""
        path = self.pictures / f"{name}.png"
        self.page.screenshot(path=path, animations="disabled")
        shrink(path)


def shrink(picture: Path) -> None:
    """Leave a screenshot so few colours that its file is small."""
    Image.open(picture).convert("RGB").quantize(256).save(picture, optimize=True)


@contextmanager
def annotator(program: str, studio: LabelStudioServer, pictures: Path) -> Iterator[Annotator]:
    """A person signed in to Label Studio; the browser reaches nothing else."""
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=program, args=list(ARGUMENTS))
        context = chromium.new_context(viewport={"width": 1100, "height": 1000})
        context.set_default_timeout(SLOW_MS)
        expect.set_options(timeout=SLOW_MS)
        person = Annotator(context.new_page(), studio, pictures)

        def refuse(route: object) -> None:
            person.refused.append(route.request.url)  # type: ignore[attr-defined]
            route.abort()  # type: ignore[attr-defined]

        context.route(lambda address: not address.startswith((studio.url, "data:", "blob:")), refuse)
        person.sign_in()
        yield person
        chromium.close()
