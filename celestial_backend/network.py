"""
The network and what stands before and after it.

Keras is imported inside functions, so that reading a card or preparing a picture costs no TensorFlow.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from celestial_backend.body import find_body, level
from celestial_backend.decode import rgb
from celestial_backend.errors import ModelError, ModelLoadError

CARD = "card.json"
FILES = ("config.json", "metadata.json", "model.weights.h5")  # as `model.save(zipped=False)` names them


@dataclass(frozen=True)
class Preprocess:
    """Picture to network input; small, immutable, safe to share between threads."""

    size_px: tuple[int, int] = (72, 72)

    def __call__(self, picture: Image.Image) -> NDArray[np.float32]:
        """
        The body, cut out, brought to one size and to one brightness.

        Args:
            picture: Decoded, any size and mode.

        Returns:
            Shape (1, H, W, 3), RGB, about 0 to 1 (see `level`).
        """
        picture = rgb(picture)
        (left, top, right, bottom), colour = find_body(picture)
        height_px, width_px = self.size_px
        box = (max(0.0, left), max(0.0, top), min(float(picture.width), right), min(float(picture.height), bottom))
        across, down = width_px / (right - left), height_px / (bottom - top)
        place = (round((box[0] - left) * across), round((box[1] - top) * down))
        size = (max(1, round((box[2] - box[0]) * across)), max(1, round((box[3] - box[1]) * down)))
        part = picture.resize(size, Image.Resampling.BILINEAR, box=box, reducing_gap=2.0)
        if size != (width_px, height_px):
            canvas = Image.new("RGB", (width_px, height_px), colour)
            canvas.paste(part, place)
            part = canvas
        return level(np.asarray(part).astype(np.float32) / np.float32(255))[None]


@dataclass(frozen=True)
class Postprocess:
    """Network output to named probabilities; immutable, safe to share between threads."""

    classes: tuple[str, ...]

    def __call__(self, logits: ArrayLike) -> dict[str, Any]:
        """
        The prediction for one image.

        Args:
            logits: Shape (1, K), array or tensor; column k belongs to ``classes[k]``.

        Returns:
            ``{"prediction": class, "probabilities": {class: float}}``, in the order of the classes.

        Raises:
            ModelError: The network's output does not have K columns.
        """
        row = self.batch(logits)[0]
        return {
            "prediction": self.classes[int(row.argmax())],
            "probabilities": dict(zip(self.classes, row.tolist(), strict=True)),
        }

    def batch(self, logits: ArrayLike) -> NDArray[np.float64]:
        """
        Probabilities for N images, shape (N, K); rows sum to 1 within 1e-12.

        Raises:
            ModelError: The network's output does not have K columns.
        """
        values = np.asarray(logits, np.float64)
        if values.ndim != 2 or values.shape[1] != len(self.classes):
            raise ModelError(
                f"The network's output must have {len(self.classes)} columns, one for each class, "
                f"got shape {values.shape}. Save the model with its own classes."
            )
        values = np.exp(values - values.max(axis=1, keepdims=True))
        return np.asarray(values / values.sum(axis=1, keepdims=True))


def build(
    classes_count: int, size_px: tuple[int, int], widths: Sequence[int], dropout: float = 0.0, normalised: bool = True
) -> Any:
    """
    A fresh Keras network that ends in a plain ``Dense`` layer of logits, called ``logits``.

    Args:
        classes_count: K, the number of outputs.
        size_px: Height and width of the input; its range is about 0 to 1.
        widths: Filters of the convolutions; the first halves the picture, and so does a
            pooling after every second one.
        dropout: Share of the features dropped before the last layer while training.
        normalised: With batch normalisation, as needed to learn from nothing; `fused` takes it out.
    """
    import keras
    from keras import layers

    inputs = keras.Input((*size_px, 3), name="picture")
    x = inputs
    for index, width in enumerate(widths):
        x = layers.Conv2D(
            width,
            3,
            strides=1 if index else 2,
            padding="same",
            use_bias=not normalised,
            kernel_initializer="he_normal",
            name=f"convolution_{index}",
        )(x)
        if normalised:
            x = layers.BatchNormalization(momentum=0.97, name=f"normalisation_{index}")(x)
        x = layers.ReLU(name=f"activation_{index}")(x)
        if index % 2 and index < len(widths) - 1:
            x = layers.MaxPooling2D(name=f"pooling_{index}")(x)
    x = layers.GlobalAveragePooling2D(name="features")(x)
    x = layers.Dropout(dropout, name="dropout")(x)
    return keras.Model(inputs, layers.Dense(classes_count, name="logits")(x), name="celestial_bodies")


def fused(network: Any, dropout: float = 0.0) -> Any:
    """The same function as a network from `build`, its batch normalisations folded into the convolutions."""
    convolutions = [layer for layer in network.layers if layer.name.startswith("convolution_")]
    size_px, widths = network.input_shape[1:3], [layer.filters for layer in convolutions]
    plain = build(network.output_shape[-1], size_px, widths, dropout, normalised=False)
    plain.get_layer("logits").set_weights(network.get_layer("logits").get_weights())
    for index, layer in enumerate(convolutions):
        normalisation = network.get_layer(f"normalisation_{index}")
        gain, shift, mean, variance = normalisation.get_weights()
        gain = gain / np.sqrt(variance + normalisation.epsilon)
        plain.get_layer(layer.name).set_weights([layer.get_weights()[0] * gain, shift - mean * gain])
    return plain


def temperature(logits: NDArray[np.floating], truths: NDArray[np.integer]) -> float:
    """
    The number that logits must be divided by so that their softmax is as likely as can be.

    Args:
        logits: Shape (N, K).
        truths: Shape (N,), the column that is right.

    Returns:
        Between 0.2 and 5, found by trying 200 values evenly spaced in the logarithm.
    """
    values = np.asarray(logits, np.float64)
    values = values - values.max(axis=1, keepdims=True)
    right = values[np.arange(len(values)), truths]
    tried = np.geomspace(0.2, 5, 200)
    losses = [float((np.log(np.exp(values / t).sum(axis=1)) - right / t).mean()) for t in tried]
    return float(tried[int(np.argmin(losses))])


def fold_temperature(network: Any, divisor: float) -> None:
    """Divide the logits of a network for good, through the weights and bias of its last layer."""
    last = network.layers[-1]
    last.set_weights([weights / divisor for weights in last.get_weights()])


@dataclass(frozen=True)
class Card:
    """What stands beside the weights in a saved model's folder."""

    classes: tuple[str, ...]
    size_px: tuple[int, int]
    metrics: dict[str, Any]
    recipe: dict[str, Any]
    versions: dict[str, str]


def load_card(folder: Path) -> Card:
    """
    The card of a saved model; needs no TensorFlow.

    Raises:
        ModelLoadError: There is none, or it cannot be read.
    """
    try:
        card = json.loads((folder / CARD).read_text("utf-8"))
        height_px, width_px = card["size_px"]
        return Card(
            tuple(str(name) for name in card["classes"]),
            (int(height_px), int(width_px)),
            dict(card["metrics"]),
            dict(card["recipe"]),
            dict(card["versions"]),
        )
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ModelLoadError(
            f"A saved model must have a {CARD} with classes, size_px, metrics, recipe and versions, got {error!r} "
            f"in {folder}. Train the model again."
        ) from error
