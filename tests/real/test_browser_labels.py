"""Label configs of which the page decides what is right: what is ticked there, and what Submit keeps of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import expect

from celestial_backend.planets.renderer import render
from tests.support.backend_server import Backends, BackendServer
from tests.support.browser import Annotator
from tests.support.label_studio import LabelStudioServer

pytestmark = pytest.mark.timeout(600)
WHEN = 'visibleWhen="choice-selected" whenTagName="level"'
DEPENDENT = f"""
<View>
  <Image name="image" value="$image"/>
  <Choices name="level" toName="image" showInline="true">
    <Choice value="Gas giant" alias="gas" predicted_values="Jupiter,Saturn,Uranus,Neptune"/>
    <Choice value="Rocky" predicted_values="Mercury,Venus,Earth,Mars" hint="has a ground"/>
  </Choices>
  <Choices name="giant" toName="image" {WHEN} whenChoiceValue="Gas giant">
    <Choice value="Jupiter"/><Choice value="Saturn"/><Choice value="Uranus"/><Choice value="Neptune"/>
  </Choices>
  <View {WHEN} whenChoiceValue="Rocky">
    <Choices name="rock" toName="image"><Choice value="Mercury"/><Choice value="Venus"/><Choice value="Earth"/>
      <Choice value="Mars"/></Choices>
  </View>
</View>
"""
TAXONOMY = """
<View>
  <Image name="image" value="$image"/>
  <Taxonomy name="kind" toName="image">
    <Choice value="Planet"><Choice value="Ringed" alias="ringed"><Choice value="Saturn" alias="sat"/></Choice>
      <Choice value="Mars"/></Choice>
    <Choice value="Moon"/>
  </Taxonomy>
</View>
"""
FEW = """
<View>
  <Image name="image" value="$image"/>
  <Choices name="body" toName="image"><Choice value="Saturn"/><Choice value="Erde"/><Choice value="Mond"/>
    <Choice value="Sonstiges"/></Choices>
</View>
"""

ANY_CASE = """
<view>
  <image name="image" value="$image"/>
  <choices name="body" toName="image" CHOICE="multiple"><choice VALUE="Saturn" ALIAS="ringed"/><CHOICE value="Mars"/>
  </choices>
  <choices name="other" TONAME="image"><choice value="Ring" PREDICTED_VALUES="Saturn"/><choice Value="Mars"/></choices>
</view>
"""


@pytest.fixture
def backend(label_studio: LabelStudioServer, backends: Backends) -> BackendServer:
    return backends(
        LABEL_STUDIO_URL=label_studio.url,
        LABEL_STUDIO_API_KEY=label_studio.legacy_token,
        CELESTIAL_LABEL_STUDIO_DATA=label_studio.data_folder,
    )


def pictures(folder: Path, bodies: Sequence[str]) -> list[Path]:
    paths = [folder / f"{body}.png" for body in bodies]
    for path in paths:
        render(path.stem, seed=5, size_px=300).save(path)
    return paths


def ticked(person: Annotator) -> list[str]:
    """What is seen on the page as ticked: of Choices, and of a Taxonomy."""
    seen = [box for box in person.page.locator(".lsf-choices input").all() if box.is_visible()]
    tags = person.page.locator(".ant-select-selection-item, .taxonomy [data-testid^=selected]").all()
    return [box.get_attribute("name") or "" for box in seen if box.is_checked()] + [
        tag.inner_text().strip() for tag in tags if tag.is_visible()
    ]


def kept(label_studio: LabelStudioServer, project: int) -> dict[str, dict[str, Any]]:
    """What Submit has kept of each picture, by control."""
    names = {task["id"]: Path(task["data"]["image"]).stem.partition("-")[2] for task in label_studio.tasks(project)}
    return {
        names[each["task"]]: {region["from_name"]: region["value"][region["type"]] for region in each["result"]}
        for each in label_studio.annotations(project)
    }


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        pytest.param(DEPENDENT, {
            "Saturn": (["Gas giant", "Saturn"], {"level": ["gas"], "giant": ["Saturn"]}),
            "Mars": (["Rocky", "Mars"], {"level": ["Rocky"], "rock": ["Mars"]}),
        }, id="dependent choices and groups"),
        pytest.param(TAXONOMY, {
            "Saturn": (["Saturn"], {"kind": [["Planet", "ringed", "sat"]]}),
            "Moon": (["Moon"], {"kind": [["Moon"]]}),
        }, id="Taxonomy"),
        pytest.param(FEW, {
            "Saturn": (["Saturn"], {"body": ["Saturn"]}), "Jupiter": ([], {}),
        }, id="classes without a choice"),
        pytest.param(ANY_CASE, {
            "Saturn": (["Saturn", "Ring"], {"body": ["ringed"], "other": ["Ring"]}),
        }, id="tags and attributes in any case"),
    ],
)  # fmt: skip
def test_what_is_ticked_is_what_was_meant_and_submit_keeps_it(
    label_studio: LabelStudioServer,
    backend: BackendServer,
    person: Annotator,
    tmp_path: Path,
    config: str,
    expected: dict[str, tuple[list[str], dict[str, Any]]],
) -> None:
    """Each task is opened and submitted as it comes."""
    project = label_studio.create_project("As the page shows it", config)
    label_studio.upload(project, pictures(tmp_path, list(expected)))
    label_studio.connect_backend(project, backend.url)
    name_of = {task["id"]: Path(task["data"]["image"]).stem.partition("-")[2] for task in label_studio.tasks(project)}
    person.label_all_tasks(project)
    for task in sorted(name_of):
        expect(person.page.locator(".lsf-current-task__task-id")).to_contain_text(str(task))
        wanted = expected[name_of[task]][0]
        person.wait_until(lambda wanted=wanted: ticked(person) == wanted)
        person.photograph(f"as-shown-{name_of[task]}")
        person.submit()
    assert kept(label_studio, project) == {name: result for name, (_, result) in expected.items()}


FORMS = ("$pictures[0].file", "$picture.file", "$one", "URL/data/upload/$folder/$name", "/data/upload/$folder/$name")


@pytest.mark.parametrize("value", FORMS)
def test_a_picture_that_the_page_shows_is_predicted(
    label_studio: LabelStudioServer, backend: BackendServer, person: Annotator, tmp_path: Path, value: str
) -> None:
    """Whatever the form of `value` that the editor finds it with."""
    config = FEW.replace("$image", value.replace("URL", label_studio.url))
    project = label_studio.create_project("Forms of value", FEW)
    (address,) = label_studio.upload(project, pictures(tmp_path, ["Saturn"])).values()
    (uploaded,) = label_studio.tasks(project)
    label_studio.api("DELETE", f"/api/tasks/{uploaded['id']}/")
    label_studio.api("PATCH", f"/api/projects/{project}/", json={"label_config": config})
    _, _, _, folder, name = address.split("/")
    data = {"pictures": [{"file": address}], "picture": {"file": address}, "folder": folder, "name": name,
            "one": [address]}  # fmt: skip
    label_studio.api("POST", f"/api/projects/{project}/import", json=[{"data": data}])
    label_studio.connect_backend(project, backend.url)
    person.label_all_tasks(project)
    person.wait_until(lambda: ticked(person) == ["Saturn"])
    width = "() => Math.max(0, ...[...document.querySelectorAll('.lsf-main-view img')].map(each => each.naturalWidth))"
    person.wait_until(lambda: person.page.evaluate(width) == 300)
    person.submit()
    (annotation,) = label_studio.annotations(project)
    assert annotation["result"][0]["value"] == {"choices": ["Saturn"]}
