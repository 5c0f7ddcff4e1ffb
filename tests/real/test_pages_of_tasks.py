"""Pages of tasks that workers predict, and what becomes of them when a worker, the queue or the command is lost."""

from __future__ import annotations

import base64
import io
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image

from celestial_backend.jobs import pages
from celestial_backend.jobs.pages import Distribution, Pages, QueueError
from celestial_backend.jobs.queue import make_queue
from celestial_backend.settings import Settings
from tests.support.backend_server import REPOSITORY, label_config
from tests.support.redis_server import RedisServer
from tests.support.trainings import Place

ABOUT = {"project": "3", "version": "m:1", "config": "<View/>"}


def pages_of(count: int, size: int = 4) -> Iterator[list[dict[str, Any]]]:
    for number in range(count):
        yield [{"id": size * number + each, "data": {}} for each in range(size)]


def all_tasks(count: int, size: int = 4) -> list[int]:
    return list(range(count * size))


class Run:
    """A distribution on one queue; what was predicted here is answered ``here``."""

    def __init__(self, queue: Any) -> None:
        self.pages = Pages(queue)
        self.failures: list[tuple[Any, str]] = []
        self.here: list[int] = []
        self.distribution = Distribution(
            self.pages, "prelabel-3-", ABOUT, self._predict, lambda *each: self.failures.append(each)
        )

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
        queue = make_queue(settings)
        Pages(queue)
        while not self._over.is_set():
            task = queue.dequeue()
            if task is None:
                time.sleep(0.02)
            else:
                queue.execute(task)

    def stop(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Workers]:
    workers = Workers(monkeypatch)
    yield workers
    workers.stop()


@pytest.fixture(params=["file", "redis"])
def settings(request: pytest.FixtureRequest, tmp_path: Path) -> Settings:
    """With the queue in a file, and with the queue in Redis."""
    given = {"MODEL_DIR": str(tmp_path / "state")}
    if request.param == "redis":
        given["REDIS_URL"] = request.getfixturevalue("redis_server").url
    return Settings.from_environ(given)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "TAKE_S", 0.5)
    monkeypatch.setattr(pages, "SILENT_S", 0.5)


@pytest.fixture
def watchful(monkeypatch: pytest.MonkeyPatch) -> None:
    """Silence is soon noticed, but a busy machine is given the time to take a page."""
    monkeypatch.setattr(pages, "TAKE_S", 20)
    monkeypatch.setattr(pages, "SILENT_S", 1)


def left(settings: Settings) -> list[str]:
    return list(make_queue(settings).storage.result_items())


def test_workers_predict_every_page_once(settings: Settings, workers: Workers) -> None:
    """What they cannot predict is told with its reason; nothing is predicted here, and nothing is left behind."""
    workers.start(settings, 2)
    run = Run(make_queue(settings))
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
    run = Run(make_queue(settings))
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
    run = Run(make_queue(settings))
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
    run = Run(make_queue(settings))
    assert sorted(run(1)) == all_tasks(1)
    assert run.here == []


@pytest.mark.parametrize(
    "answer",
    ['{"error": "Its live model is another."}', "no JSON", "[]", '{"answers": ["too few"]}', '{"answers": 4}'],
)
@pytest.mark.parametrize("settings", ["file"], indirect=True)
def test_a_page_that_workers_cannot_predict_is_predicted_here(
    settings: Settings, workers: Workers, monkeypatch: pytest.MonkeyPatch, answer: str, caplog: pytest.LogCaptureFixture
) -> None:
    """After two have tried, and the log says what they said."""
    monkeypatch.setattr(workers, "answer", lambda _page, _sign: answer)
    workers.start(settings)
    run = Run(make_queue(settings))
    assert run(3) == dict.fromkeys(all_tasks(3), "here")
    assert caplog.text.count("did not predict a page of tasks") == 6
    assert ("Its live model is another." in caplog.text) == ("error" in answer)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("settings", ["redis"], indirect=True)
def test_without_the_queue_pages_are_predicted_here(
    settings: Settings, redis_server: RedisServer, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Redis that goes away costs no page; one that is away at the start is said at once."""
    good = workers.answer

    def last(page: dict[str, Any], sign: Callable[[], None]) -> str:
        if page["tasks"][0]["id"] == 8:
            redis_server.kill()
        return good(page, sign)

    monkeypatch.setattr(workers, "answer", last)
    queue = make_queue(settings)
    run = Run(queue)
    thread = threading.Thread(target=_until_away, args=(settings,))
    thread.start()
    found = run(6)
    thread.join()
    assert sorted(found) == all_tasks(6)
    assert set(run.here) >= {8, 9, 10, 11}
    with pytest.raises(QueueError, match="correct REDIS_URL"):
        run(1)


def _until_away(settings: Settings) -> None:
    queue = make_queue(settings)
    Pages(queue)
    try:
        while True:
            task = queue.dequeue()
            if task is not None:
                queue.execute(task)
    except Exception:  # noqa: BLE001, S110 - whatever a client of a queue that is away raises
        pass


@pytest.mark.usefixtures("impatient")
def test_what_a_killed_run_left_is_no_work(
    settings: Settings, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next run of the project removes its pages, and no other's; a worker that finds its messages does nothing."""
    asked: list[Any] = []
    monkeypatch.setattr(workers, "answer", lambda page, _sign: asked.append(page) or "{}")
    run = Run(make_queue(settings))
    killed = [run.pages.offer("prelabel-3-", ABOUT | {"tasks": []}) for _ in range(3)]
    other = run.pages.offer("prelabel-33-", ABOUT | {"tasks": []})
    run(2)
    assert [run.pages.take(key) for key in killed] == [None] * 3
    assert run.pages.take(other) is not None
    workers.start(settings)
    queue = make_queue(settings)
    while queue.storage.queue_size():
        time.sleep(0.02)
    assert (asked, left(settings)) == ([], [])


def test_a_run_that_ends_early_takes_its_pages_back(settings: Settings) -> None:
    """As when Label Studio refuses an import: workers do nothing for it any more."""
    run = Run(make_queue(settings))
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


@pytest.mark.parametrize("settings", ["file"], indirect=True)
def test_a_slow_import_is_no_silence_of_the_workers(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the answers to one page are imported for minutes, the worker that has another one keeps it."""
    run, storage = Run(make_queue(settings)), make_queue(settings).storage
    answer = json.dumps({"answers": ["worker"] * 4}).encode()

    def work() -> None:
        """A worker: it takes both pages and shows life, and is through with the first a moment later."""
        for offer in run.distribution._offers:
            if run.pages.take(offer.key) is not None:
                storage.put_data(f"{offer.key}.sign", b"w 0")
            elif offer.page[0]["id"] == 0:
                storage.put_data(f"{offer.key}.answer", answer)

    clock = Clock(work)
    monkeypatch.setattr(pages, "time", clock)
    answers = run.distribution.predict(pages_of(2))
    next(answers)
    (other,) = run.distribution._offers
    clock.now += 180
    storage.put_data(f"{other.key}.answer", answer)
    assert list(answers) == [(other.page, ["worker"] * 4)]
    assert run.here == []
    assert run.distribution.workers == {"w": 8}


@pytest.fixture
def place(tmp_path: Path, model_store: Path) -> Iterator[Place]:
    """For real workers, with the queue in a file."""
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
    run = Distribution(place.jobs.pages, "prelabel-3-", all_about, here, lambda *_: pytest.fail("a task failed"))
    return [answers for _, answers in run.predict(real_pages(3))]


def test_a_worker_outlives_the_process_that_predicts_for_it(place: Place) -> None:
    """When that is killed, as for want of memory, the page is predicted by another one."""
    worker = place.worker(FAULT_AT="celestial_backend.predictor:Predictor.predict:before", FAULT_DO="self")
    answers = distributed(place, lambda _: pytest.fail("predicted here"))
    version = place.services.store.live_tag("3")
    assert [[answer["model_version"] for answer in page] for page in answers] == [[version] * 2] * 3
    assert (place.marks / "struck-0").exists()
    assert worker.process.poll() is None


def test_a_worker_that_stops_takes_the_process_with_it(place: Place) -> None:
    """At SIGTERM, in the middle of a page, as at the end of the server that started the worker."""
    fault = {"FAULT_AT": "celestial_backend.predictor:Predictor.predict:before", "FAULT_DO": "slow"}
    worker = place.worker(**fault)
    place.jobs.pages.offer("prelabel-3-", {**real_about(place), "tasks": next(real_pages(1))})
    place.wait_for((place.marks / "struck-0").exists, 60)
    (child,) = psutil.Process(worker.process.pid).children()
    worker.process.send_signal(signal.SIGTERM)
    worker.process.wait(30)
    place.wait_for(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE, 5)


def test_a_worker_with_another_model_is_not_heard(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    """As one with another state folder has; the log says what to look at."""
    place.worker()
    assert distributed(place, lambda page: ["here"] * len(page), version="m:1") == [["here"] * 2] * 3
    assert "and m:1 was asked for. See that all workers have the MODEL_DIR" in caplog.text


def test_a_process_that_predicts_ends_when_no_page_comes(place: Place) -> None:
    """And its memory with it, though the worker lives on."""
    code = "from celestial_backend.worker import pages as p; p.IDLE_S = 0.2; import os; p.main(os.getppid())"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY, env=os.environ | place.environ,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
    try:
        assert process.wait(60) == 0
    finally:
        process.kill()
