"""The images and the spaces of `quality_cifar.py`: CIFAR-10 from grids, flowers from a tar, or scikit-learn's digits."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from supernet.space import Space

CIFAR_SPACE = {
    "format": 1, "name": "cifar-quick", "family": "mbconv", "source": "our own, 2,048 networks that train in minutes",
    "resolution": [16, 24], "stem": {"width": [16], "stride": 2},
    "stages": [
        {"width": [16], "depth": [1], "kernel_size": [3], "expand_ratio": [2, 4], "stride": 1},
        {"width": [24, 32], "depth": [1, 2], "kernel_size": [3, 5], "expand_ratio": [2, 4], "stride": 2},
        {"width": [40, 64], "depth": [1, 2], "kernel_size": [3, 5], "expand_ratio": [2, 4], "stride": 2, "squeeze_excite": True},
    ],
    "head": {"expand_ratio": 3, "width": [64, 128]}, "classes": 10, "in_channels": 3,
}  # fmt: skip
FLOWERS_SPACE = {
    **CIFAR_SPACE, "name": "flowers-quick", "source": "our own, elastic resolution", "resolution": [96, 128, 160], "classes": 5,
    "stages": [
        {"width": [16], "depth": [1], "kernel_size": [3], "expand_ratio": [1], "stride": 2},
        {"width": [24], "depth": [1, 2], "kernel_size": [3, 5], "expand_ratio": [3], "stride": 2},
        {"width": [40, 48], "depth": [1, 2], "kernel_size": [3, 5], "expand_ratio": [3, 4], "stride": 2, "squeeze_excite": True},
        {"width": [64, 80], "depth": [1, 2], "kernel_size": [3, 5], "expand_ratio": [3, 4], "stride": 2, "squeeze_excite": True},
    ],
}  # fmt: skip
DIGITS_SPACE = {
    **CIFAR_SPACE, "name": "digits-quick", "source": "our own, grey images of 8 pixels", "resolution": [8, 12], "in_channels": 1,
    "stem": {"width": [8], "stride": 1},
}  # fmt: skip


def data_and_space(given: str | None, folder: Path, train_images: int | None) -> tuple[str, Space, dict[str, Any]]:
    """The name by which the images are opened, the space, and what the recipe changes for them."""
    folder.mkdir(parents=True, exist_ok=True)
    if given is None:
        print("no --data: scikit-learn's digits (8 x 8 pixels) stand in; their figures say nothing of CIFAR-10")
        return "digits", Space.from_definition(DIGITS_SPACE), {"batch_size": 64, "augment": {"shift": 0.1}}
    if (Path(given) / "flowers-160.tar").exists():
        if not (folder / "flowers").exists():
            with tarfile.open(Path(given) / "flowers-160.tar") as archive:
                archive.extractall(folder / "unpacked", filter="data")
            (folder / "unpacked").rename(folder / "flowers")
        return str(folder / "flowers"), Space.from_definition(FLOWERS_SPACE), {
            "batch_size": 64, "augment": {"min_area": 0.35, "flip": 0.5}
        }  # fmt: skip
    path = folder / f"cifar10-{train_images or 'all'}.npz"
    if not path.exists():
        rng, images, labels, parts = np.random.default_rng(0), [], [], []
        for name, part, most in (("train-0", "train", train_images), ("train-1", "val", None), ("test", "test", None)):
            grid = np.asarray(Image.open(Path(given) / f"{name}.webp").convert("RGB"))
            chosen = rng.permutation(10_000)[:most]
            images.append(grid.reshape(100, 32, 100, 32, 3).swapaxes(1, 2).reshape(-1, 32, 32, 3)[chosen])
            labels.append(chosen // 1000)
            parts += [part] * len(chosen)
        names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
        np.savez(
            path, images=np.concatenate(images), labels=np.concatenate(labels), classes=np.array(names), parts=np.array(parts)
        )
    return str(path), Space.from_definition(CIFAR_SPACE), {}
