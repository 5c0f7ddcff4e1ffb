"""Pages for people: templates beside this file, with nothing from elsewhere, and no script but our own."""

from __future__ import annotations

import base64
import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

from flask import Response
from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup, escape

HERE = Path(__file__).parent
REFERENCE = "#/components/schemas/"


def respond(template: str, script: str = "", **values: Any) -> Response:
    """
    A page; a browser runs and shows nothing on it but what lies here, and no other page may hold it in a frame.

    Args:
        template: The name of its file.
        script: That of its script.
        values: What the template names.
    """
    style, code = (_text("page.css"), _text(script) if script else "")
    page = _environment().get_template(template).render(values, style=Markup(style), script=Markup(code))  # noqa: S704 - our own files
    policy = (
        f"default-src 'none'; style-src {_source(style)}; script-src {_source(code)}; connect-src 'self';"
        " img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return Response(page, headers={"Content-Security-Policy": policy, "Cache-Control": "no-store"})


@cache
def _environment() -> Environment:
    environment = Environment(loader=FileSystemLoader(HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"kind": _kind, "pretty": _pretty, "prose": _prose, "query": _query}
    return environment


@cache
def _text(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


def _source(text: str) -> str:
    """What a Content-Security-Policy calls a text within the page."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" if text else "'none'"


def _query(operation: dict[str, Any]) -> str:
    """An example of what may follow an operation's path."""
    told = [f"{one['name']}={one['example']}" for one in operation.get("parameters", ()) if "example" in one]
    return "?" * bool(told) + "&".join(told)


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
