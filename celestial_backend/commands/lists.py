"""The commands `models` and `jobs`: what there is and what happens, for people and for scripts."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import click
from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from celestial_backend.commands.shown import Shown
from celestial_backend.errors import CelestialError, StateError
from celestial_backend.jobs.ledger import WAITING, Job, Known
from celestial_backend.jobs.trainings import HOW_TO_START
from celestial_backend.labels import some
from celestial_backend.models import standalone
from celestial_backend.models.registry import Described
from celestial_backend.services import build
from celestial_backend.settings import MODEL_NAME, Settings
from celestial_backend.studio.project import StudioProject
from celestial_backend.trust import calibration
from celestial_backend.trust.calibration import CalibrationError

SHARED = "all others"
NOT_BEGUN = "not begun"  # in the place of a job's state
NONE_YET = "There are no trainings yet."
WIDTH, NAMED = 100, 10  # signs of a line, and choices of a model
LOOK_S = 1.0


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """
    A table that fits a terminal; scripts have --json.

    Args:
        heads: With an asterisk where words are never parted, as a tag that is can be copied nowhere.
        rows: Cells, as many as heads.
    """
    shown = Table(box=box.SIMPLE, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)
    for head in heads:
        shown.add_column(Text(head.strip("*")), overflow="fold", no_wrap=head.endswith("*"))
    for row in rows:
        shown.add_row(*map(Text, row))
    return shown


def say(shown: Table) -> None:
    """Print a table on stdout, at most `WIDTH` signs wide, into a pipe too."""
    terminal = Console()
    Console(width=min(terminal.width, WIDTH) if terminal.is_terminal else WIDTH).print(shown)


@click.group(invoke_without_command=True, short_help="List the models, or use, add, calibrate or export one.")
@click.option("--project", type=click.IntRange(min=1), help="Only the models that this project may use.")
@click.option("--json", "as_json", is_flag=True, help="Print the list as JSON.")
@click.pass_context
def models(context: click.Context, project: int | None, *, as_json: bool) -> None:
    """List the models: what each was taught from, how it did, and for which projects it is live."""
    if context.invoked_subcommand is not None:
        return
    store = build(context.obj).store
    shared, live = store.live_tag(), store.pointers.projects()
    rows: list[dict[str, Any]] = [
        {
            "tag": model.tag,
            "project": model.project,
            "live": [*([SHARED] if model.tag == shared else []), *(p for p, tag in live.items() if tag == model.tag)],
            "created": model.created,
            "parent": model.parent,
            "choices": _choices(model),
            "decision": model.manifest.decision,
            "reason": model.manifest.reason,
            "calibrated": model.calibrated,
            "calibration": model.manifest.calibration and model.manifest.calibration.plain(),
            "scores": model.metadata.get("scores"),  # as they stand there: older models have others
        }
        for model in store.registry.models()
        if project is None or model.project in (None, str(project))
    ]
    if as_json:
        click.echo(json.dumps(rows))
        return
    if not rows:
        click.echo("There are no models.")
        return
    say(table(
        ["model*", "live for", "made*", "taught from*", "what it says, and how it did"],
        [
            [
                row["tag"].partition(":")[2],
                ", ".join(who if who == SHARED else f"project {who}" for who in row["live"]),
                row["created"][:10],
                (row["parent"] or "").partition(":")[2],
                ". ".join(filter(None, [*map(_named, row["choices"].values()), row["reason"], _scores_of(row)])),
            ]
            for row in rows
        ],
    ))  # fmt: skip


def _scores_of(row: Mapping[str, Any]) -> str:
    """What is to be known of a model's scores."""
    if row["calibration"]:
        return f"Calibrated on {row['calibration']['pictures']} pictures"
    return "" if row["calibrated"] else "Uncalibrated: its scores need not say how often it is right"


def _named(choices: Sequence[str]) -> str:
    return ", ".join([*choices[:NAMED], *(["…"] if len(choices) > NAMED else [])])


def _choices(model: Described) -> dict[str, list[str]]:
    """What a model says, by control; under "" what it says of any."""
    told = model.manifest
    if told.choices is not None:
        return told.choices
    return {} if told.classes is None else {"": told.classes}


@models.command("use")
@click.argument("tag")
@click.option(
    "--project", type=click.IntRange(min=1), required=True, help="Label Studio's number of the project."
)  # fmt: skip
@click.pass_obj
def use(settings: Settings, tag: str, project: int) -> None:
    """Make the model TAG the live one of a project, at once; this is the way back to an older one."""
    services = build(settings)
    tag = tag if ":" in tag else f"{MODEL_NAME}:{tag}"
    services.store.publish(str(project), tag)
    click.echo(f"Project {project} is served {tag} from now on.")
    try:
        said = StudioProject(services.studio, str(project), patience_s=3).show_version(tag)
    except CelestialError as error:
        said = [f"Label Studio was not told: {error}"]
    for sentence in said:
        click.echo(sentence, err=True)


@models.command("add")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.pass_obj
def add(settings: Settings, file: Path) -> None:
    """
    Put the model of FILE, a .bentomodel, into the database, so that every machine can serve it.

    It may have up to 200 MB. `models use` makes it the live one of a project.
    """
    with Shown(f"Reading {file.name}, and putting its model into the database"):
        tag = build(settings).store.add(file)
    click.echo(f"{tag} is in the database. Use it with: python -m celestial_backend models use {tag} --project N")


@models.command("export")
@click.argument("tag")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--control", help="Name of the control to export, if the model has learned several.")
@click.pass_obj
def export(settings: Settings, tag: str, file: Path, control: str | None) -> None:
    """Write the model TAG to FILE, a .bentomodel that BentoML and Keras use anywhere, without this package."""
    tag = tag if ":" in tag else f"{MODEL_NAME}:{tag}"
    with Shown(f"Writing {file.name}"):
        exported = standalone.export(settings, tag, file, control)
    click.echo(f"{file} holds {exported}.")


@models.command("calibrate")
@click.argument("tag")
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.pass_obj
def calibrate(settings: Settings, tag: str, folder: Path, *, as_json: bool) -> None:
    """
    Make the scores of TAG, a model that you brought, say how often it is right, by the pictures of FOLDER.

    FOLDER has one sub-folder for each class, under the model's own names. The model must not have learned these
    pictures. Its answers stay the same; a new version of it gets other scores.
    """
    store = build(settings).store
    tag = tag if ":" in tag else f"{MODEL_NAME}:{tag}"
    with Shown(f"Calibrating {tag}") as shown:
        found = calibration.calibrate(store, settings, tag, folder, shown)
    served = found.tag == store.live_tag()
    if as_json:
        click.echo(json.dumps(asdict(found) | {"served": served}))
        return
    click.echo(f"{found.tag} is {found.of} with other scores. {_error('Before', found.before)}, "
               f"{_error('after', found.after)}, on {found.pictures} pictures.")  # fmt: skip
    click.echo("Projects without a model of their own are served it from now on." if served else
               f"Use it with: python -m celestial_backend models use {found.tag} --project N")  # fmt: skip
    for sentence in _notes(found):
        click.echo(sentence, err=True)


def _error(when: str, found: CalibrationError) -> str:
    return f"{when} they were off by {found.value:.3f} ({found.low:.3f} to {found.high:.3f})"


def _notes(found: calibration.Calibrated) -> Iterator[str]:
    if found.missing:
        yield f"The folder has no picture of {some(found.missing)}, so nothing is known of the scores of these."
    if found.left_out:
        yield f"{len(found.left_out)} files are left out: no pictures, or in two classes."
    if not found.everywhere:
        yield "It is too large for the database, so only this machine has it."


@click.command(short_help="List trainings: waiting, running and ended, and why.")
@click.option("--project", type=click.IntRange(min=1), help="Only the trainings of this project.")
@click.option("--limit", type=click.IntRange(min=1), default=20, show_default=True, help="How many, the newest first.")
@click.option("--watch", is_flag=True, help="Show what happens until Ctrl-C; in a pipe, a line for each change.")
@click.option("--json", "as_json", is_flag=True, help="Print the list as JSON.")
@click.pass_obj
def jobs(settings: Settings, project: int | None, limit: int, *, watch: bool, as_json: bool) -> None:
    """
    List the trainings that wait, run and have ended, and why.

    Below them are the projects where none starts by itself, and what is missing there. If trainings wait and no worker
    runs, it says so on standard error, and they are "stalled" in JSON.
    """
    if watch and as_json:
        raise click.UsageError("--watch shows a list to people, and --json prints one for a script. Give one of them.")
    ledger, number = build(settings).jobs.ledger, None if project is None else str(project)
    if watch:
        with suppress(KeyboardInterrupt):
            _watch(lambda: (ledger.jobs(number, limit=limit), ledger.hindered(number, limit)))
        return
    found, hindered = ledger.jobs(number, limit=limit), ledger.hindered(number, limit)
    waiting = {job.id for job in found if job.state == WAITING}
    stalled = waiting if waiting and not ledger.workers() else set()
    if stalled:
        click.echo(f"No worker runs on this database, so what waits is not begun. {HOW_TO_START}", err=True)
    if as_json:
        rows = [shown_job(job) | {"stalled": job.id in stalled} for job in found]
        click.echo(json.dumps([*rows, *map(_shown_hindrance, hindered)]))
        return
    if found or hindered:
        say(_table(found, hindered))
    else:
        click.echo(NONE_YET)


def _table(found: Sequence[Job], hindered: Sequence[Known]) -> Table:
    return table(
        ["job*", "project*", "state*", "asked for*", "seconds*", "progress or reason"],
        [
            *(
                [job.id, job.project, job.state, _moment(job.requested_at), _seconds(job), job.reason or _where(job)]
                for job in found
            ),
            *(["", known.project, NOT_BEGUN, "", "", known.hindrance] for known in hindered),
        ],
    )


def _watch(look: Callable[[], tuple[Sequence[Job], Sequence[Known]]]) -> None:
    """Show the list as it changes, on a terminal, or each change in a pipe; a database that is away may come back."""
    console, before = Console(), list[str]()
    with Live(console=console, auto_refresh=False, screen=False) if console.is_terminal else nullcontext() as live:
        while True:
            try:
                found, hindered = look()
                shown: Table | str = _table(found, hindered) if found or hindered else NONE_YET
            except StateError as error:
                found, hindered, shown = (), (), str(error)
            if live is not None:
                live.update(shown, refresh=True)
            else:
                lines = [shown] if isinstance(shown, str) else [_line(job) for job in reversed(found)]
                for line in lines:
                    if line not in before:
                        click.echo(line)
                before = lines
            time.sleep(LOOK_S)


def _line(job: Job) -> str:
    return f"Job {job.id} of project {job.project}: " + ", ".join(filter(None, [job.state, job.reason or _where(job)]))


def shown_job(job: Job) -> dict[str, Any]:
    """A job as JSON shows it."""
    return {name: value for name, value in asdict(job).items() if name != "token"} | {"tag": job.manifest.tag}


def _shown_hindrance(known: Known) -> dict[str, Any]:
    """A project that does not train by itself, in the place of a job: with its reason, and without a moment."""
    none = Job("", known.project, NOT_BEGUN, requests=0, attempts=0, requested_at=0.0, reason=known.hindrance)
    return shown_job(none) | {"requested_at": None, "stalled": False}


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def _seconds(job: Job) -> str:
    if job.started_at is None:
        return ""
    return f"{max(0.0, (job.ended_at or time.time()) - job.started_at):.0f}"  # the clock may have been moved back


def _where(job: Job) -> str:
    at = job.progress
    words = [str(at.get("stage", ""))]
    if "pictures" in at:
        words.append(f"{at['pictures']} of {at['of']}" if at["of"] else f"{at['pictures']}")
    return " ".join(filter(None, words))
