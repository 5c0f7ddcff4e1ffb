"""`train FOLDER`: what is learned of a folder, what is left out, and what is said when nothing can be."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from celestial_backend.errors import ModelLoadError, NotEnoughDataError, TrainingError
from celestial_backend.features import FeatureCache
from celestial_backend.learning import folder as folder_module
from celestial_backend.learning.folder import Learned, learn_folder
from celestial_backend.models.headed import Head, load, save
from celestial_backend.models.store import ModelStore
from celestial_backend.models.store import __name__ as store_module
from celestial_backend.settings import MODEL_NAME, Settings
from tests.support.backend_server import label_config
from tests.support.colours import Colours, plain, png
from tests.support.stores import store_of

WARM = ("red", "orange", "tomato", "gold", "coral", "brown", "orangered", "salmon", "darkorange", "firebrick")
COOL = ("blue", "navy", "teal", "cyan", "royalblue", "slateblue", "turquoise", "skyblue", "cadetblue", "steelblue")


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(bentoml_home=tmp_path / "bentoml", model_dir=tmp_path / "state")


@pytest.fixture(autouse=True)
def colours(monkeypatch: pytest.MonkeyPatch) -> Colours:
    """The embedder of this process."""
    embedder = Colours()
    monkeypatch.setattr(folder_module, "open_embedder", lambda _: embedder)
    monkeypatch.setattr(f"{store_module}.open_embedder", lambda _: embedder)
    return embedder


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """A folder with pictures of these colours in the sub-folders of these names."""

    def made(**colours: tuple[str, ...]) -> Path:
        for name, mine in colours.items():
            (tmp_path / "pictures" / name).mkdir(parents=True)
            for colour in mine:
                (tmp_path / "pictures" / name / f"{colour}.png").write_bytes(png(colour))
        return tmp_path / "pictures"

    return made


def choice_for(store: ModelStore, config: str, colour: str) -> list[list[str]]:
    """What the live model says of a picture, control by control."""
    model = store.current()
    (row,) = model.probabilities(model.prepare(plain(colour)))
    regions, _ = model.vocabulary.choices(config).prediction({"image": row.tolist()})
    return [region["value"]["choices"] for region in regions]


def test_what_was_learned_is_served_to_all_projects(settings: Settings, folder: Callable[..., Path]) -> None:
    """To every control that shares a choice with it, whatever its name; the metadata say how good it is."""
    default = store_of(settings).live_tag()
    learned = learn_folder(folder(warm=WARM, cool=COOL), settings)
    store = store_of(settings)
    assert store.live_tag("7") == learned.tag != default
    assert learned.tag.startswith(f"{MODEL_NAME}:folder-")
    assert (learned.classes, learned.left_out) == (("cool", "warm"), ())
    assert learned.scores.labels == 20
    assert 18 <= learned.scores.right <= 20
    metadata = store.registry.describe(learned.tag).metadata
    assert metadata["choices"] == {"": ["cool", "warm"]}
    assert metadata["scores"][""] == learned.scores.plain()
    assert metadata["reason"] == f"{learned.scores.right} of 20 labels that it had not learned are right."

    both = label_config(["warm", "cool"])
    assert choice_for(store, both, "crimson") == [["warm"]]
    assert choice_for(store, both, "mediumblue") == [["cool"]]
    three = (
        '<View><Image name="image" value="$image"/><Choices name="a" toName="image"><Choice value="Warm"/>'
        '<Choice value="odd"/></Choices><Choices name="b" toName="image" choice="multiple"><Choice value="cosy"'
        ' predicted_values="warm"/></Choices><Choices name="c" toName="image"><Choice value="cat"/></Choices></View>'
    )
    assert choice_for(store, three, "crimson") == [["Warm"], ["cosy"]]


def test_learning_again_gives_another_model_of_the_same(settings: Settings, folder: Callable[..., Path]) -> None:
    """From what is remembered of the pictures, with the same numbers."""
    place = folder(warm=WARM, cool=COOL)
    first = learn_folder(place, settings)
    again = learn_folder(place, settings)
    store = store_of(settings)
    assert store.live_tag() == again.tag != first.tag
    assert again.scores == first.scores
    one, other = store.model(first.tag), store.model(again.tag)
    assert one.probabilities(one.prepare(plain("red"))).tolist() == other.probabilities(
        other.prepare(plain("red"))
    ).tolist()  # fmt: skip


def test_files_that_are_no_pictures_are_left_out(
    settings: Settings, folder: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    """And reported; so are pictures in two classes; one that is there twice counts once."""
    place = folder(warm=(*WARM, "black"), cool=(*COOL, "black"))
    (place / "warm" / "notes.txt").write_text("words")
    (place / "warm" / "again.png").write_bytes(png("red"))
    (place / "warm" / "large.png").write_bytes(png("pink") + bytes(2000))
    (place / "warm" / "wide.png").write_bytes(png("pink", side_px=200))
    (place / ".hidden").mkdir()
    (place / "loose.png").write_bytes(png("red"))
    limited = Settings(
        bentoml_home=settings.bentoml_home, model_dir=settings.model_dir, image_max_mb=0.002, image_max_megapixels=0.01
    )
    with caplog.at_level(logging.WARNING):
        learned = learn_folder(place, limited)
    assert sorted(learned.left_out) == [
        "cool/black.png", "warm/black.png", "warm/large.png", "warm/notes.txt", "warm/wide.png"
    ]  # fmt: skip
    assert learned.scores.labels == 20
    for sentence in (
        "cool/black.png is left out: it is in cool and warm",
        "warm/notes.txt is left out: the file must be a picture",
        "warm/large.png is left out: a picture file may have 0.002 MB",
        "warm/wide.png is left out: a picture may have 0.01 million pixels",
    ):
        assert sentence in caplog.text


@pytest.mark.parametrize(
    ("colours", "seen"),
    [
        pytest.param({}, "no class at all", id="nothing"),
        pytest.param({"warm": WARM}, "warm: 10", id="one class"),
        pytest.param({"warm": WARM, "cool": COOL[:2]}, "cool: 2, warm: 10", id="too few"),
    ],
)
def test_too_little_is_refused_with_the_counts(
    settings: Settings, folder: Callable[..., Path], colours: dict[str, tuple[str, ...]], seen: str
) -> None:
    """Before anything is learned."""
    place = folder(**colours)
    place.mkdir(exist_ok=True)
    sentence = rf"at least 2 classes with 3 readable pictures each, got {seen}\. Add pictures or remove the class"
    with pytest.raises(NotEnoughDataError, match=sentence):
        learn_folder(place, settings)


def test_what_is_no_folder_is_refused(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"must be a folder with one sub-folder for each class, got .*missing"):
        learn_folder(tmp_path / "missing", settings)


def test_a_class_without_a_name_in_utf_8_is_refused(settings: Settings, tmp_path: Path) -> None:
    """Before any picture is read."""
    place = tmp_path
    os.mkdir(os.fsencode(place) + b"/caf\xe9")  # noqa: PTH102 - no path of pathlib's
    Path(os.fsdecode(os.fsencode(place) + b"/caf\xe9"), "a.png").touch()
    with pytest.raises(TrainingError, match=r"must have a name in UTF-8, and 'caf\\udce9' is none"):
        learn_folder(place, settings)


def test_what_could_be_guessed_is_not_registered(settings: Settings, folder: Callable[..., Path]) -> None:
    """The store keeps what it had."""
    place = folder(even=WARM[::2] + COOL[::2], odd=WARM[1::2] + COOL[1::2])
    before = store_of(settings).live_tag()
    with pytest.raises(TrainingError, match=r"No model was made of .*: \d+ of 20 labels .* which guessing could be"):
        learn_folder(place, settings)
    assert store_of(settings).live_tag() == before
    assert [model.tag for model in store_of(settings).registry.models()] == [before]


def test_of_too_many_files_some_are_learned(
    settings: Settings, folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same ones each time."""
    monkeypatch.setattr(folder_module, "PICTURES_MAX", 14)
    place = folder(warm=WARM, cool=COOL)
    told: list[Learned] = [learn_folder(place, settings) for _ in range(2)]
    assert [each.scores.labels for each in told] == [14, 14]
    assert told[0].scores == told[1].scores


@pytest.mark.parametrize(
    "heads",
    [
        pytest.param([("", False), ("kind", False)], id="two"),
        pytest.param([("", True)], id="several choices"),
    ],
)
def test_a_head_of_any_control_is_alone(tmp_path: Path, heads: list[tuple[str, bool]]) -> None:
    """Nothing else could be meant by its name."""
    ones = [
        Head(control, ("a", "b"), np.ones((3, 2), np.float32), np.zeros(2, np.float32), multiple=multiple)
        for control, multiple in heads
    ]
    save(tmp_path, ones, "colours-1")
    with pytest.raises(ModelLoadError, match="a head of any control must be the only one, and say one choice"):
        load("m:1", tmp_path, Colours, FeatureCache(Settings(model_dir=tmp_path)), lambda tag: pytest.fail(tag))


def test_the_parts_of_a_split_are_learned_as_one(
    settings: Settings, folder: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    """Never as classes; what programs put beside pictures costs no word, an empty class one sentence."""
    place = folder(
        **{"train/warm": WARM[:6], "train/cool": COOL[:6], "VAL/warm": WARM[6:], "VAL/cool": COOL[6:], "VAL/none": ()}
    )
    for junk in ("__MACOSX/train/._red.png", "train/warm/._red.png", "train/warm/Thumbs.db", "train/.git/config"):
        (place / junk).parent.mkdir(parents=True, exist_ok=True)
        (place / junk).write_bytes(b"\0\5\x16\7")
    with caplog.at_level(logging.WARNING):
        learned = learn_folder(place, settings)
    assert (learned.classes, learned.left_out, learned.scores.labels) == (("cool", "warm"), (), 20)
    assert "['VAL', 'train'] in" in caplog.text
    assert "has no pictures in ['none']" in caplog.text
    assert "left out" not in caplog.text


def test_what_lies_in_no_class_is_left_out_and_named(
    settings: Settings, folder: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    place = folder(warm=WARM, cool=COOL)
    (place / "loose.png").write_bytes(png("red"))
    with caplog.at_level(logging.WARNING):
        assert learn_folder(place, settings).scores.labels == 20
    assert "1 files lie in no class, and are left out: ['loose.png']" in caplog.text


def test_sub_folders_that_are_no_classes_are_refused(settings: Settings, folder: Callable[..., Path]) -> None:
    with pytest.raises(TrainingError, match="hold no sub-folders named after classes"):
        learn_folder(folder(train=WARM, val=COOL), settings)
