"""
Stand-ins for the images that the Dockerfile and the compose files name, made from Debian's packages.

They are tagged exactly as they are asked for, so no registry is needed. What an engine has already stays. They differ
from the real ones in what no test here looks at: Debian for Alpine, its Python 3.11, plain entry points.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import yaml

from tests.real.docker.engine import Docker, run
from tests.support.backend_server import REPOSITORY

MIRROR = "http://deb.debian.org/debian"
BUNDLE = "etc/ssl/certs/ca-certificates.crt"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
STUDIO = """
FROM {base}
ENV LABEL_STUDIO_BASE_DATA_DIR=/label-studio/data HOME=/label-studio
RUN pip install --no-cache-dir label-studio=={version}
RUN useradd --uid 1001 --gid 0 --home-dir /label-studio studio \\
 && mkdir -p /label-studio/data && chown -R 1001:0 /label-studio
VOLUME /label-studio/data
USER 1001
CMD ["label-studio", "start", "--no-browser", "--internal-host", "0.0.0.0"]
"""
POSTGRES = """#!/bin/sh
set -e
if [ ! -s "$PGDATA/PG_VERSION" ]; then
    initdb --username "$POSTGRES_USER" --auth trust --encoding UTF8 --locale C.UTF-8
    echo "host all all all $POSTGRES_HOST_AUTH_METHOD" >> "$PGDATA/pg_hba.conf"
    pg_ctl --wait -o "-c listen_addresses=" start
    createdb --username "$POSTGRES_USER" --maintenance-db postgres "${POSTGRES_DB:-$POSTGRES_USER}"
    pg_ctl --wait stop
fi
exec "$@"
"""


class Bases:
    """The images of one engine; `make` makes those that are missing."""

    def __init__(self, docker: Docker, folder: Path) -> None:
        self._docker = docker
        self._folder = folder

    def make(self) -> None:
        services = _services()
        (base,) = re.findall(r"^FROM (\S+)", (REPOSITORY / "Dockerfile").read_text(), re.MULTILINE)
        makers = {
            base: self._python,
            services["nginx"]["image"]: self._nginx,
            services["postgres"]["image"]: self._postgres,
        }
        for image, maker in makers.items():
            if not self._docker.has(image):
                maker(image)
        studio = services["label-studio"]["image"]
        if not self._docker.has(studio):
            text = STUDIO.format(base=base, version=studio.rpartition(":")[2])
            self._docker("build", "--tag", studio, "-", stdin=text, seconds=1200)

    def _python(self, image: str) -> None:
        root = self._bootstrapped("bookworm", "python3,python3-pip,python3-venv")
        run("chroot", str(root), "python3", "-m", "venv", "--copies", "/usr/local")  # with `python` and `pip`
        if Path("/", BUNDLE).exists():  # this machine may reach the index of packages through a proxy of its own
            shutil.copy(Path("/", BUNDLE), root / BUNDLE)
        (root / "etc/pip.conf").write_text(f"[global]\ncert = /{BUNDLE}\ntimeout = 180\n")
        self._import(image, root, f"ENV PATH={PATH}")

    def _nginx(self, image: str) -> None:
        root = self._bootstrapped("forky", "nginx")  # the first with 1.27.3, which looks up names again
        run("chroot", str(root), "useradd", "--system", "nginx")
        self._import(image, root, f"ENV PATH={PATH}")

    def _postgres(self, image: str) -> None:
        (version,) = re.findall(r":(\d+)", image)
        root = self._bootstrapped("trixie", f"postgresql-{version}")
        program, data = root / "usr/local/bin/entrypoint", root / "var/lib/postgresql/data"
        program.write_text(POSTGRES)
        program.chmod(0o755)
        data.mkdir(mode=0o700)
        run("chroot", str(root), "chown", "--recursive", "postgres:postgres", "/var/lib/postgresql", "/run/postgresql")
        (root / "run/postgresql").chmod(0o3777)  # as the official image has it; a tmpfs there takes it over
        sample = root / f"usr/share/postgresql/{version}/postgresql.conf.sample"
        sample.write_text(sample.read_text() + "\nlisten_addresses = '*'\n")
        self._import(image, root, f"ENV PATH=/usr/lib/postgresql/{version}/bin:{PATH} PGDATA=/var/lib/postgresql/data",
                     'ENTRYPOINT ["entrypoint"]', "VOLUME /var/lib/postgresql/data", "STOPSIGNAL SIGINT")  # fmt: skip

    def _bootstrapped(self, suite: str, packages: str) -> Path:
        root = self._folder / suite
        shutil.rmtree(root, ignore_errors=True)
        named = Path("/usr/share/debootstrap/scripts", suite)
        script = [] if named.exists() else ["/usr/share/debootstrap/scripts/sid"]
        wanted = f"--include=ca-certificates,curl,{packages}"
        run("debootstrap", "--variant=minbase", wanted, suite, str(root), MIRROR, *script, seconds=1200)
        for left in ("var/cache/apt", "var/lib/apt/lists"):
            shutil.rmtree(root / left)
        return root

    def _import(self, image: str, root: Path, *changes: str) -> None:
        packed = self._folder / "root.tar"
        run("tar", "--directory", str(root), "--create", "--file", str(packed), ".")
        words = [word for change in changes for word in ("--change", change)]
        self._docker("import", *words, str(packed), image)
        packed.unlink()
        shutil.rmtree(root)


class _Loader(yaml.SafeLoader):
    """Knows `!override`, which changes nothing for who only reads names of images."""


_Loader.add_constructor("!override", lambda loader, node: loader.construct_sequence(node))


def _services() -> dict[str, Any]:
    """The services of both compose files, with the images that they name."""
    found: dict[str, Any] = {}
    for file in ("docker-compose.yml", "docker-compose.scale.yml"):
        services = yaml.load((REPOSITORY / file).read_text(), _Loader)["services"]  # noqa: S506 - a safe one
        found |= {name: service for name, service in services.items() if "image" in service}
    return found
