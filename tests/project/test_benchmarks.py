"""The benchmarks' own arithmetic and what they print; nothing is measured here."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks import annotators, cli, kills, memory, scores
from benchmarks.album import lay_out
from benchmarks.bench import Bench, Sizes
from benchmarks.chart import chart
from benchmarks.jobs import Pace, Told
from benchmarks.learning import learning
from benchmarks.load import percentile, summary
from benchmarks.memory import slope
from benchmarks.order import ORDERS, Album, Annotator, reached
from benchmarks.report import Ratio, figures, ratios, shown_in, table_of, text_of
from benchmarks.soak_record import Record, by_minute, deaths, growth, latencies, leftovers, training
from benchmarks.studio import in_turns
from celestial_backend.errors import StateError
from celestial_backend.features import unit
from celestial_backend.jobs.ledger import Job
from celestial_backend.planets.renderer import render
from tests.support.backend_server import REPOSITORY

PARTS = ("start", "single", "batch", "studio", "learned", "memory", "growth", "learning")


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
    "learned": {
        "single": {name: {"p50_ms": p50_ms} for name, p50_ms in (("ours, new", 26), ("limit", 20), ("ours, known", 5))},
        "studio": {"tasks": 1000, "constant_s": [40.0], "new_s": [47.0, 48.0], "known_s": [41.0]},
    },
    "memory": {"idle_mb": 500.0, "after_mb": {"1000": 600.0, "10000": 615.0}, "peak_mb": 750.0},
    "growth": {
        "steps": [
            {"tasks": 100, "seconds": 0.1, "peak_mb": 600.0},
            {"tasks": 1000, "seconds": 2.0, "peak_mb": 660.0},
        ]
    },
}
LEARNING = {
    "classes": 4, "train": 40, "test": 20, "seeds": 2,
    "steps": [
        {"labels": labels, "ours": ours, "plain": ours - 0.1, "pixels": 0.25, "ours_s": 2.0, "ours_new_s": 6.04}
        for labels, ours in ((2, 0.7), (5, 0.8), (10, 0.9))
    ],
}  # fmt: skip


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
        pytest.param(
            "One task with a learned model, a new picture: p50 ÷ the limit's", "1.30", "≤ 1.5", "yes", id="new"
        ),
        pytest.param(
            "*Retrieve Predictions* of 1,000 with a learned model, pictures seen before: time ÷ constant predictions'",
            "1.02", "≤ 1.1", "yes", id="known",
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
    """Each part stands for itself; what was learned is a table of its own."""
    alone = [len(ratios({part: RESULTS[part]})) for part in RESULTS]
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


def test_what_was_learned_is_told() -> None:
    """A row for each number of labels, and a line through as many points for each way to learn."""
    assert table_of({"learning": LEARNING}).splitlines()[2:] == [
        f"| {labels} | {ours:.3f} | {ours - 0.1:.3f} | 0.250 | 2.0 | 6.0 |"
        for labels, ours in ((2, 0.7), (5, 0.8), (10, 0.9))
    ]
    svg = ET.fromstring(chart({"learning": LEARNING}))  # noqa: S314 - our own
    lines = [path.attrib["d"] for path in svg.findall("{*}path") if "L" in path.attrib["d"]]
    points = [[float(y) for _, y in re.findall(r"([\d.]+) ([\d.]+)", line)] for line in lines]
    assert [len(each) for each in points] == [3, 3, 3]
    ours, plain, pixels = points
    assert ours[0] - ours[1] == pytest.approx(plain[1] - plain[2], abs=0.2)  # ten per cent are as high everywhere
    assert all(one < other for one, other in zip(ours, plain, strict=True))
    assert len(set(pixels)) == 1
    assert all(float(text.attrib["y"]) < float(svg.attrib["height"]) for text in svg.findall("{*}text"))


def drawn_folder(place: Path) -> Path:
    """Pictures of three bodies to learn from, and others to judge by."""
    for part, count in (("train", 6), ("test", 2)):
        for body in ("Earth", "Mars", "Saturn"):
            (place / part / body).mkdir(parents=True)
            for number in range(count):
                render(body, (count, number)).save(place / part / body / f"{number}.png")
    return place


def test_learning_is_measured_as_a_project_learns(tmp_path: Path) -> None:
    """For each number of labels that the folder has; more labels than it has are not measured."""
    pictures, album = drawn_folder(tmp_path / "pictures"), lay_out(tmp_path / "work", [])
    bench = Bench(tmp_path, Sizes(labels=(2, 4, 7), seeds=2), album, lambda _: None, pictures)
    found = learning(bench)
    assert [step["labels"] for step in found["steps"]] == [2, 4]
    assert (found["classes"], found["train"], found["test"]) == (3, 18, 6)
    for step in found["steps"]:
        assert step["ours"] >= 5 / 6
        assert step["ours_new_s"] > 0
        assert 0 <= step["pixels"] <= 1


def test_learning_needs_a_folder_to_learn_from(tmp_path: Path) -> None:
    asked = command("learning", "--pictures", drawn_folder(tmp_path / "pictures") / "train", "--output", tmp_path)
    assert asked.returncode != 0
    assert "--pictures FOLDER with train and test" in asked.stderr


@pytest.mark.parametrize("name", ["results", "learned", "learning"])
def test_the_page_shows_the_measured_figures(name: str) -> None:
    """Its tables are those that the kept results give, of whole runs, and so are the pictures."""
    page, file = (REPOSITORY / "docs" / "performance.md").read_text(), REPOSITORY / f"benchmarks/results/{name}.json"
    results = json.loads(file.read_text())
    assert f"<!-- {name} -->" in page
    assert shown_in(page, name, results) == page
    assert file.with_suffix(".svg").read_text() == chart(results)
    assert not results["about"]["quick"]


def test_the_figures_of_trust_show_how_often_intervals_hold_the_truth() -> None:
    """The table is that of the kept results, of runs through a real Label Studio and of others."""
    results = json.loads((REPOSITORY / "benchmarks" / "results" / "annotators.json").read_text())
    assert "\n".join(annotators.table_of(results)) in (REPOSITORY / "docs" / "trust-measured.md").read_text()
    for kind in results.values():
        assert kind["runs"] >= 50
        assert min(told["share"] for told in kind["figures"].values()) >= 0.9


def test_a_run_writes_its_own_table_into_the_page() -> None:
    """What stands between the marks is replaced, and nothing else; a page without them stays as it is."""
    page = "Before\n<!-- learning -->\nold\n<!-- end -->\n<!-- results -->\nolder\n<!-- end -->\nAfter\n"
    table = table_of({"learning": LEARNING})
    assert shown_in(page, "learning", {"learning": LEARNING}) == page.replace("old\n", f"{table}\n", 1)
    assert shown_in(page, "single", RESULTS) == page


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


@pytest.mark.parametrize("load", [pytest.param(0.4, id="quiet"), pytest.param(0.7, id="busy")])
def test_the_load_of_the_machine_is_noted(load: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The load average from before the first part stands in the JSON, and one that changes figures is warned of."""
    (tmp_path / "pictures").mkdir()
    render("Mars", 1).save(tmp_path / "pictures" / "mars.png")
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr("os.getloadavg", lambda: (load, 0.1, 0.1))
    monkeypatch.setattr(Bench, "fill_store", lambda _: None)
    monkeypatch.setitem(cli.PARTS, "memory", ("A part.", lambda _: RESULTS["memory"]))
    ran = CliRunner().invoke(
        cli.main, ["memory", "--pictures", str(tmp_path / "pictures"), "--output", str(tmp_path / "found")]
    )
    assert ran.exit_code == 0, ran.output
    about = json.loads((tmp_path / "found" / "memory.json").read_text())["about"]
    assert about["load_average"] == [load, 0.1, 0.1]
    assert ("Its load average must be 0.5 at the most, and is 0.7." in ran.stderr) == (load == 0.7)


def test_every_way_is_measured_in_every_round() -> None:
    """In turns, back and forth, so that none always finds the fullest database; a way may have several figures."""
    titles: list[str] = []

    def way(title: str) -> dict[str, float]:
        titles.append(title)
        return {"s": len(titles), "work_s": len(titles) / 10}

    found = in_turns({"a": way, "b": way}, 3, lambda _: None)
    assert titles == ["a 0", "b 0", "b 1", "a 1", "a 2", "b 2"]
    assert found["a_s"] == [1, 4, 5]
    assert found["b_work_s"] == [0.2, 0.3, 0.6]


def test_a_peak_is_forgotten() -> None:
    """What a process once held, and gave back, is not taken for the peak of a later step."""
    holds = "held = b'x' * 300_000_000; del held; print('gave it back', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", holds], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        server: Any = SimpleNamespace(group=process.pid)
        before = memory._resident(server)
        memory._forget_peak(server)
        after = memory._resident(server)
        process.kill()
    assert after["mb"] <= after["peak_mb"] < 300 < before["peak_mb"]


@contextmanager
def standing(*_: object) -> Iterator[SimpleNamespace]:
    """A Label Studio in which each of two tasks has one prediction."""
    yield SimpleNamespace(predictions=lambda: 2, held=lambda: Counter([1, 2]))


@pytest.mark.parametrize(
    ("program", "told", "code"),
    [
        pytest.param("import time; time.sleep(2)", "2 of 2 kills", 0, id="killed"),
        pytest.param("", "0 of 2 kills", 1, id="ended before"),
    ],
)
def test_only_real_kills_count(program: str, told: str, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that ended before it could be killed is no kill, and fewer kills than were asked for are a failure."""

    @contextmanager
    def command(*_: object) -> Iterator[subprocess.Popen[bytes]]:
        with subprocess.Popen([sys.executable, "-c", program]) as process:
            yield process

    monkeypatch.setattr(kills, "_place", standing)
    monkeypatch.setattr(kills, "_command", command)
    ran = CliRunner().invoke(kills.main, ["--tasks", "2", "--kills", "2"])
    assert told in ran.output
    assert ran.exit_code == code


def test_a_command_does_not_outlive_its_run(tmp_path: Path) -> None:
    """Whatever comes between, such as a wait that takes too long."""
    place = kills.Place(None, 1, {"MODEL_DIR": str(tmp_path)})  # type: ignore[arg-type]
    with pytest.raises(subprocess.TimeoutExpired), kills._command(place, 100) as process:
        process.wait(0.01)
    assert process.returncode == -signal.SIGKILL


def job(state: str, reason: str = "") -> Job:
    return Job("1", "7", state, requests=1, attempts=1, requested_at=0.0, reason=reason)


@pytest.mark.parametrize(
    ("ended", "served", "problems"),
    [
        pytest.param(job("published", "Better."), True, [], id="published"),
        pytest.param(job("kept", "Worse."), False, [], id="kept"),
        pytest.param(job("failed", "No labels."), False, ["The training ended as failed: No labels."], id="failed"),
        pytest.param(job("running"), False, ["The training did not end: it is running."], id="running"),
        pytest.param(None, False, ["The training that was asked for is not in the list of jobs."], id="none"),
        pytest.param(
            job("published"), False, ["The training was published, and the project is served the old model."],
            id="not served",
        ),
    ],
)  # fmt: skip
def test_a_soak_tells_how_its_training_ended(ended: Job | None, served: bool, problems: list[str]) -> None:
    """A training that did not do what it was to do is a problem; a model that was kept is only told."""
    record = Record()
    told = training(record, ended, served=served)
    assert record.problems == problems
    assert told == {"state": ended.state if ended else "unknown", "reason": ended.reason if ended else ""}


def seen(rss_mb: float, rise: float = 0.0, until: int = 1000) -> list[dict[str, float]]:
    """A process that is looked at every second, while ten tasks a second are predicted."""
    return [
        {"at": at, "tasks": at * 10, "rss_mb": rss_mb + rise * at / 100, "pss_mb": 1, "threads": 2, "files": 3}
        for at in range(until)
    ]


def test_a_soak_sees_a_process_that_dies_early() -> None:
    """Also before anything is steady; a training's process is to end, and one seen once was no process of its own."""
    record = Record()
    record.processes |= {
        "web 1": seen(100), "web 2": seen(100, until=30), "trainer 3": seen(100, until=99), "worker 4": seen(9, until=1)
    }  # fmt: skip
    deaths(record, 999)
    assert record.problems == ["The process web 2 ended after 29 s."]


def test_a_soak_tells_growth_and_how_fast() -> None:
    """Megabytes for a thousand tasks in the last half, the middle of every minute, and what grew too much."""
    record = Record()
    record.processes |= {"web 1": seen(100), "web 2": seen(100, rise=2.0), "trainer 3": seen(100, until=200)}
    found = growth(record, 200, 1000)
    assert {name: one["rss_mb_per_1000_tasks"] for name, one in found.items()} == {"web 1": 0.0, "web 2": 2.0}
    assert record.problems == ["web 2: rss_mb grew from 104.8 to 119.2."]
    assert by_minute(seen(100, rise=2.0, until=120), "rss_mb") == [[0, 100.6], [1, 101.8]]
    assert growth(record, 1000, 1000) == {}


def test_a_soak_counts_what_is_left_on_the_disk() -> None:
    """A few files come and go; more than that are a problem."""
    record = Record()
    record.folders += [{"at": at, "state": 10 + at // 200, "tmp": at // 100} for at in range(1000)]
    assert leftovers(record, 200, 1000) == {"state": [11, 14], "tmp": [2, 9]}
    assert record.problems == ["The files in the folder tmp grew from 2 to 9."]
    assert leftovers(record, 2000, 1000) == {}


def test_a_soak_tells_percentiles_by_the_nearest_rank() -> None:
    """As the benchmarks do: of a hundred values, the median is the fiftieth."""
    record = Record()
    for number in range(100, 0, -1):
        record.answer("predict 1", 0.0, number / 1000, "200")
    found = latencies(record, 0.0, 0.0, 10.0)["predict 1"]
    assert {name: found[name] for name in ("p50", "p95", "p99", "max")} == {"p50": 50, "p95": 95, "p99": 99, "max": 100}
    assert found["first_and_last_p50"] == [50.5, None]


def test_a_call_that_fails_is_counted_and_not_timed() -> None:
    """It would make the others look quick; what several have seen is added up."""
    asked: list[int] = []

    def call() -> None:
        asked.append(1)
        if len(asked) % 2:
            raise StateError("It was away.")

    told = Pace(1000, time.monotonic() + 0.2).calls(call)
    assert (len(told.seconds), told.errors["StateError"]) == (len(asked) // 2, (len(asked) + 1) // 2)
    both = Told([0.001, 0.003])
    both.add(Told([0.002], Counter(StateError=1)))
    assert " ".join(str(both).split()) == "3 x, p50 2.00 ms, p99 3.00 ms, {'StateError': 1}"


def test_labels_to_an_aim_are_counted_between_two_trainings() -> None:
    assert reached([(10, 0.5), (20, 0.9)], 0.7) == pytest.approx(15)
    assert reached([(10, 0.5), (20, 0.9)], 0.95) is None


def test_every_order_gives_each_picture_once_and_none_that_is_labelled() -> None:
    vectors = np.eye(12, dtype=np.float32)[np.arange(36) % 12]
    names = np.array(["a", "b", "c"])[np.arange(36) % 3]
    annotator = Annotator(Album(vectors, names), Album(vectors, names), 1)
    for order in ORDERS.values():
        assert sorted(order(annotator, [3, 4], None)) == sorted({*range(30)} - {3, 4})


def test_figures_of_scores() -> None:
    """Of clouds that lie apart, heads are right and their scores say so; a pair that is left out is found."""
    rng, middles = np.random.default_rng(1), np.random.default_rng(2).normal(size=(5, 32))
    names = np.repeat(list("abcde"), 40)
    parts = [
        Album(unit((np.repeat(middles, 40, axis=0) + rng.normal(size=(200, 32))).astype(np.float32)), names)
        for _ in range(2)
    ]
    found = scores.of_heads(*parts, 60, 0, 1.0)
    assert found is not None
    assert found["right"] > 0.95
    assert found["error"] == pytest.approx(abs(found["right"] - found["mean score"]), abs=0.06)
    beyond = scores.of_unknown(*parts, ("a", "b"), 40, 0)
    assert beyond is not None
    assert beyond["area"] > 0.95
    assert beyond["unknown withheld"] > 10 * beyond["known withheld"]
