"""The command `report`: what the pre-labels of a project are worth, as a page for people or in figures for a script."""

from __future__ import annotations

import json
from pathlib import Path

import click
import msgspec

from celestial_backend.commands.shown import Shown
from celestial_backend.errors import SettingsError
from celestial_backend.jobs.trainings import NOBODY_TO_ASK
from celestial_backend.learning.project import Learner
from celestial_backend.services import Services, build
from celestial_backend.settings import Settings
from celestial_backend.studio.labels import ProjectLabels
from celestial_backend.studio.tabs import show_tasks
from celestial_backend.trust import planted
from celestial_backend.trust import report as pages
from celestial_backend.trust.album import Sights, look
from celestial_backend.trust.evidence import Evidence
from celestial_backend.trust.measures import measure

TAB = "To look at again"


@click.command(short_help="Say how far to trust the pre-labels, on a page.")
@click.option(
    "--project", type=click.IntRange(min=1), required=True, help="Label Studio's number of the project."
)  # fmt: skip
@click.option(
    "--output", type=click.Path(path_type=Path), metavar="FILE",
    help="Where to write the page; without it, into the state folder.",
)  # fmt: skip
@click.option("--quality-tab", is_flag=True, help=f"Make or renew the tab {TAB!r} in Label Studio's Data Manager.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON, and write a page only to --output.")
@click.pass_obj
def report(settings: Settings, project: int, output: Path | None, *, quality_tab: bool, as_json: bool) -> None:
    """
    Write a page that says how far the pre-labels of a project can be trusted, and what to do next.

    It is for whoever runs the project, not for those who label, as it names pre-labels that were withheld from them.
    """
    if not (settings.label_studio_url and settings.label_studio_api_key):
        raise SettingsError(NOBODY_TO_ASK)
    place = output or (None if as_json else settings.state.report(str(project)))
    if place is not None:
        pages.check(place, settings)
    services = build(settings)
    labels = ProjectLabels(services.studio, str(project))
    with Shown(f"Reporting on project {project}") as shown:
        shown(words="reading labels")
        evidence = services.evidence(str(project))
        figures = measure(evidence, {each.tag: each.manifest for each in services.store.registry.models()})
        sights = _look(services, evidence, labels, shown) if place is not None or quality_tab else None
        if place is not None and sights is not None:
            pages.write(place, pages.page(figures, sights))
        tab = _tab(evidence, labels, sights) if quality_tab and sights is not None else None
    if as_json:
        seen: dict[str, object] = {} if sights is None else {"drift": sights.drift, "again": sights.again}
        seen |= {"planted": planted.told(services.trial.kept(str(project), evidence.made))}
        click.echo(json.dumps(msgspec.to_builtins(figures) | msgspec.to_builtins(seen, str_keys=True)))
        return
    for sentence in pages.summary(figures):
        click.echo(sentence)
    click.echo(f"The page is {place}. Keep it from those who label: it names what was withheld from them.")
    if quality_tab:
        click.echo(_told(evidence.link, tab))


def _look(services: Services, evidence: Evidence, labels: ProjectLabels, shown: Shown) -> Sights:
    def told(stage: str, **where: int | None) -> None:
        shown(where.get("pictures") or 0, where.get("of"), words=stage)

    learner = Learner(services.settings, services.store, services.studio, services.images, services.trial.misled)
    return look(evidence, labels, learner, services.images, services.store, services.settings, told)


def _tab(evidence: Evidence, labels: ProjectLabels, sights: Sights) -> int | None:
    annotations = {given.task: given.annotation for given in evidence.given}
    return show_tasks(labels, TAB, {task: annotations.get(task) for task in sights.again})


def _told(link: str, tab: int | None) -> str:
    if tab is None:
        return f"There is no task to look at again, so there is no tab {TAB!r}."
    return f"The tab {TAB!r} in Label Studio: {link}?tab={tab}"
