"""The command line: arguments in, one call, text out."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import click
import msgspec

from celestial_backend import __version__, logs
from celestial_backend.commands.connect import connect
from celestial_backend.commands.demo import demo
from celestial_backend.commands.doctor import doctor
from celestial_backend.commands.features import features
from celestial_backend.commands.finish import finish
from celestial_backend.commands.lists import jobs, models, shown_job
from celestial_backend.commands.prelabel import prelabel
from celestial_backend.commands.private_addresses import studio_variables
from celestial_backend.commands.report import report
from celestial_backend.commands.shown import Shown
from celestial_backend.commands.suspects import suspects
from celestial_backend.errors import CelestialError, TrainingError
from celestial_backend.jobs.ledger import FAILED
from celestial_backend.jobs.trainings import Jobs
from celestial_backend.learning.folder import Learned, learn_folder
from celestial_backend.services import build
from celestial_backend.settings import Settings, state_note
from celestial_backend.state import private


class _Commands(click.Group):
    """Turns our errors into a sentence on stderr and the exit code of their class."""

    def invoke(self, context: click.Context) -> object:
        try:
            return super().invoke(context)
        except CelestialError as error:
            click.echo(f"Error: {error}", err=True)
            sys.exit(error.exit_code)


@click.group(cls=_Commands, name="python -m celestial_backend")
@click.version_option(__version__, prog_name="celestial-backend")
@click.pass_context
def main(context: click.Context) -> None:
    """Pre-label pictures in Label Studio, with a model that learns from your labels."""
    if context.invoked_subcommand == serve.name:
        return  # its arguments are settings too
    context.obj = Settings.from_environ(os.environ)
    private(context.obj.model_dir)
    if note := state_note():
        click.echo(note, err=True)
    logs.configure(context.obj.log_level, context.obj.log_format)


main.add_command(demo)
main.add_command(doctor)
main.add_command(connect)
main.add_command(features)
main.add_command(finish)
main.add_command(jobs)
main.add_command(models)
main.add_command(prelabel)
main.add_command(report)
main.add_command(suspects)


@main.command(
    short_help="Start the backend, in any folder.",
    add_help_option=False,
    context_settings={"ignore_unknown_options": True},
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def serve(context: click.Context, arguments: Sequence[str]) -> None:
    """Start the backend on port 9090, in any folder; `serve --help` lists the arguments."""
    from celestial_backend.web import server

    sys.exit(server.serve(arguments, context.command_path))


@main.command("private-addresses", short_help="Print what lets Label Studio reach one address.")
@click.argument("addresses", metavar="ADDRESS...", nargs=-1, required=True)
def private_addresses(addresses: tuple[str, ...]) -> None:
    """
    Print the two variables with which Label Studio talks to the backend at ADDRESS, such as 127.0.0.1.

    Label Studio refuses all private addresses. Started with these variables, it still refuses all but those named
    here.
    """
    for name, value in studio_variables(addresses).items():
        click.echo(f"{name}={value}")


@main.command(short_help="Train on a project's labels, or on a folder.")
@click.argument("folder", type=click.Path(path_type=Path), required=False)
@click.option(
    "--project", type=click.IntRange(min=1),
    help="Train on the labels of this Label Studio project instead of a folder.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.pass_obj
def train(settings: Settings, folder: Path | None, project: int | None, *, as_json: bool) -> None:
    """
    Learn FOLDER, one sub-folder per class, and serve the new model to all projects without one of their own.

    With --project instead of FOLDER, do what *Start Training* in Label Studio does, and wait for the end.
    """
    if (folder is None) == (project is None):
        raise click.UsageError("Give either FOLDER or --project.")
    if project is not None:
        _train_project(settings, str(project), as_json=as_json)
    if folder is not None:
        _train_folder(settings, folder, as_json=as_json)


def _train_project(settings: Settings, project: str, *, as_json: bool) -> None:
    """Ask for a training, run it here unless a worker does, and say how it ended, or the one it was merged into."""
    trainings = build(settings).jobs
    job_id = trainings.request(project)["job"]
    job, ended = None, threading.Event()
    with Shown(f"Training project {project}") as shown:
        threading.Thread(target=_follow, args=(trainings, job_id, shown, ended), daemon=True).start()
        while job is None or not job.ended:
            trainings.run(project)
            job = trainings.ledger.doing(job_id)
            time.sleep(0 if job and job.ended else 1)
        ended.set()
    click.echo(json.dumps(shown_job(job)) if as_json else f"{job.state}: {job.reason}")
    if job.state == FAILED:
        sys.exit(TrainingError.exit_code)


def _follow(trainings: Jobs, job_id: str, shown: Shown, ended: threading.Event) -> None:
    """Show where a training is, until it has ended."""
    while not ended.wait(1):
        with suppress(CelestialError):
            job = trainings.ledger.doing(job_id)
            at = job.progress if job else {}
            shown(at.get("pictures") or 0, at.get("of") or 0, words=at.get("stage") or (job.state if job else ""))


def _train_folder(settings: Settings, folder: Path, *, as_json: bool) -> None:
    started = time.monotonic()
    with Shown("Looking at pictures") as shown:
        learned = learn_folder(
            folder, settings, lambda done, of: shown(what="Learning") if done == of else shown(done, of)
        )
    seconds = round(time.monotonic() - started, 1)
    click.echo(json.dumps(msgspec.to_builtins(learned) | {"seconds": seconds}) if as_json else _told(learned, seconds))


def _told(learned: Learned, seconds: float) -> str:
    right, labels = learned.scores.right, learned.scores.labels
    said = f"{right} of {labels} pictures ({right / labels:.1%}) are right, each by a head that had not learned it."
    look = [f"Labels to look at again: {', '.join(learned.suspects)}."] if learned.suspects else []
    return "\n".join([learned.tag, f"{said} {seconds} s.", *look])
