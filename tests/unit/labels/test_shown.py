"""What the page hides is not predicted, and not learned: visibleWhen against the editor's own rules, written anew."""

from __future__ import annotations

from typing import Any, NamedTuple
from xml.sax.saxutils import quoteattr

import pytest
from hypothesis import given, seed
from hypothesis import strategies as st
from label_studio_sdk.label_interface import LabelInterface

from celestial_backend.errors import LabelConfigError
from celestial_backend.labels import CONTROLS_MAX, ChoiceMap, read
from celestial_backend.learning.votes import HIDDEN, votes_of
from tests.support.cases import cases

WHEN = 'visibleWhen="choice-selected"'
MARS = '<Choice value="Mars"/>'
PLANETS = ["Jupiter", "Saturn", "Earth", "Mars"]
GAS = (
    '<View><Image name="image" value="$image"/><Choices name="level1" toName="image">'
    '<Choice value="Gas giant" alias="gas" predicted_values="Jupiter,Saturn"/>'
    '<Choice value="Rocky" predicted_values="Earth,Mars"/></Choices>'
    '<Choices name="gas" toName="image" visibleWhen="choice-selected" whenTagName="level1" whenChoiceValue="Gas giant">'
    '<Choice value="Jupiter"/><Choice value="Saturn"/></Choices>'
    '<View visibleWhen="choice-selected" whenTagName="level1" whenChoiceValue="Rocky"><View>'
    '<Choices name="rocky" toName="image" choice="multiple"><Choice value="Earth"/><Choice value="Mars"/></Choices>'
    "</View></View></View>"
)


def predicted(label_config: str, *row: float, classes: list[str] = PLANETS) -> tuple[dict[str, list[str]], float]:
    """The choices of each control that is predicted, and the task's score."""
    choice_map = ChoiceMap.from_config(label_config, classes)
    result, score = choice_map.prediction(dict.fromkeys(choice_map.data_keys, row))
    return {region["from_name"]: region["value"][region["type"]] for region in result}, score


def test_a_control_that_the_page_hides_is_not_predicted() -> None:
    """Nor is the score of the task its score."""
    assert predicted(GAS, 0.5, 0.375, 0.0625, 0.0625) == ({"level1": ["gas"], "gas": ["Jupiter"]}, 0.5)
    assert predicted(GAS, 0.0625, 0.0625, 0.125, 0.75) == ({"level1": ["Rocky"], "rocky": ["Mars"]}, 0.75)


@pytest.mark.parametrize(("head", "shown"), [
    ('visibleWhen="choice-selected" whenTagName="a" whenChoiceValue="Earth"', True),
    ('visiblewhen="choice-selected" whentagname="a" WHENCHOICEVALUE="Moon,Earth"', True),
    ('visibleWhen="choice-selected" whenTagName="a" whenChoiceValue="Moon, Earth"', False),
    ('visibleWhen="choice-selected" whenTagName="a" whenChoiceValue="EARTH"', False),
    ('visibleWhen="choice-selected" whenTagName="a"', True),
    ('visibleWhen="choice-selected"', True),
    ('visibleWhen="choice-selected" whenChoiceValue="Earth"', True),
    ('visibleWhen="choice-selected" whenChoiceValue="Mars"', False),
    ('visibleWhen="choice-unselected" whenTagName="a" whenChoiceValue="Earth"', False),
    ('visibleWhen="choice-unselected" whenTagName="a" whenChoiceValue="Mars"', True),
    ('visibleWhen="choice-unselected" whenTagName="a" whenChoiceValue="gone"', True),
    ('visibleWhen="choice-unselected" whenTagName="a"', False),
    ('visibleWhen="choice-unselected" whenTagName="nobody"', True),
    ('visibleWhen="choice-unselected" whenTagName="nobody" whenChoiceValue="x"', False),
    ('visibleWhen="choice-unselected"', False),
    ('visibleWhen="choice-selected" whenTagName="nobody"', False),
    ('visibleWhen="choice-selected" whenTagName="b"', False),
    ('visibleWhen="choice-unselected" whenTagName="b"', False),
    ('visibleWhen="region-selected"', False),
    ('visibleWhen="no-region-selected"', True),
    ('visibleWhen="sometimes" whenChoiceValue="x"', True),
    ('whenChoiceValue="Earth"', True),
    ('whenChoiceValue="Earth,Mars"', False),
    ('whenTagName="a"', True),
])  # fmt: skip
@pytest.mark.parametrize("place", ["control", "view"])
def test_a_condition_means_what_it_means_to_the_editor(head: str, shown: bool, place: str) -> None:
    """At the control itself, or at a View around it; any other control is predicted as ever."""
    at_control, at_view = (head, "") if place == "control" else ("", head)
    label_config = (
        '<View><Image name="image" value="$image"/><Choices name="a" toName="image"><Choice value="Earth"/>'
        f'<Choice value="Mars"/></Choices><View {at_view}><Choices name="b" toName="image" {at_control}>'
        '<Choice value="Jupiter" predicted_values="Earth"/></Choices></View></View>'
    )
    if 'whenChoiceValue="Mars"' in head and place == "view" and "whenTagName" not in head:
        shown = True  # of any control, a View looks only whether something is chosen
    said, score = predicted(label_config, 0, 0, 0.75, 0.25)
    assert said == ({"a": ["Earth"], "b": ["Jupiter"]} if shown else {"a": ["Earth"]})
    assert score == 0.75


@pytest.mark.parametrize(("own", "view", "shown"), [
    ('whenTagName="t" whenChoiceValue="Earth"', "", False), ("", 'whenTagName="t" whenChoiceValue="Earth"', True),
    ("", 'whenTagName="t" whenChoiceValue="e"', True), ("", 'whenTagName="t" whenChoiceValue="Rock"', False),
    ('whenTagName="t"', "", True),
])  # fmt: skip
def test_what_depends_on_a_taxonomy(own: str, view: str, shown: bool) -> None:
    """A View is shown by the last name of a path; what a control says of itself there, Submit forgets."""
    label_config = (
        '<View><Image name="image" value="$image"/><Taxonomy name="t" toName="image"><Choice value="Rock">'
        f'<Choice value="Earth" alias="e"/></Choice></Taxonomy><View {WHEN if view else ""} {view}>'
        f'<Choices name="b" toName="image" {WHEN if own else ""} {own}><Choice value="Earth"/></Choices></View></View>'
    )
    assert predicted(label_config, 0, 0, 1, 0)[0] == {"t": [["Rock", "e"]]} | ({"b": ["Earth"]} if shown else {})


def test_a_chain_of_conditions_is_followed_in_whatever_order() -> None:
    """What hangs on a hidden control is hidden too."""
    chain = [
        f'<Choices {WHEN} whenTagName="b" name="c" toName="image"><Choice value="Mars"/></Choices>',
        f'<Choices {WHEN} whenTagName="a" whenChoiceValue="Earth" name="b" toName="image">{MARS}</Choices>',
        '<Choices name="a" toName="image"><Choice value="Earth"/><Choice value="Mars"/></Choices>',
    ]
    for controls in (chain, chain[::-1]):
        label_config = f'<View><Image name="image" value="$image"/>{"".join(controls)}</View>'
        assert predicted(label_config, 0, 0, 0.5, 0.5)[0] == {"a": ["Earth"], "b": ["Mars"], "c": ["Mars"]}
        assert predicted(label_config, 0, 0, 0.25, 0.75)[0] == {"a": ["Mars"]}


BRANCHES = (
    '<View><Image name="image" value="$image"/><Taxonomy name="t" toName="image"><Choice value="Rock">'
    '<Choice value="Mars"/><Choice value="Other"/></Choice><Choice value="Gas"><Choice value="Earth"/>'
    '<Choice value="Other" predicted_values="Jupiter"/></Choice></Taxonomy><View visibleWhen="WHEN" whenTagName="t" '
    'whenChoiceValue="Other"><Choices name="c" toName="image"><Choice value="Saturn" predicted_values="Jupiter"/>'
    "</Choices></View></View>"
)


@pytest.mark.parametrize(("when", "shown"), [("choice-selected", True), ("choice-unselected", False)])
def test_a_name_in_several_branches_fulfils_from_each(when: str, shown: bool) -> None:
    """The editor compares the last name of a path alone."""
    said = predicted(BRANCHES.replace("WHEN", when), 1, 0, 0, 0)[0]
    assert said == {"t": [["Gas", "Other"]]} | ({"c": ["Saturn"]} if shown else {})


def test_what_is_left_in_a_hidden_control_fulfils_nothing() -> None:
    """In reading what people said, too: the page asked for what hangs on it as if nothing was ticked there."""
    label_config = (
        '<View><Image name="image" value="$image"/><Choices name="a" toName="image"><Choice value="Mars"/>'
        '<Choice value="Earth"/></Choices><View visibleWhen="choice-unselected" whenTagName="a" whenChoiceValue="Mars">'
        '<Choices name="b" toName="image"><Choice value="Mars"/><Choice value="Earth"/></Choices></View>'
        '<View visibleWhen="choice-unselected" whenTagName="b" whenChoiceValue="Mars"><Choices name="c" toName="image">'
        '<Choice value="Mars"/><Choice value="Earth"/></Choices></View></View>'
    )
    task = {"id": 1, "data": {}, "annotations": [annotation(1, a=["Mars"], b=["Mars"], c=["Earth"])]}
    votes, left_out = votes_of(task, ChoiceMap.for_learning(label_config))
    assert [vote.control for vote in votes] == ["a", "c"]
    assert left_out == {HIDDEN: 1}


@pytest.mark.parametrize("head", ['visibleWhen="choice-selected"', 'whenChoiceValue="Earth"'])
def test_what_looks_at_all_controls_was_asked_wherever_they_stand(head: str) -> None:
    """Also before the one that fulfils it."""
    label_config = (
        f'<View><Image name="image" value="$image"/><Choices name="b" toName="image" {head}><Choice value="Mars"/>'
        '<Choice value="Moon"/></Choices><Choices name="a" toName="image"><Choice value="Earth"/></Choices></View>'
    )
    task = {"id": 1, "data": {}, "annotations": [annotation(1, a=["Earth"], b=["Mars"])]}
    votes, _ = votes_of(task, ChoiceMap.for_learning(label_config))
    assert [vote.control for vote in votes] == ["b", "a"]


def annotation(number: int, **said: list[str]) -> dict[str, Any]:
    result = [
        {"from_name": name, "to_name": "image", "type": "choices", "value": {"choices": choices}}
        for name, choices in said.items()
    ]
    return {"id": number, "completed_by": number, "updated_at": "2026-01-01T00:00:00Z", "result": result}


def test_what_the_page_hid_is_no_label() -> None:
    """Neither "none of them", for a control of several choices, nor what was left ticked in a View that closed."""
    choices = ChoiceMap.for_learning(GAS)
    task = {"id": 1, "data": {}, "annotations": [
        annotation(1, level1=["gas"], gas=["Saturn"]),
        annotation(2, level1=["Rocky"]),
        annotation(3, level1=["gas"], gas=["Jupiter"], rocky=["Mars"]),
    ]}  # fmt: skip
    votes, left_out = votes_of(task, choices)
    assert [(vote.annotation_id, vote.control, set(vote.choices)) for vote in votes] == [
        (1, "level1", {"gas"}), (1, "gas", {"Saturn"}), (2, "level1", {"Rocky"}), (2, "rocky", set()),
        (3, "level1", {"gas"}), (3, "gas", {"Jupiter"}),
    ]  # fmt: skip
    assert left_out == {HIDDEN: 3}


def test_what_hangs_on_a_control_that_is_not_served_is_asked_where_it_is_answered() -> None:
    """Its choices are not read, so nobody knows what the page showed."""
    label_config = GAS.replace('<Choices name="level1" toName="image">', '<Choices name="level1" toName="image" '
                               'model_skip="true">')  # fmt: skip
    task = {"id": 1, "data": {}, "annotations": [annotation(1, gas=["Saturn"]), annotation(2)]}
    votes, left_out = votes_of(task, ChoiceMap.for_learning(label_config))
    assert [(vote.annotation_id, vote.control) for vote in votes] == [(1, "gas")]
    assert left_out == {HIDDEN: 3}


# Any config against the editor's rules


class Drawn(NamedTuple):
    """A control of a drawn config."""

    kind: str
    name: str
    multiple: bool
    choices: tuple[tuple[str, str, str], ...]  # value, alias, predicted_values
    conditions: tuple[dict[str, str], ...]  # of the Views around it, and last its own


NAMES = ["a", "b", "c", "d"]
CLASSES = ["Earth", "Mars", "Moon", "Sun"]
condition = st.fixed_dictionaries({}, optional={
    "visibleWhen": st.sampled_from(["choice-selected", "choice-unselected", "region-selected", "no-region-selected",
                                    "odd"]),
    "whenTagName": st.sampled_from([*NAMES, "nobody"]),
    "whenChoiceValue": st.sampled_from(["Earth", "Mars", "m", "Mars,Moon", "EARTH", "Earth, m"]),
})  # fmt: skip
choice = st.tuples(
    st.sampled_from([*CLASSES, "EARTH", "mars ", "Other"]), st.sampled_from(["", "", "m", "Sun"]),
    st.sampled_from(["", "", "Earth,Sun", "moon, Mars"]),
)  # fmt: skip


@st.composite
def configs(draw: st.DrawFn) -> list[Drawn]:
    """Controls with conditions of their own and Views with conditions around them."""
    names = draw(st.lists(st.sampled_from(NAMES), min_size=1, unique=True))
    return [
        Drawn(
            draw(st.sampled_from(["Choices", "Choices", "Taxonomy"])), name, draw(st.booleans()),
            tuple(draw(st.lists(choice, min_size=1, max_size=4))),
            (*draw(st.lists(condition, max_size=2)), draw(condition)),
        )
        for name in names
    ]  # fmt: skip


def as_xml(controls: list[Drawn], images: int) -> str:
    text = "".join(f'<Image name="image{number}" value="$image{number}"/>' for number in range(images))
    for place, control in enumerate(controls):
        *views, own = control.conditions
        head = {"name": control.name, "toName": f"image{place % images}", **own}
        head |= {"choice": "multiple"} if control.multiple else {}
        inside = "".join(
            f"<Choice value={quoteattr(value)}" + (f" alias={quoteattr(alias)}" if alias else "")
            + (f" predicted_values={quoteattr(names)}" if names else "") + "/>"
            for value, alias, names in control.choices
        )  # fmt: skip
        element = f"<{control.kind} {attributes(head)}>{inside}</{control.kind}>"
        for view in reversed(views):
            element = f"<View {attributes(view)}>{element}</View>"
        text += element
    return f"<View>{text}</View>"


def attributes(given: dict[str, str]) -> str:
    return " ".join(f"{name}={quoteattr(value)}" for name, value in given.items())


def visible(condition: dict[str, str], said: dict[str, list[str]], controls: dict[str, Drawn]) -> bool:
    """The editor's `isVisible` of one element, as its source says it."""
    when, tag = condition.get("visibleWhen", ""), condition.get("whenTagName", "")
    values = condition.get("whenChoiceValue", "")
    if when in ("choice-selected", "choice-unselected"):
        if not tag:
            chosen = any(said.get(name) for name, each in controls.items() if each.kind == "Choices")
        elif tag not in controls:
            if values:
                return False  # the page breaks
            chosen = False
        elif not values:
            chosen = bool(said.get(tag))
        else:
            found = [find(controls[tag], value) for value in values.split(",")]
            chosen = any(name is not None and name in said.get(tag, []) for name in found)
        return chosen == (when == "choice-selected")
    if when:
        return when != "region-selected"
    if values:
        return any(values in said.get(name, []) for name, each in controls.items() if each.kind == "Choices")
    return True


def kept(own: dict[str, str], controls: dict[str, Drawn]) -> bool:
    """Whether Submit keeps an answer that is shown; seen, and not meant so."""
    on = controls.get(own.get("whenTagName", ""))
    when, values = own.get("visibleWhen"), own.get("whenChoiceValue")
    return not (on is not None and on.kind == "Taxonomy" and values and when == "choice-selected")


def find(control: Drawn, value: str) -> str | None:
    """What Label Studio writes for the first choice with this alias or value."""
    return next((alias or name for name, alias, _ in control.choices if value in (alias or name, name)), None)


@seed(21)
@cases(200)
@given(configs(), st.integers(1, 3), st.lists(st.integers(0, 8), min_size=4, max_size=4), st.data())
def test_nothing_is_predicted_that_the_editor_would_not_show_or_take(
    controls: list[Drawn], images: int, shares: list[int], data: Any
) -> None:
    """Of any config: each region's control is shown with all that is ticked, each choice can be ticked and is meant."""
    text = as_xml(controls, images)
    try:
        choice_map = ChoiceMap.from_config(text, CLASSES)
    except LabelConfigError:
        return
    row = [share / (sum(shares) or 1) for share in shares]
    missing = data.draw(st.sets(st.sampled_from(choice_map.data_keys), max_size=1)) if choice_map.controls else ()
    result, score = choice_map.prediction({key: row for key in choice_map.data_keys if key not in missing})
    prediction = {"result": result, "score": score, "model_version": "celestial:1"}
    assert LabelInterface(text).validate_prediction(prediction, return_errors=True) == []
    drawn = {control.name: control for control in controls}
    said = {
        region["from_name"]: [each if isinstance(each, str) else each[-1] for each in region["value"][region["type"]]]
        for region in result
    }
    scores = [region["score"] for region in result]
    assert score <= min(scores, default=1)
    for region in result:
        control, ticked = drawn[region["from_name"]], said[region["from_name"]]
        assert region["to_name"] not in missing
        assert all(visible(each, said, drawn) for each in control.conditions)
        assert kept(control.conditions[-1], drawn)
        names = [alias or value for value, alias, _ in control.choices]
        assert set(ticked) <= set(names)
        if control.kind == "Choices" and not control.multiple:
            assert len(ticked) == 1
            assert names.count(ticked[0]) == 1  # the editor would tick both, and then take neither


def test_a_config_with_very_many_conditions_is_read() -> None:
    """Controls that look at all others are served as others are; of Views in each other some are enough."""
    many = "".join(
        f'<Choices name="c{number}" toName="image" visibleWhen="choice-selected"><Choice value="Earth"/></Choices>'
        for number in range(5000)
    )
    head = (
        '<View><Image name="image" value="$image"/><Choices name="a" toName="image"><Choice value="Earth"/></Choices>'
    )
    choice_map = ChoiceMap.from_config(f"{head}{many}</View>", CLASSES)
    assert len(choice_map.controls) == len(choice_map.prediction({"image": [1, 0, 0, 0]})[0]) == CONTROLS_MAX
    deep = '<View visibleWhen="choice-selected">' * 3000
    with pytest.raises(LabelConfigError, match="may nest 20 conditions"):
        read(f"{head}{deep}{'</View>' * 3000}</View>")
