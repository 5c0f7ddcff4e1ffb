"""
What people said of the pictures of a task, and what several of them agree on.

Reads tasks as Label Studio's ``/api/tasks?fields=all`` gives them. A *vote* is what one person chose for one
picture with one control; all else that was submitted is counted and left out.

Where a label came from is told by comparing it with the prediction that it started from, because Label Studio's
own word for it misleads (seen on 1.23.2):

====================================  =======================  ===================
what the annotator did                ``result[0].origin``     parent prediction
====================================  =======================  ===================
accepted the pre-label                ``prediction``           its id
changed it                            ``prediction-changed``   its id
changed it and changed it back        ``prediction-changed``   its id
labelled without a pre-label          ``manual``               null
Create Annotations From Predictions   absent                   its id
====================================  =======================  ===================

The parent becomes null when the prediction is deleted; ``origin`` stays, and so does the copy of the prediction
in the annotation, which ``/api/tasks`` does not show but exports and events do. That copy is also filled where
nobody saw a pre-label, so it counts only beside an ``origin`` that names a prediction.
"""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from celestial_backend.labels import ChoiceMap, Control
from celestial_backend.studio.client import is_certified, moment

if TYPE_CHECKING:
    from numpy.typing import NDArray

logger = logging.getLogger(__name__)

UNAIDED, ACCEPTED, CORRECTED = "unaided", "accepted", "corrected"
SKIPPED = "skipped by the annotator"
UNSEEN = "accepted by a certificate, without a look"
NOT_TRUTH = "beside a ground truth"
MISLED = "where a wrong pre-label was shown on purpose"
REPLACED = "replaced by a later one of the same annotator"
NO_CHOICE = "without a choice"
SEVERAL = "with several choices where one is asked for"
NOT_OFFERED = "with a choice that the label config does not offer"
HIDDEN = "where the page hides the control"
ALONE, TRUTH, MAJORITY, CROWDLAB, TIE = "one vote", "ground truth", "majority", "CROWDLAB", "tie"

Choices = frozenset[str]  # of one picture; several, or none, only where the control takes them


@dataclass(frozen=True)
class Vote:
    """
    What one person chose for one picture with one control.

    Attributes:
        annotator: Who; every annotation of an account that was deleted counts as another person's.
        data_key: Which picture of the task.
        source: ``unaided``, made without a pre-label; ``accepted`` as it was pre-labelled; ``corrected``.
        updated_at: When it was last changed, as Label Studio writes it.
    """

    annotation_id: int
    task_id: int
    annotator: str
    control: str
    data_key: str
    choices: Choices
    source: str
    ground_truth: bool
    updated_at: str


class Consensus(NamedTuple):
    """
    What a picture shows.

    Attributes:
        choices: None for a tie.
        how: ``one vote``, ``ground truth``, ``majority``, ``CROWDLAB`` or ``tie``.
        source: Where the winning votes came from: corrected if any was, else unaided if any was, else accepted.
    """

    choices: Choices | None
    how: str
    source: str


def votes_of(
    task: Mapping[str, Any], choices: ChoiceMap, *, misled: bool = False
) -> tuple[list[Vote], Counter[str]]:
    """
    The votes of a task, in the order of their annotations and the config's controls, and what was left out.

    If an annotation is marked as ground truth, only such count. Of several annotations by one person the newest
    counts, also if it says nothing. What `finish` has accepted unseen counts for nothing. A control that takes several
    choices was answered with none of them where the annotation says anything else. A control that the page hides, by
    what the annotation says of others, was not answered at all.

    Args:
        task: As above.
        choices: For learning.
        misled: People were shown a wrong pre-label on purpose: what they said is left out but for a ground truth.

    Returns:
        Votes, and for each reason the number of annotations (of each control) without one.
    """
    left_out: Counter[str] = Counter()
    given = [each for each in task.get("annotations") or () if isinstance(each, Mapping)]
    left_out[UNSEEN] = sum(map(is_certified, given))
    given = [each for each in given if not is_certified(each)]
    standing = [each for each in given if not each.get("was_cancelled")]
    left_out[SKIPPED] = len(given) - len(standing)
    counted = [each for each in standing if each.get("ground_truth")]
    if not counted and not misled:
        counted = standing
    left_out[MISLED if misled else NOT_TRUTH] = len(standing) - len(counted)
    latest = _latest(counted)
    left_out[REPLACED] = len(counted) - len(latest)
    votes = []
    for annotation in sorted(latest, key=lambda each: int(each["id"])):
        said = choices.choices_of(annotation.get("result"))
        asked = choices.asked(said)
        for control in choices.controls:
            chosen = frozenset(said.get(control.from_name, ()))
            shown = control.from_name in asked
            fault = _fault(chosen, control, answered=bool(said)) if shown else HIDDEN
            if fault:
                left_out[fault] += 1
                continue
            votes.append(
                Vote(
                    annotation_id=int(annotation["id"]),
                    task_id=int(task["id"]),
                    annotator=_annotator(annotation),
                    control=control.from_name,
                    data_key=control.data_key,
                    choices=chosen,
                    source=_source(chosen, annotation, task, control, choices),
                    ground_truth=bool(annotation.get("ground_truth")),
                    updated_at=str(annotation.get("updated_at") or ""),
                )
            )
    return votes, +left_out


def agree(
    ballots: Mapping[str, Sequence[Vote]],
    classes: Sequence[str],
    probabilities: Mapping[str, NDArray[np.floating]] | None = None,
) -> dict[str, Consensus]:
    """
    The consensus on each picture about one control; the same for the same votes in whatever order.

    A ground truth goes before any vote. Where people looked at the same pictures, each chose one choice, and the
    model knows all of these, cleanlab's CROWDLAB (Goh et al., 2022) weighs each annotator by how well they agree
    with the others, and the model by how well it agrees with all; elsewhere the majority decides, and where
    several choices are taken, the majority on each. Equal top votes are no consensus.

    Args:
        ballots: Picture -> its votes, at least one. One person's newest vote on a picture counts.
        classes: K choices that the live model knows.
        probabilities: Picture -> K probabilities, at least for those that `contested` names; without them the
            majority decides.
    """
    counted = {picture: _counted(votes) for picture, votes in sorted(ballots.items())}
    several = {picture: votes for picture, votes in counted.items() if len(votes) > 1 and not votes[0].ground_truth}
    weighed = _crowdlab(several, classes, probabilities or {})
    return {picture: _decide(votes, weighed.get(picture)) for picture, votes in counted.items()}


def contested(ballots: Mapping[str, Sequence[Vote]]) -> list[str]:
    """The pictures, in order, whose probabilities `agree` can use: several people voted, and nobody knows the truth."""
    counted = ((picture, _counted(votes)) for picture, votes in sorted(ballots.items()))
    return [picture for picture, votes in counted if len(votes) > 1 and not votes[0].ground_truth]


def _fault(chosen: Choices, control: Control, *, answered: bool) -> str:
    """Why an annotation is no vote about a control, "" if it is one."""
    if not chosen and not (control.multiple and answered):
        return NO_CHOICE
    if len(chosen) > 1 and not control.multiple:
        return SEVERAL
    return "" if chosen <= set(control.choices) else NOT_OFFERED


def _latest(annotations: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    latest: dict[str, Mapping[str, Any]] = {}
    for annotation in sorted(annotations, key=lambda each: (moment(each.get("updated_at")), int(each["id"]))):
        latest[_annotator(annotation)] = annotation
    return list(latest.values())


def _annotator(annotation: Mapping[str, Any]) -> str:
    person = annotation.get("completed_by")
    return f"somebody's annotation {annotation['id']}" if person is None else str(person)


def _source(
    chosen: Choices, annotation: Mapping[str, Any], task: Mapping[str, Any], control: Control, choices: ChoiceMap
) -> str:
    parent = annotation.get("parent_prediction")
    origin = _origin(annotation.get("result"), control.from_name)
    if parent is None and not origin.startswith("prediction"):
        return UNAIDED
    snapshot = annotation.get("prediction")
    known = [each for each in task.get("predictions") or () if parent is not None and each.get("id") == parent]
    known += [snapshot] if isinstance(snapshot, Mapping) and snapshot.get("result") else []
    if known:
        shown = choices.choices_of(known[0].get("result"))
        if control.multiple and shown and not chosen:
            return CORRECTED if control.from_name in shown else ACCEPTED
        said = shown.get(control.from_name)
        return UNAIDED if not said else ACCEPTED if frozenset(said) == chosen else CORRECTED
    return CORRECTED if origin == "prediction-changed" else ACCEPTED


def _origin(result: object, control: str) -> str:
    """What Label Studio says about the regions of one control; the strongest word of several, "" without any."""
    said = {
        str(region.get("origin") or "")
        for region in (result if isinstance(result, list) else ())
        if isinstance(region, Mapping) and region.get("from_name") == control
    }
    return next((word for word in ("prediction-changed", "prediction") if word in said), "")


def _counted(votes: Sequence[Vote]) -> list[Vote]:
    """The votes that count: the ground truth if there is one, else one per person, the newest."""
    true = [vote for vote in votes if vote.ground_truth]
    latest: dict[str, Vote] = {}
    for vote in sorted(true or votes, key=lambda vote: (moment(vote.updated_at), vote.annotation_id)):
        latest[vote.annotator] = vote
    return sorted(latest.values(), key=lambda vote: vote.annotation_id)


def _decide(votes: Sequence[Vote], weighed: str | None) -> Consensus:
    winner = _majority(votes)
    if winner is None:
        return Consensus(None, TIE, "")
    how = TRUTH if votes[0].ground_truth else ALONE if len(votes) == 1 else MAJORITY
    if how == MAJORITY and weighed is not None and any(weighed in vote.choices for vote in votes):
        winner, how = frozenset({weighed}), CROWDLAB  # a class without a vote is the model's word, not a label
    sources = {vote.source for vote in votes if vote.choices == winner} or {vote.source for vote in votes}
    return Consensus(winner, how, next(source for source in (CORRECTED, UNAIDED, ACCEPTED) if source in sources))


def _majority(votes: Sequence[Vote]) -> Choices | None:
    """What most people chose; of choices that may be several, each by itself; None for a tie."""
    counts = Counter(vote.choices for vote in votes)
    top = max(counts.values())
    leaders = [choices for choices, count in counts.items() if count == top]
    if len(leaders) == 1:
        return leaders[0]
    if all(len(choices) == 1 for choices in leaders):
        return None
    each = Counter(choice for vote in votes for choice in vote.choices)
    if any(2 * count == len(votes) for count in each.values()):
        return None
    return frozenset(choice for choice, count in each.items() if 2 * count > len(votes))


def _crowdlab(
    ballots: Mapping[str, Sequence[Vote]], classes: Sequence[str], probabilities: Mapping[str, NDArray[np.floating]]
) -> dict[str, str]:
    """
    Picture -> CROWDLAB's choice, for the pictures that it can weigh; none where cleanlab fails.

    Ties are not handed over: where nothing else decides, cleanlab breaks them by chance.
    """
    column = {name: number for number, name in enumerate(classes)}
    one = {picture: [_only(vote.choices) for vote in votes] for picture, votes in ballots.items()}
    pictures = [
        picture
        for picture, votes in ballots.items()
        if picture in probabilities
        and all(choice in column for choice in one[picture])
        and _majority(votes) is not None
    ]
    people = sorted({vote.annotator for picture in pictures for vote in ballots[picture]})
    if not pictures or len(column) < 2:
        return {}
    labels = np.full((len(pictures), len(people)), np.nan)
    for row, picture in enumerate(pictures):
        for vote, choice in zip(ballots[picture], one[picture], strict=True):
            labels[row, people.index(vote.annotator)] = column[choice]
    given = np.stack([np.asarray(probabilities[picture], float) for picture in pictures])
    try:
        best = _label_quality(labels, given)
    except Exception as error:  # noqa: BLE001 - whatever cleanlab and pandas meet, the votes are there
        logger.warning("CROWDLAB cannot weigh the annotators of %d pictures (%s: %.200s); the majority decides.",
                       len(pictures), type(error).__name__, error)  # fmt: skip
        return {}
    return {picture: classes[int(number)] for picture, number in zip(pictures, best, strict=True)}


def _only(choices: Choices) -> str:
    """The one choice; "", which is none, of several or without any."""
    return next(iter(choices)) if len(choices) == 1 else ""


def _label_quality(labels: NDArray[np.float64], probabilities: NDArray[np.float64]) -> Any:
    """
    The class number of each picture by CROWDLAB.

    Args:
        labels: Shape (N, M): class numbers by picture and annotator, NaN for no vote.
        probabilities: Shape (N, K).
    """
    from cleanlab.multiannotator import get_label_quality_multiannotator

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that people agree nowhere is for the counts of ties to tell
        quality = get_label_quality_multiannotator(
            labels, probabilities, return_detailed_quality=False, return_annotator_stats=False, verbose=False
        )
    return quality["label_quality"]["consensus_label"].to_numpy()
