"""
Whether scores mean what they say, and pictures of classes that nobody labelled are found:
``python -m benchmarks.scores FOLDER --planets RAW``.

FOLDER is as for `benchmarks.order`, RAW holds the pictures that the default model was made from. Heads are learned from
some labels of FOLDER, as a training learns them. For unknown pictures, each pair of classes is left out in turn.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.order import RARER, Album, Model, read
from celestial_backend.errors import CelestialError
from celestial_backend.features import Familiar
from celestial_backend.models.classifier import Model as Served
from celestial_backend.planets import robustness
from celestial_backend.planets.examples import read_folder, split
from celestial_backend.planets.renderer import render
from celestial_backend.planets.training import Recipe
from celestial_backend.services import build
from celestial_backend.settings import Settings
from celestial_backend.studio.setup import pictures_of
from celestial_backend.trust.calibration import calibration_error
from tests.support.new_bodies import NEW_BODIES, render_new

LABELS, EACH, BINS = (20, 50, 200, 500), (20, 50, 115), 15
CLOTHES, OTHERS_EACH = 100, 40  # photographs of FOLDER and pictures of each body that the default model is shown
Figures = dict[str, float]


def errors(said: NDArray[np.float64], truths: NDArray[np.integer], seed: int = 0) -> Figures:
    """How far scores are off: in groups of one size, in groups of one width, and what right scores would show."""
    sure, right = said.max(axis=1), said.argmax(axis=1) == truths
    found = calibration_error(sure, right, BINS)
    drawn = np.where(np.random.default_rng(seed).random(len(sure)) < sure, said.argmax(axis=1), -1)
    return {
        "right": float(right.mean()),
        "mean score": float(sure.mean()),
        "error": found.value if found else 0.0,
        "by width": robustness.expected_calibration_error(said, truths, BINS),
        "by width, by chance": robustness.expected_calibration_error(said, drawn, BINS),
    }


def of_heads(train: Album, judged: Album, count: int, seed: int, share: float) -> Figures | None:
    """
    How far the scores of a head are off, by all pictures that it did not learn.

    Each class has `share` of the labels of the one before.
    """
    classes, rng = np.unique(train.names), np.random.default_rng(seed)
    shares = share ** np.arange(len(classes))[rng.permutation(len(classes))]
    wanted = np.maximum(2, np.round(count * shares / shares.sum())).astype(int)
    rows = np.concatenate([rng.permutation(np.flatnonzero(train.names == name))[:number]
                           for name, number in zip(classes, wanted, strict=True)])  # fmt: skip
    model, rest = Model(train, rows.tolist()), train.some(np.setdiff1d(np.arange(len(train.names)), rows))
    unseen = Album(np.concatenate([judged.vectors, rest.vectors]), np.concatenate([judged.names, rest.names]))
    said = model.says(unseen)
    if said is None:
        return None
    truths = np.argmax(unseen.names[:, None] == model.classes, axis=1)
    return errors(said, truths, seed) | {"pictures": len(truths)}


def of_unknown(train: Album, judged: Album, left_out: Sequence[str], each: int, seed: int) -> Figures | None:
    """How well the pictures of some classes are told from all others."""
    from sklearn.metrics import roc_auc_score

    rng, known = np.random.default_rng(seed), [name for name in np.unique(train.names) if name not in left_out]
    rows = np.concatenate([rng.permutation(np.flatnonzero(train.names == name))[:each] for name in known])
    familiar = Familiar.of(train.vectors[rows], np.unique(train.names[rows], return_inverse=True)[1])
    unknown = np.isin(judged.names, left_out)
    if familiar is None:
        return None
    distances = familiar.measure.distance(judged.vectors)
    beyond = distances > familiar.limit
    return {"area": float(roc_auc_score(unknown, distances)), "known withheld": float(beyond[~unknown].mean()),
            "unknown withheld": float(beyond[unknown].mean())}  # fmt: skip


def of_default(raw: Path, photographs: Sequence[Path]) -> dict[str, Figures]:
    """The default model, on pictures that it did not learn, on the same changed, and on photographs."""
    with tempfile.TemporaryDirectory() as place:
        model = build(Settings(model_dir=Path(place), bentoml_home=Path(place, "bentoml"))).store.current()
        _, held_out = split(read_folder(raw), Recipe().held_out_share)
        truths = np.array([model.vocabulary.classes.index(each.class_name) for each in held_out])
        answered = {name: _answers(model, shown)
                    for name, shown in robustness.suite([each.load() for each in held_out]).items()}  # fmt: skip
        said, strange = answered.pop("clean")
        changed = np.concatenate([rows for rows, _ in answered.values()])
        changed_truths = np.tile(truths, len(changed) // len(truths))
        withheld = np.concatenate([beyond for _, beyond in answered.values()])
        others = [render_new(name, number) for name in NEW_BODIES for number in range(OTHERS_EACH)]
        drawn = [render(name, number) for name in model.vocabulary.classes for number in range(OTHERS_EACH)]
        shown = [Image.open(path).convert("RGB") for path in photographs]
        return {
            "clean": errors(said, truths) | {"pictures": len(truths), "withheld": float(strange.mean())},
            "changed": errors(changed, changed_truths) | {"pictures": len(changed), "withheld": float(withheld.mean())},
            "photographs": {"pictures": len(shown), "withheld": float(_answers(model, shown)[1].mean())},
            "other bodies": {"pictures": len(others), "withheld": float(_answers(model, others)[1].mean())},
            "drawn anew": {"pictures": len(drawn), "withheld": float(_answers(model, drawn)[1].mean())},
        }


def _answers(model: Served, pictures: Sequence[Image.Image]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """What a model says, shape (N, K), and what it withholds, shape (N,)."""
    parts = [model.answers(np.concatenate([model.prepare(each) for each in pictures[start : start + 64]]))
             for start in range(0, len(pictures), 64)]  # fmt: skip
    return np.concatenate([rows for rows, _ in parts]), np.concatenate([beyond[:, 0] > 0 for _, beyond in parts])


def _mean(runs: Sequence[Figures | None]) -> Figures:
    known = [run for run in runs if run is not None]
    return {name: round(float(np.mean([run[name] for run in known])), 4) for name in known[0]} if known else {}


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--planets", type=click.Path(exists=True, file_okay=False, path_type=Path), help="RAW.")
@click.option("--seeds", default=5, show_default=True, help="Choices of labels.")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="Where the figures go, as JSON.")
def main(folder: Path, planets: Path | None, seeds: int, output: Path | None) -> None:
    """Measure the scores of heads and of the default model, and how well unknown pictures are found."""
    train, judged = read(folder)
    found: dict[str, Any] = {"pictures": [len(train.names), len(judged.names)], "seeds": seeds}

    def tell(name: str, figures: Any) -> None:
        found[name] = figures
        click.echo(f"{name}: {figures}")
        if output is not None:
            output.write_text(json.dumps(found, indent=1) + "\n")

    if planets is not None:
        figures = of_default(planets, pictures_of(folder)[:: max(1, len(pictures_of(folder)) // CLOTHES)][:CLOTHES])
        tell("default model", {name: _mean([each]) for name, each in figures.items()})
    for count in LABELS:
        for way, share in (("evenly", 1.0), ("unevenly", RARER)):
            runs = [of_heads(train, judged, count, seed, share) for seed in range(seeds)]
            tell(f"{count} labels, {way}", _mean(runs))
    for each in EACH:
        pairs = [of_unknown(train, judged, pair, each, seed)
                 for seed, pair in enumerate(combinations(np.unique(train.names).tolist(), 2))]  # fmt: skip
        areas = [pair["area"] for pair in pairs if pair is not None]
        spread = {"least area": round(min(areas), 4), "deviation": round(float(np.std(areas)), 4)} if areas else {}
        tell(f"two classes left out, {each} labels a class", _mean(pairs) | spread | {"pairs": len(areas)})


if __name__ == "__main__":
    try:
        main()
    except CelestialError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(error.exit_code)
