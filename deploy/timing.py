"""The statistics of a timing. Knows no model: it times callables, interleaved, until their latencies are known well enough.

The latency is the *least* time: what the call takes when nothing disturbs it. Where one thread does the work, the clock is that
thread's CPU time, which does not go on while others have the processor; with several threads it is the wall clock. CPU time is
disturbed too, by tens of percent for seconds, by whoever uses the same core's other hardware thread or its caches: on two shared cores,
medians of 15 samples of one network differed by 6 % from one another, the least ones by 2 %, of 30 samples by 2 % and 0.7 %.

This file travels to the machines that are measured (`deploy/far.py`): it needs Python 3.9 and numpy, nothing else of Nestling.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import numpy as np

CLOCKS = ("cpu", "wall")

WARM_UPS = 3
LEAST_ROUNDS, MOST_ROUNDS = 15, 5_000
LOOSE, LOOSE_ROUNDS = 0.05, 8
"""Where a wider interval will do, or the time is over, fewer rounds do."""
LEAST_SAMPLE_MS = 1.0
"""Shorter calls are repeated within a sample, so that reading the clock does not count."""
WIDTH = 0.03
"""How wide the interval may be, as a part of the latency, for the result to be called stable."""
QUIET = 0.1
"""Share of the samples that must be as quick as the quickest, within the interval: the machine was quiet more than once."""
THROTTLED = 1.5
"""Mean over median of the wall clock beyond which something stops the machine now and then: a quota, or heat."""
MOST_NUMBER = 1e12
"""No time in ms, and no number of samples, is larger."""
BUSY_STEAL = 0.02
"""Share of the time that a virtual machine waits for its host beyond which it is called busy."""


@dataclass(frozen=True)
class Timing:
    """What a call takes, in ms, with an interval (`low_ms` to `high_ms`); `stable` where that is as narrow as asked.

    The latency is the least time by its clock, "cpu" (of the one thread) or "wall"; `high_ms` is what at least `QUIET` of all calls do
    not exceed. `min_ms` to `p95_ms` are of that clock, `wall_*_ms` of the wall clock. `why` says why a result is not stable;
    `throttled` that wall means lie far above medians.
    """

    latency_ms: float
    low_ms: float
    high_ms: float
    min_ms: float
    median_ms: float
    mean_ms: float
    p95_ms: float
    wall_min_ms: float
    wall_median_ms: float
    wall_mean_ms: float
    samples: int
    stable: bool
    throttled: bool
    why: str
    clock: str
    load: float
    """Programs that wanted to run on the machine, a minute's mean, at the end (0 where it cannot be read)."""
    steal: float
    """Share of the machine's time that its host gave to others while it was timed (0 where it cannot be read)."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

    @classmethod
    def from_dict(cls, value: Any) -> Timing:
        """Read what `as_dict` gave. Raises `ValueError` for anything else, and for times that no clock shows."""
        kinds = {each.name: each.type for each in fields(cls)}
        if not isinstance(value, dict) or set(value) != set(kinds):
            raise ValueError(f"a timing has {', '.join(kinds)}")
        for name, kind in kinds.items():
            given = value[name]
            right = {"float": type(given) in (int, float), "int": type(given) is int, "bool": type(given) is bool}
            if not right.get(str(kind), isinstance(given, str)):
                raise ValueError(f"{name} of a timing is {kind}, not {str(given)[:40]!r}")
            if kind in ("float", "int") and not 0 <= given <= MOST_NUMBER:
                raise ValueError(f"{name} of a timing is 0 to {MOST_NUMBER:.0e}, not {str(given)[:40]}")
            if kind == "str" and not (len(given) <= 1000 and given.isprintable()):
                raise ValueError(f"{name} of a timing is a line of text, not {given[:40]!r}")
        if (
            value["samples"] < 1
            or not value["min_ms"] <= value["median_ms"]
            or not value["wall_min_ms"] <= value["wall_median_ms"]
        ):
            raise ValueError("a timing has samples, and no median below their least")
        if value["clock"] not in CLOCKS or not 0 < value["low_ms"] <= value["latency_ms"] <= value["high_ms"]:
            raise ValueError("a timing has a latency above 0 within its interval, and the clock cpu or wall")
        return cls(**value)


def time_interleaved(
    calls: Sequence[Callable[[], object]], *, clock: str = "cpu", width: float = WIDTH, most_seconds: float = 20.0
) -> list[Timing]:
    """Time every call, in rounds through all of them, so that a drift of the machine's speed touches all alike.

    A call whose interval is at most `width` of its latency leaves the rounds. They go on for at most `most_seconds` (and at least
    `least_rounds`); what is wider then is not `stable`.
    """
    if not calls:
        return []
    machine = Watch()
    repeats = [_repeats(call) for call in calls]
    samples: list[list[tuple[float, float]]] = [[] for _ in calls]
    start, rng = time.monotonic(), np.random.default_rng(0)
    going, rounds = list(range(len(calls))), 0
    while going:
        for position in rng.permutation(going):
            samples[position].append(_sample(calls[position], repeats[position], clock))
        rounds, late = rounds + 1, time.monotonic() - start > most_seconds
        if rounds < (LOOSE_ROUNDS if late else least_rounds(width)):
            continue
        if late or rounds >= MOST_ROUNDS:
            break
        going = [at for at in going if not _settled(np.array(samples[at]), clock, width)]
    load, steal = machine.load(), machine.steal()
    return [summary(np.array(taken), clock, width=width, load=load, steal=steal) for taken in samples]


def least_rounds(width: float) -> int:
    """Rounds that are made while there is time, where intervals may be so wide; `LOOSE_ROUNDS` are made in any case."""
    return LEAST_ROUNDS if width <= LOOSE else LOOSE_ROUNDS


def summary(taken: Any, clock: str, *, width: float = WIDTH, load: float = 0.0, steal: float = 0.0) -> Timing:
    """The timing of samples, shape (samples, 2): CPU time of the thread and wall time of a call, in ms."""
    times, wall = taken[:, CLOCKS.index(clock)], taken[:, 1]
    low, high = float(times.min()), quiet_end(times)
    stable = high - low <= width * low
    wall_median, wall_mean = float(np.median(wall)), float(wall.mean())
    throttled = wall_mean > THROTTLED * wall_median
    why = "" if stable else _why((high - low) / low if low else 0.0, width, throttled, load, steal)
    return Timing(
        low, low, high, low, float(np.median(times)), float(times.mean()), float(np.percentile(times, 95)),
        float(wall.min()), wall_median, wall_mean, len(times), bool(stable), bool(throttled), why, clock, load, steal,
    )  # fmt: skip


def quiet_end(samples: Any) -> float:
    """A value that at least the share `QUIET` of all calls do not exceed, at 95 %, by order statistics; else the largest sample.

    If it is close to the least sample, the machine was quiet often enough for that to be what the call takes undisturbed.
    """
    ordered, count = np.sort(samples), len(samples)
    return float(ordered[min(count - 1, _rank(count, QUIET, 0.95))])


@lru_cache(maxsize=4096)
def _rank(count: int, share: float, level: float) -> int:
    """The least k such that at most k of `count` samples lie below the quantile `share` with a chance of at least `level`."""
    total, term = 0.0, float(count) * math.log(1 - share)
    for rank in range(count + 1):
        total += math.exp(term)
        if total >= level:
            return rank
        term += math.log((count - rank) / (rank + 1.0)) + math.log(share / (1 - share)) if rank < count else 0.0
    return count


def _settled(taken: Any, clock: str, width: float) -> bool:
    times = taken[:, CLOCKS.index(clock)]
    return bool(quiet_end(times) - times.min() <= width * times.min())


def _why(found: float, width: float, throttled: bool, load: float, steal: float) -> str:
    cores = os.cpu_count() or 1
    said = f"the interval is {100 * found:.1f} % of the latency, {100 * width:.3g} % is asked for"
    if load > cores or steal > BUSY_STEAL:
        return said + f": the host is busy (load {load:.1f} on {cores} cores, {100 * steal:.0f} % of the time stolen)"
    if throttled:
        return said + ": the machine is throttled (wall times have a mean far above their median: a quota or heat stops it)"
    return said + ": the times vary"


def _repeats(call: Callable[[], object]) -> int:
    for _ in range(WARM_UPS):
        call()
    start = time.perf_counter_ns()
    call()
    once_ms = max((time.perf_counter_ns() - start) / 1e6, 1e-4)
    return max(1, round(LEAST_SAMPLE_MS / once_ms))


def _sample(call: Callable[[], object], repeats: int, clock: str) -> tuple[float, float]:
    """CPU time and wall time of a call in ms: means of `repeats`; by the wall clock the quickest of three as long."""
    call()  # the caches now hold this network, not the one before it in the round
    best = (math.inf, math.inf)
    for _ in range(3 if clock == "wall" else 1):
        wall, cpu = time.perf_counter_ns(), time.thread_time_ns()
        for _ in range(repeats):
            call()
        passed = time.perf_counter_ns() - wall
        best = min(best, ((time.thread_time_ns() - cpu) / repeats / 1e6, passed / repeats / 1e6), key=lambda pair: pair[1])
    return best


class Watch:
    """What others do to the machine meanwhile."""

    def __init__(self) -> None:
        self._begin = self._ticks()

    def load(self) -> float:
        """Programs that want to run, a minute's mean."""
        try:
            return float(os.getloadavg()[0])
        except (OSError, AttributeError):
            return 0.0

    def steal(self) -> float:
        """Share of the time since the beginning that the host of a virtual machine gave to others."""
        (stolen_before, before), (stolen, now) = self._begin, self._ticks()
        return max(0.0, (stolen - stolen_before) / (now - before)) if now > before else 0.0

    @staticmethod
    def _ticks() -> tuple[int, int]:
        try:
            with open("/proc/stat", encoding="ascii") as file:  # noqa: PTH123
                ticks = [int(part) for part in file.readline().split()[1:9]]
            return ticks[7], sum(ticks)
        except (OSError, ValueError, IndexError):
            return 0, 0
