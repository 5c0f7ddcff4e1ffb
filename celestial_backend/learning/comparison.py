"""
A new head beside the live model, on one control: the figures of both, and whether the new one may answer.

The new head is judged on labels that it did not learn, by cross-validation; the live model on labels that came after
its own training, or on all if it learned from none of the project's. Both are asked about the same pictures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from msgspec import structs
from numpy.typing import NDArray

from celestial_backend.models.manifest import ChoiceScore, Comparison, Scores

# How unlikely it must be that a head says labels so well by chance, by the number of labels: few labels may pass with
# less, as nothing else can be had of them, and the next ones come soon.
CHANCE = ((8, 0.06), (12, 0.03), (20, 0.005), (10**9, 0.002))
LEAST_SKILL = 0.2  # share of what guessing gets wrong that a head must get right
SHUFFLES, LEAST_SHUFFLES = 4000, 1000  # fewer could not tell the last of `CHANCE`
LEAST_STRANGE, STRANGE = 10, ((20, 0.2), (50, 0.05), (10**9, 0.01))  # new labels: how likely guessing may be as good
ALL_P = 0.4  # all labels together: a loss that is less likely by chance is one
LEAST_FRESH = 5  # labels that the live model has not learned; fewer say nothing of it
LIKELY_P, SURE_P = 0.25, 0.05  # a loss less likely by chance is worse: if the log loss is no better, and in any case
CLASS_SHARE, CLASS_PICTURES = 0.10, 1  # of a choice's pictures that may be lost on balance; so many always
KEPT_SHARE = 0.02  # of the pictures of choices that the live model knew before
LEAST_PROBABILITY = 1e-3  # for the log loss: what a choice gets that a model does not know
SEED = 977


@dataclass(frozen=True)
class Bench:
    """
    What both models say about N labelled pictures of one control.

    Attributes:
        targets: Shape (N, K); 1 where a choice is right.
        challenger: Probabilities, shape (N, K), by a head that did not learn the picture.
        champion: The same of the live model, 0 for choices that it does not know; None if it answers nothing.
        fresh: Shape (N,); pictures that the champion did not learn either.
        kept: Shape (N,); pictures that no one of the project labelled, of choices that the champion knew.
        once_right: Shape (N,); of what it learned, what its own cross-validation said rightly; None if unknown.
    """

    targets: NDArray[np.floating]
    challenger: NDArray[np.floating]
    champion: NDArray[np.floating] | None
    fresh: NDArray[np.bool_]
    kept: NDArray[np.bool_]
    multiple: bool = False
    once_right: NDArray[np.bool_] | None = None


@dataclass(frozen=True)
class Verdict:
    """Whether to publish, why in a sentence or two for people, and the figures."""

    publish: bool
    reason: str
    scores: Scores


def judge(choices: Sequence[str], bench: Bench, *, replaces_network: bool, before: tuple[int, int] | None) -> Verdict:
    """
    Compare a new head with the live model on one control.

    Args:
        choices: K, in the order of the columns.
        bench: At least one picture is not kept.
        replaces_network: The champion is a network, or a head that somebody else made: it is only replaced by what
            is better, or by what knows choices that it does not.
        before: Right answers and labels of the champion's own cross-validation, if it is a head of ours.
    """
    right = _right(bench.challenger, bench.targets, multiple=bench.multiple)
    mine = ~bench.kept
    skill, p_chance, limit = _skill(bench)
    scores = Scores(
        labels=int(mine.sum()),
        right=int(right[mine].sum()),
        choices=_by_choice(choices, bench.targets[mine], right[mine]),
        skill=round(skill, 4),
        p_chance=round(p_chance, 5),
    )
    told = f"{scores.right} of {scores.labels} labels that it had not learned are right"
    if p_chance > limit or skill < LEAST_SKILL:
        return Verdict(False, f"{told}, which guessing could be, too; label more pictures", scores)
    if bench.champion is None:
        return Verdict(True, told, scores)
    kept = _compared(bench, right, bench.kept) if bench.kept.any() else None
    fresh, of_all, p_strange = _compared(bench, right, bench.fresh & mine), _all_compared(bench, right), _strange(bench)
    if p_strange is not None:
        fresh = structs.replace(fresh, p_chance=round(p_strange, 5))
    scores = structs.replace(scores, kept=kept, fresh=fresh, of_all=of_all)
    faults = _kept_faults(kept) + _fresh_faults(choices, bench, right, fresh)
    if fresh.pictures < LEAST_FRESH:
        faults += _worse_than_before(scores, before)
    faults += _strange_faults(fresh, p_strange) + _all_faults(of_all)
    if faults:
        return Verdict(False, f"{'; '.join(faults)}; {told}", scores)
    if replaces_network and not _is_better(bench, fresh):
        live = f"{fresh.champion_right} of {fresh.pictures}"
        return Verdict(False, f"{told}, and the live model, which says {live}, is as good", scores)
    return Verdict(True, told, scores)


def chance(lost: int, gained: int) -> float:
    """How likely so many losses or more are among the pictures on which two equal models differ."""
    differ = lost + gained
    return sum(math.comb(differ, count) for count in range(lost, differ + 1)) / (1 << differ)


def _right(said: NDArray[np.floating], targets: NDArray[np.floating], *, multiple: bool) -> NDArray[np.bool_]:
    if multiple:
        return np.asarray(((said >= 0.5) == (targets >= 0.5)).all(axis=1))
    elsewhere = 1 - said.sum(axis=1)  # what a model gives to choices that have no column any more
    return np.asarray((targets[np.arange(len(said)), said.argmax(axis=1)] > 0) & (said.max(axis=1) >= elsewhere))


def _skill(bench: Bench) -> tuple[float, float, float]:
    """
    The share of what guessing gets wrong that is right, how likely that is by chance, and how likely it may be.

    Guessing is to give the same answers to these pictures in another order. Where so few have another choice than the
    most that this tells nothing, the answers to kept pictures are guessed with, too; without any, answers without a
    fault may pass.
    """
    answers, truths = _answers(bench)
    mine, truths = answers[~bench.kept], truths[~bench.kept]
    limit = next(limit for below, limit in CHANCE if len(mine) < below)
    _, counts = np.unique(truths, axis=0, return_counts=True)
    least = math.exp(sum(math.lgamma(count + 1) for count in counts) - math.lgamma(len(mine) + 1))
    skill, p_chance = _guessed(mine, truths, mine)
    if (mine == truths).all():
        p_chance = least  # which shuffles find only roughly
    if least > limit and bench.kept.any():
        other, p_chance = _guessed(mine, truths, answers)
        return (other if len(counts) == 1 else skill), p_chance, limit
    return skill, p_chance, max(limit, min(CHANCE[0][1], least))


def _answers(bench: Bench) -> tuple[NDArray[np.integer], NDArray[np.integer]]:
    """What the challenger says and what is right, as whole numbers, a row for each picture."""
    said, targets = bench.challenger, bench.targets
    if bench.multiple:
        return (said >= 0.5).astype(np.int8), (targets >= 0.5).astype(np.int8)
    return said.argmax(axis=1)[:, None], targets.argmax(axis=1)[:, None]


def _guessed(
    answers: NDArray[np.integer], truths: NDArray[np.integer], urn: NDArray[np.integer]
) -> tuple[float, float]:
    """The skill of answers beside such as are drawn from an urn, and how likely these are as good."""
    agreed = float((answers == truths).mean())
    rng = np.random.default_rng(SEED)
    turns = max(LEAST_SHUFFLES, min(SHUFFLES, 20_000_000 // max(1, urn.size)))
    draws = (urn[rng.permutation(len(urn))[: len(truths)]] for _ in range(turns))
    guessed = np.array([np.count_nonzero(draw == truths) for draw in draws]) / truths.size  # quicker than their means
    expected = float(guessed.mean())
    return (agreed - expected) / max(1 - expected, 1e-9), float(((guessed >= agreed - 1e-12).sum() + 1) / (turns + 1))


def _by_choice(
    choices: Sequence[str], targets: NDArray[np.floating], right: NDArray[np.bool_]
) -> dict[str, ChoiceScore]:
    return {
        choice: ChoiceScore(int(mine.sum()), int(right[mine].sum()))
        for choice, mine in zip(choices, (targets > 0).T, strict=True)
        if mine.any()
    }


def _champion(bench: Bench) -> NDArray[np.floating]:
    return np.zeros_like(bench.challenger) if bench.champion is None else bench.champion


def _compared(bench: Bench, right: NDArray[np.bool_], chosen: NDArray[np.bool_]) -> Comparison:
    says = _champion(bench)
    champion, challenger = _right(says, bench.targets, multiple=bench.multiple)[chosen], right[chosen]
    gained, lost = int((~champion & challenger).sum()), int((champion & ~challenger).sum())
    losses = [_loss(said[chosen], bench.targets[chosen]) for said in (says, bench.challenger)]
    return Comparison(
        pictures=int(chosen.sum()),
        champion_right=int(champion.sum()),
        challenger_right=int(challenger.sum()),
        champion_log_loss=losses[0],
        challenger_log_loss=losses[1],
        gained=gained,
        lost=lost,
        p_worse=round(chance(lost, gained), 4),
    )


def _loss(said: NDArray[np.floating], targets: NDArray[np.floating]) -> float | None:
    if not len(said):
        return None
    return round(float(-(targets * np.log(np.maximum(said, LEAST_PROBABILITY))).sum(axis=1).mean()), 4)


def _all_compared(bench: Bench, right: NDArray[np.bool_]) -> Comparison | None:
    """On new and old labels together, each asked before it was learned; None where that is not known of the old."""
    if bench.once_right is None:
        return None
    mine = ~bench.kept
    says = _right(_champion(bench), bench.targets, multiple=bench.multiple)
    champion = np.where(bench.fresh, says, bench.once_right)[mine]
    gained, lost = int((~champion & right[mine]).sum()), int((champion & ~right[mine]).sum())
    return Comparison(
        pictures=len(champion),
        champion_right=int(champion.sum()),
        gained=gained,
        lost=lost,
        p_worse=round(chance(lost, gained), 4),
    )


def _strange(bench: Bench) -> float | None:
    """How likely guesses would say new labels as well as the new head does; None where there are too few to tell."""
    mine = ~bench.kept
    fresh = bench.fresh & mine
    if int(fresh.sum()) < LEAST_STRANGE or fresh.sum() == mine.sum():
        return None
    answers, truths = _answers(bench)
    return _guessed(answers[fresh], truths[fresh], answers[mine])[1]


def _kept_faults(found: Comparison | None) -> list[str]:
    if found is None or found.net_loss <= KEPT_SHARE * found.pictures:
        return []
    known = f"of {found.pictures} pictures of what the live model knew before"
    return [f"{known}, {found.challenger_right} are right and {found.champion_right} were"]


def _fresh_faults(
    choices: Sequence[str], bench: Bench, right: NDArray[np.bool_], found: Comparison
) -> list[str]:
    if found.pictures < LEAST_FRESH:
        return []
    faults = []
    if found.net_loss > 0 and found.p_worse < (SURE_P if found.surer else LIKELY_P):
        faults.append(
            f"of {found.pictures} pictures that neither had learned, it says {found.challenger_right} right and"
            f" the live model {found.champion_right}"
        )
    fresh = bench.fresh & ~bench.kept
    for choice, mine in zip(choices, (bench.targets > 0).T, strict=True):
        if (count := int((mine & fresh).sum())) >= LEAST_FRESH:
            one = _compared(bench, right, mine & fresh)
            if one.net_loss > max(CLASS_PICTURES, CLASS_SHARE * count) and one.p_worse < LIKELY_P:
                faults.append(
                    f"of {count} pictures of {choice!r} it says {one.challenger_right} right and the live model"
                    f" {one.champion_right}"
                )
    return faults


def _strange_faults(fresh: Comparison, p_chance: float | None) -> list[str]:
    """New labels that the new head says no better than guessing would: they are not of what the others are of."""
    if p_chance is None or p_chance <= next(limit for below, limit in STRANGE if fresh.pictures < below):
        return []
    return [f"{fresh.pictures} labels are new, and guessing could say them as well"]


def _all_faults(found: Comparison | None) -> list[str]:
    """New and old labels together: if there are new ones that are wrong, the old ones are said worse than before."""
    if found is None or found.net_loss <= 0 or chance(found.lost, found.gained) >= ALL_P:
        return []
    asked, said = found.pictures, found.champion_right
    return [f"of all {asked} labels, each asked before it was learned, the live model said {said} right"]


def _worse_than_before(scores: Scores, before: tuple[int, int] | None) -> list[str]:
    """Compare two cross-validations where there are too few fresh labels: of other labels, so only roughly."""
    if before is None or not before[1]:
        return []
    old, new = before[0] / before[1], scores.right / scores.labels
    noise: float = math.sqrt(max(old * (1 - old), 0.01) * (1 / before[1] + 1 / scores.labels))
    if new >= old - 2 * noise:
        return []
    return [f"the live model had {before[0]} of {before[1]} right when it was made, and the new one has fewer"]


def _is_better(bench: Bench, fresh: Comparison) -> bool:
    """Whether a head does more than the network it would replace: it knows new choices, or says more of them right."""
    unknown = (bench.targets > 0).any(axis=0) & (_champion(bench).max(axis=0) <= 0)
    if unknown.any():
        return True
    return fresh.net_loss < 0 and chance(fresh.gained, fresh.lost) < SURE_P
