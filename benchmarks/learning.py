"""How much is learned from few labels: a folder's own classes, through the code that the worker runs."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any
from xml.sax.saxutils import quoteattr

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from benchmarks.bench import Bench, BenchmarkError
from celestial_backend.features import FeatureCache
from celestial_backend.labels import ChoiceMap
from celestial_backend.learning.control import Champion, teach
from celestial_backend.learning.dataset import Labels, Reader, Wanted, copies_for, dataset, pool_of
from celestial_backend.learning.folder import Files
from celestial_backend.models.embedders import open_embedder
from celestial_backend.models.headed import GENERAL
from celestial_backend.settings import Settings
from celestial_backend.studio.setup import pictures_of

CONTROL = "choice"
SIDE_PX = 32  # of the pictures whose raw pixels are learned
MOMENT = "2026-01-01T12:00:00Z"
HEADS = ("ours", "plain", "pixels")


def learning(bench: Bench) -> dict[str, Any]:
    """
    Shares of unseen pictures that are answered rightly, and the seconds that learning took.

    The folder has `train` and `test`, each with one sub-folder for a class. For each number of labels
    and each seed, as many pictures of every class are labelled; the rest of `train` is a project's
    unlabelled pictures. Each learns the same labels: ours, a plain linear head on the same features
    (scikit-learn's logistic regression as it comes), and that on raw pixels.

    Raises:
        BenchmarkError: The folder is not such a one.
    """
    train, test = (_pictures(bench.pictures, part) for part in ("train", "test"))
    course = _Course(bench.folder, train)
    shown = course.vectors(test)
    names = np.array([name for name, _ in test])
    steps = []
    for count in bench.sizes.labels:
        if count > max(list(course.names).count(name) for name in course.classes):
            bench.say(f"{count} labels a class are more than the folder has")
            break
        runs = [course.run(count, seed, shown, names) for seed in range(bench.sizes.seeds)]
        step = {"labels": count, **{key: round(fmean(run[key] for run in runs), 4) for key in runs[0]}}
        steps.append(step)
        bench.say(", ".join(f"{key} {value}" for key, value in step.items()))
    return {"classes": len(course.classes), "train": len(train), "test": len(test), "seeds": bench.sizes.seeds,
            "steps": steps}  # fmt: skip


@dataclass(frozen=True)
class _Shown:
    """Pictures as what is learned from them: shapes (N, D) and (N, P)."""

    features: NDArray[np.float32]
    pixels: NDArray[np.float32]


class _Course:
    """The pictures that can be labelled."""

    def __init__(self, folder: Path, train: Sequence[tuple[str, Path]]) -> None:
        self._settings, self._folder = Settings(), folder
        self._embedder = open_embedder(self._settings)
        self._paths = [path for _, path in train]
        self.names = np.array([name for name, _ in train])
        self.classes = sorted(set(self.names))
        own = "".join(f"<Choice value={quoteattr(name)}/>" for name in self.classes)
        self._choices = ChoiceMap.for_learning(
            f'<View><Image name="image" value="$image"/><Choices name="{CONTROL}" toName="image">{own}</Choices></View>'
        )
        self._shown = self.vectors(train)

    def run(self, count: int, seed: int, test: _Shown, names: NDArray[np.str_]) -> dict[str, float]:
        """What is right of the test pictures after learning so many labels of each class, and the seconds."""
        rng = np.random.default_rng(seed)
        rows = np.sort(np.concatenate([
            rng.permutation(np.flatnonzero(self.names == name))[:count] for name in self.classes
        ]))  # fmt: skip
        found = self._ours(rows, test, names, self._folder / f"cache-{count}-{seed}")
        for way, mine, theirs in (
            ("plain", self._shown.features, test.features),
            ("pixels", self._shown.pixels, test.pixels),
        ):
            started = time.perf_counter()
            with threadpool_limits(1):
                head = LogisticRegression(max_iter=1000).fit(mine[rows], self.names[rows])
            found[f"{way}_s"] = time.perf_counter() - started
            found[way] = float(np.mean(head.predict(theirs) == names))
        return found

    def vectors(self, pictures: Sequence[tuple[str, Path]]) -> _Shown:
        """Pictures of any folder, in their order."""
        wanted = [Wanted(number, "image", str(path)) for number, (_, path) in enumerate(pictures)]
        reader = self._reader(FeatureCache(Settings(model_dir=self._folder / "features")))
        reader.read(wanted)
        if unread := [str(each.value) for each in wanted if each.picture is None]:
            raise BenchmarkError(f"All pictures must be readable, and {len(unread)} are not, first {unread[0]}.")
        known = [each.picture for each in wanted if each.picture is not None]
        pixels = np.stack([_pixels(path) for _, path in pictures])
        return _Shown(reader.gallery.rows(known, (GENERAL,)), pixels)

    def _ours(
        self, rows: NDArray[np.integer], test: _Shown, names: NDArray[np.str_], folder: Path
    ) -> dict[str, float]:
        """First with nothing known of the pictures; then again, with all features known."""
        cache = FeatureCache(Settings(model_dir=folder))
        seconds = []
        for _ in range(2):
            started = time.perf_counter()
            labels, reader = Labels(self._choices, "1"), self._reader(cache)
            for row in rows:
                labels.add(self._task(int(row), [self._annotation(int(row))]))
            reader.read(labels.wanted.values(), copies_for(len(labels.wanted)))
            read = time.perf_counter()
            rest = np.setdiff1d(np.arange(len(self._paths)), rows)
            pool = list(pool_of((self._task(int(row), []) for row in rest), labels, "1"))
            reader.read(pool)
            data = dataset(labels, reader, pool)
            pooled = time.perf_counter()
            lesson = teach(self._choices.controls[0], data, Champion())
            ended = time.perf_counter()
            cache.close()
            seconds.append((read - started, pooled - read, ended - pooled))
        new, known = seconds
        if lesson is None:
            raise BenchmarkError("Every class must have labels enough to be learned.")
        said = np.array(lesson.head.classes)[lesson.head.probabilities(test.features).argmax(axis=1)]
        return {
            "ours": float(np.mean(said == names)), "ours_s": sum(known), "ours_new_s": new[0] + new[2],
            "pool_new_s": new[1],
        }  # fmt: skip

    def _reader(self, cache: FeatureCache) -> Reader:
        return Reader(Files(self._settings), cache, {GENERAL: self._embedder}, os.cpu_count() or 2)

    def _task(self, row: int, annotations: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": row + 1, "data": {"image": str(self._paths[row])}, "annotations": annotations}

    def _annotation(self, row: int) -> dict[str, Any]:
        chosen = {"choices": [str(self.names[row])]}
        region = {"from_name": CONTROL, "to_name": "image", "type": "choices", "value": chosen}
        return {"id": row + 1, "completed_by": 1, "updated_at": MOMENT, "result": [region]}


def _pictures(folder: Path | None, part: str) -> list[tuple[str, Path]]:
    """The class and the path of each picture of a part."""
    if folder is None or not (folder / part).is_dir():
        raise BenchmarkError("learning needs --pictures FOLDER with train and test, in each a sub-folder for a class.")
    return [(path.parent.name, path) for path in pictures_of(folder / part)]


def _pixels(path: Path) -> NDArray[np.float32]:
    with Image.open(path) as picture:
        small = picture.convert("RGB").resize((SIDE_PX, SIDE_PX), Image.Resampling.BILINEAR)
    return np.asarray(small, np.float32).ravel() / np.float32(255)
