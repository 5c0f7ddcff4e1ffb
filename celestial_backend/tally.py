"""What a project's labels came to: the examples, how many, and what was left out for which reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from celestial_backend.errors import NotEnoughDataError
from celestial_backend.examples import Example
from celestial_backend.studio import moment

LEAST_EXAMPLES = 10
LEAST_PER_NEW_CLASS = 5
SHOWN_FAILURES = 20

FAILED = "that cannot be had"
BEYOND = "beyond those that one training reads"
TIED = "on which the annotators disagree"
BOTH_SIDES = "that are held out in one task and learned in another"
TOO_RARE = "of new classes with too few examples"
WEIGHTLESS = "accepted as pre-labelled, which CELESTIAL_ACCEPTED_WEIGHT lets count nothing"


@dataclass(frozen=True)
class ProjectExample(Example):
    """One picture of a project; its name is the digest of its pixels."""

    task_ids: tuple[int, ...] = ()
    annotation_ids: tuple[int, ...] = ()
    source: str = ""  # "unaided", "accepted" or "corrected"


@dataclass
class Tally:
    """
    Filled while labels are read.

    Attributes:
        given: Annotations of all tasks.
        merged: Tasks that show a picture of another one.
        newest: The largest ``updated_at`` of an annotation.
        how: How pictures came to their classes.
        annotations: Those left out, by reason; `pictures` likewise.
        rare: Examples of new classes that have too few.
        failed: Task ids and why their pictures cannot be had.
    """

    tasks: int = 0
    given: int = 0
    merged: int = 0
    newest: str | None = None
    how: Counter[str] = field(default_factory=Counter)
    annotations: Counter[str] = field(default_factory=Counter)
    pictures: Counter[str] = field(default_factory=Counter)
    rare: Counter[str] = field(default_factory=Counter)
    failed: list[tuple[int, str]] = field(default_factory=list)

    def add(self, task: Mapping[str, Any]) -> None:
        """Count a task and its annotations."""
        given = task.get("annotations") or ()
        moments = [self.newest, *(each.get("updated_at") for each in given)]
        self.tasks += 1
        self.given += len(given)
        self.newest = max(filter(None, moments), key=moment, default=None)

    def counts(self, learn: Sequence[ProjectExample], held: Sequence[ProjectExample]) -> dict[str, Any]:
        """Everything, for people and manifests, ready for JSON and in one order."""
        out = self.pictures + Counter({FAILED: len(self.failed), TOO_RARE: self.rare.total()})
        return {
            "tasks": self.tasks,
            "annotations": self.given,
            "learn": _sorted(Counter(example.class_name for example in learn)),
            "held out": _sorted(Counter(example.class_name for example in held)),
            "sources": _sorted(Counter(example.source for example in (*learn, *held))),
            "consensus": _sorted(self.how),
            "duplicates merged": self.merged,
            "new classes with too few examples": _sorted(self.rare),
            "annotations left out": _sorted(self.annotations),
            "pictures left out": _sorted(out),
            "pictures that cannot be had": [
                {"task": task, "reason": reason} for task, reason in sorted(self.failed)[:SHOWN_FAILURES]
            ],
        }


def check_enough(counts: Mapping[str, Any], project_id: str) -> None:
    """
    Make sure that there is something to learn from and something to compare models on.

    Raises:
        NotEnoughDataError: The message gives the counts per class, and what was left out.
    """
    learn, held = sum(counts["learn"].values()), sum(counts["held out"].values())
    if learn + held >= LEAST_EXAMPLES and learn and held:
        return
    seen = _listed(Counter(counts["learn"]) + Counter(counts["held out"])) or "none"
    rare = _listed(counts["new classes with too few examples"])
    out = [f"{count} annotations {why}" for why, count in counts["annotations left out"].items()]
    out += [f"{count} pictures {why}" for why, count in counts["pictures left out"].items()]
    raise NotEnoughDataError(
        f"Training needs at least {LEAST_EXAMPLES} labelled pictures, some to learn from and some to compare models on,"
        f" and project {project_id} gives {learn} to learn from and {held} to compare on ({seen})."
        + (f" A new class needs {LEAST_PER_NEW_CLASS} pictures ({rare})." if rare else "")
        + (f" Left out: {'; '.join(out)}." if out else "")
        + " Label more pictures."
    )


def ranges(numbers: Iterable[int]) -> str:
    """Whole numbers as text: "1-40,43"."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number <= parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(f"{first}-{last}" if last > first else f"{first}" for first, last in parts)


def _sorted(counter: Mapping[str, int]) -> dict[str, int]:
    return {name: counter[name] for name in sorted(counter) if counter[name]}


def _listed(counter: Mapping[str, int]) -> str:
    return ", ".join(f"{name}: {count}" for name, count in sorted(counter.items()))
