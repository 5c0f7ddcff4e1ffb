"""The command that makes the default model again: ``python -m celestial_backend.planets``."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from celestial_backend import logs
from celestial_backend.errors import CelestialError
from celestial_backend.features.embedder import Lite0
from celestial_backend.planets import replay
from celestial_backend.planets.examples import Example, read_folder
from celestial_backend.planets.training import Progress as Reached
from celestial_backend.planets.training import Recipe, TrainedModel, save, train


@click.command(name="python -m celestial_backend.planets")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--export", type=click.Path(file_okay=False, writable=True, path_type=Path), required=True,
    help="Write the model's plain files to this folder.",
)  # fmt: skip
@click.option("--epochs", type=click.IntRange(min=1), help="Passes over the pictures, in place of the recipe's.")
@click.option("--seed", type=int, help="Seed of everything random, in place of the recipe's.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
@click.option("--features-only", is_flag=True, help="Leave the network that the folder has, and look at FOLDER anew.")
def main(
    folder: Path, export: Path, epochs: int | None, seed: int | None, *, as_json: bool, features_only: bool
) -> None:
    """
    Train the default model again on FOLDER with one sub-folder per class, and write its plain files.

    They include the features of some pictures of FOLDER, which keep what the model knows when a project
    teaches it more.
    """
    examples = read_folder(folder)
    if not features_only:
        trained = _trained(examples, epochs, seed)
        save(trained, export)
    replay.make(export, examples, Lite0())
    if features_only:
        click.echo(export / replay.FILE.name)
        return
    click.echo(json.dumps(trained.metrics) if as_json else _told(export, trained))


def _trained(examples: Sequence[Example], epochs: int | None, seed: int | None) -> TrainedModel:
    recipe, console = Recipe(), Console(stderr=True)
    recipe = replace(recipe, epochs=epochs or recipe.epochs, seed=recipe.seed if seed is None else seed)
    with Progress(
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[score]}"), TimeRemainingColumn(),
        console=console, disable=not console.is_terminal,
    ) as bar:  # fmt: skip
        shown = bar.add_task(f"Training on {len(examples)} pictures", score="")

        def show(at: Reached) -> None:
            bar.update(shown, total=at.epochs * at.steps, completed=at.epoch * at.steps + at.step)
            if at.held_out_accuracy is not None:
                score = f"epoch {at.epoch + 1}/{at.epochs}, held-out {at.held_out_accuracy:.1%}"
                bar.update(shown, score=score)
                if not console.is_terminal:
                    click.echo(f"{score}, loss {at.loss:.3f}, {at.seconds:.0f} s", err=True)

        return train(examples, recipe, show)


def _told(export: Path, trained: TrainedModel) -> str:
    metrics = trained.metrics
    return (
        f"{export}\n"
        f"{metrics['accuracy']:.2%} of {sum(metrics['counts']['held_out'].values())} held-out pictures are right, "
        f"{metrics['accuracy_corrupted_mean']:.2%} when they are noisy, blurred, dark, turned, small or tinted. "
        f"{metrics['seconds']:.0f} s."
    )


if __name__ == "__main__":
    logs.configure("INFO")
    try:
        main()
    except CelestialError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(error.exit_code)
