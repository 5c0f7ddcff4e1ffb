"""
The bytes of a picture file, turned into pixels.

Bytes come from strangers: only the formats below are tried, the size is checked before a pixel is decoded, and
whatever a decoder trips over is a DecodeError.

First comes a look at how the file is built. A decoder works through some parts in loops that a stranger can make
long: fifty lines of a JPEG may ask for the whole picture fifty times, a TIFF may be cut into millions of tiles,
Pillow reads run lengths and what is noted about a picture in Python, and libavif looks up each part of an AVIF among
all the others. Limits are far above what cameras and programs write. Files are walked through as their decoders do
it, so that nothing hides from the count in a place where only they look.
"""

from __future__ import annotations

import math
import re
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image, ImageChops, ImageFile, TiffImagePlugin, UnidentifiedImageError, features

from celestial_backend.errors import DecodeError, TooLargeError
from celestial_backend.pictures.hooks import NotFiniteError, rgb

SCANS_MAX = 50  # of a JPEG; programs write ten. Each is a walk over all of its pixels.
SEGMENTS_MAX = 2_000  # of a JPEG; the longest profile that 50 MB can hold has 800
NOTES_MAX = 3_000_000  # bytes of a JPEG's EXIF data, Photoshop notes and tables; mostly one segment of 65,000
FILLING_MAX = 100_000  # bytes between a JPEG's segments; Pillow takes a microsecond for each
CHUNKS_MAX = 50_000  # of a PNG; programs write some for each megabyte
PACKED_MAX = 100  # compressed texts and profiles of a PNG; Pillow unpacks a megabyte of each
BLOCKS_MAX = 10_000  # of a GIF before its first frame; they hold 2.5 megabytes
STRIPS_MAX = 100_000  # of a TIFF, or tiles; programs write no more than the picture has rows
ENTRIES_MAX = 4_000  # of a TIFF's directory
FRACTIONS_MAX = 10_000  # of an entry; places and lenses have a dozen
RUNS_MAX = 10_000_000  # pixels of a BMP that is stored in run lengths, and its bytes; so many take a few seconds
HEAD_MAX = 60_000  # bytes of an AVIF's tables, profiles not counted; a grid of a thousand tiles has as many
PROPERTY_MAX = 1_000  # bytes of what they say of an item; libavif copies it for each item that it is said of
PIECES_MAX = 10_000  # of data, which an AVIF's items are put together from
SHARED_MAX = 10_000_000  # bytes that an AVIF's items may have more than the file; equal tiles share theirs
AVIF_EXIF_MAX = 130_000  # bytes; Pillow reads and writes them all to add which side is up

START_OF_SCAN, END_OF_IMAGE, APP1, APP2 = 0xDA, 0xD9, 0xE1, 0xE2
JPEG_MARKER = re.compile(rb"\xff([^\x00\xd0-\xd7\xff])")  # no stuffed byte, restart or filling
BARE_MARKERS = frozenset((0x01, 0xC8, 0xD8, END_OF_IMAGE, *range(0xF0, 0xFE)))  # those without a length, for Pillow
COSTLY_MARKERS = frozenset((*range(0xC0, 0xD0), 0xDB, 0xDE, 0xED))  # frames, tables and Photoshop's notes
EXIF, MPF = b"Exif\0\0", b"MPF\0"
RAW_EXIF = "Raw profile type exif"  # as ImageMagick names it in a PNG: hexadecimal digits
PACKED = (b"iCCP", b"zTXt", b"iTXt")
EXTENSION, FRAME = 0x21, 0x2C  # the first byte of what a GIF consists of
COMMENT, APPLICATION = b"\xfe", b"\xff"  # kinds of extensions
TIFFS = (b"II*\0", b"MM\0*", b"II+\0", b"II\0*", b"MM*\0")  # the last two are wrong, and Pillow reads them
BITS, COMPRESSION, PHOTOMETRIC, CHANNELS, PLANES, SAMPLE_FORMAT = 258, 259, 262, 277, 284, 339  # entries of a TIFF
MISSING = 42113  # one of GDAL's: the number that stands for none, as text
WHITE_IS_ZERO, SEPARATE, UNSIGNED = 0, 2, 1  # what they may say
FORMS = {2: " with a sign", 3: " as fractions", 5: " as complex numbers", 6: " as complex numbers"}
NUMBERS = ("I;16", "I;16B", "I;16L", "I;16N", "I", "F")
STRIPS = (273, 324)  # where a TIFF says where its strips and tiles are, in numbers of any type
SMALL_TYPES = (1, 2, 7)  # of a TIFF's other values: bytes and text, such as a colour profile, are not counted
FRACTIONS = (5, 10)
TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
RUN_LENGTHS = (1, 2)  # how a BMP may be compressed, with 8 and with 4 bits for a pixel
META: dict[bytes, Any] = {b"iinf": {}, b"iprp": {b"ipco": {}}}
BOXES = {b"meta": META, b"moov": {b"trak": {b"meta": META}}}  # those of an AVIF that hold others
AVIF_BRANDS = (b"avif", b"avis", b"mif1", b"msf1")
BULK = (b"colr", b"idat")  # boxes that may be long: colour profiles and data
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", *(("AVIF",) if features.check("avif") else ()))
KNOWN = "JPEG, PNG, GIF, WebP, BMP, TIFF or AVIF"
NOTHING_KNOWN, PACKED_WITH_GZIP = "nothing known", "something compressed with gzip"
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
    (b"\x1f\x8b", PACKED_WITH_GZIP),
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


def refuse_bomb(data: bytes) -> None:
    """
    Refuse a JPEG, PNG, GIF, TIFF, BMP or AVIF of too many parts; costs some microseconds.

    Raises:
        TooLargeError: It has more parts than a picture needs; it was not decoded.
        DecodeError: It is a TIFF that no decoder reads.
    """
    if data.startswith(b"\xff\xd8"):
        _check_jpeg(data)
    elif data.startswith(b"\x89PNG"):
        _check_png(data)
    elif data.startswith(b"GIF8") and len(data) > 10:
        _check_gif(data)
    elif data.startswith(TIFFS):
        _check_tiff(data, "a TIFF")
    elif data.startswith(b"MM\0+"):  # one directory for Pillow, and another for libtiff
        raise DecodeError("a TIFF of 64-bit numbers must be little-endian, and this one is not. Save the picture anew.")
    elif data.startswith(b"BM") and len(data) > 34:
        _check_bmp(data)
    elif data[4:8] == b"ftyp" and data[8:12] in AVIF_BRANDS:
        _check_avif(data)


def refuse_exif_bomb(info: Mapping[Any, Any]) -> None:
    """
    Refuse EXIF data of too many parts, wherever in the file Pillow has found it; costs some microseconds.

    Args:
        info: Pillow's, of a picture that is decoded.

    Raises:
        TooLargeError: It has more parts than cameras write; Pillow has not read it.
        ValueError, TypeError: It is damaged.
    """
    if "exif" in info:
        exif = info["exif"]
    elif len(text := info.get(RAW_EXIF, "")) > NOTES_MAX:
        raise _costly("a picture", NOTES_MAX, "bytes of EXIF data as text")
    else:
        exif = bytes.fromhex("".join(text.split("\n")[3:]))
    _check_tiff(exif.removeprefix(EXIF).removeprefix(EXIF), "a block of EXIF data")


def _check_jpeg(data: bytes) -> None:
    segments = enumerate(_jpeg_segments(data), 1)
    _check_jpeg_head(data, segments)
    if data.count(bytes((0xFF, START_OF_SCAN))) <= SCANS_MAX:  # previews and films inside have some too
        return
    scans = 1
    for number, (marker, _, _) in segments:
        scans += marker == START_OF_SCAN
        if scans > SCANS_MAX:
            raise _costly("a JPEG", SCANS_MAX, "scans")
        if number > SEGMENTS_MAX:
            raise _costly("a JPEG", SEGMENTS_MAX, "segments")
        if marker == END_OF_IMAGE:
            return


def _check_jpeg_head(data: bytes, segments: Iterator[tuple[int, tuple[int, int, int]]]) -> None:
    """All up to its first scan, which Pillow reads."""
    place, filling, notes, exif, album = 2, 0, 0, [], b""
    for number, (marker, start, end) in segments:
        filling += start - place
        place = end
        if marker == APP1 and data.startswith(EXIF, start + 4):
            exif.append(data[start + 4 + len(EXIF) : end])
            notes += end - start
        elif marker == APP2 and data.startswith(MPF, start + 4):
            album = data[start + 4 + len(MPF) : end]
        elif marker in COSTLY_MARKERS:
            notes += end - start
        for seen, most, parts in (
            (number, SEGMENTS_MAX, "segments"),
            (filling, FILLING_MAX, "bytes between its segments"),
            (notes, NOTES_MAX, "bytes of EXIF data and tables"),
        ):
            if seen > most:
                raise _costly("a JPEG", most, parts)
        if marker == START_OF_SCAN:
            break
    _check_tiff(b"".join(exif).removeprefix(EXIF), "a block of EXIF data")
    _check_tiff(album, "a list of a JPEG's pictures")


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Each marker, and where its segment starts and ends; where there is no more, the picture ends."""
    at, near = 2, FILLING_MAX + 3  # the next one is looked for so near, until pixels come
    while found := JPEG_MARKER.search(data, at, at + near):
        marker, at = found[1][0], found.end()
        if marker not in BARE_MARKERS:
            at += max(2, int.from_bytes(data[at : at + 2]))
        yield marker, found.start(), at
        if marker == START_OF_SCAN:
            near = len(data)
    end = min(at + near, len(data))
    yield END_OF_IMAGE, end, end


def _check_png(data: bytes) -> None:
    at, packed = 8, 0
    for _ in range(CHUNKS_MAX):
        name = data[at + 4 : at + 8]
        if at >= len(data) or name == b"IEND":
            return
        packed += name in PACKED
        if packed > PACKED_MAX:
            raise _costly("a PNG", PACKED_MAX, "compressed texts and profiles")
        at += 12 + int.from_bytes(data[at : at + 4])
    raise _costly("a PNG", CHUNKS_MAX, "chunks")


def _check_gif(data: bytes) -> None:
    at = 13 + (3 << (data[10] & 7) + 1 if data[10] & 0x80 else 0)  # behind the head and its colours
    certain, inside = 0, False  # inside an extension, so many blocks are no end of it, even if they are empty
    for _ in range(BLOCKS_MAX):
        if at >= len(data) or (not inside and data[at] == FRAME):
            return
        if inside:
            inside = data[at] > 0 or certain > 0
            at, certain = at + 1 + data[at], certain - 1
        elif data[at] == EXTENSION:
            kind, inside = data[at + 1 : at + 2], True
            certain = (kind != COMMENT) + (kind == APPLICATION and data.startswith(b"NETSCAPE2.0", at + 3))
            at += 2
        else:
            at += 1
    raise _costly("a GIF", BLOCKS_MAX, "blocks")


def _check_tiff(data: bytes, kind: str) -> None:
    """A TIFF, or what has the form of one."""
    if not data:
        return
    order = "<" if data.startswith(b"II") else ">"
    big = data[2:3] == b"+"
    place, number, entry = ("8xQ", "Q", "HHQQ") if big else ("4xI", "H", "HHII")
    held = 0
    try:
        (start,) = struct.unpack_from(order + place, data)
        (entries,) = struct.unpack_from(order + number, data, start)
        start, step = start + struct.calcsize(order + number), struct.calcsize(order + entry)
        entries = min(entries, (len(data) - start) // step)  # one that is cut off ends the directory
        if entries > ENTRIES_MAX:
            raise _costly(kind, ENTRIES_MAX, "entries")
        for at in range(start, start + entries * step, step):
            tag, form, count, offset = struct.unpack_from(order + entry, data, at)
            size, room = count * TYPE_BYTES.get(form, 0), max(0, len(data) - offset)
            if tag in STRIPS and count > STRIPS_MAX:
                raise _costly(kind, STRIPS_MAX, "strips or tiles")
            most = FRACTIONS_MAX if form in FRACTIONS else STRIPS_MAX
            if count > most and form not in SMALL_TYPES and 0 < size <= room:  # others are not read
                raise _costly(kind, most, "numbers in an entry")
            held += min(size, room) if size > 8 else 0
            if held > 2 * len(data):  # twice, because an entry that is damaged may reach to the end
                raise _costly(kind, 2 * len(data), "bytes in its entries")
    except (struct.error, OverflowError):
        return  # cut off, or none: the decoder says so


def _check_bmp(data: bytes) -> None:
    head, width, height, compression = struct.unpack_from("<IIi4xI", data, 14)
    long = max(width * abs(height), len(data)) > RUNS_MAX
    if long and compression in RUN_LENGTHS and head >= 40:  # a shorter head has colours there
        raise _costly("a run-length BMP", RUNS_MAX, "pixels, and as many bytes")


def _check_avif(data: bytes) -> None:
    head, tables = 0, []
    for parent, name, start, end in _avif_boxes(data, 0, len(data), BOXES):
        bulk = not parent or name in BULK
        head += 8 if bulk else 8 + end - start
        if head > HEAD_MAX:
            raise _costly("an AVIF", HEAD_MAX, "bytes of tables")
        if parent == b"ipco" and not bulk and end - start > PROPERTY_MAX:
            raise _costly("a property of an AVIF", PROPERTY_MAX, "bytes")
        if name in (b"iloc", b"infe"):
            tables.append((name, data[start:end]))
    _check_avif_items(tables, len(data))


def _check_avif_items(tables: Sequence[tuple[bytes, bytes]], length: int) -> None:
    """What a file of some length says of its items and of where their data is."""
    sizes: Counter[int] = Counter()
    pieces, exif = 0, set()
    for name, table in tables:
        if name == b"iloc":
            for item, size in _avif_pieces(table):
                sizes[item] += size
                pieces += 1
                if pieces > PIECES_MAX:
                    raise _costly("an AVIF", PIECES_MAX, "pieces of data")
        elif name == b"infe":
            wide = 4 if table.startswith(b"\3") else 2
            if table[6 + wide : 10 + wide] == b"Exif":
                exif.add(int.from_bytes(table[4 : 4 + wide]))
    if sizes.total() > length + SHARED_MAX:
        raise _costly("an AVIF", length + SHARED_MAX, "bytes in its items")
    if sum(sizes[item] for item in exif) > AVIF_EXIF_MAX:
        raise _costly("an AVIF", AVIF_EXIF_MAX, "bytes of EXIF data")


def _avif_boxes(
    data: bytes, at: int, end: int, inner: dict[bytes, Any], parent: bytes = b""
) -> Iterator[tuple[bytes, bytes, int, int]]:
    """The boxes from one place to another, and those in the ones named by `inner`: parent, name, and what it holds."""
    while at + 8 <= end:
        size, name, start = int.from_bytes(data[at : at + 4]), data[at + 4 : at + 8], at + 8
        if size == 1:
            size, start = int.from_bytes(data[start : start + 8]), start + 8
        at = min(end, at + size) if size else end
        if at < start:
            return  # damaged: the decoder says so
        if name in inner:
            head = {b"meta": 4, b"iinf": 8 if data.startswith(b"\1", start) else 6}.get(name, 0)
            yield from _avif_boxes(data, start + head, at, inner[name], name)
        else:
            yield parent, name, start, at


def _avif_pieces(box: bytes) -> Iterator[tuple[int, int]]:
    """The pieces that a table of items' places names: the item, and the piece's bytes."""
    if len(box) < 8:
        return
    version = box[0]
    offset, length, base, index = box[4] >> 4, box[4] & 15, box[5] >> 4, box[5] & 15 if version else 0
    wide = 4 if version == 2 else 2
    at = 6 + wide
    while at < len(box):
        item = int.from_bytes(box[at : at + wide])
        at += wide + (4 if version else 2) + base
        pieces = int.from_bytes(box[at : at + 2])
        at += 2
        for _ in range(pieces):
            yield item, int.from_bytes(box[at + index + offset : at + index + offset + length])
            at += index + offset + length


def _costly(kind: str, most: int, parts: str) -> TooLargeError:
    return TooLargeError(f"{kind} may have {most} {parts}, and this one has more. Save the picture anew.")


def decode(data: bytes, max_pixels: float, take: Callable[[int], None] | None = None) -> Image.Image:
    """
    The picture that a file's bytes hold, upright, in mode RGB; of an animation, the first frame.

    What is transparent becomes black, the colour of empty sky. Grey in 16 bits, large
    integers or fractions is taken as 0 to 1 (fractions alone), 0 to 255 or 0 to 65535,
    whichever holds all of it; where that leaves less than a sixteenth of the range to
    it, or none holds it, it is stretched from its darkest to its brightest, a few
    odd values aside. So nothing comes out black that has something to show. Numbers
    that are none are black.

    Args:
        data: A whole file.
        max_pixels: Width times height that a picture may have.
        take: Told the picture's pixels before they are decoded; may wait until there is room.

    Raises:
        DecodeError: The bytes are no picture of a known format, or a damaged one.
        TooLargeError: The picture has too many pixels or parts; it was not decoded.
        TimeoutError: From `take`.
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
        _check_planes(image)
        image.load()
        return _as_meant(image, rgb(_upright(_true_numbers(image))))
    except (TooLargeError, DecodeError, TimeoutError):
        raise
    except NotFiniteError as error:
        raise DecodeError(str(error)) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise TooLargeError(_too_many(max_pixels, "far more")) from error
    except (UnidentifiedImageError, KeyError) as error:  # Pillow looks up what it does not know
        if kind := _strange_tiff(data):
            raise DecodeError(
                f"this TIFF is of a kind that is not read: {kind}. Save the picture anew in grey or RGB, with 8 or 16"
                " bits per channel, best as PNG."
            ) from error
        raise DecodeError(
            f"the file must be a picture ({KNOWN}), and its {len(data)} bytes look like {looks_like(data)}."
            " Check what the task's address really leads to."
        ) from error
    except Exception as error:  # decoders meet damage with nearly every exception there is
        raise DecodeError(
            f"the file must be a whole picture, and its {len(data)} bytes look like {looks_like(data)}"
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


def _entry(image: Image.Image, tag: int, otherwise: Any) -> Any:
    """What a TIFF says, the first of several values; `otherwise` where it says nothing, or is none."""
    found = image.tag_v2.get(tag, otherwise) if isinstance(image, TiffImagePlugin.TiffImageFile) else otherwise
    return found[0] if isinstance(found, tuple) else found


def _check_planes(image: Image.Image) -> None:
    """Pillow reads the planes of a TIFF as if each number were a byte."""
    if _entry(image, PLANES, 1) == SEPARATE and _entry(image, BITS, 8) > 8:
        raise DecodeError(
            "a TIFF of more than 8 bits per channel must hold the channels of a pixel side by side, and this one holds"
            " them apart. Save the picture anew, best as PNG."
        )


def _true_numbers(image: Image.Image) -> Image.Image:
    """What a TIFF means by its numbers: the largest are not negative, as Pillow has it, and some stand for none."""
    if image.format != "TIFF" or image.mode not in NUMBERS:
        return image
    numbers, missing = np.asarray(image), str(_entry(image, MISSING, "")).strip(" \0")
    if image.mode == "I" and _entry(image, SAMPLE_FORMAT, UNSIGNED) == UNSIGNED and numbers.min() < 0:
        numbers = numbers.view(np.uint32)
    elif not missing:
        return image
    numbers = numbers.astype(np.float32)
    with suppress(ValueError):
        numbers[numbers == np.float32(missing)] = np.nan
    return Image.fromarray(numbers)


def _as_meant(image: Image.Image, picture: Image.Image) -> Image.Image:
    """A TIFF in which 0 is white; Pillow sees to that for 8 bits alone."""
    is_negative = image.mode in NUMBERS and _entry(image, PHOTOMETRIC, 1) == WHITE_IS_ZERO
    return ImageChops.invert(picture) if is_negative else picture


def _strange_tiff(data: bytes) -> str:
    """What there is about the pixels of a TIFF; "" of any other file, or a damaged one."""
    if not data.startswith(TIFFS):
        return ""
    try:
        tags, file = TiffImagePlugin.ImageFileDirectory_v2(data[:16] if data[2:3] == b"+" else data[:8]), BytesIO(data)
        file.seek(tags.next)
        tags.load(file)
        if (compression := tags.get(COMPRESSION, 1)) not in TiffImagePlugin.COMPRESSION_INFO:
            return f"its compression has the number {int(compression)}"
        channels, bits, form = int(tags.get(CHANNELS, 1)), tags.get(BITS, (1,)), tags.get(SAMPLE_FORMAT, (UNSIGNED,))
        told = tags.get(PHOTOMETRIC, WHITE_IS_ZERO), form[:1], bits * channels if len(bits) == 1 else bits
        if any((kind[1], kind[2], kind[4]) == told for kind in TiffImagePlugin.OPEN_INFO):
            return ""
        return f"{channels} x {int(bits[0])} bits{FORMS.get(int(form[0]), '')} in each pixel"
    except Exception:  # noqa: BLE001 - damage shows in any way
        return ""


def _upright(image: Image.Image) -> Image.Image:
    try:
        refuse_exif_bomb(image.info)
        turn = TURNS.get(image.getexif().get(ORIENTATION, 1))
    except TooLargeError:
        raise
    except Exception:  # noqa: BLE001 - broken EXIF data says nothing, and the pixels are fine without
        turn = None
    return image if turn is None else image.transpose(turn)


def looks_like(data: bytes) -> str:
    """What a file seems to be, by its first bytes and for a sentence."""
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
        return NOTHING_KNOWN
    if not all(sign.isprintable() or sign in "\r\n\t" for sign in text):
        return NOTHING_KNOWN
    if text.startswith(("<!doctype html", "<html")):
        return "a web page (perhaps a login page or an error)"
    if "<svg" in text:
        return "an SVG drawing"
    if text.startswith(("{", "[")):
        return "JSON (perhaps an error message)"
    return "XML (perhaps an error message)" if text.startswith("<") else "plain text"
