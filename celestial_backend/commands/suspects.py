"""The command `suspects`: labels to look at again, with links."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import click

from celestial_backend.commands.lists import say, table
from celestial_backend.commands.shown import Shown
from celestial_backend.errors import SettingsError
from celestial_backend.jobs.trainings import NOBODY_TO_ASK
from celestial_backend.learning.project import Learner
from celestial_backend.services import build
from celestial_backend.settings import Settings
from celestial_backend.trust.figures import percent
from celestial_backend.trust.suspects import Suspect, Suspects, look

LIMIT = 20
NOTHING = "nothing"


@click.command(short_help="List labels that look wrong, with links.")
@click.option(
    "--project", type=click.IntRange(min=1), required=True, help="Label Studio's number of the project."
)  # fmt: skip
@click.option("--limit", type=click.IntRange(min=1), default=LIMIT, show_default=True, help="At most so many labels.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.pass_obj
def suspects(settings: Settings, project: int, limit: int, *, as_json: bool) -> None:
    """
    List the labels of a project that look wrong, the likeliest first.

    Each label is compared with what a model says that was trained on the others. It reads all labelled pictures, as a
    training does, and changes nothing. It also says what 50 more labels are expected to bring.
    """
    if not (settings.label_studio_url and settings.label_studio_api_key):
        raise SettingsError(NOBODY_TO_ASK)
    services = build(settings)
    learner = Learner(settings, services.store, services.studio, services.images, services.trial.misled)
    with Shown(f"Looking at the labels of project {project}") as shown:

        def report(stage: str, **where: int | None) -> None:
            shown(where.get("pictures") or 0, where.get("of"), words=stage)

        found = look(learner, str(project), report)
    rows = [_row(each, f"{settings.studio_link}/projects/{project}/data?task={each.tasks[0]}")
            for each in found.found[:limit]]  # fmt: skip
    if as_json:
        told = {"judged": dict(found.judged), "lacking": dict(found.lacking), "found": len(found.found)}
        ahead = {control: asdict(each) for control, each in found.outlooks.items()}
        click.echo(json.dumps(told | {"labels": rows, "outlook": ahead}))
        return
    click.echo(_told(found, len(rows)))
    if rows:
        say(table(
            ["task*", *(["control"] if len(found.judged) > 1 else []), "label", "model says", "sure", "where*"],
            [[str(row["tasks"][0]), *([row["control"]] if len(found.judged) > 1 else []), _named(row["given"]),
              _named(row["said"]), percent(min(row["sure"], 0.999)), row["link"]] for row in rows],
        ))  # fmt: skip
    for control, outlook in found.outlooks.items():
        click.echo(f"{control!r}: {outlook.sentence}" if len(found.judged) > 1 else outlook.sentence)


def _row(suspect: Suspect, link: str) -> dict[str, Any]:
    return asdict(suspect) | {"link": link}


def _named(choices: list[str]) -> str:
    return ", ".join(choices) or NOTHING


def _told(found: Suspects, shown: int) -> str:
    """What was judged, and what was not, in sentences."""
    judged = sum(found.judged.values())
    said = [f"The model says otherwise about {len(found.found)} of {judged} labels."]
    if shown < len(found.found):
        said.append(f"The {shown} that are likeliest to be wrong:")
    return " ".join([*_lacking(found.lacking), *said])


def _lacking(lacking: Mapping[str, str]) -> list[str]:
    return [f"{control!r} was not judged: {why}." for control, why in lacking.items()]
