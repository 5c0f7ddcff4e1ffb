"""Settings: declared once, read once, refused with a sentence."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from celestial_backend.errors import SettingsError
from celestial_backend.settings import Settings


def test_an_empty_environment_gives_the_defaults() -> None:
    """Nothing has to be set; an empty variable counts as unset."""
    assert Settings.from_environ({}) == Settings()
    assert Settings.from_environ({"PORT": "", "LABEL_STUDIO_URL": "  "}) == Settings()


def test_every_variable_is_read(tmp_path: Path) -> None:
    """Each declared variable lands in its own field."""
    (tmp_path / "file").write_text("")
    given = {
        "LABEL_STUDIO_URL": ("http://ls:8080/sub/", "http://ls:8080/sub"),
        "LABEL_STUDIO_API_KEY": ("token", "token"),
        "MODEL_DIR": (str(tmp_path / "new"), tmp_path / "new"),
        "BENTOML_HOME": (str(tmp_path), tmp_path),
        "BASIC_AUTH_USER": ("u", "u"),
        "BASIC_AUTH_PASS": ("p", "p"),
        "CELESTIAL_HOSTS": ("ML.example.com., b.example", ("ml.example.com", "b.example")),
        "LOG_LEVEL": ("debug", "DEBUG"),
        "PORT": ("1234", 1234),
        "WORKERS": ("3", 3),
        "THREADS": ("4", 4),
        "CELESTIAL_MODEL": ("name:1", "name:1"),
        "CELESTIAL_BENTOMODEL": (str(tmp_path / "file"), tmp_path / "file"),
        "CELESTIAL_DATA_FOLDER": (str(tmp_path), tmp_path),
        "CELESTIAL_LABEL_STUDIO_DATA": (str(tmp_path), tmp_path),
        "LOCAL_FILES_DOCUMENT_ROOT": (str(tmp_path), tmp_path),
        "CELESTIAL_ALLOWED_HOSTS": ("Minio, 10.0.0.0/8 ,::1", ("minio", "10.0.0.0/8", "::1")),
        "CELESTIAL_IMAGE_TIMEOUT_S": ("2.5", 2.5),
        "CELESTIAL_IMAGE_MAX_MB": ("1", 1.0),
        "CELESTIAL_IMAGE_MAX_MEGAPIXELS": ("9", 9.0),
        "CELESTIAL_FETCH_THREADS": ("2", 2),
        "CELESTIAL_PREDICT_MAX_S": ("30", 30.0),
        "CELESTIAL_REQUEST_MAX_MB": ("5", 5.0),
        "CELESTIAL_BATCH_SIZE": ("16", 16),
        "REDIS_URL": ("redis://:secret@redis:6379/2", "redis://:secret@redis:6379/2"),
        "CELESTIAL_TRAIN_EVERY": ("50", 50),
        "CELESTIAL_TRAIN_MAX_S": ("600", 600.0),
        "CELESTIAL_ACCEPTED_WEIGHT": ("0.5", 0.5),
        "CELESTIAL_KEEP_MODELS": ("2", 2),
    }
    settings = Settings.from_environ({name: text for name, (text, _) in given.items()})
    declared = {one.metadata["variable"]: one.name for one in fields(Settings)}
    assert given.keys() == declared.keys()
    assert {name: getattr(settings, declared[name]) for name in given} == {name: v for name, (_, v) in given.items()}


@pytest.mark.parametrize(
    ("variable", "text", "rule"),
    [
        ("LABEL_STUDIO_URL", "localhost:8080", "must be an address that starts with http:// or https://"),
        ("LABEL_STUDIO_URL", "http://", "must be an address that starts with"),
        ("LOG_LEVEL", "LOUD", "must be one of DEBUG, INFO, WARNING, ERROR"),
        ("PORT", "0", "must be a port number from 1 to 65535"),
        ("PORT", "http", "must be a port number"),
        ("WORKERS", "0", "must be a whole number of 1 or more"),
        ("THREADS", "1.5", "must be a whole number of 1 or more"),
        ("CELESTIAL_IMAGE_TIMEOUT_S", "0", "must be a number above 0"),
        ("CELESTIAL_IMAGE_MAX_MB", "nan", "must be a number above 0"),
        ("CELESTIAL_IMAGE_MAX_MB", "inf", "must be a number above 0"),
        ("CELESTIAL_DATA_FOLDER", "/nowhere/at/all", "must name a folder that exists"),
        ("CELESTIAL_BENTOMODEL", "/nowhere/at/all", "must name a file that exists"),
        ("CELESTIAL_ALLOWED_HOSTS", "http://minio", "without http://"),
        ("CELESTIAL_ALLOWED_HOSTS", "10.0.0.0/99", "10.0.0.0/99"),
        ("CELESTIAL_HOSTS", "https://ml.example.com", "without http://"),
        ("CELESTIAL_HOSTS", "*.example.com", "port and stars"),
        ("CELESTIAL_ACCEPTED_WEIGHT", "1.1", "must be a number from 0 to 1"),
        ("CELESTIAL_ACCEPTED_WEIGHT", "half", "must be a number from 0 to 1"),
        ("CELESTIAL_TRAIN_EVERY", "0", "must be a whole number of 1 or more"),
    ],
)
def test_a_bad_value_is_refused_with_its_rule(variable: str, text: str, rule: str) -> None:
    """The sentence names the variable, the rule and the value seen."""
    with pytest.raises(SettingsError) as refused:
        Settings.from_environ({variable: text})
    assert str(refused.value).startswith(variable)
    assert rule in str(refused.value)
    assert repr(text) in str(refused.value)


def test_all_problems_are_told_at_once() -> None:
    """An operator mends everything in one go."""
    with pytest.raises(SettingsError, match=re.compile("PORT.*WORKERS.*CELESTIAL_TYPO is not a setting")):
        Settings.from_environ({"PORT": "x", "WORKERS": "x", "CELESTIAL_TYPO": "1"})


def test_half_of_a_credential_is_refused() -> None:
    """A user name without a password would leave the backend open."""
    for name in ("BASIC_AUTH_USER", "BASIC_AUTH_PASS"):
        with pytest.raises(SettingsError, match="must be set together"):
            Settings.from_environ({name: "x"})


def test_an_address_of_redis_is_refused_without_its_password() -> None:
    """The rule is told, the value is not."""
    with pytest.raises(SettingsError, match="REDIS_URL must be an address that starts with redis://") as refused:
        Settings.from_environ({"REDIS_URL": "http://:s3cret@redis"})
    assert "s3cret" not in str(refused.value)


def test_secrets_are_not_shown() -> None:
    """Neither the settings' text nor a refusal holds a secret."""
    text = repr(Settings(label_studio_api_key="s3cret", basic_auth_user="u", basic_auth_pass="s3cret"))
    assert "s3cret" not in text
