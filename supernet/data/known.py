"""Data sets that torchvision reads, from the files of a local root. Nothing is fetched unless asked, nothing unpickled unchecked.

Only the CIFAR sets are pickled, and torchvision compares the MD5 sum of every batch with the published one before it reads it.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from supernet.data.arrays import ArraySource
from supernet.data.folder import FilesSource
from supernet.data.source import Source
from supernet.errors import InputError

SHORT = {"fashion-mnist": "FashionMNIST", "mnist": "MNIST", "cifar10": "CIFAR10", "cifar100": "CIFAR100"}
PREFIX = "torchvision:"
_TRAIN_TEST = {"train": {"split": "train"}, "test": {"split": "test"}}
_TRAIN_FLAG: dict[str, dict[str, Any]] = {"train": {"train": True}, "test": {"train": False}}
_THREE = {"train": {"split": "train"}, "val": {"split": "val"}, "test": {"split": "test"}}
SETS: dict[str, dict[str, dict[str, Any]]] = {
    "MNIST": _TRAIN_FLAG, "FashionMNIST": _TRAIN_FLAG, "KMNIST": _TRAIN_FLAG, "USPS": _TRAIN_FLAG,
    "CIFAR10": _TRAIN_FLAG, "CIFAR100": _TRAIN_FLAG, "SVHN": _TRAIN_TEST, "STL10": _TRAIN_TEST,
    "Food101": _TRAIN_TEST, "GTSRB": _TRAIN_TEST, "StanfordCars": _TRAIN_TEST,
    "OxfordIIITPet": {"train": {"split": "trainval"}, "test": {"split": "test"}},
    "Flowers102": _THREE, "DTD": _THREE, "FGVCAircraft": _THREE, "RenderedSST2": _THREE,
    "Country211": _THREE | {"val": {"split": "valid"}},
    "Imagenette": {"train": {"split": "train"}, "val": {"split": "val"}},
    "EuroSAT": {"": {}}, "SUN397": {"": {}},
}  # fmt: skip
"""torchvision's name -> part -> what its class is called with."""


def is_known(text: str) -> bool:
    """Whether it is the name of one of these sets, rather than of a file."""
    return text in SHORT or text.startswith(PREFIX)


def known_source(text: str, root: Path | None, download: bool) -> Source:
    """Open a set by its short name (`mnist`) or torchvision's (`torchvision:Flowers102`). Raises InputError."""
    name = SHORT.get(text, text.removeprefix(PREFIX))
    if name not in SETS:
        near = difflib.get_close_matches(name.lower(), [each.lower() for each in SETS], n=1)
        hint = "".join(f" (did you mean {each}?)" for each in SETS if each.lower() in near)
        raise InputError(
            f"there is no {text} here{hint}: give one of {', '.join(SETS)}; of another set, give the folder that its images lie in"
        )
    if root is None:
        raise InputError(f"{text} is read from a folder: pass root, the folder of torchvision's files; --download fetches them")
    sets = _opened(text, name, root.expanduser(), download)
    return (
        _from_arrays(text, sets) if hasattr(next(iter(sets.values())), "data") else _from_files(text, root.expanduser(), sets)
    )


def _opened(text: str, name: str, root: Path, download: bool) -> dict[str, Any]:
    import torchvision.datasets

    kind = getattr(torchvision.datasets, name)
    fetch = {} if name == "StanfordCars" else {"download": download}  # its files are no longer to be had
    try:
        return {part: kind(str(root), **options, **fetch) for part, options in SETS[name].items()}
    except Exception as error:  # of what is damaged, torchvision makes RuntimeError, AssertionError, KeyError and more
        what = "could not be downloaded to" if download else "was not found whole in"
        todo = "try again later" if download else "pass another root, or --download to fetch it there"
        raise InputError(f"{text} {what} {root} ({' '.join(str(error).split())}): {todo}") from error


def _from_arrays(text: str, sets: Mapping[str, Any]) -> ArraySource:
    """Sets that are one array of pixels each: (N, H, W), (N, H, W, 3), or (N, 3, H, W) where they have `labels`, not `targets`."""
    pixels = np.concatenate([np.asarray(each.data) for each in sets.values()])
    if pixels.ndim == 4 and pixels.shape[1] == 3 and pixels.shape[3] != 3:
        pixels = pixels.transpose(0, 2, 3, 1)
    labels = [_numbers(each.targets if hasattr(each, "targets") else each.labels) for each in sets.values()]
    parts = [part for part, own in zip(sets, labels, strict=True) for _ in own]
    return ArraySource(text, _classes(next(iter(sets.values())), labels), np.concatenate(labels), parts, pixels)


def _from_files(text: str, root: Path, sets: Mapping[str, Any]) -> FilesSource:
    """Sets of image files; sorted by their paths within a part, for some are listed as the file system gives them."""
    root = root.resolve()
    found: list[tuple[str, str, int]] = []
    labels = []
    for part, each in sets.items():
        files, own = _listed(each)
        labels.append(own)
        paths = [Path(file).resolve().relative_to(root).as_posix() for file in files]
        found += sorted((part, path, int(label)) for path, label in zip(paths, own, strict=True))
    missing = next((path for _, path, _ in found if not (root / path).is_file()), None)
    if missing:
        raise InputError(f"{text} was not found whole in {root} (there is no {missing}): pass another root, or --download to fetch it "
                         "there")  # fmt: skip
    sizes = np.array([(root / path).stat().st_size for _, path, _ in found], np.int64)
    numbers = np.array([label for _, _, label in found], np.int64)
    classes = _classes(next(iter(sets.values())), labels)
    return FilesSource(text, classes, numbers, [part for part, _, _ in found], root, [path for _, path, _ in found], sizes)


def _listed(each: Any) -> tuple[Sequence[Any], NDArray[np.int64]]:
    """Files and labels of a part; torchvision has several names for them."""
    for name in ("_samples", "samples"):
        if hasattr(each, name):
            samples = getattr(each, name)
            return [file for file, _ in samples], _numbers([label for _, label in samples])
    files = each._image_files if hasattr(each, "_image_files") else each._images
    return files, _numbers(each._labels)


def _numbers(labels: Any) -> NDArray[np.int64]:
    return np.asarray(labels).astype(np.int64)


def _classes(each: Any, labels: Sequence[NDArray[np.int64]]) -> list[str]:
    """Names of the classes, or their numbers where torchvision has no names."""
    found = getattr(each, "classes", None)
    if not found:
        return [str(number) for number in range(max(int(own.max()) for own in labels) + 1)]
    names = [name if isinstance(name, str) else ", ".join(name) for name in found]  # Imagenette has several words for one
    return names if len(set(names)) == len(names) else [f"{name} ({i})" for i, name in enumerate(names)]
