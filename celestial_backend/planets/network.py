"""
The default model's network: how it is built, and the card that is saved with it.

Keras is imported inside functions, so that reading a card costs no TensorFlow.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from celestial_backend.errors import ModelLoadError
from celestial_backend.pictures.hooks import USUAL_PX, Postprocess, Preprocess

CARD = "card.json"
FILES = ("config.json", "metadata.json", "model.weights.h5")  # as `model.save(zipped=False)` names them
PIXELS = 1  # counts what `Preprocess` gives for a picture; another number with every change of it


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


def version(folder: Path) -> str:
    """The version of the model in a folder, after its content: ``default-`` and twelve hexadecimal digits."""
    digest = hashlib.sha256(b"".join((folder / name).read_bytes() for name in FILES))
    return f"default-{digest.hexdigest()[:12]}"


@dataclass(frozen=True)
class Card:
    """What stands beside the weights in a saved model's folder."""

    classes: tuple[str, ...]
    size_px: tuple[int, int]
    metrics: dict[str, Any]
    recipe: dict[str, Any]
    versions: dict[str, str]
    pixels: int = PIXELS


def hooks(metadata: Mapping[str, Any]) -> tuple[Preprocess, Postprocess] | None:
    """
    What stands before and after a network of ours in the store, by its description; None where it is not ours.

    Raises:
        ModelLoadError: A later release has saved it, whose `Preprocess` gives other numbers.
    """
    taught, classes = is_taught(metadata), metadata.get("classes")
    from_nothing = taught and metadata.get("from_scratch") is True
    size_px = USUAL_PX if from_nothing else metadata.get("size_px")
    if not from_nothing and not _names_us(metadata.get("versions")):
        return None
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        return None
    if not isinstance(size_px, list | tuple) or [type(side) for side in size_px] != [int, int]:
        return None
    pixels = metadata.get("pixels", PIXELS)
    if pixels != PIXELS:
        raise ModelLoadError(
            f"The pixels of a network of this release must be {PIXELS}, and model.yaml says {pixels!r:.20}: another "
            "release of celestial-backend has saved it. Install the newest release."
        )
    return Preprocess((size_px[0], size_px[1])), Postprocess(tuple(classes))


def is_ours(metadata: Mapping[str, Any]) -> bool:
    """Whether this package has trained a network: the default model, or one that an earlier release has taught."""
    return is_taught(metadata) or _names_us(metadata.get("versions"))


def is_taught(metadata: Mapping[str, Any]) -> bool:
    """Whether an earlier release has taught a network a project's labels: from nothing, or from its ``parent``."""
    training = metadata.get("training")
    return _names_us(training.get("versions") if isinstance(training, dict) else None)


def _names_us(versions: object) -> bool:
    return isinstance(versions, dict) and "celestial_backend" in versions


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
            int(card.get("pixels", PIXELS)),
        )
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ModelLoadError(
            f"A saved model must have a {CARD} with classes, size_px, metrics, recipe and versions, got {error!r} "
            f"in {folder}. Train the model again."
        ) from error
