"""
A model made as the MLOps guide makes its own; a script, so that its functions are pickled whole.

Usage: guide_model.py FOLDER. Writes guide.bentomodel, picture-<n>.png, and answers.json: for
each picture what the model's own preprocess, predict and postprocess give.
"""

import json
import sys
from pathlib import Path

import bentoml
import keras
import numpy as np
import tensorflow as tf

from celestial_backend.planets.renderer import render

NAMES = ["Earth", "Jupiter", "Mars", "Mercury", "Moon", "Neptune", "Pluto", "Saturn", "Uranus", "Venus"]
SIZE = (32, 32)


def main(folder: Path) -> None:
    greyscale, names = True, dict(enumerate(NAMES))

    def preprocess(picture):
        small = picture.convert("L" if greyscale else "RGB").resize(SIZE)
        return np.expand_dims(np.array(small) / 255.0, axis=0)

    def postprocess(logits):
        shares = tf.nn.softmax(logits).numpy()[0].tolist()
        return {
            "prediction": names[int(tf.argmax(logits, axis=-1).numpy()[0])],
            "probabilities": {names[column]: share for column, share in enumerate(shares)},
        }

    keras.utils.set_random_seed(3)
    layers = keras.layers
    network = keras.Sequential(
        [
            layers.Input((*SIZE, 1)),
            layers.Conv2D(32, (3, 3), activation="relu"),
            layers.MaxPooling2D((3, 3)),
            layers.Flatten(),
            layers.Dense(64, activation="relu"),
            layers.Dense(len(NAMES)),
        ]
    )
    network.compile(keras.optimizers.Adam(1e-3), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    pictures = [render(name, seed) for seed in range(6) for name in NAMES]
    network.fit(np.concatenate([preprocess(one) for one in pictures])[..., None], np.tile(np.arange(10), 6), verbose=0)

    saved = bentoml.keras.save_model(
        "celestial_bodies_classifier_model",
        network,
        include_optimizer=True,
        custom_objects={"preprocess": preprocess, "postprocess": postprocess},
    )
    bentoml.models.export_model(saved.tag, str(folder / "guide.bentomodel"))
    answers = []
    for index, picture in enumerate(pictures[-12:]):
        picture.save(folder / f"picture-{index}.png")
        answers.append(postprocess(network.predict(preprocess(picture), verbose=0)))
    (folder / "answers.json").write_text(json.dumps({"tag": str(saved.tag), "answers": answers}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
