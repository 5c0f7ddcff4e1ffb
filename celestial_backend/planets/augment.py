"""
What happens to a picture before the network learns from it.

Everything is drawn from the generator that the caller hands in: the same generator state
gives the same pixels, on any number of threads.
"""

from __future__ import annotations

import io
import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

Floats = NDArray[np.float32]
Rng = np.random.Generator

CLEAN_SHARE = 0.28  # of the examples come as they are, or only turned, so that the plain case stays the surest
RESIZED_SHARE = 0.3  # come in another size first, because people's pictures do
BACKGROUND_LEVEL = 14  # grey levels up to here, joined to the border, count as black sky


def augment(picture: Image.Image, rng: Rng) -> Image.Image:
    """
    Another picture of the same body, as a person might have it.

    Args:
        picture: Any size, any mode; a body on black gets new skies behind it.
        rng: Owned by this call; its state decides everything.

    Returns:
        An RGB picture, from half to twice the size.
    """
    picture = picture.convert("RGB")
    if rng.random() < RESIZED_SHARE:
        picture = _resize(picture, rng)
    if rng.random() < CLEAN_SHARE:
        picture = _flip(picture, rng)
        if rng.random() < 0.5:
            return picture
        return _place(picture, rng, scale=float(rng.uniform(0.95, 1.05)), spread=0.02)[0]
    picture = _flip(picture, rng)
    if rng.random() < 0.35:
        scale = math.exp(rng.uniform(math.log(0.22), math.log(0.85)))
        picture, body = _place(picture, rng, scale=scale, spread=1.0)
    else:
        scale = float(rng.uniform(0.8, rng.choice((1.2, 1.2, 1.5))))
        picture, body = _place(picture, rng, scale=scale, spread=float(rng.choice((0.1, 0.5))))
    values = _values(picture)
    if rng.random() < 0.15:
        values = _shade(values, rng)
    if rng.random() < 0.4:
        values = _sky(values, _values(body)[..., None], rng)
    values = _light(values, rng)
    picture = _picture(values)
    if rng.random() < 0.3:
        picture = _blur(picture, rng)
    if rng.random() < 0.35:
        picture = _picture(_noise(_values(picture), rng))
    if rng.random() < 0.3:
        picture = _send(picture, rng)
    return picture


def _picture(values: Floats) -> Image.Image:
    return Image.fromarray((np.clip(values, 0, 1) * 255 + 0.5).astype(np.uint8))


def _values(picture: Image.Image) -> Floats:
    return np.asarray(picture).astype(np.float32) / np.float32(255)


def _resize(picture: Image.Image, rng: Rng) -> Image.Image:
    factor = math.exp(rng.uniform(math.log(0.5), math.log(2.0)))
    size = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
    filters = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS)
    return picture.resize(size, filters[int(rng.integers(3))])


def _flip(picture: Image.Image, rng: Rng) -> Image.Image:
    return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else picture


def _body(picture: Image.Image) -> Image.Image:
    """Mask of the body: 0 for black sky; all 255 when the border is not black."""
    grey = np.asarray(picture.convert("L"))
    if np.median(np.concatenate((grey[0], grey[-1], grey[:, 0], grey[:, -1]))) > BACKGROUND_LEVEL:
        return Image.new("L", picture.size, 255)
    lit = grey > BACKGROUND_LEVEL
    across = np.maximum.accumulate(lit, 1) & np.maximum.accumulate(lit[:, ::-1], 1)[:, ::-1]
    down = np.maximum.accumulate(lit, 0) & np.maximum.accumulate(lit[::-1], 0)[::-1]
    return Image.fromarray(((across & down) * np.uint8(255)).astype(np.uint8))


def _place(picture: Image.Image, rng: Rng, scale: float, spread: float) -> tuple[Image.Image, Image.Image]:
    """Turn, scale and move; ``spread`` 1 lets the middle go anywhere that keeps most of the body inside."""
    width, height = picture.size
    angle = rng.uniform(-math.pi, math.pi) if rng.random() < 0.75 else rng.normal(0, 0.15)
    squeeze = math.exp(rng.normal(0, 0.03))
    free = max(0.0, 1 - scale) / 2 + 0.15 * min(scale, 1.0)
    move_x, move_y = rng.uniform(-1, 1, 2) * free * spread
    cos, sin = math.cos(angle), math.sin(angle)
    a, b, d, e = cos / scale * squeeze, sin / scale, -sin / scale, cos / scale / squeeze
    x, y = width * (0.5 + move_x), height * (0.5 + move_y)
    matrix = (a, b, width / 2 - a * x - b * y, d, e, height / 2 - d * x - e * y)
    body = _body(picture)
    corner = (int(rng.integers(0, 256)),) * 3 if rng.random() < 0.06 else (0, 0, 0)  # as some programs leave it
    if scale < 0.6:  # an affine transform skips pixels when it shrinks; blur what it would skip
        picture = picture.filter(ImageFilter.GaussianBlur(0.35 / scale))
    return (
        picture.transform(picture.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=corner),
        body.transform(picture.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR),
    )


def _ramp(shape: tuple[int, ...], rng: Rng) -> Floats:
    """Values 0 to 1 rising across the picture in a random direction, shape (H, W, 1)."""
    angle = rng.uniform(-math.pi, math.pi)
    rows = np.linspace(-1, 1, shape[0])[:, None] * math.sin(angle)
    columns = np.linspace(-1, 1, shape[1])[None, :] * math.cos(angle)
    return ((rows + columns) / 2.83 + 0.5)[..., None].astype(np.float32)


def _shade(values: Floats, rng: Rng) -> Floats:
    """One side of the picture in shade, softly."""
    edge, soft = rng.uniform(-0.1, 0.5), rng.uniform(0.2, 0.6)
    return values * np.clip((_ramp(values.shape, rng) - np.float32(edge)) / np.float32(soft), 0.08, 1)


def _clouds(shape: tuple[int, ...], rng: Rng) -> Floats:
    """Soft coloured noise of two scales, shape (H, W, 3), 0 to 1."""
    total = np.zeros((shape[0], shape[1], 3), np.float32)
    for cells, part in ((int(rng.integers(2, 5)), 0.65), (int(rng.integers(5, 12)), 0.35)):
        coarse = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        fine = coarse.resize((shape[1], shape[0]), Image.Resampling.BICUBIC)
        total += _values(fine) * np.float32(part)
    return total


def _stars(shape: tuple[int, ...], rng: Rng) -> Floats:
    """Points of light, few bright and many faint, some of them smeared."""
    count = int(np.exp(rng.uniform(math.log(10), math.log(400))))
    field: Floats = np.zeros((shape[0], shape[1], 3), np.float32)
    rows, columns = rng.integers(0, shape[0], count), rng.integers(0, shape[1], count)
    field[rows, columns] = (rng.power(0.6, (count, 1)) * rng.uniform(0.6, 1, (count, 3))).astype(np.float32)
    big = rng.random(count) < 0.25
    for step_row, step_column in ((0, 1), (1, 0), (1, 1)):
        place = (rows[big] + step_row) % shape[0], (columns[big] + step_column) % shape[1]
        field[place] = field[rows[big], columns[big]]
    if rng.random() < 0.4:
        blurred = _picture(field).filter(ImageFilter.GaussianBlur(float(rng.uniform(0.4, 1.2))))
        field = _values(blurred) * np.float32(rng.uniform(1, 2.5))
    return field


def _sky(values: Floats, body: Floats, rng: Rng) -> Floats:
    """Something other than black behind the body: stars, a gradient, a nebula, a plain colour, or several."""
    sky = np.zeros_like(values)
    if rng.random() < 0.3:
        sky += _ramp(values.shape, rng) * rng.uniform(0, 0.45, 3).astype(np.float32)
    if rng.random() < 0.3:
        sky += (_clouds(values.shape, rng) ** 2) * rng.uniform(0, 0.7, 3).astype(np.float32)
    if rng.random() < 0.1:  # paper, or daylight
        sky += (rng.uniform(0.2, 1) + rng.normal(0, 0.05, 3)).astype(np.float32)
    elif rng.random() < 0.25:
        sky += rng.uniform(0, 0.35, 3).astype(np.float32)
    if rng.random() < 0.75:
        sky += _stars(values.shape, rng)
    return values * body + sky * (1 - body)


def _light(values: Floats, rng: Rng) -> Floats:
    """White balance, greyness, exposure, gamma and contrast, each or none."""
    if rng.random() < 0.45:
        span = rng.choice((0.15, 0.4))
        warm = rng.uniform(-1, 1) * np.array((0.25, 0, -0.25))
        values = values * (rng.uniform(1 - span, 1 + span, 3) * (1 + warm)).astype(np.float32)
    if rng.random() < 0.12:
        grey = values.mean(axis=2, keepdims=True)
        values = grey + (values - grey) * np.float32(rng.uniform(0.15, 1.2))
    if rng.random() < 0.3:
        values = values * np.float32(math.exp(rng.uniform(math.log(0.12), math.log(0.8))))
    elif rng.random() < 0.2:
        values = values * np.float32(rng.uniform(1.1, 2.0))
    if rng.random() < 0.25:
        values = np.clip(values, 0, 1) ** np.float32(math.exp(rng.uniform(-0.9, 0.9)))
    if rng.random() < 0.25:
        keep = np.float32(math.exp(rng.uniform(math.log(0.13), math.log(0.9))))
        haze = (rng.uniform(0, 1) + rng.normal(0, 0.08, 3)).astype(np.float32)
        values = values * keep + haze * (1 - keep)
    return values


def _blur(picture: Image.Image, rng: Rng) -> Image.Image:
    """Gaussian, defocus (box of a box) or motion; up to about a twentieth of the picture."""
    reach = max(picture.size) * math.exp(rng.uniform(math.log(0.004), math.log(0.05)))
    kind = rng.random()
    if kind < 0.4:
        return picture.filter(ImageFilter.GaussianBlur(reach))
    if kind < 0.7:
        return picture.filter(ImageFilter.BoxBlur(reach * 1.4))
    angle, total = rng.uniform(-math.pi, math.pi), np.zeros((picture.height, picture.width, 3), np.float32)
    for shift in np.linspace(-1.5 * reach, 1.5 * reach, 7):  # motion: the mean of copies shifted along a line
        matrix = (1, 0, shift * math.cos(angle), 0, 1, shift * math.sin(angle))
        total += _values(picture.transform(picture.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR))
    return _picture(total / np.float32(7))


def _noise(values: Floats, rng: Rng) -> Floats:
    """Gaussian, in colour or grey, shot, or salt and pepper."""
    height, width = values.shape[:2]
    strength = np.float32(math.exp(rng.uniform(math.log(0.015), math.log(0.22))))
    kind = rng.random()
    if kind < 0.75:
        channels = 1 if rng.random() < 0.25 else 3
        grain = rng.standard_normal((height, width, channels), np.float32) * strength
        return values + (grain if kind < 0.5 else grain * np.sqrt(values + np.float32(0.01)) * np.float32(1.5))
    hit = rng.random((height, width), np.float32)
    share = strength * np.float32(0.6)
    values = np.where((hit < share / 2)[..., None], np.float32(0), values)
    return np.where((hit > 1 - share / 2)[..., None], np.float32(1), values)


def _send(picture: Image.Image, rng: Rng) -> Image.Image:
    """Shrunk and blown up, compressed hard, or both."""
    size = picture.size
    if rng.random() < 0.5:
        shrink = rng.uniform(0.3, 0.9)
        fewer = (max(8, round(size[0] * shrink)), max(8, round(size[1] * shrink)))
        picture = picture.resize(fewer, Image.Resampling.BILINEAR)
    if rng.random() < 0.8:
        stream = io.BytesIO()
        picture.save(stream, "JPEG", quality=int(rng.integers(4, 45)))
        with Image.open(stream) as sent:
            picture = sent.convert("RGB")
    return picture.resize(size, Image.Resampling.BILINEAR if rng.random() < 0.7 else Image.Resampling.NEAREST)
