"""
Pictures of the ten bodies, drawn from nothing but numbers.

A sphere is seen from far away: every pixel knows the point of the globe that it shows, and a
recipe for each body paints that point with noise, bands and craters. Good enough for tests,
for a demonstration, and as a second source to learn from; no picture from elsewhere is used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

Floats = NDArray[np.float64]
Rng = np.random.Generator


def _mix(low: ArrayLike, high: ArrayLike, share: Floats) -> Floats:
    """Colours (..., 3) between two colours, by a share of shape (...)."""
    part = np.clip(share, 0, 1)[..., None]
    return np.asarray(np.asarray(low, float) * (1 - part) + np.asarray(high, float) * part)


def _step(values: Floats, start: float, end: float) -> Floats:
    """0 below start, 1 above end, smooth between."""
    t = np.clip((values - start) / (end - start), 0, 1)
    return np.asarray(t * t * (3 - 2 * t))


def _noise(points: Floats, rng: Rng, scale: float, octaves: int = 4) -> Floats:
    """Smooth random values about 0 to 1 for points (..., 3); each octave halves in size and in strength."""
    table, total, strength = rng.random(16**3), np.zeros(points.shape[:-1]), 0.0
    for octave in range(octaves):
        place = points * scale * 2**octave + rng.uniform(0, 16, 3)
        cell = np.floor(place).astype(int)
        high = place - cell
        high = high * high * (3 - 2 * high)
        weights = (1 - high, high)
        rows = (cell & 15, (cell + 1) & 15)
        for i, j, k in np.ndindex(2, 2, 2):
            at = (rows[i][..., 0] << 8) | (rows[j][..., 1] << 4) | rows[k][..., 2]
            total += weights[i][..., 0] * weights[j][..., 1] * weights[k][..., 2] * (table[at] / 2**octave)
        strength += 1 / 2**octave
    return np.asarray((total / strength - 0.5) * 1.8 + 0.5)


def _craters(points: Floats, rng: Rng, count: int, largest: float, rays: float) -> Floats:
    """Change of brightness by craters: dark floors, bright rims, and bright rays around the freshest."""
    centres = rng.normal(size=(count, 3))
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    sizes = largest * rng.power(0.5, count) * 0.9 + 0.02
    apart = np.arccos(np.clip(points @ centres.T, -1, 1)) / sizes
    change = 0.10 * np.exp(-(((apart - 1) / 0.25) ** 2)) - 0.07 * (apart < 0.85)
    fresh = rng.random(count) < rays
    change += 0.28 * fresh * np.exp(-((apart / 1.6) ** 2))
    return np.asarray(np.clip(change.sum(axis=-1), -0.25, 0.4))


def _bands(points: Floats, rng: Rng, colours: Sequence[Sequence[float]], rough: float) -> Floats:
    """Colours by latitude, south to north, their edges frayed by noise."""
    stretched = points * (1, 6, 1)
    frayed = points[..., 1] + rough * (_noise(stretched, rng, 2.2, 4) - 0.5)
    place = (np.clip(frayed, -1, 1) + 1) / 2 * (len(colours) - 1)
    table = np.asarray(colours, float)
    return np.stack([np.interp(place, np.arange(len(table)), table[:, k]) for k in range(3)], axis=-1)


def _earth(points: Floats, rng: Rng) -> Floats:
    height, dry = _noise(points, rng, 1.4, 5), _noise(points, rng, 2.0, 4)
    north = np.abs(points[..., 1])
    sea = _mix((22, 52, 120), (32, 78, 150), _noise(points, rng, 2, 3))
    land = _mix((58, 92, 38), (190, 162, 112), _step(dry - 0.5 * np.abs(north - 0.4), 0.3, 0.5))
    ground = _mix(sea, land, _step(height, 0.53, 0.56))
    ground = _mix(ground, (240, 245, 250), _step(north + 0.15 * (height - 0.5), 0.88, 0.93))
    clouds = _noise(points * (1, 2, 1), rng, 2.2, 5)
    return _mix(ground, (235, 238, 242), 0.9 * _step(clouds, 0.56, 0.8))


def _jupiter(points: Floats, rng: Rng) -> Floats:
    pole, cream, white, brown = (138, 122, 98), (204, 190, 160), (222, 216, 205), (172, 128, 66)
    belts = [pole, pole, cream, (160, 135, 95), white, cream, brown, brown, white, white]
    belts += [cream, (178, 134, 62), brown, cream, white, (170, 140, 90), cream, pole, pole]
    colours = _bands(points, rng, belts, 0.09)
    if rng.random() < 0.6:
        angle = rng.uniform(-1, 1)
        spot = (np.arctan2(points[..., 0], points[..., 2]) - angle) ** 2 / 0.06 + (points[..., 1] + 0.37) ** 2 / 0.012
        colours = _mix(colours, (186, 100, 62), (1 - _step(spot, 0.6, 1.1)) * (points[..., 2] > 0))
    return colours * (0.9 + 0.2 * _noise(points * (1, 5, 1), rng, 3.5, 4))[..., None]


def _mars(points: Floats, rng: Rng) -> Floats:
    ground = _mix((142, 74, 44), (190, 112, 72), _noise(points, rng, 2.5, 5))
    ground = _mix(ground, (62, 42, 36), 0.85 * _step(_noise(points, rng, 1.5, 5), 0.54, 0.7))
    cap = _step(np.abs(points[..., 1]) + 0.08 * (_noise(points, rng, 4, 3) - 0.5), rng.uniform(0.93, 0.99), 1.0)
    return _mix(ground, (236, 226, 216), cap) * (1 + 0.8 * _craters(points, rng, 25, 0.1, 0.03))[..., None]


def _mercury(points: Floats, rng: Rng) -> Floats:
    grey = 112 + 34 * (_noise(points, rng, 3, 5) - 0.5) + 40 * (_noise(points, rng, 12, 3) - 0.5)
    return (grey * (1 + 1.1 * _craters(points, rng, 150, 0.07, 0.22)))[..., None] * (1.0, 0.985, 0.97)


def _moon(points: Floats, rng: Rng) -> Floats:
    grey = 172 + 34 * (_noise(points, rng, 6, 4) - 0.5)
    maria = _noise(points, rng, 1.1, 4) + 0.16 * points[..., 2] * rng.uniform(0, 1)
    grey = grey * (1 - 0.5 * _step(maria, 0.5, 0.6))
    return (grey * (1 + 0.9 * _craters(points, rng, 80, 0.06, 0.08)))[..., None] * (1.0, 0.985, 0.98)


def _neptune(points: Floats, rng: Rng) -> Floats:
    deep, plain, light = (46, 52, 158), (52, 92, 208), (68, 128, 222)
    colours = _bands(points, rng, [deep, plain, light, plain, deep, plain, light, plain, deep], 0.12)
    streaks = _step(_noise(points * (1, 8, 1), rng, 1.6, 4), 0.76, 0.92)
    return _mix(colours, (205, 225, 250), 0.7 * streaks)


def _pluto(points: Floats, rng: Rng) -> Floats:
    ground = _mix((150, 130, 122), (226, 220, 216), _noise(points, rng, 2.2, 5))
    ground = _mix(ground, (62, 38, 30), 0.95 * _step(_noise(points, rng, 1.3, 5), 0.5, 0.62))
    ground = _mix(ground, (238, 232, 226), _step(_noise(points, rng, 1.0, 3), 0.64, 0.7))
    return ground * (1 + 0.7 * _craters(points, rng, 30, 0.09, 0.0))[..., None]


def _saturn(points: Floats, rng: Rng) -> Floats:
    belts = [(150, 148, 130), (196, 176, 128), (226, 204, 152), (236, 218, 172), (222, 196, 140), (240, 226, 186)]
    return _bands(points, rng, [*belts, (232, 210, 160), (206, 184, 132), (168, 162, 138)], 0.03)


def _uranus(points: Floats, rng: Rng) -> Floats:
    pale = _mix((142, 200, 208), (176, 230, 234), _step(points[..., 1] * rng.choice((-1, 1)), -1, 1))
    return pale * (0.99 + 0.02 * _noise(points * (1, 4, 1), rng, 1.5, 2))[..., None]


def _venus(points: Floats, rng: Rng) -> Floats:
    swirl = points + 0.5 * _noise(points, rng, 1.2, 2)[..., None]
    veil = _noise(swirl * (1, 2.6, 1), rng, 1.6, 5)
    return _mix((186, 132, 74), (244, 206, 142), _step(veil, 0.1, 0.75))


_PAINTERS: dict[str, Callable[[Floats, Rng], Floats]] = {
    "Earth": _earth,
    "Jupiter": _jupiter,
    "Mars": _mars,
    "Mercury": _mercury,
    "Moon": _moon,
    "Neptune": _neptune,
    "Pluto": _pluto,
    "Saturn": _saturn,
    "Uranus": _uranus,
    "Venus": _venus,
}
BODIES = tuple(_PAINTERS)


def _turn(angle: float, first: int, second: int) -> Floats:
    matrix = np.eye(3)
    matrix[first, first] = matrix[second, second] = math.cos(angle)
    matrix[first, second], matrix[second, first] = -math.sin(angle), math.sin(angle)
    return matrix


def _rings(x: Floats, y: Floats, depth: Floats, opening: float, rng: Rng) -> tuple[Floats, Floats]:
    """Colour (H, W, 3) and cover (H, W) of Saturn's rings, 0 where the globe hides them."""
    along = y / math.sin(opening)
    radius, behind = np.hypot(x, along), -along * math.cos(opening) < depth
    edges = [0, 1.24, 1.27, 1.52, 1.55, 1.94, 1.96, 2.02, 2.04, 2.26, 2.29, 9]
    cover = np.interp(radius, edges, [0, 0, 0.4, 0.55, 0.95, 0.95, 0.08, 0.08, 0.85, 0.8, 0, 0])
    grooves = np.interp(radius, np.linspace(1.2, 2.3, 40), rng.uniform(0.75, 1.1, 40))
    colour = _mix((92, 84, 76), (158, 142, 122), _step(radius, 1.3, 1.7)) * grooves[..., None]
    return colour, np.where(behind, 0, cover)


def render(body: str, seed: int | Sequence[int], size_px: int = 128) -> Image.Image:
    """
    A body on black, seen from a random side.

    Args:
        body: One of `BODIES`.
        seed: The same seed gives the same pixels.
        size_px: Height and width.

    Returns:
        An RGB picture.

    Raises:
        ValueError: The body is none that can be drawn.
    """
    if body not in _PAINTERS:
        raise ValueError(f"A body that can be drawn is one of {', '.join(BODIES)}, got {body!r}.")
    rng = np.random.default_rng([BODIES.index(body), *np.atleast_1d(seed).tolist()])
    globe = rng.uniform(0.36, 0.42) / 2 if body == "Saturn" else rng.uniform(0.42, 0.46)
    line = (np.arange(size_px) + 0.5) / size_px - 0.5
    x, y = np.meshgrid(line / globe, -line / globe)
    roll = _turn(rng.normal(0, 0.15), 0, 1)
    x, y = x * roll[0, 0] + y * roll[0, 1], x * roll[1, 0] + y * roll[1, 1]
    far = np.hypot(x, y)
    depth = np.sqrt(np.clip(1 - far**2, 0, 1))
    seen = far < 1 + 1 / (globe * size_px)
    facing = (np.stack((x, y, depth), axis=-1) / np.maximum(far, 1)[..., None])[seen]
    opening = float(rng.uniform(0.06, 0.75) * rng.choice((-1, 1)))
    tilt = opening if body == "Saturn" else float(rng.normal(0, 0.4))
    points = facing @ _turn(tilt, 1, 2) @ _turn(rng.uniform(-math.pi, math.pi), 0, 2)
    colours = _PAINTERS[body](points, rng) * rng.uniform(0.95, 1.05, 3)
    light = np.array([rng.normal(0, 0.3), rng.normal(0, 0.3), 1.0])
    lit = np.clip(facing @ (light / np.linalg.norm(light)), 0, 1) ** rng.uniform(0.05, 0.45)
    covered = np.clip((1 - far[seen]) * globe * size_px + 0.5, 0, 1)
    picture: Floats = np.zeros((size_px, size_px, 3))
    picture[seen] = colours * (lit * covered)[..., None]
    if body == "Saturn":
        ring, cover = _rings(x, y, np.where(far < 1, depth, -9.0), opening, rng)
        picture = _mix(picture, ring * rng.uniform(0.8, 1.1), cover)
    return Image.fromarray(np.clip(picture * rng.uniform(0.9, 1.08), 0, 255).astype(np.uint8))
