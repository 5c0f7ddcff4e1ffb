"""
Planted errors: wrong pre-labels on tasks whose answer is known, which tell how often people accept what is wrong.

In go a task with its ground truth and what the model says of it; out come the regions that stand in their place. Once
a task has all its labels they are removed from Label Studio.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from celestial_backend.errors import CelestialError, ProjectGoneError, StateError
from celestial_backend.labels import ChoiceMap
from celestial_backend.learning.votes import votes_of
from celestial_backend.studio.client import Studio
from celestial_backend.studio.project import StudioProject
from celestial_backend.trust.trial import PLANTED, Regions, Trial, Unshown

logger = logging.getLogger(__name__)
STUDIO_S = 3.0  # for a Label Studio that is away: there is another minute


def truth_of(task: Any, config: str) -> dict[str, frozenset[str]]:
    """
    What a task's ground truth says: control -> its one choice.

    Nothing where it has none that says one thing, and where it has as many labels as it shall have.

    Args:
        task: As Label Studio sends it; where its annotations or ``is_labeled`` are not told, nothing is known.
        config: The label config.
    """
    given = task.get("annotations") if isinstance(task, Mapping) and task.get("is_labeled") is False else None
    true = [each for each in given or () if isinstance(each, Mapping) and each.get("ground_truth") is True]
    if not true:
        return {}
    choices = ChoiceMap.for_learning(config)
    try:
        votes, _ = votes_of({"id": task["id"], "annotations": true}, choices)
    except (LookupError, TypeError, ValueError):  # not Label Studio's
        return {}
    said = {control.from_name: {vote.choices for vote in votes if vote.control == control.from_name}
            for control in choices.controls if not control.multiple}  # fmt: skip
    return {name: next(iter(found)) for name, found in said.items() if len(found) == 1}


def in_place_of(answer: Any, other: Any, truth: Mapping[str, Collection[str]]) -> Regions:
    """
    The regions of another answer, with the scores of the one in whose place they stand.

    Args:
        answer: What the model says of a task.
        other: What it says when it may not say the truth; none is shown if it has nothing else to say.
        truth: As `truth_of` gives it.
    """
    regions = other["result"] if other else []
    if not any(region["from_name"] in truth for region in regions):
        return []
    scores = {region["from_name"]: region["score"] for region in answer["result"]}
    return [region | {"score": scores.get(region["from_name"], answer["score"])} for region in regions]


def told(unshown: Iterable[Unshown]) -> list[dict[str, Any]]:
    """The planted errors as plain values, so that whoever exports predictions can tell them from the model's."""
    return [
        {"task": each.task, "version": each.version, "said": each.said, "shown": each.shown,
         "stands": each.removed_at is None}
        for each in unshown
        if each.arm == PLANTED
    ]  # fmt: skip


def take_away(trial: Trial, studio: Studio) -> None:
    """Remove what was planted from Label Studio, of tasks that have all their labels; what fails has another minute."""
    try:
        standing = trial.standing()
    except StateError as error:
        logger.debug("%s", error)
        return
    for number, planted in standing.items():
        try:
            _take_away(trial, StudioProject(studio, number, STUDIO_S), planted)
        except CelestialError as error:
            logger.info("Project %s: planted errors are not removed now: %s", number, error)


def _take_away(trial: Trial, project: StudioProject, planted: Sequence[Unshown]) -> None:
    try:
        over = project.remove_of_done({(each.task, each.version) for each in planted})
    except ProjectGoneError:
        over = {(each.task, each.version) for each in planted}
    if over:
        trial.removed(project.project_id, [each for each in planted if (each.task, each.version) in over])
