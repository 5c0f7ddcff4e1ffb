"""
Half an hour of everything at once: ``python -m benchmarks.soak --minutes 30``.

A real Label Studio and the backend, started as the README starts it. Single tasks and
batches of a hundred are predicted, with pictures from disk and over HTTP, projects are set
up, events of every kind come in, and one training runs. Every process of the backend is
looked at once a second, and so are the folders that it writes to. Growth is what lies
between the first tenth after the training and the last tenth.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import requests

from benchmarks.soak_load import CHOICES, CONFIG, Load
from benchmarks.soak_record import (
    Record,
    Sample,
    by_minute,
    deaths,
    growth,
    latencies,
    leftovers,
    say,
    tell,
    training,
)
from celestial_backend.database import Database
from celestial_backend.jobs.ledger import Ledger
from celestial_backend.planets.renderer import BODIES, render
from celestial_backend.settings import Settings
from tests.support.backend_server import BackendServer
from tests.support.label_studio import LabelStudioServer
from tests.support.new_bodies import render_new

KINDS = {"celestial_backend.worker.training": "trainer", "celestial_backend.worker": "worker"}  # by the module
LABELLED = 12  # pictures of each of the classes that are learned from


def look(server: psutil.Process) -> Iterator[tuple[str, Sample]]:
    """Every process of the backend: what it is, with its number, and what it holds."""
    kinds: dict[int, str] = {}
    for process in [server, *server.children(recursive=True)]:  # parents come before their children
        with suppress(psutil.Error), process.oneshot():
            words = " ".join(process.cmdline())
            if words.startswith("sh -c"):
                continue
            kind = next((kind for module, kind in KINDS.items() if module in words), None)
            kinds[process.pid] = kind or kinds.get(process.ppid(), "web")
            memory = process.memory_full_info()
            yield f"{kinds[process.pid]} {process.pid}", {
                "rss_mb": memory.rss / 1e6, "pss_mb": memory.pss / 1e6,
                "threads": process.num_threads(), "files": process.num_fds(),
            }  # fmt: skip


def files_in(folder: Path) -> int:
    """How many files and folders lie in a folder, at any depth."""
    return sum(len(folders) + len(files) for _, folders, files in os.walk(folder))


def prepare(studio: LabelStudioServer) -> tuple[int, list[str]]:
    """A project with labels to learn from, and picture addresses to predict, on disk and over HTTP."""
    folder = studio.local_files_root / "soak"
    folder.mkdir()
    labels = []
    for number, choice in itertools.product(range(LABELLED), CHOICES):
        name = f"{choice}-{number}.png"
        picture = render(choice, (77, number)) if choice in BODIES else render_new(choice, (77, number))
        picture.save(folder / name)
        labels.append((f"/data/local-files/?d=soak/{name}", choice))
    project = studio.create_project("Soak", CONFIG)
    studio.import_labelled(project, labels)
    few = sorted(folder.iterdir())[:10]
    uploaded = studio.upload(studio.create_project("Uploads"), few)
    return project, [value for value, _ in labels] + list(uploaded.values())


def soak(minutes: float, folder: Path, workers: int, postgresql: str | None) -> dict[str, Any]:
    """Run it all, Label Studio and the backend on one PostgreSQL if it is named; the figures, and what was wrong."""
    with ExitStack() as running:
        say("Starting a Label Studio and the backend")
        studio = LabelStudioServer(folder, postgresql)
        running.callback(studio.stop)
        project, pictures = prepare(studio)
        place = folder / "backend"
        folders = {"state": place / "state", "bentoml": place / "bentoml", "tmp": place / "tmp"}
        folders["tmp"].mkdir(parents=True)
        backend = BackendServer(
            place, LABEL_STUDIO_URL=studio.url, LABEL_STUDIO_API_KEY=studio.legacy_token, TMPDIR=folders["tmp"],
            LOCAL_FILES_DOCUMENT_ROOT=studio.local_files_root, WORKERS=str(workers),
            CELESTIAL_DATABASE_URL=postgresql or "",
        )  # fmt: skip
        running.callback(backend.stop)
        before = backend.model_version
        record, server = Record(), psutil.Process(backend.process.pid)
        load = Load(backend.url, record, project, pictures)
        started, moment = time.monotonic(), time.time()
        running.callback(load.stop)
        load.start()
        load.train()
        watch(record, server, folders, started, minutes)
        end = time.monotonic() - started
        load.stop()
        told = {"MODEL_DIR": str(folders["state"]), "CELESTIAL_DATABASE_URL": postgresql or ""}
        jobs = Ledger(Database(Settings.from_environ(told), look_only=True)).jobs(str(project))
        job = next(iter(jobs), None)
        trained = training(record, job, served=version_of(backend, project) not in (before, None))
        log = backend.log_text()
    for word in ("Traceback", " ERROR celestial_backend"):
        if word in log:
            record.problem(f"The backend's log holds {word.strip()}: {log[log.index(word) :][:300]}")
    deaths(record, record.folders[-1]["at"])
    after = job.ended_at - moment if job and job.ended_at else 0.0
    steady = max(after + 15, end / 4)
    if not after or steady > 0.7 * end:
        record.problem("The training did not end early enough to tell growth. Run it for more minutes.")
    return {
        "minutes": round(end / 60, 1),
        "tasks": record.tasks,
        "trained_after_s": round(after, 1),
        "training": trained,
        "answers": {kind: dict(counts) for kind, counts in record.answers.items()},
        "milliseconds": latencies(record, started, steady, end),
        "processes": growth(record, steady, end),
        "rss_mb_by_minute": {name: by_minute(samples, "rss_mb") for name, samples in record.processes.items()},
        "folders": leftovers(record, steady, end),
        "problems": record.problems,
    }


def watch(
    record: Record, server: psutil.Process, folders: Mapping[str, Path], started: float, minutes: float
) -> None:
    """Look at processes and folders once a second, for so long."""
    told = 0.0
    while (now := time.monotonic() - started) < minutes * 60:
        for name, sample in look(server):
            record.processes[name].append({"at": now, "tasks": record.tasks, **sample})
        record.folders.append({"at": now, **{name: files_in(folder) for name, folder in folders.items()}})
        if now >= told + 60:
            told = now
            total = sum(sum(counts.values()) for counts in record.answers.values())
            say(f"{now:5.0f} s: {total} answers, {len(record.problems)} problems")
        time.sleep(max(0.0, 1 - (time.monotonic() - started - now)))


def version_of(backend: BackendServer, project: int) -> str | None:
    """The version that a project is served now."""
    with suppress(requests.RequestException, KeyError, ValueError):
        return str(backend.post("/setup", {"project": str(project), "schema": CONFIG}, 30).json()["model_version"])
    return None


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 if nothing was wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description="Mixed load for a long time.")
    parser.add_argument("--minutes", type=float, default=30, help="how long (default: 30)")
    parser.add_argument("--workers", type=int, default=1, help="web server processes (default: 1)")
    parser.add_argument("--postgresql", metavar="URL", help="an empty database for Label Studio and the backend")
    parser.add_argument("--json", type=Path, help="a file for the figures")
    parser.add_argument("--folder", type=Path, help="an empty folder for logs and state (default: one that goes away)")
    options = parser.parse_args(argv)
    with ExitStack() as held:
        folder = options.folder or Path(held.enter_context(tempfile.TemporaryDirectory(prefix="celestial-soak-")))
        folder.mkdir(parents=True, exist_ok=True)
        found = soak(options.minutes, folder, options.workers, options.postgresql)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2))
    tell(found)
    return 1 if found["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
