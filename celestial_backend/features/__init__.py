"""
Pictures to vectors: what the heads of `learning/` are fitted on, and served with.

An `Embedder` turns a picture into a vector of D numbers; pictures that look alike get vectors that are
near each other; `Familiar` tells those that are unlike all that was learned. The one inside (`Lite0`) needs no
TensorFlow; those that an operator brings are models of the store. A `FeatureCache` remembers vectors by the picture's
content. Nothing here knows labels, tasks or projects.
"""

from __future__ import annotations

from celestial_backend.features.cache import FeatureCache, digest, rounded
from celestial_backend.features.embedder import Embedder
from celestial_backend.features.familiar import Familiar, Nearest, unit

__all__ = ["Embedder", "Familiar", "FeatureCache", "Nearest", "digest", "rounded", "unit"]
