"""
Pre-labelling that is killed again and again: ``python -m benchmarks.kills --tasks 1000 --kills 5 --seed 1``.

The command `prelabel` runs on a real Label Studio with drawn pictures. At random moments, one in each
part of the run, it is killed and started again. In the end every task must have exactly one prediction.
"""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from benchmarks.album import lay_out
from benchmarks.bench import QUICK, REPOSITORY, Bench
from benchmarks.label_studio import LabelStudio
from benchmarks.tasks import LABEL_CONFIG
from celestial_backend.commands.demo import draw
from celestial_backend.studio.client import Studio
from celestial_backend.studio.setup import create_project

RUN_S = 3600.0
LOOK_S = 0.1
PICTURES = 20
PAGES = 20  # that the tasks come in, so that there are moments between
PAGE_S = 1.0  # that a page takes at the least
LEFT = 2  # pages that are to be done when it is killed, so that it has not ended by then


@dataclass(frozen=True)
class Place:
    """A running Label Studio, the project in it, and the environment of the command."""

    studio: Studio
    project: int
    environ: dict[str, str]

    def predictions(self) -> int:
        """How many there are by now."""
        found = self.studio.ask("the project", lambda client: client.projects.get(self.project))
        return found.total_predictions_number or 0

    def held(self) -> Counter[int]:
        """How many predictions each task has."""
        found: Any = self.studio.ask("predictions", lambda client: client.predictions.list(project=self.project))
        return Counter(int(each.task) for each in found)


@click.command()
@click.option("--tasks", type=click.IntRange(min=1), default=1000, show_default=True)
@click.option("--kills", type=click.IntRange(min=0), default=5, show_default=True)
@click.option("--seed", type=int, default=1, show_default=True, help="Of the moments.")
def main(tasks: int, kills: int, seed: int) -> None:
    """Kill prelabel again and again, and count what Label Studio holds in the end; exit code 1 if that is wrong."""
    moments = random.Random(seed)  # noqa: S311 - no secret
    most, killed = max(0, tasks - LEFT * page_of(tasks)), 0
    with tempfile.TemporaryDirectory(prefix="celestial-kills-") as folder, _place(Path(folder), tasks) as place:
        started = time.monotonic()
        for number in range(kills):
            least, delay = int(moments.uniform(number, number + 1) * most / kills), moments.uniform(0, PAGE_S)
            seconds, code = _killed(place, tasks, least, delay)
            killed += code == -signal.SIGKILL
            moment = f"after {seconds:.2f} s, {delay:.2f} s after {least} predictions"
            click.echo(f"Run {number + 1}: {_told(code)} {moment}; {place.predictions()} are there.")
        with _command(place, tasks) as last:
            code = last.wait(RUN_S)
        click.echo(f"Run {kills + 1}: {_told(code)}.")
        held = place.held()
        without, doubled = tasks - len(held), sum(count > 1 for count in held.values())
        click.echo(f"{tasks} tasks, {killed} of {kills} kills (seed {seed}), {time.monotonic() - started:.0f} s:")
        click.echo(f"{held.total()} predictions, {without} tasks without, {doubled} tasks with more than one.")
    if code or without or doubled or killed < kills:
        sys.exit(1)


def page_of(tasks: int) -> int:
    """How many tasks come at once."""
    return max(1, tasks // PAGES)


def _killed(place: Place, tasks: int, least: int, delay: float) -> tuple[float, int]:
    """Run the command, and kill it a moment after there are so many predictions; its seconds, and how it ended."""
    started = time.monotonic()
    with _command(place, tasks) as command:
        while command.poll() is None and place.predictions() < least:
            time.sleep(LOOK_S)
        time.sleep(delay)
        command.kill()
        return time.monotonic() - started, command.wait()


def _told(code: int) -> str:
    return "killed" if code == -signal.SIGKILL else f"ended with code {code}"


@contextmanager
def _command(place: Place, tasks: int) -> Iterator[subprocess.Popen[bytes]]:
    """The command while it runs; it is killed in any case when the ``with`` block ends."""
    command = [sys.executable, "-m", "celestial_backend", "prelabel", "--project", str(place.project)]
    rate = ["--rate", str(page_of(tasks) / PAGE_S)]
    with subprocess.Popen([*command, *rate], env=place.environ, cwd=REPOSITORY) as process:  # noqa: S603 - our own module
        try:
            yield process
        finally:
            process.kill()


@contextmanager
def _place(folder: Path, tasks: int) -> Iterator[Place]:
    album = lay_out(folder, draw(folder / "pictures", PICTURES))
    bench = Bench(folder, QUICK, album, lambda line: click.echo(line, err=True))
    with LabelStudio(bench) as server:
        project = create_project(server.studio, "Kills", LABEL_CONFIG)
        request: Any = [{"data": {"image": address}} for address in album.addresses(tasks)]
        server.studio.ask("tasks", lambda client: client.projects.import_tasks(project, request=request))
        environ = bench.environ(
            LABEL_STUDIO_URL=server.url, LABEL_STUDIO_API_KEY=server.token, MODEL_DIR=folder / "state",
            CELESTIAL_LABEL_STUDIO_DATA=album.studio_data, LOG_LEVEL="WARNING",
        )  # fmt: skip
        yield Place(server.studio, project, environ)


if __name__ == "__main__":
    main()
