"""What a soak has seen, and what it says of it: answers, milliseconds, growth, and the verdict."""

from __future__ import annotations

import statistics
import sys
import threading
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.load import percentile
from benchmarks.memory import slope
from celestial_backend.jobs.ledger import FAILED, MERGED, PUBLISHED, Job

# By factor and by amount. Not PSS, which jumps when a training ends that shared TensorFlow's pages.
GROWTH = {"rss_mb": (1.05, 8.0), "threads": (1.0, 2.0), "files": (1.0, 3.0)}
FILES_MORE = 5  # on the disk, of each folder: such as come and go
Sample = dict[str, float]


@dataclass
class Record:
    """What was answered and seen; threads add to it."""

    answers: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    seconds: dict[str, list[tuple[float, float]]] = field(default_factory=lambda: defaultdict(list))
    processes: dict[str, list[Sample]] = field(default_factory=lambda: defaultdict(list))
    folders: list[Sample] = field(default_factory=list)  # how many files lie in each
    tasks: int = 0  # that got a prediction
    problems: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def answer(self, kind: str, at: float, seconds: float, outcome: str) -> None:
        """Count an answer, or what came in its place."""
        with self.lock:
            self.answers[kind][outcome] += 1
            self.seconds[kind].append((at, seconds))

    def predicted(self, tasks: int) -> None:
        """Count tasks that got a prediction."""
        with self.lock:
            self.tasks += tasks

    def problem(self, sentence: str) -> None:
        """Remember what was wrong; the first fifty."""
        with self.lock:
            if len(self.problems) < 50:
                self.problems.append(sentence)


def training(record: Record, job: Job | None, *, served: bool) -> dict[str, str]:
    """How the training ended. That the old model was kept is told; all else than a model that is served is wrong."""
    if job is None:
        record.problem("The training that was asked for is not in the list of jobs.")
        return {"state": "unknown", "reason": ""}
    if not job.ended:
        record.problem(f"The training did not end: it is {job.state}.")
    elif job.state in (FAILED, MERGED):
        record.problem(f"The training ended as {job.state}: {job.reason}")
    elif job.state == PUBLISHED and not served:
        record.problem("The training was published, and the project is served the old model.")
    return {"state": job.state, "reason": job.reason}


def deaths(record: Record, looked: float) -> None:
    """Tell of processes that the last look did not find; one seen once was about to become another program."""
    for name, samples in record.processes.items():
        if len(samples) > 1 and samples[-1]["at"] < looked and not name.startswith("trainer"):
            record.problem(f"The process {name} ended after {samples[-1]['at']:.0f} s.")


def growth(record: Record, steady: float, end: float) -> dict[str, Any]:
    """The first tenth of the steady time beside the last, for each process that lives through it."""
    found: dict[str, Any] = {}
    for name, samples in record.processes.items():
        first, last = _tenths(samples, steady, end)
        if not first or not last or name.startswith("trainer"):
            continue
        found[name] = {key: _medians(key, first, last) for key in ("rss_mb", "pss_mb", "threads", "files")}
        found[name]["peak_pss_mb"] = round(max(sample["pss_mb"] for sample in samples), 1)
        half = [sample for sample in samples if sample["at"] >= max(steady, end / 2)]
        found[name]["rss_mb_per_1000_tasks"] = _rise(half)
        for key, (factor, amount) in GROWTH.items():
            before, after = found[name][key]
            if after > before * factor and after > before + amount:
                record.problem(f"{name}: {key} grew from {before:g} to {after:g}.")
    return found


def leftovers(record: Record, steady: float, end: float) -> dict[str, list[float]]:
    """The files of each folder in the first tenth of the steady time, and in the last."""
    first, last = _tenths(record.folders, steady, end)
    if not first or not last:
        return {}
    found = {name: _medians(name, first, last) for name in first[0] if name != "at"}
    for name, (before, after) in found.items():
        if after > before + FILES_MORE:
            record.problem(f"The files in the folder {name} grew from {before:g} to {after:g}.")
    return found


def by_minute(samples: Sequence[Sample], key: str) -> list[list[float]]:
    """Minutes from the start, and the middle of what was seen in each."""
    minutes: dict[int, list[float]] = defaultdict(list)
    for sample in samples:
        minutes[int(sample["at"] // 60)].append(sample[key])
    return [[minute, round(statistics.median(values), 1)] for minute, values in minutes.items()]


def latencies(record: Record, started: float, steady: float, end: float) -> dict[str, Any]:
    """Milliseconds by kind of request, all in all and in the first and last tenth of the steady time."""
    tenth = (end - steady) / 10
    found: dict[str, Any] = {}
    for kind, pairs in record.seconds.items():
        values = [seconds * 1000 for _, seconds in pairs]
        parts = [
            [seconds * 1000 for at, seconds in pairs if low <= at - started <= low + tenth]
            for low in (steady, end - tenth)
        ]
        found[kind] = {f"p{share}": round(percentile(values, share / 100), 1) for share in (50, 95, 99)}
        found[kind]["max"] = round(max(values), 1)
        found[kind]["first_and_last_p50"] = [round(statistics.median(part), 1) if part else None for part in parts]
    return found


def tell(found: dict[str, Any]) -> None:
    """The figures for people, and the verdict."""
    say(f"\n{found['minutes']} minutes, {found['tasks']} tasks predicted; after {found['trained_after_s']} s the "
        f"training was {found['training']['state']}: {found['training']['reason']}\n")
    say(f"{'request':14}{'answers':28}{'p50':>8}{'p95':>8}{'p99':>8}{'max':>9}   first and last p50, ms")
    for kind, counts in found["answers"].items():
        ms = found["milliseconds"][kind]
        told = ", ".join(f"{count} x {outcome}" for outcome, count in counts.items())
        say(f"{kind:14}{told:28}{ms['p50']:8}{ms['p95']:8}{ms['p99']:8}{ms['max']:9}   {ms['first_and_last_p50']}")
    say(f"\n{'process':18}{'PSS MB':>18}{'RSS MB':>18}{'threads':>14}{'files':>14}   first and last")
    for name, one in found["processes"].items():
        parts = [" -> ".join(f"{value:g}" for value in one[key]) for key in ("pss_mb", "rss_mb", "threads", "files")]
        say(f"{name:18}{parts[0]:>18}{parts[1]:>18}{parts[2]:>14}{parts[3]:>14}   peak {one['peak_pss_mb']:g} MB")
    say("\nRSS in the last half, MB for 1,000 predicted tasks")
    for name, one in found["processes"].items():
        say(f"{name:18}{one['rss_mb_per_1000_tasks']:+.3f}")
    say("\nFiles and folders on the disk, first and last")
    for name, (before, after) in found["folders"].items():
        say(f"{name:18}{before:g} -> {after:g}")
    say("")
    for problem in found["problems"]:
        say(f"- {problem}")
    say("Verdict: " + ("something is wrong." if found["problems"] else "no error, no growth, no leak."))


def _tenths(samples: Sequence[Sample], steady: float, end: float) -> tuple[list[Sample], list[Sample]]:
    tenth = (end - steady) / 10
    first, last = (
        [sample for sample in samples if low <= sample["at"] <= low + tenth] for low in (steady, end - tenth)
    )
    return first, last


def _medians(key: str, first: Sequence[Sample], last: Sequence[Sample]) -> list[float]:
    return [round(statistics.median(sample[key] for sample in part), 1) for part in (first, last)]


def _rise(samples: Sequence[Sample]) -> float:
    """Megabytes of RSS for 1,000 tasks, by least squares; 0 where no task was predicted meanwhile."""
    tasks = [sample["tasks"] for sample in samples]
    if len(set(tasks)) < 2:
        return 0.0
    return round(slope(tasks, [sample["rss_mb"] for sample in samples]) * 1000, 3) + 0.0  # no -0.0


def say(sentence: str) -> None:
    """A line for whoever watches."""
    sys.stdout.write(f"{sentence}\n")
    sys.stdout.flush()


