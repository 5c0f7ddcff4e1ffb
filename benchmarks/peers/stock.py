"""
A backend as the SDK's template leaves it: a model class with a loop over the tasks.

``label-studio-ml init`` copies this file beside its own ``_wsgi.py``, and ``label-studio-ml start``
runs that on Flask's server. The SDK makes a new object of the class at every /setup; the network
is loaded once for all of them, because reading it each time would be slow for no reason.
"""

from typing import Any

import bentoml
import keras
from label_studio_ml.model import LabelStudioMLBase
from PIL import Image

stored = bentoml.models.get("celestial_bodies_classifier_model:latest")
preprocess, postprocess = stored.custom_objects["preprocess"], stored.custom_objects["postprocess"]
network = keras.models.load_model(stored.path)


class Stock(LabelStudioMLBase):  # type: ignore[misc]
    """Predicts one task after the other."""

    def predict(self, tasks: list[dict[str, Any]], **_: Any) -> list[dict[str, Any]]:
        """A prediction for each task."""
        return [self._predict_one(task) for task in tasks]

    def _predict_one(self, task: dict[str, Any]) -> dict[str, Any]:
        name, schema = next(iter(self.parsed_label_config.items()))
        picture = Image.open(self.get_local_path(task["data"][schema["inputs"][0]["value"]]))
        answer = postprocess(network.predict(preprocess(picture), verbose=0))
        chosen = answer["prediction"]
        region = {
            "from_name": name, "to_name": schema["to_name"][0], "type": "choices", "value": {"choices": [chosen]},
        }  # fmt: skip
        return {"result": [region], "score": answer["probabilities"][chosen]}
