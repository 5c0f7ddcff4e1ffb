"""
The kinds of models that the store may hold, a class each.

A new kind is a class here and its place in `FAMILIES`; the store, its commands and the predictor name none of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from celestial_backend.features import Embedder, FeatureCache
from celestial_backend.labels import Vocabulary
from celestial_backend.models import classifier, headed
from celestial_backend.models.classifier import Classifier, Model


@dataclass(frozen=True)
class Needs:
    """
    What a model may need beside its own files.

    Attributes:
        embedder: Gives the process's one.
        features: What the process knows of pictures.
        network: Gives a network of the store by its tag, loaded.
    """

    embedder: Callable[[], Embedder]
    features: FeatureCache
    network: Callable[[str], Classifier]


class Family(Protocol):
    """One kind of model, by the folder of the store that holds it; all is without state."""

    @staticmethod
    def holds(folder: Path) -> bool:
        """Whether a model is of this kind, by the files that are there."""

    @staticmethod
    def check(tag: str, folder: Path) -> None:
        """
        Refuse at once, without TensorFlow, what can never be served here.

        Raises:
            ModelLoadError: It cannot; the message says why, and what to do.
        """

    @staticmethod
    def vocabulary(tag: str, folder: Path) -> Vocabulary | None:
        """
        What it can say, in a millisecond, or None where only the loaded model tells.

        Raises:
            ModelLoadError: As for `check`.
        """

    @staticmethod
    def load(tag: str, folder: Path, needs: Needs) -> Model:
        """
        The model, loaded; one of a kind at a time.

        Raises:
            ModelLoadError: It cannot be served here; the message says what to do.
        """


class Heads:
    """Our own models of heads on features: two plain files."""

    @staticmethod
    def holds(folder: Path) -> bool:
        """Whether the file that says what was learned is there."""
        return headed.is_headed(folder)

    @staticmethod
    def check(tag: str, folder: Path) -> None:
        """Refuse what is damaged."""
        headed.read_about(tag, folder)

    @staticmethod
    def vocabulary(tag: str, folder: Path) -> Vocabulary:
        """What the heads answer."""
        return headed.vocabulary(headed.read_about(tag, folder).heads)

    @staticmethod
    def load(tag: str, folder: Path, needs: Needs) -> Model:
        """The heads, with the embedder and the network that they need."""
        return headed.load(tag, folder, needs.embedder, needs.features, needs.network)


class Networks:
    """Networks of Keras with a `preprocess` and a `postprocess`: the default model, and those from outside."""

    @staticmethod
    def holds(folder: Path) -> bool:  # noqa: ARG004 - asked last
        """Any other folder, as what is no network is told what it lacks."""
        return True

    @staticmethod
    def check(tag: str, folder: Path) -> None:
        """Refuse what is no network of Keras, or what another Python has saved."""
        classifier.check_files(tag, folder)

    @staticmethod
    def vocabulary(tag: str, folder: Path) -> Vocabulary | None:
        """Known of our own networks, and of what we have exported."""
        classes = classifier.classes_in(classifier.check_files(tag, folder))
        return None if classes is None else Vocabulary(classes)

    @staticmethod
    def load(tag: str, folder: Path, needs: Needs) -> Model:  # noqa: ARG004 - it stands alone
        """The network with its own custom objects."""
        return classifier.load(tag, folder)


FAMILIES: tuple[type[Family], ...] = (Heads, Networks)  # asked in this order


def family_of(folder: Path) -> type[Family]:
    """The kind of model that a folder of the store holds."""
    return next(family for family in FAMILIES if family.holds(folder))
