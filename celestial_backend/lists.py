"""What there is and what happens, as the command line lists it: models and trainings."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from datetime import datetime
from typing import Any

import click

from celestial_backend.errors import CelestialError
from celestial_backend.jobs import HOW_TO_START, worker_lives
from celestial_backend.ledger import WAITING, Job, Ledger
from celestial_backend.project import StudioProject
from celestial_backend.settings import MODEL_NAME, Settings
from celestial_backend.store import ModelStore
from celestial_backend.tables import table
from celestial_backend.wiring import build

SHARED = "all others"


@click.group(invoke_without_command=True)
@click.option("--project", type=click.IntRange(min=1), help="Only the models of this project.")
@click.option("--json", "as_json", is_flag=True, help="Print the list as JSON.")
@click.pass_context
def models(context: click.Context, project: int | None, *, as_json: bool) -> None:
    """List the models of the store: parent, scores, and for which projects they are live."""
    if context.invoked_subcommand is not None:
        return
    store = ModelStore(context.obj)
    shared, live = store.live_tag(), store.pointers.projects()
    rows: list[dict[str, Any]] = [
        {
            "tag": model.tag,
            "project": model.project,
            "live": [*([SHARED] if model.tag == shared else []), *(p for p, tag in live.items() if tag == model.tag)],
            "created": model.created,
            "parent": model.parent,
            "decision": model.metadata.get("decision"),
            "reason": model.metadata.get("reason"),
            "scores": model.metadata.get("scores"),
        }
        for model in store.registry.models()
        if project is None or model.project in (None, str(project))
    ]
    if as_json:
        click.echo(json.dumps(rows))
        return
    table(
        ["model", "live for", "made", "taught from", "how it did"],
        [
            [
                row["tag"].partition(":")[2],
                ", ".join(who if who == SHARED else f"project {who}" for who in row["live"]),
                row["created"][:16].replace("T", " "),
                (row["parent"] or "").partition(":")[2],
                row["reason"] or "",
            ]
            for row in rows
        ],
    )


@models.command("use")
@click.argument("tag")
@click.option(
    "--project", type=click.IntRange(min=1), required=True, help="Label Studio's number of the project."
)  # fmt: skip
@click.pass_obj
def use(settings: Settings, tag: str, project: int) -> None:
    """Make the model TAG the live one of a project, at once, as for a way back to an older one."""
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


@click.command()
@click.option("--project", type=click.IntRange(min=1), help="Only the trainings of this project.")
@click.option("--limit", type=click.IntRange(min=1), default=20, show_default=True, help="How many, the newest first.")
@click.option("--json", "as_json", is_flag=True, help="Print the list as JSON.")
@click.pass_obj
def jobs(settings: Settings, project: int | None, limit: int, *, as_json: bool) -> None:
    """
    List the trainings that wait, run and have ended, and why.

    Where some wait and no worker runs, it says so on stderr, and they are "stalled" in JSON.
    """
    found = Ledger(settings.model_dir).jobs(None if project is None else str(project), limit=limit)
    waiting = {job.id for job in found if job.state == WAITING}
    stalled = waiting if waiting and not worker_lives(settings.model_dir) else set()
    if stalled:
        click.echo(f"No worker runs on this MODEL_DIR, so what waits is not begun. {HOW_TO_START}", err=True)
    if as_json:
        click.echo(json.dumps([shown_job(job) | {"stalled": job.id in stalled} for job in found]))
        return
    table(
        ["job", "project", "state", "asked for", "seconds", "where it is, or why it ended so"],
        [
            [job.id, job.project, job.state, _moment(job.requested_at), _seconds(job), job.reason or _where(job)]
            for job in found
        ],
    )


def shown_job(job: Job) -> dict[str, Any]:
    """A job as JSON shows it."""
    return asdict(job) | {"tag": job.outcome.get("tag")}


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
    if "epoch" in at:
        words.append(f"epoch {at['epoch'] + 1}/{at['epochs']}, step {at['step']}/{at['steps']}, loss {at['loss']:.3f}")
    return " ".join(filter(None, words))
