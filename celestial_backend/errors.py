"""
Everything that can go wrong, one class per cause.

    CelestialError
    ├── SettingsError          a setting cannot be used
    ├── RequestError           a request body that is not what Label Studio sends
    │   ├── BodyTooLargeError  it has too many bytes
    │   └── BodyTooLateError   it did not come in time
    ├── ForeignRequestError    a request that the web page of another site makes
    ├── BusyError              more is asked for at once than one process takes on
    ├── LabelConfigError       a label config that the model cannot serve
    ├── ImageError             a picture that cannot be had
    │   ├── ForbiddenError     its address or path is not allowed
    │   ├── FetchError         it could not be fetched
    │   │   └── LockedError    Label Studio has it, and the token is missing or refused
    │   ├── TooLargeError      it has too many bytes or pixels
    │   └── DecodeError        its bytes are no picture
    ├── ModelError             a model that cannot be used
    │   ├── ModelNotFoundError it is not in the store
    │   └── ModelLoadError     it is there and does not load, or does not work
    ├── StudioError            Label Studio did not answer as it should
    │   ├── ProjectGoneError   it has no such project
    │   └── TokenError         it refuses the token, or there is none
    ├── StateError             the database, or the state folder, cannot be read or written
    └── TrainingError          a training that cannot give a model
        ├── NotEnoughDataError too few examples
        └── CannotGrowError    a model that cannot be taught further

Messages are sentences for people: the rule, the value seen, the place and the
remedy. They may be sent to a client, so they hold no secret and no path of the
server that the operator did not choose to name.
"""


from __future__ import annotations

import re

STATE_REMEDY = "Check that this user can write to the folder that MODEL_DIR names, and that its disk has space."
DATABASE_REMEDY = "Start the database, or correct CELESTIAL_DATABASE_URL; without it, it is a file in the state folder."


PASSWORD = "password"  # noqa: S105 - the code of a refusal for want of the right one


def code_of(name: str) -> str:
    """The code of an error class by its name: LabelConfigError is ``label_config``."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name.removesuffix("Error")).lower()


class CelestialError(Exception):
    """
    Base of all errors of this package; `str()` of it is the sentence to show.

    Attributes:
        exit_code: What a command ends with.
        status: Of the HTTP answer.
        code: The cause for programs, which do not read sentences; by the name of the class.
    """

    exit_code = 1
    status = 500
    code = "celestial"

    def __init_subclass__(cls) -> None:
        cls.code = code_of(cls.__name__)


class SettingsError(CelestialError):
    """A setting cannot be used; the message lists every problem found."""

    exit_code = 2


class RequestError(CelestialError):
    """A request body that is not what Label Studio sends."""

    status = 400


class BodyTooLargeError(RequestError):
    """A request body with more bytes than the settings allow."""

    status = 413


class BodyTooLateError(RequestError):
    """A request body that was not there in time."""

    status = 408


class ForeignRequestError(CelestialError):
    """A request that a browser makes for the page of another site, or may do so."""

    status = 403


class BusyError(CelestialError):
    """More is asked for at once than one process takes on; later it may be answered."""

    status = 503


class LabelConfigError(CelestialError):
    """A label config that cannot be read, or that has controls and none that can be served."""

    status = 422


class ImageError(CelestialError):
    """A picture of a task that cannot be had; costs that task its prediction, and no other."""

    status = 422


class ForbiddenError(ImageError):
    """The picture's host, path or scheme is not allowed."""


class FetchError(ImageError):
    """The picture could not be fetched."""


class LockedError(FetchError):
    """The picture is in Label Studio, and the token that opens it is missing or refused."""


class TooLargeError(ImageError):
    """The picture has more bytes or pixels than the settings allow."""


def file_too_large(max_mb: float, mb: float | None = None) -> TooLargeError:
    """The error about a picture file of so many megabytes, where it may have `max_mb`; None where more still come."""
    seen = "more" if mb is None else f"{mb:.1f}"
    return TooLargeError(
        f"a picture file may have {max_mb:g} MB, and this one has {seen}."
        " Raise CELESTIAL_IMAGE_MAX_MB or shrink the picture."
    )


class DecodeError(ImageError):
    """The bytes that came are not a picture that can be read."""


class ModelError(CelestialError):
    """A model that cannot be used."""

    exit_code = 3
    status = 503


class ModelNotFoundError(ModelError):
    """The wanted model is not in the BentoML store."""


class ModelLoadError(ModelError):
    """The model is in the store and cannot be loaded, or its parts do not work together."""


class StudioError(CelestialError):
    """Label Studio did not answer as it should."""

    exit_code = 4
    status = 502


class ProjectGoneError(StudioError):
    """Label Studio has no such project, or does not show it to the token's user."""


class TokenError(StudioError):
    """Label Studio refuses the token, or there is none."""

    status = 422  # of a project whose pictures need one


class StateError(CelestialError):
    """The database or the state folder cannot be read or written; what was to be written was not accepted."""

    exit_code = 6
    status = 503


class TrainingError(CelestialError):
    """A training that cannot give a model."""

    exit_code = 5


class NotEnoughDataError(TrainingError):
    """Too few examples; the message gives the counts per class."""


class CannotGrowError(TrainingError):
    """A model that cannot be taught further; the message offers a training from nothing."""
