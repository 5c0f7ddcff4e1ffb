"""ImageReader: every way a task can name its picture, the order of places, and what is refused."""

from __future__ import annotations

import base64
import io
import os
import unicodedata
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from PIL import Image

from celestial_backend.errors import DecodeError, FetchError, ForbiddenError, ImageError, LockedError, TooLargeError
from celestial_backend.pictures import folders
from celestial_backend.pictures.reader import ImageReader, shown
from celestial_backend.settings import Settings
from celestial_backend.studio.client import Studio, rewritten
from tests.support.picture_host import PictureHost, picture_host, redirect

TOKEN = "f" * 40
RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)
NAME = "24/4ced85b9-pic_1.png"

# What Label Studio 1.23.2 made of names that were uploaded the way browsers upload them, after its `<hash>-`.
UPLOADED = {
    "plain.jpg": "plain.jpg",
    "two words.jpg": "two_words.jpg",
    "a-b-c_d.jpg": "a-b-c_d.jpg",
    "deadbeef-x.jpg": "deadbeef-x.jpg",
    " lead.jpg": "_lead.jpg",
    "trail .jpg": "trail_.jpg",
    "tab\tname.jpg": "tabname.jpg",
    "a  b.jpg": "a__b.jpg",
    "50% off (1) [x] {y} #z & w+v=u,t;s!@$^~`'.jpg": "50_off_1_x_y_z__wvuts.jpg",
    'quo"te.jpg': "quo22te.jpg",
    "back\\slash.jpg": "slash.jpg",
    "a&amp;b.jpg": "ab.jpg",
    "über é.jpg": "über_é.jpg",
    unicodedata.normalize("NFD", "über é.jpg"): "uber_e.jpg",
    "Ещё файл.jpg": "Ещё_файл.jpg",
    unicodedata.normalize("NFD", "Ещё файл.jpg"): "Еще_фаил.jpg",
    "行星 图片.jpg": "行星_图片.jpg",
    unicodedata.normalize("NFD", "がぎ.jpg"): "かき.jpg",
    "हिन्दी.jpg": "हनद.jpg",
    "ไทยดี.jpg": "ไทยด.jpg",
    "한국어.jpg": "한국어.jpg",
    unicodedata.normalize("NFD", "한국어.jpg"): unicodedata.normalize("NFD", "한국어.jpg"),
    "كوكب.jpg": "كوكب.jpg",
    "😀 moon.jpg": "_moon.jpg",
    "a\u200bb.jpg": "ab.jpg",
    "nb\u00a0sp.jpg": "nbsp.jpg",
    "x..y.jpg": "x..y.jpg",
    ".hidden.jpg": ".hidden.jpg",
    "UPPER.JPG": "UPPER.JPG",
    "ﬁ①½².jpg": "ﬁ①½².jpg",
    "q?x=1.jpg": "qx1.jpg",
    "a%20b.jpg": "a20b.jpg",
    "-dash.jpg": "-dash.jpg",
}


@pytest.fixture
def host() -> Iterator[PictureHost]:
    with picture_host() as server:
        yield server


@pytest.fixture
def other() -> Iterator[PictureHost]:
    with picture_host() as server:
        yield server


def png(colour: tuple[int, int, int], size: tuple[int, int] = (4, 4)) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, colour).save(stream, "PNG")
    return stream.getvalue()


def put(folder: Path, name: str, colour: tuple[int, int, int]) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(colour))
    return path


def reader(studio: PictureHost | str | None = None, **values: Any) -> ImageReader:
    url = studio.url if isinstance(studio, PictureHost) else studio
    settings = Settings(**{"label_studio_url": url, "label_studio_api_key": TOKEN if url else None} | values)
    return ImageReader(settings, Studio(settings))


def colour(images: ImageReader, value: object, task_id: int | None = None) -> Any:
    picture = images.read(value, task_id)
    assert picture.mode == "RGB"
    return picture.getpixel((0, 0))


def refused(error: type[Exception], images: ImageReader, value: object, task_id: int | None = None) -> str:
    with pytest.raises(error) as raised:
        images.read(value, task_id)
    assert raised.type is error
    assert str(raised.value).startswith("The picture ")
    return str(raised.value)


class TestUploads:
    @pytest.mark.parametrize(
        "value",
        [f"/data/upload/{NAME}", f"/label-studio/data/upload/{NAME}", f"upload/{NAME}", f"data/upload/{NAME}", "URL"],
    )
    @pytest.mark.parametrize("place", ["disk", "http"])
    def test_spellings(self, host: PictureHost, tmp_path: Path, value: str, place: str) -> None:
        """Every spelling of an upload is found, on Label Studio's disk or over HTTP with the token."""
        host.answers[f"/data/upload/{NAME}"] = png(GREEN)
        value = value.replace("URL", f"{host.url}/data/upload/{NAME}")
        if place == "disk":
            put(tmp_path, f"media/upload/{NAME}", RED)
            assert colour(reader(host, label_studio_data=tmp_path), value) == RED
            assert host.requests == []
        else:
            assert colour(reader(host, label_studio_data=tmp_path), value) == GREEN
            assert host.authorizations() == [f"Token {TOKEN}"]

    def test_order_of_places(self, host: PictureHost, tmp_path: Path) -> None:
        """Label Studio's folder comes first, then the originals, then HTTP."""
        studio_file = put(tmp_path, f"studio/media/upload/{NAME}", RED)
        original = put(tmp_path, "originals/pic_1.png", BLUE)
        host.answers[f"/data/upload/{NAME}"] = png(GREEN)
        images = reader(host, label_studio_data=tmp_path / "studio", data_folder=tmp_path / "originals")
        assert colour(images, f"/data/upload/{NAME}") == RED
        studio_file.unlink()
        assert colour(images, f"/data/upload/{NAME}") == BLUE
        original.unlink()
        assert colour(images, f"/data/upload/{NAME}") == GREEN

    def test_media_folder_itself(self, tmp_path: Path) -> None:
        """CELESTIAL_LABEL_STUDIO_DATA may also name the media folder inside Label Studio's data."""
        put(tmp_path, f"upload/{NAME}", RED)
        assert colour(reader(label_studio_data=tmp_path), f"/data/upload/{NAME}") == RED

    def test_below_a_sub_path(self, host: PictureHost) -> None:
        """LABEL_STUDIO_URL with a sub-path is asked below it, whatever prefix the task carries."""
        host.answers[f"/ls/data/upload/{NAME}"] = png(GREEN)
        images = reader(f"{host.url}/ls")
        for value in (f"/data/upload/{NAME}", f"/ls/data/upload/{NAME}", f"{host.url}/ls/data/upload/{NAME}"):
            assert colour(images, value) == GREEN

    def test_escaped_names(self, host: PictureHost, tmp_path: Path) -> None:
        """Label Studio escapes names in tasks; they are unescaped once for the disk and escaped again for HTTP."""
        value = "/data/upload/1/0314b95a-%C3%BCber_%25.png"
        host.answers[value] = png(GREEN)
        assert colour(reader(host), value) == GREEN
        put(tmp_path, "media/upload/1/0314b95a-über_%.png", RED)
        assert colour(reader(host, label_studio_data=tmp_path), value) == RED

    def test_no_address(self) -> None:
        """An upload without any place to look for it names the settings."""
        assert "Set LABEL_STUDIO_URL and LABEL_STUDIO_API_KEY" in refused(LockedError, reader(), f"/data/upload/{NAME}")

    def test_deleted_upload(self, host: PictureHost) -> None:
        """Label Studio's odd 500 for a missing upload is explained, and the value named."""
        host.answers[f"/data/upload/{NAME}"] = 500
        said = refused(FetchError, reader(host), f"/data/upload/{NAME}")
        assert said.startswith(f"The picture '/data/upload/{NAME}' cannot be used: Label Studio answered 500, as it")


class TestOtherNames:
    """Label Studio writes the address that people know into its tasks; the backend may know it by another."""

    PEOPLE = "https://labels.example.com/studio"

    @pytest.mark.parametrize(
        "place",
        [
            PEOPLE, "http://labels.example.com/studio", "http://LABELS.example.com:8080/studio", "http://localhost:8080",
            "http://127.0.0.1", "https://localhost/label-studio", "http://[::1]:9000",
        ],
    )  # fmt: skip
    @pytest.mark.parametrize("path", [f"/data/upload/{NAME}", "/data/local-files/?d=ds/a%20b.png"])
    def test_are_read_where_label_studio_is(
        self, host: PictureHost, tmp_path: Path, place: str, path: str
    ) -> None:
        """From disk, or from LABEL_STUDIO_URL with the token; the other name is never asked."""
        host.answers[path] = png(GREEN)
        names = {"label_studio_host": self.PEOPLE}
        assert colour(reader(host, **names), place + path) == GREEN
        assert host.authorizations() == [f"Token {TOKEN}"]
        put(tmp_path, f"media/upload/{NAME}", RED)
        put(tmp_path, "ds/a b.png", RED)
        disk = reader(None, label_studio_data=tmp_path, local_files_root=tmp_path, label_studio_url=host.url, **names)
        assert colour(disk, place + path) == RED
        assert len(host.requests) == 1

    def test_a_stranger_is_no_other_name(self, host: PictureHost, tmp_path: Path) -> None:
        """However much its path looks like Label Studio's: nothing of the disk, and no token."""
        put(tmp_path, f"media/upload/{NAME}", RED)
        images = reader(host, label_studio_host=self.PEOPLE, label_studio_data=tmp_path)
        strangers = ("192.0.2.1", "example.com", "labels.example.com", "labels.example.com.x.y/studio")
        for place in (f"http://{name}" for name in strangers):
            refused(ForbiddenError if "192" in place else FetchError, images, f"{place}/data/upload/{NAME}")
        assert host.requests == []

    def test_the_name_that_is_missing_is_told(self, host: PictureHost, tmp_path: Path) -> None:
        """The remedy works: with the variable that it names, the picture comes, from disk or from Label Studio."""
        value = f"http://192.0.2.1:8080/data/upload/{NAME}"
        said = refused(ForbiddenError, reader(host), value)
        remedy = "If http://192.0.2.1:8080 is Label Studio, set LABEL_STUDIO_HOST to it."
        assert said.endswith(f"add it to CELESTIAL_ALLOWED_HOSTS. {remedy}")
        host.answers[f"/data/upload/{NAME}"] = png(GREEN)
        assert colour(reader(host, label_studio_host="http://192.0.2.1:8080"), value) == GREEN
        put(tmp_path, f"upload/{NAME}", RED)
        assert colour(reader(label_studio_host="http://192.0.2.1:8080", label_studio_data=tmp_path), value) == RED
        assert "LABEL_STUDIO" not in refused(ForbiddenError, reader(host), "http://192.0.2.1:8080/pictures/a.png")

    def test_a_host_that_may_serve_pictures_can_be_allowed(self, host: PictureHost) -> None:
        """The other remedy of the message."""
        host.answers["/a.png"] = png(GREEN)
        assert "add it to CELESTIAL_ALLOWED_HOSTS" in refused(ForbiddenError, reader(), f"{host.url}/a.png")
        assert colour(reader(allowed_hosts=(f"127.0.0.1:{host.port}",)), f"{host.url}/a.png") == GREEN

    def test_other_pictures_of_its_host_are_on_the_web(self, host: PictureHost, other: PictureHost) -> None:
        """Only Label Studio's own are asked of Label Studio; a store beside it is another place."""
        other.answers["/bucket/a.png"] = png(BLUE)
        allowed = (f"127.0.0.1:{other.port}",)
        assert colour(reader(host, allowed_hosts=allowed), f"{other.url}/bucket/a.png") == BLUE
        assert host.requests == []
        assert other.authorizations() == [None]

    def test_a_label_studio_that_has_moved_says_where(self, host: PictureHost) -> None:
        """To https, say; the token is not sent there, and the message names the right setting."""
        host.other = redirect(f"http://localhost:1{host.port % 10_000:04}/data/upload/{NAME}")
        said = refused(FetchError, reader(host), f"/data/upload/{NAME}")
        assert f"it has moved to http://localhost:1{host.port % 10_000:04}, and the token is not sent there" in said
        assert "set LABEL_STUDIO_URL to it" in said


class TestOriginals:
    @pytest.mark.parametrize(("name", "uploaded"), UPLOADED.items(), ids=[ascii(name) for name in UPLOADED])
    def test_names(self, tmp_path: Path, name: str, uploaded: str) -> None:
        """An original is found by the name that Label Studio gave its upload."""
        assert rewritten(name) == uploaded
        put(tmp_path, f"sub/folder/{name}", RED)
        images = reader(data_folder=tmp_path)
        assert colour(images, f"/data/upload/1/00000000-{quote(uploaded)}") == RED

    @pytest.mark.parametrize("stored", ["NFC", "NFD"])
    @pytest.mark.parametrize("sent", ["NFC", "NFD"])
    def test_unicode_forms(self, tmp_path: Path, stored: str, sent: str) -> None:
        """Composed or decomposed, on the disk and in the upload: it is the same name."""
        put(tmp_path, unicodedata.normalize(stored, "é.png"), RED)
        uploaded = rewritten(unicodedata.normalize(sent, "é.png"))
        assert colour(reader(data_folder=tmp_path), f"/data/upload/1/00000000-{uploaded}") == RED

    @pytest.mark.parametrize(
        ("name", "uploaded"),
        [
            ("a" * 90 + ".jpg", "upload/1/5127a520-" + "a" * 70 + "_oQMsSG0.jpg"),
            ("ж" * 120 + ".jpg", "upload/1/5dafd371-" + "ж" * 70 + "_QHeH1nS.jpg"),
        ],
    )
    def test_long_names(self, tmp_path: Path, name: str, uploaded: str) -> None:
        """Label Studio 1.23.2 cut these names to paths of 100 letters; in shorter paths nothing was cut."""
        put(tmp_path, name, RED)
        images = reader(data_folder=tmp_path)
        assert len(uploaded) == 100
        assert colour(images, uploaded) == RED
        refused(LockedError, images, uploaded.replace("/1/", "/12/"))
        put(tmp_path, "b/" + name.replace(".jpg", "z.jpg"), GREEN)
        refused(LockedError, reader(data_folder=tmp_path), uploaded)

    def test_hashes_are_cut_once(self, tmp_path: Path) -> None:
        """Only Label Studio's own hash is cut off, not one that the original's name starts with."""
        put(tmp_path, "deadbeef-x.png", RED)
        put(tmp_path, "x.png", GREEN)
        images = reader(data_folder=tmp_path)
        assert colour(images, "/data/upload/1/00000000-deadbeef-x.png") == RED
        assert colour(images, "/data/upload/1/00000000-x.png") == GREEN

    def test_two_that_differ(self, host: PictureHost, tmp_path: Path) -> None:
        """Two originals whose uploads get one name: neither is used, Label Studio is asked. Copies do no harm."""
        put(tmp_path, "a b.png", RED)
        put(tmp_path, "deep/a_b.png", BLUE)
        host.answers["/data/upload/1/00000000-a_b.png"] = png(GREEN)
        assert colour(reader(host, data_folder=tmp_path), "/data/upload/1/00000000-a_b.png") == GREEN
        put(tmp_path, "deep/a_b.png", RED)
        assert colour(reader(host, data_folder=tmp_path), "/data/upload/1/00000000-a_b.png") == RED

    def test_new_originals(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A picture that is put there later is found when the list has aged."""
        images = reader(data_folder=tmp_path)
        refused(LockedError, images, "/data/upload/1/00000000-x.png")
        put(tmp_path, "x.png", RED)
        later = folders.time.monotonic() + 3600
        monkeypatch.setattr(folders.time, "monotonic", lambda: later)
        assert colour(images, "/data/upload/1/00000000-x.png") == RED


class TestLocalFiles:
    VALUE = "/data/local-files/?d=ds/img%200%20%C3%A9%2B.png"  # as Label Studio 1.23.2 writes "ds/img 0 é+.png"

    def test_from_disk_else_http(self, host: PictureHost, tmp_path: Path) -> None:
        """LOCAL_FILES_DOCUMENT_ROOT is read if the file is there; else Label Studio is asked, with the token."""
        host.answers[self.VALUE] = png(GREEN)
        images = reader(host, local_files_root=tmp_path)
        for value in (self.VALUE, f"/ls{self.VALUE}", host.url + self.VALUE):
            assert colour(images, value) == GREEN
        assert host.authorizations() == [f"Token {TOKEN}"] * 3
        put(tmp_path, "ds/img 0 é+.png", RED)
        assert colour(images, self.VALUE) == RED
        assert colour(reader(host), self.VALUE) == GREEN

    def test_message_names_the_file(self, host: PictureHost) -> None:
        """The one query that is the file's name is shown; nothing else of it."""
        said = refused(FetchError, reader(host), "/data/local-files/?d=ds/x.png&sig=s3cret")
        assert said.startswith("The picture '/data/local-files/?d=ds/x.png' cannot be used: Label Studio answered 404")


ESCAPES = ["../x.png", "a/../../x.png", "/etc/passwd", "..", "a\0b.png", "..\\x.png", "\\\\host\\x.png"]


class TestConfinement:
    @pytest.mark.parametrize("path", ESCAPES)
    @pytest.mark.parametrize("form", ["/data/local-files/?d={}", "/data/upload/{}", "upload/{}"])
    def test_paths_that_climb(self, host: PictureHost, tmp_path: Path, form: str, path: str) -> None:
        """Paths that lead out are refused wherever the file would be, and Label Studio is not asked for them."""
        put(tmp_path, "x.png", RED)
        (tmp_path / "media" / "upload").mkdir(parents=True)
        images = reader(host, local_files_root=tmp_path / "media", label_studio_data=tmp_path, data_folder=tmp_path)
        said = refused(ForbiddenError, images, form.format(quote(path, safe="")))
        assert "a path must stay inside its folder: relative, without '..' and NUL signs." in said
        assert str(tmp_path) not in said
        assert host.requests == []

    @pytest.mark.parametrize("kind", ["file", "folder"])
    def test_links_that_leave(self, tmp_path: Path, kind: str) -> None:
        """A link out of the folder is refused in each folder; the message names the setting, not the path."""
        outside = put(tmp_path, "outside/00000000-x.png", RED)
        for place in ("local", "studio/media/upload", "originals"):
            (tmp_path / place).mkdir(parents=True)
            target = outside if kind == "file" else outside.parent
            (tmp_path / place / ("x.png" if kind == "file" else "link")).symlink_to(target)
            (tmp_path / place / "00000000-x.png").symlink_to(outside)
        name = "x.png" if kind == "file" else "link/00000000-x.png"
        local = reader(local_files_root=tmp_path / "local")
        said = refused(ForbiddenError, local, f"/data/local-files/?d={name}")
        assert "a link leads this one out of LOCAL_FILES_DOCUMENT_ROOT." in said
        assert str(tmp_path) not in said
        studio = reader(label_studio_data=tmp_path / "studio")
        assert "out of CELESTIAL_LABEL_STUDIO_DATA" in refused(ForbiddenError, studio, f"/data/upload/{name}")
        originals = reader(data_folder=tmp_path / "originals")
        if kind == "file":
            said = refused(ForbiddenError, originals, "/data/upload/1/00000000-x.png")
            assert "out of CELESTIAL_DATA_FOLDER" in said

    def test_links_that_stay(self, tmp_path: Path) -> None:
        """A link inside the folder is as good as a file, and the folder itself may be a link."""
        put(tmp_path, "real/ds/x.png", RED)
        (tmp_path / "real" / "y.png").symlink_to(tmp_path / "real" / "ds" / "x.png")
        (tmp_path / "root").symlink_to(tmp_path / "real")
        assert colour(reader(local_files_root=tmp_path / "root"), "/data/local-files/?d=y.png") == RED

    def test_no_plain_files(self, host: PictureHost, tmp_path: Path) -> None:
        """A pipe is not waited for, a folder not read, a name too long not tripped over: Label Studio is asked."""
        os.mkfifo(tmp_path / "pipe.png")
        images = reader(host, local_files_root=tmp_path)
        for name in ("pipe.png", ".", "a" * 300, "pipe.png/x"):
            with pytest.raises(ImageError):
                images.read(f"/data/local-files/?d={name}")
        assert len(host.requests) == 3


class TestOtherValues:
    @pytest.mark.parametrize("uri", ["s3://bucket/a b.png", "gs://b/k.png", "azure-blob://c/k.png"])
    def test_cloud(self, host: PictureHost, uri: str) -> None:
        """Label Studio opens cloud storage for the task; the signed address it gives is asked without the token."""
        packed = quote(base64.urlsafe_b64encode(uri.encode()).decode())
        with picture_host() as bucket:
            host.answers[f"/tasks/7/resolve/?fileuri={packed}"] = redirect(f"{bucket.url}/k?X-Signature=s3cret", 303)
            bucket.answers["/k?X-Signature=s3cret"] = png(BLUE)
            assert colour(reader(host, allowed_hosts=("127.0.0.1",)), uri, 7) == BLUE
            assert (host.authorizations(), bucket.authorizations()) == ([f"Token {TOKEN}"], [None])
            said = refused(ForbiddenError, reader(host), uri, 7)
            assert "CELESTIAL_ALLOWED_HOSTS" in said
            assert "s3cret" not in said

    def test_cloud_needs_a_task(self, host: PictureHost) -> None:
        """Without a task id nobody can open cloud storage."""
        said = refused(ImageError, reader(host), "s3://b/k.png?sig=s3cret")
        assert said == (
            "The picture 's3://b/k.png' cannot be used: Label Studio opens cloud storage for one of its tasks,"
            " and this one has no id. Import it first."
        )

    @pytest.mark.parametrize("prefix", ["", "/ls", "URL"])
    def test_resolve_paths(self, host: PictureHost, prefix: str) -> None:
        """The resolve paths that Label Studio's own API shows instead of cloud addresses work as well."""
        host.answers["/tasks/7/resolve/?fileuri=czM6Ly9i"] = png(BLUE)
        value = f"{prefix.replace('URL', host.url)}/tasks/7/resolve/?fileuri=czM6Ly9i"
        assert colour(reader(host), value) == BLUE

    def test_web_addresses(self, host: PictureHost) -> None:
        """An address elsewhere is fetched as it is, without the token."""
        host.answers["/a.png?x=1"] = png(BLUE)
        images = reader("http://127.0.0.1:9", allowed_hosts=("127.0.0.1",))
        assert colour(images, f" {host.url}/a.png?x=1 ") == BLUE
        assert host.authorizations() == [None]

    @pytest.mark.parametrize(
        "uri",
        [
            "data:image/png;base64," + base64.b64encode(png(BLUE)).decode(),
            "DATA:image/png;charset=x;BASE64," + base64.urlsafe_b64encode(png(BLUE)).decode().rstrip("="),
            "data:image/png;base64," + quote(base64.encodebytes(png(BLUE)).decode()),
            "data:image/png," + quote(png(BLUE)),
        ],
        ids=["base64", "url-base64", "escaped-base64", "escaped"],
    )
    def test_data_uris(self, uri: str) -> None:
        """A picture inside the task is read without any network."""
        assert colour(reader(), uri) == BLUE

    @pytest.mark.parametrize(
        ("uri", "rule"),
        [
            ("data:image/png;base64", "must have a comma before its data"),
            ("data:image/png;base64,ab$c", "must hold whole base64"),
            ("data:image/png;base64,abcde", "must hold whole base64"),
            ("data:,hello", "look like plain text"),
        ],
    )
    def test_broken_data_uris(self, uri: str, rule: str) -> None:
        """A data: URI that holds no picture says what is wrong."""
        assert rule in refused(DecodeError, reader(), uri)

    @pytest.mark.parametrize(
        "value",
        [
            None, "", "  ", 7, True, 1.5, [], ["/data/upload/24/x.png"], {"url": "x"}, b"x", "x.png", "/etc/passwd",
            "file:///etc/passwd", "ftp://user:s3cret@host/x.png", "C:\\x.png", "//host/data/upload/1/x.png",
            "javascript:1", "/data/upload/", "/data/local-files/", "/data/local-files/?d=",
            "/api/current-user/token", "s3:", "http://", "http:///x", "http://[::1", "https:x.png",
        ],
        ids=repr,
    )  # fmt: skip
    def test_all_else_is_refused(self, host: PictureHost, tmp_path: Path, value: object) -> None:
        """Whatever names no picture is one of our errors, and nobody is asked."""
        with pytest.raises(ImageError) as raised:
            reader(host, data_folder=tmp_path, label_studio_data=tmp_path, local_files_root=tmp_path).read(value)
        assert "s3cret" not in str(raised.value)
        assert host.requests == []

    @pytest.mark.parametrize("value", ["\ud800", "/data/upload/1/\ud800.png", "http://127.0.0.1/\ud800"])
    def test_half_letters(self, host: PictureHost, value: str) -> None:
        """JSON can carry half a letter; it names nothing, and the message can still be written to a log."""
        refused(ImageError, reader(host), value).encode()

    @pytest.mark.parametrize("value", [None, "x.png", ["/data/upload/24/x.png"]])
    def test_the_rule_is_told(self, value: object) -> None:
        """The message lists what would have been right."""
        said = refused(ImageError, reader(), value)
        for way in ("/data/upload/", "/data/local-files/?d=", "http or https", "s3://", "data:"):
            assert way in said


class TestFiles:
    def test_bytes_first(self, host: PictureHost, tmp_path: Path) -> None:
        """The bytes of a picture are had without decoding it, from here and from afar alike."""
        put(tmp_path, f"media/upload/{NAME}", RED)
        host.answers["/data/upload/far.png"] = b"no picture"
        images = reader(host, label_studio_data=tmp_path)
        near = images.near_file(f"/data/upload/{NAME}")
        assert near == images.file(f"/data/upload/{NAME}") == png(RED)
        assert images.decoded(f"/data/upload/{NAME}", near).getpixel((0, 0)) == RED
        assert images.near_file("/data/upload/far.png") is None
        assert images.file("/data/upload/far.png") == b"no picture"

    def test_what_is_wrong_is_told_with_its_name(self, host: PictureHost) -> None:
        """Whether there is no file or no picture in it."""
        images = reader(host)
        with pytest.raises(FetchError, match=r"The picture '/data/upload/gone.png' cannot be used"):
            images.file("/data/upload/gone.png")
        with pytest.raises(DecodeError, match=r"The picture '/data/upload/a.png' cannot be used"):
            images.decoded("/data/upload/a.png", b"no picture")


class TestLimits:
    @pytest.mark.parametrize("place", ["studio", "originals", "local", "data", "escaped"])
    def test_bytes(self, tmp_path: Path, place: str) -> None:
        """CELESTIAL_IMAGE_MAX_MB holds for files and for data: URIs too."""
        raw = png(RED) + b"\0" * 2000
        for name in ("media/upload/24/00000000-x.png", "x.png"):
            put(tmp_path, name, RED).write_bytes(raw)
        value = {
            "local": "/data/local-files/?d=x.png",
            "data": "data:image/png;base64," + base64.b64encode(raw).decode(),
            "escaped": "data:image/png," + quote(raw),
        }.get(place, "/data/upload/24/00000000-x.png")
        folder = {"studio": "label_studio_data", "originals": "data_folder", "local": "local_files_root"}
        values: dict[str, Any] = {folder[place]: tmp_path} if place in folder else {}
        assert colour(reader(image_max_mb=0.01, **values), value) == RED
        said = refused(TooLargeError, reader(image_max_mb=0.0005, **values), value)
        assert "a picture file may have 0.0005 MB, and this one has " in said
        assert "Raise CELESTIAL_IMAGE_MAX_MB" in said

    def test_pixels(self) -> None:
        """CELESTIAL_IMAGE_MAX_MEGAPIXELS is a million pixels each."""
        uri = "data:image/png;base64," + base64.b64encode(png(RED, (2000, 1000))).decode()
        assert reader(image_max_megapixels=2.0).read(uri).size == (2000, 1000)
        assert "may have 1.9 million pixels" in refused(TooLargeError, reader(image_max_megapixels=1.9), uri)

    def test_side_by_side(self, host: PictureHost, tmp_path: Path) -> None:
        """Threads that share the reader each get their own picture, from wherever it is."""
        values = []
        for number in range(60):
            name = f"1/00000000-{number}.png"
            if number % 3 == 0:
                host.answers[f"/data/upload/{name}"] = png((number, 0, 0))
            else:
                put(tmp_path, f"media/upload/{name}" if number % 3 == 1 else f"{number}.png", (number, 0, 0))
            values.append(f"/data/upload/{name}")
        images = reader(host, label_studio_data=tmp_path, data_folder=tmp_path)
        with ThreadPoolExecutor(8) as threads:
            found = list(threads.map(lambda value: colour(images, value), values))
        images.close()
        assert found == [(number, 0, 0) for number in range(60)]


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        ("http://u:p@h/a.jpg?X-Amz-Signature=1#f", "'http://h/a.jpg'"),
        ("http://h/a.jpg#token=1", "'http://h/a.jpg'"),
        ("http://u:p/w@h/a.jpg", "'http://h/a.jpg'"),
        ("http://u:p?w#@h/a.jpg?q=1", "'http://...'"),
        ("https://h/b/2024-01-01T12:00:00.jpg?GoogleAccessId=a@b.iam&Signature=s3cret", "'https://...'"),
        ("https://h:8443/p.jpg?mail=a@b.com&X-Amz-Signature=s3cret", "'https://...'"),
        ("https://h?u=a@b&sig=s3cret", "'https://...'"),
        ("https://h/p.jpg#x:@s3cret", "'https://...'"),
        ("http://h/@me/a.jpg", "'http://h/@me/a.jpg'"),
        ("data:image/png;base64 AAAA", "data:,..."),
        ("data:\nAAAA", "data:,..."),
        ("data:image/png;base64,AAAA", "data:image/png;base64,..."),
        ("/a\nb", "'/a\\nb'"),
        ("/" + "a" * 200, "'/" + "a" * 49 + "..." + "a" * 50 + "'"),
        (None, "(a value of type NoneType)"),
        (["s3cret"], "(a value of type list)"),
    ],
)
def test_shown(value: object, wanted: str) -> None:
    """A value in a message is short, on one line and without secrets."""
    assert shown(value) == wanted
