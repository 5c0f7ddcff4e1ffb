"""Pages of tasks that workers predict, and what becomes of them when a worker, a database or a command is lost."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image

from celestial_backend.database import Database
from celestial_backend.errors import StateError
from celestial_backend.jobs import pages
from celestial_backend.jobs.pages import Distribution, Pages
from celestial_backend.jobs.queue import make_queue
from celestial_backend.settings import Settings
from tests.support.backend_server import REPOSITORY, label_config
from tests.support.postgres_server import PostgresServer
from tests.support.trainings import Place

ABOUT = {"project": "3", "version": "m:1", "config": "<View/>"}


def pages_of(count: int, size: int = 4) -> Iterator[list[dict[str, Any]]]:
    for number in range(count):
        yield [{"id": size * number + each, "data": {}} for each in range(size)]


def all_tasks(count: int, size: int = 4) -> list[int]:
    return list(range(count * size))


def pages_in(settings: Settings) -> Pages:
    return Pages(make_queue(settings), Database(settings))


class Run:
    """A distribution in one database; what was predicted here is answered ``here``."""

    def __init__(self, settings: Settings) -> None:
        self.pages = pages_in(settings)
        self.failures: list[tuple[Any, str]] = []
        self.here: list[int] = []
        self.distribution = Distribution(self.pages, ABOUT, self._predict, lambda *each: self.failures.append(each))

    def _predict(self, page: list[dict[str, Any]]) -> list[Any]:
        self.here += [task["id"] for task in page]
        return ["here"] * len(page)

    def __call__(self, count: int) -> dict[int, Any]:
        """Every task's answer; fails if a task comes twice."""
        found: dict[int, Any] = {}
        for page, answers in self.distribution.predict(pages_of(count)):
            for task, answer in zip(page, answers, strict=True):
                assert task["id"] not in found
                found[task["id"]] = answer
        return found


class Workers:
    """Threads that do what a worker does, but for the process that predicts: `answer` stands in for it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []
        monkeypatch.setattr(pages._PageProcess, "answer", lambda _, page, sign: self.answer(json.loads(page), sign))

    def answer(self, page: dict[str, Any], _sign: Callable[[], None]) -> str:
        answers = [[] if task["id"] == 5 else "worker" for task in page["tasks"]]
        failures = [[task["id"], "no picture"] for task in page["tasks"] if task["id"] == 5]
        return json.dumps({"answers": answers, "failures": failures})

    def start(self, settings: Settings, count: int = 1) -> None:
        for _ in range(count):
            self._threads.append(threading.Thread(target=self._work, args=(settings,)))
            self._threads[-1].start()

    def _work(self, settings: Settings) -> None:
        work(settings, self._over)

    def stop(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()


def work(settings: Settings, over: threading.Event) -> None:
    """What a worker's thread does."""
    queue = make_queue(settings)
    Pages(queue, Database(settings))
    while not over.is_set():
        task = queue.dequeue()
        if task is None:
            time.sleep(0.02)
        else:
            queue.execute(task)


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Workers]:
    workers = Workers(monkeypatch)
    yield workers
    workers.stop()


@pytest.fixture
def settings(database_url: str, tmp_path: Path) -> Settings:
    """With the database in a file, and with PostgreSQL."""
    return Settings.from_environ({"MODEL_DIR": str(tmp_path / "state"), "CELESTIAL_DATABASE_URL": database_url})


on_sqlite = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
on_postgresql = pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "TAKE_S", 0.5)
    monkeypatch.setattr(pages, "LEASE_S", 0.5)


@pytest.fixture
def watchful(monkeypatch: pytest.MonkeyPatch) -> None:
    """Silence is soon noticed, but a busy machine is given the time to take a page."""
    monkeypatch.setattr(pages, "TAKE_S", 20)
    monkeypatch.setattr(pages, "LEASE_S", 1)


def left(settings: Settings) -> list[str]:
    return [row["run"] for row in Database(settings).rows("SELECT run FROM pages")]


def test_workers_predict_every_page_once(settings: Settings, workers: Workers) -> None:
    """What they cannot predict is told with its reason; nothing is predicted here, and nothing is left behind."""
    workers.start(settings, 2)
    run = Run(settings)
    found = run(12)
    assert sorted(found) == all_tasks(12)
    assert {task for task, answer in found.items() if answer != "worker"} == {5}
    assert run.failures == [(5, "no picture")]
    assert run.here == []
    assert sum(run.distribution.workers.values()) == 48
    assert left(settings) == []


@pytest.mark.usefixtures("impatient")
def test_pages_that_no_worker_takes_are_predicted_here(
    settings: Settings, workers: Workers, caplog: pytest.LogCaptureFixture
) -> None:
    """As when all of them train; they wait once, not each of them. A worker that has time again gets those left."""
    run = Run(settings)
    with caplog.at_level(logging.INFO):
        assert run(12) == dict.fromkeys(all_tasks(12), "here")
    assert caplog.text.count("No worker has taken a page") == 1
    predict = run._predict

    def slow(page: list[dict[str, Any]]) -> list[Any]:
        if not run.distribution.workers and len(run.here) == 56:
            workers.start(settings)
        time.sleep(0.2)
        return predict(page)

    run.distribution._here = slow
    found = run(12)
    assert sorted(found) == all_tasks(12)
    assert {answer for task, answer in found.items() if task != 5} == {"here", "worker"}
    assert left(settings) == []


@pytest.mark.usefixtures("watchful")
def test_a_page_whose_worker_is_silent_is_given_to_another(
    settings: Settings, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its answer, if it comes after all, is used by nobody."""
    good, gate, hung = workers.answer, threading.Event(), []

    def hang_once(page: dict[str, Any], sign: Callable[[], None]) -> str:
        if page["tasks"][0]["id"] == 8 and not hung:
            hung.append(page)
            gate.wait(20)
        return good(page, sign)

    monkeypatch.setattr(workers, "answer", hang_once)
    workers.start(settings, 2)
    run = Run(settings)
    found = run(6)
    gate.set()
    assert sorted(found) == all_tasks(6)
    assert run.here == []
    assert sum(run.distribution.workers.values()) == 24


@pytest.mark.usefixtures("watchful")
def test_a_worker_that_shows_life_has_its_time(
    settings: Settings, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slow pictures are no death."""
    good = workers.answer

    def slow(page: dict[str, Any], sign: Callable[[], None]) -> str:
        for _ in range(8):
            time.sleep(0.2)
            sign()
        return good(page, sign)

    monkeypatch.setattr(workers, "answer", slow)
    workers.start(settings)
    run = Run(settings)
    assert sorted(run(1)) == all_tasks(1)
    assert run.here == []


@pytest.mark.parametrize(
    "answer",
    ['{"error": "Its live model is another."}', "no JSON", "[]", '{"answers": ["too few"]}', '{"answers": 4}'],
)
@on_sqlite
def test_a_page_that_workers_cannot_predict_is_predicted_here(
    settings: Settings, workers: Workers, monkeypatch: pytest.MonkeyPatch, answer: str, caplog: pytest.LogCaptureFixture
) -> None:
    """After two have tried, and the log says what they said."""
    monkeypatch.setattr(workers, "answer", lambda _page, _sign: answer)
    workers.start(settings)
    run = Run(settings)
    assert run(3) == dict.fromkeys(all_tasks(3), "here")
    assert caplog.text.count("did not predict a page of tasks") == 6
    assert ("Its live model is another." in caplog.text) == ("error" in answer)


@on_sqlite
def test_a_worker_that_is_stuck_loses_its_page(
    settings: Settings, workers: Workers, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Though it shows life: that of a process that predicts and does not end."""

    def stuck(_page: dict[str, Any], sign: Callable[[], None]) -> str:
        while True:
            time.sleep(0.05)
            sign()

    monkeypatch.setattr(pages, "ANSWER_S", 0.2)
    monkeypatch.setattr(pages, "LEASE_S", 0.5)
    monkeypatch.setattr(workers, "answer", stuck)
    workers.start(settings)
    assert Run(settings)(1) == dict.fromkeys(all_tasks(1), "here")
    assert "It takes longer than 0.2 s." in caplog.text


@pytest.mark.usefixtures("impatient")
@on_postgresql
def test_without_the_database_pages_are_predicted_here(
    settings: Settings, postgres_server: PostgresServer, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that goes away costs no page; one that is away at the start is said at once."""
    good = workers.answer

    def last(page: dict[str, Any], sign: Callable[[], None]) -> str:
        if page["tasks"][0]["id"] == 8:
            postgres_server.kill()
        return good(page, sign)

    monkeypatch.setattr(workers, "answer", last)
    run = Run(settings)
    thread = threading.Thread(target=_until_away, args=(settings,))
    thread.start()
    found = run(6)
    thread.join()
    assert sorted(found) == all_tasks(6)
    assert set(run.here) >= {8, 9, 10, 11}
    with pytest.raises(StateError, match="correct CELESTIAL_DATABASE_URL"):
        run(1)


def _until_away(settings: Settings) -> None:
    with contextlib.suppress(Exception):  # whatever a client of a queue that is away raises
        work(settings, threading.Event())


@on_sqlite
def test_a_list_of_failures_that_cannot_be_written_ends_the_run(settings: Settings, workers: Workers) -> None:
    """A full disk is not taken for a database that is away."""

    def full(_task: Any, _reason: str) -> None:
        raise StateError("The list cannot be written.")

    workers.start(settings)
    run = Run(settings)
    run.distribution._on_failure = full
    with pytest.raises(StateError, match=r"The list cannot be written\."):
        run(3)
    assert (run.here, left(settings)) == ([], [])


def test_a_worker_that_is_not_woken_is_woken_again(
    settings: Settings, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A message that is lost costs a moment."""
    offer = Pages.offer

    def lose_messages(self: Pages, run: str, page: dict[str, Any]) -> Any:
        row = offer(self, run, page)
        self._queue.storage.flush_queue()
        return row

    monkeypatch.setattr(Pages, "offer", lose_messages)
    monkeypatch.setattr(pages, "WAKE_S", 0.2)
    workers.start(settings)
    run = Run(settings)
    assert sorted(run(6)) == all_tasks(6)
    assert run.here == []


@pytest.mark.usefixtures("impatient")
def test_what_a_killed_run_left_is_no_work(
    settings: Settings, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next run of the project removes its pages, and no other's; a worker that finds its messages does nothing."""
    asked: list[Any] = []
    monkeypatch.setattr(workers, "answer", lambda page, _sign: asked.append(page) or "{}")
    run = Run(settings)
    for _ in range(3):
        run.pages.offer("3", ABOUT | {"tasks": []})
    other = run.pages.offer("33", ABOUT | {"tasks": []})
    run(2)
    assert left(settings) == ["33"]
    assert run.pages.take(other)
    workers.start(settings)
    queue = make_queue(settings)
    while queue.storage.queue_size():
        time.sleep(0.02)
    assert (asked, left(settings)) == ([], [])


@pytest.mark.parametrize("moved_s", [pages.KEEP_S + 1000, -1000.0], ids=["a day later", "after a restart"])
def test_pages_whose_command_never_came_back_are_removed(settings: Settings, moved_s: float) -> None:
    """After a day; and where the clock, which begins anew with the machine, has not come so far yet."""
    all_pages, database = pages_in(settings), Database(settings)
    for run in ("3", "4", "5"):
        all_pages.offer(run, ABOUT | {"tasks": []})
    claimed = all_pages.claim("w")
    assert claimed is not None
    with database.writing("test") as to:
        to.run("UPDATE pages SET lease = lease - :moved WHERE run <> '5'", moved=moved_s)
    all_pages.remove_old()
    assert left(settings) == ["5"]
    assert not all_pages.renew(claimed)


def test_a_lease_from_before_a_restart_of_the_machine_holds_nobody_up(settings: Settings) -> None:
    """It seems to last for days, by the clock that began anew; nor does a page go round for ever."""
    all_pages = pages_in(settings)
    all_pages.offer("3", ABOUT | {"tasks": []})
    first = all_pages.claim("w")
    assert all_pages.claim("x") is None
    for _ in range(pages.TURNS - 1):
        with Database(settings).writing("test") as to:
            to.run("UPDATE pages SET lease = lease + 1000000")
        assert all_pages.claim("x") is not None
    with Database(settings).writing("test") as to:
        to.run("UPDATE pages SET lease = lease + 1000000")
    assert all_pages.claim("y") is None
    assert first is not None
    assert not all_pages.renew(first)
    assert not all_pages.answer(first, "{}")


# A worker without a process that predicts: it tells what it has claimed, and what it has answered.
CLAIMER = """
import sys
import time
from celestial_backend.database import Database
from celestial_backend.errors import StateError
from celestial_backend.jobs import pages
from celestial_backend.jobs.queue import make_queue
from celestial_backend.settings import Settings

settings = Settings.from_environ()
pages.LEASE_S, pages.TURNS = 5.0, 100
mine = pages.Pages(make_queue(settings), Database(settings))
while True:
    row = mine.claim(sys.argv[1])
    if row is not None:
        print("claimed", row["id"], flush=True)
        time.sleep(0.01)
        if mine.answer(row, row["id"]):
            print("answered", row["id"], flush=True)
"""


def test_of_a_thousand_pages_none_is_lost_and_none_is_answered_twice(
    settings: Settings, database_url: str, tmp_path: Path
) -> None:
    """Four claim them at the same time, and one of them is killed again and again, wherever it is."""
    all_pages = pages_in(settings)
    ids = [all_pages.offer("3", {"number": number})["id"] for number in range(1000)]
    environ = os.environ | {"MODEL_DIR": str(settings.model_dir), "CELESTIAL_DATABASE_URL": database_url}
    logs, claimers = [], []

    def start() -> None:
        logs.append((tmp_path / f"claimer-{len(logs)}").open("w+"))
        command = [sys.executable, "-c", CLAIMER, str(len(logs))]
        claimers.append(subprocess.Popen(command, cwd=REPOSITORY, env=environ, stdout=logs[-1]))

    def answered() -> int:
        return sum(row["state"] == "done" for row in all_pages.look("3").values())

    try:
        for _ in range(4):
            start()
        kills, deadline = 0, time.monotonic() + 240
        while answered() < len(ids):
            assert time.monotonic() < deadline, answered()
            if answered() >= 100 * (kills + 1):
                claimers[kills].kill()
                claimers[kills].wait()
                kills += 1
                start()
            time.sleep(0.01)
    finally:
        for claimer in claimers:
            claimer.kill()
            claimer.wait()
    told: list[list[str]] = []
    for log in logs:
        log.seek(0)
        told += [line.split() for line in log.read().splitlines() if line.count(" ") == 1]
        log.close()
    claims = Counter(page for what, page in told if what == "claimed")
    answers = Counter(page for what, page in told if what == "answered")
    assert kills >= 5
    assert len(claims) == len(ids)
    assert len(ids) < sum(claims.values()) <= len(ids) + kills  # one is claimed again where its claimer was killed
    assert set(answers.values()) == {1}
    assert len(answers) >= len(ids) - kills  # of one that was killed between the answer and the word of it
    assert {key: row["answer"] for key, row in all_pages.look("3").items()} == {key: key for key in ids}


def test_a_run_that_ends_early_takes_its_pages_back(settings: Settings) -> None:
    """As when Label Studio refuses an import: workers do nothing for it any more."""
    run = Run(settings)
    run.distribution._patience_s = 0.0
    found = run.distribution.predict(pages_of(12))
    next(found)
    assert left(settings)
    found.close()
    assert left(settings) == []


class Clock:
    """A clock that is moved by hand and by sleep, during which `meanwhile` happens."""

    def __init__(self, meanwhile: Callable[[], None]) -> None:
        self.now, self.meanwhile = 1000.0, meanwhile

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.meanwhile()


@on_sqlite
def test_a_slow_import_is_no_silence_of_the_workers(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the answers to one page are imported for minutes, the worker that has another one keeps it."""
    run, claimed = Run(settings), []

    def work() -> None:
        """A worker: it takes both pages and shows life, and is through with the first a moment later."""
        first = not claimed
        while (row := run.pages.claim("w")) is not None:
            claimed.append(row)
        assert run.pages.renew(claimed[1])
        if not first or clock.now > 1180:
            run.pages.answer(claimed[clock.now > 1180], json.dumps({"answers": ["worker"] * 4}))

    clock = Clock(work)
    monkeypatch.setattr(pages, "time", clock)
    answers = run.distribution.predict(pages_of(2))
    next(answers)
    (other,) = run.distribution._offers
    assert run.pages.renew(claimed[1])
    clock.now += 180
    assert list(answers) == [(other.page, ["worker"] * 4)]
    assert run.here == []
    assert run.distribution.workers == {"w": 8}


@pytest.fixture
def place(tmp_path: Path, model_store: Path) -> Iterator[Place]:
    """For real workers, with the database in a file."""
    place = Place(tmp_path, model_store)
    yield place
    place.stop()


def real_pages(count: int) -> Iterator[list[dict[str, Any]]]:
    """Of tasks with a picture in each."""
    picture = io.BytesIO()
    Image.new("RGB", (64, 64), (200, 90, 40)).save(picture, "png")
    address = f"data:image/png;base64,{base64.b64encode(picture.getvalue()).decode()}"
    for number in range(count):
        yield [{"id": 2 * number + each, "data": {"image": address}} for each in range(2)]


def real_about(place: Place) -> dict[str, Any]:
    return {"project": "3", "version": place.services.store.live_tag("3"), "config": label_config()}


def distributed(place: Place, here: Callable[[Any], list[Any]], **about: str) -> list[list[Any]]:
    all_about = real_about(place) | about
    run = Distribution(place.jobs.pages, all_about, here, lambda *_: pytest.fail("a task failed"))
    return [answers for _, answers in run.predict(real_pages(3))]


def test_a_worker_outlives_the_process_that_predicts_for_it(place: Place) -> None:
    """When that is killed, as for want of memory, the page is predicted by another one."""
    worker = place.worker(FAULT_AT="celestial_backend.predictor:Predictor.predict:before", FAULT_DO="self")
    answers = distributed(place, lambda _: pytest.fail("predicted here"))
    version = place.services.store.live_tag("3")
    assert [[answer["model_version"] for answer in page] for page in answers] == [[version] * 2] * 3
    assert (place.marks / "struck-0").exists()
    assert worker.process.poll() is None


def test_a_worker_that_stops_gives_its_page_back(place: Place) -> None:
    """At SIGTERM, in the middle of a page, as if nobody had begun with it; the process that predicts ends too."""
    (child,), row = at_a_page(place)
    worker = place.workers[-1].process
    worker.send_signal(signal.SIGTERM)
    worker.wait(30)
    (seen,) = place.jobs.pages.look("3").values()
    assert (seen["id"], seen["state"], seen["turn"]) == (row["id"], "waiting", 0)
    place.wait_for(lambda: has_ended(child), 5)


def test_a_page_that_is_taken_away_ends_the_process_that_predicts_it(place: Place) -> None:
    """As when its command has ended; the worker lives on, and predicts what comes next."""
    (child,), _ = at_a_page(place)
    version = place.services.store.live_tag("3")
    answers = distributed(place, lambda _: pytest.fail("predicted here"))
    assert [[answer["model_version"] for answer in page] for page in answers] == [[version] * 2] * 3
    assert has_ended(child)
    assert place.workers[-1].process.poll() is None


def at_a_page(place: Place) -> tuple[list[psutil.Process], Any]:
    """The process that predicts a page, for half a minute, and the page's row."""
    worker = place.worker(FAULT_AT="celestial_backend.predictor:Predictor.predict:before", FAULT_DO="slow")
    row = place.jobs.pages.offer("3", {**real_about(place), "tasks": next(real_pages(1))})
    place.wait_for((place.marks / "struck-0").exists, 60)
    return psutil.Process(worker.process.pid).children(), row


def has_ended(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def test_a_worker_with_another_model_is_not_heard(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    """As one with other settings has; the log says what to look at."""
    place.worker()
    assert distributed(place, lambda page: ["here"] * len(page), version="m:1") == [["here"] * 2] * 3
    assert "and m:1 was asked for. See that all workers have the CELESTIAL_DATABASE_URL" in caplog.text


def test_a_process_that_predicts_ends_when_no_page_comes(place: Place) -> None:
    """And its memory with it, though the worker lives on."""
    code = "from celestial_backend.worker import pages as p; p.IDLE_S = 0.2; import os; p.main(os.getppid())"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY, env=os.environ | place.environ,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
    try:
        assert process.wait(60) == 0
    finally:
        process.kill()
