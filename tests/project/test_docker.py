"""The image and the compose file: read as Docker reads them, and run as far as that goes without Docker."""

from __future__ import annotations

import ast
import base64
import http.server
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from fnmatch import fnmatch
from functools import partial
from io import BytesIO
from ipaddress import collapse_addresses, ip_address, ip_network
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml
from huey.consumer_options import ConsumerConfig, OptionParserHandler

from celestial_backend import __version__
from celestial_backend.planets.renderer import render
from celestial_backend.settings import Settings
from tests.support.backend_server import REPOSITORY, ServerProcess, free_port, label_config, plain_environ
from tests.support.label_studio import VERSION, label_studio_program

UNSET = {"PATH": os.defpath}
HERE = "127.0.0.1"


# How Docker reads the files


def instructions(text: str) -> list[tuple[str, str]]:
    """The Dockerfile's instructions in their order, continuation lines joined, comments left out."""
    lines = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    joined = re.sub(r"\\\n", "", lines)
    return [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in joined.splitlines()) if name]


DOCKERFILE = instructions((REPOSITORY / "Dockerfile").read_text())


def arguments(name: str) -> list[str]:
    return [rest for instruction, rest in DOCKERFILE if instruction == name]


def image_environ() -> dict[str, str]:
    return dict(pair.split("=", 1) for rest in arguments("ENV") for pair in shlex.split(rest))


def healthcheck() -> list[str]:
    return list(json.loads(arguments("HEALTHCHECK")[-1].partition("CMD ")[2]))


def in_context(path: str, ignored: list[str]) -> bool:
    """Whether .dockerignore lets a file into the build: the last pattern that fits it or a folder above it decides."""
    inside = True
    for line in ignored:
        pattern, parts = line.removeprefix("!"), Path(path).parts
        above = ["/".join(parts[: count + 1]) for count in range(len(parts))]
        if any(fnmatch(name, pattern) or fnmatch(f"/{name}", pattern) for name in above):
            inside = line.startswith("!")
    return inside


def filled(node: Any, environ: Mapping[str, str]) -> Any:
    """Compose's interpolation of strings in the form used here, ${NAME:-default}; a default may hold another one."""
    if isinstance(node, dict):
        return {key: filled(value, environ) for key, value in node.items()}
    if isinstance(node, list):
        return [filled(value, environ) for value in node]
    if isinstance(node, str):
        while (found := re.search(r"\$\{(\w+):-([^${}]*)\}", node)) is not None:
            node = node[: found.start()] + (environ.get(found[1]) or found[2]) + node[found.end() :]
        assert "$" not in node, f"not interpolated: {node}"
    return node


def compose(environ: Mapping[str, str] = UNSET) -> dict[str, Any]:
    """The compose file, filled from an environment."""
    return dict(filled(yaml.safe_load((REPOSITORY / "docker-compose.yml").read_text()), environ))


def environment(service: str, environ: Mapping[str, str] = UNSET) -> dict[str, str]:
    return dict(compose(environ)["services"][service]["environment"])


STUDIO, BACKEND, WORKER = (compose()["services"][name] for name in ("label-studio", "backend", "worker"))
BACKEND_ADDRESS = ip_address(BACKEND["networks"]["default"]["ipv4_address"])


# The image


def test_the_frozen_requirements_are_what_gets_installed() -> None:
    """The image runs pip once, with the README's very arguments, on the copied frozen file."""
    pip = [rest for rest in arguments("RUN") if "pip" in rest]
    assert [rest.split(" && ")[0].strip() for rest in pip] == ["pip install --no-deps -r requirements-freeze.txt"]
    order = [(name, rest) for name, rest in DOCKERFILE if name in ("COPY", "RUN")]
    assert order.index(("COPY", "requirements-freeze.txt ./")) < order.index(("RUN", pip[0]))
    assert image_environ()["PIP_NO_CACHE_DIR"] == "1"


def test_the_server_runs_as_a_user_without_rights() -> None:
    """The last USER is made by the image, is not root, and has the number that owns Label Studio's uploads."""
    (user,) = arguments("USER")
    (made,) = [rest for rest in arguments("RUN") if rest.startswith("useradd ")]
    assert made.split()[-1] == user != "root"
    assert "--uid 1001 " in made
    names = [name for name, _ in DOCKERFILE]
    assert max(place for place, name in enumerate(names) if name in ("RUN", "COPY")) < names.index("USER")


def test_all_state_is_on_the_volume() -> None:
    """Both folders that are written to lie on the image's one volume, which the user's home makes writable."""
    (volume,) = arguments("VOLUME")
    assert f"--home-dir {volume} --create-home" in " ".join(arguments("RUN"))
    for name in ("MODEL_DIR", "BENTOML_HOME"):
        assert Path(image_environ()[name]).is_relative_to(volume)
    assert image_environ()["BENTOML_DO_NOT_TRACK"] == "True"


def test_running_requests_end_before_docker_kills() -> None:
    """The image's own server takes the signal, with no shell before it, and has the time that it gives requests."""
    from celestial_backend.web.server import STOP_S

    assert json.loads(arguments("CMD")[0]) == ["python", "_wsgi.py", "--no-worker", "--host", "0.0.0.0"]  # noqa: S104 - in a container
    assert int(BACKEND["stop_grace_period"].removesuffix("s")) > STOP_S


def test_only_what_the_server_needs_gets_into_the_image() -> None:
    """Of the repository's files, the build sees the package, its licence, the entry point and what is asked for."""
    ignored = [line for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    git = shutil.which("git") or "git"
    listed = subprocess.run([git, "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    files = listed.stdout.split("\n")[:-1]
    seen = {file for file in files if in_context(file, ignored)}
    package = {file for file in files if file.startswith("celestial_backend/")}
    assert seen == package | {"LICENSE", "_wsgi.py", "requirements-freeze.txt", "requirements.txt"}
    assert not in_context("celestial_backend/__pycache__/errors.cpython-311.pyc", ignored)
    assert not in_context(".env", ignored), "passwords would get into the image's layers"
    assert not in_context("data/state/anything", ignored)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A folder that holds what the Dockerfile copies, and nothing else; nobody may write to it."""
    folder = tmp_path / "app"
    folder.mkdir()
    for copy in arguments("COPY"):
        *sources, target = [word for word in copy.split() if not word.startswith("--")]
        for source in sources:
            path = REPOSITORY / source
            assert path.exists(), f"the Dockerfile copies {source}, which is not there"
            if path.is_dir():
                shutil.copytree(path, folder / target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(path, folder / target)
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o555)
    return folder


def test_everything_that_is_imported_is_copied(image: Path) -> None:
    """Each of our own modules that a copied file imports is a copied file."""
    wanted = set()
    for file in image.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
                wanted |= {node.module} | {f"{node.module}.{name.name}" for name in node.names}
            elif isinstance(node, ast.Import):
                wanted |= {name.name for name in node.names}
    ours = {name for name in wanted if name.split(".")[0] in ("celestial_backend", "_wsgi")}
    there = {".".join(file.relative_to(image).with_suffix("").parts) for file in image.rglob("*.py")}
    there |= {name.removesuffix(".__init__") for name in there}
    lost = {name for name in ours if name not in there and name.rpartition(".")[0] not in there}
    assert "celestial_backend" in {name.split(".")[0] for name in ours}
    assert lost == set()


def environ_beside(image: Path) -> dict[str, str]:
    """The image's environment, with state in the folder that holds the image's."""
    state = {"MODEL_DIR": str(image.parent / "state"), "BENTOML_HOME": str(image.parent / "bentoml")}
    return plain_environ(Path(sys.executable).parent) | image_environ() | state


class Served(ServerProcess):
    """The image's CMD, in the image's folder, with state of its own."""

    def __init__(self, image: Path, **settings: str) -> None:
        self.port = free_port()
        self.environ = environ_beside(image) | {"PORT": str(self.port)} | settings
        log = image.parent / "image.log"
        program, *rest = json.loads(arguments("CMD")[0])
        assert program == "python"
        super().__init__([sys.executable, *rest], cwd=image, environ=self.environ, log=log)
        try:
            self.wait_for_answer(f"http://{HERE}:{self.port}/health", 60)
        except BaseException:
            self.stop()
            raise

    def check(self, **settings: str) -> int:
        """The exit code of the image's HEALTHCHECK."""
        return run_healthcheck(self.environ | settings)


def test_the_image_knows_its_version_and_what_it_asks_for(image: Path) -> None:
    """`--version` is the package's, and `doctor` looks at every package of requirements.txt."""
    command, environ = [sys.executable, "-m", "celestial_backend"], environ_beside(image)
    ran = partial(subprocess.run, cwd=image, env=environ, capture_output=True, text=True, timeout=120, check=False)
    assert ran([*command, "--version"]).stdout == f"celestial-backend, version {__version__}\n"
    found = json.loads(ran([*command, "doctor", "--json"]).stdout)["checks"][0]
    assert found["state"] == "ok", found
    asked = [line for line in (REPOSITORY / "requirements.txt").read_text().splitlines() if line[:1] not in ("", "#")]
    assert f"all {len(asked)} packages" in found["what"]


def run_healthcheck(environ: Mapping[str, str]) -> int:
    program, *rest = healthcheck()
    assert program == "python"
    done = subprocess.run(
        [sys.executable, *rest], cwd=REPOSITORY, env=dict(environ), capture_output=True, timeout=30, check=False
    )
    assert b"Traceback" not in done.stderr
    return done.returncode


@pytest.mark.parametrize(
    "auth",
    [
        pytest.param({}, id="open"),
        pytest.param({"BASIC_AUTH_USER": "studio", "BASIC_AUTH_PASS": "a: b%ü"}, id="basic-auth"),
    ],
)
def test_the_image_serves_is_found_healthy_and_stops_in_order(image: Path, auth: dict[str, str]) -> None:
    """CMD serves from a read-only folder, HEALTHCHECK finds it healthy with its password, SIGTERM ends it with 0."""
    server = Served(image, **auth)
    try:
        assert server.check() == 0
        assert server.check(http_proxy=f"http://{HERE}:9", HTTP_PROXY=f"http://{HERE}:9") == 0
        if auth:
            assert server.check(BASIC_AUTH_PASS="wrong") != 0
        server.process.terminate()
        assert server.process.wait(timeout=20) == 0, server.log_tail()
        assert server.check() != 0
    finally:
        server.stop()


class _Answers(http.server.BaseHTTPRequestHandler):
    """Answers with the server's status and body, and keeps what it was asked."""

    def do_GET(self) -> None:
        server: Any = self.server
        server.seen.append((self.path, self.headers["Authorization"]))
        server.may_answer.wait(30)
        self.send_response(server.status)
        self.end_headers()
        self.wfile.write(server.body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def answering() -> Iterator[Any]:
    """A local HTTP server whose `status` and `body` can be set and whose `seen` tells what was asked."""
    server: Any = http.server.ThreadingHTTPServer((HERE, 0), _Answers)
    server.seen, server.status, server.body, server.may_answer = [], 200, b"", threading.Event()
    server.may_answer.set()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(("status", "healthy"), [(200, True), (401, False), (500, False), (503, False)])
def test_the_healthcheck_wants_status_200(answering: Any, status: int, healthy: bool) -> None:
    """The image's HEALTHCHECK asks /health with the password that is set, and believes 200 alone."""
    answering.status = status
    environ = {"PORT": str(answering.server_port), "BASIC_AUTH_USER": "studio", "BASIC_AUTH_PASS": "secret"}
    assert (run_healthcheck(UNSET | environ) == 0) is healthy
    assert answering.seen == [("/health", "Basic " + base64.b64encode(b"studio:secret").decode())]


def test_label_studios_healthcheck_wants_status_200(answering: Any) -> None:
    """The compose file's check of Label Studio believes an answer of 200 and no other."""
    kind, program, *rest = STUDIO["healthcheck"]["test"]
    assert (kind, program) == ("CMD", "python3")
    command = [sys.executable, *(part.replace("8080", str(answering.server_port)) for part in rest)]
    for status, healthy in ((200, True), (502, False)):
        answering.status = status
        done = subprocess.run(command, env=UNSET, capture_output=True, timeout=30, check=False)
        assert (done.returncode == 0) is healthy
    assert {path for path, _ in answering.seen} == {"/health"}


def test_a_running_request_is_answered_before_the_server_stops(image: Path, answering: Any) -> None:
    """A prediction that waits for its picture when SIGTERM comes is made, and then the server ends with 0."""
    drawn = BytesIO()
    render("Saturn", seed=1, size_px=64).save(drawn, "PNG")
    answering.body = drawn.getvalue()
    answering.may_answer.clear()
    server = Served(image, CELESTIAL_ALLOWED_HOSTS=HERE)
    task = {"id": 1, "data": {"image": f"http://{HERE}:{answering.server_port}/saturn.png"}}
    body = {"project": "1.1", "label_config": label_config(), "tasks": [task]}
    try:
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(requests.post, f"http://{HERE}:{server.port}/predict", json=body, timeout=60)
            while not answering.seen:
                assert not asked.done(), asked.result().text
                time.sleep(0.05)
            server.process.terminate()
            server.wait_for_log("Handling signal: term")
            answering.may_answer.set()
            (prediction,) = asked.result().json()["results"]
        assert prediction["result"][0]["value"]["choices"], prediction
        assert server.process.wait(timeout=20) == 0, server.log_tail()
    finally:
        answering.may_answer.set()
        server.stop()


# The compose file


def test_docker_compose_accepts_the_file() -> None:
    """Docker's own reader takes the file, and reads its values as these tests do."""
    docker = shutil.which("docker")
    if docker is None or subprocess.run([docker, "compose", "version"], capture_output=True, check=False).returncode:
        pytest.skip("no docker client with compose on this machine")
    command = [docker, "compose", "--env-file", os.devnull, "config", "--format", "json"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    read = json.loads(done.stdout)["services"]
    for name in ("label-studio", "backend", "worker"):
        assert read[name]["environment"] == environment(name)


def test_an_upgrade_builds_an_image_of_its_own() -> None:
    """`up` builds what is not there, and an image of the release before has another name."""
    assert BACKEND["image"] == WORKER["image"] == f"celestial-backend:{__version__}"


def test_label_studio_is_the_release_that_the_tests_run_against() -> None:
    assert STUDIO["image"] == f"heartexlabs/label-studio:{VERSION}"


def built_in_list() -> list[str]:
    """The networks that Label Studio itself refuses, from its own source."""
    venv = label_studio_program().parent.parent
    (source,) = venv.glob("lib/python3*/site-packages/label_studio/core/utils/io.py")
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "default_banned_subnets":
            return [str(value) for value in ast.literal_eval(node.value)]
    raise AssertionError(f"{source} holds no list any more")


def test_label_studio_may_reach_the_backend_and_no_other_private_address() -> None:
    """Both protections are on, and the refused networks are Label Studio's own except for one address."""
    settings = environment("label-studio")
    assert settings["ML_BLOCK_LOCAL_IP"] == settings["SSRF_PROTECTION_ENABLED"] == "true"
    assert settings["USE_DEFAULT_BANNED_SUBNETS"] == "false"
    refused = settings["USER_ADDITIONAL_BANNED_SUBNETS"]
    assert not re.search(r"\s", refused), "Label Studio answers 500 to everything when the list has a blank"
    hole, wanted = ip_network(BACKEND_ADDRESS), []
    for network in map(ip_network, built_in_list()):
        inside = network.version == 4 and hole.subnet_of(network)
        wanted += list(network.address_exclude(hole)) if inside else [network]
    networks = [ip_network(text) for text in refused.split(",")]
    for version in (4, 6):
        expected = collapse_addresses(network for network in wanted if network.version == version)
        assert list(collapse_addresses(network for network in networks if network.version == version)) == list(expected)


def test_the_backends_address_is_fixed_and_free() -> None:
    """It lies in the network's pinned range, and Docker gives it to no other container."""
    (pool,) = compose()["networks"]["default"]["ipam"]["config"]
    assert BACKEND_ADDRESS in ip_network(pool["subnet"]).hosts()
    assert BACKEND_ADDRESS not in ip_network(pool["ip_range"])
    assert str(BACKEND_ADDRESS) != pool["gateway"]
    assert ip_network(pool["ip_range"]).subnet_of(ip_network(pool["subnet"]))


def test_the_backends_name_has_a_dot() -> None:
    """Label Studio makes no webhook for a name without one, and says nothing."""
    (alias,) = BACKEND["networks"]["default"]["aliases"]
    assert alias == "ml-backend.internal"


def test_label_studio_is_published_to_this_machine_alone_unless_asked() -> None:
    """Anybody who reaches Label Studio can sign up, so other machines are let in on purpose only."""
    assert STUDIO["ports"] == [f"{HERE}:8080:8080"]
    other = {"LABEL_STUDIO_PORT": "8081"}
    assert compose(other)["services"]["label-studio"]["ports"] == [f"{HERE}:8081:8080"]
    assert environment("backend", other)["LABEL_STUDIO_HOST"] == "http://localhost:8081"
    everywhere = compose({"LABEL_STUDIO_ADDRESS": "0.0.0.0"})  # noqa: S104
    assert everywhere["services"]["label-studio"]["ports"] == ["0.0.0.0:8080:8080"]
    assert "ports" not in BACKEND


def test_one_token_is_shared_and_another_can_be_given() -> None:
    """A token in .env is Label Studio's and the backend's; a later personal access token goes to the backend alone."""
    shared = {"LABEL_STUDIO_USER_TOKEN": "0123456789abcdef"}
    assert environment("label-studio", shared)["LABEL_STUDIO_USER_TOKEN"] == "0123456789abcdef"
    assert environment("label-studio", shared)["LABEL_STUDIO_ENABLE_LEGACY_API_TOKEN"] == "true"
    assert environment("backend", shared)["LABEL_STUDIO_API_KEY"] == "0123456789abcdef"
    both = shared | {"LABEL_STUDIO_API_KEY": "personal"}
    assert environment("label-studio", both)["LABEL_STUDIO_USER_TOKEN"] == "0123456789abcdef"
    assert environment("backend", both)["LABEL_STUDIO_API_KEY"] == "personal"


def test_no_password_or_token_stands_in_the_file() -> None:
    """With nothing set there is no account that a stranger could know, and the backend has no token."""
    for name in ("LABEL_STUDIO_USERNAME", "LABEL_STUDIO_PASSWORD", "LABEL_STUDIO_USER_TOKEN"):
        assert environment("label-studio")[name] == ""
    for name in ("LABEL_STUDIO_API_KEY", "BASIC_AUTH_USER", "BASIC_AUTH_PASS"):
        assert environment("backend")[name] == ""


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"LOG_LEVEL": "DEBUG", "WORKERS": "2", "LABEL_STUDIO_API_KEY": "token", "LABEL_STUDIO_HOST": "https://l.example"},
    ],
)
def test_the_backend_can_read_its_settings(tmp_path: Path, given: dict[str, str]) -> None:
    """What the compose file sets is a valid set of settings, with nothing in .env and with something."""
    (tmp_path / "media").mkdir()
    settings = image_environ() | environment("backend", given) | {"CELESTIAL_LABEL_STUDIO_DATA": str(tmp_path)}
    read = Settings.from_environ(settings)
    assert read.label_studio_url == "http://label-studio:8080"
    assert read.studio_link == given.get("LABEL_STUDIO_HOST", "http://localhost:8080")
    assert f"{read.address}/" == f"http://{BACKEND['networks']['default']['aliases'][0]}:{read.port}/"
    assert read.label_studio_api_key == given.get("LABEL_STUDIO_API_KEY")
    assert (read.log_level, read.workers) == (given.get("LOG_LEVEL", "INFO"), int(given.get("WORKERS", "1")))


def test_every_setting_can_be_made_in_env() -> None:
    """Each setting is the image's, the compose file's, or can be given in .env; those that name a file need a mount."""
    need_mount = {"CELESTIAL_BENTOMODEL", "CELESTIAL_DATA_FOLDER", "LOCAL_FILES_DOCUMENT_ROOT"}
    fixed = {"PORT", "LABEL_STUDIO_URL", "CELESTIAL_LABEL_STUDIO_DATA"} | set(image_environ())
    for variable in {field.metadata["variable"] for field in fields(Settings)} - need_mount - fixed:
        assert environment("backend", {variable: "given"})[variable] == "given"


def test_the_backend_reads_label_studios_pictures_and_nothing_else_of_it() -> None:
    """Only the media folder of Label Studio's data is mounted, read-only, where the setting expects it."""
    (studio,) = STUDIO["volumes"]
    name, data = studio.split(":")
    state, pictures = BACKEND["volumes"]
    assert (pictures["source"], pictures["volume"]["subpath"], pictures["read_only"]) == (name, "media", True)
    assert pictures["volume"]["nocopy"] is True
    assert pictures["target"] == environment("backend")["CELESTIAL_LABEL_STUDIO_DATA"] + "/media"
    assert data == "/label-studio/data"
    assert BACKEND["depends_on"]["label-studio"]["condition"] == "service_healthy"
    assert state == f"state:{arguments('VOLUME')[0]}"
    assert set(compose()["volumes"]) == {name, "state"}


def test_the_containers_have_no_rights_that_they_do_not_need() -> None:
    """No capabilities, new privileges or floods of processes; backend and worker write to volume and memory only."""
    for service in (STUDIO, BACKEND, WORKER):
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert "privileged" not in service
        assert service["pids_limit"] == 4096
    for service in (BACKEND, WORKER):
        assert service["read_only"] is True
        assert service["tmpfs"] == ["/tmp:noexec,nosuid,nodev"]  # noqa: S108


# The worker


def seconds(duration: str) -> int:
    """A duration in the form that Compose takes and this file uses: a number and s or m."""
    return int(duration[:-1]) * {"s": 1, "m": 60}[duration[-1]]


def consumer() -> tuple[ConsumerConfig, str]:
    """What huey makes of the worker's command: its options, and the name of the queue."""
    program, *words = WORKER["command"]
    assert program == "huey_consumer"
    options, (name,) = OptionParserHandler().get_option_parser().parse_args(words)
    config = ConsumerConfig(**{key: value for key, value in vars(options).items() if value is not None})
    config.validate()
    return config, name


def test_the_worker_is_the_backend_with_another_command() -> None:
    """The same image, settings, folders and rights; it says anew when it starts and how it stops, and no more."""
    assert BACKEND.keys() - WORKER.keys() == {"networks"}
    told_apart = {key for key in BACKEND.keys() & WORKER.keys() if BACKEND[key] != WORKER[key]}
    assert told_apart == {"depends_on", "stop_grace_period"}
    assert {"build", "environment", "volumes", "restart"} <= WORKER.keys()


def test_the_worker_starts_after_the_backend() -> None:
    """Two containers that are made at once may both fill the new volume; the backend waits for Label Studio."""
    assert WORKER["depends_on"] == {"backend": {"condition": "service_started"}}
    assert f"state:{arguments('VOLUME')[0]}" in WORKER["volumes"]


def test_the_worker_has_no_port_and_no_fixed_address() -> None:
    """Nobody asks it anything; the image's check knows a worker by its sign of life."""
    assert {"ports", "expose", "networks", "healthcheck"}.isdisjoint(WORKER)


def test_a_stop_lets_the_running_training_end() -> None:
    """Docker sends the signal that huey waits at, waits longer than a training may take, and huey knows no limit."""
    config, _ = consumer()
    assert WORKER["stop_signal"] == f"SIG{config.graceful_signal}"
    assert config.shutdown_timeout is None
    assert seconds(WORKER["stop_grace_period"]) >= Settings().train_max_s + 60


def test_the_worker_takes_one_job_at_a_time_soon_and_looks_after_lost_ones() -> None:
    """One thread, never a forked process; the periodic look at the jobs is on; locks of a second worker stay."""
    config, name = consumer()
    assert (config.workers, config.worker_type) == (1, "thread")
    assert config.periodic
    assert config.check_worker_health
    assert config.max_delay <= 1
    assert not config.flush_locks
    assert name == "celestial_backend.worker.huey"


def catches(pid: int, wanted: signal.Signals) -> bool:
    """Whether a process has a handler of its own for a signal."""
    (caught,) = re.findall(r"^SigCgt:\s*(\w+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return bool(int(caught, 16) >> (wanted - 1) & 1)


def test_the_workers_command_runs_in_the_image_and_ends_at_its_signal(image: Path) -> None:
    """
    The consumer finds the queue, runs in a folder that holds only what is copied, and its stop signal ends it.

    It is healthy from its first sign of life until it has ended, by the image's own check.
    """
    environ = environ_beside(image) | {"PORT": str(free_port())}
    assert run_healthcheck(environ) != 0
    worker = ServerProcess(WORKER["command"], cwd=image, environ=environ, log=image.parent / "worker.log")
    try:
        while run_healthcheck(environ) != 0:
            assert worker.process.poll() is None, worker.log_tail()
        deadline = time.monotonic() + 60
        while worker.process.poll() is None and not catches(worker.process.pid, signal.SIGHUP):  # huey's last step
            assert time.monotonic() < deadline, worker.log_tail()
            time.sleep(0.05)
        worker.process.send_signal(signal.Signals[WORKER["stop_signal"]])
        assert worker.process.wait(timeout=20) == 0, worker.log_tail()
        assert run_healthcheck(environ) != 0
        assert "Traceback" not in worker.log_text()
    finally:
        worker.stop()


def test_the_worker_does_not_start_with_a_setting_that_it_cannot_use(image: Path) -> None:
    """It ends with the sentence that the web server would give."""
    environ = environ_beside(image) | {"CELESTIAL_TRAIN_EVERY": "often"}
    done = subprocess.run(WORKER["command"], cwd=image, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "CELESTIAL_TRAIN_EVERY must be a whole number" in done.stderr
