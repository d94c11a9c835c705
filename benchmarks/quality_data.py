"""What the benchmarks of quality share: images, spaces, and the folder of finished pieces.

Images are CIFAR-10 from grids, flowers from a tar, or scikit-learn's digits.
"""

from __future__ import annotations

import json
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from supernet.data.sources import open_source
from supernet.errors import InputError
from supernet.recipe import TrainConfig
from supernet.run import Run
from supernet.space import Space

Piece = tuple[dict[str, Any], dict[str, NDArray[Any]]]

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


@dataclass(frozen=True)
class Work:
    """A folder of finished pieces and of runs: what lies there is not done again."""

    path: Path

    @classmethod
    def at(cls, path: Path | None, name: str) -> Work:
        """The folder, made where it is not there; a fresh one for `name` where none is given."""
        path = path or Path(tempfile.mkdtemp(prefix=f"{name}-"))
        path.mkdir(parents=True, exist_ok=True)
        return cls(path)

    def only_of(self, settings: object) -> None:
        """Raise `InputError` where the folder holds pieces of other settings than these (JSON)."""
        file, said = self.path / "settings.json", json.dumps(settings, sort_keys=True)
        if file.exists() and file.read_text() != said:
            raise InputError(f"{self.path} holds pieces of other settings: give another --work")
        file.write_text(said)

    def piece(self, name: str, compute: Callable[[], Piece]) -> Piece:
        """A finished piece's figures and arrays, computed where it is not there."""
        path = self.path / f"{name}.npz"
        if not path.exists():
            figures, arrays = compute()
            with tempfile.NamedTemporaryFile(dir=self.path, suffix=".part", delete=False) as file:
                np.savez_compressed(file, figures=np.array(json.dumps(figures)), **arrays)
            Path(file.name).replace(path)
        with np.load(path) as found:
            return json.loads(str(found["figures"])), {key: found[key] for key in found.files if key != "figures"}

    def run(self, name: str, space: Space, recipe: TrainConfig, data: str) -> Run:
        """The run of a supernet, made where it is not there."""
        path = self.path / name
        if (path / "config.json").exists():
            return Run.open(path)
        return Run.create(path, space, recipe, open_source(data))


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
