"""
A model's folder in the BentoML store, as it is read here: its description, its custom objects, its network.

Custom objects are pickles that hold Python's bytecode, and so are Lambda layers. Another minor version of Python that
reads them does not raise an error, it crashes. So the description, which is plain text, is read first, and nothing is
unpickled before its `python_version` was compared. BentoML itself is not needed, and takes a second to import.
TensorFlow is started here, beside other threads, and called without Keras's detours.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from celestial_backend.errors import ModelLoadError
from celestial_backend.labels import short, some
from celestial_backend.logs import hushed

DESCRIPTION, CUSTOM, CONFIG, WEIGHTS = "model.yaml", "custom_objects.pkl", "config.json", "model.weights.h5"
HERE = f"{sys.version_info.major}.{sys.version_info.minor}"
MINOR = re.compile(r"(\d{1,2}\.\d{1,2})(?:[.\-+ a-z].*)?", re.DOTALL)
NAME = re.compile(r"[A-Za-z_][\w.]{0,99}")
CAUSES_MAX = 20  # errors behind an error that are looked at
FILES_MAX = 10_000
IN_PLACE_OF = {"tensorflow": "tensorflow-cpu"}  # the same module, without code for graphics cards
OTHER_NETWORKS = (
    ("saved_model.pb", "a SavedModel of TensorFlow",
     "Load it with the Keras 2 that made it, and save it as one file model.h5"),
    ("*.weights.h5", "weights without their network", 'Save the whole network: model.save("model.keras")'),
    ("*.onnx", "a network for ONNX", ""),
    ("*.tflite", "a network for TensorFlow Lite", "Save the Keras network that it was made from"),
    ("*.pt", "a network for PyTorch", ""),
    ("*.pth", "a network for PyTorch", ""),
    ("*.safetensors", "weights without their network", ""),
    ("*.pkl", "a pickle, as scikit-learn's models are", ""),
)  # fmt: skip


def traced(network: Any) -> Callable[[NDArray[np.float32]], Any]:
    """
    The forward pass as one graph: `network.predict` costs some 75 ms a call, this 1 to 2 ms.

    It gives what `network.predict` gives: an array, or lists and dicts of arrays where a network has several outputs.
    """
    import tensorflow as tf

    graph = tf.function(lambda batch: network(batch, training=False), reduce_retracing=True)

    def forward(batch: NDArray[np.float32]) -> Any:
        outputs = graph(tf.convert_to_tensor(batch))
        return outputs.numpy() if isinstance(outputs, tf.Tensor) else tf.nest.map_structure(np.asarray, outputs)

    return forward


def version(package: str) -> str:
    """
    The version of a package, or of the one that is installed in its place.

    Raises:
        PackageNotFoundError: Neither is.
    """
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return metadata.version(IN_PLACE_OF.get(package, package))


def open_tensorflow() -> None:
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
    with hushed():
        for name in ("libtensorflow_framework.so.2", "libtensorflow_cc.so.2"):
            library = Path(found.origin).parent / name
            if library.is_file():
                linker.dlopen(str(library).encode(), ctypes.c_int(os.RTLD_NOW | os.RTLD_LOCAL))


@dataclass(frozen=True)
class Cause:
    """What lies behind an error, as part of a sentence without a capital, and what helps, as a sentence."""

    what: str
    remedy: str


@dataclass(frozen=True)
class Saved:
    """
    A folder that BentoML has saved a model into; nothing is read before it is asked for.

    Attributes:
        whose: What the model is called in sentences.
        folder: Holds `DESCRIPTION`.
        other: What there is to be done without this model, as the end of a sentence.
    """

    whose: str
    folder: Path
    other: str = "serve another model with CELESTIAL_MODEL"

    @cached_property
    def description(self) -> Mapping[str, Any]:
        """
        What `model.yaml` says; not to be changed.

        Raises:
            ModelLoadError: It cannot be read.
        """
        path = self.folder / DESCRIPTION
        try:
            return described(path, path.stat().st_mtime_ns)
        except (OSError, ValueError) as error:
            raise ModelLoadError(
                f"The description of {self.whose} cannot be read from the BentoML store ({type(error).__name__}). "
                f"Remove it with `bentoml models delete {self.whose.split()[-1]}` and save it again."
            ) from error

    @property
    def metadata(self) -> Mapping[str, Any]:
        """What whoever saved it has said of it."""
        found = self.description.get("metadata")
        return found if isinstance(found, dict) else {}

    @property
    def _context(self) -> Mapping[str, Any]:
        found = self.description.get("context")
        return found if isinstance(found, dict) else {}

    @property
    def of_this_python(self) -> bool:
        """Whether the same minor version of Python saved it."""
        return self._python == HERE

    @property
    def _python(self) -> str | None:
        found = MINOR.fullmatch(str(self._context.get("python_version", "")))
        return found[1] if found else None

    def check_python(self) -> None:
        """
        Refuse what another minor version of Python has pickled.

        Raises:
            ModelLoadError: Another one has saved it, or nobody knows which.
        """
        if self._python is None:
            said = self._context.get("python_version")
            seen = "says none" if said is None else f"says {short(str(said))}"
            raise ModelLoadError(
                f"model.yaml of {self.whose} must say which Python saved it (python_version), as another one cannot "
                f"read its custom objects; it {seen}. Save the model again under Python {HERE}, or {self.other}."
            )
        if not self.of_this_python:
            raise ModelLoadError(
                f"Python {self._python} has saved {self.whose}, and this is Python {HERE}, which cannot read its "
                f"custom objects. Save the model again under Python {HERE}, run the backend under Python "
                f"{self._python}, or {self.other}."
            )

    def custom_objects(self) -> dict[str, Any]:
        """
        What was saved with the network, by name; runs code of whoever saved it.

        Raises:
            ModelLoadError: Another Python has saved it, or it cannot be read.
        """
        path = self.folder / CUSTOM
        if not path.is_file():
            return {}
        self.check_python()
        import cloudpickle

        try:
            with path.open("rb") as file:
                found = cloudpickle.load(file)
        except (Exception, SystemExit) as error:  # a pickle may raise anything
            raise ModelLoadError(self.not_loaded("custom objects", error)) from error
        if not isinstance(found, dict):
            raise ModelLoadError(
                f"The custom objects of {self.whose} must be a dict, got {of_type(found)}. Save it again with "
                'custom_objects={"preprocess": …, "postprocess": …}.'
            )
        return found

    def network_path(self) -> Path:
        """
        The folder or the file that Keras can load; takes no TensorFlow.

        Raises:
            ModelLoadError: There is none, or one of several.
        """
        if _is_network(self.folder):
            return self.folder
        found = list(_networks(self.folder))
        if len(found) > 1:
            raise ModelLoadError(
                f"The folder of {self.whose} must hold one network, and holds {len(found)}: "
                f"{some(str(path.relative_to(self.folder)) for path in found)}. Save it again with one of them."
            )
        if not found:
            raise ModelLoadError(self._no_network())
        return found[0]

    def network(self, custom: Mapping[str, Any]) -> Any:
        """
        The Keras network, not compiled: it is not trained here, so its loss and optimizer are not needed.

        Takes seconds at the first call of a process, which starts TensorFlow. Lambda layers are loaded where the same
        Python has saved them.

        Args:
            custom: Its custom objects.

        Raises:
            ModelLoadError: Keras cannot load it.
        """
        path = self.network_path()
        open_tensorflow()
        import keras

        known, safe = dict(custom), not self.of_this_python
        while True:
            try:
                return keras.models.load_model(path, custom_objects=known, compile=False, safe_mode=safe)
            except (Exception, SystemExit) as error:  # Keras raises whatever its layers raise
                package, _, name = _missing(error).rpartition(">")
                if package and name in known and f"{package}>{name}" not in known:
                    known[f"{package}>{name}"] = known[name]  # as `register_keras_serializable` names it
                    continue
                if safe and "deserialization of a" in _texts(error):
                    self.check_python()
                raise ModelLoadError(self.not_loaded("network", error)) from error

    def not_loaded(self, part: str, error: BaseException) -> str:
        """The sentences for a part that cannot be loaded."""
        found = cause(error)
        if found is not None:
            return f"The {part} of {self.whose} cannot be loaded: {found.what}. {found.remedy}, or {self.other}."
        frameworks = self._context.get("framework_versions")
        there = {**(frameworks if isinstance(frameworks, dict) else {}), "Python": self._context.get("python_version")}
        saved_with = ", ".join(f"{name} {number}" for name, number in there.items())
        here = f"tensorflow {version('tensorflow')}, Python {sys.version.split()[0]}"
        return (
            f"The {part} of {self.whose} cannot be loaded ({type(error).__name__}). It was saved with {saved_with}; "
            f"here run {here}. Save it again with these versions, or {self.other}."
        )

    def _no_network(self) -> str:
        wanted = f"({CONFIG} and {WEIGHTS}, or one .keras or .h5 file)"
        for pattern, what, remedy in OTHER_NETWORKS:
            if any(path.name != CUSTOM for path in self.folder.rglob(pattern)):
                return (
                    f"The folder of {self.whose} does not hold a Keras 3 network {wanted}, but {what}. "
                    f"{remedy or 'Only networks of Keras can be served: save one'}, or {self.other}."
                )
        return (
            f"The folder of {self.whose} does not hold a Keras 3 network {wanted}. "
            "Save it again with bentoml.keras.save_model under Keras 3.4 or later."
        )


@lru_cache(maxsize=256)
def described(path: Path, _written_ns: int) -> dict[str, Any]:
    """
    A description of BentoML's, read once as long as the file stays as it is.

    Raises:
        OSError, ValueError: It cannot be read.
    """
    return description_in(path.read_bytes())


def description_in(data: bytes) -> dict[str, Any]:
    """
    A description of BentoML's, from the bytes of its file.

    Raises:
        ValueError: It is none.
    """
    try:
        found = yaml.safe_load(data)
    except (yaml.YAMLError, LookupError, AttributeError, TypeError, RecursionError) as error:  # by odd tags and depths
        raise ValueError(str(error)[:200]) from error
    if isinstance(found, dict):
        return found
    raise ValueError(f"it must be a mapping, and is {of_type(found)}")


def _is_network(folder: Path) -> bool:
    return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()


def _networks(folder: Path) -> Iterator[Path]:
    """What Keras may be able to load, in the order of the names: files, and folders that hold config and weights."""
    whole: list[Path] = []
    for path in sorted(folder.rglob("*"))[:FILES_MAX]:
        if any(part in whole for part in path.parents):
            continue
        if path.is_dir() and _is_network(path):
            whole.append(path)
            yield path
        elif path.is_file() and path.suffix in (".keras", ".h5", ".hdf5") and not path.name.endswith(".weights.h5"):
            yield path


def of_type(value: object) -> str:
    """The type of a value, for a sentence."""
    name = type(value).__name__
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name[:40]}"


def cause(error: BaseException) -> Cause | None:
    """
    What is behind an error that a stranger's code has raised, where that is known.

    Only names are taken out of an error, never its text, which may hold paths and whole configurations.
    """
    for each in _chain(error):
        found = _import_cause(each) or _name_cause(each) or _keras_cause(str(each))
        if found is not None:
            return found
    return None


def _import_cause(error: BaseException) -> Cause | None:
    if isinstance(error, ModuleNotFoundError):
        name = error.name or _match(r"No module named '([\w.]+)'", str(error))
        if name and NAME.fullmatch(name):
            return Cause(
                f"it needs the Python module {name}, which is not installed",
                f"Install it where the backend runs, add the folder that holds it to PYTHONPATH, save the model "
                f"again with external_modules=[{name.partition('.')[0]}]",
            )
    if isinstance(error, AttributeError):
        found = re.search(r"Can't get attribute '([\w.]{1,99})' on <module '([\w.]{1,99})'", str(error))
        if found:
            return Cause(
                f"it needs {found[1]} of the Python module {found[2]}, which has no such name here",
                f"Install the {found[2].partition('.')[0]} that the model was saved with",
            )
    return None


def _name_cause(error: BaseException) -> Cause | None:
    if isinstance(error, NameError):
        name = error.name or _match(r"name '(\w{1,99})' is not defined", str(error))
        if name and NAME.fullmatch(name):
            return Cause(
                f"a function of it uses the name {name}, which is not known where it is loaded",
                f"Import {name} inside that function; in place of a Lambda layer's lambda take a function with a "
                "name, and save it as a custom object under that name",
            )
    return None


def _keras_cause(text: str) -> Cause | None:
    name = _missing_in(text)
    if name:
        own = name.rpartition(">")[2]
        return Cause(
            f"it needs {own}, which Keras does not know and its custom objects do not hold",
            f'Save it again with custom_objects={{"preprocess": …, "postprocess": …, "{own}": {own}}}',
        )
    if "could not automatically infer the shape of the Lambda's output" in text:
        return Cause("a Lambda layer of it does not say what shape it gives", "Give that layer an output_shape")
    if "No model config found" in text:
        return Cause("the file holds weights without their network", 'Save the whole: model.save("model.keras")')
    return None


def _missing(error: BaseException) -> str:
    """The class or function that Keras does not know, as Keras calls it; empty if that is not the matter."""
    return next((name for each in _chain(error) if (name := _missing_in(str(each)))), "")


def _missing_in(text: str) -> str:
    function = _match(r"Could not locate function '([\w.>]{1,99})'", text)
    registered = _match(r"Could not locate class '[\w.>]{1,99}'.*'registered_name': '([\w.>]{1,99})'", text)
    plain = _match(r"(?:Could not locate|Could not deserialize) class '([\w.>]{1,99})'", text)
    return function or registered or plain or _match(r"Unknown [\w ]{1,40}: '([\w.>]{1,99})'", text)


def _match(pattern: str, text: str) -> str:
    found = re.search(pattern, text, re.DOTALL)
    return found[1] if found else ""


def _chain(error: BaseException) -> list[BaseException]:
    """An error and those behind it, the innermost first, as it knows best."""
    found: list[BaseException] = []
    each: BaseException | None = error
    while each is not None and each not in found and len(found) < CAUSES_MAX:
        found.append(each)
        each = each.__cause__ or each.__context__
    return found[::-1]


def _texts(error: BaseException) -> str:
    return " ".join(str(each) for each in _chain(error))
