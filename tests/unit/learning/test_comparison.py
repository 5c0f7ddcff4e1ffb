"""A new head beside the live model: what is published, what is refused, and where each rule begins."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from celestial_backend.learning.comparison import Bench, Verdict, chance, judge
from celestial_backend.models.manifest import ChoiceScore

NAMES = {"M": "Mars", "O": "Moon", "C": "Comet"}
CHOICES = tuple(NAMES.values())


def rows(answers: str, sure: float = 0.9) -> NDArray[np.float64]:
    """Probabilities in which each answer has `sure`, and the others share the rest; "-" is none at all."""
    found = np.full((len(answers), 3), (1 - sure) / 2)
    for row, letter in zip(found, answers, strict=True):
        row[:] = 0 if letter == "-" else row
        if letter != "-":
            row["MOC".index(letter)] = sure
    return found


def bench(
    truths: str, challenger: str, champion: str | None = None, *, fresh: int = -1, kept: int = 0, sure: float = 0.9,
    knows: str = "MOC",
) -> Bench:  # fmt: skip
    """
    A picture for each letter: M(ars), O for Moon, C(omet).

    The first `fresh` of them are new to the champion, all if negative; the last `kept` nobody has labelled. The
    champion has no probability for what it does not know.
    """
    said = None
    if champion is not None:
        said = rows(champion, sure) * [letter in knows for letter in "MOC"]
    number = np.arange(len(truths))
    new = number < (len(truths) if fresh < 0 else fresh)
    return Bench(rows(truths, 1.0), rows(challenger), said, new, number >= len(truths) - kept)


def judged(given: Bench, *, network: bool = False, before: tuple[int, int] | None = None) -> Verdict:
    return judge(CHOICES, given, replaces_network=network, before=before)


# Against labels that are wrong


def test_new_labels_that_are_no_better_than_drawn_are_not_learned() -> None:
    """Though the old ones, which are more, are still said well; as many new ones that can be said are learned."""
    truths, told = "MO" * 60, "MO" * 60
    drawn = "".join("MO"[number // 2 % 2] for number in range(40)) + told[40:]
    refused = judged(bench(truths, drawn, drawn, fresh=40))
    assert not refused.publish
    assert "40 labels are new, and guessing could say them as well" in refused.reason
    assert judged(bench(truths, told, told, fresh=40)).publish
    one_kind = judged(bench("MO" * 40 + "C" * 20, "MO" * 40 + "C" * 17 + "MOM", fresh=0, champion="MO" * 50))
    assert one_kind.publish, one_kind.reason


@pytest.mark.parametrize(
    ("old", "publish"), [pytest.param("MOMOMOMM", False, id="fewer"), pytest.param("MOMOMOMO", True, id="as many")]
)
def test_old_labels_are_not_said_worse_than_they_were(old: str, publish: bool) -> None:
    """By each model's own cross-validation, in which none had learned what it was asked."""
    truths = "MO" * 30
    given = replace(bench(truths, "MO" * 10 + old * 5, "MO" * 30, fresh=20), once_right=np.arange(60) >= 20)
    verdict = judged(given)
    assert verdict.publish is publish, verdict.reason
    if not publish:
        assert "of all 60 labels, each asked before it was learned, the live model said 60 right" in verdict.reason


# Against guessing


@pytest.mark.parametrize("count", [6, 12, 20, 60, 200])
@pytest.mark.parametrize("kinds", [2, 3])
def test_guesses_are_seldom_published(count: int, kinds: int) -> None:
    """Answers that have nothing to do with the labels: a few in a hundred of six labels, none of many."""
    rng = np.random.default_rng([count, kinds])
    passed = 0
    for _ in range(25):
        truths, said = ("".join("MOC"[each] for each in rng.permutation(np.arange(count) % kinds)) for _ in range(2))
        passed += judged(bench(truths, said)).publish
    assert passed <= (3 if count < 20 else 0)


@pytest.mark.parametrize(
    ("truths", "said", "published"),
    [
        pytest.param("MMMOOO", "MMMOOO", True, id="six labels of two choices, all right"),
        pytest.param("MMMOOO", "MMMOOM", False, id="one of six wrong"),
        pytest.param("MMOO", "MMOO", False, id="four labels"),
        pytest.param("MMOOCC", "MMOOCC", True, id="two labels of three choices"),
        pytest.param("MMMMMOOOOO", "MMMMOOOOOO", True, id="one of ten wrong"),
        pytest.param("MMMMMOOOOO", "MMMMOOOOMM", False, id="three of ten wrong"),
        pytest.param("M" * 20 + "O" * 20, "M" * 14 + "O" * 6 + "O" * 14 + "M" * 6, False, id="7 of 10, of 40 labels"),
        pytest.param("M" * 20 + "O" * 20, "M" * 16 + "O" * 4 + "O" * 16 + "M" * 4, True, id="8 of 10, of 40 labels"),
        pytest.param("M" * 28 + "OO", "M" * 28 + "OO", True, id="two of thirty are another choice"),
        pytest.param("M" * 28 + "OO", "M" * 28 + "OM", False, id="one of the two is not seen"),
        pytest.param("M" * 28 + "OO", "M" * 30, False, id="the most frequent choice, always"),
    ],
)
def test_what_guessing_could_be(truths: str, said: str, published: bool) -> None:
    """The share of right answers, beside how often the same answers in another order are as good."""
    verdict = judged(bench(truths, said))
    assert verdict.publish is published
    right = sum(one == other for one, other in zip(truths, said, strict=True))
    told = f"{right} of {len(truths)} labels that it had not learned are right"
    assert verdict.reason == (told if published else f"{told}, which guessing could be, too; label more pictures")


@pytest.mark.parametrize(
    ("truths", "said", "published"),
    [
        pytest.param("C" * 8, "C" * 8, True, id="one new choice alone"),
        pytest.param("C" * 8, "MOMOMOMO", False, id="which it does not say"),
        pytest.param("C" * 20 + "MM", "C" * 19 + "MMM", True, id="nearly alone"),
    ],
)
def test_kept_pictures_tell_a_lone_choice_from_guesses(truths: str, said: str, published: bool) -> None:
    """All labels are of one choice; that no kept picture gets it is what shows that it is known."""
    kept = "MO" * 40
    verdict = judged(bench(truths + kept, said + kept, "MO" * (len(truths) // 2) + kept, kept=80, knows="MO"))
    assert verdict.publish is published
    assert verdict.scores.labels == len(truths)


# Against the live model


def test_as_good_is_good_enough() -> None:
    """The same right answers on fresh labels, from a head of ours before: published."""
    truths = "MMMMMOOOOO"
    verdict = judged(bench(truths, "MMMMMOOOOM", "MMMMMOOOOM"), before=(10, 10))
    assert (verdict.publish, verdict.reason) == (True, "9 of 10 labels that it had not learned are right")
    assert verdict.scores.choices == {"Mars": ChoiceScore(5, 5), "Moon": ChoiceScore(5, 4)}
    fresh = verdict.scores.fresh
    assert (fresh.pictures, fresh.champion_right, fresh.challenger_right) == (10, 9, 9)


@pytest.mark.parametrize(
    ("lost", "gained", "expected"),
    [
        pytest.param(0, 0, 1.0, id="nothing"),
        pytest.param(1, 0, 0.5, id="one"),
        pytest.param(3, 0, 0.125, id="three"),
        pytest.param(3, 1, 5 / 16, id="three of four"),
        pytest.param(0, 3, 1.0, id="gains only"),
        pytest.param(3000, 2000, 0.0, id="very many"),
    ],
)
def test_the_paired_test_on_paper(lost: int, gained: int, expected: float) -> None:
    """Of n pictures on which they differ, each is lost with one half: a tail of the binomial."""
    assert chance(lost, gained) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("lost", "published"), [pytest.param(2, True, id="by chance"), pytest.param(3, False, id="too many to be chance")]
)
def test_worse_on_fresh_labels_is_refused(lost: int, published: bool) -> None:
    """Two pictures of forty may be chance, p 0.25; three are not, p 0.125."""
    right = "M" * 20 + "O" * 20
    wrong = "O" * (lost - lost // 2) + right[lost - lost // 2 : 40 - lost // 2] + "M" * (lost // 2)
    verdict = judged(bench(right, wrong, right))
    assert verdict.publish is published
    if not published:
        assert verdict.reason == (
            "of 40 pictures that neither had learned, it says 37 right and the live model 40; 37 of 40 labels that it"
            " had not learned are right"
        )


@pytest.mark.parametrize(
    ("lost", "published"), [pytest.param(4, True, id="perhaps chance"), pytest.param(5, False, id="surely worse")]
)
def test_a_better_log_loss_makes_up_for_what_may_be_chance(lost: int, published: bool) -> None:
    """A hesitant champion: four pictures lost may be chance, p 0.06; five are not, p 0.03, whatever the log loss."""
    truths = "M" * 60 + "O" * 60
    said = "O" * (lost - 2) + truths[lost - 2 : 118] + "MM"
    verdict = judged(bench(truths, said, truths, sure=0.6))
    fresh = verdict.scores.fresh
    assert fresh.challenger_log_loss < fresh.champion_log_loss
    assert verdict.publish is published


def test_what_the_champion_has_learned_does_not_speak_for_it() -> None:
    """It says all labels right that it was taught, and of five fresh ones one."""
    truths = "MOMOM" + "MO" * 20
    assert judged(bench(truths, truths[:5] + "OM" + truths[7:], "MMOMO" + truths[5:], fresh=5)).publish


@pytest.mark.parametrize(
    ("before", "published"),
    [
        pytest.param((20, 20), False, id="it was much better"),
        pytest.param((12, 20), True, id="it was as good"),
        pytest.param(None, True, id="nobody knows"),
    ],
)
def test_without_fresh_labels_two_cross_validations_are_compared(
    before: tuple[int, int] | None, published: bool
) -> None:
    """Roughly, as they are of other labels."""
    truths = "M" * 20 + "O" * 20
    given = bench(truths, "M" * 16 + "O" * 4 + "O" * 16 + "M" * 4, truths, fresh=4)
    verdict = judged(given, before=before)
    assert verdict.publish is published
    assert ("the live model had 20 of 20 right when it was made" in verdict.reason) is not published


@pytest.mark.parametrize(
    ("count", "lost", "published"),
    [
        pytest.param(10, 1, True, id="one is always allowed"),
        pytest.param(10, 2, True, id="two of ten, by chance"),
        pytest.param(10, 3, False, id="three of ten"),
        pytest.param(30, 3, True, id="a tenth"),
        pytest.param(30, 4, False, id="more than a tenth"),
    ],
)
def test_no_choice_pays_for_the_others(count: int, lost: int, published: bool) -> None:
    """Mars loses more than a tenth of its pictures, and Moon gains as many: refused, Mars named."""
    truths = "M" * count + "O" * 40
    champion, challenger = "M" * count + "M" * lost + "O" * (40 - lost), "O" * lost + truths[lost:]
    verdict = judged(bench(truths, challenger, champion))
    assert verdict.publish is published
    if not published:
        told = f"of {count} pictures of 'Mars' it says {count - lost} right and the live model {count}"
        assert told in verdict.reason


def test_a_lost_choice_is_refused() -> None:
    """The live model tells Moon, and the new head says none."""
    truths = "M" * 20 + "O" * 6 + "C" * 20
    verdict = judged(bench(truths, "M" * 26 + "C" * 20, truths))
    assert not verdict.publish
    assert "of 6 pictures of 'Moon' it says 0 right and the live model 6" in verdict.reason


@pytest.mark.parametrize(
    ("lost", "published"), [pytest.param(4, True, id="two in a hundred"), pytest.param(5, False, id="more")]
)
def test_what_was_known_before_is_kept(lost: int, published: bool) -> None:
    """Of 200 pictures that nobody labelled four may be lost, and no fifth; labels do not pay for them."""
    kept, labels = "MO" * 100, "C" * 20 + "M" * 20
    said = "".join("C" if place < 2 * lost and place % 2 else letter for place, letter in enumerate(kept))
    verdict = judged(bench(labels + kept, labels + said, "M" * 20 + "M" * 20 + kept, kept=200, knows="MO"))
    assert verdict.publish is published
    assert verdict.scores.kept.pictures == 200
    assert verdict.scores.labels == 40
    if not published:
        assert "of 200 pictures of what the live model knew before, 195 are right and 200 were" in verdict.reason


# In the place of a network


@pytest.mark.parametrize(
    ("champion", "knows", "published"),
    [
        pytest.param("M" * 10 + "O" * 10, "MO", False, id="as good"),
        pytest.param("O" + "M" * 9 + "O" * 9 + "M", "MO", False, id="perhaps better"),
        pytest.param("O" * 4 + "M" * 6 + "O" * 7 + "M" * 3, "MO", True, id="surely better"),
    ],
)
def test_a_network_is_replaced_by_what_is_better(champion: str, knows: str, published: bool) -> None:
    """A head of ours gives way to one that is as good; somebody's network does not."""
    truths = "M" * 10 + "O" * 10
    verdict = judged(bench(truths, truths, champion, knows=knows), network=True)
    assert verdict.publish is published
    assert judged(bench(truths, truths, champion, knows=knows), before=(20, 20)).publish
    if not published:
        right = sum(one == other for one, other in zip(truths, champion, strict=True))
        assert verdict.reason.endswith(f"and the live model, which says {right} of 20, is as good")


def test_many_labels_of_many_choices_are_published() -> None:
    """With several choices each: chance is told from skill however many answers there are."""
    rng = np.random.default_rng(5)
    targets = (rng.random((4100, 10)) < 0.3).astype(float)
    said = np.where(rng.random(targets.shape) < 0.01, 1 - targets, targets)
    none = np.zeros(len(targets), bool)
    many = Bench(targets, said, None, ~none, none, multiple=True)
    verdict = judge([str(number) for number in range(10)], many, replaces_network=False, before=None)
    assert verdict.publish, verdict.reason


def test_a_network_is_replaced_for_new_choices() -> None:
    """It has no word for Comet; the old choices must not be lost for it."""
    truths = "M" * 10 + "O" * 10 + "C" * 4
    champion = "M" * 10 + "O" * 10 + "M" * 4
    assert judged(bench(truths, truths, champion, knows="MO"), network=True).publish
    worse = "O" * 5 + truths[5:]
    assert not judged(bench(truths, worse, champion, knows="MO"), network=True).publish


def test_a_model_that_says_nothing_is_right_about_nothing() -> None:
    """Nor is one that would say what is no choice any more."""
    truths = "M" * 8 + "O" * 8
    for champion in ("-" * 16, "C" * 16):
        verdict = judged(bench(truths, "O" + truths[1:], champion, knows="MO"))
        assert verdict.publish
        assert verdict.scores.fresh.champion_right == 0


# Several choices


def several(truths: str, said: str) -> Bench:
    """A picture for each word, whose letters are its choices."""
    pictures = [[[float(letter in word) for letter in "MOC"] for word in words.split(",")] for words in (truths, said)]
    targets, challenger = np.array(pictures[0]), np.array(pictures[1]) * 0.8 + 0.1
    none = np.zeros(len(targets), bool)
    return Bench(targets, challenger, None, ~none, none, multiple=True)


def test_several_choices_must_all_be_right() -> None:
    """A picture counts as right with all its ticks and no other; guessing is judged by tick."""
    truths = ",".join(["MO", "M", "", "C", "OC", "M", "", "O"] * 3)
    verdict = judged(several(truths, truths))
    assert verdict.publish
    assert (verdict.scores.right, verdict.scores.labels) == (24, 24)
    assert verdict.scores.choices["Moon"] == ChoiceScore(9, 9)
    missed = judged(several(truths, ",".join(["M", "M", "", "C", "OC", "M", "", "O"] * 3)))
    assert (missed.publish, missed.scores.right) == (True, 21)
    assert not judged(several(truths, ",".join([""] * 24))).publish


def test_ticks_that_are_guessed_are_not_published() -> None:
    """Over many draws."""
    rng = np.random.default_rng(5)
    words = np.array(["MO", "M", "", "C", "O"])
    passed = sum(judged(several(*(",".join(rng.choice(words, 40)) for _ in range(2)))).publish for _ in range(25))
    assert passed == 0


def test_scores_are_plain_values() -> None:
    """They are kept with the model as JSON, and are the same in another order of pictures."""
    given = bench("MMMOOCMMMOOC", "MMMOOCMMMOOM", "MMMOOMMMMOOM", knows="MO")
    scores = judged(given).scores.plain()
    assert json.loads(json.dumps(scores)) == scores
    order = np.random.default_rng(1).permutation(12)
    turned = replace(
        given, targets=given.targets[order], challenger=given.challenger[order],
        champion=None if given.champion is None else given.champion[order],
    )  # fmt: skip
    again = judged(turned).scores.plain()
    assert again.keys() == scores.keys()
    assert all(again[name] == value for name, value in scores.items() if name not in ("p_chance", "skill"))
