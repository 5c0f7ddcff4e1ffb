"""Settings: declared once, read once, refused with a sentence."""

from __future__ import annotations

import contextlib
import re
from dataclasses import fields, replace
from pathlib import Path

import pytest

from celestial_backend import settings
from celestial_backend.errors import SettingsError
from celestial_backend.settings import (
    MODEL_NAME,
    NEVER,
    OFF,
    ON,
    Settings,
    is_project,
    no_project,
    project_of,
    project_tag,
    state_note,
)


def test_an_empty_environment_gives_the_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing has to be set; an empty variable counts as unset."""
    monkeypatch.setattr("celestial_backend.settings._connection", lambda _: {})  # `connect` may have been given a token
    assert Settings.from_environ({}) == Settings()
    assert Settings.from_environ({"PORT": "", "LABEL_STUDIO_URL": "  "}) == Settings()


@pytest.mark.parametrize(
    ("set_too", "used"),
    [
        pytest.param({}, ("http://ls:8080", "given"), id="nothing is set"),
        pytest.param({"LABEL_STUDIO_URL": "http://ls:8080/"}, ("http://ls:8080", "given"), id="the same address"),
        pytest.param({"LABEL_STUDIO_URL": "http://other"}, ("http://other", None), id="another Label Studio"),
        pytest.param({"LABEL_STUDIO_API_KEY": "mine"}, (None, "mine"), id="a token of its own"),
    ],
)
def test_a_token_that_was_given_stands_in_for_the_variables(
    tmp_path: Path, set_too: dict[str, str], used: tuple[str | None, str | None]
) -> None:
    """It is sent to no other Label Studio than the one that it was given for; a file that is none is nothing."""
    file = tmp_path / "label-studio.json"
    file.write_text('{"url": "http://ls:8080", "token": "given"}')
    settings = Settings.from_environ({"MODEL_DIR": str(tmp_path)} | set_too)
    assert (settings.label_studio_url, settings.label_studio_api_key) == used
    for text in ("", "[]", '{"url": 1}', '{"url": "no address", "token": "given"}'):
        file.write_text(text)
        assert Settings.from_environ({"MODEL_DIR": str(tmp_path)}).label_studio_api_key is None


def test_another_token_changes_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server may have got settings as arguments, beside variables that alone are none."""
    monkeypatch.setenv("BASIC_AUTH_PASS", "secret")
    started = Settings.from_environ({"MODEL_DIR": str(tmp_path), "BASIC_AUTH_USER": "me", "BASIC_AUTH_PASS": "secret"})
    (tmp_path / "label-studio.json").write_text('{"url": "http://ls:8080", "token": "given"}')
    told = {"label_studio_url": "http://ls:8080", "label_studio_api_key": "given"}
    assert started.reconnected() == replace(started, **told)
    monkeypatch.setenv("LABEL_STUDIO_API_KEY", "mine")
    assert started.reconnected().label_studio_api_key == "mine"


@pytest.mark.parametrize("password", ["p[ss", "p/ss", "p?ss", "p#ss", ""])
def test_no_digest_is_made_of_a_password(password: str) -> None:
    """Whatever signs it has; two that differ in it alone are the same."""
    one, other = (
        Settings.from_environ({"CELESTIAL_DATABASE_URL": f"postgresql://studio:{each}@db:5432/studio"}).digests("x")
        for each in (password, "another")
    )
    assert one == other
    elsewhere = Settings.from_environ({"CELESTIAL_DATABASE_URL": f"postgresql://studio:{password}@db:5432/other"})
    assert one != elsewhere.digests("x")


def test_every_variable_is_read(tmp_path: Path) -> None:
    """Each declared variable lands in its own field."""
    (tmp_path / "file").write_text("")
    given = {
        "LABEL_STUDIO_URL": ("http://ls:8080/sub/", "http://ls:8080/sub"),
        "LABEL_STUDIO_HOST": ("https://labels.example.com/sub/", "https://labels.example.com/sub"),
        "LABEL_STUDIO_API_KEY": ("token", "token"),
        "MODEL_DIR": (str(tmp_path / "new"), tmp_path / "new"),
        "BENTOML_HOME": (str(tmp_path), tmp_path),
        "BASIC_AUTH_USER": ("u", "u"),
        "BASIC_AUTH_PASS": ("p", "p"),
        "CELESTIAL_HOSTS": ("ML.example.com., b.example", ("ml.example.com", "b.example")),
        "CELESTIAL_BACKEND_URL": ("http://ml-backend.internal:9090/", "http://ml-backend.internal:9090"),
        "LOG_LEVEL": ("debug", "DEBUG"),
        "LOG_FORMAT": ("JSON", "json"),
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
        "CELESTIAL_DATABASE_URL": ("postgresql://me:secret@there/it", "postgresql+psycopg://me:secret@there/it"),
        "CELESTIAL_TRAIN_EVERY": ("50", 50),
        "CELESTIAL_UNKNOWN": ("Label", "label"),
        "CELESTIAL_SCORE": ("Typical", "typical"),
        "CELESTIAL_CONTROL_SHARE": ("0.1", 0.1),
        "CELESTIAL_PLANTED_SHARE": ("0.05", 0.05),
        "CELESTIAL_TRAIN_MAX_S": ("600", 600.0),
        "CELESTIAL_ACCEPTED_WEIGHT": ("0.5", 0.5),
        "CELESTIAL_KEEP_MODELS": ("2", 2),
        "CELESTIAL_KEEP_PREDICTIONS": ("yes", True),
        "CELESTIAL_EMBEDDER": ("name:1", "name:1"),
        "CELESTIAL_CACHE_DIR": (str(tmp_path / "new"), tmp_path / "new"),
        "CELESTIAL_CACHE_MAX_MB": ("5", 5.0),
    }
    settings = Settings.from_environ({name: text for name, (text, _) in given.items()})
    declared = {one.metadata["variable"]: one.name for one in fields(Settings)}
    assert given.keys() == declared.keys()
    assert {name: getattr(settings, declared[name]) for name in given} == {name: v for name, (_, v) in given.items()}


@pytest.mark.parametrize(
    ("variable", "text", "rule"),
    [
        ("LABEL_STUDIO_URL", "localhost:8080", "must be an address that starts with http:// or https://"),
        ("LABEL_STUDIO_URL", "localhost:8080/projects/3", "such as http://localhost:8080"),
        ("LABEL_STUDIO_URL", "http:/localhost", "such as http://localhost"),
        ("LABEL_STUDIO_URL", "http://", "must be an address that starts with"),
        ("LABEL_STUDIO_URL", "http://localhost:port", "must be an address that starts with"),
        ("LABEL_STUDIO_HOST", "ftp://labels.example.com", "must be an address that starts with"),
        ("CELESTIAL_BACKEND_URL", "localhost:9090", "such as http://localhost:9090"),
        ("LOG_LEVEL", "LOUD", "must be one of DEBUG, INFO, WARNING, ERROR"),
        ("LOG_FORMAT", "xml", "must be one of text, json"),
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
        ("CELESTIAL_UNKNOWN", "drop", "must be withhold or label"),
        ("CELESTIAL_SCORE", "entropy", "must be one of confidence, margin, typical"),
        ("CELESTIAL_CONTROL_SHARE", "10%", "must be a number from 0 to 1"),
        ("CELESTIAL_PLANTED_SHARE", "-1", "must be a number from 0 to 1"),
        ("CELESTIAL_TRAIN_EVERY", "0", "must be a whole number of 1 or more, or off"),
        ("CELESTIAL_TRAIN_EVERY", "never", "must be a whole number of 1 or more, or off"),
        ("CELESTIAL_KEEP_PREDICTIONS", "maybe", "must be one of on, true, 1, yes, off, false, 0, no"),
    ],
)
def test_a_bad_value_is_refused_with_its_rule(variable: str, text: str, rule: str) -> None:
    """The sentence names the variable, the rule and the value seen."""
    with pytest.raises(SettingsError) as refused:
        Settings.from_environ({variable: text})
    assert str(refused.value).startswith(variable)
    assert rule in str(refused.value)
    assert repr(text) in str(refused.value)


@pytest.mark.parametrize("variable", ["LABEL_STUDIO_URL", "LABEL_STUDIO_HOST"])
@pytest.mark.parametrize("place", ["http://localhost:8080", "https://host", "https://host/label-studio", "http://h/a/b"])
@pytest.mark.parametrize(
    "page",
    [
        "", "/", "//", "/projects", "/projects/", "/projects/3", "/projects/3/data?tab=5", "/projects/3/settings",
        "/projects/3/data/import#top", "/user/login",
        "/user/login/?next=/projects/", "/user/account/personal-access-token",
        "/organization/", "/organization/webhooks", "/models", "/data/upload/3/a.png", "/data/local-files/?d=a.png",
        "/tasks/3/resolve/?fileuri=a", "/api/projects/3/", "/api", "/docs/api", "/health", "?tab=5",
    ],
)  # fmt: skip
def test_a_page_of_label_studio_stands_for_label_studio(variable: str, place: str, page: str) -> None:
    """What a browser shows can be pasted; the folder that Label Studio is installed under stays."""
    assert getattr(Settings.from_environ({variable: place + page}), variable.lower()) == place


@pytest.mark.parametrize(
    "path", ["/projects/label-studio", "/api/label-studio", "/user", "/apis", "/tasks", "/label-studio-projects"]
)
def test_a_folder_that_only_looks_like_a_page_stays(path: str) -> None:
    """Label Studio can be installed under any path."""
    assert Settings.from_environ({"LABEL_STUDIO_URL": f"https://host{path}/"}).label_studio_url == f"https://host{path}"


@pytest.mark.parametrize(
    "page", ["", "/", "/health", "/setup", "/docs", "/doctor", "/metrics", "/predict/", "/docs?x=1#top"]
)
@pytest.mark.parametrize("place", ["http://127.0.0.1:9090", "https://host/ml"])
def test_a_page_of_the_backend_stands_for_the_backend(place: str, page: str) -> None:
    """Also under a path of a proxy."""
    assert Settings.from_environ({"CELESTIAL_BACKEND_URL": place + page}).address == place


@pytest.mark.parametrize(
    "pasted",
    ["{}", '"{}"', "'{}'", "“{}”", "Token {}", "token  {}", "Bearer {}", "Authorization: Token {}", '"Bearer {}"',
     "{}\n", "\n{}\r\n", "Token '{}'"],
)  # fmt: skip
@pytest.mark.parametrize("token", ["0123456789abcdef0123456789abcdef01234567", "eyJhbGciOi.eyJ0b2tlb.s-_gnature"])
def test_a_token_may_be_pasted_with_what_stands_around_it(pasted: str, token: str) -> None:
    """Quotes of an .env file, the header of an example, the line's end; and a line break inside, as a mail has it."""
    for text in (pasted.format(token), pasted.format(f"{token[:20]}\r\n  {token[20:]}")):
        assert Settings.from_environ({"LABEL_STUDIO_API_KEY": text}).label_studio_api_key == token


def test_addresses_may_be_pasted_in_quotes() -> None:
    """As `docker run --env-file` leaves them."""
    quoted = {"LABEL_STUDIO_URL": '"http://ls:8080"', "LABEL_STUDIO_HOST": "'http://l.example'"}
    read = Settings.from_environ(quoted)
    assert (read.label_studio_url, read.label_studio_host) == ("http://ls:8080", "http://l.example")


def test_where_people_and_label_studio_go_is_known_without_a_setting() -> None:
    """People open Label Studio where the backend finds it, and the backend is on this machine."""
    alone = Settings.from_environ({"LABEL_STUDIO_URL": "http://ls:8080", "PORT": "9191"})
    assert (alone.studio_link, alone.address) == ("http://ls:8080", "http://127.0.0.1:9191")
    told = {"LABEL_STUDIO_HOST": "http://localhost:8080", "CELESTIAL_BACKEND_URL": "http://ml-backend.internal:9090"}
    read = Settings.from_environ({"LABEL_STUDIO_URL": "http://ls:8080"} | told)
    assert (read.studio_link, read.address) == tuple(told.values())
    guarded = Settings.from_environ({"LABEL_STUDIO_URL": "http://ada:s3cret@ls:8080"})
    assert guarded.studio_link == "http://ls:8080", "links are printed"
    assert Settings.from_environ({}).studio_link is None


@pytest.mark.parametrize(("text", "read"), [*((text, True) for text in ON), *((text, False) for text in OFF)])
def test_a_switch_is_on_or_off(text: str, read: bool) -> None:
    """Only the words of two lists, however they are spelled."""
    for spelled in (text, text.upper(), text.title()):
        assert Settings.from_environ({"CELESTIAL_KEEP_PREDICTIONS": spelled}).keep_predictions is read


def test_training_by_itself_can_be_switched_off() -> None:
    """Which is another thing than to leave it unset."""
    assert Settings.from_environ({}).train_every is None
    assert Settings.from_environ({"CELESTIAL_TRAIN_EVERY": "Off"}).train_every == NEVER


def test_all_problems_are_told_at_once() -> None:
    """An operator fixes everything in one go."""
    with pytest.raises(SettingsError, match=re.compile("PORT.*WORKERS.*CELESTIAL_TYPO is not a setting")):
        Settings.from_environ({"PORT": "x", "WORKERS": "x", "CELESTIAL_TYPO": "1"})


def test_half_of_a_credential_is_refused() -> None:
    """A user name without a password would leave the backend open."""
    for name in ("BASIC_AUTH_USER", "BASIC_AUTH_PASS"):
        with pytest.raises(SettingsError, match="must be set together"):
            Settings.from_environ({name: "x"})


def test_an_address_of_a_database_is_refused_without_its_password() -> None:
    """The rule is told, the value is not."""
    with pytest.raises(SettingsError, match="CELESTIAL_DATABASE_URL must be an address that starts with") as refused:
        Settings.from_environ({"CELESTIAL_DATABASE_URL": "http://:s3cret@there"})
    assert "s3cret" not in str(refused.value)


def test_the_address_of_a_database_is_not_shown() -> None:
    """It holds a password, and settings may be printed."""
    assert "s3cret" not in repr(Settings.from_environ({"CELESTIAL_DATABASE_URL": "postgresql://me:s3cret@there/it"}))


@pytest.mark.parametrize(
    ("address", "taken"),
    [
        ("postgresql://me:s3%40%2F%3A%25cret@there:5432/it", True),
        ("postgresql+psycopg://me:s3/c%ret@[::1]:5432/it?sslmode=require", True),
        ("postgresql:///it?host=/run/postgresql", True),
        ("postgresql://%2Frun%2Fpostgresql/it", True),
        ("postgresql://me:s3c@ret@there/it", False),
        ("postgresql://me:s3c@r:et@there/it", False),
        ("postgresql://one:5432,two:5432/it", False),
        ("postgresql://me:s3cret@there:port/it", False),
        ("sqlite:///?s3cret", False),
    ],
)
def test_an_address_of_a_database_that_cannot_be_read_is_refused_at_once(address: str, taken: bool) -> None:
    """Not where it is used first, with a traceback that shows a part of the password; the remedy is told."""
    with contextlib.nullcontext() if taken else pytest.raises(SettingsError, match=r"%40 for an @|path of a file"):
        assert Settings.from_environ({"CELESTIAL_DATABASE_URL": address}).database_url



def test_secrets_are_not_shown() -> None:
    """Neither the settings' text nor a refusal holds a secret."""
    text = repr(Settings(label_studio_api_key="s3cret", basic_auth_user="u", basic_auth_pass="s3cret"))
    assert "s3cret" not in text


# The number of a project, and what the tags of models say of theirs

STRANGE = ["", "0", "0007", "-1", "+7", " 7", "7 ", "7\n", "7.0", "1_000", "x", "٣", "१२", "7²", str(2**63), "9" * 20,
           "1" * 4301, None, 7, 7.0, b"7", ["7"]]  # fmt: skip


@pytest.mark.parametrize("text", ["1", "7", "10", "9876543210", str(2**63 - 1)])
def test_a_number_of_label_studio_is_one(text: str) -> None:
    """Every number that a database can give to a project."""
    assert is_project(text)


@pytest.mark.parametrize("text", STRANGE, ids=lambda text: repr(text)[:20])
def test_anything_else_is_none(text: object) -> None:
    """Also what Python's int() would take, so that a project never has two names."""
    assert not is_project(text)


def test_two_million_digits_are_refused() -> None:
    """The length is looked at before the number; int() refuses more than 4,300 digits with an error of its own."""
    assert not is_project("1" * 2_000_000)
    assert len(no_project("1" * 2_000_000)) < 300


@pytest.mark.parametrize("version", ["project-7-0badcafe", "project-0007-0badcafe"])
def test_no_models_of_a_project_are_for_all(version: str) -> None:
    """Also those that an older release has trained under a text that is no number."""
    assert project_of(f"{MODEL_NAME}:{version}") == version.split("-")[1]
    assert project_of(project_tag("7", "0badcafe")) == "7"
    assert project_of(f"{MODEL_NAME}:default-0badcafe") is None


def test_state_is_in_one_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever folder a program is started in: in the clone beside `_wsgi.py`; of a package, with the user's data."""
    monkeypatch.chdir(tmp_path)
    clone = Path(settings.__file__).parents[1]
    assert Settings.from_environ({}).model_dir == clone / "data"
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "share"))
    monkeypatch.setattr(settings, "__file__", str(tmp_path / "lib" / "celestial_backend" / "settings.py"))
    assert settings._place() == tmp_path / "share" / "celestial-backend"
    assert state_note({}) == ""


@pytest.mark.parametrize("left", ["celestial.db", "jobs.db"])
def test_state_that_an_earlier_release_has_left_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: str
) -> None:
    """It was in `data` below the folder of the start; that is said, unless MODEL_DIR names a folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    assert Settings.from_environ({}).model_dir == settings.PLACE, "a folder of somebody else's data"
    (tmp_path / "data" / left).touch()
    (tmp_path / "share").mkdir()
    (tmp_path / "share" / "celestial.db").touch()
    monkeypatch.setattr(settings, "PLACE", tmp_path / "share")
    assert Settings.from_environ({}).model_dir == tmp_path / "data"
    assert state_note({}).startswith(f"The state folder is {tmp_path / 'data'}, as in earlier releases, and ")
    assert state_note({"MODEL_DIR": "elsewhere"}) == ""


def test_a_clone_keeps_its_own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another one in the folder of the start was begun there by mistake; it is named and not used."""
    for name in ("here", "clone"):
        (tmp_path / name / "data").mkdir(parents=True)
        (tmp_path / name / "data" / "celestial.db").touch()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(settings, "PLACE", tmp_path / "clone" / "data")
    assert Settings.from_environ({}).model_dir == tmp_path / "clone" / "data"
    here = tmp_path / "here" / "data"
    assert state_note({}).endswith(f"; there is one in {here} too, which MODEL_DIR={here} uses.")
