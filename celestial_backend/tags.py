"""What the tags of models say: which project a model was trained for, and by which job."""

from __future__ import annotations

import re

from celestial_backend.settings import MODEL_NAME

PROJECT_VERSION = re.compile(r"project-(?P<project>[0-9]+)-[0-9a-z]+")


def is_tag(text: str) -> bool:
    """Whether a text, such as a title, is the tag of a model of ours."""
    return text.startswith(f"{MODEL_NAME}:")


def project_of(tag: str) -> str | None:
    """The project that a tag's model was trained for, None for a model of all projects."""
    found = PROJECT_VERSION.fullmatch(tag.partition(":")[2])
    return found["project"] if found else None


def project_tag(project: str, job_id: str) -> str:
    """The tag of the model that a job trains for a project."""
    return f"{MODEL_NAME}:project-{project}-{job_id}"
