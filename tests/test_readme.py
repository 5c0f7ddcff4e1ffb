"""The README: what it shows is run or read by these tests, so that it cannot go stale unseen."""

from __future__ import annotations

import ast
import base64
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from backend_server import BODIES, REPOSITORY, Backends, plain_environ
from label_studio import LabelStudioServer, networks_without

from celestial_backend.classifier import HOOKS
from celestial_backend.labels import ChoiceMap
from celestial_backend.settings import MODEL_NAME, Settings

STARTED_IN = Path.cwd()  # the settings' defaults are resolved when they are imported
README = (REPOSITORY / "README.md").read_text()
BLOCKS = re.findall(r"^( *)```(\w*)\n(.*?)^ *```$", README, re.DOTALL | re.MULTILINE)
SHELL = [re.sub(r" *\\\n\s*", " ", text) for _, kind, text in BLOCKS if kind == "sh"]
COMMANDS = [line.strip() for text in SHELL for line in text.splitlines()]
LABEL_STUDIOS_OWN = {
    "LABEL_STUDIO_USERNAME",
    "LABEL_STUDIO_PASSWORD",
    "LABEL_STUDIO_USER_TOKEN",
    "LABEL_STUDIO_ENABLE_LEGACY_API_TOKEN",
    "LABEL_STUDIO_HOST",
    "USE_DEFAULT_BANNED_SUBNETS",
    "USER_ADDITIONAL_BANNED_SUBNETS",
    "ML_BLOCK_LOCAL_IP",
    "SSRF_PROTECTION_ENABLED",
    "ML_TIMEOUT_PREDICT",
    "LOCAL_FILES_SERVING_ENABLED",
}
OTHERS = {"LABEL_STUDIO_ADDRESS", "TEST_CASES_TIMES", "TEST_LABEL_STUDIO_VENV", "PROMETHEUS_MULTIPROC_DIR"}


def block(kind: str, holding: str = "") -> str:
    """The one code block of a kind that holds a text."""
    (found,) = [text for _, shown, text in BLOCKS if shown == kind and holding in text]
    return found


def rows(heading: str) -> list[list[str]]:
    """The cells of the first table below a heading, without its head."""
    section = README.split(f"\n{heading}\n", 1)[1]
    lines = re.search(r"^\|.*?(?=\n[^|]|\Z)", section, re.DOTALL | re.MULTILINE)
    assert lines is not None
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[0].splitlines()[2:]]


def default(value: object) -> str:
    """How the table writes a default."""
    if value is None or value == ():
        return "none"
    if isinstance(value, Path):
        here = value.is_relative_to(STARTED_IN)
        value = f"./{value.relative_to(STARTED_IN)}" if here else str(value).replace(str(Path.home()), "~", 1)
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def test_the_table_of_settings_is_the_dataclass() -> None:
    """Every setting has its row, in the order of the code, with its default and its sentence."""
    declared = [(field.metadata, default(field.default)) for field in fields(Settings)]
    assert rows("## Settings") == [[f"`{about['variable']}`", shown, about["about"]] for about, shown in declared]


def test_the_defaults_in_the_table_can_be_set() -> None:
    """A variable set to its default in the table changes nothing."""
    plain = Settings.from_environ({})
    for variable, shown, _ in rows("## Settings"):
        if shown != "none":
            assert Settings.from_environ({variable.strip("`"): shown.strip("`").replace("./", "")}) == plain


def test_every_variable_that_the_text_names_exists() -> None:
    """A renamed setting leaves no old name behind."""
    text = re.sub(r"\]\([^)]*\)", "", README)  # without the files that links name
    named = set(re.findall(r"\b[A-Z]+(?:_[A-Z]+)+\b", text))
    assert named - {field.metadata["variable"] for field in fields(Settings)} <= LABEL_STUDIOS_OWN | OTHERS


def anchor(heading: str) -> str:
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def test_links_and_pictures_lead_somewhere() -> None:
    """Relative links name files and headings that are there; pictures are pictures, and have words beside them."""
    anchors = {anchor(heading) for heading in re.findall(r"^#+ (.*)$", README, re.MULTILINE)}
    links = re.findall(r"(!?)\[([^\]]*)\]\(([^)]+)\)", README)
    assert len(links) > 5
    for picture, words, target in links:
        if target.startswith("#"):
            assert target[1:] in anchors, target
        elif "://" not in target:
            path = REPOSITORY / target
            assert path.is_file(), target
            assert not picture or path.read_bytes()[:4] in (b"\x89PNG", b"\xff\xd8\xff\xe0", b"<svg"), target
        assert words
    assert [target for picture, _, target in links if picture], "no picture at all"


# Commands


def _install_and_start() -> None:
    """The image installs with the same words; the backends of all tests are started with the same words."""
    assert "RUN pip install --no-deps -r requirements-freeze.txt\n" in (REPOSITORY / "Dockerfile").read_text()
    assert '"label-studio-ml", "start", "."' in (REPOSITORY / "tests" / "backend_server.py").read_text()


def _in_ci(command: str) -> None:
    script = (REPOSITORY / ".ci" / "run").read_text()
    assert re.search(rf"^ *{re.escape(command)}( \|\| failed=1)?$", script, re.MULTILINE)


def _helped(command: str) -> None:
    """The command exists and takes these arguments; what it does is tested in the files of its parts."""
    environ = plain_environ(Path(sys.executable).parent)
    name, words = re.fullmatch(r"python -m celestial_backend (\w+(?: use)?)(.*)", command).groups()
    asked = [sys.executable, "-m", "celestial_backend", *name.split(), "--help"]
    shown = subprocess.run(asked, cwd=REPOSITORY, env=environ, capture_output=True, text=True, check=True).stdout
    for word in words.replace(" P", "").split():
        assert word in shown


def _benchmarks() -> None:
    """Nothing is measured; the options that the text names are there."""
    asked = [sys.executable, "-m", "benchmarks", "--help"]
    shown = subprocess.run(asked, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    section = README.split("## How fast it is", 1)[1].split("\n## ", 1)[0]
    for option in re.findall(r"--[a-z]+", section):
        assert option in shown


def _consumer() -> None:
    """The name is what the worker's file gives, and the compose file says the same."""
    code = "from celestial_backend.worker import huey; print(huey.name)"
    told = subprocess.check_output([sys.executable, "-c", code], cwd=REPOSITORY, text=True)
    assert told == "celestial\n"
    assert "celestial_backend.worker.huey" in (REPOSITORY / "docker-compose.yml").read_text()


def _compose_up() -> None:
    assert (REPOSITORY / "docker-compose.yml").is_file()  # what it does is tested in test_docker.py


def _compose_scale() -> None:
    """Both files are there; what they do together is tested in test_docker_scale.py and test_scale.py."""
    assert (REPOSITORY / "docker-compose.scale.yml").is_file()


def _worker_image() -> None:
    """It stops as the compose file's worker does, and runs the same command on the same volume."""
    (command,) = [command for command in COMMANDS if command.startswith("docker run") and "huey_consumer" in command]
    compose = yaml.safe_load((REPOSITORY / "docker-compose.yml").read_text())["services"]["worker"]
    assert f"--stop-signal {compose['stop_signal']} " in command
    assert compose["stop_grace_period"] == "35m"
    assert "--stop-timeout 2100 " in command
    assert command.endswith("huey_consumer --quiet --logfile=/dev/null celestial_backend.worker.huey")
    assert " -v celestial-state:/data celestial-backend " in command


def _image() -> None:
    """Name, port and volume of the two commands fit each other and the Dockerfile."""
    dockerfile = (REPOSITORY / "Dockerfile").read_text()
    build, run, _ = [command.split() for command in COMMANDS if command.startswith(("docker build", "docker run"))]
    assert build[:4] == ["docker", "build", "-t", run[-1]]
    port, volume = run[run.index("-p") + 1].split(":")[-1], run[run.index("-v") + 1].split(":")[-1]
    assert f"EXPOSE {port}\n" in dockerfile
    assert f"VOLUME {volume}\n" in dockerfile


CHECKS: dict[str, Any] = {
    "pip install --no-deps -r requirements-freeze.txt && label-studio-ml start .": _install_and_start,
    "pip install --no-deps -r requirements-test-freeze.txt && pytest": _in_ci,
    "ruff check": _in_ci,
    "mypy": _in_ci,
    "pytest": lambda: None,  # this one
    "python -m celestial_backend train FOLDER": _helped,
    "python -m celestial_backend train --project P --from-scratch": _helped,
    "python -m celestial_backend connect FOLDER --title T": _helped,
    "python -m celestial_backend prelabel --project P": _helped,
    "python -m celestial_backend demo": _helped,
    "python -m celestial_backend doctor": _helped,
    "python -m celestial_backend jobs": _helped,
    "python -m celestial_backend models": _helped,
    "python -m celestial_backend models use TAG --project P": _helped,
    "python -m benchmarks": _benchmarks,
    "huey_consumer celestial_backend.worker.huey": _consumer,
    "docker compose up": _compose_up,
    "docker compose -f docker-compose.yml -f docker-compose.scale.yml up": _compose_scale,
    "docker build -t celestial-backend .": _image,
    "docker run --rm -p 127.0.0.1:9090:9090 -v celestial-state:/data celestial-backend": _image,
    "docker run --rm --init --stop-signal SIGINT --stop-timeout 2100 -v celestial-state:/data celestial-backend "
    "huey_consumer --quiet --logfile=/dev/null celestial_backend.worker.huey": _worker_image,
}


@pytest.mark.parametrize("command", [line for line in COMMANDS if not line.startswith("curl")])
def test_a_command_does_what_the_readme_says(command: str) -> None:
    """Each line of each shell block has its check; a new line without one fails here."""
    assert command in CHECKS, f"nothing checks {command!r}"
    check = CHECKS[command]
    check(command) if check in (_in_ci, _helped) else check()


@pytest.mark.timeout(300)
def test_the_webhook_gets_its_password_as_the_readme_says(
    label_studio: LabelStudioServer, backends: Backends, tmp_path: Path
) -> None:
    """Behind a password, Label Studio's events are refused until the README's command has been run, and taken then."""
    curl = shutil.which("curl")
    if curl is None:
        pytest.skip("no curl on this machine")
    password = 'a: "secret", so long that base64 breaks its line in two if one lets it'
    auth = {"BASIC_AUTH_USER": "studio", "BASIC_AUTH_PASS": password}
    backend = backends(LABEL_STUDIO_URL=label_studio.url, LABEL_STUDIO_API_KEY=label_studio.legacy_token, **auth)
    project = label_studio.create_project("Password")
    login = {"auth_method": "BASIC_AUTH", "basic_auth_user": "studio", "basic_auth_pass": password}
    label_studio.connect_backend(project, backend.url, **login)
    (task,) = label_studio.import_tasks(project, ["data:image/png;base64,"])
    label_studio.annotate(task, "Earth")
    backend.wait_for_log("POST /webhook")
    assert set(re.findall(r"POST /webhook (\d+)", backend.log_text())) == {"401"}

    (webhook,) = label_studio.webhooks(project)
    environ = plain_environ(Path(sys.executable).parent) | auth
    environ |= {"LABEL_STUDIO_URL": label_studio.url, "LABEL_STUDIO_API_KEY": label_studio.legacy_token}
    (command,) = [line for line in COMMANDS if line.startswith("curl ")]
    shell = ["sh", "-c", f"WEBHOOK={webhook['id']}; {command} --fail"]
    subprocess.run(shell, env=environ, cwd=tmp_path, check=True, capture_output=True, timeout=30)
    label_studio.annotate(task, "Mars")
    backend.wait_for_log("POST /webhook 201")
    (webhook,) = label_studio.webhooks(project)
    sent = base64.b64decode(webhook["headers"]["Authorization"].removeprefix("Basic ")).decode()
    assert sent == f"studio:{password}"


# Examples


def test_the_list_of_refused_networks_has_one_hole(capsys: pytest.CaptureFixture[str]) -> None:
    """The README's program prints what the tests themselves start Label Studio with."""
    exec(compile(block("python", "BANNED_SUBNETS"), "README", "exec"), {})  # noqa: S102
    first, second = capsys.readouterr().out.splitlines()
    assert first == "USE_DEFAULT_BANNED_SUBNETS=false"
    assert second == f"USER_ADDITIONAL_BANNED_SUBNETS={networks_without('127.0.0.1')}"


def test_the_label_config_is_matched_as_the_text_says() -> None:
    """The example's three ways to name a class all work, and a class without a choice is never predicted."""
    (control,) = ChoiceMap.from_config(block("xml"), BODIES).controls
    assert dict(control.choice_of) == {"Earth": "Earth", "Mars": "Red planet", "Moon": "Moon"}


def test_the_classes_are_those_of_the_model() -> None:
    sentence = re.search(r"classes of the model inside are ([^.]*)\.", README)
    assert sentence is not None
    assert tuple(re.split(r",\s+|\s+and\s+", sentence[1])) == BODIES


def test_a_model_of_ones_own_is_saved_with_what_the_backend_looks_for() -> None:
    """Name and custom objects of the example are those that are served; a model so saved is served in test_store.py."""
    (call,) = [node for node in ast.walk(ast.parse(block("python", "save_model"))) if isinstance(node, ast.Call)]
    assert ast.unparse(call.func) == "bentoml.keras.save_model"
    assert ast.literal_eval(call.args[0]) == MODEL_NAME
    (objects,) = [word.value for word in call.keywords if word.arg == "custom_objects"]
    assert isinstance(objects, ast.Dict)
    assert [ast.literal_eval(key) for key in objects.keys if key] == list(HOOKS)


def test_the_compose_settings_are_read_by_the_compose_file() -> None:
    """Every name in the .env example and in Docker's table is one that the compose file asks for, with that default."""
    compose = (REPOSITORY / "docker-compose.yml").read_text()
    for line in block("ini").splitlines():
        assert f"${{{line.split('=')[0]}:-}}" in compose
    for variable, shown, _ in rows("## Docker"):
        value = "" if shown == "none" else shown.strip("`")
        assert f"${{{variable.strip('`')}:-{value}}}" in compose
    assert "172.30.55.0/24" in compose
    assert "ml-backend.internal" in compose


def test_the_arguments_are_those_of_the_server() -> None:
    """Every argument of `label-studio-ml start .` is named, and no other."""
    told = subprocess.check_output([sys.executable, "_wsgi.py", "--help"], cwd=REPOSITORY, text=True)
    offered = set(re.findall(r"--[a-z-]+", told)) - {"--help"}
    section = README.split("`label-studio-ml start .` takes arguments too", 1)[1].split("\n\n", 1)[0]
    assert set(re.findall(r"--[a-z-]+", section)) == offered
