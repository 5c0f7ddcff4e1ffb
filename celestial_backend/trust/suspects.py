"""
Labels that look wrong: heads that did not learn a label say another choice of its picture.

The labels are ranked by the probability that such heads give them, the lowest first: cleanlab's self-confidence
(Northcutt et al., 2021). Where several choices may be right, each is judged by itself, and the one that is likeliest
wrong counts.

What more labels are expected to bring, heads that learned fewer labels say: the share of wrong answers falls towards a
floor as one over the number of labels does. How sure that is, drawing the labels again at random says, and that some
answers turn wrong while more turn right.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from celestial_backend.learning.control import TICKED, Unseen, unseen
from celestial_backend.learning.dataset import LEAST_LABELS
from celestial_backend.learning.project import Learner, Progress

MORE = 50  # labels
LEAST = 30  # labels, from which on something can be said
DRAWS, SEED = 400, 20
SURE = 90  # % of the cases in which the interval is to hold what is gained
LEAST_TURNED = 0.005  # share of the answers that turn from wrong to right, or back, with any more labels
WORTH = 0.01  # of the pictures; less than that is little
Steps = Sequence[tuple[float, NDArray[np.float64]]]


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


@dataclass(frozen=True)
class Outlook:
    """
    What more labels are expected to bring.

    Attributes:
        labels: That there are.
        right: The share that is said rightly now, by heads that did not learn the label.
        more: Labels.
        gain: How much that share is expected to grow, and `low` and `high`, between which it lies in 90 % of the cases.
        sentence: The same for people.
    """

    labels: int
    right: float
    more: int
    gain: float
    low: float
    high: float
    sentence: str


def outlook(labels: int, steps: Steps, more: int = MORE) -> Outlook | None:
    """
    What more labels are expected to bring; None of fewer than `LEAST`.

    Args:
        labels: N, that there are.
        steps: As `Unseen.steps` has them, that of the most labels last.
        more: Labels.
    """
    if labels < LEAST or len(steps) < 2:
        return None
    rng = np.random.default_rng(SEED)
    learned = np.array([count for count, _ in steps])
    wrong = np.stack([1 - right for _, right in steps])
    again = rng.multinomial(labels, np.ones(labels) / labels, DRAWS)
    gains = _gains(learned, wrong, np.concatenate([np.ones((1, labels)), again]), more)
    gain = float(gains[0])
    turned = np.sqrt(2 * max(gain, LEAST_TURNED) / labels)
    low, high = np.percentile(gains[1:] + rng.normal(0, turned, DRAWS), [50 - SURE / 2, 50 + SURE / 2])
    right = float(np.nanmean(steps[-1][1]))
    low, high = max(float(low), -right), min(float(high), 1 - right)
    said = _sentence(right, more, gain, low, high)
    return Outlook(labels, round(right, 4), more, round(gain, 4), round(low, 4), round(high, 4), said)


def _gains(
    learned: NDArray[np.float64], wrong: NDArray[np.float64], weights: NDArray[np.float64], more: int
) -> NDArray[np.float64]:
    """
    What more labels bring by the curve that fits best, shape (B,).

    Args:
        learned: Shape (S,).
        wrong: Shape (S, N); NaN where it was learned.
        weights: Shape (B, N); how often each label counts, for each answer.
        more: Labels.
    """
    judged = np.maximum(weights @ (~np.isnan(wrong)).T.astype(float), 1e-9)
    shares = weights @ np.nan_to_num(wrong).T / judged
    off = 1 / learned - (judged @ (1 / learned) / judged.sum(axis=1))[:, None]
    slope = np.maximum(0.0, (judged * off * shares).sum(axis=1) / (judged * off**2).sum(axis=1))
    now = weights.shape[1]
    return np.asarray(slope * (1 / now - 1 / (now + more)))


def _sentence(right: float, more: int, gain: float, low: float, high: float) -> str:
    said = (
        f"The model is right about {100 * right:.0f} % of the labels that it has not learned. {more} more labels are"
        f" expected to bring {100 * gain:.1f} points more ({100 * low:.1f} to {100 * high:.1f})."
    )
    return f"{said} That is little: the labels may be enough." if gain < WORTH else said
