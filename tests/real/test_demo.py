"""`demo`: one command from nothing to pre-labelled tasks, and nothing left when it ends."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import pytest
import requests
from playwright.sync_api import expect

from celestial_backend.commands.demo import MARKER, Server
from celestial_backend.commands.demo import free_port as demo_port
from celestial_backend.errors import StudioError
from tests.support.backend_server import REPOSITORY, free_port
from tests.support.browser import HOW_TO_GET_ONE, annotator, find_chromium
from tests.support.label_studio import label_studio_program

Shown = dict[str, Any]


def arguments(folder: Path, *more: str) -> list[str]:
    """A demonstration in `folder`, with the Label Studio of the tests."""
    return [sys.executable, "-m", "celestial_backend", "demo", "--folder", str(folder), *more]


def done(folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        arguments(folder, *more), cwd=REPOSITORY, env=os.environ, capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip


def inhabitants(folder: Path) -> list[int]:
    """The processes whose command line, or environment, names the folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            about = (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
            if str(folder).encode() in about and int(process.name) != os.getpid():
                found.append(int(process.name))
    return found


def left(folder: Path, seconds: float = 5) -> list[int]:
    deadline = time.monotonic() + seconds
    while (found := inhabitants(folder)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return found


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., tuple[subprocess.Popen[str], Shown]]]:
    """Start a demonstration; what it is and what it printed, once it did."""
    started: list[subprocess.Popen[str]] = []
    logs: list[IO[str]] = []

    def begin(folder: Path) -> tuple[subprocess.Popen[str], Shown]:
        venv = label_studio_program().parents[1]
        command = arguments(folder, "--label-studio-venv", str(venv), "--pictures", "12", "--json")
        logs.append((tmp_path / f"demo-{len(started)}.log").open("w"))
        process = subprocess.Popen(
            command, cwd=REPOSITORY, env=os.environ, stdout=subprocess.PIPE, stderr=logs[-1], text=True,
            start_new_session=True,
        )  # fmt: skip
        started.append(process)
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, (tmp_path / f"demo-{len(started) - 1}.log").read_text()
        return process, dict(json.loads(line))

    yield begin
    for process in started:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(60)
        if process.stdout is not None:
            process.stdout.close()
    for log in logs:
        log.close()
    for one in inhabitants(tmp_path):  # of a demonstration that was killed, if the test went no further
        with contextlib.suppress(ProcessLookupError):
            os.kill(one, signal.SIGKILL)


def looked_at(program: str, root: str, shown: Shown, pictures: Path) -> None:
    """The Data Manager, as the printed sign-in opens it: every task with its picture and one prediction."""
    server: Any = SimpleNamespace(url=root, user=shown["user"], password=shown["password"])
    with annotator(program, server, pictures) as person:
        person.open_project(shown["project"])
        expect(person.page.get_by_text(f"Tasks: {shown['tasks']} / {shown['tasks']}")).to_be_visible()
        expect(person.page.get_by_text(f"Predictions: {shown['predictions']}")).to_be_visible()
        person.page.wait_for_load_state("networkidle")
        person.photograph("demo")


@pytest.mark.timeout(600)
def test_one_command_shows_everything_and_leaves_nothing(
    tmp_path: Path, start: Callable[..., tuple[subprocess.Popen[str], Shown]]
) -> None:
    """Every picture has a prediction; a kill is got over; Ctrl-C leaves no process, and --clean no file."""
    folder = tmp_path / "demo place"
    first, shown = start(folder)
    account = json.loads((folder / "account.json").read_text())
    assert stat.S_IMODE((folder / "account.json").stat().st_mode) == 0o600
    headers = {"Authorization": f"Token {account['token']}"}
    root = shown["url"].split("/projects/")[0]
    tasks = requests.get(f"{root}/api/tasks?project={shown['project']}&fields=all", headers=headers, timeout=30).json()
    assert len(tasks["tasks"]) == shown["tasks"] == 12
    assert [task["total_predictions"] for task in tasks["tasks"]] == [1] * 12
    assert {task["predictions"][0]["model_version"] for task in tasks["tasks"]} == {shown["model_version"]}
    assert all(task["predictions"][0]["score"] > 0 for task in tasks["tasks"])
    session = requests.Session()
    session.get(f"{root}/user/login/", timeout=30)
    form = {"email": shown["user"], "password": shown["password"], "csrfmiddlewaretoken": session.cookies["csrftoken"]}
    session.post(f"{root}/user/login/", data=form, headers={"Referer": root}, timeout=30)
    assert session.get(shown["url"], timeout=30).url == shown["url"]
    if (program := find_chromium()) is not None:
        looked_at(program, root, shown, Path(os.environ.get("TEST_SCREENSHOTS") or tmp_path))
    elif os.environ.get("CI") == "true":
        pytest.fail(HOW_TO_GET_ONE)

    second = done(folder)
    assert second.returncode == 6
    assert "A demonstration runs in" in second.stderr

    first.kill()
    first.wait()
    assert inhabitants(folder), "the servers live on"
    again, more = start(folder)
    assert {name: more[name] for name in ("project", "tasks", "predictions", "password")} == {
        name: shown[name] for name in ("project", "tasks", "predictions", "password")
    }
    models = requests.get(f"{more['url'].split('/projects/')[0]}/api/ml?project={more['project']}", headers=headers,
                          timeout=30).json()  # fmt: skip
    assert [model["url"] for model in models] == [more["backend"]]

    again.send_signal(signal.SIGINT)
    assert again.wait(60) == 0
    assert left(folder) == []
    assert str(folder) in (tmp_path / "demo-1.log").read_text()
    cleaned = done(folder, "--clean")
    assert cleaned.returncode == 0, cleaned.stderr
    assert not folder.exists()


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    """Neither used nor removed, unless it is empty or carries the marker."""
    (tmp_path / "thesis.txt").write_text("mine")
    for option in ("--clean", "--json"):
        refused = done(tmp_path, option)
        assert refused.returncode == 6
        assert "must be empty or of an earlier demonstration" in refused.stderr
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["thesis.txt"]
    assert "There is nothing to remove" in done(tmp_path / "nowhere", "--clean").stderr


def test_a_clean_that_was_cut_short_can_be_done_again(tmp_path: Path) -> None:
    """The marker goes last."""
    folder = tmp_path / "demo"
    (folder / "data").mkdir(parents=True)
    (folder / MARKER).touch()
    assert done(folder, "--clean").returncode == 0
    assert not folder.exists()


def test_an_environment_without_label_studio_is_refused(tmp_path: Path) -> None:
    refused = done(tmp_path / "demo", "--label-studio-venv", str(tmp_path))
    assert refused.returncode == 4
    assert "--label-studio-venv must name" in refused.stderr


def test_a_port_that_is_taken_is_not_given() -> None:
    wanted = free_port()
    assert demo_port(wanted) == wanted
    with socket.socket() as other:
        other.bind(("127.0.0.1", wanted))
        other.listen()
        assert demo_port(wanted) not in (0, wanted)


def test_a_server_that_was_left_behind_is_ended_and_a_stranger_is_not(tmp_path: Path) -> None:
    """The lock tells them apart: a process number alone may long belong to somebody else."""
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    with contextlib.ExitStack() as running:
        stranger = running.enter_context(subprocess.Popen(sleep, start_new_session=True))
        running.callback(stranger.kill)
        (tmp_path / "one.pid").write_text(str(stranger.pid))
        Server(tmp_path, "one").end_leftover()
        assert stranger.poll() is None

        behind = Server(tmp_path, "two")
        running.callback(behind.stop)
        behind.start(sleep, os.environ, tmp_path)
        Server(tmp_path, "two").end_leftover()
        with pytest.raises(StudioError, match=r"two has ended\. Its process was ended by signal 15"):
            behind.see_that_it_runs()
