"""Pictures made to hurt: each is refused with its reason, or read, in little time and little memory."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from celestial_backend.errors import DecodeError, TooLargeError
from celestial_backend.pictures.decode import (
    AVIF_EXIF_MAX,
    ENTRIES_MAX,
    FILLING_MAX,
    FORMATS,
    FRACTIONS_MAX,
    NOTES_MAX,
    PIECES_MAX,
    PROPERTY_MAX,
    SEGMENTS_MAX,
    STRIPS_MAX,
    decode,
)
from tests.unit.pictures.test_decode import claiming, noise, saved

MANY = 50e6
RED = (255, 0, 0)


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
    whole = saved(Image.new("RGB", (8, 4), RED), "PNG")
    return whole[:33] + chunks + whole[33:]


def blocks(number: int, start: bytes = b"\x21\xfe", block: bytes = b"\1c") -> bytes:
    """A GIF with a comment of one-byte blocks."""
    whole = saved(Image.new("P", (8, 8)), "GIF")
    first = 13 + (3 << (whole[10] & 7) + 1 if whole[10] & 0x80 else 0)
    return whole[:first] + start + block * number + b"\0" + whole[first:]


def tiles(side: int, big: bool = False) -> bytes:
    """A TIFF cut into tiles of one pixel, in the small or the big form of its directory."""
    count = side * side
    tags = [(256, 4, 1, side), (257, 4, 1, side), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (277, 3, 1, 1),
            (322, 4, 1, 1), (323, 4, 1, 1), (324, 3, count, 512), (325, 3, count, 512)]  # fmt: skip
    head = b"II+\0\x08\0\0\0" + struct.pack("<QQ", 16, 10) if big else b"II*\0" + struct.pack("<IH", 8, 10)
    entries = b"".join(struct.pack("<HHQQ" if big else "<HHII", *tag) for tag in tags)
    return (head + entries).ljust(512, b"\0") + struct.pack("<H", 8) * count


def runs(side: int, body: bytes) -> bytes:
    """A BMP of one palette colour whose pixels are these run lengths."""
    head = struct.pack("<IiiHHIIiiII", 40, side, side, 1, 8, 1, len(body), 0, 0, 1, 1)
    return b"BM" + struct.pack("<I4xI", 58 + len(body), 58) + head + bytes((0, 0, 255, 0)) + body


def repeated(part: bytes, size: int) -> bytes:
    return part * (size // len(part))


def segment(marker: int, body: bytes) -> bytes:
    return bytes((0xFF, marker)) + struct.pack(">H", len(body) + 2) + body


def with_segments(parts: bytes) -> bytes:
    """A JPEG with more behind its first bytes; it has no JFIF part, so Pillow asks EXIF for its resolution."""
    whole = saved(Image.new("RGB", (8, 4), RED), "JPEG")
    return whole[:2] + parts + whole[whole.index(b"\xff\xdb") :]


def pieces(start: bytes, data: bytes) -> bytes:
    """Segments of APP1 that hold what is too long for one."""
    step = 65_533 - len(start)
    return b"".join(segment(0xE1, start + data[at : at + step]) for at in range(0, len(data), step))


def notes(entries: Sequence[tuple[int, int, int, int]], size: int = 0) -> bytes:
    """A block of EXIF data: a directory of tags, types, counts and places, and then as many bytes of ones."""
    block = b"II*\0" + struct.pack("<IH", 8, len(entries)) + b"".join(struct.pack("<HHII", *one) for one in entries)
    return (block + bytes(4)).ljust(size, b"\1")


def with_exif(kind: str, block: bytes) -> bytes:
    """A picture with EXIF data, where each format has it."""
    if kind == "JPEG":
        return with_segments(pieces(b"Exif\0\0", block))
    if kind == "PNG":
        return with_chunks(chunk(b"eXIf", block))
    if kind == "WEBP":
        return webp_of(8, 8, b"EXIF" + struct.pack("<I", len(block)) + block + bytes(len(block) % 2))
    whole = saved(Image.new("RGB", (8, 4), RED), "AVIF", exif=b"Exif\0\0" + notes([(0x0128, 3, 1, 2)]))
    at, short = whole.index(b"II*\0") - 10, 10 + len(notes([(0x0128, 3, 1, 2)]))
    whole = whole.replace(struct.pack(">II", at, short), struct.pack(">II", len(whole) + 8, 4 + len(block)))
    return whole + box(b"mdat", bytes(4), block)


def with_exif_as_text(size: int) -> bytes:
    """A PNG with a text that claims to be EXIF data, and is nothing but empty lines."""
    return with_chunks(chunk(b"tEXt", b"Raw profile type exif\0" + b"\n" * size))


def box(name: bytes, *parts: bytes) -> bytes:
    body = b"".join(parts)
    return struct.pack(">I", 8 + len(body)) + name + body


def avif(*tables: bytes) -> bytes:
    """An AVIF of which there is only the head."""
    return box(b"ftyp", b"avif\0\0\0\0avifmif1") + box(b"meta", bytes(4), *tables)


def items(number: int, count: int, size: int, name: bytes = b"mime") -> bytes:
    """An AVIF of items that are put together from so many pieces of a size."""
    places = b"".join(
        struct.pack(">HHH", 1 + item, 0, count) + struct.pack(">II", 0, size) * count for item in range(number)
    )
    names = b"".join(box(b"infe", b"\2\0\0\0", struct.pack(">HH", 1 + item, 0), name + b"\0") for item in range(number))
    return avif(
        box(b"iloc", b"\0\0\0\0\x44\0", struct.pack(">H", number), places),
        box(b"iinf", bytes(4), struct.pack(">H", number), names),
    )


def associated(size: int) -> bytes:
    """An AVIF that says of many items that there is nothing to say of them."""
    said = np.zeros(size // 5, dtype=[("item", ">u4"), ("properties", "u1")])
    said["item"] = range(1, 1 + len(said))
    return avif(box(b"iprp", box(b"ipco"), box(b"ipma", b"\1\0\0\0", struct.pack(">I", len(said)), said.tobytes())))


def tiff(entries: Sequence[tuple[int, int, int, int]], size: int, compressed: bool = False) -> bytes:
    """A TIFF of 8 x 8 pixels with more entries and as many bytes of ones at 65536."""
    whole = saved(Image.new("L", (8, 8)), "TIFF", compression="tiff_lzw" if compressed else None)
    (start,) = struct.unpack_from("<I", whole, 4)
    (number,) = struct.unpack_from("<H", whole, start)
    first = [struct.unpack_from("<HHII", whole, start + 2 + 12 * place) for place in range(number)]
    every = sorted([*first, *entries])
    directory = struct.pack("<H", len(every)) + b"".join(struct.pack("<HHII", *one) for one in every) + bytes(4)
    whole = whole[:4] + struct.pack("<I", len(whole)) + whole[8:] + directory
    return whole.ljust(65_536, b"\0") + inner(size)


def inner(size: int) -> bytes:
    """A directory of one entry, which holds fractions."""
    return struct.pack("<HHHIII", 1, 0x9999, 5, size // 8, 65_536 + 18, 0) + b"\1" * size


def gif_of(width: int, height: int) -> bytes:
    return b"GIF89a" + struct.pack("<HHBBB", width, height, 0, 0, 0) + plain("GIF")[13:]


def webp_of(width: int, height: int, chunks: bytes = b"") -> bytes:
    size = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"VP8X" + struct.pack("<IB3x", 10, 12 if chunks else 0) + size + plain("WEBP")[12:] + chunks
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


BLOCKS = {  # of EXIF data, by what their size is spent on
    "one-value": lambda size: notes([(0x927C, 7, size - 30, 26)], size),
    "values-at-one-place": lambda size: notes([(tag, 7, size // 2, 8) for tag in range(1000, 4900)], size),
    "values-past-the-end": lambda size: notes([(tag, 7, size, 8) for tag in range(1000, 4900)], size),
    "entries": lambda size: notes([(tag, 7, 5, 8) for tag in range(1000, 1000 + min(64_000, size // 16))], size),
    "fractions": lambda size: notes([(tag, 5, size // 8 - 20, 50) for tag in (0x0128, 0x011A)], size),
    "numbers": lambda size: notes([(0x9999, 3, size // 2 - 20, 26)], size),
    "turned-fractions": lambda size: notes([(0x0112, 5, size // 8 - 20, 26)], size),
    "inner-fractions": lambda size: notes([(0x8769, 4, 1, 26)], 26) + struct.pack("<HHHII", 1, 9, 5, size // 8 - 20, 60)
    + b"\1" * size,
}  # fmt: skip
XMP = b"http://ns.adobe.com/xap/1.0/\0"
EXIF = "a block of EXIF data may have "


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        pytest.param(with_exif("PNG", BLOCKS["entries"](1_000_000)), rf"{EXIF}{ENTRIES_MAX} entries", id="entries"),
        pytest.param(
            with_exif("WEBP", BLOCKS["values-at-one-place"](99_999)), f"{EXIF}199998 bytes in its entries", id="values"
        ),
        pytest.param(
            with_exif("PNG", BLOCKS["fractions"](200_000)), f"{EXIF}{FRACTIONS_MAX} numbers in an entry", id="fractions"
        ),
        pytest.param(
            with_exif("PNG", BLOCKS["numbers"](400_000)), f"{EXIF}{STRIPS_MAX} numbers in an entry", id="numbers"
        ),
        pytest.param(
            with_exif("JPEG", BLOCKS["one-value"](NOTES_MAX)),
            f"a JPEG may have {NOTES_MAX} bytes of EXIF data and tables", id="jpeg-exif",
        ),
        pytest.param(
            with_segments(b"\0" * FILLING_MAX + b"\0"), f"a JPEG may have {FILLING_MAX} bytes between its segments",
            id="jpeg-filling",
        ),
        pytest.param(
            with_segments(segment(0xE2, b"MPF\0" + notes([(7, 7, 1, 1)] * 4001))),
            f"a list of a JPEG's pictures may have {ENTRIES_MAX} entries", id="jpeg-album",
        ),
        pytest.param(
            with_exif_as_text(NOTES_MAX + 1), f"a picture may have {NOTES_MAX} bytes of EXIF data as text",
            id="png-text",
        ),
        pytest.param(b"II\0*" + tiles(400)[4:], f"a TIFF may have {STRIPS_MAX} strips or tiles", id="tiff-head"),
        pytest.param(
            avif(box(b"iprp", box(b"ipco", box(b"free", bytes(PROPERTY_MAX + 1))))),
            f"a property of an AVIF may have {PROPERTY_MAX} bytes", id="avif-property",
        ),
        pytest.param(
            avif(box(b"iloc", bytes(6), b"\0\1" + struct.pack(">HHH", 1, 0, PIECES_MAX + 1))),
            f"an AVIF may have {PIECES_MAX} pieces of data", id="avif-pieces",
        ),
        pytest.param(items(2, 1, 10_000_000), r"an AVIF may have \d+ bytes in its items", id="avif-items"),
        pytest.param(
            items(1, 2, AVIF_EXIF_MAX, b"Exif"), f"an AVIF may have {AVIF_EXIF_MAX} bytes of EXIF data", id="avif-exif"
        ),
        pytest.param(
            with_exif("AVIF", bytes(AVIF_EXIF_MAX)), f"an AVIF may have {AVIF_EXIF_MAX} bytes of EXIF data",
            id="avif-exif-of-a-picture",
        ),
    ],
)  # fmt: skip
def test_too_many_notes_are_refused(data: bytes, reason: str) -> None:
    """The sentence says what there is too much of."""
    with pytest.raises(TooLargeError, match=rf"^{reason}, and this one has more\. Save the picture anew\.$"):
        decode(data, MANY)


def test_a_tiff_that_two_decoders_read_differently_is_refused() -> None:
    """Pillow takes the directory of such a file for another than libtiff does."""
    with pytest.raises(DecodeError, match=r"^a TIFF of 64-bit numbers must be little-endian, and this one is not\."):
        decode(b"MM\0+" + tiff_of(8, 8)[4:], MANY)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF"])
@pytest.mark.parametrize(
    "block",
    [
        pytest.param(b"II*\0\x08\0\0\0" + b"\xff" * 40_000, id="garbage"),
        pytest.param(notes([(0x010F, 2, 2**32 - 1, 8)] * 2, 1000), id="sizes"),
        pytest.param(notes([(7, 5, 2**32 - 1, 900), (8, 4, 2**31, 8), (9, 99, 2**31, 8)], 1000), id="counts"),
        pytest.param(notes([(tag, 7, 100_000, 2**31) for tag in range(1, 3000)]), id="places"),
    ],
)
def test_damaged_notes_cost_no_picture(kind: str, block: bytes) -> None:
    """What cannot be read is no bomb: the picture comes as it lies in the file."""
    assert decode(with_exif(kind, block), MANY).size in ((8, 4), (8, 8))


TURN = (0x0112, 3, 1, 6)
CAMERA = [(0x010F, 2, 9, 40_000), TURN, (0x011A, 5, 1, 40_016), (0x0128, 3, 1, 2), (0x8769, 4, 1, 39_000)]
ICC = b"ICC_PROFILE\0"


def profile_as_text(block: bytes) -> bytes:
    """EXIF data as ImageMagick writes it into a PNG."""
    digits = block.hex().encode()
    lines = [digits[at : at + 72] for at in range(0, len(digits), 72)]
    text = b"\nexif\n%8d\n" % len(block) + b"\n".join(lines) + b"\n"
    return chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(text))


def scanned() -> bytes:
    """A TIFF with a directory about the camera, a profile and a note, and turned."""
    camera = Image.Exif()
    camera[0x0112] = 6
    camera.get_ifd(0x8769)[0x829A] = TiffImagePlugin.IFDRational(1, 250)
    picture = Image.new("RGB", (8, 4), RED)
    return saved(picture, "TIFF", exif=camera, icc_profile=bytes(5_000_000), compression="tiff_lzw")


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: with_exif("JPEG", notes(CAMERA, 65_000)), id="phone"),
        pytest.param(lambda: with_exif("JPEG", notes([TURN, (0x927C, 7, 999_000, 99)], 1_000_000)), id="long-notes"),
        pytest.param(
            lambda: with_segments(
                pieces(b"Exif\0\0", notes(CAMERA, 65_000))
                + pieces(XMP.replace(b"xap/1.0", b"xmp/extension"), bytes(5_000_000))
                + b"".join(segment(0xE2, ICC + bytes((1 + number, 80)) + bytes(65_000)) for number in range(80))
                + segment(0xED, b"Photoshop 3.0\0" + b"8BIM\4\4\0\0\0\0\xc3\x50" + bytes(50_000))
                + b"\xff" * 10_000
            ),
            id="all-that-there-is",
        ),
        pytest.param(lambda: with_exif("PNG", notes(CAMERA, 65_000)) + bytes(2_000_000), id="png-with-zeros-behind"),
        pytest.param(lambda: with_chunks(profile_as_text(notes(CAMERA, 65_000))), id="png-with-text"),
        pytest.param(lambda: with_segments(segment(0xE1, XMP + b' tiff:Orientation="6" ')), id="xmp"),
        pytest.param(scanned, id="tiff"),
    ],
)
def test_what_cameras_note_is_read(make: Callable[[], bytes]) -> None:
    """Long notes, in the forms that cameras and programs write, still say which side is up."""
    assert decode(make(), MANY).size == (4, 8)


@pytest.mark.parametrize("kind", ["WEBP", "AVIF"])
def test_what_programs_note_is_read(kind: str) -> None:
    """A long profile, a long note, EXIF data with a small picture in it, and transparency."""
    camera = Image.Exif()
    camera[0x0112], camera[0x927C] = 6, bytes(64_000)
    picture = Image.new("RGBA", (8, 4), RED)
    more = {"icc_profile": bytes(5_000_000), "xmp": bytes(5_000_000)}
    assert decode(saved(picture, kind, exif=camera, **more), MANY).size == (4, 8)
