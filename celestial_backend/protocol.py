"""
What Label Studio sends, as far as this backend reads it, and what it is answered.

Captured from Label Studio 1.23.2. Unknown keys are let through: Label Studio adds
some with every release.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from celestial_backend.errors import RequestError

TrainEvent = Literal[
    "START_TRAINING", "ANNOTATION_CREATED", "ANNOTATIONS_CREATED", "ANNOTATION_UPDATED", "ANNOTATIONS_DELETED"
]
TRAIN_EVENTS: tuple[str, ...] = get_args(TrainEvent)


def _whole(value: object) -> object:
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(_whole)]  # to JSON, 7.0 is a whole number too


class Sent(BaseModel):
    """A value is of its very type: text that looks like a number is none."""

    model_config = ConfigDict(strict=True)


class SetupRequest(Sent):
    """Body of `POST /setup`."""

    project: str | None = Field(None, description="The project's number, a point, and when it was made.")
    label_config: str = Field(alias="schema", description="The project's label config.")
    extra_params: dict[str, Any] | str | None = Field(None, description="Taken in every form, and not used.")


class PredictRequest(Sent):
    """Body of `POST /predict`."""

    tasks: list[Any] = Field(description="Tasks with `id` and `data`; one that is none costs only its own prediction.")
    label_config: str = Field(description="The project's label config.")
    project: str | Whole | None = Field(None, description="The project, whose own model predicts if it has one.")
    params: dict[str, Any] | None = Field(None, description="Not used.")


class WebhookProject(Sent):
    """The project of an event."""

    id: Whole = Field(ge=1, lt=2**63, description="The project's number.")
    label_config: str = Field("", description="The project's label config.")


class WebhookRequest(Sent):
    """Body of `POST /webhook` for an event that this backend listens to."""

    action: TrainEvent = Field(description="The event.")
    project: WebhookProject
    annotation: Any = Field(None, description="The label that was made or changed, or a list of them.")


class OtherEvent(Sent):
    """Body of `POST /webhook` for any other event; the rest of it is not read."""

    action: Annotated[str, Field(json_schema_extra={"not": {"enum": list(TRAIN_EVENTS)}})]


class Choice(BaseModel):
    """What is ticked."""

    choices: list[str] = Field(min_length=1, description="Choices of the label config, by alias or value.")


class Region(BaseModel):
    """What is predicted for one `Choices` of the label config."""

    id: str
    from_name: str = Field(description="The name of the `Choices`.")
    to_name: str = Field(description="The name of the `Image`.")
    type: Literal["choices"]
    value: Choice
    score: float = Field(ge=0, le=1, description="The model's probability of the best class.")


class Prediction(BaseModel):
    """The prediction of one task."""

    result: list[Region] = Field(description="One for each `Choices` that the model has an answer to.")
    score: float = Field(ge=0, le=1, description="The lowest of the regions' scores.")
    model_version: str = Field(description="The BentoML tag of the model.")


NoPrediction = Annotated[list[Any], Field(max_length=0)]


class HealthAnswer(BaseModel):
    """The server is up."""

    status: Literal["UP"]
    model_class: str


class SetupAnswer(BaseModel):
    """The model can serve the label config."""

    model_version: str = Field(description="The tag that every prediction carries.")


class PredictAnswer(BaseModel):
    """As many results as tasks, in their order."""

    results: list[Prediction | NoPrediction] = Field(description="An empty list stands for a task that failed.")


class Accepted(BaseModel):
    """What comes of an event."""

    event: TrainEvent
    state: str = Field(description="Of the job, `counted`, or `not asked for`.")
    job: str | None = Field(None, description="The training that will do it; the command `jobs` tells more.")
    requests: int | None = Field(None, description="How many requests the job stands for.")
    reason: str | None = Field(None, description="Why nothing comes of it.")


class WebhookAnswer(BaseModel):
    """The event was written down."""

    status: Literal["ok"]
    result: Accepted


class OtherEventAnswer(BaseModel):
    """The event was of no interest."""

    status: Literal["Unknown event"]


class ErrorAnswer(BaseModel):
    """Every error; its sentence is the reason phrase of the status line too."""

    status: int
    detail: str = Field(description="What is wrong and what to do, for people.")
    request_id: str = Field(description="The server's log tells more under it; also the header `X-Request-ID`.")


REQUESTS: dict[str, type[BaseModel]] = {
    "/setup": SetupRequest,
    "/predict": PredictRequest,
    "/webhook": WebhookRequest,
}


def check(path: str, body: object) -> None:
    """
    Refuse a body that is not what Label Studio sends to this path.

    Raises:
        RequestError: The message names the first key that is wrong, and why.
    """
    if not isinstance(body, dict):
        raise RequestError(f"The body of {path} must be a JSON object, got {_kind(body)}.")
    try:
        REQUESTS[path].model_validate(body)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise RequestError(f"The body of {path} is not what Label Studio sends: {place}: {first['msg']}.") from None


def _kind(value: object) -> str:
    return "nothing that is JSON" if value is None else type(value).__name__
