"""Larger real images for slow tests and benchmarks: found through NESTLING_DATA or beside the checkout, else skipped with a reason."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

ROOT = Path(__file__).parent.parent


def folder(name: str) -> Path:
    """The folder of a set, such as "fashion-mnist"; skips the calling test where there is none."""
    given = os.environ.get("NESTLING_DATA")
    places = [Path(given)] if given else [ROOT / "shared" / "data", ROOT.parent / "shared" / "data"]
    for place in places:
        if (place / name).is_dir():
            return place / name
    pytest.skip(f"no {name} under {' or '.join(map(str, places))}: set NESTLING_DATA to the folder that holds it")


def fashion_mnist(part: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Images, shape (N, 28, 28), and labels of "train" or "t10k", from the official idx files."""
    place = folder("fashion-mnist")
    with gzip.open(place / f"{part}-images-idx3-ubyte.gz") as file:
        images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28)
    with gzip.open(place / f"{part}-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8)
    return images, labels


def fashion_npz(out: Path, *, train: int, test: int) -> Path:
    """The first `train` and `test` images as an .npz file that `--data` takes."""
    (x, y), (test_x, test_y) = fashion_mnist("train"), fashion_mnist("t10k")
    parts = np.array(["train"] * train + ["test"] * test)
    images, labels = np.concatenate([x[:train], test_x[:test]]), np.concatenate([y[:train], test_y[:test]])
    np.savez(out, images=images, labels=labels.astype(np.int64), parts=parts)
    return out
