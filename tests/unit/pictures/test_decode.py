"""decode: bytes become an upright RGB picture, or an error that says why not."""

from __future__ import annotations

import io
import struct
import warnings
from typing import Any

import numpy as np
import pytest
from PIL import Image

from celestial_backend.errors import DecodeError, TooLargeError
from celestial_backend.pictures.decode import FORMATS, decode

MANY = 1e8
RED, BLACK = (255, 0, 0), (0, 0, 0)


def saved(picture: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def noise(width: int = 64, height: int = 48) -> Image.Image:
    return Image.fromarray(np.random.default_rng(7).integers(0, 256, (height, width, 3), dtype=np.uint8))


def near(seen: Any, wanted: tuple[int, ...], by: int = 3) -> bool:
    return all(abs(a - b) <= by for a, b in zip(seen, wanted, strict=True))


@pytest.mark.parametrize("kind", FORMATS)
def test_formats(kind: str) -> None:
    """Every format of the list is read, in RGB, at its size."""
    picture = decode(saved(Image.new("RGB", (20, 10), RED), kind), MANY)
    assert (picture.mode, picture.size) == ("RGB", (20, 10))
    assert near(picture.getpixel((5, 5)), RED)


@pytest.mark.parametrize("kind", ["ICO", "PPM", "TGA", "JPEG2000", "ICNS"])
def test_other_formats_are_refused(kind: str) -> None:
    """Formats that no browser shows are not tried, though Pillow knows them."""
    with pytest.raises(DecodeError, match="must be a picture \\(JPEG, PNG, GIF, WebP, BMP, TIFF or AVIF\\)"):
        decode(saved(Image.new("RGB", (16, 16), RED), kind), MANY)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF"])
def test_pixels_are_kept(kind: str) -> None:
    """A lossless file gives back every pixel."""
    assert decode(saved(noise(), kind), MANY).tobytes() == noise().tobytes()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(kind: str, orientation: int) -> None:
    """A picture whose EXIF data says how it was held comes out upright, once turned and not twice."""
    upright = Image.new("RGB", (48, 32), BLACK)
    upright.paste(RED, (0, 0, 24, 16))  # the upper left is red
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Pillow's numbers of the turns back
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = decode(saved(stored, kind, exif=exif), MANY)
    assert picture.size == (48, 32)
    assert near(picture.getpixel((6, 4)), RED, 12)
    assert near(picture.getpixel((42, 28)), BLACK, 12)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_broken_exif_costs_nothing() -> None:
    """EXIF data that cannot be read leaves the picture as it lies in the file."""
    picture = decode(saved(Image.new("RGB", (20, 10), RED), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff"), MANY)
    assert picture.size == (20, 10)


def test_transparent_becomes_black() -> None:
    """Alpha is laid on black, and the colour stored under a transparent pixel does not show."""
    picture = Image.new("RGBA", (3, 1))
    for x, alpha in enumerate((0, 128, 255)):
        picture.putpixel((x, 0), (*RED, alpha))
    seen = decode(saved(picture, "PNG"), MANY)
    assert [seen.getpixel((x, 0)) for x in range(3)] == [BLACK, (128, 0, 0), RED]


def test_palette_with_transparency() -> None:
    """A palette picture gets its colours; its transparent entry becomes black, whatever colour it has."""
    picture = Image.new("P", (2, 1))
    picture.putpalette([*RED, 0, 0, 255])
    picture.putpixel((1, 0), 1)
    for kind in ("PNG", "GIF"):
        assert decode(saved(picture, kind), MANY).getpixel((1, 0)) == (0, 0, 255)
        seen = decode(saved(picture, kind, transparency=0), MANY)
        assert (seen.getpixel((0, 0)), seen.getpixel((1, 0))) == (BLACK, (0, 0, 255))


def test_colour_key_transparency() -> None:
    """A PNG may call one grey or one colour transparent; that becomes black."""
    grey = Image.new("L", (2, 1), 200)
    grey.putpixel((1, 0), 90)
    seen = decode(saved(grey, "PNG", transparency=200), MANY)
    assert (seen.getpixel((0, 0)), seen.getpixel((1, 0))) == (BLACK, (90, 90, 90))
    seen = decode(saved(Image.new("RGB", (1, 1), (9, 8, 7)), "PNG", transparency=(9, 8, 7)), MANY)
    assert seen.getpixel((0, 0)) == BLACK


def test_grey_with_alpha_and_one_bit() -> None:
    """Grey with alpha and black-and-white pictures become RGB."""
    assert decode(saved(Image.new("LA", (1, 1), (200, 0)), "PNG"), MANY).getpixel((0, 0)) == BLACK
    assert decode(saved(Image.new("LA", (1, 1), (200, 255)), "PNG"), MANY).getpixel((0, 0)) == (200, 200, 200)
    assert decode(saved(Image.new("1", (1, 1), 1), "PNG"), MANY).getpixel((0, 0)) == (255, 255, 255)
    assert decode(saved(Image.new("L", (1, 1), 77), "PNG"), MANY).getpixel((0, 0)) == (77, 77, 77)


INKS = pytest.mark.parametrize(
    ("inks", "colour"),
    [
        pytest.param((0, 255, 255, 0), RED, id="red"),
        pytest.param((0, 0, 0, 0), (255, 255, 255), id="white"),
        pytest.param((0, 0, 0, 255), BLACK, id="black"),
        pytest.param((0, 0, 0, 153), (102, 102, 102), id="grey"),
        pytest.param((255, 0, 0, 0), (0, 255, 255), id="cyan"),
    ],
)


@INKS
@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk(kind: str, inks: tuple[int, ...], colour: tuple[int, ...]) -> None:
    """Four inks become the colour they print, also in Adobe's inverted JPEG files."""
    assert near(decode(saved(Image.new("CMYK", (16, 16), inks), kind), MANY).getpixel((8, 8)), colour)


@INKS
def test_ycck(inks: tuple[int, ...], colour: tuple[int, ...]) -> None:
    """So they do in YCCK files, Photoshop's habit: there three inks are stored as brightness and two colours."""
    ycc = Image.new("RGB", (1, 1), inks[:3]).convert("YCbCr").getpixel((0, 0))
    stored = (*(255 - value for value in ycc), inks[3])  # type: ignore[union-attr]
    data = bytearray(saved(Image.new("CMYK", (16, 16), stored), "JPEG", quality=100))
    data[data.index(b"Adobe") + 11] = 2  # Adobe's mark of YCCK
    assert near(decode(bytes(data), MANY).getpixel((8, 8)), colour)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_scaled(kind: str) -> None:
    """0 to 65535 becomes 0 to 255: nothing above 255 is clipped to white."""
    values = np.array([[0, 255, 257, 32896, 65535]], dtype=np.uint16)
    seen = np.asarray(decode(saved(Image.fromarray(values), kind), MANY))[0, :, 0]
    assert seen.tolist() == [0, 1, 1, 128, 255]


@pytest.mark.parametrize(
    ("kind", "values", "wanted"),
    [
        pytest.param(np.float32, [0, 0.5, 1], [0, 128, 255], id="0-to-1"),
        pytest.param(np.float32, [0, 100, 255], [0, 100, 255], id="0-to-255"),
        pytest.param(np.float32, [0, 32896, 65535], [0, 128, 255], id="0-to-65535"),
        pytest.param(np.float32, [-1000, 0, 1000], [0, 128, 255], id="stretched"),
        pytest.param(np.float32, [5e5, 5e5, 5e5], [255, 255, 255], id="flat"),
        pytest.param(np.float32, [0, 0.0005, 0.001], [0, 128, 255], id="faint"),
        pytest.param(np.float32, [0, 500, 1000], [0, 128, 255], id="faint for 65535"),
        pytest.param(np.float32, [0, 0.6, 1.2], [0, 128, 255], id="a little above 1"),
        pytest.param(np.float32, [np.nan, 0.5, np.inf], [0, 128, 255], id="some are none"),
        pytest.param(np.float32, [-3.4e38, 0.5, 1], [0, 128, 255], id="a missing value"),
        pytest.param(np.uint16, [0, 2000, 4000], [0, 128, 255], id="12 bits of 16"),
        pytest.param(np.uint16, [0, 100, 200], [0, 100, 200], id="8 bits of 16"),
        pytest.param(np.int32, [0, 100, 200], [0, 100, 200], id="whole-8-bit"),
        pytest.param(np.int32, [0, 32896, 65535], [0, 128, 255], id="whole-16-bit"),
        pytest.param(np.int32, [0, 500000, 1000000], [0, 128, 255], id="whole-stretched"),
    ],
)
def test_other_numbers(kind: type, values: list[float], wanted: list[int]) -> None:
    """Pictures of floats and large integers keep their range instead of being clipped."""
    data = saved(Image.fromarray(np.array([values], dtype=kind)), "TIFF")
    assert np.asarray(decode(data, MANY))[0, :, 1].tolist() == wanted


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_must_be_finite(value: float) -> None:
    """A picture of NaN or infinity alone has no brightness."""
    data = saved(Image.fromarray(np.full((2, 2), value, dtype=np.float32)), "TIFF")
    with pytest.raises(DecodeError, match=r"must be finite, and none is\. Save it with 8 or 16 bits"):
        decode(data, MANY)


def test_a_hot_pixel_does_not_darken_the_rest() -> None:
    """Nor does a dead one: a thousandth of the numbers may lie anywhere."""
    values = np.linspace(0, 0.01, 10_000, dtype=np.float32).reshape(100, 100)
    values[50, 50], values[50, 51] = 40_000, -40_000
    seen = np.asarray(decode(saved(Image.fromarray(values), "TIFF"), MANY))[..., 0]
    assert 120 < seen.mean() < 135
    assert (seen.min(), seen.max()) == (0, 255)


def test_the_number_that_stands_for_none_is_black() -> None:
    """As GDAL writes it down; it does not count for the range."""
    values = np.array([[-9999, -9999, 0.5, 1]], np.float32)
    data = saved(Image.fromarray(values), "TIFF", tiffinfo={42113: "-9999"})
    assert np.asarray(decode(data, MANY))[0, :, 0].tolist() == [0, 0, 128, 255]


def tiff(pixels: np.ndarray[Any, Any], *, form: int = 1, photometric: int = 1, apart: bool = False) -> bytes:
    """A TIFF of any numbers, shape (H, W, channels), as programs of science write them."""
    height, width, channels = pixels.shape
    data = np.ascontiguousarray(pixels.transpose(2, 0, 1) if apart else pixels).tobytes()
    bits = pixels.dtype.itemsize * 8
    end = 8 + 2 + 11 * 12 + 4
    several = struct.pack(f"<{channels}H", *[bits] * channels) + struct.pack(f"<{channels}H", *[form] * channels)
    at = (end, end + 2 * channels) if channels > 2 else (bits * 0x10001, form * 0x10001)
    entries = [
        (256, 3, 1, width), (257, 3, 1, height), (258, 3, channels, at[0]), (259, 3, 1, 1), (262, 3, 1, photometric),
        (273, 4, 1, end + len(several)), (277, 3, 1, channels), (278, 3, 1, height), (279, 4, 1, len(data)),
        (284, 3, 1, 2 if apart else 1), (339, 3, channels, at[1]),
    ]  # fmt: skip
    head = b"II*\0" + struct.pack("<IH", 8, len(entries)) + b"".join(struct.pack("<HHII", *one) for one in entries)
    return head + bytes(4) + several + data


RAMP = np.linspace(0, 1, 64).reshape(8, 8, 1)


@pytest.mark.parametrize(
    ("data", "last"),
    [
        pytest.param(tiff((RAMP * 4294967295).astype("<u4")), 255, id="32 bits without a sign"),
        pytest.param(tiff((RAMP * 65535).astype("<u2"), photometric=0), 0, id="white is 0, 16 bits"),
        pytest.param(tiff(RAMP.astype("<f4"), form=3, photometric=0), 0, id="white is 0, fractions"),
        pytest.param(tiff((RAMP * 2000 - 1000).astype("<i2"), form=2), 255, id="16 bits with a sign"),
    ],
)
def test_numbers_are_taken_as_a_tiff_means_them(data: bytes, last: int) -> None:
    seen = np.asarray(decode(data, MANY))[..., 0]
    assert (seen[0, 0], seen[-1, -1]) == (255 - last, last)
    assert 120 < seen.mean() < 135


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        pytest.param(tiff(np.zeros((8, 8, 3), "<f4"), form=3, photometric=2), "3 x 32 bits as fractions", id="colours"),
        pytest.param(tiff(np.zeros((8, 8, 1), "<f8"), form=3), "1 x 64 bits as fractions", id="64 bits"),
        pytest.param(tiff(np.zeros((8, 8, 1), "<f2"), form=3), "1 x 16 bits as fractions", id="half"),
        pytest.param(tiff(np.zeros((8, 8, 5), "u1")), "5 x 8 bits", id="five bands"),
        pytest.param(tiff(np.zeros((8, 8, 3), "<u2"), photometric=2, apart=True), "holds them apart", id="planes"),
        pytest.param(
            tiff(np.zeros((8, 8, 1), "u1")).replace(struct.pack("<HHII", 259, 3, 1, 1),
                                                    struct.pack("<HHII", 259, 3, 1, 34887)),
            "its compression has the number 34887", id="compression",
        ),
    ],
)  # fmt: skip
def test_a_tiff_of_another_kind_is_refused_with_the_cause(data: bytes, cause: str) -> None:
    """It is not damaged, and the sentence says what it is."""
    with pytest.raises(DecodeError, match=cause) as raised:
        decode(data, MANY)
    assert "Save the picture anew" in str(raised.value)
    assert "damaged" not in str(raised.value)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF", "MPO"])
def test_first_frame(kind: str) -> None:
    """Of an animation or a stack of pages the first picture counts."""
    more = [Image.new("RGB", (20, 10), (0, 0, 255))]
    picture = decode(saved(Image.new("RGB", (20, 10), RED), kind, save_all=True, append_images=more), MANY)
    assert near(picture.getpixel((5, 5)), RED)


@pytest.mark.parametrize("part", [0.03, 0.5, 0.9])
@pytest.mark.parametrize("kind", FORMATS)
def test_cut_files_are_errors(kind: str, part: float) -> None:
    """A file that was cut on its way is refused, never filled up with grey."""
    data = saved(noise(200, 200), kind)
    with pytest.raises(DecodeError, match="the file must be a"):
        decode(data[: int(len(data) * part)], MANY)


def test_cut_progressive_jpeg() -> None:
    """A progressive JPEG whose finer scans are missing is cut too."""
    data = saved(noise(200, 200), "JPEG", progressive=True)
    with pytest.raises(DecodeError, match=r"whole picture, and its \d+ bytes look like a damaged or cut-off JPEG"):
        decode(data[: len(data) * 2 // 3], MANY)


@pytest.mark.parametrize(
    ("data", "looks"),
    [
        pytest.param(b"", "an empty file", id="empty"),
        pytest.param(b"hello there", "plain text", id="text"),
        pytest.param(b"\xef\xbb\xbf\n<!DOCTYPE html><html>", "a web page", id="html"),
        pytest.param(b'{"detail": "no"}', "JSON", id="json"),
        pytest.param(b"<?xml version='1.0'?><Error/>", "XML", id="xml"),
        pytest.param(b"<?xml version='1.0'?><svg/>", "an SVG drawing", id="svg"),
        pytest.param(b"%PDF-1.7\xff", "a PDF", id="pdf"),
        pytest.param(b"\x1f\x8b\x08\0", "gzip", id="gzip"),
        pytest.param(b"PK\3\4\0", "a ZIP archive", id="zip"),
        pytest.param(b"\0\0\0\x18ftypheic\0", "a HEIC photo", id="heic"),
        pytest.param(b"\xff\xd8\xff\xe0", "a damaged or cut-off JPEG", id="jpeg"),
        pytest.param(b"\x01\xfe\xff\x00" * 9, "nothing known", id="noise"),
        pytest.param(("é" * 300).encode(), "plain text", id="letter-cut-at-the-end-of-the-sample"),
    ],
)
def test_says_what_it_looks_like(data: bytes, looks: str) -> None:
    """Bytes that are no picture are refused with the rule, what they look like, and what to do."""
    with pytest.raises(DecodeError) as raised:
        decode(data, MANY)
    assert "must be a " in str(raised.value)
    assert f"its {len(data)} bytes look like " in str(raised.value)
    assert looks in str(raised.value)
    assert str(raised.value).endswith(("Check what the task's address really leads to.", "Upload it again."))


@pytest.mark.parametrize("kind", FORMATS)
def test_pixels_are_limited(kind: str) -> None:
    """A picture of exactly the limit passes, one pixel more does not, and the message names the setting."""
    data = saved(Image.new("RGB", (100, 50)), kind)
    assert decode(data, 5000).size == (100, 50)
    with pytest.raises(TooLargeError) as raised:
        decode(data, 4999)
    assert "may have 0.004999 million pixels, and this one has 100 x 50." in str(raised.value)
    assert "Raise CELESTIAL_IMAGE_MAX_MEGAPIXELS" in str(raised.value)


def claiming(width: int, height: int) -> bytes:
    """A tiny PNG that says it is large."""
    import zlib

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [9_000, 12_000, 16_000, 65_000])
@pytest.mark.parametrize("strict", [False, True])
def test_bombs(side: int, strict: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that claims a giant size is too large, whether Pillow would stay silent, warn or fail."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 89_478_485)
    with warnings.catch_warnings():
        warnings.simplefilter("error" if strict else "ignore")
        with pytest.raises(TooLargeError, match="CELESTIAL_IMAGE_MAX_MEGAPIXELS"):
            decode(claiming(side, side), 50e6)


def test_a_high_limit_is_ours_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """An operator who allows more than Pillow's own limit gets neither its warning nor its error."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode(saved(Image.new("RGB", (100, 50)), "PNG"), 5000).size == (100, 50)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_any_damage_is_a_decode_error() -> None:
    """Whatever bytes are changed in a file, the outcome is a picture or one of our errors."""
    rng = np.random.default_rng(3)
    for kind in FORMATS:
        whole = saved(noise(24, 24), kind)
        for _ in range(40):
            data = bytearray(whole)
            for place in rng.integers(0, len(data), 4):
                data[place] = int(rng.integers(256))
            try:
                assert decode(bytes(data), 1e6).mode == "RGB"
            except (DecodeError, TooLargeError):
                continue
