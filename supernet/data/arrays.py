"""Images in memory: .npz files, the handwritten digits, and whatever else is one array of pixels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from supernet.data.labels import every_class_occurs
from supernet.data.source import Source
from supernet.errors import InputError
from supernet.preprocess import MODES


class ArraySource(Source):
    """Images of one size in memory: uint8 (images, H, W) or (images, H, W, C), C = 1 or 3."""

    encoded = False

    def __init__(
        self, name: str, classes: Sequence[str], labels: NDArray[np.int64], parts: Sequence[str], pixels: NDArray[np.uint8]
    ) -> None:
        self.pixels = np.ascontiguousarray(pixels[..., 0] if pixels.shape[3:] == (1,) else pixels)
        super().__init__(name, classes, labels, 3 if pixels.shape[3:] == (3,) else 1, parts)
        every_class_occurs(name, self.classes, labels)
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
        """Give image i in mode L or RGB."""
        return Image.fromarray(self.pixels[i])

    def header(self, i: int) -> tuple[str, tuple[int, int]]:
        """Give Pillow's mode and (width, height)."""
        return MODES[self.channels], (self.pixels.shape[2], self.pixels.shape[1])

    def _content(self) -> Iterator[bytes]:
        yield str(self.pixels.shape).encode()
        yield from map(np.ndarray.tobytes, self.pixels)


def digits() -> ArraySource:
    """scikit-learn's handwritten digits: 1797 grey images of 8 x 8 pixels."""
    from sklearn.datasets import load_digits

    found = load_digits()
    pixels = np.round(found.images * 255 / 16).astype(np.uint8)
    labels = found.target.astype(np.int64)
    return ArraySource("digits", [str(digit) for digit in range(10)], labels, [""] * len(labels), pixels)


def read_npz(path: Path) -> ArraySource:
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
    labels, classes = _labels(path, arrays, len(images))
    return ArraySource(str(path), classes, labels, _parts(path, arrays, len(images)), images)


def _labels(path: Path, arrays: Mapping[str, NDArray[Any]], count: int) -> tuple[NDArray[np.int64], list[str]]:
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


def _parts(path: Path, arrays: Mapping[str, NDArray[Any]], count: int) -> list[str]:
    if "parts" not in arrays:
        return [""] * count
    parts = arrays["parts"]
    if parts.dtype.kind != "U" or parts.shape != (count,) or set(parts.tolist()) - {"train", "val", "test"}:
        raise InputError(f"{path}: parts is {count} words, train, val or test, one per image")
    return [str(part) for part in parts]
