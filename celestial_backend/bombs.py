"""
Picture files that cost far more than their bytes and pixels, told by how they are built.

A decoder works through some parts of a file in loops that a stranger can make long:
fifty lines of a JPEG may ask for the whole picture fifty times, a TIFF may be cut into
millions of tiles, and Pillow reads a BMP's run lengths in Python. Limits here are far
above what cameras and programs write.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator

from celestial_backend.errors import TooLargeError

SCANS_MAX = 50  # of a JPEG; programs write ten. Each is a walk over all of its pixels.
SEGMENTS_MAX = 2_000  # of a JPEG; the longest profile that 50 MB can hold has 800
CHUNKS_MAX = 50_000  # of a PNG; programs write some for each megabyte
BLOCKS_MAX = 20_000  # of a GIF before its first frame; they hold five megabytes
STRIPS_MAX = 100_000  # of a TIFF, or tiles; programs write no more than the picture has rows
ENTRIES_MAX = 4_000  # of a TIFF's directory
RUNS_MAX = 10_000_000  # pixels of a BMP that is stored in run lengths, and its bytes; so many take a few seconds

START_OF_SCAN, END_OF_IMAGE = 0xDA, 0xD9
JPEG_MARKER = re.compile(rb"\xff([^\x00\xd0-\xd7\xff])")  # no stuffed byte, restart or filling
BARE_MARKERS = (0x01, 0xD8)  # those without a length
EXTENSION, FRAME = 0x21, 0x2C  # the first byte of what a GIF consists of
STRIPS = (273, 324)  # where a TIFF says where its strips and tiles are, in numbers of any type
SMALL_TYPES = (1, 2, 7)  # of a TIFF's other values: bytes and text, such as a colour profile, are not counted
RUN_LENGTHS = (1, 2)  # how a BMP may be compressed, with 8 and with 4 bits for a pixel


def refuse_bomb(data: bytes) -> None:
    """
    Refuse a JPEG, PNG, GIF, TIFF or BMP of too many parts; costs some microseconds.

    Raises:
        TooLargeError: It has more parts than a picture needs; it was not decoded.
    """
    if data.startswith(b"\xff\xd8"):
        _check_jpeg(data)
    elif data.startswith(b"\x89PNG"):
        _check_png(data)
    elif data.startswith(b"GIF8") and len(data) > 10:
        _check_gif(data)
    elif data.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        _check_tiff(data)
    elif data.startswith(b"BM") and len(data) > 34:
        _check_bmp(data)


def _check_jpeg(data: bytes) -> None:
    suspect = data.count(bytes((0xFF, START_OF_SCAN))) > SCANS_MAX  # previews and films inside have some too
    scans = 0
    for segments, marker in enumerate(_jpeg_markers(data), 1):
        scans += marker == START_OF_SCAN
        if scans > SCANS_MAX:
            raise _too_many("JPEG", SCANS_MAX, "scans")
        if segments > SEGMENTS_MAX:
            raise _too_many("JPEG", SEGMENTS_MAX, "segments")
        if scans and not suspect:
            return


def _jpeg_markers(data: bytes) -> Iterator[int]:
    at = 2
    while found := JPEG_MARKER.search(data, at):
        marker, at = found[1][0], found.end()
        if marker == END_OF_IMAGE:
            return
        yield marker
        if marker not in BARE_MARKERS:
            at += int.from_bytes(data[at : at + 2])


def _check_png(data: bytes) -> None:
    at = 8
    for _ in range(CHUNKS_MAX):
        if at >= len(data):
            return
        at += 12 + int.from_bytes(data[at : at + 4])
    raise _too_many("PNG", CHUNKS_MAX, "chunks")


def _check_gif(data: bytes) -> None:
    at = 13 + (3 << (data[10] & 7) + 1 if data[10] & 0x80 else 0)  # behind the head and its colours
    inside = False
    for _ in range(BLOCKS_MAX):
        if at >= len(data) or (not inside and data[at] == FRAME):
            return
        if inside:
            at, inside = at + 1 + data[at], data[at] > 0
        else:
            inside = data[at] == EXTENSION
            at += 2 if inside else 1
    raise _too_many("GIF", BLOCKS_MAX, "blocks")


def _check_tiff(data: bytes) -> None:
    order = "<" if data.startswith(b"II") else ">"
    big = b"+" in data[2:4]
    place, number, entry = (("8xQ", "Q", "HHQ8x") if big else ("4xI", "H", "HHI4x"))
    try:
        (start,) = struct.unpack_from(order + place, data)
        (entries,) = struct.unpack_from(order + number, data, start)
        start += struct.calcsize(order + number)
        if entries > ENTRIES_MAX:
            raise _too_many("TIFF", ENTRIES_MAX, "entries")
        for at in range(start, start + entries * struct.calcsize(order + entry), struct.calcsize(order + entry)):
            tag, kind, count = struct.unpack_from(order + entry, data, at)
            if count > STRIPS_MAX and (tag in STRIPS or kind not in SMALL_TYPES):
                raise _too_many("TIFF", STRIPS_MAX, "strips or tiles")
    except (struct.error, OverflowError):
        return  # cut off, or none: the decoder says so


def _check_bmp(data: bytes) -> None:
    head, width, height, compression = struct.unpack_from("<IIi4xI", data, 14)
    long = max(width * abs(height), len(data)) > RUNS_MAX
    if long and compression in RUN_LENGTHS and head >= 40:  # a shorter head has colours there
        raise _too_many("run-length BMP", RUNS_MAX, "pixels, and as many bytes")


def _too_many(kind: str, most: int, parts: str) -> TooLargeError:
    return TooLargeError(f"a {kind} may have {most} {parts}, and this one has more. Save the picture anew.")
