"""Embedders by name: the one inside, and Keras networks of the BentoML store that an operator brings."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from celestial_backend.errors import ModelLoadError, ModelNotFoundError
from celestial_backend.features.cache import rounded
from celestial_backend.features.embedder import Embedder, Lite0
from celestial_backend.models.passes import SharedPasses
from celestial_backend.models.saved import CONFIG, WEIGHTS, Saved, cause, traced
from celestial_backend.models.saved import CUSTOM as HOOKS
from celestial_backend.pictures.hooks import Middle
from celestial_backend.settings import Settings

LITE0 = "lite0"

_opened: dict[tuple[str, Path], Embedder] = {}
_opening = threading.Lock()

KEPT_AS = "celestial_embedder"  # the name in the store of networks that the command `features add` has made
SCALING = "preprocessing"  # in the metadata: the module of `keras.applications` that brings pixels to their range
ADDRESS = "shared_object_id"  # in Keras's config: another one in each process
USUAL_PX = 224  # where a network takes pictures of any size
BACK = "or unset CELESTIAL_EMBEDDER"
Prepare = Callable[[Image.Image], Any]


def open_embedder(settings: Settings) -> Embedder:
    """The embedder that the settings name, the same one for the whole process; nothing is read before it is used."""
    wanted = (settings.embedder, settings.bentoml_home)
    with _opening:
        if wanted not in _opened:
            _opened[wanted] = Lite0() if settings.embedder.lower() == LITE0 else StoredNetwork(*wanted)
        return _opened[wanted]


@dataclass(frozen=True)
class Loaded:
    """A network that gives (N, D), and what makes its input of a picture, with a batch axis of 1."""

    network: Any
    prepare: Prepare
    forward: Callable[[NDArray[np.float32]], NDArray[np.float32]]
    width: int


class StoredNetwork:
    """
    A Keras network as an embedder, by its BentoML tag or by its name in `keras.applications`.

    It is loaded, and TensorFlow with it, when it is first used.
    """

    def __init__(self, wanted: str, bentoml_home: Path) -> None:
        """
        Args:
            wanted: ``name:version``, or a name that `features add` was given.
            bentoml_home: The folder of the store.
        """
        self._wanted = wanted
        self.tag = wanted if ":" in wanted else f"{KEPT_AS}:{wanted.lower()}"
        self._folder = bentoml_home.joinpath("models", *self.tag.split(":", 1))
        self._naming = threading.Lock()  # the files are read for it, which may be hundreds of megabytes
        self._known_name = ""
        self._lock = threading.Lock()
        self._loaded: Loaded | None = None

    @property
    def name(self) -> str:
        """
        Another one whenever the files of the network differ.

        Raises:
            ModelNotFoundError: It is not in the store.
            ModelLoadError: It is no Keras network, or cannot be read.
        """
        with self._naming:
            if not self._known_name:
                self._known_name = self._name()
            return self._known_name

    @property
    def width(self) -> int:
        """D; the network is loaded for it."""
        return self.loaded().width

    def prepare(self, picture: Image.Image) -> NDArray[np.float32]:
        """
        A picture as the network takes it, by its own custom object `preprocess` if it has one.

        Raises:
            ModelLoadError: As `name`; or it does not work.
        """
        return prepared(f"the embedder {self.tag}", self.loaded().prepare, picture)

    def vectors(self, batch: NDArray[np.float32]) -> NDArray[np.float32]:
        """The vectors of N prepared pictures, shape (N, D), in one forward pass, which other threads may share."""
        return rounded(self.loaded().forward(batch))

    def loaded(self) -> Loaded:
        """
        The network itself.

        Raises:
            ModelNotFoundError, ModelLoadError: As `name`; or it does not give (N, D).
        """
        with self._lock:
            if self._loaded is None:
                known = self.name
                self._loaded = self._load()
                if self._name() != known:
                    raise ModelLoadError(f"The embedder {self.tag} was replaced meanwhile. Start the backend anew.")
            return self._loaded

    def custom_objects(self) -> dict[str, Any]:
        """
        What was saved with the network, by name.

        Raises:
            ModelLoadError: Another Python has saved it, or it cannot be read.
        """
        return self._saved.custom_objects()

    @property
    def _saved(self) -> Saved:
        return Saved(f"the embedder {self.tag}", self._folder, BACK.removeprefix("or "))

    def _name(self) -> str:
        """By what its files hold; dates and addresses in memory, which are in them too, do not matter."""
        if not (self._folder / "model.yaml").is_file():
            raise ModelNotFoundError(self._missing())
        digest = hashlib.sha256(self._scaling().encode())
        try:
            digest.update(_without_addresses((self._folder / CONFIG).read_bytes()))
            for name in (WEIGHTS, *([HOOKS] if (self._folder / HOOKS).is_file() else [])):
                with (self._folder / name).open("rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
        except (OSError, ValueError) as error:
            raise ModelLoadError(
                f"The embedder {self.tag} must be a network in Keras 3's format, and its {CONFIG} and {WEIGHTS} cannot "
                f"be read ({type(error).__name__}). Save it again with bentoml.keras.save_model, {BACK}."
            ) from error
        return f"{self._wanted.lower()}-{digest.hexdigest()[:12]}"

    def _missing(self) -> str:
        there = ", ".join(sorted(path.parent.name for path in self._folder.parent.glob("*/model.yaml"))) or "none"
        if ":" in self._wanted:
            remedy = f"Save it with bentoml.keras.save_model, name one that is there, {BACK}."
        else:
            remedy = f"Make it: python -m celestial_backend features add {self._wanted}; {BACK}."
        return (
            f"CELESTIAL_EMBEDDER names {self._wanted}, and the BentoML store has no {self.tag}"
            f" (of this name: {there}). {remedy}"
        )

    def _scaling(self) -> str:
        try:
            return str(self._saved.metadata.get(SCALING, ""))
        except ModelLoadError as error:
            raise ModelLoadError(
                f"The description of the embedder {self.tag} cannot be read. Make it again, {BACK}."
            ) from error

    def _load(self) -> Loaded:
        hooks = self.custom_objects()
        network = self._saved.network(hooks)
        prepare = hooks.get("preprocess") or Middle(_size(self.tag, network), self._scaling())
        forward = SharedPasses(traced(network))
        probe = prepared(f"the embedder {self.tag}", prepare, Image.new("RGB", (300, 200), "gray"))
        return Loaded(network, prepare, forward, _width(self.tag, forward, probe))


def _without_addresses(config: bytes) -> bytes:
    kept = json.loads(config, object_hook=lambda found: {name: found[name] for name in found if name != ADDRESS})
    return json.dumps(kept, sort_keys=True).encode()


def _size(tag: str, network: Any) -> tuple[int, int]:
    shape = getattr(network, "input_shape", None)
    if not (isinstance(shape, tuple) and len(shape) == 4 and shape[3] == 3):
        raise ModelLoadError(
            f"The embedder {tag} must take pictures (N, H, W, 3), and takes {shape}. Save it with a custom object "
            f"`preprocess` that makes its input of a picture, {BACK}."
        )
    return shape[1] or USUAL_PX, shape[2] or USUAL_PX


def _width(tag: str, forward: Callable[[NDArray[np.float32]], Any], probe: NDArray[np.float32]) -> int:
    try:
        found = np.asarray(forward(np.concatenate([probe, probe])))
    except Exception as error:
        raise ModelLoadError(
            f"The network of the embedder {tag} does not take what is made of a picture, shape {probe.shape} "
            f"({type(error).__name__}). Save it with the `preprocess` that it needs, {BACK}."
        ) from error
    if found.ndim != 2 or len(found) != 2 or not np.isfinite(found).all():
        raise ModelLoadError(
            f"The network of the embedder {tag} must give one row of finite numbers (N, D) for N pictures, and for 2 "
            f"it gave the shape {found.shape}. End it with a pooling layer (pooling=\"avg\"), {BACK}."
        )
    return int(found.shape[1])


def prepared(whose: str, prepare: Prepare, picture: Image.Image) -> NDArray[np.float32]:
    """
    What a custom object `preprocess` makes of a picture, shape (1, …).

    Args:
        whose: The model, for messages.
        prepare: The custom object.
        picture: RGB.

    Raises:
        ModelLoadError: It failed, or gave no batch axis of 1.
    """
    try:
        array = np.asarray(prepare(picture), np.float32)
    except (Exception, SystemExit) as error:
        found = cause(error)
        why = f"{type(error).__name__}: {found.what}. {found.remedy}" if found else type(error).__name__
        raise ModelLoadError(
            f"preprocess of {whose} failed on a {picture.width}x{picture.height} picture: {why}. It must take a PIL "
            "picture and give a float array with a batch axis of 1."
        ) from error
    if array.ndim < 2 or array.shape[0] != 1:
        raise ModelLoadError(
            f"preprocess of {whose} must give an array with a batch axis of 1, got shape {array.shape}. "
            "Add the axis with np.expand_dims(x, axis=0)."
        )
    return array
