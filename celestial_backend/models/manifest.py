"""
What a model says of its making: what it learned, and how well it says what it had not learned.

A training writes it into the model's description in the store, and with its job into the list of jobs, under the same
keys. It is read back from any store: one of an older release, of somebody else, or edited by hand. So nothing here
raises: what is not known is passed over, and what is missing or of another type counts as not told.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType, field

PASSED, REFUSED = "passed", "refused"  # decisions
Count = Annotated[int, Meta(ge=0)]
Ranges = Annotated[str, Meta(pattern=r"^(\d{1,18}(-\d{1,18})?(,\d{1,18}(-\d{1,18})?)*)?$")]  # whole numbers: "1-40,43"


class Part(Struct, frozen=True, omit_defaults=True):
    """Some facts. One that is not told is not written; a part without one that it must have is not told itself."""

    def plain(self) -> dict[str, Any]:
        """The facts as JSON holds them."""
        found: dict[str, Any] = msgspec.to_builtins(self)
        return found


class ChoiceScore(Part, frozen=True):
    """
    How well a new head says one choice.

    Attributes:
        labels: Labelled pictures that show it.
        right: Those that the head said right when it had not learned them.
    """

    labels: Count
    right: Count


class Comparison(Part, frozen=True, kw_only=True):
    """
    The live model, the champion, and a new head, the challenger, asked about the same pictures.

    Attributes:
        champion_right: Pictures that the champion says right.
        challenger_right: The same of the challenger.
        champion_log_loss: Of its probabilities; None where there is no picture.
        challenger_log_loss: The same of the challenger.
        gained: Pictures that the challenger alone says right.
        lost: Pictures that the champion alone says right.
        p_worse: How likely so many losses are of two models that are equally good.
        p_chance: How likely guesses would be as good as the challenger; only of new labels.
    """

    pictures: Count
    champion_right: Count
    challenger_right: Count | None = None
    champion_log_loss: float | UnsetType | None = UNSET
    challenger_log_loss: float | UnsetType | None = UNSET
    gained: Count
    lost: Count
    p_worse: float
    p_chance: float | None = None

    @property
    def net_loss(self) -> int:
        """How many pictures more the champion says right than the challenger."""
        return self.lost - self.gained

    @property
    def surer(self) -> bool:
        """Whether the challenger has the lower log loss."""
        champion, challenger = self.champion_log_loss, self.challenger_log_loss
        return isinstance(champion, float) and isinstance(challenger, float) and challenger < champion


class Scores(Part, frozen=True):
    """
    How well a control's new head says what it had not learned, beside the live model.

    Attributes:
        labels: Labelled pictures.
        right: Those that it said right.
        choices: The same for each choice that some picture shows.
        skill: The share that it says right of what guessing says wrong.
        p_chance: How likely guesses would be as good.
        kept: On pictures that nobody labelled, of choices that the live model knew before.
        fresh: On labels that the live model has not learned either.
        of_all: On all labels, each asked before it was learned.
    """

    labels: Count
    right: Count
    choices: dict[str, ChoiceScore]
    skill: float
    p_chance: float
    kept: Comparison | None = None
    fresh: Comparison | None = None
    of_all: Comparison | None = field(default=None, name="all")


class Fit(Part, frozen=True):
    """
    How a control's head was fitted.

    Attributes:
        kind: Of those that were tried, the one that was chosen.
        features: The spaces that it takes.
        loss: The log loss of the kind that was chosen, on labels that it had not learned.
        losses: The same of every kind that was tried.
        folds: Of the cross-validation.
        too_few: Choices with too few labels to be learned, and how many they have.
        kept: Choices that the live model knew, and how many pictures stand for them that nobody labelled.
        doubted: Labels that look wrong.
    """

    kind: str
    features: list[str]
    loss: float
    losses: dict[str, float]
    folds: Count
    too_few: dict[str, Count] = field(name="too few labels")
    kept: dict[str, Count]
    doubted: Count


class Taught(Part, frozen=True):
    """
    What later trainings ask of the head that answers a control; nothing is told of a network.

    Attributes:
        annotations: The numbers of those that it learned.
        right: Pictures that it said right when it had not learned them, of `labels`.
        sampled: Choices that it knows from the default model's training pictures.
        said: The numbers of the annotations that it said right when it had not learned them.
    """

    annotations: Ranges | None = None
    right: Count | None = None
    labels: Count | None = None
    sampled: list[str] | None = None
    said: Ranges | None = None


class Unreadable(Part, frozen=True):
    """A task whose picture cannot be read, and why."""

    task: int
    reason: str


class Counts(Part, frozen=True):
    """
    What a project's labels came to.

    Attributes:
        tasks: With a label.
        annotations: Of these tasks.
        labels: By control, how many pictures have each choice.
        sources: How many labels are unaided, accepted or corrected.
        consensus: How many labels were agreed on in which way.
        duplicates: Tasks whose picture another one has too.
        unlabelled: Pictures without a label that were read.
        annotations_left_out: How many, by the reason.
        pictures_left_out: How many, by the reason.
        unreadable: The first of those that cannot be read.
    """

    tasks: Count | None = None
    annotations: Count | None = None
    labels: dict[str, dict[str, Count]] | None = None
    sources: dict[str, Count] | None = None
    consensus: dict[str, Count] | None = None
    duplicates: Count | None = field(default=None, name="duplicates merged")
    unlabelled: Count | None = field(default=None, name="without a label")
    annotations_left_out: dict[str, Count] | None = field(default=None, name="annotations left out")
    pictures_left_out: dict[str, Count] | None = field(default=None, name="pictures left out")
    unreadable: list[Unreadable] | None = field(default=None, name="pictures that cannot be had")


class FolderCounts(Part, frozen=True):
    """How many pictures each class of a folder has, and how many of its files were left out."""

    labels: dict[str, Count]
    left_out: Count = field(name="left out")


class Calibration(Part, frozen=True):
    """
    How the probabilities of a model from outside are made as sure as they are right.

    Attributes:
        of: The tag of the model that it was before.
        temperature: Divides the logarithms of its probabilities.
        pictures: It was fitted on.
        before: The calibration error on them, of the model as it was.
        after: The same of the calibrated one, each picture asked before it was fitted on.
        inside: Whether its own postprocess does so already, as that of an exported model.
    """

    of: str
    temperature: Annotated[float, Meta(gt=0, le=1000)]
    pictures: Count
    before: float
    after: float
    inside: bool = False


class Manifest(Part, frozen=True):
    """
    All that is told of a model; with the same labels it can be made again.

    Attributes:
        tag: Its own; only in a job's result, as in the store it stands beside.
        project: The number of the project whose labels it learned.
        job: The training that made it.
        parent: The tag of the model that was live when that began, and which it was compared with.
        decision: `PASSED` if some control is answered by it at least as well, else `REFUSED`.
        reason: A sentence or more for people: how it did, by control.
        scores: By control.
        training: By control, how its head was fitted.
        suspects: By control, the tasks whose labels look wrong, the likeliest first.
        labels: What there was to learn from.
        digest: Changes when a label or a picture does that was used.
        annotations: The numbers of those that were used.
        taught: By control, what its head has learned.
        tried: The tag of the network whose features its heads might have taken; None where there was none.
        accepted_weight: What a label counted that was submitted as it was pre-labelled.
        choices: By control, what its head says; under "" what it says of any control.
        embedder: The name of the one whose features its heads take.
        base: The tag of the network whose features or answers its heads need.
        classes: Of a network, what it says.
        calibration: Of one from outside, if somebody has calibrated it here.
    """

    tag: str | None = None
    project: str | None = None
    job: str | None = None
    parent: str | None = None
    decision: str | None = None
    reason: str | None = None
    scores: dict[str, Scores] | None = None
    training: dict[str, Fit] | None = None
    suspects: dict[str, list[int]] | None = None
    labels: FolderCounts | Counts | None = None
    digest: str | None = None
    annotations: Ranges | None = None
    taught: dict[str, Taught] | None = None
    tried: str | UnsetType | None = UNSET
    accepted_weight: float | None = None
    choices: dict[str, list[str]] | None = None
    embedder: str | None = None
    base: str | None = None
    classes: list[str] | None = None
    calibration: Calibration | None = None

    @classmethod
    def of(cls, told: object) -> Manifest:
        """What a model's metadata, or a job's result, tells; all of it may be missing."""
        found: Manifest = _part(cls, told if isinstance(told, dict) else {})
        return found


def _read(kind: Any, told: Any) -> Any:
    """
    What is told, as a type has it.

    Raises:
        msgspec.ValidationError: It is of another type, so it is not told.
    """
    origin = get_origin(kind)
    if origin in (Union, UnionType):
        return _first(get_args(kind), told)
    if isinstance(told, dict) and origin is dict:
        return _entries(get_args(kind)[1], told)
    if isinstance(told, dict) and origin is None and issubclass(kind, Part):
        return _part(kind, told)
    try:
        return msgspec.convert(told, kind)
    except UnicodeError as error:  # half a character, which msgspec cannot look at
        raise msgspec.ValidationError(str(error)) from error


def _first(kinds: Iterable[Any], told: Any) -> Any:
    """As the first of some types that it fits."""
    for kind in kinds:
        with suppress(msgspec.ValidationError):
            return _read(kind, told)
    raise msgspec.ValidationError("it is of none of these types")


def _entries(kind: Any, told: dict[Any, Any]) -> dict[str, Any]:
    """Those entries of a dict whose values are of a type."""
    found = {}
    for name, each in told.items():
        with suppress(msgspec.ValidationError):
            found[_read(str, name)] = _read(kind, each)
    return found


def _part(kind: type[Part], told: dict[Any, Any]) -> Any:
    """Those facts that are told; not told itself if one is missing that it must have."""
    facts, found = _facts(kind), {}
    for fact in facts:
        with suppress(msgspec.ValidationError, KeyError):
            found[fact.name] = _read(fact.type, told[fact.encode_name])
    if missing := [fact.name for fact in facts if fact.required and fact.name not in found]:
        raise msgspec.ValidationError(f"{missing} must be told")
    return kind(**found)


@cache
def _facts(kind: type[Part]) -> tuple[msgspec.structs.FieldInfo, ...]:
    return msgspec.structs.fields(kind)
