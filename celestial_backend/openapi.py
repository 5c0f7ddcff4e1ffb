"""
What the backend says of itself: an OpenAPI 3.1 document, and the same as a page to read.

Both are made from the models in `protocol`, so they cannot drift from what is checked.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup, escape

from celestial_backend import __version__, protocol

REFERENCE = "#/components/schemas/"
LABEL_CONFIG = (
    '<View><Image name="image" value="$image"/><Choices name="choice" toName="image">'
    '<Choice value="Earth"/><Choice value="Mars"/><Choice value="Saturn"/></Choices></View>'
)
PROJECT = "7.1795374408"
VERSION = "celestial_bodies_classifier_model:default-0123456789ab"
PREDICTION = {
    "result": [{
        "id": "choice-1", "from_name": "choice", "to_name": "image", "type": "choices",
        "value": {"choices": ["Mars"]}, "score": 0.9987,
    }],
    "score": 0.9987,
    "model_version": VERSION,
}  # fmt: skip
SETUP = {"project": PROJECT, "schema": LABEL_CONFIG, "extra_params": None}
PREDICT = {
    "tasks": [
        {"id": 101, "data": {"image": "/data/upload/7/0123abcd-Mars.png"}},
        {"id": 102, "data": {"image": "/data/upload/7/0123abcd-gone.png"}},
    ],
    "label_config": LABEL_CONFIG,
    "project": PROJECT,
    "params": {"context": None},
}
TRAIN = {"action": "START_TRAINING", "project": {"id": 7, "label_config": LABEL_CONFIG}}
TRAINING = {
    "status": "ok",
    "result": {"event": "START_TRAINING", "job": "3f2a9c1e", "state": "waiting", "requests": 1},
}
METRICS = 'celestial_tasks_total{outcome="predicted"} 1998.0\ncelestial_tasks_total{outcome="failed"} 2.0\n'
SENTENCES = {
    "400": "The body of /predict is not what Label Studio sends: Object missing required field 'tasks'.",
    "401": "User name or password of the ML backend is missing or wrong (BASIC_AUTH_USER).",
    "403": "A page of another site must not use this backend; only its own pages may.",
    "404": "The requested URL was not found on the server.",
    "405": "The method is not allowed for the requested URL.",
    "408": "The body of the request did not come whole and in time. Send it again.",
    "413": "A request to /predict may have 100 MB, and this one has more. Send less at once.",
    "415": "A request to /predict must be application/json, and this one is text/plain.",
    "422": "None of the choices ['cat', 'dog'] is a class of the model ['Earth', 'Mars'].",
    "503": "The model celestial_bodies_classifier_model:7 is not in the BentoML store.",
}
ERRORS = {
    "400": "The body is no JSON, or not what Label Studio sends.",
    "401": "The credentials of `BASIC_AUTH_USER` are missing or wrong.",
    "403": "A browser sends it from another site, or it is asked for under a name that is not known.",
    "404": "There is no such path.",
    "405": "The path takes another method, which the header `Allow` names.",
    "408": "The body did not come in time.",
    "413": "The body has more bytes than `CELESTIAL_REQUEST_MAX_MB` allows on this path, or more tasks or values than "
    "one request may.",
    "415": "The body's Content-Type is not `application/json`.",
    "422": "The label config cannot be read, or shares no class with the model.",
    "503": "There is no model to predict with, the state folder cannot be used, or too much is asked for "
    "at once; the header `Retry-After` then says when to ask again.",
}
ABOUT = (
    "An ML backend for Label Studio, which calls the paths below. A body must be JSON, in UTF-8, and its Content-Type "
    "`application/json`. Every error has the same shape."
)


def document(*, guarded: bool) -> dict[str, Any]:
    """The OpenAPI document; `guarded` where requests must carry a name and a password."""
    health = _get("Whether the server is up", _answer(protocol.HealthAnswer, _HEALTH))
    paths = {
        "/setup": {"post": _post(
            "Connect a project", "Checks its label config against the model, and tells the model's version.",
            _body(protocol.SetupRequest, project=SETUP),
            {"200": _answer(protocol.SetupAnswer, {"model_version": VERSION})}, ("422", "503"),
        )},
        "/predict": {"post": _post(
            "Predict tasks", "One result per task, in order. A task whose picture cannot be had gets an empty list.",
            _body(protocol.PredictRequest, two_tasks=PREDICT),
            {"200": _answer(protocol.PredictAnswer, {"results": [PREDICTION, []]})}, ("422", "503"),
        )},
        "/webhook": {"post": _post(
            "Take an event", "START_TRAINING asks for a training, new and changed labels are counted towards one. "
            "The training runs later, in a worker.",
            _body(protocol.WebhookRequest, protocol.OtherEvent, train=TRAIN, other={"action": "TASKS_CREATED"}),
            {"201": _answer(protocol.WebhookAnswer, TRAINING),
             "200": _answer(protocol.OtherEventAnswer, {"status": "Unknown event"})}, ("503",),
        )},
        "/health": {"get": health},
        "/": {"get": health},
        "/metrics": {"get": _get("Counts and seconds for Prometheus", _text("text/plain", METRICS))},
        "/openapi.json": {"get": _get("This document", {
            "description": "OpenAPI 3.1.", "content": {"application/json": {"schema": {"type": "object"}}},
        })},
        "/docs": {"get": _get("This document as a page", _text("text/html", "<!doctype html>"))},
    }  # fmt: skip
    _, schemas = msgspec.json.schema_components(MODELS, ref_template=REFERENCE + "{name}")
    components: dict[str, Any] = {
        "schemas": schemas,
        "responses": {status: _error(status) for status in ERRORS},
        "headers": {"RequestId": {"description": "Found in the server's log.", "schema": {"type": "string"}}},
    }
    made: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "Celestial bodies ML backend", "version": __version__, "description": ABOUT},
        "paths": paths,
        "components": components,
    }
    if guarded:
        components["securitySchemes"] = {"basic": {"type": "http", "scheme": "basic"}}
        made["security"] = [{"basic": []}]
        for methods in paths.values():
            for operation in methods.values():
                operation["responses"]["401"] = {"$ref": "#/components/responses/401"}
    return made


def page(made: dict[str, Any]) -> str:
    """The document as HTML, with nothing from elsewhere."""
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True)
    environment.filters |= {"kind": _kind, "pretty": _pretty, "prose": _prose}
    return environment.get_template("docs.html").render(made)


_HEALTH = {"status": "UP", "model_class": "CelestialBodiesBackend"}
MODELS: tuple[type[msgspec.Struct], ...] = (
    protocol.SetupRequest, protocol.SetupAnswer, protocol.PredictRequest, protocol.PredictAnswer,
    protocol.WebhookRequest, protocol.OtherEvent, protocol.WebhookAnswer, protocol.OtherEventAnswer,
    protocol.HealthAnswer, protocol.ErrorAnswer,
)  # fmt: skip


def _get(summary: str, answer: dict[str, Any]) -> dict[str, Any]:
    return {"summary": summary, "responses": {"200": answer | _headers(), "403": _refer("403"), "405": _refer("405")}}


def _post(
    summary: str, about: str, body: dict[str, Any], answers: dict[str, dict[str, Any]], errors: tuple[str, ...]
) -> dict[str, Any]:
    responses = {status: answer | _headers() for status, answer in answers.items()}
    responses |= {status: _refer(status) for status in ("400", "403", "405", "408", "413", "415", *errors)}
    return {"summary": summary, "description": about, "requestBody": body, "responses": responses}


def _headers() -> dict[str, Any]:
    return {"headers": {"X-Request-ID": {"$ref": "#/components/headers/RequestId"}}}


def _refer(status: str) -> dict[str, Any]:
    return {"$ref": f"#/components/responses/{status}"}


def _schema(*models: type[msgspec.Struct]) -> dict[str, Any]:
    schemas: list[dict[str, Any]] = [{"$ref": REFERENCE + model.__name__} for model in models]
    return schemas[0] if len(schemas) == 1 else {"anyOf": schemas}


def _body(*models: type[msgspec.Struct], **examples: Any) -> dict[str, Any]:
    named = {name: {"value": value} for name, value in examples.items()}
    return {"required": True, "content": {"application/json": {"schema": _schema(*models), "examples": named}}}


def _answer(model: type[msgspec.Struct], example: Any) -> dict[str, Any]:
    content = {"application/json": {"schema": _schema(model), "example": example}}
    return {"description": model.__doc__, "content": content}


def _text(kind: str, example: str) -> dict[str, Any]:
    return {"description": "Text.", "content": {kind: {"schema": {"type": "string"}, "example": example}}}


def _error(status: str) -> dict[str, Any]:
    example = {"status": int(status), "detail": SENTENCES[status], "request_id": "1f0c2a9b3d4e"}
    content = {"application/json": {"schema": _schema(protocol.ErrorAnswer), "example": example}}
    return {"description": ERRORS[status], "content": content} | _headers()


def _pretty(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, indent=2, ensure_ascii=False)


def _prose(text: str) -> Markup:
    """A description as HTML: what stands between backticks is code, all else is text."""
    code = Markup("<code>{}</code>")
    parts = [code.format(part) if index % 2 else escape(part) for index, part in enumerate(text.split("`"))]
    return Markup("").join(parts)


def _kind(schema: dict[str, Any]) -> str:
    """A schema in words."""
    if "$ref" in schema:
        return str(schema["$ref"]).removeprefix(REFERENCE)
    if "anyOf" in schema:
        return " or ".join(_kind(one) for one in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return " or ".join(json.dumps(value) for value in schema.get("enum", [schema.get("const")]))
    kind = str(schema.get("type", "anything"))
    if kind != "array":
        return kind
    return "empty list" if schema.get("maxItems") == 0 else f"list of {_kind(schema.get('items', {}))}"
