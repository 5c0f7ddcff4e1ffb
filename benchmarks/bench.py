"""What every part works with: how much is measured, where files go, which pictures and which model."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.album import Album
from celestial_backend.commands.demo import plain_environ
from celestial_backend.errors import CelestialError

REPOSITORY = Path(__file__).parents[1]
BIN = Path(sys.executable).parent


class BenchmarkError(CelestialError):
    """A backend or a tool did not do what is measured, so there is no figure."""


@dataclass(frozen=True)
class Sizes:
    """How much each part does."""

    pictures: int = 40
    clients: tuple[int, ...] = (1, 8, 32)
    requests: int = 150  # of one task in each round, for each number of clients
    tasks: int = 1000  # in one request, and in a project of Label Studio
    peer_tasks: int = 200  # for the peers, which take a second for a dozen
    rounds: int = 3
    studio_rounds: int = 2
    steady_tasks: int = 10_000
    growth: tuple[int, ...] = (100, 1000, 10_000, 100_000)
    labels: tuple[int, ...] = (2, 5, 10, 20, 50, 100)  # of each class
    seeds: int = 4


QUICK = Sizes(
    pictures=10, requests=64, tasks=200, peer_tasks=20, rounds=1, studio_rounds=1, steady_tasks=2000,
    growth=(100, 1000, 5000), labels=(2, 5), seeds=1,
)  # fmt: skip


@dataclass(frozen=True)
class Bench:
    """One run of the benchmarks."""

    folder: Path
    sizes: Sizes
    album: Album
    say: Callable[[str], None]
    pictures: Path | None = None  # the folder that was given

    @property
    def store(self) -> Path:
        """The model store that all backends share."""
        return self.folder / "bentoml"

    def environ(self, **settings: object) -> dict[str, str]:
        """A clean environment with this environment's programs first, the shared store, and the given settings."""
        environ = plain_environ()
        environ["PATH"] = f"{BIN}:{environ.get('PATH', '/usr/bin:/bin')}"
        environ |= {
            "PYTHONPATH": str(REPOSITORY),
            "PYTHONUNBUFFERED": "1",
            "TF_CPP_MIN_LOG_LEVEL": "2",
            "BENTOML_DO_NOT_TRACK": "True",
            "BENTOML_HOME": str(self.store),
        }
        return environ | {name: str(value) for name, value in settings.items()}

    def fill_store(self) -> None:
        """Put the default model into the shared store."""
        self.run(["celestial_backend", "models"], self.environ(MODEL_DIR=self.folder / "state"))

    def run(self, module: list[Any], environ: Mapping[str, str]) -> str:
        """
        What ``python -m MODULE ARGUMENTS`` prints.

        Raises:
            BenchmarkError: It failed; the message ends with what it said.
        """
        command = [sys.executable, "-m", *map(str, module)]
        done = subprocess.run(  # noqa: S603 - our own modules
            command, cwd=REPOSITORY, env=dict(environ), capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise BenchmarkError(f"{' '.join(command[1:])} must succeed, and ended with {done.stderr[-1500:]}")
        return done.stdout
