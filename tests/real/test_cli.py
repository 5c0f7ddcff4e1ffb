"""The command line as people use it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import termios
from collections.abc import Iterator
from ipaddress import ip_network
from pathlib import Path

import pytest
from click.testing import CliRunner

from celestial_backend.commands import shown
from celestial_backend.commands.cli import main
from celestial_backend.database import Database
from celestial_backend.jobs.ledger import FAILED, KEPT, MERGED, PUBLISHED, Ending, Job, Ledger
from celestial_backend.jobs.trainings import Jobs
from celestial_backend.planets.renderer import render
from celestial_backend.settings import Settings
from tests.support.backend_server import REPOSITORY
from tests.support.label_studio import RESERVED_NETWORKS, networks_without
from tests.support.stores import store_of


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "celestial_backend", *map(str, arguments)],
        cwd=REPOSITORY, env=os.environ, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def test_train_registers_a_model_that_is_served(tmp_path: Path) -> None:
    """
    `train FOLDER` ends with a tag of the store that is from then on the latest, and with an honest figure.

    Neither TensorFlow nor BentoML is needed for it.
    """
    folder = tmp_path / "pictures"
    for body in ("Saturn", "Earth"):
        (folder / body).mkdir(parents=True)
        for seed in range(8):
            render(body, seed).save(folder / body / f"{seed}.png")
    done = run("train", folder)
    assert done.returncode == 0, done.stderr
    tag, said = done.stdout.splitlines()
    store = store_of(Settings.from_environ())
    assert store.live_tag() == tag
    assert store.classes(tag, 0) == ("Earth", "Saturn")
    assert re.match(r"1[3-6] of 16 pictures \([0-9.]+%\) are right, each by a head that had not learned it\. ", said)
    code = f"""
import sys
from celestial_backend.commands.cli import main
main(["train", {str(folder)!r}, "--json"], standalone_mode=False)
print(sorted({{"tensorflow", "keras", "bentoml"}} & set(sys.modules)))
"""
    again = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    told, heavy = again.stdout.splitlines()
    assert heavy == "[]"
    assert store.live_tag() == json.loads(told)["tag"] != tag
    assert json.loads(told)["scores"]["labels"] == 16


def test_train_refuses_a_folder_without_classes(tmp_path: Path) -> None:
    """A sentence on stderr with the counts, exit code 5, nothing on stdout."""
    done = run("train", tmp_path)
    assert done.returncode == 5
    assert done.stderr.splitlines()[-1].startswith("Error: Training needs at least 2 classes")
    assert done.stdout == ""


def test_a_bad_setting_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 2, no traceback."""
    monkeypatch.setenv("CELESTIAL_TYPO", "1")
    done = run("train", ".")
    assert done.returncode == 2
    assert "CELESTIAL_TYPO is not a setting of this backend" in done.stderr
    assert "Traceback" not in done.stderr


def test_help_names_the_commands() -> None:
    """`--help` works without any setting, for the whole and for each command."""
    assert "train" in run("--help").stdout
    assert "FOLDER" in run("train", "--help").stdout


def test_jobs_says_that_there_are_none() -> None:
    """A sentence for people, an empty list for a script."""
    done = run("jobs")
    assert (done.stdout, done.stderr) == ("There are no trainings yet.\n", "")
    assert json.loads(run("jobs", "--json").stdout) == []


def test_tables_fit_a_hundred_columns() -> None:
    """In a pipe too; no tag and no moment is parted, and all of a reason is there."""
    ledger = Ledger(Database(Settings.from_environ()))
    reason = "It is a long story " + "of labels " * 40
    job = ended(ledger, str(2**63 - 1), reason)
    lines = run("jobs").stdout.splitlines()
    assert max(map(len, lines)) <= 100
    assert re.match(rf"{job.id}  {job.project}  kept +\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d  0 ", lines[2])
    place = lines[0].index("progress or reason")
    assert " ".join(line[place:] for line in lines[2:]).split() == reason.split()
    listed = run("models").stdout
    assert max(map(len, listed.splitlines())) <= 100
    assert "default-" in listed


def ended(ledger: Ledger, project: str, reason: str) -> Job:
    ledger.request(project)
    job = ledger.start("a worker", project)
    assert job is not None
    ledger.end(job, Ending(KEPT, reason))
    return job


def test_jobs_can_be_watched_in_a_pipe() -> None:
    """A line for each change, and code 0 at Ctrl-C; not as JSON, which is one list."""
    ledger = Ledger(Database(Settings.from_environ()))
    with subprocess.Popen(
        [sys.executable, "-m", "celestial_backend", "jobs", "--watch"],
        cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as watching:  # fmt: skip
        assert watching.stdout is not None
        assert watching.stdout.readline() == "There are no trainings yet.\n"
        waiting = ledger.request("3")
        assert watching.stdout.readline() == f"Job {waiting.id} of project 3: waiting\n"
        job = ledger.start("a worker", "3")
        assert job is not None
        assert watching.stdout.readline() == f"Job {job.id} of project 3: running\n"
        ledger.end(job, Ending(KEPT, "It is worse."))
        assert watching.stdout.readline() == f"Job {job.id} of project 3: kept, It is worse.\n"
        watching.send_signal(signal.SIGINT)
        rest = watching.communicate(timeout=60)
        assert (rest, watching.returncode) == (("", ""), 0)
    refused = run("jobs", "--watch", "--json")
    assert refused.returncode == 2
    assert "Give one of them." in refused.stderr


@contextlib.contextmanager
def in_a_terminal(*command: str) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """A command that has a terminal, as it is started in a window."""
    ours, its = os.openpty()
    with subprocess.Popen(
        [sys.executable, *command], cwd=REPOSITORY, stdin=its, stdout=its, stderr=its, start_new_session=True,
        env={**os.environ, "TERM": "xterm"}, preexec_fn=lambda: fcntl.ioctl(its, termios.TIOCSCTTY, 0),
    ) as process:  # fmt: skip
        os.close(its)
        yield ours, process
        process.wait(60)
    os.close(ours)


def read_until(terminal: int, *words: str) -> None:
    seen = ""
    while not all(word in seen for word in words):
        seen += os.read(terminal, 65536).decode(errors="replace")


def test_jobs_can_be_watched_on_a_terminal() -> None:
    """The table is drawn anew; Ctrl-C ends it with code 0."""
    ledger = Ledger(Database(Settings.from_environ()))
    with in_a_terminal("-m", "celestial_backend", "jobs", "--watch") as (terminal, process):
        read_until(terminal, "There are no trainings yet.")
        waiting = ledger.request("3")
        read_until(terminal, waiting.id, "waiting", "progress or reason")
        os.write(terminal, b"\x03")
        read_until(terminal, "\x1b[?25h")  # the cursor is shown again
    assert process.returncode == 0


def test_a_bar_goes_on_while_a_library_is_kept_quiet() -> None:
    """With what, how much of how much and how; what the library writes stands nowhere."""
    code = (
        "import os, sys; from celestial_backend import logs; from celestial_backend.commands.shown import Shown\n"
        "with Shown('Doing it') as shown, logs.hushed():\n"
        "    shown(3, 10, words='2 per second'); os.write(2, b'C++'); sys.stdin.readline()\n"
    )
    with in_a_terminal("-c", code) as (terminal, process):
        read_until(terminal, "Doing it", "3 of 10, 2 per second")
        os.write(terminal, b"\n")
        rest = b""
        with contextlib.suppress(OSError):  # its end
            while part := os.read(terminal, 65536):
                rest += part
    assert b"C++" not in rest
    assert process.returncode == 0


def test_a_wait_is_a_line_in_a_pipe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """After two seconds, and then every ten."""
    assert (shown.SOON_S, shown.EVERY_S) == (2, 10)
    monkeypatch.setattr(shown, "SOON_S", 0.0)
    doing, said = shown.Shown("Doing it"), ""
    doing(3, 10, words="2 per second")
    with doing:
        while not said:
            said = capsys.readouterr().err
    assert re.fullmatch(r"Doing it: 3 of 10, 2 per second, \d+ s\n", said)


def test_jobs_tells_where_each_training_is() -> None:
    """The stage, and within it pictures, one line for each job."""
    ledger = Ledger(Database(Settings.from_environ()))
    where = {"3": {"stage": "reading pictures", "pictures": 50, "of": None},
             "4": {"stage": "reading pictures", "pictures": 60, "of": 60},
             "5": {"stage": "learning"}}  # fmt: skip
    for project, progress in where.items():
        ledger.request(project)
        job = ledger.start("a worker", project)
        assert job is not None
        ledger.progress(job, **progress)
    lines = [re.split(r"  +", line.strip()) for line in run("jobs").stdout.splitlines()]
    assert [(line[1], line[2], line[5]) for line in lines[2:]] == [
        ("5", "running", "learning"),
        ("4", "running", "reading pictures 60 of 60"),
        ("3", "running", "reading pictures 50"),
    ]


@pytest.mark.parametrize(("state", "code"), [(PUBLISHED, 0), (KEPT, 0), (FAILED, 5)])
def test_train_follows_the_training_that_it_was_merged_into(
    monkeypatch: pytest.MonkeyPatch, state: str, code: int
) -> None:
    """To its end, which is what is said and what the command exits by."""
    ledger = Ledger(Database(Settings.from_environ()))
    rounds = iter(range(9))

    def run(_: Jobs, project: str) -> bool:
        begun = ledger.start("a worker", project)
        if begun and next(rounds) == 0:  # its worker dies when somebody has asked again
            ledger.request(project)
            ledger.give_back(begun)
        elif begun:
            ledger.end(begun, Ending(state, "As it was."))
        return True

    monkeypatch.setattr(Jobs, "run", run)
    done = CliRunner().invoke(main, ["train", "--project", "3"])
    assert (done.exit_code, done.stdout) == (code, f"{state}: As it was.\n")
    assert [job.state for job in ledger.jobs()] == [state, MERGED]


def test_train_wants_a_folder_or_a_project() -> None:
    """Options that do not go together are refused before anything is done."""
    both = ("folder", "--project", "3")
    for arguments in ((), both, ("--project", "3", "--epochs", "2")):
        done = run("train", *arguments)
        assert done.returncode == 2
        assert "Error: " in done.stderr


@pytest.mark.parametrize("command", ["models use m:1", "models", "jobs", "prelabel", "doctor", "train"])
def test_a_project_has_a_number_from_one_on(command: str) -> None:
    """Any other is refused before anything is done."""
    done = CliRunner().invoke(main, [*command.split(), "--project", "-1"])
    assert done.exit_code == 2
    assert "Invalid value for '--project': -1 is not in the range x>=1" in done.stderr


def refused_after(*addresses: str) -> list[str]:
    """The networks that Label Studio refuses when it is started with what the command prints."""
    done = CliRunner().invoke(main, ["private-addresses", *addresses])
    assert done.exit_code == 0, done.output
    first, second = done.stdout.splitlines()
    assert first == "USE_DEFAULT_BANNED_SUBNETS=false"
    return second.removeprefix("USER_ADDITIONAL_BANNED_SUBNETS=").split(",")


def test_one_private_address_is_let_in() -> None:
    """What is printed is what the tests' own Label Studio is started with."""
    assert ",".join(refused_after("127.0.0.1")) == networks_without("127.0.0.1")


def test_several_private_addresses_are_let_in_and_no_other() -> None:
    """Of both kinds, single ones and networks, twice or one inside another; all else stays refused."""
    named = ["127.0.0.1", "::1", "172.30.55.0/28", "172.30.55.2", "127.0.0.1"]
    refused = [ip_network(each) for each in refused_after(*named)]
    for hole in map(ip_network, named):
        assert not any(network.overlaps(hole) for network in refused if network.version == hole.version)
    before = sum(ip_network(each).num_addresses for each in RESERVED_NETWORKS)
    assert sum(network.num_addresses for network in refused) == before - 1 - 1 - 16


@pytest.mark.parametrize(
    ("address", "said"),
    [
        pytest.param("localhost", "without http:// and port", id="name"),
        pytest.param("http://127.0.0.1:9090", "without http:// and port", id="url"),
        pytest.param("10.0.0.5/24", "must begin with its first address", id="not the first of a network"),
        pytest.param("fe80::1%eth0", "got 'fe80::1%eth0'", id="zone"),
        pytest.param("8.8.8.8", "A public address needs no variables", id="public"),
        pytest.param("0.0.0.0/0", "give the parts one by one", id="everything"),
    ],
)
def test_an_address_that_cannot_be_let_in_is_a_sentence(address: str, said: str) -> None:
    """Nothing is printed that would change what Label Studio refuses."""
    done = CliRunner().invoke(main, ["private-addresses", "127.0.0.1", address])
    assert (done.exit_code, done.stdout) == (1, "")
    assert said in done.stderr
