"""Whatever is sent, there is an answer with a sentence: no 5xx, no crash, nobody who waits."""

from __future__ import annotations

import base64
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

import pytest
from flask.testing import FlaskClient
from hypothesis import given, seed
from hypothesis import strategies as st
from PIL import Image
from werkzeug.test import TestResponse

from celestial_backend.errors import LabelConfigError
from celestial_backend.labels import ChoiceMap
from celestial_backend.predictor import Predictor
from celestial_backend.services import build
from celestial_backend.settings import Settings
from celestial_backend.web.app import create_app
from celestial_backend.web.protocol import TRAIN_EVENTS
from tests.support.backend_server import BODIES, label_config
from tests.support.cases import cases
from tests.unit.pictures.test_decode import saved

LONG_S = 20  # far more than any of these may take on a busy machine, far less than what they took once
IMAGE = '<Image name="image" value="$image"/>'


@pytest.fixture
def client(tmp_path: Path) -> FlaskClient:
    settings = Settings(bentoml_home=tmp_path / "bentoml", model_dir=tmp_path / "state", image_timeout_s=1)
    return create_app(build(settings)).test_client()


class Told(logging.Handler):
    """What the log said of tasks, and of what nobody foresaw."""

    def __init__(self) -> None:
        super().__init__()
        self.tasks: list[str] = []
        self.unforeseen: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info:
            self.unforeseen.append(record.getMessage())
        if record.getMessage().startswith("Task "):
            self.tasks.append(record.getMessage())


@pytest.fixture
def told() -> Iterator[Told]:
    handler = Told()
    logging.getLogger("celestial_backend").addHandler(handler)
    yield handler
    logging.getLogger("celestial_backend").removeHandler(handler)


def check_refusal(answer: TestResponse, *statuses: int) -> None:
    """A sentence in the body, the same in the status line, on one line of ASCII, and nothing of the server."""
    assert answer.status_code in statuses, answer.text
    sentence = answer.json["detail"]
    assert sentence.endswith((".", "...")), sentence
    reason = answer.status.partition(" ")[2]
    assert reason.isascii()
    assert reason.isprintable()
    assert reason[:20] == " ".join(sentence.split()).encode("ascii", "replace").decode()[:20]
    assert "Traceback" not in answer.text
    assert "/celestial_backend/" not in answer.text


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None), max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
# Addresses, whole and in pieces; the hosts are those that nobody may reach.
PIECES = st.sampled_from([
    "http://", "https://", "HTTP:", "file:///", "s3://", "gs://", "azure-blob://", "ftp://", "data:", "data:image/png",
    ";base64", ",", "//", "/", "\\", "..", "%2e%2e", "%00", "\0", "\r\n", "\t", " ", "@", ":", "?", "#", "[", "]",
    "[::1]", "[::ffff:127.0.0.1]", "127.0.0.1", "0x7f000001", "2130706433", "017700000001", "169.254.169.254",
    "localhost", ":0", ":99999", ":-1", "user:secret@", "data/upload/", "upload/", "/data/local-files/?d=",
    "tasks/1/resolve/?fileuri=", "etc/passwd", "x.png", "é", "。", "①", "\u202e", "\ud800", "xn--", "a" * 300,
    "iVBORw0KGgo",
])  # fmt: skip
VALUES = st.lists(PIECES, max_size=7).map("".join)
ORANGE = Image.new("RGB", (12, 9), (200, 90, 10))
PICTURES = [saved(ORANGE, kind) for kind in ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF")]


@st.composite
def damaged_pictures(draw: st.DrawFn) -> str:
    """A data: URI of a picture with bytes changed, taken out and cut off."""
    data = bytearray(draw(st.sampled_from(PICTURES)))
    for _ in range(draw(st.integers(0, 4))):
        place = draw(st.integers(0, len(data) - 1))
        data[place : place + draw(st.integers(0, 3))] = draw(st.binary(max_size=3))
    return "data:image/png;base64," + base64.b64encode(data[: draw(st.integers(1, 2000))]).decode()


DATA = st.fixed_dictionaries({"image": JSON | VALUES | damaged_pictures()})
TASKS = st.lists(JSON | st.fixed_dictionaries({"id": JSON | st.integers(1, 9), "data": DATA}), max_size=4)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore::PIL.Image.DecompressionBombWarning")
@seed(3)
@cases(150)
@given(tasks=TASKS, params=st.none() | st.dictionaries(st.text(max_size=8), JSON, max_size=2))
def test_any_task_gets_its_own_answer(client: FlaskClient, told: Told, tasks: list[Any], params: Any) -> None:
    """Whatever stands in a task costs no more than its own prediction, and one line that ends in a full stop."""
    told.tasks.clear()
    body = {"tasks": tasks, "label_config": label_config(), "project": "7.1", "params": params}
    answer = client.post("/predict", json=body)
    assert answer.status_code == 200, answer.text
    results = answer.json["results"]
    assert len(results) == len(tasks)
    assert len(told.tasks) == results.count([])
    assert all(line.endswith(".") and line.isprintable() for line in told.tasks), told.tasks
    assert not told.unforeseen
    assert "secret@" not in "".join(told.tasks)


NAMES = st.sampled_from(["View", "Image", "Choices", "Choice", "Header", "x:Choices", "choices", "a-b", "é"])
KEYS = st.sampled_from(["name", "toName", "value", "alias", "predicted_values", "choice", "model_score_threshold",
    "valueList", "perRegion", "apiUrl", "xmlns", "xmlns:x", "model_skip"])  # fmt: skip
TEXTS = st.sampled_from(["image", "$image", "choice", "Mars", "mars ", "multiple", "0.5", "nan", "true", "$a.b",
    "a,image", "", "urn:x", "&\"<'", "\u0301" * 300, "$" + "a." * 200]) | st.text(max_size=8)  # fmt: skip
ELEMENTS = st.recursive(
    st.builds(lambda name, keys: (name, keys, []), NAMES, st.dictionaries(KEYS, TEXTS, max_size=4)),
    lambda inner: st.tuples(NAMES, st.dictionaries(KEYS, TEXTS, max_size=4), st.lists(inner, max_size=4)),
    max_leaves=12,
)
HEADS = st.sampled_from(["", '<?xml version="1.0" encoding="utf-16"?>', "<!DOCTYPE View>", "\ufeff", "<!-- - -->",
    "<?x y?>", '<!DOCTYPE a [<!ENTITY b "c">]>', '<!DOCTYPE a SYSTEM "http://127.0.0.1:1/x">', "\x01"])  # fmt: skip


def as_xml(element: tuple[str, dict[str, str], list[Any]]) -> str:
    name, keys, inner = element
    head = "".join(f" {key}={quoteattr(value)}" for key, value in keys.items())
    return f"<{name}{head}>{''.join(map(as_xml, inner))}</{name}>"


MARKUP = ["<", ">", "/", "View", "Choices ", "name='a'", "&", "<![CDATA[", "]]>", "<!--", "\0", "]"]
CONFIGS = (
    st.builds("{}{}".format, HEADS, ELEMENTS.map(as_xml))
    | st.builds("<View>{}{}</View>".format, ELEMENTS.map(as_xml), st.just(label_config()))
    | st.lists(st.sampled_from(MARKUP), max_size=9).map("".join)
    | st.text(st.characters(codec=None), max_size=30)
)  # fmt: skip


@seed(4)
@cases(150)
@given(config=CONFIGS)
def test_any_label_config_is_served_or_refused_with_a_sentence(client: FlaskClient, told: Told, config: str) -> None:
    """By /setup and /predict alike: what connects also predicts."""
    setup = client.post("/setup", json={"project": "7.1", "schema": config})
    predict = client.post("/predict", json={"tasks": [{"id": 1, "data": {}}], "label_config": config})
    assert setup.status_code == predict.status_code
    if setup.status_code != 200:
        for answer in (setup, predict):
            check_refusal(answer, 400, 422)
    assert not told.unforeseen


@seed(5)
@cases(100)
@given(
    path=st.sampled_from(["/setup", "/predict", "/webhook"]),
    body=st.dictionaries(
        st.sampled_from(["action", "project", "schema", "tasks", "label_config", "params", "annotation"]),
        JSON | st.sampled_from([*TRAIN_EVENTS, "TASKS_CREATED"]) | st.fixed_dictionaries({"id": JSON}),
    ).map(json.dumps)
    | JSON.map(json.dumps)
    | st.binary(max_size=40),
)  # fmt: skip
def test_any_body_gets_a_sentence(client: FlaskClient, told: Told, path: str, body: str | bytes) -> None:
    """JSON of the right keys and the wrong values, other JSON, and bytes that are none."""
    answer = client.post(path, data=body, content_type="application/json")
    if answer.status_code not in (200, 201):
        check_refusal(answer, 400, 422)
    assert not told.unforeseen


@pytest.mark.parametrize("path", ["/setup", "/predict", "/webhook"])
@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"[" * 100_000, id="deep-list"),
        pytest.param(b'{"tasks":' * 100_000, id="deep-object"),
        pytest.param(b"9" * 100_000, id="long-number"),
        pytest.param(b'{"action": "TASKS_CREATED", "project": {"id": 1e999}', id="cut"),
        pytest.param('{"schema": "é"}'.encode("latin-1"), id="latin-1"),
        pytest.param(b'"' + b"\\ud800" * 20_000 + b'"', id="half-letters"),
    ],
)
def test_bodies_made_to_hurt(client: FlaskClient, path: str, body: bytes) -> None:
    """Nesting, numbers and letters without end are the sender's fault, and the sender is told."""
    check_refusal(client.post(path, data=body, content_type="application/json"), 400)


@pytest.mark.parametrize("number", ["1e999", "-1e999", "NaN", "9" * 400, '"' + "9" * 400 + '"', "-1", "null", "[]"])
def test_an_event_of_a_project_without_a_number(client: FlaskClient, number: str) -> None:
    """What trains nothing is waved through, what does is refused; no file is named after it."""
    other = f'{{"action": "TASKS_CREATED", "project": {{"id": {number}}}}}'
    answers = [
        client.post("/webhook", data=other.replace("TASKS_CREATED", event), content_type="application/json")
        for event in ("TASKS_CREATED", "START_TRAINING")
    ]
    assert answers[0].json == {"status": "Unknown event"}
    check_refusal(answers[1], 400)


@pytest.mark.parametrize("project", ["9" * 400, "/etc/passwd", "..", "a\0b", "\ud800", "-1", "1e9", "٣"])
def test_a_project_that_is_none_has_no_model_of_its_own(client: FlaskClient, tmp_path: Path, project: str) -> None:
    """Its name never becomes a path; the default model answers."""
    for path, key in (("/setup", "schema"), ("/predict", "label_config")):
        assert client.post(path, json={"project": project, key: label_config(), "tasks": []}).status_code == 200
    assert not list((tmp_path / "state").glob("live/*"))


@pytest.mark.parametrize("number", ["x\nFAKE LINE", "data:image/png;base64,PIXELS", {"a": 1}, True, -1, 2**80, 1.5])
def test_an_id_that_is_no_number_is_not_repeated(client: FlaskClient, told: Told, number: object) -> None:
    """Not in the log, and not in an address of Label Studio."""
    task = {"id": number, "data": {"image": "s3://bucket/x.png"}}
    assert client.post("/predict", json={"tasks": [task], "label_config": label_config()}).json["results"] == [[]]
    assert [line.partition(":")[0] for line in told.tasks] == ["Task without an id"]
    assert "this one has no id" in told.tasks[0]


def test_a_task_without_an_id_is_called_so_where_the_model_fails(
    client: FlaskClient, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where its picture fails."""
    monkeypatch.setattr(Predictor, "_said", lambda *_: iter([([float("nan")] * len(BODIES), [0.0])]))
    picture = base64.b64encode(saved(Image.new("RGB", (8, 8)), "PNG")).decode()
    task = {"data": {"image": f"data:image/png;base64,{picture}"}}
    assert client.post("/predict", json={"tasks": [task], "label_config": label_config()}).json["results"] == [[]]
    assert [line.partition(":")[0] for line in told.tasks] == ["Task without an id"]


@pytest.mark.parametrize("path", ["/x%0d%0aFAKE%20LINE", "/x%0aFAKE", "/%1b[31mred", "/x%e2%80%a8y", "/" + "x" * 5000])
def test_a_path_forges_no_line_of_the_log(client: FlaskClient, caplog: pytest.LogCaptureFixture, path: str) -> None:
    """What is asked for is logged on one line, as text, and cut."""
    with caplog.at_level(logging.INFO):
        check_refusal(client.get(path), 404)
    assert all(line.isprintable() and len(line) < 300 for line in caplog.messages)


def repeated(text: str, number: int = 10_000) -> str:
    return "".join(text.format(i, "") for i in range(number))


def choices(number: int, text: str = "Class {}") -> str:
    return repeated(f'<Choice value="{text}"/>', number)


def config_of(inside: str, head: str = "", more: str = "") -> str:
    return f'{head}<View>{IMAGE}{more}<Choices name="c" toName="image">{inside}</Choices></View>'


LAUGHS = "".join(f'<!ENTITY {new} "{f"&{old};" * 10}">' for old, new in zip("abcdefghi", "bcdefghij", strict=True))
ACCENTS = "\u0301\u0316"  # above and below, in the order that has to be changed
MARS = '<Choice value="Mars"/>'
PLAIN = '<Choices name="c{}" toName="image"><Choice value="Mars"/></Choices>'
HOSTILE = {
    "billion-laughs": (config_of("&j;" + MARS, f'<!DOCTYPE v [<!ENTITY a "ha">{LAUGHS}]>'), 422),
    "external-entity": (config_of(MARS, '<!DOCTYPE v [<!ENTITY a SYSTEM "file:///etc/passwd">]>', "&a;"), 422),
    "external-parameter": (config_of(MARS, '<!DOCTYPE v [<!ENTITY % a SYSTEM "http://127.0.0.1:1/">%a;]>'), 422),
    "external-doctype": (config_of(MARS, '<!DOCTYPE v SYSTEM "http://127.0.0.1:1/x.dtd">'), 200),
    "attributes-for-all": (
        config_of(MARS * 9_000, f"<!DOCTYPE v [<!ATTLIST Choice{repeated(' a{} CDATA {!r}', 9_000)}>]>"), 422
    ),
    "deep-declaration": (config_of(MARS, f"<!DOCTYPE v [<!ELEMENT v {'(' * 100_000}a{')' * 100_000}>]>"), 422),
    "ten-thousand-choices": (config_of(choices(10_000) + MARS), 200),
    "ten-thousand-equal-choices": (config_of(MARS * 10_000 + '<Choice value="Moon"/>'), 200),
    "ten-thousand-controls": (
        config_of(MARS, more=repeated('<Choices name="c{}" toName="image"><Choice value="Mars"/></Choices>')), 200
    ),
    "ten-thousand-controls-on-nothing": (
        f"""<View>{repeated('<Choices name="c{}" toName="no"><Choice value="Mars"/></Choices>')}</View>""", 422
    ),
    "deep": ("<View>" * 100_000 + config_of(MARS) + "</View>" * 100_000, 200),
    "deep-and-open": ("<View>" * 100_000, 422),
    "long": (config_of(MARS + f'<Choice value="{"x" * 2_000_000}"/>'), 422),
    "long-attribute": (config_of(MARS + f'<Choice value="{"x" * 1_900_000}"/>'), 200),
    "many-attributes": (config_of(MARS, more="<Header " + " ".join(f'a{i}="x"' for i in range(100_000)) + "/>"), 200),
    "accents": (config_of(MARS + f'<Choice value="a{ACCENTS * 100_000}"/>'), 200),
    "accents-spread": (config_of(MARS + choices(1_000, "a" + ACCENTS * 90 + "{}")), 200),
    "predicted-values": (config_of(f'<Choice value="x" predicted_values="{"Mars," * 200_000}"/>'), 200),
    "blanks": (config_of(MARS + f'<Choice value="{" " * 900_000}x" alias="{" , " * 300_000}"/>'), 200),
    "hyphens": (f'<View>{IMAGE}<Choices name="{"-" * 1_000_000}" toName="no">{MARS}</Choices></View>', 422),
    "unknown-prefix": (config_of(MARS, more='<x:Image name="i" value="$i"/>'), 200),
    "default-namespace": (config_of(MARS).replace("<View>", '<View xmlns="urn:x">'), 200),
    "control-characters": (config_of(MARS + '<Choice value="\x01"/>'), 422),
    "nul": (config_of(MARS) + "\0", 422),
    "wrong-encoding": (config_of(MARS, '<?xml version="1.0" encoding="no-such"?>'), 200),
    "two-roots": (config_of(MARS) * 2, 422),
    "ten-thousand-conditions": (
        config_of(MARS, more=repeated(
            '<Choices name="c{}" toName="image" visibleWhen="choice-selected"><Choice value="Mars"/></Choices>')), 200
    ),
    "a-thousand-that-look-at-all": (
        config_of(MARS, more=repeated(
            '<Choices name="c{}" toName="image" visibleWhen="choice-selected" whenChoiceValue="Mars">'
            '<Choice value="Mars"/></Choices>', 900)), 200
    ),
    "a-circle-of-900": (
        config_of(MARS, more=repeated(
            '<Choices name="c{}" toName="image" visibleWhen="choice-selected" whenTagName="d"><Choice value="Mars"/>'
            "</Choices>", 900) + '<Choices name="d" toName="image" visibleWhen="choice-unselected" whenTagName="c1">'
            '<Choice value="Mars"/></Choices>'), 200
    ),
    "long-condition": (
        config_of(MARS, more='<Choices name="d" toName="image" visibleWhen="choice-selected" whenTagName="c" '
                  f'whenChoiceValue="{"Mars," * 100_000}"><Choice value="Mars"/></Choices>'), 200
    ),
    "conditions-in-each-other": (
        config_of(MARS, more='<View visibleWhen="choice-selected">' * 20_000 + "</View>" * 20_000), 422
    ),
    "views-around-very-many": (
        config_of(MARS, more='<View visibleWhen="choice-selected">' * 20 + repeated(PLAIN, 990) + "</View>" * 20), 200
    ),
    "pairs-that-look-at-each-other": (
        config_of(MARS, more='<View visibleWhen="choice-selected">' + "".join(
            f'<Choices name="{one}{i}" toName="image" visibleWhen="choice-selected" whenTagName="{other}{i}">'
            '<Choice value="Mars"/></Choices>' for i in range(490) for one, other in ("ab", "ba")) + "</View>"), 200
    ),
    "a-chain": (
        config_of(MARS, more=repeated('<Choices name="c{}" toName="image" visibleWhen="choice-selected" '
                                      'whenTagName="c"><Choice value="Mars"/></Choices>', 3000)), 200
    ),
    "very-many-that-name-very-much": (
        config_of(choices(10_000) + MARS, more='<View visibleWhen="choice-selected" whenTagName="c" whenChoiceValue="'
                  + ",".join(f"Class {i}" for i in range(10_000)) + '">' + repeated(PLAIN, 990) + "</View>"), 200
    ),
    "long-paths": (
        config_of(MARS, more=f'<Taxonomy name="t" toName="image"><Choice value="{"x" * 1_000_000}">' + choices(1000)
                  + "</Choice></Taxonomy>"), 200
    ),
    "deep-taxonomy": (
        config_of(MARS, more='<Taxonomy name="t" toName="image">' + '<Choice value="Mars">' * 30_000
                  + "</Choice>" * 30_000 + "</Taxonomy>"), 200
    ),
    "wide-taxonomy": (config_of(MARS, more='<Taxonomy name="t" toName="image"><Choice value="Earth">' + choices(10_000)
                                + "</Choice></Taxonomy>"), 200),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_label_configs_made_to_hurt(client: FlaskClient, told: Told, name: str) -> None:
    """Each is served or refused at once, with a short sentence, by /setup and /predict."""
    config, status = HOSTILE[name]
    for path, key in (("/setup", "schema"), ("/predict", "label_config")):
        start = time.process_time()
        answer = client.post(path, json={key: config, "tasks": [{"id": 1, "data": {}}]})
        assert time.process_time() - start < LONG_S
        assert answer.status_code == status, answer.text[:500]
        if status != 200:
            check_refusal(answer, 422)
            assert len(answer.json["detail"]) <= 400
    assert not told.unforeseen


@pytest.mark.parametrize("name", HOSTILE)
def test_a_model_of_a_thousand_classes_makes_no_config_slow(name: str) -> None:
    """The work is that of reading the config, not of comparing each choice with each class; learning included."""
    config, status = HOSTILE[name]
    classes = [*BODIES, *(f"Class {i}" for i in range(990))]
    for read in (lambda given: ChoiceMap.from_config(given, classes), ChoiceMap.for_learning):
        start = time.process_time()
        if status == 200:
            assert len(read(config).warnings) <= 21
        else:
            with pytest.raises(LabelConfigError):
                read(config)
        assert time.process_time() - start < LONG_S
