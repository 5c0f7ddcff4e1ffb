"""The command `report`: what the pre-labels of a project are worth."""

from __future__ import annotations

import click
import msgspec

from celestial_backend.commands.shown import Shown
from celestial_backend.errors import SettingsError
from celestial_backend.jobs.trainings import NOBODY_TO_ASK
from celestial_backend.services import build
from celestial_backend.settings import Settings
from celestial_backend.trust.measures import measure


@click.command(short_help="Say what the pre-labels of a project are worth.")
@click.option(
    "--project", type=click.IntRange(min=1), required=True, help="Label Studio's number of the project."
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
@click.pass_obj
def report(settings: Settings, project: int, *, as_json: bool) -> None:
    """
    Say how far the pre-labels of a project can be trusted, what they save, and what they do to those who label.

    It reads all labels, and changes nothing.
    """
    if not (settings.label_studio_url and settings.label_studio_api_key):
        raise SettingsError(NOBODY_TO_ASK)
    services = build(settings)
    with Shown(f"Reading the labels of project {project}"):
        evidence = services.evidence(str(project))
        manifests = {model.tag: model.manifest for model in services.store.registry.models()}
        measures = measure(evidence, manifests)
    if as_json:
        click.echo(msgspec.json.encode(measures).decode())
        return
    raise click.UsageError("Give --json: there is no page yet.")
