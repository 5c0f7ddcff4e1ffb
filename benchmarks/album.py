"""The pictures that are predicted: drawn ones of any size, or a folder of real ones."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
from PIL import Image

from celestial_backend.planets.renderer import BODIES, render

SIZE_PX = (128, 128)  # width, height: what the default model was trained on
SEED = 51
GRAIN = 7.0  # grey levels: the noise of a sensor; at 1024 x 768 it makes files of about 190 KB
QUALITY = 90
SMALL_PX = (128, 128)


@dataclass(frozen=True)
class Album:
    """
    Pictures as they lie on a disk, under the names that all backends find them by.

    Attributes:
        originals: Folder with the files under their own names, which hold no dash.
        studio_data: A Label Studio data folder in which the same files are uploads.
        names: The files' own names.
    """

    originals: Path
    studio_data: Path
    names: tuple[str, ...]

    def addresses(self, count: int, folder: str = "1") -> list[str]:
        """What stands in `count` tasks; the pictures come in turn."""
        return [f"/data/upload/{folder}/{_upload_name(name)}" for name in self.take(count)]

    def take(self, count: int) -> list[str]:
        """The pictures' own names for `count` tasks, in turn."""
        return [self.names[number % len(self.names)] for number in range(count)]

    def variants(self, folder: str, count: int) -> list[str]:
        """
        What stands in so many tasks of pictures that differ: after a file's own bytes come some of its number.

        The files are uploads of that folder, and lie beside the originals too.
        """
        uploads = self.studio_data / "media" / "upload" / folder
        uploads.mkdir(parents=True)
        made = []
        for number, name in enumerate(self.take(count)):
            varied = f"{folder}_{number:05}_{name}"
            data = (self.originals / name).read_bytes() + number.to_bytes(4, "big")
            (self.originals / varied).write_bytes(data)
            os.link(self.originals / varied, uploads / _upload_name(varied))
            made.append(f"/data/upload/{folder}/{_upload_name(varied)}")
        return made

    def about(self) -> dict[str, object]:
        """How many, how large in the middle, and of how many pixels."""
        paths = [self.originals / name for name in self.names]
        with Image.open(paths[0]) as first:
            size = first.size
        return {"count": len(paths), "median_kb": round(median(path.stat().st_size for path in paths) / 1000),
                "size_px": list(size)}  # fmt: skip


def lay_out(folder: Path, paths: Sequence[Path]) -> Album:
    """Link pictures into the places where the backends look; small copies of them are the uploads of folder 2."""
    originals, data = folder / "originals", folder / "label-studio"
    uploads, small = data / "media" / "upload" / "1", data / "media" / "upload" / "2"
    for place in (originals, uploads, small):
        place.mkdir(parents=True)
    names = tuple(f"picture_{number:04}{path.suffix.lower()}" for number, path in enumerate(paths, 1))
    for name, path in zip(names, paths, strict=True):
        (originals / name).write_bytes(path.read_bytes())
        os.link(originals / name, uploads / _upload_name(name))
        with Image.open(path) as picture:
            picture.convert("RGB").resize(SMALL_PX).save(small / _upload_name(name), format="jpeg")
    return Album(originals, data, names)


def drawn(folder: Path, count: int, size_px: tuple[int, int] = SIZE_PX) -> list[Path]:
    """Drawn pictures of the bodies in turn, width and height given; those that are there from an earlier run stay."""
    folder = folder / "x".join(map(str, size_px))
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number:04}.jpg" for number in range(count)]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(partial(_draw, size_px), [path for path in paths if not path.exists()]))
    return paths


def label_folders(folder: Path, paths: Sequence[Path]) -> Path:
    """Put drawn pictures into a folder for each body."""
    for path in paths:
        place = folder / BODIES[int(path.stem) % len(BODIES)]
        place.mkdir(parents=True, exist_ok=True)
        (place / path.name).write_bytes(path.read_bytes())
    return folder


def _draw(size_px: tuple[int, int], path: Path) -> None:
    number = int(path.stem)
    body = render(BODIES[number % len(BODIES)], (SEED, number), 512)
    (width, height), side = size_px, min(size_px)
    picture = Image.new("RGB", size_px)
    picture.paste(body.resize((side, side), Image.Resampling.BICUBIC), ((width - side) // 2, (height - side) // 2))
    grain = np.random.default_rng((SEED, number)).normal(0, GRAIN, (height, width, 1))
    grainy = np.clip(np.asarray(picture) + grain, 0, 255).astype(np.uint8)
    part = path.with_suffix(f".part-{os.getpid()}")
    Image.fromarray(grainy).save(part, format="jpeg", quality=QUALITY)
    part.replace(path)


def _upload_name(name: str) -> str:
    """As Label Studio names an upload: eight hexadecimal digits and a dash in front."""
    return f"0ce1e57a-{name}"
