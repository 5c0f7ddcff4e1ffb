"""The picture for docs/performance.md: bars of one unit in each group, as SVG."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import median
from typing import Any
from xml.sax.saxutils import escape

Results = dict[str, Any]
WIDTH, LEFT, RIGHT, BAR, GAP, HEAD = 760, 170, 110, 20, 6, 44  # pixels
OURS, OTHERS, INK = "#2563eb", "#94a3b8", "#1e293b"
CURVES = {"ours": ("this backend", OURS), "plain": ("plain head", OTHERS), "pixels": ("raw pixels", "#d4a373")}
NAMES = {"ours": "this backend", "limit": "limit", "stock": "SDK's template", "tutorial": "tutorial"}


@dataclass(frozen=True)
class Group:
    """Bars to be compared: a title that tells the unit, and a length for each name."""

    title: str
    bars: dict[str, float]


def chart(results: Results) -> str:
    """The picture of a run; the bars of this backend stand out."""
    lines: list[str] = []
    y = 12
    if "learning" in results:
        lines, y = curves(results["learning"])
    for group in groups(results):
        lines.append(_text(12, y + 18, group.title, weight="bold"))
        y += HEAD - GAP
        longest = max(group.bars.values())
        for name, value in group.bars.items():
            length = max(2.0, value / longest * (WIDTH - LEFT - RIGHT))
            colour = OURS if name.startswith(NAMES["ours"]) else OTHERS
            lines.append(_text(LEFT - 8, y + 14, name, anchor="end"))
            lines.append(f'<rect x="{LEFT}" y="{y}" width="{length:.1f}" height="{BAR}" rx="3" fill="{colour}"/>')
            lines.append(_text(LEFT + length + 8, y + 14, _number(value)))
            y += BAR + GAP
        y += GAP * 2
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y}" viewBox="0 0 {WIDTH} {y}" '
        'font-family="system-ui, sans-serif" font-size="13">'
    )
    return "\n".join([head, f'<rect width="{WIDTH}" height="{y}" fill="#ffffff"/>', *lines, "</svg>", ""])


def curves(learning: Results) -> tuple[list[str], int]:
    """Lines of what is right after how many labels, and the pixels that they take downwards."""
    steps, top, height = learning["steps"], 44, 260
    counts = [step["labels"] for step in steps]
    span = math.log(counts[-1] / counts[0]) or 1.0
    lowest = math.floor(10 * min(step[name] for step in steps for name in CURVES)) / 10

    def place(count: int, share: float) -> tuple[float, float]:
        x = LEFT + math.log(count / counts[0]) / span * (WIDTH - LEFT - RIGHT)
        return x, top + (1 - share) / (1 - lowest) * height

    title = f"Unseen pictures that are answered rightly, by labels of each of {learning['classes']} classes"
    lines = [_text(12, 30, title, weight="bold")]
    for tenth in range(round(lowest * 10), 11):
        y = place(counts[0], tenth / 10)[1]
        lines.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="#e2e8f0"/>')
        lines.append(_text(LEFT - 8, y + 4, f"{tenth * 10} %", anchor="end"))
    lines += [_text(place(count, 0)[0], top + height + 22, str(count), anchor="middle") for count in counts]
    for name, (_, colour) in CURVES.items():
        points = [place(step["labels"], step[name]) for step in steps]
        way = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        lines.append(f'<path d="{way}" fill="none" stroke="{colour}" stroke-width="2.5"/>')
    ends = sorted((place(counts[-1], steps[-1][name])[1], said) for name, (said, _) in CURVES.items())
    below = 0.0
    for y, said in ends:
        below = max(y + 4, below + 16)  # no name on another one
        lines.append(_text(WIDTH - RIGHT + 8, below, said))
    return lines, top + height + 40


def groups(results: Results) -> list[Group]:
    """What the measured parts give to compare."""
    found = []
    if "single" in results:
        single = results["single"]
        for clients in single["ours"]:
            if clients in ("1", "32"):
                title = f"One task per request, {'one client' if clients == '1' else f'{clients} clients'}: median, ms"
                found.append(Group(title, {NAMES[name]: single[name][clients]["p50_ms"] for name in single}))
    if "batch" in results:
        for way, where in (("disk", "on disk"), ("http", "over HTTP")):
            paces = results["batch"][way]
            title = f"{paces['ours']['tasks']:,} tasks in one request, pictures {where}: tasks a second"
            found.append(Group(title, {NAMES[name]: paces[name]["per_s"] for name in paces}))
    if "studio" in results:
        studio = results["studio"]
        names = {"disk_s": "this backend, disk", "http_s": "this backend, HTTP", "constant_s": "constant answers"}
        bars = {said: median(studio[name]) for name, said in names.items()}
        found.append(Group(f"Retrieve Predictions of {studio['tasks']:,} tasks in Label Studio: seconds", bars))
    if "learned" in results:
        learned = results["learned"]
        names = {"ours, new": "this backend, new", "ours, known": "this backend, known", "limit": "limit"}
        bars = {said: learned["single"][name]["p50_ms"] for name, said in names.items()}
        found.append(Group("One task per request, with a learned model: median, ms", bars))
        names = {"new_s": "this backend, new", "known_s": "this backend, known", "constant_s": "constant answers"}
        bars = {said: median(learned["studio"][name]) for name, said in names.items()}
        title = f"Retrieve Predictions of {learned['studio']['tasks']:,} tasks, with a learned model: seconds"
        found.append(Group(title, bars))
    if "start" in results:
        starts = results["start"]
        bars = {NAMES[name]: starts[name]["setup_s"] for name in ("ours", "stock", "tutorial")}
        found.append(Group("Start to the first /setup: seconds", bars))
    return found


def _text(x: float, y: float, text: str, anchor: str = "start", weight: str = "normal") -> str:
    return (f'<text x="{x:.1f}" y="{y}" text-anchor="{anchor}" font-weight="{weight}" fill="{INK}">'
            f"{escape(text)}</text>")  # fmt: skip


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
