"""The command `features`: networks of `keras.applications`, put into the BentoML store as embedders."""

from __future__ import annotations

import inspect
import tempfile
import warnings
from pathlib import Path
from typing import Any

import click

from celestial_backend.commands.shown import Shown
from celestial_backend.errors import ModelError, SettingsError
from celestial_backend.models.embedders import KEPT_AS, SCALING
from celestial_backend.models.registry import Registry
from celestial_backend.planets.network import FILES
from celestial_backend.settings import Settings

IMAGENET = "imagenet"


@click.group(short_help="Add another network that makes features.")
def features() -> None:
    """What makes features of pictures, in the place of the network inside."""


@features.command("add")
@click.argument("name")
@click.option(
    "--weights", type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A file with its weights, without the top.  [default: fetched by Keras, those of ImageNet]",
)  # fmt: skip
@click.pass_obj
def add(settings: Settings, name: str, weights: Path | None) -> None:
    """
    Put the network NAME of keras.applications, such as EfficientNetV2B0, into the store for CELESTIAL_EMBEDDER.

    Run again, it replaces the one that is there.
    """
    with Shown(f"Getting {name} and its weights"):
        network, scaling = build(name, weights)
    tag = f"{KEPT_AS}:{name.lower()}"
    registry = Registry(settings.bentoml_home)
    with Shown(f"Putting {name} into the store"), tempfile.TemporaryDirectory() as place:
        saved, kept = Path(place, "saved"), Path(place, "kept")
        network.save(saved, zipped=False)
        kept.mkdir()
        for file in FILES:
            (saved / file).rename(kept / file)
        registry.remove(tag)
        facts = {SCALING: scaling, "weights": weights.name if weights else IMAGENET}
        registry.add_files(tag, kept, facts, "bentoml.keras")
    click.echo(f"{tag} gives {network.output_shape[1]} features of a picture.")
    click.echo(
        f"Set CELESTIAL_EMBEDDER={name}, start the backend anew, and press Start Training in projects that have learned"
        " from other features.",
        err=True,
    )


def build(name: str, weights: Path | None) -> tuple[Any, str]:
    """
    A Keras network that gives (N, D), and the module of `keras.applications` that makes its pixels.

    Args:
        name: In any case.
        weights: A file with its weights without the top; without one Keras fetches those of ImageNet.

    Raises:
        SettingsError: There is no such network.
        ModelError: The weights could not be fetched, or are not its own.
    """
    from keras import applications

    known = {each.lower(): each for each, made in inspect.getmembers(applications, inspect.isfunction)}
    if name.lower() not in known:
        raise SettingsError(f"A network of keras.applications is wanted, got {name!r}; there are"
                            f" {', '.join(sorted(known.values()))}.")  # fmt: skip
    make = getattr(applications, known[name.lower()])
    given = str(weights) if weights else IMAGENET
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of weights that do not fit there are hundreds before the error
            height, width = make(weights=None).input_shape[1:3]
            network = make(include_top=False, pooling="avg", weights=given, input_shape=(height, width, 3))
    except Exception as error:  # whatever Keras, h5py and the network meet
        raise ModelError(_not_had(known[name.lower()], weights, error)) from error
    return network, make.__module__.rpartition(".")[2]


def _not_had(name: str, weights: Path | None, error: Exception) -> str:
    why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if weights is None:
        return (
            f"The weights of {name} could not be fetched ({why}). Fetch the file without the top where there is a"
            " network, and give it with --weights FILE.h5."
        )
    return (
        f"{weights.name} must hold the weights of {name} without its top, and cannot be used ({why}). Save them with"
        " network.save_weights(\"name.weights.h5\"), or fetch Keras's own file whose name ends in notop.h5."
    )
