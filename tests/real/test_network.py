"""What stands before and after the network, and the network itself, worked out on small cases."""

from __future__ import annotations

import math
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from celestial_backend.errors import ModelLoadError
from celestial_backend.pictures.hooks import Postprocess, Preprocess, find_body, level
from celestial_backend.planets import network
from celestial_backend.planets.renderer import BODIES, render

DEFAULT = Path(network.__file__).parent / "default_model"
MEGABYTE = 2**20


def _placed(share: float, x: float, y: float, size_px: int = 200) -> Image.Image:
    """Jupiter at a share of its size, its middle at (x, y) of a black picture."""
    picture = Image.new("RGB", (size_px, size_px))
    side = round(share * size_px)
    body = render("Jupiter", 3, 160).resize((side, side), Image.Resampling.LANCZOS)
    picture.paste(body, (round(x * size_px - side / 2), round(y * size_px - side / 2)))
    return picture


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "YCbCr", "HSV", "I", "I;16", "F"])
def test_any_mode_becomes_one_row_of_floats(mode: str) -> None:
    """Whatever Pillow decodes has the same shape, type and range before the network."""
    grey = render("Moon", 1, 96).convert("L")
    if mode == "I;16":
        picture = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    else:
        picture = grey.convert("RGB").convert(mode) if mode not in ("I", "F", "1") else grey.convert(mode)
    inputs = Preprocess((40, 48))(picture)
    assert inputs.shape == (1, 40, 48, 3)
    assert inputs.dtype == np.float32
    assert np.isfinite(inputs).all()
    assert -1 < inputs.min() < 0.1
    assert 0.9 < inputs.max() < 4


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (200, 3), (2000, 1500)])
def test_any_size_becomes_the_same_shape(size: tuple[int, int]) -> None:
    """One pixel and a large photograph alike."""
    assert Preprocess((72, 72))(render("Mars", 1).resize(size)).shape == (1, 72, 72, 3)


def test_deep_grey_keeps_its_shades() -> None:
    """A picture with 16 bits gives what its 8-bit version gives."""
    grey = render("Moon", 1, 96).convert("L")
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    assert np.abs(Preprocess()(deep) - Preprocess()(grey)).max() < 0.03


def test_transparent_is_black() -> None:
    """A body cut out by transparency is seen on black, whatever colour hides under it."""
    body = render("Mars", 1, 96)
    alpha = body.convert("L").point(lambda value: 255 if value > 10 else 0)
    cut_out = Image.composite(body, Image.new("RGB", body.size, (255, 0, 255)), alpha)
    cut_out.putalpha(alpha)
    assert np.abs(Preprocess()(cut_out) - Preprocess()(body)).mean() < 0.02


@pytest.mark.parametrize(("share", "x", "y"), [(0.25, 0.2, 0.8), (0.4, 0.7, 0.3), (0.6, 0.4, 0.6)])
def test_a_small_body_is_found_and_brought_to_size(share: float, x: float, y: float) -> None:
    """The square is around the body, within a cell and a half of the grid on each side."""
    (left, top, right, bottom), _ = find_body(_placed(share, x, y))
    assert (left + right) / 2 == pytest.approx(200 * x, abs=9)
    assert (top + bottom) / 2 == pytest.approx(200 * y, abs=9)
    assert 200 * share * 0.9 < right - left < 200 * share * 1.8


def test_where_a_small_body_lies_hardly_matters() -> None:
    """The network's input is nearly the same for two places in the picture."""
    one, other = Preprocess()(_placed(0.4, 0.3, 0.3)), Preprocess()(_placed(0.4, 0.65, 0.55))
    assert np.abs(one - other).mean() < 0.1
    assert np.abs(one - Preprocess()(render("Mars", 1))).mean() > 0.2


def test_nothing_to_find_gives_the_whole_picture() -> None:
    """A plain area is passed on as it is, as a finite input."""
    plain = Image.new("RGB", (100, 60), (90, 90, 90))
    (left, top, right, bottom), colour = find_body(plain)
    assert (left, right, (top + bottom) / 2) == (0, 100, 30)
    assert colour == (90, 90, 90)
    assert np.isfinite(Preprocess()(plain)).all()


def test_darkness_and_haze_hardly_matter() -> None:
    """A third of the light, or grey haze over two thirds, gives nearly the same input."""
    picture = render("Earth", 2)
    plain = Preprocess()(picture)
    dark = Preprocess()(ImageEnhance.Brightness(picture).enhance(0.33))
    hazy = Preprocess()(Image.blend(Image.new("RGB", picture.size, (120, 120, 120)), picture, 0.33))
    assert np.abs(plain - dark).mean() < 0.03
    assert np.abs(plain - hazy).mean() < 0.03


def test_level_on_paper() -> None:
    """Values from 0.2 to 0.6 are spread from 0 to 1, and a colour's channels move together."""
    ramp = np.linspace(0.2, 0.6, 101, dtype=np.float32).reshape(1, 101, 1).repeat(3, axis=2)
    ramp[0, 50, 0] += 0.1
    levelled = level(ramp)
    assert levelled[0, 2, 1] == pytest.approx(0, abs=0.01)
    assert levelled[0, 98, 1] == pytest.approx(1, abs=0.01)
    assert levelled[0, 50, 0] - levelled[0, 50, 1] == pytest.approx(0.1 / 0.384, abs=0.01)


def test_the_picture_handed_in_stays_as_it_is() -> None:
    """Preprocessing reads only."""
    picture = render("Venus", 1)
    before = picture.tobytes()
    Preprocess()(picture)
    assert picture.tobytes() == before


def test_softmax_on_paper() -> None:
    """Logits 0, ln 2, ln 5 are one, two and five eighths; the surest class is the prediction."""
    answer = Postprocess(("a", "b", "c"))([[0.0, math.log(2), math.log(5)]])
    assert answer["prediction"] == "c"
    assert list(answer["probabilities"]) == ["a", "b", "c"]
    assert list(answer["probabilities"].values()) == pytest.approx([1 / 8, 2 / 8, 5 / 8], abs=1e-12)


def test_huge_logits_do_not_overflow() -> None:
    """A float32 network may say 1e30; the probabilities still sum to 1."""
    rows = Postprocess(("a", "b")).batch(np.array([[1e30, -1e30], [-3e38, -3e38]], np.float32))
    assert rows.tolist() == [[1.0, 0.0], [0.5, 0.5]]


def test_batches_are_rows_of_single_answers() -> None:
    """Row i of a batch is the answer for row i alone, in any order; rows sum to 1."""
    logits = np.random.default_rng(1).normal(0, 4, (30, 4)).astype(np.float32)
    postprocess = Postprocess(("a", "b", "c", "d"))
    rows, order = postprocess.batch(logits), np.random.default_rng(2).permutation(30)
    assert rows.sum(axis=1) == pytest.approx(np.ones(30), abs=1e-12)
    assert np.array_equal(postprocess.batch(logits[order]), rows[order])
    for row, single in zip(rows, logits, strict=True):
        assert list(postprocess(single[None])["probabilities"].values()) == row.tolist()


@pytest.mark.parametrize("shape", [(1, 3), (2,), (1, 2, 1)])
def test_a_network_with_other_columns_is_refused(shape: tuple[int, ...]) -> None:
    """The message gives both numbers."""
    with pytest.raises(ValueError, match=r"must have 2 columns.*got shape \("):
        Postprocess(("a", "b"))(np.zeros(shape))


@pytest.mark.parametrize("made", [Preprocess((32, 48)), Postprocess(("Earth", "Mars"))])
def test_they_are_pickled_by_reference(made: Any) -> None:
    """BentoML keeps them as pickles: small, equal again, and naming this module."""
    pickled = pickle.dumps(made)
    assert pickle.loads(pickled) == made  # noqa: S301
    assert b"celestial_backend.pictures.hooks" in pickled
    assert len(pickled) < 300


def test_importing_and_reading_a_card_starts_no_tensorflow() -> None:
    """The web server does both before anything else."""
    code = (
        "import sys; from pathlib import Path; from celestial_backend.planets import network;"
        f"network.load_card(Path({str(DEFAULT)!r})); sys.exit('tensorflow' in sys.modules or 'keras' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("text", [None, "{", "[]", '{"classes": ["a"]}'])
def test_a_folder_without_a_good_card_is_refused(tmp_path: Path, text: str | None) -> None:
    """The message names the file, what it must hold and the remedy."""
    if text is not None:
        (tmp_path / network.CARD).write_text(text)
    with pytest.raises(ModelLoadError, match=r"card\.json with classes, size_px.*Train the model again"):
        network.load_card(tmp_path)


def test_temperature_finds_the_number_that_was_multiplied_in() -> None:
    """Truths drawn from softmax(z), logits given as 3 z: the divisor is 3."""
    rng = np.random.default_rng(1)
    honest = rng.normal(0, 2, (20_000, 5))
    truths = (honest + rng.gumbel(size=honest.shape)).argmax(axis=1)
    assert network.temperature(3 * honest, truths) == pytest.approx(3, rel=0.05)


def test_a_folded_network_says_the_same(untrained: Any) -> None:
    """Folding the temperature divides the logits; folding the normalisations changes nothing."""
    inputs = np.random.default_rng(1).random((6, 32, 32, 3), np.float32)
    rng = np.random.default_rng(2)
    for layer in untrained.layers:  # as if trained: no mean is 0 and no variance is 1
        if layer.name.startswith("normalisation_"):
            layer.set_weights([rng.uniform(0.5, 2, one.shape) for one in layer.get_weights()])
    before = untrained.predict_on_batch(inputs)
    plain = network.fused(untrained)
    assert not any("normalisation" in layer.name for layer in plain.layers)
    assert plain.predict_on_batch(inputs) == pytest.approx(before, abs=1e-4)
    network.fold_temperature(plain, 2.5)
    assert plain.predict_on_batch(inputs) == pytest.approx(before / 2.5, abs=1e-4)


@pytest.fixture
def untrained() -> Any:
    return network.build(3, (32, 32), (8, 12, 16, 16))


def test_the_last_layer_is_plain_logits(untrained: Any) -> None:
    """A later training grows this layer for new classes, so it must be the last and have no activation."""
    last = untrained.layers[-1]
    assert (type(last).__name__, last.name, last.units) == ("Dense", "logits", 3)
    assert last.activation.__name__ == "linear"


@pytest.fixture(scope="session")
def shipped() -> Any:
    import keras

    return keras.models.load_model(DEFAULT, compile=False)


def test_the_shipped_model_is_small_and_holds_no_code() -> None:
    """Under 2.5 MB in plain files; JSON, HDF5, arrays, Markdown and PNG only."""
    files = sorted(DEFAULT.iterdir())
    assert {file.suffix for file in files} <= {".json", ".h5", ".npz", ".md", ".png"}
    assert sum(file.stat().st_size for file in files) < 2.5 * MEGABYTE
    assert {*network.FILES, network.CARD, "MODEL_CARD.md"} <= {file.name for file in files}
    assert b"Lambda" not in (DEFAULT / "config.json").read_bytes()


def test_the_shipped_model_knows_drawn_bodies(shipped: Any) -> None:
    """At least 98 % of pictures that the renderer has not drawn before."""
    card = network.load_card(DEFAULT)
    assert card.classes == BODIES
    preprocess = Preprocess(card.size_px)
    inputs = np.concatenate([preprocess(render(body, (777, index))) for body in BODIES for index in range(15)])
    rows = Postprocess(card.classes).batch(shipped.predict_on_batch(inputs))
    assert (rows.argmax(axis=1) == np.repeat(np.arange(10), 15)).mean() >= 0.98


def test_the_shipped_model_answers_row_by_row(shipped: Any) -> None:
    """A picture gets the same answer alone, in a batch, and in another order."""
    card = network.load_card(DEFAULT)
    inputs = np.concatenate([Preprocess(card.size_px)(render(body, 5)) for body in BODIES])
    together = shipped.predict_on_batch(inputs)
    order = np.random.default_rng(1).permutation(len(inputs))
    assert shipped.predict_on_batch(inputs[order]) == pytest.approx(together[order], abs=1e-4)
    for row, alone in enumerate(inputs):
        assert shipped.predict_on_batch(alone[None])[0] == pytest.approx(together[row], abs=1e-4)


def test_the_model_card_gives_the_figures_of_the_run() -> None:
    """The page for people and the card for programs say the same."""
    metrics, page = network.load_card(DEFAULT).metrics, (DEFAULT / "MODEL_CARD.md").read_text("utf-8")
    for value in (metrics["accuracy"], metrics["accuracy_corrupted_mean"], *metrics["accuracy_corrupted"].values()):
        assert f"{value:.2%}".replace("%", " %") in page
    assert "Solar System Scope" in page
    assert "python -m celestial_backend.planets FOLDER --export DIR" in page
