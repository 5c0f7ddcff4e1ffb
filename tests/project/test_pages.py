"""The README and the pages in docs: what they show is run or read by these tests, so that it cannot go stale unseen."""

from __future__ import annotations

import ast
import base64
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import fields
from functools import cache
from pathlib import Path

import click
import pytest
import yaml

from benchmarks.annotators import main as annotators
from benchmarks.certificates import main as certificates
from benchmarks.cli import main as benchmarks
from benchmarks.jobs import main as jobs
from benchmarks.kills import main as kills
from benchmarks.order import main as order
from benchmarks.scores import main as scores
from benchmarks.suspects import main as suspects
from celestial_backend.commands.cli import main
from celestial_backend.labels import ChoiceMap
from celestial_backend.models.classifier import HOOKS
from celestial_backend.planets.__main__ import main as planets
from celestial_backend.settings import MODEL_NAME, Settings
from tests.support.backend_server import BODIES, REPOSITORY, Backends, plain_environ
from tests.support.label_studio import VERSION, LabelStudioServer, networks_without

STARTED_IN = Path.cwd()  # the settings' defaults are resolved when they are imported
README, SECURITY, CHANGELOG = (REPOSITORY / f"{name}.md" for name in ("README", "SECURITY", "CHANGELOG"))
DOCS = REPOSITORY / "docs"
PAGES = {path: path.read_text() for path in (README, *sorted(DOCS.glob("*.md")))}
LINKED = PAGES | {path: path.read_text() for path in (SECURITY, CHANGELOG)}
FENCED = re.compile(r"^( *)```(\w*)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
README_MAX = 12_000
LABEL_STUDIOS_OWN = {
    "LABEL_STUDIO_USERNAME",
    "LABEL_STUDIO_PASSWORD",
    "LABEL_STUDIO_USER_TOKEN",
    "LABEL_STUDIO_ENABLE_LEGACY_API_TOKEN",
    "LABEL_STUDIO_HOST",
    "ML_BLOCK_LOCAL_IP",
    "SSRF_PROTECTION_ENABLED",
    "LOCAL_FILES_SERVING_ENABLED",
}
OTHERS = {
    "LABEL_STUDIO_ADDRESS",
    "LABEL_STUDIO_PORT",
    "COMPOSE_FILE",
    "TEST_CASES_TIMES",
    "TEST_DOCKER_FOLDER",
    "TEST_LABEL_STUDIO_VENV",
    "TEST_SCREENSHOTS",
    "PROMETHEUS_MULTIPROC_DIR",
}
# Options of other programs: pip, docker, gunicorn, pg_dump.
FOREIGN = {"--no-deps", "--wait", "--env-file", "--env", "--scale", "--build", "--bind", "--worker-class", "--workers",
           "--threads", "--schema", "--label-studio", "--label-studio-database"}  # fmt: skip

# Beside those of `python -m celestial_backend`: programs made with click, and others.
OTHER_COMMANDS = {
    "celestial_backend.planets": planets,
    "benchmarks": benchmarks,
    "benchmarks.annotators": annotators,
    "benchmarks.certificates": certificates,
    "benchmarks.jobs": jobs,
    "benchmarks.kills": kills,
    "benchmarks.order": order,
    "benchmarks.scores": scores,
    "benchmarks.suspects": suspects,
}
HELPED = ("_wsgi", "benchmarks.soak")


def blocks(page: str, kind: str) -> list[str]:
    """The code blocks of one kind."""
    return [text for _, shown, text in FENCED.findall(page) if shown == kind]


def commands(page: str) -> list[str]:
    """What a page tells people to type: each line of its shell blocks, and our own commands in its sentences."""
    shell = "".join(re.sub(r" *\\\n\s*", " ", text) for text in blocks(page, "sh"))
    inline = re.findall(r"`(python -m [^`]+)`", FENCED.sub("", page))
    return [line.strip() for line in shell.splitlines()] + [" ".join(each.split()) for each in inline]


COMMANDS = sorted({command for page in PAGES.values() for command in commands(page)} - {
    "python -m celestial_backend COMMAND"
})  # fmt: skip


def section(page: str, heading: str) -> str:
    """What stands below a heading, up to the next one of its rank or a higher one."""
    rank = heading.split(" ")[0]
    below = page.split(f"\n{heading}\n", 1)[1]
    return re.split(rf"^#{{2,{len(rank)}}} ", below, maxsplit=1, flags=re.MULTILINE)[0]


def rows(page: str, heading: str) -> list[list[str]]:
    """The cells of the first table below a heading, without its head."""
    lines = re.search(r"^\|.*?(?=\n[^|]|\Z)", section(page, heading), re.DOTALL | re.MULTILINE)
    assert lines is not None
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[0].splitlines()[2:]]


def headings(page: str) -> list[str]:
    return re.findall(r"^#+ (.*)$", FENCED.sub("", page), re.MULTILINE)


each_page = pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)


# The pages as a whole


def test_the_readme_is_short() -> None:
    """Everything that not everybody needs is on the other pages; so are all pictures."""
    assert len(README.read_bytes()) <= README_MAX
    assert not [words for picture, words, _ in LINK.findall(PAGES[README]) if picture]


def anchor(heading: str) -> str:
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("path", LINKED, ids=lambda path: path.name)
def test_links_and_pictures_lead_somewhere(path: Path) -> None:
    """Links name files and headings that are there; pictures are pictures, and have words beside them."""
    for picture, words, target in LINK.findall(FENCED.sub("", LINKED[path])):
        assert words, target
        if "://" in target:
            continue
        name, _, place = target.partition("#")
        led_to = (path.parent / name).resolve() if name else path
        assert led_to.exists(), target
        assert led_to.is_relative_to(REPOSITORY), target
        if place:
            assert place in map(anchor, headings(LINKED[led_to])), target
        if picture:
            assert led_to.read_bytes()[:4] in (b"\x89PNG", b"\xff\xd8\xff\xe0", b"<svg"), target


@each_page
def test_a_page_has_no_heading_twice(path: Path) -> None:
    """A link to a heading finds the one that is meant."""
    found = headings(PAGES[path])
    assert sorted(found) == sorted(set(found))


def test_every_page_is_found_from_the_readme() -> None:
    """By links alone, so that nobody has to look into the folder."""
    found, ahead = set(), [README]
    while ahead:
        path = ahead.pop()
        found.add(path)
        targets = {(path.parent / target.partition("#")[0]).resolve() for _, _, target in LINK.findall(LINKED[path])}
        ahead += [each for each in targets if each in LINKED and each not in found]
    assert found == set(LINKED)


@each_page
def test_every_variable_that_a_page_names_exists(path: Path) -> None:
    """A renamed setting leaves no old name behind."""
    text = re.sub(r"\]\([^)]*\)", "", PAGES[path])  # without the files that links name
    named = set(re.findall(r"\b[A-Z]+(?:_[A-Z]+)+\b", text))
    assert named - {field.metadata["variable"] for field in fields(Settings)} <= LABEL_STUDIOS_OWN | OTHERS


# Tables


def default(value: object) -> str:
    """How the table writes a default."""
    if value is None or value == ():
        return "none"
    if value is False:
        return "`off`"
    if isinstance(value, Path):
        here = value.is_relative_to(STARTED_IN)
        value = f"./{value.relative_to(STARTED_IN)}" if here else str(value).replace(str(Path.home()), "~", 1)
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def test_the_table_of_settings_is_the_dataclass() -> None:
    """Every setting has its row, in the order of the code, with its default and its sentence."""
    declared = [(field.metadata, default(field.default)) for field in fields(Settings)]
    assert rows(PAGES[DOCS / "settings.md"], "## Variables") == [
        [f"`{about['variable']}`", shown, about["about"]] for about, shown in declared
    ]


def test_the_defaults_in_the_table_can_be_set() -> None:
    """A variable set to its default in the table changes nothing."""
    plain = Settings.from_environ({})
    for variable, shown, _ in rows(PAGES[DOCS / "settings.md"], "## Variables"):
        if shown != "none":
            assert Settings.from_environ({variable.strip("`"): shown.strip("`").replace("./", "")}) == plain


def test_the_limits_of_pictures_are_those_of_the_settings() -> None:
    """Each with its default, as far as a setting changes it."""
    known = {field.metadata["variable"]: field.default for field in fields(Settings)}
    told = {setting.strip("`"): shown for _, shown, setting in rows(PAGES[DOCS / "pictures.md"], "## What can be read")}
    assert told.pop("none") == "8,000 characters"
    assert {name: float(shown.split()[0]) for name, shown in told.items()} == {name: known[name] for name in told}
    assert len(told) == 3


def ours(group: click.Group, before: str = "") -> dict[str, click.Command]:
    """Our commands, by the words that call them."""
    found: dict[str, click.Command] = {}
    for name, command in group.commands.items():
        if not isinstance(command, click.Group) or command.invoke_without_command:
            found[before + name] = command
        if isinstance(command, click.Group):
            found |= ours(command, f"{before}{name} ")
    return found


def options(command: click.Command) -> set[str]:
    return {name for each in command.params for name in each.opts if name.startswith("--")}


@cache
def helped(module: str) -> set[str]:
    """The options that the help of a program names which is not made with click."""
    told = subprocess.check_output([sys.executable, "-m", module, "--help"], cwd=REPOSITORY, text=True)
    return set(re.findall(r"--[a-z-]+", told))


def test_the_commands_of_the_readme_are_those_there_are() -> None:
    assert sorted(command.strip("`") for command, _ in rows(PAGES[README], "## Commands")) == sorted(ours(main))


@pytest.mark.parametrize("name", ours(main))
def test_a_command_is_described_with_all_its_options(name: str) -> None:
    """Each has its section with every option that it takes, and no other."""
    told = section(PAGES[DOCS / "operations.md"], f"### {name}")
    assert set(re.findall(r"--[a-z][a-z-]*", told)) == options(ours(main)[name])


def test_the_arguments_are_those_of_the_server() -> None:
    """Every argument of `label-studio-ml start .` is in the table, and no other."""
    shown = [argument for argument, _ in rows(PAGES[DOCS / "settings.md"], "## Arguments of the server")]
    assert set(re.findall(r"--[a-z-]+", " ".join(shown))) == helped("_wsgi") - {"--help"}


def test_every_option_that_a_page_names_exists() -> None:
    """Ours are those of a command, of the server or of the benchmarks."""
    known = set().union(*map(options, [*ours(main).values(), *OTHER_COMMANDS.values()]), *map(helped, HELPED))
    for path, page in PAGES.items():
        inline = " ".join(re.findall(r"`([^`]+)`", FENCED.sub("", page)))
        assert set(re.findall(r"(?<!\S)--[a-z-]+", inline)) <= known | FOREIGN, path.name


# Commands


def _install_and_start(command: str, _folder: Path) -> None:
    """The image installs with the same words; the backends of all tests are started with the same words."""
    install, _, start = command.rpartition(" && ")
    assert not install or f"RUN {install} " in (REPOSITORY / "Dockerfile").read_text()
    words = ", ".join(f'"{word}"' for word in start.split())
    assert words in (REPOSITORY / "tests" / "support" / "backend_server.py").read_text()


def _in_ci(command: str, _folder: Path) -> None:
    script = (REPOSITORY / ".ci" / "run").read_text()
    assert re.search(rf"^ *{re.escape(command)}( \|\| failed=1)?$", script, re.MULTILINE)


def _on_another_studio(command: str, _folder: Path) -> None:
    """The options are those that there are, and some tests are chosen."""
    options = shlex.split(command)[1:]
    some = [sys.executable, "-m", "pytest", "-q", "-n", "0", "--collect-only", *options, "tests/real/test_browser.py"]
    told = subprocess.check_output(some, cwd=REPOSITORY, text=True)
    assert re.search(r"[1-9]/?\d* tests collected", told)


def _environment(command: str, folder: Path) -> None:
    """What follows in the same terminal runs in the new virtual environment."""
    told = in_shell(f"{command} && python -c 'import sys; print(sys.prefix)'", folder)
    assert told == f"{folder / '.venv'}\n"


def _exported(command: str, _folder: Path) -> None:
    """They are settings, and have values that can be used."""
    given = dict(word.split("=", 1) for word in shlex.split(command)[1:])
    settings = Settings.from_environ(given)
    assert (settings.label_studio_url, settings.label_studio_api_key) == tuple(given.values())


def _parsed(command: str, folder: Path) -> None:
    """The command exists and takes these arguments; what it does is tested in the files of its parts."""
    (folder / "FOLDER").mkdir()
    (folder / "FILE").touch()
    _, _, module, *words = shlex.split(command)
    words = ["1" if word == "P" else word for word in words]
    parsed = OTHER_COMMANDS.get(module, main)
    while isinstance(parsed, click.Group) and words and words[0] in parsed.commands:
        parsed = parsed.commands[words.pop(0)]
    assert parsed is not main
    parsed.make_context(module, words)  # refuses what it does not take


def _helped(command: str, _folder: Path) -> None:
    """The options are those that there are."""
    _, _, module, *words = shlex.split(command)
    assert {word for word in words if word.startswith("--")} <= helped(module)


def _studio_started(command: str, folder: Path) -> None:
    """Label Studio starts with one address let in, and nothing else changed."""
    (folder / ".venv" / "bin").mkdir(parents=True)
    label_studio, python = folder / ".venv" / "bin" / "label-studio", folder / ".venv" / "bin" / "python"
    label_studio.write_text("#!/bin/sh\nenv\necho ARGUMENTS=$@\n")
    label_studio.chmod(0o755)
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    given = in_shell(f'PATH="{label_studio.parent}:$PATH"; {command}', folder).splitlines()
    assert "USE_DEFAULT_BANNED_SUBNETS=false" in given
    assert f"USER_ADDITIONAL_BANNED_SUBNETS={networks_without('127.0.0.1')}" in given
    assert given[-1] == "ARGUMENTS=start"


def in_shell(script: str, folder: Path) -> str:
    """What a shell prints in a folder where our commands are found."""
    environ = plain_environ(Path(sys.executable).parent) | {"PYTHONPATH": str(REPOSITORY)}
    return subprocess.check_output(["/bin/sh", "-c", script], cwd=folder, env=environ, text=True, timeout=120)


def _studio_installed(command: str, _folder: Path) -> None:
    """It is the Label Studio that the tests use."""
    assert command.endswith(f" && pip install label-studio=={VERSION}")


def _consumer(command: str, _folder: Path) -> None:
    """The name is what the worker's file gives, and the compose file says the same."""
    code = "from celestial_backend.worker import huey; print(huey.name)"
    told = subprocess.check_output([sys.executable, "-c", code], cwd=REPOSITORY, text=True)
    assert told == "celestial\n"
    assert command.split()[-1] in (REPOSITORY / "docker-compose.yml").read_text()


def _compose(command: str, _folder: Path) -> None:
    """The files are there; what they do is tested in test_docker.py, test_docker_scale.py and test_scale.py."""
    named = re.findall(r"-f (\S+)", command) or ["docker-compose.yml"]
    assert all((REPOSITORY / name).is_file() for name in named)


def _compose_command(command: str, folder: Path) -> None:
    """The service is there, and `run` takes none with an address of its own, which would be taken already."""
    words = shlex.split(command)
    place = words.index("python")
    service = yaml.safe_load((REPOSITORY / "docker-compose.yml").read_text())["services"][words[place - 1]]
    assert words[2] == "exec" or "networks" not in service
    (folder / "pictures").mkdir()
    _parsed(shlex.join(words[place:]).replace("/pictures", str(folder / "pictures")), folder)


REPLACING = (
    "export COMPOSE_FILE=docker-compose.yml:docker-compose.scale.yml",
    "docker compose build backend",
    "OLD=$(docker compose ps -q backend)",
    "docker compose up -d --no-deps --no-recreate --wait --scale backend=6 backend",
    "docker stop $OLD && docker rm $OLD",
    "docker compose up -d --no-deps worker",
)


def _replacing(command: str, _folder: Path) -> None:
    """They stand on the page in this order; test_compose.py runs them all under load, where there is an engine."""
    assert command in REPLACING
    assert "\n".join(REPLACING) in PAGES[DOCS / "deployment.md"]
    tested = (REPOSITORY / "tests/real/docker/test_compose.py").read_text()
    assert all(option in tested for option in re.findall(r"--[a-z-]+", command))


def _probe(command: str, _folder: Path) -> None:
    """The image asks the same; test_docker.py has what it answers."""
    assert f"CMD {json.dumps(command.split())}\n" in (REPOSITORY / "Dockerfile").read_text()


def _worker_image(command: str, _folder: Path) -> None:
    """It stops as the compose file's worker does, and runs the same command on the same volume."""
    compose = yaml.safe_load((REPOSITORY / "docker-compose.yml").read_text())["services"]["worker"]
    assert f"--stop-signal {compose['stop_signal']} " in command
    assert compose["stop_grace_period"] == "35m"
    assert "--stop-timeout 2100 " in command
    assert command.endswith("huey_consumer --quiet --logfile=/dev/null celestial_backend.worker.huey")
    assert " -v celestial-state:/data celestial-backend " in command


def _image(_command: str, _folder: Path) -> None:
    """Name, port and volume of the two commands fit each other and the Dockerfile."""
    dockerfile = (REPOSITORY / "Dockerfile").read_text()
    page = commands(PAGES[DOCS / "deployment.md"])
    build, run, _ = [command.split() for command in page if command.startswith(("docker build", "docker run"))]
    assert build[:4] == ["docker", "build", "-t", run[-1]]
    port, volume = run[run.index("-p") + 1].split(":")[-1], run[run.index("-v") + 1].split(":")[-1]
    assert f"EXPOSE {port}\n" in dockerfile
    assert f"VOLUME {volume}\n" in dockerfile


def _package(command: str, _folder: Path) -> None:
    """The files are there, and the name is that of the package's script; what it does is tested in test_package.py."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert all((REPOSITORY / name).is_file() for name in re.findall(r"requirements\S*\.txt", command))
    assert command.startswith(("pip install ", "uv pip install ")) or command.split()[0] in project["scripts"]


CHECKS: dict[str, Callable[[str, Path], None]] = {
    "python3 -m venv .venv && . .venv/bin/activate": _environment,
    "pip install --no-deps -r requirements-freeze.txt && label-studio-ml start .": _install_and_start,
    "label-studio-ml start .": _install_and_start,
    "pip install --no-deps -r requirements-freeze.txt && pip install --no-deps .": _package,
    "uv pip install --overrides requirements-overrides.txt --excludes requirements-excludes.txt "
    "-r requirements-small.txt .": _package,
    "celestial-backend --version": _package,
    "pip install --no-deps -r requirements-test-freeze.txt && pytest": _in_ci,
    "ruff check": _in_ci,
    "mypy": _in_ci,
    "pytest": lambda *_: None,  # this one
    "pytest -m studio --label-studio 1.20.0": _on_another_studio,
    "pytest -m studio --label-studio-database postgresql": _on_another_studio,
    "export LABEL_STUDIO_URL=http://127.0.0.1:8080 LABEL_STUDIO_API_KEY=YOUR-TOKEN": _exported,
    "env $(.venv/bin/python -m celestial_backend private-addresses 127.0.0.1) label-studio start": _studio_started,
    "python3 -m venv ~/label-studio && . ~/label-studio/bin/activate "
    "&& pip install label-studio==1.23.2": _studio_installed,
    "huey_consumer celestial_backend.worker.huey": _consumer,
    "docker compose up": _compose,
    "docker compose -f docker-compose.yml -f docker-compose.scale.yml up": _compose,
    "docker compose exec backend python -m celestial_backend doctor": _compose_command,
    "docker compose exec backend python -m celestial_backend jobs": _compose_command,
    'docker compose run --rm -v "$PWD/FOLDER:/pictures:ro" worker python -m celestial_backend connect /pictures '
    '--title "My pictures"': _compose_command,
    **dict.fromkeys(REPLACING, _replacing),
    "python -m celestial_backend.doctor.health": _probe,
    "docker build -t celestial-backend .": _image,
    "docker run --rm -p 127.0.0.1:9090:9090 -v celestial-state:/data celestial-backend": _image,
    "docker run --rm --init --stop-signal SIGINT --stop-timeout 2100 -v celestial-state:/data celestial-backend "
    "huey_consumer --quiet --logfile=/dev/null celestial_backend.worker.huey": _worker_image,
}
def check_of(command: str) -> Callable[[str, Path], None] | None:
    """What checks a command: its own check, or for our modules what checks their arguments."""
    if command in CHECKS:
        return CHECKS[command]
    module = re.match(r"(?:\.venv/bin/)?python -m ((?:celestial_backend|benchmarks)\S*)", command)
    if module is None:
        return None
    return _helped if module[1] in HELPED else _parsed


@pytest.mark.parametrize("command", [line for line in COMMANDS if not line.startswith("curl")])
def test_a_command_does_what_the_pages_say(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each line of each shell block has its check; a new line without one fails here."""
    monkeypatch.chdir(tmp_path)
    check = check_of(command)
    assert check is not None, f"nothing checks {command!r}"
    check(command, tmp_path)


def test_no_check_is_left_behind() -> None:
    """What checks a command that no page shows any more goes too."""
    assert set(CHECKS) <= set(COMMANDS)


@pytest.mark.timeout(300)
def test_the_webhook_gets_its_password_as_the_pages_say(
    label_studio: LabelStudioServer, backends: Backends, tmp_path: Path
) -> None:
    """Behind a password, Label Studio's events are refused until the command has been run, and taken then."""
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


def test_the_label_config_is_matched_as_the_text_says() -> None:
    """The example's three ways to name a class all work, and a class without a choice is never predicted."""
    (config,) = blocks(PAGES[DOCS / "label-config.md"], "xml")
    (control,) = ChoiceMap.from_config(config, BODIES).controls
    assert dict(control.choice_of) == {"Earth": "Earth", "Mars": "Red planet", "Moon": "Moon"}


def test_the_classes_are_those_of_the_model() -> None:
    sentence = re.search(r"classes of the model inside are ([^.]*)\.", PAGES[DOCS / "model.md"])
    assert sentence is not None
    assert tuple(re.split(r",\s+|\s+and\s+", sentence[1])) == BODIES


def test_a_model_of_ones_own_is_saved_with_what_the_backend_looks_for() -> None:
    """Name and custom objects of the example are those that are served; a model so saved is served in test_store.py."""
    (example,) = blocks(PAGES[DOCS / "model.md"], "python")
    (call,) = [node for node in ast.walk(ast.parse(example)) if isinstance(node, ast.Call)]
    assert ast.unparse(call.func) == "bentoml.keras.save_model"
    assert ast.literal_eval(call.args[0]) == MODEL_NAME
    (objects,) = [word.value for word in call.keywords if word.arg == "custom_objects"]
    assert isinstance(objects, ast.Dict)
    assert [ast.literal_eval(key) for key in objects.keys if key] == list(HOOKS)


def test_the_compose_settings_are_read_by_the_compose_file() -> None:
    """Every name in the .env example and in the table is one that the compose file asks for, with that default."""
    page, compose = PAGES[DOCS / "deployment.md"], (REPOSITORY / "docker-compose.yml").read_text()
    (example,) = blocks(page, "ini")
    for line in example.splitlines():
        assert f"${{{line.split('=')[0]}:-}}" in compose
    for variable, shown, _ in rows(page, "### Settings of the compose file"):
        value = "" if shown == "none" else shown.strip("`")
        assert f"${{{variable.strip('`')}:-{value}}}" in compose
    for name in ("172.30.55.0/24", "ml-backend.internal"):
        assert name in page
        assert name in compose
