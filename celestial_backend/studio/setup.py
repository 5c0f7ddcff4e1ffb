"""
From nothing to a labelling project, through label-studio-sdk: its label config, its pictures, its model.

Everything here can be done again: what is there already is found, and left as it is. An upload's name begins with a
digest of its bytes, so a picture that is in the project already is known by its task alone, whatever was killed
before, and pictures of the same name do not clash.

Label Studio takes a label along with a new task in some milliseconds, and tells nobody. For a task that is there
already it takes a tenth of a second, and tells the backend.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap
from typing import IO, TYPE_CHECKING, Any
from unicodedata import east_asian_width
from urllib.parse import parse_qs, urlsplit
from xml.sax.saxutils import quoteattr

from celestial_backend.errors import ImageError, RequestError, StudioError
from celestial_backend.labels import Control, Sorted, by_class
from celestial_backend.settings import NEEDS_LABELS
from celestial_backend.studio.client import Studio, credentials, plain, rewritten
from celestial_backend.studio.project import LIVE, StudioProject, update_record

if TYPE_CHECKING:
    from label_studio_sdk import LabelStudio
    from label_studio_sdk.types.ml_backend import MlBackend


SIDE_PERCENT, SIDE_PX = 70, 543  # what choices may have beside picture and list of tasks, of 1366 pixels in all
LINE_PX, MOST_LINES = 28, 20
MOST_COLUMNS, BOX_PX, LETTER_PX = 6, 58, 7  # the box is what a column has besides its letters
LINES = f".lsf-choices {{ margin: 0 !important }} .lsf-choice {{ line-height: {LINE_PX}px !important }}"
TICKED = ".lsf-choice:has(:checked) { position: sticky; top: 0; bottom: 0; z-index: 1; backdrop-filter: blur(9px) }"
FILTER = '<Filter name="filter" toName="choice" hotkey="shift+f"/>'
TITLE_LENGTHS = (3, 50)  # Label Studio's own limits, in letters
CONNECTED = "CO"
PRIVATE = "reserved network address"
ENDINGS = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".webp"}  # pictures that Label Studio takes and we read
FILES_PER_REQUEST = 100  # Label Studio's limit
BYTES_PER_REQUEST = 150_000_000  # Label Studio refuses 250 MiB
UPLOAD_S = 600
NOTES_MAX = 20  # sentences about files that were left out
NAME_LETTERS = 40  # Label Studio cuts paths of more than 100 letters, digest and project included
DIGEST_LETTERS = 16
OURS = re.compile(rf"/[0-9a-f]{{8}}-([0-9a-f]{{{DIGEST_LETTERS}}})-[^/]*$")
LOCAL = "/data/local-files/"
THE_IMAGE = "$undefined$"  # Label Studio puts in its place the key that the label config names
UNTOUCHED = [
    {"filter": f"filter:tasks:{column}", "operator": "equal", "type": "Number", "value": 0}
    for column in ("total_annotations", "cancelled_annotations")
]
Progress = Callable[[int, int], None]  # pictures that are done, of how many
Annotation = dict[str, Any]


@dataclass(frozen=True)
class Registered:
    """
    A model of a project as Label Studio shows it.

    Attributes:
        version: What the backend said its model is; the title begins with it.
        new: Whether it was not there before.
        notes: Sentences about what a person should know.
    """

    id: int
    version: str
    new: bool
    notes: tuple[str, ...] = ()


def config_for(choices: Sequence[str]) -> str:
    """
    A label config that asks for one of the choices, which stand beside the picture.

    Picture and choices are seen without scrolling on a screen of 1366 × 768 pixels. Choices that are too
    many for that scroll by themselves, below a field that filters them, and what is ticked stays in sight.
    """
    columns = _columns(choices)
    rules, search, style = LINES, "", f"columns: {columns}"
    if not columns:
        rules, search, style = f"{LINES} {TICKED}", FILTER, "max-height: calc(100vh - 220px); overflow-y: auto"
    lines = "".join(f"        <Choice value={quoteattr(name)}/>\n" for name in choices)
    return (
        f'<View style="display: flex; gap: 16px">\n  <Style>{rules}</Style>\n'
        '  <View style="flex: 1; min-width: 0"><Image name="image" value="$image"/></View>\n'
        f'  <View style="max-width: {SIDE_PERCENT}%; overflow-wrap: anywhere">{search}\n    <View style="{style}">\n'
        f'      <Choices name="choice" toName="image">\n{lines}      </Choices>\n    </View>\n  </View>\n</View>'
    )


def _columns(choices: Sequence[str]) -> int:
    """In how many columns all choices are seen at once; 0 if in none that is allowed."""
    for columns in range(1, MOST_COLUMNS + 1):
        letters = int((SIDE_PX / columns - BOX_PX) / LETTER_PX)
        if sum(len(wrap(_as_wide(name), letters)) for name in choices) <= columns * MOST_LINES:
            return columns
    return 0


def _as_wide(name: str) -> str:
    """A name with two letters for each that is as wide as two."""
    return "".join(letter * (1 + (east_asian_width(letter) in "WF")) for letter in name)


def find_project(studio: Studio, title: str) -> int | None:
    """
    The number of the project with exactly this title, or None.

    Raises:
        StudioError: There are two of them, or Label Studio did not answer as it should.
    """
    listed: Any = studio.ask("the list of projects", lambda client: list(client.projects.list(title=title)))
    numbers = sorted(int(project.id) for project in listed if project.title == title)
    if len(numbers) > 1:
        raise StudioError(
            f"The title must name one project, and {title!r} names {' and '.join(map(str, numbers))}."
            " Rename all but one in Label Studio, or give another title."
        )
    return numbers[0] if numbers else None


def create_project(studio: Studio, title: str, config: str, *, by_score: bool = False) -> int:
    """
    The number of a new project.

    Args:
        studio: Label Studio.
        title: Of the project.
        config: Its label config.
        by_score: Whether people label the tasks with the lowest scores first.

    Raises:
        RequestError: Label Studio takes no such title.
        StudioError: It did not answer as it should.
    """
    least, most = TITLE_LENGTHS
    if not least <= len(title) <= most:
        raise RequestError(f"A project's title must have {least} to {most} letters, got {len(title)}: {title[:60]!r}.")
    more: dict[str, Any] = {"sampling": "Uncertainty sampling"} if by_score else {}
    return int(
        studio.ask("a new project", lambda client: client.projects.create(title=title, label_config=config, **more)).id
        or 0
    )


def set_config(studio: Studio, project: int, config: str) -> None:
    """
    Give a project a label config.

    Raises:
        StudioError: Label Studio refuses it, or did not answer as it should.
    """
    studio.ask("the label config", lambda client: client.projects.update(project, label_config=config))


def register(
    studio: Studio, project: int, url: str, title: str = NEEDS_LABELS, user: str | None = None,
    password: str | None = None,
) -> Registered:
    """
    Connect the backend at `url` with a project, or see that it is connected.

    Label Studio asks the backend for its version, which may be `NEEDS_LABELS`. The title is made the
    same, because the column of scores and uncertainty sampling work only then, and the project is set
    to show it; `StudioProject.show_version` has both follow the versions to come.

    Raises:
        StudioError: Label Studio refuses the address, or cannot use what answers there.
    """
    auth: dict[str, Any] = {}
    if user and password:
        auth = {"auth_method": "BASIC_AUTH", "basic_auth_user": user, "basic_auth_pass": password}
    before = _records(studio, project)
    known = next((record for record in before if _same(record.url, url)), None)
    if known is None:
        _connect(studio, url, lambda client: client.ml.create(project=project, url=url, title=title, **auth))
    elif known.state != CONNECTED or (auth and known.basic_auth_user != user):
        _update(studio, known, url, known.title or title, auth)
    record = next((each for each in _records(studio, project) if _same(each.url, url)), None)
    if record is None or record.state != CONNECTED or not record.model_version:
        said = f": {plain(record.error_message)}" if record is not None and record.error_message else "."
        raise StudioError(f"Label Studio took the address {url} and cannot use what answers there{said}")
    version = record.model_version
    if record.title not in (version, version + LIVE):
        _update(studio, record, url, version, auth)
    notes = [_shown(studio, project, version), _webhook(studio, project, url, user, password)]
    if before and not _same(before[0].url, url):
        notes.append(
            f"Label Studio asks only the first model of a project for predictions, which is {before[0].title!r} at"
            f" {before[0].url}. Remove that one under Settings > Model, to have those of {version}."
        )
    return Registered(int(record.id or 0), version, known is None, tuple(filter(None, notes)))


def with_password(headers: Mapping[str, Any], user: str | None, password: str | None) -> dict[str, Any]:
    """A webhook's headers with the backend's password, if it has one; as they are, if they carry it already."""
    right = [f"Basic {base64.b64encode(text).decode()}" for text in credentials(user or "", password or "")]
    given = {key: value for key, value in headers.items() if key.lower() == "authorization"}
    if not (user and password) or any(value in right for value in given.values()):
        return dict(headers)
    return {key: value for key, value in headers.items() if key not in given} | {"Authorization": right[0]}


def _records(studio: Studio, project: int) -> list[MlBackend]:
    return studio.ask(f"the models of project {project}", lambda client: client.ml.list(project=project))


def _same(one: str, other: str) -> bool:
    return one.rstrip("/") == other.rstrip("/")


def _update(studio: Studio, record: MlBackend, url: str, title: str, auth: dict[str, Any]) -> None:
    _connect(studio, url, lambda client: update_record(client, record, url=url, title=title, **auth))


def _connect(studio: Studio, url: str, call: Callable[[LabelStudio], object]) -> None:
    try:
        studio.ask(f"the model at {url}", call)
    except StudioError as error:
        if PRIVATE not in str(error):
            raise
        raise StudioError(
            f"Label Studio refuses {url}, because it is a private address. Start Label Studio with the two variables"
            " that `python -m celestial_backend private-addresses ADDRESS` prints, and do this again."
        ) from None


def _shown(studio: Studio, project: int, version: str) -> str:
    """Have the project show the model's predictions, unless a person chose others; a sentence in that case."""
    number = project
    shown = studio.ask(f"project {project}", lambda client: client.projects.get(number)).model_version or ""
    if not shown:
        wanted = "live predictions"
        studio.ask(wanted, lambda client: client.projects.update(number, model_version=version))
    elif shown != version:
        return f"The project shows predictions of {shown!r}; choose {version} under Settings > Annotation to change it."
    return ""


def _webhook(studio: Studio, project: int, url: str, user: str | None, password: str | None) -> str:
    """See that labels are told to the backend, with its password; a sentence where they cannot be."""
    target = f"{url.rstrip('/')}/webhook"
    hooks: Any = studio.ask("the webhooks", lambda client: client.webhooks.list(project=str(project)))
    hook = next((each for each in hooks if each.url == target), None)
    known = (hook and hook.headers) or {}
    headers = with_password(known, user, password)
    wanted = "the webhook that tells the backend of labels"
    try:
        if hook is None:
            studio.ask(wanted, lambda client: client.webhooks.create(url=target, project=project, headers=headers))
        elif headers != known:
            number = int(hook.id)
            studio.ask(wanted, lambda client: client.webhooks.update(number, headers=headers))
    except StudioError as error:
        return str(error)
    return ""


@dataclass(frozen=True)
class Imported:
    """What became of the pictures of a folder: new tasks, those that were there, new labels, and notes on the rest."""

    added: int
    already: int
    labelled: int = 0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class FolderLabels:
    """The choices of pictures, and the control that they are choices of; a picture without one is not labelled."""

    control: Control
    choice_of: Mapping[Path, str]

    def annotation(self, choice: str) -> Annotation:
        """A label as Label Studio's API takes it; an imported one is ground truth where nothing is said."""
        return {"result": [self.control.region([choice])], "ground_truth": False}

    def of_paths(self) -> dict[str, Annotation]:
        """The label of each picture, by its path."""
        return {str(path.resolve()): self.annotation(choice) for path, choice in self.choice_of.items()}

    def of_digests(self, digests: Mapping[Path, str]) -> tuple[dict[str, Annotation], int]:
        """The label of each picture, by the digest of its bytes, and how many have several."""
        said: dict[str, set[str]] = {}
        for path, digest in digests.items():
            if path in self.choice_of:
                said.setdefault(digest, set()).add(self.choice_of[path])
        sure = {digest: self.annotation(choices.pop()) for digest, choices in said.items() if len(choices) == 1}
        return sure, len(said) - len(sure)


def pictures_of(folder: Path) -> list[Path]:
    """All of `pictures_by_class`, sorted."""
    return pictures_by_class(folder).files


def pictures_by_class(folder: Path) -> Sorted:
    """
    The pictures in a folder, by the sub-folders that name classes; see `labels.by_class`.

    What cannot be looked at is among them, a dangling link or a closed sub-folder: `upload` says so.

    Raises:
        ImageError: There is none.
    """
    try:
        found = by_class(folder, _is_picture)
    except OSError as error:
        raise ImageError(f"The folder {folder} cannot be read ({error.strerror}). Check its rights.") from error
    if not found.files:
        endings = ", ".join(sorted(ENDINGS))
        raise ImageError(f"A folder to import must hold pictures ({endings}), and {folder} holds none. Check the path.")
    return found


def _is_picture(path: Path) -> bool:
    """Whether it may be one; what cannot be looked at may."""
    return path.suffix.lower() in ENDINGS or os.path.isdir(path)  # noqa: PTH112 - `is_dir` raises in a closed folder


def upload(
    studio: Studio, project: int, paths: Sequence[Path], progress: Progress, labels: FolderLabels | None = None
) -> Imported:
    """
    Import pictures as tasks, in their order, each once: the same bytes are one task, whatever they are called.

    `progress` is told after each request, of the pictures first and of labels for older tasks then.

    Args:
        studio: Label Studio.
        project: Its number there.
        paths: Of the pictures.
        progress: See above.
        labels: For those tasks that nobody has labelled or skipped, older ones included.

    Raises:
        StudioError: Label Studio did not take them. Those of earlier requests stay.
    """
    known = _digests(studio, project)
    digests, notes = _read(paths)
    new: dict[str, Path] = {}
    for path, digest in digests.items():
        if digest not in known:
            new.setdefault(digest, path)
    annotations, doubtful = labels.of_digests(digests) if labels else ({}, 0)
    if doubtful:
        notes.append(f"{doubtful} pictures lie in the sub-folders of several choices, and get no label.")
    told = next((digest for digest in reversed(new) if digest in annotations), "")  # its label comes last, by itself
    done = labelled = 0
    for batch in _batches([(path, digest) for digest, path in new.items()]):
        with ExitStack() as opened:
            files, gone = _opened(batch, opened)
            given = {digest: annotations[digest] for digest in files if digest in annotations and digest != told}
            if files:
                _send(studio, project, list(files.values()), given)
        notes += gone
        done, labelled = done + len(files), labelled + len(given)
        progress(done, len(new))
    labelled += _label(studio, project, annotations, progress)
    return Imported(done, len(digests) - len(new), labelled, tuple(_few(notes)))


def local_root(folder: Path, root: Path | None) -> Path:
    """
    Label Studio's local-files folder, as LOCAL_FILES_DOCUMENT_ROOT names it, for a folder that it can be read from.

    Raises:
        StudioError: The folder is not below the root.
    """
    place = folder.resolve()
    if root is None or not place.is_relative_to(root.resolve()) or place == root.resolve():
        raise StudioError(
            f"--local-files needs a folder below the one that LOCAL_FILES_DOCUMENT_ROOT names, and {place} is none."
            " Set that variable, here and for Label Studio, or leave --local-files out to upload the pictures."
        )
    return root.resolve()


def add_storage(
    studio: Studio,
    project: int,
    folder: Path,
    root: Path,
    progress: Progress,
    labels: FolderLabels | None = None,
) -> Imported:
    """
    Make a folder a source of tasks without uploading it, and read it anew.

    `root` is what `local_root` gives; `labels` and `progress` are as for `upload`.

    Raises:
        StudioError: Label Studio does not serve the folder.
    """
    place = folder.resolve()
    before = len(_tasks(studio, project))
    storages: Any = studio.ask(
        "the project's storages", lambda client: client.import_storage.local.list(project=project)
    )
    number = next((each.id for each in storages if each.path == str(place)), None)
    if number is None:
        pattern = r"(?i)(?!\.).*\.(" + "|".join(ending[1:] for ending in sorted(ENDINGS)) + ")$"
        made: Any = studio.ask(
            "the folder as local files",
            lambda client: client.import_storage.local.create(
                project=project, path=str(place), use_blob_urls=True, regex_filter=pattern, recursive_scan=True,
                title=place.name,
            ),
        )  # fmt: skip
        number = made.id
    studio.ask("the folder as local files", lambda client: client.import_storage.local.sync(number))
    added = len(_tasks(studio, project)) - before
    labelled = _label(studio, project, labels.of_paths() if labels else {}, progress, root)
    return Imported(added, before, labelled)


class _Untouched(StudioProject):
    """The tasks of a project that nobody has labelled or skipped."""

    def names(self, root: Path | None) -> list[tuple[int, str]]:
        """Their numbers, each with the digest of the upload or the path of the local file that it shows."""
        return [
            (task["id"], name)
            for task in self._tasks(UNTOUCHED, "id,data")
            for value in task["data"].values()
            if isinstance(value, str) and (name := _name(value, root))
        ]


def _name(value: str, root: Path | None) -> str:
    address = urlsplit(value)
    if root is not None and address.path.endswith(LOCAL):
        return str((root / parse_qs(address.query).get("d", [""])[0]).resolve())
    found = OURS.search(value)
    return found[1] if found else ""


def _tasks(studio: Studio, project: int) -> list[dict[str, Any]]:
    return list(StudioProject(studio, str(project), patience_s=0).data())


def _digests(studio: Studio, project: int) -> set[str]:
    """The digests of the pictures that the project's tasks show."""
    values = (value for data in _tasks(studio, project) for value in data.values() if isinstance(value, str))
    return {found[1] for value in values if (found := OURS.search(value))}


def _read(paths: Sequence[Path]) -> tuple[dict[Path, str], list[str]]:
    """The digests of pictures that can be uploaded, and notes on the others."""
    digests: dict[Path, str] = {}
    notes: list[str] = []
    for path in paths:
        try:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()[:DIGEST_LETTERS]
                size = file.tell()
        except OSError as error:
            notes.append(_unread(path, error))
            continue
        if not size:
            notes.append(f"{path} was left out, because it is empty.")
        elif size > BYTES_PER_REQUEST:
            notes.append(f"{path} was left out, because it has more than {BYTES_PER_REQUEST // 10**6} MB.")
        else:
            digests[path] = digest
    return digests, notes


def _unread(path: Path, error: OSError) -> str:
    return f"{path} was left out, because it cannot be read ({error.strerror})."


def _few(notes: Sequence[str]) -> list[str]:
    """Notes that a person can read through, and how many more there are."""
    more = len(notes) - NOTES_MAX
    return [*notes[:NOTES_MAX], *([f"There are {more} more notes of this kind."] if more > 0 else [])]


def _opened(batch: Sequence[tuple[Path, str]], opened: ExitStack) -> tuple[dict[str, tuple[str, IO[bytes]]], list[str]]:
    """The files of a batch by their digests, each with the name that it is sent under; and notes on those now gone."""
    files: dict[str, tuple[str, IO[bytes]]] = {}
    notes: list[str] = []
    for path, digest in batch:
        try:
            files[digest] = upload_name(path, digest), opened.enter_context(path.open("rb"))
        except OSError as error:
            notes.append(_unread(path, error))
    return files, notes


def _batches(pictures: Sequence[tuple[Path, str]]) -> Iterator[list[tuple[Path, str]]]:
    batch: list[tuple[Path, str]] = []
    size = 0
    for path, digest in pictures:
        try:
            more = path.stat().st_size
        except OSError:
            more = 0  # it has gone, which shows when it is opened
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


def _send(
    studio: Studio, project: int, pictures: Sequence[tuple[str, IO[bytes]]], annotations: Mapping[str, Annotation]
) -> None:
    """Make tasks of pictures: of the files at once, or where some are labelled of what becomes of the files."""
    # Each under a field name of its own: of several files with the same one, only the last is kept.
    files = {f"file{number}": picture for number, picture in enumerate(pictures)}

    def send(client: LabelStudio) -> Any:
        place = f"api/projects/{project}"
        if not annotations:
            return _call(client, "POST", f"{place}/import", files=files)
        sent = _call(client, "POST", f"{place}/import?commit_to_project=false", files=files)
        names = _call(client, "GET", f"{place}/file-uploads?ids={sent['file_upload_ids']}")
        kept = [f"/data/{each['file']}" for each in sorted(names, key=lambda each: int(each["id"]))]
        tasks = [
            {
                "data": {THE_IMAGE: urlsplit(studio.url or "").path + value},
                "annotations": [annotations[digest] for digest in OURS.findall(value) if digest in annotations],
            }
            for value in kept
        ]
        return _call(client, "POST", f"{place}/import", json=tasks)

    taken = int(studio.ask(f"the import of {len(files)} pictures", send)["task_count"])
    if taken != len(files):
        raise StudioError(
            f"Label Studio must make {len(files)} tasks of {len(files)} pictures, and made {taken}."
            " Look into its log, and do this again: what is there is not imported twice."
        )


def _label(
    studio: Studio, project: int, annotations: Mapping[str, Annotation], progress: Progress, root: Path | None = None
) -> int:
    """Label the tasks that nobody has touched, one by one; how many there were."""
    if not annotations:
        return 0
    untouched = _Untouched(studio, str(project), patience_s=0).names(root)
    wanted = [(task, annotations[name]) for task, name in untouched if name in annotations]

    def label(client: LabelStudio) -> None:
        for number, (task, annotation) in enumerate(wanted, 1):
            client.annotations.create(task, **annotation)
            progress(number, len(wanted))

    studio.ask(f"labels for {len(wanted)} tasks", label)
    return len(wanted)


def _call(client: LabelStudio, method: str, path: str, **more: Any) -> Any:
    """What a place of the API answers; the SDK knows no upload of several files, so its own connection is used."""
    from label_studio_sdk.core.api_error import ApiError

    answer = client._client_wrapper.httpx_client.request(
        path, method=method, request_options={"timeout_in_seconds": UPLOAD_S}, **more
    )
    body = answer.json()
    if not answer.is_success:
        raise ApiError(status_code=answer.status_code, body=body)
    return body
