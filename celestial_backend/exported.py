"""Models that `bentoml.models.export_model` wrote to a file."""

from __future__ import annotations

import logging
import tarfile
from lzma import LZMAError
from pathlib import Path
from typing import Any

import yaml

from celestial_backend.errors import ModelLoadError

logger = logging.getLogger(__name__)

UNREADABLE = (OSError, EOFError, LookupError, TypeError, StopIteration, tarfile.TarError, LZMAError, yaml.YAMLError)


def tag_of(archive: Path) -> str:
    """
    The tag of an exported model, read from the description inside it, without BentoML.

    Raises:
        ModelLoadError: The file is no such archive, or not a whole one.
    """
    try:
        with tarfile.open(archive) as tar:
            member = next(member for member in tar if Path(member.name).name == "model.yaml")
            described = yaml.safe_load(tar.extractfile(member) or b"")
        return f"{described['name']}:{described['version']}"
    except UNREADABLE as error:
        raise ModelLoadError(_not_exported(archive, error)) from error


def import_into(store: Any, archive: Path) -> None:
    """
    Import an exported model into a store of BentoML, under the tag it was exported with.

    Raises:
        ModelLoadError: BentoML cannot read the file.
    """
    import bentoml

    try:
        tag = bentoml.models.import_model(str(archive), _model_store=store).tag
    except Exception as error:  # BentoML lets through whatever the archive causes
        raise ModelLoadError(_not_exported(archive, error)) from error
    logger.info("Imported %s from CELESTIAL_BENTOMODEL", tag)


def _not_exported(archive: Path, error: Exception) -> str:
    return (
        f"CELESTIAL_BENTOMODEL names {archive.name}, which is not a model that bentoml.models.export_model "
        f"wrote ({type(error).__name__}). Export it again."
    )
