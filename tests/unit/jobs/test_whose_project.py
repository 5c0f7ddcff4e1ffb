"""Whose model a project gets: numbers begin anew in another Label Studio, and in one that was set up again."""

from __future__ import annotations

from typing import Any

import pytest
from flask.testing import FlaskClient

from celestial_backend.models.pointers import Pointer
from celestial_backend.models.store import DEFAULT_MODEL
from celestial_backend.planets import network
from celestial_backend.planets.network import load_card
from celestial_backend.services import Services, build
from celestial_backend.settings import MODEL_NAME, Settings, project_parts, project_tag
from celestial_backend.web.app import create_app
from tests.support import fake_project
from tests.support.backend_server import label_config

settings, studio = fake_project.settings, fake_project.studio
OURS, ANOTHER = "1795374408", "1795999999"


@pytest.fixture
def services(settings: Settings, studio: Any) -> Services:
    """Project 7 of our Label Studio has a model of its own."""
    services, card = build(settings), load_card(DEFAULT_MODEL)
    services.store.live_tag()
    tag = services.store.registry.add_folder(DEFAULT_MODEL, project_tag("7", "ab12").partition(":")[2])
    assert card.classes
    studio.born = OURS
    services.jobs.know(f"7.{OURS}")
    services.jobs.look("7")
    services.store.publish("7", tag, job="ab12")
    return services


def served(services: Services, made: str) -> str:
    client: FlaskClient = create_app(services).test_client()
    answer = client.post("/setup", json={"project": f"7.{made}", "schema": label_config()})
    assert answer.status_code == 200, answer.text
    return str(answer.json["model_version"])


DEFAULT = f"{MODEL_NAME}:{network.version(DEFAULT_MODEL)}"
OWN = project_tag("7", "ab12")


def test_a_project_of_another_label_studio_gets_no_stranger_s_model(services: Services) -> None:
    """It has the same number and was made at another time: it is served what all are, and ours as before."""
    assert served(services, OURS) == OWN
    assert served(services, ANOTHER) == DEFAULT
    services.jobs.look("7")
    assert (served(services, OURS), served(services, ANOTHER)) == (OWN, DEFAULT), "our Label Studio has confirmed it"
    assert services.store.live_tag("7") == OWN, "who tells of no moment means ours"


def test_a_project_of_a_label_studio_that_was_set_up_again_begins_anew(services: Services, studio: Any) -> None:
    """As soon as Label Studio says so: without the old one's model, which is there for a way back, and its labels."""
    services.jobs.ledger.read_until("7", "2026-11-23T01:02:03Z")
    studio.born = ANOTHER
    assert served(services, ANOTHER) == DEFAULT
    services.jobs.look("7")
    known = services.jobs.ledger.known("7")
    assert known is not None
    assert (known.made, known.read_until, known.doubted) == (ANOTHER, None, False)
    assert (served(services, ANOTHER), served(services, OURS)) == (DEFAULT, DEFAULT)
    services.store.publish("7", OWN)
    assert services.store.pointers.read("7") == Pointer(OWN, made=ANOTHER)
    assert (served(services, ANOTHER), served(services, OURS)) == (OWN, DEFAULT)


def test_a_project_that_was_forgotten_leaves_its_model_to_no_other(services: Services, studio: Any) -> None:
    """As one that Label Studio has not any more, before it has another one of its number."""
    services.jobs.ledger.forget("7")
    studio.born = ANOTHER
    assert served(services, ANOTHER) == DEFAULT
    services.jobs.look("7")
    assert services.store.live_tag("7") == DEFAULT, "for a command or a training too"


def test_a_pointer_of_an_older_release_is_the_project_s_that_label_studio_has(services: Services) -> None:
    """It says nothing of when the project was made; until Label Studio does it is everybody's of that number."""
    with services.database.writing("7") as work:
        work.run("UPDATE live SET made = ''")
        work.run("UPDATE projects SET made = ''")
    assert (served(services, OURS), served(services, ANOTHER)) == (OWN, OWN)
    services.jobs.look("7")
    assert (served(services, OURS), served(services, ANOTHER)) == (OWN, DEFAULT)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("7.1795374408", ("7", "1795374408")),
        ("7@1795374408", ("7", "1795374408")),
        ("7", ("7", "")),
        ("7.", ("7", "")),
        ("7.x", ("7", "")),
        ("7.1.2", ("7", "")),
        ("x.1795374408", ("", "")),
        ("", ("", "")),
        ("0.1", ("", "")),
        ("9" * 30 + ".1", ("", "")),
    ],
)
def test_the_parts_of_what_label_studio_sends(text: str, parts: tuple[str, str]) -> None:
    assert project_parts(text) == parts
