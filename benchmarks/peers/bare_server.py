"""
The limit for one task: a WSGI app that predicts the picture its path names, and says so in constant bytes.

It reads the request's body without parsing it. gunicorn runs it as it runs ours.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.peers import ANSWER, HEADERS
from benchmarks.peers.bare import Bare

PICTURES = Path(os.environ["BENCHMARK_PICTURES"])
bare = Bare()


def app(environ: dict[str, Any], start_response: Callable[[str, list[tuple[str, str]]], object]) -> Iterable[bytes]:
    """Decode, preprocess and predict one picture."""
    environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
    bare.forward([bare.prepare((PICTURES / environ["PATH_INFO"].lstrip("/")).read_bytes())])
    start_response("200 OK", HEADERS)
    return [ANSWER]
