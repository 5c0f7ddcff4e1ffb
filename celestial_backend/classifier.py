"""
Pictures to calibrated probabilities, by one model of the BentoML store.

TensorFlow and BentoML are imported inside functions: a process that has loaded
TensorFlow must never be forked, and a server must answer before they are there.
"""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from celestial_backend.errors import ModelLoadError
from celestial_backend.passes import SharedPasses

logger = logging.getLogger(__name__)

HOOKS = ("preprocess", "postprocess")


@dataclass(frozen=True)
class Parts:
    """
    What a model of the store is made of.

    Attributes:
        tag: The BentoML tag.
        network: The Keras model.
        preprocess: Picture to network input, with a batch axis of 1.
        postprocess: The network's output for one picture to its named probabilities.
    """

    tag: str
    network: Any
    preprocess: Callable[[Image.Image], Any]
    postprocess: Callable[[Any], Any]


class Classifier:
    """
    One loaded model; lives until another one is live, and is safe to share between threads.

    Attributes:
        tag: The BentoML tag, which is the model version everywhere.
        classes: K class names, in the order of the columns of `probabilities`.
        input_shape: Shape of one prepared picture, without the batch axis.
    """

    def __init__(self, parts: Parts) -> None:
        self.tag = parts.tag
        self._preprocess = parts.preprocess
        self._forward = SharedPasses(_traced(parts.network))
        self._postprocess = parts.postprocess
        probe = _prepared(self.tag, parts.preprocess, Image.new("RGB", (128, 128)))
        self.input_shape = probe.shape[1:]
        self.classes = _classes(self.tag, _outputs(self.tag, self._forward, probe), parts.postprocess)

    def prepare(self, picture: Image.Image) -> NDArray[np.float32]:
        """
        One picture as the network wants it, by the model's own `preprocess`.

        Returns:
            Shape (1, *input_shape), float32.

        Raises:
            ModelLoadError: `preprocess` gave another shape than for other pictures.
        """
        array = _prepared(self.tag, self._preprocess, picture)
        if array.shape[1:] != self.input_shape:
            raise ModelLoadError(
                f"preprocess of {self.tag} gives shape {array.shape[1:]} for one picture and "
                f"{self.input_shape} for another; all must be alike."
            )
        return array

    def probabilities(self, batch: NDArray[np.float32]) -> NDArray[np.float64]:
        """
        Class probabilities of prepared pictures, in one forward pass, which others may share.

        Args:
            batch: Shape (N, *input_shape), N >= 1, as `prepare` gives them.

        Returns:
            Shape (N, K); row i belongs to ``batch[i]``, column k to ``self.classes[k]``.
            The numbers are those of the model's own `postprocess`, row by row, or all at
            once where it has a method ``batch`` from outputs (N, K) to probabilities (N, K).
        """
        outputs = self._forward(batch)
        whole = getattr(self._postprocess, "batch", None)
        if whole is not None:
            return np.asarray(whole(outputs), dtype=np.float64)
        rows = [self._postprocess(outputs[i : i + 1])["probabilities"] for i in range(len(outputs))]
        return np.array([[row[name] for name in self.classes] for row in rows], dtype=np.float64)


def load(tag: str) -> Classifier:
    """
    Load a model of the BentoML store with its own `preprocess` and `postprocess`.

    Raises:
        ModelLoadError: As for `read_parts`; or its parts do not work together.
    """
    classifier = Classifier(read_parts(tag))
    logger.info("Loaded %s: %d classes, input %s", tag, len(classifier.classes), classifier.input_shape)
    return classifier


def read_parts(tag: str) -> Parts:
    """
    Read a model of the BentoML store from its files.

    Takes seconds at the first call of a process, which starts TensorFlow. The
    custom objects are pickles and run code: the store is trusted, nothing else is.

    Raises:
        ModelLoadError: The model cannot be read here, or is not a classifier as
            design and README describe it; the message says what to do.
    """
    import bentoml

    try:
        bento = bentoml.models.get(tag)
    except Exception as error:  # BentoML lets through what a damaged model.yaml causes
        raise ModelLoadError(
            f"{tag} cannot be read from the BentoML store ({type(error).__name__}). "
            f"Remove it with `bentoml models delete {tag}` and save it again."
        ) from error
    check_files(tag, Path(bento.path))
    _open_tensorflow()
    import keras

    try:
        custom = bento.custom_objects
    except Exception as error:  # a pickle may raise anything
        raise ModelLoadError(_not_ours(tag, "custom objects", bento.info.context, error)) from error
    missing = [name for name in HOOKS if not callable(custom.get(name))]
    if missing:
        raise ModelLoadError(_no_hooks(tag, missing))
    try:
        network = keras.models.load_model(bento.path, custom_objects=custom)
    except Exception as error:  # Keras raises whatever its layers raise
        raise ModelLoadError(_not_ours(tag, "network", bento.info.context, error)) from error
    return Parts(tag, network, custom["preprocess"], custom["postprocess"])


def check_files(tag: str, folder: Path) -> None:
    """
    Refuse at once, without TensorFlow, a stored model that can never be served.

    Raises:
        ModelLoadError: No custom objects, or not saved in Keras 3's format.
    """
    if not (folder / "custom_objects.pkl").is_file():
        raise ModelLoadError(_no_hooks(tag, HOOKS))
    if not (folder / "config.json").is_file() or not (folder / "model.weights.h5").is_file():
        raise ModelLoadError(
            f"{tag} does not hold a Keras 3 network (config.json and model.weights.h5). "
            "Save it again with bentoml.keras.save_model under Keras 3.4 or later."
        )


def _no_hooks(tag: str, missing: Sequence[str]) -> str:
    return (
        f"{tag} has no custom object {' and no '.join(missing)}. Save it again with "
        'bentoml.keras.save_model(name, model, custom_objects={"preprocess": …, "postprocess": …}).'
    )


def _not_ours(tag: str, part: str, context: Any, error: Exception) -> str:
    frameworks = {**(context.framework_versions or {}), "Python": context.python_version}
    there = ", ".join(f"{name} {number}" for name, number in frameworks.items())
    here = f"tensorflow {version('tensorflow')}, Python {platform.python_version()}"
    return (
        f"The {part} of {tag} cannot be loaded ({type(error).__name__}). It was saved with {there}; here run {here}. "
        "Save it again with these versions, or serve another model with CELESTIAL_MODEL."
    )


def _prepared(tag: str, preprocess: Callable[[Image.Image], Any], picture: Image.Image) -> NDArray[np.float32]:
    try:
        array = np.asarray(preprocess(picture), dtype=np.float32)
    except Exception as error:
        raise ModelLoadError(
            f"preprocess of {tag} failed on a {picture.size[0]}x{picture.size[1]} RGB picture: "
            f"{type(error).__name__}. It must take a PIL picture and give a float array with a batch axis of 1."
        ) from error
    if array.ndim < 2 or array.shape[0] != 1:
        raise ModelLoadError(
            f"preprocess of {tag} must give an array with a batch axis of 1, got shape {array.shape}. "
            "Add the axis with np.expand_dims(x, axis=0)."
        )
    return array


def _outputs(tag: str, forward: Callable[[NDArray[np.float32]], Any], probe: NDArray[np.float32]) -> Any:
    try:
        outputs = forward(probe)
    except Exception as error:
        raise ModelLoadError(
            f"The network of {tag} does not take what its preprocess gives, shape {probe.shape}: "
            f"{type(error).__name__}. Save the network together with the preprocess it was trained with."
        ) from error
    if outputs.ndim != 2:
        raise ModelLoadError(
            f"The network of {tag} must give one row of numbers per picture, got shape {outputs.shape}. "
            "End it with a Dense layer, one unit per class."
        )
    return outputs


def _classes(tag: str, outputs: NDArray[np.float32], postprocess: Callable[[Any], Any]) -> tuple[str, ...]:
    width = outputs.shape[1]
    try:
        classes = tuple(str(name) for name in postprocess(outputs)["probabilities"])
    except Exception as error:
        raise ModelLoadError(
            f"postprocess of {tag} failed on the network's output of {width} numbers: {type(error).__name__}. "
            'It must give {"prediction": class, "probabilities": {class: float}} with one class per output.'
        ) from error
    if len(classes) != width:
        raise ModelLoadError(
            f"The network of {tag} gives {width} numbers and its postprocess names {len(classes)} classes; "
            "they must be as many. Save the network with the class names it was trained on."
        )
    return classes


def _traced(network: Any) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    """The forward pass as one graph: `network.predict` costs some 75 ms a call, this 1 to 2 ms."""
    import tensorflow as tf

    graph = tf.function(lambda batch: network(batch, training=False), reduce_retracing=True)

    def forward(batch: NDArray[np.float32]) -> NDArray[np.float32]:
        outputs: NDArray[np.float32] = graph(tf.convert_to_tensor(batch)).numpy()
        return outputs

    return forward


def _open_tensorflow() -> None:
    """
    Map TensorFlow's libraries before Python imports them, without holding the interpreter's lock.

    The import alone keeps every other thread waiting for about a second while the
    linker works, and Label Studio gives /health one second. A call through ctypes
    lets the other threads run. Where it does not work the import still does.
    """
    found = importlib.util.find_spec("tensorflow")
    if found is None or found.origin is None or not hasattr(os, "RTLD_NOW"):
        return
    linker = ctypes.CDLL(None)
    for name in ("libtensorflow_framework.so.2", "libtensorflow_cc.so.2"):
        library = Path(found.origin).parent / name
        if library.is_file():
            linker.dlopen(str(library).encode(), ctypes.c_int(os.RTLD_NOW | os.RTLD_LOCAL))
