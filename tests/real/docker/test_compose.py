"""Both compose files on a real engine, from the first build to a backend that is cut off under load."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.real.docker.bases import Bases
from tests.real.docker.engine import NAME, Docker, engine
from tests.support.backend_server import REPOSITORY, label_config

pytestmark = [pytest.mark.docker, pytest.mark.timeout(3600)]

FOLDER = Path(os.environ.get("TEST_DOCKER_FOLDER") or Path.home() / ".cache/celestial-backend/docker")
ACCOUNT = {
    "LABEL_STUDIO_USERNAME": "you@example.com",
    "LABEL_STUDIO_PASSWORD": "a-password-of-your-own",
    "LABEL_STUDIO_USER_TOKEN": "0123456789abcdef" * 2 + "01234567",
}
PICTURES, PROGRAM, STOP = "/tmp/pictures", "/tmp/load.py", "/tmp/stop"  # noqa: S108 - of the containers
COMMAND = ("python", "-m", "celestial_backend")
DRAW = """
from pathlib import Path
from celestial_backend.planets.renderer import render
for name, body in {{"ringed": "Saturn", "red": "Mars"}}.items():
    for seed in range({first}, {first} + 10):
        file = Path("{place}", name, f"{{seed}}.png")
        file.parent.mkdir(parents=True, exist_ok=True)
        render(body, seed=seed, size_px=96).save(file)
"""
STUDIO = """
import json, os, sys, urllib.request
method, path, body = sys.argv[1], sys.argv[2], sys.argv[3]
headers = {"Authorization": "Token " + os.environ["LABEL_STUDIO_API_KEY"], "Content-Type": "application/json"}
url = os.environ["LABEL_STUDIO_URL"] + path
request = urllib.request.Request(url, body.encode() or None, headers, method=method)
print(urllib.request.urlopen(request, timeout=110).read().decode())
"""


def drawn(first: int) -> str:
    """A program that draws twenty pictures, others for each number."""
    return DRAW.format(place=PICTURES, first=first)


def log(text: str) -> None:
    """A line of what is done, with the time, as the run takes minutes; in a file that stays."""
    with (FOLDER / "run.log").open("a") as file:
        file.write(f"{time.strftime('%H:%M:%S')} {text}\n")


class Stack:
    """The containers of one or both compose files."""

    def __init__(self, docker: Docker, files: Sequence[str] = ("docker-compose.yml",)) -> None:
        self.docker = docker
        self._named = [word for file in files for word in ("-f", file)]

    def __call__(self, *words: str, stdin: str = "", seconds: float = 1200) -> str:
        begun = time.monotonic()
        environ = ACCOUNT | {"LABEL_STUDIO_ADDRESS": "127.0.0.3"}
        command = ["compose", "--env-file", os.devnull, "-p", NAME, *self._named, *words]
        told = self.docker(*command, cwd=REPOSITORY, stdin=stdin, seconds=seconds, **environ)
        if words[0] not in ("exec", "logs", "ps"):
            log(f"{time.monotonic() - begun:5.1f} s  docker compose {' '.join(words)}")
        return told

    def ours(self, *words: str) -> Any:
        """What one of our commands prints as JSON, run inside a backend."""
        return json.loads(self("exec", "-T", "backend", *COMMAND, *words, "--json"))

    def studio(self, method: str, path: str, body: Any = None) -> Any:
        """What Label Studio's API answers."""
        words = ["exec", "-T", "backend", "python", "-c", STUDIO, method, path, json.dumps(body) if body else ""]
        return json.loads(self(*words))

    def ids(self, service: str) -> list[str]:
        return self("ps", "-q", service).split()

    @property
    def image(self) -> str:
        """The name of the backend's."""
        return self.docker("inspect", "--format", "{{.Config.Image}}", self.ids("backend")[0]).strip()

    def trained(self, project: int) -> str:
        """The state of the last training of a project, when it has ended."""
        deadline = time.monotonic() + 300
        while True:
            jobs = self.ours("jobs", "--project", str(project))
            if jobs and jobs[0]["ended_at"]:
                return str(jobs[0]["state"])
            assert time.monotonic() < deadline, jobs
            time.sleep(1)

    def logs(self) -> str:
        return self("logs", "--no-color", "--tail", "60")


@pytest.fixture(scope="module")
def docker() -> Iterator[Docker]:
    FOLDER.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    with engine(FOLDER) as found:
        log(f"{found.versions}, up after {time.monotonic() - begun:.0f} s")
        Bases(found, FOLDER).make()
        log(f"bases after {time.monotonic() - begun:.0f} s")
        yield found


@contextmanager
def up(docker: Docker, *files: str) -> Iterator[Stack]:
    stack = Stack(docker, files)
    stack("down", "--volumes", "--timeout", "0")  # of a run that was killed
    try:
        stack("up", "--build", "--detach", "--wait")
        yield stack
    except BaseException:
        log(stack.logs())
        raise
    finally:
        stack("down", "--volumes", "--timeout", "0")


def connected(stack: Stack) -> int:
    """A project of twenty labelled pictures that the backend has learned from."""
    stack("exec", "-T", "backend", "python", "-", stdin=drawn(0))
    made = stack.ours("connect", PICTURES, "--title", "Planets", "--labelled")
    assert stack.trained(made["project"]) == "published"
    return int(made["project"])


def predicted(stack: Stack, project: int) -> int:
    """How many tasks of a project hold a prediction after Label Studio has asked for all."""
    stack.studio("POST", f"/api/dm/actions?project={project}&id=retrieve_tasks_predictions",
                 {"project": project, "selectedItems": {"all": True, "excluded": []}})  # fmt: skip
    tasks = stack.studio("GET", f"/api/tasks?project={project}&fields=all&page_size=100")["tasks"]
    return sum(bool(task["total_predictions"]) for task in tasks)


def test_the_plain_file(docker: Docker) -> None:
    """Built, healthy, connected, trained by labels' events, killed, stopped, and back with all that it knew."""
    with up(docker, "docker-compose.yml") as stack:
        size = int(docker("image", "inspect", "--format", "{{.Size}}", stack.image))
        log(f"the image has {size / 1e9:.2f} GB")
        assert size < 2.2e9
        found = stack.ours("doctor")
        assert [check for check in found["checks"] if check["state"] == "fail"] == []

        project = connected(stack)
        assert predicted(stack, project) == 20

        stack("exec", "-T", "backend", "python", "-", stdin=drawn(10))
        (published,) = stack.ours("jobs")
        stack.ours("connect", PICTURES, "--title", "Planets", "--labelled")
        while len(stack.ours("jobs")) < 2:  # Label Studio tells the backend of the labels
            time.sleep(1)
        stack.trained(project)
        live = stack.ours("models", "--project", str(project))

        (backend,) = stack.ids("backend")
        os.kill(int(docker("inspect", "--format", "{{.State.Pid}}", backend)), signal.SIGKILL)
        stack("up", "--detach", "--wait")
        assert predicted(stack, project) == 40

        begun = time.monotonic()
        stack("stop")
        assert time.monotonic() - begun < 30
        stack("up", "--detach", "--wait")
        assert stack.ours("models", "--project", str(project)) == live
        assert predicted(stack, project) == 40
        assert published["project"] == str(project)


class Load:
    """Batches that are asked for in a container beside the others, while something happens to these."""

    def __init__(self, stack: Stack) -> None:
        self._docker = stack.docker
        words = ["--detach", "--rm", "--name", f"{NAME}-load", "--network", f"{NAME}_default", "--init"]
        self._docker("run", *words, stack.image, "sleep", "infinity")
        program = Path(__file__).with_name("load.py").read_text()
        self._inside("tee", PROGRAM, stdin=program)

    @contextmanager
    def during(self, what: str) -> Iterator[None]:
        """Nothing that is asked for meanwhile is lost."""
        self._inside("rm", "-f", STOP)
        begun = time.monotonic()
        with ThreadPoolExecutor(1) as pool:
            asking = pool.submit(self._inside, "env", "PYTHONPATH=/app", "python", PROGRAM, label_config())
            try:
                time.sleep(5)  # so that some are on their way
                yield
                time.sleep(5)
            finally:
                self._inside("touch", STOP)
            told = json.loads(asking.result())
        log(f"{time.monotonic() - begun:5.1f} s  {what}: {told['asked']} asked for, lost: {told['lost']}")
        assert told["asked"] > 0
        assert told["lost"] == []

    def _inside(self, *words: str, stdin: str = "") -> str:
        return self._docker("exec", "--interactive", f"{NAME}-load", *words, stdin=stdin)

    def end(self) -> None:
        self._docker("rm", "--force", f"{NAME}-load")


def test_the_file_for_several(docker: Docker) -> None:
    """Backends are killed, added, taken away, replaced and cut off under load, and no prediction is lost."""
    with up(docker, "docker-compose.yml", "docker-compose.scale.yml") as stack:
        project = connected(stack)
        assert predicted(stack, project) == 20
        assert len(stack.ids("backend")) == 3
        load = Load(stack)
        scale = ["up", "--detach", "--no-deps", "--no-recreate", "--wait", "--scale"]
        try:
            with load.during("a backend is killed"):
                docker("kill", "--signal", "KILL", stack.ids("backend")[0])
            with load.during("3 to 5"):
                stack(*scale, "backend=5", "backend")
            with load.during("5 to 2"):
                stack(*scale, "backend=2", "backend")
            with load.during("all are replaced"):
                old = stack.ids("backend")
                stack(*scale, "backend=4", "backend")
                docker("stop", *old)
                docker("rm", *old)
                stack("up", "--detach", "--no-deps", "worker")
            assert len(stack.ids("backend")) == 2
            assert not set(old) & set(stack.ids("backend"))
            cut = stack.ids("backend")[0]
            with load.during("cut off and joined again"):
                docker("network", "disconnect", f"{NAME}_default", cut)
                time.sleep(15)
                docker("network", "connect", "--alias", "backend", f"{NAME}_default", cut)
            stack("kill", "--signal", "KILL", "worker")
            stack("up", "--detach", "--wait")
            assert predicted(stack, project) == 20
        finally:
            load.end()
