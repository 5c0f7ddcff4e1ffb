"""
How long it takes to accept work, and to know what is live: ``python -m benchmarks.jobs latency``.

Four processes of eight threads each ask for trainings of 64 projects, first of the database itself and then of a
backend's /webhook, at a steady pace and as fast as they can, while two workers begin and end what is asked for.
"""

from __future__ import annotations

import itertools
import json
import math
import multiprocessing
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from http.client import HTTPConnection, HTTPException

import click
from msgspec import Raw

from benchmarks.bench import BIN, REPOSITORY
from benchmarks.load import HEADERS, percentile
from celestial_backend.commands.demo import HOST
from celestial_backend.database import Database
from celestial_backend.errors import CelestialError
from celestial_backend.jobs.ledger import KEPT, Ending, Ledger
from celestial_backend.models.pointers import Pointer, Pointers
from celestial_backend.settings import Settings
from celestial_backend.trust.trial import Trial
from celestial_backend.web.protocol import Tasks
from tests.support.backend_server import ServerProcess, free_port, plain_environ

PROCESSES, THREADS, WORKERS = 4, 8, 2
PROJECTS = 64  # fewer than may wait
SIGN_S = 5.0  # between two signs of life of a worker
READS = 20_000
WARM_UP_S = 3.0


@dataclass
class Told:
    """What some threads have seen: the seconds of each call that succeeded, and how the others failed."""

    seconds: list[float] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)

    def add(self, other: Told) -> None:
        """Take in what others have seen."""
        self.seconds += other.seconds
        self.errors += other.errors

    def __str__(self) -> str:
        if not self.seconds:
            return f"no answer, {dict(self.errors)}"
        p50, p99 = (percentile(self.seconds, share) * 1000 for share in (0.5, 0.99))
        failed = f", {dict(self.errors)}" if self.errors else ", no error"
        return f"{len(self.seconds):7} x, p50 {p50:7.2f} ms, p99 {p99:7.2f} ms{failed}"


@dataclass(frozen=True)
class Pace:
    """How often each thread calls, and until when, on the clock that all processes of a machine share."""

    per_s: float
    until: float

    def calls(self, call: Callable[[], object]) -> Told:
        """Call again and again in this thread."""
        told, due = Told(), time.monotonic() + random.uniform(0, 1 / self.per_s)  # noqa: S311 - not all at once
        while due < self.until and (now := time.monotonic()) < self.until:
            time.sleep(max(0.0, due - now))
            started = time.monotonic()
            try:
                call()
            except (CelestialError, OSError, HTTPException) as error:
                told.errors[type(error).__name__] += 1
            else:
                told.seconds.append(time.monotonic() - started)
            due = max(due + 1 / self.per_s, time.monotonic() - 1)
        return told


@cache
def ledger_of(settings: Settings) -> Ledger:
    """The list of jobs, by connections that this process keeps."""
    return Ledger(Database(settings))


def enqueue(settings: Settings, pace: Pace, seed: int) -> Told:
    """What eight threads of a process see that ask the database for trainings."""
    ledger = ledger_of(settings)

    def ask(number: int) -> Told:
        project = projects(seed + number)
        return pace.calls(lambda: ledger.request(next(project), pressed=True))

    return side_by_side(ask)


def webhook(port: int, pace: Pace, seed: int) -> Told:
    """What eight threads see that send *Start Training* to a backend, each time over a new connection."""

    def ask(number: int) -> Told:
        project = projects(seed + number)
        return pace.calls(lambda: post(port, next(project)))

    return side_by_side(ask)


def post(port: int, project: str) -> None:
    """
    Send one event.

    Raises:
        HTTPException: It was not accepted.
    """
    body = {"action": "START_TRAINING", "project": {"id": int(project), "label_config": "<View/>"}}
    connection = HTTPConnection(HOST, port, timeout=10)
    try:
        connection.request("POST", "/webhook", json.dumps(body).encode(), HEADERS)
        answer = connection.getresponse()
        answer.read()
    finally:
        connection.close()
    if answer.status != 201:
        raise HTTPException(f"POST /webhook must be answered with 201, got {answer.status}")


def work(settings: Settings, until: float, name: str) -> Told:
    """What a worker sees that begins what waits and ends it at once: the seconds of both."""
    ledger, told, sign = ledger_of(settings), Told(), -math.inf
    while (started := time.monotonic()) < until:
        try:
            if started > sign + SIGN_S:
                ledger.show_life(name)
                sign = started
            if (job := ledger.start(name)) is None:
                time.sleep(0.01)
                continue
            ledger.end(job, Ending(KEPT, "It was a benchmark."))
        except CelestialError as error:
            told.errors[type(error).__name__] += 1
        else:
            told.seconds.append(time.monotonic() - started)
    return told


def projects(seed: int) -> Iterator[str]:
    """Numbers of projects, in an order of their own."""
    choice = random.Random(seed)  # noqa: S311 - no secret
    return (str(choice.randint(1, PROJECTS)) for _ in itertools.count())


def side_by_side(ask: Callable[[int], Told]) -> Told:
    """What all threads of this process see together."""
    told, found = Told(), list[Told]()
    threads = [threading.Thread(target=lambda number=number: found.append(ask(number))) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for each in found:
        told.add(each)
    return told


def measure(
    pool: ProcessPoolExecutor, settings: Settings, ask: Callable[..., Told], whom: object, per_s: float, seconds: float
) -> tuple[Told, Told]:
    """What those who ask see together, and what the workers see beside them."""
    until = time.monotonic() + seconds
    workers = [pool.submit(work, settings, until, f"benchmark {number}") for number in range(WORKERS)]
    pace = Pace(per_s / PROCESSES / THREADS, until)
    asking = [pool.submit(ask, whom, pace, 100 * number) for number in range(PROCESSES)]
    return together(asking), together(workers)


def together(asked: Sequence[Future[Told]]) -> Told:
    """What several processes see."""
    told = Told()
    for each in asked:
        told.add(each.result())
    return told


def read_live(settings: Settings) -> Told:
    """What one thread sees that asks for live models."""
    database, told = Database(settings), Told()
    pointers = Pointers(database)
    with database.writing("live") as transaction:
        for number in range(1, PROJECTS + 1):
            pointers.write(str(number), Pointer(f"benchmark:{number}"), transaction)
    for project in itertools.islice(projects(0), READS):
        started = time.monotonic()
        pointers.read(project)
        told.seconds.append(time.monotonic() - started)
    return told


@contextmanager
def backend(settings: Settings, url: str | None) -> Iterator[int]:
    """The port of a backend with four web server processes and no worker."""
    port, folder = free_port(), settings.model_dir
    environ = plain_environ(BIN) | {
        "MODEL_DIR": str(folder), "BENTOML_HOME": str(folder / "bentoml"), "WORKERS": str(PROCESSES),
        "CELESTIAL_DATABASE_URL": url or "", "LOG_LEVEL": "WARNING",
    }  # fmt: skip
    command = [sys.executable, "_wsgi.py", "--no-worker", "-p", str(port)]
    server = ServerProcess(command, cwd=REPOSITORY, environ=environ, log=folder / "backend.log")
    try:
        server.wait_for_answer(f"http://{HOST}:{port}/health", 60)
        yield port
    finally:
        server.stop()


@click.group()
def main() -> None:
    """How quick the list of jobs is."""


@main.command()
@click.option("--postgresql", metavar="URL", help="An empty database of a PostgreSQL; without it, a new SQLite file.")
@click.option("--seconds", type=click.FloatRange(min=0.1), default=20, show_default=True, help="Of each part.")
@click.option("--rate", type=click.FloatRange(min=1), default=50, show_default=True, help="Requests a second, paced.")
def latency(postgresql: str | None, seconds: float, rate: float) -> None:
    """Time requests for trainings and reads of live models; exit code 1 if one of them failed."""
    failed = False

    def say(what: str, told: Told) -> None:
        nonlocal failed
        failed = failed or bool(told.errors) or not told.seconds
        click.echo(f"{what:30}{told}")

    with ExitStack() as held:
        folder = held.enter_context(tempfile.TemporaryDirectory(prefix="celestial-jobs-"))
        settings = Settings.from_environ({"MODEL_DIR": folder, "CELESTIAL_DATABASE_URL": postgresql or ""})
        say("live model, one thread", read_live(settings))
        spawn = multiprocessing.get_context("spawn")
        pool = held.enter_context(ProcessPoolExecutor(PROCESSES + WORKERS, spawn))
        port = held.enter_context(backend(settings, postgresql))
        asked_of = (("enqueue", enqueue, settings), ("/webhook", webhook, port))
        for _, ask, whom in asked_of:  # from now on all processes are started, and have their connections
            measure(pool, settings, ask, whom, rate, WARM_UP_S)
        for name, ask, whom in asked_of:
            for pace, per_s in ((f"{rate:g} a second", rate), ("as fast as can be", math.inf)):
                asked, worked = measure(pool, settings, ask, whom, per_s, seconds)
                say(f"{name}, {pace}", asked)
                say("  begun and ended beside it", worked)
    sys.exit(failed)


@main.command()
@click.option("--postgresql", metavar="URL", help="An empty database of a PostgreSQL; without it, a new SQLite file.")
@click.option("--repeat", type=click.IntRange(min=1), default=200, show_default=True, help="Requests of each kind.")
def shown(postgresql: str | None, repeat: int) -> None:
    """Time what it adds to a request for predictions that some are held back, by share and by number of tasks."""
    region = {"from_name": "choice", "to_name": "image", "type": "choices", "value": {"choices": ["Mars"]}}
    with tempfile.TemporaryDirectory(prefix="celestial-shown-") as folder:
        settings = Settings.from_environ({"MODEL_DIR": folder, "CELESTIAL_DATABASE_URL": postgresql or ""})
        for share, count in itertools.product((0.0, 0.1, 1.0), (1, 250)):
            trial, told = Trial(replace(settings, control_share=share), Database(settings)), Told()
            sent = [json.dumps({"id": task, "data": {"image": "/data/upload/1/0.png"}}).encode() for task in
                    range(1, repeat + count)]  # fmt: skip
            said = [{"result": [region], "score": 0.9, "model_version": "one"} for _ in range(count)]
            trial.shown([], [], "7.1")
            for place in range(repeat):
                tasks = Tasks([Raw(task) for task in sent[place : place + count]])
                started = time.monotonic()
                trial.shown(tasks, said, f"{count}.{share:.1f}".replace(".", "") + ".1")
                told.seconds.append(time.monotonic() - started)
            click.echo(f"share {share:<4} of {count:>3} tasks: {told}")


if __name__ == "__main__":
    main()
