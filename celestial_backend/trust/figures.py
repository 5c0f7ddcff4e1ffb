"""The figures of a report, as `trust.measures` finds them and as a script gets them in JSON."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from celestial_backend.trust.calibration import Bin
from celestial_backend.trust.intervals import Interval


@dataclass(frozen=True)
class Figure:
    """
    One number, how sure it is, and what it means.

    Attributes:
        sentence: For people, whole: it names the number and its interval, or says what is missing.
        value: A share from 0 to 1, or what the sentence says; None where there is not enough yet.
        low: The lower end of its 95 % interval; None with the value.
        high: The upper end.
        n: Labels that it rests on.
        missing: About how many more of them are needed; 0 with a value, or where nobody can say.
    """

    sentence: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    n: int = 0
    missing: int = 0


@dataclass(frozen=True)
class Compared:
    """
    How often people agree with the model where they see what it says, and where they do not.

    Attributes:
        name: A choice that the model said, a range of its confidence ("0.9 to 1"), or a person; "" for all.
        shown: The share that agrees with the pre-label that they saw.
        withheld: The share that agrees with what was withheld from them.
        difference: The first less the second; below 0 where people disagree more with what they see.
        unlooked: The share of pre-labels that is accepted without looking, (s - q) / (1 - q).
    """

    name: str
    shown: Figure
    withheld: Figure
    difference: Figure
    unlooked: Figure


@dataclass(frozen=True)
class Person:
    """
    One annotator.

    Attributes:
        annotator: As in `Given`.
        name: For people.
        labels: How many.
        kept: The share of the pre-labels that they saw and kept.
        agreement: The share of their labels on which most others agree.
        right: The share of their labels that the ground truth agrees with.
        seconds: The typical seconds for a task.
    """

    annotator: str
    name: str
    labels: int
    kept: Figure
    agreement: Figure
    right: Figure
    seconds: Figure


@dataclass(frozen=True)
class Pair:
    """Two annotators, by their names, and Cohen's kappa on the tasks that both labelled."""

    one: str
    other: str
    kappa: Figure


@dataclass(frozen=True)
class Disputed:
    """
    A task on which people differ.

    Attributes:
        answers: Annotator's name -> what they chose.
        said: What the model said; empty where nobody knows.
        decided: What a ground truth says; empty without one.
    """

    task: int
    answers: Mapping[str, tuple[str, ...]]
    said: tuple[str, ...] = ()
    decided: tuple[str, ...] = ()


@dataclass(frozen=True)
class Confusion:
    """
    How often people chose what, where the model said what.

    Attributes:
        choices: K names, of several choices at once joined by " + "; the rows and the columns.
        blind: K rows of K counts, of labels made without the pre-label: row i is what the model said, column j
            what people chose.
        shown: The same of labels made with it.
    """

    choices: tuple[str, ...]
    blind: tuple[tuple[int, ...], ...]
    shown: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Version:
    """
    What became of a model's predictions.

    Attributes:
        tag: The model's.
        first: When the first label on a prediction of it was made, as Label Studio writes it.
        last: When the last one was.
        labels: On its predictions, shown or not.
        kept: The share of its pre-labels that was kept.
        right: The share of its predictions that people agreed with who did not see them.
        tested: Of the labels that it learned, how many it said right when it had not learned them.
    """

    tag: str
    first: str
    last: str
    labels: int
    kept: Figure
    right: Figure
    tested: Figure


@dataclass(frozen=True)
class Measured:
    """
    One control.

    Attributes:
        control: Its name in the label config.
        multiple: Several choices may be made; then a pre-label was kept if exactly its choices were.
        choices: On offer.
        labels: By how they were made (`Given.arm`), how many people gave.
        kept: The share of shown pre-labels that were submitted as they were.
        kept_rightly: The share of those that are right.
        truths: Sentence by sentence, what is taken for right, and for how many labels.
        compared: Shown against withheld, of all.
        by_choice: The same by what the model said.
        by_confidence: The same by its confidence.
        by_person: The same by annotator.
        over_corrected: The share of right pre-labels that were changed to something wrong.
        under_corrected: The share of wrong pre-labels that were kept.
        planted: The share of planted errors that were kept.
        accuracy: The share of predictions that people agree with who did not see them.
        alpha: Krippendorff's alpha of all annotators, nominal: 1 is full agreement, 0 what chance gives.
        people: By the number of labels, the most first.
        pairs: Those with the most tasks in common first.
        disputed: Tasks to ask about again, those with most disagreement first.
        disputes: How many tasks are disputed; `disputed` holds the first of them.
        confusion: The model against people.
        reliability: Confidence against agreement of people who did not see it.
        calibration_error: Of those, as `trust.calibration` has it.
        scores: How many predictions have a confidence from 0 to 0.1, from 0.1 to 0.2 and so on.
        versions: In the order of their first labels.
    """

    control: str
    multiple: bool
    choices: tuple[str, ...]
    labels: Mapping[str, int]
    kept: Figure
    kept_rightly: Figure
    truths: tuple[str, ...]
    compared: Compared
    by_choice: tuple[Compared, ...]
    by_confidence: tuple[Compared, ...]
    by_person: tuple[Compared, ...]
    over_corrected: Figure
    under_corrected: Figure
    planted: Figure
    accuracy: Figure
    alpha: Figure
    people: tuple[Person, ...]
    pairs: tuple[Pair, ...]
    disputed: tuple[Disputed, ...]
    disputes: int
    confusion: Confusion
    reliability: tuple[Bin, ...]
    calibration_error: Figure
    scores: tuple[int, ...]
    versions: tuple[Version, ...]


@dataclass(frozen=True)
class Measures:
    """
    All figures of a project.

    Attributes:
        project: Label Studio's number.
        title: Its name.
        link: Where people open it.
        at: When this was measured, UTC, as in 2026-11-29T14:30:00Z.
        tasks: How many there are.
        labelled: Tasks with a label of a person.
        annotators: How many people labelled.
        seconds_saved: Per task: the typical seconds without a pre-label less those with one.
        seconds_with: The typical seconds with a pre-label.
        seconds_without: Where it was withheld.
        controls: In the config's order.
        left_out: Why labels do not count, and how many.
    """

    project: str
    title: str
    link: str
    at: str
    tasks: int
    labelled: int
    annotators: int
    seconds_saved: Figure
    seconds_with: Figure
    seconds_without: Figure
    controls: tuple[Measured, ...]
    left_out: Mapping[str, int] = field(default_factory=dict)


def percent(value: float) -> str:
    """A share for people; one digit more where that tells something."""
    digits = 1 if 0 < abs(value) < 0.0995 or 0 < 1 - abs(value) < 0.0995 else 0
    return f"{100 * value:.{digits}f} %"


def span(found: Interval, write: Callable[[float], str] = percent) -> str:
    """The 95 % interval of a number, in words."""
    return f"95 % interval {write(found.low).removesuffix(' %')} to {write(found.high)}"


def told_by(found: Interval, sentence: str) -> Figure:
    """A figure of an interval, and the sentence that says it."""
    return Figure(sentence, found.value, found.low, found.high, found.n)


def not_yet(why: str, n: int = 0, missing: int = 0) -> Figure:
    """A figure that is not told: how much more it needs of what, or else why nobody can say it."""
    return Figure(f"Not enough yet: about {missing} more {why}." if missing else f"Cannot be told: {why}.", n=n,
                  missing=missing)  # fmt: skip
