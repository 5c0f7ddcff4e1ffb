"""What every test stands on: a clean environment, no network but this machine, the servers that it asks for."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.support.backend_server import Backends
    from tests.support.browser import Annotator
    from tests.support.label_studio import LabelStudioServer
    from tests.support.postgres_server import PostgresServer

OURS = ("CELESTIAL_", "LABEL_STUDIO_", "HEARTEX_", "BENTOML_", "BASIC_AUTH_", "LOCAL_FILES_")
OURS_BY_NAME = {"MODEL_DIR", "LOG_LEVEL", "LOG_FORMAT", "PORT", "WORKERS", "THREADS"}
PROXIES = {"HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"}
LONGEST = (
    "test_labels_to_model.py", "test_end_to_end.py", "test_distributed_prelabel.py", "test_worker.py",
    "test_connect.py", "test_browser.py", "test_browser_labels.py", "test_demo.py",
)  # fmt: skip


def pytest_addoption(parser: pytest.Parser) -> None:
    studio = parser.getgroup("Label Studio")
    studio.addoption("--label-studio", metavar="VERSION", help="The version that the tests start.")
    studio.addoption(
        "--label-studio-database", choices=("sqlite", "postgresql"), default="sqlite", help="What it keeps its data in."
    )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """
    The longest files come first, so that none of them is begun when the other process has nothing left to do.

    Tests with a real Label Studio are marked, for `-m studio`.
    """
    for item in items:
        if "label_studio" in getattr(item, "fixturenames", ()):
            item.add_marker("studio")
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONGEST)))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "studio: with a real Label Studio")
    config.addinivalue_line("filterwarnings", r"error:::celestial_backend(\..*)?$")
    config.addinivalue_line("filterwarnings", "error::pytest.PytestUnhandledThreadExceptionWarning")


@pytest.fixture(scope="session", autouse=True)
def session_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No setting of the person who runs the tests reaches them; some libraries read theirs at import."""
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith(OURS) or name in OURS_BY_NAME or name.upper() in PROXIES:
                patch.delenv(name)
        _set_folders(patch, tmp_path_factory.mktemp("session"))
        # What programs that are killed leave behind goes where pytest clears up. The name is short for sockets' sake.
        patch.setenv("TMPDIR", str(tmp_path_factory.mktemp("tmp", numbered=False)))
        patch.setattr(tempfile, "tempdir", None)
        patch.setenv("BENTOML_DO_NOT_TRACK", "True")
        patch.setenv("TF_CPP_MIN_LOG_LEVEL", "2")
        patch.setenv("NO_PROXY", "127.0.0.1,localhost")
        yield


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """State and model store are folders of the one test that runs."""
    _set_folders(monkeypatch, tmp_path)


def _set_folders(patch: pytest.MonkeyPatch, folder: Path) -> None:
    for name, value in (("MODEL_DIR", folder / "state"), ("BENTOML_HOME", folder / "bentoml")):
        value.mkdir()
        patch.setenv(name, str(value))
    # BentoML looks at BENTOML_HOME once per process and keeps what it made of it.
    containers = sys.modules.get("bentoml._internal.configuration.containers")
    if containers is not None:
        container = containers.BentoMLContainer
        for name in ("bentoml_home", "model_store_dir", "model_store", "tmp_bento_store_dir", "bento_store_dir"):
            patch.setattr(getattr(container, name), "_cache", containers.providers.sentinel)


@pytest.fixture(scope="session", autouse=True)
def only_this_machine() -> Iterator[None]:
    """A connection to anywhere but loopback fails the test; a foreign name is one that nobody knows."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("connect", "connect_ex"):
            patch.setattr(socket.socket, name, _loopback_only(getattr(socket.socket, name)))
        patch.setattr(socket, "getaddrinfo", _no_name_service(socket.getaddrinfo))
        yield


def _is_loopback(host: object) -> bool:
    return str(host) in ("localhost", "::1", "") or str(host).startswith("127.")


def _loopback_only(connect: Callable[..., Any]) -> Callable[..., Any]:
    def guarded(self: socket.socket, address: Any) -> Any:
        if self.family in (socket.AF_INET, socket.AF_INET6) and not _is_loopback(address[0]):
            pytest.fail(f"this test tried to reach {address[0]}:{address[1]}; tests talk to 127.0.0.1 only")
        return connect(self, address)

    return guarded


def _no_name_service(getaddrinfo: Callable[..., Any]) -> Callable[..., Any]:
    def guarded(host: Any, *rest: Any, **options: Any) -> Any:
        name = host.decode() if isinstance(host, bytes) else host
        if name is not None and not _is_loopback(name):
            with contextlib.suppress(socket.gaierror):
                return getaddrinfo(name, *rest, **(options | {"flags": socket.AI_NUMERICHOST}))
            raise socket.gaierror(socket.EAI_NONAME, f"tests look up no names, and {name} is one")
        return getaddrinfo(host, *rest, **options)

    return guarded


@pytest.fixture(scope="session")
def label_studio(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LabelStudioServer]:
    """The one real Label Studio of this process of the session."""
    from tests.support.label_studio import VERSION, LabelStudioServer

    version = request.config.getoption("--label-studio") or VERSION
    on_postgresql = request.config.getoption("--label-studio-database") == "postgresql"
    database = request.getfixturevalue("postgres_server").fresh() if on_postgresql else None
    server = LabelStudioServer(tmp_path_factory.mktemp("label-studio"), database, version)
    yield server
    server.stop()


@pytest.fixture(scope="session")
def guide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an exported model made the guide's way, pictures, and the answers it gave for them."""
    folder = tmp_path_factory.mktemp("guide")
    script = Path(__file__).parent / "support" / "guide_model.py"
    environ = os.environ | {"BENTOML_HOME": str(folder / "bentoml"), "PYTHONPATH": str(script.parents[2])}
    (folder / "bentoml").mkdir()
    done = subprocess.run([sys.executable, script, folder], env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def backends(tmp_path: Path) -> Iterator[Backends]:
    """Start backends for one test: `backends(NAME=value, …)` gives a running one with these settings."""
    from tests.support.backend_server import Backends

    starter = Backends(tmp_path)
    yield starter
    starter.kill()


@pytest.fixture(scope="session")
def model_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model store with the default model in it."""
    from tests.support.backend_server import REPOSITORY, plain_environ

    folder = tmp_path_factory.mktemp("store")
    folders = {"MODEL_DIR": str(folder / "state"), "BENTOML_HOME": str(folder / "bentoml")}
    command = [sys.executable, "-m", "celestial_backend", "models"]
    environ = plain_environ(Path(sys.executable).parent) | folders
    subprocess.run(command, cwd=REPOSITORY, env=environ, capture_output=True, check=True, timeout=60)
    return folder / "bentoml"


@pytest.fixture(scope="session")
def postgres_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresServer]:
    """The one real PostgreSQL of this process of the session; a test may kill it, if it starts it again."""
    from tests.support.postgres_server import HOW_TO_GET_ONE, PostgresServer, find_postgres

    programs = find_postgres()
    if programs is None:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(HOW_TO_GET_ONE)
    server = PostgresServer(programs, tmp_path_factory.mktemp("postgres"))
    yield server
    server.stop()


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """What `CELESTIAL_DATABASE_URL` wants, for an empty database of one test, of either kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'celestial.db'}"
    url: str = request.getfixturevalue("postgres_server").fresh()
    return url


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder that is a disk of its own, of 256 KB; where nobody may mount one there is no test."""
    from tests.support import disks

    folder = tmp_path / "disk"
    folder.mkdir()
    if not disks.mount(folder):
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)("mounting a disk needs root")
    yield folder
    disks.unmount(folder)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    """A failed test shows the end of the log of each server that it used."""
    report = yield
    if report.failed:
        for name, used in getattr(item, "funcargs", {}).items():
            if hasattr(used, "log_tail"):
                report.sections.append((f"log of {name}", used.log_tail()))
    return report


@pytest.fixture
def person(label_studio: LabelStudioServer, tmp_path: Path) -> Iterator[Annotator]:
    """Somebody signed in to Label Studio; TEST_SCREENSHOTS names a folder that keeps what they saw."""
    from tests.support.browser import HOW_TO_GET_ONE, annotator, find_chromium

    program = find_chromium()
    if program is None:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(HOW_TO_GET_ONE)
    with annotator(program, label_studio, Path(os.environ.get("TEST_SCREENSHOTS") or tmp_path)) as someone:
        yield someone
