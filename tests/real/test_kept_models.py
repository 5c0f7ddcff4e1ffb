"""The models that the database keeps, on the databases that there are."""

from __future__ import annotations

import os
import socket
import socketserver
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest

from celestial_backend.database import Database
from celestial_backend.models import headed, kept
from celestial_backend.models import store as store_module
from celestial_backend.models.headed import Head
from celestial_backend.models.pointers import Pointer
from celestial_backend.models.store import ModelStore
from celestial_backend.planets.renderer import render
from celestial_backend.settings import Settings, project_tag
from tests.support.colours import Colours, plain
from tests.support.postgres_server import PostgresServer
from tests.support.stores import store_of

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
KIND = Head("kind", ("apple", "leaf", "sky"), 9 * np.eye(3, dtype=np.float32), np.zeros(3, np.float32))


@pytest.fixture(autouse=True)
def colours(monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedder of this process."""
    embedder = Colours()
    monkeypatch.setattr(store_module, "open_embedder", lambda _: embedder)


@pytest.fixture
def machines(tmp_path: Path, database_url: str) -> list[ModelStore]:
    """Two machines that have nothing in common but the database."""
    return [store_of(settings_of(tmp_path, name, database_url)) for name in ("first", "second")]


def settings_of(place: Path, name: str, database_url: str, **more: Path) -> Settings:
    return Settings(bentoml_home=place / name / "bentoml", model_dir=place / name / "state",
                    database_url=database_url, **more)  # fmt: skip


def trained(store: ModelStore, place: Path, job: str = "0badcafe") -> str:
    """A model of heads of project 3, as a training leaves it on its machine."""
    folder = place / job
    folder.mkdir()
    return store.registry.add_heads(project_tag("3", job), folder, headed.save(folder, [KIND], "colours-1"))


def test_a_model_and_its_pointer_come_together(machines: list[ModelStore], tmp_path: Path, database_url: str) -> None:
    """
    Another machine gives the same answers from its next request on; before the end of the transaction, and if it
    is undone, it knows of neither.
    """
    first, second = machines
    shared = second.live_tag("3")
    tag = trained(first, tmp_path)
    database = Database(settings_of(tmp_path, "any", database_url))
    with suppress(ZeroDivisionError), database.writing("3") as transaction:
        first.publish("3", tag, job="0badcafe", instead_of=shared, within=transaction)
        raise ZeroDivisionError
    assert (first.live_tag("3"), second.live_tag("3"), second.registry.holds(tag)) == (shared, shared, False)
    with database.writing("3") as transaction:
        first.publish("3", tag, job="0badcafe", instead_of=shared, within=transaction)
        assert first.pointers.read("3") is None
    assert second.live_tag("3") == tag
    assert second.pointers.read("3") == Pointer(tag, "0badcafe")
    ours, theirs = first.current("3"), second.current("3")
    row = ours.prepare(plain("lime"))
    assert theirs.probabilities(row).tolist() == ours.probabilities(row).tolist()
    assert {model.tag for model in second.registry.models()} == {shared, tag}


def test_who_publishes_waits_for_who_does(machines: list[ModelStore], tmp_path: Path) -> None:
    """Of many that would replace the same model, each on its machine, one does."""
    shared = machines[0].live_tag("3")
    assert machines[1].live_tag("3") == shared
    tags = [trained(machines[number % 2], tmp_path, f"0000000{number}") for number in range(6)]
    with ThreadPoolExecutor(6) as pool:
        done = list(pool.map(lambda n: machines[n % 2].publish("3", tags[n], instead_of=shared), range(6)))
    assert sum(done) == 1
    assert [machine.live_tag("3") for machine in machines] == [tags[done.index(True)]] * 2


def test_an_exported_network_is_served_by_every_machine(
    machines: list[ModelStore], tmp_path: Path, database_url: str, guide: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In parts, and with the answers of a machine that has imported the file."""
    monkeypatch.setattr(kept, "PART_BYTES", 10_000)
    first, second = machines
    with_file = settings_of(tmp_path, "third", database_url, bentomodel=guide / "guide.bentomodel")
    told = store_of(with_file)
    tag = told.live_tag("3")
    assert first.add(guide / "guide.bentomodel") == tag
    assert told.add(guide / "guide.bentomodel") == tag
    second.publish("3", tag)
    assert (first.live_tag("3"), second.live_tag("3")) == (tag, tag)
    assert first.live_tag() == second.live_tag() == first.live_tag("4") != tag
    ours, theirs = told.current("3"), first.current("3")
    row = ours.prepare(render("Saturn", 5))
    assert theirs.probabilities(row) == pytest.approx(ours.probabilities(row), abs=1e-6)


def test_a_model_that_was_pruned_is_gone_everywhere(
    machines: list[ModelStore], tmp_path: Path, database_url: str
) -> None:
    """From the database at once, and from another machine at its own prune; what is live stays."""
    first, second = machines
    shared = second.live_tag()
    tags = [trained(first, tmp_path, f"0000000{number}") for number in range(7)]
    for tag in tags:
        first.publish("3", tag)
        second.live_tag("3")
    assert first.prune("3") == tags[:2]
    rows = Database(settings_of(tmp_path, "any", database_url)).rows("SELECT tag FROM models ORDER BY tag")
    assert [row["tag"] for row in rows] == tags[2:]
    assert second.prune("3") == tags[:2]
    assert {model.tag for model in second.registry.models()} == {shared, *tags[2:]}


@contextmanager
def slow_line(port: int) -> Iterator[int]:
    """A port that leads to another one; what comes back from there comes at 200 KB a second."""

    class Line(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with socket.create_connection(("127.0.0.1", port)) as there:
                threading.Thread(target=self._pass_on, args=(there,), daemon=True).start()
                while part := there.recv(10_000):
                    self.request.sendall(part)
                    time.sleep(0.05 * (len(part) > 5_000))

        def _pass_on(self, there: socket.socket) -> None:
            with suppress(OSError):
                while part := self.request.recv(10_000):
                    there.sendall(part)
                there.shutdown(socket.SHUT_WR)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Line) as server:
        server.daemon_threads, server.block_on_close = True, False
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


def test_a_model_comes_over_a_slow_line_too(postgres_server: PostgresServer, tmp_path: Path) -> None:
    """Its bytes may take longer than a database that answers at all."""
    url = postgres_server.fresh()
    first = store_of(settings_of(tmp_path, "first", url))
    folder = tmp_path / "0badcafe"
    folder.mkdir()
    (folder / "more").write_bytes(os.urandom(300_000))
    tag = first.registry.add_heads(project_tag("3", "0badcafe"), folder, headed.save(folder, [KIND], "colours-1"))
    first.publish("3", tag)
    with slow_line(postgres_server.port) as port:
        second = store_of(settings_of(tmp_path, "second", url.replace(f":{postgres_server.port}/", f":{port}/")))
        assert second.live_tag("3") == tag
        assert second.registry.here(tag)
