"""The command that says what is wrong with a set-up, and what fixes it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict

import click

from celestial_backend.commands.connect import read_address
from celestial_backend.commands.shown import each
from celestial_backend.doctor import machine, studio
from celestial_backend.doctor.machine import Finding, not_checked
from celestial_backend.doctor.studio import Connection
from celestial_backend.errors import StudioError
from celestial_backend.services import Services, build
from celestial_backend.settings import Settings
from celestial_backend.studio.project import StudioProject

COLOURS, WIDTH = {"ok": "green", "warn": "yellow", "fail": "red"}, 11


@click.command(short_help="Find what is wrong with a set-up, and how to fix it.")
@click.option(
    "--project", type=click.IntRange(min=1),
    help="Check this project only.  [default: all that the backend is connected to]",
)  # fmt: skip
@click.option(
    "--backend-url", callback=read_address,
    help="Where Label Studio finds the backend.  [default: CELESTIAL_BACKEND_URL, or http://127.0.0.1:PORT]",
)  # fmt: skip
@click.option("--fix", is_flag=True, help="Fix in Label Studio what can be fixed there, and say what was changed.")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
@click.pass_obj
def doctor(settings: Settings, project: int | None, backend_url: str | None, *, fix: bool, as_json: bool) -> None:
    """
    Check everything that a connection needs, and say how to fix what is wrong.

    The exit code is 0 if nothing failed; warnings are not failures.
    """
    findings = []
    for finding in each("Checking", _findings(settings, project, backend_url, fix=fix)):
        findings.append(finding)
        if not as_json:
            _tell(finding)
    failed = sum(finding.state == "fail" for finding in findings)
    if as_json:
        click.echo(json.dumps({"fine": not failed, "checks": [asdict(finding) for finding in findings]}))
    else:
        warned = sum(finding.state == "warn" for finding in findings)
        click.echo(f"{len(findings)} checks: {failed} failed, {warned} with a warning.")
    sys.exit(1 if failed else 0)


def _findings(settings: Settings, project: int | None, backend_url: str | None, *, fix: bool) -> Iterator[Finding]:
    services = build(settings, look_only=True)
    yield machine.python_and_packages()
    found, classes = machine.model(services)
    yield found
    yield machine.state_folder(settings)
    yield machine.disk(settings)
    running, found = machine.backend(settings, backend_url)
    yield found
    if running and found.state == "ok":
        yield machine.seen(settings, backend_url)
    answers, told = studio.answering(services.studio)
    yield from told
    yield from _of_studio(services, project, fix=fix, answers=answers, model_works=bool(classes))
    yield machine.worker(services, running=running)
    yield machine.database(settings)


def _of_studio(
    services: Services, project: int | None, *, fix: bool, answers: bool, model_works: bool
) -> Iterator[Finding]:
    name = "Projects" if project is None else f"Project {project}"
    if not answers:
        yield not_checked("Token", "Label Studio does not answer")
        yield not_checked(name, "Label Studio does not answer")
        return
    api = StudioProject(services.studio, "", patience_s=0)  # one look: nothing is tried twice
    accepted = studio.token(api, services.settings)
    yield accepted
    if accepted.state == "fail":
        yield not_checked(name, "the token is not accepted")
        return
    try:
        connected = studio.connected(api, project)
        if not connected and project is not None:
            yield from studio.not_connected(api, services, project, model_works=model_works)
        elif not connected:
            mend = "Connect one: python -m celestial_backend connect --help"
            what = "No project is connected, so it is not known whether Label Studio reaches the backend or blocks it."
            yield Finding(name, "warn", what, mend)
        for number, record in connected:
            connection = Connection(services, number, record)
            connection.model_works = model_works
            yield from connection.findings(fix=fix)
    except StudioError as error:
        mend = "Look whether Label Studio is up, and whether the token's user sees the project; then run this again."
        yield Finding(name, "fail", str(error), mend)


def _tell(finding: Finding) -> None:
    mark = click.style(f"{finding.state:{WIDTH}}", fg=COLOURS.get(finding.state))
    place = "" if finding.project is None else f"Project {finding.project}: "
    click.echo(f"{mark} {place}{finding.name}: {finding.what}")
    if finding.changed:
        click.echo(f"{'':{WIDTH}} changed: {finding.changed}")
    if finding.mend:
        click.echo(f"{'':{WIDTH}} -> {finding.mend}")
