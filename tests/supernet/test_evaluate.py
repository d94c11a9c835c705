"""Calibration and evaluation divided among processes: here threads, for many divisions; real processes in `test_distributed.py`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from supernet.calibrate import calibrate
from supernet.data.dataset import SplitImages
from supernet.data.sources import Source, open_source
from supernet.distributed import ALONE, World
from supernet.evaluate import Evaluator
from supernet.model import Supernet
from supernet.space import Space
from supernet.task import Classification, Regression, Task

Result = TypeVar("Result")

AUTOENCODER: dict[str, Any] = {
    "format": 1, "name": "tiny-autoencoder", "family": "autoencoder", "in_channels": 1, "resolution": [6, 8],
    "stem": {"width": [3, 6]}, "bottleneck": {"width": [4, 7]},
    "stages": [{"width": [5, 8], "depth": [1, 2], "decoder_depth": [1, 3], "kernel_size": [1, 3]}],
}  # fmt: skip
MLP: dict[str, Any] = {
    "format": 1, "name": "tiny-mlp", "family": "mlp", "in_channels": 1, "classes": 3, "resolution": 8, "depth": [1, 3],
    "width": [6, 9, 11], "activation": ["relu", "swish"],
}  # fmt: skip


@dataclass
class Table:
    """Where threads meet."""

    size: int
    given: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.size, timeout=20)


@dataclass(frozen=True)
class Threads(World):
    """One of several threads, which stand for processes."""

    table: Table = field(default_factory=lambda: Table(1))

    def sum_(self, tensor: Tensor) -> Tensor:
        self.table.given[self.rank] = tensor.clone()
        self.table.barrier.wait()
        shapes = {given.shape for given in self.table.given.values()}
        assert len(shapes) == 1, f"all bring the same shape, not {shapes}"
        tensor.copy_(torch.stack([self.table.given[rank] for rank in range(self.size)]).sum(0, dtype=tensor.dtype))
        self.table.barrier.wait()
        return tensor


def in_each(size: int, job: Callable[[World], Result]) -> list[Result]:
    """Do it in `size` processes; the first one is really alone where there is one."""
    if size == 1:
        return [job(World())]
    table = Table(size)
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(job, [Threads(rank, size, "cpu", table) for rank in range(size)]))


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    """Evaluation sets the number of torch's threads, which several at once mix up."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def source(tmp_path: Path, save_images: Callable[..., Path]) -> Source:
    return open_source(str(save_images(tmp_path / "images.npz")))


def split(source: Source, images: int, name: str = "confirm") -> SplitImages:
    order = np.random.default_rng(3).permutation(60)[:images]
    return SplitImages(name, source, order, 1.0, (0.5,), (0.3,))


def trained(space: Space) -> Supernet:
    supernet, generator = Supernet(space), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in supernet.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return supernet


def evaluator(
    space: Space, source: Source, world: World = ALONE, calibration_images: int = 59, task: Task | None = None
) -> Evaluator:
    train = split(source, 60, "train")
    return Evaluator(trained(space), task or Classification(), train, calibration_images, batch_size=7, world=world)


def statistics(network: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in network.named_buffers() if "running" in name}


# --- calibration ---


def batches(count: int) -> list[Tensor]:
    return list(2 + 3 * torch.randn(count, 5, 1, 8, 8, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("parts", [(3, 2), (1, 4), (5, 0), (0, 5), (2, 1, 2), (0, 0, 3, 0, 2)], ids=str)
def test_statistics_are_the_mean_over_the_batches_of_all_processes(parts: tuple[int, ...], tiny_space: Space) -> None:
    given, starts = batches(5), np.cumsum([0, *parts])
    wanted = calibrate(trained(tiny_space).extract(tiny_space.largest), given)

    def job(world: World) -> nn.Module:
        own = given[starts[world.rank] : starts[world.rank + 1]]
        return calibrate(trained(tiny_space).extract(tiny_space.largest), own, world)

    for network in in_each(len(parts), job):
        found = network.state_dict()
        assert found.keys() == wanted.state_dict().keys()
        for name, value in wanted.state_dict().items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
        assert not any(module.training for module in network.modules())


def test_all_processes_have_the_same_bits(tiny_space: Space) -> None:
    def job(world: World) -> nn.Module:
        return calibrate(trained(tiny_space).extract(tiny_space.largest), batches(5)[world.rank :: 3], world)

    one, *others = (network.state_dict() for network in in_each(3, job))
    assert all(torch.equal(value, other[name]) for other in others for name, value in one.items())


def test_no_batches_anywhere_are_an_error_everywhere(tiny_space: Space) -> None:
    def job(world: World) -> str:
        with pytest.raises(ValueError, match="calibration needs at least one batch") as caught:
            calibrate(trained(tiny_space).extract(tiny_space.smallest), [], world)
        return str(caught.value)

    assert len(in_each(2, job)) == 2


# --- evaluation ---


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("images", [60, 31, 7, 2, 1, 0])
def test_every_process_gets_the_scores_that_one_alone_gets(size: int, images: int, tiny_space: Space, source: Source) -> None:
    arch = tiny_space.largest
    wanted = evaluator(tiny_space, source).evaluate(arch, split(source, images))

    def job(world: World) -> Any:
        return evaluator(tiny_space, source, world).evaluate(arch, split(source, images))

    assert wanted.shape == (images,)
    for found in in_each(size, job):
        assert found.dtype == bool
        assert found.tolist() == wanted.tolist()


def test_scores_of_the_comparison_above_are_right_and_wrong(tiny_space: Space, source: Source) -> None:
    found = evaluator(tiny_space, source).evaluate(tiny_space.largest, split(source, 60))
    assert 0 < found.mean() < 1


@pytest.mark.parametrize("images", [31, 2])
def test_scores_that_are_floats(images: int, source: Source) -> None:
    space, task = Space.from_definition(AUTOENCODER), Regression((0.3,))
    wanted = evaluator(space, source, task=task).evaluate(space.smallest, split(source, images))

    def job(world: World) -> Any:
        return evaluator(space, source, world, task=task).evaluate(space.smallest, split(source, images))

    for found in in_each(3, job):
        assert found.dtype == wanted.dtype == np.float32
        np.testing.assert_allclose(found, wanted, rtol=1e-4)
    assert len(set(wanted)) == images


def test_networks_without_maps(source: Source) -> None:
    space = Space.from_definition(MLP)
    wanted = evaluator(space, source).evaluate(space.largest, split(source, 31))
    for found in in_each(2, lambda world: evaluator(space, source, world).evaluate(space.largest, split(source, 31))):
        assert found.tolist() == wanted.tolist()


@pytest.mark.parametrize(("calibration_images", "size"), [(59, 2), (59, 3), (59, 9), (8, 2), (5, 2)])
def test_calibration_is_divided_into_whole_batches(
    calibration_images: int, size: int, tiny_space: Space, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 8 images, 7 of them; or a single smaller one."""
    monkeypatch.setattr("supernet.evaluate.CALIBRATION_BATCH", 8)
    arch = tiny_space.largest
    wanted = statistics(evaluator(tiny_space, source, calibration_images=calibration_images).calibrated(arch))

    def job(world: World) -> nn.Module:
        return evaluator(tiny_space, source, world, calibration_images).calibrated(arch)

    for network in in_each(size, job):
        found = statistics(network)
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


def test_each_process_reads_its_own_images_once(tiny_space: Space, source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("supernet.evaluate.CALIBRATION_BATCH", 8)
    read: list[int] = []
    real, lock = SplitImages.pixels, threading.Lock()

    def spy(self: SplitImages, resolution: int, images: int | None = None) -> Any:
        before = {key: len(value) for key, value in self._cache.items()}
        found = real(self, resolution, images)
        if before != {key: len(value) for key, value in self._cache.items()}:
            with lock:
                read.append(len(found))
        return found

    monkeypatch.setattr(SplitImages, "pixels", spy)

    def job(world: World) -> None:
        made, confirm = evaluator(tiny_space, source, world), split(source, 31)
        for _ in range(3):
            made.evaluate(tiny_space.largest, confirm)

    in_each(2, job)
    assert sorted(read) == [15, 16, 24, 32]  # of 31 images, and of 7 batches of 8


def test_two_splits_of_a_name_are_not_mixed_up(tiny_space: Space, source: Source) -> None:
    one, other = split(source, 20), split(source, 20)
    other.indices = np.random.default_rng(4).permutation(60)[:20]
    alone = evaluator(tiny_space, source)
    wanted = [alone.evaluate(tiny_space.largest, each).tolist() for each in (one, other)]
    assert wanted[0] != wanted[1]

    def job(world: World) -> list[list[bool]]:
        made = evaluator(tiny_space, source, world)
        return [made.evaluate(tiny_space.largest, each).tolist() for each in (one, other)]

    assert in_each(2, job) == [wanted, wanted]


# --- samples ---


@pytest.mark.parametrize("images", [60, 7, 1, 0])
def test_every_process_gets_the_samples_that_one_alone_gets(images: int, tiny_space: Space, source: Source) -> None:
    confirm = split(source, images)

    def job(world: World) -> Any:
        made = evaluator(tiny_space, source, world)
        return made.samples(made.calibrated(tiny_space.largest), 8, confirm)

    wanted = job(ALONE)
    assert {name: column.dtype for name, column in wanted.items()} == {
        "rank": np.uint16, "predicted": np.uint16, "loss": np.float16
    }  # fmt: skip
    assert (wanted["rank"] == 0).tolist() == evaluator(tiny_space, source).evaluate(tiny_space.largest, confirm).tolist()
    for found in in_each(3, job):
        for name, column in wanted.items():
            np.testing.assert_allclose(found[name], column, rtol=1e-2)


def test_samples_of_images(source: Source) -> None:
    space, task = Space.from_definition(AUTOENCODER), Regression((0.3,))
    made = evaluator(space, source, task=task)
    network, confirm = made.calibrated(space.smallest), split(source, 31)
    assert made.samples(network, 6, confirm)["psnr_db"].tolist() == made.scores(network, 6, confirm).tolist()


def test_images_are_prepared_in_the_precision_of_the_weights(tiny_space: Space, source: Source) -> None:
    made = evaluator(tiny_space, source)
    single = made.samples(made.calibrated(tiny_space.largest), 8, split(source, 20))
    made.supernet.double()
    double = made.samples(made.calibrated(tiny_space.largest), 8, split(source, 20))
    np.testing.assert_allclose(single["loss"], double["loss"], rtol=1e-2)
