"""A bundle in a .zip opens as the folder does; an archive of anything else is refused and leaves nothing."""

from __future__ import annotations

import io
import stat
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

import nestling
from deploy import archive
from deploy.again import verify_again
from deploy.archive import pack, unpack
from deploy.bundle import Bundle
from deploy.measure import measured
from supernet.errors import InputError

SQUARE = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))


@pytest.fixture
def packed(tiny_bundle: Bundle, tmp_path: Path) -> Path:
    path = tmp_path / "b.zip"
    pack(tiny_bundle.path, path)
    return path


def test_packed_it_opens_and_predicts_the_same(tiny_bundle: Bundle, packed: Path) -> None:
    opened = Bundle.open(packed)
    assert opened.manifest == tiny_bundle.manifest
    np.testing.assert_array_equal(opened.predict(SQUARE), tiny_bundle.predict(SQUARE))
    place = opened.path
    assert place.is_dir()
    assert (opened.name, tiny_bundle.name) == ("b.zip", tiny_bundle.path.name)
    del opened
    assert not place.exists()


def test_the_same_bundle_gives_the_same_bytes_and_replaces_an_older_archive(
    tiny_bundle: Bundle, packed: Path, tmp_path: Path
) -> None:
    before = packed.read_bytes()
    packed.write_bytes(b"old")
    pack(tiny_bundle.path, packed)
    assert packed.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["b.zip"]


def made(path: Path, *members: tuple[str, bytes], mode: int = 0) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for name, content in members:
            info = zipfile.ZipInfo(name)
            info.external_attr = mode << 16
            file.writestr(info, content)
    return path


@pytest.mark.parametrize("name", [
    "../outside", "/etc/outside", "a/b", "a\\..\\outside", "..", "C:\\x", "sub/", "x" * 200, "a\nb", "\x1b[2Jx", "./outside",
])  # fmt: skip
def test_names_that_lead_elsewhere_are_refused(tmp_path: Path, name: str) -> None:
    path, into = made(tmp_path / "x.zip", ("ok", b"1"), (name, b"evil")), tmp_path / "in"
    into.mkdir()
    with pytest.raises(InputError, match=r"no plain file|no bundle") as raised:
        unpack(path, into)
    assert str(raised.value).isprintable()
    assert sorted(each.name for each in tmp_path.iterdir()) == ["in", "x.zip"]
    assert not list(into.iterdir())


def test_links_devices_and_folders_are_refused(tmp_path: Path) -> None:
    for kind in (stat.S_IFLNK, stat.S_IFCHR, stat.S_IFIFO, stat.S_IFDIR):
        path = made(tmp_path / "x.zip", ("model.onnx", b"/etc/passwd"), mode=kind | 0o777)
        with pytest.raises(InputError, match="no plain file"):
            unpack(path, tmp_path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    into = tmp_path / "in"
    into.mkdir()
    with pytest.raises(InputError, match="twice or too many"):
        unpack(made(tmp_path / "x.zip", ("a", b"1"), ("a", b"2")), into)
    with pytest.raises(InputError, match="twice or too many"):
        unpack(made(tmp_path / "x.zip", *((str(number), b"") for number in range(101))), into)
    monkeypatch.setattr(archive, "MOST_BYTES", 100)
    with pytest.raises(InputError, match="unpacks to more than"):
        unpack(made(tmp_path / "x.zip", ("a", b"1" * 101)), into)


def test_an_archive_that_lies_about_sizes_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a", bytes(1 << 20))
    data = path.read_bytes().replace(struct.pack("<I", 1 << 20), struct.pack("<I", 50))  # both headers
    path.write_bytes(data)
    monkeypatch.setattr(archive, "MOST_BYTES", 1000)
    into = tmp_path / "in"
    into.mkdir()
    with pytest.raises(InputError):
        unpack(path, into)
    assert sum(each.stat().st_size for each in into.iterdir()) <= 1000


@pytest.mark.parametrize(
    "content", [b"", b"PK", b"PK\x03\x04" + bytes(100), b"PK\x05\x06" + bytes(18), b"no archive", bytes(1000)]
)
def test_what_is_no_archive_is_said_in_a_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.zip"
    path.write_bytes(content)
    with pytest.raises(InputError) as raised:
        Bundle.open(path)
    assert "\n" not in str(raised.value)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_damage_opens_right_or_is_an_input_error(packed: Path, tiny_bundle: Bundle, data: st.DataObject) -> None:
    content = bytearray(packed.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] = data.draw(st.integers(0, 255))
    cut = data.draw(st.sampled_from([len(content), len(content) // 2, len(content) - 7]))
    damaged = packed.with_name("damaged.zip")
    damaged.write_bytes(bytes(content[:cut]))
    try:
        opened = Bundle.open(damaged)
    except InputError as error:
        assert "\n" not in str(error)
    else:
        assert opened.manifest == tiny_bundle.manifest


def test_a_full_disk_leaves_the_older_archive(tiny_bundle: Bundle, packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = packed.read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(zipfile.ZipFile, "writestr", full)
    with pytest.raises(OSError, match="No space left"):
        pack(tiny_bundle.path, packed)
    assert packed.read_bytes() == before
    assert [path.name for path in packed.parent.iterdir()] == ["b.zip"]


def test_an_encrypted_archive_is_said(packed: Path) -> None:
    data = bytearray(packed.read_bytes())
    with zipfile.ZipFile(io.BytesIO(bytes(data))) as file:
        offsets = [info.header_offset for info in file.infolist()]
    start = data.rindex(b"PK\x05\x06")
    central = struct.unpack("<I", data[start + 16 : start + 20])[0]
    data[central + 8] |= 1
    for offset in offsets[:1]:
        data[offset + 6] |= 1
    packed.write_bytes(bytes(data))
    with pytest.raises(InputError, match="encrypted"):
        Bundle.open(packed)


def test_commands_take_an_archive(packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify_again(packed, None, None)["graph"] == "ok"
    SQUARE.save(tmp_path / "square.png")
    done = CliRunner().invoke(nestling.app, ["predict", str(packed), str(tmp_path / "square.png"), "--json"])
    assert done.exit_code == 0 and '"classes"' in done.output
    with pytest.raises(InputError, match="needs a place of its own"):
        measured(Bundle.open(packed), "local", 8, None, None)
    opened = Bundle.open(packed)  # what it unpacked to goes with it
    files = [(path.name, path.read_bytes()) for path in opened.path.iterdir() if path.name != "card.md"]
    damaged = made(tmp_path / "damaged.zip", *files)
    with pytest.raises(InputError, match=r"card\.md"):
        verify_again(damaged, None, None)
