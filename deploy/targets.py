"""Where a child will run, and how fast it is there. For now: this machine."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from deploy.runtimes import Runtime
from deploy.runtimes.onnxruntime import OnnxRuntime
from deploy.timing import Clock, Timing, time_interleaved
from supernet.run import environment

CLOCKS: dict[Clock, str] = {"cpu": "CPU time of the one thread", "wall": "wall time"}
"""What a latency is, in words: it goes where the latency goes."""
AT_ONCE = 24
"""Models loaded and timed together; more are timed in groups."""


@dataclass(frozen=True, slots=True)
class Model:
    """A model to be timed at batch 1: the file's bytes and its input, (channels, pixels a side)."""

    data: bytes
    channels: int
    resolution: int


@dataclass(frozen=True, slots=True)
class Latency:
    """A measured latency in ms at batch 1, with its 95 % interval."""

    target: str
    latency_ms: float
    low: float
    high: float
    fingerprint: Mapping[str, Any]
    date: str

    def as_dict(self) -> dict[str, Any]:
        """For JSON and manifests."""
        return {name: getattr(self, name) for name in self.__slots__}

    @classmethod
    def from_dict(cls, value: Any) -> Latency:
        """Read what `as_dict` gave. Raises `ValueError` for anything else."""
        if not isinstance(value, dict) or set(value) != set(cls.__slots__) or not isinstance(value["fingerprint"], dict):
            raise ValueError(f"a latency has {', '.join(cls.__slots__)}")
        numbers = [value[name] for name in ("latency_ms", "low", "high")]
        texts = [value["target"], value["date"], *(value["fingerprint"].get(name) for name in ("processor", "runtime", "hash"))]
        if not all(type(number) in (int, float) and 0 <= number < math.inf for number in numbers):
            raise ValueError(f"a latency is a number of ms with its interval, not {numbers}")
        if not all(isinstance(text, str) for text in texts):
            raise ValueError("a latency names its target, date, processor and runtime")
        return cls(**value)


class Target(Protocol):
    """A device with a runtime."""

    @property
    def name(self) -> str:
        """What results are filed under."""
        ...

    def fingerprint(self) -> dict[str, Any]:
        """All that a latency depends on: processor, cores, runtime, threads."""
        ...

    def measure(self, models: Sequence[Model], *, precision: float = 0.02, most_seconds: float = 20.0) -> list[Timing]:
        """Latency of each model at batch 1."""
        ...


@dataclass(frozen=True, slots=True)
class Local:
    """This machine. At one thread the CPU time of that thread counts, else the wall clock (`deploy/timing.py`)."""

    threads: int = 1
    runtime: Runtime = field(default_factory=OnnxRuntime)

    @property
    def name(self) -> str:
        """`local`, with the number of threads."""
        return f"local:threads={self.threads}"

    @property
    def _clock(self) -> Clock:
        return "cpu" if self.threads == 1 else "wall"

    def fingerprint(self) -> dict[str, Any]:
        """Processor, cores, runtime, threads and a short hash of them."""
        here = environment()
        facts = {"processor": here["processor"], "cores": here["cores"], "runtime": self.runtime.name, "threads": self.threads,
                 "clock": CLOCKS[self._clock], "precision": "fp32", "batch": 1}  # fmt: skip
        return {**facts, "hash": hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]}

    def measure(self, models: Sequence[Model], *, precision: float = 0.02, most_seconds: float = 20.0) -> list[Timing]:
        """Interleaved timings of all models, in groups of `AT_ONCE` of mixed order; `most_seconds` is a group's limit."""
        order = np.random.default_rng(0).permutation(len(models))
        found: dict[int, Timing] = {}
        for start in range(0, len(models), AT_ONCE):
            group = [int(position) for position in order[start : start + AT_ONCE]]
            calls = [self._call(models[position]) for position in group]
            timings = time_interleaved(calls, clock=self._clock, precision=precision, most_seconds=most_seconds)
            found.update(zip(group, timings, strict=True))
        return [found[position] for position in range(len(models))]

    def _call(self, model: Model) -> Any:
        session = self.runtime.load(model.data, threads=self.threads)
        images = np.random.default_rng(0).standard_normal((1, model.channels, model.resolution, model.resolution), np.float32)
        return lambda: session(images)
