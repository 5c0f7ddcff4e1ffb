"""
Pictures of tasks, read side by side and kept as small files.

A training looks at each picture many times and needs it no larger than its network
does; what came over the network is not fetched twice, and memory stays flat.
"""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from celestial_backend.errors import DecodeError, FetchError, ImageError, StateError, StudioError, TrainingError
from celestial_backend.examples import LONGEST_SIDE_PX
from celestial_backend.images import ImageReader

MOST_FAILED_SHARE = 0.1  # of the wanted pictures; a training on a random rest would be silently worse
RETRY_PAUSE_S = 6.0  # longer than Studio remembers a failure
REPORT_EVERY = 50  # pictures
SHOWN = 3  # failures in a message

Report = Callable[[int, int | None], None]


@dataclass
class Wanted:
    """
    A picture of a task, on its way into the album.

    Attributes:
        value: What the task names it by; None once that is not needed any more.
        digest: Its name in the album, "" until it is there.
        problem: Why it is not there, "" if it is or nobody tried.
        again: Whether another try may help.
    """

    task_id: int
    value: object
    digest: str = ""
    problem: str = ""
    again: bool = False


class Album:
    """A folder of pictures, each named after the digest of its pixels; filled from one thread."""

    def __init__(self, images: ImageReader, folder: Path, threads: int) -> None:
        self._images = images
        self._folder = folder
        self._threads = threads

    def fill(self, wanted: Iterable[Wanted], report: Report | None = None) -> None:
        """
        Read pictures, a bounded number at once; each says afterwards what became of it.

        Args:
            wanted: Taken one by one as there is room.
            report: Told now and then how many pictures were read, of how many (None: nobody knows).

        Raises:
            StateError: The folder cannot hold them.
        """
        waiting: deque[tuple[Wanted, Future[str]]] = deque()
        done = 0
        with ThreadPoolExecutor(self._threads) as pool:
            for each in wanted:
                waiting.append((each, pool.submit(self._keep, each.value, each.task_id)))
                if len(waiting) < 4 * self._threads:
                    continue
                _settle(*waiting.popleft())
                done += 1
                if report is not None and done % REPORT_EVERY == 0:
                    report(done, None)
            for each, future in waiting:
                _settle(each, future)
        if report is not None:
            report(done + len(waiting), done + len(waiting))

    def try_again(self, wanted: Iterable[Wanted], wait: Callable[[], object] | None) -> None:
        """
        Read once more what failed and may be had now.

        Args:
            wanted: All of them.
            wait: Returns when Label Studio answers, which may have been away for a while.
        """
        failed = [each for each in wanted if each.again]
        if failed:
            time.sleep(RETRY_PAUSE_S)
            if wait is not None:
                wait()
            self._images.close()
            self.fill(failed)

    def open(self, digest: str) -> Image.Image:
        """A picture of the album, in mode RGB, its longest side 512 pixels or less."""
        with Image.open(self._folder / f"{digest}.png") as picture:
            picture.load()
            return picture

    def _keep(self, value: object, task_id: int) -> str:
        picture = self._images.read(value, task_id)
        picture.thumbnail((LONGEST_SIDE_PX, LONGEST_SIDE_PX))
        digest = hashlib.sha256(repr(picture.size).encode() + picture.tobytes()).hexdigest()[:32]
        path, part = self._folder / f"{digest}.png", self._folder / f"{digest}.{task_id}.part"
        try:
            if not path.exists():
                picture.save(part, "PNG", compress_level=1)
                part.replace(path)
        except OSError as error:
            raise StateError(
                f"The state folder must hold the pictures of a training, and does not ({error.strerror})."
                " Make room there."
            ) from error
        return digest


def check(wanted: Sequence[Wanted]) -> list[tuple[int, str]]:
    """
    Make sure that nearly all wanted pictures are there; the task ids of the others, and why.

    Raises:
        TrainingError: More than a tenth are not; the message gives the number and the first reasons.
    """
    failed = [each for each in wanted if not each.digest]
    if len(failed) > MOST_FAILED_SHARE * len(wanted):
        reasons = " ".join(f"Task {each.task_id}: {each.problem}" for each in failed[:SHOWN])
        raise TrainingError(
            f"A training needs {1 - MOST_FAILED_SHARE:.0%} of the labelled pictures, and {len(failed)} of {len(wanted)}"
            f" cannot be had. Mend them, or delete their labels. {reasons}"
        )
    return [(each.task_id, each.problem) for each in failed]


def _settle(wanted: Wanted, future: Future[str]) -> None:
    try:
        wanted.digest, wanted.problem, wanted.again = future.result(), "", False
    except (ImageError, StudioError) as error:
        wanted.problem = str(error)
        # A download that was cut off looks like a damaged file. What stands in the task itself does not change.
        inline = isinstance(wanted.value, str) and wanted.value[:5].lower() == "data:"
        wanted.again = isinstance(error, (FetchError, DecodeError, StudioError)) and not inline
    if not wanted.again:
        wanted.value = None  # it may be a whole picture
