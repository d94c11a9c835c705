"""What is kept of every image: against its definition on random, tied and broken outputs; bytes come back whole or not at all."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from torch.nn import functional as F

from supernet.errors import InputError
from supernet.samples import pack, unpack
from supernet.task import TASKS, Classification, Regression, Task

classification, regression = Classification(), Regression((0.5,))
NAN, INF = float("nan"), float("inf")
MOST = 65504.0

LOGITS = npst.arrays(
    np.float32, st.tuples(st.integers(1, 6), st.integers(2, 7)), elements=st.sampled_from([-2, -1, 0, 0.5, 3, NAN, INF, -INF])
)


def place(logits: list[float], label: int) -> int:
    """The rank by its definition: where the label comes in a list that begins with what the outputs put first."""
    finite = [number for number in range(len(logits)) if np.isfinite(logits[number])]
    broken = [number for number in range(len(logits)) if not np.isfinite(logits[number])]
    if label in broken:
        return len(logits) - 1
    return sorted(finite, key=lambda number: (-logits[number], number)).index(label)


@given(LOGITS, st.integers(0, 10**6))
def test_the_rank_is_the_place_of_the_label(logits: np.ndarray, seed: int) -> None:
    labels = np.random.default_rng(seed).integers(logits.shape[1], size=len(logits))
    found = classification.samples(torch.from_numpy(logits), torch.from_numpy(labels))
    assert found["rank"].tolist() == [place(row, label) for row, label in zip(logits.tolist(), labels, strict=True)]
    assert ((found["rank"].int() == 0) == (found["predicted"].int() == torch.from_numpy(labels))).all()
    assert found["loss"].isfinite().all()
    assert [column.dtype for column in found.values()] == [torch.uint16, torch.uint16, torch.float16]


@pytest.mark.parametrize("ties", [False, True])
def test_of_finite_outputs_it_is_what_torch_says(ties: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(200, 9, generator=generator), torch.randint(9, (200,), generator=generator)
    logits = logits.round() if ties else logits
    found = classification.samples(logits, labels)
    assert found["predicted"].tolist() == logits.argmax(-1).tolist()
    assert (found["rank"].int() == 0).tolist() == classification.scores(logits, labels).tolist()
    torch.testing.assert_close(found["loss"].float(), F.cross_entropy(logits, labels, reduction="none"), rtol=1e-3, atol=1e-3)
    for k in (1, 3, 5):
        in_first = torch.sort(logits, dim=-1, descending=True, stable=True).indices[:, :k].eq(labels[:, None]).any(-1)
        assert (found["rank"].int() < k).tolist() == in_first.tolist()


@pytest.mark.parametrize(
    ("logits", "label", "rank", "predicted", "loss"),
    [
        ([0.0, 0.0, 0.0], 0, 0, 0, 1.0986),
        ([0.0, 0.0, 0.0], 2, 2, 0, 1.0986),
        ([NAN, NAN, NAN], 0, 2, 1, MOST),  # argmax would call it right
        ([NAN, NAN, NAN], 1, 2, 0, MOST),
        ([NAN, 1.0, 0.0], 1, 0, 1, MOST),
        ([NAN, 1.0, 0.0], 0, 2, 1, MOST),
        ([INF, 1.0, 0.0], 0, 2, 1, MOST),
        ([1e30, 0.0, 0.0], 1, 1, 0, MOST),
        ([1.0, -INF, 0.0], 0, 0, 0, 0.3133),
    ],
)
def test_by_hand(logits: list[float], label: int, rank: int, predicted: int, loss: float) -> None:
    found = classification.samples(torch.tensor([logits]), torch.tensor([label]))
    assert (found["rank"].item(), found["predicted"].item()) == (rank, predicted)
    assert found["loss"].item() == pytest.approx(loss, abs=2e-3)


def test_of_mixed_labels_the_likeliest_counts() -> None:
    logits, mixed = torch.tensor([[1.0, 2.0, 0.0]]), torch.tensor([[0.3, 0.6, 0.1]])
    found = classification.samples(logits, mixed)
    assert found["rank"].item() == 0
    assert found["loss"].item() == pytest.approx(F.cross_entropy(logits, mixed).item(), abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_outputs_of_other_precisions(dtype: torch.dtype) -> None:
    logits, labels = torch.tensor([[1.0, 2.0, 0.0]] * 2, dtype=dtype), torch.tensor([1, 0])
    found = classification.samples(logits, labels)
    assert found["rank"].tolist() == [0, 1]
    assert found["loss"].tolist() == pytest.approx([0.4076, 1.4076], abs=2e-3)


def test_more_classes_than_a_column_tells_apart() -> None:
    classification.samples(torch.zeros(1, 2**16), torch.tensor([2**16 - 1]))
    with pytest.raises(
        InputError, match="samples tell 65536 classes apart, but the network has 65537: choose a space of fewer"
    ):
        classification.samples(torch.zeros(1, 2**16 + 1), torch.tensor([0]))


def test_of_regression_samples_are_the_scores() -> None:
    generator = torch.Generator().manual_seed(0)
    outputs, targets = torch.randn(5, 1, 4, 4, generator=generator), torch.randn(5, 1, 4, 4, generator=generator)
    outputs[3] = NAN
    found = regression.samples(outputs, targets)
    assert list(found) == ["psnr_db"]
    assert torch.equal(found["psnr_db"], regression.scores(outputs, targets))
    assert found["psnr_db"].isfinite().all()


# --- bytes ---

each = pytest.mark.parametrize("task", [classification, regression], ids=["classification", "regression"])


def made(task: Task, images: int) -> dict[str, Any]:
    rng = np.random.default_rng(images)
    return {name: rng.integers(0, 1000, images).astype(np.dtype(dtype)) for name, dtype in task.columns.items()}


@each
@settings(deadline=None)
@given(images=st.integers(0, 300))
def test_samples_come_back(task: Task, images: int) -> None:
    samples = made(task, images)
    back = unpack(pack(samples, task.columns), images, task.columns)
    assert list(back) == list(task.columns)
    for name, column in samples.items():
        assert back[name].tolist() == column.tolist()
        assert back[name].dtype == column.dtype
        assert back[name].shape == (images,)


@each
def test_columns_are_what_samples_gives(task: Task) -> None:
    outputs = torch.zeros(2, 3) if task is classification else torch.zeros(2, 1, 3, 3)
    found = task.samples(outputs, torch.zeros(2, dtype=torch.int64) if task is classification else outputs)
    assert {name: column.numpy().dtype for name, column in found.items()} == {
        name: np.dtype(d) for name, d in task.columns.items()
    }


@each
def test_samples_of_two_parts_are_those_of_the_whole(task: Task) -> None:
    samples = made(task, 50)
    parts = [{name: column[where] for name, column in samples.items()} for where in (slice(0, 20), slice(20, 50))]
    back = [unpack(pack(part, task.columns), count, task.columns) for part, count in zip(parts, (20, 30), strict=True)]
    for name, column in samples.items():
        assert np.concatenate([part[name] for part in back]).tolist() == column.tolist()


@each
@pytest.mark.parametrize("images", [0, 6, 8, 70, -1])
def test_another_number_of_images(task: Task, images: int) -> None:
    with pytest.raises(ValueError, match=f"samples of {images} images"):
        unpack(pack(made(task, 7), task.columns), images, task.columns)


@each
def test_damage_is_seen(task: Task) -> None:
    packed = pack(made(task, 40), task.columns)
    bad = [b"", packed[:-1], packed + b"x", packed[:20], b"x" * 50]
    bad += [bytes([*packed[:where], packed[where] ^ 1, *packed[where + 1 :]]) for where in range(0, len(packed), 3)]
    for data in bad:
        with pytest.raises(ValueError, match="samples of 40 images"):
            unpack(data, 40, task.columns)


@each
def test_a_bomb_does_not_go_off(task: Task) -> None:
    """Some kilobytes that say 50 megabytes: no more than what 3 images have is made of it."""
    import tracemalloc

    bomb = zlib.compress(bytes(50_000_000), 9)
    tracemalloc.start()
    with pytest.raises(ValueError, match="samples of 3 images"):
        unpack(bomb, 3, task.columns)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 5_000_000


def test_a_good_child_takes_few_bytes() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(10, (5000,), generator=generator)
    logits = torch.randn(5000, 10, generator=generator) + 5 * F.one_hot(labels, 10)
    samples = {name: column.numpy() for name, column in classification.samples(logits, labels).items()}
    assert len(pack(samples, classification.columns)) < 3 * 5000


def test_every_task_has_columns() -> None:
    for task in TASKS.values():
        assert task.columns
        assert all(np.dtype(dtype).byteorder in "<|=" for dtype in task.columns.values())
