"""The command that says what is wrong with a set-up, and what mends it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict

import click

from celestial_backend import checks
from celestial_backend.checks import Finding
from celestial_backend.settings import Settings
from celestial_backend.wiring import build

MARKS = {"ok": ("ok", "green"), "warn": ("warning", "yellow"), "fail": ("FAILED", "red"), "not checked": ("-", None)}


@click.command()
@click.option("--project", type=int, help="Look at this project only; without it, at all that the backend serves.")
@click.option("--backend-url", help="Where the backend is, as Label Studio calls it. Default: PORT on this machine.")
@click.option("--fix", is_flag=True, help="Mend in Label Studio what can be mended there, and say what was changed.")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
@click.pass_obj
def doctor(settings: Settings, project: int | None, backend_url: str | None, *, fix: bool, as_json: bool) -> None:
    """
    Check everything that a connection needs, in that order, and say what mends what is wrong.

    Ends with code 0 when nothing failed; warnings are no failures.
    """
    findings = []
    for finding in _findings(settings, project, backend_url, _fix=fix):
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


def _findings(settings: Settings, _project: int | None, backend_url: str | None, *, _fix: bool) -> Iterator[Finding]:
    services = build(settings)
    yield checks.python_and_packages()
    found, _classes = checks.model(services)
    yield found
    yield checks.state_folder(settings)
    yield checks.disk(settings)
    running, found = checks.backend(settings, backend_url)
    yield found
    yield checks.worker(settings, running=running)
    yield checks.queue(settings)


def _tell(finding: Finding) -> None:
    mark, colour = MARKS[finding.state]
    place = "" if finding.project is None else f"Project {finding.project}: "
    click.echo(f"{click.style(f'{mark:8}', fg=colour)} {place}{finding.name}: {finding.what}")
    if finding.mend:
        click.echo(f"{'':8} -> {finding.mend}")
