"""What a bomb costs, measured in a process of its own; and what notes about a picture cost, as they grow."""

from __future__ import annotations

import contextlib
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from celestial_backend.errors import DecodeError, TooLargeError
from celestial_backend.pictures.decode import (
    BLOCKS_MAX,
    CHUNKS_MAX,
    HEAD_MAX,
    PACKED_MAX,
    RUNS_MAX,
    SCANS_MAX,
    SEGMENTS_MAX,
    STRIPS_MAX,
    decode,
)
from tests.unit.pictures.test_bombs import (
    BLOCKS,
    MANY,
    XMP,
    associated,
    blocks,
    chunk,
    gif_of,
    items,
    notes,
    pieces,
    plain,
    repeated,
    runs,
    scans,
    segment,
    segments,
    tiff,
    tiff_of,
    tiles,
    webp_of,
    with_chunks,
    with_exif,
    with_exif_as_text,
    with_segments,
)
from tests.unit.pictures.test_decode import claiming, saved

MEMORY_MB = 40  # what refusing any of these may take, Pillow's own reading of the head included


def offsets(tag: int, kind: int, count: int = 300_000) -> bytes:
    """A TIFF that names its strips or tiles in numbers of one byte."""
    tags = [(256, 4, 1, 1000), (257, 4, 1, 1000), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (277, 3, 1, 1),
            (278, 4, 1, 1), (322, 4, 1, 1), (323, 4, 1, 1), (tag, kind, count, 512)]  # fmt: skip
    entries = b"".join(struct.pack("<HHII", *one) for one in tags)
    return (b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries).ljust(512, b"\0") + b"\1" * count


REFUSED = {
    "jpeg-scans": (lambda: scans(SCANS_MAX, 6000), rf"may have {SCANS_MAX} scans"),
    "jpeg-segments": (lambda: segments(1_000_000), rf"may have {SEGMENTS_MAX} segments"),
    "png-chunks": (lambda: with_chunks(chunk(b"abCd") * 1_000_000), rf"may have {CHUNKS_MAX} chunks"),
    "gif-blocks": (lambda: blocks(5_000_000), rf"may have {BLOCKS_MAX} blocks"),
    "gif-blocks-after-filling": (lambda: blocks(5_000_000, b"\0\0\x21\xfe"), rf"may have {BLOCKS_MAX} blocks"),
    "png-profiles": (
        lambda: with_chunks(chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(1_000_000))) * 5_000),
        rf"may have {PACKED_MAX} compressed texts and profiles"),
    "tiff-notes-at-one-place": (
        lambda: tiff([(tag, 7, 1_000_000, 65_536) for tag in range(40_000, 43_900)], 1_000_000, compressed=True),
        r"may have \d+ bytes in its entries"),
    "avif-associations": (lambda: associated(1_000_000), rf"may have {HEAD_MAX} bytes of tables"),
    "tiff-tiles": (lambda: tiles(1500), rf"may have {STRIPS_MAX} strips or tiles"),
    "big-tiff-tiles": (lambda: tiles(1500, big=True), rf"may have {STRIPS_MAX} strips or tiles"),
    "tiff-strips-in-bytes": (lambda: offsets(273, 1), rf"may have {STRIPS_MAX} strips or tiles"),
    "tiff-tiles-in-bytes": (lambda: offsets(324, 1), rf"may have {STRIPS_MAX} strips or tiles"),
    "tiff-strips-in-signed-bytes": (lambda: offsets(273, 6), rf"may have {STRIPS_MAX} strips or tiles"),
    "tiff-tiles-in-signed-bytes": (lambda: offsets(324, 6), rf"may have {STRIPS_MAX} strips or tiles"),
    "bmp-runs": (lambda: runs(100, b"\0\0" * RUNS_MAX), rf"may have {RUNS_MAX} pixels, and as many bytes"),
    "bmp-runs-of-many-pixels": (lambda: runs(7000, b"\1\0\0\0" * 7000), rf"may have {RUNS_MAX} pixels"),
    "png-size": (lambda: claiming(65_000, 65_000), "million pixels"),
    "png-size-of-signed-numbers": (lambda: claiming(2**31 - 1, 2**31 - 1), "million pixels"),
    "gif-size": (lambda: gif_of(65_535, 65_535), "million pixels"),
    "webp-size": (lambda: webp_of(16_383, 16_383), "million pixels"),
    "tiff-size": (lambda: tiff_of(100_000, 100_000), "million pixels"),
    "tiff-size-real": (
        lambda: saved(Image.new("L", (9_000, 9_000)), "TIFF", compression="tiff_deflate"), "million pixels"),
}  # fmt: skip

MEASURE = """
import resource, sys, time
from celestial_backend.pictures.decode import decode
from celestial_backend.errors import DecodeError, TooLargeError
data = sys.stdin.buffer.read()
before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
try:
    print(decode(data, 50e6).size)
except TooLargeError as error:
    print(error)
print(time.process_time() - start)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.parametrize("name", REFUSED)
def test_a_bomb_costs_neither_time_nor_memory(name: str) -> None:
    """It is refused with its reason before it is unpacked: in a process of its own, the peak hardly moves."""
    make, reason = REFUSED[name]
    here = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", MEASURE], input=make(), capture_output=True, cwd=here, check=False)
    assert done.returncode == 0, done.stderr.decode()
    said, seconds, megabytes = done.stdout.decode().splitlines()
    with pytest.raises(TooLargeError, match=reason):
        raise TooLargeError(said)
    assert float(seconds) < 2  # unpacked, they take between 3 seconds and hours
    assert float(megabytes) < MEMORY_MB


PACKED = zlib.compress(bytes(1_000_000))
GROWING: dict[str, Callable[[int], bytes]] = {
    "jpeg-exif": lambda size: with_segments(repeated(segment(0xE1, b"Exif\0\0" + bytes(65_000)), size)),
    "jpeg-exif-behind-an-end": lambda size: with_segments(b"\xff\xd9" + pieces(b"Exif\0\0", bytes(size))),
    "jpeg-exif-behind-a-bare-marker": lambda size: with_segments(
        repeated(b"\xff\xc8" + segment(0xE1, b"Exif\0\0" + bytes(60_000)), size)),
    "jpeg-photoshop": lambda size: with_segments(
        repeated(segment(0xED, b"Photoshop 3.0\0" + b"8BIM\4\4\0\0\0\0\0\0" * 5_400), size)),
    "jpeg-tables": lambda size: with_segments(repeated(segment(0xDB, (b"\0" + b"\1" * 64) * 1000), size)),
    "jpeg-frames": lambda size: with_segments(
        repeated(segment(0xC0, b"\x08\0\x08\0\x08\x03" + b"\1\x22\0" * 21_000), size)),
    "jpeg-profiles": lambda size: with_segments(repeated(segment(0xE2, b"ICC_PROFILE\0\1\1" + bytes(65_000)), size)),
    "jpeg-xmp": lambda size: with_segments(repeated(segment(0xE1, XMP + b"tiff:Orientatio" * 4000), size)),
    "jpeg-comments": lambda size: with_segments(repeated(segment(0xFE, bytes(65_000)), size)),
    "jpeg-album": lambda size: with_segments(
        repeated(segment(0xE2, b"MPF\0" + notes([(tag, 3, 20_000, 8) for tag in range(1, 4000)])), size)),
    "jpeg-filling": lambda size: with_segments(b"\xff" * size),
    "jpeg-filling-behind-all": lambda size: with_segments(b"")[:-2] + b"\xff" * size + b"\xff\xd9",
    "jpeg-zeros": lambda size: with_segments(segment(0xFE, b"") + bytes(size)),
    "jpeg-restarts": lambda size: with_segments(b"\xff\xd0" * (size // 2)),
    "jpeg-without-pixels": lambda size: with_segments(b"")[:100] + bytes(size),
    "png-profiles": lambda size: with_chunks(repeated(chunk(b"iCCP", b"a\0\0" + PACKED), size)),
    "png-nameless-texts": lambda size: with_chunks(repeated(chunk(b"zTXt", b"\0\0" + PACKED), size)),
    "png-texts-behind-the-pixels": lambda size: plain("PNG")[:-12]
    + repeated(chunk(b"iTXt", b"a\0\1\0\0\0" + zlib.compress(b"\xff" * 1_000_000)), size) + chunk(b"IEND"),
    "png-texts": lambda size: with_chunks(repeated(chunk(b"tEXt", b"a\0" + bytes(2000)), size)),
    "png-xmp": lambda size: with_chunks(
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + repeated(b"tiff:Orientatio", size))),
    "png-exif-as-text": with_exif_as_text,
    "gif-comments": lambda size: blocks(size // 256, block=b"\xff" + b"c" * 255),
    "gif-blocks-behind-an-empty-one": lambda size: blocks(size // 2, b"\x21\xf9\0\x2c" + bytes(44)),
    "gif-blocks-behind-a-name": lambda size: blocks(size // 2, b"\x21\xff\x0bNETSCAPE2.0\0\x2c" + bytes(44)),
    "webp-xmp": lambda size: webp_of(8, 8, b"XMP " + struct.pack("<I", size) + b"tiff:Orientation" * (size // 16)),
    "webp-chunks": lambda size: webp_of(8, 8, b"abcd\0\0\0\0" * (size // 8)),
    "tiff-one-value": lambda size: tiff([(700, 7, size, 65_536)], size),
    "tiff-values-at-one-place": lambda size: tiff([(tag, 7, size, 65_536) for tag in range(40_000, 43_900)], size),
    "tiff-values-past-the-end": lambda size: tiff(
        [(tag, 7, 2 * size, 65_536) for tag in range(40_000, 43_900)], size, compressed=True),
    "tiff-fractions": lambda size: tiff([(tag, 5, size // 8, 65_536) for tag in (282, 283, 274)], size),
    "tiff-inner-fractions": lambda size: tiff([(0x8769, 4, 1, 65_536), (0x8825, 4, 1, 65_536)], size),
    "avif-associations": associated,
    "avif-items": lambda size: items(900, 1, size) + bytes(size),
    **{
        f"{kind}-{name}": lambda size, kind=kind, make=make: with_exif(kind, make(size))
        for kind, names in (("JPEG", BLOCKS), ("PNG", BLOCKS), ("WEBP", ("entries",)), ("AVIF", ("entries",)))
        for name, make in BLOCKS.items() if name in names
    },
}  # fmt: skip
SIZES = (2_000_000, 4_000_000, 8_000_000, 16_000_000)
A_BYTE_S = 20e-9  # so little, such as for copying memory, is told from no other cost by how it grows


def seconds(data: bytes) -> float:
    """The processor's least time for a file that is read, refused or damaged."""
    runs: list[float] = []
    while len(runs) < 5 and sum(runs) < 0.05:
        started = time.thread_time()
        with contextlib.suppress(DecodeError, TooLargeError):
            decode(data, MANY)
        runs.append(time.thread_time() - started)
    return min(runs)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("name", GROWING)
def test_what_is_noted_costs_no_more_than_its_bytes(name: str) -> None:
    """However a file notes things about its picture, time grows no faster than the file's size, and stays small."""
    taken = [seconds(GROWING[name](size)) for size in SIZES]
    assert max(taken) < 1
    slope, _ = np.polyfit(np.log(SIZES), np.log(taken), 1)
    assert slope <= 1.2 or taken[-1] < A_BYTE_S * SIZES[-1]
