"""Two heads that are worked out on paper, on the vectors of `Colours`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from celestial_backend.features import FeatureCache
from celestial_backend.models.classifier import Classifier
from celestial_backend.models.headed import Head, HeadsModel, load
from tests.support.colours import Colours, plain

TAG = "celestial_bodies_classifier_model:project-7-0badcafe"
BASE = "celestial_bodies_classifier_model:base"
TWO, FOUR = np.log(2.0), np.log(4.0)
KIND = Head("kind", ("apple", "leaf", "sky"), np.diag([TWO, TWO, FOUR]), np.zeros(3))
FLAWS = Head("flaws", ("hot", "cold"), np.array([[4.0, -4], [0, 0], [-4, 4]]), np.array([-1.0, 0]), multiple=True)


def no_network(tag: str) -> Classifier:
    raise AssertionError(f"{tag} is not needed")


def opened(folder: Path, cache: FeatureCache, name: str = "colours-1", network: Any = no_network) -> HeadsModel:
    return load(TAG, folder, lambda: Colours(name), cache, network)


def said(model: HeadsModel, *colours: str) -> np.ndarray:
    return model.probabilities(np.concatenate([model.prepare(plain(colour)) for colour in colours]))
