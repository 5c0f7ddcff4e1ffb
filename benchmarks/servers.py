"""The backends that are compared, each started as its people start it."""

from __future__ import annotations

import contextlib
import itertools
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from benchmarks.bench import BIN, REPOSITORY, Bench, BenchmarkError
from benchmarks.load import Call, ask
from benchmarks.packages import peer_packages
from benchmarks.tasks import check, predict_body, setup_body
from celestial_backend.commands.demo import HOST, Server, free_port
from celestial_backend.settings import Settings

READY_S = 120.0
PEERS = Path(__file__).with_name("peers")
_numbers = itertools.count(1)


class Backend(Server):
    """A running backend, ended with all its processes when its ``with`` block ends."""

    def __init__(self, bench: Bench, name: str) -> None:
        super().__init__(bench.folder, f"{name}-{next(_numbers)}")
        self.bench = bench
        self.port = free_port()
        self.url = f"http://{HOST}:{self.port}"
        self.started = 0.0
        self.group = 0

    def begin(self, command: Sequence[object], environ: Mapping[str, str], cwd: Path = REPOSITORY) -> Self:
        """Start it; `started` is the moment, `group` its process group."""
        self.started = time.perf_counter()
        self.start([str(part) for part in command], environ, cwd)
        self.group = int(self._group.read_text())
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def call(self, *addresses: str) -> Call:
        """The request for a prediction of tasks with these pictures."""
        return Call("/predict", predict_body(addresses))

    def predict(self, addresses: Sequence[str], timeout: float = 300) -> float:
        """The seconds in which tasks with these pictures got their predictions, all in one request."""
        call = self.call(*addresses)
        started = time.perf_counter()
        answer = ask(self.port, call, timeout)
        seconds = time.perf_counter() - started
        check(answer, len(addresses))
        return seconds

    def until_setup(self) -> float:
        """The seconds from its start to the first answer of /setup."""
        return self._until(lambda: ask(self.port, Call("/setup", setup_body())))

    def until_prediction(self) -> float:
        """The seconds from its start to the first prediction."""
        return self._until(lambda: check(ask(self.port, self.call(*self.bench.album.addresses(1))), 1))

    def ready(self) -> Self:
        """Wait until it has predicted."""
        self.until_setup()
        self.until_prediction()
        return self

    def _until(self, attempt: Callable[[], object]) -> float:
        while time.perf_counter() < self.started + READY_S:
            self.see_that_it_runs()
            with contextlib.suppress(OSError, BenchmarkError):
                attempt()
                return time.perf_counter() - self.started
            time.sleep(0.005)
        raise BenchmarkError(f"{self.name} must predict within {READY_S:g} seconds and did not. See {self.log}.")


class Limit(Backend):
    """The bare server: gunicorn as ours, no Flask and no JSON, one picture a request, named by the path."""

    def call(self, *addresses: str) -> Call:
        """The same body, which is read and left alone."""
        return Call("/" + addresses[0].partition("-")[2], predict_body(addresses))

    def until_prediction(self) -> float:
        """The seconds to its first answer, which it gives when it has predicted."""
        return self._until(lambda: ask(self.port, self.call(*self.bench.album.addresses(1))))

    def until_setup(self) -> float:
        """It has no /setup."""
        return self.until_prediction()


class BareBatch:
    """The bare work of many pictures, in a process that waits to be told; see `peers/bare_batch.py`."""

    def __init__(self, bench: Bench, place: str, names: Sequence[str]) -> None:
        settings = Settings()
        command = [sys.executable, "-m", "benchmarks.peers.bare_batch", place, str(settings.fetch_threads),
                   str(settings.batch_size), *names]  # fmt: skip
        self._process = subprocess.Popen(  # noqa: S603 - our own module
            command, cwd=REPOSITORY, env=bench.environ(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Self:
        self.alone_ms = round(self._number(), 2)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.kill()
        self._process.communicate()

    def round(self) -> float:
        """The seconds of all pictures once."""
        return self._number("\n")

    def _number(self, line: str = "") -> float:
        told, says = self._process.stdin, self._process.stdout
        assert told is not None  # noqa: S101 - both are pipes
        assert says is not None  # noqa: S101
        told.write(line)
        told.flush()
        said = says.readline()
        if not said:
            raise BenchmarkError("The bare work must go on, and its process ended.")
        return float(said)


def ours(bench: Bench, **settings: object) -> Backend:
    """Ours, by the README's command, with pictures on Label Studio's disk."""
    backend = Backend(bench, "ours")
    state = bench.folder / f"{backend.name}-state"
    given = {"MODEL_DIR": state, "CELESTIAL_LABEL_STUDIO_DATA": bench.album.studio_data, **settings}
    return backend.begin([BIN / "label-studio-ml", "start", ".", "-p", backend.port], bench.environ(**given))


def tutorial(bench: Bench) -> Backend:
    """The MLOps guide's way: FastAPI under uvicorn, pictures in a local folder."""
    backend = Backend(bench, "tutorial")
    environ = bench.environ(BENCHMARK_PICTURES=bench.album.originals)
    environ["PYTHONPATH"] = f"{peer_packages(bench.say)}:{REPOSITORY}"
    command = [sys.executable, "-m", "uvicorn", "benchmarks.peers.tutorial:app", "--host", HOST, "--port", backend.port]
    return backend.begin(command, environ)


def stock(bench: Bench) -> Backend:
    """The SDK's way: a project made by ``label-studio-ml init`` and started by ``label-studio-ml start``."""
    backend = Backend(bench, "stock")
    # The SDK looks for Label Studio's uploads below the user's data folder.
    environ = bench.environ(XDG_DATA_HOME=bench.album.studio_data.parent, MODEL_DIR=bench.folder / "stock-state")
    script = f"{PEERS / 'stock.py'}:Stock"
    made = bench.folder / backend.name
    shutil.rmtree(made, ignore_errors=True)
    command = [str(BIN / "label-studio-ml"), "init", made.name, "--script", script]
    subprocess.run(command, cwd=bench.folder, env=environ, capture_output=True, check=True)  # noqa: S603 - the SDK's own
    start = [BIN / "label-studio-ml", "start", made.name, "--host", HOST, "-p", backend.port]
    return backend.begin(start, environ, bench.folder)


def limit(bench: Bench) -> Backend:
    """The least that any backend must do for one task on this web server; see `peers/bare_server.py`."""
    backend = Limit(bench, "limit")
    threads = Settings().threads
    command = [sys.executable, "-m", "gunicorn", "--worker-class", "gthread", "--threads", threads,
               "--bind", f"{HOST}:{backend.port}", "benchmarks.peers.bare_server:app"]  # fmt: skip
    return backend.begin(command, bench.environ(BENCHMARK_PICTURES=bench.album.originals))


def bare_head(bench: Bench, store: Path) -> Backend:
    """The same limit with the newest model of heads in a store; see `peers/bare_head.py`."""
    backend = Limit(bench, "limit")
    command = [sys.executable, "-m", "gunicorn", "--worker-class", "gthread", "--threads", Settings().threads,
               "--bind", f"{HOST}:{backend.port}", "benchmarks.peers.bare_head:app"]  # fmt: skip
    return backend.begin(command, bench.environ(BENCHMARK_PICTURES=bench.album.originals, BENTOML_HOME=store))


def constant(bench: Bench) -> Backend:
    """A backend that answers at once, the same for every task."""
    backend = Backend(bench, "constant")
    return backend.begin([sys.executable, "-m", "benchmarks.peers.constant", backend.port], bench.environ())


def picture_host(bench: Bench) -> Backend:
    """A web server with the pictures under their own names."""
    host = Backend(bench, "host")
    command = [sys.executable, "-m", "benchmarks.peers.host", host.port, bench.album.originals]
    host.begin(command, bench.environ()).wait_for_answer(f"{host.url}/{bench.album.names[0]}", READY_S)
    return host


BACKENDS: dict[str, Callable[[Bench], Backend]] = {"ours": ours, "limit": limit, "stock": stock, "tutorial": tutorial}
