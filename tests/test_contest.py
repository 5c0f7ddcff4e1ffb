"""Champion and challenger: what is published, what is refused, and where each rule begins."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from celestial_backend.contest import Bench, Limits, chance, judge

OLD = ("Mars", "Moon")
NEW = (*OLD, "Comet")


def _says(names: Sequence[str], answers: Sequence[str], sure: float = 0.9) -> np.ndarray:
    """Probabilities in which each answer has `sure`, and the others share the rest."""
    rows = np.full((len(answers), len(names)), (1 - sure) / (len(names) - 1))
    rows[np.arange(len(answers)), [names.index(answer) for answer in answers]] = sure
    return rows


def _bench(truths: str, champion: str, challenger: str, tasks: Sequence[int] = (), sure: float = 0.9) -> Bench:
    """A picture for each letter: M(ars), O for Moon, C(omet)."""
    words = {"M": "Mars", "O": "Moon", "C": "Comet"}
    said = [[words[letter] for letter in letters] for letters in (truths, champion, challenger)]
    return Bench(said[0], _says(OLD, said[1], sure), _says(NEW, said[2], sure), tasks)


def test_as_good_is_good_enough() -> None:
    """The same right answers from both: published, with the figures in words."""
    verdict = judge(OLD, NEW, _bench("MMMOOO", "MMMOOM", "MMMOOM"))
    assert verdict.publish
    assert verdict.reason == "Published: 5 of 6 held-out pictures right, 5 before."


def test_a_new_class_counts_for_the_challenger() -> None:
    """The champion cannot be right about a class that it does not know."""
    verdict = judge(OLD, NEW, _bench("MMOOCC", "MMOOOM", "MMOOCC"), _bench("MO", "MO", "MO"))
    assert verdict.publish
    assert (
        verdict.reason == "Published: 6 of 6 held-out pictures right, 4 before; 2 of 2 drawn pictures right, 2 before."
    )
    comets = verdict.scores["benches"]["held-out"]["classes"]["Comet"]
    assert (comets["champion_right"], comets["challenger_right"], comets["gained"]) == (0, 2, 2)


@pytest.mark.parametrize(
    ("lost", "gained", "expected"),
    [
        pytest.param(0, 0, 1.0, id="nothing"),
        pytest.param(1, 0, 0.5, id="one"),
        pytest.param(3, 0, 0.125, id="three"),
        pytest.param(3, 1, 5 / 16, id="three of four"),
        pytest.param(0, 3, 1.0, id="gains only"),
    ],
)
def test_the_paired_test_on_paper(lost: int, gained: int, expected: float) -> None:
    """Of n pictures on which they differ, each is lost with one half: a tail of the binomial."""
    assert chance(lost, gained) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("lost", "published"), [pytest.param(2, True, id="by chance"), pytest.param(3, False, id="too many to be chance")]
)
def test_a_worse_model_is_refused(lost: int, published: bool) -> None:
    """Two pictures of forty may be chance, p 0.25; three are not, p 0.125."""
    right = "M" * 20 + "O" * 20
    wrong = "O" * (lost - lost // 2) + right[lost - lost // 2 : 40 - lost // 2] + "M" * (lost // 2)
    verdict = judge(OLD, NEW, _bench(right, right, wrong))
    assert verdict.publish is published
    if not published:
        assert "of 40 held-out pictures the new model lost 3 and gained 0" in verdict.reason
        assert verdict.reason.startswith("Kept the old model: ")


@pytest.mark.parametrize(
    ("lost", "published"), [pytest.param(4, True, id="perhaps chance"), pytest.param(5, False, id="surely worse")]
)
def test_a_better_log_loss_makes_up_for_what_may_be_chance(lost: int, published: bool) -> None:
    """A hesitant champion: four pictures lost may be chance, p 0.06; five are not, p 0.03, whatever the log loss."""
    truths = ["Mars"] * 60
    said = ["Moon"] * lost + ["Mars"] * (60 - lost)
    verdict = judge(OLD, NEW, Bench(truths, _says(OLD, truths, 0.6), _says(NEW, said, 0.9)))
    assert verdict.publish is published
    held_out = verdict.scores["benches"]["held-out"]
    assert held_out["challenger_log_loss"] < held_out["champion_log_loss"]


@pytest.mark.parametrize(
    ("lost", "published"), [pytest.param(4, True, id="two points"), pytest.param(5, False, id="more than two points")]
)
def test_two_points_of_the_drawn_pictures_may_be_lost(lost: int, published: bool) -> None:
    """Of 200 drawn pictures four may be lost, and no fifth."""
    right = "MO" * 100
    challenger = "".join("C" if place < 2 * lost and place % 2 else letter for place, letter in enumerate(right))
    assert judge(OLD, NEW, _bench("MOMOMO", "MOMOMO", "MOMOMO"), _bench(right, right, challenger)).publish is published


def test_gains_of_a_new_class_do_not_pay_for_old_ones() -> None:
    """Nine comets gained and four old pictures lost, one or two of each class: refused for the old ones."""
    truths, champion = "C" * 9 + "M" * 20 + "O" * 20, "M" * 29 + "O" * 20
    challenger = "C" * 9 + "OO" + "M" * 18 + "MM" + "O" * 18
    verdict = judge(OLD, NEW, _bench(truths, champion, challenger))
    assert not verdict.publish
    assert "of 40 held-out pictures of the old classes the new model lost 4 and gained 0" in verdict.reason


@pytest.mark.parametrize(
    ("count", "lost", "published"),
    [
        pytest.param(3, 1, True, id="one is always allowed"),
        pytest.param(10, 2, False, id="two of ten"),
        pytest.param(20, 2, True, id="two of twenty"),
    ],
)
def test_no_class_pays_for_the_others(count: int, lost: int, published: bool) -> None:
    """Mars loses more than a tenth of its pictures, and Moon gains as many: refused, Mars named."""
    truths = "M" * count + "O" * count
    champion, challenger = "M" * count + "M" * lost + "O" * (count - lost), "O" * lost + truths[lost:]
    verdict = judge(OLD, NEW, _bench(truths, champion, challenger))
    assert verdict.publish is published
    if not published:
        assert f"Mars fell from {count} to {count - lost} right of {count} held-out pictures" in verdict.reason


def test_drawn_pictures_count_too() -> None:
    """What no label of today shows is still not to be forgotten."""
    verdict = judge(OLD, NEW, _bench("CCCCCC", "MMMMMM", "CCCCCC"), _bench("MMMOOO", "MMMOOO", "MMMCCC"))
    assert not verdict.publish
    assert "Moon fell from 3 to 0 right of 3 drawn pictures" in verdict.reason


@pytest.mark.parametrize(
    ("wrong", "published"), [pytest.param(3, True, id="fifteen percent"), pytest.param(4, False, id="twenty percent")]
)
def test_labels_that_both_models_contradict(wrong: int, published: bool) -> None:
    """More than 15 % of the labels name a class that both models rule out: refused, with the tasks to look at."""
    truths, seen = "O" * wrong + "M" * (20 - wrong), "M" * 20
    verdict = judge(OLD, NEW, _bench(truths, seen, seen, tasks=range(100, 120), sure=0.95))
    assert verdict.publish is published
    labels = verdict.scores["labels"]
    assert (labels["labels"], labels["contradicted"], labels["contradicted_share"]) == (20, wrong, wrong / 20)
    assert labels["contradicted_tasks"] == [*range(100, 100 + wrong)]
    if not published:
        assert "both models contradict 4 of 20 labels" in verdict.reason
        assert "look at tasks 100, 101, 102, 103" in verdict.reason


@pytest.mark.parametrize(
    ("champion", "challenger", "sure"),
    [
        pytest.param("M" * 8, "O" * 8, 0.95, id="the challenger has learned them"),
        pytest.param("M" * 8, "M" * 8, 0.6, id="neither is sure"),
    ],
)
def test_hard_pictures_are_no_wrong_labels(champion: str, challenger: str, sure: float) -> None:
    """An honest label is contradicted by one model only, or by none with conviction."""
    verdict = judge(OLD, NEW, _bench("O" * 8, champion, challenger, sure=sure))
    assert verdict.scores["labels"]["contradicted"] == 0
    assert verdict.publish


def test_labels_that_were_learned_are_judged_too() -> None:
    """Few held-out labels tell little; the learned ones join them, and long lists of tasks are cut."""
    held_out = _bench("MMMMM", "MMMMM", "MMMMM", range(5))
    learned = _bench("O" * 30 + "M" * 5, "M" * 35, "M" * 35, range(10, 45), sure=0.95)
    verdict = judge(OLD, NEW, held_out, None, learned)
    assert not verdict.publish
    assert verdict.scores["labels"]["contradicted"] == 30
    assert "28, 29 and 10 more" in verdict.reason


def test_learned_labels_do_not_thin_out_the_held_out_ones() -> None:
    """A challenger that has learned wrong labels by heart contradicts only those that it never saw."""
    held_out = _bench("OOOO" + "M" * 8, "M" * 12, "M" * 12, range(12), sure=0.95)
    learned = _bench("O" * 12 + "M" * 36, "M" * 48, "O" * 12 + "M" * 36, range(12, 60), sure=0.95)
    verdict = judge(OLD, NEW, held_out, None, learned)
    assert not verdict.publish
    assert "both models contradict 4 of 12 labels with one voice (33%" in verdict.reason


@pytest.mark.parametrize(
    ("missed", "published"), [pytest.param(10, True, id="a quarter"), pytest.param(11, False, id="more")]
)
def test_labels_of_new_classes_that_cannot_be_learned(missed: int, published: bool) -> None:
    """The champion knows nothing of them; what the challenger has learned and does not give back is in doubt."""
    held_out = _bench("C" * 10, "M" * 10, "C" * 10, range(10))
    said = "O" * missed + "C" * (30 - missed)
    verdict = judge(OLD, NEW, held_out, None, _bench("C" * 30, "M" * 30, said, range(10, 40)))
    assert verdict.publish is published
    assert verdict.scores["labels"]["unlearned"] == missed
    if not published:
        assert "the new model misses 11 of 40 labels of new classes (28%, at most 25% may be)" in verdict.reason
        assert "look at tasks 10, 11, 12" in verdict.reason


@pytest.mark.parametrize(("count", "published"), [(4, False), (5, True)])
def test_too_few_pictures_say_nothing(count: int, published: bool) -> None:
    """The message says how many there are and how many are needed."""
    verdict = judge(OLD, NEW, _bench("M" * count, "M" * count, "M" * count))
    assert verdict.publish is published
    if not published:
        assert "at least 5 held-out pictures are needed to compare two models, and the project has 4" in verdict.reason


def test_no_picture_at_all() -> None:
    """Nothing held out, nothing drawn: refused, and nothing breaks."""
    nothing = Bench((), np.empty((0, 2)), np.empty((0, 3)))
    assert not judge(OLD, NEW, nothing, nothing, nothing).publish


def test_a_model_from_nothing_may_lack_a_class() -> None:
    """The challenger's classes need not be the champion's; who lacks a class is wrong about it."""
    bench = Bench(["Mars"] * 6, _says(OLD, ["Mars"] * 6), _says(("Comet", "Moon"), ["Moon"] * 6))
    verdict = judge(OLD, ("Comet", "Moon"), bench)
    assert not verdict.publish
    assert "Mars fell from 6 to 0 right of 6 held-out pictures" in verdict.reason


def test_scores_are_plain_values() -> None:
    """They are kept with the model as JSON, the limits with them."""
    bench = _bench("MMMOOC", "MMMOOM", "MMMOOC", range(6))
    scores = judge(OLD, NEW, bench, bench, bench, replace(Limits(), least_pictures=2)).scores
    assert json.loads(json.dumps(scores)) == scores
    assert scores["limits"]["least_pictures"] == 2
    assert scores["benches"]["held-out"]["challenger_accuracy"] == 1.0
