"""Models of heads: what they say, what they remember, and what is said of files that somebody has damaged."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from celestial_backend.errors import ModelLoadError
from celestial_backend.features import Familiar, FeatureCache, unit
from celestial_backend.models.headed import ARRAYS, GENERAL, Head, HeadsModel, read_about, save
from celestial_backend.models.manifest import Manifest
from tests.support import colours
from tests.support.colours import Colours, plain, png
from tests.support.heads import BASE, FLAWS, KIND, TAG, opened, said

cache = colours.cache


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "heads"
    folder.mkdir()
    save(folder, [KIND, FLAWS], "colours-1")
    return folder


def test_each_head_has_its_own_columns(folder: Path, cache: FeatureCache) -> None:
    """Worked out on paper: red is (1, 0, 0), whose logits are log 2, 0, 0, and 4 - 1 and -4 where each is by itself."""
    rows = said(opened(folder, cache), "red", "blue")
    assert rows[0] == pytest.approx([1 / 2, 1 / 4, 1 / 4, 1 / (1 + np.exp(-3)), 1 / (1 + np.exp(4))])
    assert rows[1] == pytest.approx([1 / 6, 1 / 6, 2 / 3, 1 / (1 + np.exp(5)), 1 / (1 + np.exp(-4))])
    assert rows[:, :3].sum(axis=1) == pytest.approx(1, abs=1e-6)


def test_a_picture_gets_the_same_alone_and_in_a_batch(folder: Path, cache: FeatureCache) -> None:
    """In any order."""
    model, colours = opened(folder, cache), ["red", "lime", "blue", "orange", "black"]
    together = said(model, *colours)
    assert together == pytest.approx(np.concatenate([said(model, colour) for colour in colours]))
    assert together == pytest.approx(said(model, *colours[::-1])[::-1])
    assert np.isfinite(together).all(), "black, whose vector has no direction, too"


def test_large_logits_are_no_trouble(cache: FeatureCache) -> None:
    """Neither of several choices nor of one."""
    for multiple in (False, True):
        head = Head("c", ("a", "b"), np.array([[5000.0, -5000]] * 3), np.zeros(2), multiple=multiple)
        assert said(HeadsModel(TAG, [head], {GENERAL: Colours()}, cache), "red") == pytest.approx(np.array([[1, 0]]))


def test_what_was_saved_says_the_same(folder: Path, cache: FeatureCache) -> None:
    """And knows its choices, control by control."""
    before, after = HeadsModel(TAG, [KIND, FLAWS], {GENERAL: Colours()}, cache), opened(folder, cache)
    assert said(after, "red", "tan") == pytest.approx(said(before, "red", "tan"), abs=1e-6)
    assert after.vocabulary == before.vocabulary
    assert [(own.control, own.start, own.classes, own.multiple) for own in after.vocabulary.own] == [
        ("kind", 0, ("apple", "leaf", "sky"), False), ("flaws", 3, ("hot", "cold"), True)
    ]  # fmt: skip


def test_what_a_head_has_learned_is_saved_with_it(tmp_path: Path, cache: FeatureCache) -> None:
    """A colour that is none of those is strange to it, and to no other head."""
    shades = [(255, green, blue) for green in range(0, 60, 8) for blue in range(0, 60, 12)]
    shades += [(green, blue, 255) for _, green, blue in shades]
    vectors = np.concatenate([unit(Colours().vectors(Colours().prepare(plain(each)))) for each in shades])
    familiar = Familiar.of(vectors, np.arange(len(shades)) // (len(shades) // 2))
    assert familiar is not None
    save(tmp_path, [replace(KIND, familiar=familiar), FLAWS], "colours-1")
    model = opened(tmp_path, cache)
    rows, strange = model.answers(np.concatenate([model.prepare(plain(each)) for each in ("red", "blue", "lime")]))
    assert rows == pytest.approx(said(model, "red", "blue", "lime"))
    assert (strange > 0).tolist() == [[False, False], [False, False], [True, False]]
    with np.load(tmp_path / ARRAYS) as arrays:
        np.savez(tmp_path / ARRAYS, **{name: array for name, array in arrays.items() if name != "familiar_0_numbers"})
    with pytest.raises(ModelLoadError, match=f"The file {ARRAYS} of .* is damaged"):
        opened(tmp_path, cache)


def test_files_hold_numbers_and_plain_text_alone(folder: Path) -> None:
    """Nothing runs when they are read."""
    assert sorted(path.name for path in folder.iterdir()) == ["heads.json", "heads.npz"]
    assert set(json.loads((folder / "heads.json").read_text())) == {"format", "heads", "embedder", "base"}
    with np.load(folder / ARRAYS, allow_pickle=False) as arrays:
        assert {array.dtype.kind for array in arrays.values()} == {"f"}


def test_the_metadata_tells_what_must_be_kept(tmp_path: Path) -> None:
    """The base network above all, without which the heads are worth nothing."""
    assert save(tmp_path, [KIND], "colours-1", BASE).plain() == {
        "choices": {"kind": ["apple", "leaf", "sky"]}, "embedder": "colours-1", "base": BASE,
    }  # fmt: skip
    known = Manifest(reason="It is as good.", choices={"old": ["twig"]}, base=BASE)
    assert save(tmp_path, [KIND], "colours-1", manifest=known).plain() == {
        "reason": "It is as good.", "choices": {"kind": ["apple", "leaf", "sky"]}, "embedder": "colours-1",
    }  # fmt: skip


def test_a_remembered_picture_is_not_looked_at_again(cache: FeatureCache) -> None:
    """Its row is the same to the last bit, and features of another embedder are none of its."""
    colours = Colours()
    model = HeadsModel(TAG, [KIND], {GENERAL: colours}, cache)
    data = png("tan")
    key = model.key(data)
    assert key is not None
    assert model.remembered(key) is None
    fresh = model.prepare(plain("tan"), key)
    cache.close()
    known = model.remembered(key)
    assert known is not None
    assert known.tolist() == fresh.tolist()
    assert colours.seen == 1
    other = HeadsModel(TAG, [KIND], {GENERAL: Colours("colours-2")}, cache)
    assert other.remembered(key) is None
    assert model.remembered(model.key(png("red"))) is None


def test_a_picture_without_a_key_is_not_remembered(cache: FeatureCache) -> None:
    """As the changed copies of a training."""
    model = HeadsModel(TAG, [KIND], {GENERAL: Colours()}, cache)
    model.prepare(plain("tan"))
    cache.close()
    assert model.remembered(model.key(png("tan"))) is None


def test_remembered_vectors_of_another_length_are_not_used(cache: FeatureCache) -> None:
    """Whatever has come into the file under this name."""
    model = HeadsModel(TAG, [KIND], {GENERAL: Colours()}, cache)
    key = model.key(png("tan"))
    cache.put("colours-1", {key: np.ones(4, np.float32)})
    cache.close()
    assert model.remembered(key) is None






def test_heads_of_another_embedder_are_refused(folder: Path, cache: FeatureCache) -> None:
    """Its vectors mean something else; the sentence names both and the two ways out."""
    with pytest.raises(ModelLoadError) as refused:
        opened(folder, cache, "colours-2")
    assert str(refused.value) == (
        f"{TAG} was learned on features of the embedder colours-1, and colours-2 is set now. Set CELESTIAL_EMBEDDER"
        " back, or press Start Training for a model of the new one's features."
    )


def about(**changes: Any) -> Callable[[Path], None]:
    """Write other things into heads.json; those of the first head under `head`."""

    def change(folder: Path) -> None:
        path = folder / "heads.json"
        told = json.loads(path.read_text())
        told["heads"][0] |= changes.pop("head", {})
        path.write_text(json.dumps(told | changes))

    return change


def arrays(**changes: Any) -> Callable[[Path], None]:
    """Put other arrays into heads.npz; None takes one away."""

    def change(folder: Path) -> None:
        with np.load(folder / ARRAYS) as known:
            given = {name: array for name, array in (dict(known) | changes).items() if array is not None}
        np.savez(folder / ARRAYS, **given)

    return change


def cut(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2])

    return change


class Runs:
    def __reduce__(self) -> Any:
        return pytest.fail, ("a pickle was read",)


def a_pickle(folder: Path) -> None:
    (folder / ARRAYS).write_bytes(pickle.dumps(Runs()))


def a_pickle_inside(folder: Path) -> None:
    with zipfile.ZipFile(folder / ARRAYS, "w") as archive:
        archive.writestr("weights_0.npy", pickle.dumps(Runs()))


@pytest.mark.parametrize(
    ("damage", "name", "why"),
    [
        pytest.param(lambda folder: (folder / ARRAYS).unlink(), "heads.npz", "FileNotFoundError", id="no numbers"),
        pytest.param(cut("heads.npz"), "heads.npz", "BadZipFile", id="half the numbers"),
        pytest.param(lambda folder: (folder / ARRAYS).write_bytes(b""), "heads.npz", "EOFError", id="no bytes"),
        pytest.param(a_pickle, "heads.npz", "ValueError", id="a pickle"),
        pytest.param(a_pickle_inside, "heads.npz", "ValueError", id="a pickle inside"),
        pytest.param(arrays(weights_0=np.array([None, Runs()])), "heads.npz", "ValueError", id="objects"),
        pytest.param(arrays(bias_1=None), "heads.npz", "KeyError", id="an array less"),
        pytest.param(arrays(bias_0=np.array(["a", "b", "c"])), "heads.npz", "ValueError", id="words"),
        pytest.param(arrays(weights_0=np.ones((4, 3))), "heads.npz",
                     "must have the shapes (3, 3) and (3,), got (4, 3) and (3,)", id="too many features"),
        pytest.param(arrays(bias_1=np.ones(3)), "heads.npz",
                     "'flaws' must have the shapes (3, 2) and (2,), got (3, 2) and (3,)", id="too many choices"),
        pytest.param(arrays(bias_0=np.array([0, 0, np.nan])), "heads.npz", "must be finite", id="no number"),
        pytest.param(cut("heads.json"), "heads.json", "data was truncated", id="half the text"),
        pytest.param(lambda folder: (folder / "heads.json").write_text("<"), "heads.json", "malformed", id="no JSON"),
        pytest.param(about(format=2), "heads.json", "Invalid enum value 2 - at `$.format`", id="another format"),
        pytest.param(about(heads=[]), "heads.json", "length >= 1 - at `$.heads`", id="no heads"),
        pytest.param(about(heads=[{}]), "heads.json", "missing required field `control`", id="an empty head"),
        pytest.param(about(embedder=None), "heads.json", "Expected `str`, got `null` - at `$.embedder`", id="embedder"),
        pytest.param(about(head={"control": "flaws"}), "heads.json", "two heads are of one control", id="control"),
        pytest.param(about(head={"classes": ["a", "a", "b"]}), "heads.json", "names that differ", id="classes"),
        pytest.param(about(head={"kind": "forest"}), "heads.json", "Invalid enum value 'forest'", id="kind"),
        pytest.param(about(head={"spaces": ["hyper"]}), "heads.json", "Invalid enum value 'hyper'", id="space"),
        pytest.param(about(head={"spaces": []}), "heads.json", "do not fit its kind", id="no space"),
        pytest.param(about(head={"kind": "network"}), "heads.json", "do not fit its kind", id="kind and spaces"),
        pytest.param(about(head={"spaces": ["own"]}), "heads.json", "needs a base network, and none", id="no base"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_a_sentence(
    folder: Path, cache: FeatureCache, damage: Callable[[Path], None], name: str, why: str
) -> None:
    """It names the file and the way out, and no pickle is ever read."""
    damage(folder)
    with pytest.raises(ModelLoadError) as refused:
        opened(folder, cache)
    message = str(refused.value)
    assert message.startswith(f"The file {name} of {TAG} is damaged: ")
    assert why in message
    assert message.endswith("or press Start Training for a new one.")


def test_vectors_of_length_one_keep_their_direction() -> None:
    """Each row by itself; one without a direction stays as it is."""
    vectors = np.array([[3.0, 4], [0, 0], [0, -2e-3]], np.float32)
    assert unit(vectors) == pytest.approx(np.array([[0.6, 0.8], [0, 0], [0, -1]]))


def test_a_description_that_is_nested_without_end_is_damaged(tmp_path: Path) -> None:
    """In a part that nobody reads, too."""
    (tmp_path / "heads.json").write_text('{"zz":' + "[" * 100_000 + "]" * 100_000 + ',"embedder":"x"}')
    with pytest.raises(ModelLoadError, match="damaged"):
        read_about(TAG, tmp_path)
