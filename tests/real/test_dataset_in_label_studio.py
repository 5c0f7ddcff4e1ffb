"""A dataset read from a real Label Studio."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from celestial_backend.labels import ChoiceMap
from celestial_backend.learning import dataset as module
from celestial_backend.pictures.reader import ImageReader
from celestial_backend.settings import Settings
from celestial_backend.studio import project
from celestial_backend.studio.client import Studio
from tests.real.test_studio_project import connect
from tests.support import colours, gatherer
from tests.support.gate import gate
from tests.support.gatherer import Gatherer
from tests.support.label_studio import LabelStudioServer
from tests.support.shapes import drawn

cache, gather, no_pause = colours.cache, gatherer.gather, gatherer.no_pause


def test_label_studio_away_in_the_middle(
    label_studio: LabelStudioServer, gather: Gatherer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Uploads are read over HTTP while Label Studio goes away for two seconds: every picture is there in the end."""
    monkeypatch.setattr(project, "PAGE", 20)
    monkeypatch.setattr(project, "FIRST_PAUSE_S", 0.2)
    monkeypatch.setattr(module, "REPORT_EVERY", 10)
    number = label_studio.create_project("away")
    paths = [tmp_path / f"{seed}.png" for seed in range(36)]
    for seed, path in enumerate(paths):
        drawn("disc", seed).save(path)
    label_studio.upload(number, paths)
    for each in label_studio.tasks(number):
        label_studio.annotate(each["id"], "Mars")
    with gate(label_studio.url) as door:
        settings = Settings(label_studio_url=door.url, label_studio_api_key=label_studio.legacy_token)
        reader = connect(door.url, label_studio.legacy_token, number)

        def report(done: int, _: int | None) -> None:
            if done == 10:
                door.shut()
                threading.Timer(2, door.open).start()

        gather.images = ImageReader(settings, Studio(settings))  # type: ignore[assignment]
        choices = ChoiceMap.for_learning(reader.label_config())
        got = gather(reader.labelled_tasks(), wait=reader.label_config, report=report, choices=choices)
        gather.images.close()
        assert reader.labels_since(got.newest) == 0
    assert len(got.examples["choice"]) == 36
    assert got.counts.unreadable == []
