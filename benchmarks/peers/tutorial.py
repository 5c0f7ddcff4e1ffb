"""
A backend as the MLOps guide builds it: FastAPI, one picture a request, ``model.predict`` for it.

The first task of a request is answered and no other; the picture is found in a folder by the
name it had before it was uploaded; the model is loaded through ``bentoml.keras`` before the
server listens. The model stands for the guide's own, which has the same two custom objects.
"""

import os
import uuid
from pathlib import Path
from typing import Any

import bentoml
from fastapi import FastAPI  # type: ignore[import-not-found,unused-ignore]
from PIL import Image

VERSION = "tutorial"
PICTURES = Path(os.environ["BENCHMARK_PICTURES"])

app = FastAPI()
stored = bentoml.keras.get("celestial_bodies_classifier_model")
preprocess, postprocess = stored.custom_objects["preprocess"], stored.custom_objects["postprocess"]
model = stored.load_model()


@app.get("/health")  # type: ignore[untyped-decorator,unused-ignore]
async def health() -> dict[str, str]:
    """Say that it runs."""
    return {"status": "ok"}


@app.post("/setup")  # type: ignore[untyped-decorator,unused-ignore]
async def setup(_: dict[str, Any]) -> dict[str, str]:
    """Say which version it is."""
    return {"model_version": VERSION}


@app.post("/webhook")  # type: ignore[untyped-decorator,unused-ignore]
async def webhook() -> dict[str, str]:
    """Leave every event alone."""
    return {"status": "Unknown event"}


@app.post("/predict")  # type: ignore[untyped-decorator,unused-ignore]
async def predict(data: dict[str, Any]) -> dict[str, Any]:
    """Predict the first task."""
    name = data["tasks"][0]["data"]["image"].partition("-")[2]
    answer = postprocess(model.predict(preprocess(Image.open(PICTURES / name))))
    chosen = answer["prediction"]
    region = {
        "id": str(uuid.uuid4()), "from_name": "choice", "to_name": "image", "type": "choices",
        "value": {"choices": [chosen]},
    }  # fmt: skip
    return {"results": [{"model_version": VERSION, "score": answer["probabilities"][chosen], "result": [region]}]}
