"""
The bytes of a picture file, turned into pixels.

Bytes come from strangers: only the formats below are tried, the size is checked
before a pixel is decoded, and whatever a decoder trips over is a DecodeError.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from io import BytesIO

from PIL import Image, ImageFile, UnidentifiedImageError, features

from celestial_backend.bombs import refuse_bomb, refuse_exif_bomb
from celestial_backend.errors import DecodeError, TooLargeError

FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", *(("AVIF",) if features.check("avif") else ()))
KNOWN = "JPEG, PNG, GIF, WebP, BMP, TIFF or AVIF"
LOOKS = (
    (b"\xff\xd8\xff", "a damaged or cut-off JPEG"),
    (b"\x89PNG", "a damaged or cut-off PNG"),
    (b"GIF8", "a damaged or cut-off GIF"),
    (b"BM", "a damaged or cut-off BMP"),
    (b"II*\0", "a damaged or cut-off TIFF"),
    (b"MM\0*", "a damaged or cut-off TIFF"),
    (b"II+\0", "a damaged or cut-off TIFF"),
    (b"RIFF", "a damaged WebP, or a sound or film"),
    (b"\0\0\1\0", "an icon"),
    (b"8BPS", "a Photoshop file"),
    (b"%PDF", "a PDF"),
    (b"PK\3\4", "a ZIP archive"),
    (b"\x1f\x8b", "something compressed with gzip"),
    (b"SIMPLE  =", "a FITS file"),
    (b"\xff\x0a", "a JPEG XL"),
    (b"\0\0\0\x0cJXL ", "a JPEG XL"),
    (b"\0\0\0\x0cjP  ", "a JPEG 2000"),
)
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
ORIENTATION = 0x0112  # the EXIF tag
INNER_NOTES = (0x8769, 0x8825)  # EXIF tags that lead to more of them: of the camera, and of the place


def decode(data: bytes, max_pixels: float, take: Callable[[int], None] | None = None) -> Image.Image:
    """
    The picture that a file's bytes hold, upright, in mode RGB; of an animation, the first frame.

    What is transparent becomes black, the colour of empty sky. 16-bit grey keeps
    its range: 0 to 65535 becomes 0 to 255. Grey in other numbers is taken as 0 to
    1, 0 to 255 or 0 to 65535, whichever holds all of it, and is stretched from its
    darkest to its brightest otherwise.

    Args:
        data: A whole file.
        max_pixels: Width times height that a picture may have.
        take: Told the picture's pixels before they are decoded; may wait until there is room.

    Raises:
        DecodeError: The bytes are no picture of a known format, or a damaged one.
        TooLargeError: The picture has too many pixels or parts; it was not decoded.
    """
    # Pillow's own limit warns between one and two times its value. Ours is checked for
    # every picture, so Pillow's has to speak only for sizes that ours refuses too.
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = math.ceil(max_pixels)
    try:
        refuse_bomb(data)
        image = Image.open(BytesIO(data), formats=FORMATS)
        _check_size(image, max_pixels)
        if take is not None:
            take(image.width * image.height)
        _spare_work(image, len(data))
        image.load()
        return rgb(_upright(image))
    except (TooLargeError, DecodeError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise TooLargeError(_too_many(max_pixels, "far more")) from error
    except UnidentifiedImageError as error:
        raise DecodeError(
            f"the file must be a picture ({KNOWN}), and its {len(data)} bytes look like {_looks_like(data)}."
            " Check what the task's address really leads to."
        ) from error
    except Exception as error:  # decoders meet damage with nearly every exception there is
        raise DecodeError(
            f"the file must be a whole picture, and its {len(data)} bytes look like {_looks_like(data)}"
            f" ({type(error).__name__}). Upload it again."
        ) from error


def _check_size(image: Image.Image, max_pixels: float) -> None:
    if image.width * image.height > max_pixels:
        raise TooLargeError(_too_many(max_pixels, f"{image.width} x {image.height}"))


def _too_many(max_pixels: float, seen: str) -> str:
    return (
        f"a picture may have {max_pixels / 1e6:g} million pixels, and this one has {seen}."
        " Raise CELESTIAL_IMAGE_MAX_MEGAPIXELS or shrink the picture."
    )


def _spare_work(image: ImageFile.ImageFile, length: int) -> None:
    """Keep Pillow from work that does nothing for the pixels and that a stranger can make long."""
    if image.format in ("JPEG", "MPO"):
        # libjpeg reads filling between its parts anew for each block that it is given, so it gets the file as one.
        image.decodermaxblock = length
    elif image.format == "TIFF":
        # To turn the picture, Pillow reads all notes, in directories inside others too. It keeps what it has read.
        notes = image.getexif()
        for tag in INNER_NOTES:
            if tag in notes:
                del notes[tag]


def _upright(image: Image.Image) -> Image.Image:
    try:
        refuse_exif_bomb(image.info)
        turn = TURNS.get(image.getexif().get(ORIENTATION, 1))
    except TooLargeError:
        raise
    except Exception:  # noqa: BLE001 - broken EXIF data says nothing, and the pixels are fine without
        turn = None
    return image if turn is None else image.transpose(turn)


def rgb(image: Image.Image) -> Image.Image:
    """A decoded picture of any mode in RGB, as `decode` says."""
    if image.mode.startswith("I;16"):
        image = _scaled(image, 0, 65535)
    elif image.mode in ("I", "F"):
        image = _scaled(image, *_range(image))
    if image.has_transparency_data:
        # Pasting on black also hides the colours that were stored under transparent pixels.
        rgba = image.convert("RGBA")
        image = Image.new("RGB", rgba.size)
        image.paste(rgba, mask=rgba)
    return image if image.mode == "RGB" else image.convert("RGB")


def _range(image: Image.Image) -> tuple[float, float]:
    extrema = image.getextrema()
    low, high = (float(value) for value in extrema if isinstance(value, int | float))
    if not (math.isfinite(low) and math.isfinite(high)):
        raise DecodeError(
            "the picture's numbers must be finite, and some are not. Save it with 8 or 16 bits per channel."
        )
    whole = (255.0, 65535.0) if image.mode == "I" else (1.0, 255.0, 65535.0)
    for top in whole:
        if low >= 0 and high <= top:
            return 0.0, top
    return low, high


def _scaled(image: Image.Image, low: float, high: float) -> Image.Image:
    factor = 255 / (high - low) if high > low else 0.0
    # Pillow takes such a function of these modes apart into a factor and an offset.
    return image.point(lambda value: value * factor + (0.5 - low * factor)).convert("L")


def _looks_like(data: bytes) -> str:
    if not data:
        return "an empty file"
    for start, name in LOOKS:
        if data.startswith(start):
            return name
    if data[4:8] == b"ftyp":
        return "a damaged AVIF" if data[8:12] in (b"avif", b"avis") else "a HEIC photo or a film"
    try:
        text = data[:512].decode("utf-8", "ignore" if len(data) > 512 else "strict").lstrip("\ufeff \r\n\t").lower()
    except UnicodeDecodeError:
        return "nothing known"
    if not all(sign.isprintable() or sign in "\r\n\t" for sign in text):
        return "nothing known"
    if text.startswith(("<!doctype html", "<html")):
        return "a web page (perhaps a login page or an error)"
    if "<svg" in text:
        return "an SVG drawing"
    if text.startswith(("{", "[")):
        return "JSON (perhaps an error message)"
    return "XML (perhaps an error message)" if text.startswith("<") else "plain text"
