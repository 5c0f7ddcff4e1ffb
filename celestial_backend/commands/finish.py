"""The command `finish`: an audit that people label blind, and what may then be accepted without a look."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

from celestial_backend.commands.shown import Shown
from celestial_backend.errors import SettingsError, StateError
from celestial_backend.jobs.processes import lock
from celestial_backend.jobs.trainings import NOBODY_TO_ASK
from celestial_backend.services import Services, build
from celestial_backend.settings import Settings
from celestial_backend.studio.desk import Desk
from celestial_backend.trust import certificate, report
from celestial_backend.trust.audit import ACCEPTED, ALL
from celestial_backend.trust.finish import CERTIFIED, Certificates, Outcome, Wish

WORST = 0.5


def read_share(_context: click.Context, option: click.Parameter, value: float | None) -> float | None:
    """A share that can be promised."""
    if value is None or (option.name == "error" and 0 < value <= WORST):
        return value
    if option.name == "confidence" and WORST <= value < 1:
        return value
    if option.name == "error" and value == 0:
        raise click.BadParameter("No error at all can be promised only of tasks that people label.")
    rule = f"above 0 and at most {WORST}" if option.name == "error" else f"from {WORST} to below 1"
    raise click.BadParameter(
        f"It must be a share {rule}, such as {'0.03' if option.name == 'error' else '0.9'}, got {value:g}."
    )


@click.command(short_help="Accept the rest, once a sample shows that few enough are wrong.")
@click.option(
    "--project", type=click.IntRange(min=1), required=True, help="Label Studio's number of the project."
)  # fmt: skip
@click.option(
    "--error", type=float, callback=read_share, help="The share that may be wrong, such as 0.03; a new audit needs it."
)
@click.option(
    "--of", type=click.Choice([ACCEPTED, ALL]), help="Of what: of the accepted, or of all tasks that were open, those"
    " that people label included.  [default: accepted]",
)  # fmt: skip
@click.option("--confidence", type=float, callback=read_share, help="How sure that is to be.  [default: 0.9]")
@click.option("--control", help="Judge and accept only this control.  [default: all]")
@click.option(
    "--audit", type=click.IntRange(min=1), help="How many tasks to draw.  [default: what leaves the least to label]"
)
@click.option("--more", is_flag=True, help="Draw as many tasks again, where the labels are not enough.")
@click.option("--new", is_flag=True, help="Give up the open audit, and draw another one.")
@click.option("--annotate", is_flag=True, help="Write annotations, marked as accepted, in place of predictions.")
@click.option(
    "--output", type=click.Path(path_type=Path), metavar="FILE",
    help="Where to write the certificate; without it, into the state folder.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.pass_obj
def finish(settings: Settings, /, project: int, output: Path | None, *, as_json: bool, **wishes: Any) -> None:
    """
    Accept what the model says of the remaining tasks, once a sample shows that few enough of it is wrong.

    The first run draws the sample, and prints where people label it, without pre-labels. Run again, it says how many
    labels are missing. Once all are there, it accepts as many predictions as they allow, and writes a certificate.
    """
    if not (settings.label_studio_url and settings.label_studio_api_key):
        raise SettingsError(NOBODY_TO_ASK)
    place = output or settings.state.certificate(str(project))
    report.check(place, settings)
    services = build(settings)
    wish = Wish(wishes["error"], wishes["confidence"], wishes["of"], wishes["control"], wishes["audit"],
                more=wishes["more"], anew=wishes["new"], annotate=wishes["annotate"])  # fmt: skip
    with lock(settings.state.prelabel_lock(str(project))) as held:
        if held is None:
            raise StateError(
                f"One prelabel or finish at a time may run on a project, and another one runs on project {project}."
                " Wait until it has ended. With CELESTIAL_SCORE=margin or typical, the worker runs prelabel by itself."
            )
        with Shown(f"Finishing project {project}") as shown:
            outcome = _run(services, str(project), wish, shown)
        if outcome.state == CERTIFIED:
            report.write(place, certificate.page(outcome))
    if as_json:
        click.echo(json.dumps(asdict(outcome) | {"page": str(place) if outcome.state == CERTIFIED else None}))
    else:
        for sentence in certificate.sentences(outcome):
            click.echo(sentence)
        if outcome.state == CERTIFIED:
            click.echo(f"The certificate is {place}.")
    if outcome.changed:
        raise StateError("The certificate does not hold any more. Look at the labels of its audit.")


def _run(services: Services, project: str, wish: Wish, shown: Shown) -> Outcome:
    def answers(tasks: Any, config: str) -> Any:
        return services.predictor.predict(tasks, config, project=project)

    made = Certificates(
        Desk(services.studio, project), services.database, services.trial, services.store.live_tag(project), answers,
        lambda what, done, total: shown(done, total, what=what),
    )  # fmt: skip
    return replace(made.go_on(wish), link=f"{services.settings.studio_link}/projects/{project}/data")
