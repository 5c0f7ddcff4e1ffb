"""The command `connect`: from a folder of pictures to a labelling project."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from celestial_backend.errors import ModelError, RequestError
from celestial_backend.labels import ChoiceMap
from celestial_backend.linking import config_for, create_project, find_project, register
from celestial_backend.project import StudioProject
from celestial_backend.settings import Settings
from celestial_backend.uploads import Imported, add_storage, pictures_of, upload
from celestial_backend.wiring import Services, build

FROM_MODEL = "from-model"
MODEL_S = 120.0  # a large model takes its time to load


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--title", required=True, help="Of the project; the one that has it, or a new one.")
@click.option(
    "--choices", default=FROM_MODEL, show_default=True, metavar="from-model|FILE.xml",
    help="A new project's label config: one choice for each class of the model, or the file's.",
)  # fmt: skip
@click.option("--backend-url", help="Where Label Studio finds the backend.  [default: http://127.0.0.1:PORT]")
@click.option("--local-files", is_flag=True, help="Leave the pictures in FOLDER, below LOCAL_FILES_DOCUMENT_ROOT.")
@click.option("--json", "as_json", is_flag=True, help="Print what was done as JSON.")
@click.pass_obj
def connect(
    settings: Settings,
    folder: Path,
    title: str,
    choices: str,
    backend_url: str | None,
    *,
    local_files: bool,
    as_json: bool,
) -> None:
    """
    Make a labelling project of the pictures in FOLDER, with the backend connected.

    Done again, it adds the pictures that are new, and makes nothing twice.
    """
    services = build(settings)
    pictures = pictures_of(folder)
    project = find_project(services.studio, title)
    config = checked_config(services, project, choices)
    new = project is None
    if project is None:
        project = create_project(services.studio, title, config)
    said = [] if new or choices == FROM_MODEL else ["The project was there and keeps its own label config."]
    if local_files:
        imported = add_storage(services.studio, project, folder, settings.local_files_root)
    else:
        imported = upload_shown(services, project, pictures)
    url = backend_url or f"http://127.0.0.1:{settings.port}"
    tag = services.store.live_tag(str(project))
    model = register(services.studio, project, url, tag, settings.basic_auth_user, settings.basic_auth_pass)
    link = f"{settings.label_studio_url}/projects/{project}/data"
    for sentence in [*said, *imported.notes, *model.notes]:
        click.echo(sentence, err=True)
    if as_json:
        done = {"project": project, "new": new, "added": imported.added, "already": imported.already}
        click.echo(json.dumps({**done, "model": model.id, "model_version": model.version, "link": link}))
        return
    click.echo(f"{'Made' if new else 'Found'} project {project}, {title!r}.")
    click.echo(f"Added {imported.added} pictures; {imported.already} were there already.")
    click.echo(f"The model at {url} is connected and says version {model.version}.")
    click.echo(link)


def checked_config(services: Services, project: int | None, choices: str) -> str:
    """
    The label config of the project, or the one that it shall have; the model can serve it.

    Raises:
        LabelConfigError: None of its choices is a class of the model.
    """
    name = "" if project is None else str(project)
    tag = services.store.live_tag(name)
    classes = services.store.classes(tag, MODEL_S)
    if classes is None:
        raise ModelError(
            f"The model {tag} must load within {MODEL_S:g} seconds and did not. See that the machine has time for it."
        )
    if project is not None:
        config = StudioProject(services.studio, name, patience_s=0).label_config()
    elif choices == FROM_MODEL:
        config = config_for(classes)
    else:
        config = _readable(Path(choices))
    for warning in ChoiceMap.from_config(config, classes).warnings:
        click.echo(warning, err=True)
    return config


def upload_shown(services: Services, project: int, pictures: list[Path]) -> Imported:
    """Upload with a progress bar, where there is a terminal to show it."""
    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        console=console, disable=not sys.stderr.isatty(),
    ) as bar:  # fmt: skip
        shown = bar.add_task("Uploading pictures", total=None)
        return upload(
            services.studio, project, pictures, lambda done, total: bar.update(shown, completed=done, total=total)
        )


def _readable(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(
            f"--choices must be {FROM_MODEL} or a file with a label config, and {path} cannot be read"
            f" ({type(error).__name__}). Check the path."
        ) from None
