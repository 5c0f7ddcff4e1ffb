"""The `LabelStudioMLBase` subclass: glue between the SDK and the predictor, nothing else."""

from __future__ import annotations

import time
from typing import Any

from celestial_backend.sdk import StatelessModel
from celestial_backend.wiring import Services


class CelestialBodiesBackend(StatelessModel):
    """Serves the live model of the store to Label Studio; one object per request."""

    services: Services  # bound by `bound_to`, because the SDK makes the objects

    @classmethod
    def bound_to(cls, services: Services) -> type[CelestialBodiesBackend]:
        """A subclass whose objects all work with these services."""
        return type(cls.__name__, (cls,), {"services": services})

    def get(self, key: str) -> Any:
        """A value of this request; ``model_version`` is the live tag, asked for anew each time."""
        return self.services.store.live_tag(self.project_id) if key == "model_version" else super().get(key)

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
        """
        del context
        now = time.monotonic()
        deadline = (now if asked_at is None else asked_at) + self.services.settings.predict_max_s
        with self.services.admission.turn(len(tasks), (now + deadline) / 2):
            return self.services.predictor.predict(tasks, self.get("label_config") or "", deadline, self.project_id)

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
