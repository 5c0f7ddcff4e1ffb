"""
The judge: pictures as people take, send and shrink them, and how a classifier fares on them.

Written before the augmentation and apart from it: other code, other parameters, other
distributions, so that a score here is no echo of the training. Each corruption has three
severities, from what one meets every day to what one can barely use.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageDraw, ImageEnhance, ImageFilter

Corruption = Callable[[Image.Image, np.random.Generator, int], Image.Image]
SEVERITIES = (1, 2, 3)


def _picture(values: NDArray[np.floating]) -> Image.Image:
    return Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8))


def noise(picture: Image.Image, rng: np.random.Generator, severity: int) -> Image.Image:
    """Sensor noise in all pixels, or dead and hot pixels in some."""
    values = np.asarray(picture, np.float64)
    if rng.random() < 0.7:
        return _picture(values + rng.normal(0, (12, 25, 45)[severity - 1], values.shape))
    hit = rng.random(values.shape[:2]) < (0.01, 0.04, 0.1)[severity - 1]
    values = values.copy()
    values[hit] = rng.choice((0.0, 255.0), size=(int(hit.sum()), 1))
    return _picture(values)


def blur(picture: Image.Image, rng: np.random.Generator, severity: int) -> Image.Image:
    """Out of focus (disc) or shaken (line); the radius is a share of the picture."""
    radius = max(picture.size) * (0.01, 0.02, 0.035)[severity - 1]
    if rng.random() < 0.6:
        return picture.filter(ImageFilter.BoxBlur(radius)).filter(ImageFilter.BoxBlur(radius / 2))
    angle, steps = rng.uniform(0, math.pi), 9
    total = np.zeros((picture.height, picture.width, 3))
    for shift in np.linspace(-1.6 * radius, 1.6 * radius, steps):
        moved = ImageChops.offset(picture, round(shift * math.cos(angle)), round(shift * math.sin(angle)))
        total += np.asarray(moved, np.float64)
    return _picture(total / steps)


def dark(picture: Image.Image, rng: np.random.Generator, severity: int) -> Image.Image:
    """Under-exposed: only a share of the light is left, in whole grey levels."""
    return ImageEnhance.Brightness(picture).enhance((0.5, 0.3, 0.17)[severity - 1] * rng.uniform(0.85, 1.15))


def low_contrast(picture: Image.Image, rng: np.random.Generator, severity: int) -> Image.Image:
    """Haze: everything moves towards one grey."""
    share = (0.5, 0.35, 0.2)[severity - 1]
    haze = Image.new("RGB", picture.size, (int(rng.integers(70, 170)),) * 3)
    return Image.blend(haze, picture, share)


def rotate(picture: Image.Image, rng: np.random.Generator, severity: int) -> Image.Image:
    """Turned; a little, a lot, or by any angle and mirrored."""
    span = (30, 100, 180)[severity - 1]
    turned = picture.rotate(float(rng.uniform(-span, span)), Image.Resampling.BICUBIC)
    return turned.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if severity == SEVERITIES[-1] else turned


def small_off_centre(picture: Image.Image, rng: np.random.Generator, severity: int) -> Image.Image:
    """A small body somewhere in a dark picture."""
    share = (0.65, 0.45, 0.28)[severity - 1] * rng.uniform(0.9, 1.1)
    size = (round(picture.width * share), round(picture.height * share))
    canvas = Image.new("RGB", picture.size)
    spread = (0.0, 0.03, 0.06)[severity - 1]
    place = [
        round(rng.uniform(-spread * whole, whole * (1 + spread) - part))
        for whole, part in zip(picture.size, size, strict=True)
    ]
    canvas.paste(picture.resize(size, Image.Resampling.LANCZOS), (place[0], place[1]))
    return canvas


def hard_jpeg(picture: Image.Image, rng: np.random.Generator, severity: int) -> Image.Image:
    """Sent through a messenger: shrunk, compressed hard, blown up again."""
    shrink = (1.0, 0.75, 0.5)[severity - 1]
    size = (round(picture.width * shrink), round(picture.height * shrink))
    stream = io.BytesIO()
    picture.resize(size).save(stream, "JPEG", quality=(22, 14, 8)[severity - 1] + int(rng.integers(-2, 3)))
    with Image.open(stream) as sent:
        return sent.convert("RGB").resize(picture.size)


def stars_behind(picture: Image.Image, rng: np.random.Generator, severity: int) -> Image.Image:
    """A night sky in place of the black: stars of all sizes, and a glow at the worst."""
    sky = Image.new("RGB", picture.size, tuple(int(level) for level in rng.integers(0, 6 * severity, 3)))
    pen = ImageDraw.Draw(sky)
    for _ in range((25, 80, 200)[severity - 1]):
        x, y = rng.uniform(0, picture.width), rng.uniform(0, picture.height)
        radius, level = rng.exponential(0.5), int(rng.integers(60, 256))
        colour = (level, level, int(rng.integers(level // 2, 256)))
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), colour)
    if severity == SEVERITIES[-1]:
        glow = _picture(rng.uniform(0, 255, (5, 5))).resize(picture.size, Image.Resampling.BICUBIC)
        sky = ImageChops.add(sky, Image.merge("RGB", [glow.point(lambda v: v // 5)] * 3))
    body = picture.convert("L").point(lambda level: 255 if level > 20 else 0)
    body = body.filter(ImageFilter.MaxFilter(5)).filter(ImageFilter.MinFilter(5))
    return Image.composite(picture, sky, body)


def tint(picture: Image.Image, rng: np.random.Generator, severity: int) -> Image.Image:
    """A wrong white balance: each channel has its own gain."""
    span = (0.12, 0.22, 0.35)[severity - 1]
    return _picture(np.asarray(picture, np.float64) * rng.uniform(1 - span, 1 + span, 3))


CORRUPTIONS: dict[str, Corruption] = {
    corruption.__name__: corruption
    for corruption in (noise, blur, dark, low_contrast, rotate, small_off_centre, hard_jpeg, stars_behind, tint)
}


def corrupt(picture: Image.Image, name: str, severity: int, seed: int) -> Image.Image:
    """
    One corrupted RGB picture of the same size; the same arguments give the same pixels.

    Args:
        picture: Any size and mode, the body on black.
        name: A key of `CORRUPTIONS`.
        severity: 1, 2 or 3.
        seed: Seeds all that is random.
    """
    rng = np.random.default_rng([seed, severity, list(CORRUPTIONS).index(name)])
    return CORRUPTIONS[name](picture.convert("RGB"), rng, severity)


def suite(pictures: Sequence[Image.Image], seed: int = 0) -> dict[str, list[Image.Image]]:
    """
    The pictures as they are under ``clean``, and 3 N corrupted ones under each corruption.

    Returns:
        Picture ``i`` of an entry comes from ``pictures[i % N]``, so truths are repeated three times.
    """
    worse = {
        name: [
            corrupt(picture, name, severity, seed + index)
            for severity in SEVERITIES
            for index, picture in enumerate(pictures)
        ]
        for name in CORRUPTIONS
    }
    return {"clean": list(pictures), **worse}


def answers(
    logits_of: Callable[[Sequence[Image.Image]], NDArray[np.floating]], pictures: Sequence[Image.Image], seed: int = 0
) -> dict[str, NDArray[np.floating]]:
    """What a network says to each entry of the `suite`: logits of shape (N, K) clean, (3 N, K) corrupted."""
    return {name: logits_of(changed) for name, changed in suite(pictures, seed).items()}


def figures(
    answered: dict[str, NDArray[np.floating]], truths: NDArray[np.integer], temperature: float = 1.0
) -> dict[str, Any]:
    """
    How good those answers are.

    Args:
        answered: As `answers` gives them.
        truths: Shape (N,), the column that is right for each clean picture.
        temperature: Divides the logits.

    Returns:
        Shares of right answers (``accuracy`` for clean pictures), calibration errors, and the
        confusion over clean and corrupted pictures: rows are truths, columns are answers.
    """
    accuracy: dict[str, float] = {}
    probabilities, right = {}, {}
    for name, logits in answered.items():
        values = np.exp((logits - logits.max(axis=1, keepdims=True)).astype(np.float64) / temperature)
        probabilities[name] = values / values.sum(axis=1, keepdims=True)
        right[name] = np.tile(truths, len(logits) // len(truths))
        accuracy[name] = round(float((logits.argmax(axis=1) == right[name]).mean()), 4)
    clean = accuracy.pop("clean")
    worse = np.concatenate([probabilities[name] for name in accuracy])
    worse_right = np.concatenate([right[name] for name in accuracy])
    confusion = np.zeros((worse.shape[1], worse.shape[1]), int)
    for name in answered:
        np.add.at(confusion, (right[name], probabilities[name].argmax(axis=1)), 1)
    return {
        "accuracy": clean,
        "accuracy_corrupted": accuracy,
        "accuracy_corrupted_mean": round(float(np.mean(list(accuracy.values()))), 4),
        "calibration_error": round(expected_calibration_error(probabilities["clean"], truths), 4),
        "calibration_error_corrupted": round(expected_calibration_error(worse, worse_right), 4),
        "confusion": confusion.tolist(),
    }


def expected_calibration_error(
    probabilities: NDArray[np.floating], truths: NDArray[np.integer], bins: int = 15
) -> float:
    """
    How far confidence is from accuracy, on average over equally wide bins of confidence.

    Args:
        probabilities: Shape (N, K).
        truths: Shape (N,), the column that is right.
        bins: Number of bins over 0 to 1.
    """
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == truths
    places = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = [
        abs(float(confidence[places == place].mean() - right[places == place].mean())) * float((places == place).mean())
        for place in range(bins)
        if (places == place).any()
    ]
    return float(sum(gaps))
