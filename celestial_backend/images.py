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
from collections.abc import Callable
from pathlib import Path
from urllib.parse import SplitResult, parse_qs, quote, unquote, unquote_to_bytes, urlsplit

from PIL import Image

from celestial_backend.decode import decode
from celestial_backend.download import Downloader
from celestial_backend.errors import DecodeError, FetchError, ImageError, TooLargeError
from celestial_backend.folders import Originals, read_inside, split_inside
from celestial_backend.metrics import DECODE, FETCH, Metrics
from celestial_backend.settings import Settings
from celestial_backend.studio import Studio

CLOUDS = ("s3", "gs", "azure-blob")  # the schemes that Label Studio's storages resolve
SHOWN_MAX = 100  # letters of a task's value in a message
UPLOAD = re.compile(r"(?:(?:.*?/)?data/|/?)upload/(?P<path>.+)", re.DOTALL)
LOCAL = re.compile(r"(?:.*?/)?data/local-files/?")
SCHEME = re.compile(r"([\w+.-]*:)?//")
MEDIA_TYPE = re.compile(r"data:[\w.+-]*/?[\w.+-]*(;base64)?(?=,)", re.IGNORECASE | re.ASCII)
RESOLVE = re.compile(r"(?:.*?/)?(?P<path>(?:tasks|projects)/[0-9]+/(?:resolve|presign)/?)")
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
        try:
            with self._metrics.stage(FETCH):
                data = self._bytes(value, task_id)
            with self._metrics.stage(DECODE):
                return decode(data, self._settings.image_max_megapixels * 1e6, take)
        except ImageError as error:
            raise type(error)(f"The picture {shown(value)} cannot be used: {error}") from error

    def close(self) -> None:
        """Close the connections and forget which hosts were silent; reading again opens new ones."""
        self._downloader.close()

    def _bytes(self, value: object, task_id: int | None) -> bytes:
        if not isinstance(value, str) or not value.strip():
            raise ImageError(f"{KINDS}. Name one in the task.")
        value = value.strip()
        if value[:5].lower() == "data:":
            return _data_uri(value, self._max_mb)
        try:
            value.encode()  # half a surrogate pair is fine JSON, and no name of anything
            parts = urlsplit(value)
        except ValueError as error:
            raise ImageError("its address must be a valid one, and is not. Correct the task.") from error
        if parts.scheme in CLOUDS:
            return self._cloud(value, task_id)
        if (not parts.scheme and not parts.netloc) or self._downloader.is_studio(value):
            data = self._from_studio(parts)
            if data is not None:
                return data
        if parts.scheme in ("http", "https"):
            return self._downloader.get(value)
        raise ImageError(f"{KINDS}; this is none of them. Correct the task.")

    def _from_studio(self, parts: SplitResult) -> bytes | None:
        """The bytes of a path that Label Studio serves pictures under; None for any other path."""
        if upload := UPLOAD.fullmatch(parts.path):
            return self._upload(split_inside(unquote(upload["path"])))
        if LOCAL.fullmatch(parts.path):
            named = parse_qs(parts.query).get("d", [""])[0]
            return self._local_file(split_inside(named))
        if resolve := RESOLVE.fullmatch(parts.path):
            return self._get(f"/{resolve['path']}?{parts.query}")
        return None

    def _upload(self, path: tuple[str, ...]) -> bytes:
        """An upload: from Label Studio's disk, from the folder of originals, or over HTTP."""
        folder = self._settings.label_studio_data
        for place in (folder / "media" / "upload", folder / "upload") if folder else ():
            data = read_inside(place, path, "CELESTIAL_LABEL_STUDIO_DATA", self._max_mb)
            if data is not None:
                return data
        if self._originals is not None:
            data = self._originals.read(path)
            if data is not None:
                return data
        return self._get("/data/upload/" + quote("/".join(path)))

    def _local_file(self, path: tuple[str, ...]) -> bytes:
        folder: Path | None = self._settings.local_files_root
        if folder is not None:
            data = read_inside(folder, path, "LOCAL_FILES_DOCUMENT_ROOT", self._max_mb)
            if data is not None:
                return data
        return self._get("/data/local-files/?d=" + quote("/".join(path)))

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


def shown(value: object) -> str:
    """A task's value for a message: short, on one line, without passwords, signatures and other queries."""
    if not isinstance(value, str):
        return f"(a value of type {type(value).__name__})"
    text = value.strip()
    if text[:5].lower() == "data:":
        head = MEDIA_TYPE.match(text)
        return f"{head[0] if head else 'data:'},..."
    start = SCHEME.match(text)
    rest = text[start.end() :] if start else text
    if ":" in rest.rpartition("@")[0] or "@" in rest.partition("/")[0]:
        # A password may hold every sign that else ends it; so a path with @ and : in it is shown in part.
        text = (start[0] if start else "") + rest.rpartition("@")[2]
    path, mark, query = text.partition("?")
    path = path.partition("#")[0]
    if mark and LOCAL.fullmatch(path):
        path = f"{path}?d={parse_qs(query).get('d', [''])[0]}"
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
    data = unquote_to_bytes(body)
    if packed:
        data = b"".join(data.split()).translate(bytes.maketrans(b"-_", b"+/")).rstrip(b"=")
        try:
            data = base64.b64decode(data + b"=" * (-len(data) % 4), validate=True)
        except binascii.Error as error:
            raise DecodeError("a data: URI must hold whole base64, and this one does not. Correct the task.") from error
    return data
