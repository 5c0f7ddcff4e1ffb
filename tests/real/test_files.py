"""The state folder is its user's alone, whatever program makes it, and what other users have is left as it is."""

from __future__ import annotations

import base64
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import psutil
import pytest
import requests

from celestial_backend.planets.renderer import render
from tests.support.backend_server import (
    REPOSITORY,
    Backends,
    BackendServer,
    ServerProcess,
    free_port,
    label_config,
    plain_environ,
)
from tests.support.trainings import BIN, FAULTS, Place

USE = "import sys; from pathlib import Path; from celestial_backend.state import private; private(Path(sys.argv[1]))"


@pytest.fixture(autouse=True)
def usual_umask() -> Iterator[None]:
    """Files that everybody may read, as on most machines."""
    before = os.umask(0o022)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def open_to_others(folder: Path) -> list[str]:
    """What other users may look into, below a folder and with it."""
    return [f"{mode(path):o} {path}" for path in (folder, *folder.rglob("*")) if mode(path) & 0o077]


def umask(pid: int) -> str:
    status = Path(f"/proc/{pid}/status").read_text()
    return next(line.split()[1] for line in status.splitlines() if line.startswith("Umask:"))


def run(code: str, folder: Path) -> None:
    subprocess.run([sys.executable, "-c", code, folder], cwd=REPOSITORY, check=True, timeout=60)


def test_a_folder_of_ours_is_closed(tmp_path: Path) -> None:
    """One that is there, and one that is made later, with all that is made in it."""
    (tmp_path / "there").mkdir()
    for name in ("there", "later"):
        folder = tmp_path / name
        run(f"{USE}; p = Path(sys.argv[1], 'a/b'); p.mkdir(parents=True); (p / 'c').write_text('')", folder)
        assert open_to_others(folder) == []
        assert (folder / "a/b/c").exists()


def test_a_folder_that_is_not_ours_alone_is_left_as_it_is(tmp_path: Path) -> None:
    """Another user's, such as a volume of Kubernetes, and one like /tmp; that is no error."""
    for name, bits in (("volume", 0o775), ("temporary", 0o1777)):
        (tmp_path / name).mkdir()
        (tmp_path / name).chmod(bits)
    if os.geteuid() == 0:
        os.chown(tmp_path / "volume", 12345, -1)
        run(USE, tmp_path / "volume")
        assert mode(tmp_path / "volume") == 0o775
    run(USE, tmp_path / "temporary")
    assert mode(tmp_path / "temporary") == 0o1777


def used(server: BackendServer, folder: Path) -> None:
    """Make a backend write all that it writes."""
    picture = BytesIO()
    render("Mars", 1).save(picture, "PNG")
    project = {"id": 7, "label_config": label_config()}
    assert server.post("/setup", {"project": "7.1", "schema": label_config()}).status_code == 200
    assert server.predict([f"data:image/png;base64,{base64.b64encode(picture.getvalue()).decode()}"])[0]
    label = {"action": "ANNOTATION_CREATED", "project": project, "annotation": {"id": 1}, "task": {"id": 1}}
    assert server.post("/webhook", label).status_code == 201
    assert server.post("/webhook", {"action": "START_TRAINING", "project": project}).status_code == 201
    for name in ("celestial.db", "queue.db"):
        assert (folder / name).exists(), name


def test_all_that_a_backend_writes_is_its_users_alone(tmp_path: Path, model_store: Path) -> None:
    """Web server, worker and training, in a folder that was open to all before."""
    place = Place(tmp_path, model_store)
    (tmp_path / "state").chmod(0o755)
    given = {"MODEL_DIR": tmp_path / "state", "BENTOML_HOME": tmp_path / "bentoml", "PYTHONPATH": FAULTS}
    server = BackendServer(tmp_path, **given, FAULT_MARKS=place.marks, FAULT_LEARN="20")
    try:
        used(server, tmp_path / "state")
        place.wait_for(place.trainers)
        place.wait_for(place.left_over)
        assert open_to_others(tmp_path / "state") == []
        ours = [each for each in psutil.Process(server.process.pid).children(recursive=True) if "python" in each.exe()]
        assert len(ours) >= 3, "its own shell apart: master, web process, worker"
        assert {umask(process.pid) for process in (*ours, *place.trainers())} == {"0077"}
    finally:
        server.stop()
    assert open_to_others(tmp_path / "state") == []


def test_all_that_gunicorn_writes_is_its_users_alone(tmp_path: Path) -> None:
    """Where another program starts the web server's processes, `gunicorn _wsgi:app`."""
    state, port = tmp_path / "new" / "state", free_port()
    given = {"MODEL_DIR": str(state), "BENTOML_HOME": str(tmp_path / "bentoml")}
    command = [BIN / "gunicorn", "--bind", f"127.0.0.1:{port}", "--threads", "4", "_wsgi:app"]
    environ = plain_environ(BIN) | given
    server = ServerProcess(command, cwd=REPOSITORY, environ=environ, log=tmp_path / "gunicorn.log")
    try:
        server.wait_for_answer(f"http://127.0.0.1:{port}/health", 60)
        server.wait_for_log("Features of pictures", seconds=60)  # the last line of warming up
        event = {"action": "START_TRAINING", "project": {"id": 7, "label_config": label_config()}}
        assert requests.post(f"http://127.0.0.1:{port}/webhook", json=event, timeout=30).status_code == 201
        assert (state / "celestial.db").exists()
        assert open_to_others(state) == []
    finally:
        server.stop()


def test_all_that_a_command_writes_is_its_users_alone(backends: Backends) -> None:
    """The first use closes the folder, though a command only looks; one that is not there is not made for that."""
    folder = backends.folder / "state"
    folder.chmod(0o755)
    command = [sys.executable, "-m", "celestial_backend", "jobs"]
    environ = plain_environ(BIN) | {"MODEL_DIR": str(folder), "BENTOML_HOME": str(backends.folder / "bentoml")}
    subprocess.run(command, cwd=REPOSITORY, env=environ, check=True, timeout=60)
    assert (folder / "celestial.db").exists()
    assert open_to_others(folder) == []
    missing = backends.folder / "missing"
    help_page = [*command, "--help"]
    subprocess.run(help_page, cwd=REPOSITORY, env=environ | {"MODEL_DIR": str(missing)}, check=True, timeout=60)
    assert not missing.exists()
