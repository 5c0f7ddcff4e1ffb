"""The web server as people start it: its arguments, its first seconds, its workers, its end."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from celestial_backend.metrics import SHARED
from celestial_backend.planets.renderer import render
from celestial_backend.web.server import _shared_metrics
from tests.support.backend_server import (
    REPOSITORY,
    Backends,
    BackendServer,
    ServerProcess,
    free_port,
    label_config,
    plain_environ,
)

BIN = Path(sys.executable).parent
HEALTH_S, SETUP_S = 5, 10  # Label Studio gives 1 and 3; other tests want the processor too


def environ(folder: Path, **settings: str) -> dict[str, str]:
    folders = {"MODEL_DIR": str(folder / "state"), "BENTOML_HOME": str(folder / "bentoml")}
    return plain_environ(BIN) | folders | settings


def start(folder: Path, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run `python _wsgi.py` to its end; for starts that are refused."""
    return subprocess.run(
        [sys.executable, "_wsgi.py", "-p", str(free_port()), *arguments],
        cwd=REPOSITORY, env=environ(folder, **settings), capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def body(url: str, path: str, content: Any, timeout: float) -> requests.Response:
    return requests.post(f"{url}{path}", json=content, timeout=timeout)


def test_health_and_setup_answer_from_the_first_second(tmp_path: Path) -> None:
    """
    While TensorFlow is still loading, /health and /setup answer soon, also on a busy machine; /predict waits.

    Label Studio's own limits are held by `python -m benchmarks.soak`.
    """
    port = free_port()
    server = ServerProcess(
        [BIN / "label-studio-ml", "start", ".", "--port", str(port)],
        cwd=REPOSITORY, environ=environ(tmp_path), log=tmp_path / "log",
    )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        while True:
            try:
                assert requests.get(f"{url}/health", timeout=HEALTH_S).status_code == 200
                break
            except requests.ConnectionError:
                assert server.process.poll() is None, server.log_text()
                time.sleep(0.05)
        answered: list[Any] = []
        picture = {"image": "data:image/png;base64,"}
        task = {"tasks": [{"id": 1, "data": picture}], "label_config": label_config(), "project": "1.1"}
        waiting = threading.Thread(target=lambda: answered.append(body(url, "/predict", task, 100)))
        waiting.start()
        while waiting.is_alive():
            setup = body(url, "/setup", {"project": "1.1", "schema": label_config()}, SETUP_S)
            assert setup.status_code == 200
            assert setup.json()["model_version"].startswith("celestial_bodies_classifier_model:default-")
            assert requests.get(f"{url}/health", timeout=HEALTH_S).status_code == 200
        assert answered[0].json()["results"] == [[]]
        assert "Loaded celestial_bodies_classifier_model" in server.log_text()
    finally:
        server.stop()


def test_workers_are_there_and_say_one_version(backends: Backends) -> None:
    """WORKERS processes answer, and all with the same version."""
    server = backends(WORKERS="3")
    deadline = time.monotonic() + 60
    while len(commands := children_of_the_master(server)) < 3 + 1:  # three for requests, and one for trainings
        assert time.monotonic() < deadline, commands
        time.sleep(0.1)
    assert len(commands) == 3 + 1
    assert len({server.model_version for _ in range(30)}) == 1


def children_of_the_master(server: ServerProcess) -> list[str]:
    """The command lines of the processes beside the training worker, and its own."""
    for one in psutil.Process(server.process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            commands = [" ".join(child.cmdline()) for child in one.children()]
            if any("celestial_backend.worker" in command for command in commands):
                return commands
    return []


@pytest.fixture
def originals(tmp_path: Path) -> Path:
    """A folder with one large picture, so that a batch of it takes a while."""
    folder = tmp_path / "originals"
    folder.mkdir()
    render("Mars", 1, size_px=700).save(folder / "mars.png")
    return folder


BATCH = ["/data/upload/1/01234567-mars.png"] * 300


@pytest.mark.parametrize(("threads", "waits"), [("1", True), ("2", False)])
def test_threads_predict_side_by_side(backends: Backends, originals: Path, threads: str, waits: bool) -> None:
    """With one of THREADS two tasks wait for the batch before them, with two not; one task and /health never wait."""
    server = backends(CELESTIAL_DATA_FOLDER=originals, THREADS=threads)
    server.predict(BATCH[:1])
    ended: list[str] = []

    def ask(name: str, values: list[str]) -> None:
        server.predict(values)
        ended.append(name)

    asking = threading.Thread(target=ask, args=("batch", BATCH))
    asking.start()
    time.sleep(0.2)
    assert requests.get(f"{server.url}/health", timeout=60).status_code == 200
    assert ended == []
    ask("task", BATCH[:1])
    ask("tasks", BATCH[:2])
    asking.join()
    assert ended == (["task", "batch", "tasks"] if waits else ["task", "tasks", "batch"])


def test_a_stop_lets_running_requests_end(backends: Backends, originals: Path) -> None:
    """SIGTERM while a batch is predicted: it is answered whole, then the server is gone."""
    server = backends(CELESTIAL_DATA_FOLDER=originals)
    server.predict(BATCH[:1])
    answers: list[Any] = []
    asking = threading.Thread(target=lambda: answers.append(server.predict(BATCH)))
    asking.start()
    time.sleep(0.3)
    os.killpg(server.process.pid, signal.SIGTERM)
    asking.join(60)
    assert len(answers) == 1
    assert len(answers[0]) == 300
    assert all(answers[0])
    server.process.wait(30)


STARTED = [BIN / "label-studio-ml", "start", "."]
ALONE = [sys.executable, "_wsgi.py"]


@contextlib.contextmanager
def started(folder: Path, command: list[Any], terminal: int | None = None) -> Iterator[list[psutil.Process]]:
    """A server and all its processes, the worker for trainings too, which are ended afterwards."""
    port = free_port()
    process = subprocess.Popen(
        [*map(str, command), "-p", str(port)], cwd=REPOSITORY, env=environ(folder),
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=(folder / "log").open("wb"), start_new_session=True,
        preexec_fn=None if terminal is None else lambda: fcntl.ioctl(terminal, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    family: list[psutil.Process] = []
    try:
        while len(family) < (3 if command is ALONE else 4):
            assert process.poll() is None, (folder / "log").read_text()
            time.sleep(0.1)
            with contextlib.suppress(requests.ConnectionError):
                requests.get(f"http://127.0.0.1:{port}/health", timeout=HEALTH_S)
                family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        yield family
    finally:
        for one in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        process.wait(30)


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    """The two ends of a terminal: what shows it, and what a program has."""
    ends = os.openpty()
    yield ends
    for end in ends:
        with contextlib.suppress(OSError):
            os.close(end)


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_what_was_started_ends_with_it(tmp_path: Path, sign: signal.Signals) -> None:
    """Whatever ends `label-studio-ml start .`, which hands no signal on: no server and no worker is left."""
    with started(tmp_path, STARTED) as family:
        family[0].send_signal(sign)
        assert not psutil.wait_procs(family, 60)[1]


@pytest.mark.parametrize("command", [STARTED, ALONE], ids=["label-studio-ml", "python"])
def test_what_was_started_ends_with_its_terminal(
    tmp_path: Path, command: list[Any], terminal: tuple[int, int]
) -> None:
    """As when somebody closes the window."""
    with started(tmp_path, command, terminal[1]) as family:
        os.close(terminal[0])
        assert not psutil.wait_procs(family, 60)[1]


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(["nohup", *STARTED], id="nohup"),
        pytest.param(ALONE, id="without a terminal, as under systemd and in Docker"),
    ],
)
def test_a_hang_up_ends_nothing_that_was_to_go_on(
    tmp_path: Path, command: list[Any], terminal: tuple[int, int]
) -> None:
    """With `nohup` it does not even reach gunicorn; without a terminal, its web processes start anew."""
    with started(tmp_path, command, None if command is ALONE else terminal[1]) as family:
        master = next(one for one in family if any("_wsgi.py" in word for word in one.cmdline()[1:2]))
        if command is ALONE:
            master.send_signal(signal.SIGHUP)
        else:
            os.close(terminal[0])
        master.send_signal(signal.SIGTTOU)  # signals are answered in turn; this one leaves no more than a line
        deadline = time.monotonic() + 60
        while "ttou" not in (tmp_path / "log").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert master.is_running()
        assert master.status() != psutil.STATUS_ZOMBIE
        assert ("signal: hup" in (tmp_path / "log").read_text()) == (command is ALONE)


def test_the_wsgi_app_runs_under_plain_gunicorn(tmp_path: Path) -> None:
    """`gunicorn _wsgi:app` serves the same app."""
    port = free_port()
    server = ServerProcess(
        [BIN / "gunicorn", "--bind", f"127.0.0.1:{port}", "--threads", "2", "_wsgi:app"],
        cwd=REPOSITORY, environ=environ(tmp_path), log=tmp_path / "log",
    )  # fmt: skip
    try:
        server.wait_for_answer(f"http://127.0.0.1:{port}/health", 60)
        setup = body(f"http://127.0.0.1:{port}", "/setup", {"project": "1.1", "schema": label_config()}, 10)
        assert setup.status_code == 200
    finally:
        server.stop()


def test_gunicorn_stops_at_settings_that_cannot_be_used(tmp_path: Path) -> None:
    """A worker that is told nonsense says so once and takes the server down, without a traceback."""
    done = subprocess.run(
        [BIN / "gunicorn", "--bind", f"127.0.0.1:{free_port()}", "_wsgi:app"],
        cwd=REPOSITORY, env=environ(tmp_path, CELESTIAL_BATCH_SIZE="many"),
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "CELESTIAL_BATCH_SIZE must be a whole number of 1 or more, got 'many'" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_bad_setting_ends_the_start_with_a_sentence(tmp_path: Path) -> None:
    """Exit code 2, every problem named, no traceback."""
    done = start(tmp_path, WORKERS="none", CELESTIAL_TYPO="1")
    assert done.returncode == 2
    assert "WORKERS must be a whole number" in done.stderr
    assert "CELESTIAL_TYPO is not a setting" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("version", ["25.3.0", "28.0.0"])
@pytest.mark.parametrize(
    "start",
    [
        pytest.param("from celestial_backend.web.server import serve; sys.exit(serve())", id="ours"),
        pytest.param("from gunicorn.app.wsgiapp import run; run()", id="plain gunicorn"),
    ],
)
def test_an_unfit_gunicorn_ends_the_start_with_a_sentence(tmp_path: Path, version: str, start: str) -> None:
    """Exit code 2, the rule, what was seen and what to do; by its internals no request would be answered."""
    numbers = tuple(map(int, version.split(".")))
    code = f"import sys, gunicorn; gunicorn.__version__, gunicorn.version_info = {version!r}, {numbers}; {start}"
    arguments = ["-p", str(free_port())]
    if "wsgiapp" in start:
        worker = "celestial_backend.web.connections.Worker"
        arguments = ["--bind", f"127.0.0.1:{free_port()}", "--worker-class", worker, "_wsgi:app"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=REPOSITORY, env=environ(tmp_path), capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert f"The web server needs gunicorn>=26,<28, and {version} is installed. Install it: " in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        pytest.param(["--host", "192.0.2.1"], "--host must be an address or a name of this machine", id="another one"),
        pytest.param(["--host", "nowhere.invalid"], "--host must be an address or a name of this machine", id="none"),
        pytest.param(["--host", "no..where"], "--host must be an address or a name of this machine", id="no name"),
        pytest.param(["--model-dir", "README.md"], "README.md is none (File exists)", id="a file"),
        pytest.param(["--model-dir", "/proc/nowhere"], "MODEL_DIR must be a folder in which this user can write",
                     id="a folder that cannot be made"),
    ],
)  # fmt: skip
def test_a_start_that_cannot_work_is_refused_at_once(tmp_path: Path, arguments: list[str], sentence: str) -> None:
    """One sentence on stderr and exit code 2, before anything is started."""
    done = start(tmp_path, *arguments)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert sentence in done.stderr


def test_a_start_that_is_refused_is_json_where_the_log_is(tmp_path: Path) -> None:
    """The same sentence, as the one line of the log."""
    done = start(tmp_path, "--host", "192.0.2.1", LOG_FORMAT="json")
    told = json.loads(done.stderr)
    assert (done.returncode, told["level"]) == (2, "CRITICAL")
    assert told["message"].startswith("--host must be an address or a name of this machine")


def test_a_port_that_is_in_use_is_a_sentence(tmp_path: Path) -> None:
    """With the port and what to do; `label-studio-ml start .` says it too, and drops the exit code."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for command, code in ((ALONE, 2), (STARTED, 0)):
            done = subprocess.run(
                [*map(str, command), "-p", str(port)], cwd=REPOSITORY, env=environ(tmp_path), capture_output=True,
                text=True, timeout=60, check=False,
            )  # fmt: skip
            assert done.returncode == code
            assert done.stderr.splitlines()[-1].startswith(f"Port {port} of 127.0.0.1 is in use, perhaps by a backend")
            assert done.stderr.count("\n") == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
def test_a_port_for_administrators_is_a_sentence() -> None:
    """For a user who is none."""
    code = (
        "import os; from celestial_backend.web.server import _check_address\n"
        "os.setuid(65534); _check_address('127.0.0.1', 80)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False
    )
    limit = int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text())
    assert ("Port 80 is for administrators alone" in done.stderr) == (limit > 80)


@pytest.mark.parametrize("program", [ALONE[1:], [*map(str, STARTED), "--"]], ids=["python", "label-studio-ml"])
def test_help_shows_our_arguments(tmp_path: Path, program: list[str]) -> None:
    """The SDK answers `label-studio-ml start . --help` itself; two dashes lead past it."""
    done = subprocess.run(
        [sys.executable, *program, "--help"], cwd=REPOSITORY, env=environ(tmp_path), capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0
    assert "--no-worker" in done.stdout


def test_all_of_a_server_that_logs_json_is_json(tmp_path: Path) -> None:
    """Web server, worker and training: an object a line, with project, tasks, failed and seconds of each request."""
    server = BackendServer(tmp_path, LOG_FORMAT="json")
    try:
        server.predict(["nowhere"])
        event = {"action": "START_TRAINING", "project": {"id": 7, "label_config": label_config()}}
        assert server.post("/webhook", event).status_code == 201
        server.wait_for_log('"logger": "celestial_backend.worker.training"', seconds=60)
    finally:
        server.stop()
    lines = [json.loads(line) for line in server.log_text().splitlines()]
    assert {"gunicorn", "celestial_backend.web.app", "celestial_backend.jobs.trainings"} <= {
        line["logger"] for line in lines
    }
    (asked,) = (line for line in lines if line.get("path") == "/predict")
    assert (asked["project"], asked["tasks"], asked["failed"], asked["status"]) == ("1", 1, 1, 200)
    assert asked["seconds"] > 0


def test_check_ends_with_a_sentence_when_the_model_is_broken(tmp_path: Path) -> None:
    """`--check` loads the model before it serves; what is wrong stands on stderr, with exit code 3."""
    (tmp_path / "broken.bentomodel").write_bytes(b"broken")
    done = start(tmp_path, "--check", CELESTIAL_BENTOMODEL=str(tmp_path / "broken.bentomodel"))
    assert done.returncode == 3
    assert "must be one that bentoml.models.export_model wrote, and broken.bentomodel is none" in done.stderr
    assert "Traceback" not in done.stderr
    missing = start(tmp_path, "--check", CELESTIAL_MODEL="celestial_bodies_classifier_model:gone")
    assert missing.returncode == 3
    assert "celestial_bodies_classifier_model:gone is not in the BentoML store" in missing.stderr


def test_a_broken_model_does_not_keep_the_server_down(backends: Backends) -> None:
    """Without `--check` it serves: /health is up, /setup and the log say what is wrong."""
    server = backends(CELESTIAL_MODEL="celestial_bodies_classifier_model:gone")
    setup = server.post("/setup", {"project": "1.1", "schema": label_config()})
    assert setup.status_code == 503
    assert "Set CELESTIAL_MODEL to one that is there" in setup.reason
    server.wait_for_log("Set CELESTIAL_MODEL")
    assert "Traceback" not in server.log_text()


@pytest.mark.parametrize(
    ("arguments", "variable"),
    [
        pytest.param(["--log-level", "LOUD"], "invalid choice", id="log level"),
        pytest.param(["-p", "0"], "PORT must be a port number", id="port"),
        pytest.param(["--basic-auth-user", "u"], "must be set together", id="half a credential"),
    ],
)
def test_arguments_are_checked_like_settings(tmp_path: Path, arguments: list[str], variable: str) -> None:
    """An argument takes its setting's place, and its rules."""
    done = start(tmp_path, *arguments)
    assert done.returncode == 2
    assert variable in done.stderr


def test_every_argument_of_the_sdks_template_has_its_effect(tmp_path: Path) -> None:
    """Host, port, log level, state folder, debug, check and basic auth arrive through `label-studio-ml start`."""
    port = free_port()
    arguments = [
        "-p", str(port), "--host", "127.0.0.1", "-d", "--model-dir", str(tmp_path / "elsewhere"), "--check",
        "--basic-auth-user", "u", "--basic-auth-pass", "p",
    ]  # fmt: skip
    server = ServerProcess(
        [BIN / "label-studio-ml", "start", ".", *arguments],
        cwd=REPOSITORY, environ=environ(tmp_path), log=tmp_path / "log",
    )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        server.wait_for_answer(f"{url}/health", 90, auth=("u", "p"))
        assert requests.get(f"{url}/health", timeout=5).status_code == 401
        server.wait_for_log("DEBUG celestial_backend.web.app: GET /health")
        server.wait_for_log("Loaded", seconds=60)
        event = {"action": "START_TRAINING", "project": {"id": 7, "label_config": label_config()}}
        assert requests.post(f"{url}/webhook", json=event, auth=("u", "p"), timeout=30).status_code == 201
        assert (tmp_path / "elsewhere" / "celestial.db").exists()
        listening = [c.laddr.ip for c in psutil.net_connections("tcp") if c.laddr.port == port and c.status == "LISTEN"]
        assert set(listening) == {"127.0.0.1"}
    finally:
        server.stop()


@pytest.mark.parametrize("whose", ["linked", "another user's", "own"])
def test_a_start_clears_up_folders_of_its_own_user_alone(
    whose: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Anybody may put folders and links into the temporary folder; nothing is written or removed through them."""
    monkeypatch.setenv(SHARED, "")  # the start sets it
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = tmp_path / ("precious" if whose == "linked" else "celestial-metrics-left")
    folder.mkdir()
    (folder / "life").write_text("precious")
    if whose == "linked":
        (tmp_path / "celestial-metrics-link").symlink_to(folder)
    if whose == "another user's":
        user = os.getuid()
        monkeypatch.setattr(os, "getuid", lambda: user + 1)
    with _shared_metrics():
        assert folder.exists() == (whose != "own")
        assert whose == "own" or (folder / "life").read_text() == "precious"
