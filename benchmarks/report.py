"""What the figures of a run say: ratios with their aims, and the figures themselves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

Results = dict[str, Any]
KNOWN_AS = {"ours": "this backend", "limit": "limit", "stock": "SDK's template", "tutorial": "tutorial"}


@dataclass(frozen=True)
class Ratio:
    """
    One comparison within one run.

    Attributes:
        what: What is compared with what.
        value: The first by the second.
        figures: Both, with their unit.
        least, most: The aim, where there is one: the value should lie between.
    """

    what: str
    value: float
    figures: str
    least: float | None = None
    most: float | None = None

    @property
    def shown(self) -> str:
        """The value as people say it: a small one as a fraction."""
        return f"1/{1 / self.value:.1f}" if 0 < self.value < 0.4 else f"{self.value:.2f}"

    @property
    def aim(self) -> str:
        """The aim as people say it; empty without."""
        bounds = [(sign, bound) for sign, bound in (("≥", self.least), ("≤", self.most)) if bound is not None]
        return " and ".join(f"{sign} {f'1/{1 / bound:.0f}' if bound < 0.4 else f'{bound:g}'}" for sign, bound in bounds)

    @property
    def met(self) -> str:
        """Whether the aim is reached; empty without one."""
        if not self.aim:
            return ""
        low, high = self.least, self.most
        return "yes" if (low is None or self.value >= low) and (high is None or self.value <= high) else "no"


def ratios(results: Results) -> list[Ratio]:
    """The comparisons that the measured parts allow, in the order of the parts."""
    known = {"single": _single, "batch": _batch, "studio": _studio, "learned": _learned, "start": _start,
             "memory": _memory, "growth": _growth}  # fmt: skip
    return [ratio for part, ratios_of in known.items() if part in results for ratio in ratios_of(results[part])]


def table_of(results: Results) -> str:
    """The ratios, and what was learned from how many labels, as Markdown tables."""
    tables = [_table(rows) for rows in (_ratio_rows(results), _learning_rows(results)) if len(rows) > 1]
    return "\n\n".join(tables)


def shown_in(page: str, name: str, results: Results) -> str:
    """A page with the tables of a run between its marks, ``<!-- name -->`` and ``<!-- end -->``, if it has them."""
    mark = f"<!-- {name} -->\n"
    before, found, after = page.partition(mark)
    return f"{before}{mark}{table_of(results)}\n<!-- end -->{after.partition('<!-- end -->')[2]}" if found else page


def _table(rows: list[tuple[str, ...]]) -> str:
    head, *others = rows
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ("---",) * len(head), *others))


def _ratio_rows(results: Results) -> list[tuple[str, ...]]:
    rows = [(each.what, each.shown, each.aim, each.met, each.figures) for each in ratios(results)]
    return [("", "ratio", "aim", "met", "figures"), *rows]


def _learning_rows(results: Results) -> list[tuple[str, ...]]:
    steps = results.get("learning", {}).get("steps", [])
    head = ("labels of each class", "this backend", "plain linear head", "raw pixels", "seconds, features known",
            "seconds, new pictures")  # fmt: skip
    return [head] + [
        (str(step["labels"]), *(f"{step[name]:.3f}" for name in ("ours", "plain", "pixels")),
         *(f"{step[name]:.1f}" for name in ("ours_s", "ours_new_s")))
        for step in steps
    ]  # fmt: skip


def text_of(results: Results) -> str:
    """Ratios first, figures second, for a terminal."""
    rows = [(each.what, each.shown, each.aim, each.met) for each in ratios(results)]
    rows.insert(0, ("Ratio", "", "aim", "met"))
    width = max(len(row[0]) for row in rows)
    lines = [f"{what:<{width}}  {value:>8}  {aim:<17}  {met}".rstrip() for what, value, aim, met in rows]
    return "\n".join([*lines, "", "Figures", *figures(results)])


def figures(results: Results, path: str = "") -> Iterator[str]:
    """All numbers and texts of a run, each on a line after its place."""
    for key, value in results.items():
        place = f"{path} {key}".strip()
        if isinstance(value, dict):
            yield from figures(value, place)
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for each in value:
                yield f"{place}: " + ", ".join(f"{name} {number}" for name, number in each.items())
        else:
            yield f"{place}: {', '.join(map(str, value)) if isinstance(value, list) else value}"


def _single(found: Results) -> Iterator[Ratio]:
    for clients, mine in found["ours"].items():
        crowd = "one client" if clients == "1" else f"{clients} clients"
        for other, most in (("tutorial", 1 / 20), ("limit", 3.0), ("stock", None)):
            theirs = found[other][clients]
            yield Ratio(
                f"One task per request, {crowd}: p50 ÷ the {KNOWN_AS[other]}'s",
                mine["p50_ms"] / theirs["p50_ms"],
                f"{mine['p50_ms']:.1f} ms, {theirs['p50_ms']:.1f} ms",
                most=most if clients == "1" else None,
            )


def _batch(found: Results) -> Iterator[Ratio]:
    for way, where in (("disk", "on disk"), ("http", "over HTTP")):
        mine = found[way]["ours"]
        for other in ("limit", "stock", "tutorial"):
            if other in found[way]:
                theirs = found[way][other]
                yield Ratio(
                    f"{mine['tasks']:,} tasks in one request, pictures {where}: throughput ÷ the {KNOWN_AS[other]}'s",
                    mine["per_s"] / theirs["per_s"],
                    f"{mine['per_s']:.0f}/s, {theirs['per_s']:.0f}/s",
                    least=0.85 if other == "limit" and way == "disk" else None,
                )


def _studio(found: Results) -> Iterator[Ratio]:
    count, instant = found["tasks"], median(found["constant_s"])
    for name, what, most in (
        ("disk_s", "*Retrieve Predictions* of {}, pictures on disk: time ÷ constant predictions'", 1.1),
        ("http_s", "*Retrieve Predictions* of {}, pictures over HTTP: time ÷ constant predictions'", None),
        ("prelabel_disk_s", "`prelabel` of {}, pictures on disk: time ÷ *Retrieve* of constant predictions'", None),
        ("prelabel_http_s", "`prelabel` of {}, pictures over HTTP: time ÷ *Retrieve* of constant predictions'", None),
    ):
        mine = median(found[name])
        yield Ratio(what.format(f"{count:,}"), mine / instant, f"{mine:.1f} s, {instant:.1f} s", most=most)
    mine, least = median(found["http_s"]), instant + median(found["serving_s"])
    yield Ratio(f"*Retrieve Predictions* of {count:,}, pictures over HTTP: time ÷ constant predictions' and serving's",
                mine / least, f"{mine:.1f} s, {least:.1f} s")  # fmt: skip


def _learned(found: Results) -> Iterator[Ratio]:
    one, least = found["single"], found["single"]["limit"]["p50_ms"]
    for name, what, most in (("ours, new", "a new picture", 1.5), ("ours, known", "a picture seen before", None)):
        mine = one[name]["p50_ms"]
        yield Ratio(f"One task with a learned model, {what}: p50 ÷ the limit's", mine / least,
                    f"{mine:.1f} ms, {least:.1f} ms", most=most)  # fmt: skip
    count, instant = found["studio"]["tasks"], median(found["studio"]["constant_s"])
    for name, what, most in (("new_s", "new pictures", 1.2), ("known_s", "pictures seen before", 1.1)):
        mine = median(found["studio"][name])
        yield Ratio(
            f"*Retrieve Predictions* of {count:,} with a learned model, {what}: time ÷ constant predictions'",
            mine / instant, f"{mine:.1f} s, {instant:.1f} s", most=most,
        )  # fmt: skip


def _start(found: Results) -> Iterator[Ratio]:
    mine, two_s = found["ours"], 2.0
    yield Ratio("Start to the first `/setup`, as a share of two seconds", mine["setup_s"] / two_s,
                f"{mine['setup_s']:.2f} s, 2 s", most=1.0)  # fmt: skip
    for name, what in (("setup_s", "`/setup`"), ("predict_s", "prediction")):
        for other in ("tutorial", "stock"):
            yield Ratio(f"Start to the first {what}: ÷ the {KNOWN_AS[other]}'s", mine[name] / found[other][name],
                        f"{mine[name]:.2f} s, {found[other][name]:.2f} s")  # fmt: skip


def _memory(found: Results) -> Iterator[Ratio]:
    counts = sorted(map(int, found["after_mb"]))
    first, last = (found["after_mb"][str(count)] for count in (counts[0], counts[-1]))
    yield Ratio(f"Memory after {counts[-1]:,} tasks: ÷ that after {counts[0]:,}", last / first,
                f"{last:.0f} MB, {first:.0f} MB", least=0.95, most=1.05)  # fmt: skip
    idle = found["idle_mb"]
    yield Ratio(f"Memory after {counts[-1]:,} tasks: ÷ that after the first prediction", last / idle,
                f"{last:.0f} MB, {idle:.0f} MB")  # fmt: skip
    peak = found["peak_mb"]
    yield Ratio("Memory at its peak: ÷ that after the first prediction", peak / idle, f"{peak:.0f} MB, {idle:.0f} MB")


def _growth(found: Results) -> Iterator[Ratio]:
    first, last = found["steps"][0], found["steps"][-1]
    each = [step["seconds"] / step["tasks"] * 1000 for step in (first, last)]
    yield Ratio(f"Time of one task among {last['tasks']:,} in a request: ÷ one among {first['tasks']:,}",
                each[1] / each[0], f"{each[1]:.2f} ms, {each[0]:.2f} ms")  # fmt: skip
    peaks = [step["peak_mb"] for step in (first, last)]
    yield Ratio(f"Peak of memory with {last['tasks']:,} tasks in a request: ÷ that with {first['tasks']:,}",
                peaks[1] / peaks[0], f"{peaks[1]:.0f} MB, {peaks[0]:.0f} MB")  # fmt: skip
