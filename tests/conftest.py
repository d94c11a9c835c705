"""What many tests start from: a small trained run, its search and its bundle, made once; and a target that needs no clock.

Nobody writes into the shared ones; a test that changes something takes a copy (`run_copy`, `bundle_copy`).
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: its threads wait for one another where tests share the cores

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import numpy as np
import pytest
from numpy.typing import NDArray

# The same examples every time: a change is judged by what it changes. HYPOTHESIS_PROFILE=default looks for new ones.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
pytest.register_assert_rewrite("deploy.conformance")
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


SLOW_CONFORMANCE = ("arch-0", "arch-1", "arch-2", "every_batch_size[1]", "-foreach", "-fused")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Much of the conformance suite is slow here; whoever runs it over a family of their own runs all of it."""
    for item in items:
        if "for_200_children" in item.name:
            item.add_marker(pytest.mark.nightly)  # a few children are counted in every run
        if "conformance" in item.path.parts and any(part in item.name for part in SLOW_CONFORMANCE):
            item.add_marker(pytest.mark.slow)


if TYPE_CHECKING:
    import onnx

    from deploy.bundle import Bundle
    from deploy.targets import Model
    from deploy.timing import Timing
    from search.found import Found
    from search.settings import SearchConfig
    from supernet.run import Run
    from supernet.space import Space

CLASSES = ("bar", "rail", "slash")
EASY_IMAGES = 240


def easy_images(count: int = EASY_IMAGES, seed: int = 0) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Grey images of 8 pixels with an upright line, a level line or the diagonal; and their labels."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 40, (count, 8, 8)).astype(np.uint8)
    labels = np.arange(count) % len(CLASSES)
    for image, label in zip(images, labels, strict=True):
        if label == 2:
            np.fill_diagonal(image, 220)
        else:
            line = image if label else image.T
            line[rng.integers(1, 7)] = 220
    return images, labels


@dataclass
class FakeTarget:
    """A device whose latencies follow from the graph alone: by default 0.01 ms and 1 ms for 100 million macs, known to 1 %."""

    milliseconds: Callable[[onnx.ModelProto], float] | None = None
    spread: float = 0.01
    label: str = "fake"
    measured: list[int] = field(default_factory=list)
    """How many models each call to `measure` was given."""
    precision: str = "fp32"
    """Of the models that it says it times."""

    @property
    def name(self) -> str:
        return self.label

    def fingerprint(self) -> dict[str, Any]:
        return {
            "processor": "none",
            "cores": 1,
            "runtime": "fake 1",
            "threads": 1,
            "precision": "fp32",
            "batch": 1,
            "hash": self.label,
        }

    def measure(
        self, models: Sequence[Model], *, width: float = 0.03, most_seconds: float = 20.0,
        each: Callable[[int, Timing], None] | None = None,
    ) -> list[Timing]:  # fmt: skip
        import onnx

        self.measured.append(len(models))
        found = [self._timing(onnx.load_model_from_string(model.data)) for model in models]
        for position, timing in enumerate(found):
            if each:
                each(position, timing)
        return found

    def _timing(self, model: onnx.ModelProto) -> Timing:
        middle = self.milliseconds(model) if self.milliseconds else 0.01 + macs_of(model) / 1e8
        return timing_of(middle, middle * (1 - self.spread), middle * (1 + self.spread))


def timing_of(latency_ms: float, low_ms: float | None = None, high_ms: float | None = None, **changes: Any) -> Timing:
    """A stable timing by the CPU clock; its interval is the latency alone where none is given, and all times are the latency."""
    from deploy.timing import Timing

    low, high = latency_ms if low_ms is None else low_ms, latency_ms if high_ms is None else high_ms
    values: dict[str, Any] = dict.fromkeys(
        ("min_ms", "median_ms", "mean_ms", "p95_ms", "wall_min_ms", "wall_median_ms", "wall_mean_ms"), latency_ms
    )
    values |= {"samples": 15, "stable": True, "throttled": False, "why": "", "clock": "cpu", "load": 0.0, "steal": 0.0}
    return Timing(**{"latency_ms": latency_ms, "low_ms": low, "high_ms": high, **values, **changes})


def shapes_of(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every activation and weight of a graph, at batch 1."""
    import onnx

    graph = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        shapes[value.name] = tuple(part.dim_value or 1 for part in value.type.tensor_type.shape.dim)
    return shapes


def macs_of(model: onnx.ModelProto) -> int:
    """Multiply-accumulates of the convolutions and linear layers of a graph at batch 1."""
    shapes = shapes_of(model)
    total = 0
    for node in model.graph.node:
        if node.op_type == "Conv":
            total += math.prod(shapes[node.input[1]]) * math.prod(shapes[node.output[0]][2:])
        elif node.op_type == "Gemm":
            total += math.prod(shapes[node.input[1]])
    return total


def small_space_of(**changes: list[int]) -> Space:
    """A space of one arch, but for the dimensions `resolution`, `width`, `depth`, `kernel_size` and `head` that are given."""
    from supernet.space import Space

    chosen = {"resolution": [12], "width": [8], "depth": [1], "kernel_size": [3], "head": [16]} | changes
    stage = {name: chosen[name] for name in ("width", "depth", "kernel_size")}
    return Space.from_definition({
        "name": "small", "family": "mbconv", "resolution": chosen["resolution"], "stem": {"width": [8], "stride": 1},
        "stages": [{**stage, "expand_ratio": [2], "stride": 2, "squeeze_excite": True}],
        "head": {"expand_ratio": 2, "width": chosen["head"]}, "classes": 3, "in_channels": 1,
    })  # fmt: skip


@pytest.fixture
def small_space() -> Callable[..., Space]:
    """The function `small_space_of`."""
    return small_space_of


@pytest.fixture(scope="session")
def easy_npz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """240 images of 8 pixels in 3 classes that a small network tells apart, as an .npz file."""
    path = tmp_path_factory.mktemp("data") / "lines.npz"
    images, labels = easy_images()
    np.savez(path, images=images, labels=labels, classes=np.array(CLASSES))
    return path


@pytest.fixture(scope="session")
def tiny_run(easy_npz: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of the digits space on `easy_npz`, trained for 3 epochs; not searched. Read only."""
    from supernet.start import start
    from supernet.train import train

    begun = start(
        str(easy_npz), tmp_path_factory.mktemp("run") / "lines", epochs=3,
        overrides={"batch_size": 48, "calibration_images": 64},
    )  # fmt: skip
    train(begun.run)
    return begun.run


@pytest.fixture(scope="session")
def small_search() -> SearchConfig:
    """A search of a few seconds: 2 ends, 1 random child, 3 skeletons, 2 mutants, 1 neighbour, one finalist at a time."""
    from search.settings import SearchConfig

    return SearchConfig(
        name="small",
        strategy="coarse_to_fine",
        options={"coarse": 3},
        evaluations=5,
        random=1,
        polish=1,
        batch=2,
        finalists=1,
        profile_children=8,
        zones=2,
    )


@pytest.fixture(scope="session")
def tiny_searched(
    tiny_run: Run, small_search: SearchConfig, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Run, Found]:  # fmt: skip
    """A copy of `tiny_run` and the outcome of its search for half of the largest child's macs. Read only."""
    from search.loop import Asked, search

    run = copied(tiny_run, tmp_path_factory.mktemp("searched") / "lines")
    return run, search(run, Asked(("macs<=500K",), settings=small_search, targets={None: FakeTarget()}))


@pytest.fixture(scope="session")
def tiny_found(tiny_searched: tuple[Run, Found]) -> Found:
    """The outcome of `tiny_searched`."""
    return tiny_searched[1]


@pytest.fixture(scope="session")
def tiny_bundle(tiny_searched: tuple[Run, Found], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The chosen child of `tiny_searched`, exported. Read only."""
    from deploy.ship import ship

    run, found = tiny_searched
    assert found.best.latency is not None
    return ship(run, found.best.arch, tmp_path_factory.mktemp("bundle") / "lines", latencies=[found.best.latency.as_dict()])


@pytest.fixture
def fake_target() -> type[FakeTarget]:
    """The class `FakeTarget`."""
    return FakeTarget


@pytest.fixture
def make_timing() -> Callable[..., Timing]:
    """The function `timing_of`."""
    return timing_of


@pytest.fixture
def graph_shapes() -> Callable[[onnx.ModelProto], dict[str, tuple[int, ...]]]:
    """The function `shapes_of`."""
    return shapes_of


@pytest.fixture
def run_copy(tiny_run: Run, tmp_path: Path) -> Run:
    """A trained run of one's own, not searched."""
    return copied(tiny_run, tmp_path / "run")


@pytest.fixture
def searched_copy(tiny_searched: tuple[Run, Found], tmp_path: Path) -> Run:
    """A searched run of one's own."""
    return copied(tiny_searched[0], tmp_path / "searched")


@pytest.fixture
def bundle_copy(tiny_bundle: Bundle, tmp_path: Path) -> Path:
    """The folder of a bundle of one's own."""
    return Path(shutil.copytree(tiny_bundle.path, tmp_path / "bundle"))


def copied(run: Run, path: Path) -> Run:
    """A copy of a run's directory, opened."""
    from supernet.run import Run

    shutil.copytree(run.path, path)
    return Run.open(path)
