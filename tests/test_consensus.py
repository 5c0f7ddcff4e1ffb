"""Consensus: when the majority decides, when CROWDLAB does, and when nobody does."""

from __future__ import annotations

import random
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from numpy.typing import NDArray

from celestial_backend import consensus
from celestial_backend.consensus import Consensus, agree, contested
from celestial_backend.votes import Vote

CLASSES = ("Mars", "Moon", "Venus")


def vote(annotator: str, class_name: str, number: int = 1, source: str = "unaided", true: bool = False) -> Vote:
    return Vote(number, 1, annotator, "image", class_name, source, true, f"2026-01-01T00:00:{number:02}.5Z")


@pytest.mark.parametrize(
    ("votes", "expected"),
    [
        pytest.param([vote("a", "Mars")], ("Mars", "one vote", "unaided"), id="one vote"),
        pytest.param([vote("a", "Mars"), vote("b", "Mars")], ("Mars", "majority", "unaided"), id="agreement"),
        pytest.param(
            [vote("a", "Moon"), vote("b", "Mars"), vote("c", "Moon")], ("Moon", "majority", "unaided"), id="two to one"
        ),
        pytest.param([vote("a", "Mars"), vote("b", "Moon")], (None, "tie", ""), id="tie"),
        pytest.param(
            [vote("a", "Mars", 1), vote("b", "Moon", 2), vote("a", "Moon", 3)],
            ("Moon", "majority", "unaided"),
            id="one person's newest",
        ),
        pytest.param(
            [vote("a", "Mars", 1, true=True), vote("b", "Moon", 2), vote("c", "Moon", 3)],
            ("Mars", "ground truth", "unaided"),
            id="truth before votes",
        ),
        pytest.param(
            [vote("a", "Mars", 1, true=True), vote("b", "Moon", 2, true=True)], (None, "tie", ""), id="two truths"
        ),
        pytest.param(
            [vote("a", "Mars", 1, "accepted"), vote("b", "Mars", 2, "accepted"), vote("c", "Moon", 3, "corrected")],
            ("Mars", "majority", "accepted"),
            id="only the winners' sources",
        ),
        pytest.param(
            [vote("a", "Mars", 1, "accepted"), vote("b", "Mars", 2, "unaided")],
            ("Mars", "majority", "unaided"),
            id="unaided before accepted",
        ),
        pytest.param(
            [vote("a", "Mars", 1, "corrected"), vote("b", "Mars", 2, "unaided")],
            ("Mars", "majority", "corrected"),
            id="corrected before unaided",
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
    """With the model's probabilities, fewer pictures get a wrong class than by majority, and ties stay ties."""
    ballots, probabilities, truth = crowd(300)
    by_majority, by_crowdlab = agree(ballots, CLASSES), agree(ballots, CLASSES, probabilities)

    def wrong(said: dict[str, Consensus]) -> int:
        return sum(each.class_name not in (None, truth[picture]) for picture, each in said.items())

    assert wrong(by_crowdlab) < 0.7 * wrong(by_majority)
    ties = [{picture for picture, each in said.items() if each.how == "tie"} for said in (by_majority, by_crowdlab)]
    assert ties[0] == ties[1] != set()
    how = Counter(each.how for each in by_crowdlab.values())
    assert how["CROWDLAB"] > 150
    shuffled = dict(random.Random(2).sample(list(ballots.items()), len(ballots)))  # noqa: S311
    assert agree({picture: votes[::-1] for picture, votes in shuffled.items()}, CLASSES, probabilities) == by_crowdlab


def test_the_model_alone_is_no_label() -> None:
    """A single vote stands against the model, and a class that nobody voted for does not win."""
    certain = np.array([0.001, 0.001, 0.998], np.float32)
    ballots = {f"{number}": [vote("a", "Mars"), vote("b", "Mars"), vote("c", "Moon")] for number in range(20)}
    ballots["alone"] = [vote("a", "Mars")]
    said = agree(ballots, CLASSES, dict.fromkeys(ballots, certain))
    assert {each.class_name for each in said.values()} == {"Mars"}


def test_new_classes_are_for_the_majority() -> None:
    """A picture with a vote for a class that the model does not know is beyond CROWDLAB; the others are not."""
    ballots, probabilities, _ = crowd(40)
    ballots["new"] = [vote("ann", "Comet"), vote("bob", "Comet"), vote("cat", "Mars")]
    probabilities["new"] = np.full(3, 1 / 3, np.float32)
    said = agree(ballots, CLASSES, probabilities)
    assert said["new"] == ("Comet", "majority", "unaided")
    assert any(each.how == "CROWDLAB" for each in said.values())


@pytest.mark.filterwarnings("error")
def test_crowds_that_cleanlab_finds_odd() -> None:
    """People who never agree, who all agree, one class, one picture: no warning, no error."""
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
            assert said[picture].class_name == (None if tied else counts[0][0])


def test_contested() -> None:
    """Only pictures that several people looked at, without a truth, need the model's word."""
    ballots = {
        "one": [vote("a", "Mars")],
        "same person": [vote("a", "Mars", 1), vote("a", "Moon", 2)],
        "true": [vote("a", "Mars", 1, true=True), vote("b", "Moon", 2)],
        "two": [vote("a", "Mars"), vote("b", "Mars")],
    }
    assert contested(ballots) == ["two"]


def test_import_is_light() -> None:
    """The libraries cleanlab and pandas stay out until there is a crowd to weigh."""
    code = (
        f"import sys; import {consensus.__name__} as c; c.agree({{}}, ()); "
        "sys.exit(bool({'cleanlab', 'pandas', 'sklearn'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
