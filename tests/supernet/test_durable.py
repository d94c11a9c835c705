"""Files that are old or new and never torn, and locks that die with their holder."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supernet import durable
from supernet.errors import InputError

ROOT = Path(__file__).parents[2]

WRITER = """
import itertools, pathlib, sys
from supernet import durable
print("open", flush=True)
for number in itertools.count():
    durable.write_json(pathlib.Path(sys.argv[1]), {"number": number, "again": [number] * 5000})
"""

HOLDER = """
import pathlib, sys, time
from supernet import durable
with durable.locked(pathlib.Path(sys.argv[1]), "the run"):
    print("held", flush=True)
    time.sleep(60)
"""


def python(code: str, path: Path) -> subprocess.Popen[str]:
    """A process that runs `code`, as soon as it has said something."""
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    process.stdout.readline()
    return process


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a file system of 64 KiB."""
    folder = tmp_path / "full"
    folder.mkdir()
    if os.geteuid() != 0 or subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(folder)], capture_output=True, check=False
    ).returncode:  # fmt: skip
        pytest.skip("needs the right to mount a small file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


# --- writing ---


@pytest.mark.parametrize("data", [b"", b"new", b"\x00\xff\r\n" * 1000])
def test_a_file_is_made_or_replaced_whole(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "file"
    for before in (None, b"old and longer than what comes after"):
        if before:
            path.write_bytes(before)
        durable.write_bytes(path, data)
        assert path.read_bytes() == data
        assert list(tmp_path.iterdir()) == [path]


texts = st.text(st.characters(codec="utf-8"))
plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts
trees = st.recursive(plain, lambda inner: st.lists(inner) | st.dictionaries(texts, inner), max_leaves=8)


@pytest.mark.slow
@given(trees)
def test_json_comes_back_with_every_digit(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "value.json"
    durable.write_json(path, value)
    assert json.loads(path.read_bytes()) == value


@pytest.mark.parametrize("value", [float("nan"), [float("inf")], {"a": object()}, {"a": b"x"}])
def test_what_is_not_json_is_refused_and_the_file_stays(tmp_path: Path, value: object) -> None:
    path = tmp_path / "value.json"
    durable.write_json(path, 1)
    with pytest.raises((ValueError, TypeError)):
        durable.write_json(path, value)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_text() == "1\n"


@pytest.mark.parametrize("point", ["os.fsync", "os.fdopen", "pathlib.Path.replace", "pathlib.Path.chmod"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_at_any_point_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str, error: BaseException
) -> None:
    path = tmp_path / "file"
    durable.write_bytes(path, b"old")

    def fail(*_: object, **__: object) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(point, fail)
        with pytest.raises(type(error)):
            durable.write_bytes(path, b"new")
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == b"old"


def test_a_full_disk_leaves_the_old_file_and_room_to_go_on(full_disk: Path) -> None:
    path = full_disk / "file"
    durable.write_bytes(path, b"old")
    for _ in range(3):
        with pytest.raises(OSError, match="No space left on device"):
            durable.write_bytes(path, b"x" * 200_000)
        assert list(full_disk.iterdir()) == [path]
        assert path.read_bytes() == b"old"
    durable.write_bytes(path, b"new" * 5000)
    assert path.read_bytes() == b"new" * 5000


def test_content_is_on_the_disk_before_the_name_and_the_name_before_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def note_fsync(handle: int) -> None:
        order.append("folder" if Path(f"/proc/self/fd/{handle}").resolve() == tmp_path.resolve() else "content")
        fsync(handle)

    def note_replace(self: Path, target: Path) -> Path:
        order.append("name")
        return replace(self, target)

    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc")
    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(Path, "replace", note_replace)
    durable.write_bytes(tmp_path / "file", b"x")
    assert order == ["content", "name", "folder"]


def test_a_killed_writer_leaves_an_old_or_a_new_file(tmp_path: Path) -> None:
    path, delays, seen = tmp_path / "value.json", random.Random(0), set()
    for _ in range(8):
        process = python(WRITER, path)
        time.sleep(delays.uniform(0.005, 0.03))
        kill(process)
        if path.exists():
            value = json.loads(path.read_text())
            assert value["again"] == [value["number"]] * 5000
            seen.add(value["number"])
    assert len(seen) > 1


def test_sha256_is_that_of_the_content(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    assert durable.sha256(tmp_path / "file") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


# --- lines ---


def test_lines_come_back_in_order_and_a_missing_file_has_none(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    assert durable.read_lines(path) == []
    values = [1, {"a": "ü\n"}, None, [0.1]]
    for value in values:
        durable.append_line(path, json.dumps(value))
    assert durable.read_lines(path) == values


def test_a_torn_last_line_is_left_out_wherever_it_is_torn(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    whole = '{"step": 1}\n{"step": 2, "é": "é"}\n'.encode()
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        expected = [{"step": 1}, {"step": 2, "é": "é"}][: whole[:length].count(b"\n")]
        assert durable.read_lines(path) == expected


def test_a_line_after_a_torn_one_is_not_lost(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"step": 1}\n{"ste')
    durable.append_line(path, '{"step": 3}')
    durable.append_line(path, '{"step": 4}')
    assert durable.read_lines(path) == [{"step": 1}, {"step": 3}, {"step": 4}]


# --- locks ---


def test_a_second_process_is_refused_and_told_who_holds_the_lock(tmp_path: Path) -> None:
    process = python(HOLDER, tmp_path / "lock")
    try:
        with (
            pytest.raises(
                InputError, match=f"the run is in use by another process \\(pid {process.pid}\\): wait for it or stop it"
            ),
            durable.locked(tmp_path / "lock", "the run"),
        ):
            pass
        assert process.poll() is None
    finally:
        kill(process)


def test_a_killed_holder_frees_the_lock(tmp_path: Path) -> None:
    for _ in range(3):
        kill(python(HOLDER, tmp_path / "lock"))
        with durable.locked(tmp_path / "lock", "the run"):
            assert (tmp_path / "lock").read_text() == f"pid {os.getpid()}"


def test_the_same_process_is_refused_too(tmp_path: Path) -> None:
    with durable.locked(tmp_path / "lock", "the run"):
        for _ in range(2):
            with pytest.raises(InputError, match=f"pid {os.getpid()}"), durable.locked(tmp_path / "lock", "the run"):
                pass
    with durable.locked(tmp_path / "lock", "the run"):
        pass


def test_an_error_within_frees_the_lock_and_is_not_changed(tmp_path: Path) -> None:
    with pytest.raises(BlockingIOError, match="of the caller's own"), durable.locked(tmp_path / "lock", "the run"):
        raise BlockingIOError("of the caller's own")
    with durable.locked(tmp_path / "lock", "the run"):
        pass


def test_locks_of_different_files_do_not_mind_each_other(tmp_path: Path) -> None:
    with durable.locked(tmp_path / "a", "a"), durable.locked(tmp_path / "b", "b"):
        pass
