"""The statistics of a timing. Knows no model: it times callables, interleaved, until their medians are known well enough.

On a shared machine the wall clock is disturbed by others by up to 2x, while the CPU time of the measuring thread is not; where one
thread does the work, its CPU time is the latency on an idle core. Where several threads work, only the wall clock can be read.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom

Clock = Literal["cpu", "wall"]

WARM_UPS = 3
LEAST_ROUNDS = 15
LEAST_SAMPLE_MS = 1.0
"""Shorter calls are repeated within a sample, so that reading the clock does not count."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Median time of a call in ms with a distribution-free 95 % interval; `stable` where the interval is as narrow as asked."""

    median_ms: float
    low_ms: float
    high_ms: float
    p95_ms: float
    wall_median_ms: float
    samples: int
    stable: bool
    clock: Clock


def time_interleaved(
    calls: Sequence[Callable[[], object]], *, clock: Clock = "cpu", precision: float = 0.02, most_seconds: float = 20.0
) -> list[Timing]:
    """Time every call, in rounds through all of them, so that a drift of the machine's speed touches all alike.

    Goes on until each 95 % interval is within +-`precision` of its median, for at most `most_seconds` (then `stable` is False where
    it is not). Stopping as soon as the intervals are narrow costs them about a point of their coverage.
    """
    if not calls:
        return []
    read = time.thread_time_ns if clock == "cpu" else time.perf_counter_ns
    repeats = [_repeats(call) for call in calls]
    samples: list[list[tuple[float, float]]] = [[] for _ in calls]
    start = time.monotonic()
    rng = np.random.default_rng(0)
    while True:
        for position in rng.permutation(len(calls)):
            samples[position].append(_sample(calls[position], repeats[position], read))
        timings = [_summary(np.array(taken), clock, precision) for taken in samples] if len(samples[0]) >= LEAST_ROUNDS else []
        if timings and (all(timing.stable for timing in timings) or time.monotonic() - start > most_seconds):
            return timings


def median_interval(samples: NDArray[np.float64], confidence: float = 0.95) -> tuple[float, float]:
    """Interval that holds the median of whatever distribution the samples come from, by order statistics (binomial).

    With fewer than 6 samples no such interval exists at 95 %; the range is given then.
    """
    ordered, count = np.sort(samples), len(samples)
    rank = int(binom.ppf((1 - confidence) / 2, count, 0.5)) - 1  # 0-based rank of the lower end, at least the confidence
    rank = max(0, rank)
    return float(ordered[rank]), float(ordered[count - 1 - rank])


def _repeats(call: Callable[[], object]) -> int:
    for _ in range(WARM_UPS):
        call()
    start = time.perf_counter_ns()
    call()
    once_ms = max((time.perf_counter_ns() - start) / 1e6, 1e-4)
    return max(1, round(LEAST_SAMPLE_MS / once_ms))


def _sample(call: Callable[[], object], repeats: int, read: Callable[[], int]) -> tuple[float, float]:
    call()  # the caches now hold this network, not the one before it in the round
    wall, start = time.perf_counter_ns(), read()
    for _ in range(repeats):
        call()
    return (read() - start) / repeats / 1e6, (time.perf_counter_ns() - wall) / repeats / 1e6


def _summary(taken: NDArray[np.float64], clock: Clock, precision: float) -> Timing:
    times, wall = taken[:, 0], taken[:, 1]
    median, (low, high) = float(np.median(times)), median_interval(times)
    stable = high - low <= 2 * precision * median
    return Timing(median, low, high, float(np.percentile(times, 95)), float(np.median(wall)), len(times), stable, clock)
