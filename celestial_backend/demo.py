"""The command `demo`: the whole product on one machine, with pictures that it draws itself."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import click
from rich.console import Console

from celestial_backend.demo_project import draw, prelabelled
from celestial_backend.demo_servers import (
    HOST,
    PLACE,
    Server,
    free_port,
    label_studio_program,
    plain_environ,
    start_label_studio,
)
from celestial_backend.errors import StateError
from celestial_backend.processes import lock
from celestial_backend.settings import Settings

MARKER = ".celestial-demo"  # says that the folder is ours, and may be removed
START_S = 300.0
USER = "demo@example.com"
START = "import sys; from celestial_backend.server import serve; sys.exit(serve())"


@click.command()
@click.option(
    "--folder", type=click.Path(file_okay=False, path_type=Path), help="Of the data.  [default: MODEL_DIR/demo]"
)
@click.option(
    "--label-studio-venv", type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="A virtual environment that has Label Studio; without, one is made in the folder.",
)  # fmt: skip
@click.option("--pictures", type=click.IntRange(10, 1000), default=40, show_default=True, help="How many are drawn.")
@click.option("--clean", is_flag=True, help="Remove the folder of an earlier demonstration, and do nothing else.")
@click.option("--json", "as_json", is_flag=True, help="Print address, user and password as JSON.")
@click.pass_obj
def demo(
    settings: Settings,
    folder: Path | None,
    label_studio_venv: Path | None,
    pictures: int,
    *,
    clean: bool,
    as_json: bool,
) -> None:
    """
    Start a Label Studio of its own and the backend, and pre-label pictures that are drawn for it.

    Ctrl-C stops both; started again, it goes on with the same data.
    """
    place = (folder or settings.model_dir / "demo").absolute()
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGINT, _interrupt)
    with _alone(place, make=not clean):
        if clean:
            _clean(place)
            return
        try:
            _run(place, label_studio_venv, pictures, as_json=as_json)
        except KeyboardInterrupt:
            click.echo(f"Stopped. The data lies in {place}; --clean removes it.", err=True)


def _run(place: Path, venv: Path | None, pictures: int, *, as_json: bool) -> None:
    """Start everything, say where it is, and wait for the end; both servers are stopped however it comes."""
    studio, backend = Server(place, "Label-Studio"), Server(place, "backend")
    try:
        with _progress() as say:
            account = _account(place)
            program = label_studio_program(place, venv, say)
            say("Starting Label Studio and the backend")
            url, backend_url = _start(place, program, account, studio, backend)
            say("Drawing pictures")
            drawn = draw(place / "pictures", pictures)
            say("Starting Label Studio and the backend")
            backend.wait_for_answer(f"{backend_url}/health", START_S)
            studio.wait_for_answer(f"{url}/health", START_S)
            say("Connecting, and pre-labelling the pictures")
            shown = prelabelled(url, backend_url, account["token"], drawn)
        about = {"url": f"{url}/projects/{shown['project']}/data", "user": USER, "password": account["password"]}
        if as_json:
            click.echo(json.dumps({**shown, **about, "backend": backend_url, "folder": str(place)}))
        else:
            click.echo(f"{shown['predictions']} of {shown['tasks']} pictures are pre-labelled.")
            click.echo(f"Open      {about['url']}\nUser      {about['user']}\nPassword  {about['password']}")
            click.echo(f"Backend   {backend_url}\nData      {place}\nCtrl-C stops everything.")
        while True:
            time.sleep(1)
            studio.see_that_it_runs()
            backend.see_that_it_runs()
    finally:
        for sign in (signal.SIGINT, signal.SIGTERM):
            signal.signal(sign, signal.SIG_IGN)  # the end is under way already
        backend.stop()
        studio.stop()


def _account(place: Path) -> dict[str, Any]:
    """User, password, token and ports, made once and kept where only this user reads them."""
    file = place / "account.json"
    try:
        account = dict(json.loads(file.read_text()))
    except (OSError, ValueError):
        account = {"user": USER, "password": secrets.token_urlsafe(12), "token": secrets.token_hex(20)}
    # The same ports again, where they are free, so that an open page goes on.
    account["studio_port"] = free_port(account.get("studio_port", 0))
    account["backend_port"] = free_port(account.get("backend_port", 0))
    part = place / "account.json.part"
    part.unlink(missing_ok=True)
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as written:
        json.dump(account, written)
    part.replace(file)
    return account


def _start(
    place: Path, program: Path, account: dict[str, Any], studio: Server, backend: Server
) -> tuple[str, str]:
    """Start both servers side by side; their addresses."""
    uploads, backend_port = place / "data", account["backend_port"]
    url = start_label_studio(studio, program, account["studio_port"], uploads, account | {"user": USER})
    ours = {
        "PYTHONPATH": PLACE,
        "MODEL_DIR": str(place / "state"),
        "BENTOML_HOME": str(place / "bentoml"),
        "BENTOML_DO_NOT_TRACK": "True",
        "PORT": str(backend_port),
        "LABEL_STUDIO_URL": url,
        "LABEL_STUDIO_API_KEY": account["token"],
        "CELESTIAL_LABEL_STUDIO_DATA": str(uploads),
    }
    backend.start([sys.executable, "-c", START, "--host", HOST], plain_environ() | ours, place)
    return url, f"http://{HOST}:{backend_port}"


@contextmanager
def _alone(place: Path, *, make: bool) -> Iterator[None]:
    """The folder, which is ours and which no other demonstration uses."""
    if place.exists() and any(place.iterdir()) and not (place / MARKER).is_file():
        raise StateError(
            f"The folder must be empty or of an earlier demonstration, and {place} is neither. Name another."
        )
    if not place.exists() and not make:
        raise StateError(f"There is nothing to remove: {place} does not exist.")
    place.mkdir(parents=True, exist_ok=True)
    (place / MARKER).touch()
    with lock(place / "demo.lock") as held:
        if held is None:
            raise StateError(f"A demonstration runs in {place}. Stop it first, or name another folder.")
        yield


def _clean(place: Path) -> None:
    for name in ("Label-Studio", "backend"):
        Server(place, name).end_leftover()
    for path in place.iterdir():  # the marker last, so that a removal that was cut short can be done again
        if path.name != MARKER:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.rmtree(place)
    click.echo(f"Removed {place}.")


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """A line that changes on a terminal; elsewhere one for each stage."""
    if not sys.stderr.isatty():
        yield lambda text: click.echo(text[:150], err=True)
        return
    with Console(stderr=True).status("") as status:
        yield lambda text: status.update(text[:150])


def _interrupt(_sign: int, _frame: object) -> NoReturn:
    raise KeyboardInterrupt
