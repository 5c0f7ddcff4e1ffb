"""
What this process did, counted for Prometheus.

The web server processes of one server write into one folder, and whichever is asked
for /metrics tells the sum of all, those that have ended included. The library looks
for that folder in the environment (`SHARED`) when it is imported, so it is imported
at the first count, which comes after the fork. Without a folder a process tells its
own numbers.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.metrics_core import Metric

logger = logging.getLogger(__name__)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SHARED = "PROMETHEUS_MULTIPROC_DIR"
ROOM = 1 << 17  # bytes of a file of counts: twice what all routes, statuses and causes take
STAGES = FETCH, DECODE, PREPARE, MODEL = "fetch", "decode", "prepare", "model"
PREDICTED, FAILED = "predicted", "failed"
REQUEST_BUCKETS_S = (0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 3, 10, 30, 100)  # Label Studio's limits are 1, 3 and 100
STAGE_BUCKETS_S = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30)


class Metrics:
    """The counts of one process; one object in each, safe between threads. A count costs a few microseconds."""

    def __init__(self) -> None:
        self._building = threading.Lock()  # Python 3.12 and later have none in `cached_property`
        self._built: _Counters | None = None

    def request(self, route: str, status: int, seconds: float) -> None:
        """Count an answered request; `route` is one of few, whatever strangers ask for."""
        self._counters.requests.labels(route, str(status)).inc()
        self._counters.seconds.labels(route).observe(seconds)

    def tasks(self, predicted: int, failed: int) -> None:
        """Count the tasks of a batch that was answered."""
        self._counters.predicted.inc(predicted)
        self._counters.failed.inc(failed)

    def failure(self, of: str, cause: str, count: int = 1) -> None:
        """Count why a ``request``, a ``task`` or one ``picture`` of it failed: the error's class, not its words."""
        self._counters.failures.labels(of, cause).inc(count)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time what is done inside, failed or not, for one of `STAGES`."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.took(name, time.perf_counter() - started)

    def took(self, name: str, seconds: float) -> None:
        """Count what was timed elsewhere, for one of `STAGES`."""
        self._counters.stages[name].observe(seconds)

    def page(self, live: Mapping[str, str], jobs: Mapping[str, int] | None) -> bytes:
        """
        Everything, in Prometheus' text format.

        Args:
            live: Project, or ``default``, and the model version that is served to it.
            jobs: State and count of the jobs of all projects; None where they cannot be read.
        """
        from prometheus_client import CollectorRegistry, generate_latest

        now = CollectorRegistry()
        now.register(_Now(live, jobs))
        return generate_latest(self._counters.all()) + generate_latest(now)

    @cached_property
    def _counters(self) -> _Counters:
        with self._building:
            if self._built is None:
                self._built = _Counters()
            return self._built


class _Counters:
    """prometheus-client's objects, those with known labels looked up once."""

    def __init__(self) -> None:
        _take_room()
        from prometheus_client import CollectorRegistry, Counter, Histogram

        self._registry = own = CollectorRegistry()
        self.requests = Counter("celestial_requests", "Answered requests.", ["route", "status"], registry=own)
        self.seconds = Histogram("celestial_request_seconds", "Seconds from a request to its answer.", ["route"],
                                 buckets=REQUEST_BUCKETS_S, registry=own)  # fmt: skip
        tasks = Counter("celestial_tasks", "Tasks of answered batches.", ["outcome"], registry=own)
        self.predicted, self.failed = tasks.labels(PREDICTED), tasks.labels(FAILED)
        self.failures = Counter("celestial_failures", "Requests and tasks that failed, by the class of the error.",
                                ["of", "cause"], registry=own)  # fmt: skip
        stages = Histogram("celestial_stage_seconds", "Seconds that one picture takes to fetch, to decode and to "
                           "prepare, and one batch in the model.",
                           ["stage"], buckets=STAGE_BUCKETS_S, registry=own)  # fmt: skip
        self.stages = {name: stages.labels(name) for name in STAGES}

    def all(self) -> CollectorRegistry:
        """Where the numbers of all processes are, or of this one where none are shared."""
        from prometheus_client import CollectorRegistry, multiprocess, values

        if not values.ValueClass._multiprocess:
            return self._registry
        shared = CollectorRegistry()
        multiprocess.MultiProcessCollector(shared)  # type: ignore[no-untyped-call]
        return shared


def _take_room() -> None:
    """
    Take the disk space of this process's counts in the shared folder, or share none.

    The library maps its files into memory, where a page for which the disk has no space kills the process.
    """
    if SHARED not in os.environ:
        return
    kinds = ("counter", "histogram")
    files = [Path(os.environ[SHARED], f"{kind}_{os.getpid()}.db") for kind in kinds]  # as the library names them
    try:
        for path in files:
            with path.open("ab") as file:
                os.posix_fallocate(file.fileno(), 0, ROOM)
    except OSError as error:
        logger.warning("The temporary folder cannot hold the counts of all processes (%s); each tells its own.",
                       error.strerror)  # fmt: skip
        del os.environ[SHARED]
        for path in files:
            path.unlink(missing_ok=True)


class _Now:
    """What is true at this moment for all processes, read when it is asked for."""

    def __init__(self, live: Mapping[str, str], jobs: Mapping[str, int] | None) -> None:
        self._live = live
        self._jobs = jobs

    def collect(self) -> Iterable[Metric]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        model = GaugeMetricFamily("celestial_live_model", "The model version that is served, always 1.",
                                  labels=["project", "model_version"])  # fmt: skip
        for project, tag in self._live.items():
            model.add_metric([project, tag], 1)
        yield model
        if self._jobs is None:
            return
        queue = GaugeMetricFamily("celestial_jobs", "Trainings that have not ended.", labels=["state"])
        ended = CounterMetricFamily("celestial_trainings", "Trainings that have ended.", labels=["state"])
        for state, count in self._jobs.items():
            (queue if state in ("waiting", "running") else ended).add_metric([state], count)
        yield queue
        yield ended
