"""What a web server process of ours holds in memory, and whether it grows. Reads Linux's ``/proc``."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.bench import Bench
from benchmarks.servers import Backend, ours

FOREVER_S = 3600


def memory(bench: Bench) -> dict[str, Any]:
    """Resident megabytes after the first prediction, and after so many tasks in requests of the same size."""
    addresses, after = bench.album.addresses(bench.sizes.tasks), {}
    with ours(bench) as backend:
        idle = _resident(backend.ready())
        for done in range(bench.sizes.tasks, bench.sizes.steady_tasks + 1, bench.sizes.tasks):
            backend.predict(addresses)
            after[str(done)] = _resident(backend)["mb"]
            bench.say(f"{done} tasks: {after[str(done)]} MB")
        return {"idle_mb": idle["mb"], "idle_pss_mb": idle["pss_mb"], "after_mb": after,
                "peak_mb": _resident(backend)["peak_mb"]}  # fmt: skip


def growth(bench: Bench) -> dict[str, Any]:
    """Seconds and the peak of the memory of one request with ever more tasks, whose pictures are small."""
    steps = []
    with ours(bench, CELESTIAL_PREDICT_MAX_S=FOREVER_S) as backend:
        backend.ready().predict(bench.album.addresses(64, "2"))
        before = _resident(backend)["mb"]
        for count in bench.sizes.growth:
            _forget_peak(backend)
            seconds = backend.predict(bench.album.addresses(count, "2"), FOREVER_S)
            held = _resident(backend)
            steps.append({"tasks": count, "seconds": round(seconds, 3), "mb": held["mb"], "peak_mb": held["peak_mb"]})
            bench.say(f"{count} tasks: {seconds:.2f} s, {held['mb']} MB, at its peak {held['peak_mb']} MB")
    counts = [step["tasks"] for step in steps]
    return {
        "before_mb": before,
        "steps": steps,
        "exponent": round(slope(list(map(math.log, counts)), [math.log(step["seconds"]) for step in steps]), 3),
        "peak_mb_per_1000": round(slope(counts, [step["peak_mb"] for step in steps]) * 1000, 3),
    }


def slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """How much y grows for each x, by least squares."""
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    above = sum((one - x) * (other - y) for one, other in zip(xs, ys, strict=True))
    return above / sum((one - x) ** 2 for one in xs)


def _resident(backend: Backend) -> dict[str, float]:
    """
    Of the process that serves.

    Returns:
        Megabytes now (``mb``), its share of them when those in use by others too are split (``pss_mb``), and the
        most that it had since its start or the last `_forget_peak` (``peak_mb``).
    """
    status, place = _serving(backend)
    pss_kb = _kb((place / "smaps_rollup").read_text(), "Pss")
    kilobytes = {"mb": _kb(status, "VmRSS"), "pss_mb": pss_kb, "peak_mb": _kb(status, "VmHWM")}
    return {name: round(kb * 1024 / 1e6, 1) for name, kb in kilobytes.items()}


def _forget_peak(backend: Backend) -> None:
    """Let the peak begin anew at what is held now, because that of loading the model may be higher than any after."""
    (_serving(backend)[1] / "clear_refs").write_text("5")


def _serving(backend: Backend) -> tuple[str, Path]:
    """Status and place of the largest process of the group, because the others have no model."""
    return max(_group(backend.group), key=lambda each: _kb(each[0], "VmRSS"))


def _group(group: int) -> Iterator[tuple[str, Path]]:
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # a process that has just ended
            if int((place / "stat").read_text().rpartition(")")[2].split()[2]) == group:
                yield (place / "status").read_text(), place


def _kb(text: str, name: str) -> int:
    return next((int(line.split()[1]) for line in text.splitlines() if line.startswith(f"{name}:")), 0)
