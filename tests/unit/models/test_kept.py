"""The models that the database keeps: whole on every machine, or not there."""

from __future__ import annotations

import io
import logging
import pickle
import tarfile
import threading
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from celestial_backend.commands.lists import models
from celestial_backend.database import Database
from celestial_backend.errors import ModelError, ModelLoadError, ModelNotFoundError, StateError
from celestial_backend.models import headed, kept
from celestial_backend.models import store as store_module
from celestial_backend.models.headed import Head
from celestial_backend.models.manifest import Manifest
from celestial_backend.models.pointers import Pointer
from celestial_backend.models.store import ModelStore
from celestial_backend.settings import MODEL_NAME, Settings, project_tag
from tests.support.colours import Colours, plain
from tests.support.stores import store_of

KIND = Head("kind", ("apple", "leaf", "sky"), 9 * np.eye(3, dtype=np.float32), np.zeros(3, np.float32))
SHARED = f"{MODEL_NAME}:mine"


@pytest.fixture(autouse=True)
def colours(monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedder of this process."""
    embedder = Colours()
    monkeypatch.setattr(store_module, "open_embedder", lambda _: embedder)


def settings_of(place: Path, machine: str) -> Settings:
    """A machine with a BentoML store and a state folder of its own, and the database of all."""
    return Settings(bentoml_home=place / machine / "bentoml", model_dir=place / machine / "state", model=SHARED,
                    database_url=f"sqlite:///{place / 'celestial.db'}", keep_models=2)  # fmt: skip


def machine(place: Path, name: str) -> ModelStore:
    """A machine that has a model for all projects."""
    store = store_of(settings_of(place, name))
    if not store.registry.here(SHARED):
        save(store, place, SHARED)
    return store


def save(store: ModelStore, place: Path, tag: str, head: Head = KIND, base: str | None = None, **told: str) -> str:
    """A model of heads, as a training leaves it on its machine."""
    folder = place / f"{len(list(place.iterdir()))}"
    folder.mkdir()
    manifest = headed.save(folder, [head], "colours-1", base, Manifest(**told))
    return store.registry.add_heads(tag, folder, manifest)


def trained(store: ModelStore, place: Path, job: str = "0badcafe", **told: str) -> str:
    """A model of project 3 that its training has published."""
    tag = save(store, place, project_tag("3", job), **told)
    store.publish("3", tag, job=job)
    return tag


def said(store: ModelStore, colour: str = "lime") -> list[list[float]]:
    model = store.current("3")
    return model.probabilities(model.prepare(plain(colour))).tolist()


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def database(place: Path) -> Database:
    return Database(settings_of(place, "any"))


def change(place: Path, statement: str, **values: object) -> None:
    with database(place).writing("3") as transaction:
        assert transaction.run(statement, **values)


def test_a_model_is_served_by_a_machine_that_has_not_trained_it(tmp_path: Path) -> None:
    """With the same files and the same answers; the other machine needs the database once."""
    first, second = machine(tmp_path, "first"), machine(tmp_path, "second")
    assert second.live_tag("3") == SHARED
    tag = trained(first, tmp_path)
    assert second.live_tag("3") == tag
    assert said(second) == said(first)
    assert files(second.registry.place(tag)) == files(first.registry.place(tag))
    assert second.registry.describe(tag) == first.registry.describe(tag)
    change(tmp_path, "DELETE FROM models")
    assert store_of(settings_of(tmp_path, "second")).live_tag("3") == tag


def test_a_request_costs_one_query(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once a model is on its machine, nothing but the pointer is asked for."""
    tag = trained(machine(tmp_path, "first"), tmp_path)
    shared = database(tmp_path)
    store = ModelStore(settings_of(tmp_path, "first"), shared)
    asked, rows = [], shared.rows

    def read(statement: str, **values: str) -> object:
        asked.append(statement)
        return rows(statement, **values)

    monkeypatch.setattr(shared, "rows", read)
    assert store.live_tag("3") == tag
    store.model(tag)
    assert asked == ["SELECT tag, job, made FROM live WHERE project = :project"]


def test_a_model_is_published_with_its_transaction(tmp_path: Path) -> None:
    """What undoes it leaves no pointer, and no model in the database."""
    first, second = machine(tmp_path, "first"), machine(tmp_path, "second")
    tag = save(first, tmp_path, project_tag("3", "0badcafe"))
    with suppress(ZeroDivisionError), database(tmp_path).writing("3") as transaction:
        assert first.publish("3", tag, job="0badcafe", instead_of=SHARED, within=transaction)
        assert not first.publish("3", tag, instead_of=SHARED, within=transaction)
        raise ZeroDivisionError
    assert (first.live_tag("3"), second.live_tag("3"), second.registry.holds(tag)) == (SHARED, SHARED, False)
    with database(tmp_path).writing("3") as transaction:
        assert first.publish("3", tag, job="0badcafe", instead_of=SHARED, within=transaction)
    assert (first.live_tag("3"), second.live_tag("3")) == (tag, tag)
    assert second.pointers.read("3") == Pointer(tag, "0badcafe")


def test_a_model_that_was_kept_out_is_listed_everywhere(tmp_path: Path) -> None:
    """With its reason; a machine that only lists it does not bring it."""
    first, second = machine(tmp_path, "first"), machine(tmp_path, "second")
    tag = save(first, tmp_path, project_tag("3", "0badcafe"), parent=SHARED, reason="Kept out: it is worse.")
    assert [model.tag for model in second.registry.models()] == [SHARED]
    with database(tmp_path).writing("3") as transaction:
        first.keep(tag, transaction)
    for _ in range(2):
        listed = {model.tag: model for model in second.registry.models()}
        assert listed[tag] == first.registry.describe(tag)
        assert listed[tag].manifest.reason == "Kept out: it is worse."
    assert (second.registry.here(tag), second.live_tag("3")) == (False, SHARED)
    second.publish("3", tag)
    assert (said(second), first.live_tag("3")) == (said(first), tag)


def test_a_later_attempt_replaces_what_is_kept(tmp_path: Path) -> None:
    """It has the same tag, as it is of the same job."""
    first, second = machine(tmp_path, "first"), machine(tmp_path, "second")
    tag = trained(first, tmp_path)
    first.registry.remove(tag)
    save(first, tmp_path, tag, Head("kind", ("apple", "leaf"), np.eye(3, 2, dtype=np.float32), np.zeros(2, np.float32)))
    first.publish("3", tag)
    assert second.classes(second.live_tag("3"), 0) == ("apple", "leaf")


def test_many_who_ask_get_one_whole_model(tmp_path: Path) -> None:
    """Threads, and processes with objects of their own, that lack a model at the same moment."""
    tag = trained(machine(tmp_path, "first"), tmp_path)
    machine(tmp_path, "second")
    found: list[str] = []
    stores = [store_of(settings_of(tmp_path, "second")) for _ in range(3)] * 3
    threads = [threading.Thread(target=lambda store=store: found.append(store.live_tag("3"))) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [tag] * 9
    assert len(files(stores[0].registry.place(tag))) == 3
    assert not list(tmp_path.joinpath("second", "bentoml").glob("saving-*"))


def archive(*members: tuple[str, bytes | None]) -> bytes:
    """A tar of files; nothing for the bytes makes a link to a file of the machine."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            if content is None:
                member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
            member.size = len(content or b"")
            tar.addfile(member, io.BytesIO(content or b""))
    return data.getvalue()


YAML = ("model.yaml", b"{}")


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"no archive", id="no archive"),
        pytest.param(archive(YAML)[:700], id="cut off"),
        pytest.param(archive(("heads.json", b"{}")), id="no description"),
        pytest.param(archive(YAML, ("../../outside", b"")), id="a name above"),
        pytest.param(archive(YAML, ("/outside", b"")), id="a whole path"),
        pytest.param(archive(YAML, ("heads.json", None)), id="a link"),
        pytest.param(archive(YAML, YAML), id="a file twice"),
    ],
)
def test_a_damaged_model_ends_no_other_predictions(
    tmp_path: Path, body: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """It is there not at all, its project is served the model of all, and the log says what to do."""
    first, second = machine(tmp_path, "first"), machine(tmp_path, "second")
    tag = trained(first, tmp_path)
    other = save(first, tmp_path, project_tag("4", "0badcafe"))
    first.publish("4", other)
    change(tmp_path, "UPDATE bodies SET body = :body WHERE tag = :tag", body=body, tag=tag)
    digest = kept.digest_of(io.BytesIO(body))
    change(tmp_path, "UPDATE models SET digest = :digest WHERE tag = :tag", digest=digest, tag=tag)
    before = sorted(tmp_path.rglob("*"))
    with caplog.at_level(logging.ERROR):
        assert [second.live_tag("3") for _ in range(3)] == [SHARED] * 3
    assert caplog.text.count(f"The model {tag} in the database is damaged") == 1
    assert "models use TAG --project 3" in caplog.text
    assert {path.suffix for path in set(tmp_path.rglob("*")) - set(before)} <= {".lock", ""}
    assert not second.registry.here(tag)
    assert second.live_tag("4") == other
    assert first.live_tag("3") == tag


def test_a_model_that_was_changed_on_the_way_is_not_served(tmp_path: Path) -> None:
    """Also where its archive can be read; and a damaged description hides no other model."""
    first, second = machine(tmp_path, "first"), machine(tmp_path, "second")
    tag = trained(first, tmp_path)
    change(tmp_path, "UPDATE models SET digest = 'another', metadata = '{'")
    assert second.live_tag("3") == SHARED
    assert [model.tag for model in second.registry.models()] == [SHARED]
    assert [model.tag for model in first.registry.models()] == [SHARED, tag]


def test_a_database_that_is_away_ends_no_predictions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is on the machine is served on; a model that is not is no reason to serve another one silently."""
    tag = trained(machine(tmp_path, "first"), tmp_path)
    second = machine(tmp_path, "second")
    shared = second.registry._database
    answers = said(second)

    def away(*_: object, **__: object) -> None:
        raise StateError("The database cannot be read (it does not answer).")

    monkeypatch.setattr(shared, "rows", away)
    assert (second.live_tag("3"), said(second)) == (tag, answers)
    second.registry.remove(tag)
    with pytest.raises(StateError, match="does not answer"):
        second.live_tag("3")
    assert second.live_tag() == SHARED


def test_old_models_go_everywhere(tmp_path: Path) -> None:
    """From the database at the prune of who trains, from others at their own, or when the next one comes to them."""
    first, second, third = (machine(tmp_path, name) for name in ("first", "second", "third"))
    oldest = trained(first, tmp_path, "00000001")
    other = save(first, tmp_path, project_tag("4", "00000001"))
    first.publish("4", other)
    assert [second.live_tag("3"), third.live_tag("3"), third.live_tag("4")] == [oldest, oldest, other]
    later = [trained(first, tmp_path, f"0000000{number}") for number in (2, 3, 4)]
    assert first.prune("3") == [oldest, later[0]]
    for statement in ("SELECT tag FROM models", "SELECT tag FROM bodies"):
        assert {row["tag"] for row in database(tmp_path).rows(statement)} == {other, *later[1:]}
    assert second.prune("3") == [oldest]
    assert [model.tag for model in second.registry.models()] == [SHARED, other, *later[1:]]
    assert third.live_tag("3") == later[-1]
    assert [model.tag for model in third.registry.on_this_machine()] == [SHARED, other, later[-1]]


def test_who_only_looks_changes_no_store(tmp_path: Path) -> None:
    """A model of the database is known and loaded all the same."""
    first = machine(tmp_path, "first")
    tag = trained(first, tmp_path)
    machine(tmp_path, "second")
    before = sorted(tmp_path.joinpath("second").rglob("*"))
    settings = settings_of(tmp_path, "second")
    second = ModelStore(settings, Database(settings, look_only=True), look_only=True)
    assert (second.live_tag("3"), second.classes(tag, 0)) == (tag, KIND.classes)
    assert said(second) == said(first)
    assert sorted(tmp_path.joinpath("second").rglob("*")) == before


def test_the_default_model_that_heads_need_comes_with_them(tmp_path: Path) -> None:
    """A machine of a later release has another one; a network of the operator stays where it is."""
    first, second = machine(tmp_path, "first"), machine(tmp_path, "second")
    default, own = f"{MODEL_NAME}:default-0123456789ab", f"{MODEL_NAME}:own"
    for number, base in enumerate((default, own)):
        save(first, tmp_path, base)
        trained(first, tmp_path, f"0000000{number}", base=base)
    assert (second.registry.holds(default), second.registry.holds(own)) == (True, False)


def test_the_models_of_an_older_release_are_taken_over(tmp_path: Path) -> None:
    """With its pointers, so that a second machine serves what the first has trained before."""
    first = machine(tmp_path, "first")
    live, refused = (save(first, tmp_path, project_tag("3", job)) for job in ("0000aaaa", "0000bbbb"))
    tmp_path.joinpath("celestial.db").unlink(missing_ok=True)
    settings = settings_of(tmp_path, "first")
    settings.state.old_pointers.mkdir(parents=True)
    (settings.state.old_pointers / "3.json").write_text(f'{{"tag": "{live}", "job": "0000aaaa"}}')
    (broken := first.registry.place(project_tag("3", "0000cccc"))).mkdir()
    (broken / "model.yaml").write_text("{")
    assert store_of(settings).live_tag("3") == live
    second = machine(tmp_path, "second")
    assert (second.live_tag("3"), second.registry.holds(refused)) == (live, True)
    assert settings.state.old_pointers.with_name("live.old").is_dir()


def test_what_a_killed_training_of_an_older_release_has_saved_is_not_taken_over(tmp_path: Path) -> None:
    """The training begins anew, and learns the same labels again."""
    first = machine(tmp_path, "first")
    tags = {job: save(first, tmp_path, project_tag("3", job), job=job) for job in ("0000aaaa", "0000bbbb", "0000cccc")}
    settings = settings_of(tmp_path, "first")
    known = (
        "INSERT INTO work (id, project, state, requests, attempts, requested_at, reason, progress, outcome)"
        " VALUES (:job, '3', :state, 1, 1, 1, '', '{}', '{}')"
    )
    for job, state in {"0000aaaa": "kept", "0000bbbb": "waiting"}.items():  # and of one nothing is known any more
        change(tmp_path, known, job=job, state=state)
    settings.state.old_pointers.mkdir(parents=True)
    again = store_of(settings)
    assert [again.registry.keeps(tags[job]) for job in ("0000aaaa", "0000bbbb", "0000cccc")] == [True, False, True]


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    """A model for all projects, as `bentoml.models.export_model` writes it."""
    return export(tmp_path, "red", "green")


def export(place: Path, *classes: str, **more: bytes) -> Path:
    elsewhere = store_of(settings_of(place, f"elsewhere-{len(list(place.iterdir()))}"))
    weights = np.eye(3, len(classes), dtype=np.float32)
    tag = save(elsewhere, place, f"{MODEL_NAME}:outside", Head("kind", classes, weights, np.zeros(len(classes))))
    for name, content in more.items():
        (elsewhere.registry.place(tag) / name).write_bytes(content)
    file = place / f"{len(list(place.iterdir()))}.bentomodel"
    with tarfile.open(file, "w:gz") as tar:
        tar.add(elsewhere.registry.place(tag), ".")
    return file


def run(place: Path, name: str, *arguments: str) -> str:
    done = CliRunner().invoke(models, arguments, obj=settings_of(place, name))
    if done.exception:
        raise done.exception
    return done.stdout


def test_a_file_is_added_for_every_machine(tmp_path: Path, exported: Path) -> None:
    """Twice is as once; it is nobody's model until it is used."""
    machine(tmp_path, "first")
    second = machine(tmp_path, "second")
    tag = f"{MODEL_NAME}:outside"
    for _ in range(2):
        told = run(tmp_path, "first", "add", str(exported))
        assert told.startswith(f"{tag} is in the database. ")
        assert told.endswith(f"models use {tag} --project N\n")
    assert (second.live_tag("3"), second.live_tag()) == (SHARED, SHARED)
    second.publish("3", tag)
    assert second.classes(second.live_tag("3"), 0) == ("red", "green")
    assert run(tmp_path, "first", "add", str(exported)).startswith(tag)


def test_another_model_of_the_same_tag_is_refused(tmp_path: Path, exported: Path) -> None:
    """Wherever the first one is: in the database, or in the store of this machine alone."""
    first, second = machine(tmp_path, "first"), machine(tmp_path, "second")
    first.add(exported)
    for another in (export(tmp_path, "red", "blue"), export(tmp_path, "red", "green", more=b"")):
        with pytest.raises(ModelError, match=r"There is another model .*:outside already. Export this one under"):
            second.add(another)
    save(first, tmp_path, f"{MODEL_NAME}:here")
    assert second.classes(f"{MODEL_NAME}:outside", 0) == ("red", "green")


def test_a_file_that_is_too_large_is_told_the_other_way(
    tmp_path: Path, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of it gets into the database."""
    monkeypatch.setattr(kept, "MAX_BYTES", 100)
    with pytest.raises(ModelError, match=r"may have 0.0001 MB, and .*\.bentomodel has 0 MB\. .* CELESTIAL_BENTOMODEL"):
        machine(tmp_path, "first").add(exported)
    assert not database(tmp_path).rows("SELECT tag FROM models")


class Telling:
    """Fails the test that unpickles it."""

    def __reduce__(self) -> tuple[object, ...]:
        return (pytest.fail, ("it was unpickled",))


def test_nothing_in_a_file_is_run(tmp_path: Path) -> None:
    """Neither when it is added nor when it comes to a machine."""
    file = export(tmp_path, "red", "green", **{"custom_objects.pkl": pickle.dumps(Telling())})
    tag = machine(tmp_path, "first").add(file)
    second = machine(tmp_path, "second")
    assert second.registry.holds(tag)
    assert (second.registry.place(tag) / "custom_objects.pkl").read_bytes() == pickle.dumps(Telling())


@pytest.mark.parametrize(
    ("members", "sentence"),
    [
        pytest.param([], "must be one that bentoml.models.export_model wrote", id="no model"),
        pytest.param([("model.yaml", None)], "must be one that bentoml.models.export_model wrote", id="a link"),
        pytest.param([("inner/model.yaml", b"name: a\nversion: b")], "cannot be read", id="deep"),
        pytest.param([("model.yaml", b"name: a\nversion: b")], "has no custom object preprocess", id="no network"),
    ],
)
def test_a_file_that_can_never_be_served_is_refused(
    tmp_path: Path, members: list[tuple[str, bytes | None]], sentence: str
) -> None:
    """As one that CELESTIAL_BENTOMODEL names."""
    file = tmp_path / "strange.bentomodel"
    file.write_bytes(archive(*members))
    with pytest.raises(ModelLoadError, match=sentence):
        machine(tmp_path, "first").add(file)


def test_a_tag_that_leads_elsewhere_is_not_asked_for(tmp_path: Path) -> None:
    """A pointer or a file with one brings nothing from anywhere."""
    store = machine(tmp_path, "first")
    change(tmp_path, "INSERT INTO models VALUES ('../../a:b', '', '', 1, '', '{}')")
    assert not store.registry.holds("../../a:b")
    with pytest.raises(ModelNotFoundError):
        store.publish("3", "../../a:b")


def test_a_large_model_comes_in_parts(tmp_path: Path, exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that neither side needs the memory for all of it."""
    monkeypatch.setattr(kept, "PART_BYTES", 100)
    monkeypatch.setattr(kept, "LARGE_BYTES", 100)
    tag = machine(tmp_path, "first").add(exported)
    rows = database(tmp_path).rows("SELECT part, body FROM bodies ORDER BY part")
    assert [row["part"] for row in rows] == list(range(-(-exported.stat().st_size // 100)))
    assert b"".join(row["body"] for row in rows) == exported.read_bytes()
    assert machine(tmp_path, "second").classes(tag, 0) == ("red", "green")


def test_a_pinned_model_of_the_database_is_served(tmp_path: Path, exported: Path) -> None:
    """CELESTIAL_MODEL may name what was added."""
    tag = machine(tmp_path, "first").add(exported)
    assert store_of(replace(settings_of(tmp_path, "second"), model=tag)).live_tag("9") == tag
