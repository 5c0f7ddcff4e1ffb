"""
The `LabelStudioMLBase` subclass, and the seam to label-studio-ml: the only file that knows which generation it is.

Generation 1 is release 1.0.9 (PyPI, frozen since 2023), generation 2 is 2.x (GitHub). On both, a request gets a fresh
model object that keeps nothing, our version is the one that is told, ``fit(event, data)`` runs inside the request,
and errors leave the SDK's views as they were raised.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
import tempfile
import time
from typing import Any

from flask import Flask

from celestial_backend.services import Services
from celestial_backend.settings import project_parts
from celestial_backend.web.admission import Admission


def _import_quietly() -> Any:
    """
    The SDK's model module, without the traces its import leaves.

    Generation 2 opens a SQLite file in ``MODEL_DIR`` at import. Nothing is ever
    read from it here, because each process remembers it on its own; so it gets a
    folder that goes away. Both generations wrap their views in a handler that puts
    the whole traceback into the answer; ours takes its place.
    """
    before = os.environ.get("MODEL_DIR")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MODEL_DIR"] = folder
        try:
            exceptions: Any = importlib.import_module("label_studio_ml.exceptions")
            exceptions.exception_handler = lambda view: view
            return importlib.import_module("label_studio_ml.model")
        finally:
            del os.environ["MODEL_DIR"]
            if before is not None:
                os.environ["MODEL_DIR"] = before


_sdk = _import_quietly()
_SdkModel: Any = _sdk.LabelStudioMLBase
_SdkManager: Any = getattr(_sdk, "LabelStudioMLManager", object)  # generation 1 only
GENERATION = 2 if _SdkManager is object else 1


class StatelessModel(_SdkModel):  # type: ignore[misc]
    """
    `LabelStudioMLBase` with the interface of generation 2 and no memory; lives for one request.

    Attributes:
        project_id: Label Studio's project id as text, empty if it was not told.
    """

    def __init__(self, project_id: str | None = None, label_config: str | None = None) -> None:
        self._values: dict[str, Any] = {"label_config": label_config}
        self._is_made = GENERATION == 1
        if GENERATION == 2:
            self._values["model_version"] = "asked for while it is made"  # else it is set, and no event needs it
            super().__init__(project_id, label_config or "")
            self._is_made = True
            return
        super().__init__()
        self.project_id = project_id or ""
        self.label_config = label_config
        self.setup()

    def setup(self) -> None:
        """Called once at the end of the making; nothing slow belongs here."""

    def use_label_config(self, label_config: str) -> None:
        """Keep the label config for this request only."""
        self._values["label_config"] = label_config

    def get(self, key: str) -> Any:
        """A value of this request, None if it was not set."""
        return self._values.get(key)

    def set(self, key: str, value: Any) -> None:
        """Keep a value for this request only."""
        self._values[key] = value

    def has(self, key: str) -> bool:
        """Whether a value of this request was set."""
        return key in self._values


def make_app(model_class: type[StatelessModel], events: tuple[str, ...]) -> Flask:
    """
    A Flask app of the SDK that serves a model class: /health, /setup, /predict, /webhook.

    Each call gives an app of its own, without the SDK's hooks (they log whole
    bodies, tokens included) and error handlers (they answer with the exception).

    Args:
        model_class: Made anew for every request.
        events: Names of the webhook events that reach ``fit``.
    """
    logging.getLogger("label_studio_ml").setLevel(logging.INFO)  # at DEBUG its views log what /setup brings
    sys.modules.pop("label_studio_ml.api", None)
    api: Any = importlib.import_module("label_studio_ml.api")
    if GENERATION == 1:
        api._manager = _Manager()
    else:
        api.TRAIN_EVENTS = events
    app: Flask = api.init_app(model_class)
    if GENERATION == 2:
        api.BASIC_AUTH = None  # the app's own hook asks for the same credentials
    for rule in app.url_map.iter_rules():
        if rule.rule == "/versions" and rule.methods:  # generation 1 looks for them in folders of its own
            rule.methods.discard("POST")
    app.before_request_funcs.clear()
    app.after_request_funcs.clear()
    app.error_handler_spec.clear()
    return app


class _Manager(_SdkManager):  # type: ignore[misc]
    """Gives generation 1 the request handling of generation 2, in place of its module-level manager."""

    def initialize(self, model_class: type[StatelessModel], **_: Any) -> None:
        self.model_class = model_class

    def fetch(self, project: object, label_config: str | None, *_: Any, **__: Any) -> Any:
        model = self.model_class(project_id(project), label_config)
        return _sdk.ModelWrapper(model=model, model_version=model.get("model_version"))

    def predict(
        self, tasks: list[Any], project: object, label_config: str | None, *_: Any, **params: Any
    ) -> tuple[list[Any], Any]:
        wrapped = self.fetch(project, label_config)
        return wrapped.model.predict(tasks, **params), wrapped

    def webhook(self, event: str, data: dict[str, Any]) -> dict[str, Any]:
        model = self.model_class(data["project"]["id"], data["project"]["label_config"])
        return {"result": model.fit(event, data), "status": "ok"}


def project_id(project: object) -> str:
    """The number of a project, an @, and when it was made, as far as Label Studio tells; empty if that is no number."""
    return "@".join(filter(None, project_parts(str(project))))


class CelestialBodiesBackend(StatelessModel):
    """Serves the live model of the store to Label Studio; one object per request."""

    services: Services  # bound by `bound_to`, because the SDK makes the objects
    admission: Admission

    @classmethod
    def bound_to(cls, services: Services, admission: Admission) -> type[CelestialBodiesBackend]:
        """A subclass whose objects all work with these."""
        return type(cls.__name__, (cls,), {"services": services, "admission": admission})

    def get(self, key: str) -> Any:
        """A value of this request; ``model_version`` is what `Predictor.version` says now."""
        if key != "model_version" or not self._is_made:
            return super().get(key)
        return self.services.predictor.version(super().get("label_config") or "", self.project_id)

    def predict(
        self, tasks: list[Any], context: dict[str, Any] | None = None, asked_at: float | None = None, **_: Any
    ) -> list[Any]:
        """
        As many answers as tasks, in their order: a prediction, or ``[]`` for a task that failed.

        Args:
            tasks: As Label Studio sends them.
            context: What interactive annotation sends; not used.
            asked_at: On the monotonic clock, when Label Studio began to wait; now if None.

        Raises:
            LabelConfigError, ModelError: Nothing can be predicted; the whole request fails.
            BusyError: Its turn did not come while there was time to do anything.
            StateError: As for `Trial.shown`.
        """
        del context
        now = time.monotonic()
        deadline = (now if asked_at is None else asked_at) + self.services.settings.predict_max_s
        with self.admission.turn(len(tasks), (now + deadline) / 2):
            config, project = self.get("label_config") or "", self.project_id
            answers = self.services.predictor.predict(tasks, config, deadline, project)
            return self.services.shown(tasks, answers, project, config, deadline)

    def fit(self, event: str, data: dict[str, Any], **_: Any) -> dict[str, Any]:
        """
        What comes of an event: a job that waits, or a count of labels. Takes some milliseconds; a worker does the rest.

        Raises:
            StateError: The request could not be written down, so it was not accepted.
        """
        project = str(data["project"]["id"])
        if event == "START_TRAINING":
            return {"event": event, **self.services.jobs.request(project)}
        labels = 0 if event == "ANNOTATIONS_DELETED" else int(data["labels"])
        return {"event": event, **self.services.jobs.note_labels(project, labels)}
