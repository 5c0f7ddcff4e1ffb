"""Label config ↔ classes: what is read, what is predicted, what Label Studio's own reader says to it."""

from __future__ import annotations

import math
import time
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from xml.sax.saxutils import quoteattr

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from label_studio_sdk.label_interface import LabelInterface

from celestial_backend.errors import FetchError, LabelConfigError, ModelError
from celestial_backend.labels import ChoiceMap

CLASSES = ["Earth", "Mars", "Moon"]
IMAGE = '<Image name="image" value="$image"/>'
GUIDE = (
    f'<View>{IMAGE}<Choices name="choice" toName="image"><Choice value="Earth"/><Choice value="Mars"/>'
    '<Choice value="Moon"/></Choices></View>'
)
relaxed = settings(max_examples=80, deadline=None, database=None)


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
    pytest.param(config('value="Earth" alias="e"', 'value="Moon" alias=""'), id="alias of a value, empty alias"),
    pytest.param(f'<View>{IMAGE}<Choices name="c" toName="image"><Choice value="Rocky"><Choice value="Earth"/>'
                 '<Choice value="Mars"/></Choice></Choices></View>', id="nested"),
    pytest.param(f'<View>{IMAGE}<Choices name="c" toName="image"><View><View><Choice value="Earth"/></View></View>'
                 '</Choices></View>', id="views between"),
    pytest.param('<View><Choices name="first" toName="b"><Choice value="Earth"/></Choices><Image name="a" value="$x"/>'
                 '<Image name="b" value="$y"/><Choices name="d" toName="a"><Choice value="Mars"/></Choices></View>',
                 id="two controls, two images, control before object"),
    pytest.param('<View><Text name="t" value="$t"/><Image name="i" value="$i"/><Image name="j" value="$j"/>'
                 '<Choices name="c" toName="t,j,i"><Choice value="Moon"/></Choices></View>', id="several toNames"),
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
        assert region["type"] == "choices"
        assert set(region["value"]["choices"]) <= set(interface.get_control(region["from_name"]).labels)
    assert 0 <= score <= 1


@pytest.mark.parametrize("label_config", CORPUS)
def test_names_keys_and_choices_are_those_that_label_studio_reads(label_config: str) -> None:
    """Controls, objects, data keys and choices agree with LabelInterface."""
    interface = LabelInterface(label_config)
    for control in ChoiceMap.from_config(label_config, CLASSES).controls:
        theirs = interface.get_control(control.from_name)
        assert list(control.choices) == theirs.labels
        assert control.to_name in theirs.to_name
        assert control.data_key == interface.get_object(control.to_name).value_name
        assert control.multiple == theirs.is_multiple_choice


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


def test_single_gives_the_best_offered_class_with_its_own_probability() -> None:
    """The score is neither renormalised over the offered choices nor summed over a choice's classes."""
    assert chosen(values("Earth", "Moon"), 0.2, 0.7, 0.1) == (["Earth"], 0.2)
    rock = config('value="Rock" predicted_values="Earth,Mars"', 'value="Moon"')
    assert chosen(rock, 0.3, 0.25, 0.45) == (["Moon"], 0.45)
    assert chosen(rock, 0.3, 0.4, 0.3) == (["Rock"], 0.4)


def test_multiple_gives_all_that_reach_the_threshold_and_each_choice_once() -> None:
    """The default threshold is a half, reached counts, the best comes first and stays if none was set."""
    assert chosen(values(*CLASSES, head='choice="multiple"'), 0.5, 0.9, 0.49) == (["Mars", "Earth"], 0.9)
    assert chosen(values(*CLASSES, head='choice="multiple"'), 0.1, 0.2, 0.4) == (["Moon"], 0.4)
    rock = config('value="Rock" predicted_values="Earth,Mars"', 'value="Moon"', head='choice="multiple"')
    assert chosen(rock, 0.8, 0.9, 0.6) == (["Rock", "Moon"], 0.9)


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
    pytest.param("", '<Text name="image" value="$t"/>', "no Image is among its toName ['image']", id="Text"),
    pytest.param("", '<image name="image" value="$t"/>', "no Image is among its toName ['image']", id="case of tags"),
    pytest.param("", '<Image name="image" valueList="$l"/>',
                 "the Image 'image' shows a list (valueList) or has no value of the form $key", id="valueList"),
    pytest.param("", '<Image name="image" value="$image" valueList="$l"/>',
                 "the Image 'image' shows a list (valueList) or has no value of the form $key", id="value, valueList"),
    pytest.param("", '<Image name="image" value="http://x/$image"/>',
                 "the Image 'image' shows a list (valueList) or has no value of the form $key", id="no key"),
    pytest.param("", '<Image name="image" value="$images[{{i}}]"/>',
                 "the Image 'image' shows a list (valueList) or has no value of the form $key", id="Repeater"),
])
def test_a_control_that_cannot_be_served_is_skipped_with_its_reason(head: str, image: str, reason: str) -> None:
    """Alone it is an error that names the reason; beside another control it is a warning."""
    alone = config('value="Earth"', head=head, image=image)
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


def test_a_config_without_a_known_class_names_both_lists() -> None:
    """The sentence says what to do; it is what a person reads at Validate and Save."""
    with pytest.raises(LabelConfigError) as caught:
        ChoiceMap.from_config(values("Cat", "Dog"), CLASSES)
    assert str(caught.value) == (
        "None of the choices ['Cat', 'Dog'] is a class of the model ['Earth', 'Mars', 'Moon']. "
        "Rename a choice or add predicted_values.")


@pytest.mark.parametrize("name", ["galaxy", "x" * 900, "a\nb\r\n", "a\u2028b", "\U000e0001" * 50])
def test_a_long_or_odd_list_is_shortened_to_one_line(name: str) -> None:
    """The sentence fits into a status line whatever the config and the model hold, remedy included."""
    label_config = config(*(f'value="{number} {name.replace(chr(10), "&#10;").replace(chr(13), "&#13;")}"'
                            for number in range(500)))
    with pytest.raises(LabelConfigError) as caught:
        ChoiceMap.from_config(label_config, [f"{name} {number}" for number in range(500)])
    message = str(caught.value)
    assert len(message) <= 400
    assert len(message.splitlines()) == 1
    assert message.endswith(", ...]. Rename a choice or add predicted_values.")


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
    pytest.param("", "not readable XML", id="empty"),
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
    pytest.param("<View></View>", "no Choices on an Image", id="no control"),
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


def test_deep_nesting_and_ten_thousand_choices_are_read_fast() -> None:
    """No recursion limit is met, and a huge config takes well under a second."""
    deep = f"<View>{'<View>' * 50_000}{values('Earth')}{'</View>' * 50_000}</View>"
    assert one(deep).choices == ("Earth",)
    classes = [f"class {number}" for number in range(10_000)]
    label_config = values(*(name.upper() for name in classes))
    start = time.process_time()
    choice_map = ChoiceMap.from_config(label_config, classes)
    assert time.process_time() - start < 1
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


@pytest.mark.parametrize(("key", "expected"), [("image", "a"), ("data.image.url", "b"), ("data.x", "literal"),
                                               ("none", None)])
def test_a_value_is_found_by_key_and_by_path(key: str, expected: object) -> None:
    """A literal key with dots goes before the path, and an empty value is a value."""
    task = {"image": "a", "data": {"image": {"url": "b"}, "x": "path"}, "data.x": "literal", "none": None}
    assert ChoiceMap.value_of(task, key) == expected


@pytest.mark.parametrize(("task", "known"), [({"img": "secret"}, "['img']"), ({}, "[]"), (None, "[]"),
                                             ({"data": "text"}, "['data']"), ({"data": {"image": []}}, "['data']")])
def test_a_missing_key_costs_that_task_with_a_sentence(task: Any, known: str) -> None:
    """The message names the key and what the task has, and none of its values."""
    with pytest.raises(FetchError) as caught:
        ChoiceMap.value_of(task, "data.image.url")
    assert str(caught.value) == (
        f"The task has no data key 'data.image.url' that the label config names; it has {known}.")


def region(*choices: object, **more: object) -> dict[str, Any]:
    return {"id": "r", "from_name": "choice", "to_name": "image", "type": "choices",
            "value": {"choices": list(choices)}, **more}


def test_annotations_become_classes_again() -> None:
    """A choice is its class, a choice that is none is a new class, and each is named once."""
    choice_map = ChoiceMap.from_config(values("EARTH", "Comet"), CLASSES)
    assert choice_map.classes_of([region("EARTH", "Comet"), region("EARTH")]) == {"choice": ["Earth", "Comet"]}


def test_a_choice_of_several_classes_is_its_namesake_or_else_the_first() -> None:
    """The way back is one class: the one spelled so, or else so but for case, or else the model's first."""
    rock = config('value="mars" predicted_values="Earth,Mars,Moon"')
    assert one(rock).class_of == {"mars": "Mars"}
    assert one(rock, ["Earth", "Mars", "mars"]).class_of == {"mars": "mars"}
    assert one(config('value="Rock" predicted_values="Moon,Mars"')).class_of == {"Rock": "Mars"}


@pytest.mark.parametrize("result", [
    None, "Earth", {}, [], [None], ["Earth"], [1], [region()], [region(["Rocky", "Earth"], None, 3, "")],
    [region("Earth", from_name="other")], [region("Earth", from_name=["choice"])], [region("Earth", to_name="other")],
    [region("Earth", value="Earth")], [region("Earth", value={"choices": "Earth"})], [region("Earth", value=None)],
    [{"from_name": "choice"}], [{"type": "relation", "from_id": "a", "to_id": "b"}],
], ids=repr)
def test_what_names_no_class_is_passed_over(result: Any) -> None:
    """Empty choices, paths, other regions and broken ones give nothing and raise nothing."""
    assert ChoiceMap.from_config(GUIDE, CLASSES).classes_of(result) == {}


names = st.text(st.characters(exclude_categories=["Cs", "Cc", "Cn", "Z"]), min_size=1, max_size=8).filter(
    lambda name: name.strip() and "$" not in name)
odd_numbers = st.one_of(st.floats(), st.integers(), st.none(), st.text(max_size=3), st.booleans())


@relaxed
@given(st.lists(names, min_size=1, max_size=6, unique_by=lambda name: unicodedata.normalize("NFC", name).casefold()),
       st.data())
def test_single_gives_exactly_one_offered_choice_and_its_class_comes_back(classes: list[str], data: Any) -> None:
    """For any names and any numbers: one offered choice, a score from 0 to 1, and class -> choice -> class."""
    offered = data.draw(st.lists(st.sampled_from(classes), min_size=1, unique=True))
    choice_map = ChoiceMap.from_config(values(*offered), classes)
    row = data.draw(st.lists(odd_numbers, min_size=len(classes), max_size=len(classes)))
    (found,), score = choice_map.prediction({"image": row})
    (choice,) = found["value"]["choices"]
    assert choice in offered
    assert 0 <= score <= 1
    assert choice_map.classes_of([found]) == {"choice": [choice_map.controls[0].class_of[choice]]}
    for class_name, its_choice in choice_map.controls[0].choice_of.items():
        assert choice_map.controls[0].class_of[its_choice] == class_name


@relaxed
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


@settings(relaxed, max_examples=300)
@given(elements.map(as_xml) | st.text(max_size=30), st.lists(odd_numbers, min_size=3, max_size=3))
def test_odd_configs_give_a_map_or_a_label_config_error(label_config: str, row: list[Any]) -> None:
    """Nothing else is ever raised, and whatever is predicted is offered."""
    lengths = [1]
    for text in (label_config, GUIDE.replace("</View>", f"{label_config}</View>")):
        try:
            learning = ChoiceMap.for_learning(text, CLASSES)
            assert learning.classes[:3] == tuple(CLASSES)
            assert all(control.choice_of for control in learning.controls)
            choice_map = ChoiceMap.from_config(text, CLASSES)
        except LabelConfigError as error:
            lengths.append(len(str(error)))
            continue
        result, score = choice_map.prediction(dict.fromkeys(choice_map.data_keys, row))
        assert 0 <= score <= 1
        offered = {control.from_name: control.choices for control in choice_map.controls}
        assert all(set(found["value"]["choices"]) <= set(offered[found["from_name"]]) for found in result)
    assert 0 < min(lengths) <= max(lengths) <= 400


# Learning


def learned(label_config: str, classes: list[str] = CLASSES) -> ChoiceMap:
    return ChoiceMap.for_learning(label_config, classes)


@pytest.mark.parametrize(("label_config", "new"), [
    pytest.param(GUIDE, [], id="no new choice"),
    pytest.param(values("Comet", "EARTH", "Nebula"), ["Comet", "Nebula"], id="new ones, in the config's order"),
    pytest.param(values("Comet", "Nebula"), ["Comet", "Nebula"], id="none is a class of the model"),
    pytest.param(config('value="A comet" alias="comet"'), ["comet"], id="named by its alias"),
    pytest.param(config('value="Comet" predicted_values="Mars"'), [], id="predicted_values"),
    pytest.param(config('value="Mars"', 'value="Red" predicted_values="Mars"'), [], id="another choice's class"),
    pytest.param(config('value="mars"', 'value="Mars"'), ["mars"], id="two spellings are two classes"),
    pytest.param(f'<View>{IMAGE}<Choices name="a" toName="image"><Choice value="Comet"/></Choices>'
                 '<Choices name="b" toName="image"><Choice value="COMET"/><Choice value="Dust"/></Choices></View>',
                 ["Comet", "Dust"], id="one class over two controls"),
    pytest.param(f'<View>{IMAGE}<Text name="t" value="$t"/>'
                 '<Choices name="a" toName="image"><Choice value="Comet"/></Choices>'
                 '<Choices name="b" toName="t"><Choice value="Prose"/></Choices>'
                 '<Choices name="c" toName="image" perRegion="true"><Choice value="Part"/></Choices></View>',
                 ["Comet"], id="only controls on whole pictures"),
])
def test_every_choice_stands_for_a_class(label_config: str, new: list[str]) -> None:
    """For learning, choices that match no class are new classes behind those of the model."""
    assert learned(label_config).classes == (*CLASSES, *new)


def test_what_is_learned_is_predicted() -> None:
    """A model that has learned the classes of a config serves it, and its predictions are read back as they were."""
    label_config = config('value="A comet" alias="comet"', 'value="EARTH"', 'value="Dust, red" predicted_values="Mars"')
    choice_map = learned(label_config)
    serving = ChoiceMap.from_config(label_config, choice_map.classes)
    for number, class_name in enumerate(choice_map.classes):
        row = [float(place == number) for place in range(len(choice_map.classes))]
        result, _ = serving.prediction({"image": row})
        if class_name != "Moon":  # no choice stands for it
            assert choice_map.classes_of(result) == {"choice": [class_name]}
    assert choice_map.classes_of([{"from_name": "choice", "to_name": "image", "type": "choices",
                                   "value": {"choices": ["EARTH"]}}]) == {"choice": ["Earth"]}


def test_learning_needs_a_config_with_choices() -> None:
    """What cannot be served cannot be learned from, and says the same."""
    for label_config in ("<View", f"<View>{IMAGE}</View>", f'<View>{IMAGE}<Choices name="c" toName="image"/></View>'):
        with pytest.raises(LabelConfigError) as raised:
            learned(label_config)
        with pytest.raises(LabelConfigError) as expected:
            ChoiceMap.from_config(label_config, CLASSES)
        assert str(raised.value) == str(expected.value)
