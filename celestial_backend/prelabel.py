"""The command that gives all tasks of a project their predictions, without Label Studio's time limit."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from celestial_backend.bulk import Prelabelling, Summary
from celestial_backend.errors import CelestialError
from celestial_backend.pending import Conditions, read_filter
from celestial_backend.settings import Settings
from celestial_backend.wiring import build

LINE_EVERY_S = 10.0  # in a pipe


class _Shown:
    """What is seen of a run while it goes on: a bar on a terminal, a line now and then in a pipe, on stderr."""

    def __init__(self, project: int) -> None:
        self._console = Console(stderr=True)
        self._said_at = time.monotonic()
        self.bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[words]}"),
            TimeRemainingColumn(), console=self._console, disable=not self._console.is_terminal,
        )  # fmt: skip
        self._task = self.bar.add_task(f"Project {project}", total=None, words="")

    def __call__(self, at: Summary) -> None:
        words = f"{_pace(at)}, {at.failed} failed"
        self.bar.update(self._task, total=at.wanted, completed=at.done, words=words)
        if not self._console.is_terminal and time.monotonic() - self._said_at >= LINE_EVERY_S:
            self._said_at = time.monotonic()
            left = max(0, at.wanted - at.done)
            click.echo(f"{at.done} of {at.wanted} tasks, {left} remaining, {words}", err=True)


@click.command()
@click.option(
    "--project", type=click.IntRange(min=1), required=True, help="Label Studio's number of the project."
)  # fmt: skip
@click.option("--only-unlabelled", is_flag=True, help="Only tasks that nobody has labelled.")
@click.option("--limit", type=click.IntRange(min=1), help="At most this many tasks.")
@click.option("--filter", "filters", metavar="JSON", help="Only tasks that fit these filters of the Data Manager.")
@click.option("--rate", type=click.FloatRange(min=0, min_open=True), help="At most this many tasks per second.")
@click.option(
    "--failures",
    type=click.Path(path_type=Path, dir_okay=False),
    help="List of the tasks that failed, one JSON object a line; else a file in MODEL_DIR.",
)
@click.option("--distribute", is_flag=True, help="Let all workers predict, those of other machines included.")
@click.option("--dry-run", is_flag=True, help="Only say how many tasks there are to do.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.pass_obj
def prelabel(
    settings: Settings,
    project: int,
    limit: int | None,
    filters: str | None,
    rate: float | None,
    failures: Path | None,
    *,
    only_unlabelled: bool,
    distribute: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """
    Give every task of a project a prediction of its live model.

    Tasks that hold one are passed over, so a run that was ended can be started again. The exit code is 1
    when tasks failed.
    """
    run = Prelabelling(
        build(settings),
        str(project),
        conditions=read_filter(filters) if filters else Conditions(),
        only_unlabelled=only_unlabelled,
        limit=limit,
        rate=rate,
        failures=failures,
        distribute=distribute,
    )
    if dry_run:
        at = run.plan()
        click.echo(json.dumps(asdict(at)) if as_json else f"{at.wanted} tasks would get a prediction of {at.version}"
                   f", {at.already} have one.")  # fmt: skip
        return
    shown = _Shown(project)
    with shown.bar:
        at = run.run(shown)
    for sentence in run.select_version():
        click.echo(sentence, err=True)
    listed = str(run.failures.path) if at.failed else None
    click.echo(json.dumps(asdict(at) | {"failures": listed}) if as_json else _told(at, listed))
    if at.failed:
        sys.exit(CelestialError.exit_code)


def _told(at: Summary, listed: str | None) -> str:
    said = f"{at.predicted} tasks got a prediction of {at.version} in {at.seconds:.0f} s ({_pace(at)})"
    said += f", {sum(at.workers.values())} of them by {len(at.workers)} workers" if at.workers else ""
    said += f", {at.already} had one" if at.already else ""
    said += f", {at.meanwhile} were predicted, labelled or deleted by others meanwhile" if at.meanwhile else ""
    return said + (f". {at.failed} failed; {listed} says why." if listed else ".")


def _pace(at: Summary) -> str:
    return f"{at.done / at.seconds:.0f} per second" if at.seconds else "0 per second"
