"""Labelled images under one face: folders, .npz files and the known small sets."""

from __future__ import annotations

import difflib
import hashlib
import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from supernet.errors import InputError
from supernet.preprocess import MODES, open_header, open_image

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
PARTS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}  # folder name -> part
GREY_MODES = ("1", "L", "I;16", "I;16B", "I;16L", "I")
TORCHVISION = {"fashion-mnist": "FashionMNIST", "mnist": "MNIST", "cifar10": "CIFAR10", "cifar100": "CIFAR100"}

T = TypeVar("T")


class Source(ABC):
    """Labelled images in a fixed order; index i means the same image as long as `fingerprint` stays the same.

    `name` opens the source again; `classes` are in the order of the label numbers; `labels` is int64 (images,);
    `channels` is 1 or 3; `parts` says per image "train", "val" or "test", or "" where the maker divided nothing.
    """

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
        """Decode image i to mode L or RGB, upright. Raises InputError naming the file when it cannot be read."""

    @abstractmethod
    def _content(self) -> Iterator[bytes]:
        """Yield what the fingerprint covers besides classes, identities and labels."""

    @abstractmethod
    def _short_sides(self, sample: NDArray[np.int64]) -> list[int]:
        """Read the short sides in pixels of these images, those that can be read."""

    @cached_property
    def image_size(self) -> int:
        """Median short side in pixels, over 200 images spread evenly."""
        sides = self._short_sides(evenly(np.arange(len(self)), 200))
        if not sides:
            raise InputError(f"{self.name}: none of 200 images can be read; are these image files?")
        return int(np.median(sides))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256, hexadecimal, of classes, identities, labels and the files' sizes (folders) or the pixels (arrays)."""
        digest = hashlib.sha256()
        for names in (self.classes, map(self.identity, range(len(self)))):
            digest.update("\0".join(names).encode("utf-8", "surrogateescape") + b"\0\0")
        digest.update(self.labels.astype("<i8").tobytes())
        for piece in self._content():
            digest.update(piece)
        return digest.hexdigest()


class ArraySource(Source):
    """Images of one size in memory: uint8 (images, H, W) or (images, H, W, C), C = 1 or 3."""

    def __init__(
        self, name: str, classes: Sequence[str], labels: NDArray[np.int64], parts: Sequence[str], pixels: NDArray[np.uint8]
    ) -> None:
        self.pixels = np.ascontiguousarray(pixels[..., 0] if pixels.shape[3:] == (1,) else pixels)
        super().__init__(name, classes, labels, 3 if pixels.shape[3:] == (3,) else 1, parts)
        empty = np.flatnonzero(np.bincount(labels, minlength=len(self.classes)) == 0)
        if empty.size:
            raise InputError(f"{name} has no image of class {self.classes[empty[0]]!r}: add some, or leave the class out")
        counts: Counter[str] = Counter()
        self._within_part = np.zeros(len(self), np.int64)
        for i, part in enumerate(self.parts):
            self._within_part[i] = counts[part]
            counts[part] += 1

    def identity(self, i: int) -> str:
        """Give the position within its part: "test/00012", or "00012" where there are no parts."""
        part = self.parts[i]
        return f"{part}/{self._within_part[i]:05d}" if part else f"{i:05d}"

    def file(self, i: int) -> None:
        """None: arrays have no file per image."""

    def image(self, i: int) -> Image.Image:
        """Decode image i to mode L or RGB."""
        return Image.fromarray(self.pixels[i])

    def _content(self) -> Iterator[bytes]:
        yield str(self.pixels.shape).encode()
        yield from map(np.ndarray.tobytes, self.pixels)

    def _short_sides(self, sample: NDArray[np.int64]) -> list[int]:
        return [min(self.pixels.shape[1:3])]


class FolderSource(Source):
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
        self.folder = folder
        self._identities = [Path(entry.path).relative_to(folder).as_posix() for entry in found]
        self._sizes = np.array([entry.stat().st_size for entry in found], np.int64)
        channels = _channels(folder, [Path(entry.path) for entry in found])
        super().__init__(str(folder), classes, np.array(labels, np.int64), channels, parts)

    def identity(self, i: int) -> str:
        """Give the path below the folder, with "/"."""
        return self._identities[i]

    def file(self, i: int) -> Path:
        """Give the image's file."""
        return self.folder / self._identities[i]

    def image(self, i: int) -> Image.Image:
        """Decode image i to mode L or RGB, upright. Raises InputError naming the file when it cannot be read."""
        try:
            return open_image(self.file(i), self.channels)
        except ValueError as error:
            raise InputError(f"{error}: repair the file or remove it, and start again") from error

    def _content(self) -> Iterator[bytes]:
        yield self._sizes.astype("<i8").tobytes()

    def _short_sides(self, sample: NDArray[np.int64]) -> list[int]:
        headers = (_header(self.file(int(i))) for i in sample)
        return [min(size) for _, size in filter(None, headers)]


def open_source(text: str, *, root: Path | None = None, download: bool = False) -> Source:
    """Open a source by its name: `digits`, `fashion-mnist`, `mnist`, `cifar10`, `cifar100`, a folder or an .npz file.

    A name wins over a folder that is called the same (write `./digits` for the folder). `root` is the folder of
    torchvision's files; nothing is downloaded unless `download`. The CIFAR sets are pickled: torchvision compares the MD5
    of every batch with the published one before it reads it. Raises InputError, also for anything wrong in the data.
    """
    if text == "digits":
        return _digits()
    if text in TORCHVISION:
        return _torchvision(text, root, download)
    try:
        path = Path(text).expanduser().resolve()
        if text and path.is_dir():
            return FolderSource(path)
        if path.is_file() and path.suffix.lower() == ".npz":
            return _npz(path)
    except (OSError, RuntimeError) as error:  # RuntimeError: a link that leads to itself, a home that is not known
        named = getattr(error, "filename", None) or text
        raise InputError(f"{named} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    raise InputError(_unknown(text, path))


def unreadable(source: Source) -> list[tuple[str, str]]:
    """Decode every image file; the identity of each one that fails and the reason, in the source's order."""

    def problem(i: int) -> tuple[str, str] | None:
        file = source.file(i)
        if file is None:
            return None
        try:
            open_image(file, source.channels)
        except ValueError as error:
            return source.identity(i), str(error).removeprefix(f"{file}: ")
        return None

    return [found for found in over_images(source, np.arange(len(source)), problem) if found is not None]


def over_images(source: Source, indices: NDArray[np.int64], function: Callable[[int], T]) -> Iterator[T]:
    """Yield `function(index)` in order, by several threads where there are files to decode."""
    plain = [int(i) for i in indices]
    if not plain or source.file(plain[0]) is None:
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


def _unknown(text: str, path: Path) -> str:
    names = ["digits", *TORCHVISION]
    possible = f"give one of {', '.join(names)}, a folder of class folders, or an .npz file"
    if path.exists() and text:
        return f"{path} is neither a folder nor an .npz file: {possible}"
    if "/" in text or text.endswith(".npz"):
        return f"there is no folder or file {path}: {possible}"
    near = difflib.get_close_matches(text.lower(), names, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    return f"there is no data called {text!r}{hint}: {possible}"


def _digits() -> ArraySource:
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.round(digits.images * 255 / 16).astype(np.uint8)
    labels = digits.target.astype(np.int64)
    return ArraySource("digits", [str(digit) for digit in range(10)], labels, [""] * len(labels), pixels)


def _torchvision(name: str, root: Path | None, download: bool) -> ArraySource:
    import torchvision.datasets

    if root is None:
        raise InputError(f"{name} is read from a folder: pass root, the folder of torchvision's files; --download fetches them")
    kind = getattr(torchvision.datasets, TORCHVISION[name])
    try:
        halves = [kind(root.expanduser(), train=train, download=download) for train in (True, False)]
    except Exception as error:  # of what is damaged, torchvision makes RuntimeError, AssertionError, KeyError and more
        what = "could not be downloaded to" if download else "was not found whole in"
        todo = "try again later" if download else "pass another root, or --download to fetch it there"
        raise InputError(f"{name} {what} {root} ({' '.join(str(error).split())}): {todo}") from error
    pixels = np.concatenate([np.asarray(half.data) for half in halves])
    labels = np.concatenate([np.asarray(half.targets) for half in halves]).astype(np.int64)
    parts = ["train"] * len(halves[0]) + ["test"] * len(halves[1])
    return ArraySource(name, halves[0].classes, labels, parts, pixels)


def _npz(path: Path) -> ArraySource:
    """`images` uint8 (N, H, W) or (N, H, W, 1 or 3), `labels` (N,), optional `classes` (names) and `parts` (per image)."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {key: np.asarray(archive[key]) for key in archive.files}
    except Exception as error:  # of what is damaged, NumPy makes ValueError, BadZipFile, zlib.error and more
        raise InputError(f"{path} is not an .npz file of plain arrays ({error}): save it again with numpy.savez") from error
    unknown = set(arrays) - {"images", "labels", "classes", "parts"}
    missing = {"images", "labels"} - set(arrays)
    if unknown or missing:
        text = f"lacks {sorted(missing)}" if missing else f"holds {sorted(unknown)}"
        raise InputError(f"{path} {text}: it takes images and labels, and optionally classes and parts")
    images = arrays["images"]
    shape_is_right = images.ndim == 3 or (images.ndim == 4 and images.shape[3] in MODES)
    if images.dtype != np.uint8 or not shape_is_right or images.size == 0:
        raise InputError(f"{path}: images are uint8 (images, height, width[, 1 or 3]), not {images.dtype} {images.shape}")
    labels, classes = _npz_labels(path, arrays, len(images))
    return ArraySource(str(path), classes, labels, _npz_parts(path, arrays, len(images)), images)


def _npz_labels(path: Path, arrays: Mapping[str, NDArray[Any]], count: int) -> tuple[NDArray[np.int64], list[str]]:
    labels = arrays["labels"]
    if labels.dtype.kind not in "iu" or labels.shape != (count,):
        raise InputError(f"{path}: labels are {count} whole numbers, one per image, not {labels.dtype} {labels.shape}")
    if labels.min() < 0 or ("classes" not in arrays and labels.max() >= count):
        raise InputError(f"{path}: labels go from {labels.min()} to {labels.max()}; classes are numbered 0, 1, 2 and so on")
    names = arrays.get("classes", np.arange(int(labels.max()) + 1).astype(str))
    if names.dtype.kind != "U" or names.ndim != 1 or len(set(names.tolist())) < len(names):
        raise InputError(f"{path}: classes is a list of different names, not {names.dtype} {names.shape}")
    if labels.max() >= len(names):
        raise InputError(f"{path}: the largest label is {labels.max()}, but there are {len(names)} classes, numbered from 0")
    return labels.astype(np.int64), names.tolist()


def _npz_parts(path: Path, arrays: Mapping[str, NDArray[Any]], count: int) -> list[str]:
    if "parts" not in arrays:
        return [""] * count
    parts = arrays["parts"]
    if parts.dtype.kind != "U" or parts.shape != (count,) or set(parts.tolist()) - {"train", "val", "test"}:
        raise InputError(f"{path}: parts is {count} words, train, val or test, one per image")
    return [str(part) for part in parts]


def _layout(folder: Path) -> list[tuple[str, Path]]:
    """Find the parts and their folders, train first; one part "" when the class folders lie in `folder` itself."""
    names = _subfolders(folder)
    if not names:
        raise InputError(f"{folder} has no class folders: put the images in {folder.name}/CLASS/ or {folder.name}/train/CLASS/")
    tops = [(PARTS[name.lower()], folder / name) for name in names if name.lower() in PARTS]
    if len(tops) < len(names):
        divided = [top for part, top in tops if part == "train" and _subfolders(top)]
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


def _subfolders(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")))


def _class_folders(top: Path) -> tuple[str, ...]:
    names = _subfolders(top)
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


def _header(file: Path) -> tuple[str, tuple[int, int]] | None:
    """Read mode and size, or None where the header is damaged: `unreadable` and training report such a file."""
    try:
        with open_header(file) as image:
            return image.mode, image.size
    except Exception:  # a damaged file makes Pillow raise nearly anything
        return None


def _channels(folder: Path, files: Sequence[Path]) -> int:
    """1 when all of up to 50 files spread evenly are grey, else 3."""
    headers = [_header(files[int(i)]) for i in evenly(np.arange(len(files)), 50)]
    modes = {header[0] for header in headers if header is not None}
    if not modes:
        raise InputError(f"no image in {folder} can be read: {files[0].relative_to(folder)} is one; are these image files?")
    return 1 if modes <= set(GREY_MODES) else 3
