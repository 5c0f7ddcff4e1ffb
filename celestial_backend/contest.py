"""
The champion and the challenger: whether a newly trained model may take the live one's place.

It is published unless it is worse; to be as good is enough, for it may know new classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

DRAWN = "drawn"
LEAST_PROBABILITY = 1e-3  # for the log loss: what a class gets that a model does not know


Names = tuple[tuple[str, ...], tuple[str, ...]]  # classes of the champion, of the challenger


@dataclass(frozen=True)
class Limits:
    """How much worse is worse. All shares are from 0 to 1."""

    least_pictures: int = 5  # held out; fewer say nothing
    likely_p: float = 0.25  # a loss less likely than this by chance is worse, if the log loss is no better either
    sure_p: float = 0.05  # a loss less likely than this by chance is worse in any case
    drawn_share: float = 0.02  # of the drawn pictures may be lost on balance in any case
    class_share: float = 0.10  # of the pictures of a class may be lost on balance
    class_pictures: int = 1  # but so many may always be
    doubted: float = 0.10  # a label is contradicted when the champion gives its class less than this
    times: float = 2.0  # and the challenger gives another class so many times what it gives the label's
    contradicted_share: float = 0.15  # of all labels may be contradicted by both models
    unlearned_share: float = 0.25  # of the labels of new classes may be missed by the challenger, learned ones too
    labels: int = 2  # but so many may always be contradicted, and as many missed
    tasks_named: int = 20


@dataclass(frozen=True)
class Bench:
    """
    What both models say about the same N pictures.

    Attributes:
        truths: The class names that people gave, or that were drawn.
        champion: Probabilities, shape (N, K) for the champion's K classes.
        challenger: Probabilities, shape (N, K') for the challenger's K' classes.
        tasks: The Label Studio tasks that the pictures come from, if they come from any.
    """

    truths: Sequence[str]
    champion: NDArray[np.floating]
    challenger: NDArray[np.floating]
    tasks: Sequence[int] = ()


@dataclass(frozen=True)
class Verdict:
    """Whether to publish, a sentence or two for people, and all figures in plain values that JSON can hold."""

    publish: bool
    reason: str
    scores: dict[str, Any]


def judge(
    champion_classes: Sequence[str],
    challenger_classes: Sequence[str],
    held_out: Bench,
    known: Bench | None = None,
    learned: Bench | None = None,
    limits: Limits | None = None,
) -> Verdict:
    """
    Compare two models on the same pictures.

    Args:
        champion_classes: In the order of the columns of a bench's ``champion``.
        challenger_classes: In the order of the columns of a bench's ``challenger``.
        held_out: Labelled pictures of the project that neither model has learned.
        known: Freshly drawn pictures of classes that the champion knows.
        learned: Labelled pictures that the challenger has learned; only their labels are judged.
        limits: The default ones if none.
    """
    limits = limits or Limits()
    names = (tuple(champion_classes), tuple(challenger_classes))
    benches = {"held-out": _scored(held_out, names)}
    if known is not None and len(known.truths):
        benches[DRAWN] = _scored(known, names)
    doubts = _doubts([held_out, *([learned] if learned is not None else [])], names, limits)
    seen_by_none = _doubts([held_out], names, limits)
    scores = {"benches": benches, "labels": doubts, "held_out_labels": seen_by_none, "limits": asdict(limits)}
    count = len(held_out.truths)
    if count < limits.least_pictures:
        needed = f"at least {limits.least_pictures} held-out pictures are needed to compare two models"
        return Verdict(
            False, f"Kept the old model: {needed}, and the project has {count}. Label more pictures.", scores
        )
    faults = [fault for name, bench in benches.items() for fault in _faults(name, bench, limits)]
    faults += _doubtful(doubts, limits) or _doubtful(seen_by_none, limits, "contradicted")
    told = "; ".join(_told(name, bench) for name, bench in benches.items())
    if faults:
        return Verdict(False, f"Kept the old model: {'; '.join(faults)}. In figures: {told}.", scores)
    return Verdict(True, f"Published: {told}.", scores)


def _scored(bench: Bench, names: Names) -> dict[str, Any]:
    """Right answers of both on one bench: of all pictures, of those of old classes, and class by class."""
    truths = np.array(bench.truths, dtype=object)
    marks = _Marks(
        _answers(bench.champion, names[0]) == truths,
        _answers(bench.challenger, names[1]) == truths,
        _losses(bench.truths, bench.champion, names[0]),
        _losses(bench.truths, bench.challenger, names[1]),
    )
    old = np.array([name in names[0] for name in bench.truths], dtype=bool)
    groups = {name: truths == name for name in sorted(set(bench.truths))}
    return {
        **_counts(marks, np.ones(len(truths), bool)),
        "old_classes": _counts(marks, old),
        "classes": {name: _counts(marks, chosen) for name, chosen in groups.items()},
    }


class _Marks(NamedTuple):
    """Of N pictures: whether each model was right, and the log losses."""

    champion: NDArray[np.bool_]
    challenger: NDArray[np.bool_]
    champion_losses: NDArray[np.floating]
    challenger_losses: NDArray[np.floating]


def _counts(marks: _Marks, chosen: NDArray[np.bool_]) -> dict[str, Any]:
    champion, challenger = marks.champion[chosen], marks.challenger[chosen]
    gained, lost, count = int((~champion & challenger).sum()), int((champion & ~challenger).sum()), len(champion)
    return {
        "pictures": count,
        "champion_right": int(champion.sum()),
        "challenger_right": int(challenger.sum()),
        "champion_accuracy": _mean(champion),
        "challenger_accuracy": _mean(challenger),
        "champion_log_loss": _mean(marks.champion_losses[chosen]),
        "challenger_log_loss": _mean(marks.challenger_losses[chosen]),
        "gained": gained,
        "lost": lost,
        "p_worse": round(chance(lost, gained), 4),
    }


def _mean(values: NDArray[Any]) -> float | None:
    return round(float(values.mean()), 4) if len(values) else None


def chance(lost: int, gained: int) -> float:
    """
    How likely so many losses or more are among the pictures on which two equal models differ.

    The exact, one-sided McNemar test: each such picture is lost with probability one half.
    """
    total = lost + gained
    return sum(math.comb(total, k) for k in range(lost, total + 1)) / int(2**total)


def _answers(shares: NDArray[np.floating], names: Sequence[str]) -> NDArray[np.object_]:
    columns = np.asarray(shares).reshape(-1, len(names)).argmax(axis=1)
    return np.asarray(np.array(names, dtype=object)[columns])


def _share_of(truths: Sequence[str], shares: NDArray[np.floating], names: Sequence[str]) -> NDArray[np.floating]:
    """What each picture's own class was given; 0 where the model does not know it."""
    places = {name: column for column, name in enumerate(names)}
    return np.array(
        [float(shares[row, places[name]]) if name in places else 0.0 for row, name in enumerate(truths)], float
    )


def _losses(truths: Sequence[str], shares: NDArray[np.floating], names: Sequence[str]) -> NDArray[np.floating]:
    return np.asarray(-np.log(np.maximum(_share_of(truths, shares, names), LEAST_PROBABILITY)))


def _doubts(benches: Sequence[Bench], names: Names, limits: Limits) -> dict[str, Any]:
    """
    How many labels are in doubt, and the tasks that bear them.

    Contradicted is a label if both models give its picture the same other class; unlearned is one
    of a new class that the challenger does not give back, though it has seen it or many like it.
    """
    contradicted, unlearned = [], []
    count = new = 0
    for bench in (bench for bench in benches if len(bench.truths)):
        truths = np.array(bench.truths, dtype=object)
        tasks: Sequence[int | None] = bench.tasks or [None] * len(truths)
        first, second = _answers(bench.champion, names[0]), _answers(bench.challenger, names[1])
        doubted = _share_of(bench.truths, bench.champion, names[0]) < limits.doubted
        mine = _share_of(bench.truths, bench.challenger, names[1])
        doubted &= np.asarray(bench.challenger).max(axis=1) > limits.times * mine
        doubted &= (first == second) & (first != truths)
        fresh = np.array([name not in names[0] for name in bench.truths])
        count, new = count + len(truths), new + int(fresh.sum())
        contradicted += [task for task, yes in zip(tasks, doubted, strict=True) if yes]
        unlearned += [task for task, yes in zip(tasks, fresh & (second != truths), strict=True) if yes]
    return {
        "labels": count,
        **_listed("contradicted", contradicted, count),
        "labels_of_new_classes": new,
        **_listed("unlearned", unlearned, new),
    }


def _listed(name: str, tasks: Sequence[int | None], count: int) -> dict[str, Any]:
    return {
        name: len(tasks),
        f"{name}_share": round(len(tasks) / count, 4) if count else 0.0,
        f"{name}_tasks": sorted(int(task) for task in tasks if task is not None),
    }


def _faults(name: str, bench: Mapping[str, Any], limits: Limits) -> list[str]:
    faults: list[str] = []
    allowed = limits.drawn_share if name == DRAWN else 0.0
    for group, what in ((bench, f"{name} pictures"), (bench["old_classes"], f"{name} pictures of the old classes")):
        if not faults and _worse(group, limits, allowed):
            faults.append(
                f"of {group['pictures']} {what} the new model lost {group['lost']} and gained {group['gained']}"
            )
    for class_name, group in bench["classes"].items():
        net = group["lost"] - group["gained"]
        if net > max(limits.class_pictures, limits.class_share * group["pictures"]):
            faults.append(
                f"{class_name} fell from {group['champion_right']} to {group['challenger_right']} right "
                f"of {group['pictures']} {name} pictures"
            )
    return faults


def _worse(group: Mapping[str, Any], limits: Limits, allowed: float) -> bool:
    if group["lost"] - group["gained"] <= allowed * group["pictures"]:
        return False
    surer = group["challenger_log_loss"] < group["champion_log_loss"]
    return bool(group["p_worse"] < (limits.sure_p if surer else limits.likely_p))


def _doubtful(doubts: Mapping[str, Any], limits: Limits, *kinds: str) -> list[str]:
    told = {
        "contradicted": f"both models contradict {{}} of {doubts['labels']} labels with one voice",
        "unlearned": f"the new model misses {{}} of {doubts['labels_of_new_classes']} labels of new classes",
    }
    faults = []
    for name in kinds or told:
        allowed, tasks = getattr(limits, f"{name}_share"), doubts[f"{name}_tasks"]
        if doubts[f"{name}_share"] > allowed and doubts[name] > limits.labels:
            more = f" and {len(tasks) - limits.tasks_named} more" if len(tasks) > limits.tasks_named else ""
            look = f"; look at tasks {', '.join(map(str, tasks[: limits.tasks_named]))}{more}" if tasks else ""
            share = f"{doubts[f'{name}_share']:.0%}, at most {allowed:.0%} may be"
            faults.append(f"{told[name].format(doubts[name])} ({share}){look}")
    return faults


def _told(name: str, bench: Mapping[str, Any]) -> str:
    return f"{bench['challenger_right']} of {bench['pictures']} {name} pictures right, {bench['champion_right']} before"
