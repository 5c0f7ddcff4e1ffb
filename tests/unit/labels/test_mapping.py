"""Label config ↔ classes: what is read, what is predicted, what Label Studio's own reader says to it."""

from __future__ import annotations

import math
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from xml.sax.saxutils import quoteattr

import numpy as np
import pytest
from hypothesis import given, seed
from hypothesis import strategies as st
from label_studio_sdk.label_interface import LabelInterface

from celestial_backend.errors import FetchError, LabelConfigError, ModelError
from celestial_backend.labels import ChoiceMap, Columns, value_of
from tests.support.cases import cases

CLASSES = ["Earth", "Mars", "Moon"]
IMAGE = '<Image name="image" value="$image"/>'
GUIDE = (
    f'<View>{IMAGE}<Choices name="choice" toName="image"><Choice value="Earth"/><Choice value="Mars"/>'
    '<Choice value="Moon"/></Choices></View>'
)


def config(*choices: str, head: str = "", image: str = IMAGE) -> str:
    """A config with one Choices tag, `head` being more of its attributes and each choice those of a Choice."""
    inside = "".join(f"<Choice {choice}/>" for choice in choices)
    return f'<View>{image}<Choices name="choice" toName="image" {head}>{inside}</Choices></View>'


def values(*names: str, head: str = "") -> str:
    return config(*(f"value={quoteattr(name)}" for name in names), head=head)


def one(label_config: str, classes: list[str] = CLASSES) -> Any:
    """The only control that is served."""
    (control,) = ChoiceMap.from_config(label_config, classes).controls
    return control


def chosen(label_config: str, *row: float, classes: list[str] = CLASSES) -> tuple[list[str], float]:
    """The choices predicted for one picture, and the task's score."""
    choice_map = ChoiceMap.from_config(label_config, classes)
    result, score = choice_map.prediction(dict.fromkeys(choice_map.data_keys, row))
    return [choice for region in result for choice in region["value"]["choices"]], score


CORPUS = [
    pytest.param(GUIDE, id="the guide's"),
    pytest.param(values("EARTH", "MARS", head='choice="single"'), id="single"),
    pytest.param(values("earth ", head='choice="single-radio"'), id="single-radio"),
    pytest.param(values(*CLASSES, head='choice="multiple"'), id="multiple"),
    pytest.param(values(*CLASSES, head='model_score_threshold="0.5"'), id="threshold"),
    pytest.param(values(*CLASSES, head='choice="multiple" model_score_threshold="0.2"'), id="multiple, threshold"),
    pytest.param(config('value="Our planet" alias="home" hotkey="e" predicted_values="Earth, Mars"', 'value="Moon"'),
                 id="alias, predicted_values, hotkey"),
    pytest.param(config('value="Earth" alias="e"', 'value="Moon"'), id="alias of a value"),
    pytest.param(f'<View>{IMAGE}<Choices name="c" toName="image"><Choice value="Rocky"><Choice value="Earth"/>'
                 '<Choice value="Mars"/></Choice></Choices></View>', id="nested"),
    pytest.param(f'<View>{IMAGE}<Choices name="c" toName="image"><View><View><Choice value="Earth"/></View></View>'
                 '</Choices></View>', id="views between"),
    pytest.param('<View><Choices name="first" toName="b"><Choice value="Earth"/></Choices><Image name="a" value="$x"/>'
                 '<Image name="b" value="$y"/><Choices name="d" toName="a"><Choice value="Mars"/></Choices></View>',
                 id="two controls, two images, control before object"),
    pytest.param('<View><Text name="t" value="$t"/><Image name="i" value="$i"/><Choices name="c" toName="t,i">'
                 '<Choice value="Moon"/></Choices></View>', id="several toNames"),
    pytest.param(f'<View>{IMAGE}<Taxonomy name="t" toName="image"><Choice value="Rocky"><Choice value="Earth"/>'
                 '<Choice value="Mars" alias="m"/></Choice><Choice value="Moon"/></Taxonomy></View>', id="Taxonomy"),
    pytest.param(f'<View>{IMAGE}<Taxonomy name="t" toName="image" leafsOnly="true" maxUsages="1"><Choice value="Moon">'
                 '<Choice value="Earth"/></Choice></Taxonomy></View>', id="leaves of a Taxonomy"),
    pytest.param(config('value="Earth"', image='<Image name="image" value="$data.image.url"/>'), id="dotted"),
    pytest.param(config('value="Earth"', image='<Image name="image" value="$undefined$"/>'), id="$undefined$"),
    pytest.param(f'<View><!-- {{"data": {{"image": "x"}}}} --><Header value="$h"/>{IMAGE}<Style>.a{{}}</Style>'
                 '<Choices name="c" toName="image" perRegion="false"><!-- --><Choice value="Moon"/></Choices></View>',
                 id="comment, header, style"),
    pytest.param(f'<View>{IMAGE}<RectangleLabels name="r" toName="image"><Label value="Earth"/></RectangleLabels>'
                 '<Choices name="c" toName="image"><Choice value="Earth"/></Choices>'
                 '<TextArea name="t" toName="image"/></View>', id="beside other controls"),
    pytest.param(values("Earth", "Good", "Été <&> \"'"), id="choices that are no class"),
]


@pytest.mark.parametrize("label_config", CORPUS)
@pytest.mark.parametrize("row", [(0.7, 0.2, 0.1), (0.1, 0.45, 0.45), (0.0, 0.0, 0.0), (math.nan, 2.0, -1.0)])
def test_label_studio_accepts_every_prediction(label_config: str, row: tuple[float, ...]) -> None:
    """Each prediction passes Label Studio's validation, with ids that differ and choices that are offered."""
    choice_map = ChoiceMap.from_config(label_config, CLASSES)
    result, score = choice_map.prediction(dict.fromkeys(choice_map.data_keys, row))
    interface = LabelInterface(label_config)
    prediction = {"result": result, "score": score, "model_version": "celestial:1"}
    assert interface.validate_prediction(prediction, return_errors=True) == []
    assert len({region["id"] for region in result}) == len(result)
    for region in result:
        offered = set(interface.get_control(region["from_name"]).labels)
        names = region["value"].get("choices") or [name for path in region["value"]["taxonomy"] for name in path]
        assert set(names) <= offered
    assert 0 <= score <= 1


@pytest.mark.parametrize("label_config", CORPUS)
def test_names_keys_and_choices_are_those_that_label_studio_reads(label_config: str) -> None:
    """Controls, objects, data keys and choices agree with LabelInterface."""
    interface = LabelInterface(label_config)
    for control in ChoiceMap.from_config(label_config, CLASSES).controls:
        theirs = interface.get_control(control.from_name)
        assert set(map(control.name, control.choices)) <= set(theirs.labels)
        assert control.to_name in theirs.to_name
        assert control.data_key == interface.get_object(control.to_name).value_name
        assert control.type == theirs.tag.lower()


@pytest.mark.parametrize("choices", [
    pytest.param('<Choice value="Rocky"><Choice value="Earth"/></Choice>', id="inside another choice"),
    pytest.param('<Choice value="Earth"/><Choice value="x" alias="Earth"/>', id="of two with one name"),
    pytest.param('<Choice value="$name" predicted_values="Earth"/>', id="named by the task"),
    pytest.param('<Choice value="Earth, $name"/>', id="named in part by the task"),
    pytest.param('<Repeater on="$all"><Choice value="Earth"/></Repeater>', id="repeated"),
    pytest.param('<View visibleWhen="choice-selected" whenTagName="c"><Choice value="Earth"/></View>', id="hidden"),
    pytest.param('<Choice value="Earth">Die Erde</Choice>', id="with a text"),
    pytest.param('<Choice value="Earth"><!-- blue --></Choice>', id="with a comment"),
    pytest.param('<Choice value="Earth" alias=""/>', id="empty alias"),
])
def test_a_choice_that_nobody_can_tick_is_left_alone(choices: str) -> None:
    """The editor does not show it, shows another name, or does not take it."""
    label_config = f'<View>{IMAGE}<Choices name="c" toName="image">{choices}<Choice value="Mars"/></Choices></View>'
    choice_map = ChoiceMap.from_config(label_config, CLASSES)
    assert choice_map.controls[0].choice_of == {"Mars": "Mars"}
    reasons = ("which the editor does not show", "Submit then refuses both", "may have another name on the page")
    assert [warning for warning in choice_map.warnings if any(reason in warning for reason in reasons)]
    assert choice_map.prediction({"image": [1, 0, 0]}) == ([], 0.0)


def test_what_does_a_choice_no_harm() -> None:
    """Blanks inside it, a text beside an alias, and attributes that are for people."""
    label_config = config('value="Earth" hint="ours" selected="true" hotkey="e" html="&lt;b&gt;Earth&lt;/b&gt;"')
    more = '<Choice value="Mars">\n </Choice><Choice value="x" alias="Moon">M</Choice></Choices>'
    label_config = label_config.replace("</Choices>", more)
    assert one(label_config).choice_of == {"Earth": "Earth", "Mars": "Mars", "Moon": "Moon"}


def test_an_image_with_a_text_inside_shows_that_text() -> None:
    """The editor takes it for the value, so nobody knows where the picture is."""
    with pytest.raises(LabelConfigError, match=r"the Image 'image' shows a list .valueList. or has no value"):
        ChoiceMap.from_config(config('value="Earth"', image='<Image name="image" value="$a">$b</Image>'), CLASSES)


def taxonomy(inside: str, head: str = "") -> str:
    return f'<View>{IMAGE}<Taxonomy name="t" toName="image" {head}>{inside}</Taxonomy></View>'


def paths(label_config: str, *row: float) -> list[list[str]]:
    result, _ = ChoiceMap.from_config(label_config, CLASSES).prediction({"image": row})
    return [path for found in result for path in found["value"]["taxonomy"]]


TREE = '<Choice value="Rock"><Choice value="Earth"/><Choice value="Mars" alias="m"/></Choice><Choice value="Moon"/>'


@pytest.mark.parametrize(("head", "row", "expected"), [
    pytest.param("", (0.5, 0.5, 0), [["Rock", "Earth"], ["Rock", "m"]], id="several"),
    pytest.param("", (0.25, 0.4, 0.35), [["Rock", "m"]], id="the best of none"),
    pytest.param('maxUsages="1"', (0.5, 0.5, 0), [["Rock", "Earth"]], id="one"),
    pytest.param('maxUsages="1.5"', (0.5, 0.5, 0), [["Rock", "Earth"]], id="a number as JavaScript reads it"),
    pytest.param('maxusages="0x2"', (0.5, 0.5, 0), [["Rock", "Earth"], ["Rock", "m"]], id="another one"),
    pytest.param('maxUsages="many"', (0.5, 0.5, 0), [["Rock", "Earth"], ["Rock", "m"]], id="no number"),
    pytest.param('maxUsages="' + "9" * 5000 + '"', (0.5, 0.5, 0), [["Rock", "Earth"], ["Rock", "m"]], id="very many"),
])
def test_a_taxonomy_is_predicted_by_its_paths(head: str, row: tuple[float, ...], expected: list[list[str]]) -> None:
    """As many as it takes, the best first."""
    assert paths(taxonomy(TREE, head), *row) == expected


@pytest.mark.parametrize(("inside", "expected"), [
    pytest.param('<Choice value="Earth"><Choice value="Mars"/></Choice>', [["Earth"]], id="a branch"),
    pytest.param('<Choice value="x" predicted_values="Earth"><Choice value="Mars"/></Choice>', [["x"]], id="a group"),
    pytest.param('<Choice value="Mars"><Choice value="Earth"/></Choice><Choice value="Mars"><Choice value="Moon"/>'
                 "</Choice>", [["Mars", "Earth"]], id="of two with one name, the first"),
    pytest.param('<Choice value="x" alias="1"/><Choice value="x" alias="Earth"/>', [], id="by value, not by alias"),
    pytest.param('<Choice value="x" alias=""><Choice value="Mars"/></Choice><Choice value="Earth" alias=""/>', [],
                 id="empty alias"),
])
def test_a_taxonomy_offers_what_the_editor_does(inside: str, expected: list[list[str]]) -> None:
    assert paths(taxonomy(f'{inside}<Choice value="Moon"/>'), 1, 0, 0) == expected


def test_only_the_leaves_of_a_taxonomy_where_it_says_so() -> None:
    inside = '<Choice value="Earth"><Choice value="Mars"/></Choice><Choice value="Moon"/>'
    assert paths(taxonomy(inside, 'leafsOnly="true"'), 1, 0, 0) == []
    assert paths(taxonomy(inside, 'leafsOnly="true"'), 0, 1, 0) == [["Earth", "Mars"]]


def test_a_taxonomy_in_which_nothing_may_be_chosen_is_left_alone() -> None:
    with pytest.raises(LabelConfigError, match=r"nothing in it may be chosen .maxUsages '0'"):
        ChoiceMap.from_config(taxonomy(TREE, 'maxUsages="0"'), CLASSES)


PATHS = [
    ["A / B"], ["A", "B"], ["A /", "B"], ["A", "/ B"], ["A // B"], ["A", "/", "B"], ["/"], ["A"], ["A", "/"], ["A /"],
]  # fmt: skip


def test_each_path_is_a_choice_of_its_own() -> None:
    """Whatever slashes are in its names; and it comes back as it was."""
    tree: dict[str, Any] = {}
    for path in PATHS:
        branch = tree
        for name in path:
            branch = branch.setdefault(name, {})

    def written(branch: dict[str, Any]) -> str:
        return "".join(f'<Choice value="{name}">{written(inner)}</Choice>' for name, inner in branch.items())

    (control,) = ChoiceMap.for_learning(taxonomy(written(tree))).controls
    assert len(control.choices) == len(PATHS)
    for path in PATHS:
        (choice,) = control.choices_in({"from_name": "t", "to_name": "image", "value": {"taxonomy": [path]}})
        assert control.region([choice])["value"] == {"taxonomy": [path]}


def test_the_case_of_tags_does_not_matter() -> None:
    """It does not to the editor either; Label Studio takes such a prediction."""
    label_config = (
        '<view><image name="i" value="$i"/><choices name="c" toName="i"><CHOICE value="Earth"/></choices>'
        '<taxonomy name="t" toName="i"><choice value="Earth"/></taxonomy></view>'
    )
    result, _ = ChoiceMap.from_config(label_config, CLASSES).prediction({"i": [1, 0, 0]})
    assert [region["value"] for region in result] == [{"choices": ["Earth"]}, {"taxonomy": [["Earth"]]}]
    prediction = {"result": result, "score": 1.0, "model_version": "celestial:1"}
    assert LabelInterface(label_config).validate_prediction(prediction, return_errors=True) == []


def test_the_case_of_attributes_does_not_matter() -> None:
    """It does not to the editor either; of two spellings the last one counts."""
    label_config = (
        '<view><image NAME="i" VALUE="$i"/><choices Name="c" TONAME="i" CHOICE="multiple"><choice VALUE="x"'
        ' ALIAS="Earth" PREDICTED_VALUES="Mars"/></choices><choices name="d" toName="c" TONAME="i"'
        ' visiblewhen="choice-selected" WHENTAGNAME="c" WhenChoiceValue="none"><choice value="Mars"/></choices></view>'
    )
    choice_map = ChoiceMap.from_config(label_config, CLASSES)
    assert [(one.from_name, one.to_name, one.data_key) for one in choice_map.controls] == [
        ("c", "i", "i"), ("d", "i", "i")
    ]  # fmt: skip
    result, _ = choice_map.prediction({"i": [0, 1, 0]})
    assert [region["value"] for region in result] == [{"choices": ["Earth"]}], "and d is hidden"


def test_the_guides_config_gives_the_guides_prediction() -> None:
    """The region has exactly the form that Label Studio stores."""
    result, score = ChoiceMap.from_config(GUIDE, CLASSES).prediction({"image": [0.25, 0.5, 0.25]})
    assert result == [{"id": "choice-1", "from_name": "choice", "to_name": "image", "type": "choices",
                       "value": {"choices": ["Mars"]}, "score": 0.5}]
    assert score == 0.5


@pytest.mark.parametrize(("choices", "expected"), [
    pytest.param(['value="EARTH"'], {"Earth": "EARTH"}, id="upper case"),
    pytest.param(['value=" earth  "'], {"Earth": " earth  "}, id="blanks, spelled as the config does"),
    pytest.param(['value="EARTH"', 'value="Earth"'], {"Earth": "Earth"}, id="exact before case"),
    pytest.param(['value="Earth"', 'value="Terra" predicted_values="Earth"'], {"Earth": "Terra"},
                 id="predicted_values before label"),
    pytest.param(['value="Terra" predicted_values="EARTH"', 'value="Gaia" predicted_values="x, Earth"'],
                 {"Earth": "Gaia"}, id="predicted_values exact before case"),
    pytest.param(['value="Earth"', 'value="Terra" predicted_values="earth"'], {"Earth": "Terra"},
                 id="predicted_values in other case before exact label"),
    pytest.param(['value="Rock" predicted_values=" mars ,Earth,, Vulcan"'], {"Earth": "Rock", "Mars": "Rock"},
                 id="several predicted_values"),
    pytest.param(['value="Earth" alias="e"'], {"Earth": "e"}, id="value behind an alias"),
    pytest.param(['value="Earth" alias="e"', 'value="x" alias="Earth"'], {"Earth": "Earth"}, id="label before value"),
    pytest.param(['value="Earth" alias="e"', 'value="x" alias="EARTH"'], {"Earth": "e"}, id="exact value before case"),
    pytest.param(['value="earth" alias="e"', 'value="x" alias="EARTH"'], {"Earth": "EARTH"}, id="label's case first"),
    pytest.param(['value="EARTH"', 'value="earth"'], {"Earth": "EARTH"}, id="first choice wins"),
])
def test_a_class_finds_its_choice(choices: list[str], expected: dict[str, str]) -> None:
    """The order of precedence: predicted_values, label, value, and all but the first exactly before loosely."""
    assert one(config(*choices)).choice_of == expected


def test_case_is_no_obstacle_in_either_direction() -> None:
    """A class in upper case meets a choice in lower case too, and accents match however they are composed."""
    assert one(values("Earth"), ["EARTH"]).choice_of == {"EARTH": "Earth"}
    assert one(values("Pome\u0301"), ["POM\u00c9"]).choice_of == {"POM\u00c9": "Pome\u0301"}


def test_single_gives_the_best_choice_with_its_own_probability() -> None:
    """The score is not renormalised over the offered choices."""
    assert chosen(values("Earth", "Moon"), 0.5, 0.2, 0.3) == (["Earth"], 0.5)


def test_the_probabilities_of_a_group_add_up() -> None:
    """A choice that stands for several classes has the probability of any of them."""
    rock = config('value="Rock" predicted_values="Earth,Mars"', 'value="Moon"')
    assert chosen(rock, 0.25, 0.25, 0.5) == (["Rock"], 0.5)
    assert chosen(rock, 0.25, 0.35, 0.4) == (["Rock"], 0.6)
    assert chosen(rock, 0.2, 0.2, 0.6) == (["Moon"], 0.6)


@pytest.mark.parametrize("head", ["", 'choice="multiple"', 'model_score_threshold="0.1"'])
def test_a_class_without_a_choice_ticks_nothing(head: str) -> None:
    """Where the picture shows most likely something that is not on offer, no choice is ticked, and the score is low."""
    germans = values("Moon", "Erde", "Sonstiges", head=head)
    assert chosen(germans, 0.5, 0.4, 0.1) == ([], 0.1)
    assert chosen(germans, 0.9999999, 0, 1e-7) == ([], 1e-7)
    assert chosen(germans, 0.1, 0.1, 0.8) == (["Moon"], 0.8)


def test_multiple_gives_all_that_reach_the_threshold_and_each_choice_once() -> None:
    """The default threshold is a half, reached counts, the best comes first and stays if none was set."""
    assert chosen(values(*CLASSES, head='choice="multiple"'), 0.5, 0.9, 0.49) == (["Mars", "Earth"], 0.9)
    assert chosen(values(*CLASSES, head='choice="multiple"'), 0.1, 0.2, 0.4) == (["Moon"], 0.4)
    rock = config('value="Rock" predicted_values="Earth,Mars"', 'value="Moon"', head='choice="multiple"')
    assert chosen(rock, 0.25, 0.25, 0.5) == (["Rock", "Moon"], 0.5)


@pytest.mark.parametrize("kind", ["single", "multiple"])
def test_a_threshold_that_is_not_reached_makes_the_control_abstain(kind: str) -> None:
    """No region then, and the score is the best probability all the same."""
    label_config = values(*CLASSES, head=f'choice="{kind}" model_score_threshold="0.6"')
    assert chosen(label_config, 0.3, 0.59, 0.1) == ([], 0.59)
    assert chosen(label_config, 0.3, 0.6, 0.1) == (["Mars"], 0.6)


@pytest.mark.parametrize("text", ["1.1", "-0.1", "nan", "inf", "half", "0,5"])
def test_a_threshold_that_is_none_is_ignored_with_a_warning(text: str) -> None:
    """The control works as if it had no threshold, and the log says why."""
    choice_map = ChoiceMap.from_config(values(*CLASSES, head=f'model_score_threshold="{text}"'), CLASSES)
    assert choice_map.controls[0].threshold is None
    assert choice_map.warnings == (
        f"Control 'choice': model_score_threshold must be a number from 0 to 1, got '{text}'; it is ignored.",)


@pytest.mark.parametrize("text", ["0", "1", " 0.25 "])
def test_a_threshold_may_be_anything_from_0_to_1(text: str) -> None:
    """Both ends are allowed, and blanks do no harm."""
    assert one(values(*CLASSES, head=f'model_score_threshold="{text}"')).threshold == float(text)


def test_the_score_of_a_task_is_the_lowest_of_its_controls() -> None:
    """Each picture has its own probabilities; a control that abstains counts, one without a picture does not."""
    choice_map = ChoiceMap.from_config(
        '<View><Image name="a" value="$x"/><Image name="b" value="$y"/><Choices name="c" toName="a">'
        '<Choice value="Earth"/></Choices><Choices name="d" toName="b" model_score_threshold="0.5">'
        '<Choice value="Mars"/></Choices></View>', CLASSES)
    assert choice_map.data_keys == ("x", "y")
    result, score = choice_map.prediction({"x": [0.9, 0, 0], "y": [0, 0.8, 0]})
    assert ([region["score"] for region in result], score) == ([0.9, 0.8], 0.8)
    result, score = choice_map.prediction({"x": [0.9, 0, 0], "y": [0, 0.4, 0]})
    assert ([region["from_name"] for region in result], score) == (["c"], 0.4)
    result, score = choice_map.prediction({"x": [0.9, 0, 0], "z": [1.0]})
    assert ([region["from_name"] for region in result], score) == (["c"], 0.9)
    assert choice_map.prediction({}) == ([], 0.0)


def test_numpy_rows_give_plain_numbers() -> None:
    """A row of float32 gives floats that JSON can hold, never above 1."""
    result, score = ChoiceMap.from_config(GUIDE, CLASSES).prediction(
        {"image": np.array([0.0, 1.0000001, 0.0], np.float32)})  # type: ignore[dict-item]
    assert (type(score), score, type(result[0]["score"])) == (float, 1.0, float)


def test_a_row_of_the_wrong_length_is_refused() -> None:
    """A probability is never given to the wrong class."""
    with pytest.raises(ModelError, match="The model gave 2 probabilities for its 3 classes"):
        ChoiceMap.from_config(GUIDE, CLASSES).prediction({"image": [0.5, 0.5]})


@pytest.mark.parametrize(("head", "image", "reason"), [
    pytest.param('perRegion="true"', IMAGE, "it belongs to regions (perRegion)", id="perRegion"),
    pytest.param('perregion="TRUE"', IMAGE, "it belongs to regions (perRegion)", id="perregion"),
    pytest.param('perItem="true"', IMAGE, "it belongs to the items of a list (perItem)", id="perItem"),
    pytest.param('model_skip="True"', IMAGE, "the config says so (model_skip)", id="model_skip"),
    pytest.param('allowNested="true"', IMAGE, "its choices are paths (allowNested)", id="allowNested"),
    pytest.param('value="$options"', IMAGE, "its choices come from the task (dynamic)", id="dynamic"),
    pytest.param('apiUrl="http://x"', IMAGE, "its choices come from the task (dynamic)", id="apiUrl"),
    pytest.param("", f'{IMAGE}<Image name="b" value="$b"/>',
                 "it is about several images at once (toName ['image', 'b'])", id="several images"),
    pytest.param('value="$options.all"', IMAGE, "its choices come from the task (dynamic)", id="dynamic, a path"),
    pytest.param('visibleWhen="region-selected"', IMAGE,
                 "the page shows it only while a region is selected (visibleWhen)", id="region-selected"),
    pytest.param('visiblewhen="choice-unselected"', IMAGE,
                 "the page hides it as soon as anything is chosen (visibleWhen without whenTagName)", id="unselected"),
    pytest.param('visibleWhen="choice-selected" whenTagName="image" whenChoiceValue="x"', IMAGE,
                 "it depends on 'image', which is no control with choices (whenTagName)", id="of no control"),
    pytest.param('visibleWhen="choice-selected" whenTagName="choice"', IMAGE,
                 "whether the page shows it depends on itself (visibleWhen)", id="of itself"),
    pytest.param("", '<Text name="image" value="$t"/>', "no Image is among its toName ['image']", id="Text"),
    pytest.param("", '<Image name="image" valueList="$l"/>',
                 "the Image 'image' shows a list (valueList) or has no value of the form $key", id="valueList"),
    pytest.param("", '<Image name="image" value="$image" valueList="$l"/>',
                 "the Image 'image' shows a list (valueList) or has no value of the form $key", id="value, valueList"),
    pytest.param("", '<Image name="image" value="image"/>',
                 "the Image 'image' shows a list (valueList) or has no value of the form $key", id="no key"),
    pytest.param("", '<Image name="image" value="$images[{{i}}]"/>',
                 "the Image 'image' shows a list (valueList) or has no value of the form $key", id="Repeater"),
])
def test_a_control_that_cannot_be_served_is_skipped_with_its_reason(head: str, image: str, reason: str) -> None:
    """Alone it is an error that names the reason; beside another control it is a warning."""
    alone = config('value="Earth"', head=head, image=image)
    if "several images" in reason:
        alone = alone.replace('toName="image"', 'toName="image,b"')
    with pytest.raises(LabelConfigError) as caught:
        ChoiceMap.from_config(alone, CLASSES)
    sentence = f"Control 'choice' is skipped: {reason}."
    assert str(caught.value) == f"The label config has no Choices on an Image that the model can serve. {sentence}"
    beside = alone.replace("</View>", '<Image name="i" value="$i"/><Choices name="c" toName="i"><Choice value="Earth"/>'
                                      '<Choice value="Mars"/><Choice value="Moon"/></Choices></View>')
    choice_map = ChoiceMap.from_config(beside, CLASSES)
    assert [control.from_name for control in choice_map.controls] == ["c"]
    assert choice_map.warnings == (sentence,)


def test_warnings_tell_what_is_never_predicted() -> None:
    """Choices without a class, classes without a choice, and a class that two choices claim."""
    label_config = values("EARTH", "earth", "Nice").replace(
        "</View>", '<Choices name="quality" toName="image"><Choice value="Sharp"/></Choices></View>')
    choice_map = ChoiceMap.from_config(label_config, CLASSES)
    assert [control.from_name for control in choice_map.controls] == ["choice"]
    assert choice_map.warnings == (
        "Control 'choice': several choices claim the class 'Earth'; 'EARTH' has it, not ['earth'].",
        "Control 'choice': the model never predicts the choices ['earth', 'Nice'].",
        "Control 'quality': the model never predicts the choices ['Sharp'].",
        "No choice stands for the classes ['Mars', 'Moon'], so they are never predicted.",
    )
    assert ChoiceMap.from_config(GUIDE, CLASSES).warnings == ()
    assert ChoiceMap.from_config(values("Earth", "EARTH"), ["Earth", "EARTH"]).warnings == ()


def test_an_exact_name_that_loses_its_class_is_reported() -> None:
    """Also when the winner got the class by predicted_values."""
    choice_map = ChoiceMap.from_config(config('value="Earth"', 'value="Terra" predicted_values="Earth"'), ["Earth"])
    assert choice_map.warnings[0] == (
        "Control 'choice': several choices claim the class 'Earth'; 'Terra' has it, not ['Earth'].")

    choice_map = ChoiceMap.from_config(config('value="Rock" predicted_values="Earth"',
                                              'value="Stone" predicted_values="Mars,Earth"'), ["Earth", "Mars"])
    assert choice_map.warnings == (
        "Control 'choice': several choices claim the class 'Earth'; 'Rock' has it, not ['Stone'].",)


def test_a_config_without_a_known_class_is_a_map_without_controls() -> None:
    """Nothing is predicted; the first warning holds both lists and says what to do."""
    choice_map = ChoiceMap.from_config(values("Cat", "Dog"), CLASSES)
    assert (choice_map.controls, choice_map.data_keys, choice_map.prediction({})) == ((), (), ([], 0.0))
    first, second = choice_map.warnings
    assert first == ("None of the choices ['Cat', 'Dog'] is a class of the model ['Earth', 'Mars', 'Moon']. "
                     "Label pictures for it to learn, rename a choice, or add predicted_values.")
    assert second == "Control 'choice': the model never predicts the choices ['Cat', 'Dog']."


@pytest.mark.parametrize("label_config", ["", "  \n", "<View></View>", "<View/>", f"<View>{IMAGE}</View>"])
def test_a_config_without_controls_is_a_map_without_controls(label_config: str) -> None:
    """Label Studio makes new projects so, and nothing is wrong with them yet."""
    assert ChoiceMap.from_config(label_config, CLASSES) == ChoiceMap(tuple(CLASSES), (), ())


@pytest.mark.parametrize("name", ["galaxy", "x" * 900, "a\nb\r\n", "a\u2028b", "\U000e0001" * 50])
def test_a_long_or_odd_list_is_shortened_to_one_line(name: str) -> None:
    """The sentence is a line of the log whatever the config and the model hold, remedy included."""
    label_config = config(*(f'value="{number} {name.replace(chr(10), "&#10;").replace(chr(13), "&#13;")}"'
                            for number in range(500)))
    message = ChoiceMap.from_config(label_config, [f"{name} {number}" for number in range(500)]).warnings[0]
    assert len(message) <= 450
    assert len(message.splitlines()) == 1
    assert message.endswith(", ...]. Label pictures for it to learn, rename a choice, or add predicted_values.")


def test_controls_of_other_kinds_are_named_where_nothing_else_is_there() -> None:
    """Else nobody would know why such a project is refused."""
    boxes = '<Rectangle name="r" toName="image"/><TextArea name="t" toName="image"/>'
    reason = r"can serve\. It has \['Rectangle', 'TextArea'\], which offer no choices\.$"
    with pytest.raises(LabelConfigError, match=reason):
        ChoiceMap.from_config(f"<View>{IMAGE}{boxes}</View>", CLASSES)


def test_many_skipped_controls_still_make_a_short_message() -> None:
    """The reasons are cut, not the rule."""
    many = "".join(f'<Choices name="c{number}" toName="t"><Choice value="Earth"/></Choices>' for number in range(99))
    with pytest.raises(LabelConfigError) as caught:
        ChoiceMap.from_config(f"<View>{many}</View>", CLASSES)
    assert len(str(caught.value)) <= 400
    assert str(caught.value).startswith("The label config has no Choices on an Image")


LAUGHS = ('<!DOCTYPE v [<!ENTITY a "ha">' + "".join(
    f'<!ENTITY {new} "{f"&{old};" * 10}">' for old, new in zip("abcdefghi", "bcdefghij", strict=True))
    + ']><View><Header value="&j;"/>&j;</View>')


@pytest.mark.parametrize(("label_config", "message"), [
    pytest.param("<View>", "not readable XML", id="cut off"),
    pytest.param("<View><a></View></a>", "not readable XML", id="crossed"),
    pytest.param("<View a='\ud800'/>", "not readable XML", id="half a character"),
    pytest.param("<View>\0</View>", "not readable XML", id="NUL"),
    pytest.param("<View>&nbsp;</View>", "not readable XML", id="unknown entity"),
    pytest.param(LAUGHS, "declares an XML entity, attribute or element", id="billion laughs"),
    pytest.param('<!DOCTYPE v [<!ENTITY x SYSTEM "file:///etc/passwd">]><View>&x;</View>', "declares an XML entity",
                 id="file"),
    pytest.param('<!DOCTYPE v [<!ENTITY % x SYSTEM "http://127.0.0.1:1/">%x;]><View/>', "declares an XML entity",
                 id="parameter entity"),
    pytest.param(f'<View>{IMAGE}<RectangleLabels name="r" toName="image"><Label value="A"/></RectangleLabels></View>',
                 "no Choices on an Image", id="another control"),
    pytest.param(config(), "it offers no choice", id="no choice"),
    pytest.param(config('value=""', 'alias=""', 'hotkey="1"'), "it offers no choice", id="no name"),
    pytest.param(None, "must be XML text, got NoneType", id="none"),
    pytest.param({"choice": 1}, "must be XML text, got dict", id="dict"),
])
def test_a_config_that_cannot_be_read_is_refused_with_a_sentence(label_config: Any, message: str) -> None:
    """Whatever comes instead of a label config, the answer is a LabelConfigError on one line."""
    with pytest.raises(LabelConfigError, match=message) as caught:
        ChoiceMap.from_config(label_config, CLASSES)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("head", ['<?xml version="1.0" encoding="UTF-8"?>', '<?xml version="1.0" encoding="latin-1"?>',
                                  "\ufeff", "\n  <?xml version='1.0' encoding='utf-16'?>\n", "<!DOCTYPE View>"])
def test_what_stands_before_the_config_does_no_harm(head: str) -> None:
    """A header, also one that names another encoding than the text has, a byte order mark, blanks, a bare DOCTYPE."""
    assert one(head + values("Terre éée", "Earth")).choices == ("Terre éée", "Earth")


def test_deep_nesting_and_ten_thousand_choices_are_read() -> None:
    """No recursion limit is met."""
    deep = f"<View>{'<View>' * 50_000}{values('Earth')}{'</View>' * 50_000}</View>"
    assert one(deep).choices == ("Earth",)
    classes = [f"class {number}" for number in range(10_000)]
    label_config = values(*(name.upper() for name in classes))
    choice_map = ChoiceMap.from_config(label_config, classes)
    assert choice_map.controls[0].choice_of["class 9999"] == "CLASS 9999"


def test_a_map_is_made_once_and_shared() -> None:
    """The same config and classes give the same object, in any thread; other classes another one."""
    first = ChoiceMap.from_config(GUIDE, CLASSES)
    with ThreadPoolExecutor(4) as pool:
        assert all(again is first for again in pool.map(lambda _: ChoiceMap.from_config(GUIDE, CLASSES), range(20)))
    assert ChoiceMap.from_config(GUIDE, ["Earth"]) is not first
    with pytest.raises(TypeError):
        first.controls[0].choice_of["Earth"] = "Mars"  # type: ignore[index]
    first.prediction({"image": [1, 0, 0]})[0][0]["value"]["choices"].append("spoiled")
    assert chosen(GUIDE, 1, 0, 0) == (["Earth"], 1.0)


def test_of_two_controls_with_one_name_the_first_is_served() -> None:
    """Label Studio refuses such a config; here it costs a warning and no wrong region."""
    twice = GUIDE.replace("</View>", '<Choices name="choice" toName="image"><Choice value="Mars"/></Choices></View>')
    choice_map = ChoiceMap.from_config(twice, CLASSES)
    assert [control.choices for control in choice_map.controls] == [tuple(CLASSES)]
    assert choice_map.warnings == ("Control 'choice' is skipped: another control has its name.",)


TASK = {
    "image": "a", "data": {"image": {"url": "b"}, "x": "path"}, "data.x": "literal", "none": None, "my-image": "dash",
    "größe": "any script", "images": ["c", {"url": "d"}], "one": ["e"], "host": "https://h", "number": 5, "part": 5.0,
    "my image": "blank",
}  # fmt: skip


@pytest.mark.parametrize(("value", "expected"), [
    ("$image", "a"), ("$data.image.url", "b"), ("$data.x", "literal"), ("$none", None), ("$my-image", "dash"),
    ("$größe", "any script"), ("$images[0]", "c"), ("$images[1].url", "d"), ("$images.1.url", "d"),
    ("$data[image][url]", "b"), ("$one", "e"), (" $image ", "a"),
    ("https://h/$image.jpg", None), ("https://h/$image/1.jpg", "https://h/a/1.jpg"), ("$host/$image", "https://h/a"),
    ("$host/x.jpg", "https://h/x.jpg"), ("/data/local-files/?d=$number/$images[0].png", None),
    ("/data/local-files/?d=$number/$images[0]", "/data/local-files/?d=5/c"), ("https://h/$part", "https://h/5"),
    ("https://h/x.jpg", "https://h/x.jpg"), ("s3://b/$data.image.url", "s3://b/b"),
])
def test_a_value_is_resolved_as_the_editor_does(value: str, expected: object) -> None:
    """A key, a path, several of them in a text, and an address that is the same in every task."""
    control = one(config('value="Earth"', image=f'<Image name="image" value="{value}"/>'))
    if expected is None and value != "$none":
        with pytest.raises(FetchError, match=r"no data key '(image\.jpg|images\[0\]\.png)' that the label"):
            value_of(TASK, control.data_key)
    else:
        assert value_of(TASK, control.data_key) == expected


@pytest.mark.parametrize("value", ["https://h/$none", "https://h/$images", "https://h/$data", "https://h/$gone"])
def test_what_is_no_text_is_not_put_into_an_address(value: str) -> None:
    """The editor writes "null", "undefined" or "[object Object]" there, and shows no picture."""
    control = one(config('value="Earth"', image=f'<Image name="image" value="{value}"/>'))
    with pytest.raises(FetchError, match="The task has no data key"):
        value_of(TASK, control.data_key)


@pytest.mark.parametrize(("task", "known"), [({"img": "secret"}, "['img']"), ({}, "[]"), (None, "[]"),
                                             ({"data": "text"}, "['data']"), ({"data": {"image": []}}, "['data']")])
def test_a_missing_key_costs_that_task_with_a_sentence(task: Any, known: str) -> None:
    """The message names the key and what the task has, and none of its values."""
    with pytest.raises(FetchError) as caught:
        value_of(task, "data.image.url")
    assert str(caught.value) == (
        f"The task has no data key 'data.image.url' that the label config names; it has {known}.")


def region(*choices: object, **more: object) -> dict[str, Any]:
    return {"id": "r", "from_name": "choice", "to_name": "image", "type": "choices",
            "value": {"choices": list(choices)}, **more}


def test_the_choices_of_an_annotation_are_read() -> None:
    """As they are spelled, each once, by control; one that is not on offer any more too."""
    choice_map = ChoiceMap.from_config(values("EARTH", "Comet"), CLASSES)
    assert choice_map.choices_of([region("EARTH", "Comet"), region("EARTH", "gone")]) == {
        "choice": ["EARTH", "Comet", "gone"]}


@pytest.mark.parametrize("result", [
    None, "Earth", {}, [], [None], ["Earth"], [1], [region()], [region(["Rocky", "Earth"], None, 3, "")],
    [region("Earth", from_name="other")], [region("Earth", from_name=["choice"])], [region("Earth", to_name="other")],
    [region("Earth", value="Earth")], [region("Earth", value={"choices": "Earth"})], [region("Earth", value=None)],
    [{"from_name": "choice"}], [{"type": "relation", "from_id": "a", "to_id": "b"}],
], ids=repr)
def test_what_names_no_choice_is_passed_over(result: Any) -> None:
    """Empty choices, paths, other regions and broken ones give nothing and raise nothing."""
    assert ChoiceMap.from_config(GUIDE, CLASSES).choices_of(result) == {}


names = st.text(st.characters(exclude_categories=["Cs", "Cc", "Cn", "Z"]), min_size=1, max_size=8).filter(
    lambda name: name.strip() and "$" not in name)
odd_numbers = st.one_of(st.floats(), st.integers(), st.none(), st.text(max_size=3), st.booleans())


@seed(22)
@cases(50)
@given(st.lists(names, min_size=1, max_size=6, unique_by=lambda name: unicodedata.normalize("NFC", name).casefold()),
       st.data())
def test_single_gives_one_offered_choice_or_none(classes: list[str], data: Any) -> None:
    """For any names and any numbers: at most one offered choice, a score from 0 to 1, and the region is read back."""
    offered = data.draw(st.lists(st.sampled_from(classes), min_size=1, unique=True))
    choice_map = ChoiceMap.from_config(values(*offered), classes)
    row = data.draw(st.lists(odd_numbers, min_size=len(classes), max_size=len(classes)))
    result, score = choice_map.prediction({"image": row})
    said = [choice for found in result for choice in found["value"]["choices"]]
    assert len(said) <= 1
    assert set(said) <= set(offered)
    assert said or set(offered) != set(classes)
    assert 0 <= score <= 1
    assert choice_map.choices_of(result) == ({"choice": said} if said else {})


@seed(23)
@cases(50)
@given(st.permutations(range(5)), st.lists(st.floats(0, 1), min_size=5, max_size=5, unique=True))
def test_the_order_of_choices_and_of_classes_does_not_matter(order: list[int], row: list[float]) -> None:
    """The same probabilities give the same choice however config and model list them."""
    classes = [f"class{number}" for number in range(5)]
    straight = chosen(values(*classes), *row, classes=classes)
    shuffled = [classes[number] for number in order]
    assert chosen(values(*shuffled), *row, classes=classes) == straight
    assert chosen(values(*classes), *(row[number] for number in order), classes=shuffled) == straight


attributes = st.dictionaries(
    st.sampled_from(["name", "toName", "value", "valueList", "alias", "choice", "perRegion", "predicted_values",
                     "model_score_threshold", "model_skip", "whatever"]),
    st.sampled_from(["image", "$image", "image,other", "Earth", "EARTH", "true", "multiple", "", ",", "0.5", "é$"]))
elements = st.recursive(
    st.tuples(st.sampled_from(["View", "Image", "Choices", "Choice", "Filter", "Text"]), attributes, st.just([])),
    lambda inner: st.tuples(st.sampled_from(["View", "Image", "Choices", "Choice"]), attributes,
                            st.lists(inner, max_size=3)), max_leaves=12)


def as_xml(element: tuple[str, dict[str, str], list[Any]]) -> str:
    tag, attrs, inner = element
    head = "".join(f" {name}={quoteattr(value)}" for name, value in attrs.items())
    return f"<{tag}{head}>{''.join(map(as_xml, inner))}</{tag}>"


@seed(24)
@cases(100)
@given(elements.map(as_xml) | st.text(max_size=30), st.lists(odd_numbers, min_size=3, max_size=3))
def test_odd_configs_give_a_map_or_a_label_config_error(label_config: str, row: list[Any]) -> None:
    """Nothing else is ever raised, and whatever is predicted is offered."""
    lengths = [1]
    for text in (label_config, GUIDE.replace("</View>", f"{label_config}</View>")):
        try:
            choice_map = ChoiceMap.from_config(text, CLASSES)
            learning = ChoiceMap.for_learning(text)
            assert all(list(control.choice_of) == list(control.choices) for control in learning.controls)
        except LabelConfigError as error:
            lengths.append(len(str(error)))
            continue
        result, score = choice_map.prediction(dict.fromkeys(choice_map.data_keys, row))
        assert 0 <= score <= 1
        offered = {control.from_name: control.choices for control in choice_map.controls}
        assert all(set(found["value"]["choices"]) <= set(offered[found["from_name"]]) for found in result)
    assert 0 < min(lengths) <= max(lengths) <= 400


# Heads, each of one control


TWO = (
    f'<View>{IMAGE}<Choices name="body" toName="image"><Choice value="Mars"/><Choice value="Moon"/></Choices>'
    '<Choices name="flaws" toName="image" choice="multiple"><Choice value="dark"/><Choice value="blur"/></Choices>'
    '</View>'
)
BODY = Columns("body", 0, ("Mars", "Moon"))
FLAWS = Columns("flaws", 2, ("dark", "blur", "noise"), multiple=True)
ROW = (0.25, 0.75, 0.9, 0.2, 0.8)


def answered(label_config: str, *own: Columns, row: tuple[float, ...] = ROW) -> tuple[dict[str, list[str]], float]:
    """What heads say of one picture by control, and the task's score."""
    result, score = ChoiceMap.from_config(label_config, (), own).prediction({"image": row})
    return {region["from_name"]: region["value"]["choices"] for region in result}, score


def test_each_control_is_answered_by_its_own_head() -> None:
    """From its own columns; the order of the heads does not matter, and the score is the lowest."""
    assert answered(TWO, BODY, FLAWS) == ({"body": ["Moon"], "flaws": ["dark"]}, 0.75)
    turned = answered(TWO, FLAWS._replace(start=0), BODY._replace(start=3), row=(0.9, 0.2, 0.8, 0.25, 0.75))
    assert turned == answered(TWO, BODY, FLAWS)


def test_choices_with_one_name_in_two_controls_are_two() -> None:
    """Yes is another thing in each of them."""
    twice = TWO.replace("dark", "Mars").replace("blur", "Moon").replace('choice="multiple"', "")
    both = (BODY, Columns("flaws", 2, ("Moon", "Mars")))
    assert answered(twice, *both, row=(0.9, 0.1, 0.8, 0.2))[0] == {"body": ["Mars"], "flaws": ["Moon"]}


def test_a_renamed_control_keeps_the_head_that_shares_a_choice() -> None:
    """Where the config has the old one no more; one head answers one control, the more it shares the rather."""
    renamed = TWO.replace('"body"', '"planet"')
    assert answered(renamed, BODY, FLAWS)[0] == {"planet": ["Moon"], "flaws": ["dark"]}
    other = Columns("other", 5, ("Mars",))
    assert answered(renamed, BODY, FLAWS, other, row=(*ROW, 1.0))[0]["planet"] == ["Moon"]
    second = '<Choices name="again" toName="image"><Choice value="Moon"/></Choices></View>'
    assert answered(renamed.replace("</View>", second), BODY, FLAWS)[0] == {"planet": ["Moon"], "flaws": ["dark"]}
    assert answered(TWO.replace("</View>", second), BODY, FLAWS)[0] == {"body": ["Moon"], "flaws": ["dark"]}


def test_what_is_not_learned_yet_is_a_warning() -> None:
    """Choices that were added since, and controls without a head."""
    grown = TWO.replace('<Choice value="Mars"/>', '<Choice value="Mars"/><Choice value="Io"/>')
    choice_map = ChoiceMap.from_config(grown, (), (BODY,))
    assert [control.from_name for control in choice_map.controls] == ["body"]
    assert choice_map.warnings == ("Control 'body': the choices ['Io'] are not learned yet.",
                                   "Control 'flaws': the choices ['dark', 'blur'] are not learned yet.")


@pytest.mark.parametrize(("row", "said", "score"), [
    pytest.param((0.9, 0.2), ["dark"], 0.8, id="the least sure is that one is not there"),
    pytest.param((0.6, 0.95), ["blur", "dark"], 0.6, id="both"),
    pytest.param((0.1, 0.3), [], 0.7, id="none, which is an answer"),
])
def test_several_choices_are_ticked_each_by_itself(row: tuple[float, ...], said: list[str], score: float) -> None:
    """The score is the lowest probability with which one of them is rightly ticked, or rightly not."""
    result, told = ChoiceMap.from_config(TWO, (), [FLAWS._replace(start=0, classes=("dark", "blur"))]).prediction(
        {"image": row})
    assert [choice for region in result for choice in region["value"]["choices"]] == said
    assert told == pytest.approx(score)
    assert all(region["score"] == told for region in result)


def test_where_people_always_tick_one_the_best_is_ticked() -> None:
    """Also below a half, and the score says how sure that is; a threshold in the config goes before."""
    always = FLAWS._replace(start=0, classes=("dark", "blur"), at_least_one=True)
    assert answered(TWO, always, row=(0.1, 0.3)) == ({"flaws": ["blur"]}, pytest.approx(0.3))
    strict = TWO.replace('choice="multiple"', 'choice="multiple" model_score_threshold="0.4"')
    assert answered(strict, always, row=(0.1, 0.3)) == ({}, pytest.approx(0.7))
    assert answered(strict, always, row=(0.1, 0.45)) == ({"flaws": ["blur"]}, pytest.approx(0.45))


def test_a_head_follows_a_control_that_was_changed_to_single() -> None:
    """It says its best choice then, and one that was learned as single says its best of several."""
    single = TWO.replace('choice="multiple"', "")
    assert answered(single, FLAWS._replace(start=0), row=(0.9, 0.8, 0.1)) == ({"flaws": ["dark"]}, 0.9)
    several = TWO.replace('name="body"', 'name="body" choice="multiple"')
    assert answered(several, BODY, row=(0.4, 0.35)) == ({"body": ["Mars"]}, 0.4)


def test_a_choice_that_was_learned_is_itself() -> None:
    """Whatever predicted_values say, which are for the class names of others."""
    label_config = config('value="Rock" predicted_values="Earth"', 'value="Earth"')
    own = Columns("choice", 0, ("Rock", "Earth"))
    (control,) = ChoiceMap.from_config(label_config, (), [own]).controls
    assert dict(control.choice_of) == {"Rock": "Rock", "Earth": "Earth"}
    (control,) = ChoiceMap.from_config(label_config, (), [own._replace(learned=False)]).controls
    assert dict(control.choice_of) == {"Rock": "Rock", "Earth": "Rock"}


def test_a_row_of_another_length_is_refused_from_heads_too() -> None:
    """All heads' columns are one row."""
    with pytest.raises(ModelError, match="The model gave 4 probabilities for its 5 classes"):
        answered(TWO, BODY, FLAWS, row=ROW[:4])


# Learning


@pytest.mark.parametrize(("label_config", "choices"), [
    pytest.param(GUIDE, {"choice": ("Earth", "Mars", "Moon")}, id="the guide's"),
    pytest.param(config('value="A comet" alias="comet"'), {"choice": ("comet",)}, id="named by its alias"),
    pytest.param(config('value="Comet" predicted_values="Mars"'), {"choice": ("Comet",)}, id="predicted_values"),
    pytest.param(config('value="mars"', 'value="Mars"'), {"choice": ("mars", "Mars")}, id="two spellings are two"),
    pytest.param(TWO, {"body": ("Mars", "Moon"), "flaws": ("dark", "blur")}, id="two controls"),
    pytest.param(f'<View>{IMAGE}<Text name="t" value="$t"/>'
                 '<Choices name="a" toName="image"><Choice value="Comet"/></Choices>'
                 '<Choices name="b" toName="t"><Choice value="Prose"/></Choices>'
                 '<Choices name="c" toName="image" perRegion="true"><Choice value="Part"/></Choices></View>',
                 {"a": ("Comet",)}, id="only controls on whole pictures"),
])
def test_every_control_learns_its_own_choices(label_config: str, choices: dict[str, tuple[str, ...]]) -> None:
    """Each stands for itself, whatever any model calls it."""
    choice_map = ChoiceMap.for_learning(label_config)
    assert {control.from_name: control.choices for control in choice_map.controls} == choices
    for control in choice_map.controls:
        assert dict(control.choice_of) == {choice: choice for choice in control.choices}
        assert control.columns.classes == control.choices


def test_what_is_learned_is_predicted() -> None:
    """Heads of all controls serve the config that they were learned with, and predictions are read back the same."""
    choice_map = ChoiceMap.for_learning(TWO)
    serving = ChoiceMap.from_config(TWO, (), [control.columns for control in choice_map.controls])
    assert serving.warnings == ()
    result, _ = serving.prediction({"image": (0.1, 0.9, 0.7, 0.2)})
    assert choice_map.choices_of(result) == {"body": ["Moon"], "flaws": ["dark"]}


@pytest.mark.parametrize("label_config", [
    "<View", "", f"<View>{IMAGE}</View>", f'<View>{IMAGE}<Choices name="c" toName="image"/></View>'])
def test_learning_needs_a_config_with_choices(label_config: str) -> None:
    """What cannot be served cannot be learned from."""
    with pytest.raises(LabelConfigError, match=r"not readable XML|has no Choices on an Image that the model can serve"):
        ChoiceMap.for_learning(label_config)


UNKNOWN = config('value="Mars"', 'value="Moon"', 'value="Other" predicted_values="none, __unknown__"')


@pytest.mark.parametrize(
    ("label_config", "ticked"),
    [
        pytest.param(values("Mars", "Moon"), [], id="no choice for it"),
        pytest.param(UNKNOWN, ["Other"], id="a choice for it"),
        pytest.param(UNKNOWN.replace("<Choices ", '<Choices choice="multiple" '), ["Other"], id="several choices"),
    ],
)
def test_a_picture_unlike_all_that_was_learned_gets_the_choice_for_such(label_config: str, ticked: list[str]) -> None:
    """Or none; and a score below that of any other picture, the stranger the lower."""
    choice_map, scores = ChoiceMap.from_config(label_config, CLASSES), []
    assert not any("Other" in warning for warning in choice_map.warnings), "no model can say it, and none need to"
    for strangeness in (0.1, 1.0):
        result, score = choice_map.prediction({"image": (0.01, 0.98, 0.01)}, {"image": [strangeness]})
        assert [choice for region in result for choice in region["value"]["choices"]] == ticked
        scores.append(score)
    assert 0.01 > scores[0] > scores[1] >= 0
    assert chosen(label_config, 0.01, 0.98, 0.01) == (["Mars"], 0.98), "a picture that is known is not concerned"


def test_what_one_head_has_not_learned_another_may_know() -> None:
    """Each control is about what its own head learned."""
    label_config = f"<View>{IMAGE}" + "".join(
        f'<Choices name="{name}" toName="image"><Choice value="a"/><Choice value="b"/></Choices>' for name in "xy"
    ) + "</View>"
    own = (Columns("x", 0, ("a", "b"), head=0), Columns("y", 2, ("a", "b"), head=1))
    choice_map = ChoiceMap.from_config(label_config, (), own)
    result, _ = choice_map.prediction({"image": (0.9, 0.1, 0.2, 0.8)}, {"image": [0.4, 0]})
    assert [(region["from_name"], region["value"]["choices"]) for region in result] == [("y", ["b"])]
