"""
Half an hour of everything at once: ``python -m benchmarks.soak --minutes 30``.

A real Label Studio and the backend, started as the README starts it. Single tasks and
batches of a hundred are predicted, with pictures from disk and over HTTP, projects are set
up, events of every kind come in, and one training runs and is published. Every process of
the backend is looked at once a second. Growth is what lies between the first tenth after
the training and the last tenth.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import requests

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from backend_server import BODIES, BackendServer, label_config  # type: ignore[import-not-found]
from label_studio import LabelStudioServer  # type: ignore[import-not-found]
from new_bodies import render_new  # type: ignore[import-not-found]

from celestial_backend.renderer import render

CHOICES = [*BODIES, "Comet"]
CONFIG = label_config(CHOICES)
LABELLED = 12  # pictures of each of the classes that are learned from
LIMITS_S = {"health": 1.0, "setup": 3.0, "webhook": 1.0, "train": 100.0, "predict 1": 100.0, "predict 100": 100.0}
# By factor and by amount. Not PSS, which jumps when a training ends that shared TensorFlow's pages.
GROWTH = {"rss_mb": (1.05, 8.0), "threads": (1.0, 2.0), "files": (1.0, 3.0)}
EVENTS = (
    "ANNOTATION_CREATED", "ANNOTATION_UPDATED", "ANNOTATIONS_CREATED", "ANNOTATIONS_DELETED", "TASKS_CREATED",
    "TASKS_DELETED", "PROJECT_UPDATED",
)  # fmt: skip
Sample = dict[str, float]


@dataclass
class Record:
    """What was answered and seen; threads add to it."""

    answers: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    seconds: dict[str, list[tuple[float, float]]] = field(default_factory=lambda: defaultdict(list))
    processes: dict[str, list[Sample]] = field(default_factory=lambda: defaultdict(list))
    problems: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def answer(self, kind: str, at: float, seconds: float, outcome: str) -> None:
        """Count an answer, or what came in its place."""
        with self.lock:
            self.answers[kind][outcome] += 1
            self.seconds[kind].append((at, seconds))

    def problem(self, sentence: str) -> None:
        """Remember what was wrong; the first fifty."""
        with self.lock:
            if len(self.problems) < 50:
                self.problems.append(sentence)


class Load:
    """Clients that ask until they are told to stop."""

    def __init__(self, backend: BackendServer, record: Record, project: int, pictures: Sequence[str]) -> None:
        self.url, self.record, self.project, self.pictures = backend.url, record, project, pictures
        self.over = threading.Event()
        self.threads: list[threading.Thread] = []

    def start(self) -> None:
        """Begin to ask, in threads."""
        for number in range(4):
            self._repeat(0.05, lambda number=number: self._predict(1, number))  # type: ignore[misc]
        self._repeat(1.0, lambda: self._predict(100, 9))
        self._repeat(0.5, lambda: self._ask("health", "GET", "/health"))
        self._repeat(0.5, lambda: self._ask("setup", "POST", "/setup", {"project": self.name(), "schema": CONFIG}))
        events = itertools.cycle(EVENTS)
        self._repeat(0.3, lambda: self._ask("webhook", "POST", "/webhook", event(next(events), self.project)))

    def stop(self) -> None:
        """Ask no more, and wait for the last answers."""
        self.over.set()
        for thread in self.threads:
            thread.join(120)

    def name(self) -> str:
        """The project as Label Studio names it."""
        return f"{self.project}.1"

    def train(self) -> None:
        """Ask for a training."""
        body = {"action": "START_TRAINING", "project": {"id": self.project, "label_config": CONFIG}}
        self._ask("train", "POST", "/webhook", body)

    def _predict(self, count: int, seed: int) -> None:
        values = random.Random(f"{seed} {time.monotonic()}").choices(self.pictures, k=count)  # noqa: S311 - a choice of pictures
        tasks = [{"id": number, "data": {"image": value}} for number, value in enumerate(values, 1)]
        body = {"tasks": tasks, "label_config": CONFIG, "project": self.name(), "params": {"context": None}}
        answer = self._ask(f"predict {count}", "POST", "/predict", body)
        if answer is None:
            return
        results = answer.get("results", [])
        empty = sum(not result for result in results)
        if len(results) != count or empty:
            self.record.problem(f"Of {count} tasks {len(results)} were answered, {empty} of them with nothing.")
        elif len({result["model_version"] for result in results}) != 1:
            self.record.problem("One batch was answered by several models.")

    def _ask(self, kind: str, method: str, path: str, body: Any = None) -> dict[str, Any] | None:
        at = time.monotonic()
        answer: dict[str, Any] | None = None
        try:
            got = requests.request(method, self.url + path, json=body, timeout=LIMITS_S[kind])
            outcome = str(got.status_code)
            if got.status_code < 300:
                answer = got.json()
            else:
                self.record.problem(f"{kind}: {got.status_code} {got.reason[:200]}")
        except (requests.RequestException, ValueError) as error:
            outcome = type(error).__name__
            self.record.problem(f"{kind}: {outcome}: {str(error)[:200]}")
        self.record.answer(kind, at, time.monotonic() - at, outcome)
        return answer

    def _repeat(self, pause_s: float, work: Callable[[], object]) -> None:
        def run() -> None:
            while not self.over.wait(pause_s):
                work()

        self.threads.append(threading.Thread(target=run, daemon=True))
        self.threads[-1].start()


def event(action: str, project: int) -> dict[str, Any]:
    """An event of a webhook as Label Studio sends it, as far as it is read."""
    one = {"id": 1, "result": [], "was_cancelled": False}
    return {"action": action, "project": {"id": project}, "annotation": [one, one] if "S_CREATED" in action else one}


def look(server: psutil.Process, started: float) -> Iterator[tuple[str, Sample]]:
    """Every process of the backend: what it is, with its number, and what it holds."""
    for process in [server, *server.children(recursive=True)]:
        with suppress(psutil.Error), process.oneshot():
            words = " ".join(process.cmdline())
            if words.startswith("sh -c"):
                continue
            kinds = {"celestial_backend.trainer": "trainer", "celestial_backend.worker": "worker"}
            kind = next((kind for word, kind in kinds.items() if word in words), "web")
            memory = process.memory_full_info()
            yield f"{kind} {process.pid}", {
                "at": time.monotonic() - started, "rss_mb": memory.rss / 1e6, "pss_mb": memory.pss / 1e6,
                "threads": process.num_threads(), "files": process.num_fds(),
            }  # fmt: skip


def growth(record: Record, steady: float, end: float) -> dict[str, Any]:
    """The first tenth of the steady time beside the last, for each process that is to live through it."""
    tenth = (end - steady) / 10
    found: dict[str, Any] = {}
    for name, samples in record.processes.items():
        first = [sample for sample in samples if steady <= sample["at"] <= steady + tenth]
        last = [sample for sample in samples if end - tenth <= sample["at"] <= end]
        if not first or name.startswith("trainer"):
            continue
        if not last:
            record.problem(f"The process {name} ended.")
            continue
        found[name] = {
            key: [round(statistics.median(sample[key] for sample in part), 1) for part in (first, last)]
            for key in ("rss_mb", "pss_mb", "threads", "files")
        }
        found[name]["peak_pss_mb"] = round(max(sample["pss_mb"] for sample in samples), 1)
        for key, (factor, amount) in GROWTH.items():
            before, after = found[name][key]
            if after > before * factor and after > before + amount:
                record.problem(f"{name}: {key} grew from {before:g} to {after:g}.")
    return found


def latencies(record: Record, started: float, steady: float, end: float) -> dict[str, Any]:
    """Milliseconds by kind of request, all in all and in the first and last tenth of the steady time."""
    tenth = (end - steady) / 10
    found: dict[str, Any] = {}
    for kind, pairs in record.seconds.items():
        values = sorted(seconds * 1000 for _, seconds in pairs)
        parts = [
            [seconds * 1000 for at, seconds in pairs if low <= at - started <= low + tenth]
            for low in (steady, end - tenth)
        ]
        found[kind] = {f"p{share}": round(values[int(len(values) * share / 100)], 1) for share in (50, 95, 99)}
        found[kind]["max"] = round(values[-1], 1)
        found[kind]["first_and_last_p50"] = [round(statistics.median(part), 1) if part else None for part in parts]
    return found


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


def say(sentence: str) -> None:
    """A line for whoever watches."""
    sys.stdout.write(f"{sentence}\n")
    sys.stdout.flush()


def soak(minutes: float, folder: Path, workers: int) -> dict[str, Any]:
    """Run it all; the figures, and what was wrong."""
    with ExitStack() as running:
        say("Starting a Label Studio and the backend")
        studio = LabelStudioServer(folder)
        running.callback(studio.stop)
        project, pictures = prepare(studio)
        (folder / "backend").mkdir()
        backend = BackendServer(
            folder / "backend", LABEL_STUDIO_URL=studio.url, LABEL_STUDIO_API_KEY=studio.legacy_token,
            LOCAL_FILES_DOCUMENT_ROOT=studio.local_files_root, WORKERS=str(workers),
        )  # fmt: skip
        running.callback(backend.stop)
        before = backend.model_version
        record, server = Record(), psutil.Process(backend.process.pid)
        load = Load(backend, record, project, pictures)
        started = time.monotonic()
        running.callback(load.stop)
        load.start()
        load.train()
        trained, told, began = 0.0, 0.0, False
        while (now := time.monotonic() - started) < minutes * 60:
            seen = dict(look(server, started))
            for name, sample in seen.items():
                record.processes[name].append(sample)
            trains = any(name.startswith("trainer") for name in seen)
            if began and not trains and not trained:
                trained = now
                say(f"{now:5.0f} s: the training has ended")
            began = began or trains
            if now >= told + 60:
                told = now
                total = sum(sum(counts.values()) for counts in record.answers.values())
                say(f"{now:5.0f} s: {total} answers, {len(record.problems)} problems")
            time.sleep(max(0.0, 1 - (time.monotonic() - started - now)))
        end = time.monotonic() - started
        load.stop()
        published = version_of(backend, project) not in (before, None)
        log = backend.log_text()
    for word in ("Traceback", " ERROR celestial_backend"):
        if word in log:
            record.problem(f"The backend's log holds {word.strip()}: {log[log.index(word) :][:300]}")
    steady = max(trained + 15, end / 4)
    if not trained or steady > 0.7 * end:
        record.problem("The training did not end early enough to tell growth. Run it for more minutes.")
    return {
        "minutes": round(end / 60, 1),
        "trained_after_s": round(trained, 1),
        "published": published,
        "answers": {kind: dict(counts) for kind, counts in record.answers.items()},
        "milliseconds": latencies(record, started, steady, end),
        "processes": growth(record, steady, end),
        "problems": record.problems,
    }


def version_of(backend: BackendServer, project: int) -> str | None:
    """The version that a project is served now."""
    with suppress(requests.RequestException, KeyError, ValueError):
        return str(backend.post("/setup", {"project": f"{project}.1", "schema": CONFIG}, 30).json()["model_version"])
    return None


def tell(found: dict[str, Any]) -> None:
    """The figures for people, and the verdict."""
    say(f"\n{found['minutes']} minutes; the training ended after {found['trained_after_s']} s, "
        f"{'and was published' if found['published'] else 'and nothing was published'}\n")
    say(f"{'request':14}{'answers':28}{'p50':>8}{'p95':>8}{'p99':>8}{'max':>9}   first and last p50, ms")
    for kind, counts in found["answers"].items():
        ms = found["milliseconds"][kind]
        told = ", ".join(f"{count} x {outcome}" for outcome, count in counts.items())
        say(f"{kind:14}{told:28}{ms['p50']:8}{ms['p95']:8}{ms['p99']:8}{ms['max']:9}   {ms['first_and_last_p50']}")
    say(f"\n{'process':18}{'PSS MB':>18}{'RSS MB':>18}{'threads':>14}{'files':>14}   first and last")
    for name, one in found["processes"].items():
        parts = [" -> ".join(f"{value:g}" for value in one[key]) for key in ("pss_mb", "rss_mb", "threads", "files")]
        say(f"{name:18}{parts[0]:>18}{parts[1]:>18}{parts[2]:>14}{parts[3]:>14}   peak {one['peak_pss_mb']:g} MB")
    say("")
    for problem in found["problems"]:
        say(f"- {problem}")
    say("Verdict: " + ("something is wrong." if found["problems"] else "no error, no growth, no leak."))


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 if nothing was wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description="Mixed load for a long time.")
    parser.add_argument("--minutes", type=float, default=30, help="how long (default: 30)")
    parser.add_argument("--workers", type=int, default=1, help="web server processes (default: 1)")
    parser.add_argument("--json", type=Path, help="a file for the figures")
    parser.add_argument("--folder", type=Path, help="an empty folder for logs and state (default: one that goes away)")
    options = parser.parse_args(argv)
    with ExitStack() as held:
        folder = options.folder or Path(held.enter_context(tempfile.TemporaryDirectory(prefix="celestial-soak-")))
        folder.mkdir(parents=True, exist_ok=True)
        found = soak(options.minutes, folder, options.workers)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2))
    tell(found)
    return 1 if found["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
