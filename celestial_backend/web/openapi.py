"""
What the backend says of itself: an OpenAPI 3.1 document, and the same as a page to read.

The document is a file beside this one; a test holds it against what is read and answered.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup, escape

from celestial_backend import __version__

HERE = Path(__file__).parent
REFERENCE = "#/components/schemas/"


def document(*, guarded: bool) -> dict[str, Any]:
    """The OpenAPI document; `guarded` where requests must carry a name and a password."""
    made: dict[str, Any] = json.loads((HERE / "openapi.json").read_text(encoding="utf-8"))
    made["info"]["version"] = __version__
    if guarded:
        made["security"] = [{"basic": []}]
    return made


def page(made: dict[str, Any]) -> str:
    """The document as HTML, with nothing from elsewhere."""
    environment = Environment(loader=FileSystemLoader(HERE), autoescape=True, trim_blocks=True)
    environment.filters |= {"kind": _kind, "pretty": _pretty, "prose": _prose}
    return environment.get_template("docs.html").render(made)


def _pretty(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, indent=2, ensure_ascii=False)


def _prose(text: str) -> Markup:
    """A description as HTML: what stands between backticks is code, all else is text."""
    code = Markup("<code>{}</code>")
    parts = [code.format(part) if index % 2 else escape(part) for index, part in enumerate(text.split("`"))]
    return Markup("").join(parts)


def _kind(schema: dict[str, Any]) -> str:
    """A schema in words."""
    if "$ref" in schema:
        return str(schema["$ref"]).removeprefix(REFERENCE)
    if "anyOf" in schema:
        return " or ".join(_kind(one) for one in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return " or ".join(json.dumps(value) for value in schema.get("enum", [schema.get("const")]))
    kind = str(schema.get("type", "anything"))
    if kind != "array":
        return kind
    return "empty list" if schema.get("maxItems") == 0 else f"list of {_kind(schema.get('items', {}))}"
