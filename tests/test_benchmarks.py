"""The benchmarks' own arithmetic and what they print; nothing is measured here."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from backend_server import REPOSITORY

from benchmarks.album import lay_out
from benchmarks.chart import chart
from benchmarks.load import percentile, summary
from benchmarks.memory import slope
from benchmarks.report import Ratio, figures, ratios, table_of, text_of
from celestial_backend.renderer import render

PARTS = ("start", "single", "batch", "studio", "memory", "growth")


def timed(p50_ms: float) -> dict[str, dict[str, float]]:
    return {"1": {"p50_ms": p50_ms, "p95_ms": p50_ms * 2, "p99_ms": p50_ms * 3}}


RESULTS: dict[str, Any] = {
    "single": {"ours": timed(5), "limit": timed(2), "stock": timed(80), "tutorial": timed(100)},
    "batch": {
        "disk": {
            "ours": {"tasks": 1000, "per_s": 90.0},
            "limit": {"per_s": 100.0},
            "stock": {"per_s": 10.0},
            "tutorial": {"per_s": 9.0},
        },
        "http": {"ours": {"tasks": 1000, "per_s": 40.0}, "limit": {"per_s": 80.0}},
    },
    "studio": {
        "tasks": 1000,
        "constant_s": [30.0, 90.0, 40.0],
        "disk_s": [46.0],
        "http_s": [60.0],
        "serving_s": [20.0],
        "prelabel_disk_s": [20.0],
        "prelabel_http_s": [30.0],
    },
    "start": {
        "ours": {"setup_s": 1.5, "predict_s": 8.0},
        "stock": {"setup_s": 6.0, "predict_s": 7.0},
        "tutorial": {"setup_s": 5.0, "predict_s": 6.0},
    },
    "memory": {"idle_mb": 500.0, "after_mb": {"1000": 600.0, "10000": 615.0}, "peak_mb": 750.0},
    "growth": {
        "steps": [
            {"tasks": 100, "seconds": 0.1, "peak_mb": 600.0},
            {"tasks": 1000, "seconds": 2.0, "peak_mb": 660.0},
        ]
    },
}


def command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "benchmarks", *map(str, arguments)]
    return subprocess.run(line, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=60)


def test_help_lists_the_parts() -> None:
    """Each part stands in the help with a sentence, and no other part can be asked for."""
    listed = command("--help").stdout.split("\nParts:\n")[1]
    assert tuple(line.split()[0] for line in listed.splitlines() if re.match(r"  \w", line)) == PARTS
    assert command("single", "unknown").returncode == 2


@pytest.mark.parametrize(
    ("what", "shown", "aim", "met"),
    [
        pytest.param("One task per request, one client: p50 ÷ the tutorial's", "1/20.0", "≤ 1/20", "yes", id="guide"),
        pytest.param("One task per request, one client: p50 ÷ the limit's", "2.50", "≤ 3", "yes", id="limit"),
        pytest.param("One task per request, one client: p50 ÷ the SDK's template's", "1/16.0", "", "", id="no aim"),
        pytest.param(
            "1,000 tasks in one request, pictures on disk: throughput ÷ the limit's", "0.90", "≥ 0.85", "yes",
            id="disk",
        ),
        pytest.param(
            "1,000 tasks in one request, pictures over HTTP: throughput ÷ the limit's", "0.50", "", "", id="http"
        ),
        pytest.param(
            "*Retrieve Predictions* of 1,000, pictures on disk: time ÷ constant predictions'", "1.15", "≤ 1.1", "no",
            id="median of rounds",
        ),
        pytest.param(
            "*Retrieve Predictions* of 1,000, pictures over HTTP: time ÷ constant predictions' and serving's",
            "1.00", "", "", id="serving",
        ),
        pytest.param("Start to the first `/setup`, as a share of two seconds", "0.75", "≤ 1", "yes", id="start"),
        pytest.param(
            "Memory after 10,000 tasks: ÷ that after 1,000", "1.02", "≥ 0.95 and ≤ 1.05", "yes", id="memory"
        ),
        pytest.param("Time of one task among 1,000 in a request: ÷ one among 100", "2.00", "", "", id="growth"),
    ],
)  # fmt: skip
def test_ratios_are_those_of_the_figures(what: str, shown: str, aim: str, met: str) -> None:
    """Given figures make known ratios, said as people say them, and held against their aims."""
    (ratio,) = [ratio for ratio in ratios(RESULTS) if ratio.what == what]
    assert (ratio.shown, ratio.aim, ratio.met) == (shown, aim, met)


def test_an_aim_that_is_missed_is_said_to_be() -> None:
    """On either side of the aim."""
    bounds = {"least": 0.95, "most": 1.05}
    assert [Ratio("", value, "", **bounds).met for value in (0.94, 0.95, 1.05, 1.06)] == ["no", "yes", "yes", "no"]


def test_a_part_that_was_not_run_has_no_rows() -> None:
    """Each part stands for itself."""
    alone = [len(ratios({part: RESULTS[part]})) for part in PARTS]
    assert all(alone)
    assert len(ratios(RESULTS)) == sum(alone)
    assert not ratios({"about": {"quick": True}})


def test_the_table_comes_from_the_json(tmp_path: Path) -> None:
    """``--table`` prints the Markdown table of an earlier run and measures nothing."""
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    printed = command("--table", tmp_path / "results.json").stdout
    assert printed.strip() == table_of(RESULTS)
    rows = [line.strip("|").split(" | ") for line in printed.splitlines()]
    assert {len(row) for row in rows} == {5}
    assert "| One task per request, one client: p50 ÷ the limit's | 2.50 | ≤ 3 | yes | 5.0 ms, 2.0 ms |" in printed


def test_the_readme_shows_the_measured_figures() -> None:
    """Its table and its picture are those that the kept results give, of a whole run; there are none without them."""
    kept = REPOSITORY / "benchmarks" / "results" / "results.json"
    section = (REPOSITORY / "README.md").read_text().split("\n## How fast it is\n")[1].split("\n## ")[0]
    table = "\n".join(line for line in section.splitlines() if line.startswith("|"))
    results = json.loads(kept.read_text()) if kept.exists() else {}
    assert table == (table_of(results) if results else "")
    if results:
        assert kept.with_suffix(".svg").read_text() == chart(results)
        assert not results["about"]["quick"]


def test_ratios_come_before_figures() -> None:
    """On a terminal the ratios are read first, and every figure is there."""
    above, _, below = text_of(RESULTS).partition("\nFigures\n")
    assert "1/20.0" in above
    assert below.splitlines() == list(figures(RESULTS))
    assert "single tutorial 1 p99_ms: 300" in below
    assert "growth steps: tasks 1000, seconds 2.0, peak_mb 660.0" in below


def test_the_picture_shows_the_figures() -> None:
    """Bars of one group are as long as their figures are large, and ours is the one in colour."""
    svg = ET.fromstring(chart(RESULTS))  # noqa: S314 - our own
    texts = [text.text for text in svg.findall("{*}text")]
    bars = svg.findall("{*}rect")[1:]  # the first is the ground
    assert "One task per request, one client: median, ms" in texts
    lengths = [float(bar.attrib["width"]) for bar in bars[:4]]
    assert [round(length / lengths[3], 2) for length in lengths] == [0.05, 0.02, 0.8, 1]
    assert texts[1:9] == ["this backend", "5.00", "limit", "2.00", "SDK's template", "80.0", "tutorial", "100"]
    assert len({bar.attrib["fill"] for bar in bars[:4]}) == 2
    assert all(float(bar.attrib["x"]) + float(bar.attrib["width"]) < float(svg.attrib["width"]) for bar in bars)


def test_percentiles() -> None:
    """The nearest rank: a value that was really measured."""
    values = [number / 1000 for number in range(100, 0, -1)]
    assert [percentile(values, share) for share in (0.5, 0.95, 0.99, 1)] == [0.05, 0.095, 0.099, 0.1]
    assert percentile([7.0], 0.99) == 7.0
    assert summary(values, 2.0) == {"p50_ms": 50.0, "p95_ms": 95.0, "p99_ms": 99.0, "calls": 100, "per_s": 50.0}


def test_slope() -> None:
    """Of points on a line, its own; of scattered ones, by least squares."""
    assert slope([1, 2, 4], [5, 7, 11]) == pytest.approx(2)
    assert slope([0, 1, 2], [0, 2, 1]) == pytest.approx(0.5)


def test_the_pictures_lie_where_every_backend_looks(tmp_path: Path) -> None:
    """One file under its own name and as an upload; the tutorial's way of finding the name leads to it."""
    render("Mars", 1).save(tmp_path / "a-picture.PNG")
    album = lay_out(tmp_path / "work", [tmp_path / "a-picture.PNG"] * 2)
    addresses = album.addresses(3)
    assert addresses[0] == addresses[2] != addresses[1]
    for address, name in zip(addresses, album.take(3), strict=True):
        upload = album.studio_data / "media" / address.removeprefix("/data/")
        assert upload.read_bytes() == (album.originals / name).read_bytes() == (tmp_path / "a-picture.PNG").read_bytes()
        assert "".join(address.split("-")[1:]) == name
