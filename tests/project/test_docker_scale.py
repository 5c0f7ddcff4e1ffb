"""The compose file for several backends, laid over the other one as Docker does it, and what both must agree in."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import fields
from ipaddress import ip_address
from typing import Any

import pytest
import yaml

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
NGINX, REDIS, STORE = (SERVICES[name] for name in ("nginx", "redis", "store"))
MANY = {"backend": BACKEND, "worker": WORKER}


def test_there_are_three_backends_and_two_workers() -> None:
    """Of nginx and Redis there is one each; neither a fixed address nor a published port keeps Docker from more."""
    copies = {name: service.get("deploy", {}).get("replicas", 1) for name, service in SERVICES.items()}
    assert copies == {"label-studio": 1, "nginx": 1, "redis": 1, "store": 1, "backend": 3, "worker": 2}
    for name in MANY:
        assert SERVICES[name]["networks"] == ["default", "queue"]
        assert {"ports", "container_name"}.isdisjoint(SERVICES[name])


def test_backends_and_workers_are_those_of_the_other_file() -> None:
    """The same image, settings, folders and rights; the queue, the networks and what they wait for are told anew."""
    for name, alone in MANY.items():
        told = set(OVER["services"][name])
        assert told <= {"deploy", "environment", "networks", "depends_on"}
        kept = alone.keys() - told
        assert {key: SERVICES[name][key] for key in kept} == {key: alone[key] for key in kept}
        assert SERVICES[name]["environment"] == alone["environment"] | {"REDIS_URL": "redis://redis:6379/0"}
        assert alone.get("depends_on", {}).items() <= SERVICES[name]["depends_on"].items()


def test_every_setting_still_comes_from_env() -> None:
    """What can be given in .env for one backend is given to each of several, except where the queue is."""
    for variable in {field.metadata["variable"] for field in fields(Settings)} - {"REDIS_URL"}:
        environ = {variable: "given"}
        for name in MANY:
            alone = compose(environ)["services"][name]["environment"]
            together = scaled(environ)["services"][name]["environment"]
            assert together | {"REDIS_URL": ""} == alone | {"REDIS_URL": ""}


def test_label_studio_reaches_nginx_where_the_backend_was() -> None:
    """The one address that it may speak to, and the name with a dot, are nginx's and nobody else's."""
    assert SERVICES["label-studio"] == STUDIO
    assert {name for name, service in SERVICES.items() if "ipv4_address" in str(service)} == {"nginx"}
    (alias,) = NGINX["networks"]["default"]["aliases"]
    assert alias == BACKEND["networks"]["default"]["aliases"][0]
    assert ip_address(NGINX["networks"]["default"]["ipv4_address"]) == BACKEND_ADDRESS


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


def test_redis_is_reached_by_those_who_queue_and_keeps_what_it_holds() -> None:
    """On a network of its own without a way out, with no port on the machine, and its file on a volume."""
    assert "ports" not in REDIS
    assert REDIS["networks"] == ["queue"]
    assert SCALED["networks"]["queue"] == {"internal": True}
    on_it = {name for name, service in SERVICES.items() if "queue" in service.get("networks", ())}
    assert on_it == {"redis", "backend", "worker"}
    assert REDIS["command"] == ["redis-server", "--save", "", "--appendonly", "yes"]
    assert REDIS["volumes"] == ["queue:/data"]
    assert set(SCALED["volumes"]) == {"label-studio", "state", "queue"}


def test_one_container_fills_the_new_volume_before_the_others_come() -> None:
    """Three that are made at once may all fill it, and fail; this one also brings in the default model, and ends."""
    assert SERVICES["backend"]["depends_on"]["store"] == {"condition": "service_completed_successfully"}
    assert STORE["volumes"] == [BACKEND["volumes"][0]]
    assert STORE["build"] == BACKEND["build"]
    assert STORE["command"] == ["python", "-m", "celestial_backend", "models"]
    assert "restart" not in STORE, "it would run again and again"


def test_no_container_has_rights_that_it_does_not_need() -> None:
    """No capabilities, no new privileges, nothing to write to but volumes and memory, and nobody is root."""
    for name in ("nginx", "redis", "store", *MANY):
        service = SERVICES[name]
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["read_only"] is True
        assert "privileged" not in service
    assert (NGINX["user"], REDIS["user"]) == ("nginx", "redis")


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
        assert set(read[name]["networks"]) == {"default", "queue"}
    assert read["nginx"]["networks"]["default"]["ipv4_address"] == str(BACKEND_ADDRESS)
