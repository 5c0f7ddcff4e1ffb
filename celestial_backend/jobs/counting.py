"""
How many pictures have which choice, and whether that is enough to learn from.

The rule: a project trains by itself as soon as one of its controls has at least two
choices with three labelled pictures each, and again whenever its labels have grown by a
fifth since the last training began, and by five at least.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from celestial_backend.labels import ChoiceMap, Control, short
from celestial_backend.studio.client import is_certified, moment

LEAST_CHOICES, LEAST_LABELS = 2, 3  # of one control; of each of them
ONE_IN, LEAST_NEW = 5, 5  # new or changed labels that bring the next training about: of those there were, and in number
LEAST = f"at least {LEAST_CHOICES} choices need {LEAST_LABELS} labels each"
NAMED_MAX = 4  # choices whose labels a sentence tells one by one
Annotations = Sequence[Mapping[str, Any]]


def enough_new(labels: int, every: int | None) -> int:
    """
    How many new or changed labels bring the next training about.

    Args:
        labels: How many there were when the last one began.
        every: CELESTIAL_TRAIN_EVERY, if that is a number.
    """
    return every or max(LEAST_NEW, math.ceil(labels / ONE_IN))


def missing(label_config: str, tasks: Iterable[Annotations]) -> str | None:
    """
    What labels a project lacks before anything can be learned, as a sentence; None if nothing.

    Args:
        label_config: The project's.
        tasks: The annotations of each labelled task; no more tasks are read than it takes to know that there are
            enough.

    Raises:
        LabelConfigError: The config has no control that can be learned.
    """
    counts = LabelCounts(ChoiceMap.for_learning(label_config))
    for task in tasks if counts.controls else ():
        counts.add(task)
        if counts.enough:
            return None
    return counts.missing


class LabelCounts:
    """
    How many pictures have which choice, by what most of their annotators chose last.

    It is quick and close, and not what a training finds: that also looks at the pictures themselves.

    Attributes:
        controls: Those that offer enough choices, in the config's order.
        pictures: By control, the pictures of each choice on offer.
        enough: Whether a control can be learned.
    """

    def __init__(self, choices: ChoiceMap) -> None:
        self.controls = [control for control in choices.controls if len(control.choices) >= LEAST_CHOICES]
        self.pictures = {control.from_name: Counter(dict.fromkeys(control.choices, 0)) for control in self.controls}
        self.enough = False
        self._learnable: Counter[str] = Counter()  # choices with enough pictures, by control
        self._choices = choices

    def add(self, annotations: Annotations) -> None:
        """Count one task: where its annotators do not agree, what more of them chose than anything else."""
        said = [self._choices.choices_of(each.get("result")) for each in _standing(annotations)]
        said = [{name: each[name] for name in self._choices.asked(each) if name in each} for each in said]
        for control in self.controls:
            name, pictures = control.from_name, self.pictures[control.from_name]
            for choice in _agreed(control, [each[name] for each in said if name in each]):
                if choice in pictures:
                    pictures[choice] += 1
                    self._learnable[name] += pictures[choice] == LEAST_LABELS
            self.enough |= self._learnable[name] >= LEAST_CHOICES

    @property
    def missing(self) -> str | None:
        """What is missing where it takes the fewest labels to fix it, as a sentence; None if nothing is."""
        if not self.controls:
            return f"No control of the label config offers {LEAST_CHOICES} choices, so no training begins by itself."
        return None if self.enough else self._sentence(min(self.controls, key=self._lacks))

    def _lacks(self, control: Control) -> int:
        most = self.pictures[control.from_name].most_common(LEAST_CHOICES)
        return sum(max(0, LEAST_LABELS - count) for _, count in most)

    def _sentence(self, control: Control) -> str:
        counted = self.pictures[control.from_name].most_common()
        there = [(count, f"of {short(choice)}") for choice, count in counted[:NAMED_MAX] if count]
        rest = sum(count for _, count in counted[NAMED_MAX:])
        said = _listed("label", [*there, (rest, "of other choices")] if rest else there)
        name = short(control.from_name)[1:-1]
        return f"{name}: {said or 'no labels yet'}; {LEAST}, so label {_wanted(counted)}."


def _wanted(counted: Sequence[tuple[str, int]]) -> str:
    """What to label, of a control whose choices are given with their pictures, the most frequent first."""
    others = len(counted) > LEAST_CHOICES  # one without labels is as good as another
    if others and not counted[0][1]:
        return f"{LEAST_LABELS} pictures each of {LEAST_CHOICES} choices"
    return _listed("more picture", [
        (LEAST_LABELS - count, f"of {short(choice)}" if count or not others else "of another choice")
        for choice, count in counted[:LEAST_CHOICES] if count < LEAST_LABELS
    ])  # fmt: skip


def _listed(noun: str, parts: Sequence[tuple[int, str]]) -> str:
    """Numbers of something, the first one with its name: "4 labels of 'a', 2 of 'b' and 1 of 'c'"; empty for none."""
    words = [f"{count} {rest}" for count, rest in parts]
    if words:
        count, rest = parts[0]
        words[0] = f"{count} {noun}{'s' * (count != 1)} {rest}"
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def _standing(annotations: Annotations) -> list[Mapping[str, Any]]:
    """The newest annotation of each annotator that can be learned; of ground truths alone, if there are any."""
    given = [each for each in annotations if not each.get("was_cancelled") and not is_certified(each)]
    latest: dict[str, Mapping[str, Any]] = {}
    for each in sorted(filter(_is_truth, given) if any(map(_is_truth, given)) else given, key=_moment):
        person = each.get("completed_by")
        latest[f"{each.get('id')} of nobody" if person is None else str(person)] = each
    return list(latest.values())


def _is_truth(annotation: Mapping[str, Any]) -> bool:
    return bool(annotation.get("ground_truth"))


def _moment(annotation: Mapping[str, Any]) -> datetime:
    return moment(annotation.get("updated_at"))


def _agreed(control: Control, chosen: Sequence[Sequence[str]]) -> list[str]:
    """The choices of a picture: one that has more votes than any other, or, of several, those that most people made."""
    if control.multiple:
        votes = Counter(choice for each in chosen for choice in each)
        return [choice for choice, count in votes.items() if 2 * count > len(chosen)]
    votes = Counter(each[0] for each in chosen if len(each) == 1)
    (first, most), (_, second) = [*votes.most_common(2), ("", 0), ("", 0)][:2]
    return [first] if most > second else []
