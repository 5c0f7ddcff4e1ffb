"""
The picture of a task: from the value in the task's data to pixels.

Label Studio knows many ways to name a picture: uploads, files it serves from its
own disk, cloud storage that only it can open, plain addresses, pictures written
into the task itself. What lies on a disk here is read from there, in one go; the
rest comes over HTTP.
"""

from __future__ import annotations

import base64
import binascii
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import SplitResult, quote, unquote

import numpy as np
from PIL import Image

from celestial_backend.decode import decode
from celestial_backend.download import ADDRESS_MAX, LOCAL, UPLOAD, Downloader, local_file, split_address, studio_path
from celestial_backend.errors import DecodeError, FetchError, ImageError, TooLargeError
from celestial_backend.folders import Originals, read_inside, split_inside
from celestial_backend.metrics import DECODE, FETCH, Metrics
from celestial_backend.settings import Settings
from celestial_backend.studio import Studio

CLOUDS = ("s3", "gs", "azure-blob")  # the schemes that Label Studio's storages resolve
SHOWN_MAX = 100  # letters of a task's value in a message
SCHEME = re.compile(r"([\w+.-]*:)?//")
MEDIA_TYPE = re.compile(r"data:[\w.+-]*/?[\w.+-]*(;base64)?(?=,)", re.IGNORECASE | re.ASCII)
BASE64 = bytes.maketrans(b"-_", b"+/")
PIECE = 1 << 20  # bytes
DIGITS = np.full(256, 16, np.uint8)  # what a byte is worth as a hexadecimal digit; 16 where it is none
DIGITS[list(b"0123456789ABCDEFabcdef")] = [*range(16), *range(10, 16)]
KINDS = (
    "a task names its picture by an upload (/data/upload/...), a local file of Label Studio"
    " (/data/local-files/?d=...), an http or https address, cloud storage (s3://, gs://, azure-blob://)"
    " or a data: URI"
)


class ImageReader:
    """Reads the pictures of tasks; one per process, called side by side from many threads."""

    def __init__(self, settings: Settings, studio: Studio, metrics: Metrics | None = None) -> None:
        self._settings = settings
        self._metrics = metrics or Metrics()
        self._studio = studio
        self._max_mb = settings.image_max_mb
        self._downloader = Downloader(settings, studio)
        self._originals = (
            Originals(settings.data_folder, "CELESTIAL_DATA_FOLDER", settings.image_max_mb)
            if settings.data_folder
            else None
        )

    def read(
        self, value: object, task_id: int | None = None, take: Callable[[int], None] | None = None
    ) -> Image.Image:
        """
        The picture that a task's value names, upright, in mode RGB.

        Args:
            value: What stands under the task's data key; anything, as strangers write tasks.
            task_id: The task's id; cloud storage cannot be read without.
            take: As for `decode`.

        Raises:
            ForbiddenError: Its host or path is not allowed.
            FetchError: It could not be fetched.
            TooLargeError: It has too many bytes or pixels.
            DecodeError: Its bytes are no picture.
            ImageError: The value names no picture at all.
            StudioError: Label Studio's token could not be renewed.
        """
        with _naming(value):
            with self._metrics.stage(FETCH):
                data = self._near(value)
                if data is None:
                    data = self._fetched(value, task_id)
            return self._decoded(data, take)

    def read_near(self, value: object, take: Callable[[int], None] | None = None) -> Image.Image | None:
        """
        The same for a picture in the task itself or on a disk here; None for one that has to be fetched.

        Raises:
            ImageError: As `read`.
        """
        started = time.perf_counter()
        with _naming(value):
            data = self._near(value)
            if data is None:
                return None
            self._metrics.took(FETCH, time.perf_counter() - started)
            return self._decoded(data, take)

    def close(self) -> None:
        """Close the connections and forget which hosts were silent; reading again opens new ones."""
        self._downloader.close()

    def _near(self, value: object) -> bytes | None:
        """The bytes of what is here; None for what must be fetched, or cannot be read here."""
        text = _text(value)
        if _is_data(text):
            return _data_uri(text, self._max_mb)
        parts = split_address(text)
        if not self._is_studio(text, parts):
            return None
        if upload := UPLOAD.fullmatch(parts.path):
            return self._upload(split_inside(unquote(upload["path"])))
        if LOCAL.fullmatch(parts.path):
            return self._local_file(split_inside(local_file(parts.query)))
        return None

    def _fetched(self, value: object, task_id: int | None) -> bytes:
        text = _text(value)
        parts = split_address(text)
        if parts.scheme in CLOUDS:
            return self._cloud(text, task_id)
        if self._is_studio(text, parts) and (path := studio_path(parts)):
            return self._get(path)
        if parts.scheme in ("http", "https"):
            return self._downloader.get(text)
        raise ImageError(f"{KINDS}; this is none of them. Correct the task.")

    def _decoded(self, data: bytes, take: Callable[[int], None] | None) -> Image.Image:
        with self._metrics.stage(DECODE):
            return decode(data, self._settings.image_max_megapixels * 1e6, take)

    def _is_studio(self, text: str, parts: SplitResult) -> bool:
        return not (parts.scheme or parts.netloc) or self._downloader.is_studio(text)

    def _upload(self, path: tuple[str, ...]) -> bytes | None:
        """An upload from Label Studio's disk, or from the folder of originals."""
        folder = self._settings.label_studio_data
        for place in (folder / "media" / "upload", folder / "upload") if folder else ():
            data = read_inside(place, path, "CELESTIAL_LABEL_STUDIO_DATA", self._max_mb)
            if data is not None:
                return data
        return self._originals.read(path) if self._originals is not None else None

    def _local_file(self, path: tuple[str, ...]) -> bytes | None:
        folder: Path | None = self._settings.local_files_root
        return read_inside(folder, path, "LOCAL_FILES_DOCUMENT_ROOT", self._max_mb) if folder is not None else None

    def _cloud(self, uri: str, task_id: int | None) -> bytes:
        if task_id is None:
            raise ImageError(
                "Label Studio opens cloud storage for one of its tasks, and this one has no id. Import it first."
            )
        packed = base64.urlsafe_b64encode(uri.encode()).decode()
        return self._get(f"/tasks/{task_id}/resolve/?fileuri={quote(packed)}")

    def _get(self, path: str) -> bytes:
        if not self._studio.url:
            raise FetchError(
                "it has to come from Label Studio, and nobody said where that is. Set LABEL_STUDIO_URL and"
                " LABEL_STUDIO_API_KEY."
            )
        return self._downloader.get(self._studio.url + path)


def _text(value: object) -> str:
    text = value.strip() if isinstance(value, str) else ""
    if not text:
        raise ImageError(f"{KINDS}. Name one in the task.")
    return text


def _is_data(text: str) -> bool:
    return text[:5].lower() == "data:"


@contextmanager
def _naming(value: object) -> Iterator[None]:
    """What is wrong with a picture, told with its name."""
    try:
        yield
    except ImageError as error:
        raise type(error)(f"The picture {shown(value)} cannot be used: {error}") from error


def shown(value: object) -> str:
    """A task's value for a message: short, on one line, without passwords, signatures and other queries."""
    if not isinstance(value, str):
        return f"(a value of type {type(value).__name__})"
    text = value.strip()
    if _is_data(text):
        head = MEDIA_TYPE.match(text[:SHOWN_MAX])
        return f"{head[0] if head else 'data:'},..."
    if len(text) > ADDRESS_MAX:
        return f"(a text of {len(text)} letters)"
    start = SCHEME.match(text)
    rest = text[start.end() :] if start else text
    if ":" in rest.rpartition("@")[0] or "@" in rest.partition("/")[0]:
        # A password may hold every sign that else ends it; so a path with @ and : in it is shown in part, and
        # nothing where it may be a query that has an @.
        hidden, _, rest = rest.rpartition("@")
        text = (start[0] if start else "") + ("..." if "?" in hidden or "#" in hidden else rest)
    path, mark, query = text.partition("?")
    path = path.partition("#")[0]
    if mark and LOCAL.fullmatch(path):
        path = f"{path}?d={local_file(query)}"
    return repr(path if len(path) <= SHOWN_MAX else f"{path[: SHOWN_MAX // 2]}...{path[-SHOWN_MAX // 2 :]}")


def _data_uri(value: str, max_mb: float) -> bytes:
    head, comma, body = value.partition(",")
    if not comma:
        raise DecodeError("a data: URI must have a comma before its data, and this one has none. Correct the task.")
    packed = head.lower().endswith(";base64")
    if len(body) * (0.75 if packed else 1 / 3) > max_mb * 1_000_000:
        raise TooLargeError(
            f"a picture file may have {max_mb:g} MB, and this one has more."
            " Raise CELESTIAL_IMAGE_MAX_MB or shrink the picture."
        )
    data = _unescaped(body.encode("utf-8", "replace"))
    if packed:
        data = data.translate(BASE64, b" \t\n\r\v\f").rstrip(b"=")
        try:
            data = base64.b64decode(data + b"=" * (-len(data) % 4), validate=True)
        except binascii.Error as error:
            raise DecodeError("a data: URI must hold whole base64, and this one does not. Correct the task.") from error
    return data


def _unescaped(text: bytes) -> bytes:
    """Bytes with each %xx read; piece by piece, as what it takes is several times their size."""
    if b"%" not in text:
        return text
    pieces, start = [], 0
    while start < len(text):
        end = start + PIECE
        if end < len(text):
            cut = text.rfind(b"%", start + 1, end)  # so that no %xx is cut in two
            end = end if cut < 0 else cut
        pieces.append(_unescaped_piece(text[start:end]))
        start = end
    return b"".join(pieces)


def _unescaped_piece(text: bytes) -> bytes:
    signs = np.frombuffer(text, np.uint8).copy()
    high, low = DIGITS[signs[1:-1]], DIGITS[signs[2:]]
    escaped = (signs[:-2] == ord("%")) & ((high | low) < 16)
    signs[:-2][escaped] = (high << 4 | low)[escaped]
    kept = np.ones(len(signs), bool)
    kept[1:-1] &= ~escaped
    kept[2:] &= ~escaped
    return bytes(signs[kept])
