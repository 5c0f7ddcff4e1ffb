"""Whatever a stranger sends, twice as much of it takes twice as long: no step takes more than linear time."""

from __future__ import annotations

import base64
import gc
import json
import math
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flask.testing import FlaskClient
from hypothesis import given, seed
from hypothesis import strategies as st
from PIL import Image

from celestial_backend.errors import CelestialError, ImageError
from celestial_backend.labels import CONTROLS_MAX, KEYS_MAX, ChoiceMap
from celestial_backend.pictures.download import ADDRESS_MAX
from celestial_backend.pictures.reader import ImageReader
from celestial_backend.services import build
from celestial_backend.settings import Settings
from celestial_backend.studio.client import Studio
from celestial_backend.web.app import create_app
from celestial_backend.web.protocol import DATA_MAX, TASKS_MAX, VALUES_MAX, Tasks, read
from tests.support.backend_server import label_config
from tests.support.cases import cases

MOST = 1.4  # the exponent, with noise and caches in it; of squares it is 2
MB = 1_000_000


def exponent(sizes: Sequence[int], made: Callable[[int], Any], work: Callable[[Any], object]) -> float:
    """How this thread's processor time grows with size: the slope of their logarithms, the best of some tries."""
    best = math.inf
    for _ in range(8):
        times = []
        for size in sizes:
            sent = made(size)
            spans = []
            for _ in range(3):
                started = time.thread_time()
                work(sent)
                spans.append(time.thread_time() - started)
            times.append(max(min(spans), 1e-5))
        best = min(best, float(np.polyfit(np.log(sizes), np.log(times), 1)[0]))
        if best <= MOST:
            break
    return best


def test_what_looks_at_all_letters_for_each_of_them_is_found() -> None:
    """The limit leaves room for noise, and none for that: measured with loops, which cost the same everywhere."""

    def squares(value: str) -> int:
        return sum(1 for _ in value for _ in value)

    def lines(value: str) -> int:
        return sum(1 for _ in range(100) for _ in value)

    assert exponent([250, 500, 1_000], lambda size: "a" * size, squares) > MOST
    assert exponent([2_000, 4_000, 8_000], lambda size: "a" * size, lines) <= MOST


@pytest.fixture
def images(tmp_path: Path) -> ImageReader:
    """A reader that looks everywhere a picture may lie."""
    folders = {name: tmp_path / name for name in ("data_folder", "label_studio_data", "local_files_root")}
    for folder in folders.values():
        (folder / "media" / "upload").mkdir(parents=True)
        (folder / "a" / "a").mkdir(parents=True)
    settings = Settings(label_studio_url="http://127.0.0.1:9/ls", image_timeout_s=1, **folders)  # type: ignore[arg-type]
    return ImageReader(settings, Studio(settings))


def attempt(images: ImageReader, value: object) -> str:
    """Read it as a prediction does: near first, then from afar; gives what is said of it."""
    try:
        data = images.near_file(value)
        images.decoded(value, images.file(value, 7) if data is None else data)
    except CelestialError as error:
        return str(error)
    return ""


UNITS = ["a", "a.", ".", "/", "a/", "../", "./", "%2e", "%", "%41", ":", "@", "?", "#", "&", "&d=", "=", ";", " ", "\t",
    "\n", "\\", "é", "\u0301\u0316", "\ud800", "。", "①", "\u202e", "\0", "[", "]", "0", "1.", "xn--", "-", "_",
    "data/", "upload/", "tasks/1/", "tasks/1", "http:", "//", "user:x@", "A" * 63 + "."]  # fmt: skip
STARTS = ["", "http://", "https://h/", "//", "/", "/data/upload/", "data/upload/1/", "/data/local-files/?d=", "s3://",
    "http://127.0.0.1:9/ls/data/upload/", "http://127.0.0.1:9/ls/", "tasks/1/resolve/?fileuri=", "file:///",
    "http://h?", "http://h#", "http://a@", "http://[", " ", "x:"]  # fmt: skip
ENDS = ["", "/", "x.png", "?", "\ud800", "@h", ":80"]


def check_address(images: ImageReader, start: str, unit: str, end: str) -> None:
    room = ADDRESS_MAX - len(start) - len(end)

    def made(size: int) -> str:
        return start + (unit * size)[: min(size, room)] + end

    found = exponent([2_000, 4_000, 8_000], made, lambda value: attempt(images, value))
    assert found <= MOST, (start, unit, end)


@pytest.mark.parametrize("start", STARTS)
def test_an_address_takes_time_that_is_linear_in_its_length(images: ImageReader, start: str) -> None:
    """Up to as many letters as one may have, whatever is repeated in it."""
    for unit in UNITS:
        check_address(images, start, unit, "")


@seed(11)
@cases(60)
@given(start=st.sampled_from(STARTS), units=st.lists(st.sampled_from(UNITS), min_size=2, max_size=3),
    end=st.sampled_from(ENDS))  # fmt: skip
def test_any_address_takes_time_that_is_linear_in_its_length(
    images: ImageReader, start: str, units: list[str], end: str
) -> None:
    """The same for what is made up of several parts."""
    check_address(images, start, "".join(units), end)


DATA_STARTS = ["data:", "data:,", "data:image/png;base64,", "data:;base64,", "DATA:image/png,", "data:image/png;base64"]
DATA_UNITS = ["a", "A ", "aa\n", "=", "%", "%41", "%4", "/", ";", ",", "é", "\ud800", "-_", "\t"]
HEADS = ["", "iVBORw0KGgo", "/9j/4AAQ", "R0lGODlh", "SUkqAAAA", "Qk0", "UklGRg"]  # as pictures begin in base64


def check_data(images: ImageReader, start: str, unit: str, sizes: Sequence[int]) -> None:
    def made(size: int) -> str:
        return start + (unit * size)[:size]

    assert exponent(sizes, made, lambda value: attempt(images, value)) <= MOST, (start, unit)


@pytest.mark.parametrize("start", DATA_STARTS)
def test_a_data_uri_takes_time_that_is_linear_in_its_length(images: ImageReader, start: str) -> None:
    """Whatever is repeated in it, its kind or its data."""
    for unit in DATA_UNITS:
        check_data(images, start, unit, [1_000, 3_000, 9_000])


@seed(12)
@cases(30)
@given(start=st.sampled_from(DATA_STARTS), head=st.sampled_from(HEADS), unit=st.sampled_from(DATA_UNITS))
def test_any_data_uri_takes_time_that_is_linear_in_its_length(
    images: ImageReader, start: str, head: str, unit: str
) -> None:
    """The same for megabytes that begin as pictures do."""
    check_data(images, start + head, unit, [100_000, 1_000_000, 8_000_000])


@pytest.mark.parametrize("unit", ["a", "%", "%41", "aa ", "=", "é"])
@pytest.mark.parametrize("start", ["data:image/png;base64,", "data:,"])
def test_what_it_takes_at_the_limit(images: ImageReader, start: str, unit: str) -> None:
    """A data: URI of as many bytes as one may have needs a small multiple of them, whatever it is made of."""
    value = start + (unit * 20 * MB)[: 20 * MB]
    tracemalloc.start()
    attempt(images, value)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6 * len(value)


def test_a_long_value_is_refused_before_anything_reads_it(images: ImageReader) -> None:
    """What is no data: URI has 8,000 letters at most; the sentence says so, and does not hold them."""
    for value in ("http://h/" + "a" * 60 * MB, "/data/upload/" + "a/" * MB, "a" * (ADDRESS_MAX + 1)):
        said = attempt(images, value)
        assert said.startswith(f"The picture (a text of {len(value)} letters) cannot be used: an address or a path may")
        assert "8000 letters" in said
    with pytest.raises(ImageError, match="the name of a host may have 253 letters"):
        images.read("http://" + "a." * 1000 + "/x.png")
    assert "letters" not in attempt(images, "http://127.0.0.1:9/ls/data/upload/" + "a" * 200 + ".png")


def test_no_cache_keeps_long_values(images: ImageReader) -> None:
    """Addresses and label configs of megabytes are gone with their request."""
    values = ["http://h/" + letter * 10 * MB for letter in "abcd"] + ["data:" + letter * 10 * MB for letter in "abcd"]
    configs = [label_config([letter * MB, "Mars"]) for letter in "abcdefgh"]
    attempt(images, "http://h/")
    gc.collect()
    tracemalloc.start()
    while values:
        attempt(images, values.pop())
    while configs:
        ChoiceMap.from_config(configs.pop(), ["Mars"])
    gc.collect()
    kept = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert kept < 12 * MB  # two of the eight configs, read


@pytest.mark.parametrize("number", [1, 2])
def test_a_request_leaves_nothing_behind(client: FlaskClient, number: int) -> None:
    """What it held is gone when it is answered, and not when Python next looks for cycles."""
    task = {"id": 1, "data": {"image": "data:" + "a" * 10 * MB, "more": "http://h/" + "a" * 10 * MB}}
    body = json.dumps({"tasks": [task] * number, "label_config": label_config()}).encode()
    post(client, body)
    gc.collect()
    gc.disable()
    tracemalloc.start()
    for _ in range(3):
        post(client, body)
    kept = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    gc.enable()
    assert kept < 5 * MB


BODY_UNITS = [b"[],", b"{},", b"0,", b'"a",', b"[[],", b'{"a":1},', b'{"id":1,"data":{}},', b"null,", b"1.5e3,",
    b'"\\u0041",', b'"\\ud800",', b" ", b"9", b"[", b'{"a":', b'"\xff",', b"NaN,", b"-", b"\\"]  # fmt: skip
BODY_PLACES = [
    b'"tasks":[', b'"unread":[', b'"label_config":[', b'"label_config":"', b'"tasks":[{"data":{"image":[',
    b'"tasks":[{"id":[', b'"tasks":[{"unread":[', b'"params":{"a":[', b'"project":[', b'"annotation":[',
    b'"annotation":{"a":[', b'"extra_params":{"a":[', b'"schema":"', b'"action":"', b'"project":{"id":[', b"",
    b'"project":"',
]  # fmt: skip


@seed(13)
@cases(40)
@given(path=st.sampled_from(["/predict", "/setup", "/webhook"]), place=st.sampled_from(BODY_PLACES),
    unit=st.sampled_from(BODY_UNITS), whole=st.booleans())  # fmt: skip
def test_any_body_takes_time_that_is_linear_in_its_length(path: str, place: bytes, unit: bytes, whole: bool) -> None:
    """Whatever is repeated in it, and wherever; cut off, or closed as JSON must be."""
    closing = place.translate(bytes.maketrans(b"[{", b"]}"), b'":,abcdefghijklmnopqrstuvwxyz_') + b"}"
    more = b'{"action":"START_TRAINING","schema":"x","label_config":"x","tasks":[],"project":{"id":1},'
    start = (more if path == "/webhook" else more.replace(b'"project":{"id":1},', b"")) + place

    def made(size: int) -> bytes:
        return start + (unit * size)[:size] + (b"0" + closing[-2::-1] + b"}" if whole else b"")

    def work(body: bytes) -> None:
        try:
            found = read(path, body)
        except CelestialError:
            return
        for task in Tasks(getattr(found, "tasks", ())):
            del task

    assert exponent([100_000, 1_000_000, 4_000_000], made, work) <= MOST


@pytest.fixture
def client(tmp_path: Path) -> FlaskClient:
    settings = Settings(bentoml_home=tmp_path / "bentoml", model_dir=tmp_path / "state")
    return create_app(build(settings)).test_client()


def post(client: FlaskClient, body: bytes, path: str = "/predict") -> Any:
    return client.post(path, data=body, content_type="application/json")


def test_a_label_config_has_so_many_controls_and_images() -> None:
    """More are left alone, and a line says so: each costs every task an answer, or a picture."""
    tags = [
        f'<Image name="i{n}" value="$k{n}"/><Choices name="c{n}" toName="i{n}"><Choice value="Mars"/></Choices>'
        for n in range(30)
    ]
    choices = ChoiceMap.from_config(f"<View>{''.join(tags)}</View>", ["Mars"])
    assert len(choices.data_keys) == len(choices.controls) == KEYS_MAX
    assert any("200 controls on 16 images are served" in warning for warning in choices.warnings)
    tags = [f'<Choices name="c{n}" toName="image"><Choice value="Mars"/></Choices>' for n in range(300)]
    choices = ChoiceMap.from_config(f'<View><Image name="image" value="$image"/>{"".join(tags)}</View>', ["Mars"])
    assert len(choices.controls) == CONTROLS_MAX


def test_a_request_that_is_over_keeps_nobody_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many pictures a task has, its thread reads one more at most once the time is up."""
    from tests.unit.pictures.test_decode import saved

    read: list[object] = []

    def slow(_: ImageReader, value: object) -> bytes:
        read.append(value)
        time.sleep(0.2)
        return saved(Image.new("RGB", (8, 8)), "PNG")

    monkeypatch.setattr(ImageReader, "near_file", slow)
    services = build(Settings(bentoml_home=tmp_path / "bentoml", model_dir=tmp_path / "state", predict_max_s=0.5))
    services.store.current()
    tags = [
        f'<Image name="i{n}" value="$k{n}"/><Choices name="c{n}" toName="i{n}"><Choice value="Mars"/></Choices>'
        for n in range(KEYS_MAX)
    ]
    tasks = [{"id": number, "data": {f"k{n}": "x" for n in range(KEYS_MAX)}} for number in (1, 2)]
    deadline = time.monotonic() + services.settings.predict_max_s
    assert services.predictor.predict(tasks, f"<View>{''.join(tags)}</View>", deadline) == [[], []]
    known = len(read)
    time.sleep(1)
    assert len(read) - known <= 2


def test_a_request_has_a_bounded_number_of_tasks(client: FlaskClient) -> None:
    """More than Label Studio waits for are refused with what to do instead, whatever they are."""
    for task in (b"{}", b"0", b'{"id":1,"data":{}}'):
        body = b'{"label_config":"x","tasks":[' + b",".join([task] * (TASKS_MAX + 1)) + b"]}"
        said = post(client, body).status
        assert said.startswith("413 A request to /predict may hold 100,000 tasks, and this one has 100,001"), task
        assert "use the command prelabel" in said


def test_a_request_has_a_bounded_number_of_values(client: FlaskClient) -> None:
    """It is told by its commas, before anything reads it."""
    answer = post(client, b'{"unread":[' + b"[]," * VALUES_MAX + b'[]],"label_config":"x","tasks":[]}')
    assert answer.status.startswith("413 A request to /predict may hold 3,000,000 values, and this one has more. Send")


def test_what_nobody_reads_is_not_built(client: FlaskClient) -> None:
    """Half a million values under a key of no meaning, and in a task beside its data or as its number: no memory."""
    config = label_config().replace('"', "'").encode()
    many = b"[" + b"[]," * (MB // 2) + b"0]"
    task = b'{"id":%b,"x":%b,"data":{"image":"x"}}' % (many, many)
    body = b'{"x":%b,"tasks":[%b],"label_config":"%b"}' % (many, task, config)
    assert post(client, body).json["results"] == [[]]
    tracemalloc.start()
    assert len(Tasks(read("/predict", body).tasks)[0:1]) == 1  # type: ignore[union-attr]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < MB


def test_a_task_of_too_many_values_costs_its_own_prediction(
    client: FlaskClient, caplog: pytest.LogCaptureFixture
) -> None:
    """The limit stands in its reason; its neighbour in the request is predicted."""
    from celestial_backend.planets.renderer import render
    from tests.unit.pictures.test_decode import saved

    picture = "data:image/png;base64," + base64.b64encode(saved(render("Mars", 1), "PNG")).decode()
    tasks = [
        {"id": 1, "data": {"image": picture, "curve": [0] * (DATA_MAX + 1)}},
        {"id": 2, "data": {"image": picture, "curve": [0] * (DATA_MAX - 10)}},
    ]
    answer = client.post("/predict", json={"tasks": tasks, "label_config": label_config()})
    assert [bool(result) for result in answer.json["results"]] == [False, True]
    assert "Task 1: The data of a task may hold 10,000 values, and this one has more." in caplog.text


def test_twenty_failures_are_told_and_the_rest_counted(client: FlaskClient, caplog: pytest.LogCaptureFixture) -> None:
    """However many tasks fail, the log of a request stays short."""
    tasks = [{"id": number, "data": {"image": "/data/upload/1/x.png"}} for number in range(1, 301)] + [{}] * 200
    answer = client.post("/predict", json={"tasks": tasks, "label_config": label_config()})
    assert answer.json["results"] == [[]] * 500
    assert sum(message.startswith("Task ") for message in caplog.messages) == 20
    assert "480 more tasks of the request failed: 280 of LockedError, 200 of RequestError" in caplog.messages
