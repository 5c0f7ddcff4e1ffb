"""The command line: arguments in, one call, text out."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from celestial_backend import logs, training
from celestial_backend.errors import CelestialError
from celestial_backend.examples import read_folder
from celestial_backend.settings import Settings
from celestial_backend.store import ModelStore


class _Commands(click.Group):
    """Turns our errors into a sentence on stderr and the exit code of their class."""

    def invoke(self, context: click.Context) -> object:
        try:
            return super().invoke(context)
        except CelestialError as error:
            click.echo(f"Error: {error}", err=True)
            sys.exit(error.exit_code)


@click.group(cls=_Commands, name="python -m celestial_backend")
@click.pass_context
def main(context: click.Context) -> None:
    """Pre-label images in Label Studio with a BentoML-packaged Keras classifier."""
    context.obj = Settings.from_environ(os.environ)
    logs.configure(context.obj.log_level)


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--export", type=click.Path(path_type=Path), help="Also write the model's plain files to this folder.")
@click.option("--epochs", type=click.IntRange(min=1), help="Passes over the pictures, in place of the recipe's.")
@click.option("--seed", type=int, help="Seed of everything random, in place of the recipe's.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.pass_obj
def train(
    settings: Settings, folder: Path, export: Path | None, epochs: int | None, seed: int | None, *, as_json: bool
) -> None:
    """Train on FOLDER, one sub-folder per class, and register the model in the BentoML store."""
    examples = read_folder(folder)
    recipe = training.Recipe()
    recipe = replace(recipe, epochs=epochs or recipe.epochs, seed=recipe.seed if seed is None else seed)
    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[score]}"), TimeRemainingColumn(),
        console=console, disable=not console.is_terminal,
    ) as bar:  # fmt: skip
        shown = bar.add_task(f"Training on {len(examples)} pictures", score="")

        def show(at: training.Progress) -> None:
            bar.update(shown, total=at.epochs * at.steps, completed=at.epoch * at.steps + at.step)
            if at.held_out_accuracy is not None:
                score = f"epoch {at.epoch + 1}/{at.epochs}, held-out {at.held_out_accuracy:.1%}"
                bar.update(shown, score=score)
                if not console.is_terminal:
                    click.echo(f"{score}, loss {at.loss:.3f}, {at.seconds:.0f} s", err=True)

        trained = training.train(examples, recipe, show)
    with tempfile.TemporaryDirectory() as place:
        written = export or Path(place) / "model"
        training.save(trained, written)
        tag = ModelStore(settings).register(written)
    click.echo(json.dumps({"tag": tag, **trained.metrics}) if as_json else _told(tag, trained))


def _told(tag: str, trained: training.TrainedModel) -> str:
    metrics = trained.metrics
    return (
        f"{tag}\n"
        f"{metrics['accuracy']:.2%} of {sum(metrics['counts']['held_out'].values())} held-out pictures are right, "
        f"{metrics['accuracy_corrupted_mean']:.2%} when they are noisy, blurred, dark, turned, small or tinted. "
        f"{metrics['seconds']:.0f} s."
    )
