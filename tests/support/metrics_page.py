"""What /metrics says, read with Prometheus' own parser."""

from __future__ import annotations

from typing import Any

import pytest
from flask.testing import FlaskClient
from prometheus_client.parser import text_string_to_metric_families

from celestial_backend import metrics
from celestial_backend.services import Services
from celestial_backend.web.app import create_app
from tests.support.backend_server import label_config


@pytest.fixture
def client(services: Services) -> FlaskClient:
    return create_app(services).test_client()


class Page:
    """What a page of metrics says."""

    def __init__(self, text: str) -> None:
        families = list(text_string_to_metric_families(text))
        self.kinds = {family.name: family.type for family in families}
        self.samples = [sample for family in families for sample in family.samples]

    def value(self, name: str, **labels: str) -> float:
        """The one sample of that name and those labels."""
        (found,) = [sample.value for sample in self.samples if sample.name == name and sample.labels == labels]
        return found

    def labels(self, name: str) -> list[dict[str, str]]:
        return [sample.labels for sample in self.samples if sample.name == name]


def page(client: FlaskClient) -> Page:
    answer = client.get("/metrics")
    assert answer.status_code == 200
    assert answer.content_type == metrics.CONTENT_TYPE
    return Page(answer.text)


def predict(client: FlaskClient, tasks: list[Any]) -> Any:
    return client.post("/predict", json={"tasks": tasks, "label_config": label_config(), "project": "7.1"})
