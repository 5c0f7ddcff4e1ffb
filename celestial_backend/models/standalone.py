"""
Models that work without this package: exported files with one Keras network and its own code.

A model of heads is made into a network: what makes the features, their length brought to 1, the head. BentoML,
Keras and Pillow are all that the other machine needs.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import yaml
from PIL import Image

from celestial_backend.database import Database
from celestial_backend.errors import ModelError
from celestial_backend.features.embedder import SIDE_PX, convolutions, weights_file
from celestial_backend.labels import some
from celestial_backend.models import headed
from celestial_backend.models.classifier import INDEPENDENT, MADE_FROM, own_hooks, read_parts, temperature_in
from celestial_backend.models.embedders import StoredNetwork, open_embedder
from celestial_backend.models.headed import GENERAL, Head, HeadsModel
from celestial_backend.models.registry import Registry
from celestial_backend.models.saved import CUSTOM, DESCRIPTION, Saved, version
from celestial_backend.models.store import ModelStore
from celestial_backend.pictures import hooks
from celestial_backend.pictures.hooks import Both, Calibrated, EachByItself, Middle, Postprocess
from celestial_backend.planets import network
from celestial_backend.settings import Settings
from celestial_backend.state import reason

ENDING = ".bentomodel"


@dataclass(frozen=True)
class _Source:
    """What makes the features of one space: a picture's input, and a network from that to (N, D)."""

    prepare: Callable[[Image.Image], Any]
    network: Any
    custom: dict[str, Any]


def export(settings: Settings, tag: str, file: Path, control: str | None = None) -> str:
    """
    Write a model of the store to a file that BentoML imports on any machine, without this package.

    Args:
        settings: Say where the store is, and what makes features.
        tag: A model of the store.
        file: Ends in ".bentomodel"; a file that is there is replaced.
        control: Whose head is exported, where the model has several.

    Returns:
        The tag that the file is imported under.

    Raises:
        ModelError: It cannot be exported, the message says why.
    """
    if file.suffix != ENDING:
        raise ModelError(f"An exported model's file must end in {ENDING}, got {file.name}.")
    file = file.resolve()  # BentoML takes a path that is not whole as one below /
    if not file.parent.is_dir():
        raise ModelError(f"{file} cannot be written: there is no folder {file.parent}. Make it, or choose another one.")
    store = ModelStore(settings, Database(settings))
    folder = store.registry.path(tag)
    if not store.registry.holds(tag):
        held = ", ".join(model.tag for model in store.registry.models(tag.partition(":")[0])) or "none of that name"
        raise ModelError(f"The model {tag} is not in the BentoML store, which holds {held}.")
    if not headed.is_headed(folder):
        return _write_network(folder, tag, file)
    model = cast("HeadsModel", store.model(tag))
    base = str(store.registry.describe(tag).base)
    head = _chosen(model, base, control)
    with tempfile.TemporaryDirectory() as place:
        made = _saved(Path(place), settings, model, head, base, store.registry.path(base))
        return _write(Path(place, "store"), made, file)


def _write_network(folder: Path, tag: str, file: Path) -> str:
    """
    Export a network as it is; one of ours that another Python has saved, with code that this Python has pickled.

    One that is calibrated gets a postprocess that does so itself, as nobody else reads our record of it.
    """
    saved = Saved(tag, folder)
    own, temperature = own_hooks(saved), temperature_in(saved)
    if own is None and temperature is not None:
        with tempfile.TemporaryDirectory() as place:
            shutil.copytree(folder, Path(place).joinpath(*tag.split(":")))
            _calibrate_inside(Saved(tag, Path(place).joinpath(*tag.split(":"))), temperature)
            return _write(Path(place), tag, file)
    if own is None or saved.of_this_python:
        return _write(folder.parents[1], tag, file)
    with tempfile.TemporaryDirectory() as place:
        Registry(Path(place)).add(tag, folder, *own, dict(saved.metadata))
        return _write(Path(place, "models"), tag, file)


def _calibrate_inside(saved: Saved, temperature: float) -> None:
    """Write a postprocess that is calibrated into a copy of a model; runs code of whoever saved it."""
    import cloudpickle

    custom = saved.custom_objects()
    custom["postprocess"] = Calibrated(custom["postprocess"], temperature)
    told = dict(saved.description)
    told["metadata"] = {**saved.metadata, "calibration": {**saved.metadata["calibration"], "inside": True}}
    cloudpickle.register_pickle_by_value(hooks)
    try:
        (saved.folder / CUSTOM).write_bytes(cloudpickle.dumps(custom))
    finally:
        cloudpickle.unregister_pickle_by_value(hooks)
    (saved.folder / DESCRIPTION).write_text(yaml.safe_dump(told, sort_keys=False, allow_unicode=True), "utf-8")


def _chosen(model: HeadsModel, base: str, control: str | None) -> Head:
    found = [head for head in model.heads if control in (None, head.control)]
    if len(found) != 1:
        names = some([head.control for head in model.heads])
        raise ModelError(
            f"One file holds one control; {model.tag} has {names}. Name one of them with --control NAME."
        )
    if not found[0].spaces:
        raise ModelError(
            f"{model.tag} has not learned the control {found[0].control!r}: the network {base} answers it. "
            "Export that one."
        )
    return found[0]


def _saved(place: Path, settings: Settings, model: HeadsModel, head: Head, base: str, folder: Path) -> str:
    """
    Save a head with all that it needs into a store of its own, `place`/store; gives its tag there.

    The network `base`, where it is needed, lies in `folder`.
    """
    import bentoml
    from bentoml._internal.models import ModelStore as Aside

    sources = [_general(settings) if space == GENERAL else _own(base, folder) for space in head.spaces]
    prepare = sources[0].prepare if len(sources) == 1 else Both(tuple(source.prepare for source in sources))
    answer = EachByItself(head.classes) if head.multiple else Postprocess(head.classes)
    custom = {name: each for source in sources for name, each in source.custom.items()}
    number = model.tag.partition(":")[2]
    number += "-alone" if len(model.heads) == 1 else f"-alone-{model.heads.index(head)}"
    plain = place / "plain"
    _network(sources, head).save(plain, zipped=False)
    with bentoml.models.create(
        f"{model.tag.partition(':')[0]}:{number}",
        module="bentoml.keras",
        context=bentoml.models.ModelContext(
            framework_name="keras", framework_versions={"tensorflow": version("tensorflow")}
        ),
        custom_objects=custom | {"preprocess": prepare, "postprocess": answer},
        external_modules=[hooks],
        metadata={MADE_FROM: model.tag, "control": head.control, "classes": list(head.classes),
                  INDEPENDENT: head.multiple},
        _model_store=Aside(place / "store"),
    ) as saved:
        for name in network.FILES:
            shutil.copyfile(plain / name, saved.path_of(name))
    return str(saved.tag)


def _write(store: Path, tag: str, file: Path) -> str:
    import bentoml
    from bentoml._internal.models import ModelStore as Aside

    try:
        with tempfile.TemporaryDirectory(dir=file.parent, prefix=".export-") as place:
            made = Path(place) / f"model{ENDING}"
            bentoml.models.export_model(tag, str(made), _model_store=Aside(store))
            made.replace(file)
    except OSError as error:
        raise ModelError(f"{file} cannot be written ({reason(error)}). Choose a folder with room.") from error
    return tag


def _general(settings: Settings) -> _Source:
    embedder = open_embedder(settings)
    if isinstance(embedder, StoredNetwork):
        loaded = embedder.loaded()
        return _Source(loaded.prepare, loaded.network, embedder.custom_objects())
    return _Source(Middle((SIDE_PX, SIDE_PX), share=1.0), lite0_network(), {})


def _own(base: str, folder: Path) -> _Source:
    import keras

    parts = read_parts(base, folder)
    before = keras.Model(parts.network.inputs, parts.network.layers[-1].input)
    return _Source(parts.preprocess, before, dict(parts.custom))


def _network(sources: Sequence[_Source], head: Head) -> Any:
    """From what the sources' `prepare` gives, side by side if they are several, to logits."""
    import keras
    from keras import layers, ops

    shapes = [tuple(np.asarray(source.prepare(Image.new("RGB", (64, 64)))).shape[1:]) for source in sources]
    inputs = keras.Input(shapes[0] if len(shapes) == 1 else (sum(map(int, map(np.prod, shapes))),), name="picture")
    found, start = [], 0
    for number, (source, shape) in enumerate(zip(sources, shapes, strict=True)):
        end = start + int(np.prod(shape))
        part = inputs if len(shapes) == 1 else layers.Reshape(shape, name=f"input_{number}")(inputs[:, start:end])
        source.network.name = f"features_{number}"
        vectors = ops.cast(ops.cast(source.network(part), "float16"), "float32")  # as they are remembered
        found.append(layers.UnitNormalization(name=f"length_{number}")(vectors))
        start = end
    together = found[0] if len(found) == 1 else layers.Concatenate(name="features")(found)
    model = keras.Model(inputs, layers.Dense(len(head.classes), name="logits")(together), name="heads")
    model.layers[-1].set_weights([head.weights, head.bias])
    return model


def lite0_network() -> Any:
    """EfficientNet-Lite0 in Keras: from pixels 0 to 255 to the roots of its features."""
    import keras
    from keras import layers, ops

    inputs = keras.Input((SIDE_PX, SIDE_PX, 3))
    x = layers.Rescaling(1 / 128, -127 / 128)(inputs)
    outputs: list[Any] = []
    for convolution in convolutions(weights_file()):
        channels, _, *size = convolution.kernel.shape
        if convolution.depthwise:
            layer = layers.DepthwiseConv2D(size, convolution.stride, "same")
            kernel = convolution.kernel.transpose(2, 3, 0, 1)
        else:
            layer = layers.Conv2D(channels, size, convolution.stride, "same")
            kernel = convolution.kernel.transpose(2, 3, 1, 0)
        x = layer(x)
        layer.set_weights([kernel, convolution.bias])
        if convolution.bounded:
            x = layers.ReLU(6)(x)
        if convolution.added is not None:
            x = layers.Add()([outputs[convolution.added], x])
        outputs.append(x)
    return keras.Model(inputs, ops.sqrt(ops.relu(layers.GlobalAveragePooling2D()(x))))
