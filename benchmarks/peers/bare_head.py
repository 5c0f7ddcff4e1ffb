"""
The limit for one task with a learned model: a WSGI app that decodes, embeds and answers the picture its path names.

It reads the request's body without parsing it, remembers nothing, and answers with constant bytes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from io import BytesIO
from pathlib import Path
from typing import Any

import bentoml
import numpy as np
from PIL import Image

from benchmarks.peers import ANSWER, HEADERS
from celestial_backend.models.embedders import open_embedder
from celestial_backend.settings import Settings

PICTURES = Path(os.environ["BENCHMARK_PICTURES"])
embedder = open_embedder(Settings())
arrays = np.load(Path(bentoml.models.get("celestial_bodies_classifier_model:latest").path) / "heads.npz")
weights, bias = arrays["weights_0"], arrays["bias_0"]


def app(environ: dict[str, Any], start_response: Callable[[str, list[tuple[str, str]]], object]) -> Iterable[bytes]:
    """Decode, prepare, embed, and one product."""
    environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
    picture = Image.open(BytesIO((PICTURES / environ["PATH_INFO"].lstrip("/")).read_bytes()))
    picture.load()
    (vector,) = embedder.vectors(embedder.prepare(picture))
    logits = vector / np.linalg.norm(vector) @ weights + bias
    shares = np.exp(logits - logits.max())
    float(shares.max() / shares.sum())
    start_response("200 OK", HEADERS)
    return [ANSWER]
