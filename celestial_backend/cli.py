"""The command line: arguments in, one call, text out."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from celestial_backend import logs, training
from celestial_backend.connect import connect
from celestial_backend.demo import demo
from celestial_backend.doctor import doctor
from celestial_backend.errors import CelestialError, TrainingError
from celestial_backend.examples import read_folder
from celestial_backend.files import private
from celestial_backend.ledger import FAILED
from celestial_backend.lists import jobs, models, shown_job
from celestial_backend.prelabel import prelabel
from celestial_backend.registry import Registry
from celestial_backend.settings import Settings
from celestial_backend.wiring import build


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
    private(context.obj.model_dir)
    logs.configure(context.obj.log_level)


main.add_command(demo)
main.add_command(doctor)
main.add_command(connect)
main.add_command(jobs)
main.add_command(models)
main.add_command(prelabel)


@main.command()
@click.argument("folder", type=click.Path(path_type=Path), required=False)
@click.option(
    "--project", type=click.IntRange(min=1),
    help="Train on the labels of this Label Studio project instead of a folder.",
)  # fmt: skip
@click.option("--from-scratch", is_flag=True, help="With --project: a new model, not the live one taught more.")
@click.option("--export", type=click.Path(path_type=Path), help="Also write the model's plain files to this folder.")
@click.option("--epochs", type=click.IntRange(min=1), help="Passes over the pictures, in place of the recipe's.")
@click.option("--seed", type=int, help="Seed of everything random, in place of the recipe's.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.pass_obj
def train(
    settings: Settings,
    folder: Path | None,
    project: int | None,
    export: Path | None,
    epochs: int | None,
    seed: int | None,
    *,
    from_scratch: bool,
    as_json: bool,
) -> None:
    """
    Train on FOLDER, one sub-folder per class, and register the model in the BentoML store.

    With --project instead of FOLDER, do what *Start training* in Label Studio does, and wait for the end.
    """
    if (folder is None) == (project is None):
        raise click.UsageError("Give either FOLDER or --project.")
    if project is not None:
        if export or epochs or seed is not None:
            raise click.UsageError("--export, --epochs and --seed go with FOLDER.")
        _train_project(settings, str(project), from_scratch=from_scratch, as_json=as_json)
        return
    if folder is None or from_scratch:
        raise click.UsageError("--from-scratch goes with --project.")
    _train_folder(settings, folder, export, epochs, seed, as_json=as_json)


def _train_project(settings: Settings, project: str, *, from_scratch: bool, as_json: bool) -> None:
    """Ask for a training, run it here unless a worker does, and say how it ended."""
    trainings = build(settings).jobs
    job_id = trainings.request(project, from_scratch=from_scratch)["job"]
    job = None
    while job is None or not job.ended:
        trainings.run(project)
        job = trainings.ledger.job(job_id)
        time.sleep(0 if job and job.ended else 1)
    click.echo(json.dumps(shown_job(job)) if as_json else f"{job.state}: {job.reason}")
    if job.state == FAILED:
        sys.exit(TrainingError.exit_code)


def _train_folder(
    settings: Settings, folder: Path, export: Path | None, epochs: int | None, seed: int | None, *, as_json: bool
) -> None:
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
        tag = Registry(settings.bentoml_home).add_folder(written)
    click.echo(json.dumps({"tag": tag, **trained.metrics}) if as_json else _told(tag, trained))


def _told(tag: str, trained: training.TrainedModel) -> str:
    metrics = trained.metrics
    return (
        f"{tag}\n"
        f"{metrics['accuracy']:.2%} of {sum(metrics['counts']['held_out'].values())} held-out pictures are right, "
        f"{metrics['accuracy_corrupted_mean']:.2%} when they are noisy, blurred, dark, turned, small or tinted. "
        f"{metrics['seconds']:.0f} s."
    )
