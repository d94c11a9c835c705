"""Images in tar files: indexed by one pass over the headers, then read by offset. Nothing is ever extracted.

A member's name is text and never becomes a path. Compressed tars are refused: they cannot be read at a place.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np

from supernet.data.labels import PARTS, classes_of, parts_of_files
from supernet.data.shards import Pieces, relative_names
from supernet.data.source import EXTENSIONS, MOST_BYTES, Encoded, Names
from supernet.errors import InputError

BLOCK = 512
MOST_LABEL_BYTES = 2**20


@dataclass(slots=True)
class _Piece:
    """A member's data: where it lies in its tar."""

    name: str
    offset: int
    size: int


@dataclass(slots=True)
class _Shard:
    """What one tar holds: its images, and labels (.cls, .json) by the key that they share with an image."""

    images: list[_Piece] = field(default_factory=list)
    labels: dict[str, int | str] = field(default_factory=dict)


class TarSource(Encoded):
    """Images of tar files: as webdataset writes them (KEY.jpg and KEY.cls, or KEY.json with "label"), or in CLASS/ or train/CLASS/.

    Which part an image is of is told by the tar's name or folder, or by folders inside. One folder around everything is passed over.
    """

    def __init__(self, name: str, paths: Sequence[Path]) -> None:
        shards = [_index(path) for path in paths]
        images = [image for shard in shards for image in shard.images]
        if not images:
            raise InputError(f"{name} holds no image ({', '.join(EXTENSIONS)}): is it the right file?")
        self._tars = relative_names(paths)
        self._pieces = Pieces(paths)
        self._names = Names(image.name for image in images)
        self._shard = np.repeat(np.arange(len(shards), dtype=np.int32), [len(shard.images) for shard in shards])
        self._offsets = np.array([image.offset for image in images], np.int64)
        beside = any(shard.labels for shard in shards)
        raw, inner = _labelled(paths, shards) if beside else _in_folders(name, images)
        classes, labels = classes_of(raw, name, numbers=beside)
        parts = self._parts(inner)
        super().__init__(name, classes, labels, parts, np.array([image.size for image in images], np.int64))

    def identity(self, i: int) -> str:
        """Give the member's name, after that of its tar where there are several."""
        return self._names[i] if len(self._tars) == 1 else f"{self._tars[self._shard[i]]}/{self._names[i]}"

    def file(self, i: int) -> None:
        """None: it lies in a tar."""

    def place(self, i: int) -> str:
        """Give the tar's path and the member's name."""
        return f"{self._pieces.paths[self._shard[i]]}: {self._names[i]}"

    def _open(self, i: int) -> BinaryIO:
        size = int(self.sizes[i])
        if not 0 < size <= MOST_BYTES:
            raise ValueError("is empty" if size == 0 else f"has {size} bytes, more than {MOST_BYTES}")
        return io.BytesIO(self._pieces.read(int(self._shard[i]), int(self._offsets[i]), size))

    def _parts(self, inner: Sequence[str]) -> list[str]:
        """The part of every image, by the folders inside, or the tar's name."""
        outer = parts_of_files(self._tars)
        parts = [outer[shard] for shard in self._shard]
        if not any(inner):
            return parts
        for i, (one, other) in enumerate(zip(parts, inner, strict=True)):
            if one and one != other:
                raise InputError(
                    f"{self.place(i)} is of {one} by the tar's name and of {other} by the folder in it: rename one"
                )
        return list(inner)


def _index(path: Path) -> _Shard:
    """List the images of a tar. Raises InputError for one that is damaged, cut short, compressed, or has unsafe names."""
    shard, seen = _Shard(), set()
    pieces = Pieces([path])
    for piece in _members(path):
        if piece.name in seen:
            raise InputError(f"{path} holds {piece.name} twice: write it again with different names")
        seen.add(piece.name)
        suffix = PurePosixPath(piece.name).suffix.lower()
        if suffix in EXTENSIONS:
            shard.images.append(piece)
        elif suffix in (".cls", ".json") and 0 < piece.size <= MOST_LABEL_BYTES:
            label = _label(path, piece, pieces.read(0, piece.offset, piece.size))
            key = _key(piece.name)
            if label is not None and (suffix == ".cls" or key not in shard.labels):
                shard.labels[key] = label
    keys = {_key(image.name) for image in shard.images} if shard.labels else set()
    shard.labels = {key: label for key, label in shard.labels.items() if key in keys}
    return shard


def _members(path: Path) -> Iterator[_Piece]:
    """Yield the plain files of a tar, but for hidden ones. Whatever is no file (folders, devices, pipes) is passed over."""
    length, last = path.stat().st_size, -1
    with path.open("rb") as file:
        try:
            tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115 - the file is closed above
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # or a million members would stay in memory
                if member.offset <= last:
                    raise ValueError("its members overlap")
                last = member.offset
                if member.size < 0 or member.offset_data + (member.size if member.isreg() else 0) > length:
                    raise ValueError(f"{member.name} ends behind its end")
                piece = _safe(path, member)
                if piece is not None:
                    yield piece
            _check_end(file, tar.offset)
        except InputError:
            raise
        except (
            Exception
        ) as error:  # of what is damaged, tarfile makes ReadError, ValueError, OverflowError, RecursionError and more
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InputError(
                f"{path} is not a whole, uncompressed tar ({reason}): unpack .gz and the like, or write it again"
            ) from error


def _safe(path: Path, member: tarfile.TarInfo) -> _Piece | None:
    """Give a member that is a plain file; None for what is not read. Raises InputError for names and links that lead elsewhere."""
    name = PurePosixPath(member.name)
    if name.is_absolute() or ".." in name.parts or "\\" in member.name or "\0" in member.name:
        raise InputError(
            f"{path} holds the name {member.name[:200]!r}, which leads out of it: names are relative, without '..'"
        )
    read = name.suffix.lower() in (*EXTENSIONS, ".cls", ".json") and not any(part.startswith(".") for part in name.parts)
    if not read or member.isdir():
        return None
    if member.islnk() or member.issym():
        raise InputError(f"{path} holds {member.name} as a link, which is not followed: write it with tar --dereference "
                         "--hard-dereference")  # fmt: skip
    if member.issparse():
        raise InputError(f"{path} holds {member.name} with holes (--sparse), which is not read: write it without")
    return _Piece(name.as_posix(), member.offset_data, member.size) if member.isreg() else None


def _check_end(file: BinaryIO, end: int) -> None:
    """A whole tar ends with zeros; where it is cut or its headers are damaged, tarfile just stops."""
    file.seek(end)
    rest = file.read(BLOCK)
    if len(rest) < BLOCK or any(rest):
        raise ValueError(f"it has no end mark at byte {end}: it is cut short, or damaged there")
    while rest := file.read(2**20):
        if rest.count(0) < len(rest):
            raise ValueError("there is more behind its end mark: are these two tars in one file?")


def _key(name: str) -> str:
    """What the files of a sample have in common: the name up to the first dot behind the last "/" (as in webdataset)."""
    folder, slash, last = name.rpartition("/")
    return folder + slash + last.partition(".")[0]


def _label(path: Path, piece: _Piece, content: bytes) -> int | str | None:
    """The label in a .cls or .json member; None for JSON without one."""
    try:
        text = content.decode()
        value = json.loads(text) if piece.name.lower().endswith(".json") else text.strip()
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: {piece.name} is no label that can be read ({error}): write it again") from error
    if piece.name.lower().endswith(".json"):
        value = value.get("label") if isinstance(value, dict) else None
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | str)):
        raise InputError(f"{path}: the label in {piece.name} is a number or a name, not {str(value)[:100]}")
    return value


def _labelled(paths: Sequence[Path], shards: Sequence[_Shard]) -> tuple[list[int | str], list[str]]:
    """Labels and parts of images whose labels lie beside them."""
    raw, parts = [], []
    for path, shard in zip(paths, shards, strict=True):
        seen = set()
        for image in shard.images:
            key = _key(image.name)
            label = shard.labels.get(key)
            if label is None:
                raise InputError(f'{path}: {image.name} has no label beside it: add {key}.cls, or {key}.json with "label"')
            if key in seen:
                raise InputError(f"{path}: the sample {key} has two images, and one is read: leave the other one out")
            seen.add(key)
            raw.append(label)
            parts.append(PARTS.get(image.name.partition("/")[0].lower(), "") if "/" in image.name else "")
    return raw, parts if all(parts) and len(set(parts)) > 1 else [""] * len(raw)


def _in_folders(name: str, images: Sequence[_Piece]) -> tuple[list[int | str], list[str]]:
    """Labels and parts of images in class folders."""
    paths = [image.name.split("/") for image in images]
    while len({path[0] for path in paths}) == 1 and min(map(len, paths)) > 2:
        paths = [path[1:] for path in paths]  # one folder around everything
    tops = {path[0] for path in paths}
    named = {top for top in tops if top.lower() in PARTS}
    divided = any(len(path) > 2 for path in paths if path[0] in named and PARTS[path[0].lower()] == "train")
    if divided and named < tops:
        others = ", ".join(sorted(tops - named)[:3])
        raise InputError(f"{name} holds train/ with folders in it and also {others}: take one or the other out")
    depth = 1 if divided else 0
    for image, path in zip(images, paths, strict=True):
        if len(path) < depth + 2:
            raise InputError(
                f"{name}: {image.name} is in no class folder and has no label beside it: name it CLASS/NAME.jpg or "
                "train/CLASS/NAME.jpg, or add a .cls or .json file of the same name"
            )
    labels: list[int | str] = [path[depth] for path in paths]
    return labels, [PARTS[path[0].lower()] if divided else "" for path in paths]
