"""The command `connect`: from a folder of pictures to a labelling project."""

from __future__ import annotations

import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from unicodedata import normalize

import click

from celestial_backend.commands.shown import Shown
from celestial_backend.errors import ModelError, RequestError, StateError
from celestial_backend.jobs.counting import LEAST_CHOICES, LEAST_LABELS
from celestial_backend.jobs.looker import EMBEDDED
from celestial_backend.labels import ChoiceMap, Sorted, loose, read, some
from celestial_backend.services import Services, build
from celestial_backend.settings import CONFIDENCE, NEEDS_LABELS, NEVER, Settings, backend_address, project_of
from celestial_backend.state import reason, replace_text
from celestial_backend.studio.access import ANSWER_S
from celestial_backend.studio.project import StudioProject
from celestial_backend.studio.setup import (
    FolderLabels,
    Imported,
    add_storage,
    config_for,
    create_project,
    find_project,
    local_root,
    pictures_by_class,
    register,
    set_config,
    upload,
)

STUDIO, ACCOUNT = "http://127.0.0.1:8080", "/user/account"
FROM_MODEL = "from-model"
MODEL_S = 120.0  # a large model takes its time to load
NOT_IN_XML = re.compile("[^\t\n\r -\uD7FF\uE000-\uFFFD\U00010000-\U0010FFFF]")
KEEPS_ITS_OWN = "The project was there and keeps its own label config."
KNOWS_NONE = (
    f"The model knows none of the choices; the first pre-labels come after {LEAST_CHOICES} of them have {LEAST_LABELS}"
    " labels each."
)
TRAINS = "A training on the labels starts by itself."
PRESS = "Press Start Training in Label Studio, in the menu of the model, to have it learn from the labels."
TWO_CHOICES = "A project must offer at least two different choices"
HOW_TO_CHOOSE = (
    f"Give them as --choices a,b,c, as a file with a label config (--choices FILE.xml), or as sub-folders that hold"
    f" pictures; --choices {FROM_MODEL} takes the classes of the model, which is about celestial bodies if you have"
    " brought none of your own."
)


def read_address(_context: click.Context, _option: click.Parameter, text: str | None) -> str | None:
    """What `--backend-url` gives, read as CELESTIAL_BACKEND_URL is."""
    try:
        return backend_address(text) if text else None
    except ValueError as error:
        raise click.BadParameter(f"It {error}, got {text!r}.") from None


@click.command(short_help="Make a project from a folder of pictures.")
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path), required=False)
@click.option("--title", help="Title of the project, made if there is none of that title.  [default: FOLDER's name]")
@click.option(
    "--choices", metavar="a,b,c|FILE.xml|from-model",
    help="What a new project asks for: names, a file with a label config, or the classes of the model."
    "  [default: the sub-folders that hold pictures]",
)  # fmt: skip
@click.option("--labelled", is_flag=True, help="Label each picture with the choice that its sub-folder is named after.")
@click.option(
    "--backend-url", callback=read_address,
    help="Where Label Studio finds the backend.  [default: CELESTIAL_BACKEND_URL, or http://127.0.0.1:PORT]",
)  # fmt: skip
@click.option("--local-files", is_flag=True, help="Leave the pictures in FOLDER, below LOCAL_FILES_DOCUMENT_ROOT.")
@click.option("--new-token", is_flag=True, help="Ask for another token of Label Studio; without FOLDER, do no more.")
@click.option("--json", "as_json", is_flag=True, help="Print what was done as JSON.")
@click.pass_obj
def connect(
    settings: Settings,
    folder: Path | None,
    title: str | None,
    choices: str | None,
    backend_url: str | None,
    *,
    labelled: bool,
    local_files: bool,
    new_token: bool,
    as_json: bool,
) -> None:
    """
    Make a labelling project of the pictures in FOLDER, with the backend connected.

    Run again, it adds the pictures that are new, and makes nothing twice.
    """
    if folder is None:
        if not new_token:
            raise click.UsageError("Give FOLDER; or --new-token alone, for projects that you connect by hand.")
        only_token(settings)
        return
    sorted_ones = pictures_by_class(folder)
    pictures, sub_folder_of = sorted_ones.files, sorted_ones.class_of()
    if labelled and len(sorted_ones.classes) != 1 and sorted_ones.doubt:
        raise RequestError(
            f"--labelled needs sub-folders with pictures, named after choices. {sorted_ones.doubt} Or leave --labelled"
            " out."
        )
    root = local_root(folder, settings.local_files_root) if local_files else None
    title = title or folder.resolve().name
    settings, given = with_token(settings, anew=new_token)
    services = build(settings)
    found = find_project(services.studio, title)
    if given:
        remember(settings)
    own = own_config(services, found)
    config = own or label_config(services, choices, sorted_ones)
    offered = ChoiceMap.for_learning(config)
    labels = folder_labels(offered, sub_folder_of) if labelled else None
    project = found or create_project(services.studio, title, config, by_score=settings.score != CONFIDENCE)
    if found and not own:
        set_config(services.studio, found, config)
    url = backend_url or settings.address
    user, password = settings.basic_auth_user, settings.basic_auth_pass
    model = register(services.studio, project, url, user=user, password=password)
    with Shown("Importing pictures") as progress:
        if root is not None:
            imported = add_storage(services.studio, project, folder, root, progress, labels)
        else:
            imported = upload(services.studio, project, pictures, progress, labels)
    link = f"{settings.studio_link}/projects/{project}/data"
    said = [*sorted_ones.notes, *([KEEPS_ITS_OWN] if own and choices is not None else [])]
    said += [*offered.warnings, unlabelled(pictures, sub_folder_of, labels), *imported.notes, *model.notes]
    for sentence in filter(None, [*said, outlook(settings, model.version, imported, labels)]):
        click.echo(sentence, err=True)
    if as_json:
        done = {"project": project, "new": not found, "link": link, "model": model.id, "model_version": model.version}
        counts = {"added": imported.added, "already": imported.already, "labelled": imported.labelled}
        click.echo(json.dumps(done | counts))
        return
    click.echo(f"{'Found' if found else 'Made'} project {project}, {title!r}.")
    click.echo(f"Added {imported.added} pictures; {imported.already} were there already.")
    if labels is not None:
        click.echo(f"Labelled {imported.labelled} pictures by their sub-folders.")
    click.echo(f"The model at {url} is connected and says version {model.version}.")
    click.echo(link)


def with_token(settings: Settings, *, anew: bool) -> tuple[Settings, bool]:
    """The settings with Label Studio's address and a token; and whether a person has given it just now."""
    if (settings.label_studio_api_key and not anew) or not sys.stdin.isatty():
        return settings, False
    url = settings.label_studio_url or STUDIO
    page = f"{settings.studio_link or url}{ACCOUNT}"
    click.echo(f"Create a personal access token in Label Studio, and copy it: {page}", err=True)
    token = click.prompt("Paste it here; it is not shown", hide_input=True, err=True)
    return Settings.from_environ({**os.environ, "LABEL_STUDIO_URL": url, "LABEL_STUDIO_API_KEY": token}), True


def only_token(settings: Settings) -> None:
    """Ask for a token, and keep it once Label Studio has accepted it."""
    settings, given = with_token(settings, anew=True)
    if not given:
        raise RequestError("A token is asked for at a terminal only. Elsewhere set LABEL_STUDIO_API_KEY to it.")
    build(settings).studio.check(ANSWER_S)
    remember(settings)
    click.echo(f"Label Studio at {settings.label_studio_url} accepts the token, and the backend has it.")


def remember(settings: Settings) -> None:
    """Keep address and token for the backend and for the other commands, where nobody but this user reads them."""
    told = {"url": settings.label_studio_url, "token": settings.label_studio_api_key}
    try:
        replace_text(settings.state.connection, json.dumps(told))
    except OSError as error:
        raise StateError(
            f"The token must be written into MODEL_DIR and was not ({reason(error)}). See that this user may write"
            " there."
        ) from None


def own_config(services: Services, project: int | None) -> str:
    """The label config of a project; empty where it asks for nothing yet, as Label Studio makes new ones."""
    if project is None:
        return ""
    config = StudioProject(services.studio, str(project), patience_s=0).label_config()
    return config if read(config).controls else ""


def label_config(services: Services, choices: str | None, pictures: Sorted) -> str:
    """
    The label config that a project shall have; asks for choices if nothing names them.

    Raises:
        RequestError: They are fewer than two, or there is nobody to ask.
    """
    names = list(pictures.classes)
    several = len(names) >= LEAST_CHOICES
    if choices is None and several and not pictures.doubt:
        return config_for(clean(names, "the sub-folders are"))
    if choices is None and (several or not sys.stdin.isatty()):
        seen = f"only the sub-folder {some(names)} holds pictures" if names else "no sub-folder is named after one"
        raise RequestError(f"{f'{TWO_CHOICES}, and {seen}.' * (not several)} {pictures.doubt} {HOW_TO_CHOOSE}".strip())
    if choices is None:
        choices = str(click.prompt("Choices, separated by commas", err=True))
    if choices == FROM_MODEL:
        return config_for(model_classes(services))
    if choices.lower().endswith(".xml"):
        return _text_of(Path(choices))
    return config_for(clean(choices.split(","), "those given are"))


def clean(names: Iterable[str], what: str) -> list[str]:
    """
    Names of choices, each once, without blanks around them, in the one spelling that Unicode recommends.

    Raises:
        RequestError: They are fewer than two, or one has letters that no label config can hold.
    """
    cleaned = list(dict.fromkeys(filter(None, (" ".join(normalize("NFC", name).split()) for name in names))))
    if len(cleaned) < LEAST_CHOICES:
        raise RequestError(f"{TWO_CHOICES}, and {what} {some(cleaned)}. {HOW_TO_CHOOSE}")
    if unfit := [name for name in cleaned if NOT_IN_XML.search(name)]:
        raise RequestError(f"A choice must have letters that XML can hold, and {some(unfit)} has others. Rename it.")
    return cleaned


def model_classes(services: Services) -> Sequence[str]:
    """
    The classes of the model that new projects are served.

    Raises:
        ModelError: They are not known after `MODEL_S` seconds.
    """
    tag = services.store.live_tag()
    with Shown("Loading the model"):
        classes = services.store.classes(tag, MODEL_S)
    if classes is None:
        raise ModelError(
            f"The model {tag} must load within {MODEL_S:g} seconds and did not. See that the machine has time for it."
        )
    return classes


def folder_labels(offered: ChoiceMap, sub_folder_of: Mapping[Path, str]) -> FolderLabels:
    """
    The labels that sub-folders give to the pictures in them, for the control that most of them fit.

    Raises:
        RequestError: No sub-folder is named after a choice.
    """
    best: dict[str, str] = {}
    sub_folders = sorted(set(sub_folder_of.values()))
    for control in offered.controls:
        called = {control.name(choice): choice for choice in reversed(control.choices)}
        names = {loose(name): choice for name, choice in called.items()} | called  # the very spelling goes first
        found = {name: names.get(name) or names.get(loose(name)) for name in sub_folders}
        fitting = {name: choice for name, choice in found.items() if choice}
        if len(fitting) > len(best):
            best, chosen = fitting, control
    if not best:
        choices = (choice for control in offered.controls for choice in control.choices)
        raise RequestError(
            f"--labelled needs sub-folders named after choices; the sub-folders are {some(sub_folders)}"
            f" and the project offers {some(choices)}. Rename the sub-folders, or leave --labelled out."
        )
    choice_of = {path: best[name] for path, name in sub_folder_of.items() if name in best}
    return FolderLabels(chosen, choice_of)


def unlabelled(pictures: Sequence[Path], sub_folder_of: Mapping[Path, str], labels: FolderLabels | None) -> str:
    """A sentence about the pictures that their sub-folders do not label; empty without any."""
    rest = [path for path in pictures if labels is not None and path not in labels.choice_of]
    strange = sorted({sub_folder_of[path] for path in rest if path in sub_folder_of})
    places = ["in no sub-folder"] * any(path not in sub_folder_of for path in rest)
    places += [f"in {some(strange)}, which the project does not offer"] if strange else []
    return f"{len(rest)} pictures get no label, because they lie {' or '.join(places)}." if rest else ""


def outlook(settings: Settings, version: str, imported: Imported, labels: FolderLabels | None) -> str:
    """A sentence about what comes of the labels, or about the first pre-labels; empty where these are there."""
    counts = Counter(labels.choice_of.values() if labels else ())
    enough = sum(count >= LEAST_LABELS for count in counts.values()) >= LEAST_CHOICES
    if not enough:
        return KNOWS_NONE if version == NEEDS_LABELS else ""
    if not imported.labelled:
        return ""
    unasked = version == NEEDS_LABELS or version.startswith(EMBEDDED) or project_of(version) is not None
    return TRAINS if unasked and settings.train_every != NEVER else PRESS


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(
            f"--choices {path} must be a file with a label config, and it cannot be read ({type(error).__name__})."
            " Check the path."
        ) from None
