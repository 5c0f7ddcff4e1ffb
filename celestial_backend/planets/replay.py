"""
What the default model's training pictures look like, as features: a sample of them, so that a project that
teaches it more need not label again what it knows.

The file lies beside the default model; what makes that model makes it too, and it is made anew when features
are. Features are kept in eight bits, which changes a
vector by less than a picture's own noise does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from celestial_backend.features import Embedder, Familiar, Nearest, unit
from celestial_backend.pictures.hooks import Postprocess, Preprocess
from celestial_backend.planets import network
from celestial_backend.planets.augment import augment
from celestial_backend.planets.examples import Example, rendered
from celestial_backend.settings import MODEL_NAME

FILE = Path(__file__).with_name("default_model") / "features.npz"
EACH = 40  # pictures of a class
DRAWN_EACH = 150  # drawn pictures of a class, beside all the others: what the model must not take for unknown
COPIES = 2  # changed copies of each picture
SEED = 31


@dataclass(frozen=True)
class Replay:
    """
    N pictures as features, by space.

    Attributes:
        classes: The class of each picture, shape (N,).
        vectors: Space -> shape (N, D).
        copies: Space -> shape (N * `COPIES`, D); copies of picture i are rows i * `COPIES` and following.
    """

    classes: tuple[str, ...]
    vectors: dict[str, NDArray[np.float32]]
    copies: dict[str, NDArray[np.float32]]


def load(names: Mapping[str, str]) -> Replay | None:
    """
    The sample, where it was made with these embedders; None otherwise.

    Args:
        names: Of the embedder of each space that is needed.
    """
    with np.load(FILE, allow_pickle=False) as file:
        if any(str(file[f"{space}_name"]) != name for space, name in names.items()):
            return None
        return Replay(
            tuple(map(str, file["classes"])),
            {space: _unpacked(file, space) for space in names},
            {space: _unpacked(file, f"{space}_copies") for space in names},
        )


def familiar(tag: str) -> Familiar | None:
    """What the model with this tag has learned, if it is the default model; by the features of its last layer."""
    with np.load(FILE, allow_pickle=False) as file:
        if str(file["own_name"]) != tag:
            return None
        measure = Nearest(unit(_unpacked(file, "familiar")), file["familiar_reach"])
        return Familiar(measure, *map(float, file["familiar_limits"]))


def make(folder: Path, examples: Sequence[Example], embedder: Embedder) -> None:
    """
    Write the sample for the model in a folder, beside it.

    Args:
        folder: Holds what `training.save` wrote.
        examples: The pictures that it was trained on, of which `EACH` are taken of every class.
        embedder: Of the general features.
    """
    chosen = _chosen(examples)
    pictures = [example.load() for example in chosen]
    changed = [
        augment(picture, np.random.default_rng([SEED, place, number]))
        for place, picture in enumerate(pictures)
        for number in range(COPIES)
    ]
    arrays: dict[str, Any] = {"classes": np.array([example.class_name for example in chosen])}
    general = _Space("general", embedder.name, lambda picture: embedder.vectors(embedder.prepare(picture))[0])
    own, said = _spaces_of(folder)
    for space in (general, own, said):
        arrays[f"{space.kind}_name"] = np.array(space.name)
        arrays |= _packed(space.kind, np.stack([space.vector(picture) for picture in pictures]))
        arrays |= _packed(f"{space.kind}_copies", np.stack([space.vector(picture) for picture in changed]))
    drawn = rendered(sorted({example.class_name for example in examples}), DRAWN_EACH, SEED)
    arrays |= _familiar(own, [example.load() for example in examples], [example.load() for example in drawn])
    np.savez_compressed(folder / FILE.name, **arrays)


def _familiar(own: _Space, pictures: Sequence[Image.Image], drawn: Sequence[Image.Image]) -> dict[str, Any]:
    """Arrays for `familiar`; drawn pictures differ more among themselves than the others do."""
    packed = _packed("familiar", np.stack([own.vector(picture) for picture in (*pictures, *drawn)]))
    groups = np.repeat([0, 1], [len(pictures), len(drawn)])
    found = Familiar.nearest(unit(_unpacked(packed, "familiar")), groups).arrays()
    return packed | {"familiar_reach": found["reach"], "familiar_limits": found["numbers"]}


class _Space(NamedTuple):
    kind: str  # "general", or of the network: "own" features, and what it "said"
    name: str
    vector: Callable[[Image.Image], NDArray[np.floating]]


def _chosen(examples: Sequence[Example]) -> list[Example]:
    found = []
    for name in sorted({example.class_name for example in examples}):
        mine = [example for example in examples if example.class_name == name]
        rows = np.random.default_rng(SEED).permutation(len(mine))[:EACH]
        found += [mine[row] for row in sorted(rows)]
    return found


def _spaces_of(folder: Path) -> tuple[_Space, _Space]:
    """The features before the network's last layer, and its probabilities; named as the backend names the model's."""
    import keras

    card, whole = network.load_card(folder), keras.saving.load_model(folder, compile=False)
    before = keras.Model(whole.inputs, whole.layers[-1].input)
    preprocess, postprocess = Preprocess(card.size_px), Postprocess(card.classes)
    tag = f"{MODEL_NAME}:{network.version(folder)}"
    return (
        _Space("own", tag, lambda picture: before.predict_on_batch(preprocess(picture))[0]),
        _Space(
            "said", f"{tag} probabilities",
            lambda picture: postprocess.batch(whole.predict_on_batch(preprocess(picture)))[0],
        ),
    )  # fmt: skip


def _packed(name: str, vectors: NDArray[np.floating]) -> dict[str, Any]:
    low, high = float(vectors.min()), float(vectors.max())
    scale = max(high - low, 1e-9) / 255
    return {name: np.round((vectors - low) / scale).astype(np.uint8), f"{name}_range": np.array([low, scale])}


def _unpacked(file: Mapping[str, Any], name: str) -> NDArray[np.float32]:
    low, scale = file[f"{name}_range"]
    return np.asarray(file[name].astype(np.float32) * np.float32(scale) + np.float32(low), np.float32)
