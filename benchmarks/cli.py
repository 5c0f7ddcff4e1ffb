"""The command line of the benchmarks."""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import click

from benchmarks.album import SIZE_PX, drawn, lay_out
from benchmarks.batch import batch
from benchmarks.bench import QUICK, Bench, Sizes
from benchmarks.chart import chart
from benchmarks.learned import learned
from benchmarks.learning import learning
from benchmarks.memory import growth, memory
from benchmarks.packages import cache_folder
from benchmarks.report import shown_in, table_of, text_of
from benchmarks.single import single
from benchmarks.start import start
from benchmarks.studio import studio
from celestial_backend.errors import CelestialError
from celestial_backend.models.saved import version
from celestial_backend.studio.setup import pictures_of

PARTS: dict[str, tuple[str, Callable[[Bench], dict[str, Any]]]] = {
    "start": ("From start to the first /setup and the first prediction.", start),
    "single": ("One task per request, from 1, 8 and 32 clients.", single),
    "batch": ("1,000 tasks in one request, pictures on disk and over HTTP.", batch),
    "studio": ("Retrieve Predictions and prelabel on a real Label Studio.", studio),
    "learned": ("One task and Retrieve Predictions with a model that was learned from labels.", learned),
    "memory": ("Memory of the web process over 10,000 tasks.", memory),
    "growth": ("Seconds and memory from 100 to 100,000 tasks in one request.", growth),
    "learning": ("How much is learned from few labels of --pictures; only if asked for.", learning),
}
UNASKED = [name for name in PARTS if name != "learning"]
RESULTS, PAGE = Path("benchmarks/results"), Path("docs/performance.md")
QUIET = 0.5  # a load average of the last minute that changes no figure


class _Command(click.Command):
    """Lists the parts in its help."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        del ctx
        with formatter.section("Parts"):
            formatter.write_dl([(name, sentence) for name, (sentence, _) in PARTS.items()])


@click.command(cls=_Command)
@click.argument("parts", nargs=-1, type=click.Choice(list(PARTS)), metavar="[PARTS]...")
@click.option("--quick", is_flag=True, help="Everything small: shows that it runs, its figures say little.")
@click.option(
    "--pictures", type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of real pictures in place of drawn ones.",
)  # fmt: skip
@click.option("--size", type=(click.IntRange(1), click.IntRange(1)), default=SIZE_PX, metavar="WIDTH HEIGHT",
              show_default=True, help="Pixels of the drawn pictures.")  # fmt: skip
@click.option(
    "--output", type=click.Path(file_okay=False, path_type=Path), default=RESULTS,
    show_default=True, help="Folder for the JSON and the picture.",
)  # fmt: skip
@click.option(
    "--table", type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Only print the Markdown table of an earlier run's JSON.",
)  # fmt: skip
def main(
    parts: tuple[str, ...],
    pictures: Path | None,
    size: tuple[int, int],
    output: Path,
    table: Path | None,
    *,
    quick: bool,
) -> None:
    """
    Measure this backend beside two others and the limit; all PARTS but the last, or some.

    Prints ratios first and figures second, and writes both as JSON and a picture. Where docs/performance.md shows
    these parts, their table there is written anew.
    """
    if table is not None:
        click.echo(table_of(json.loads(table.read_text())))
        return
    signal.signal(signal.SIGTERM, _interrupt)
    sizes = QUICK if quick else Sizes()
    folder = Path(tempfile.mkdtemp(prefix="celestial-benchmarks-"))
    try:
        results = _measure(folder, sizes, pictures, size, parts or tuple(UNASKED))
    except CelestialError as error:
        click.echo(f"{error}\nThe logs of this run are kept in {folder}.", err=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        shutil.rmtree(folder)
        raise
    shutil.rmtree(folder)
    results["about"]["quick"] = quick
    output.mkdir(parents=True, exist_ok=True)
    name = "quick" if quick else "-".join(parts) or "results"
    (output / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
    (output / f"{name}.svg").write_text(chart(results))
    if output == RESULTS and PAGE.is_file():
        PAGE.write_text(shown_in(PAGE.read_text(), name, results))
    click.echo(text_of(results))
    click.echo(f"Written: {output / name}.json and .svg", err=True)


def _measure(
    folder: Path, sizes: Sizes, pictures: Path | None, size: tuple[int, int], parts: tuple[str, ...]
) -> dict[str, Any]:
    def say(text: str) -> None:
        click.echo(text, err=True)

    machine = _machine()  # before there is any work of ours
    if machine["load_average"][0] > QUIET:
        say(f"Warning: the machine has other work, so the figures say less. Its load average must be {QUIET} at the "
            f"most, and is {machine['load_average'][0]}.")  # fmt: skip
    if pictures is None:
        say(f"Drawing {sizes.pictures} pictures, once")
        paths = drawn(cache_folder() / "benchmark-pictures", sizes.pictures, size)
    else:
        found = pictures_of(pictures)
        paths = found[:: max(1, len(found) // sizes.pictures)][: sizes.pictures]  # of every folder some
    bench = Bench(folder, sizes, lay_out(folder, paths), say, pictures)
    bench.fill_store()
    results: dict[str, Any] = {"about": machine | {"pictures": bench.album.about(), "parts": list(parts)}}
    for part in PARTS:
        if part in parts:
            say(f"\n{part}: {PARTS[part][0]}")
            results[part] = PARTS[part][1](bench)
    return results


def _interrupt(_sign: int, _frame: object) -> NoReturn:
    raise KeyboardInterrupt  # so that the servers are ended


def _machine() -> dict[str, Any]:
    return {
        "cores": len(os.sched_getaffinity(0)),
        "load_average": [round(each, 2) for each in os.getloadavg()],
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("tensorflow", "keras", "bentoml", "pillow", "label-studio-ml")},
    }
