"""
People who accept pre-labels without looking: ``python -m benchmarks.annotators --runs 51``.

Simulated people label projects. Some pre-labels they accept as they are, be they right or wrong; to the others they
answer what they think. What is true of them is known, so it can be counted how often the 95 % intervals of `report`
hold it. A third of the runs each accept 0, 10 and 30 %.

Tasks, predictions, labels and figures go through a real Label Studio: what is withheld is drawn by `Trial`, labels are
what its editor sends, and `report` reads them. They are written as Label Studio's own bulk action writes them, because
its API takes a third of a second for each. With ``--pure`` there is no Label Studio, and time for many more runs.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import msgspec
import numpy as np
from numpy.typing import NDArray
from scipy.stats import trim_mean

from benchmarks.album import lay_out
from benchmarks.bench import QUICK, REPOSITORY, Bench, BenchmarkError
from benchmarks.label_studio import LabelStudio, program
from celestial_backend.commands.demo import plain_environ
from celestial_backend.database import Database
from celestial_backend.labels import ChoiceMap
from celestial_backend.settings import MODEL_NAME, Settings
from celestial_backend.studio.client import Studio
from celestial_backend.studio.setup import create_project
from celestial_backend.trust.evidence import SHOWN, Evidence, Given
from celestial_backend.trust.measures import measure
from celestial_backend.trust.trial import KEY, WITHHELD, Trial

Figures = dict[str, dict[str, Any]]
Run = Callable[["World", int], Figures]
BODIES = ("Earth", "Jupiter", "Mars", "Moon", "Venus")
VERSION, MOMENT = f"{MODEL_NAME}:simulated", "2026-01-01T12:00:00Z"
CONFIG = (
    '<View><Image name="image" value="$image"/><Choices name="body" toName="image">'
    + "".join(f'<Choice value="{body}"/>' for body in BODIES)
    + "</Choices></View>"
)
ACCEPTED = (0.0, 0.1, 0.3)  # shares that are accepted without looking
HARD, MOOD = 0.3, 0.4  # how far seconds spread between tasks, and from answer to answer: of their logarithms
COFFEE, COFFEE_S = 0.01, 500.0  # now and then somebody fetches one
ANNOTATE = """
import json, os, sys
os.environ["DJANGO_SETTINGS_MODULE"] = "core.settings.label_studio"
import label_studio
sys.path.insert(0, os.path.dirname(label_studio.__file__))
import django
django.setup()
from projects.models import Project
from tasks.models import Annotation, Task
for line in sys.stdin:
    wanted = json.loads(line)
    project = Project.objects.get(id=wanted["project"])
    Annotation.objects.bulk_create([Annotation(project=project, **each) for each in wanted["annotations"]])
    project.update_tasks_counters_and_is_labeled(Task.objects.filter(project=project))
    print("written", file=sys.stderr, flush=True)
"""


@dataclass(frozen=True)
class Answer:
    """What one person submits, and the seconds that it took."""

    chosen: str
    seconds: float


@dataclass(frozen=True)
class Picture:
    """What the model says of a task, how surely, and what each person answers."""

    said: str
    confidence: float
    answers: tuple[Answer, ...]


@dataclass(frozen=True)
class World:
    """
    A project, its model, and the people who label it.

    Attributes:
        accepted: The share of shown pre-labels that is accepted without looking.
        withheld: The share of tasks that is shown without its pre-label.
        model: The share of predictions that is right.
        person: The share of people's own answers that is right.
        looked_s: The median seconds for an answer of one's own; of the second person twice as many, and so on.
        accepted_s: The same for one that is accepted without looking.
    """

    accepted: float = 0.1
    tasks: int = 300
    people: int = 2
    withheld: float = 0.2
    model: float = 0.85
    person: float = 0.94
    looked_s: float = 5.0
    accepted_s: float = 1.5

    def truths(self) -> dict[str, float]:
        """Of each figure, what is true."""
        alike = self.model * self.person + (1 - self.model) * (1 - self.person) / (len(BODIES) - 1)
        rng, many = np.random.default_rng(0), 400_000
        saved = [
            trim_mean(self._seconds(rng, who, np.zeros(many, bool)), 0.2)
            - trim_mean(self._seconds(rng, who, rng.random(many) < self.accepted), 0.2)
            for who in range(self.people)
        ]
        return {
            "accepted without looking": self.accepted,
            "shown less withheld": self.accepted * (1 - alike),
            "kept": self.accepted + (1 - self.accepted) * alike,
            "accuracy": alike,
            "seconds saved": float(np.mean(saved)),
        }

    def pictures(self, rng: np.random.Generator, withheld: NDArray[np.bool_]) -> list[Picture]:
        """
        What becomes of the tasks.

        Args:
            rng: Decides.
            withheld: Shape (tasks,), whether nobody sees the pre-label.
        """
        found = []
        for is_withheld in withheld:
            true, hard = int(rng.integers(len(BODIES))), np.array([rng.lognormal(0, HARD)])
            said, answers = _answer(rng, true, self.model), []
            for who in range(self.people):
                blindly = not is_withheld and rng.random() < self.accepted
                chosen = said if blindly else _answer(rng, true, self.person)
                seconds = self._seconds(rng, who, np.array([blindly]), hard)
                answers.append(Answer(BODIES[chosen], round(float(seconds[0]), 3)))
            found.append(Picture(BODIES[said], round(float(rng.beta(6, 1)), 4), tuple(answers)))
        return found

    def evidence(self, seed: int) -> Evidence:
        """What would be read of such a project."""
        rng = np.random.default_rng(seed)
        withheld = rng.random(self.tasks) < self.withheld
        given = [
            Given(task, task * self.people + who, str(who), "body", frozenset({answer.chosen}),
                  WITHHELD if withheld[task] else SHOWN, frozenset({picture.said}), picture.confidence, VERSION,
                  answer.seconds, at=MOMENT)
            for task, picture in enumerate(self.pictures(rng, withheld))
            for who, answer in enumerate(picture.answers)
        ]  # fmt: skip
        people = {str(who): f"person {who}" for who in range(self.people)}
        controls = ChoiceMap.for_learning(CONFIG).controls
        return Evidence("1", "simulated", "", controls, tuple(given), people=people, tasks=self.tasks)

    def _seconds(
        self, rng: np.random.Generator, who: int, blindly: NDArray[np.bool_], hard: NDArray[np.float64] | None = None
    ) -> NDArray[np.float64]:
        n = len(blindly)
        typical = np.where(blindly, self.accepted_s, self.looked_s) * (1 + who)
        hard = rng.lognormal(0, HARD, n) if hard is None else hard
        coffee = np.where(rng.random(n) < COFFEE, COFFEE_S, 0.0)
        return np.asarray(typical * hard * rng.lognormal(0, MOOD, n) + coffee, np.float64)


def figures_of(measures: Mapping[str, Any]) -> Figures:
    """Those whose truth is known, of what `report --json` prints."""
    control = measures["controls"][0]
    return {
        "accepted without looking": control["compared"]["unlooked"],
        "shown less withheld": control["compared"]["difference"],
        "kept": control["kept"],
        "accuracy": control["accuracy"],
        "seconds saved": measures["seconds_saved"],
    }


def pure(world: World, seed: int) -> Figures:
    """The figures of a simulated project, without a Label Studio."""
    return figures_of(msgspec.to_builtins(measure(world.evidence(seed))))


def summed(runs: list[tuple[World, Figures]]) -> dict[str, Any]:
    """By figure: how many runs could tell it, in which share of these the interval holds the truth, and its width."""
    truths = {world: world.truths() for world in {world for world, _ in runs}}
    found = {}
    for name in truths[runs[0][0]]:
        told = [(figures[name], truths[world][name]) for world, figures in runs if figures[name]["value"] is not None]
        right = sum(figure["low"] <= true <= figure["high"] for figure, true in told)
        widths = [figure["high"] - figure["low"] for figure, _ in told]
        found[name] = {"told": len(told), "held": right, "share": round(right / max(1, len(told)), 3),
                       "median width": round(float(np.median(widths)), 3) if widths else None}  # fmt: skip
    return found


def table_of(results: Mapping[str, Any]) -> list[str]:
    """The lines of the table that a page shows of what `--output` has written, of runs of both kinds."""
    studio, alone = results["label_studio"], results["pure"]
    heads = ["figure", f"{studio['runs']} projects in a real Label Studio", f"{alone['runs']:,} simulated projects",
             "width of the interval, median"]  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", "|---|---|---|---|"]
    for name, told in alone["figures"].items():
        through = studio["figures"][name]
        width = told["median width"]
        written = f"{width:.1f} s" if name.startswith("seconds") else f"{100 * width:.0f} points"
        lines.append(f"| {name} | {through['held']} of {through['told']} | {100 * told['share']:.1f} % | {written} |")
    return lines


@click.command()
@click.option("--runs", type=click.IntRange(min=1), default=51, show_default=True, help="Projects in all.")
@click.option("--pure", "is_pure", is_flag=True, help="Without a Label Studio.")
@click.option("--tasks", type=click.IntRange(min=50), default=300, show_default=True, help="Of each project.")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path),
              help="File for the result, as JSON.")
def main(runs: int, tasks: int, output: Path | None, *, is_pure: bool) -> None:
    """Count how often the 95 % intervals of `report` hold what is true of simulated people."""
    started = time.monotonic()
    with _without_studio() if is_pure else _with_studio() as run:
        found = []
        for seed in range(runs):
            world = replace(World(), accepted=ACCEPTED[seed % len(ACCEPTED)], tasks=tasks)
            found.append((world, run(world, seed)))
            if not is_pure or not (seed + 1) % 100:
                click.echo(f"{seed + 1} of {runs}, {time.monotonic() - started:.0f} s: {summed(found)}", err=True)
    seconds = round(time.monotonic() - started)
    result = {"runs": runs, "tasks": tasks, "people": World().people, "seconds": seconds, "figures": summed(found)}
    click.echo(json.dumps(result, indent=1))
    if output is not None:
        known = json.loads(output.read_text()) if output.exists() else {}
        output.write_text(json.dumps(known | {"pure" if is_pure else "label_studio": result}, indent=1) + "\n")


@contextmanager
def _without_studio() -> Iterator[Run]:
    yield pure


@contextmanager
def _with_studio() -> Iterator[Run]:
    with tempfile.TemporaryDirectory(prefix="celestial-annotators-") as name:
        folder = Path(name)
        bench = Bench(folder, QUICK, lay_out(folder / "album", []), lambda text: click.echo(text, err=True))
        with LabelStudio(bench) as studio:
            python = program(bench).with_name("python")
            own = plain_environ() | {"LABEL_STUDIO_BASE_DATA_DIR": str(studio.uploads), "COLLECT_ANALYTICS": "false"}
            with subprocess.Popen(  # noqa: S603 - Label Studio's own Python
                [python, "-c", ANNOTATE], env=own, text=True, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            ) as annotating:  # fmt: skip
                try:
                    yield _Through(studio, annotating, folder / "state").run
                finally:
                    annotating.kill()


class _Through:
    """Runs through a real Label Studio, a project for each."""

    def __init__(self, studio: LabelStudio, annotating: subprocess.Popen[str], state: Path) -> None:
        state.mkdir()
        self._studio, self._annotating, self._state = studio, annotating, state
        self._settings = Settings(model_dir=state, label_studio_url=studio.url, label_studio_api_key=studio.token)
        with Database(self._settings).writing(KEY) as transaction:  # that every series of runs draws the same tasks
            put = "INSERT INTO secrets (name, value) VALUES (:name, :value)"
            transaction.run(put, name=KEY, value=hashlib.sha256(b"annotators").hexdigest())
        self._people = [self._person(number) for number in range(World().people)]

    def run(self, world: World, seed: int) -> Figures:
        """The figures that the command `report` prints of a project that these people have labelled."""
        number, made, tasks = self._project(world, seed)
        drawn = replace(self._settings, control_share=world.withheld)
        trial = Trial(drawn, Database(drawn))
        withheld = np.array([bool(trial.arm(str(number), task)) for task in tasks])
        pictures = world.pictures(np.random.default_rng(seed), withheld)
        answers = [{"result": [_region(each.said) | {"score": each.confidence}], "score": each.confidence,
                    "model_version": VERSION} for each in pictures]  # fmt: skip
        shown = trial.shown([{"id": task} for task in tasks], answers, f"{number}.{made}")
        rows = [{"task": task, **answer} for task, answer in zip(tasks, shown, strict=True)]
        self._studio.call("POST", f"/api/projects/{number}/import/predictions", rows)
        parents = {each["task"]: each["id"] for each in self._studio.call("GET", f"/api/predictions/?project={number}")}
        self._annotate(number, [
            {"task_id": task, "completed_by_id": person, "lead_time": answer.seconds,
             "parent_prediction_id": parents[task],
             "result": [_region(answer.chosen, _origin(picture, answer, hidden=hidden))]}
            for task, picture, hidden in zip(tasks, pictures, withheld, strict=True)
            for person, answer in zip(self._people, picture.answers, strict=True)
        ])  # fmt: skip
        return self._report(number)

    def _project(self, world: World, seed: int) -> tuple[int, str, list[int]]:
        studio = Studio(self._settings)
        number = create_project(studio, f"Run {seed}", CONFIG)
        body = [{"data": {"image": f"http://127.0.0.1/{place}.png"}} for place in range(world.tasks)]
        answer = self._studio.call("POST", f"/api/projects/{number}/import?return_task_ids=true", body)
        created = studio.ask("the project", lambda client: client.projects.get(number).created_at)
        return number, str(int(created.timestamp())) if created else "", sorted(answer["task_ids"])

    def _person(self, number: int) -> int:
        body = {"email": f"person{number}@example.com", "username": f"person{number}", "password": "a passw0rd of ours"}
        return int(self._studio.call("POST", "/api/users/", body)["id"])

    def _annotate(self, project: int, annotations: list[dict[str, Any]]) -> None:
        print(json.dumps({"project": project, "annotations": annotations}), file=self._annotating.stdin, flush=True)
        said = []
        for line in self._annotating.stderr or ():
            if line.strip() == "written":
                return
            said.append(line)
        raise BenchmarkError(f"Label Studio's models must take the annotations, and said: {''.join(said)[-2000:]}")

    def _report(self, project: int) -> Figures:
        own = {"LABEL_STUDIO_URL": self._studio.url, "LABEL_STUDIO_API_KEY": self._studio.token,
               "MODEL_DIR": str(self._state), "BENTOML_HOME": str(self._state / "bentoml")}  # fmt: skip
        command = [sys.executable, "-m", "celestial_backend", "report", "--project", str(project), "--json"]
        done = subprocess.run(  # noqa: S603 - our own command
            command, env=plain_environ() | own, cwd=REPOSITORY, text=True, check=True, stdout=subprocess.PIPE
        )
        return figures_of(json.loads(done.stdout))


def _region(choice: str, origin: str = "") -> dict[str, Any]:
    made = {"from_name": "body", "to_name": "image", "type": "choices", "value": {"choices": [choice]}}
    return made | ({"origin": origin} if origin else {})


def _origin(picture: Picture, answer: Answer, *, hidden: bool) -> str:
    """What the editor says of a region."""
    if hidden:
        return "manual"
    return "prediction" if answer.chosen == picture.said else "prediction-changed"


def _answer(rng: np.random.Generator, true: int, right: float) -> int:
    """The true choice, or any other."""
    return true if rng.random() < right else (true + int(rng.integers(1, len(BODIES)))) % len(BODIES)


if __name__ == "__main__":
    main()
