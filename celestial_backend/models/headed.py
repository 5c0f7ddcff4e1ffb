"""
A model of heads, as it is served: each answers one control, from the features of a picture.

On disk it is two plain files beside BentoML's description, and no pickle: `heads.json` says
what was learned and on which features, `heads.npz` holds the numbers. Anybody may have
damaged them, so both are checked whole before a picture is answered with them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from msgspec import Meta, Struct
from numpy.typing import NDArray
from PIL import Image

from celestial_backend.errors import ModelLoadError
from celestial_backend.features import Embedder, Familiar, FeatureCache, digest, rounded, unit
from celestial_backend.labels import Columns, Vocabulary, short
from celestial_backend.models.classifier import HEADS_FILE as ABOUT
from celestial_backend.models.classifier import Classifier, NetworkFeatures, Said
from celestial_backend.models.manifest import Manifest

ARRAYS = "heads.npz"
Space = Literal["general", "own"]  # an embedder's features, and those of the base network
GENERAL: Space = "general"
OWN: Space = "own"
SAID = "said"  # no features: the probabilities that the base network gives


@dataclass(frozen=True, eq=False)
class Head:
    """
    What answers one control.

    Attributes:
        control: Its name in the label config; "" for a head that answers any control, which is the only one then.
        classes: K; the control's own choices, or all classes of the base network where that answers.
        weights: Shape (D, K), for a picture's vectors of all spaces, each of length 1, one after another.
        bias: Shape (K,).
        spaces: Whose vectors; none where the base network itself answers, and then there are no weights.
        multiple: Each choice has a probability by itself; else they have 1 together.
        at_least_one: The best choice is said where none of several reaches a half.
        familiar: What it has learned; None where it cannot tell what is unlike that.
    """

    control: str
    classes: tuple[str, ...]
    weights: NDArray[np.float32]
    bias: NDArray[np.float32]
    spaces: tuple[Space, ...] = (GENERAL,)
    multiple: bool = False
    at_least_one: bool = False
    familiar: Familiar | None = None

    @classmethod
    def of_network(cls, control: str, classes: Sequence[str]) -> Head:
        """The head of a control that the base network itself answers, whose classes these are."""
        return cls(control, tuple(classes), np.empty((0, 0), np.float32), np.empty(0, np.float32), ())

    @property
    def needs(self) -> tuple[str, ...]:
        """The columns of a prepared picture that it takes, by what they hold."""
        return self.spaces or (SAID,)

    def probabilities(self, given: NDArray[np.float32]) -> NDArray[np.float64]:
        """
        What it says of pictures.

        Args:
            given: Shape (N, D), the columns that it needs: vectors of length 1, or the network's probabilities.

        Returns:
            Shape (N, K); rows sum to 1 unless it is `multiple`.
        """
        if not self.spaces:
            return given.astype(np.float64)
        logits = (given @ self.weights + self.bias).astype(np.float64)
        if self.multiple:
            return np.asarray(np.exp(-np.logaddexp(0, -logits)))
        shares = np.exp(logits - logits.max(axis=1, keepdims=True))
        return np.asarray(shares / shares.sum(axis=1, keepdims=True))

    def strangeness(self, given: NDArray[np.float32]) -> NDArray[np.float64]:
        """How unlike pictures are to what it has learned, shape (N,): 0 for all where it cannot tell."""
        return np.zeros(len(given)) if self.familiar is None else self.familiar.strangeness(given)


class HeadAbout(Struct, forbid_unknown_fields=True):
    """What `heads.json` says of one head; its numbers stand under its place among them."""

    control: str
    kind: Literal["linear", "network"]
    classes: Annotated[list[str], Meta(min_length=1)]
    multiple: bool = False
    at_least_one: bool = False
    spaces: list[Space] = []


class About(Struct):
    """
    What `heads.json` says.

    Attributes:
        embedder: The name of the embedder whose features are the general ones.
        base: The tag of the network whose features, or answers, are used too.
    """

    heads: Annotated[list[HeadAbout], Meta(min_length=1)]
    embedder: str
    base: str | None = None
    format: Literal[1] = 1


def vocabulary(heads: Sequence[Head] | Sequence[HeadAbout]) -> Vocabulary:
    """What a model of heads can say, in the order of its row; a head of no control answers any, as a network does."""
    if not heads[0].control:
        return Vocabulary(tuple(heads[0].classes))
    own: list[Columns] = []
    for head in heads:
        start = sum(len(each.classes) for each in own)
        learned = bool(head.spaces)
        own.append(
            Columns(head.control, start, tuple(head.classes), learned, head.multiple, head.at_least_one, len(own))
        )
    return Vocabulary((), tuple(own))


class HeadsModel:
    """
    Heads, and what makes features for them; safe to share between threads.

    Attributes:
        tag: The BentoML tag, which is the model version everywhere.
        vocabulary: What it can say, in the order of the columns of `probabilities`.
        heads: At least one.
        sources: What gives each of the columns that heads need, in the order of the columns of a prepared picture.
        base: The tag of the network among them, if there is one.
    """

    def __init__(
        self, tag: str, heads: Sequence[Head], sources: Mapping[str, Embedder], cache: FeatureCache,
        base: str | None = None,
    ) -> None:  # fmt: skip
        """
        Args:
            tag: The BentoML tag.
            heads: At least one.
            sources: What gives each of the columns that heads need, and nothing else.
            cache: Knows features, and is told new ones.
            base: The tag of the network among the sources.
        """
        self.tag = tag
        self.base = base
        self.vocabulary = vocabulary(heads)
        self.heads = tuple(heads)
        self.sources = dict(sources)
        self._cache = cache
        columns, start = {}, 0
        for name, source in sources.items():
            columns[name] = np.arange(start, start := start + source.width)
        self._asked = [(head, np.concatenate([columns[name] for name in head.needs])) for head in heads]

    def key(self, data: bytes) -> bytes | None:
        """What the features of a picture file are remembered by."""
        return digest(data)

    def remembered(self, key: bytes) -> NDArray[np.float32] | None:
        """A picture as `prepare` gives it, None where some of its features are not known."""
        found = []
        for source in self.sources.values():
            vector = self._cache.get(source.name, [key]).get(key)
            if vector is None or vector.shape != (source.width,):
                return None
            found.append(vector)
        return self._row(found)

    def prepare(self, picture: Image.Image, key: bytes | None = None) -> NDArray[np.float32]:
        """
        The features of a picture, which are remembered by its key; takes some milliseconds.

        Returns:
            Shape (1, D), the same whether they were remembered or not.
        """
        found = []
        for source in self.sources.values():
            vector = rounded(source.vectors(source.prepare(picture)))[0]
            if key is not None:
                self._cache.put(source.name, {key: vector})
            found.append(vector)
        return self._row(found)

    def probabilities(self, batch: NDArray[np.float32]) -> NDArray[np.float64]:
        """
        What all heads say of prepared pictures.

        Args:
            batch: Shape (N, D), as `prepare` gives them.

        Returns:
            Shape (N, K), the heads' columns one after another. A row sums to 1 over the columns
            of each head that is not `multiple`.
        """
        return np.concatenate([head.probabilities(batch[:, columns]) for head, columns in self._asked], axis=1)

    def answers(self, batch: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """What `probabilities` gives; and of each head how unlike a picture is to what it learned, shape (N, heads)."""
        strange = np.stack([head.strangeness(batch[:, columns]) for head, columns in self._asked], axis=1)
        return self.probabilities(batch), strange

    def _row(self, vectors: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
        named = zip(self.sources, vectors, strict=True)
        parts = [vector[None] if name == SAID else unit(vector[None]) for name, vector in named]
        return np.concatenate(parts, axis=1)


def save(
    folder: Path, heads: Sequence[Head], embedder: str, base: str | None = None, manifest: Manifest | None = None
) -> Manifest:
    """
    Write a model into a folder that is there.

    Args:
        folder: Gets `ABOUT` and `ARRAYS`.
        heads: At least one, each of another control.
        embedder: The name of the one whose features are the general ones.
        base: The tag of the network whose features or answers are used, if there is one.
        manifest: What is known of their making.

    Returns:
        The manifest with what the heads say and need, which belongs into the store too.
    """
    kinds = [
        HeadAbout(head.control, "linear" if head.spaces else "network", list(head.classes), head.multiple,
                   head.at_least_one, list(head.spaces))
        for head in heads
    ]  # fmt: skip
    arrays: dict[str, Any] = {}
    for number, head in enumerate(heads):
        if head.spaces:
            arrays |= {f"weights_{number}": np.asarray(head.weights, np.float32),
                       f"bias_{number}": np.asarray(head.bias, np.float32)}  # fmt: skip
        if head.familiar is not None:
            arrays |= {f"familiar_{number}_{name}": array for name, array in head.familiar.arrays().items()}
    np.savez(folder / ARRAYS, **arrays)
    about = msgspec.json.encode(About(kinds, embedder, base))
    (folder / ABOUT).write_bytes(msgspec.json.format(about, indent=1) + b"\n")
    choices = {head.control: list(head.classes) for head in heads}
    return msgspec.structs.replace(manifest or Manifest(), choices=choices, embedder=embedder, base=base or None)


def is_headed(folder: Path) -> bool:
    """Whether a folder of the store holds a model of heads."""
    return (folder / ABOUT).is_file()


def read_about(tag: str, folder: Path) -> About:
    """
    What a model of heads says of itself; takes a millisecond.

    Raises:
        ModelLoadError: It cannot be read.
    """
    try:
        about = msgspec.json.decode((folder / ABOUT).read_bytes(), type=About)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise _damaged(tag, ABOUT, str(error)) from error
    controls = [head.control for head in about.heads]
    if len(set(controls)) < len(controls):
        raise _damaged(tag, ABOUT, "two heads are of one control")
    if "" in controls and (len(controls) > 1 or about.heads[0].multiple):
        raise _damaged(tag, ABOUT, "a head of any control must be the only one, and say one choice")
    for head in about.heads:
        if len(set(head.classes)) < len(head.classes) or not all(head.classes):
            raise _damaged(tag, ABOUT, f"the classes of {short(head.control)} must have names that differ")
        if (head.kind == "linear") != bool(head.spaces) or len(set(head.spaces)) < len(head.spaces):
            raise _damaged(tag, ABOUT, f"the spaces of {short(head.control)} do not fit its kind")
    if about.base is None and any(head.kind == "network" or OWN in head.spaces for head in about.heads):
        raise _damaged(tag, ABOUT, "a head needs a base network, and none is named")
    return about


def load(
    tag: str,
    folder: Path,
    embedder: Callable[[], Embedder],
    cache: FeatureCache,
    network: Callable[[str], Classifier],
) -> HeadsModel:
    """
    Load a model of heads.

    Args:
        tag: Its BentoML tag.
        folder: Where it lies in the store.
        embedder: Gives the process's one; only asked where a head uses general features.
        cache: The process's features.
        network: Gives another model of the store, loaded; only asked for the base network, where one is needed.

    Raises:
        ModelLoadError: A file of it is damaged, it was learned on features of another embedder
            than is set, or its base network is not there or another one.
    """
    about = read_about(tag, folder)
    needed = {name for head in about.heads for name in head.spaces or (SAID,)}
    sources: dict[str, Embedder] = {}
    if GENERAL in needed:
        sources[GENERAL] = _checked(tag, about, embedder())
    if about.base is not None and needed - {GENERAL}:
        base = network(about.base)
        if OWN in needed:
            sources[OWN] = NetworkFeatures(base)
        if SAID in needed:
            sources[SAID] = Said(base)
            _check_classes(tag, about, base)
    widths = {name: source.width for name, source in sources.items()}
    return HeadsModel(tag, _heads(tag, folder, about, widths), sources, cache, about.base)


def _checked(tag: str, about: About, found: Embedder) -> Embedder:
    if found.name != about.embedder:
        raise ModelLoadError(
            f"{tag} was learned on features of the embedder {about.embedder}, and {found.name} is set now. Set "
            "CELESTIAL_EMBEDDER back, or press Start Training for a model of the new one's features."
        )
    return found


def _check_classes(tag: str, about: About, base: Classifier) -> None:
    if any(head.kind == "network" and tuple(head.classes) != base.classes for head in about.heads):
        raise ModelLoadError(
            f"{tag} lets the model {about.base} answer, and that has other classes than when it was learned. "
            "Bring that model back, or press Start Training for a new one."
        )


def _heads(tag: str, folder: Path, about: About, widths: Mapping[str, int]) -> list[Head]:
    try:
        with np.load(folder / ARRAYS, allow_pickle=False) as arrays:
            heads = [_head(arrays, number, head) for number, head in enumerate(about.heads)]
    except Exception as error:  # a damaged archive meets nearly every exception there is
        raise _damaged(tag, ARRAYS, type(error).__name__) from error
    for head in heads:
        if head.spaces:
            wanted = (sum(widths[name] for name in head.spaces), len(head.classes))
            if (head.weights.shape, head.bias.shape) != (wanted, wanted[1:]):
                seen = f"{head.weights.shape} and {head.bias.shape}"
                why = f"the arrays of {short(head.control)} must have the shapes {wanted} and {wanted[1:]}, got {seen}"
                raise _damaged(tag, ARRAYS, why)
            if not (np.isfinite(head.weights).all() and np.isfinite(head.bias).all()):
                raise _damaged(tag, ARRAYS, f"the numbers of {short(head.control)} must be finite")
    return heads


def _head(arrays: Mapping[str, Any], number: int, about: HeadAbout) -> Head:
    if about.kind == "network":
        return Head.of_network(about.control, about.classes)
    weights, bias = (np.asarray(arrays[f"{name}_{number}"], np.float32) for name in ("weights", "bias"))
    mine = f"familiar_{number}_"
    of_familiar = {name.removeprefix(mine): arrays[name] for name in arrays if name.startswith(mine)}
    familiar = Familiar.from_arrays(of_familiar, len(weights)) if of_familiar else None
    return Head(
        about.control, tuple(about.classes), weights, bias, tuple(about.spaces), about.multiple, about.at_least_one,
        familiar,
    )  # fmt: skip


def _damaged(tag: str, name: str, why: str) -> ModelLoadError:
    return ModelLoadError(
        f"The file {name} of {tag} is damaged: {' '.join(why.split())[:200]}. Make another model live with "
        "`python -m celestial_backend models use`, or press Start Training for a new one."
    )
