"""Charts as plain SVG within a page: no script and no colour of their own, so that light, dark and paper may choose."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from typing import NamedTuple

from markupsafe import Markup, escape

from celestial_backend.trust.figures import percent

WIDTH, HEIGHT = 440, 300
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 10, 42
LETTER = 6.2  # pixels that a letter takes, about


class Estimate(NamedTuple):
    """
    A share or a number with its interval, at a place along the axis.

    Attributes:
        at: The place; of `reliability` and `course` from 0 to 1.
        n: Of how many; larger dots for more.
    """

    at: float
    value: float
    low: float
    high: float
    n: int = 0


class Bar(NamedTuple):
    """A bar of two parts, the second one on top."""

    name: str
    first: float
    second: float = 0


def reliability(points: Sequence[Estimate]) -> Markup:
    """How often predictions of a score are right, against that score; what lies on the diagonal is calibrated."""
    most = max((point.n for point in points), default=1) or 1
    marks = [_line(_x(0), _y(0), _x(1), _y(1), "ideal")]
    for point in points:
        x, size = _x(point.at), 2.5 + 4 * math.sqrt(point.n / most)
        said = f"score {point.at:.2f}: {percent(point.value)} right ({span(point.low, point.high)}), n = {point.n}"
        marks += [_line(x, _y(point.low), x, _y(point.high), "interval"), _dot(x, _y(point.value), size, said)]
    told = "; ".join(f"at {point.at:.2f} {percent(point.value)}" for point in points)
    return _svg(
        "Reliability diagram: how often predictions are right, by their score", told,
        [*_shares("right"), *_ticks((0, 0.25, 0.5, 0.75, 1), "score"), *marks],
    )  # fmt: skip


def histogram(bars: Sequence[Bar], title: str, axis: str) -> Markup:
    """Bars side by side; each first part stands below its second one."""
    highest = max((bar.first + bar.second for bar in bars), default=0) or 1
    step = (WIDTH - LEFT - RIGHT) / max(len(bars), 1)
    every = max(1, math.ceil(max((len(bar.name) for bar in bars), default=1) * LETTER / step))
    marks, base = list[Markup](), HEIGHT - BOTTOM
    for place, bar in enumerate(bars):
        x, both = LEFT + place * step, (bar.first, bar.second)
        heights = [each / highest * (base - TOP) for each in both]
        said = f"{bar.name}: {bar.first:g}" + (f" and {bar.second:g}" if any(each.second for each in bars) else "")
        marks.append(_rect(x + 1, base - heights[0], step - 2, heights[0], "first", said))
        if bar.second:
            marks.append(_rect(x + 1, base - sum(heights), step - 2, heights[1], "second", said))
        if place % every == 0:
            marks.append(_text(x + step / 2, base + 16, bar.name, "middle"))
    scale = [_across(base - number / highest * (base - TOP), f"{number:g}") for number in _round_numbers(highest)]
    told = "; ".join(f"{bar.name}: {bar.first + bar.second:g}" for bar in bars)
    return _svg(title, told, [*scale, _text((LEFT + WIDTH) / 2, HEIGHT - 6, axis, "middle"), *marks])


def course(
    points: Sequence[Estimate], title: str, axis: str, limit: float | None = None, names: Sequence[str] = ()
) -> Markup:
    """Shares over time, with what is usual as a line across; `names` stand below the first and the last point."""
    highest = min(1.0, max([0.1, *(point.high for point in points), limit or 0]) * 1.1)
    marks = [] if limit is None else [_line(LEFT, _y(limit, highest), WIDTH - RIGHT, _y(limit, highest), "ideal")]
    places = [(_x(0.04 + 0.92 * point.at), _y(point.value, highest)) for point in points]
    marks.append(_part('<polyline class="way" points="{}"/>', " ".join(f"{x:.1f},{y:.1f}" for x, y in places)))
    for (x, y), point in zip(places, points, strict=True):
        said = f"{percent(point.value)} ({span(point.low, point.high)}), n = {point.n}"
        marks += [_line(x, _y(point.low, highest), x, _y(point.high, highest), "interval"), _dot(x, y, 4, said)]
    ends = [_text(LEFT, HEIGHT - BOTTOM + 16, names[0]), _text(WIDTH - RIGHT, HEIGHT - BOTTOM + 16, names[-1], "end")]
    told = "; ".join(f"{percent(point.value)} of {point.n}" for point in points)
    middle = _text((LEFT + WIDTH) / 2, HEIGHT - 6, axis, "middle")
    return _svg(title, told, [*_shares("", highest), *(ends if names else []), middle, *marks])


def interval(value: float, low: float, high: float, least: float = 0.0, most: float = 1.0) -> Markup:
    """A small picture for a cell of a table: an interval between two ends, and a line at 0 where they enclose it."""
    width, height = 120, 14

    def x_of(number: float) -> float:
        return 4 + (width - 8) * (min(max(number, least), most) - least) / (most - least)

    zero = _line(x_of(0), 0, x_of(0), height, "ideal") if least < 0 < most else Markup()
    inside = [
        _line(x_of(least), height / 2, x_of(most), height / 2, "axis"), zero,
        _line(x_of(low), height / 2, x_of(high), height / 2, "interval"), _dot(x_of(value), height / 2, 3.5),
    ]  # fmt: skip
    return _part(
        '<svg class="small" viewBox="0 0 {0} {1}" width="{0}" height="{1}" aria-hidden="true">{2}</svg>',
        width, height, Markup().join(inside),
    )  # fmt: skip


def span(low: float, high: float) -> str:
    """An interval of shares for people."""
    return f"{percent(low)} to {percent(high)}"


def _svg(title: str, told: str, parts: Sequence[Markup]) -> Markup:
    key = f"c{zlib.crc32(f'{title} {told}'.encode()):x}"  # a page may hold several
    return _part(
        '<svg class="chart" viewBox="0 0 {} {}" role="img" aria-labelledby="{}t {}d"><title id="{}t">{}</title>'
        '<desc id="{}d">{}</desc>{}</svg>',
        WIDTH, HEIGHT, key, key, key, title, key, told, Markup("\n").join(parts),
    )  # fmt: skip


def _shares(axis: str, highest: float = 1.0) -> list[Markup]:
    """Lines across for shares, from 0 up."""
    lines = [_across(_y(share, highest), percent(share)) for share in _round_numbers(highest)]
    return [*lines, *([_text(LEFT + 6, TOP + 12, axis)] if axis else [])]


def _ticks(places: Sequence[float], axis: str) -> list[Markup]:
    named = [_text(_x(place), HEIGHT - BOTTOM + 16, f"{place:g}", "middle") for place in places]
    return [*named, _text((LEFT + WIDTH) / 2, HEIGHT - 6, axis, "middle")]


def _round_numbers(highest: float) -> list[float]:
    """From 0 up to a number, some four steps of 1, 2 or 5 times a power of ten."""
    rough = highest / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * each for each in (1, 2, 2.5, 5, 10) if power * each >= rough * 0.999)
    return [round(step * number, 10) for number in range(int(highest / step + 1e-9) + 1)]


def _across(y: float, name: str) -> Markup:
    return _part('<g class="grid">{}{}</g>', _line(LEFT, y, WIDTH - RIGHT, y), _text(LEFT - 6, y + 4, name, "end"))


def _x(share: float) -> float:
    return LEFT + share * (WIDTH - LEFT - RIGHT)


def _y(share: float, highest: float = 1.0) -> float:
    return HEIGHT - BOTTOM - min(share / highest, 1) * (HEIGHT - BOTTOM - TOP)


def _line(x1: float, y1: float, x2: float, y2: float, kind: str = "") -> Markup:
    return _part('<line class="{}" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>', kind, x1, y1, x2, y2)


def _dot(x: float, y: float, size: float, said: str = "") -> Markup:
    return _part('<circle class="dot" cx="{:.1f}" cy="{:.1f}" r="{:.1f}">{}</circle>', x, y, size, _title(said))


def _rect(x: float, y: float, width: float, height: float, kind: str, said: str) -> Markup:
    return _part(
        '<rect class="{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}">{}</rect>',
        kind, x, y, max(width, 1), max(height, 0), _title(said),
    )  # fmt: skip


def _text(x: float, y: float, text: str, anchor: str = "start") -> Markup:
    return _part('<text x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>', x, y, anchor, text)


def _title(said: str) -> Markup:
    return _part("<title>{}</title>", said) if said else Markup()


def _part(form: str, *values: object) -> Markup:
    """Markup with what is put into it escaped."""
    return Markup(form.format(*(each if isinstance(each, int | float) else escape(each) for each in values)))  # noqa: S704 - each is escaped
