"""Measures: figures of labels whose truth is known, and sentences where there is not enough."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest

from benchmarks.annotators import ACCEPTED, CONFIG, World, pure, summed
from celestial_backend.labels import ChoiceMap
from celestial_backend.models.manifest import Manifest
from celestial_backend.trust.evidence import SHOWN, UNPREDICTED, Evidence, Given
from celestial_backend.trust.figures import Figure, Measured, percent
from celestial_backend.trust.measures import measure
from celestial_backend.trust.trial import AUDITED, PLANTED, WITHHELD

BODY = ChoiceMap.for_learning(CONFIG).controls
NOT_YET = "Not enough yet: about "


def label(
    task: int, chosen: str = "Mars", said: str | None = "Mars", arm: str = SHOWN, by: str = "1", **more: Any
) -> Given:
    told = None if said is None else frozenset(said.split("+"))
    plain = {"confidence": 0.9, "version": "v1", "seconds": 3.0, "at": "2026-01-01T12:00:00Z"}
    chosen_set = frozenset(chosen.split("+")) if chosen else frozenset[str]()
    return Given(task, 10 * task + int(by), by, "body", chosen_set, arm, told, **plain | more)  # type: ignore[arg-type]


def evidence(given: Sequence[Given], **more: Any) -> Evidence:
    people = {str(number): f"p{number}" for number in range(1, 6)}
    return Evidence("7", "planets", "http://127.0.0.1/projects/7/data", BODY, tuple(given), people=people, **more)


def of(given: Sequence[Given], manifests: dict[str, Manifest] | None = None) -> Measured:
    (found,) = measure(evidence(given), manifests).controls
    return found


def figures(told: object) -> Iterator[Figure]:
    """All that stand anywhere in what was measured."""
    if isinstance(told, Figure):
        yield told
    elif hasattr(told, "__dataclass_fields__"):
        for name in told.__dataclass_fields__:
            yield from figures(getattr(told, name))
    elif isinstance(told, tuple):
        for each in told:
            yield from figures(each)


def is_honest(figure: Figure) -> bool:
    """A number has an interval around it and the sentence names no interval without one."""
    assert figure.sentence[-1] == "."
    if figure.value is None:
        return figure.low is figure.high is None and figure.sentence.startswith((NOT_YET, "Cannot be told: "))
    assert figure.low is not None
    assert figure.high is not None
    return figure.low <= figure.value <= figure.high and figure.low < figure.high and figure.missing == 0


DEGENERATE = {
    "nothing": [],
    "one label": [label(1)],
    "all kept, none withheld": [label(task) for task in range(300)],
    "all kept, and all withheld agreed": [label(task, arm=SHOWN if task % 5 else WITHHELD) for task in range(300)],
    "nothing kept": [label(task, "Moon", arm=SHOWN if task % 5 else WITHHELD) for task in range(300)],
    "no prediction": [label(task, said=None, arm=UNPREDICTED, confidence=None, version="") for task in range(50)],
    "only ground truths": [label(task, truth=True) for task in range(50)],
    "no seconds": [label(task, arm=SHOWN if task % 5 else WITHHELD, seconds=None) for task in range(200)],
    "the same seconds": [label(task, arm=SHOWN if task % 5 else WITHHELD, seconds=2.0) for task in range(200)],
    "what was said is gone": [label(task, "Moon", said=None, confidence=None, version="") for task in range(60)],
    "everybody agrees": [label(task, ("Mars", "Moon")[task % 2], by=by) for task in range(60) for by in "123"],
    "people who are gone": [label(task, by=str(7 + task % 2)) for task in range(60)],
    "audited alone": [label(task, arm=AUDITED) for task in range(60)],
}


@pytest.mark.parametrize("case", DEGENERATE)
def test_what_cannot_be_told_is_not_told(case: str) -> None:
    """Nothing is divided by nothing, nothing is certain, and what is missing is said."""
    told = measure(evidence(DEGENERATE[case]))
    found = list(figures(told))
    assert len(found) > 10
    assert [each for each in found if not is_honest(each)] == []
    assert not [word for word in ("nan", "inf", "None") if word in "".join(each.sentence for each in found)]
    json.loads(msgspec.json.encode(told))  # NaN would be null
    numbers = [number for each in found for number in (each.value, each.low, each.high) if number is not None]
    assert all(map(math.isfinite, numbers))


def test_what_is_missing_is_counted() -> None:
    """And what to set where nothing is withheld at all."""
    told = of([label(task) for task in range(100)] + [label(task, arm=WITHHELD) for task in range(100, 112)])
    assert (told.compared.difference.missing, told.compared.shown.value) == (8, 1)
    assert told.compared.difference.sentence == f"{NOT_YET}8 more tasks without a pre-label."
    none = of([label(task) for task in range(100)])
    assert "CELESTIAL_CONTROL_SHARE=0.1" in none.accuracy.sentence
    assert none.kept.value == 1
    sure = of([label(task, arm=SHOWN if task % 5 else WITHHELD) for task in range(300)])
    assert "nobody disagreed with what was withheld" in sure.compared.unlooked.sentence
    assert sure.compared.difference.value == 0


def test_pre_labels_that_are_accepted_without_looking() -> None:
    """90 of 100 agree where they see it, 80 of 100 where they do not: half of what was to be changed is not."""
    seen = [label(task, "Mars" if task % 10 else "Moon") for task in range(200)]
    unseen = [label(task, "Mars" if task % 5 else "Moon", arm=WITHHELD) for task in range(200, 400)]
    told = of(seen + unseen).compared
    assert (told.shown.value, told.withheld.value) == (pytest.approx(0.9), pytest.approx(0.8))
    assert told.difference.value == pytest.approx(0.1)
    assert told.unlooked.value == pytest.approx(0.5)
    assert told.unlooked.sentence.startswith("About 50 % of the pre-labels are accepted without looking (95 % interval")
    turned = of([replace(each, arm=WITHHELD if each.arm == SHOWN else SHOWN) for each in seen + unseen]).compared
    assert turned.unlooked.value is not None
    assert turned.unlooked.value < 0
    assert "There is no sign yet" in turned.unlooked.sentence
    assert "10.0 points less often" in turned.difference.sentence


def test_only_what_was_made_under_the_same_conditions_is_compared() -> None:
    """Labels of a time when nothing was withheld say nothing of what withholding does, however many they are."""
    before = [label(task, "Moon", version="v0") for task in range(500)]
    seen = [label(task) for task in range(500, 600)]
    unseen = [label(task, arm=WITHHELD) for task in range(600, 630)]
    told = of(before + seen + unseen)
    assert told.compared.shown.value == 1
    assert told.kept.value == pytest.approx(1 / 6)


def test_another_share_that_is_withheld_is_not_taken_for_what_people_do() -> None:
    """A poor version of which a tenth was withheld, and then a good one of which a half was."""

    def part(version: str, start: int, every: int, wrong: int) -> list[Given]:
        return [label(task, "Moon" if task // every % wrong == 0 else "Mars", arm=SHOWN if task % every else WITHHELD,
                      version=version) for task in range(start, start + 1000)]  # fmt: skip

    told = of(part("v1", 0, 10, 2) + part("v2", 1000, 2, 10)).compared
    assert told.difference.value == pytest.approx(0, abs=0.01)
    assert told.shown.value == pytest.approx(told.withheld.value, abs=0.01)


def test_groups_are_told_apart() -> None:
    """By what was said, how surely, and to whom."""
    given = [
        label(task, "Mars" if by == "1" else "Moon", ("Mars", "Venus")[task % 2], SHOWN if task % 4 else WITHHELD, by,
              confidence=(0.4, 0.99)[task % 2])
        for task in range(200) for by in "12"
    ]  # fmt: skip
    told = of(given)
    assert {each.name: each.shown.value for each in told.by_person} == {"p1": pytest.approx(1 / 3), "p2": 0}
    assert {each.name for each in told.by_choice} == {"Mars", "Venus"}
    assert {each.name for each in told.by_confidence} == {"0 to 0.5", "0.95 to 1"}


def test_right_is_what_a_ground_truth_says_or_others() -> None:
    """Those who saw no pre-label first; nobody's own label says whether it is right."""
    given = []
    for task in range(0, 90, 3):
        given += [label(task), label(task, "Moon", said=None, arm=UNPREDICTED, by="9", truth=True)]
        given += [label(task + 1), label(task + 1, "Moon", arm=UNPREDICTED, said=None, by="2"), label(task + 1, by="3")]
        given += [label(task + 2)]
    told = of(given)
    assert told.kept_rightly.value == pytest.approx(0, abs=0.01)
    assert told.truths == (
        "A ground truth tells what is right for 30 labels.",
        "For 60 labels it is what most others chose who saw no pre-label.",
        "For 30 labels it is not known: no ground truth, and no others who agree and saw none.",
    )


def test_those_who_saw_the_same_pre_label_do_not_say_what_is_right() -> None:
    """Where all keep 90 % of what is right in 60 %, at most two thirds of what is kept can be right."""
    given = [label(task, "Mars" if task % 10 else "Moon", by=by) for task in range(600) for by in "12"]
    assert of(given).kept_rightly.value is None
    given += [label(task, "Mars" if task % 10 < 6 else "Moon", arm=WITHHELD) for task in range(600, 1000)]
    told = of(given).kept_rightly
    assert told.value == pytest.approx(2 / 3, abs=0.02)
    assert "at most" in told.sentence
    more = [label(task, "Mars" if task % 20 else "Moon", arm=WITHHELD) for task in range(1000, 2000)]
    assert of(given[:1200] + more).kept_rightly.value is None, "as much as is kept: that bounds nothing"


def test_corrections_of_what_was_right_and_what_was_wrong() -> None:
    """Over-correction and under-correction stand apart, and planted errors beside them."""
    truths = [label(task, ("Mars", "Venus")[task % 2], arm=UNPREDICTED, said=None, by="9", truth=True)
              for task in range(300)]  # fmt: skip
    shown = [label(task, "Moon" if task % 20 == 0 else "Venus" if task % 20 == 1 else "Mars") for task in range(200)]
    planted = [label(task, "Moon" if task % 4 else "Venus", "Moon", PLANTED) for task in range(200, 300)]
    told = of(truths + shown + planted)
    assert told.over_corrected.value == pytest.approx(0.1)
    assert told.under_corrected.value == pytest.approx(0.9)
    assert told.planted.value == pytest.approx(0.75)
    assert told.kept.n == 200, "what was planted is no pre-label of the model's"


def test_people_are_compared_with_themselves() -> None:
    """A careless one who labels most of what is withheld makes nobody else look misled."""
    rng, careful, careless = np.random.default_rng(3), 0.95, 0.6
    given = []
    for task in range(900):
        one = bool(rng.random() < 0.5)
        agrees, withheld = rng.random(2) < ((careful, 0.05) if one else (careless, 0.5))
        given.append(label(task, "Mars" if agrees else "Moon", arm=WITHHELD if withheld else SHOWN, by="12"[one]))
    told = of(given).compared
    assert told.difference.low < 0 < told.difference.high  # type: ignore[operator]
    apart = [replace(each, annotator="12"[each.arm == SHOWN]) for each in given]
    told = of(apart).compared
    assert told.difference.value is None
    assert "of people who label some with and some without" in told.difference.sentence


def test_a_planted_error_is_what_the_ground_truth_says_is_wrong() -> None:
    """Not the right answers to other controls of the task, nor what turned out to be right."""
    truths = [label(task, "Mars", arm=UNPREDICTED, said=None, by="9", truth=True) for task in range(30)]
    wrong = [label(task, "Moon", "Moon", PLANTED) for task in range(20)]
    right = [label(task, "Mars", "Mars", PLANTED) for task in range(20, 30)]
    unknown = [label(task, "Mars", "Mars", PLANTED) for task in range(30, 60)]
    assert of(truths + wrong + right + unknown).planted.n == 20
    assert of(truths + right + unknown).planted.missing == 20


def test_what_a_model_had_learned_does_not_show_how_good_it_is() -> None:
    """A task that somebody labelled before the training is left out where the model is judged."""
    unseen = [label(task, "Mars" if task < 30 else "Moon", arm=WITHHELD, by="1") for task in range(60)]
    before = [label(task, said=None, arm=UNPREDICTED, version="", by="2") for task in range(30)]
    learned = Manifest(annotations="2-292")
    for known in (before, [replace(each, truth=True) for each in before]):
        assert of(unseen + known).accuracy.value == pytest.approx(0.5)
        assert of(unseen + known, {"v1": learned}).accuracy.value == 0


def test_agreement_of_people() -> None:
    """Alpha, each pair, each person against the others, and the tasks to ask about again, the most disputed first."""
    answers = {task: ("Mars", "Mars", "Mars") if task % 3 else ("Venus", "Venus", "Moon") for task in range(60)}
    answers[60] = ("Mars", "Venus", "Moon")
    given = [label(task, chosen, by=str(who)) for task, mine in answers.items() for who, chosen in enumerate(mine, 1)]
    told = of([*given, label(0, "Venus", arm=UNPREDICTED, said=None, by="9", truth=True)])
    assert told.alpha.value is not None
    assert 0.4 < told.alpha.value < 0.9
    kappas = {(each.one, each.other): each.kappa.value for each in told.pairs}
    assert kappas["p1", "p2"] > kappas["p1", "p3"]  # type: ignore[operator]
    assert {each.name: each.agreement.value for each in told.people} == {
        "p1": pytest.approx(1, abs=0.02), "p2": pytest.approx(1, abs=0.02), "p3": pytest.approx(2 / 3, abs=0.02),
    }  # fmt: skip
    assert told.disputes == 21
    assert told.disputed[0].task == 60
    assert told.disputed[0].answers == {"p1": ("Mars",), "p2": ("Venus",), "p3": ("Moon",)}
    assert (told.disputed[-1].task, told.disputed[-1].decided) == (0, ("Venus",)), "a ground truth has decided it"


def test_an_agreement_that_may_be_chance_is_not_praised() -> None:
    given = [label(task, ("Mars", "Moon")[(task + (task < 3 and who == 2)) % 2], by=str(who))
             for task in range(22) for who in (1, 2)]  # fmt: skip
    told = of(given).alpha
    assert "agree fairly" in told.sentence
    assert told.sentence.endswith("It may also be little.")


def test_confusion_marks_what_was_seen() -> None:
    given = [label(1, "Mars"), label(2, "Moon"), label(3, "Moon", arm=WITHHELD), label(4, "Moon", arm=PLANTED)]
    told = of(given).confusion
    assert told.choices == ("Mars", "Moon")
    assert told.shown == ((1, 1), (0, 0))
    assert told.blind == ((0, 1), (0, 0))


def test_sets_of_choices_are_one_answer() -> None:
    """Where several may be chosen, a pre-label was kept if exactly its choices were."""
    given = [label(task, "Mars+Moon", "Mars+Moon" if task % 2 else "Mars") for task in range(40)]
    told = of(given)
    assert told.kept.value == pytest.approx(0.5)
    assert "Mars + Moon" in told.confusion.choices


def test_versions_in_their_order() -> None:
    """With what their trainings tell."""
    later = [label(task, version="v2", at="2026-02-01T00:00:00Z") for task in range(20)]
    earlier = [label(task, version="v1", at="2026-01-01T00:00:00.5Z", by="2") for task in range(20)]
    scores = {"body": {"labels": 80, "right": 72, "choices": {}, "skill": 0.8, "p_chance": 0.0}}
    told = of(later + earlier, {"v2": Manifest.of({"scores": scores})}).versions
    assert [each.tag for each in told] == ["v1", "v2"]
    assert [each.tested.value for each in told] == [None, pytest.approx(0.9)]


def test_seconds_that_nobody_worked_do_not_count() -> None:
    """Of other people, an hour and more, none at all; a person who only saw pre-labels is compared with nobody."""
    rng = np.random.default_rng(0)
    given = [label(task, arm=SHOWN if task % 4 else WITHHELD, seconds=float(rng.normal(4 if task % 4 else 7, 1)))
             for task in range(200)]  # fmt: skip
    given += [label(task, by="2", seconds=100.0) for task in range(1, 200, 4)]
    given += [replace(each, control="flaw", arm=UNPREDICTED, said=None) for each in given]  # of the same annotations
    given += [label(200 + task, arm=WITHHELD, seconds=seconds) for task, seconds in enumerate((7200.0, 0.0, -1.0))]
    told = measure(evidence(given))
    assert told.seconds_saved.value == pytest.approx(3, abs=0.5)
    assert told.seconds_with.value == pytest.approx(4, abs=0.3)
    assert told.seconds_saved.sentence.endswith("s saved).")


def test_people_who_did_little_are_taken_together() -> None:
    """Eighty who labelled four tasks each tell as much as four who labelled eighty."""
    rng = np.random.default_rng(1)
    given = [
        replace(label(task, arm=SHOWN if task % 4 else WITHHELD, seconds=float(rng.normal(4 if task % 4 else 7, 1))),
                annotator=str(task // 4))
        for task in range(320)
    ]  # fmt: skip
    told = measure(evidence(given)).seconds_saved
    assert told.value == pytest.approx(3, abs=0.4)


@pytest.mark.parametrize(
    ("share", "text"), [(0, "0 %"), (1, "100 %"), (0.5, "50 %"), (0.034, "3.4 %"), (0.996, "99.6 %"), (-0.2, "-20 %")]
)
def test_shares_for_people(share: float, text: str) -> None:
    assert percent(share) == text


def test_simulated_people_are_told_rightly() -> None:
    """
    The intervals hold what is true of people who accept 0, 10 and 30 % without looking.

    `python -m benchmarks.annotators` does it with more runs, and through a real Label Studio.
    """
    runs = [(world, pure(world, seed)) for seed in range(30) for world in [World(ACCEPTED[seed % 3], tasks=150)]]
    for name, told in summed(runs).items():
        assert told["told"] >= 20, name
        assert told["share"] >= 0.83, (name, told)
