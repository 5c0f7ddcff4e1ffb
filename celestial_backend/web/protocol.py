"""
What Label Studio sends, as far as this backend reads it; `openapi.json` describes it, and the answers.

Captured from Label Studio 1.23.2. Keys that nobody reads are skipped, not built: Label
Studio adds some with every release, and whoever sends megabytes of them costs next to
nothing. So are the tasks of a request until their turn comes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Annotated, Any, Generic, Literal, TypeVar, get_args

import msgspec
from msgspec import Meta, Raw, Struct

from celestial_backend.errors import BodyTooLargeError, RequestError

TrainEvent = Literal[
    "START_TRAINING", "ANNOTATION_CREATED", "ANNOTATIONS_CREATED", "ANNOTATION_UPDATED", "ANNOTATIONS_DELETED"
]
TRAIN_EVENTS: tuple[str, ...] = get_args(TrainEvent)

TASKS_MAX = 100_000  # of a request; Label Studio waits 100 seconds, in which a model predicts fewer
VALUES_MAX = 3_000_000  # of a request, counted by their commas; so many tasks of Label Studio have nearly as many
LOOSE_MAX, LOOSE_MAX_BYTES = 200_000, 20_000_000  # values and bytes of a body that is read in the slow way
DATA_MAX = 10_000  # values of one task's data
ID_MAX = 20  # bytes of a task's number
NOTHING = Raw(b"null")
TRUE = re.compile(rb'"ground_truth"\s*:\s*true')

Sent = TypeVar("Sent")


class Unread(Struct):
    """An object whose keys nobody reads."""


class SetupRequest(Struct, rename={"label_config": "schema"}):
    """Body of `POST /setup`."""

    label_config: Annotated[str, Meta(description="The project's label config.")]
    project: Annotated[str | None, Meta(description="The project's number, a point, and when it was made.")] = None
    access_token: Annotated[
        str | None, Meta(description="A token of Label Studio, for a look at the first tasks where ours is refused.")
    ] = None


class PredictRequest(Struct, Generic[Sent]):
    """Body of `POST /predict`."""

    tasks: Annotated[
        list[Sent], Meta(description="Tasks with `id` and `data`; one that is none costs only its own prediction.")
    ]
    label_config: Annotated[
        str, Meta(description="The project's label config; nothing is predicted for one without choices.")
    ] = ""
    project: Annotated[
        str | int | None, Meta(description="The project, whose own model predicts if it has one.")
    ] = None
    params: Annotated[Unread | None, Meta(description="Not used.")] = None


class WebhookProject(Struct):
    """The project of an event."""

    id: Annotated[int, Meta(ge=1, le=2**63 - 1, description="The project's number.")]


class Label(Struct):
    """An annotation, of which only one thing is read."""

    was_cancelled: Annotated[bool | None, Meta(description="Whether the task was skipped.")] = None


class WebhookRequest(Struct):
    """Body of `POST /webhook` for an event that this backend listens to."""

    action: Annotated[TrainEvent, Meta(description="The event.")]
    project: WebhookProject
    annotation: Annotated[
        Label | list[Label] | None, Meta(description="The label that was made or changed, or a list of them.")
    ] = None


class OtherEvent(Struct):
    """Body of `POST /webhook` for any other event; the rest of it is not read."""

    action: Annotated[str, Meta(extra_json_schema={"not": {"enum": list(TRAIN_EVENTS)}})]


Request = SetupRequest | PredictRequest[Any] | WebhookRequest | OtherEvent
# What is read from the bytes of a body, and, where they are JSON that only Python takes, from what it makes of them.
KINDS: dict[str, tuple[Any, Any]] = {
    "/setup": (SetupRequest, SetupRequest),
    "/predict": (PredictRequest[Raw], PredictRequest[Any]),
    "/webhook": (WebhookRequest, WebhookRequest),
    "event": (OtherEvent, OtherEvent),
}


def read(path: str, body: bytes) -> Request:
    """
    What a body says, as far as it is read, in time that is linear in its length and with little memory.

    Raises:
        RequestError: It is not what Label Studio sends to this path; the message names what is wrong, and where.
        BodyTooLargeError: It holds more values, or more tasks, than one request may.
    """
    if body.count(b",") > VALUES_MAX:
        raise BodyTooLargeError(
            f"A request to {path} may hold {VALUES_MAX:,} values, and this one has more. Send fewer tasks at once."
        )
    if path == "/webhook":
        event: OtherEvent = _read("event", path, body)
        if event.action not in TRAIN_EVENTS:
            return event
    found: Request = _read(path, path, body)
    if isinstance(found, PredictRequest) and len(found.tasks) > TASKS_MAX:
        raise BodyTooLargeError(
            f"A request to {path} may hold {TASKS_MAX:,} tasks, and this one has {len(found.tasks):,}, more than can be"
            " predicted while Label Studio waits. Send fewer at once, or use the command prelabel."
        )
    return found


def event_project(body: bytes) -> str:
    """The number of the project of any event, as text; empty if it has none."""
    try:
        return str(_event.decode(body).project.id)
    except UNREADABLE:
        return ""


class Tasks(Sequence[Any]):
    """
    The tasks of a request, each read whenever it is asked for: those that wait take no more than their bytes.

    A task is a dict with ``id`` and ``data``; in the place of data that is too much to be read stands
    the `RequestError` that says so. One with a ground truth has ``annotations`` and ``is_labeled`` too. What is no
    object is None.
    """

    def __init__(self, sent: Sequence[Any]) -> None:
        self._sent = sent

    def __len__(self) -> int:
        return len(self._sent)

    def __getitem__(self, place: Any) -> Any:
        found = self._sent[place]
        return [_task(one) for one in found] if isinstance(place, slice) else _task(found)


class _Task(Struct):
    id: Raw = NOTHING
    data: Raw = NOTHING
    annotations: Raw = NOTHING
    is_labeled: Raw = NOTHING


class _EventProject(Struct):
    id: int


class _Event(Struct):
    project: _EventProject


_event = msgspec.json.Decoder(_Event)
_anything = msgspec.json.Decoder(Any)
_task_parts = msgspec.json.Decoder(_Task)
_readers = {name: msgspec.json.Decoder(strict) for name, (strict, _) in KINDS.items()}
UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)


def _read(name: str, path: str, body: bytes) -> Any:
    try:
        return _readers[name].decode(body)
    except UNREADABLE as error:
        if body.count(b",") > LOOSE_MAX or len(body) > LOOSE_MAX_BYTES:
            raise _wrong(path, error) from None
    # Python takes more for JSON, such as NaN and halves of letters, and so did this backend always.
    try:
        found = json.loads(body, parse_float=_number)
    except RecursionError:
        raise RequestError(f"The body of {path} must not be nested by the hundreds, and is.") from None
    except ValueError:
        found = None
    if not isinstance(found, dict):
        kind = "nothing that is JSON" if found is None else type(found).__name__
        raise RequestError(f"The body of {path} must be a JSON object, got {kind}.")
    try:
        return msgspec.convert(found, KINDS[name][1])
    except msgspec.ValidationError as error:
        raise _wrong(path, error) from None


def _wrong(path: str, error: Exception) -> RequestError:
    said = str(error).replace("`", "'")
    return RequestError(f"The body of {path} is not what Label Studio sends: {said}.")


def _number(text: str) -> float:
    """To JSON, 7.0 is a whole number too."""
    number = float(text)
    return int(number) if number.is_integer() else number


def _task(sent: Any) -> Any:
    if not isinstance(sent, Raw):
        return sent
    try:
        parts = _task_parts.decode(sent)
    except UNREADABLE:
        return None
    data: Any = bytes(parts.data)
    if len(data) > DATA_MAX and data.count(b",") > DATA_MAX:
        data = RequestError(f"The data of a task may hold {DATA_MAX:,} values, and this one has more.")
    else:
        data = _value(data)
    task = {"id": _value(bytes(parts.id)) if len(parts.id) <= ID_MAX else None, "data": data}
    given = bytes(parts.annotations)
    if TRUE.search(given) and given.count(b",") <= DATA_MAX:
        told = bytes(parts.is_labeled)
        task |= {"annotations": _value(given), "is_labeled": _value(told) if len(told) <= ID_MAX else None}
    return task


def _value(text: bytes) -> Any:
    try:
        return _anything.decode(text)
    except UNREADABLE:
        pass
    try:  # numbers beyond all bounds
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
