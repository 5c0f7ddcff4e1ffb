"""
The least that predicting a picture takes: decode the file, preprocess, one forward pass.

No checks, no limits, no task, no label config, no postprocess. The whole picture is decoded by
Pillow's defaults, and the forward pass is one compiled graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from typing import Any

import bentoml
import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray
from PIL import Image


class Bare:
    """The newest model of the store."""

    def __init__(self) -> None:
        stored = bentoml.models.get("celestial_bodies_classifier_model:latest")
        self._preprocess = stored.custom_objects["preprocess"]
        network = keras.models.load_model(stored.path)
        self._graph = tf.function(lambda batch: network(batch, training=False), reduce_retracing=True)

    def prepare(self, data: bytes) -> NDArray[np.float32]:
        """A file's bytes as the network wants them, with a batch axis of 1."""
        picture = Image.open(BytesIO(data))
        picture.load()  # not convert: that copies a picture which is RGB already, and takes longer than to decode it
        return np.asarray(self._preprocess(picture), np.float32)

    def forward(self, prepared: Sequence[NDArray[np.float32]]) -> Any:
        """The network's outputs for prepared pictures, in one pass."""
        return self._graph(tf.convert_to_tensor(np.concatenate(prepared))).numpy()
