"""What a soak has seen, and what it says of it: answers, milliseconds, growth, and the verdict."""

from __future__ import annotations

import statistics
import sys
import threading
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

# By factor and by amount. Not PSS, which jumps when a training ends that shared TensorFlow's pages.
GROWTH = {"rss_mb": (1.05, 8.0), "threads": (1.0, 2.0), "files": (1.0, 3.0)}
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


def say(sentence: str) -> None:
    """A line for whoever watches."""
    sys.stdout.write(f"{sentence}\n")
    sys.stdout.flush()


