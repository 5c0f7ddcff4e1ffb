"""The web server: gunicorn, with TensorFlow started after the fork."""

from __future__ import annotations

import argparse
import errno
import logging
import math
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from gunicorn.app.base import BaseApplication
from gunicorn.arbiter import Arbiter
from gunicorn.glogging import Logger

from celestial_backend import logs
from celestial_backend.errors import CelestialError, SettingsError
from celestial_backend.jobs.processes import PLACE, is_dead, lock, show_life, starter
from celestial_backend.metrics import SHARED
from celestial_backend.services import build, rebuild
from celestial_backend.settings import LOG_LEVELS, Settings, state_note
from celestial_backend.state import private, reason, written_at
from celestial_backend.web.admission import LINE
from celestial_backend.web.app import create_app
from celestial_backend.web.connections import Worker, check_gunicorn
from celestial_backend.web.start import tell_in_background

logger = logging.getLogger(__name__)

SPARE = 8  # threads that no prediction takes: for /health, /setup and /webhook
START = "label-studio-ml start ."
STOP_S = 30  # seconds that running requests have to end after a stop signal
AGAIN_S = 5.0  # a worker that ends is started anew no sooner than this after its last start
HANDED_ON = ("LISTEN_FDS", "GUNICORN_FD")  # where systemd, or the process before this one, listens already
MAY_PASS = (errno.EROFS, errno.ENOSPC, errno.EDQUOT)
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
        logs.configure(settings.log_level, settings.log_format)
        _check_folder(settings.model_dir)
        if not any(name in os.environ for name in HANDED_ON):
            _check_address(options.host, settings.port)
        if note := state_note({**os.environ, **given}):
            logger.warning("%s", note)
        given["MODEL_DIR"] = str(settings.model_dir)
        if options.check:
            _check(settings)
    except CelestialError as error:
        logs.refuse(error)
        return error.exit_code
    worker = None if options.no_worker else _TrainingWorker({**os.environ, **given}, settings.state.connection)
    with _shared_metrics():
        _Server(settings, options.host, worker, reload=options.debug).run()
    return 0


def wsgi_app() -> _App:
    """The app of a web server process that something else has started, such as ``gunicorn _wsgi:app``."""
    try:
        settings = Settings.from_environ()
        logs.configure(settings.log_level, settings.log_format)
        _check_folder(settings.model_dir)
    except CelestialError as error:
        logs.refuse(error)
        sys.exit(Arbiter.APP_LOAD_ERROR)  # gunicorn stops at this code, and starts anew at any other
    return _App(settings)


class _App:
    """The app, with its model loading; made anew, with the same model, once `connect` was given another token."""

    def __init__(self, settings: Settings) -> None:
        self._lock = threading.Lock()
        self._file = settings.state.connection
        self._written_at = written_at(self._file)
        self._services = build(settings)
        self._services.store.warm_up()
        tell_in_background(settings, self._services.access)
        self._app = create_app(self._services)

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        if written_at(self._file) != self._written_at:
            with self._lock:
                self._reconnect()
        return self._app(environ, start_response)

    def _reconnect(self) -> None:
        now = written_at(self._file)
        if now != self._written_at:
            self._services = rebuild(self._services, self._services.settings.reconnected())
            self._app, self._written_at = create_app(self._services), now
            logger.info("Label Studio's address and token are those that `connect` was given")


def _check_folder(folder: Path) -> None:
    """
    Make the state folder, for this user alone.

    Raises:
        SettingsError: Nobody but its owner or an administrator could make it work.
    """
    private(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        if error.errno not in MAY_PASS:  # else predictions go on, and the log says that trainings do not
            raise SettingsError(
                f"MODEL_DIR must be a folder in which this user can write, and {folder} is none ({reason(error)})."
                " Choose another folder with --model-dir or MODEL_DIR, or make that one this user's."
            ) from error


def _check_address(host: str, port: int) -> None:
    """
    See that this machine lets us listen there; gunicorn tries five times, and says it in its own words.

    Raises:
        SettingsError: It does not; the message says what to change.
    """
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as gunicorn does
            probe.bind((host, port))
    except (OSError, UnicodeError) as error:
        code = error.errno if isinstance(error, OSError) else None  # a name may have no form that can be asked for
        if code == errno.EADDRINUSE:
            said = (f"Port {port} of {host} is in use, perhaps by a backend that runs already. Stop what uses it, or"
                    f" choose another port with -p or PORT.")  # fmt: skip
        elif code == errno.EACCES:
            said = f"Port {port} is for administrators alone. Choose one of 1024 or more with -p or PORT."
        else:
            said = (f"--host must be an address or a name of this machine, got {host!r}. Use 127.0.0.1 for programs on"
                    " this machine alone, or 0.0.0.0 for all that can reach it.")  # fmt: skip
        raise SettingsError(said) from error


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
            logs.refuse(error)
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
            "bind": f"[{host}]:{settings.port}" if ":" in host else f"{host}:{settings.port}",
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
        return _App(self._settings)

    def run(self) -> None:
        _Arbiter(self, self._worker).run()


class _Log(Logger):  # type: ignore[misc]
    """gunicorn's own log, as a part of ours."""

    def setup(self, cfg: Any) -> None:
        super().setup(cfg)
        logging.getLogger("gunicorn.error").handlers.clear()
        self.error_log = logging.getLogger("gunicorn")  # its lines at INFO are no errors
        self.error_log.setLevel(self.loglevel)


class _Arbiter(Arbiter):  # type: ignore[misc]
    """
    gunicorn's master process, which keeps a worker for trainings beside its own.

    It ends with the `label-studio-ml start` that started it, and with the terminal that it was started in, unless
    that was to leave it alone, as with `nohup`.
    """

    def __init__(self, server: _Server, worker: _TrainingWorker | None) -> None:
        self._training_worker = worker
        self._starter = starter()
        self._terminal = _has_terminal()
        super().__init__(server)

    def init_signals(self) -> None:
        left_alone = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        super().init_signals()
        if left_alone:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def handle_hup(self) -> None:
        if self._terminal:
            raise StopIteration  # as gunicorn does at SIGTERM
        super().handle_hup()

    def manage_workers(self) -> None:
        if self._starter is not None and is_dead(self._starter):
            self.log.info("What has started this server has ended")
            raise StopIteration
        super().manage_workers()
        if self._training_worker is not None:
            self._training_worker.keep()


def _has_terminal() -> bool:
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return False
    return True


class _TrainingWorker:
    """A worker process of our own, spawned and never forked; started anew when it ends."""

    def __init__(self, environ: Mapping[str, str], connection: Path) -> None:
        self._connection, self._written_at = connection, written_at(connection)
        more = [environ["PYTHONPATH"]] if "PYTHONPATH" in environ else []
        self._environ = {**environ, "PYTHONPATH": os.pathsep.join([PLACE, *more])}
        self._process: subprocess.Popen[bytes] | None = None
        self._started = -math.inf

    def keep(self) -> None:
        """Start it, unless it runs or was started just now; anew, once `connect` was given another token."""
        now = written_at(self._connection)
        if now != self._written_at:
            self._written_at = now
            if self._process is not None:
                logger.info("The worker starts anew, as it was given another token")
                self._process.send_signal(signal.SIGTERM)
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
    parser = argparse.ArgumentParser(prog=program, description="Start the backend, and a worker that trains.")
    parser.add_argument("-p", "--port", dest="PORT", help="port to listen on (default: PORT or 9090)")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on, 0.0.0.0 for all (default: 127.0.0.1, this machine)"
    )
    parser.add_argument("-d", "--debug", action="store_true", help="log at DEBUG, start anew when the code changes")
    parser.add_argument("--log-level", dest="LOG_LEVEL", choices=LOG_LEVELS, help="default: LOG_LEVEL or INFO")
    parser.add_argument(
        "--model-dir", dest="MODEL_DIR", help="the state folder (default: MODEL_DIR, or `data` in the backend's folder)"
    )
    parser.add_argument("--check", action="store_true", help="load the model first, and exit if that fails")
    parser.add_argument("--no-worker", action="store_true", help="leave trainings to a worker that runs elsewhere")
    parser.add_argument("--basic-auth-user", dest="BASIC_AUTH_USER", help="user name that requests must carry")
    parser.add_argument("--basic-auth-pass", dest="BASIC_AUTH_PASS", help="password that requests must carry")
    words = sys.argv[1:] if argv is None else argv
    options = parser.parse_args([word for word in words if word != "--"])  # which leads `--help` past the SDK's parser
    if options.debug and options.LOG_LEVEL is None:
        options.LOG_LEVEL = "DEBUG"
    return options
