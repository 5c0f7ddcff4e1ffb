"""The image templates that Label Studio ships: each is served, or refused with the reason that our page tells."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from celestial_backend.errors import LabelConfigError
from celestial_backend.labels import ChoiceMap
from tests.support.label_studio import label_studio_program

PAGE = Path(__file__).parents[2] / "docs" / "label-config.md"
RULE = "The label config has no Choices on an Image that the model can serve. "


def outcome(label_config: str) -> str:
    """What becomes of a template, as the page tells it."""
    try:
        found = ChoiceMap.for_learning(label_config)
    except LabelConfigError as error:
        reason = str(error).removeprefix(RULE)
        return f"refused: {reason[0].lower()}{reason[1:]}"
    return "served: " + ", ".join(f"`{control.from_name}`" for control in found.controls)


def test_the_page_tells_what_becomes_of_each_image_template() -> None:
    """All of the Label Studio that the tests run; of several reasons the page tells the first."""
    (folder,) = label_studio_program().parents[1].glob("lib/python3*/site-packages/label_studio/annotation_templates")
    templates = [yaml.safe_load(path.read_text()) for path in folder.rglob("config.yml")]
    found = {each["title"]: outcome(each["config"]) for each in templates if "<Image" in each.get("config", "")}
    told = dict(re.findall(r"^\| (.+?) \| ((?:served|refused): .+?) \|$", PAGE.read_text(), re.MULTILINE))
    assert sorted(found) == sorted(told)
    assert f"ships {len(found)} templates" in PAGE.read_text()
    for title, sentence in told.items():
        assert found[title].startswith(sentence), title
