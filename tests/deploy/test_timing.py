"""The statistics of a timing, under clocks that the tests turn; no test here waits for a real one."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import binom

from deploy import timing
from deploy.timing import LEAST_ROUNDS, median_interval, time_interleaved

TRACES = Path(__file__).parents[1] / "golden" / "timing_traces.json"


class FakeTime:
    """Stands in for the module `time`: CPU and wall clock go on only when a call says so."""

    def __init__(self) -> None:
        self.cpu_ns = self.wall_ns = 0

    def thread_time_ns(self) -> int:
        return self.cpu_ns

    def perf_counter_ns(self) -> int:
        return self.wall_ns

    def monotonic(self) -> float:
        return self.wall_ns / 1e9

    def work(self, cpu_ms: float, waiting_ms: float = 0.0) -> None:
        self.cpu_ns += round(cpu_ms * 1e6)
        self.wall_ns += round((cpu_ms + waiting_ms) * 1e6)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    made = FakeTime()
    monkeypatch.setattr(timing, "time", made)
    return made


def noisy(clock: FakeTime, middle_ms: float, sigma: float, seed: int) -> Callable[[], None]:
    rng = np.random.default_rng(seed)
    return lambda: clock.work(middle_ms * math.exp(sigma * rng.standard_normal()))


@pytest.mark.parametrize("count", [*range(6, 120), 333, 1000])
def test_the_interval_holds_the_median_with_95_percent_and_no_narrower_one_does(count: int) -> None:
    low, high = (
        int(rank) for rank in median_interval(np.random.default_rng(count).permutation(float(count) + np.arange(count)))
    )
    low, high = low - count, high - count  # positions among the ordered samples

    def held(narrower: int) -> float:  # P(more than `low` and at most `high` of `count` samples lie below the median)
        return float(binom.cdf(high - narrower, count, 0.5) - binom.cdf(low + narrower, count, 0.5))

    assert held(0) >= 0.95 > held(1)


@pytest.mark.parametrize("count", [15, 40])
@pytest.mark.parametrize("shape", ["normal", "lognormal", "spikes", "two speeds"])
def test_the_interval_holds_the_median_in_95_percent_of_simulations(count: int, shape: str) -> None:
    rng, trials = np.random.default_rng([count, len(shape)]), 2000
    normal = rng.standard_normal((trials, count))
    samples, median = {
        "normal": (10 + normal, 10.0),
        "lognormal": (np.exp(normal), 1.0),
        "spikes": (1 + 0.01 * normal + 5 * (rng.random((trials, count)) < 0.1) * np.sign(normal), 1.0),
        "two speeds": (np.where(normal < 0, 1.0, 2.0) + 0.1 * normal, 1.5),
    }[shape]
    ends = np.array([median_interval(row) for row in samples])
    assert np.mean((ends[:, 0] <= median) & (median <= ends[:, 1])) >= 0.95


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=60))
def test_the_interval_is_made_of_samples_and_holds_their_median(samples: list[float]) -> None:
    low, high = median_interval(np.array(samples))
    assert {low, high} <= set(samples)
    assert low <= float(np.median(samples)) <= high


def test_fewer_than_6_samples_give_their_range() -> None:
    assert median_interval(np.array([3.0, 1.0, 2.0])) == (1.0, 3.0)


def test_a_call_that_always_takes_as_long_is_known_after_the_fewest_rounds(clock: FakeTime) -> None:
    calls = [lambda: clock.work(2.5), lambda: clock.work(0.125)]
    slow, quick = time_interleaved(calls)
    assert (slow.median_ms, slow.low_ms, slow.high_ms, slow.p95_ms) == (2.5, 2.5, 2.5, 2.5)
    assert quick.median_ms == 0.125
    assert slow.samples == quick.samples == LEAST_ROUNDS
    assert slow.stable and quick.stable


@pytest.mark.slow
@pytest.mark.parametrize("sigma", [0.02, 0.1])
def test_stopping_when_the_interval_is_narrow_keeps_it_nearly_as_honest(clock: FakeTime, sigma: float) -> None:
    """Looking after every round costs a little of the 95 %: at most 2 points here."""
    held = 0
    for seed in range(60):
        (found,) = time_interleaved([noisy(clock, 2.0, sigma, seed)], most_seconds=1e9)
        held += found.low_ms <= 2.0 <= found.high_ms
        assert found.stable and found.high_ms - found.low_ms <= 0.04 * found.median_ms
    assert held / 60 >= 0.93


def test_a_call_that_never_settles_ends_at_the_limit_and_is_called_unstable(clock: FakeTime) -> None:
    found = time_interleaved([noisy(clock, 5.0, 1.0, 0), lambda: clock.work(2.0)], most_seconds=1.0)
    assert [each.stable for each in found] == [False, True]
    assert found[0].high_ms - found[0].low_ms > 0.04 * found[0].median_ms
    assert clock.monotonic() < 1.5


def test_the_fewest_rounds_are_run_even_where_they_take_longer_than_the_limit(clock: FakeTime) -> None:
    (found,) = time_interleaved([lambda: clock.work(1000.0)], most_seconds=0.1)
    assert found.samples == LEAST_ROUNDS


def test_every_round_times_each_call_once_in_an_order_of_its_own(clock: FakeTime) -> None:
    order: list[int] = []

    def call(number: int) -> Callable[[], None]:
        def run() -> None:
            order.append(number)
            clock.work(3.0)

        return run

    time_interleaved([call(number) for number in range(5)])
    calls = order[5 * (timing.WARM_UPS + 1) :]
    rounds = [tuple(calls[start : start + 10]) for start in range(0, len(calls), 10)]
    assert len(rounds) == LEAST_ROUNDS
    for one in rounds:
        assert one[::2] == one[1::2]  # once to warm the caches, once by the clock
        assert sorted(one[::2]) == [0, 1, 2, 3, 4]
    assert len(set(rounds)) > LEAST_ROUNDS // 2


def test_a_short_call_is_repeated_until_a_sample_is_long_enough_to_read(clock: FakeTime) -> None:
    counts: Counter[str] = Counter()

    def call() -> None:
        counts["calls"] += 1
        clock.work(0.02)

    (found,) = time_interleaved([call])
    assert found.median_ms == pytest.approx(0.02)
    assert counts["calls"] == timing.WARM_UPS + 1 + LEAST_ROUNDS * (1 + 50)


def test_a_call_that_takes_no_time_at_all_ends(clock: FakeTime) -> None:
    (found,) = time_interleaved([lambda: None])
    assert found.median_ms == 0.0


def test_the_cpu_clock_does_not_see_others_and_the_wall_clock_does(clock: FakeTime) -> None:
    def call() -> None:
        clock.work(2.0, waiting_ms=3.0)

    (by_cpu,), (by_wall,) = time_interleaved([call], clock="cpu"), time_interleaved([call], clock="wall")
    assert (by_cpu.median_ms, by_cpu.wall_median_ms, by_cpu.clock) == (2.0, 5.0, "cpu")
    assert (by_wall.median_ms, by_wall.wall_median_ms, by_wall.clock) == (5.0, 5.0, "wall")


def test_a_drift_of_the_machine_touches_all_calls_alike(clock: FakeTime) -> None:
    def call(base_ms: float) -> Callable[[], None]:
        return lambda: clock.work(base_ms * (1 + clock.wall_ns / 5e8))  # twice as slow after half a second

    one, other = time_interleaved([call(2.0), call(3.0)], most_seconds=1.0)
    assert other.median_ms / one.median_ms == pytest.approx(1.5, rel=0.05)


def test_no_call_at_all_is_no_error() -> None:
    assert time_interleaved([]) == []


# --- recorded on a machine, idle and disturbed ---


def traces() -> dict[str, dict[str, NDArray[np.float64]]]:
    recorded = json.loads(TRACES.read_text())
    return {
        name: {clock: np.array(recorded[name][clock]) / 1e6 for clock in ("cpu_ns", "wall_ns")}
        for name in ("idle", "disturbed")
    }


def test_cpu_time_agrees_between_the_idle_and_the_disturbed_machine_where_the_wall_clock_does_not() -> None:
    recorded = traces()
    idle, disturbed = recorded["idle"], recorded["disturbed"]
    assert np.median(disturbed["cpu_ns"]) == pytest.approx(np.median(idle["cpu_ns"]), rel=0.02)
    assert disturbed["wall_ns"].mean() > 2 * idle["wall_ns"].mean()


@pytest.mark.parametrize("state", ["idle", "disturbed"])
@pytest.mark.parametrize("kind", ["cpu_ns", "wall_ns"])
def test_the_interval_of_a_few_samples_holds_the_median_of_the_whole_trace(state: str, kind: str) -> None:
    trace, rng = traces()[state][kind], np.random.default_rng(1)
    below, above = np.sort(trace)[[len(trace) // 2 - 1, len(trace) // 2]]  # all between them is a median of the trace
    ends = np.array([median_interval(rng.choice(trace, 20)) for _ in range(4000)])
    assert np.mean((ends[:, 0] <= above) & (below <= ends[:, 1])) >= 0.95


@pytest.mark.parametrize("state", ["idle", "disturbed"])
def test_a_replayed_trace_is_timed_as_it_was_recorded(clock: FakeTime, state: str) -> None:
    recorded = traces()[state]
    spans = iter(np.tile(np.stack([recorded["cpu_ns"], recorded["wall_ns"]], axis=1), (20, 1)).tolist())

    def call() -> None:
        cpu, wall = next(spans)
        clock.work(cpu, wall - cpu)

    (found,) = time_interleaved([call])
    assert found.stable
    assert found.median_ms == pytest.approx(np.median(recorded["cpu_ns"]), rel=0.02)
