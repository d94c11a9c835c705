"""Where a child will run, and how fast it is there: the protocol of targets, and what those have in common that a runner can talk on.

Targets are named on the command line and in YAML as `deploy/places.py` reads them: this machine, one behind ssh (`deploy/ssh.py`), a
kit that somebody runs elsewhere (`deploy/kit.py`), an Android device (`deploy/adb.py`).
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
import time
import weakref
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, ClassVar, Protocol, TypeVar

from deploy import runner
from deploy.far import Broken, Far, one_line
from deploy.timing import WIDTH, Timing
from supernet.errors import InputError

CLOCKS: dict[str, str] = {"cpu": "least CPU time of the one thread", "wall": "least wall time"}
"""What a latency is, in words: it goes where the latency goes."""
MOST_SECONDS = 20.0
"""How long a group of models is timed at most, where their times vary."""
TRIES = 3
"""Connections that may break before any model was timed in them."""
PAUSE_SECONDS = 2.0
"""Before a broken connection is made anew; twice as long before the next."""

Answer = TypeVar("Answer")
Each = Callable[[int, Timing], None]
"""Told of every timing as soon as it is known: the model's position, and what it takes."""


@dataclass(frozen=True, slots=True)
class Model:
    """A model to be timed at batch 1: the file's bytes and its input, (channels, pixels a side)."""

    data: bytes
    channels: int
    resolution: int
    shape: tuple[int, ...] | None = None
    """The whole shape of the input at batch 1, where it is no image."""

    @property
    def input_shape(self) -> list[int]:
        """What it reads at batch 1."""
        return list(self.shape or (1, self.channels, self.resolution, self.resolution))


@dataclass(frozen=True, slots=True)
class Latency:
    """A measured latency in ms at batch 1: the least time (`low`), and what a tenth of all calls do not exceed (`high`)."""

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


@dataclass(frozen=True, slots=True)
class Weight:
    """What a model costs beside time, measured in a process of its own.

    `resident_bytes` is the most memory that this process ever held, `added_bytes` what of it came with the model, `load_ms` the
    time to load it, `first_ms` that of the first inference, `images_per_s` the throughput at batch `batch`.
    """

    resident_bytes: int
    added_bytes: int
    load_ms: float
    first_ms: float
    images_per_s: float
    batch: int

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {name: getattr(self, name) for name in self.__slots__}


class Target(Protocol):
    """A device with a runtime."""

    @property
    def name(self) -> str:
        """What results are filed under."""
        ...

    @property
    def precision(self) -> str:
        """Of the models that are timed: fp32 or int8."""
        ...

    def fingerprint(self) -> dict[str, Any]:
        """All that a latency depends on: processor, cores, runtime, threads, precision, with a short hash."""
        ...

    def measure(
        self, models: Sequence[Model], *, width: float = WIDTH, most_seconds: float = MOST_SECONDS, each: Each | None = None
    ) -> list[Timing]:
        """Latency of each model at batch 1. `each` is told of every one at once, so that nothing is lost where the rest fails."""
        ...


@dataclass(frozen=True)
class Machine:
    """A target on which a runner can be started: this machine, or one behind ssh. Its runner stays up from one call to the next."""

    threads: int = 1
    runtime: str = "onnxruntime"
    precision: str = "fp32"

    kind: ClassVar[str] = ""
    far_away: ClassVar[bool] = False
    """Whether models travel through a network, and are packed for it."""

    def __post_init__(self) -> None:
        if not 1 <= self.threads <= 1024:
            raise InputError(f"a target has 1 to 1024 threads, but got {self.threads}")
        if self.runtime not in runner.MODULES:
            raise InputError(
                f"the runtime of a target must be one of {', '.join(runner.MODULES)}, but got {self.runtime[:100]!r}"
            )

    @property
    def name(self) -> str:
        """The kind of the target, with what it was told."""
        own = "" if self.runtime == "onnxruntime" else f",runtime={self.runtime}"
        return f"{self.kind}:threads={self.threads}{own}" + ("" if self.precision == "fp32" else f",{self.precision}")

    @property
    def clock(self) -> str:
        """CPU time where one thread of ours does the work; else the wall clock."""
        return "cpu" if self.threads == 1 and self.runtime == "onnxruntime" else "wall"

    def fingerprint(self) -> dict[str, Any]:
        """Processor, cores, runtime, threads, clock, precision, batch, and a short hash of them. Raises `InputError`."""
        return fingerprinted(self._hello(), self)

    def measure(
        self, models: Sequence[Model], *, width: float = WIDTH, most_seconds: float = MOST_SECONDS, each: Each | None = None
    ) -> list[Timing]:
        """Interleaved timings of all models, in groups; `most_seconds` is a group's limit.

        A broken connection is made anew, and what was timed is not timed again. Raises `InputError` where that does not help, the
        machine behind the name is another one now, or it cannot run a model (`Unable`).
        """
        return self._persist(models, lambda left: self._timed(left, width, most_seconds), each or (lambda at, timing: None))

    def weigh(self, models: Sequence[Model], *, batch: int = 8, seconds: float = 1.0) -> list[Weight]:
        """Memory, time to load, first inference and throughput (of `seconds`) of each model. Raises `InputError`, as `measure`."""
        return self._persist(models, lambda left: self._weighed(left, batch, seconds), lambda at, weight: None)

    def _weighed(self, models: Sequence[Model], batch: int, seconds: float) -> Iterator[tuple[int, Weight]]:
        listed, sent = self._packed(models)
        job = {"do": "weigh", "runtime": self.runtime, "threads": self.threads, "seconds": seconds,
               "models": [{**each, "many": batch} for each in listed]}  # fmt: skip
        seen: set[int] = set()
        for answer in self._far.ask(job, sent, seconds=60 + 10 * seconds):
            if "weight" in answer:
                at = _index(answer, len(models), self.name)
                refuse_twice(seen, at, self.name)
                yield at, _weight(answer["weight"], batch, self.name)
        refuse_missing(seen, len(models), self.name)

    def _persist(
        self, models: Sequence[Model], ask: Callable[[Sequence[Model]], Iterator[tuple[int, Answer]]],
        each: Callable[[int, Answer], None],
    ) -> list[Answer]:  # fmt: skip
        """What `ask` yields for each model; where the connection breaks, it is asked anew for those that are left."""
        found: dict[int, Answer] = {}
        broken = 0
        before = self._hello() if models else {}
        while left := [at for at in range(len(models)) if at not in found]:
            known = len(found)
            try:
                if broken:
                    time.sleep(PAUSE_SECONDS * broken)
                    self._refuse_another(before)
                for at, answer in ask([models[at] for at in left]):
                    found[left[at]] = answer
                    each(left[at], answer)
            except Broken:
                broken = broken + 1 if len(found) == known else 1
                if broken >= TRIES:
                    raise
        return [found[at] for at in range(len(models))]

    def conditions(self) -> dict[str, Any]:
        """Governor, frequency (MHz), temperature (degrees Celsius) and load at this moment; None where unknown."""
        first, *_ = self._far.ask({"do": "hello", "runtime": self.runtime})
        return dict(first.get("conditions") or {})

    def close(self) -> None:
        """End the runner; the next call starts another."""
        self._far.close()

    def command(self, arguments: Sequence[str]) -> list[str]:
        """What starts a Python there with these arguments."""
        raise NotImplementedError

    @cached_property
    def _far(self) -> Far:
        far = Far(partial(type(self).command, replace(self)), self.name)  # of a copy, so that this one can be forgotten
        weakref.finalize(self, far.close)
        return far

    def _packed(self, models: Sequence[Model]) -> tuple[list[dict[str, Any]], list[bytes]]:
        """What is said of the models, and their bytes as they are sent. Raises `InputError` for files that the runtime never reads."""
        if self.runtime == "executorch" and not all(model.data[4:6] == b"ET" for model in models):
            raise InputError(
                "executorch runs .pte programs, but profiles, searches and bundles have ONNX files: use another runtime for the "
                "target, such as ?runtime=onnxruntime, or measure a program of your own (`deploy.runtimes.executorch.to_program`)"
            )
        sent = [zlib.compress(model.data, 1) if self.far_away else model.data for model in models]
        listed = [{"bytes": len(data), "packed": self.far_away, "shapes": [model.input_shape]}
                  for model, data in zip(models, sent, strict=True)]  # fmt: skip
        return listed, sent

    def _hello(self) -> dict[str, Any]:
        return self._far.hello(self.runtime)

    def _refuse_another(self, before: Mapping[str, Any]) -> None:
        """Raise `InputError` where the name leads to another machine now, or it has another runtime."""
        now = self._hello()
        if now != before:
            raise InputError(
                f"{self.name} is another machine than before ({differing(now, before, 'now', 'before')}): measure again"
            )

    def _timed(self, models: Sequence[Model], width: float, most_seconds: float) -> Iterator[tuple[int, Timing]]:
        listed, sent = self._packed(models)
        job = {"do": "time", "runtime": self.runtime, "threads": self.threads, "clock": self.clock, "width": width,
               "most_seconds": most_seconds, "models": listed}  # fmt: skip
        seen: set[int] = set()
        for answer in self._far.ask(job, sent, seconds=20 * most_seconds):
            if "timing" in answer:
                at, timing = checked(answer, len(models), self.name, self.clock)
                refuse_twice(seen, at, self.name)
                yield at, timing
        refuse_missing(seen, len(models), self.name)


@dataclass(frozen=True)
class Local(Machine):
    """This machine."""

    kind: ClassVar[str] = "local"

    def command(self, arguments: Sequence[str]) -> list[str]:
        """The Python that runs this."""
        return [sys.executable, *arguments]


def fingerprinted(here: Mapping[str, Any], target: Any) -> dict[str, Any]:
    """The fingerprint of a machine that said `here`, measured as `target` says."""
    facts = {**here, "threads": target.threads, "clock": CLOCKS[target.clock], "precision": target.precision, "batch": 1}
    return {**facts, "hash": hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]}


def of_precision(fingerprint: Mapping[str, Any], precision: str) -> dict[str, Any]:
    """The fingerprint of the same machine for models of another precision."""
    facts = {**{name: value for name, value in fingerprint.items() if name != "hash"}, "precision": precision}
    return {**facts, "hash": hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]}


def differing(one: Mapping[str, Any], other: Mapping[str, Any], here: str = "here", there: str = "there") -> str:
    """In words, where two fingerprints differ."""
    names = [name for name in sorted(set(one) | set(other)) if name != "hash" and one.get(name) != other.get(name)]
    return "; ".join(f"{name} is {one.get(name)} {here} and {other.get(name)} {there}" for name in names) or "nothing differs"


def checked(answer: Mapping[str, Any], models: int, name: str, clock: str | None = None) -> tuple[int, Timing]:
    """A model's position and timing out of a runner's answer. Raises `InputError` for what no measurement can be."""
    at = _index(answer, models, name)
    try:
        timing = Timing.from_dict(answer.get("timing"))
        if clock not in (None, timing.clock):
            raise ValueError(f"it is by the clock {timing.clock}, {clock} was asked for")
    except ValueError as error:
        raise _impossible(name, str(error)) from error
    return at, timing


def refuse_twice(seen: set[int], at: int, name: str) -> None:
    """Raise `InputError` where a model is answered for a second time; else it is seen now."""
    if at in seen:
        raise _impossible(name, f"model {at} was answered for twice")
    seen.add(at)


def refuse_missing(found: Collection[int], models: int, name: str) -> None:
    """Raise `InputError` where a runner was done before all models were."""
    if len(found) < models:
        raise InputError(f"{name} answered for {len(found)} of {models} models and called it done: measure again")


def _index(answer: Mapping[str, Any], models: int, name: str) -> int:
    at = answer.get("index")
    if type(at) is not int or not 0 <= at < models:
        raise _impossible(name, f"there is no model {str(at)[:40]}")
    return at


def _impossible(name: str, why: str) -> InputError:
    return InputError(f"{name} gave an answer that cannot be ({one_line(why, 300)}): it was not kept; measure again")


def _weight(value: Any, batch: int, name: str) -> Weight:
    names = ("resident_bytes", "added_bytes", "load_ms", "first_ms", "images_per_s")
    numbers: list[Any] = [value.get(each) for each in names] if isinstance(value, dict) else []
    if not numbers or not all(type(number) in (int, float) and 0 <= number < math.inf for number in numbers):
        raise InputError(f"{name} weighed a model and gave {str(value)[:200]!r}, which is no weight: measure again")
    resident, added, load_ms, first_ms, images_per_s = numbers
    return Weight(int(resident), int(added), load_ms, first_ms, images_per_s, batch)
