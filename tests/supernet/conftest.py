"""Small spaces, random spaces and small runs for the tests of this folder."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st

from supernet.data.sources import Source, open_source
from supernet.errors import InputError
from supernet.recipe import TrainConfig, load_recipe
from supernet.run import Run
from supernet.space import Space

TINY: dict[str, Any] = {
    "format": 1,
    "name": "tiny",
    "family": "mbconv",
    "resolution": [6, 8],
    "stem": {"width": [8, 16], "stride": 1},
    "stages": [
        {"width": [8, 16], "depth": [1, 2], "kernel_size": [3, 5], "expand_ratio": [1, 2], "stride": 2, "squeeze_excite": True}
    ],
    "head": {"expand_ratio": 2, "width": [16, 24]},
    "classes": 3,
    "in_channels": 1,
}


def _ascending(values: st.SearchStrategy[int], most: int = 2) -> st.SearchStrategy[list[int]]:
    return st.lists(values, min_size=1, max_size=most, unique=True).map(sorted)


_STAGE = st.fixed_dictionaries({
    "width": _ascending(st.integers(1, 40)), "depth": _ascending(st.integers(1, 3)),
    "kernel_size": _ascending(st.sampled_from([1, 3, 5, 7])), "expand_ratio": _ascending(st.integers(1, 4)),
    "stride": st.integers(1, 4), "squeeze_excite": st.booleans(),
})  # fmt: skip
_DEFINITION = st.fixed_dictionaries({
    "format": st.just(1), "name": st.just("random"), "family": st.just("mbconv"), "resolution": _ascending(st.integers(1, 24), 3),
    "stem": st.fixed_dictionaries({"width": _ascending(st.integers(1, 40)), "stride": st.integers(1, 4)}),
    "stages": st.lists(_STAGE, min_size=1, max_size=3),
    "head": st.fixed_dictionaries({"expand_ratio": st.integers(1, 3), "width": _ascending(st.integers(1, 40))}),
    "classes": st.integers(1, 5), "in_channels": st.integers(1, 4),
})  # fmt: skip


@pytest.fixture(scope="session")
def definitions() -> st.SearchStrategy[dict[str, Any]]:
    """Valid definitions of small random spaces, with widths, strides and sizes of all kinds."""
    return _DEFINITION.map(_possible).filter(_has_a_smallest)


def _has_a_smallest(definition: dict[str, Any]) -> bool:
    """Some random widths make no space: a shortcut convolution that wider inputs do not need, ratios that round alike."""
    try:
        Space.from_definition(definition)
    except InputError as error:
        assert "no smallest network" in str(error) or "both give" in str(error)
        return False
    return True


def _possible(definition: dict[str, Any]) -> dict[str, Any]:
    """Without strides and kernels that are too large for the map at the smallest resolution."""
    size = definition["resolution"][0] = max(2, definition["resolution"][0])
    definition["resolution"] = sorted({size, *definition["resolution"]})
    for part in (definition["stem"], *definition["stages"]):
        part["stride"] = part["stride"] if part["stride"] <= size else 1
        if "kernel_size" in part:
            part["kernel_size"] = [kernel for kernel in part["kernel_size"] if kernel <= 2 * size] or [1]
        size = -(-size // part["stride"])
    return definition


@pytest.fixture
def tiny() -> dict[str, Any]:
    """The definition of a space of 128 archs."""
    return copy.deepcopy(TINY)


@pytest.fixture(scope="session")
def tiny_space() -> Space:
    return Space.from_definition(TINY)


@pytest.fixture
def images(tmp_path: Path) -> Source:
    """60 grey images of 8 x 8 pixels whose brightness tells their class, as an .npz file."""
    return open_source(str(_save_images(tmp_path / "images.npz")))


@pytest.fixture(scope="session")
def save_images() -> Callable[..., Path]:
    return _save_images


def _save_images(path: Path, *, count: int = 60, classes: int = 3, seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    pixels = rng.integers(0, 100, (count, 8, 8)) + 70 * labels[:, None, None]
    np.savez(path, images=pixels.astype(np.uint8), labels=labels)
    return path


@pytest.fixture(scope="session")
def recipe() -> TrainConfig:
    """Two epochs of four steps."""
    return load_recipe("digits", {"epochs": 2, "batch_size": 9, "calibration_images": 36, "dropout": 0.2, "drop_path": 0.2})


@pytest.fixture
def run(tmp_path: Path, tiny_space: Space, recipe: TrainConfig, images: Source) -> Run:
    """A run that is not trained yet."""
    return Run.create(tmp_path / "run", tiny_space, recipe, images)
