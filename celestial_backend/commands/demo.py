"""
The command `demo`: the whole product on one machine, with pictures that it draws itself.

It runs a Label Studio of its own and the backend. Each is a process group with a file that it keeps locked while it
lives. So one that was left behind, because the demonstration was killed, is found and ended by the next one, and
nothing else is.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import click
from rich.console import Console

from celestial_backend.commands.private_addresses import studio_variables
from celestial_backend.errors import StateError, StudioError
from celestial_backend.jobs.processes import PLACE, death, lock
from celestial_backend.planets.renderer import BODIES, render
from celestial_backend.settings import Settings
from celestial_backend.studio.client import Studio
from celestial_backend.studio.setup import config_for, create_project, find_project, pictures_of, register, upload

VERSION = "1.23.2"
HOST = "127.0.0.1"
STOP_S = 10.0
LOOK_S = 0.1
OURS = ("CELESTIAL_", "LABEL_STUDIO_", "HEARTEX_", "BENTOML_", "BASIC_AUTH_", "LOCAL_FILES_", "TEST_")
OURS_BY_NAME = {"MODEL_DIR", "LOG_LEVEL", "LOG_FORMAT", "PORT", "WORKERS", "THREADS", "HOST", "PYTHONPATH"}
TITLE = "Celestial bodies"
SEED = 2026  # of pictures that no model has learned from
SIZE_PX = 256
RETRIEVE_S = 600
MARKER = ".celestial-demo"  # says that the folder is ours, and may be removed
START_S = 300.0
USER = "demo@example.com"
START = "import sys; from celestial_backend.web.server import serve; sys.exit(serve())"


def free_port(wanted: int = 0) -> int:
    """A port of this machine that nothing listens on: the wanted one, if it can be had."""
    for port in (wanted, 0):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # old connections are no matter
            probe.bind((HOST, port))
            return int(probe.getsockname()[1])
    raise StateError(f"A free port of {HOST} is needed, and there is none. End some other servers.")


def plain_environ() -> dict[str, str]:
    """The environment without any setting of ours or of Label Studio's: the demonstration has its own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(OURS)}
    return {name: value for name, value in kept.items() if name not in OURS_BY_NAME} | {"NO_PROXY": HOST}


class Server:
    """A server of the demonstration; everything it prints goes to a file."""

    def __init__(self, folder: Path, name: str) -> None:
        self.name = name
        self.log = folder / f"{name}.log"
        self._group = folder / f"{name}.pid"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, command: Sequence[str | Path], environ: Mapping[str, str], cwd: Path) -> None:
        """Start it in a process group of its own; one that was left behind is ended first."""
        self.end_leftover()
        with self._group.open("a+b") as held, self.log.open("wb") as output:
            fcntl.flock(held, fcntl.LOCK_EX)
            self._process = subprocess.Popen(  # noqa: S603 - our own module, or the Label Studio that was asked for
                [str(part) for part in command], cwd=cwd, env=dict(environ), stdin=subprocess.DEVNULL,
                stdout=output, stderr=subprocess.STDOUT, start_new_session=True, pass_fds=(held.fileno(),),
            )  # fmt: skip
            held.truncate(0)
            held.write(str(self._process.pid).encode())

    def end_leftover(self) -> None:
        """End what a demonstration that was killed has left behind."""
        if not self._group.exists() or not self._held():
            return
        with contextlib.suppress(ValueError):
            _end(int(self._group.read_text()), lambda: not self._held())

    def wait_for_answer(self, url: str, seconds: float) -> None:
        """
        Wait until `url` answers.

        Raises:
            StudioError: The server ended, or was silent for too long.
        """
        deadline = time.monotonic() + seconds
        while not _answers(url):
            self.see_that_it_runs()
            if time.monotonic() > deadline:
                raise StudioError(f"{self.name} must answer within {seconds:g} seconds and did not. See {self.log}.")
            time.sleep(LOOK_S)

    def see_that_it_runs(self) -> None:
        """
        Say so when the server has ended.

        Raises:
            StudioError: It has.
        """
        code = None if self._process is None else self._process.poll()
        if code is not None:
            raise StudioError(f"{self.name} has ended. {death(code)} See {self.log}.")

    def stop(self) -> None:
        """End it with all its processes: asked first, forced after ten seconds."""
        process = self._process
        if process is not None:
            _end(process.pid, lambda: process.poll() is not None and not self._held())
            process.wait()
            self._process = None

    def _held(self) -> bool:
        """Whether a process of the server lives: the lock is freed when the last one has ended."""
        with self._group.open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False


def start_label_studio(server: Server, program: Path, port: int, data: Path, account: Mapping[str, str]) -> str:
    """Start a Label Studio with its data in a folder, and ``user``, ``password`` and ``token`` of its user; its URL."""
    url = f"http://{HOST}:{port}"
    data.mkdir(exist_ok=True)
    own = {
        "LABEL_STUDIO_BASE_DATA_DIR": str(data),
        "LABEL_STUDIO_HOST": url,
        "LABEL_STUDIO_USERNAME": account["user"],
        "LABEL_STUDIO_PASSWORD": account["password"],
        "LABEL_STUDIO_USER_TOKEN": account["token"],
        "LABEL_STUDIO_ENABLE_LEGACY_API_TOKEN": "true",
        "LABEL_STUDIO_DISABLE_SIGNUP_WITHOUT_LINK": "true",
        **studio_variables([HOST]),
        "COLLECT_ANALYTICS": "false",
        "LATEST_VERSION_CHECK": "false",
        "SENTRY_DSN": "",
        "FRONTEND_SENTRY_DSN": "",
        "FEATURE_FLAGS_OFFLINE": "true",
    }
    command: list[str | Path] = [program, "start", "--no-browser", "--internal-host", HOST, "--port", str(port)]
    server.start(command, plain_environ() | own, data.parent)
    return url


def label_studio_program(folder: Path, given: Path | None, say: Callable[[str], None]) -> Path:
    """
    Label Studio's start program, in a virtual environment that is given, or made in `folder` on first use.

    It counts only once the note that it is complete has been written; a killed installation is made again.

    Raises:
        StudioError: There is none, or it could not be installed.
    """
    if given is not None:
        program = given.absolute() / "bin" / "label-studio"
        if not program.is_file():
            raise StudioError(
                f"--label-studio-venv must name a virtual environment with Label Studio, and {given} is none."
            )
        return program
    place, complete = folder / f"label-studio-{VERSION}", folder / f"label-studio-{VERSION}.complete"
    if not complete.exists():
        shutil.rmtree(place, ignore_errors=True)
        log = folder / "install.log"
        python = place / "bin" / "python"
        commands: list[list[str | Path]] = [
            [sys.executable, "-m", "venv", place],
            [python, "-m", "pip", "install", "--progress-bar", "off", f"label-studio=={VERSION}"],
        ]
        for command in commands:
            for line in _lines_of(command, log):
                say(f"Installing Label Studio {VERSION}, once: {line}")
        complete.write_text(VERSION)
    return place / "bin" / "label-studio"


def _lines_of(command: Sequence[str | Path], log: Path) -> Iterator[str]:
    """What a command prints, line by line, while it runs; also kept in a file."""
    process = subprocess.Popen(  # noqa: S603 - Python's own venv and pip
        [str(part) for part in command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, errors="replace", start_new_session=True,
    )  # fmt: skip
    last = ""
    try:
        with log.open("a") as file:
            for line in process.stdout or ():
                file.write(line)
                last = line.strip() or last
                yield last
    finally:
        if process.poll() is None and sys.exc_info()[0] is not None:
            os.killpg(process.pid, signal.SIGTERM)
        process.wait()
    if process.returncode:
        raise StudioError(f"Label Studio could not be installed: {last[:300]} See {log}, and do this again.")


def _answers(url: str) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # this machine, whatever the proxies
    try:
        with opener.open(url, timeout=5) as answer:
            return bool(answer.status < 400)
    except (OSError, urllib.error.URLError):
        return False


def _end(group: int, ended: Callable[[], bool]) -> None:
    for sign, seconds in ((signal.SIGTERM, STOP_S), (signal.SIGKILL, STOP_S)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, sign)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if ended():
                return
            time.sleep(LOOK_S)


def draw(place: Path, count: int) -> list[Path]:
    """Pictures of the bodies in turn; those that are there from before stay."""
    place.mkdir(exist_ok=True)
    for number in range(count):
        body = BODIES[number % len(BODIES)]
        path = place / f"{number:04}-{body.lower()}.png"
        if not path.exists():
            part = path.with_suffix(".part")
            render(body, (SEED, number), SIZE_PX).save(part, format="png")
            part.replace(path)
    return pictures_of(place)


def prelabelled(url: str, backend_url: str, token: str, pictures: list[Path]) -> dict[str, Any]:
    """A project with a prediction for each picture, through the same steps as `connect`."""
    studio = Studio(Settings(label_studio_url=url, label_studio_api_key=token))
    project = find_project(studio, TITLE)
    if project is None:
        project = create_project(studio, TITLE, config_for(BODIES))
    _forget_others(studio, project, backend_url)
    upload(studio, project, pictures, lambda done, total: None)  # noqa: ARG005 - too few to show
    model = register(studio, project, backend_url)
    chosen: Any = {"all": True, "excluded": []}
    studio.ask(
        "predictions",
        lambda client: client.actions.create(
            id="retrieve_tasks_predictions", project=project, selected_items=chosen,
            request_options={"timeout_in_seconds": RETRIEVE_S},
        ),
    )  # fmt: skip
    counted = studio.ask("the project", lambda client: client.projects.get(project))
    told = {"tasks": counted.task_number or 0, "predictions": counted.total_predictions_number or 0}
    if not told["predictions"]:
        raise StudioError("Label Studio has no predictions of the pictures. See the logs in the folder.")
    return {"project": project, "model_version": model.version, **told}


def _forget_others(studio: Studio, project: int, backend_url: str) -> None:
    """Remove the record of a backend at a port of an earlier day; Label Studio would ask that one only."""
    for record in studio.ask("the models", lambda client: client.ml.list(project=project)):
        if record.url != backend_url:
            number = int(record.id or 0)
            studio.ask("the models", lambda client, number=number: client.ml.delete(number))  # type: ignore[misc]


@click.command(short_help="Show everything, with a Label Studio of its own.")
@click.option(
    "--folder", type=click.Path(file_okay=False, path_type=Path), help="Where its data go.  [default: MODEL_DIR/demo]"
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
    place = (folder or settings.state.demo).absolute()
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
