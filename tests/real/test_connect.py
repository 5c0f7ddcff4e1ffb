"""`connect`: from a folder of pictures to a labelling project, on a real Label Studio."""

from __future__ import annotations

import base64
import json
import os
import pty
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from celestial_backend.commands.connect import FROM_MODEL, clean, folder_labels, outlook
from celestial_backend.errors import ImageError, RequestError, StudioError
from celestial_backend.labels import ChoiceMap
from celestial_backend.pictures.folders import Originals
from celestial_backend.planets.renderer import render
from celestial_backend.settings import MODEL_NAME, NEEDS_LABELS, NEVER, Settings
from celestial_backend.studio import setup
from celestial_backend.studio.client import Studio
from celestial_backend.studio.setup import (
    NAME_LETTERS,
    FolderLabels,
    Imported,
    config_for,
    create_project,
    find_project,
    pictures_of,
    register,
    upload,
    upload_name,
)
from tests.support.backend_server import BODIES, REPOSITORY, Backends, BackendServer, label_config
from tests.support.label_studio import LabelStudioServer, own_name

pytestmark = pytest.mark.timeout(300)


CONTROL = ChoiceMap.for_learning(
    '<View><Image name="image" value="$image"/><Choices name="choice" toName="image"><Choice value="a"/></Choices>'
    "</View>"
).controls[0]


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

    def run(
        self, *arguments: str | Path, stdin: int = subprocess.DEVNULL, **more: str
    ) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "celestial_backend", "connect", *map(str, arguments)]
        return subprocess.run(
            command, cwd=REPOSITORY, env=self.environ | more, stdin=stdin, capture_output=True, text=True, timeout=240,
            check=False,
        )  # fmt: skip

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


def choices_of(config: str) -> tuple[str, ...]:
    (control,) = ChoiceMap.for_learning(config).controls
    return control.choices


def labels_of(label_studio: LabelStudioServer, project: int) -> dict[str, list[str]]:
    """The choices of each task's annotations, by the own name of the file that it shows."""
    return {
        task["data"]["image"].rsplit("-", 1)[-1].rsplit("/", 1)[-1]: [
            choice for each in task["annotations"] for region in each["result"] for choice in region["value"]["choices"]
        ]
        for task in label_studio.tasks(project)
    }


def test_thirty_pictures_then_nothing_then_one(
    label_studio: LabelStudioServer, backend: BackendServer, person: Person, folder: Path
) -> None:
    """A second time makes nothing twice; a new picture is added; scores have what they need."""
    asked = (folder, "--title", "Thirty", "--backend-url", backend.url)
    settings = {"CELESTIAL_BACKEND_URL": f"{backend.url}/health", "LABEL_STUDIO_HOST": f"{label_studio.url}/projects/"}
    first = person.connect(*asked[:3], **settings)
    assert (first["new"], first["added"], first["already"]) == (True, 30, 0)
    assert first["link"] == f"{label_studio.url}/projects/{first['project']}/data"
    project = first["project"]
    names = [own_name(task["data"]["image"]) for task in label_studio.tasks(project)]
    assert len(set(names)) == 30
    assert choices_of(label_studio.api("GET", f"/api/projects/{project}")["label_config"]) == BODIES
    assert first["labelled"] == 0
    assert label_studio.annotations(project) == []

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
    assert label_studio.api("GET", f"/api/ml/{model['id']}/versions") == {"versions": [model["model_version"]]}
    assert len(label_studio.webhooks(project)) == 1
    label_studio.retrieve(project)
    assert {prediction["model_version"] for prediction in label_studio.predictions(project)} == {model["title"]}
    assert len(label_studio.predictions(project)) == 31


def test_a_token_that_is_given_once_reaches_all(
    label_studio: LabelStudioServer, backends: Backends, person: Person, folder: Path
) -> None:
    """
    Asked for at a terminal and never shown, it is used by the running backend and its worker, and by other commands.

    One that Label Studio does not know is not kept.
    """
    settings = {"LABEL_STUDIO_URL": label_studio.url, "BENTOML_HOME": person.environ["BENTOML_HOME"]}
    backend = backends(**settings)
    person.environ |= {"LABEL_STUDIO_API_KEY": "", "MODEL_DIR": str(backend.state), "PORT": str(backend.port)}
    kept = backend.state / "label-studio.json"

    refused = typed(person, "0" * 40, folder, "--choices", FROM_MODEL)
    assert refused.returncode != 0
    assert "401" in refused.stderr
    assert not kept.exists()

    done = typed(person, label_studio.personal_access_token, folder, "--choices", FROM_MODEL)
    assert done.returncode == 0, done.stderr
    assert f"{label_studio.url}/user/account" in done.stderr
    assert label_studio.personal_access_token not in done.stdout + done.stderr + backend.log_text()
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    project = find_project(studio_of(label_studio), folder.name)
    assert project is not None
    assert len(label_studio.api("GET", f"/api/projects/{project}/next")["predictions"]) == 1
    assert person.run(folder, "--json").returncode == 0, "nobody is asked a second time"
    backend.wait_for_log("as it was given another token")

    kept.unlink()
    assert person.run("--new-token").returncode != 0, "there is nobody to ask"
    assert typed(person, "0" * 40, "--new-token").returncode != 0
    assert not kept.exists()
    alone = typed(person, label_studio.personal_access_token, "--new-token")
    assert "accepts the token" in alone.stdout, alone.stderr
    assert kept.exists()


def typed(person: Person, token: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The command at a terminal, where a person pastes a token once it is asked for."""
    own, theirs = pty.openpty()
    command = [sys.executable, "-m", "celestial_backend", "connect", *map(str, arguments)]
    with subprocess.Popen(
        command, cwd=REPOSITORY, env=person.environ, stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, start_new_session=True,
    ) as process:  # fmt: skip
        assert process.stderr is not None
        said = ""
        while not said.endswith("not shown: "):
            more = process.stderr.read(1)
            assert more, said
            said += more
        os.write(own, f"{token}\n".encode())
        shown, rest = process.communicate(timeout=240)
    os.close(own)
    os.close(theirs)
    return subprocess.CompletedProcess(command, process.returncode, shown, said + rest)


def test_choices_that_the_model_does_not_know_can_be_connected(
    label_studio: LabelStudioServer, backend: BackendServer, person: Person, folder: Path
) -> None:
    """Model and project carry the version that says so, until a training gives another one; a file is used as it is."""
    file = folder.parent / "config.XML"
    file.write_text(label_config(["cat", "dog"]))
    asked = (folder / "Earth", "--title", "Cats", "--choices", file, "--backend-url", backend.url)
    done = person.run(*asked)
    assert done.returncode == 0, done.stderr
    assert "the first pre-labels come after 2 of them have 3 labels each" in done.stderr
    project = find_project(studio_of(label_studio), "Cats")
    told = label_studio.api("GET", f"/api/projects/{project}")
    assert told["label_config"] == file.read_text()
    model = label_studio.model(project or 0)
    assert told["model_version"] == model["title"] == model["model_version"] == NEEDS_LABELS
    again = person.run(folder / "Earth", "--title", "Cats", "--choices", "x,y", "--backend-url", backend.url)
    assert "keeps its own label config" in again.stderr


def test_a_file_that_cannot_be_used_is_refused(
    label_studio: LabelStudioServer, person: Person, folder: Path
) -> None:
    """What looks like a file is no choice; a label config that nothing can be predicted for makes no project."""
    missing = person.run(folder, "--title", "Texts", "--choices", folder / "no.xml")
    assert missing.returncode == 1
    assert f"--choices {folder / 'no.xml'} must be a file with a label config, and it cannot be read" in missing.stderr
    file = folder.parent / "config.xml"
    file.write_text('<View><Image name="i" value="$i"/><TextArea name="t" toName="i"/></View>')
    refused = person.run(folder, "--title", "Texts", "--choices", file)
    assert refused.returncode == 1
    assert "no Choices on an Image" in refused.stderr
    assert find_project(studio_of(label_studio), "Texts") is None


def test_choices_are_asked_for_where_nothing_names_them(
    label_studio: LabelStudioServer, backend: BackendServer, person: Person, folder: Path
) -> None:
    """At a terminal; elsewhere it says what to give. Planets are for those who ask for them."""
    (folder / "Earth" / "deep").mkdir()
    asked = (folder / "Earth", "--title", "Asked", "--backend-url", backend.url)
    refused = person.run(*asked)
    assert refused.returncode == 1
    for remedy in ("no sub-folder is named after", "--choices a,b,c", f"--choices {FROM_MODEL}", "celestial bodies"):
        assert remedy in refused.stderr
    assert find_project(studio_of(label_studio), "Asked") is None

    ours, theirs = pty.openpty()
    os.write(ours, ' Ä "1" , <b>&amp;, 土星,, 土星\n'.encode())
    answered = person.run(*asked, "--json", stdin=theirs)
    os.close(ours)
    os.close(theirs)
    assert answered.returncode == 0, answered.stderr
    assert "Choices, separated by commas" in answered.stderr
    made = label_studio.api("GET", f"/api/projects/{json.loads(answered.stdout)['project']}")
    assert choices_of(made["label_config"]) == ('Ä "1"', "<b>&amp;", "土星")

    given = person.connect(
        folder / "Earth", "--title", "Planets", "--choices", FROM_MODEL, "--backend-url", backend.url
    )
    assert choices_of(label_studio.api("GET", f"/api/projects/{given['project']}")["label_config"]) == BODIES


@pytest.mark.parametrize(
    ("names", "kept"),
    [
        pytest.param([" cat", "dog ", "", "cat"], ["cat", "dog"], id="blanks and doubles"),
        pytest.param(["T\tshirt", "T  shirt", "a,b"], ["T shirt", "a,b"], id="blanks inside"),
        pytest.param(["u\u0308ber", "über", "unter"], ["über", "unter"], id="two spellings of an umlaut"),
        pytest.param(["\U0001f469\u200d\U0001f680", "نیم\u200cفاصله"], None, id="joiners"),
    ],
)
def test_names_of_choices_are_cleaned(names: list[str], kept: list[str] | None) -> None:
    assert clean(names, "") == (kept or names)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        pytest.param(["cat", " cat", ""], r"at least two different choices, and those are \['cat'\]", id="one"),
        pytest.param(["cat\x01", "dog"], r"letters that XML can hold, and \['cat\\x01'\] has others", id="no XML"),
        pytest.param(["\udcff", "dog"], "letters that XML can hold", id="a folder with bytes that are no letters"),
    ],
)
def test_names_that_are_no_choices_are_refused(names: list[str], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        clean(names, "those are")


@pytest.fixture
def sorted_folder(tmp_path: Path) -> Path:
    """Pictures of cats and dogs in their sub-folders; of mice, beside them, twice the same one, and one beside all."""
    place = tmp_path / "sorted"
    for number, name in enumerate(("Cat/c1", "Cat/c2", "dog/d1", "dog/deep/d2", "mouse/m1", "Cat/x1", "loose1")):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        render("Mars", 600 + number, 32).save(place / f"{name}.png")
    (place / "dog" / "x2.png").write_bytes((place / "Cat" / "x1.png").read_bytes())
    (place / "c3.png").write_bytes((place / "Cat" / "c2.png").read_bytes())
    return place


def test_pictures_are_labelled_by_their_sub_folders(
    label_studio: LabelStudioServer, backend: BackendServer, person: Person, sorted_folder: Path
) -> None:
    """Those of other sub-folders, of several or of none are not; done again, it adds nothing; people's labels stay."""
    asked = (sorted_folder, "--title", "Sorted", "--choices", "cat,Dog", "--backend-url", backend.url)
    first = person.connect(*asked)
    assert (first["added"], first["labelled"]) == (7, 0)
    project = first["project"]
    task_of = {own_name(task["data"]["image"])[-6:]: task["id"] for task in label_studio.tasks(project)}
    label_studio.annotate(task_of["c2.png"], "Dog")  # a person knows better
    label_studio.api("POST", f"/api/tasks/{task_of['d2.png']}/annotations/", json={"result": [], "was_cancelled": True})
    for number in range(3):
        render("Mars", 620 + number, 32).save(sorted_folder / "dog" / f"new{number}.png")

    since = len(backend.log_text())
    done = person.run(*asked, "--labelled", "--json")
    assert done.returncode == 0, done.stderr
    then = json.loads(done.stdout)
    assert (then["added"], then["already"], then["labelled"]) == (3, 9, 5)
    assert "3 pictures get no label, because they lie in no sub-folder or in ['mouse']" in done.stderr
    assert "1 pictures lie in the sub-folders of several choices" in done.stderr
    assert "A training on the labels starts by itself" in done.stderr
    backend.wait_for_log("POST /webhook 201", since)  # what Label Studio tells of labels that it imports with tasks

    expected = {"c1.png": ["cat"], "c2.png": ["Dog"], "d1.png": ["Dog"], "d2.png": [], "m1.png": [], "x1.png": []}
    expected |= {"loose1.png": [], **{f"new{number}.png": ["Dog"] for number in range(3)}}
    assert labels_of(label_studio, project) == expected
    assert {each["ground_truth"] for each in label_studio.annotations(project)} == {False}
    assert {label["id"] for label in label_studio.annotations(project)} == {
        label["id"] for label in label_studio.annotations(person.connect(*asked, "--labelled")["project"])
    }


@pytest.mark.parametrize(
    ("version", "counts", "new", "every", "said"),
    [
        pytest.param(NEEDS_LABELS, (3, 3), 6, None, "starts by itself", id="enough labels"),
        pytest.param(NEEDS_LABELS, (3, 3), 0, None, "", id="nothing new"),
        pytest.param(NEEDS_LABELS, (9, 2), 11, None, "first pre-labels come after 2 of them have 3", id="too few"),
        pytest.param(NEEDS_LABELS, (3, 3), 6, NEVER, "Press Start Training", id="trainings by hand alone"),
        pytest.param(f"{MODEL_NAME}:project-7-ab", (3, 3), 6, None, "starts by itself", id="a model of the project"),
        pytest.param(f"{MODEL_NAME}:mine", (3, 3), 6, None, "Press Start Training", id="a model that was brought"),
        pytest.param(f"{MODEL_NAME}:mine", (1, 1), 2, None, "", id="a model that knows the choices"),
    ],
)
def test_what_comes_of_the_labels_is_said(
    version: str, counts: tuple[int, ...], new: int, every: int | None, said: str
) -> None:
    """Trainings start by themselves from three labels of two choices each on; a model that was brought stays."""
    choices = [f"choice {place}" for place, count in enumerate(counts) for _ in range(count)]
    labels = FolderLabels(CONTROL, {Path(str(number)): choice for number, choice in enumerate(choices)})
    sentence = outlook(Settings(train_every=every), version, Imported(new, 0, new), labels)
    assert said in sentence
    assert bool(sentence) == bool(said)


def test_choices_that_differ_in_case_label_each_its_own_folder() -> None:
    """The very spelling goes first; a folder in another spelling fits a choice all the same."""
    offered = ChoiceMap.for_learning(config_for(["Cat", "cat", "dog"]))
    folders = {Path("1.png"): "Cat", Path("2.png"): "cat", Path("3.png"): "DOG", Path("4.png"): "bird"}
    labels = folder_labels(offered, folders)
    assert labels.choice_of == {Path("1.png"): "Cat", Path("2.png"): "cat", Path("3.png"): "dog"}


def test_a_sub_folder_finds_its_choice_in_a_taxonomy() -> None:
    """By the last name of a path; the label is the path, as Label Studio keeps it."""
    offered = ChoiceMap.for_learning(
        '<View><Image name="image" value="$image"/><Taxonomy name="kind" toName="image"><Choice value="Pet">'
        '<Choice value="Cat" alias="cat"/></Choice><Choice value="Bird"/></Taxonomy></View>'
    )
    labels = folder_labels(offered, {Path("1.png"): "CAT", Path("2.png"): "Bird", Path("3.png"): "Fish"})
    assert labels.choice_of == {Path("1.png"): "Pet / cat", Path("2.png"): "Bird"}
    assert labels.annotation("Pet / cat")["result"] == [
        {"from_name": "kind", "to_name": "image", "type": "taxonomy", "value": {"taxonomy": [["Pet", "cat"]]}}
    ]


def test_labels_that_no_sub_folder_can_give_are_refused_at_once(
    label_studio: LabelStudioServer, person: Person, sorted_folder: Path
) -> None:
    """Before Label Studio is asked for anything, or at least before anything is made."""
    flat = person.run(sorted_folder / "mouse", "--title", "Nothing", "--labelled", LABEL_STUDIO_URL="")
    assert flat.returncode == 1
    assert "--labelled needs sub-folders with pictures" in flat.stderr
    other = person.run(sorted_folder, "--title", "Nothing", "--labelled", "--choices", "fish,bird")
    assert other.returncode == 1
    assert "the sub-folders are ['Cat', 'dog', 'mouse'] and the project offers ['fish', 'bird']" in other.stderr
    assert find_project(studio_of(label_studio), "Nothing") is None


def test_two_projects_of_one_title_are_named(label_studio: LabelStudioServer, person: Person, folder: Path) -> None:
    """It cannot be known which one is meant, so nothing is done; a longer title is another one."""
    one, other = label_studio.create_project("Twins"), label_studio.create_project("Twins")
    label_studio.create_project("Twins and more")
    done = person.run(folder, "--title", "Twins")
    assert done.returncode == 4
    assert f"{one} and {other}" in done.stderr


def test_a_private_address_is_explained(label_studio: LabelStudioServer) -> None:
    """127.0.0.2 is as private as 127.0.0.1 usually is; the sentence holds what fixes it."""
    if label_studio.is_before("1.23.1"):
        pytest.skip("Label Studio refuses private addresses since 1.23.1")
    project = label_studio.create_project("Private")
    with pytest.raises(StudioError, match=r"private address.*`python -m celestial_backend private-addresses ADDRESS`"):
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
    asked = ("--title", "Local", "--local-files", "--choices", "Mars,Venus", "--backend-url", backend.url)
    outside = person.run(folder, *asked, LOCAL_FILES_DOCUMENT_ROOT=str(root))
    assert outside.returncode == 4
    assert "LOCAL_FILES_DOCUMENT_ROOT" in outside.stderr
    assert find_project(studio_of(label_studio), "Local") is None

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


def test_local_files_are_labelled_too(
    label_studio: LabelStudioServer, backend: BackendServer, person: Person, sorted_folder: Path
) -> None:
    """Each by its own place, whatever its name is."""
    inside = label_studio.local_files_root / "a + b & ü"
    sorted_folder.rename(inside)
    asked = (inside, "--title", "Local labels", "--local-files", "--labelled", "--backend-url", backend.url)
    made = person.connect(*asked, LOCAL_FILES_DOCUMENT_ROOT=str(label_studio.local_files_root))
    assert (made["added"], made["labelled"]) == (9, 7)
    mine = {"c1": "Cat", "c2": "Cat", "x1": "Cat", "d1": "dog", "d2": "dog", "x2": "dog", "m1": "mouse"}
    assert labels_of(label_studio, made["project"]) == {
        **{f"{name}.png": [choice] for name, choice in mine.items()}, "c3.png": [], "loose1.png": []
    }
    again = person.connect(*asked, LOCAL_FILES_DOCUMENT_ROOT=str(label_studio.local_files_root))
    assert (again["added"], again["labelled"]) == (0, 0)


def test_a_project_that_asks_for_nothing_yet_gets_the_choices(
    label_studio: LabelStudioServer, backend: BackendServer, person: Person, folder: Path
) -> None:
    """As Label Studio makes new projects; afterwards it keeps what it has."""
    project = label_studio.create_project("Begun", "<View></View>")
    asked = (folder, "--title", "Begun", "--backend-url", backend.url)
    made = person.connect(*asked, "--choices", "hat,shoes")
    assert (made["project"], made["new"], made["added"]) == (project, False, 30)
    assert choices_of(str(label_studio.sdk.projects.get(project).label_config)) == ("hat", "shoes")
    person.connect(*asked, "--choices", "dress,shirt")
    assert choices_of(str(label_studio.sdk.projects.get(project).label_config)) == ("hat", "shoes")


def test_a_long_name_does_not_hide_what_is_known(
    backend: BackendServer, person: Person, tmp_path: Path
) -> None:
    """Label Studio cuts long names; the digest is in front."""
    place = tmp_path / "long"
    place.mkdir()
    render("Pluto", 540, 64).save(place / ("ß" * NAME_LETTERS + "x" * 60 + ".a.b.png"))
    asked = (place, "--title", "Long names", "--choices", "Pluto,Mars", "--backend-url", backend.url)
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


def test_files_that_cannot_be_sent_cost_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gone, closed, empty, no file any more, or of a strange name: a sentence for each, and the rest is imported."""
    wanted = [tmp_path / f"{name}.png" for name in ("a-first", "b-gone", "c-folder", "d-late", "z-last")]
    strange = Path(os.fsdecode(os.fsencode(tmp_path) + b"/y-\xff\xfe.png"))
    for path in (*wanted, strange):
        path.write_bytes(os.fsencode(path))
    (tmp_path / "e-empty.png").touch()
    (tmp_path / "f-dangling.png").symlink_to("nowhere")
    os.mkfifo(tmp_path / "g-pipe.png")
    first, gone, folder, late, last = wanted
    found = pictures_of(tmp_path)
    gone.unlink()
    folder.unlink()
    folder.mkdir()
    sent: list[bytes] = []

    def call(_client: object, _method: str, _path: str, *, files: dict[str, Any]) -> dict[str, int]:
        for name, file in files.values():
            name.encode()
            sent.append(file.read())
        return {"task_count": len(files)}

    monkeypatch.setattr(setup, "_call", call)
    monkeypatch.setattr(setup, "_tasks", lambda *_: [])
    monkeypatch.setattr(Studio, "ask", lambda _studio, _wanted, call: call(None))
    monkeypatch.setattr(setup, "BYTES_PER_REQUEST", len(os.fsencode(first)))  # each in a request of its own
    imported = upload(Studio(Settings()), 1, found, lambda *_: late.unlink(missing_ok=True))
    assert sent == [os.fsencode(path) for path in (first, strange, last)]
    assert (imported.added, imported.already) == (3, 0)
    assert sorted(imported.notes) == [
        f"{gone} was left out, because it cannot be read (No such file or directory).",
        f"{folder} was left out, because it cannot be read (Is a directory).",
        f"{late} was left out, because it cannot be read (No such file or directory).",
        f"{tmp_path / 'e-empty.png'} was left out, because it is empty.",
        f"{tmp_path / 'f-dangling.png'} was left out, because it cannot be read (No such file or directory).",
    ]


@pytest.mark.parametrize("title", ["ab", "a" * 51], ids=["short", "long"])
def test_a_title_has_three_to_fifty_letters(title: str) -> None:
    """Label Studio takes no others, and its own sentence does not say so."""
    with pytest.raises(RequestError, match=r"must have 3 to 50 letters, got \d+"):
        create_project(Studio(Settings()), title, "")


@pytest.mark.parametrize("count", [2, 20, 60, 300], ids=str)
def test_the_config_has_a_choice_for_each_name(count: int) -> None:
    """Signs that XML uses itself come through, however many there are."""
    names = ("a < \"b\" & 'c'", *(f"{number}, or more" for number in range(1, count)))
    assert choices_of(config_for(names)) == names


def test_the_parts_of_a_split_name_no_choices(
    label_studio: LabelStudioServer, backend: BackendServer, person: Person, tmp_path: Path
) -> None:
    """Their sub-folders do, whose pictures are labelled by them; what programs put beside pictures is not imported."""
    place = tmp_path / "split"
    for number, (part, body) in enumerate([(part, body) for part in ("Train", "TEST") for body in ("Moon", "Mars")]):
        (place / part / body).mkdir(parents=True)
        render(body, 700 + number, 48).save(place / part / body / f"{number}.png")
    (place / "TEST" / "Venus").mkdir()
    for junk in ("__MACOSX/Train/Moon/x.png", "Train/.ipynb_checkpoints/x.png", "Train/Moon/._0.png"):
        (place / junk).parent.mkdir(parents=True, exist_ok=True)
        render("Moon", 1, 48).save(place / junk)
    asked = (place, "--title", "Split", "--labelled", "--backend-url", backend.url, "--json")
    done = person.run(*asked)
    assert done.returncode == 0, done.stderr
    assert f"['TEST', 'Train'] in {place} are the parts of a split" in done.stderr
    assert f"{place} has no pictures in ['Venus']" in done.stderr
    told = json.loads(done.stdout)
    assert (told["added"], told["labelled"]) == (4, 4)
    made = label_studio.api("GET", f"/api/projects/{told['project']}")
    assert choices_of(made["label_config"]) == ("Mars", "Moon")

    (place / "more" / "Moon").mkdir(parents=True)
    render("Moon", 9, 48).save(place / "more" / "Moon" / "9.png")
    refused = person.run(place, "--title", "Doubtful", "--backend-url", backend.url)
    assert refused.returncode == 1
    assert "look like the parts of a split, and ['more'] beside them do not" in refused.stderr
    assert "--choices a,b,c" in refused.stderr
