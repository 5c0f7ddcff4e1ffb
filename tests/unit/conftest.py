"""What holds for the tests of rooms: no process is started, and TensorFlow is not loaded; so they are quick."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

HEAVY = {"tensorflow", "keras"}


class _Refused:
    """A finder that refuses what is heavy."""

    @staticmethod
    def find_spec(name: str, *_: Any) -> None:
        if name.split(".")[0] in HEAVY:
            pytest.fail(f"a test of a room tried to load {name}; such a test belongs to tests/real")


@pytest.fixture(scope="session", autouse=True)
def nobody_to_trust(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No server of these tests speaks TLS, and each client of httpx would read Mozilla's list of authorities."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("SSL_CERT_FILE", raising=False)
        patch.setenv("SSL_CERT_DIR", str(tmp_path_factory.mktemp("authorities")))
        yield


@pytest.fixture(autouse=True)
def light(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails a test that starts a process or loads TensorFlow."""

    def refused(*args: Any, **_: Any) -> None:
        pytest.fail(f"a test of a room tried to start {args[1:2]}; such a test belongs to tests/real")

    monkeypatch.setattr(subprocess.Popen, "__init__", refused)
    monkeypatch.setattr(sys, "meta_path", [_Refused, *sys.meta_path])
