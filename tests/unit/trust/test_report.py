"""The report as a page, and the pictures that it shows."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from celestial_backend.commands.report import report as command
from celestial_backend.errors import SettingsError, StateError
from celestial_backend.labels import ChoiceMap, Control
from celestial_backend.metrics import Metrics
from celestial_backend.pictures.reader import ImageReader
from celestial_backend.settings import Settings
from celestial_backend.studio.client import Studio
from celestial_backend.trust import album, report
from celestial_backend.trust.album import DISPUTED, OVERRULED, SUSPECT, TWINS, UNKNOWN, Album, Sights
from celestial_backend.trust.calibration import Bin
from celestial_backend.trust.evidence import SHOWN, UNPREDICTED, Evidence, Given
from celestial_backend.trust.figures import (
    Compared,
    Confusion,
    Disputed,
    Figure,
    Measured,
    Measures,
    Pair,
    Person,
    Version,
)
from celestial_backend.trust.measures import measure
from celestial_backend.trust.suspects import Suspect
from celestial_backend.trust.trial import PLANTED, WITHHELD

EVIL = """<img src=x onerror="alert(1)">'&{{ 7 * 7 }}"""
NONE = Figure("Not enough yet: about 50 more labels.", missing=50)
SOME = Figure("It is 90 % (85 to 95 %; n = 100).", 0.9, 0.85, 0.95, 100)
CONFIG = '<View><Image name="image" value="$image"/><Choices name="choice" toName="image">{}</Choices></View>'
LINK = "http://studio.example/projects/7/data"


def control(*choices: str) -> Control:
    config = CONFIG.format("".join(f'<Choice value="{choice}"/>' for choice in choices))
    (found,) = ChoiceMap.for_learning(config).controls
    return found


def given(task: int, chosen: str, annotator: str = "1", **more: Any) -> Given:
    return Given(task, task * 10 + int(annotator), annotator, "choice", frozenset(filter(None, [chosen])),
                 more.pop("arm", SHOWN), **more)  # fmt: skip


def evidence(labels: Sequence[Given], **more: Any) -> Evidence:
    data = {each.task: {"image": f"/{each.task}.png"} for each in labels}
    return Evidence("7", "Planets", LINK, (control("Mars", "Moon"),), tuple(labels), more.pop("data", data), **more)


def measured(name: str = "choice", person: str = "Ada", choice: str = "Mars", figure: Figure = SOME) -> Measured:
    all_of = Compared("", figure, figure, figure, figure)
    return Measured(
        name, False, (choice, "Moon"), {"shown": 90, "withheld": 10}, figure, figure, ("What people say.",), all_of,
        (replace(all_of, name=choice),), (replace(all_of, name="0.9 to 1"),), (replace(all_of, name=person),),
        figure, figure, figure, figure, figure, (Person("1", person, 100, figure, figure, figure, figure),),
        (Pair(person, "Bob", figure),), (Disputed(3, {person: (choice,), "Bob": ("Moon",)}, (choice,)),), 1,
        Confusion((choice, "Moon"), ((5, 1), (0, 4)), ((40, 0), (2, 48))), (Bin(0.9, 0.88, 0.8, 0.93, 60),), figure,
        (0, 0, 0, 0, 0, 0, 1, 2, 3, 94),
        (Version("model:one", "2026-11-01T10:00:00Z", "", 100, figure, figure, figure),),
    )  # fmt: skip


def measures(*controls: Measured, title: str = "Planets", figure: Figure = SOME, **more: Any) -> Measures:
    return Measures("7", title, LINK, "2026-11-29T14:30:00Z", 200, more.pop("labelled", 100), 2, figure, figure, figure,
                    controls, **more)  # fmt: skip


class Seen(HTMLParser):
    """The elements and attributes of a page, and what it names by address."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: set[str] = set()
        self.handlers: list[str] = []
        self.pictures: list[dict[str, str | None]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append(tag)
        self.handlers += [name for name in found if name.startswith("on")]
        self.addresses |= {found[name] or "" for name in ("src", "href", "data", "action") if name in found}
        if tag == "img":
            self.pictures.append(found)


def test_nothing_that_a_stranger_wrote_is_read_as_html_or_as_a_template() -> None:
    """Names of classes, annotators, controls, projects and models, and what a picture's failure says."""
    piece = album.Piece(3, "", EVIL, (EVIL,), (EVIL,))
    sights = Sights(album.Drift(Figure(EVIL)), ((album.Telling(DISPUTED, EVIL, (3,), EVIL), (piece,)),),
                    {3: [DISPUTED]}, {3: EVIL}, 0, EVIL)  # fmt: skip
    page = report.page(measures(measured(EVIL, EVIL, EVIL), title=EVIL, left_out={EVIL: 2}), sights)
    seen = Seen(page)
    assert "img" not in seen.tags
    assert "script" not in seen.tags
    assert not seen.handlers
    assert EVIL not in page
    assert "{{ 7 * 7 }}" in page


def test_a_page_needs_nothing_from_elsewhere() -> None:
    """Its only addresses are those of tasks in Label Studio, which a reader follows or not."""
    page = report.page(measures(measured()), Sights(album.Drift(SOME), (), {3: [DISPUTED], 5: [TWINS]}))
    assert Seen(page).addresses == {"data:,", f"{LINK}?task=3", f"{LINK}?task=5"}
    assert not re.search(r"url\(|@import", page)
    assert "default-src 'none'" in html.unescape(page)


@pytest.mark.parametrize(
    ("link", "expected"),
    [
        pytest.param(LINK, f"{LINK}?task=5", id="as it is"),
        pytest.param(
            "https://ada:secret@host/ls/projects/7/data", "https://host/ls/projects/7/data?task=5", id="password"
        ),
        pytest.param("javascript:alert(1)", "", id="a script"),
        pytest.param("", "", id="unknown"),
    ],
)
def test_a_link_leads_to_the_task_and_tells_no_password(link: str, expected: str) -> None:
    assert report.task_link(link, 5) == expected


@pytest.mark.parametrize(
    "given_measures",
    [
        pytest.param(measures(labelled=0, figure=NONE), id="no control"),
        pytest.param(measures(measured(figure=NONE), labelled=0, figure=NONE), id="nothing labelled"),
        pytest.param(measures(measured("one"), measured("other", figure=NONE)), id="two controls"),
    ],
)
def test_there_is_a_page_of_whatever_there_is(given_measures: Measures) -> None:
    page = report.page(given_measures, Sights(album.Drift(NONE)))
    assert page.rstrip().endswith("</html>")
    for measured_one in given_measures.controls if len(given_measures.controls) > 1 else ():
        assert f"{measured_one.control}: what the pre-labels are worth" in page


@pytest.mark.parametrize(
    ("figure", "expected"),
    [
        pytest.param(replace(SOME, value=0.98, low=0.96, high=0.99), "can be trusted", id="trusted"),
        pytest.param(SOME, "Most pre-labels are right", id="mostly"),
        pytest.param(replace(SOME, value=0.7, low=0.5, high=0.85), "need to be looked at", id="unsure"),
        pytest.param(replace(SOME, value=0.4, low=0.3, high=0.5), "too often wrong", id="wrong"),
        pytest.param(NONE, "not known yet", id="unknown"),
    ],
)
def test_the_summary_begins_with_how_far_to_trust(figure: Figure, expected: str) -> None:
    assert expected in report.verdict(replace(measured(), accuracy=figure))


def test_of_several_controls_the_summary_says_which_it_means() -> None:
    several = measures(measured(), measured("flaw"))
    found = report.summary(several)
    assert all(line.startswith(("choice: ", "flaw: ")) for line in found[:-1])
    assert found[-1] == several.seconds_saved.sentence


def test_the_page_does_not_contradict_itself() -> None:
    """Pre-labels that are all right so far are not told to be wrong, and trusted ones not to be often wrong."""
    best = replace(SOME, value=1.0, low=0.84, high=1.0)
    assert "some may be wrong: about 100 % are right (between 84 % and 100 %)" in report.verdict(
        replace(measured(), accuracy=best)
    )
    trusted = replace(measured(), accuracy=replace(best, low=0.97))
    said = " ".join([report.verdict(trusted), *report.steps(measures(trusted), Sights(album.Drift(NONE)))])
    assert "can be trusted" in said
    assert "often wrong" not in said


def test_without_labels_made_blind_the_first_step_is_to_withhold_some() -> None:
    blank = replace(measured(), accuracy=NONE, labels={"shown": 90})
    assert "CELESTIAL_CONTROL_SHARE" in report.steps(measures(blank), Sights(album.Drift(NONE)))[0]


def test_a_matrix_of_many_choices_keeps_every_label() -> None:
    """The rare ones stand together in the last row and column."""
    names = tuple(f"choice {number}" for number in range(300))
    counts = tuple(tuple(300 - i if i == j else 0 for j in range(300)) for i in range(300))
    page = report.page(measures(replace(measured(), confusion=Confusion(names, counts, ()))), Sights(album.Drift(NONE)))
    table = page[page.index('<table class="matrix">') : page.index("Models over time")]
    assert sum(map(int, re.findall(r">(\d+)</td>", table))) == sum(map(sum, counts))
    assert table.count("<tr>") == report.CHOICES_MAX + 2


BLIND = {"said": frozenset({"Mars"}), "confidence": 0.9, "version": "m:one", "arm": WITHHELD}
SEEN = {**BLIND, "arm": SHOWN, "seconds": 3.0}


@pytest.mark.parametrize(
    "labels",
    [
        pytest.param([], id="none"),
        pytest.param([given(1, "")], id="an empty one"),
        pytest.param([given(1, "Mars", truth=True)], id="a ground truth"),
        pytest.param([given(task, "Mars", **SEEN) for task in range(40)], id="one annotator"),
        pytest.param(
            [
                given(task, ("Mars", "Moon", "Io")[task * int(who) % 3], who, **(BLIND if task % 4 else SEEN))
                for task in range(120)
                for who in "123"
            ],
            id="three annotators, and a choice that is gone",
        ),
    ],
)
def test_there_is_a_page_of_whatever_was_labelled(labels: list[Given], images: ImageReader) -> None:
    """With every figure, or with what is missing for it; and nothing that a program writes for nothing."""
    made = evidence(labels, people={"1": "ada@example.com"})
    page = report.page(measure(made), album.sights(made, Album(), images))
    assert page.rstrip().endswith("</html>")
    seen = re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)
    assert not re.search(r"\b(None|nan|inf|Undefined)\b", seen)
    assert measure(made).controls[0].kept.sentence.replace(" %", "\N{NO-BREAK SPACE}%") in html.unescape(page)


@pytest.fixture
def images(tmp_path: Path) -> ImageReader:
    """A reader of drawn files; the tasks' addresses name them."""
    settings = replace(Settings(), model_dir=tmp_path, data_folder=tmp_path)
    return ImageReader(settings, Studio(settings), Metrics())


def vectors(count: int, seed: int = 3) -> Any:
    found = np.random.default_rng(seed).standard_normal((count, 64)).astype(np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def album_of(rows: Any, first: int = 1, **more: Any) -> Album:
    keys = [bytes([number // 256, number % 256]) for number in range(len(rows))]
    return Album(
        {(task, "image"): key for task, key in enumerate(keys, first)}, dict(zip(keys, rows, strict=True)), **more
    )


def test_pictures_that_are_alike_and_labelled_differently_are_found() -> None:
    """A copy, and the very same file under two tasks; equal labels, and what is only similar, are no matter."""
    rows = vectors(6)
    rows[3] = rows[0] + 0.02 * rows[5]
    rows[3] /= np.linalg.norm(rows[3])
    rows[4] = rows[1]
    seen = album_of(rows)
    seen = replace(seen, digests={**seen.digests, (5, "image"): seen.digests[2, "image"]})
    labels = [
        given(1, "Mars"),
        given(2, "Mars"),
        given(3, "Moon"),
        given(4, "Moon"),
        given(5, "Moon"),
        given(6, "Mars"),
    ]
    first, second = album.twins(evidence(labels), seen)
    assert (first.one, first.other, first.exact) == (2, 5, True)
    assert (second.one, second.other, second.exact) == (1, 4, False)
    assert 0 < second.distance < album.NEAR


def test_of_many_pictures_that_are_alike_those_with_the_rare_label_are_found() -> None:
    """Each of them, and the others only as what they are compared with."""
    rows = np.repeat(vectors(1), 40, axis=0)
    labels = [given(task, "Moon" if task in (7, 9, 30) else "Mars") for task in range(1, 41)]
    found = album.twins(evidence(labels), album_of(rows))
    assert sorted(each.one for each in found) == [7, 9, 30]
    even = [given(task, "Moon" if task % 2 else "Mars") for task in range(1, 41)]
    assert {task for each in album.twins(evidence(even), album_of(rows)) for task in (each.one, each.other)} == {
        *range(1, 41)
    }


def drifting(share: float) -> album.Drift:
    """Of 200 new pictures a share comes from elsewhere."""
    rng = np.random.default_rng(5)
    classes = np.arange(320) % 4
    rows = np.eye(64, dtype=np.float32)[classes] + 0.05 * rng.standard_normal((320, 64)).astype(np.float32)
    rows[120 : 120 + int(200 * share)] = np.eye(64)[40] + 0.05 * rng.standard_normal((int(200 * share), 64))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    labels = [given(task, ("Mars", "Moon", "Sun", "Io")[classes[task - 1]]) for task in range(1, 121)]
    return album.drift(evidence(labels), album_of(rows, new=tuple(range(121, 321))))


def test_new_pictures_like_the_old_ones_are_no_drift_and_others_are() -> None:
    same, other = drifting(0.0), drifting(0.5)
    assert same.figure.value is not None
    assert same.figure.value < 0.06
    assert "has changed:" not in same.figure.sentence
    assert other.figure.value == pytest.approx(0.5, abs=0.06)
    assert "The input has changed" in other.figure.sentence
    assert set(other.strange[:50]) <= set(range(121, 221))
    assert other.periods[0].value == 1.0
    assert (other.periods[-1].value or 0) < 0.2


def test_files_that_were_uploaded_twice_are_no_sign_of_a_change() -> None:
    """Each has a twin at no distance at all, and new pictures have none."""
    rng = np.random.default_rng(5)
    rows = np.ones((180, 64), np.float32) + rng.standard_normal((180, 64)).astype(np.float32)
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    seen = album_of(np.concatenate([np.repeat(rows[:80], 2, axis=0), rows[80:]]), new=tuple(range(161, 261)))
    seen = replace(seen, digests={place: seen.vectors[key].tobytes() for place, key in seen.digests.items()},
                   vectors={row.tobytes(): row for row in rows})  # fmt: skip
    moved = album.drift(evidence([given(task, ("Mars", "Moon")[task % 2]) for task in range(1, 161)]), seen)
    assert moved.figure.n == 100
    assert "has changed:" not in moved.figure.sentence


def test_one_picture_over_and_over_is_as_before() -> None:
    """Also where each is compressed a little otherwise."""
    rng = np.random.default_rng(5)
    rows = np.ones((120, 64), np.float32) + np.float32(1e-5) * rng.standard_normal((120, 64)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    rows[:60] = rows[0]
    labels = [given(task, "Mars") for task in range(1, 61)]
    moved = album.drift(evidence(labels), album_of(rows, new=tuple(range(61, 121))))
    assert "has changed:" not in moved.figure.sentence


def test_too_few_pictures_tell_nothing_of_drift() -> None:
    found = album.drift(evidence([given(1, "Mars")]), album_of(vectors(1)))
    assert found.figure.value is None
    assert album.drift(Evidence("7", "", "", (), ()), Album()).figure.value is None


def suspect(task: int) -> Suspect:
    return Suspect("choice", (task,), (task,), ("Mars",), ("Moon",), 0.02, 0.97)


def test_each_kind_of_telling_picture_is_there_and_no_task_twice() -> None:
    labels = [
        *(given(task, "Moon", said=frozenset({"Mars"}), confidence=1 - task / 100) for task in range(1, 21)),
        given(30, "Mars"), given(30, "Moon", "2"),
        given(31, "Mars"), given(31, "Moon", "2", truth=True),
        given(40, "Mars", arm=UNPREDICTED, version="one"), given(41, "Mars", arm=UNPREDICTED),
    ]  # fmt: skip
    pair = album.Twins("choice", 50, 51, 0.01, exact=False)
    found = album.telling(evidence(labels), [pair], [60], [suspect(70)])
    assert {each.kind for each in found} == {OVERRULED, UNKNOWN, DISPUTED, TWINS, SUSPECT}
    tasks = [task for each in found for task in each.tasks]
    assert len(found) == album.TELLING_MAX
    assert len(set(tasks)) == len(tasks)
    assert tasks[0] == 1, "the surest first"
    assert {40, 60} <= set(tasks)
    assert not {31, 41} & set(tasks), "decided, and there was no model yet"


def test_a_planted_error_is_not_what_the_model_said(images: ImageReader) -> None:
    labels = [given(1, "Moon", said=frozenset({"Mars"}), confidence=0.99, arm=PLANTED)]
    assert album.telling(evidence(labels), []) == []
    shown = album.sights(evidence(labels), Album(), images, [suspect(1)]).telling[0][1][0]
    assert shown.said == ()
    assert "planted error" in shown.answers[0]


def test_whoever_labelled_blind_is_not_sent_back_because_the_model_disagrees() -> None:
    """So that what was withheld is told to nobody; a dispute between people is another matter."""
    said = {"said": frozenset({"Mars"}), "confidence": 0.99}
    labels = [
        given(1, "Moon", **said),
        given(2, "Moon", arm=WITHHELD, **said),
        given(3, "Moon", said=said["said"], confidence=0.5),
    ]
    assert album.again(evidence(labels), [], [], [suspect(2)]) == {1: [OVERRULED]}
    assert album.again(evidence([*labels, given(2, "Mars", "2")]), [])[2] == [DISPUTED]


def test_what_is_to_be_looked_at_again_is_bounded_and_mixed() -> None:
    labels = [given(task, "Moon", said=frozenset({"Mars"}), confidence=0.99) for task in range(1, 301)]
    found = album.again(evidence(labels), [album.Twins("choice", 1, 400, 0.0, exact=True)], [500])
    assert len(found) == album.AGAIN_MAX
    assert next(iter(found.items())) == (1, [TWINS, OVERRULED])
    assert {400, 500} <= set(found)


def test_a_picture_that_cannot_be_read_costs_only_itself(tmp_path: Path, images: ImageReader) -> None:
    """The others are shown small, with what the model and people said."""
    Image.new("RGB", (900, 600), "red").save(tmp_path / "1.png")
    inline = f"data:image/png;base64,{base64.b64encode((tmp_path / '1.png').read_bytes()).decode()}"
    labels = [given(task, "Moon", said=frozenset({"Mars"}), confidence=0.97, version="m:one") for task in (1, 2)]
    data = {1: {"image": inline}, 2: {"picture": "2.png"}}
    made = evidence(labels, people={"1": "ada@example.com"}, data=data)
    sights = album.sights(made, Album(), images)
    (good,), (bad,) = (pieces for _, pieces in sights.telling)
    assert good.picture.startswith("data:image/jpeg;base64,")
    assert len(good.picture) < 20_000
    assert good.answers == ("ada@example.com: Moon",)
    assert good.said == ("Mars, 0.97",)
    assert bad.picture == ""
    assert "image" in bad.problem
    (picture,) = Seen(report.page(measures(measured()), sights)).pictures
    assert picture["alt"] == "The picture of task 1"


def test_a_report_replaces_only_a_report(tmp_path: Path) -> None:
    """What else is there stays, and the folder must be there; nothing is read before that is clear."""
    settings, place = replace(Settings(), model_dir=tmp_path / "state"), tmp_path / "page.html"
    report.check(settings.state.report("7"), settings)
    report.check(place, settings)
    report.write(place, report.page(measures(), Sights(album.Drift(NONE))))
    report.check(place, settings)
    place.write_text("<html>my own page</html>")
    with pytest.raises(SettingsError, match="replaces an older report only"):
        report.check(place, settings)
    with pytest.raises(SettingsError, match="replaces an older report only"):
        report.check(tmp_path, settings)
    with pytest.raises(SettingsError, match="must be there"):
        report.check(tmp_path / "none" / "page.html", settings)
    with pytest.raises(StateError, match="cannot be written"):
        report.write(place / "page.html", "")


def test_a_folder_that_is_read_only_is_told_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, _mode: Path(path) != tmp_path)  # root may write anywhere
    with pytest.raises(SettingsError, match="must be able to write into"):
        report.check(tmp_path / "page.html", replace(Settings(), model_dir=tmp_path / "state"))


def test_a_report_does_not_lie_where_label_studio_shows_it(tmp_path: Path) -> None:
    """But for the state folder, which holds the token too."""
    settings = replace(Settings(), label_studio_data=tmp_path / "ls", local_files_root=tmp_path,
                       model_dir=tmp_path / "state")  # fmt: skip
    report.check(settings.state.report("7"), settings)
    for place in (
        tmp_path / "ls" / "media" / "page.html",
        tmp_path / "page.html",
        tmp_path / "state" / ".." / "page.html",
    ):
        with pytest.raises(SettingsError, match="Label Studio shows files"):
            report.check(place, settings)


def test_the_command_asks_for_a_label_studio_before_anything_else(tmp_path: Path) -> None:
    done = CliRunner().invoke(command, ["--project", "7"], obj=replace(Settings(), model_dir=tmp_path))
    assert isinstance(done.exception, SettingsError)
    assert "LABEL_STUDIO_URL" in str(done.exception)
