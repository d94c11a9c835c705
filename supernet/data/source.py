"""Labelled images under one face: in memory (`arrays`), or encoded in files, tar shards and Parquet (`Encoded`)."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, ClassVar, NamedTuple, TypeVar, overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from supernet.errors import InputError
from supernet.preprocess import open_header, open_image

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
GREY_MODES = ("1", "L", "I;16", "I;16B", "I;16L", "I")
MOST_BYTES = 2**28
"""Of one encoded image, that is taken out of a tar or a Parquet file: 64 megapixels of 4 bytes."""

T = TypeVar("T")


class Unreadable(InputError):
    """An image that cannot be decoded: where it lies, and why."""

    def __init__(self, place: str, reason: str) -> None:
        self.place, self.reason = (" ".join(text.split()) for text in (place, reason))
        super().__init__(f"{self.short}: repair the file or remove it, and start again")

    @property
    def short(self) -> str:
        """Both, without what to do."""
        return f"{self.place}: {self.reason}"


class Source(ABC):
    """Labelled images in a fixed order; index i means the same image as long as `fingerprint` stays the same.

    `name` opens the source again; `classes` are in the order of the label numbers; `labels` is int64 (images,);
    `channels` is 1 or 3; `parts` says per image "train", "val" or "test", or "" where the maker divided nothing.
    """

    encoded: ClassVar[bool]
    """Whether images are decoded when they are asked for, so that they may turn out to be damaged, and take time."""

    def __init__(
        self, name: str, classes: Sequence[str], labels: NDArray[np.int64], channels: int, parts: Sequence[str]
    ) -> None:
        self.name = name
        self.classes = tuple(classes)
        self.labels = labels
        self.channels = channels
        self.parts = tuple(parts)
        if len(self.classes) < 2:
            raise InputError(f"{name} has {len(self.classes)} class: give images of at least 2 classes")
        if any(self.parts) and "train" not in self.parts:
            raise InputError(f"{name} is divided into {', '.join(sorted(set(self.parts)))}: it needs a train part as well")

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def identity(self, i: int) -> str:
        """Name the image within the source, such as "train/cat/1.jpg" or "test/00012"."""

    @abstractmethod
    def file(self, i: int) -> Path | None:
        """Give the image's own file, or None where it has none."""

    @abstractmethod
    def image(self, i: int) -> Image.Image:
        """Decode image i to mode L or RGB, upright. Raises `Unreadable` naming the place when it cannot be read."""

    @abstractmethod
    def header(self, i: int) -> tuple[str, tuple[int, int]] | None:
        """Read Pillow's mode and (width, height) as stored, without decoding; None where the header is damaged."""

    @abstractmethod
    def _content(self) -> Iterator[bytes]:
        """Yield what the fingerprint covers besides classes, identities and labels."""

    @cached_property
    def image_size(self) -> int:
        """Median short side in pixels, over 200 images spread evenly."""
        headers = (self.header(int(i)) for i in evenly(np.arange(len(self)), 200))
        sides = [min(size) for _, size in filter(None, headers)]
        if not sides:
            raise InputError(f"{self.name}: none of 200 images can be read; are these image files?")
        return int(np.median(sides))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256, hexadecimal, of classes, identities, labels and the files' sizes (encoded images) or the pixels (arrays)."""
        digest = hashlib.sha256()
        for names in (self.classes, map(self.identity, range(len(self)))):
            digest.update("\0".join(names).encode("utf-8", "surrogateescape") + b"\0\0")
        digest.update(self.labels.astype("<i8").tobytes())
        for piece in self._content():
            digest.update(piece)
        return digest.hexdigest()


class Encoded(Source):
    """Images that are files, or lie in larger files as image files do; `sizes` are their bytes, int64 (images,).

    A subclass must be able to give headers before it calls this constructor, which reads some to tell grey from colour.
    """

    encoded = True

    def __init__(
        self, name: str, classes: Sequence[str], labels: NDArray[np.int64], parts: Sequence[str], sizes: NDArray[np.int64]
    ) -> None:
        self.sizes = sizes
        super().__init__(name, classes, labels, self._channels(name, len(labels)), parts)

    @abstractmethod
    def place(self, i: int) -> str:
        """Say where a person finds the image."""

    @abstractmethod
    def _open(self, i: int) -> Path | BinaryIO:
        """Give what Pillow opens. Raises ValueError or OSError where there is nothing to open."""

    def image(self, i: int) -> Image.Image:
        """Decode image i to mode L or RGB, upright. Raises `Unreadable` naming the place when it cannot be read."""
        try:
            return open_image(self._open(i), self.channels)
        except (ValueError, OSError) as error:
            text = str(error)
            for name in (f"{self.place(i)}: ", "the file: "):
                text = text.removeprefix(name)
            raise Unreadable(self.place(i), text) from error

    def header(self, i: int) -> tuple[str, tuple[int, int]] | None:
        """Read Pillow's mode and (width, height) as stored, without decoding; None where the header is damaged."""
        try:
            with open_header(self._open(i)) as image:
                return image.mode, image.size
        except Exception:  # a damaged file makes Pillow raise nearly anything
            return None

    def _content(self) -> Iterator[bytes]:
        yield self.sizes.astype("<i8").tobytes()

    def _channels(self, name: str, count: int) -> int:
        """1 when all of up to 50 images spread evenly are grey, else 3."""
        headers = [self.header(int(i)) for i in evenly(np.arange(count), 50)]
        modes = {header[0] for header in headers if header is not None}
        if not modes:
            raise InputError(f"no image in {name} can be read: {self.identity(0)} is one; are these image files?")
        return 1 if modes <= set(GREY_MODES) else 3


class Names(Sequence[str]):
    """Many texts in two arrays: a list of them would be copied, page by page, into every worker that counts references."""

    def __init__(self, names: Iterable[str]) -> None:
        encoded = [name.encode("utf-8", "surrogateescape") for name in names]
        self._text = b"".join(encoded)
        self._ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, i: int) -> str: ...
    @overload
    def __getitem__(self, i: slice) -> Sequence[str]: ...
    def __getitem__(self, i: int | slice) -> str | Sequence[str]:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        if not 0 <= i < len(self):
            raise IndexError(i)
        return self._text[self._ends[i] : self._ends[i + 1]].decode("utf-8", "surrogateescape")


class Flaw(NamedTuple):
    """An image that cannot be used, and why."""

    image: int
    identity: str
    reason: str


def flaws(source: Source, indices: NDArray[np.int64] | None = None) -> list[Flaw]:
    """Decode these images (all by default) and list those that cannot be read, in the order given."""

    def problem(i: int) -> Flaw | None:
        try:
            source.image(i)
        except Unreadable as error:
            return Flaw(i, source.identity(i), error.reason)
        return None

    if not source.encoded:
        return []
    tried = over_images(source, np.arange(len(source)) if indices is None else indices, problem)
    return [found for found in tried if found is not None]


def over_images(source: Source, indices: NDArray[np.int64], function: Callable[[int], T]) -> Iterator[T]:
    """Yield `function(index)` in order, by several threads where there is something to decode."""
    plain = [int(i) for i in indices]
    if not plain or not source.encoded:
        yield from map(function, plain)
        return
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(plain), 1000):  # a million waiting tasks would take a gigabyte
            yield from pool.map(function, plain[start : start + 1000])


def evenly(indices: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """Pick at most `most` of the indices, spread evenly over them."""
    if len(indices) <= most:
        return indices
    return indices[np.linspace(0, len(indices) - 1, most).astype(np.int64)]
