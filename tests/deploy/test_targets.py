"""This machine as a target: what is timed how, and under which name it is filed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from deploy import targets
from deploy.probe import probe
from deploy.targets import AT_ONCE, Local, Model
from deploy.timing import Timing
from supernet.space import load_space


class FakeRuntime:
    """Its sessions give back the number that the model's bytes are, and remember what they were called with."""

    name = "fake 7"

    def __init__(self) -> None:
        self.threads: list[int] = []
        self.shapes: list[tuple[int, ...]] = []

    def load(self, model: bytes, *, threads: int = 1) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
        self.threads.append(threads)

        def run(images: NDArray[np.float32]) -> NDArray[np.float32]:
            self.shapes.append(images.shape)
            assert images.dtype == np.float32
            return np.array([float(model)], np.float32)

        return run


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str]]:
    """Instead of timing, a call's latency is what it returns; (calls, clock) of every group is listed."""
    seen: list[tuple[int, str]] = []

    def fake(calls: Sequence[Callable[[], Any]], *, clock: str, precision: float, most_seconds: float) -> list[Timing]:
        seen.append((len(calls), clock))
        values = [float(call()[0]) for call in calls]
        return [Timing(value, value, value, value, value, 15, True, "cpu") for value in values]

    monkeypatch.setattr(targets, "time_interleaved", fake)
    return seen


@pytest.mark.parametrize("count", [0, 1, AT_ONCE, AT_ONCE + 1, 3 * AT_ONCE - 1])
def test_every_model_gets_its_own_timing_in_groups_of_mixed_order(groups: list[tuple[int, str]], count: int) -> None:
    runtime = FakeRuntime()
    found = Local(runtime=runtime).measure([Model(str(number).encode(), 1, 8) for number in range(count)])
    assert [timing.median_ms for timing in found] == list(range(count))
    assert sum(size for size, _ in groups) == count
    assert all(size <= AT_ONCE for size, _ in groups)


def test_a_model_is_fed_one_image_of_its_own_size(groups: list[tuple[int, str]]) -> None:
    runtime = FakeRuntime()
    Local(runtime=runtime).measure([Model(b"0", 3, 24)])
    assert runtime.shapes == [(1, 3, 24, 24)]


@pytest.mark.parametrize("threads, clock", [(1, "cpu"), (2, "wall"), (4, "wall")])
def test_cpu_time_counts_at_one_thread_and_the_wall_clock_at_more(
    groups: list[tuple[int, str]], threads: int, clock: str
) -> None:  # fmt: skip
    runtime = FakeRuntime()
    Local(threads, runtime).measure([Model(b"0", 1, 8)])
    assert (groups, runtime.threads) == ([(1, clock)], [threads])


def test_results_of_other_threads_and_runtimes_are_filed_apart() -> None:
    prints = [Local(1).fingerprint(), Local(2).fingerprint(), Local(1, FakeRuntime()).fingerprint()]
    assert len({print_["hash"] for print_ in prints}) == 3
    assert Local(1).fingerprint() == prints[0]
    assert {Local(1).name, Local(2).name} == {"local:threads=1", "local:threads=2"}
    assert set(prints[0]) == {"processor", "cores", "runtime", "threads", "clock", "precision", "batch", "hash"}


def test_a_fingerprint_goes_through_json_unchanged() -> None:
    import json

    assert json.loads(json.dumps(Local().fingerprint())) == Local().fingerprint()


def test_a_real_model_is_timed() -> None:
    space = load_space("digits")
    models = [Model(probe(space, arch), 1, space.resolution(arch)) for arch in (space.smallest, space.largest)]
    small, large = Local().measure(models, precision=0.5, most_seconds=1.0)
    for timing in (small, large):
        assert 0 < timing.low_ms <= timing.median_ms <= timing.high_ms
        assert timing.clock == "cpu"
