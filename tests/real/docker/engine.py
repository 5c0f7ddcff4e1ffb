"""
A Docker engine for the tests: the one that runs, or Debian's, unpacked into a folder and started for them alone.

What it starts lives in a network namespace of its own, so that no port clashes, and ends with the tests. The machine's
apt knows nothing of it; its forwarding is put back.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

SUITE = "trixie"  # bookworm's Docker 20 has no `subpath` of volumes, and its Compose is of another generation
PACKAGES = ("docker.io", "docker-cli", "docker-buildx", "docker-compose", "containerd")
HERE = {"debootstrap": "debootstrap", "iptables": "iptables", "runc": "runc", "tini-static": "tini"}  # of the machine
NAME = "celestial-test"  # of the namespace, the cgroup and the compose project
OUTSIDE, INSIDE, LINK = "10.213.0.1", "10.213.0.2", "celestial0"
FORWARD = Path("/proc/sys/net/ipv4/ip_forward")


def run(*command: str, environ: Mapping[str, str] | None = None, cwd: Path | None = None, stdin: str = "",
        seconds: float = 600) -> str:  # fmt: skip
    """What a command prints; it fails with all that it said."""
    done = subprocess.run(
        command, env=environ, cwd=cwd, input=stdin, capture_output=True, text=True, timeout=seconds, check=False
    )
    assert done.returncode == 0, f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
    return done.stdout


class Docker:
    """The client of an engine."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self.environ = dict(environ)

    def __call__(self, *words: str, cwd: Path | None = None, stdin: str = "", seconds: float = 600, **more: str) -> str:
        """What `docker …` prints."""
        docker = shutil.which("docker", path=self.environ["PATH"]) or "docker"
        return run(docker, *words, environ=self.environ | more, cwd=cwd, stdin=stdin, seconds=seconds)

    def has(self, image: str) -> bool:
        return bool(self("image", "ls", "--quiet", image))

    @property
    def versions(self) -> str:
        told = self("version", "--format", "{{.Server.Version}}"), self("compose", "version", "--short")
        return "Docker {}, Compose {}".format(*(each.strip() for each in told))


@contextmanager
def engine(folder: Path) -> Iterator[Docker]:
    """An engine that answers; what had to be started for it has ended when this returns."""
    running = Docker(os.environ)
    try:
        running("info")
        running("compose", "version")
    except (AssertionError, OSError):
        assert os.geteuid() == 0, "No Docker engine runs here; as root the tests start one of their own."
    else:
        yield running
        return
    _install_here()
    with ExitStack() as undo:
        _network(undo)
        yield _started(undo, folder, _unpacked(folder))


def _install_here() -> None:
    missing = [package for program, package in HERE.items() if shutil.which(program) is None]
    if missing:
        run("apt-get", "update", "-q")
        run("apt-get", "install", "-y", "-q", "--no-install-recommends", *missing)


def _unpacked(folder: Path) -> Path:
    """The engine's packages, laid out below a folder; apt is given sources and lists of its own."""
    root, apt = folder / "engine", folder / "apt"
    if (root / "usr/sbin/dockerd").exists():
        return root
    for each in ("lists/partial", "archives/partial", "debs"):
        (apt / each).mkdir(parents=True, exist_ok=True)
    keys = "/usr/share/keyrings/debian-archive-keyring.gpg"
    sources = apt / "debian.list"
    sources.write_text(f"deb [signed-by={keys}] http://deb.debian.org/debian {SUITE} main\n")
    places = {"Etc::sourcelist": sources, "Etc::sourceparts": "/dev/null", "Etc::preferencesparts": "/dev/null",
              "State::lists": apt / "lists", "Cache": apt}  # fmt: skip
    options = ["-o", "APT::Sandbox::User=root"]
    options += [word for name, place in places.items() for word in ("-o", f"Dir::{name}={place}")]
    run("apt-get", *options, "update", "-q")
    run("apt-get", *options, "download", *PACKAGES, cwd=apt / "debs")
    for package in (apt / "debs").glob("*.deb"):
        run("dpkg", "--extract", str(package), str(root))
    plugins = folder / "client" / "cli-plugins"  # the client looks for them here, and in folders of the machine
    shutil.copytree(root / "usr/libexec/docker/cli-plugins", plugins, dirs_exist_ok=True)
    return root


def _network(undo: ExitStack) -> None:
    """A namespace with a way out; what is changed on the machine is noted before."""
    before = FORWARD.read_text()
    undo.callback(FORWARD.write_text, before)
    FORWARD.write_text("1")
    run("ip", "netns", "add", NAME)
    undo.callback(run, "ip", "netns", "delete", NAME)
    run("ip", "link", "add", LINK, "type", "veth", "peer", "name", "eth0", "netns", NAME)
    undo.callback(run, "ip", "link", "delete", LINK)
    run("ip", "address", "add", f"{OUTSIDE}/30", "dev", LINK)
    run("ip", "link", "set", LINK, "up")
    for words in (f"address add {INSIDE}/30 dev eth0", "link set eth0 up", "link set lo up",
                  f"route add default via {OUTSIDE}"):  # fmt: skip
        run("ip", "-n", NAME, *words.split())
    rule = ("POSTROUTING", "--source", f"{INSIDE}/32", "--jump", "MASQUERADE")
    run("iptables", "--table", "nat", "--append", *rule)
    undo.callback(run, "iptables", "--table", "nat", "--delete", *rule)


def _started(undo: ExitStack, folder: Path, root: Path) -> Docker:
    path = os.pathsep.join([f"{root}/usr/bin", f"{root}/usr/sbin", os.environ["PATH"], "/usr/sbin", "/sbin"])
    socket, log = folder / "docker.sock", (folder / "dockerd.log").open("w")
    undo.callback(log.close)
    docker = Docker(os.environ | {"PATH": path, "DOCKER_HOST": f"unix://{socket}", "DOCKER_CONFIG": f"{folder}/client"})
    words = {"host": f"unix://{socket}", "data-root": folder / "data", "exec-root": folder / "exec",
             "pidfile": folder / "dockerd.pid", "storage-driver": "overlay2", "cgroup-parent": f"/{NAME}",
             "mtu": "1400", "init-path": shutil.which("tini-static")}  # fmt: skip
    # `ip netns exec` would hide the cgroups.
    command = ["nsenter", f"--net=/run/netns/{NAME}", "dockerd", *(f"--{name}={word}" for name, word in words.items())]
    daemon = subprocess.Popen(command, env=docker.environ, stdout=log, stderr=log, start_new_session=True)
    undo.callback(_ended, daemon, folder)
    deadline = time.monotonic() + 60
    while True:
        try:
            docker("info")
        except AssertionError:
            assert daemon.poll() is None, (folder / "dockerd.log").read_text()[-2000:]
            assert time.monotonic() < deadline, "dockerd does not answer"
            time.sleep(0.5)
        else:
            return docker


def _ended(daemon: subprocess.Popen[bytes], folder: Path) -> None:
    daemon.send_signal(signal.SIGTERM)  # it ends its containers and its containerd first
    try:
        daemon.wait(90)
    finally:
        if daemon.poll() is None:
            daemon.kill()
    # What it leaves: mounts, which keep the namespace, and empty cgroups.
    for line in reversed(Path("/proc/mounts").read_text().splitlines()):
        if line.split()[1].startswith(f"{folder}/"):
            run("umount", line.split()[1])
    for hierarchy in Path("/sys/fs/cgroup").glob(f"**/{NAME}"):
        for group in sorted([hierarchy, *filter(Path.is_dir, hierarchy.rglob("*"))], reverse=True):
            with suppress(OSError):
                group.rmdir()
