"""Heads on the features of a real network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from celestial_backend.errors import ModelLoadError
from celestial_backend.features import FeatureCache
from celestial_backend.models.classifier import Classifier, Parts
from celestial_backend.models.headed import GENERAL, OWN, Head, save
from tests.support import colours
from tests.support.colours import plain, png
from tests.support.heads import BASE, FLAWS, KIND, TWO, opened, said

cache = colours.cache


def test_features_may_be_those_of_a_network(tmp_path: Path, cache: FeatureCache) -> None:
    """Its own alone, or behind the general ones, each of length 1; they are remembered under its tag."""
    own = Head("kind", KIND.classes, KIND.weights, KIND.bias, (OWN,))
    weights = np.vstack([FLAWS.weights, np.zeros((3, 2))])
    both = Head("flaws", FLAWS.classes, weights, FLAWS.bias, (GENERAL, OWN), multiple=True)
    save(tmp_path, [own, both], "colours-1", BASE)
    base = network()
    model = opened(tmp_path, cache, network=lambda tag: {BASE: base}[tag])
    assert said(model, "red") == pytest.approx(np.array([[0.5, 0.25, 0.25, 1 / (1 + np.exp(-3)), 1 / (1 + np.exp(4))]]))
    key = model.key(png("red"))
    model.prepare(plain("red"), key)
    cache.close()
    assert cache.get(BASE, [key])[key].tolist() == [2, 0, 0]


def test_a_network_answers_controls_that_have_no_labels(tmp_path: Path, cache: FeatureCache) -> None:
    """With its own probabilities, classes and all; also from memory."""
    save(tmp_path, [KIND, Head.of_network("mood", ("warm", "cool"))], "colours-1", BASE)
    base = network()
    model = opened(tmp_path, cache, network=lambda _: base)
    key = model.key(png("red"))
    fresh = model.probabilities(model.prepare(plain("red"), key))
    assert fresh == pytest.approx(np.array([[1 / 2, 1 / 4, 1 / 4, 2 / 3, 1 / 3]]), abs=1e-3)
    cache.close()
    assert model.probabilities(model.remembered(key)).tolist() == fresh.tolist()  # type: ignore[arg-type]
    choices = model.vocabulary.choices(
        '<View><Image name="i" value="$image"/><Choices name="mood" toName="i"><Choice value="Cosy"'
        ' predicted_values="warm"/><Choice value="COOL"/></Choices></View>'
    )
    result, score = choices.prediction({"image": fresh[0].tolist()})
    assert result[0]["value"] == {"choices": ["Cosy"]}
    assert score == pytest.approx(2 / 3, abs=1e-3)


def test_a_network_with_other_classes_does_not_answer(tmp_path: Path, cache: FeatureCache) -> None:
    """Its columns would be given to the wrong choices."""
    save(tmp_path, [Head.of_network("mood", ("cool", "warm"))], "colours-1", BASE)
    base = network()
    with pytest.raises(ModelLoadError, match=r"other classes than when it was learned\. Bring that model back"):
        opened(tmp_path, cache, network=lambda _: base)


def test_a_network_that_does_not_end_in_a_dense_layer_has_no_features(tmp_path: Path, cache: FeatureCache) -> None:
    """It can be served, and nothing can be learned on it."""
    save(tmp_path, [Head("kind", KIND.classes, KIND.weights, KIND.bias, (OWN,))], "colours-1", BASE)
    base = network(("a", "b", "c"), last=keras.layers.Softmax())
    with pytest.raises(ModelLoadError, match=f"The network of {BASE} has no features, as it does not end in a Dense"):
        opened(tmp_path, cache, network=lambda _: base)


def network(classes: tuple[str, ...] = ("warm", "cool"), *, last: Any = None) -> Classifier:
    """Red, green and blue, doubled, and of these warm and cool."""
    layers = [keras.layers.Input((3,)), keras.layers.Dense(3, use_bias=False), last or keras.layers.Dense(2)]
    model = keras.Sequential(layers)
    model.layers[0].set_weights([2 * np.eye(3)])
    if last is None:
        model.layers[1].set_weights([np.array([[TWO, 0.0], [0, 0], [0, TWO]]) / 2, np.zeros(2)])

    def postprocess(outputs: Any) -> dict[str, Any]:
        shares = np.exp(outputs[0]) / np.exp(outputs[0]).sum()
        return {"prediction": "", "probabilities": dict(zip(classes, shares.tolist(), strict=False))}

    return Classifier(Parts(BASE, model, lambda picture: np.array([picture.getpixel((0, 0))]) / 255, postprocess))


def test_the_general_embedder_is_left_alone_where_nothing_needs_it(tmp_path: Path, cache: FeatureCache) -> None:
    """Whatever is set then."""
    save(tmp_path, [Head("kind", KIND.classes, KIND.weights, KIND.bias, (OWN,))], "colours-1", BASE)
    base = network()
    assert opened(tmp_path, cache, "another", lambda _: base).vocabulary.own[0].control == "kind"
