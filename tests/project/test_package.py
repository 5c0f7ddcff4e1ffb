"""The package as people install it: a wheel built from the checkout, in a virtual environment that sees no checkout."""

from __future__ import annotations

import ast
import base64
import json
import re
import shutil
import subprocess
import sys
import sysconfig
import time
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from email.message import Message
from email.parser import Parser
from importlib import metadata
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import pytest
import requests
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from celestial_backend import __version__
from celestial_backend.commands.cli import main
from celestial_backend.database import Database
from celestial_backend.jobs.ledger import Ledger
from celestial_backend.planets.renderer import render
from celestial_backend.settings import Settings
from tests.support.backend_server import REPOSITORY, ServerProcess, free_port, label_config, plain_environ

FLASKS_OWN = {"jinja2", "markupsafe", "werkzeug"}  # parts of Flask, which asks for the releases that it needs


class Installed(NamedTuple):
    """The wheel, and the programs of the virtual environment that it was installed into."""

    wheel: Path
    programs: Path

    def run(self, program: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        command, environ = [self.programs / program, *arguments], self.environ(cwd)
        return subprocess.run(command, cwd=cwd, env=environ, capture_output=True, text=True, timeout=120, check=False)

    def environ(self, cwd: Path) -> dict[str, str]:
        """Nothing is set but where models are kept; the state is where it is by itself."""
        folders = {"BENTOML_HOME": str(cwd / "bentoml"), "XDG_DATA_HOME": str(cwd / "share")}
        return plain_environ(self.programs) | folders


def files_of_the_checkout() -> list[str]:
    """All files that git knows or would take."""
    git = shutil.which("git") or "git"
    command = [git, "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.splitlines()
    return [name for name in listed if (REPOSITORY / name).is_file()]


def test_what_programs_leave_behind_is_no_part_of_it() -> None:
    """The databases, logs and copies that come about where the backend and its tests are run; some, tests need."""
    left = {".db", ".sqlite3", ".log", ".pyc", ".orig", ".rej", ".whl", ".bentomodel"}
    files = (name for name in files_of_the_checkout() if not name.startswith("tests/support/"))
    assert [name for name in files if Path(name).suffix in left] == []


def asked_for() -> list[Requirement]:
    lines = [line.split("#")[0].strip() for line in (REPOSITORY / "requirements.txt").read_text().splitlines()]
    return [Requirement(line) for line in lines if line]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """Built from a copy, because a build leaves files beside its sources; nothing is asked of the network."""
    folder = tmp_path_factory.mktemp("package")
    for name in files_of_the_checkout():
        (folder / "checkout" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / name, folder / "checkout" / name)
    (folder / "checkout" / "celestial_backend" / "planets" / "default_model" / "model.weights.h5.part").touch()
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    built = subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-index", "--no-build-isolation", "-w", folder, folder / "checkout"],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stdout + built.stderr
    shutil.rmtree(folder / "checkout")
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "venv", symlinks=True)
    programs = folder / "venv" / "bin"
    subprocess.run(
        [*pip, "--python", programs / "python", "install", "-q", "--no-deps", "--no-index", wheel],
        capture_output=True, timeout=300, check=True,
    )  # fmt: skip
    (site,) = (folder / "venv" / "lib").glob("python*/site-packages")
    (site / "packages-of-the-tests.pth").write_text(sysconfig.get_path("purelib"))
    return Installed(wheel, programs)


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """An empty folder."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    return folder


@pytest.fixture
def server(installed: Installed, elsewhere: Path, tmp_path: Path) -> Iterator[tuple[ServerProcess, str]]:
    """`celestial-backend serve` in an empty folder, and its address."""
    port = free_port()
    command = [installed.programs / "celestial-backend", "serve", "-p", str(port)]
    process = ServerProcess(command, cwd=elsewhere, environ=installed.environ(elsewhere), log=tmp_path / "server.log")
    try:
        process.wait_for_answer(f"http://127.0.0.1:{port}/health", 60)
        yield process, f"http://127.0.0.1:{port}"
    finally:
        process.stop()


# What is in the wheel


def test_the_wheel_holds_the_package_and_nothing_else(installed: Installed) -> None:
    """Every file of the package, the model and the page included; no test, no benchmark, nothing left by accident."""
    package = {name for name in files_of_the_checkout() if name.startswith("celestial_backend/")}
    about = f"celestial_backend-{__version__}.dist-info"
    made = {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE", "top_level.txt"}
    names = zipfile.ZipFile(installed.wheel).namelist()
    assert set(names) == package | {f"{about}/{name}" for name in made}
    assert len(names) == len(set(names))


def told(wheel: Path) -> Message:
    name = f"celestial_backend-{__version__}.dist-info/METADATA"
    return Parser().parsestr(zipfile.ZipFile(wheel).read(name).decode())


def test_the_metadata_say_what_the_project_says(installed: Installed) -> None:
    """Version, licence, Python and every package of requirements.txt, with its bounds."""
    about = told(installed.wheel)
    assert (about["Name"], about["Version"]) == ("celestial-backend", __version__)
    assert sorted(str(Requirement(line)) for line in about.get_all("Requires-Dist")) == sorted(map(str, asked_for()))
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert sorted(about["Requires-Python"].split(",")) == sorted(project["requires-python"].split(","))
    assert (about["License-Expression"], about["License-File"]) == ("Apache-2.0", "LICENSE")
    text = zipfile.ZipFile(installed.wheel).read(f"celestial_backend-{__version__}.dist-info/licenses/LICENSE").decode()
    assert text == (REPOSITORY / "LICENSE").read_text()
    assert "Version 2.0, January 2004" in text
    assert "Copyright 2026 The celestial-backend authors" in text


def test_the_changelog_ends_with_this_version() -> None:
    """The newest release in it is the package's version, with the day of it."""
    text = (REPOSITORY / "CHANGELOG.md").read_text()
    releases = re.findall(r"^## \[(\d[^\]]*)\] - (\d{4}-\d\d-\d\d)$", text, re.MULTILINE)
    assert releases[0][0] == __version__


def test_all_that_is_imported_is_asked_for() -> None:
    """No package is there only because another one happens to bring it."""
    roots = set()
    for file in (REPOSITORY / "celestial_backend").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom):
                roots.add((node.module or "").split(".")[0])
            elif isinstance(node, ast.Import):
                roots |= {alias.name.split(".")[0] for alias in node.names}
    known = metadata.packages_distributions()
    foreign = roots - sys.stdlib_module_names - {"celestial_backend"}
    asked = {canonicalize_name(line.name) for line in asked_for()} | FLASKS_OWN | {"tensorflow-cpu"}
    assert {"flask", "tensorflow"} <= foreign
    assert {root for root in foreign if not asked & set(map(canonicalize_name, known.get(root, [])))} == set()


# What is installed


def test_the_command_tells_version_and_commands(installed: Installed, elsewhere: Path) -> None:
    """`celestial-backend` and `python -m celestial_backend` are one command, and asking for help makes no folder."""
    place = installed.run("python", "-c", "import celestial_backend as it; print(it.__file__)", cwd=elsewhere).stdout
    assert place.startswith(str(installed.programs.parent))
    for command in (["celestial-backend"], ["python", "-m", "celestial_backend"]):
        asked = installed.run(*command, "--version", cwd=elsewhere)
        assert asked.stdout == f"celestial-backend, version {__version__}\n", asked.stderr
        helped = installed.run(*command, "--help", cwd=elsewhere).stdout
        assert set(main.commands) <= set(re.findall(r"^  ([a-z-]+) ", helped, re.MULTILINE))
        assert "--model-dir" in installed.run(*command, "serve", "--help", cwd=elsewhere).stdout
    assert list(elsewhere.iterdir()) == []


def test_the_server_predicts_with_the_model_inside(
    installed: Installed, elsewhere: Path, server: tuple[ServerProcess, str]
) -> None:
    """In an empty folder: health, a prediction, the pages, and then `doctor` and `models` beside the server."""
    process, url = server
    assert requests.get(f"{url}/health", timeout=10).json()["version"] == __version__
    drawn = BytesIO()
    render("Saturn", seed=1, size_px=128).save(drawn, "PNG")
    picture = f"data:image/png;base64,{base64.b64encode(drawn.getvalue()).decode()}"
    body = {"project": "1.1", "label_config": label_config(), "tasks": [{"id": 1, "data": {"image": picture}}]}
    (prediction,) = requests.post(f"{url}/predict", json=body, timeout=60).json()["results"]
    assert prediction["result"][0]["value"]["choices"] == ["Saturn"]
    assert requests.get(f"{url}/openapi.json", timeout=10).json()["info"]["version"] == __version__
    page = requests.get(f"{url}/docs", timeout=10)
    assert (page.status_code, page.headers["Content-Type"].split(";")[0]) == (200, "text/html")
    assert "/predict" in page.text

    ledger = Ledger(Database(Settings(model_dir=elsewhere / "share" / "celestial-backend")))
    while not ledger.workers():  # the server starts one beside itself
        process.wait_for_answer(f"{url}/health", 60)
        time.sleep(0.1)
    looked = installed.run("celestial-backend", "doctor", "--backend-url", url, "--json", cwd=elsewhere)
    assert "Traceback" not in looked.stderr
    found = {each["name"]: each for each in json.loads(looked.stdout)["checks"]}
    assert found["Python and packages"]["state"] == "ok", found["Python and packages"]
    assert f"all {len(asked_for())} packages" in found["Python and packages"]["what"]
    assert {found[name]["state"] for name in ("Model", f"Backend at {url}", "Worker")} == {"ok"}, found
    listed = installed.run("celestial-backend", "models", "--json", cwd=elsewhere)
    assert prediction["model_version"] in listed.stdout
    assert {path.name for path in elsewhere.iterdir()} == {"bentoml", "share"}


def test_another_web_server_can_serve_it(installed: Installed, elsewhere: Path, tmp_path: Path) -> None:
    """A gunicorn of one's own finds the app in the package, as it does in `_wsgi.py` of the checkout."""
    port = free_port()
    app = "celestial_backend.web.server:wsgi_app()"
    command = [installed.programs / "python", "-m", "gunicorn", "--bind", f"127.0.0.1:{port}", "--threads", "2", app]
    process = ServerProcess(command, cwd=elsewhere, environ=installed.environ(elsewhere), log=tmp_path / "gunicorn.log")
    try:
        process.wait_for_answer(f"http://127.0.0.1:{port}/health", 60)
        assert requests.get(f"http://127.0.0.1:{port}/health", timeout=10).json()["version"] == __version__
    finally:
        process.stop()


def test_a_bad_argument_is_told_by_the_server_and_a_bad_setting_by_all(installed: Installed, elsewhere: Path) -> None:
    """The arguments of `serve` are the server's own, and stand before the variables."""
    refused = installed.run("celestial-backend", "serve", "--port", "none", cwd=elsewhere)
    assert refused.returncode == 2
    assert "PORT" in refused.stderr
    assert "Traceback" not in refused.stderr
    unknown = installed.run("celestial-backend", "serve", "--no-such-thing", cwd=elsewhere)
    assert unknown.returncode == 2
    assert "celestial-backend serve: error: unrecognized arguments: --no-such-thing" in unknown.stderr
    assert list(elsewhere.iterdir()) == []
