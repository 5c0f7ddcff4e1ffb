"""
Several people's votes on one picture, brought to one class.

A ground truth goes before any vote. Where people looked at the same pictures and the
model knows all classes they voted for, cleanlab's CROWDLAB weighs each annotator by
how well they agree with the others, and the model by how well it agrees with all;
elsewhere the majority decides. Equal top votes are no consensus under either.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from celestial_backend.studio import moment
from celestial_backend.votes import ACCEPTED, CORRECTED, UNAIDED, Vote

if TYPE_CHECKING:
    from numpy.typing import NDArray

ALONE, TRUTH, MAJORITY, CROWDLAB, TIE = "one vote", "ground truth", "majority", "CROWDLAB", "tie"


class Consensus(NamedTuple):
    """
    What a picture shows.

    Attributes:
        class_name: None for a tie.
        how: ``one vote``, ``ground truth``, ``majority``, ``CROWDLAB`` or ``tie``.
        source: Where the winning votes came from: corrected if any was, else unaided if any was, else accepted.
    """

    class_name: str | None
    how: str
    source: str


def agree(
    ballots: Mapping[str, Sequence[Vote]],
    classes: Sequence[str],
    probabilities: Mapping[str, NDArray[np.float32]] | None = None,
) -> dict[str, Consensus]:
    """
    The consensus on each picture; the same for the same votes in whatever order.

    Args:
        ballots: Picture -> its votes, at least one. One person's newest vote on a picture counts.
        classes: The classes of the model, K of them.
        probabilities: Picture -> K probabilities, at least for those that `contested` names; without
            them the majority decides.
    """
    counted = {picture: _counted(votes) for picture, votes in sorted(ballots.items())}
    several = {picture: votes for picture, votes in counted.items() if len(votes) > 1 and not votes[0].ground_truth}
    weighed = _crowdlab(several, classes, probabilities or {})
    return {picture: _decide(votes, weighed.get(picture)) for picture, votes in counted.items()}


def contested(ballots: Mapping[str, Sequence[Vote]]) -> list[str]:
    """The pictures, in order, whose probabilities `agree` can use: several people voted, and nobody knows the truth."""
    counted = ((picture, _counted(votes)) for picture, votes in sorted(ballots.items()))
    return [picture for picture, votes in counted if len(votes) > 1 and not votes[0].ground_truth]


def _counted(votes: Sequence[Vote]) -> list[Vote]:
    """The votes that count: the ground truth if there is one, else one per person, the newest."""
    true = [vote for vote in votes if vote.ground_truth]
    latest: dict[str, Vote] = {}
    for vote in sorted(true or votes, key=lambda vote: (moment(vote.updated_at), vote.annotation_id)):
        latest[vote.annotator] = vote
    return sorted(latest.values(), key=lambda vote: vote.annotation_id)


def _decide(votes: Sequence[Vote], weighed: str | None) -> Consensus:
    leaders = _leaders(votes)
    if len(leaders) > 1:
        return Consensus(None, TIE, "")
    winner, how = leaders[0], ALONE if len(votes) == 1 else MAJORITY
    if votes[0].ground_truth:
        how = TRUTH
    elif weighed in {vote.class_name for vote in votes}:  # a class without a vote is the model's word, not a label
        winner, how = str(weighed), CROWDLAB
    sources = {vote.source for vote in votes if vote.class_name == winner}
    return Consensus(winner, how, next(source for source in (CORRECTED, UNAIDED, ACCEPTED) if source in sources))


def _leaders(votes: Sequence[Vote]) -> list[str]:
    """The classes with the most votes."""
    counts = Counter(vote.class_name for vote in votes)
    top = max(counts.values())
    return [name for name, count in counts.items() if count == top]


def _crowdlab(
    ballots: Mapping[str, Sequence[Vote]], classes: Sequence[str], probabilities: Mapping[str, NDArray[np.float32]]
) -> dict[str, str]:
    """
    Picture -> CROWDLAB's class, for the pictures that it can weigh.

    Ties are not handed over: where nothing else decides, cleanlab breaks them by chance.
    """
    column = {name: number for number, name in enumerate(classes)}
    pictures = [
        picture
        for picture, votes in ballots.items()
        if picture in probabilities and all(vote.class_name in column for vote in votes) and len(_leaders(votes)) == 1
    ]
    people = sorted({vote.annotator for picture in pictures for vote in ballots[picture]})
    if not pictures or len(column) < 2:
        return {}
    labels = np.full((len(pictures), len(people)), np.nan)
    for row, picture in enumerate(pictures):
        for vote in ballots[picture]:
            labels[row, people.index(vote.annotator)] = column[vote.class_name]
    best = _label_quality(labels, np.stack([np.asarray(probabilities[picture], float) for picture in pictures]))
    return {picture: classes[int(number)] for picture, number in zip(pictures, best, strict=True)}


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
            labels,
            probabilities,
            return_detailed_quality=False,
            return_annotator_stats=False,
            verbose=False,
        )
    return quality["label_quality"]["consensus_label"].to_numpy()
