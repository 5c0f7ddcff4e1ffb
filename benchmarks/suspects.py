"""
How well wrong labels are found, and what more labels bring foreseen: ``python -m benchmarks.suspects FOLDER``.

FOLDER is as for `benchmarks.order`. Labels are drawn at random; for the first question, one in twenty is changed to a
wrong class, and for the second, fifty more are drawn, and all other pictures say what these have brought.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.bench import BenchmarkError
from benchmarks.order import Album, Model, read
from celestial_backend.errors import CelestialError
from celestial_backend.labels import ChoiceMap
from celestial_backend.learning.control import Champion, Unseen, unseen
from celestial_backend.learning.dataset import Dataset, Example, Gallery
from celestial_backend.models.headed import GENERAL
from celestial_backend.models.manifest import Counts
from celestial_backend.trust.suspects import MORE, outlook, suspects

FAULTY, FIRST = 0.05, 10
CONTROL = "choice"
FEW = "FOLDER must have two classes with some pictures each."


def judged(album: Album, rows: Sequence[int], names: Sequence[str]) -> Unseen:
    """What heads that did not learn a label say of its picture, by the code of a training."""
    offered = "".join(f'<Choice value="{name}"/>' for name in np.unique(album.names))
    choices = ChoiceMap.for_learning(
        f'<View><Image name="image" value="$image"/><Choices name="{CONTROL}" toName="image">{offered}</Choices></View>'
    )
    keys = [row.to_bytes(4) for row in range(len(album.names))]
    examples = [Example(keys[row], frozenset({name}), 1.0, (int(row),), (int(row),), "unaided")
                for row, name in zip(rows, names, strict=True)]  # fmt: skip
    gallery = Gallery({GENERAL: dict(zip(keys, album.vectors, strict=True))}, {GENERAL: {}})
    pool = {"image": [keys[row] for row in sorted(set(range(len(keys))) - set(rows))]}
    found = unseen(choices.controls[0], Dataset({CONTROL: examples}, gallery, pool, Counts(), None, ""), Champion())
    if found is None:
        raise BenchmarkError(FEW)
    return found


def faults(album: Album, count: int, seed: int) -> dict[str, float]:
    """How far up wrong labels stand among all."""
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(seed)
    rows = rng.permutation(len(album.names))[:count]
    names, wrong = album.names[rows], rng.permutation(count)[: round(FAULTY * count)]
    for each in wrong:
        names[each] = rng.choice([name for name in np.unique(album.names) if name != names[each]])
    said = judged(album, rows.tolist(), names.tolist())
    is_wrong = {int(rows[each]) for each in wrong}
    trust = [float(row[said.choices.index(min(each.choices))])
             for each, row in zip(said.examples, said.said, strict=True)]  # fmt: skip
    faulty = [each.task_ids[0] in is_wrong for each in said.examples]
    named = [each.tasks[0] in is_wrong for each in suspects(CONTROL, said)]
    return {
        "auroc": float(roc_auc_score(faulty, [-each for each in trust])),
        f"first {FIRST}": float(np.mean(named[:FIRST])),
        "first 5 %": float(np.mean(named[: len(wrong)])),
        "named of all": float(sum(named) / len(wrong)),
    }


def foreseen(album: Album, count: int, seed: int) -> dict[str, float]:
    """What more labels are expected to bring, and what they bring."""
    rows = np.random.default_rng(seed).permutation(len(album.names))
    said = judged(album, rows[:count].tolist(), album.names[rows[:count]].tolist())
    told = outlook(len(said.examples), said.steps)
    if told is None:
        raise BenchmarkError(FEW)
    others = album.some(rows[count + MORE :])
    gained = (Model(album, rows[: count + MORE].tolist()).right(others)
              - Model(album, rows[:count].tolist()).right(others))  # fmt: skip
    return {"expected": told.gain, "gained": gained, "in interval": float(told.low <= gained <= told.high),
            "half width": (told.high - told.low) / 2}  # fmt: skip


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--seeds", default=5, show_default=True, help="Choices of labels.")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="Where the figures go, as JSON.")
def main(folder: Path, seeds: int, output: Path | None) -> None:
    """Plant wrong labels of the pictures in FOLDER, and look for them; and foresee what more labels bring."""
    parts = read(folder)
    album = Album(np.concatenate([each.vectors for each in parts]), np.concatenate([each.names for each in parts]))
    found: dict[str, Any] = {"pictures": len(album.names), "seeds": seeds}
    for part, counts in ((foreseen, (60, 120, 250)), (faults, (300, 500, 1000))):
        for count in counts:
            if count + MORE > len(album.names):
                continue
            runs = [part(album, count, seed) for seed in range(seeds)]
            mean = {name: round(float(np.mean([run[name] for run in runs])), 4) for name in runs[0]}
            least = {f"least {name}": round(min(run[name] for run in runs), 4) for name in runs[0] if name == "auroc"}
            found[f"{part.__name__} {count}"] = mean | least
            click.echo(f"{part.__name__}, {count} labels: {mean | least}")
    if output is not None:
        output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main()
    except CelestialError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(error.exit_code)
