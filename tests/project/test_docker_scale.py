"""The compose file for several backends, laid over the other one as Docker does it, and what both must agree in."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import fields
from ipaddress import ip_address
from typing import Any

import pytest
import yaml
from sqlalchemy import make_url

from celestial_backend.settings import Settings
from tests.project.test_docker import (
    BACKEND,
    BACKEND_ADDRESS,
    HERE,
    STUDIO,
    UNSET,
    WORKER,
    answering,
    compose,
    filled,
    seconds,
)
from tests.support.backend_server import REPOSITORY
from tests.support.nginx_server import ARGUMENTS, CONFIGURATION

__all__ = ["answering"]  # a fixture


class _Loader(yaml.SafeLoader):
    pass


class Replacement:
    """What stands behind `!override`."""

    def __init__(self, value: Any) -> None:
        self.value = value


def _replacement(loader: _Loader, node: Any) -> Replacement:
    return Replacement(loader.construct_sequence(node, deep=True))


_Loader.add_constructor("!override", _replacement)
OVER: Any = yaml.load((REPOSITORY / "docker-compose.scale.yml").read_text(), _Loader)  # noqa: S506 - a safe one


def laid_over(below: Any, above: Any) -> Any:
    """Compose's merging, in the forms used here: mappings key by key, scalars replaced, and `!override`."""
    if isinstance(above, Replacement):
        return above.value
    if isinstance(below, dict) and isinstance(above, dict):
        return below | {key: laid_over(below.get(key), value) for key, value in above.items()}
    assert below is None or not isinstance(above, list), "Compose would add to the list"
    return above


def scaled(environ: Any = UNSET) -> dict[str, Any]:
    return dict(laid_over(compose(environ), filled(OVER, environ)))


SCALED = scaled()
SERVICES = SCALED["services"]
NGINX, POSTGRES, IN_SCALE = (SERVICES[name] for name in ("nginx", "postgres", "label-studio"))
MANY = {"backend": BACKEND, "worker": WORKER}
DATABASE = {"CELESTIAL_DATABASE_URL": "postgresql://studio@postgres/studio"}


def test_there_are_three_backends_and_two_workers() -> None:
    """Of nginx and PostgreSQL there is one each; no fixed address and no published port keep Docker from more."""
    copies = {name: service.get("deploy", {}).get("replicas", 1) for name, service in SERVICES.items()}
    assert copies == {"label-studio": 1, "nginx": 1, "postgres": 1, "backend": 3, "worker": 2}
    for name in MANY:
        assert SERVICES[name]["networks"] == ["default", "database"]
        assert {"ports", "container_name"}.isdisjoint(SERVICES[name])


def test_backends_and_workers_are_those_of_the_other_file() -> None:
    """The same image, settings, pictures and rights; database, networks and what they wait for are told anew."""
    for name, alone in MANY.items():
        told = set(OVER["services"][name])
        assert told <= {"deploy", "environment", "volumes", "networks", "depends_on"}
        kept = alone.keys() - told
        assert {key: SERVICES[name][key] for key in kept} == {key: alone[key] for key in kept}
        assert SERVICES[name]["environment"] == alone["environment"] | DATABASE
        assert alone.get("depends_on", {}).items() <= SERVICES[name]["depends_on"].items()


def test_no_state_is_shared_but_the_database() -> None:
    """Backends and workers mount Label Studio's pictures, and nothing that another one of them writes."""
    for name, alone in MANY.items():
        state, pictures = alone["volumes"]
        assert state.startswith("state:")
        assert SERVICES[name]["volumes"] == [pictures]
        assert pictures["read_only"] is True


def test_every_setting_still_comes_from_env() -> None:
    """What can be given in .env for one backend is given to each of several, except where the database is."""
    for variable in {field.metadata["variable"] for field in fields(Settings)} - set(DATABASE):
        environ = {variable: "given"}
        for name in MANY:
            alone = compose(environ)["services"][name]["environment"]
            together = scaled(environ)["services"][name]["environment"]
            assert together == alone | DATABASE


def test_label_studio_reaches_nginx_where_the_backend_was() -> None:
    """The one address that it may speak to, and the name with a dot, are nginx's and nobody else's."""
    assert {name for name, service in SERVICES.items() if "ipv4_address" in str(service)} == {"nginx"}
    (alias,) = NGINX["networks"]["default"]["aliases"]
    assert alias == BACKEND["networks"]["default"]["aliases"][0]
    assert ip_address(NGINX["networks"]["default"]["ipv4_address"]) == BACKEND_ADDRESS


def test_label_studio_uses_the_same_server() -> None:
    """In the way that its own settings name a PostgreSQL; all else of it is as in the other file."""
    told = {"environment", "depends_on", "networks"}
    assert {key: value for key, value in IN_SCALE.items() if key not in told} == {
        key: value for key, value in STUDIO.items() if key not in told
    }
    assert STUDIO["environment"].items() <= IN_SCALE["environment"].items()
    user, name = POSTGRES["environment"]["POSTGRES_USER"], "studio"  # the image calls a database as its first user
    asked = make_url(DATABASE["CELESTIAL_DATABASE_URL"])
    studio = {key: IN_SCALE["environment"][f"POSTGRE_{key}"] for key in ("HOST", "USER", "NAME", "PASSWORD")}
    assert studio == {"HOST": asked.host, "USER": asked.username, "NAME": asked.database, "PASSWORD": ""}
    assert (asked.host, asked.username, asked.database) == ("postgres", user, name)
    assert IN_SCALE["environment"]["DJANGO_DB"] == "default"
    for service in (IN_SCALE, SERVICES["backend"]):
        assert service["depends_on"]["postgres"] == {"condition": "service_healthy"}


def test_nginx_runs_the_projects_configuration() -> None:
    """The file is mounted where the command looks, with the words of its own tests; it writes to memory alone."""
    assert NGINX["entrypoint"] == ["nginx", *ARGUMENTS]
    assert NGINX["volumes"] == [f"./{CONFIGURATION.relative_to(REPOSITORY)}:{ARGUMENTS[-1]}:ro"]
    assert NGINX["tmpfs"] == ["/tmp"]  # noqa: S108
    assert "-p /tmp/ " in " ".join(ARGUMENTS)
    text = CONFIGURATION.read_text()
    assert "listen 9090;" in text
    assert "server backend:9090 resolve " in text
    assert NGINX["depends_on"] == {"backend": {"condition": "service_healthy"}}
    assert seconds(NGINX["stop_grace_period"]) >= seconds(BACKEND["stop_grace_period"])


def test_the_database_is_reached_by_those_who_use_it_and_keeps_what_it_holds() -> None:
    """On a network of its own without a way out, with no port on the machine, and its files on a volume."""
    assert "ports" not in POSTGRES
    assert POSTGRES["networks"] == ["database"]
    assert SCALED["networks"]["database"] == {"internal": True}
    on_it = {name for name, service in SERVICES.items() if "database" in service.get("networks", ())}
    assert on_it == {"postgres", "label-studio", "backend", "worker"}
    assert POSTGRES["volumes"] == ["database:/var/lib/postgresql/data"]
    assert set(SCALED["volumes"]) == {"label-studio", "state", "database"}
    assert "fsync" not in str(POSTGRES)


def test_no_container_has_rights_that_it_does_not_need() -> None:
    """No capabilities, no new privileges, nothing to write to but volumes and memory, and nobody is root."""
    for name in ("nginx", "postgres", *MANY):
        service = SERVICES[name]
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["read_only"] is True
        assert "privileged" not in service
    assert (NGINX["user"], POSTGRES["user"]) == ("nginx", "postgres")


@pytest.mark.parametrize(("status", "healthy"), [(200, True), (401, True), (502, False), (404, False)])
def test_nginx_is_healthy_while_a_backend_answers(answering: Any, status: int, healthy: bool) -> None:
    """With a password that nginx does not know the answer is 401, and it is a backend's too."""
    shell = shutil.which("sh")
    if shutil.which("curl") is None or shell is None:
        pytest.skip("no curl on this machine")
    kind, command = NGINX["healthcheck"]["test"]
    assert kind == "CMD-SHELL"
    answering.status = status
    here = command.replace(f"{HERE}:9090", f"{HERE}:{answering.server_port}")
    done = subprocess.run([shell, "-c", here], env=UNSET, capture_output=True, timeout=30, check=False)
    assert (done.returncode == 0) is healthy
    assert [path for path, _ in answering.seen] == ["/health"]


def test_docker_compose_accepts_both_files() -> None:
    """Docker's own reader lays one over the other as these tests do."""
    docker = shutil.which("docker")
    if docker is None or subprocess.run([docker, "compose", "version"], capture_output=True, check=False).returncode:
        pytest.skip("no docker client with compose on this machine")
    files = ["-f", "docker-compose.yml", "-f", "docker-compose.scale.yml"]
    command = [docker, "compose", "--env-file", "/dev/null", *files, "config", "--format", "json"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    read = yaml.safe_load(done.stdout)["services"]
    for name in MANY:
        assert read[name]["environment"] == SERVICES[name]["environment"]
        assert set(read[name]["networks"]) == {"default", "database"}
        assert [volume["target"] for volume in read[name]["volumes"]] == ["/label-studio/data/media"]
    assert read["nginx"]["networks"]["default"]["ipv4_address"] == str(BACKEND_ADDRESS)
