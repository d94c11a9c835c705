"""Files that hold many images each: which ones a name means, and reading pieces of them from many threads and processes."""

from __future__ import annotations

import itertools
import math
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from supernet.data.folder import subfolders
from supernet.data.source import EXTENSIONS
from supernet.errors import InputError

MOST_SHARDS = 100_000
MOST_OPEN = 64
"""Files that a process keeps open; systems allow 256 or more."""


def expanded(pattern: str) -> list[str]:
    """Write out braces as the shell does: "train-{000..009}.tar", "{train,val}.tar". Zeros in front are kept."""
    pieces = re.split(r"\{([^{}]*)\}", pattern)
    choices = [_meant(piece) if place % 2 else [piece] for place, piece in enumerate(pieces)]
    count = math.prod(map(len, choices))
    if count > MOST_SHARDS:
        raise InputError(f"{pattern} means {count} files, and at most {MOST_SHARDS} are read: use fewer, larger ones")
    return ["".join(made) for made in itertools.product(*choices)]


def _meant(inner: str) -> list[str]:
    """What the text between braces stands for."""
    numbers = re.fullmatch(r"([0-9]{1,9})\.\.([0-9]{1,9})", inner)
    if not numbers:
        if "," not in inner:
            raise InputError(f"braces hold a range such as {{000..009}} or a list such as {{train,val}}, not {{{inner}}}")
        return inner.split(",")
    first, last = int(numbers[1]), int(numbers[2])
    if not 0 <= last - first < MOST_SHARDS:
        raise InputError(f"{{{inner}}} counts up, to at most {MOST_SHARDS} files: write it as {{000..009}}")
    width = (
        max(len(end) for end in numbers.groups())
        if any(end.startswith("0") and len(end) > 1 for end in numbers.groups())
        else 0
    )
    return [f"{number:0{width}d}" for number in range(first, last + 1)]


def files_of(pattern: str) -> list[Path]:
    """The files of a pattern with braces. Raises InputError naming the first that is not there."""
    paths = [Path(text) for text in expanded(pattern)]
    for path in paths:
        if not path.is_file():
            raise InputError(f"there is no file {path}, which {pattern} means: correct the range, or bring the file")
    return paths


def shards_in(folder: Path, suffix: str) -> list[Path]:
    """The files of a kind in a folder that has no folders, or in its folders where these hold nothing else; sorted."""
    inner = [folder / name for name in subfolders(folder)]
    if not inner:
        return _direct(folder, suffix)
    found = [_direct(each, suffix) for each in inner]
    if not all(found) or any(subfolders(each) or _holds_images(each) for each in inner):
        return []
    return [*_direct(folder, suffix), *(path for files in found for path in files)]


def relative_names(paths: Sequence[Path]) -> list[str]:
    """Names of files below the folder that holds all of them, with "/"."""
    top = os.path.commonpath([path.parent for path in paths])
    return [path.relative_to(top).as_posix() for path in paths]


def _direct(folder: Path, suffix: str) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() == suffix and not path.name.startswith("."))


def _holds_images(folder: Path) -> bool:
    return any(path.suffix.lower() in EXTENSIONS for path in folder.iterdir())


class Pieces:
    """Reads pieces of files; as many are kept open as is sensible. It may be shared by threads, forked and pickled."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = list(paths)
        self._begin()

    def read(self, file: int, offset: int, size: int) -> bytes:
        """Read `size` bytes of a file. Raises OSError, also where the file has become shorter."""
        handle = self._handle(file)
        found = os.pread(handle.descriptor, size, offset)  # has no position, that threads or processes could move
        while 0 < len(found) < size:
            more = os.pread(handle.descriptor, size - len(found), offset + len(found))
            if not more:
                break
            found += more
        if len(found) < size:
            raise OSError(f"{self.paths[file]} ends early: it became shorter since it was opened")
        return found

    def _handle(self, file: int) -> _Handle:
        with self._lock:
            handle = self._open.pop(file, None) or _Handle(self.paths[file])
            self._open[file] = handle
            if len(self._open) > MOST_OPEN:
                self._open.popitem(last=False)  # closed when the last thread that reads it lets go
            return handle

    def _begin(self) -> None:
        self._lock = threading.Lock()
        self._open: OrderedDict[int, _Handle] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {"paths": self.paths}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.paths = state["paths"]
        self._begin()


class _Handle:
    """An open file, closed when nobody holds it."""

    def __init__(self, path: Path) -> None:
        self.descriptor = -1
        self.descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
