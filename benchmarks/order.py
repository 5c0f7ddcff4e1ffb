"""
What an order of labelling is worth: ``python -m benchmarks.order FOLDER`` has an annotator simulated.

FOLDER has `train` and `test`, in each a sub-folder for each class; of one without them, a quarter is kept to judge by.
The annotator labels what comes next, and heads are learned as a training learns them, after ten labels and whenever
they have grown by a fifth. What is right of the pictures to judge by is told after each training.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from celestial_backend.errors import CelestialError
from celestial_backend.features import FeatureCache
from celestial_backend.learning import heads
from celestial_backend.learning.dataset import Reader, Wanted
from celestial_backend.learning.folder import Files
from celestial_backend.models.embedders import open_embedder
from celestial_backend.models.headed import GENERAL
from celestial_backend.settings import Settings
from celestial_backend.studio.setup import pictures_of
from celestial_backend.trust.order import EXPLORED, FIRST_EACH, places

LEAST, GROWN = 10, 5  # labels between two trainings, at least, and one in so many
SHARE = 5 / 6  # of the pictures that one seed has in its project
RARER = 0.72  # from class to class, of an unbalanced project
Rows = NDArray[np.integer]


@dataclass(frozen=True)
class Album:
    """Pictures as vectors, shape (N, D), and what they show, shape (N,)."""

    vectors: NDArray[np.float32]
    names: NDArray[np.str_]

    def some(self, rows: Rows) -> Album:
        """Those of some rows."""
        return Album(self.vectors[rows], self.names[rows])


class Model:
    """A head that was learned from some labels of an album."""

    def __init__(self, album: Album, labelled: Sequence[int], faulty: NDArray[np.str_] | None = None) -> None:
        rows = np.array(labelled)
        names = album.names[rows] if faulty is None else faulty
        counts = dict(zip(*np.unique(names, return_counts=True), strict=True))
        self.classes = np.array([name for name, count in counts.items() if count > 1])
        self.rows = np.flatnonzero(np.isin(names, self.classes))
        self.given = names[self.rows]
        if len(self.classes) < 2:
            return
        width = album.vectors.shape[1]
        self.fitted = heads.fit(heads.Lessons(
            album.vectors[rows[self.rows]], (self.given[:, None] == self.classes).astype(np.float32),
            np.ones(len(self.rows), np.float32), {GENERAL: slice(0, width)}, np.zeros((0, width), np.float32),
            np.zeros(0, int), np.delete(album.vectors, rows, axis=0),
        ))  # fmt: skip

    def says(self, album: Album) -> NDArray[np.float64] | None:
        """Probabilities, shape (N, K); None from too few labels."""
        if len(self.classes) < 2:
            return None
        logits = (album.vectors @ self.fitted.weights + self.fitted.bias).astype(np.float64)
        return heads.probabilities(logits, multiple=False)

    def right(self, album: Album) -> float:
        """The share of an album that it says rightly."""
        said = self.says(album)
        return 0.0 if said is None else float(np.mean(self.classes[said.argmax(axis=1)] == album.names))


class Annotator:
    """Labels a project in an order, and tells after each training how much is right."""

    def __init__(self, album: Album, judged: Album, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.album = album.some(rng.permutation(len(album.names))[: round(SHARE * len(album.names))])
        self.judged, self.classes = judged, len(set(album.names))
        self._any = rng.permutation(len(self.album.names))
        chance = rng.random((2, len(self.album.names)))
        self._chance = np.where(chance[0] < EXPLORED, chance[1], np.nan)

    def curve(self, order: Callable[[Annotator, list[int], Model | None], Sequence[int]], most: int) -> list[Any]:
        """After each training, how many labels there are, and what is right."""
        labelled: list[int] = []
        model, found = None, []
        while len(labelled) < min(most, len(self.album.names)):
            step = max(LEAST, -(-len(labelled) // GROWN))
            labelled += list(order(self, labelled, model))[:step]
            model = Model(self.album, labelled)
            found.append((len(labelled), round(model.right(self.judged), 4)))
        return found

    def random(self, labelled: list[int], _model: Model | None) -> list[int]:
        """Any order."""
        return [int(row) for row in self._any if row not in set(labelled)]

    def confidence(self, labelled: list[int], model: Model | None) -> list[int]:
        """The lowest probability first; any order without a model."""
        said = model.says(self.album) if model else None
        left = self.random(labelled, None)
        return left if said is None else sorted(left, key=said.max(axis=1).__getitem__)

    def margin(self, labelled: list[int], model: Model | None) -> list[int]:
        """The smallest lead first; any order without a model."""
        leads = self._leads(model)
        left = self.random(labelled, None)
        return left if np.isnan(leads).all() else sorted(left, key=leads.__getitem__)

    def typical(self, labelled: list[int], model: Model | None) -> list[int]:
        """As `CELESTIAL_SCORE=typical`."""
        known = np.zeros(len(self.album.names), bool)
        known[labelled] = True
        place_of = places(self.album.vectors, known, self._leads(model), self._chance, FIRST_EACH * self.classes)
        return sorted(place_of, key=place_of.__getitem__)

    def _leads(self, model: Model | None) -> NDArray[np.float64]:
        said = model.says(self.album) if model else None
        if said is None:
            return np.full(len(self.album.names), np.nan)
        ranked = np.sort(said, axis=1)
        return np.asarray(ranked[:, -1] - ranked[:, -2])


ORDERS = {"random": Annotator.random, "confidence": Annotator.confidence, "margin": Annotator.margin,
          "typical": Annotator.typical}  # fmt: skip


def reached(curve: Sequence[tuple[int, float]], wanted: float) -> float | None:
    """How many labels it took for so much to be right, between two trainings in proportion; None if it never was."""
    before = (0, 0.0)
    for count, right in curve:
        if right >= wanted:
            return before[0] + (count - before[0]) * (wanted - before[1]) / (right - before[1])
        before = (count, right)
    return None


def read(folder: Path) -> tuple[Album, Album]:
    """The pictures to label, and those to judge by."""
    with tempfile.TemporaryDirectory() as cache:
        settings = Settings(model_dir=Path(cache))
        parts = [folder / part for part in ("train", "test")]
        albums = [_album(part, settings) for part in (parts if all(map(Path.is_dir, parts)) else [folder])]
    if len(albums) == 1:
        rows = np.random.default_rng(7).permutation(len(albums[0].names))
        cut = len(rows) // 4
        albums = [albums[0].some(rows[cut:]), albums[0].some(rows[:cut])]
    return albums[0], albums[1]


def _album(folder: Path, settings: Settings) -> Album:
    paths = pictures_of(folder)
    wanted = [Wanted(number, "image", str(path)) for number, path in enumerate(paths)]
    reader = Reader(Files(settings), FeatureCache(settings), {GENERAL: open_embedder(settings)}, 2)
    reader.read(wanted)
    known = [(each.picture, path.parent.name) for each, path in zip(wanted, paths, strict=True) if each.picture]
    return Album(reader.gallery.rows([picture for picture, _ in known], (GENERAL,)), np.array([n for _, n in known]))


def unbalanced(album: Album) -> Album:
    """With fewer and fewer pictures from class to class."""
    rng = np.random.default_rng(1)
    names = np.unique(album.names)
    kept = [rng.permutation(np.flatnonzero(album.names == name))[: max(6, round(120 * RARER**at))]
            for at, name in enumerate(names)]  # fmt: skip
    return album.some(np.concatenate(kept))


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--seeds", default=5, show_default=True, help="Simulated annotators for each order.")
@click.option("--labels", default=250, show_default=True, help="Labels that each gives.")
@click.option("--order", "orders", type=click.Choice(list(ORDERS)), multiple=True, help="Only this one.")
@click.option("--aim", "aims", type=float, multiple=True, default=(0.8, 0.85), show_default=True)
@click.option("--unbalanced", "rare", is_flag=True, help="With fewer and fewer pictures from class to class.")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="Where the figures go, as JSON.")
def main(
    folder: Path,
    seeds: int,
    labels: int,
    orders: tuple[str, ...],
    aims: tuple[float, ...],
    *,
    rare: bool,
    output: Path | None,
) -> None:
    """Simulate annotators of the pictures in FOLDER, and tell how many labels each order takes."""
    album, judged = read(folder)
    album = unbalanced(album) if rare else album
    found: dict[str, Any] = {"pictures": len(album.names), "classes": len(set(album.names)), "seeds": seeds}
    for name in orders or ORDERS:
        curves = [Annotator(album, judged, seed).curve(ORDERS[name], labels) for seed in range(seeds)]
        found[name] = {"curve": _mean(curves)}
        for aim in aims:
            mine = [reached(curve, aim) for curve in curves]
            found[name][f"labels to {aim:.0%}"] = [each and round(each) for each in mine]
            sure = [labels if each is None else each for each in mine]
            click.echo(f"{name}: {aim:.0%} after {np.mean(sure):.0f} labels on average"
                       f" ({', '.join('never' if each is None else f'{each:.0f}' for each in mine)})")  # fmt: skip
        click.echo(f"{name}: " + ", ".join(f"{count}: {right:.3f}" for count, right in found[name]["curve"]))
    if output is not None:
        output.write_text(json.dumps(found, indent=1) + "\n")


def _mean(curves: Sequence[Sequence[tuple[int, float]]]) -> list[tuple[int, float]]:
    counts = [20, 30, 40, 50, 60, 80, 100, 120, 150, 200, 250]
    last = min(curve[-1][0] for curve in curves)
    rights = [np.interp(counts, [each[0] for each in curve], [each[1] for each in curve]) for curve in curves]
    return [(count, round(float(right), 4)) for count, right in zip(counts, np.mean(rights, axis=0), strict=True)
            if count <= last]  # fmt: skip


if __name__ == "__main__":
    try:
        main()
    except CelestialError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(error.exit_code)
