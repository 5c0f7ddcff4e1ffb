"""The house: a file imports only from lower floors, and TensorFlow stays out until it is asked for."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "celestial_backend"
FLOORS = [
    {"__init__", "errors", "files"},
    {"tables", "metrics", "bombs", "deadlines", "connections", "passes", "heap"},
    {"settings", "logs", "protocol", "label_config", "exported", "decode", "folders", "teaching", "contest"},
    {"tags"},
    {"body", "renderer", "augment", "robustness", "modelcard", "ledger", "pointers", "job_queue", "processes", "reach"},
    {"network", "examples", "pages", "outbox", "admission"},
    {"labels", "studio", "guard", "classifier", "registry", "lessons", "training"},
    {"download", "store", "votes", "project", "growth"},
    {"images", "consensus", "finetune", "tally", "endings", "pending"},
    {"predictor", "album", "distribution"},
    {"collect"},
    {"learning", "jobs"},
    {"wiring"},
    {"sdk", "checks", "linking", "bulk"},
    {"backend", "studio_checks", "openapi", "uploads"},
    {"webhook_checks"},
    {"connection_checks"},
    {"app", "lists", "connect", "prelabel", "doctor", "demo_project", "demo_servers"},
    {"demo"},
    {"server", "cli"},
    {"__main__", "worker", "trainer", "page_predictor", "_wsgi"},
]
FILES = [*sorted(PACKAGE.glob("*.py")), PACKAGE.parent / "_wsgi.py"]
# What a floor keeps to itself: nobody else imports these at the top of a file.
OWNERS = {
    "tensorflow": set(),
    "keras": set(),
    "bentoml": set(),
    "label_studio_sdk": set(),
    "label_studio_ml": set(),
    "flask": {"app", "sdk", "server"},
    "gunicorn": {"server", "connections"},
    "click": {"cli", "connect", "demo", "doctor", "lists", "prelabel", "tables"},
    "huey": {"jobs", "job_queue", "pages", "worker"},
    "cleanlab": set(),
    "pandas": set(),
}


def floor_of(name: str) -> int:
    return next(number for number, names in enumerate(FLOORS) if name in names)


def imports(path: Path, *, top_only: bool) -> set[str]:
    tree = ast.parse(path.read_text())
    found: set[str] = set()
    nodes = [node for node in tree.body if not isinstance(node, ast.If)] if top_only else list(ast.walk(tree))
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_imports_only_from_lower_floors(path: Path) -> None:
    """Every file has a floor, and looks only down."""
    ours = {name.split(".")[1] for name in imports(path, top_only=False) if name.startswith("celestial_backend.")}
    upward = {name for name in ours if name != "__version__" and floor_of(name) >= floor_of(path.stem)}
    assert not upward


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_heavy_libraries_have_owners(path: Path) -> None:
    """What is slow to import, or belongs to one file, is not imported at the top of others."""
    roots = {name.split(".")[0] for name in imports(path, top_only=True)}
    assert not {root for root in roots if path.stem not in OWNERS.get(root, {path.stem})}


def test_only_settings_reads_the_environment() -> None:
    """Elsewhere the environment is only handed on whole, or written for a library that reads it."""
    readers = {path.stem for path in FILES if "environ.get(" in path.read_text() or "getenv(" in path.read_text()}
    assert readers <= {"settings", "sdk"}


def test_the_server_starts_without_tensorflow() -> None:
    """A process that has loaded TensorFlow must not be forked, and gunicorn forks."""
    code = "import sys, celestial_backend.server; print({'tensorflow', 'keras', 'bentoml'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    assert done.stdout.strip() == "set()"
