"""Pictures made to hurt: each is refused with its reason, or read, in little time and little memory."""

from __future__ import annotations

import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from test_decode import claiming, noise, saved

from celestial_backend.bombs import BLOCKS_MAX, CHUNKS_MAX, RUNS_MAX, SCANS_MAX, SEGMENTS_MAX, STRIPS_MAX
from celestial_backend.decode import FORMATS, decode
from celestial_backend.errors import DecodeError, TooLargeError

MANY = 50e6
RED = (255, 0, 0)
MEMORY_MB = 40  # what refusing any of these may take, Pillow's own reading of the head included


def plain(kind: str, side: int = 8) -> bytes:
    return saved(Image.new("RGB", (side, side), RED), kind)


def outcome(data: bytes) -> bytes | str:
    """The pixels, or that there was a sentence instead."""
    try:
        return decode(data, MANY).tobytes()
    except DecodeError as error:
        return "refused" if str(error).endswith(".") else str(error)


def scans(number: int, side: int = 64) -> bytes:
    """A progressive JPEG whose last scan comes again and again; each costs a walk over the whole picture."""
    whole = saved(Image.new("RGB", (side, side), RED), "JPEG", progressive=True)
    last = whole.rindex(b"\xff\xda")
    return whole[:-2] + whole[last:-2] * number + whole[-2:]


def segments(number: int) -> bytes:
    whole = plain("JPEG")
    return whole[:2] + b"\xff\xe5\0\2" * number + whole[2:]


def chunk(name: bytes, body: bytes = b"") -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def with_chunks(chunks: bytes) -> bytes:
    """A PNG with more between its head and its pixels."""
    whole = plain("PNG")
    return whole[:33] + chunks + whole[33:]


def blocks(number: int, start: bytes = b"\x21\xfe") -> bytes:
    """A GIF with a comment of one-byte blocks."""
    whole = saved(Image.new("P", (8, 8)), "GIF")
    first = 13 + (3 << (whole[10] & 7) + 1 if whole[10] & 0x80 else 0)
    return whole[:first] + start + b"\1c" * number + b"\0" + whole[first:]


def tiles(side: int, big: bool = False) -> bytes:
    """A TIFF cut into tiles of one pixel, in the small or the big form of its directory."""
    count = side * side
    tags = [(256, 4, 1, side), (257, 4, 1, side), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (277, 3, 1, 1),
            (322, 4, 1, 1), (323, 4, 1, 1), (324, 3, count, 512), (325, 3, count, 512)]  # fmt: skip
    head = b"II+\0\x08\0\0\0" + struct.pack("<QQ", 16, 10) if big else b"II*\0" + struct.pack("<IH", 8, 10)
    entries = b"".join(struct.pack("<HHQQ" if big else "<HHII", *tag) for tag in tags)
    return (head + entries).ljust(512, b"\0") + struct.pack("<H", 8) * count


def offsets(tag: int, kind: int, count: int = 300_000) -> bytes:
    """A TIFF that names its strips or tiles in numbers of one byte."""
    tags = [(256, 4, 1, 1000), (257, 4, 1, 1000), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (277, 3, 1, 1),
            (278, 4, 1, 1), (322, 4, 1, 1), (323, 4, 1, 1), (tag, kind, count, 512)]  # fmt: skip
    entries = b"".join(struct.pack("<HHII", *one) for one in tags)
    return (b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries).ljust(512, b"\0") + b"\1" * count


def runs(side: int, body: bytes) -> bytes:
    """A BMP of one palette colour whose pixels are these run lengths."""
    head = struct.pack("<IiiHHIIiiII", 40, side, side, 1, 8, 1, len(body), 0, 0, 1, 1)
    return b"BM" + struct.pack("<I4xI", 58 + len(body), 58) + head + bytes((0, 0, 255, 0)) + body


def gif_of(width: int, height: int) -> bytes:
    return b"GIF89a" + struct.pack("<HHBBB", width, height, 0, 0, 0) + plain("GIF")[13:]


def webp_of(width: int, height: int) -> bytes:
    size = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"VP8X" + struct.pack("<IB3x", 10, 0) + size + plain("WEBP")[12:]
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def tiff_of(width: int, height: int) -> bytes:
    """A compressed TIFF of some bytes that claims a size."""
    whole = bytearray(saved(Image.new("L", (8, 8)), "TIFF", compression="tiff_deflate"))
    (start,) = struct.unpack_from("<I", whole, 4)
    for entry in range(start + 2, start + 2 + 12 * struct.unpack_from("<H", whole, start)[0], 12):
        tag = struct.unpack_from("<H", whole, entry)[0]
        if tag in (256, 257):
            struct.pack_into("<HHII", whole, entry, tag, 4, 1, width if tag == 256 else height)
    return bytes(whole)


REFUSED = {
    "jpeg-scans": (lambda: scans(SCANS_MAX, 6000), rf"may have {SCANS_MAX} scans"),
    "jpeg-segments": (lambda: segments(1_000_000), rf"may have {SEGMENTS_MAX} segments"),
    "png-chunks": (lambda: with_chunks(chunk(b"abCd") * 1_000_000), rf"may have {CHUNKS_MAX} chunks"),
    "gif-blocks": (lambda: blocks(5_000_000), rf"may have {BLOCKS_MAX} blocks"),
    "gif-blocks-after-filling": (lambda: blocks(5_000_000, b"\0\0\x21\xfe"), rf"may have {BLOCKS_MAX} blocks"),
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
from celestial_backend.decode import decode
from celestial_backend.errors import TooLargeError
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
    here = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", MEASURE], input=make(), capture_output=True, cwd=here, check=False)
    assert done.returncode == 0, done.stderr.decode()
    said, seconds, megabytes = done.stdout.decode().splitlines()
    with pytest.raises(TooLargeError, match=reason):
        raise TooLargeError(said)
    assert float(seconds) < 2  # unpacked, they take between 3 seconds and hours
    assert float(megabytes) < MEMORY_MB


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: scans(20), id="jpeg-of-many-scans"),
        pytest.param(lambda: segments(SEGMENTS_MAX - 50), id="jpeg-of-many-segments"),
        pytest.param(lambda: plain("JPEG") + b"\xff\xda" * 9000, id="jpeg-with-a-film-behind-it"),
        pytest.param(lambda: with_chunks(chunk(b"abCd") * 9000), id="png-of-many-chunks"),
        pytest.param(lambda: blocks(9000), id="gif-with-a-long-comment"),
        pytest.param(lambda: saved(Image.new("L", (2, 9000)), "TIFF", tiffinfo={278: 1}), id="tiff-of-single-rows"),
        pytest.param(lambda: saved(Image.new("RGB", (8, 8)), "TIFF", icc_profile=bytes(2_000_000)), id="large-profile"),
        pytest.param(lambda: saved(Image.new("RGB", (8, 8)), "TIFF", tiffinfo={700: bytes(2_000_000)}), id="notes"),
        pytest.param(lambda: saved(Image.new("RGB", (8, 8)), "TIFF", big_tiff=True), id="big-tiff"),
        pytest.param(lambda: runs(100, b"\x64\0\0\0" * 100), id="bmp-of-runs"),
    ],
)
def test_what_programs_write_is_no_bomb(make: Callable[[], bytes]) -> None:
    """Long files that are still pictures are read."""
    assert decode(make(), MANY).mode == "RGB"


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("kind", FORMATS)
def test_cut_at_every_byte(kind: str) -> None:
    """Wherever a file ends too early, there is a sentence or the whole picture, and never another."""
    whole = saved(noise(16, 16), kind)
    picture = decode(whole, MANY).tobytes()
    for length in range(len(whole)):
        assert outcome(whole[:length]) in (picture, "refused"), length


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("garbage", [b"\xff" * 5000, b"\0" * 5000, b"acsp" * 2000], ids=["ones", "zeros", "half"])
def test_a_colour_profile_of_garbage_changes_nothing(kind: str, garbage: bytes) -> None:
    """Profiles are not applied, so a broken one does no harm."""
    picture = decode(saved(Image.new("RGB", (8, 8), RED), kind, icc_profile=garbage), MANY)
    assert picture.getpixel((4, 4))[0] > 250


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_exif_that_leads_to_itself_ends() -> None:
    """A directory that names itself as the next one, and as the one inside it, is read once."""
    loop = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + struct.pack("<HHII", 0x8769, 4, 1, 8)
    loop += struct.pack("<HHII", 0x0112, 3, 1, 6) + struct.pack("<I", 8)
    assert decode(saved(Image.new("RGB", (8, 4), RED), "JPEG", exif=loop), MANY).size == (4, 8)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_a_tiff_whose_pages_go_in_circles_gives_its_first() -> None:
    """The second page's next is the first; only the first is looked at."""
    whole = bytearray(saved(Image.new("RGB", (8, 8), RED), "TIFF", save_all=True, append_images=[noise(8, 8)] * 3))
    (first,) = struct.unpack_from("<I", whole, 4)
    entries = struct.unpack_from("<H", whole, first)[0]
    struct.pack_into("<I", whole, first + 2 + 12 * entries, first)
    assert decode(bytes(whole), MANY).getpixel((4, 4)) == RED


@pytest.mark.parametrize("kind", FORMATS)
def test_one_pixel(kind: str) -> None:
    """The smallest picture there is."""
    picture = decode(saved(Image.new("RGB", (1, 1), RED), kind), MANY)
    assert picture.size == (1, 1)
    assert picture.getpixel((0, 0))[0] > 240


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(claiming(0, 8), id="png"),
        pytest.param(gif_of(0, 0)[:13] + b";", id="gif"),
        pytest.param(b"BM" + struct.pack("<IIIIiiHHIIIIII", 54, 0, 54, 40, 0, 0, 1, 24, 0, 0, 0, 0, 0, 0), id="bmp"),
        pytest.param(tiff_of(0, 0), id="tiff"),
    ],
)
def test_no_pixel_at_all(data: bytes) -> None:
    """A picture of width 0 is none."""
    with pytest.raises(DecodeError, match="the file must be a"):
        decode(data, MANY)


@pytest.mark.parametrize("mode", ["CMYK", "LAB", "YCbCr"])
def test_modes_of_tiff(mode: str) -> None:
    """What print and scan programs write becomes RGB, of the same colour."""
    red = decode(saved(Image.new("RGB", (8, 8), RED).convert(mode), "TIFF"), MANY).getpixel((4, 4))
    assert red[0] > 200
    assert max(red[1:]) < 60
