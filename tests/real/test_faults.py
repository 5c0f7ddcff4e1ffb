"""What the machine does to the backend: disks that are full or read-only, a clock that is moved, two who publish."""

from __future__ import annotations

import base64
import io
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from celestial_backend.commands import prelabel
from celestial_backend.commands.prelabel import Prelabelling
from celestial_backend.errors import ModelError, StateError
from celestial_backend.jobs.ledger import PUBLISHED
from celestial_backend.models.pointers import Pointer
from celestial_backend.models.store import DEFAULT_MODEL, ModelStore
from celestial_backend.planets.network import FILES
from celestial_backend.planets.renderer import render
from celestial_backend.services import build
from celestial_backend.settings import Settings
from celestial_backend.trust.trial import Trial
from tests.support.backend_server import REPOSITORY, Backends, label_config
from tests.support.disks import fill, remount
from tests.support.trainings import Place


@pytest.fixture
def place(tmp_path: Path, model_store: Path) -> Iterator[Place]:
    place = Place(tmp_path, model_store)
    yield place
    place.stop()


# Disks


def test_a_state_folder_that_is_read_only_costs_trainings_alone(
    backends: Backends, small_disk: Path, model_store: Path
) -> None:
    """Predictions go on, a training is refused with a sentence; once it can be written, one is accepted and run."""
    remount(small_disk, "ro,size=4m")
    server = backends(MODEL_DIR=small_disk, BENTOML_HOME=model_store)
    picture = io.BytesIO()
    render("Mars", 1).save(picture, "PNG")
    (answer,) = server.predict([f"data:image/png;base64,{base64.b64encode(picture.getvalue()).decode()}"])
    assert answer["model_version"] == server.model_version
    press = {"action": "START_TRAINING", "project": {"id": 3, "label_config": label_config()}}
    refused = server.post("/webhook", press)
    assert refused.status_code == 503
    assert "Nothing was accepted. Check that this user can write to the folder" in refused.json()["detail"]
    server.wait_for_log("The queue in the state folder cannot be opened (its file cannot be opened). Check that")
    assert "Traceback" not in server.log_text()

    remount(small_disk, "rw")
    job = server.post("/webhook", press).json()["result"]["job"]
    deadline = time.monotonic() + 30
    ledger = build(replace(Settings.from_environ(), model_dir=small_disk, bentoml_home=model_store)).jobs.ledger
    while (found := ledger.job(job)) is None or not found.attempts:
        assert time.monotonic() < deadline, server.log_tail()
        time.sleep(0.1)


@pytest.mark.parametrize("how", ["full", "read-only"])
def test_the_live_model_stays_where_the_pointer_cannot_be_written(
    small_disk: Path, model_store: Path, how: str
) -> None:
    """The old one is served as before, and a sentence says why; afterwards the change is made."""
    services = build(replace(Settings.from_environ(), model_dir=small_disk / "state", bentoml_home=model_store))
    store, tag = services.store, services.store.live_tag()
    store.publish("3", tag, job="before")
    filler = fill(small_disk)
    if how == "read-only":
        services.database.close()  # else the system does not allow it
        remount(small_disk, "ro")
    with pytest.raises(StateError, match=r"cannot be written \(its (disk is full|file can only be read).*can write to"):
        store.publish("3", tag)
    assert store.pointers.read("3") == Pointer(tag, "before")
    assert store.live_tag("3") == tag
    remount(small_disk, "rw")
    filler.unlink()
    assert store.publish("3", tag)
    assert store.pointers.read("3") == Pointer(tag)


class OneTask:
    """The edge to Label Studio: a project of one task, and the imports that came."""

    def __init__(self) -> None:
        self.sent: list[Any] = []

    def label_config(self) -> str:
        return label_config()

    def count(self) -> tuple[int, int]:
        return 1, 1 - len(self.sent)

    def pages(self, _size: int) -> Iterator[list[dict[str, Any]]]:
        yield [{"id": 7, "data": {"image": "x"}}]

    def still(self, ids: list[int]) -> set[int]:
        return set() if self.sent else set(ids)

    def holds(self, _task: int) -> bool:
        return False

    def send(self, rows: dict[int, Any]) -> int:
        self.sent.append(rows)
        return len(rows)


@pytest.fixture
def one_task(monkeypatch: pytest.MonkeyPatch, model_store: Path) -> Any:
    """Makes runs of `prelabel` with a state folder, over one task, with a predictor that takes no time."""
    tasks = OneTask()
    monkeypatch.setattr(ModelStore, "current", lambda *_: None)

    def run(model_dir: Path, result: Sequence[object] = (), **settings: float) -> tuple[Prelabelling, OneTask]:
        services = build(replace(Settings.from_environ(), model_dir=model_dir, bentoml_home=model_store, **settings))
        answer = {"result": list(result), "score": 0.5, "model_version": services.store.live_tag()}
        monkeypatch.setattr(services.predictor, "predict", lambda page, *_, **__: [answer for _ in page])
        made = Prelabelling(services, "3")
        monkeypatch.setattr(made, "_tasks", tasks)
        return made, tasks

    return run


def test_prelabel_sends_nothing_that_a_full_disk_forgets(one_task: Any, small_disk: Path) -> None:
    """Without its note an import might be made twice: it stops with a sentence; with space the run is completed."""
    (small_disk / "work").mkdir()
    filler = fill(small_disk)
    run, tasks = one_task(small_disk)
    with pytest.raises(StateError, match=r"cannot be written \(No space left on device\). See that its folder"):
        run.run()
    assert tasks.sent == []
    filler.unlink()
    assert one_task(small_disk)[0].run().predicted == 1
    assert len(tasks.sent) == 1


def test_prelabel_sends_nothing_of_what_is_held_back_and_not_kept(
    one_task: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a task fails, and the next run predicts it; an empty prediction would stand there for good."""
    said = {"from_name": "choice", "to_name": "image", "type": "choices", "value": {"choices": ["Mars"]}, "score": 0.5}
    run, tasks = one_task(tmp_path / "state", [said], control_share=1.0)
    with monkeypatch.context() as patch:
        patch.setattr(Trial, "keep", lambda *_: raise_(StateError("The database cannot be written.")))
        assert run.run().failed == 1
    assert tasks.sent == []
    assert "What is held back of it cannot be written down." in run.failures.path.read_text()
    again, tasks = one_task(tmp_path / "state", [said], control_share=1.0)
    assert again.run().predicted == 1
    ((sent,),) = [rows.values() for rows in tasks.sent]
    assert (sent["result"], sent["score"]) == ([], 0.5)


def raise_(error: Exception) -> None:
    raise error


def test_a_model_store_that_is_read_only_is_a_sentence(small_disk: Path) -> None:
    """What it holds would be served; what cannot be put into it is said, for the default and for a new model."""
    remount(small_disk, "ro")
    store = build(replace(Settings.from_environ(), bentoml_home=small_disk)).store
    for put in (store.live_tag, lambda: store.registry.add_folder(DEFAULT_MODEL)):
        with pytest.raises(ModelError, match=r"cannot be written \(Read-only file system\). Set BENTOML_HOME to"):
            put()


# The clock


@pytest.mark.parametrize("moved", ["before", "while"])
def test_prelabel_waits_no_longer_because_the_clock_was_moved_back(
    one_task: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moved: str
) -> None:
    """An import that was on its way gets its seconds, not the hour by which the clock went back."""
    monkeypatch.setattr(prelabel, "SETTLE_S", 0.6)
    monkeypatch.setattr(prelabel, "LOOK_S", 0.1)
    (tmp_path / "state" / "work").mkdir()
    killed, _ = one_task(tmp_path / "state")
    killed._outbox.note(killed.summary.version, 7)  # and then nothing more
    real, started = time.time, time.monotonic()
    back = started if moved == "before" else started + 0.3
    monkeypatch.setattr(time, "time", lambda: real() - (3600 if time.monotonic() >= back else 0))
    assert one_task(tmp_path / "state")[0].run().predicted == 1
    assert 0.5 < time.monotonic() - started < 20


def test_a_clock_that_is_moved_back_loses_no_training(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training that is asked for an hour before the last one, as it seems, is the newest, is run and is published."""
    worker = place.worker()
    first = place.ended(place.request())
    worker.stop()
    real = time.time
    monkeypatch.setattr("celestial_backend.jobs.ledger.time.time", lambda: real() - 3600)
    place.worker(FAULT_CLOCK="-3600")
    second = place.ended(place.request())
    assert (first.state, second.state, second.attempts) == (PUBLISHED, PUBLISHED, 1)
    assert second.requested_at < first.requested_at
    assert [job.id for job in place.ledger.jobs("3")] == [second.id, first.id]
    assert place.publications() == [first.id, second.id]
    assert place.services.store.live_tag("3") == second.outcome["tag"]


# Two who publish

PUBLISHER = """
import sys
from celestial_backend.pictures.hooks import Postprocess, Preprocess
from celestial_backend.planets import network
from celestial_backend.settings import Settings
from celestial_backend.trust.trial import Trial
from celestial_backend.models.store import DEFAULT_MODEL
from celestial_backend.services import build
from celestial_backend.settings import project_tag

store, card = build(Settings.from_environ()).store, network.load_card(DEFAULT_MODEL)
hooks = Preprocess(card.size_px), Postprocess(card.classes)
for turn in range(int(sys.argv[2])):
    job = f"{sys.argv[1]}{turn:07x}"
    tag = store.registry.add(project_tag("3", job), DEFAULT_MODEL, *hooks, {"classes": list(card.classes)})
    print(tag, flush=True)
    won = store.publish("3", tag, job=job, instead_of=sys.stdin.readline().strip())
    store.prune("3")
    print(won, flush=True)
"""


def test_of_two_versions_published_at_once_one_is_live_and_whole(place: Place) -> None:
    """Two processes, many times: one of them wins, and whoever reads meanwhile finds a model with all its files."""
    turns, store, done, seen = 10, place.services.store, threading.Event(), set()
    sizes = {name: (DEFAULT_MODEL / name).stat().st_size for name in FILES}
    failures: list[str] = []

    def read() -> None:
        while not done.is_set():
            tag = store.live_tag("3")
            seen.add(tag)
            whole = {name: path.stat().st_size for name in FILES if (path := store.registry.path(tag) / name).exists()}
            if whole != sizes and store.live_tag("3") == tag:
                failures.append(f"{tag}: {whole}")

    reader = threading.Thread(target=read)
    reader.start()
    publishers = [
        subprocess.Popen(
            [sys.executable, "-c", PUBLISHER, letter, str(turns)],
            cwd=REPOSITORY, env=place.environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for letter in "ab"
    ]  # fmt: skip
    try:
        for _ in range(turns):
            tags = [publisher.stdout.readline().strip() for publisher in publishers if publisher.stdout]
            before = store.live_tag("3")
            for publisher in publishers:
                assert publisher.stdin is not None
                publisher.stdin.write(f"{before}\n")
                publisher.stdin.flush()
            won = [publisher.stdout.readline().strip() for publisher in publishers if publisher.stdout]
            assert sorted(won) == ["False", "True"]
            assert store.live_tag("3") == tags[won.index("True")]
    finally:
        done.set()
        reader.join()
        for publisher in publishers:
            publisher.communicate(timeout=30)
    assert failures == []
    assert len(seen) > turns / 2
    assert len(store.current("3").classes) == 10


# The temporary folder

COUNTING = """
from celestial_backend.metrics import Metrics
counts = Metrics()
counts.tasks(3, 1)
print(counts.page({}, None).decode())
"""


def test_a_temporary_folder_without_space_ends_no_web_process(small_disk: Path) -> None:
    """The counts that processes share are mapped into memory there; without space each tells its own."""
    filler = fill(small_disk)
    environ = os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(small_disk)}
    for said, space in (("each tells its own", False), ("", True)):
        if space:
            filler.unlink()
        done = subprocess.run(
            [sys.executable, "-c", COUNTING], cwd=REPOSITORY, env=environ, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert 'celestial_tasks_total{outcome="predicted"} 3.0' in done.stdout
        assert said in done.stderr
        assert bool(list(small_disk.glob("counter_*.db"))) is space
