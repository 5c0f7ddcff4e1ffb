"""
What tests do to the processes that they start: short trainings, deaths and errors at a named call.

Python imports this at the start of every process that has this folder on its PYTHONPATH. Nothing of it
is known to the package itself.

    FAULT_MARKS  a folder: what happened is written down here, and a fault strikes only so often
    FAULT_LEARN  seconds: trainings take so long, learn nothing, and publish what lets the default model answer
    FAULT_BURN   threads that keep as many processors busy meanwhile
    FAULT_AT     module:Class.function:before or :after, and :text if an argument behind the first must hold it, named
                 or not
    FAULT_DO     worker (it is killed, and the process that it started hangs), both, self, disk (it is full), slow
    FAULT_TIMES  how often, once without it
    FAULT_CLOCK  seconds that the clock goes ahead
"""

from __future__ import annotations

import errno
import functools
import hashlib
import importlib
import importlib.abc
import importlib.util
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

LEARNING = "celestial_backend.learning.project"
MARKS = Path(os.environ.get("FAULT_MARKS", "."))


def note(name: str, text: str = "") -> None:
    with (MARKS / name).open("a") as file:
        file.write(f"{text}\n")


def strike() -> None:
    ours = ("celestial_backend.worker.training", "celestial_backend.worker.pages", "celestial_backend.worker")
    if not any(name in word for name in ours for word in sys.orig_argv):
        return
    for turn in range(int(os.environ.get("FAULT_TIMES", "1"))):
        try:
            (MARKS / f"struck-{turn}").open("x").close()
        except FileExistsError:
            continue
        break
    else:
        return
    what = os.environ["FAULT_DO"]
    if what == "disk":
        raise OSError(errno.ENOSPC, "No space left on device")
    if what == "slow":
        time.sleep(30)
    if what in ("worker", "both"):
        os.kill(os.getppid(), signal.SIGKILL)
    if what in ("self", "both"):
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(30)


def wrap(function: Callable[..., Any], moment: str, text: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapped(*args: Any, **options: Any) -> Any:
        meant = not text or any(text in str(each) for each in [*args[1:], *options.values()])
        if meant and moment == "before":
            strike()
        answer = function(*args, **options)
        if meant and moment == "after":
            strike()
        return answer

    return wrapped


def change(module: ModuleType) -> None:
    """Put the faults that concern a module into it, as soon as it is there."""
    if module.__name__ == "celestial_backend.jobs.ledger":
        count_publications(module)
    if module.__name__ == LEARNING and "FAULT_LEARN" in os.environ:
        module.Learner.learn = learn
    where, _, rest = os.environ.get("FAULT_AT", "").partition(":")
    if where == module.__name__:
        path, moment, text = [*rest.split(":", 2), ""][:3]
        owner: Any = module
        *classes, name = path.split(".")
        for each in classes:
            owner = getattr(owner, each)
        setattr(owner, name, wrap(getattr(owner, name), moment, text))


def count_publications(ledger: Any) -> None:
    end = ledger.Ledger.end

    def counted(self: Any, job: Any, *how: Any, **more: Any) -> Any:
        ended = end(self, job, *how, **more)
        if ended is not None and ended.state == ledger.PUBLISHED:
            note("published", f"{job.project} {ended.manifest.tag} {job.id}")
        return ended

    ledger.Ledger.end = counted


def learn(self: Any, request: Any, report: Callable[[str], None], read_until: object) -> Any:  # noqa: ARG001
    """In place of `Learner.learn`: the same stages and the same ways into the store, no lesson."""
    from msgspec import structs

    from celestial_backend.learning.project import Outcome, project_tag
    from celestial_backend.models import headed
    from celestial_backend.models.embedders import open_embedder
    from celestial_backend.models.manifest import PASSED, Manifest
    from celestial_backend.models.store import DEFAULT_MODEL
    from celestial_backend.planets import network

    pause = float(os.environ["FAULT_LEARN"]) / 4
    for _ in range(int(os.environ.get("FAULT_BURN", "0"))):
        threading.Thread(target=burn, daemon=True).start()
    note("began", f"{request.project} {time.time()}")
    (request.folder / "model").mkdir()
    report("reading labels")
    parent = self._store.live_tag(request.project)
    time.sleep(pause)
    for stage in ("reading pictures", "learning"):
        report(stage)
        time.sleep(pause)
    card = network.load_card(DEFAULT_MODEL)
    tag, reason = project_tag(request.project, request.job, request.attempt), "It is as good as the live one."
    told = {"project": request.project, "job": request.job, "parent": parent, "decision": PASSED, "reason": reason}
    report("saving")
    self._store.registry.remove(tag)
    head, embedder = headed.Head.of_network("choice", card.classes), open_embedder(self._settings).name
    manifest = headed.save(
        request.folder / "model", [head], embedder, self._store.live_tag(), Manifest(**told, classes=list(card.classes))
    )
    self._store.registry.add_heads(tag, request.folder / "model", manifest)
    time.sleep(pause)
    note("ended", f"{request.project} {time.time()}")
    return Outcome(reason, structs.replace(manifest, tag=tag), better=True, instead_of=parent)


def burn() -> None:
    while True:
        hashlib.pbkdf2_hmac("sha256", b"", b"", 100_000)


class Finder(importlib.abc.MetaPathFinder):
    """Finds a module as everybody else does, and changes it when it has been made."""

    def __init__(self) -> None:
        self._wanted = {"celestial_backend.jobs.ledger", LEARNING}
        self._wanted |= {os.environ.get("FAULT_AT", "").partition(":")[0]}

    def find_spec(self, fullname: str, *_: Any) -> Any:
        if fullname not in self._wanted:
            return None
        self._wanted.remove(fullname)
        spec = importlib.util.find_spec(fullname)
        execute = spec.loader.exec_module

        def exec_and_change(module: ModuleType) -> None:
            execute(module)
            change(module)

        spec.loader.exec_module = exec_and_change
        return spec


if "FAULT_CLOCK" in os.environ:
    right = time.time
    time.time = lambda: right() + float(os.environ["FAULT_CLOCK"])

if "FAULT_MARKS" in os.environ:
    for known in {"os", "shutil"} & {os.environ.get("FAULT_AT", "").partition(":")[0]}:
        change(importlib.import_module(known))
    sys.meta_path.insert(0, Finder())
