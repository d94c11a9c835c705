"""Image files in class folders."""

from __future__ import annotations

import difflib
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from supernet.data.labels import PARTS
from supernet.data.source import EXTENSIONS, Encoded, Names
from supernet.errors import InputError


class FilesSource(Encoded):
    """Image files below a folder; `paths` are relative to it, with "/"."""

    def __init__(
        self, name: str, classes: Sequence[str], labels: NDArray[np.int64], parts: Sequence[str], folder: Path,
        paths: Sequence[str], sizes: NDArray[np.int64],
    ) -> None:  # fmt: skip
        self.folder = folder
        self._paths = Names(paths)
        super().__init__(name, classes, labels, parts, sizes)

    def identity(self, i: int) -> str:
        """Give the path below the folder, with "/"."""
        return self._paths[i]

    def file(self, i: int) -> Path:
        """Give the image's file."""
        return self.folder / self._paths[i]

    def place(self, i: int) -> str:
        """Give the file's path."""
        return str(self.file(i))

    def _open(self, i: int) -> Path:
        return self.file(i)


class FolderSource(FilesSource):
    """Image files: `FOLDER/class/...` or `FOLDER/train/class/...` with `test/`, `val/` or both beside `train/`.

    Classes are the folder names, sorted. Files may lie deeper below the class folder; hidden ones are passed over.
    """

    def __init__(self, folder: Path) -> None:
        tops = _layout(folder)
        classes = _class_folders(tops[0][1])
        found, labels, parts = [], [], []
        for part, top in tops:
            files = [(classes.index(name), entry) for name in _known(top, classes) for entry in _class_files(top / name)]
            labels += [label for label, _ in files]
            found += [entry for _, entry in files]
            parts += [part] * len(files)
        paths = [Path(entry.path).relative_to(folder).as_posix() for entry in found]
        sizes = np.array([entry.stat().st_size for entry in found], np.int64)
        super().__init__(str(folder), classes, np.array(labels, np.int64), parts, folder, paths, sizes)


def subfolders(folder: Path) -> tuple[str, ...]:
    """Names of the folders in a folder, sorted, but for hidden ones."""
    return tuple(sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")))


def _layout(folder: Path) -> list[tuple[str, Path]]:
    """Find the parts and their folders, train first; one part "" when the class folders lie in `folder` itself."""
    names = subfolders(folder)
    if not names:
        raise InputError(f"{folder} has no class folders: put the images in {folder.name}/CLASS/ or {folder.name}/train/CLASS/")
    tops = [(PARTS[name.lower()], folder / name) for name in names if name.lower() in PARTS]
    if len(tops) < len(names):
        divided = [top for part, top in tops if part == "train" and subfolders(top)]
        if divided:
            others = ", ".join(name for name in names if name.lower() not in PARTS)
            raise InputError(
                f"{folder} holds {divided[0].name}/ with folders in it and also {others}: move one or the other away"
            )
        return [("", folder)]
    counts = Counter(part for part, _ in tops)
    if "train" not in counts or max(counts.values()) > 1:
        raise InputError(f"{folder} holds {', '.join(names)}: it takes one train folder, and at most one val and one test")
    return sorted(tops, key=lambda top: ("train", "val", "test").index(top[0]))


def _class_folders(top: Path) -> tuple[str, ...]:
    names = subfolders(top)
    if not names:
        raise InputError(f"{top} has no class folders: put the images in {top.name}/CLASS/")
    return names


def _known(top: Path, classes: Sequence[str]) -> tuple[str, ...]:
    """List the class folders of a part, each of which must be a class of train."""
    names = _class_folders(top)
    for name in names:
        if name not in classes:
            near = difflib.get_close_matches(name, classes, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise InputError(f"{top / name}: train has no class {name!r}{hint}; rename the folder or remove it")
    return names


def _class_files(folder: Path) -> list[os.DirEntry[str]]:
    files = _image_files(folder)
    if not files:
        raise InputError(f"{folder} holds no image ({', '.join(EXTENSIONS)}): add some, or remove the folder")
    return files


def _image_files(folder: Path) -> list[os.DirEntry[str]]:
    """List the image files below a class folder, sorted. A link to a folder is refused: it could go round for ever."""
    found: list[os.DirEntry[str]] = []
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                found += _image_files(Path(entry.path))
            elif entry.is_dir():
                raise InputError(
                    f"{entry.path} is a link to a folder, which is not followed here: link the files, or remove it"
                )
            elif Path(entry.name).suffix.lower() in EXTENSIONS:
                found.append(entry)
    return found
