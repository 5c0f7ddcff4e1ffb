"""
Pictures to calibrated probabilities, by one model of the BentoML store.

TensorFlow and BentoML are imported inside functions: a process that has loaded
TensorFlow must never be forked, and a server must answer before they are there.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from celestial_backend.errors import ModelError, ModelLoadError
from celestial_backend.features import Familiar, unit
from celestial_backend.labels import Vocabulary, short, some
from celestial_backend.models.embedders import prepared
from celestial_backend.models.manifest import Manifest
from celestial_backend.models.passes import SharedPasses, flat, rows_of
from celestial_backend.models.saved import CUSTOM, Saved, cause, of_type, traced
from celestial_backend.pictures.hooks import Postprocess, Preprocess, tempered
from celestial_backend.planets import network as planets
from celestial_backend.planets import replay

logger = logging.getLogger(__name__)

HOOKS = ("preprocess", "postprocess")
HEADS_FILE = "heads.json"  # what a model of heads has, and no other
EDGE = 1e-3  # probabilities may be that far below 0 or above 1, as numbers are rounded
SUM_OFF = 0.1  # and their sum that far from 1
MADE_FROM = "made from"  # in the metadata of a head that this backend has exported: the tag of its model
INDEPENDENT = "independent"  # in the metadata: several classes may hold at once, so there is no sum to look at
ANSWER = '{"prediction": class, "probabilities": {class: number}}'


class Model(Protocol):
    """A loaded model, as the predictor uses it; lives until another one is live, and is safe to share."""

    @property
    def tag(self) -> str:
        """The BentoML tag, which is the model version everywhere."""

    @property
    def vocabulary(self) -> Vocabulary:
        """What it can say, in the order of the columns of `probabilities`."""

    @property
    def base(self) -> str | None:
        """The tag of another model of the store that it needs."""

    def key(self, data: bytes) -> bytes | None:
        """What a picture file is remembered by, None where nothing is remembered."""

    def remembered(self, key: bytes) -> NDArray[np.float32] | None:
        """A picture as `prepare` gives it, if it is known by its key."""

    def prepare(self, picture: Image.Image, key: bytes | None = None) -> NDArray[np.float32]:
        """One picture as `probabilities` takes it, with a batch axis of 1; from now on known by its key."""

    def answers(self, batch: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """
        Probabilities, shape (N, K), and of each head how unlike a picture is to what it learned, shape (N, heads).

        Row i belongs to ``batch[i]``. A network counts as one head.
        """


@dataclass(frozen=True)
class Parts:
    """
    What a model of the store is made of.

    Attributes:
        tag: The BentoML tag.
        network: The Keras model.
        preprocess: Picture to network input, with a batch axis of 1.
        postprocess: The network's output for one picture to its named probabilities.
        custom: All custom objects, by name; none for a model of ours.
        independent: Several classes may hold at once.
        familiar: What it has learned, by the features of its last layer; None where that is not known.
        temperature: What its probabilities are brought to, after its own `postprocess`; None leaves them as they are.
    """

    tag: str
    network: Any
    preprocess: Callable[[Image.Image], Any]
    postprocess: Callable[[Any], Any]
    custom: Mapping[str, Any] = field(default_factory=dict)
    independent: bool = False
    familiar: Familiar | None = None
    temperature: float | None = None


class Classifier:
    """
    One loaded model; lives until another one is live, and is safe to share between threads.

    Attributes:
        tag: The BentoML tag, which is the model version everywhere.
        network: The Keras model.
        classes: K class names, in the order of the columns of `probabilities`.
        vocabulary: These classes, for every control.
        input_shape: Shape of one prepared picture, without the batch axis.
    """

    base: str | None = None

    def __init__(self, parts: Parts) -> None:
        self.tag = parts.tag
        self.network = parts.network
        self._preprocess = parts.preprocess
        self._familiar = parts.familiar
        self._temperature = parts.temperature
        forward = traced(parts.network if parts.familiar is None else _with_features(parts.network))
        self._forward = SharedPasses(forward)
        probe = prepared(self.tag, parts.preprocess, Image.new("RGB", (128, 128)))
        self.input_shape = probe.shape[1:]
        probes = [probe, self._alike(prepared(self.tag, parts.preprocess, _noise()))]
        outputs = _outputs(self.tag, forward, np.concatenate(probes))
        self._answers = _Answers(parts, outputs if self._familiar is None else outputs[0])
        self.classes = self._answers.classes
        self.vocabulary = Vocabulary(self.classes)

    def key(self, data: bytes) -> None:
        """No picture is remembered."""

    def remembered(self, key: bytes) -> None:
        """No picture is remembered."""

    def prepare(self, picture: Image.Image, key: bytes | None = None) -> NDArray[np.float32]:  # noqa: ARG002
        """
        One picture as the network wants it, by the model's own `preprocess`.

        Returns:
            Shape (1, *input_shape), float32.

        Raises:
            ModelLoadError: `preprocess` gave another shape than for other pictures.
        """
        return self._alike(prepared(self.tag, self._preprocess, picture))

    def _alike(self, array: NDArray[np.float32]) -> NDArray[np.float32]:
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
            once where it has a method ``batch`` from outputs (N, K) to probabilities (N, K);
            brought to a temperature where somebody has calibrated the model.

        Raises:
            ModelError: `postprocess` failed, or gave something else than probabilities of these classes.
        """
        return self.answers(batch)[0]

    def answers(self, batch: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """
        What `probabilities` gives, and how unlike pictures are to what it learned, shape (N, 1): 0 if it cannot tell.

        Raises:
            ModelError: As for `probabilities`.
        """
        outputs = self._forward(batch)
        strange: NDArray[np.float64] = np.zeros((len(batch), 1))
        if self._familiar is not None:
            outputs, features = outputs
            strange = self._familiar.strangeness(unit(features))[:, None]
        rows = self._answers.rows(outputs, len(batch))
        return (rows if self._temperature is None else tempered(rows, self._temperature)), strange


class _Answers:
    """
    A model's own `postprocess`: from a network's outputs to a row of numbers for each picture.

    What a stranger's postprocess gives is checked, each time; rows with a number that is not finite are left to
    whoever asks, for they cost one task only.
    """

    def __init__(self, parts: Parts, outputs: Any) -> None:
        """
        Args:
            parts: Of the model.
            outputs: The network's, for two pictures.

        Raises:
            ModelLoadError: The postprocess does not fit to them.
        """
        self._tag, self._postprocess, self._independent = parts.tag, parts.postprocess, parts.independent
        self._error: type[ModelError] = ModelLoadError
        self._outputs = _shapes(rows_of(outputs, 0, 1))
        width = outputs.shape[1] if isinstance(outputs, np.ndarray) and outputs.ndim == 2 else 0
        self._ours = isinstance(parts.postprocess, Postprocess)
        self._whole: Callable[[Any], Any] | None = None
        self._keys = tuple(self._given(rows_of(outputs, 0, 1)))
        self.classes = tuple(self._names(self._keys))
        if width > 1 and len(self.classes) != width:
            raise self._error(
                f"The network of {self._tag} gives {width} numbers and its postprocess names {len(self.classes)} "
                "classes; they must be as many. Save the network with the class names it was trained on."
            )
        rows, self._whole = self.rows(outputs, 2), getattr(parts.postprocess, "batch", None)
        if not self._ours:
            found = self._at_once(outputs, rows.shape)
            if found is None or not np.allclose(found, rows, atol=EDGE, equal_nan=True):
                self._whole = None  # a stranger's method that is called the same
        self._error = ModelError

    def rows(self, outputs: Any, count: int) -> NDArray[np.float64]:
        """
        Probabilities, shape (N, K).

        Args:
            outputs: The network's, for N pictures.
            count: N.

        Raises:
            ModelError: The postprocess failed on a picture, or broke its rule.
        """
        rows = self._at_once(outputs, (count, len(self.classes)))
        if rows is None:
            rows = self._table([self._given(rows_of(outputs, row, row + 1)) for row in range(count)])
        return rows if self._ours else self._checked(rows)

    def _at_once(self, outputs: Any, shape: tuple[int, ...]) -> NDArray[np.float64] | None:
        """What the method `batch` of a postprocess gives, if it has one; None where it does not give this shape."""
        if not callable(self._whole):
            return None
        try:
            found = np.asarray(self._whole(outputs), np.float64)
        except Exception as error:
            if self._ours:
                raise self._error(str(error)) from error
            return None
        return found if found.shape == shape else None

    def _given(self, outputs: Any) -> Mapping[Any, Any]:
        """The probabilities of one picture, as the postprocess names them."""
        try:
            answer = self._postprocess(outputs)
        except (Exception, SystemExit) as error:
            found = cause(error)
            why = f"{type(error).__name__}: {found.what}" if found else type(error).__name__
            remedy = f"{found.remedy}. " if found else ""
            raise self._error(
                f"postprocess of {self._tag} failed on the network's output of {self._outputs} for one picture: {why}. "
                f"{remedy}It must give {ANSWER}."
            ) from error
        given = answer.get("probabilities") if isinstance(answer, dict | Mapping) else None
        if isinstance(given, dict | Mapping) and given:
            return given
        if not isinstance(answer, Mapping):
            seen = of_type(answer)
        elif "probabilities" not in answer:
            seen = f"a dict with the keys {some(map(str, answer))}" if answer else "an empty dict"
        else:
            seen = f"{of_type(given)} as probabilities" if not isinstance(given, Mapping) else "no class at all"
        raise self._error(f"postprocess of {self._tag} must give {ANSWER}, got {seen}. Let it return such a dict.")

    def _table(self, answers: Sequence[Mapping[Any, Any]]) -> NDArray[np.float64]:
        """The numbers of several pictures in the order of the classes, which a postprocess may name in any."""
        try:
            found = np.array([[each[key] for key in self._keys] for each in answers])
        except Exception:  # noqa: BLE001 - other names, or numbers in a form that numpy does not take as one
            found = np.empty(0)
        alike = all(len(each) == len(self._keys) for each in answers)
        if alike and found.dtype.kind in "fiub" and found.shape == (len(answers), len(self._keys)):
            return found.astype(np.float64, copy=False)
        return np.array([self._row(each) for each in answers])

    def _row(self, given: Mapping[Any, Any]) -> list[float]:
        """The numbers of one picture, whatever their form; says what is wrong with them."""
        named = dict(zip(self._names(given), given.values(), strict=True))
        if set(named) != set(self.classes):
            raise self._error(
                f"postprocess of {self._tag} must name the same classes for every picture; it named "
                f"{some(self.classes)} for one and {some(named)} for another. Let it give all of them each time, "
                "also those with a probability of 0."
            )
        numbers = {name: _number(value) for name, value in named.items()}
        for name, number in numbers.items():
            if number is None:
                value = named[name]
                seen = short(value) if isinstance(value, str) else of_type(value)
                raise self._error(
                    f"postprocess of {self._tag} must give a number for each class, got {seen} for {short(name)}. "
                    "Turn it into one with float()."
                )
        return [float(numbers[name] or 0.0) for name in self.classes]

    def _names(self, keys: Sequence[Any] | Mapping[Any, Any]) -> list[str]:
        """Class names as texts; they may be numbers."""
        names = [key.decode(errors="replace") if isinstance(key, bytes) else str(key) for key in keys]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise self._error(
                f"postprocess of {self._tag} must give each class another name, and {short(twice)} is there twice. "
                "Let it use texts as names, or numbers, not both."
            )
        return names

    def _checked(self, rows: NDArray[np.float64]) -> NDArray[np.float64]:
        """Rows of probabilities, with what was rounded beyond 0 and 1 taken back to there; the usual takes 10 µs."""
        if rows.min() >= 0 and rows.max() <= 1 and (self._independent or abs(rows.sum(axis=1) - 1).max() <= SUM_OFF):
            return rows
        with np.errstate(invalid="ignore"):
            broken = (rows < -EDGE).any(axis=1) | (rows > 1 + EDGE).any(axis=1)
            if not self._independent:
                broken |= np.abs(rows.sum(axis=1) - 1) > SUM_OFF
        if broken.any() and (broken := broken & np.isfinite(rows).all(axis=1)).any():
            row = rows[int(broken.argmax())]
            one = len(row) == 1
            raise self._error(
                f"postprocess of {self._tag} must give probabilities, numbers from 0 to 1 that are 1 together; it gave "
                f"{row.min():.4g} to {row.max():.4g}, together {row.sum():.4g}. "
                + ("Let it give two classes, p and 1 - p. " * one)
                + "Let it end with softmax where the network gives logits, and divide percents by 100; where several "
                f'classes may hold at once, save the model with metadata={{"{INDEPENDENT}": True}}.'
            )
        return np.where(np.isfinite(rows), np.clip(rows, 0.0, 1.0), rows)


class NetworkFeatures:
    """
    What the last layer of a model's network makes its numbers from, as an embedder gives it.

    Attributes:
        name: The model's tag.
        width: D.

    """

    def __init__(self, classifier: Classifier) -> None:
        """
        Raises:
            ModelLoadError: The network does not end in one Dense layer.
        """
        import keras

        self.name = classifier.tag
        self.prepare = classifier.prepare
        last = next(iter(getattr(classifier.network, "layers", ())[-1:]), None)
        if not isinstance(last, keras.layers.Dense):
            raise ModelLoadError(f"The network of {self.name} has no features, as it does not end in a Dense layer.")
        try:
            alone = [each is last.output for each in classifier.network.outputs] == [True]
            before = keras.Model(classifier.network.inputs, last.input)
            _, self.width = before.output_shape
        except Exception as error:  # Keras raises whatever its layers raise
            raise ModelLoadError(
                f"The network of {self.name} has no features that can be reached ({type(error).__name__})."
            ) from error
        if not alone:
            raise ModelLoadError(
                f"The network of {self.name} has no features, as its last Dense layer does not give all its outputs."
            )
        self._forward = SharedPasses(traced(before))

    def vectors(self, batch: NDArray[np.float32]) -> NDArray[np.float32]:
        """Shape (N, D), of pictures as the model prepares them."""
        return np.asarray(self._forward(batch), np.float32)


class Said:
    """A model's own probabilities, as an embedder gives features."""

    def __init__(self, classifier: Classifier) -> None:
        self.name = f"{classifier.tag} probabilities"
        self.width = len(classifier.classes)
        self.prepare = classifier.prepare
        self._probabilities = classifier.probabilities

    def vectors(self, batch: NDArray[np.float32]) -> NDArray[np.float32]:
        """Shape (N, K), of pictures as the model prepares them."""
        return self._probabilities(batch).astype(np.float32)


def load(tag: str, folder: Path) -> Classifier:
    """
    Load a model of the BentoML store with its own `preprocess` and `postprocess`.

    Raises:
        ModelLoadError: As for `read_parts`; or its parts do not work together.
    """
    classifier = Classifier(read_parts(tag, folder))
    logger.info("Loaded %s: %d classes, input %s", tag, len(classifier.classes), classifier.input_shape)
    return classifier


def read_parts(tag: str, folder: Path) -> Parts:
    """
    Read a model of the BentoML store from its files.

    Takes seconds at the first call of a process, which starts TensorFlow. Custom objects are pickles and run code:
    the store is trusted, nothing else is. Those of our own networks are not read, as their description says enough.

    Args:
        tag: Its tag.
        folder: Where it lies in the store.

    Raises:
        ModelLoadError: The model cannot be read here, or is not a classifier as
            docs/model.md describes it; the message says what to do.
    """
    saved = check_files(tag, folder)
    own = own_hooks(saved)
    if own is not None:
        return Parts(tag, saved.network({}), *own, familiar=replay.familiar(tag))
    custom = saved.custom_objects()
    missing = [name for name in HOOKS if not callable(custom.get(name))]
    if missing:
        raise ModelLoadError(_no_hooks(tag, missing))
    independent = bool(saved.metadata.get(INDEPENDENT, MADE_FROM in saved.metadata))  # earlier exports did not say it
    return Parts(tag, saved.network(custom), custom["preprocess"], custom["postprocess"], custom, independent,
                 temperature=None if independent else temperature_in(saved))  # fmt: skip


def check_files(tag: str, folder: Path) -> Saved:
    """
    A model's folder, or a refusal at once, without TensorFlow, of one that can never be served.

    Raises:
        ModelLoadError: Heads without a network, no custom objects or those of another Python, or no one network
            that Keras 3 can load.
    """
    saved = Saved(tag, folder)
    if (folder / HEADS_FILE).is_file():
        raise ModelLoadError(
            f"{tag} holds heads on features, and no network, so it can only be served by this backend as it is. "
            "Name a model that was saved with bentoml.keras.save_model."
        )
    if own_hooks(saved) is None:
        if not (folder / CUSTOM).is_file():
            raise ModelLoadError(_no_hooks(tag, HOOKS))
        saved.check_python()
    saved.network_path()
    return saved


def classes_in(saved: Saved) -> tuple[str, ...] | None:
    """The classes of a network that we have saved or exported, by its description; others say them once they run."""
    own = own_hooks(saved)
    if own is not None:
        return own[1].classes
    said = saved.metadata.get("classes") if MADE_FROM in saved.metadata else None
    return tuple(map(str, said)) if isinstance(said, list) else None


def temperature_in(saved: Saved) -> float | None:
    """What a model's probabilities are to be brought to; None for one as it came, or whose postprocess does so."""
    told = Manifest.of(saved.metadata).calibration
    return None if told is None or told.inside else told.temperature


def own_hooks(saved: Saved) -> tuple[Preprocess, Postprocess] | None:
    """Ours, where the network is ours; one that an earlier release has taught sees what its first parent saw."""
    told, seen = saved.metadata, {""}
    found, classes = planets.hooks(told), told.get("classes")
    if found is not None or not isinstance(classes, list):
        return found
    while found is None and planets.is_taught(told):
        name, _, number = str(told.get("parent")).partition(":")
        if number in seen or not re.fullmatch(r"[\w.-]+", number) or name != saved.folder.parent.name:
            return None
        seen.add(number)
        parent = Saved(f"{name}:{number}", saved.folder.with_name(number))
        if not parent.folder.is_dir():  # removed since
            found = (Preprocess(), Postprocess(())) if number.startswith("default-") else None
            break
        told = parent.metadata
        found = planets.hooks(told)
    return None if found is None else (found[0], Postprocess(tuple(map(str, classes))))


def _no_hooks(tag: str, missing: Sequence[str]) -> str:
    return (
        f"{tag} has no custom object {' and no '.join(missing)}. Save it again with "
        'bentoml.keras.save_model(name, model, custom_objects={"preprocess": …, "postprocess": …}).'
    )


def _noise() -> Image.Image:
    """A picture that is unlike the other probe, and the same each time."""
    return Image.fromarray(np.random.default_rng(1).integers(0, 256, (128, 128, 3), np.uint8))


def _with_features(network: Any) -> Any:
    """The same network, that also gives what its last layer makes its numbers from."""
    import keras

    return keras.Model(network.inputs, [network.output, network.layers[-1].input])


def _outputs(tag: str, forward: Callable[[NDArray[np.float32]], Any], probes: NDArray[np.float32]) -> Any:
    """What a network gives for two pictures: an array, or lists and dicts of arrays, of two rows each."""
    try:
        outputs = forward(probes)
    except Exception as error:
        raise ModelLoadError(_no_pass(tag, forward, probes, error)) from error
    arrays = flat(outputs)
    if not arrays or not all(
        isinstance(array, np.ndarray) and array.dtype.kind not in "OSU" and array.shape[:1] == (2,) for array in arrays
    ):
        raise ModelLoadError(
            f"The network of {tag} must give one row of numbers for each picture, and for two pictures it gave "
            f"{_shapes(outputs)}. Let its outputs keep the batch axis, which is the first."
        )
    return outputs


def _no_pass(
    tag: str, forward: Callable[[NDArray[np.float32]], Any], probes: NDArray[np.float32], error: Exception
) -> str:
    found = cause(error)
    if found is not None:
        return f"The network of {tag} fails on a picture: {found.what}. {found.remedy}."
    try:
        forward(probes[:1])
    except Exception:  # noqa: BLE001 - the one before is told
        return (
            f"The network of {tag} does not take what its preprocess gives, shape {probes[:1].shape}: "
            f"{type(error).__name__}. Save the network together with the preprocess it was trained with."
        )
    return (
        f"The network of {tag} must take several pictures at once, and takes one only ({type(error).__name__}). "
        "Save it with a batch axis of any length, as keras.Input(shape) makes it."
    )


def _shapes(outputs: Any) -> str:
    """What a network gives, for a sentence."""
    shapes = [str(getattr(array, "shape", of_type(array))) for array in flat(outputs)]
    form = "shape " if isinstance(outputs, np.ndarray) else f"{of_type(outputs)} of shapes "
    return form + ", ".join(shapes[:8]) + ", …" * (len(shapes) > 8)


def _number(value: Any) -> float | None:
    """A number in any form, such as a tensor without axes; None if it is none."""
    try:
        array = np.asarray(value.numpy() if hasattr(value, "numpy") else value)  # numpy does not know every tensor
        return None if array.size != 1 or array.dtype.kind in "cSUMm" else float(array.reshape(()).item())
    except Exception:  # noqa: BLE001 - strangers' types raise what they like
        return None
