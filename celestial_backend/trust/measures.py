"""
What people's labels tell of the pre-labels, of the model, and of the people: figures with their intervals.

Each figure says how sure it is, or how much is missing until it can be told. All is computed from an `Evidence`;
nothing here asks anybody.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from functools import cached_property
from itertools import combinations

from celestial_backend.labels import Control
from celestial_backend.learning.votes import Choices
from celestial_backend.models.manifest import Manifest
from celestial_backend.studio.client import moment
from celestial_backend.trust.calibration import calibration_error, reliability
from celestial_backend.trust.evidence import SHOWN, Evidence, Given, by_task, most_chosen
from celestial_backend.trust.figures import (
    Compared,
    Confusion,
    Disputed,
    Figure,
    Measured,
    Measures,
    Pair,
    Person,
    Version,
    not_yet,
    percent,
    span,
    told_by,
)
from celestial_backend.trust.intervals import (
    Interval,
    Times,
    alpha,
    difference,
    kappa,
    middle,
    ratio,
    share,
    typical,
    wilson,
)
from celestial_backend.trust.trial import AUDITED, PLANTED, WITHHELD

LEAST, LEAST_OF_SOME = 20, 10  # tasks for a figure; of a choice, a range of confidence, or a person
LEAST_EACH = 5  # times of a person with and without a pre-label, to compare them with themselves
MANY = 50  # labels; whoever has so many of one kind and none of the other was not part of the trial
LEAST_CALIBRATED = 50
LONGEST_S = 3600.0  # for a task; whoever takes longer was away
BANDS = (0.5, 0.8, 0.95)  # where ranges of confidence end
DISPUTED_MAX, PAIRS_MAX, CONFUSED_MAX = 100, 20, 40
OTHERS = "others"  # beyond the most frequent choices
GONE = "accounts that are gone"
BY_TRUTH, BY_BLIND = "ground truth", "others who saw no pre-label"
SAME_TIMES = "all labels took the same time, which no person does"
WITHOUT = "tasks without a pre-label"
OF_BOTH = ", of people who label some with and some without"
CONTROL_REMEDY = "With CELESTIAL_CONTROL_SHARE=0.1, a random tenth of the tasks is shown without one"


def measure(evidence: Evidence, manifests: Mapping[str, Manifest] | None = None) -> Measures:
    """
    All figures that the labels of a project give.

    Args:
        evidence: What people answered.
        manifests: Tag -> what is told of the model; those of labels' versions are used.
    """
    judged = [each for each in evidence.given if not each.truth]
    saved, without, with_one = _seconds(judged)
    left_out = Counter(evidence.left_out)
    left_out["marked as ground truth"] += len({each.annotation for each in evidence.given if each.truth})
    return Measures(
        project=evidence.number,
        title=evidence.title,
        link=evidence.link,
        at=f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
        tasks=evidence.tasks,
        labelled=len({each.task for each in judged}),
        annotators=len({_name(each, evidence) for each in judged}),
        seconds_saved=saved,
        seconds_with=with_one,
        seconds_without=without,
        controls=tuple(_OfControl(control, evidence, manifests or {}).measured() for control in evidence.controls),
        left_out=dict(+left_out),
    )


class _OfControl:
    """The labels of one control, and what they tell."""

    def __init__(self, control: Control, evidence: Evidence, manifests: Mapping[str, Manifest]) -> None:
        mine = [each for each in evidence.given if each.control == control.from_name]
        self._control, self._evidence, self._manifests = control, evidence, manifests
        self._judged = [each for each in mine if not each.truth]
        self._shown = [each for each in self._judged if each.arm == SHOWN]
        self._truths = by_task(each for each in mine if each.truth)
        self._tasks = by_task(each for each in self._judged if each.arm != PLANTED)  # the others were misled
        self._right = {each.annotation: self._truth_for(each) for each in self._judged}

    def measured(self) -> Measured:
        blind = self._blind
        sure, same = _by_confidence(blind)
        disputed = self._disputed()
        return Measured(
            control=self._control.from_name,
            multiple=self._control.multiple,
            choices=self._control.choices,
            labels=dict(Counter(each.arm for each in self._judged)),
            kept=_kept(self._shown, "Of the pre-labels that people saw", LEAST),
            kept_rightly=self._kept_rightly(),
            truths=self._truths_told(),
            compared=self._compared("", self._comparable, LEAST),
            by_choice=self._compared_by(lambda each: _written(each.said or ())),
            by_confidence=self._compared_by(_band),
            by_person=self._compared_by(lambda each: _name(each, self._evidence)),
            over_corrected=self._over_corrected(),
            under_corrected=self._under_corrected(),
            planted=self._planted(),
            accuracy=_accuracy(blind, LEAST),
            alpha=self._alpha(),
            people=self._people(),
            pairs=self._pairs(),
            disputed=tuple(disputed[:DISPUTED_MAX]),
            disputes=len(disputed),
            confusion=self._confusion(),
            reliability=tuple(reliability(sure, same)),
            calibration_error=_calibration(sure, same),
            scores=_histogram(self._judged),
            versions=self._versions(),
        )

    @cached_property
    def _blind(self) -> list[Given]:
        """
        Labels on what was not shown, of tasks that the model had not learned.

        The withheld are a random part of all; where there is none, those that were drawn for an audit.
        """
        for arm in (WITHHELD, AUDITED):
            if found := [each for each in self._judged if each.arm == arm and not self._was_learned(each)]:
                return found
        return []

    @cached_property
    def _comparable(self) -> list[Given]:
        """Labels on versions of which some predictions were withheld: the others were made under other conditions."""
        versions = {each.version for each in self._judged if each.arm == WITHHELD}
        tried = [each for each in self._judged if each.version in versions and each.arm in (SHOWN, WITHHELD)]
        return tried or self._shown

    @cached_property
    def _learned(self) -> dict[str, Callable[[int], bool]]:
        from celestial_backend.learning.dataset import within

        told = {tag: manifest.annotations for tag, manifest in self._manifests.items()}
        return {tag: within(text) for tag, text in told.items() if text}

    def _was_learned(self, given: Given) -> bool:
        """Whether the model had learned what somebody else said of the task, or what is marked as the truth."""
        learned, task = self._learned.get(given.version), given.task
        told = (*self._tasks.get(task, ()), *self._truths.get(task, ()))
        return learned is not None and any(learned(each.annotation) for each in told)

    # What is right

    def _truth_for(self, given: Given) -> tuple[Choices, str] | None:
        """
        What is right for a label, and who says so.

        Nobody's own label tells whether it is, nor do those of others who saw the same pre-label, which misleads all.
        """
        if decided := most_chosen(self._truths.get(given.task, ())):
            return decided, BY_TRUTH
        others = [each for each in self._tasks.get(given.task, ()) if each.annotator != given.annotator]
        decided = most_chosen([each for each in others if each.arm != SHOWN])
        return None if decided is None else (decided, BY_BLIND)

    def _is_right(self, given: Given, answer: Choices | None) -> bool | None:
        told = self._right[given.annotation]
        return None if told is None or answer is None else told[0] == answer

    def _truths_told(self) -> tuple[str, ...]:
        counts = Counter(told[1] for each in self._shown if (told := self._right[each.annotation]))
        sentences = {
            BY_TRUTH: "A ground truth tells what is right for {} labels.",
            BY_BLIND: "For {} labels it is what most others chose who saw no pre-label.",
        }
        lacking = len(self._shown) - counts.total()
        unknown = f"For {lacking} labels it is not known: no ground truth, and no others who agree and saw none."
        more = [unknown] if lacking else []
        return (*(sentence.format(counts[how]) for how, sentence in sentences.items() if counts[how]), *more)

    def _kept_rightly(self) -> Figure:
        known = [each for each in self._shown if each.kept and self._is_right(each, each.chosen) is not None]
        found = _share(known, lambda each: bool(self._is_right(each, each.chosen)),
                       "Of the pre-labels that were kept, {share} are right ({span}; {n} labels).",
                       "tasks with a ground truth")  # fmt: skip
        return found if found.value is not None else self._at_most_rightly() or found

    def _at_most_rightly(self) -> Figure | None:
        """The same without a truth: no more can be right of what is kept than is right of all."""
        seen, weights, unseen = self._weighed(self._comparable)
        if min(len({each.task for each in labels}) for labels in (seen, unseen)) < LEAST:
            return None
        found = ratio(_interval(unseen), _interval(seen, weights))
        if found is None or found.value >= 1:  # then it bounds nothing
            return None
        most = Interval(found.value, found.low, min(1.0, found.high), found.n, found.tasks)
        return told_by(most, f"Of the pre-labels that were kept, at most about {percent(most.value)} are right"
                           f" ({span(most)}): more are kept than people agree with who do not see them.")  # fmt: skip

    def _over_corrected(self) -> Figure:
        right = [each for each in self._shown if self._is_right(each, each.said)]
        return _share(right, lambda each: not self._is_right(each, each.chosen),
                      "Of the right pre-labels, {share} were changed to something wrong ({span}; {n} labels).",
                      "right pre-labels on tasks of which the truth is known")  # fmt: skip

    def _under_corrected(self) -> Figure:
        wrong = [each for each in self._shown if self._is_right(each, each.said) is False]
        return _share(wrong, lambda each: each.kept,
                      "Of the wrong pre-labels, {share} were kept ({span}; {n} labels).",
                      "wrong pre-labels on tasks of which the truth is known")  # fmt: skip

    def _planted(self) -> Figure:
        planted = [each for each in self._judged if each.arm == PLANTED
                   and most_chosen(self._truths.get(each.task, ())) not in (None, each.said)]  # fmt: skip
        return _share(planted, lambda each: each.kept,
                      "Of the errors that were planted, {share} were kept ({span}; {n} labels).",
                      "labels on planted errors whose task has a ground truth")  # fmt: skip

    # What a pre-label does

    def _compared(self, name: str, labels: Sequence[Given], least: int) -> Compared:
        seen, weights, unseen = self._weighed(labels)
        whose = OF_BOTH if len(seen) + len(unseen) < sum(each.arm in (SHOWN, WITHHELD) for each in labels) else ""
        shown = _share(seen, lambda each: each.kept,
                       "Where people saw what the model said, {share} agreed with it ({span}; {n} labels).",
                       f"tasks with a pre-label{whose}", least, weights)  # fmt: skip
        withheld = _share(unseen, lambda each: each.kept,
                          "Where it was withheld from them, {share} agreed with it ({span}; {n} labels).",
                          f"{WITHOUT}{whose}" if any(each.arm == WITHHELD for each in labels)
                          else f"{WITHOUT}. {CONTROL_REMEDY}", least)  # fmt: skip
        if shown.value is None or withheld.value is None:
            lacking = withheld if withheld.value is None else shown
            return Compared(name, shown, withheld, lacking, lacking)
        one, other = _interval(seen, weights), _interval(unseen)
        return Compared(name, shown, withheld, _difference(difference(one, other)), _unlooked(one, other))

    def _weighed(self, labels: Sequence[Given]) -> tuple[Sequence[Given], list[float] | None, Sequence[Given]]:
        """
        Labels with a pre-label, how much each counts, and those without.

        Each person and each version counts as often among the first as among the last. Else, where somebody labelled
        more of one kind or another share was withheld, people and models would be compared and not what was seen.
        """
        seen, unseen = ([each for each in labels if each.arm == arm] for arm in (SHOWN, WITHHELD))
        if not (seen and unseen):
            return seen, None, unseen

        def kind(given: Given) -> tuple[str, str]:
            return given.version, _name(given, self._evidence)

        with_one, without = (Counter(map(kind, some)) for some in (seen, unseen))
        of_both = with_one.keys() & without.keys()
        seen, unseen = ([each for each in some if kind(each) in of_both] for some in (seen, unseen))
        return seen, [without[kind(each)] / with_one[kind(each)] for each in seen], unseen

    def _compared_by(self, group: Callable[[Given], str | None]) -> tuple[Compared, ...]:
        groups: dict[str, list[Given]] = {}
        for each in self._comparable:
            if (name := group(each)) is not None:
                groups.setdefault(name, []).append(each)
        ordered = sorted(groups.items(), key=lambda one: (-len(one[1]), one[0]))
        return tuple(self._compared(name, labels, LEAST_OF_SOME) for name, labels in ordered)

    # Among people

    def _alpha(self) -> Figure:
        answers = [[each.chosen for each in mine] for mine in self._tasks.values() if len(mine) > 1]
        found = alpha(answers)
        if len(answers) < LEAST:
            return not_yet("tasks that several people label", sum(map(len, answers)), LEAST - len(answers))
        if found is None:
            return not_yet("all gave the same answer to all tasks, so agreement cannot be told from habit")
        unsure = " It may also be little." if found.low < 2 / 3 <= found.value else ""
        word = "well" if found.value >= 0.8 else "fairly" if found.value >= 2 / 3 else "little"
        return told_by(found, f"Annotators agree {word}: Krippendorff's alpha is {found.value:.2f}"
                            f" ({span(found, '{:.2f}'.format)}; {found.tasks} tasks).{unsure}")  # fmt: skip

    def _people(self) -> tuple[Person, ...]:
        groups: dict[str, list[Given]] = {}
        for each in self._judged:
            groups.setdefault(_name(each, self._evidence), []).append(each)
        found = []
        for name, labels in sorted(groups.items(), key=lambda one: (-len(one[1]), one[0])):
            beside = [each for each in labels if self._others(each) is not None]
            checked = [each for each in labels if (told := self._right[each.annotation]) and told[1] == BY_TRUTH]
            found.append(Person(
                labels[0].annotator, name, len(labels),
                _kept(labels, f"Of the pre-labels that {name} saw", LEAST_OF_SOME),
                _share(beside, lambda each: each.chosen == self._others(each),
                       "{share} of their labels are what most others chose ({span}; {n} labels).",
                       "tasks that others label too", LEAST_OF_SOME),
                _share(checked, lambda each: bool(self._is_right(each, each.chosen)),
                       "{share} of their labels are what a ground truth says ({span}; {n} labels).",
                       "tasks with a ground truth", LEAST_OF_SOME),
                _typical_seconds(labels),
            ))  # fmt: skip
        return tuple(found)

    def _others(self, given: Given) -> Choices | None:
        return most_chosen([each for each in self._tasks.get(given.task, ()) if each.annotator != given.annotator])

    def _pairs(self) -> tuple[Pair, ...]:
        common: dict[tuple[str, str], list[tuple[Hashable, Hashable]]] = {}
        for mine in self._tasks.values():
            named = sorted((name, each) for each in mine if (name := self._evidence.people.get(each.annotator)))
            for (one, first), (other, second) in combinations(named, 2):
                common.setdefault((one, other), []).append((first.chosen, second.chosen))
        ordered = sorted(common.items(), key=lambda each: (-len(each[1]), each[0]))
        return tuple(Pair(one, other, _kappa(both)) for (one, other), both in ordered[:PAIRS_MAX])

    def _disputed(self) -> list[Disputed]:
        found = []
        for task, mine in self._tasks.items():
            counts = Counter(each.chosen for each in mine)
            if len(counts) > 1:
                agreed = max(counts.values()) / len(mine)
                answers: dict[str, tuple[str, ...]] = {}
                for each in mine:
                    name = _name(each, self._evidence)
                    answers[name if name not in answers else f"{name} ({len(answers)})"] = tuple(sorted(each.chosen))
                said = next((each.said for each in reversed(mine) if each.said), frozenset())
                decided = most_chosen(self._truths.get(task, ())) or frozenset()
                found.append((agreed, -len(mine), task,
                              Disputed(task, answers, tuple(sorted(said)), tuple(sorted(decided)))))  # fmt: skip
        return [each for *_, each in sorted(found, key=lambda one: (bool(one[3].decided), *one[:3]))]

    # The model

    def _confusion(self) -> Confusion:
        told = [each for each in self._judged if each.said is not None and each.arm != PLANTED]
        seen = Counter(name for each in told for name in (_written(each.said or ()), _written(each.chosen)))
        order = {name: place for place, name in enumerate(self._control.choices)}
        frequent = [name for name, _ in seen.most_common(CONFUSED_MAX)]
        names = sorted(frequent, key=lambda name: (order.get(name, len(order)), name))
        names += [OTHERS] * (len(seen) > len(names))
        place = {name: number for number, name in enumerate(names)}
        tables = []
        for blind in (True, False):
            table = [[0] * len(names) for _ in names]
            for each in told:
                if (each.arm != SHOWN) == blind:
                    row, column = (place.get(_written(what or ()), -1) for what in (each.said, each.chosen))
                    table[row][column] += 1
            tables.append(tuple(map(tuple, table)))
        return Confusion(tuple(names), *tables)

    def _versions(self) -> tuple[Version, ...]:
        groups: dict[str, list[Given]] = {}
        for each in sorted(self._judged, key=lambda each: moment(each.at)):
            if each.version:
                groups.setdefault(each.version, []).append(each)
        return tuple(
            Version(
                tag, labels[0].at, labels[-1].at, len(labels),
                _kept(labels, "Of its pre-labels that people saw", LEAST_OF_SOME),
                _accuracy([each for each in self._blind if each.version == tag], LEAST_OF_SOME),
                self._tested(tag),
            )
            for tag, labels in groups.items()
        )  # fmt: skip

    def _tested(self, tag: str) -> Figure:
        scores = self._manifests.get(tag, Manifest()).scores or {}
        found = scores.get(self._control.from_name)
        if found is None or not found.labels or found.right > found.labels:
            return not_yet("its training tells nothing of this control")
        value = found.right / found.labels
        told = Interval(value, *wilson(value, found.labels), found.labels, found.labels)
        return told_by(told, f"In training it said {percent(value)} of the labels right that it had not learned"
                           f" ({span(told)}; {found.labels} labels).")  # fmt: skip


def _name(given: Given, evidence: Evidence) -> str:
    return evidence.people.get(given.annotator, GONE)


def _written(choices: Collection[str]) -> str:
    return " + ".join(sorted(choices)) or "none"


def _band(given: Given) -> str | None:
    if given.confidence is None:
        return None
    edges = (0.0, *BANDS, 1.0)
    place = sum(given.confidence >= edge for edge in BANDS)
    return f"{edges[place]:g} to {edges[place + 1]:g}"


def _interval(labels: Sequence[Given], weights: Sequence[float] | None = None) -> Interval:
    found = share([each.kept for each in labels], [each.task for each in labels], weights)
    assert found is not None  # noqa: S101 - of labels that there are
    return found


def _share(
    labels: Sequence[Given], hit: Callable[[Given], bool], sentence: str, needed: str, least: int = LEAST,
    weights: Sequence[float] | None = None,
) -> Figure:  # fmt: skip
    """
    The share of some labels that are hits.

    Args:
        labels: Of any number of tasks.
        hit: Whether a label is one.
        sentence: With places for `share`, `span` and `n`.
        needed: What must be more, for "about N more ...".
        least: Of so few tasks nothing is told.
        weights: How much each label counts.
    """
    found = share([hit(each) for each in labels], [each.task for each in labels], weights)
    if found is None or found.tasks < least:
        return not_yet(needed, len(labels), least - (found.tasks if found else 0))
    return told_by(found, sentence.format(share=percent(found.value), span=span(found), n=found.n))


def _kept(labels: Sequence[Given], which: str, least: int) -> Figure:
    shown = [each for each in labels if each.arm == SHOWN]
    start = which.replace("{", "{{").replace("}", "}}")
    return _share(shown, lambda each: each.kept, start + ", {share} were submitted as they were ({span}; {n} labels).",
                  "tasks labelled with a pre-label", least)  # fmt: skip


def _accuracy(blind: Sequence[Given], least: int) -> Figure:
    return _share(blind, lambda each: each.kept,
                  "People who did not see what the model said agree with {share} of it ({span}; {n} labels).",
                  WITHOUT if blind else f"{WITHOUT}. {CONTROL_REMEDY}", least)  # fmt: skip


def _difference(found: Interval) -> Figure:
    def points(value: float) -> str:
        return f"{100 * value:.1f}"

    much = f"{points(abs(found.value))} points {'more' if found.value >= 0 else 'less'} often"
    sure = "" if found.low > 0 or found.high < 0 else " That may be chance."
    return told_by(found, f"People agree with the model {much} where they see what it says"
                        f" ({span(found, points)} points).{sure}")  # fmt: skip


def _unlooked(shown: Interval, withheld: Interval) -> Figure:
    many = ratio(-shown + 1, -withheld + 1)
    if many is None:
        return not_yet(f"{WITHOUT}: so far nobody disagreed with what was withheld from them", shown.n + withheld.n,
                     withheld.tasks)  # fmt: skip
    found = -many + 1
    most = percent(max(0.0, found.high))
    if found.low > 0:
        low = percent(found.low).removesuffix(" %")
        sentence = (f"About {percent(found.value)} of the pre-labels are accepted without looking"
                    f" (95 % interval {low} to {most}).")  # fmt: skip
    else:
        sentence = f"There is no sign yet that pre-labels are accepted without looking; up to {most} may be."
    return told_by(found, sentence)


def _kappa(both: Sequence[tuple[Hashable, Hashable]]) -> Figure:
    if len(both) < LEAST_OF_SOME:
        return not_yet("tasks that both label", 2 * len(both), LEAST_OF_SOME - len(both))
    found = kappa(both)
    if found is None:
        return not_yet("both gave the same answer to all tasks", 2 * len(both))
    return told_by(found, f"Cohen's kappa is {found.value:.2f} ({span(found, '{:.2f}'.format)}; {len(both)} tasks).")


def _by_confidence(blind: Sequence[Given]) -> tuple[list[float], list[bool]]:
    """The confidence of each prediction, and whether most people agree with it; of equally many, the first."""
    groups: dict[tuple[int, str], list[Given]] = {}
    for each in blind:
        if each.confidence is not None and 0 <= each.confidence <= 1:
            groups.setdefault((each.task, each.version), []).append(each)
    sure = [mine[0].confidence or 0.0 for mine in groups.values()]
    return sure, [(most_chosen(mine) or mine[0].chosen) == mine[0].said for mine in groups.values()]


def _calibration(confidence: Sequence[float], right: Sequence[bool]) -> Figure:
    found = calibration_error(confidence, right) if len(right) >= LEAST_CALIBRATED else None
    if found is None:
        return not_yet(WITHOUT, len(right), LEAST_CALIBRATED - len(right))
    return Figure(
        f"Confidence is {100 * found.value:.1f} points away from what people say, on average (95 % interval"
        f" {100 * found.low:.1f} to {100 * found.high:.1f}; {found.count} tasks). Of so few tasks, scores that are"
        f" right would show {100 * found.chance:.1f}.",
        found.value, found.low, found.high, found.count,
    )  # fmt: skip


def _histogram(judged: Iterable[Given]) -> tuple[int, ...]:
    sure = {(each.task, each.version): each.confidence for each in judged if each.confidence is not None}
    counts = Counter(min(9, max(0, math.floor(10 * value))) for value in sure.values())
    return tuple(counts[place] for place in range(10))


def _times(judged: Iterable[Given]) -> dict[int, Given]:
    """Of each annotation with a usable time, the answer that tells how it was made; any pre-label helps."""
    found: dict[int, Given] = {}
    for each in judged:
        if each.seconds is not None and 0 < each.seconds <= LONGEST_S:
            known = found.setdefault(each.annotation, each)
            found[each.annotation] = min(known, each, key=lambda one: {SHOWN: 0, WITHHELD: 1}.get(one.arm, 2))
    return found


def _compared_times(judged: Sequence[Given]) -> list[Times]:
    """The times of each person with and without a pre-label; those of people with few are taken together."""
    versions = {each.version for each in judged if each.arm == WITHHELD}
    people: dict[str, dict[str, list[Given]]] = {}
    for each in _times(judged).values():
        if each.version in versions and each.arm in (SHOWN, WITHHELD):
            people.setdefault(each.annotator, {SHOWN: [], WITHHELD: []})[each.arm].append(each)
    some: dict[str, list[Given]] = {SHOWN: [], WITHHELD: []}
    enough = []
    for mine in people.values():
        if min(map(len, mine.values())) >= LEAST_EACH:
            enough.append(mine)
        elif sum(map(len, mine.values())) < MANY or all(mine.values()):
            some = {arm: some[arm] + mine[arm] for arm in some}
    if min(map(len, some.values())) >= LEAST_EACH:
        enough.append(some)
    return [
        Times([each.seconds or 0 for each in mine[SHOWN]], [each.task for each in mine[SHOWN]],
              [each.seconds or 0 for each in mine[WITHHELD]], [each.task for each in mine[WITHHELD]])
        for mine in enough
    ]  # fmt: skip


def _seconds(judged: Sequence[Given]) -> tuple[Figure, Figure, Figure]:
    """The typical seconds that a pre-label saves, those without and with one."""
    compared = _compared_times(judged)
    tasks = len({task for each in compared for task in each.without_tasks})
    if tasks < LEAST:
        remedy = "" if any(each.arm == WITHHELD for each in judged) else f". {CONTROL_REMEDY}"
        labels = sum(len(each.without_s) for each in compared)
        none = not_yet(f"{WITHOUT} whose seconds are known{remedy}", labels, LEAST - tasks)
        return none, none, none
    without, with_one, saved = typical(compared)
    if without.low == without.high or with_one.low == with_one.high:
        none = not_yet(SAME_TIMES, saved.n)
        return none, none, none
    much = f"{abs(saved.value):.1f} s {'less' if saved.value >= 0 else 'more'} with a pre-label"
    sure = "" if saved.low > 0 or saved.high < 0 else " That may be chance."
    return (
        told_by(saved, f"A task takes {much} ({span(saved, '{:.1f}'.format)} s saved).{sure}"),
        told_by(without, f"Without a pre-label a task takes {_typical(without)}."),
        told_by(with_one, f"With a pre-label a task takes {_typical(with_one)}."),
    )


def _typical_seconds(labels: Sequence[Given]) -> Figure:
    mine = list(_times(labels).values())
    found = middle([each.seconds or 0 for each in mine], [each.task for each in mine])
    if found is None or found.n < LEAST_OF_SOME:
        return not_yet("labels with their seconds", len(mine), LEAST_OF_SOME - len(mine))
    if found.low == found.high:
        return not_yet(SAME_TIMES, found.n)
    return told_by(found, f"A task takes {_typical(found)}.")


def _typical(found: Interval) -> str:
    return f"{found.value:.1f} s ({span(found, '{:.1f}'.format)} s; {found.n} labels)"
