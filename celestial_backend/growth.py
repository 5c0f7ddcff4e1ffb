"""A network's last layer, made wider for classes that it does not know yet, without a change to the old ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from celestial_backend.classifier import Classifier, Parts
from celestial_backend.errors import CannotGrowError
from celestial_backend.network import Postprocess
from celestial_backend.renderer import BODIES, render

REMEDY = (
    "Train a new model on the project's labels alone with "
    "`python -m celestial_backend train --project P --from-scratch`."
)
START_STEPS = 300
START_DECAY = 0.1
SAME = 1e-4  # how far the probabilities may be from those of the parent's own postprocess
PROBES = 12  # pictures of noise, beside one of each body


def grown(parent: Parts, parent_classes: Sequence[str], classes: Sequence[str], seed: int) -> Any:
    """
    A copy of a model's network that ends in a plain ``Dense`` layer of logits, one for each class.

    The columns of the classes that it knows stay as they are; new ones start at nothing.

    Args:
        parent: Its network is not touched.
        parent_classes: Its classes, in the order of the outputs.
        classes: The same, and behind them the new ones.
        seed: Of the pictures on which old and new are compared.

    Raises:
        CannotGrowError: The network ends in something else, or the parent's postprocess is not
            the softmax of the last layer's numbers.
    """
    import keras
    from keras import layers

    known = tuple(parent_classes)
    if tuple(classes[: len(known)]) != known:
        raise CannotGrowError(
            f"The classes must begin with those of {parent.tag}, {list(known)}, got {list(classes)}. {REMEDY}"
        )
    place = _place(parent, len(known))
    try:
        copy = copied(parent.network)
        last = copy.layers[place]
        wide = layers.Dense(len(classes), use_bias=True, name=last.name, dtype=last.dtype_policy)
        copy = keras.Model(copy.inputs, wide(last.input), name=copy.name)
    except Exception as error:  # layers of strangers raise what they like
        raise CannotGrowError(
            f"The network of {parent.tag} cannot be copied ({type(error).__name__}). {REMEDY}"
        ) from error
    kernel, *bias = last.get_weights()
    more = len(classes) - len(known)
    old = bias[0] if bias else np.zeros(len(known), kernel.dtype)
    wide.set_weights([np.pad(kernel, ((0, 0), (0, more))), np.pad(old, (0, more))])
    _compare(parent, known, copy, seed)
    return copy


def _place(parent: Parts, count: int) -> int:
    """Where in ``network.layers`` the layer is that has one unit for each class."""
    stack = getattr(parent.network, "layers", None) or [parent.network]
    last = stack[-1]
    place = -2 if _is_softmax(last) and len(stack) > 1 else -1
    layer = stack[place]
    name = f"{type(layer).__name__} layer {layer.name!r}"
    if type(layer).__name__ != "Dense":
        raise CannotGrowError(
            f"A network that is taught more must end in a Dense layer with one unit for each class; "
            f"{parent.tag} ends in a {name}. {REMEDY}"
        )
    activation = getattr(layer.activation, "__name__", str(layer.activation))
    if activation not in (("linear",) if place == -2 else ("linear", "softmax")):
        raise CannotGrowError(
            f"The last layer of a network that is taught more must give logits or their softmax; the {name} of "
            f"{parent.tag} has the activation {activation!r}. {REMEDY}"
        )
    if layer.units != count:
        raise CannotGrowError(
            f"The last layer must have one unit for each of the {count} classes; the {name} of {parent.tag} "
            f"has {layer.units}. {REMEDY}"
        )
    return place


def _is_softmax(layer: Any) -> bool:
    named = getattr(getattr(layer, "activation", None), "__name__", "")
    return type(layer).__name__ == "Softmax" or (type(layer).__name__ == "Activation" and named == "softmax")


def _compare(parent: Parts, known: tuple[str, ...], copy: Any, seed: int) -> None:
    """Make sure that the softmax of the copied columns is what the parent says."""
    classifier, rng = Classifier(parent), np.random.default_rng([seed, PROBES])
    pictures = [Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)) for _ in range(PROBES)]
    pictures = [one.resize((96, 96)) for one in pictures] + [render(name, seed) for name in BODIES]
    batch = np.concatenate([classifier.prepare(one) for one in pictures])
    said = classifier.probabilities(batch)
    copied = Postprocess(known).batch(copy.predict_on_batch(batch)[:, : len(known)])
    away = float(np.abs(said - copied).max()) if classifier.classes == known else 1.0
    if not away <= SAME:
        raise CannotGrowError(
            f"The postprocess of a model that is taught more must be the softmax of its last layer, within {SAME:g}; "
            f"that of {parent.tag} is up to {away:.2g} away from it. {REMEDY}"
        )


def head_start(network: Any, batches: Iterable[NDArray[np.float32]], truths: NDArray[np.integer], known: int) -> None:
    """
    Give the new columns of a grown network the weights that tell their classes best by what the network sees already.

    The old columns stay. Far fewer lessons are needed from here than from nothing.

    Args:
        network: As `grown` gives it; changed in place.
        batches: Inputs of examples of all classes, the new ones among them.
        truths: The column of each, shape (N,).
        known: How many columns are old.
    """
    import keras

    last = network.layers[-1]
    both = keras.Model(network.inputs, [last.input, network.outputs[0]])
    pairs = [both.predict_on_batch(one) for one in batches]
    features = np.concatenate([pair[0].reshape(len(pair[0]), -1) for pair in pairs]).astype(np.float64)
    logits = np.concatenate([pair[1][:, :known] for pair in pairs]).astype(np.float64)
    kernel, bias = last.get_weights()
    kernel[:, known:], bias[known:] = _new_columns(features, logits, truths, len(bias))
    last.set_weights([kernel, bias])


def _new_columns(
    features: NDArray[np.float64], logits: NDArray[np.float64], truths: NDArray[np.integer], total: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Kernel and bias of a softmax regression in which the old logits are given; every class counts the same."""
    known = logits.shape[1]
    scale = max(float(np.sqrt((features**2).mean())), 1e-6)
    seen = np.pad(features / scale, ((0, 0), (0, 1)), constant_values=1.0)
    weights = 1.0 / np.bincount(truths, minlength=total)[truths]
    weights, goal = weights / weights.sum(), np.eye(total)[truths]
    columns, mean, square = (np.zeros((seen.shape[1], total - known)) for _ in range(3))
    for step in range(1, START_STEPS + 1):  # Adam
        shares = Postprocess(("",) * total).batch(np.concatenate([logits, seen @ columns], axis=1))
        slope = seen.T @ (weights[:, None] * (shares - goal)[:, known:]) + START_DECAY * columns
        mean, square = 0.9 * mean + 0.1 * slope, 0.99 * square + 0.01 * slope**2
        columns -= 0.05 * (mean / (1 - 0.9**step)) / (np.sqrt(square / (1 - 0.99**step)) + 1e-8)
    return columns[:-1] / scale, columns[-1]


def copied(network: Any) -> Any:
    """Another network with the same layers and weights, without loss and optimizer."""
    import keras

    copy = keras.models.clone_model(uncompiled(network))
    copy.set_weights(network.get_weights())
    return copy


def uncompiled(network: Any) -> Any:
    """The same layers as a network without loss and optimizer, which a copy or a file would carry along."""
    import keras

    return keras.Model(network.inputs, network.outputs, name=network.name)


def freeze_normalisations(network: Any) -> None:
    """Keep every batch normalisation as it is: few pictures would spoil what it has measured."""
    for layer in _all_layers(network):
        if type(layer).__name__ == "BatchNormalization":
            layer.trainable = False


def _all_layers(network: Any) -> Iterator[Any]:
    for layer in getattr(network, "layers", ()):
        yield layer
        yield from _all_layers(layer)
