"""
Pre-labelling that is killed again and again: ``python -m benchmarks.kills --tasks 1000 --kills 5 --seed 1``.

The command `prelabel` runs on a real Label Studio with drawn pictures. At random moments, one in each
part of the run, it is killed and started again. In the end every task must have exactly one prediction.
"""

from __future__ import annotations

import random
import secrets
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

from celestial_backend.demo_project import draw
from celestial_backend.demo_servers import (
    PLACE,
    Server,
    free_port,
    label_studio_program,
    plain_environ,
    start_label_studio,
)
from celestial_backend.linking import ask, config_for, create_project
from celestial_backend.renderer import BODIES
from celestial_backend.settings import Settings
from celestial_backend.studio import Studio

START_S, RUN_S = 300.0, 3600.0
LOOK_S = 0.1
PICTURES = 20
PAGES = 20  # that the tasks come in, so that there are moments between
PAGE_S = 1.0  # that a page takes at the least


@dataclass(frozen=True)
class Place:
    """A running Label Studio, the project in it, and the environment of the command."""

    studio: Studio
    project: int
    environ: dict[str, str]

    def predictions(self) -> int:
        """How many there are by now."""
        found = ask(self.studio, "the project", lambda client: client.projects.get(self.project))
        return found.total_predictions_number or 0

    def held(self) -> Counter[int]:
        """How many predictions each task has."""
        found: Any = ask(self.studio, "predictions", lambda client: client.predictions.list(project=self.project))
        return Counter(int(each.task) for each in found)


@click.command()
@click.option("--tasks", type=click.IntRange(min=1), default=1000, show_default=True)
@click.option("--kills", type=click.IntRange(min=0), default=5, show_default=True)
@click.option("--seed", type=int, default=1, show_default=True, help="Of the moments.")
def main(tasks: int, kills: int, seed: int) -> None:
    """Kill prelabel again and again, and count what Label Studio holds in the end; exit code 1 if that is wrong."""
    moments = random.Random(seed)  # noqa: S311 - no secret
    with tempfile.TemporaryDirectory(prefix="celestial-kills-") as folder, _place(Path(folder), tasks) as place:
        started = time.monotonic()
        for number in range(kills):
            least, delay = int(moments.uniform(number, number + 1) * tasks / kills), moments.uniform(0, PAGE_S)
            click.echo(f"Run {number + 1}: {_killed(place, tasks, least, delay)}")
        last = _start(place, tasks)
        last.wait(RUN_S)
        click.echo(f"Run {kills + 1}: ended with code {last.returncode}.")
        held = place.held()
        without, doubled = tasks - len(held), sum(count > 1 for count in held.values())
        click.echo(f"{tasks} tasks, {kills} kills (seed {seed}), {time.monotonic() - started:.0f} s:")
        click.echo(f"{held.total()} predictions, {without} tasks without, {doubled} tasks with more than one.")
    if last.returncode or without or doubled:
        sys.exit(1)


def _killed(place: Place, tasks: int, least: int, delay: float) -> str:
    """Run the command, and kill it a moment after there are so many predictions."""
    started, command = time.monotonic(), _start(place, tasks)
    while command.poll() is None and place.predictions() < least:
        time.sleep(LOOK_S)
    time.sleep(delay)
    command.kill()
    if command.wait() != -signal.SIGKILL:
        return f"ended with code {command.returncode} before it could be killed."
    seconds = time.monotonic() - started
    return f"killed after {seconds:.2f} s, {delay:.2f} s after {least} predictions; {place.predictions()} are there."


def _start(place: Place, tasks: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "celestial_backend", "prelabel", "--project", str(place.project)]
    rate = ["--rate", str(max(1, tasks // PAGES) / PAGE_S)]
    return subprocess.Popen([*command, *rate], env=place.environ, cwd=PLACE)  # noqa: S603 - our own module


@contextmanager
def _place(folder: Path, tasks: int) -> Iterator[Place]:
    for name in ("pictures", "state", "bentoml"):
        (folder / name).mkdir()
    pictures = draw(folder / "pictures", PICTURES)
    server, token = Server(folder, "Label-Studio"), secrets.token_hex(20)
    account = {"user": "kills@example.com", "password": secrets.token_urlsafe(12), "token": token}
    cache = Path("~/.cache/celestial-backend").expanduser()
    cache.mkdir(parents=True, exist_ok=True)
    program = label_studio_program(cache, None, lambda line: click.echo(line, err=True))
    try:
        url = start_label_studio(server, program, free_port(), folder / "data", account)
        server.wait_for_answer(f"{url}/health", START_S)
        studio = Studio(Settings(label_studio_url=url, label_studio_api_key=token))
        project = create_project(studio, "Kills", config_for(BODIES))
        addresses = [f"/data/local-files/?d={pictures[number % PICTURES].name}" for number in range(tasks)]
        request: Any = [{"data": {"image": address}} for address in addresses]
        ask(studio, "tasks", lambda client: client.projects.import_tasks(project, request=request))
        ours = {
            "LABEL_STUDIO_URL": url,
            "LABEL_STUDIO_API_KEY": token,
            "LOCAL_FILES_DOCUMENT_ROOT": str(folder / "pictures"),
            "MODEL_DIR": str(folder / "state"),
            "BENTOML_HOME": str(folder / "bentoml"),
            "LOG_LEVEL": "WARNING",
        }
        yield Place(studio, project, plain_environ() | ours)
    finally:
        server.stop()


if __name__ == "__main__":
    main()
