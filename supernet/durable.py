"""Writing files so that a killed process or a full disk leaves the old file or the new one, never a torn one."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from supernet.errors import InputError


class WriteError(InputError, OSError):
    """A file cannot be written: the disk is full, or the place does not allow it. What was there before is whole."""

    reason: str
    """The system's word for it."""


@contextlib.contextmanager
def writing(
    what: object, remedy: str = "make room there, or allow writing, then resume or repeat the command"
) -> Iterator[None]:
    """Turn an `OSError` of the block into a `WriteError` that says what cannot be written, why, and what to do."""
    try:
        yield
    except OSError as error:
        reason = error.reason if isinstance(error, WriteError) else error.strerror or str(error)
        told = WriteError(f"{what} cannot be written ({reason}): {remedy}")
        told.reason = reason
        raise told from error


def refuse_unwritable(folder: Path) -> None:
    """Raise `InputError` where `folder` does not allow writing, or cannot be made."""
    there = next((path for path in (folder, *folder.absolute().parents) if path.exists()), folder)
    if not there.is_dir():
        raise InputError(f"{folder} cannot be a folder, for {there} is a file: choose another --out")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"{folder} cannot be written, for {there} does not allow it: choose another --out, or allow it")


def write_bytes(path: Path, data: bytes) -> None:
    """Replace `path` by `data`: temporary file beside it, fsync, rename, fsync of the folder. Raises `WriteError`."""
    with writing(path):
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).chmod(0o644)
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of UTF-8 text."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """`write_bytes` of indented JSON. Floats keep every digit; NaN and infinity are refused (they are not JSON)."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def append_line(path: Path, line: str) -> None:
    """Append one line in a single write; a reader may find the last line torn and must ignore it then (`read_lines`).

    After a torn line it begins a new one, so that only the torn one is lost. Raises `WriteError`.
    """
    with writing(path), path.open("ab+") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        torn = file.read(1) not in (b"", b"\n")
        file.write((b"\n" if torn else b"") + line.encode() + b"\n")


def read_lines(path: Path) -> list[Any]:
    """The JSON values of a file of JSON lines; a torn last line (the process died while writing) is left out."""
    if not path.exists():
        return []
    values = []
    for line in path.read_bytes().split(b"\n")[:-1]:
        with contextlib.suppress(json.JSONDecodeError, UnicodeDecodeError):
            values.append(json.loads(line))
    return values


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    """SHA-256 of a file, hexadecimal, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Hold an exclusive lock on the file `path`; the kernel lets go of it when the process ends, however it ends.

    Raises `InputError` naming the holder when another process has it.
    """
    import fcntl

    with contextlib.ExitStack() as stack:
        with writing(path):
            file = stack.enter_context(path.open("a+"))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise InputError(f"{what} is in use by another process ({file.read().strip()}): wait for it or stop it") from None
        with contextlib.suppress(OSError):  # the lock holds all the same on a full disk, but for the name in it
            os.ftruncate(file.fileno(), 0)
            os.write(file.fileno(), f"pid {os.getpid()}".encode())
        yield
