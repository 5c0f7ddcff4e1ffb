"""Label Studio's numbers of projects, and the tags of models, which say for which project and by which job."""

from __future__ import annotations

import re

from celestial_backend.settings import MODEL_NAME

PROJECT_MAX = 2**63 - 1  # what a database holds
NUMBER = re.compile(r"[1-9][0-9]{0,18}")
PROJECT_VERSION = re.compile(r"project-(?P<project>[0-9]+)-[0-9a-z]+")


def is_project(text: object) -> bool:
    """Whether it is the number of a project of Label Studio: ASCII digits, the first one no 0, below 2^63."""
    return isinstance(text, str) and NUMBER.fullmatch(text) is not None and int(text) <= PROJECT_MAX


def no_project(text: str) -> str:
    """The sentence for a text that is no number of a project."""
    return (
        f"The number of a Label Studio project must be a whole number from 1 to {PROJECT_MAX}, got {text[:40]!r}."
        " It stands in the address of the project's page."
    )


def is_tag(text: str) -> bool:
    """Whether a text, such as a title, is the tag of a model of ours."""
    return text.startswith(f"{MODEL_NAME}:")


def project_of(tag: str) -> str | None:
    """
    The project that a tag's model was trained for, None for a model of all projects.

    Releases before `is_project` trained for texts such as "0007"; those models stay out of what all projects get.
    """
    found = PROJECT_VERSION.fullmatch(tag.partition(":")[2])
    return found["project"] if found else None


def project_tag(project: str, job_id: str) -> str:
    """The tag of the model that a job trains for a project."""
    return f"{MODEL_NAME}:project-{project}-{job_id}"
