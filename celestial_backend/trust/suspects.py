"""
Labels that look wrong: heads that did not learn a label say another choice of its picture.

The labels are ranked by the probability that such heads give them, the lowest first: cleanlab's self-confidence
(Northcutt et al., 2021). Where several choices may be right, each is judged by itself, and the one that is likeliest
wrong counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from celestial_backend.learning.control import TICKED, Unseen, unseen
from celestial_backend.learning.dataset import LEAST_LABELS
from celestial_backend.learning.project import Learner, Progress
from celestial_backend.trust.outlook import Outlook, outlook


@dataclass(frozen=True)
class Suspect:
    """
    A label to look at again.

    Attributes:
        tasks: Those that show the picture; more than one where it was uploaded twice.
        annotations: The labels; more than one where several people agree.
        given: What people chose, and `said`, what the model says instead, in the config's order.
        trust: How sure the model is of what people chose, 0 to 1, and `sure`, of what it says instead.
    """

    control: str
    tasks: tuple[int, ...]
    annotations: tuple[int, ...]
    given: tuple[str, ...]
    said: tuple[str, ...]
    trust: float
    sure: float


@dataclass(frozen=True)
class Suspects:
    """
    The labels of a project to look at again.

    Attributes:
        found: The likeliest to be wrong first, of all controls together.
        judged: By control, how many labels were judged.
        lacking: By control, why none was.
        outlooks: By control, what more labels are expected to bring, where that can be said.
    """

    found: tuple[Suspect, ...] = ()
    judged: Mapping[str, int] = field(default_factory=dict)
    lacking: Mapping[str, str] = field(default_factory=dict)
    outlooks: Mapping[str, Outlook] = field(default_factory=dict)


def look(learner: Learner, project: str, report: Progress) -> Suspects:
    """
    Judge the labels of a project as they are now; reads them as a training does, and takes as long.

    Args:
        learner: Of this process.
        project: Label Studio's number of the project.
        report: Told where the reading is.

    Raises:
        NotEnoughDataError: No control has labels enough; the message gives the counts.
        CelestialError: Labels or pictures cannot be read.
    """
    choices, champion, data = learner.read(project, report)
    report("judging labels")
    found: list[Suspect] = []
    judged, lacking, outlooks = dict[str, int](), dict[str, str](), dict[str, Outlook]()
    for control in choices.controls:
        said = unseen(control, data, champion, champion.features)
        if said is None:
            lacking[control.from_name] = f"it needs two choices with {LEAST_LABELS} labelled pictures each"
            continue
        judged[control.from_name] = len(said.examples)
        if ahead := outlook(len(said.examples), said.steps):
            outlooks[control.from_name] = ahead
        found += suspects(control.from_name, said, multiple=control.multiple)
    return Suspects(tuple(sorted(found, key=lambda each: (each.trust, each.tasks))), judged, lacking, outlooks)


def suspects(control: str, unseen: Unseen, *, multiple: bool = False) -> list[Suspect]:
    """
    The labels of which heads that did not learn them say otherwise, the likeliest to be wrong first.

    Args:
        control: Its name.
        unseen: What those heads say.
        multiple: Whether several choices may be right.
    """
    given = np.array([[choice in each.choices for choice in unseen.choices] for each in unseen.examples], bool)
    rows = np.arange(len(given))
    if multiple:
        agreed = np.where(given, unseen.said, 1 - unseen.said)
        said, trust = unseen.said >= TICKED, agreed.min(axis=1)
        sure = 1 - trust
    else:
        best = unseen.said.argmax(axis=1)
        said = np.eye(len(unseen.choices), dtype=bool)[best]
        trust, sure = unseen.said[rows, given.argmax(axis=1)], unseen.said[rows, best]
    doubted = [row for row in np.argsort(trust, kind="stable") if (said[row] != given[row]).any()]

    def named(ticked: NDArray[np.bool_]) -> tuple[str, ...]:
        return tuple(choice for choice, is_ticked in zip(unseen.choices, ticked, strict=True) if is_ticked)

    return [
        Suspect(control, each.task_ids, each.annotation_ids, named(given[row]), named(said[row]),
                round(float(trust[row]), 4), round(float(sure[row]), 4))
        for row in doubted for each in [unseen.examples[row]]
    ]  # fmt: skip
