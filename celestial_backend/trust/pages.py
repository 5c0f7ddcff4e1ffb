"""Pages for people in one file each: nothing from elsewhere, no script, and what strangers wrote is escaped."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from celestial_backend.trust.charts import interval, span
from celestial_backend.trust.figures import percent

HERE = Path(__file__).parent
ALONE = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"  # a browser loads nothing else


def render(template: str, **values: Any) -> str:
    """
    A page; it has the colours and fonts of those that the backend serves.

    Args:
        template: The name of its file, beside this one.
        values: What it names.
    """
    style = Markup(_style())  # noqa: S704 - our own file
    return _environment().get_template(template).render(values, style=style, policy=ALONE)


@cache
def _style() -> str:
    return (HERE / "page.css").read_text(encoding="utf-8")


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=StrictUndefined, finalize=_unparted,
    )  # fmt: skip
    environment.filters |= {"percent": percent}
    environment.globals |= {"interval": interval, "span": span}
    return environment


def _unparted(value: Any) -> Any:
    """A text whose numbers stand on one line with their signs."""
    return value.replace(" %", "\N{NO-BREAK SPACE}%") if type(value) is str else value
