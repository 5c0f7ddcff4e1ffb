"""
The picture of a task: from the value in the task's data to pixels.

Label Studio knows many ways to name a picture: uploads, files it serves from its
own disk, cloud storage that only it can open, plain addresses, pictures written
into the task itself. Each is a `Source`, asked in the order of `SOURCES`. What lies
on a disk here is read from there, in one go; the rest comes over HTTP.
"""

from __future__ import annotations

import base64
import binascii
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from urllib.parse import SplitResult, quote, unquote

import numpy as np
from PIL import Image

from celestial_backend.errors import DecodeError, FetchError, ForbiddenError, ImageError, LockedError, file_too_large
from celestial_backend.metrics import DECODE, FETCH, Metrics
from celestial_backend.pictures.decode import decode
from celestial_backend.pictures.download import (
    ADDRESS_MAX,
    LOCAL,
    UPLOAD,
    Downloader,
    local_file,
    shown_host,
    split_address,
    studio_path,
)
from celestial_backend.pictures.folders import Originals, read_inside, split_inside
from celestial_backend.settings import Settings
from celestial_backend.studio.client import Studio

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


class Address:
    """What a task's value says, taken apart as far as it is asked for; of one call, for one thread."""

    def __init__(self, value: object, downloader: Downloader) -> None:
        self.text = _text(value)
        self._downloader = downloader

    @cached_property
    def parts(self) -> SplitResult:
        """Raises ImageError where it is no address."""
        return split_address(self.text)

    @cached_property
    def in_studio(self) -> bool:
        """Whether it lies in Label Studio: a path alone, or an address under one of Label Studio's."""
        alone = not (self.parts.scheme or self.parts.netloc)
        return alone or self._downloader.is_studio(self.text) or self._downloader.is_picture_of_studio(self.text)


class Source(ABC):
    """
    Where pictures may lie; one object per process, called side by side from many threads.

    Attributes:
        near: Whether a picture is read from here in one go: it is in the task, or on a disk of this machine.
    """

    near = False

    def __init__(self, settings: Settings, studio: Studio, downloader: Downloader) -> None:
        self.settings, self.studio, self.downloader = settings, studio, downloader

    @abstractmethod
    def read(self, address: Address, task_id: int | None) -> bytes | None:
        """
        The file at an address; None where it is not of this kind, or not here.

        Raises:
            ImageError, StudioError: It is here, and cannot be had.
        """

    def from_studio(self, path: str) -> bytes:
        """What Label Studio serves under a path."""
        if not self.studio.url:
            raise LockedError(
                "it has to come from Label Studio, and nobody said where that is. Set LABEL_STUDIO_URL and"
                " LABEL_STUDIO_API_KEY."
            )
        return self.downloader.get(self.studio.url + path)


class Inline(Source):
    """The picture stands in the task: a data: URI. Asked first, so that so long a text is never taken apart."""

    near = True

    def read(self, address: Address, task_id: int | None) -> bytes | None:  # noqa: ARG002
        """See `Source`."""
        return _data_uri(address.text, self.settings.image_max_mb) if _is_data(address.text) else None


class Uploads(Source):
    """Uploads that are here: on Label Studio's disk, or in the folder of originals."""

    near = True

    def __init__(self, settings: Settings, studio: Studio, downloader: Downloader) -> None:
        super().__init__(settings, studio, downloader)
        folder, originals = settings.label_studio_data, settings.data_folder
        self._places = (folder / "media" / "upload", folder / "upload") if folder else ()
        self._originals = (
            Originals(originals, "CELESTIAL_DATA_FOLDER", settings.image_max_mb) if originals is not None else None
        )

    def read(self, address: Address, task_id: int | None) -> bytes | None:  # noqa: ARG002
        """See `Source`."""
        upload = UPLOAD.fullmatch(address.parts.path) if address.in_studio else None
        if upload is None:
            return None
        path = split_inside(unquote(upload["path"]))
        for place in self._places:
            data = read_inside(place, path, "CELESTIAL_LABEL_STUDIO_DATA", self.settings.image_max_mb)
            if data is not None:
                return data
        return self._originals.read(path) if self._originals is not None else None


class LocalFiles(Source):
    """Local files of Label Studio whose folder is here too."""

    near = True

    def read(self, address: Address, task_id: int | None) -> bytes | None:  # noqa: ARG002
        """See `Source`."""
        if not (address.in_studio and LOCAL.fullmatch(address.parts.path)):
            return None
        path, root = split_inside(local_file(address.parts.query)), self.settings.local_files_root
        return read_inside(root, path, "LOCAL_FILES_DOCUMENT_ROOT", self.settings.image_max_mb) if root else None


class CloudStorage(Source):
    """Files of cloud storage, which Label Studio opens for its task."""

    def read(self, address: Address, task_id: int | None) -> bytes | None:
        """See `Source`."""
        if address.parts.scheme not in CLOUDS:
            return None
        if task_id is None:
            raise ImageError(
                "Label Studio opens cloud storage for one of its tasks, and this one has no id. Import it first."
            )
        packed = base64.urlsafe_b64encode(address.text.encode()).decode()
        return self.from_studio(f"/tasks/{task_id}/resolve/?fileuri={quote(packed)}")


class InStudio(Source):
    """Whatever else Label Studio serves as a picture."""

    def read(self, address: Address, task_id: int | None) -> bytes | None:  # noqa: ARG002
        """See `Source`."""
        path = studio_path(address.parts) if address.in_studio else None
        return self.from_studio(path) if path else None


class Web(Source):
    """Any other address on the web that the settings allow."""

    def read(self, address: Address, task_id: int | None) -> bytes | None:  # noqa: ARG002
        """See `Source`."""
        if address.parts.scheme not in ("http", "https"):
            return None
        try:
            return self.downloader.get(address.text)
        except (ForbiddenError, FetchError) as error:
            if studio_path(address.parts) is None:
                raise
            kind, remedy = type(error), "LABEL_STUDIO_HOST to it"
            if not self.studio.url:
                kind, remedy = LockedError, "LABEL_STUDIO_URL to it, and LABEL_STUDIO_API_KEY"
            raise kind(f"{error} If {shown_host(address.text)} is Label Studio, set {remedy}.") from error


SOURCES: tuple[type[Source], ...] = (Inline, Uploads, LocalFiles, CloudStorage, InStudio, Web)  # asked in this order


class ImageReader:
    """Reads the pictures of tasks; one per process, called side by side from many threads."""

    def __init__(self, settings: Settings, studio: Studio, metrics: Metrics | None = None) -> None:
        self._settings = settings
        self._metrics = metrics or Metrics()
        self._downloader = Downloader(settings, studio)
        self._sources = [source(settings, studio, self._downloader) for source in SOURCES]
        self._near = [source for source in self._sources if source.near]

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
        return self.decoded(value, self.file(value, task_id), take)

    def file(self, value: object, task_id: int | None = None) -> bytes:
        """
        The bytes of the picture that a task's value names.

        Raises:
            ImageError, StudioError: As `read`.
        """
        with _naming(value), self._metrics.stage(FETCH):
            data = self._first(self._sources, value, task_id)
            if data is None:
                raise ImageError(f"{KINDS}; this is none of them. Correct the task.")
            return data

    def near_file(self, value: object) -> bytes | None:
        """
        The same for a picture in the task itself or on a disk here; None for one that has to be fetched.

        Raises:
            ImageError: As `read`.
        """
        started = time.perf_counter()
        with _naming(value):
            data = self._first(self._near, value)
        if data is not None:
            self._metrics.took(FETCH, time.perf_counter() - started)
        return data

    def needs_token(self, value: object) -> bool:
        """Whether a task's value names a picture that Label Studio alone has; no is said of what names none."""
        try:
            address = Address(value, self._downloader)
            cloud = address.parts.scheme in CLOUDS
            if not cloud and (not address.in_studio or studio_path(address.parts) is None):
                return False
            return self.near_file(value) is None
        except ImageError:
            return False

    def decoded(self, value: object, data: bytes, take: Callable[[int], None] | None = None) -> Image.Image:
        """
        The picture whose bytes `file` gave for a value.

        Raises:
            TooLargeError, DecodeError: As `read`.
        """
        with _naming(value), self._metrics.stage(DECODE):
            return decode(data, self._settings.image_max_megapixels * 1e6, take)

    def close(self) -> None:
        """Close the connections and forget which hosts were silent; reading again opens new ones."""
        self._downloader.close()

    def _first(self, sources: Iterable[Source], value: object, task_id: int | None = None) -> bytes | None:
        """What the first source that has it gives."""
        address = Address(value, self._downloader)
        return next((data for each in sources if (data := each.read(address, task_id)) is not None), None)


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
        raise file_too_large(max_mb)
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
