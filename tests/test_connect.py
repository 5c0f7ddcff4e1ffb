"""`connect`: from a folder of pictures to a labelling project, on a real Label Studio."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from backend_server import BODIES, REPOSITORY, Backends, BackendServer, label_config
from label_studio import LabelStudioServer, own_name

from celestial_backend.connect import FROM_MODEL
from celestial_backend.errors import ImageError, RequestError, StudioError
from celestial_backend.folders import Originals
from celestial_backend.labels import ChoiceMap
from celestial_backend.linking import config_for, create_project, find_project, register
from celestial_backend.renderer import render
from celestial_backend.settings import Settings
from celestial_backend.studio import Studio
from celestial_backend.uploads import NAME_LETTERS, pictures_of, upload_name

pytestmark = pytest.mark.timeout(300)


def studio_of(server: LabelStudioServer) -> Studio:
    return Studio(Settings(label_studio_url=server.url, label_studio_api_key=server.legacy_token))


@pytest.fixture
def backend(label_studio: LabelStudioServer, backends: Backends, model_store: Path) -> BackendServer:
    return backends(
        LABEL_STUDIO_URL=label_studio.url,
        LABEL_STUDIO_API_KEY=label_studio.legacy_token,
        CELESTIAL_LABEL_STUDIO_DATA=label_studio.data_folder,
        BENTOML_HOME=model_store,
    )


class Person:
    """Somebody at a shell, with the settings of the backend."""

    def __init__(self, studio: LabelStudioServer, store: Path) -> None:
        self.environ = os.environ | {
            "LABEL_STUDIO_URL": studio.url,
            "LABEL_STUDIO_API_KEY": studio.legacy_token,
            "BENTOML_HOME": str(store),
        }

    def run(self, *arguments: str | Path, **more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "celestial_backend", "connect", *map(str, arguments)]
        return subprocess.run(
            command, cwd=REPOSITORY, env=self.environ | more, capture_output=True, text=True, timeout=240, check=False
        )

    def connect(self, *arguments: str | Path, **more: str) -> dict[str, Any]:
        done = self.run(*arguments, "--json", **more)
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout))


@pytest.fixture
def person(label_studio: LabelStudioServer, model_store: Path) -> Person:
    return Person(label_studio, model_store)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Thirty pictures of ten bodies in sub-folders, three names in all; and what is no picture."""
    place = tmp_path / "pictures"
    for body in BODIES:
        (place / body).mkdir(parents=True)
        for seed in range(3):
            render(body, 500 + seed, 64).save(place / body / f"ein Bild ü{seed}.png")
    (place / "notes.txt").write_text("not a picture")
    (place / ".hidden.png").write_bytes(b"")
    return place


def test_thirty_pictures_then_nothing_then_one(
    label_studio: LabelStudioServer, backend: BackendServer, person: Person, folder: Path
) -> None:
    """A second time makes nothing twice; a new picture is added; scores have what they need."""
    asked = (folder, "--title", "Thirty", "--backend-url", backend.url)
    first = person.connect(*asked)
    assert (first["new"], first["added"], first["already"]) == (True, 30, 0)
    assert first["link"] == f"{label_studio.url}/projects/{first['project']}/data"
    project = first["project"]
    names = [own_name(task["data"]["image"]) for task in label_studio.tasks(project)]
    assert len(set(names)) == 30

    again = person.connect(*asked)
    assert (again["new"], again["project"], again["added"], again["already"]) == (False, project, 0, 30)
    (folder / "Venus" / "deeper").mkdir()
    render("Venus", 511, 64).save(folder / "Venus" / "deeper" / "ein Bild ü0.png")
    (folder / "Venus" / "renamed.png").write_bytes((folder / "Earth" / "ein Bild ü0.png").read_bytes())
    later = person.connect(*asked)
    assert (later["added"], later["already"]) == (1, 31)
    assert len(label_studio.tasks(project)) == 31

    model = label_studio.model(project)
    assert model["title"] == model["model_version"] == backend.model_version == first["model_version"]
    assert first["model"] == again["model"] == model["id"]
    assert label_studio.api("GET", f"/api/projects/{project}")["model_version"] == model["model_version"]
    assert len(label_studio.webhooks(project)) == 1
    label_studio.retrieve(project)
    assert {prediction["model_version"] for prediction in label_studio.predictions(project)} == {model["title"]}
    assert len(label_studio.predictions(project)) == 31


def test_a_file_of_choices_is_used_or_refused(
    label_studio: LabelStudioServer, backend: BackendServer, person: Person, folder: Path
) -> None:
    """The file's label config is the project's; without a choice that the model knows, nothing is made."""
    file = folder.parent / "config.xml"
    file.write_text(label_config(["cat", "dog"]))
    refused = person.run(folder, "--title", "Cats", "--choices", file, "--backend-url", backend.url)
    assert refused.returncode == 1
    assert "cat" in refused.stderr
    assert "Earth" in refused.stderr
    assert find_project(studio_of(label_studio), "Cats") is None

    file.write_text(label_config(["Earth", "Moon"]))
    made = person.connect(folder / "Earth", "--title", "Two", "--choices", file, "--backend-url", backend.url)
    assert label_studio.api("GET", f"/api/projects/{made['project']}")["label_config"] == file.read_text()

    missing = person.run(folder, "--title", "Cats", "--choices", folder / "no.xml")
    assert missing.returncode == 1
    assert f"must be {FROM_MODEL} or a file" in missing.stderr


def test_two_projects_of_one_title_are_named(label_studio: LabelStudioServer, person: Person, folder: Path) -> None:
    """It cannot be known which one is meant, so nothing is done; a longer title is another one."""
    one, other = label_studio.create_project("Twins"), label_studio.create_project("Twins")
    label_studio.create_project("Twins and more")
    done = person.run(folder, "--title", "Twins")
    assert done.returncode == 4
    assert f"{one} and {other}" in done.stderr


def test_a_private_address_is_explained(label_studio: LabelStudioServer) -> None:
    """127.0.0.2 is as private as 127.0.0.1 usually is; the sentence holds what mends it."""
    project = label_studio.create_project("Private")
    with pytest.raises(StudioError, match=r"private address.*USE_DEFAULT_BANNED_SUBNETS=false and USER_ADDITIONAL"):
        register(studio_of(label_studio), project, "http://127.0.0.2:9090", "celestial")


def test_a_backend_that_is_away_is_told(label_studio: LabelStudioServer) -> None:
    """Label Studio's own words, without its HTML and without anything else of its answer."""
    project = label_studio.create_project("Away")
    with pytest.raises(StudioError, match="Can't connect to ML backend") as caught:
        register(studio_of(label_studio), project, "http://127.0.0.1:9", "celestial")
    assert "<" not in str(caught.value)
    assert "ookie" not in str(caught.value)


def test_a_password_reaches_the_record_and_the_webhook(
    label_studio: LabelStudioServer, backends: Backends, model_store: Path
) -> None:
    """A backend behind a password is connected, and hears of labels."""
    auth = {"BASIC_AUTH_USER": "studio", "BASIC_AUTH_PASS": "sécret"}
    backend = backends(BENTOML_HOME=model_store, **auth)
    project = label_studio.create_project("Behind a password")
    made = register(studio_of(label_studio), project, backend.url, "celestial", "studio", "sécret")
    assert made.version.startswith("celestial_bodies_classifier_model:")
    (task,) = label_studio.import_tasks(project, ["data:image/png;base64,"])
    label_studio.annotate(task, "Earth")
    backend.wait_for_log("POST /webhook 201")
    assert "POST /webhook 401" not in backend.log_text()
    for encoding, key in (("latin-1", "Authorization"), ("utf-8", "authorization")):  # the backend takes both
        header = {key: "Basic " + base64.b64encode("studio:sécret".encode(encoding)).decode(), "X-Own": "kept"}
        (hook,) = label_studio.webhooks(project)
        label_studio.api("PATCH", f"/api/webhooks/{hook['id']}/", json={"headers": header})
        assert not register(studio_of(label_studio), project, backend.url, "celestial", "studio", "sécret").new
        assert label_studio.webhooks(project)[0]["headers"] == header


def test_a_model_that_a_person_connected_gets_the_versions_name(
    label_studio: LabelStudioServer, backend: BackendServer
) -> None:
    """The title is the version afterwards, and there is still one model."""
    project = label_studio.create_project("By hand")
    label_studio.connect_backend(project, backend.url + "/", title="my model")
    made = register(studio_of(label_studio), project, backend.url, "celestial")
    assert not made.new
    assert made.notes == ()
    assert label_studio.model(project)["title"] == made.version == backend.model_version


def test_local_files_stay_where_they_are(
    label_studio: LabelStudioServer, backend: BackendServer, person: Person, folder: Path
) -> None:
    """The folder becomes a storage, once; one that is not below the root is refused."""
    root = label_studio.local_files_root
    asked = ("--title", "Local", "--local-files", "--backend-url", backend.url)
    outside = person.run(folder, *asked, LOCAL_FILES_DOCUMENT_ROOT=str(root))
    assert outside.returncode == 4
    assert "LOCAL_FILES_DOCUMENT_ROOT" in outside.stderr

    inside = root / "connected"
    (inside / "deep").mkdir(parents=True)
    for number, place in enumerate((inside, inside / "deep")):
        render("Mars", 520 + number, 64).save(place / "same.png")
    made = person.connect(inside, *asked, LOCAL_FILES_DOCUMENT_ROOT=str(root))
    assert made["added"] == 2
    render("Mars", 530, 64).save(inside / "new.PNG")
    assert person.connect(inside, *asked, LOCAL_FILES_DOCUMENT_ROOT=str(root))["added"] == 1
    values = {task["data"]["image"] for task in label_studio.tasks(made["project"])}
    names = ("same.png", "deep/same.png", "new.PNG")
    assert values == {f"{label_studio.url}/data/local-files/?d=connected/{name}" for name in names}


def test_a_long_name_does_not_hide_what_is_known(
    backend: BackendServer, person: Person, tmp_path: Path
) -> None:
    """Label Studio cuts long names; the digest is in front."""
    place = tmp_path / "long"
    place.mkdir()
    render("Pluto", 540, 64).save(place / ("ß" * NAME_LETTERS + "x" * 60 + ".a.b.png"))
    asked = (place, "--title", "Long names", "--backend-url", backend.url)
    assert person.connect(*asked)["added"] == 1
    assert person.connect(*asked)["added"] == 0


def test_an_upload_is_found_in_the_folder_of_originals(tmp_path: Path) -> None:
    """`CELESTIAL_DATA_FOLDER` finds what `connect` uploaded by the name that the file has there."""
    (tmp_path / "a").mkdir()
    for name in ("ein Bild.PNG", "0123456789abcdef-2.png"):
        (tmp_path / "a" / name).write_bytes(name.encode())
    originals = Originals(tmp_path, "CELESTIAL_DATA_FOLDER", 1)
    sent = upload_name(tmp_path / "a" / "ein Bild.PNG", "fedcba9876543210")
    assert originals.read(("1", f"0a1b2c3d-{sent.replace(' ', '_')}")) == b"ein Bild.PNG"
    assert originals.read(("1", "0a1b2c3d-0123456789abcdef-2.png")) == b"0123456789abcdef-2.png"


def test_a_folder_without_pictures_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="must hold pictures"):
        pictures_of(tmp_path)


@pytest.mark.parametrize("title", ["ab", "a" * 51], ids=["short", "long"])
def test_a_title_has_three_to_fifty_letters(title: str) -> None:
    """Label Studio takes no others, and its own sentence does not say so."""
    with pytest.raises(RequestError, match=r"must have 3 to 50 letters, got \d+"):
        create_project(Studio(Settings()), title, "")


def test_the_config_of_classes_has_a_choice_for_each() -> None:
    """Signs that XML uses itself come through."""
    classes = ("Earth", "a < \"b\" & 'c'")
    (control,) = ChoiceMap.from_config(config_for(classes), classes).controls
    assert control.choices == classes
