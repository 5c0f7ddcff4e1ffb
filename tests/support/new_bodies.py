"""Pictures of things that the default model has never seen: a comet, a galaxy, a nebula."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Floats = NDArray[np.float64]
Rng = np.random.Generator


def _clouds(size_px: int, rng: Rng) -> Floats:
    """Soft noise of four scales, about 0 to 1."""
    total = np.zeros((size_px, size_px))
    for octave in range(4):
        cells = rng.integers(0, 256, (3 * 2**octave, 3 * 2**octave), dtype=np.uint8)
        fine = Image.fromarray(cells).resize((size_px, size_px), Image.Resampling.BICUBIC)
        total += np.asarray(fine, float) / 255 / 2 ** (octave + 1)
    return total


def _comet(x: Floats, y: Floats, rng: Rng) -> Floats:
    """A bright head, a straight bluish tail of gas and a wider, bent one of dust."""
    angle = rng.uniform(-math.pi, math.pi)
    x, y = x + 0.55 * math.cos(angle), y + 0.55 * math.sin(angle)
    along, aside = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    length = rng.uniform(0.5, 1.1)
    tail = np.exp(-np.maximum(along, 0) / length) * (along > -0.05)
    gas = tail * np.exp(-((aside / (0.03 + 0.08 * np.maximum(along, 0))) ** 2))
    bent = aside - rng.uniform(-0.4, 0.4) * np.maximum(along, 0) ** 2
    dust = tail * np.exp(-((bent / (0.05 + rng.uniform(0.15, 0.35) * np.maximum(along, 0))) ** 2))
    head = np.exp(-((np.hypot(along, aside) / rng.uniform(0.06, 0.13)) ** 2))
    halo = 0.5 * np.exp(-np.hypot(along, aside) / rng.uniform(0.08, 0.16))
    green = np.array((0.55, 1.0, 0.75)) if rng.random() < 0.5 else np.array((0.9, 0.95, 1.0))
    return (
        head[..., None]
        + halo[..., None] * green
        + gas[..., None] * (0.35, 0.55, 0.95) * rng.uniform(0.3, 0.8)
        + dust[..., None] * (0.95, 0.85, 0.65) * rng.uniform(0.3, 0.8)
    )


def _galaxy(x: Floats, y: Floats, rng: Rng) -> Floats:
    """A spiral with two to four arms, seen from any side: a warm core, blue arms."""
    angle, flat = rng.uniform(-math.pi, math.pi), rng.uniform(0.25, 1.0)
    along, aside = x * math.cos(angle) + y * math.sin(angle), (y * math.cos(angle) - x * math.sin(angle)) / flat
    far, around = np.hypot(along, aside), np.arctan2(aside, along)
    arms, wound = int(rng.integers(2, 5)), rng.uniform(3, 6) * rng.choice((-1, 1))
    crest = (0.5 + 0.5 * np.cos(arms * around - wound * np.log(far + 0.05))) ** rng.uniform(1, 3)
    disc = np.exp(-far / rng.uniform(0.25, 0.4))
    grain = 0.6 + 0.8 * _clouds(len(x), rng)
    core = np.exp(-((far / rng.uniform(0.1, 0.2)) ** 2))
    arm = disc * (0.2 + crest) * grain
    return core[..., None] * (1.0, 0.88, 0.65) + arm[..., None] * (0.6, 0.7, 1.0) * rng.uniform(0.7, 1.1)


def _nebula(x: Floats, y: Floats, rng: Rng) -> Floats:
    """Ragged clouds of two colours with dark lanes."""
    size_px = len(x)
    one, other, lane = _clouds(size_px, rng), _clouds(size_px, rng), _clouds(size_px, rng)
    fade = np.exp(-((np.hypot(x, y) / rng.uniform(0.6, 1.0)) ** 4))
    colours = np.array([(0.95, 0.25, 0.35), (0.3, 0.5, 0.95), (0.3, 0.85, 0.7), (0.9, 0.55, 0.25)])
    first, second = rng.choice(len(colours), 2, replace=False)
    light = np.clip(one * 2.2 - 0.6, 0, 1)[..., None] * colours[first]
    light = light + np.clip(other * 2.2 - 0.7, 0, 1)[..., None] * colours[second]
    return light * (fade * np.clip(1.6 - 2 * np.clip(lane - 0.35, 0, 1) * 2, 0.1, 1))[..., None]


_PAINTERS: dict[str, Callable[[Floats, Floats, Rng], Floats]] = {"Comet": _comet, "Galaxy": _galaxy, "Nebula": _nebula}
NEW_BODIES = tuple(_PAINTERS)


def render_new(name: str, seed: int | Sequence[int], size_px: int = 128) -> Image.Image:
    """An RGB picture of one of `NEW_BODIES` before a few stars; the same seed gives the same pixels."""
    rng = np.random.default_rng([NEW_BODIES.index(name), *np.atleast_1d(seed).tolist()])
    line = ((np.arange(size_px) + 0.5) / size_px * 2 - 1) / rng.uniform(0.75, 1.1)
    x, y = np.meshgrid(line - rng.uniform(-0.12, 0.12), line - rng.uniform(-0.12, 0.12))
    picture = _PAINTERS[name](x, y, rng) * rng.uniform(0.7, 1.1) * rng.uniform(0.9, 1.1, 3)
    stars = rng.integers(0, size_px, (int(rng.integers(0, 60)), 2))
    picture[stars[:, 0], stars[:, 1]] += rng.uniform(0.2, 0.9, (len(stars), 1))
    picture += rng.normal(0, rng.uniform(0, 0.02), picture.shape)
    return Image.fromarray((np.clip(picture, 0, 1) * 255).astype(np.uint8))
