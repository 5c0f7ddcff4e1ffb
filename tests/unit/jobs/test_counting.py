"""How many labels of which choices there are, and the sentence that says how many are missing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from celestial_backend.errors import LabelConfigError
from celestial_backend.jobs.counting import LabelCounts, enough_new, missing
from celestial_backend.labels import ChoiceMap
from tests.support.backend_server import label_config

CLOTHES = label_config(["dress", "hat", "shoe"])
SEVERAL = CLOTHES.replace("<Choices ", '<Choices choice="multiple" ')
TWO = """<View><Image name="image" value="$image"/>
    <Choices name="kind" toName="image"><Choice value="dress"/><Choice value="hat"/></Choices>
    <Choices name="colour" toName="image"><Choice value="red"/><Choice value="blue"/></Choices></View>"""


def given(*choices: str, control: str = "choice", person: int = 1, at: int = 0, **more: Any) -> dict[str, Any]:
    """An annotation as Label Studio gives it, as far as it matters."""
    region = {"from_name": control, "to_name": "image", "type": "choices", "value": {"choices": list(choices)}}
    return {"id": 10 * person + at, "completed_by": person, "result": [region], "was_cancelled": False,
            "ground_truth": False, "updated_at": f"2026-11-23T01:02:{at:02}Z"} | more  # fmt: skip


def labels(**counts: int) -> list[list[dict[str, Any]]]:
    """So many tasks with one annotation of each choice."""
    return [[given(choice)] for choice, count in counts.items() for _ in range(count)]


def pictures(*tasks: Sequence[dict[str, Any]], config: str = CLOTHES) -> dict[str, dict[str, int]]:
    """What is counted, without zeros."""
    counts = LabelCounts(ChoiceMap.for_learning(config))
    for task in tasks:
        counts.add(task)
    return {name: {choice: n for choice, n in found.items() if n} for name, found in counts.pictures.items()}


@pytest.mark.parametrize(
    ("tasks", "said"),
    [
        pytest.param([], "no labels yet; at least 2 choices need 3 labels each, so label 3 pictures each of 2 choices.",
                     id="none"),
        pytest.param(labels(dress=4, hat=1), "4 labels of 'dress' and 1 of 'hat'; at least 2 choices need 3 labels"
                     " each, so label 2 more pictures of 'hat'.", id="one is short"),
        pytest.param(labels(hat=1, dress=2), "2 labels of 'dress' and 1 of 'hat'; at least 2 choices need 3 labels"
                     " each, so label 1 more picture of 'dress' and 2 of 'hat'.", id="both are short"),
        pytest.param(labels(dress=1), "1 label of 'dress'; at least 2 choices need 3 labels each, so label 2 more"
                     " pictures of 'dress' and 3 of another choice.", id="any other will do"),
        pytest.param(labels(dress=50), "50 labels of 'dress'; at least 2 choices need 3 labels each, so label 3 more"
                     " pictures of another choice.", id="one alone"),
        pytest.param(labels(dress=3, hat=2, shoe=2), "3 labels of 'dress', 2 of 'hat' and 2 of 'shoe'; at least 2"
                     " choices need 3 labels each, so label 1 more picture of 'hat'.", id="the next best"),
    ],
)  # fmt: skip
def test_what_is_missing_is_a_sentence(tasks: list[Any], said: str) -> None:
    """With the labels there are, and the fewest that will do."""
    assert missing(CLOTHES, tasks) == f"choice: {said}"


def test_two_choices_with_three_labels_each_are_enough() -> None:
    """And no task more than that takes is read."""
    tasks = iter([*labels(shoe=1, dress=3, hat=3), *labels(dress=1)])
    assert missing(CLOTHES, tasks) is None
    assert len(list(tasks)) == 1


def test_a_sentence_is_short_however_many_choices_there_are() -> None:
    """And on one line, whatever they are called."""
    names = [f"{number}\N{LATIN SMALL LETTER A}" * 500 for number in range(500)]
    tasks = [[given(name)] for name in names]
    said = missing(label_config(names), tasks)
    assert said is not None
    assert "and 496 of other choices; at least" in said
    assert len(said) < 500
    named = missing(label_config(["a", "b"]).replace('"choice"', f'"{"c&#10;" * 90}"'), [])
    assert named is not None
    assert "\n" not in named
    assert len(named) < 200


def test_of_several_controls_the_nearest_is_named() -> None:
    """One that can be learned is enough."""
    tasks = [[given("dress", control="kind")], *([given("red", control="colour")] for _ in range(3))]
    assert missing(TWO, tasks) == (
        "colour: 3 labels of 'red'; at least 2 choices need 3 labels each, so label 3 more pictures of 'blue'."
    )
    assert missing(TWO, [*tasks, *([given("blue", control="colour")] for _ in range(3))]) is None


def test_each_annotator_is_heard_once() -> None:
    """By the newest annotation that was not skipped; ground truths go before all others."""
    assert pictures([given("hat", at=2), given("dress", at=1), given("shoe", at=3, was_cancelled=True)]) == {
        "choice": {"hat": 1}
    }
    assert pictures([given("hat"), given("dress", person=2, ground_truth=True)]) == {"choice": {"dress": 1}}


def test_where_annotators_do_not_agree_most_of_them_are_right() -> None:
    """A tie is of no account; of several choices those count that more than half have made."""
    three = [given("hat", person=person) for person in (1, 2)] + [given("dress", person=3)]
    assert pictures(three) == {"choice": {"hat": 1}}
    assert pictures(three[1:]) == {"choice": {}}
    several = [given("hat", "shoe"), given("hat", person=2), given("dress", "shoe", person=3)]
    assert pictures(several, config=SEVERAL) == {"choice": {"hat": 1, "shoe": 1}}
    assert pictures(several[:2], config=SEVERAL) == {"choice": {"hat": 1}}


def test_what_says_nothing_of_the_config_is_not_counted() -> None:
    """Choices that are not on offer, several where one is asked for, other controls, no choice, rubbish."""
    strange = [[given("coat")], [given("hat", "dress")], [given("hat", control="other")], [given()],
               [given("hat") | {"result": None}], [given("hat") | {"result": [5]}], []]  # fmt: skip
    assert pictures(*strange) == {"choice": {}}


def test_accounts_that_are_gone_are_different_people() -> None:
    """As their annotations do not tell whose they were."""
    gone = [given("hat", person=1, completed_by=None), given("hat", person=2, completed_by=None)]
    assert pictures([*gone, given("dress", person=3)]) == {"choice": {"hat": 1}}


@pytest.mark.parametrize(
    "config", ["<View/>", "<View>", '<View><Image name="i" value="$i"/><Rating name="r" toName="i"/></View>']
)
def test_a_config_that_nothing_can_be_learned_of_is_said(config: str) -> None:
    with pytest.raises(LabelConfigError):
        missing(config, [])


def test_a_control_with_one_choice_cannot_be_learned() -> None:
    """No task is read for it."""
    tasks = iter(labels(hat=3))
    assert missing(label_config(["hat"]), tasks) == (
        "No control of the label config offers 2 choices, so no training begins by itself."
    )
    assert len(list(tasks)) == 3


@pytest.mark.parametrize(("before", "more"), [(0, 5), (6, 5), (25, 5), (26, 6), (30, 6), (31, 7), (1000, 200)])
def test_a_fifth_more_and_five_at_least(before: int, more: int) -> None:
    """Or as many as CELESTIAL_TRAIN_EVERY says."""
    assert enough_new(before, None) == more
    assert enough_new(before, 50) == 50


def test_what_finish_accepted_unseen_is_no_label() -> None:
    """A training would not learn it; until somebody has looked at it."""
    (region,) = given("dress")["result"]
    unseen = given("dress") | {"result": [region | {"meta": {"text": ["certificate 1 of m:1"]}}], "lead_time": None}
    assert pictures([unseen], [given("hat")]) == {"choice": {"hat": 1}}
    assert pictures([unseen | {"lead_time": 2.5}]) == {"choice": {"dress": 1}}
