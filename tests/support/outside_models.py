"""Models as users save them with BentoML, small enough that a test saves some of them in a second."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bentoml
import keras
import numpy as np
import yaml
from PIL import Image

from celestial_backend.settings import MODEL_NAME, Settings

layers = keras.layers
NAMES = ("red", "green", "blue")


def preprocess(picture: Image.Image) -> Any:
    """The colour in the middle, each of three as a share of 255."""
    return np.array([picture.convert("RGB").getpixel((picture.width // 2, picture.height // 2))]) / 255


def hooks(**custom: Any) -> dict[str, Any]:
    """Custom objects whose `preprocess` is pickled whole, as a script's is."""

    def middle(picture: Image.Image) -> Any:
        return np.array([picture.convert("RGB").getpixel((picture.width // 2, picture.height // 2))]) / 255

    def shares(outputs: Any) -> dict[str, Any]:
        row = np.exp(outputs[0]) / np.exp(outputs[0]).sum()
        return {
            "prediction": ("red", "green", "blue")[int(row.argmax())],
            "probabilities": dict(zip(("red", "green", "blue"), row.tolist(), strict=True)),
        }

    return {name: value for name, value in ({"preprocess": middle, "postprocess": shares} | custom).items() if value}


def network(*last: Any) -> Any:
    """From a colour to logits, five times its shares, or to what `last` makes of these."""
    model = keras.Sequential([layers.Input((3,)), layers.Dense(3, use_bias=False, name="colours"), *last])
    model.get_layer("colours").set_weights([5 * np.eye(3)])
    return model


def save(model: Any = None, *, metadata: dict[str, Any] | None = None, **custom: Any) -> str:
    """Save a network as docs/model.md says; gives its tag."""
    model = network() if model is None else model
    return str(bentoml.keras.save_model(MODEL_NAME, model, custom_objects=hooks(**custom), metadata=metadata).tag)


def save_files(write: Callable[[Path], object], **custom: Any) -> str:
    """Save what `write` puts into the model's folder with `bentoml.models.create`; gives its tag."""
    with bentoml.models.create(MODEL_NAME, custom_objects=hooks(**custom)) as model:
        write(Path(model.path))
    return str(model.tag)


def folder_of(settings: Settings, tag: str) -> Path:
    return settings.bentoml_home.joinpath("models", *tag.split(":"))


def describe(folder: Path, **context: Any) -> None:
    """Let `model.yaml` tell something else of what has saved the model; None takes a line away."""
    path = folder / "model.yaml"
    told = yaml.safe_load(path.read_text())
    told["context"] = {name: each for name, each in (told["context"] | context).items() if each is not None}
    path.write_text(yaml.safe_dump(told))


class Does:
    """Does something as soon as it is unpickled."""

    def __init__(self, what: Callable[..., Any], *arguments: Any) -> None:
        self.what = what, arguments

    def __reduce__(self) -> Any:
        return self.what


def deadly() -> bytes:
    """A file of custom objects that ends the process which reads it, as bytecode of another Python does."""
    return pickle.dumps({"preprocess": Does(os._exit, 77), "postprocess": Does(os._exit, 77)})


def telling() -> bytes:
    """A file of custom objects that tells the test which reads it."""
    return pickle.dumps({"preprocess": Does(divmod, 1, 0), "postprocess": Does(divmod, 1, 0)})
