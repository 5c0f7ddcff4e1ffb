"""Votes: which annotations count, for which choices, where a label came from, and what several people agree on."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
from cleanlab import multiannotator
from numpy.typing import NDArray

from celestial_backend.labels import ChoiceMap
from celestial_backend.learning.dataset import Labels
from celestial_backend.learning.votes import Choices, Consensus, Vote, agree, contested, votes_of
from tests.support.backend_server import label_config

MAP = ChoiceMap.for_learning(label_config())
SEVERAL = ChoiceMap.for_learning(
    '<View><Image name="image" value="$image"/>'
    '<Choices name="kind" toName="image"><Choice value="dress"/><Choice value="shoe"/></Choices>'
    '<Choices name="flaw" toName="image" choice="multiple"><Choice value="torn"/><Choice value="wet"/></Choices></View>'
)
TWO = ChoiceMap.for_learning(
    '<View><Image name="a" value="$left"/><Image name="b" value="$right"/>'
    '<Choices name="kind" toName="a"><Choice value="Mars"/></Choices>'
    '<Choices name="other" toName="a"><Choice value="MARS"/><Choice value="Moon"/></Choices>'
    '<Choices name="second" toName="b"><Choice value="Moon"/></Choices></View>'
)


def region(choice: str, origin: str | None = None, control: str = "choice", image: str = "image") -> dict[str, Any]:
    made = {"from_name": control, "to_name": image, "type": "choices", "value": {"choices": [choice]}}
    return made | ({"origin": origin} if origin else {})


def annotation(number: int, *choices: str, by: int | None = 1, at: str | None = None, **more: Any) -> dict[str, Any]:
    updated_at = at or f"2026-01-01T{number // 3600:02}:{number // 60 % 60:02}:{number % 60:02}.000001Z"
    result = [region(choice, more.pop("origin", None)) for choice in choices]
    plain = {"was_cancelled": False, "ground_truth": False, "parent_prediction": None}
    return plain | {"id": number, "completed_by": by, "updated_at": updated_at, "result": result} | more


def said(*annotations: dict[str, Any], choices: ChoiceMap = MAP, **task: Any) -> tuple[list[str], dict[str, int]]:
    """Each vote as `annotation id: choices, source`, and what was left out."""
    votes, left_out = votes_of({"id": 5, "annotations": annotations, "predictions": []} | task, choices)
    return [f"{each.annotation_id}: {'+'.join(each.choices)}, {each.source}" for each in votes], dict(left_out)


def test_a_vote() -> None:
    """It says who said what about which picture, with which control, when, and whether it is the truth."""
    votes, left_out = votes_of({"id": 5, "annotations": [annotation(3, "Venus", by=7, ground_truth=True)]}, MAP)
    moment = "2026-01-01T00:00:03.000001Z"
    assert votes == [Vote(3, 5, "7", "choice", "image", frozenset({"Venus"}), "unaided", True, moment)]
    assert left_out == Counter()


@pytest.mark.parametrize(
    ("given", "votes", "left_out"),
    [
        pytest.param([], [], {}, id="no annotation"),
        pytest.param([annotation(1, "Mars", was_cancelled=True)], [], {"skipped by the annotator": 1}, id="skipped"),
        pytest.param(
            [annotation(1, "Mars"), annotation(2, "Moon", by=2, ground_truth=True), annotation(3, "Mars", by=3)],
            ["2: Moon, unaided"],
            {"beside a ground truth": 2},
            id="ground truth",
        ),
        pytest.param(
            [annotation(1, "Mars", ground_truth=True, was_cancelled=True), annotation(2, "Moon", by=2)],
            ["2: Moon, unaided"],
            {"skipped by the annotator": 1},
            id="skipped ground truth",
        ),
        pytest.param(
            [annotation(1, "Mars", at="2026-01-02T00:00:00Z"), annotation(2, "Moon", at="2026-01-01T23:59:59.9Z")],
            ["1: Mars, unaided"],
            {"replaced by a later one of the same annotator": 1},
            id="the newest of one person, by moment, with and without a fraction",
        ),
        pytest.param(
            [annotation(1, "Mars"), annotation(2)],
            [],
            {"replaced by a later one of the same annotator": 1, "without a choice": 1},
            id="taken back",
        ),
        pytest.param(
            [annotation(1, "Mars"), annotation(2, "Moon", by=2)],
            ["1: Mars, unaided", "2: Moon, unaided"],
            {},
            id="two people",
        ),
        pytest.param(
            [annotation(2, "Moon", by=None), annotation(1, "Mars", by=None)],
            ["1: Mars, unaided", "2: Moon, unaided"],
            {},
            id="deleted accounts are not one person",
        ),
        pytest.param(
            [annotation(1, "Mars", "Moon")], [], {"with several choices where one is asked for": 1}, id="several"
        ),
        pytest.param([annotation(1, "Mars", "Mars")], ["1: Mars, unaided"], {}, id="the same choice twice"),
        pytest.param(
            [annotation(1, "Vulcan")],
            [],
            {"with a choice that the label config does not offer": 1},
            id="a choice that is gone",
        ),
        pytest.param([annotation(1) | {"result": None}], [], {"without a choice": 1}, id="no result"),
        pytest.param(
            [annotation(1) | {"result": [{"value": {"choices": []}, "from_name": "choice", "to_name": "image"}, 3]}],
            [],
            {"without a choice": 1},
            id="an empty list and garbage",
        ),
    ],
)
def test_which_annotations_count(given: list[dict[str, Any]], votes: list[str], left_out: dict[str, int]) -> None:
    """One choice per person and picture; all else is left out and counted."""
    assert said(*given) == (votes, left_out)


def test_labels_beside_a_planted_error_are_left_out() -> None:
    """But for the ground truth, with or without one that still stands."""
    given = [annotation(1, "Mars"), annotation(2, "Moon", by=2), annotation(3, "Venus", by=3, ground_truth=True)]
    reason = "where a wrong pre-label was shown on purpose"
    for some, learned, out in ((given, [frozenset({"Venus"})], 2), (given[:2], [], 2)):
        votes, left_out = votes_of({"id": 5, "annotations": some}, MAP, misled=True)
        assert [vote.choices for vote in votes] == learned
        assert left_out == Counter({reason: out})
    labels = Labels(MAP, "7", misled={5})
    for task in (5, 6):
        labels.add({"id": task, "data": {"image": "a.png"}, "annotations": given[:2]})
    assert [each.task_id for each in labels.wanted.values()] == [6]
    assert labels.left_out == Counter({reason: 2})


def test_each_control_has_votes_of_its_own() -> None:
    """Whatever the others say, also of the same picture, and in other spelling."""
    both = [region("Mars", None, "kind", "a"), region("Moon", None, "other", "a"), region("Moon", None, "second", "b")]
    votes, left_out = votes_of({"id": 1, "annotations": [annotation(1) | {"result": both}]}, TWO)
    assert [(each.control, each.data_key, *each.choices) for each in votes] == [
        ("kind", "left", "Mars"), ("other", "left", "Moon"), ("second", "right", "Moon"),
    ]  # fmt: skip
    assert not left_out
    votes, left_out = votes_of({"id": 1, "annotations": [annotation(1) | {"result": both[2:]}]}, TWO)
    assert [each.control for each in votes] == ["second"]
    assert left_out == Counter({"without a choice": 2})


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        pytest.param(("torn", "wet"), {"torn", "wet"}, id="two"),
        pytest.param(("wet",), {"wet"}, id="one"),
        pytest.param((), set(), id="none, as another control was answered"),
    ],
)
def test_a_control_may_take_several_choices(chosen: tuple[str, ...], expected: set[str]) -> None:
    """In one region or in several; none of them is an answer too."""
    flaws = {"from_name": "flaw", "to_name": "image", "type": "choices", "value": {"choices": list(chosen)}}
    result = [region("dress", None, "kind"), flaws]
    votes, left_out = votes_of({"id": 1, "annotations": [annotation(1) | {"result": result}]}, SEVERAL)
    assert [(each.control, set(each.choices)) for each in votes] == [("kind", {"dress"}), ("flaw", expected)]
    assert not left_out


def test_an_empty_annotation_is_no_answer_to_several_choices() -> None:
    """Nobody knows whether it was looked at; one of several that is not offered any more makes it unknown too."""
    votes, left_out = votes_of({"id": 1, "annotations": [annotation(1)]}, SEVERAL)
    assert (votes, left_out) == ([], Counter({"without a choice": 2}))
    gone = [region("wet", None, "flaw"), region("burnt", None, "flaw")]
    votes, left_out = votes_of({"id": 1, "annotations": [annotation(1) | {"result": gone}]}, SEVERAL)
    assert votes == []
    assert left_out == {"without a choice": 1, "with a choice that the label config does not offer": 1}


PREDICTED = {"id": 9, "result": [region("Mars")]}


@pytest.mark.parametrize(
    ("choice", "more", "source"),
    [
        pytest.param("Mars", {"origin": "manual"}, "unaided", id="no pre-label"),
        pytest.param("Mars", {}, "unaided", id="through the API"),
        pytest.param(
            "Mars", {"origin": "manual", "prediction": PREDICTED}, "unaided", id="a copy that nobody started from"
        ),
        pytest.param("Mars", {"origin": "prediction", "parent_prediction": 9}, "accepted", id="accepted"),
        pytest.param("Moon", {"origin": "prediction-changed", "parent_prediction": 9}, "corrected", id="corrected"),
        pytest.param("Mars", {"origin": "prediction-changed", "parent_prediction": 9}, "accepted", id="changed back"),
        pytest.param("Moon", {"origin": "manual", "parent_prediction": 9}, "corrected", id="unselected and made anew"),
        pytest.param("Mars", {"parent_prediction": 9}, "accepted", id="bulk action"),
        pytest.param("Moon", {"parent_prediction": 9}, "corrected", id="bulk action, changed later"),
        pytest.param("Mars", {"parent_prediction": 10}, "unaided", id="the prediction said nothing"),
        pytest.param("Mars", {"origin": "prediction"}, "accepted", id="prediction deleted"),
        pytest.param("Moon", {"origin": "prediction-changed"}, "corrected", id="prediction deleted, corrected"),
        pytest.param(
            "Mars",
            {"origin": "prediction-changed", "prediction": PREDICTED},
            "accepted",
            id="prediction deleted, changed back",
        ),
        pytest.param("Mars", {"origin": "prediction", "prediction": {}}, "accepted", id="prediction deleted, no copy"),
        pytest.param("Mars", {"parent_prediction": 8}, "accepted", id="unknown prediction"),
    ],
)
def test_where_a_label_came_from(choice: str, more: dict[str, Any], source: str) -> None:
    """The choices decide while the prediction is known, and Label Studio's word only when it is gone."""
    predictions = [{"id": 7, "result": [region("Moon")]}, PREDICTED, {"id": 10, "result": []}]
    votes, _ = said(annotation(1, choice, **more), predictions=predictions)
    assert votes == [f"1: {choice}, {source}"]


@pytest.mark.parametrize(
    ("ticked", "source"),
    [
        pytest.param(["torn", "wet"], "accepted", id="the same"),
        pytest.param(["torn"], "corrected", id="one less"),
        pytest.param([], "corrected", id="none"),
    ],
)
def test_where_labels_of_several_choices_came_from(ticked: list[str], source: str) -> None:
    """Each control by itself: the kind was not pre-labelled."""
    before = {"from_name": "flaw", "to_name": "image", "type": "choices", "value": {"choices": ["wet", "torn"]}}
    result = [region("dress", "manual", "kind"), *(region(one, "prediction", "flaw") for one in ticked)]
    given = annotation(1, parent_prediction=9) | {"result": result}
    task = {"id": 1, "annotations": [given], "predictions": [{"id": 9, "result": [before]}]}
    assert [(each.control, each.source) for each in votes_of(task, SEVERAL)[0]] == [
        ("kind", "unaided"), ("flaw", source),
    ]  # fmt: skip


# Consensus

CLASSES = ("Mars", "Moon", "Venus")


def vote(annotator: str, choices: str, number: int = 1, source: str = "unaided", true: bool = False) -> Vote:
    """A vote for choices that are parted by blanks."""
    chosen = frozenset(choices.split())
    return Vote(number, 1, annotator, "choice", "image", chosen, source, true, f"2026-01-01T00:00:{number:02}.5Z")


def only(choices: str) -> Choices:
    return frozenset(choices.split())


@pytest.mark.parametrize(
    ("votes", "expected"),
    [
        pytest.param([vote("a", "Mars")], (only("Mars"), "one vote", "unaided"), id="one vote"),
        pytest.param([vote("a", "Mars"), vote("b", "Mars")], (only("Mars"), "majority", "unaided"), id="agreement"),
        pytest.param(
            [vote("a", "Moon"), vote("b", "Mars"), vote("c", "Moon")],
            (only("Moon"), "majority", "unaided"),
            id="two to one",
        ),
        pytest.param([vote("a", "Mars"), vote("b", "Moon")], (None, "tie", ""), id="tie"),
        pytest.param(
            [vote("a", "Mars", 1), vote("b", "Moon", 2), vote("a", "Moon", 3)],
            (only("Moon"), "majority", "unaided"),
            id="one person's newest",
        ),
        pytest.param(
            [vote("a", "Mars", 1, true=True), vote("b", "Moon", 2), vote("c", "Moon", 3)],
            (only("Mars"), "ground truth", "unaided"),
            id="truth before votes",
        ),
        pytest.param(
            [vote("a", "Mars", 1, true=True), vote("b", "Moon", 2, true=True)], (None, "tie", ""), id="two truths"
        ),
        pytest.param(
            [vote("a", "Mars", 1, "accepted"), vote("b", "Mars", 2, "accepted"), vote("c", "Moon", 3, "corrected")],
            (only("Mars"), "majority", "accepted"),
            id="only the winners' sources",
        ),
        pytest.param(
            [vote("a", "Mars", 1, "accepted"), vote("b", "Mars", 2, "unaided")],
            (only("Mars"), "majority", "unaided"),
            id="unaided before accepted",
        ),
        pytest.param(
            [vote("a", "Mars", 1, "corrected"), vote("b", "Mars", 2, "unaided")],
            (only("Mars"), "majority", "corrected"),
            id="corrected before unaided",
        ),
        pytest.param(
            [vote("a", "torn wet"), vote("b", "torn"), vote("c", "torn old")],
            (only("torn"), "majority", "unaided"),
            id="several choices, each by itself",
        ),
        pytest.param(
            [vote("a", "torn wet"), vote("b", "torn")], (None, "tie", ""), id="half of the votes for one of several"
        ),
        pytest.param(
            [vote("a", ""), vote("b", ""), vote("c", "wet")],
            (only(""), "majority", "unaided"),
            id="none of several choices",
        ),
        pytest.param(
            [vote("a", "torn"), vote("b", "wet"), vote("c", "old torn"), vote("d", "torn")],
            (only("torn"), "majority", "unaided"),
            id="several choices, one set ahead",
        ),
    ],
)
def test_without_a_model_the_majority_decides(votes: list[Vote], expected: Consensus) -> None:
    """One vote stands, truth goes first, equal top votes are no consensus; in whatever order they come."""
    assert agree({"p": votes}, CLASSES) == {"p": expected}
    assert agree({"p": votes[::-1]}, CLASSES) == {"p": expected}


def crowd(count: int) -> tuple[dict[str, list[Vote]], dict[str, NDArray[np.float32]], dict[str, str]]:
    """Pictures that one careful and two careless people looked at, a fair model's word on them, and the truth."""
    chance = random.Random(1)  # noqa: S311 - no secret
    ballots, probabilities, truth = {}, {}, {}
    for number in range(count):
        picture, right = f"{number:04}", chance.choice(CLASSES)
        ballots[picture] = [
            vote(name, right if chance.random() < skill else chance.choice(CLASSES))
            for name, skill in (("ann", 0.95), ("bob", 0.3), ("cat", 0.3))
            if chance.random() < 0.9 or name == "ann"
        ]
        row = np.full(3, 0.15, np.float32)
        row[CLASSES.index(right if chance.random() < 0.8 else chance.choice(CLASSES))] += 0.55
        probabilities[picture], truth[picture] = row, right
    return ballots, probabilities, truth


def test_crowdlab_knows_whom_to_trust() -> None:
    """With the model's probabilities, fewer pictures get a wrong choice than by majority, and ties stay ties."""
    ballots, probabilities, truth = crowd(300)
    by_majority, by_crowdlab = agree(ballots, CLASSES), agree(ballots, CLASSES, probabilities)

    def wrong(said: dict[str, Consensus]) -> int:
        return sum(each.choices not in (None, only(truth[picture])) for picture, each in said.items())

    assert wrong(by_crowdlab) < 0.7 * wrong(by_majority)
    ties = [{picture for picture, each in said.items() if each.how == "tie"} for said in (by_majority, by_crowdlab)]
    assert ties[0] == ties[1] != set()
    how = Counter(each.how for each in by_crowdlab.values())
    assert how["CROWDLAB"] > 150
    shuffled = dict(random.Random(2).sample(list(ballots.items()), len(ballots)))  # noqa: S311
    assert agree({picture: votes[::-1] for picture, votes in shuffled.items()}, CLASSES, probabilities) == by_crowdlab


def test_the_model_alone_is_no_label() -> None:
    """A single vote stands against the model, and a choice that nobody made does not win."""
    certain = np.array([0.001, 0.001, 0.998], np.float32)
    ballots = {f"{number}": [vote("a", "Mars"), vote("b", "Mars"), vote("c", "Moon")] for number in range(20)}
    ballots["alone"] = [vote("a", "Mars")]
    said = agree(ballots, CLASSES, dict.fromkeys(ballots, certain))
    assert {each.choices for each in said.values()} == {only("Mars")}


def test_new_choices_are_for_the_majority() -> None:
    """A picture with a vote for a choice that the model does not know is beyond CROWDLAB; the others are not."""
    ballots, probabilities, _ = crowd(40)
    ballots["new"] = [vote("ann", "Comet"), vote("bob", "Comet"), vote("cat", "Mars")]
    probabilities["new"] = np.full(3, 1 / 3, np.float32)
    said = agree(ballots, CLASSES, probabilities)
    assert said["new"] == (only("Comet"), "majority", "unaided")
    assert any(each.how == "CROWDLAB" for each in said.values())


@pytest.mark.filterwarnings("error")
def test_crowds_that_cleanlab_finds_odd() -> None:
    """People who never agree, who all agree, one choice, one picture: no warning, no error."""
    odd: list[list[list[str]]] = [
        [["Mars", "Moon", "Moon"]],
        [["Mars", "Mars"]] * 3,
        [["Mars", "Moon"]] * 3,
        [["Mars", "Moon", "Venus"], ["Venus", "Mars", "Moon"]],
        [["Mars"], ["Moon"]],
    ]
    for rows in odd:
        ballots = {f"{row}": [vote(f"p{n}", name) for n, name in enumerate(names)] for row, names in enumerate(rows)}
        flat = dict.fromkeys(ballots, np.full(3, 1 / 3, np.float32))
        said = agree(ballots, CLASSES, flat)
        for picture, names in zip(ballots, rows, strict=True):
            counts = Counter(names).most_common()
            tied = len(counts) > 1 and counts[0][1] == counts[1][1]
            assert said[picture].choices == (None if tied else only(counts[0][0]))


def refuse(*_: object, **__: object) -> None:
    raise ValueError("Annotators 3 did not label any examples.")


def test_what_cleanlab_cannot_weigh_is_for_the_majority(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever it raises costs CROWDLAB's word, and not the training; the log says why."""
    monkeypatch.setattr(multiannotator, "get_label_quality_multiannotator", refuse)
    ballots, probabilities, _ = crowd(40)
    assert agree(ballots, CLASSES, probabilities) == agree(ballots, CLASSES)
    assert "CROWDLAB cannot weigh the annotators" in caplog.text
    assert "(ValueError: Annotators 3 did not label any examples.); the majority decides." in caplog.text


def test_contested() -> None:
    """Only pictures that several people looked at, without a truth, need the model's word."""
    ballots = {
        "one": [vote("a", "Mars")],
        "same person": [vote("a", "Mars", 1), vote("a", "Moon", 2)],
        "true": [vote("a", "Mars", 1, true=True), vote("b", "Moon", 2)],
        "two": [vote("a", "Mars"), vote("b", "Mars")],
    }
    assert contested(ballots) == ["two"]
