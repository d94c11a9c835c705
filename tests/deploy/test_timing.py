"""The statistics of a timing, under clocks that the tests turn; but for one slow test, none waits for a real one."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import binom

from deploy import timing
from deploy.timing import (
    CLOCKS,
    LEAST_ROUNDS,
    LOOSE_ROUNDS,
    WIDTH,
    Timing,
    quiet_end,
    summary,
    time_interleaved,
)

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


@pytest.mark.parametrize("count", [1, 2, 5, 6, 15, 29, 100, 999, 5000])
@pytest.mark.parametrize("share", [0.1, 0.5])
@pytest.mark.parametrize("level", [0.025, 0.4, 0.95])
def test_ranks_are_quantiles_of_the_binomial_distribution(count: int, share: float, level: float) -> None:
    assert timing._rank(count, share, level) == int(binom.ppf(level, count, share))


@pytest.mark.parametrize("count", [8, 15, 29, 100, 333, 1000])
def test_the_quiet_end_lies_above_a_tenth_of_all_calls_with_95_percent_and_no_lower_one_does(count: int) -> None:
    rank = int(quiet_end(np.random.default_rng(count).permutation(float(count) + np.arange(count)))) - count
    assert binom.cdf(rank, count, 0.1) >= 0.95 > binom.cdf(rank - 1, count, 0.1)


@pytest.mark.parametrize("count", [8, 15, 29, 60])
def test_the_quiet_end_lies_above_the_tenth_in_95_percent_of_simulations(count: int) -> None:
    samples = np.random.default_rng(count).exponential(size=(2000, count))
    assert np.mean([quiet_end(row) >= -math.log(0.9) for row in samples]) >= 0.95


# --- rounds ---


def test_a_call_that_always_takes_as_long_is_known_after_the_fewest_rounds(clock: FakeTime) -> None:
    calls = [lambda: clock.work(2.5), lambda: clock.work(0.125)]
    slow, quick = time_interleaved(calls)
    assert (slow.latency_ms, slow.median_ms, slow.low_ms, slow.high_ms, slow.p95_ms) == (2.5, 2.5, 2.5, 2.5, 2.5)
    assert quick.latency_ms == 0.125
    assert slow.samples == quick.samples == LEAST_ROUNDS
    assert slow.stable and quick.stable and slow.why == ""


def slowed(clock: FakeTime, least_ms: float, scale: float, seed: int) -> Callable[[], None]:
    rng = np.random.default_rng(seed)
    return lambda: clock.work(least_ms * (1 + scale * rng.exponential()))


@pytest.mark.parametrize("scale", [0.02, 0.1])
def test_a_call_that_others_only_slow_down_is_known_to_3_percent(clock: FakeTime, scale: float) -> None:
    for seed in range(20):
        (found,) = time_interleaved([slowed(clock, 2.0, scale, seed)], most_seconds=10.0)
        assert found.stable and 2.0 <= found.latency_ms <= found.high_ms <= 2.0 * 1.01 * (1 + WIDTH)


def test_a_call_that_never_settles_ends_at_the_limit_and_is_called_unstable(clock: FakeTime) -> None:
    found = time_interleaved([noisy(clock, 5.0, 1.0, 0), lambda: clock.work(2.0)], most_seconds=1.0)
    assert [each.stable for each in found] == [False, True]
    assert found[0].high_ms - found[0].low_ms > WIDTH * found[0].latency_ms
    assert clock.monotonic() < 1.5


def test_what_is_settled_leaves_the_rounds(clock: FakeTime) -> None:
    restless, calm = time_interleaved([noisy(clock, 2.0, 0.2, 1), noisy(clock, 2.0, 0.001, 2)], most_seconds=1.0)
    assert calm.samples == LEAST_ROUNDS
    assert restless.samples > 5 * calm.samples


def test_the_fewest_rounds_are_run_even_where_they_take_longer_than_the_limit(clock: FakeTime) -> None:
    (found,) = time_interleaved([lambda: clock.work(1000.0)], most_seconds=0.1)
    assert found.samples == LOOSE_ROUNDS


def test_no_call_has_more_samples_than_the_limit(clock: FakeTime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "MOST_ROUNDS", 40)
    (found,) = time_interleaved([noisy(clock, 2.0, 1.0, 1)], most_seconds=1e9)
    assert (found.samples, found.stable) == (40, False)


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


@pytest.mark.parametrize("by, runs", [("cpu", 1), ("wall", 3)])
def test_a_short_call_is_repeated_until_a_sample_is_long_enough_to_read(clock: FakeTime, by: str, runs: int) -> None:
    counts: Counter[str] = Counter()

    def call() -> None:
        counts["calls"] += 1
        clock.work(0.02)

    (found,) = time_interleaved([call], clock=by)
    assert found.latency_ms == pytest.approx(0.02)
    assert counts["calls"] == timing.WARM_UPS + 1 + found.samples * (1 + 50 * runs)


def test_a_call_that_takes_no_time_at_all_ends(clock: FakeTime) -> None:
    (found,) = time_interleaved([lambda: None])
    assert found.latency_ms == 0.0


def test_no_call_at_all_is_no_error() -> None:
    assert time_interleaved([]) == []


# --- what is told of them ---


def test_the_cpu_clock_does_not_see_others_and_the_wall_clock_does(clock: FakeTime) -> None:
    def call() -> None:
        clock.work(2.0, waiting_ms=3.0)

    (by_cpu,), (by_wall,) = time_interleaved([call], clock="cpu"), time_interleaved([call], clock="wall")
    assert (by_cpu.latency_ms, by_cpu.wall_median_ms, by_cpu.clock) == (2.0, 5.0, "cpu")
    assert (by_wall.latency_ms, by_wall.wall_median_ms, by_wall.clock) == (5.0, 5.0, "wall")


@pytest.mark.parametrize("by", CLOCKS)
def test_the_latency_is_the_least_time_if_a_tenth_of_the_samples_are_as_quick(clock: FakeTime, by: str) -> None:
    rng = np.random.default_rng(3)

    def call() -> None:  # two of five calls are disturbed, by up to twice their time
        disturbed = 4.0 * rng.random() * (rng.random() < 0.4)
        ours, others = (disturbed, 0.0) if by == "cpu" else (0.0, disturbed)
        clock.work(4.0 * (1 + 0.004 * rng.random()) + ours, waiting_ms=others)

    (found,) = time_interleaved([call], clock=by)
    assert found.stable
    assert found.latency_ms == found.low_ms == found.min_ms == pytest.approx(4.0, rel=0.005)
    assert found.high_ms <= (1 + WIDTH) * found.latency_ms


def test_one_lucky_sample_is_not_called_stable() -> None:
    taken = np.full((200, 2), 10.0) + np.random.default_rng(0).random((200, 1))
    taken[17] = 5.0
    found = summary(taken, "wall")
    assert (found.latency_ms, found.stable) == (5.0, False)
    assert found.high_ms > 10


def test_a_drift_of_the_machine_touches_all_calls_alike(clock: FakeTime) -> None:
    def call(base_ms: float) -> Callable[[], None]:
        return lambda: clock.work(base_ms * (1 + clock.wall_ns / 5e8))  # twice as slow after half a second

    one, other = time_interleaved([call(2.0), call(3.0)], most_seconds=1.0)
    assert other.median_ms / one.median_ms == pytest.approx(1.5, rel=0.05)


@pytest.mark.parametrize(
    "wall, load, steal, why",
    [
        (1.0, 0.0, 0.0, "the times vary"),
        (1.0, 1e4, 0.0, "the host is busy (load 10000.0"),
        (1.0, 0.0, 0.2, "20 % of the time stolen"),
        (40.0, 0.0, 0.0, "the machine is throttled"),
    ],
)
def test_a_result_that_is_not_stable_says_why(wall: float, load: float, steal: float, why: str) -> None:
    cpu = 10 + 4 * np.random.default_rng(0).random(100)
    times = np.stack([cpu, np.where(np.arange(100) % 10 == 0, wall * cpu, cpu)], axis=1)
    found = summary(times, "cpu", load=load, steal=steal)
    assert not found.stable and found.throttled == (wall > 1)
    assert why in found.why and "3 % is asked for" in found.why and "\n" not in found.why
    assert summary(times, "cpu", width=1.0, load=load, steal=steal).why == ""


def test_the_width_that_is_asked_for_decides(clock: FakeTime) -> None:
    (found,) = time_interleaved([noisy(clock, 2.0, 0.05, 0)], width=0.2)
    assert found.stable and found.samples == LOOSE_ROUNDS < LEAST_ROUNDS
    assert found.high_ms - found.low_ms > WIDTH * found.latency_ms


# --- recorded on a machine, idle and disturbed ---


def traces() -> dict[str, NDArray[np.float64]]:
    """CPU and wall times in ms, shape (samples, 2)."""
    recorded = json.loads(TRACES.read_text())
    return {
        name: np.stack([np.array(recorded[name][kind]) / 1e6 for kind in ("cpu_ns", "wall_ns")], axis=1)
        for name in ("idle", "disturbed")
    }


def test_cpu_time_agrees_between_the_idle_and_the_disturbed_machine_where_the_wall_clock_does_not() -> None:
    idle, disturbed = traces()["idle"], traces()["disturbed"]
    assert summary(disturbed, "cpu").latency_ms == pytest.approx(summary(idle, "cpu").latency_ms, rel=0.02)
    assert disturbed[:, 1].mean() > 2 * idle[:, 1].mean()
    assert summary(disturbed, "cpu").throttled and not summary(idle, "cpu").throttled


def test_the_least_wall_time_agrees_between_the_idle_and_the_disturbed_machine() -> None:
    idle, disturbed = (summary(traces()[name], "wall") for name in ("idle", "disturbed"))
    assert disturbed.latency_ms == pytest.approx(idle.latency_ms, rel=WIDTH)
    assert idle.stable


@pytest.mark.parametrize("state", ["idle", "disturbed"])
@pytest.mark.parametrize("kind", CLOCKS)
def test_of_a_few_samples_the_interval_ends_above_a_tenth_of_the_whole_trace(state: str, kind: str) -> None:
    trace, rng = traces()[state][:, CLOCKS.index(kind)], np.random.default_rng(1)
    ends = np.array([quiet_end(rng.choice(trace, 20)) for _ in range(4000)])
    assert np.mean(ends >= np.quantile(trace, 0.1, method="lower")) >= 0.95


@pytest.mark.parametrize("state", ["idle", "disturbed"])
def test_a_replayed_trace_is_timed_as_it_was_recorded(clock: FakeTime, state: str) -> None:
    recorded = traces()[state]
    spans = iter(np.tile(recorded, (20, 1)).tolist())

    def call() -> None:
        cpu, wall = next(spans)
        clock.work(cpu, wall - cpu)

    (found,) = time_interleaved([call])
    assert found.stable
    assert found.latency_ms == pytest.approx(np.quantile(recorded[:, 0], 0.05), rel=0.02)


BURNER = "while True: pass"


@pytest.mark.slow
def test_on_a_real_clock_with_burners_a_result_is_stable_or_says_why_not() -> None:
    """No time is asserted: a burner on the core's other thread takes tens of percent of CPU time, and no clock here sees it."""
    rng = np.random.default_rng(0)
    left, right = rng.random((160, 160)), rng.random((160, 160))

    def work() -> None:
        for _ in range(20):
            np.sqrt(left, out=right)

    burners = [
        subprocess.Popen([sys.executable, "-c", f"print(flush=True)\n{BURNER}"], stdout=subprocess.PIPE)
        for _ in range(2 * (os.cpu_count() or 1))
    ]
    try:
        for burner in burners:
            assert burner.stdout is not None and burner.stdout.readline()  # it burns
        (burnt,) = time_interleaved([work], most_seconds=3.0)
    finally:
        for burner in burners:
            burner.kill()
            burner.communicate()
    assert burnt.stable == (burnt.high_ms - burnt.low_ms <= WIDTH * burnt.latency_ms) == (not burnt.why)
    assert 0 < burnt.low_ms <= burnt.latency_ms <= burnt.high_ms
    assert burnt.mean_ms <= 1.01 * burnt.wall_mean_ms  # one thread cannot compute for longer than it takes


# --- reading ---


def test_a_timing_goes_through_json_unchanged(make_timing: Callable[..., Timing]) -> None:
    given_timing = make_timing(2.0, 1.9, 2.1, clock="wall", why="the times vary", stable=False)
    assert Timing.from_dict(json.loads(json.dumps(given_timing.as_dict()))) == given_timing


ODD: list[tuple[str, Any]] = [
    *((name, value) for name in ("latency_ms", "mean_ms", "load") for value in (math.nan, math.inf, -1.0, None, "2", True, 10**400)),
    ("latency_ms", 0), ("latency_ms", 3.0), ("low_ms", 0.0), ("low_ms", 2.5), ("high_ms", 1.0), ("min_ms", 2.5), ("wall_min_ms", 9.0),
    ("samples", 15.0), ("samples", 0), ("samples", -3), ("samples", True), ("stable", 1), ("stable", None), ("throttled", "no"),
    ("clock", "sun"), ("clock", None), ("clock", ["cpu"]), ("why", None), ("why", 7), ("why", "two\nlines"), ("why", "\x1b[2J"),
    ("why", "a" * 1001), ("other", 1),
]  # fmt: skip


@pytest.mark.parametrize("name, value", ODD)
def test_a_timing_that_no_clock_shows_is_refused(make_timing: Callable[..., Timing], name: str, value: Any) -> None:
    with pytest.raises(ValueError, match="a timing"):
        Timing.from_dict({**make_timing(2.0, 1.9, 2.1).as_dict(), name: value})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
NAMES = list(Timing.__dataclass_fields__)


@settings(max_examples=40)
@given(JSON)
def test_what_is_no_timing_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="a timing has"):
        Timing.from_dict(value)


@given(st.sampled_from(NAMES), JSON, st.booleans())
def test_a_timing_with_one_value_changed_is_refused_or_true(name: str, value: Any, drop: bool) -> None:
    whole: dict[str, Any] = dict.fromkeys(NAMES, 2.0)
    whole |= {"samples": 15, "stable": True, "throttled": False, "why": "", "clock": "cpu", "load": 0.0, "steal": 0.0}
    changed = {each: value if each == name else whole[each] for each in NAMES if not (drop and each == name)}
    try:
        found = Timing.from_dict(changed)
    except ValueError as error:
        assert "\n" not in str(error) and len(str(error)) < 500
    else:
        assert not drop and 0 < found.low_ms <= found.latency_ms <= found.high_ms < math.inf
        assert all(
            0 <= getattr(found, each) < math.inf for each in NAMES if each not in ("stable", "throttled", "why", "clock")
        )
