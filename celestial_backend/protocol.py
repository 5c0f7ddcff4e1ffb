"""
What Label Studio sends, as far as this backend reads it.

Captured from Label Studio 1.23.2. Unknown keys are let through: Label Studio adds
some with every release.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field, ValidationError

from celestial_backend.errors import RequestError


class SetupRequest(BaseModel):
    """Body of ``POST /setup``."""

    project: str | None = None
    label_config: str = Field(alias="schema")
    extra_params: dict[str, Any] | str | None = None


class PredictRequest(BaseModel):
    """Body of ``POST /predict``; a task that is no object costs only its own prediction."""

    tasks: list[Any]
    label_config: str
    project: str | int | None = None
    params: dict[str, Any] | None = None


class WebhookProject(BaseModel):
    """The ``project`` of an event."""

    id: int
    label_config: str = ""


class WebhookRequest(BaseModel):
    """Body of ``POST /webhook`` for an event that this backend listens to."""

    action: str
    project: WebhookProject


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
