"""
The house: a room for each noun, and every arrow down.

A room is a sub-package, or a file at the top that is one by itself. Rooms import only from rooms that stand lower;
inside a room, files import each other in any order without a circle.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from itertools import combinations
from os.path import commonprefix
from pathlib import Path

import pytest

from tests.support.backend_server import REPOSITORY

PACKAGE = REPOSITORY / "celestial_backend"
FLOORS = [
    {"__init__", "errors", "state"},
    {"settings", "metrics", "logs"},
    {"database"},
    {"labels"},
    {"studio"},
    {"pictures"},
    {"features"},
    {"planets"},
    {"models"},
    {"learning"},
    {"jobs", "predictor"},
    {"trust"},
    {"services"},
    {"doctor"},
    {"web", "worker"},
    {"commands"},
    {"__main__", "_wsgi"},
]
# Each heavy or telling library is imported in these rooms, and nowhere else in the package.
OWNERS = {
    "tensorflow": {"models", "planets"},
    "keras": {"models", "planets", "commands", "pictures"},
    "bentoml": {"models"},
    "flask": {"web"},
    "gunicorn": {"web"},
    "label_studio_ml": {"web"},
    "label_studio_sdk": {"studio", "doctor"},
    "huey": {"jobs"},
    "sqlalchemy": {"database"},
    "sqlite3": {"jobs", "features"},
    "prometheus_client": {"metrics"},
    "click": {"commands", "planets"},
    "rich": {"commands", "planets"},
    "cleanlab": {"learning", "trust"},
    "scipy": {"learning", "features", "trust"},
    "sklearn": {"learning", "trust"},
    "ai_edge_litert": {"features"},
    "flatbuffers": {"features"},
    "httpcore": {"studio", "pictures"},
}
SLOW = {"tensorflow", "keras", "bentoml", "label_studio_sdk", "label_studio_ml", "cleanlab", "scipy", "sklearn",
        "ai_edge_litert", "flatbuffers"}  # fmt: skip
OF_LIBRARIES = {"_pool"}  # private names of libraries that are used for want of a public one, and called as ours
NAMES_MAX, LINES_MAX = 23, 600
PROGRAMS = (  # started by name
    "__main__", "_wsgi", "worker", "worker.training", "worker.pages", "web.server", "doctor.health",
)  # fmt: skip
FILES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
} | {"_wsgi": REPOSITORY / "_wsgi.py"}
TREES = {name: ast.parse(path.read_text()) for name, path in FILES.items()}
ROOMS = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}

each_file = pytest.mark.parametrize("name", FILES)
each_room = pytest.mark.parametrize("room", sorted(ROOMS))


def room_of(name: str) -> str:
    return name.split(".")[0]


def floor_of(name: str) -> int:
    """A room's `__main__` is a program: it stands on the top floor."""
    place = "__main__" if name.endswith(".__main__") else room_of(name)
    return next(number for number, rooms in enumerate(FLOORS) if place in rooms)


def imports(name: str, *, top_only: bool = False) -> Iterator[tuple[str, str]]:
    """Module and name of all that a file imports; the name is empty where a whole module is."""
    tree = TREES[name]
    nodes = [node for node in tree.body if not isinstance(node, ast.If)] if top_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name}:{node.lineno} must name the whole package"
            yield from ((str(node.module), alias.name) for alias in node.names)


@cache
def ours(name: str) -> set[str]:
    """The files of this package that one of them imports, anywhere in it."""
    found = set()
    for module, what in imports(name):
        if f"{module}.".startswith("celestial_backend."):
            path = f"{module}.{what}".removeprefix("celestial_backend.").removeprefix("celestial_backend")
            found.add(path if path in FILES else path.rpartition(".")[0] or "__init__")
    return found


@each_file
def test_arrows_lead_down(name: str) -> None:
    """Every room has a floor, and looks only down."""
    beyond = {each for each in ours(name) if room_of(each) != room_of(name)}
    assert not {each for each in beyond if floor_of(each) >= floor_of(name)}


def test_jobs_know_nothing_of_learning() -> None:
    """The worker joins them: one learns a model, the other has it learned although machines fail."""
    assert not {name for name in FILES if room_of(name) == "jobs" and "learning" in map(room_of, ours(name))}


@each_room
def test_nothing_in_a_room_goes_round_in_a_circle(room: str) -> None:
    inside = {name for name in FILES if room_of(name) == room}
    TopologicalSorter({name: ours(name) & inside for name in inside}).prepare()


def test_every_floor_names_what_is_there() -> None:
    assert set().union(*FLOORS) == {room_of(name) for name in FILES}


def test_the_nouns_are_seen_at_first_sight() -> None:
    """Few names, each a noun of the field; files are deep, and none is endless."""
    assert len({path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"}) <= NAMES_MAX
    long = {name for name, path in FILES.items() if len(path.read_text().splitlines()) > LINES_MAX}
    assert not long


@each_room
def test_a_room_says_what_it_is_for(room: str) -> None:
    """In a few lines: what it does, what goes in and comes out, what it never does."""
    about = ast.get_docstring(TREES[room]) or ""
    assert 3 <= len(about.splitlines()) <= 12


@each_file
def test_libraries_have_owners(name: str) -> None:
    used = {module.split(".")[0] for module, _ in imports(name)}
    assert not {library for library in used if room_of(name) not in OWNERS.get(library, {room_of(name)})}


@each_file
def test_what_is_slow_to_import_waits_until_it_is_asked_for(name: str) -> None:
    assert not SLOW & {module.split(".")[0] for module, _ in imports(name, top_only=True)}


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


@cache
def made_in_rooms() -> dict[str, set[str]]:
    """The names of functions, classes and attributes that each room makes."""
    own = defaultdict(set)
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                own[room_of(name)].add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                own[room_of(name)].add(node.attr)
    return own


@each_file
def test_no_private_name_crosses_rooms(name: str) -> None:
    """Neither by import, nor as an attribute of an object that another room has made."""
    for module, what in imports(name):
        if f"{module}.".startswith("celestial_backend.") and private(what):
            assert room_of(module.removeprefix("celestial_backend.")) == room_of(name), f"{module}.{what}"
    used = {node.attr for node in ast.walk(TREES[name]) if isinstance(node, ast.Attribute) and private(node.attr)}
    own = made_in_rooms()
    others = set().union(*(names for room, names in own.items() if room != room_of(name)))
    assert not used & others - own[room_of(name)] - OF_LIBRARIES


@each_file
def test_what_one_room_uses_lies_in_it(name: str) -> None:
    """A file that one other file imports stands in the room of that one, unless it is a room by itself."""
    users = [each for each in FILES if name in ours(each)]
    if "." in name and len(users) == 1 and name not in PROGRAMS and not users[0].endswith("__main__"):
        assert room_of(users[0]) == room_of(name) or is_a_face(name, users[0])


def is_a_face(name: str, user: str) -> bool:
    """Whether all that a program or a command does with a room is to call the one thing that it is for."""
    return room_of(user) in {"commands", "worker", "services"} and floor_of(name) < floor_of(user)


@pytest.mark.parametrize("path", sorted((REPOSITORY / "tests" / "unit").rglob("test_*.py")), ids=lambda path: path.name)
def test_a_test_of_a_room_lies_where_the_room_does(path: Path) -> None:
    """In a folder of the room's name; directly in tests/unit where the room is a file, which it is named after."""
    folders = path.relative_to(REPOSITORY / "tests" / "unit").parts[:-1]
    if folders:
        assert folders[0] in ROOMS
        assert len(folders) == 1
    else:
        assert path.stem.removeprefix("test_") in set(FILES) - ROOMS


def test_names_of_tests_differ_by_more_than_a_letter() -> None:
    """Of two that do not, the wrong one is opened."""
    names = sorted({path.stem for path in (REPOSITORY / "tests").rglob("test_*.py")})
    assert [pair for pair in combinations(names, 2) if is_a_letter_apart(*pair)] == []
    assert is_a_letter_apart("test_job", "test_jobs")
    assert is_a_letter_apart("test_tags", "test_taps")


def is_a_letter_apart(one: str, other: str) -> bool:
    """Whether one letter more, less or in the place of another makes one of the other."""
    begin = len(commonprefix([one, other]))  # noqa: RUF071 - names, no paths
    return any(one[begin + mine :] == other[begin + its :] for mine, its in ((1, 1), (1, 0), (0, 1)))


def test_only_settings_reads_the_environment() -> None:
    """Elsewhere the environment is only handed on whole, or written for a library that reads it."""
    texts = {name: path.read_text() for name, path in FILES.items()}
    readers = {name for name, text in texts.items() if "environ.get(" in text or "getenv(" in text}
    assert readers <= {"settings", "web.backend"}


def test_what_travels_in_a_saved_model_imports_nothing_of_ours() -> None:
    """An exported model works where this package is not."""
    assert ours("pictures.hooks") == set()


def test_the_server_starts_without_tensorflow() -> None:
    """A process that has loaded TensorFlow must not be forked, and gunicorn forks."""
    code = "import sys, celestial_backend.web.server; print({'tensorflow', 'keras', 'bentoml'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert done.stdout.strip() == "set()"
