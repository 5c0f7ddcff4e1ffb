"""
What people made of pre-labels: every answer of every person, and what the model had said of it, shown or not.

It is read from Label Studio's annotations and predictions, and from what the database keeps of what was not shown.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from celestial_backend.labels import Control

SHOWN, UNPREDICTED = "shown", "unpredicted"  # beside WITHHELD, AUDITED and PLANTED of `trial`
Choices = frozenset[str]


@dataclass(frozen=True)
class Given:
    """
    What one person answered to one control of one task, and what the model had said of it.

    Attributes:
        annotator: Label Studio's number of the person, as text.
        chosen: The choices; none where nothing was ticked.
        arm: `SHOWN`: the person saw the pre-label; `WITHHELD`, `AUDITED` or `PLANTED`, as `Unshown.arm` says;
            `UNPREDICTED`: there was none, as of a picture unlike all that was learned.
        said: What the model said, of `PLANTED` that was shown in its place; None without any.
        confidence: Of what the model said, 0 to 1: the region's score.
        version: The model's tag, "" without any.
        seconds: That Label Studio measured until it was submitted; None where it did not.
        truth: Whether it is marked as ground truth.
        at: When it was made, as Label Studio writes it.
    """

    task: int
    annotation: int
    annotator: str
    control: str
    chosen: Choices
    arm: str
    said: Choices | None = None
    confidence: float | None = None
    version: str = ""
    seconds: float | None = None
    truth: bool = False
    at: str = ""


@dataclass(frozen=True)
class Evidence:
    """
    All that is known of a project's labels at one moment.

    Attributes:
        number: Label Studio's number of the project.
        title: Its name.
        link: Where people open it.
        controls: Those that are served, in the config's order.
        given: In the order of tasks and annotations; each person's newest of a task.
        data: Task id -> its data, of all tasks with a label.
        people: Annotator -> a name for people, such as an e-mail address.
        tasks: How many the project has.
    """

    number: str
    title: str
    link: str
    controls: tuple[Control, ...]
    given: tuple[Given, ...]
    data: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    people: Mapping[str, str] = field(default_factory=dict)
    tasks: int = 0
