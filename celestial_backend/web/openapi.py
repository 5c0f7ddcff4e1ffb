"""
What the backend says of itself: an OpenAPI 3.1 document, and the same as a page to read and to try.

The document is a file beside this one; a test holds it against what is read and answered.
"""

from __future__ import annotations

import json
from typing import Any

from flask import Response

from celestial_backend import __version__
from celestial_backend.web import pages


def document(*, guarded: bool) -> dict[str, Any]:
    """The OpenAPI document; `guarded` where requests must carry a name and a password."""
    made: dict[str, Any] = json.loads((pages.HERE / "openapi.json").read_text(encoding="utf-8"))
    made["info"]["version"] = __version__
    if guarded:
        made["security"] = [{"basic": []}]
    return made


def page(made: dict[str, Any]) -> Response:
    """The document as HTML, from which a person can send each request."""
    return pages.respond("docs.html", "try.js", **made)
