"""The frozen requirements: complete, hashed, current, and made from the files beside them."""

from __future__ import annotations

import re
import shlex
import shutil
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from celestial_backend.web.connections import OLDEST, TOO_NEW

REPOSITORY = Path(__file__).resolve().parents[2]
SOURCES = {"requirements-freeze.txt": "requirements.txt", "requirements-test-freeze.txt": "requirements-test.txt"}
OVERRIDES = "requirements-overrides.txt"
MODERN = {"flask": 3, "werkzeug": 3, "jinja2": 3}
SMALL, EXCLUDES = "requirements-small.txt", "requirements-excludes.txt"
OPTIONS = {"--universal", "--generate-hashes", f"--override {OVERRIDES}", f"--excludes {EXCLUDES}", SMALL}


class Freeze:
    """One frozen file: its head and, by canonical name, its pins with their hashes."""

    def __init__(self, path: Path) -> None:
        self.name, text = path.name, path.read_text()
        self.head = next((line.lstrip("# ") for line in text.splitlines() if "uv pip compile" in line), "")
        joined = re.sub(r"\\\n\s*", " ", text)
        parts = [line.split(" --hash=") for line in joined.splitlines() if re.match(r"\w", line)]
        pins = [(Requirement(pin), frozenset(part.strip() for part in hashes)) for pin, *hashes in parts]
        self.pins = {canonicalize_name(pin.name): (pin, hashes) for pin, hashes in pins}

    def version(self, name: str) -> Version:
        return Version(next(iter(self.pins[name][0].specifier)).version)

    def release(self, name: str) -> tuple[str, frozenset[str]] | None:
        """What gets installed; the marker is left out, for what only tests need may widen it."""
        pin, hashes = self.pins.get(name, (None, frozenset()))
        return pin and (str(pin.specifier), hashes)

    def here(self, name: str) -> bool:
        """Whether the pin is for this machine and this Python."""
        marker = self.pins[name][0].marker
        return marker is None or marker.evaluate()


def requirements(path: Path) -> list[Requirement]:
    """The lines of a requirements file and of those that it includes."""
    found = []
    for line in path.read_text().splitlines():
        text = line.split("#")[0].strip()
        if text.startswith("-r "):
            found += requirements(path.parent / text[3:].strip())
        elif text:
            found.append(Requirement(text))
    return found


def problems(folder: Path) -> list[str]:
    """Everything that is wrong with the frozen files of a folder, one sentence each."""
    freezes = {name: Freeze(folder / name) for name in SOURCES}
    overrides = {canonicalize_name(line.name): line for line in requirements(folder / OVERRIDES)}
    excluded = {canonicalize_name(line.name) for line in requirements(folder / EXCLUDES)}
    found = []
    for name, freeze in freezes.items():
        found += _wrong_head(freeze, folder) + _wrong_pins(freeze)
        found += [
            f"{name}: {line} of {SOURCES[name]} is not met"
            for line in requirements(folder / SOURCES[name])
            if not _met(freeze, line)
        ]
        found += [f"{name}: {package} is excluded, and pinned" for package in excluded & freeze.pins.keys()]
        source = requirements(folder / SOURCES[name]) + requirements(folder / SMALL)
        found += _missing_dependencies(freeze, overrides, excluded, source)
    runtime, test = freezes["requirements-freeze.txt"], freezes["requirements-test-freeze.txt"]
    found += [f"{test.name}: {name} differs" for name in runtime.pins if test.release(name) != runtime.release(name)]
    return found


def _wrong_head(freeze: Freeze, folder: Path) -> list[str]:
    words = shlex.split(freeze.head)
    wanted = {*OPTIONS, f"-o {freeze.name}"}
    if freeze.name != "requirements-freeze.txt":
        wanted.add("-c requirements-freeze.txt")
    absent = [word for word in words if word.endswith(".txt") and not (folder / word).exists()]
    return (
        [f"{freeze.name}: its command lacks {part}" for part in sorted(wanted) if f" {part} " not in f" {freeze.head} "]
        + [f"{freeze.name}: its command names {file}, which is not there" for file in absent]
        + ([] if SOURCES[freeze.name] in words else [f"{freeze.name}: its command does not read its source"])
    )


def _wrong_pins(freeze: Freeze) -> list[str]:
    found = []
    for name, (pin, hashes) in freeze.pins.items():
        if [item.operator for item in pin.specifier] != ["=="]:
            found.append(f"{freeze.name}: {pin} is not pinned to one release")
        if not hashes or not all(re.fullmatch(r"sha256:[0-9a-f]{64}", text) for text in hashes):
            found.append(f"{freeze.name}: {name} has no hash or a bad one")
    for name, major in MODERN.items():
        if name not in freeze.pins or freeze.version(name).major < major:
            found.append(f"{freeze.name}: {name} is older than {major}")
    return found


def _met(freeze: Freeze, line: Requirement) -> bool:
    name = canonicalize_name(line.name)
    return name in freeze.pins and line.specifier.contains(freeze.version(name), prereleases=True)


def _missing_dependencies(
    freeze: Freeze, overrides: dict[str, Requirement], excluded: set[str], wanted: list[Requirement]
) -> list[str]:
    """Follow every requirement, with its extras, through the metadata of what is installed."""
    found, seen, waiting = [], set(), [("", line) for line in wanted]
    while waiting:
        parent, line = waiting.pop()
        name = canonicalize_name(line.name)
        line = overrides.get(name, line) if parent else line
        if name in excluded or (line.marker is not None and not line.marker.evaluate()):
            continue
        if not _met(freeze, line):
            found.append(f"{freeze.name}: {parent or 'the source'} needs {line}, which no pin meets")
            continue
        for extra in {"", *line.extras} - {extra for known, extra in seen if known == name}:
            seen.add((name, extra))
            waiting += [(name, child) for child in _asks_for(name, extra, freeze.version(name))]
    return found


def _asks_for(name: str, extra: str, version: Version) -> list[Requirement]:
    """What the installed release asks for on this machine; nothing when another release is installed."""
    try:
        distribution = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return []
    if Version(distribution.version) != version:
        return []
    lines = [Requirement(text) for text in distribution.requires or []]
    wanted = [line for line in lines if line.marker is None or line.marker.evaluate({"extra": extra})]
    for line in wanted:
        line.marker = None
    return wanted


def test_the_frozen_files_are_complete_and_current() -> None:
    """Every requirement, direct or not, has one hashed pin that meets it, and the heads say how they were made."""
    assert problems(REPOSITORY) == []


def test_there_is_one_tensorflow() -> None:
    """Of one version everywhere; the smaller one on Linux and x86-64, which nobody else has."""
    freeze = Freeze(REPOSITORY / "requirements-freeze.txt")
    assert freeze.version("tensorflow") == freeze.version("tensorflow-cpu")
    machines = [("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64"), ("darwin", "x86_64")]
    for system, processor in machines:
        here = {"sys_platform": system, "platform_machine": processor}
        markers = [freeze.pins[name][0].marker for name in ("tensorflow", "tensorflow-cpu")]
        assert [marker and marker.evaluate(here) for marker in markers] == [
            here != {"sys_platform": "linux", "platform_machine": "x86_64"},
            here == {"sys_platform": "linux", "platform_machine": "x86_64"},
        ]


def test_what_is_installed_is_what_is_frozen() -> None:
    """The tests run on the pinned releases; only the SDK may be the other of its two generations."""
    freeze = Freeze(REPOSITORY / "requirements-test-freeze.txt")
    different, compared = {}, 0
    for name in filter(freeze.here, freeze.pins):
        try:
            installed = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        compared += 1
        if Version(installed) != freeze.version(name) and (name, Version(installed).major) != ("label-studio-ml", 2):
            different[name] = f"{installed} instead of {freeze.version(name)}"
    assert different == {}
    assert compared > 50, "hardly any frozen package is installed, so nothing was compared"


def test_the_web_server_asks_for_the_gunicorn_that_is_required() -> None:
    """The bounds that are checked at start are those of requirements.txt, and what is frozen fits them."""
    (asked,) = (line for line in requirements(REPOSITORY / "requirements.txt") if line.name == "gunicorn")
    assert str(asked.specifier) == f"<{TOO_NEW[0]},>={OLDEST[0]}"
    assert asked.specifier.contains(Freeze(REPOSITORY / "requirements-freeze.txt").version("gunicorn"))


@pytest.mark.parametrize(
    ("file", "pattern", "replacement", "complaint"),
    [
        pytest.param("requirements-freeze.txt", r"flask==[\d.]+", "flask==1.1.2", "flask is older than 3", id="old"),
        pytest.param("requirements-freeze.txt", r"six==[\d.]+", "six>=1.0", "not pinned to one release", id="range"),
        pytest.param("requirements-freeze.txt", r"(six==[\d.]+)( \\\n.*sha256.*)+", r"\1", "has no hash", id="no-hash"),
        pytest.param("requirements-freeze.txt", r"(\nsix==)", r"\nattr==0.3.1 --hash=sha256:0\1", "attr is", id="attr"),
        pytest.param("requirements-freeze.txt", r"\nmarkupsafe==.*(\n .*)+", "", "needs markupsafe", id="gap"),
        pytest.param("requirements-test-freeze.txt", r"\nsix==[\d.]+", "\nsix==1.0", "six differs", id="apart"),
        pytest.param("requirements-freeze.txt", f"--override {OVERRIDES} ", "", "lacks --override", id="no-override"),
        pytest.param("requirements-freeze.txt", " requirements.txt", " other.txt", "is not there", id="source"),
        pytest.param("requirements.txt", r"(\nrq)", r"\nnosuchpackage>=1\1", "nosuchpackage>=1", id="new-line"),
        pytest.param("requirements.txt", r"rq>=2", "rq>=99", "rq>=99", id="new-bound"),
        pytest.param(OVERRIDES, r"werkzeug>=.*", "werkzeug>=99", "needs werkzeug>=99", id="new-override"),
        pytest.param("requirements-test.txt", r"pytest>=8", "pytest>=99", "pytest>=99", id="test-bound"),
    ],
)
def test_a_drift_is_found(tmp_path: Path, file: str, pattern: str, replacement: str, complaint: str) -> None:
    """A change to one file alone, of the kind that people make by hand, is named."""
    for name in (*SOURCES, *SOURCES.values(), OVERRIDES, EXCLUDES, SMALL):
        shutil.copy(REPOSITORY / name, tmp_path)
    before = (tmp_path / file).read_text()
    (tmp_path / file).write_text(re.sub(pattern, replacement, before, count=1))
    assert (tmp_path / file).read_text() != before, "the drift did not happen"
    found = problems(tmp_path)
    assert any(complaint in problem.lower() for problem in found), found  # packages write names as they like
