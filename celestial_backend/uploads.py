"""
The pictures of a folder as tasks of a project: uploaded, or left where they lie.

An upload's name begins with a digest of its bytes. So a picture that is in the project already
is known by its task alone, whatever was killed before, and pictures of the same name do not clash.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from celestial_backend.errors import ImageError, StudioError
from celestial_backend.folders import rewritten
from celestial_backend.linking import ask
from celestial_backend.project import StudioProject
from celestial_backend.studio import Studio

ENDINGS = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".webp"}  # pictures that Label Studio takes and we read
FILES_PER_REQUEST = 100  # Label Studio's limit
BYTES_PER_REQUEST = 150_000_000  # Label Studio refuses 250 MiB
UPLOAD_S = 600.0
NAME_LETTERS = 40  # Label Studio cuts paths of more than 100 letters, digest and project included
DIGEST_LETTERS = 16
OURS = re.compile(rf"/[0-9a-f]{{8}}-([0-9a-f]{{{DIGEST_LETTERS}}})-[^/]*$")

Progress = Callable[[int, int], None]  # pictures that are done, of how many


@dataclass(frozen=True)
class Imported:
    """What became of the pictures of a folder: new tasks, those that were there, and sentences about the rest."""

    added: int
    already: int
    notes: tuple[str, ...] = ()


def pictures_of(folder: Path) -> list[Path]:
    """
    The pictures in a folder and its sub-folders, sorted; hidden ones are left out.

    Raises:
        ImageError: There is none.
    """
    found: list[Path] = []
    for place, inner, names in os.walk(folder):
        inner[:] = [name for name in inner if not name.startswith(".")]
        for name in names:
            path = Path(place, name)
            if not name.startswith(".") and path.suffix.lower() in ENDINGS and path.is_file():
                found.append(path)
    if not found:
        endings = ", ".join(sorted(ENDINGS))
        raise ImageError(f"A folder to import must hold pictures ({endings}), and {folder} holds none. Check the path.")
    return sorted(found)


def upload(studio: Studio, project: int, paths: Sequence[Path], progress: Progress) -> Imported:
    """
    Import pictures as tasks, in their order, each once: the same bytes are one task, whatever they are called.

    `progress` is told after each request.

    Raises:
        StudioError: Label Studio did not take them. Those of earlier requests stay.
    """
    known = _digests(studio, project)
    new: list[tuple[Path, str]] = []
    notes: list[str] = []
    for path in paths:
        try:
            digest = _digest(path)
        except OSError as error:
            notes.append(f"{path} was left out, because it cannot be read ({error.strerror}).")
            continue
        if path.stat().st_size > BYTES_PER_REQUEST:
            notes.append(f"{path} was left out, because it has more than {BYTES_PER_REQUEST // 10**6} MB.")
        elif digest not in known:
            known.add(digest)
            new.append((path, digest))
    already = len(paths) - len(new) - len(notes)
    done = 0
    for batch in _batches(new):
        _send(studio, project, batch)
        done += len(batch)
        progress(done, len(new))
    return Imported(done, already, tuple(notes))


def add_storage(studio: Studio, project: int, folder: Path, root: Path | None) -> Imported:
    """
    Make a folder a source of tasks without uploading it, and read it anew.

    `root` is Label Studio's local-files folder, as LOCAL_FILES_DOCUMENT_ROOT names it.

    Raises:
        StudioError: The folder is not below the root, or Label Studio does not serve it.
    """
    place = folder.resolve()
    if root is None or not place.is_relative_to(root.resolve()) or place == root.resolve():
        raise StudioError(
            f"--local-files needs a folder below the one that LOCAL_FILES_DOCUMENT_ROOT names, and {place} is none."
            " Set that variable, here and for Label Studio, or leave --local-files out to upload the pictures."
        )
    before = len(_tasks(studio, project))
    storages: Any = ask(
        studio, "the project's storages", lambda client: client.import_storage.local.list(project=project)
    )
    number = next((each.id for each in storages if each.path == str(place)), None)
    if number is None:
        pattern = r"(?i).*\.(" + "|".join(ending[1:] for ending in sorted(ENDINGS)) + ")$"
        made: Any = ask(
            studio,
            "the folder as local files",
            lambda client: client.import_storage.local.create(
                project=project, path=str(place), use_blob_urls=True, regex_filter=pattern, recursive_scan=True,
                title=place.name,
            ),
        )  # fmt: skip
        number = made.id
    ask(studio, "the folder as local files", lambda client: client.import_storage.local.sync(number))
    return Imported(len(_tasks(studio, project)) - before, before)


def _tasks(studio: Studio, project: int) -> list[dict[str, Any]]:
    return list(StudioProject(studio, str(project), patience_s=0).data())


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:DIGEST_LETTERS]


def _digests(studio: Studio, project: int) -> set[str]:
    """The digests of the pictures that the project's tasks show."""
    values = (value for data in _tasks(studio, project) for value in data.values() if isinstance(value, str))
    return {found[1] for value in values if (found := OURS.search(value))}


def _batches(pictures: Sequence[tuple[Path, str]]) -> Iterator[list[tuple[Path, str]]]:
    batch: list[tuple[Path, str]] = []
    size = 0
    for path, digest in pictures:
        more = path.stat().st_size
        if batch and (len(batch) == FILES_PER_REQUEST or size + more > BYTES_PER_REQUEST):
            yield batch
            batch, size = [], 0
        batch.append((path, digest))
        size += more
    if batch:
        yield batch


def upload_name(path: Path, digest: str) -> str:
    """The name under which a picture is sent to Label Studio."""
    stem = rewritten(path.stem)[:NAME_LETTERS] or "picture"
    return f"{digest}-{stem}{path.suffix}"


def _send(studio: Studio, project: int, batch: Sequence[tuple[Path, str]]) -> None:
    with ExitStack() as opened:
        # Each under a field name of its own: of several files with the same one, only the last is kept.
        files: dict[str, Any] = {
            f"file{number}": (upload_name(path, digest), opened.enter_context(path.open("rb")))
            for number, (path, digest) in enumerate(batch)
        }
        taken = ask(studio, f"the import of {len(batch)} pictures", lambda client: _post(client, project, files))
    if taken != len(batch):
        raise StudioError(
            f"Label Studio must make {len(batch)} tasks of {len(batch)} pictures, and made {taken}."
            " Look into its log, and do this again: what is there is not imported twice."
        )


def _post(client: Any, project: int, files: dict[str, Any]) -> int:
    """The SDK knows no upload of several files, so its own connection is used."""
    from label_studio_sdk.core.api_error import ApiError

    answer = client._client_wrapper.httpx_client.request(
        f"api/projects/{project}/import", method="POST", files=files, request_options={"timeout_in_seconds": UPLOAD_S}
    )
    body = answer.json()
    if not answer.is_success:
        raise ApiError(status_code=answer.status_code, body=body)
    return int(body["task_count"])
