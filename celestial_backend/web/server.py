"""The web server: gunicorn, with TensorFlow started after the fork."""

from __future__ import annotations

import argparse
import math
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from flask import Flask
from gunicorn.app.base import BaseApplication
from gunicorn.arbiter import Arbiter
from gunicorn.glogging import Logger

from celestial_backend import logs
from celestial_backend.errors import CelestialError
from celestial_backend.jobs.processes import PLACE, lock, show_life
from celestial_backend.metrics import SHARED
from celestial_backend.services import build
from celestial_backend.settings import LOG_LEVELS, Settings
from celestial_backend.state import private
from celestial_backend.web.admission import LINE
from celestial_backend.web.app import create_app
from celestial_backend.web.connections import Worker, check_gunicorn
from celestial_backend.web.start import tell_in_background

SPARE = 8  # threads that no prediction takes: for /health, /setup and /webhook
START = "label-studio-ml start ."
STOP_S = 30  # seconds that running requests have to end after a stop signal
AGAIN_S = 5.0  # a worker that ends is started anew no sooner than this after its last start
COUNTS, LIFE = "celestial-metrics-", "life"  # folders of shared counts, and the lock that their servers hold


def serve(argv: Sequence[str] | None = None, program: str = START) -> int:
    """
    Serve until a signal comes; what ``label-studio-ml start .`` runs, with the arguments of the SDK's template.

    Args:
        argv: The arguments; those of this process if None.
        program: What the help calls the command.

    Returns:
        The exit code, where the server could not be started.
    """
    options = _options(argv, program)
    given = {variable: text for variable, text in vars(options).items() if variable.isupper() and text is not None}
    try:
        check_gunicorn()
        settings = Settings.from_environ({**os.environ, **given})
        private(settings.model_dir)
        logs.configure(settings.log_level)
        if options.check:
            _check(settings)
    except CelestialError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    worker = None if options.no_worker else _TrainingWorker({**os.environ, **given})
    with _shared_metrics():
        _Server(settings, options.host, worker, reload=options.debug).run()
    return 0


def wsgi_app() -> Flask:
    """The app of a web server process that something else has started, such as ``gunicorn _wsgi:app``."""
    try:
        settings = Settings.from_environ()
    except CelestialError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(Arbiter.APP_LOAD_ERROR)  # gunicorn stops at this code, and starts anew at any other
    private(settings.model_dir)
    logs.configure(settings.log_level)
    return _warm_app(settings)


def _warm_app(settings: Settings) -> Flask:
    services = build(settings)
    services.store.warm_up()
    tell_in_background(settings, services.access)
    return create_app(services)


@contextmanager
def _shared_metrics() -> Iterator[None]:
    """
    A folder of this start in which the web server processes share their counts; it goes when this process ends.

    Where the process was killed, the next start removes it, once no process of that server lives.
    """
    for left in filter(_is_own_folder, Path(tempfile.gettempdir()).glob(f"{COUNTS}*")):
        with suppress(CelestialError), lock(left / LIFE) as ours:
            if ours is not None:
                shutil.rmtree(left, ignore_errors=True)
    new, maker = Path(tempfile.mkdtemp(prefix=f".{COUNTS}")), os.getpid()
    show_life(new / LIFE)  # before another start sees it, which would remove it
    folder = new.rename(new.with_name(new.name.removeprefix(".")))
    os.environ[SHARED] = str(folder)
    try:
        yield
    finally:
        if os.getpid() == maker:  # forked processes come by here too
            shutil.rmtree(folder, ignore_errors=True)


def _is_own_folder(path: Path) -> bool:
    """Whether it is a folder of this user: anybody may put others, and links, into the temporary folder."""
    try:
        found = path.lstat()
    except OSError:  # another start has just removed it
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()


def _check(settings: Settings) -> None:
    """Load the model in a process of its own, because a process with TensorFlow must not be forked."""
    pid = os.fork()
    if pid == 0:
        try:
            build(settings).store.current()
        except CelestialError as error:
            sys.stderr.write(f"{error}\n")
            os._exit(error.exit_code)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code:
        sys.exit(code)


class _Server(BaseApplication):  # type: ignore[misc]
    """gunicorn, told by our settings instead of by its command line."""

    def __init__(self, settings: Settings, host: str, worker: _TrainingWorker | None, *, reload: bool) -> None:
        self._settings = settings
        self._worker = worker
        self._told: dict[str, Any] = {
            "bind": f"{host}:{settings.port}",
            "workers": settings.workers,
            "worker_class": Worker,
            "logger_class": _Log,
            "threads": settings.threads + LINE + SPARE,
            "graceful_timeout": STOP_S,
            "timeout": 120,  # of silence from a worker's main thread, which no request ever blocks
            "reload": reload,
            "control_socket_disable": True,
            "sendfile": False,  # a file would go out before the head that `Worker` holds back
        }
        if worker is not None:
            self._told["on_exit"] = lambda _: worker.stop()
        super().__init__()

    def load_config(self) -> None:
        for name, value in self._told.items():
            if name in self.cfg.settings:
                self.cfg.set(name, value)

    def load(self) -> Any:
        return _warm_app(self._settings)

    def run(self) -> None:
        (Arbiter(self) if self._worker is None else _Arbiter(self, self._worker)).run()


class _Log(Logger):  # type: ignore[misc]
    """gunicorn's own log, with the lines of ours."""

    def setup(self, cfg: Any) -> None:
        super().setup(cfg)
        for handler in self.error_log.handlers:
            handler.setFormatter(logs.Lines(self.error_fmt, self.datefmt))


class _Arbiter(Arbiter):  # type: ignore[misc]
    """gunicorn's master process, which keeps a worker for trainings beside its own."""

    def __init__(self, server: _Server, worker: _TrainingWorker) -> None:
        self._training_worker = worker
        super().__init__(server)

    def manage_workers(self) -> None:
        super().manage_workers()
        self._training_worker.keep()


class _TrainingWorker:
    """A worker process of our own, spawned and never forked; started anew when it ends."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        more = [environ["PYTHONPATH"]] if "PYTHONPATH" in environ else []
        self._environ = {**environ, "PYTHONPATH": os.pathsep.join([PLACE, *more])}
        self._process: subprocess.Popen[bytes] | None = None
        self._started = -math.inf

    def keep(self) -> None:
        """Start it, unless it runs or was started just now."""
        if (self._process is None or self._process.poll() is not None) and self._started + AGAIN_S < time.monotonic():
            self._started = time.monotonic()
            command = [sys.executable, "-m", "celestial_backend.worker", str(os.getpid())]
            # In a session of its own, so that Ctrl-C reaches it through `stop` alone.
            self._process = subprocess.Popen(command, env=self._environ, start_new_session=True)  # noqa: S603 - our own module

    def stop(self) -> None:
        """End it; a training that runs waits again, for the next start."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self._process.kill()


def _options(argv: Sequence[str] | None, program: str) -> argparse.Namespace:
    """Arguments; those named like a setting take its place."""
    parser = argparse.ArgumentParser(prog=program, description="Serve the celestial bodies model.")
    parser.add_argument("-p", "--port", dest="PORT", help="port to listen on (default: PORT or 9090)")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on, 0.0.0.0 for all (default: 127.0.0.1, this machine)"
    )
    parser.add_argument("-d", "--debug", action="store_true", help="log at DEBUG, start anew when the code changes")
    parser.add_argument("--log-level", dest="LOG_LEVEL", choices=LOG_LEVELS, help="default: LOG_LEVEL or INFO")
    parser.add_argument("--model-dir", dest="MODEL_DIR", help="the state folder (default: MODEL_DIR or ./data)")
    parser.add_argument("--check", action="store_true", help="load the model first, and exit if that fails")
    parser.add_argument("--no-worker", action="store_true", help="leave trainings to a worker that runs elsewhere")
    parser.add_argument("--basic-auth-user", dest="BASIC_AUTH_USER", help="user name that requests must carry")
    parser.add_argument("--basic-auth-pass", dest="BASIC_AUTH_PASS", help="password that requests must carry")
    options = parser.parse_args(argv)
    if options.debug and options.LOG_LEVEL is None:
        options.LOG_LEVEL = "DEBUG"
    return options
