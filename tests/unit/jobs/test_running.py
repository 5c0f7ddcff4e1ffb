"""How a worker runs a training: the process that it starts, how often, how long, and who may write of it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest

from celestial_backend.jobs.ledger import FAILED, KEPT, RUNNING, WAITING, Ending, Job, Ledger
from celestial_backend.jobs.trainings import Jobs
from celestial_backend.services import build
from celestial_backend.settings import Settings
from tests.support import fake_project
from tests.support.fake_project import change

live_on = Jobs._live  # which `settings` takes away
by_itself, ledger, live = fake_project.by_itself, fake_project.ledger, fake_project.live
settings, studio = fake_project.settings, fake_project.studio


class StandIn:
    """The process of a training, which ends as a test wants."""

    code: int | None = None  # until it is killed
    made: list[StandIn]

    def __init__(self, command: list[str], **_: Any) -> None:
        self.command, self.returncode, self._ended = command, self.code, threading.Event()
        if self.code is not None:
            self._ended.set()
        self.made.append(self)

    def wait(self, timeout: float | None = None) -> None:
        if not self._ended.wait(timeout):
            raise subprocess.TimeoutExpired(self.command, timeout or 0)

    def kill(self) -> None:
        self.returncode = -9
        self._ended.set()


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> type[StandIn]:
    StandIn.made, StandIn.code = [], None
    monkeypatch.setattr("celestial_backend.jobs.trainings.subprocess.Popen", StandIn)
    return StandIn


@contextlib.contextmanager
def running(jobs: Jobs) -> Iterator[Job]:
    """A job that a worker runs in a thread, which has ended afterwards."""
    jobs.request("7")
    with ThreadPoolExecutor(1) as thread:
        run = thread.submit(jobs.run)
        try:
            wait_for(lambda: jobs._running)
            yield jobs.ledger.jobs("7")[0]
            assert run.result(30)
        finally:
            for process in StandIn.made:
                process.kill()


def wait_for(what: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 30
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.usefixtures("studio")
def test_a_training_that_dies_is_begun_three_times(by_itself: Jobs, ledger: Ledger, process: type[StandIn]) -> None:
    """Each time under a token of its own; then it fails with what it died of. What it began with is remembered."""
    process.code = -9
    by_itself.request("7")
    for attempt, state in enumerate([WAITING, WAITING, FAILED], 1):
        assert by_itself.run()
        (job,) = ledger.jobs("7")
        assert (job.state, job.attempts) == (state, attempt)
    assert job.reason == (
        "Its process was ended by signal 9, as a machine that is out of memory does. It was begun 3 times. The worker's"
        " log tells more."
    )
    *start, ids, tokens, parents = zip(*(each.command for each in process.made), strict=True)
    assert [words[0] for words in start][1:] == ["-m", "celestial_backend.worker.training"]
    assert (set(ids), len(set(tokens)), set(parents)) == ({job.id}, 3, {str(os.getpid())})
    known = ledger.known("7")
    assert known is not None
    assert known.trained_labels == 6
    assert not by_itself.run()


@pytest.mark.usefixtures("studio")
def test_a_training_that_takes_too_long_fails_at_once(
    settings: Settings, ledger: Ledger, process: type[StandIn]
) -> None:
    """It would again."""
    jobs = build(replace(settings, train_max_s=0.05)).jobs
    jobs.request("7")
    jobs.run()
    (job,) = ledger.jobs("7")
    assert (job.state, process.made[0].returncode) == (FAILED, -9)
    assert job.reason == "It took longer than the 0.05 seconds of CELESTIAL_TRAIN_MAX_S. The worker's log tells more."


@pytest.mark.usefixtures("studio")
def test_a_training_that_has_ended_by_itself_stays_as_it_is(
    by_itself: Jobs, ledger: Ledger, process: type[StandIn]
) -> None:
    """Its process writes down how it ended, and its worker changes nothing of that."""
    with running(by_itself) as job:
        ledger.end(job, Ending(KEPT, "worse"))
        process.made[0].kill()
    assert [(job.state, job.reason) for job in ledger.jobs("7")] == [(KEPT, "worse")]


@pytest.mark.usefixtures("studio")
def test_a_worker_that_stops_gives_its_training_back(by_itself: Jobs, ledger: Ledger, process: type[StandIn]) -> None:
    """At once, as if it had not been begun; and begins no other."""
    with running(by_itself) as job:
        ledger.show_life(by_itself.name, [job])
        assert ledger.workers() == 1
        by_itself.stop()
    found = ledger.job(job.id)
    assert found is not None
    assert (found.state, found.attempts, ledger.workers()) == (WAITING, 0, 0)
    assert process.made[0].returncode == -9
    assert not by_itself.run()


@pytest.mark.usefixtures("studio")
def test_a_training_that_is_anothers_by_now_is_ended(
    by_itself: Jobs, ledger: Ledger, settings: Settings, process: type[StandIn], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its worker was taken for dead; the next sign of life tells him so, and nothing of the job changes."""
    monkeypatch.setattr(Jobs, "_live", live_on)
    monkeypatch.setattr("celestial_backend.jobs.trainings.SIGN_S", 0.01)
    others = threading.enumerate()
    with running(by_itself) as job:
        wait_for(ledger.workers)
        change(settings, "UPDATE work SET token = 'another', worker = 'two'")
    found = ledger.job(job.id)
    assert found is not None
    assert (found.state, found.worker, found.attempts) == (RUNNING, "two", 1)
    assert process.made[0].returncode == -9
    by_itself.stop()
    for thread in threading.enumerate():
        if thread.name == "life" and thread not in others:
            thread.join(30)


@pytest.mark.usefixtures("studio")
def test_a_machine_that_allows_no_more_threads_costs_no_later_wakening(
    by_itself: Jobs, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is accepted then is written down; and what failed goes on as soon as there are threads again."""
    monkeypatch.setattr(Jobs, "_live", live_on)

    def none_left(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", none_left)
        assert by_itself.request("7")["state"] == WAITING
        with pytest.raises(RuntimeError, match="new thread"):
            by_itself.begin()
        by_itself.look_after()
    looked_at: list[bool] = []
    monkeypatch.setattr(Jobs, "_look_round", lambda _, wanted: looked_at.append(wanted))
    by_itself.look_after()
    wait_for(by_itself.huey.pending_count)
    wait_for(lambda: looked_at)
    by_itself.begin()
    wait_for(ledger.workers)
    by_itself.stop()
