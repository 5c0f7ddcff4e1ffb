"""
What more labels are expected to bring, so that people know when to stop.

Heads that learned fewer labels say how the share of wrong answers has fallen so far. It falls towards a floor as one
over the number of labels does; so the labels to come bring the less, the more there are. How sure that is, drawing the
labels again at random says, and that some answers turn wrong while more turn right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MORE = 50  # labels
LEAST = 30  # labels, from which on something can be said
DRAWS, SEED = 400, 20
SURE = 90  # % of the cases in which the interval is to hold what is gained
LEAST_TURNED = 0.005  # share of the answers that turn from wrong to right, or back, with any more labels
WORTH = 0.01  # of the pictures; less than that is little
Steps = Sequence[tuple[float, NDArray[np.float64]]]


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
