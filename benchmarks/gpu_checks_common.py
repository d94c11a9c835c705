"""What the checks of a GPU share: where they run, how they time and compare, and the networks that they compare."""

from __future__ import annotations

import gc
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from supernet.arch import Arch
from supernet.model import Supernet, plain
from supernet.slicing import part_of
from supernet.space import Space

MOST_ROUNDS, FEWEST_ROUNDS = 30, 3


class Skipped(Exception):
    """A check cannot be made here; its text says why."""


@dataclass
class Bench:
    """Where a check runs, what those before it found, and what is wrong so far."""

    device: str
    quick: bool
    folder: Path
    """A temporary one."""
    data: Path | None = None
    figures: dict[str, Any] = field(default_factory=dict)
    """Of this check; kept also where it breaks off."""
    wrong: list[str] = field(default_factory=list)
    earlier: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Check -> its figures."""

    @property
    def cuda(self) -> bool:
        """Whether on a GPU."""
        return self.device == "cuda"

    def need_cuda(self) -> None:
        """Skip the check elsewhere."""
        if not self.cuda:
            raise Skipped("on cpu")

    def expect(self, holds: bool, otherwise: str) -> None:
        """Note what is wrong and go on: the figures after it are worth having."""
        if not holds:
            self.wrong.append(otherwise)


# --- time and memory ---


def synchronise(bench: Bench) -> None:
    if bench.cuda:
        torch.cuda.synchronize()


def tidy(bench: Bench) -> None:
    """Give memory back, and with it what a failed check left in tracebacks."""
    gc.collect()
    if bench.cuda:
        torch.cuda.empty_cache()


def milliseconds(bench: Bench, way: Callable[[], Any]) -> float:
    """One call, by the device's own clock where it has one."""
    if not bench.cuda:
        start = time.perf_counter()
        way()
        return 1000 * (time.perf_counter() - start)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    torch.cuda.synchronize()
    events[0].record()
    way()
    events[1].record()
    torch.cuda.synchronize()
    return float(events[0].elapsed_time(events[1]))


@dataclass(frozen=True)
class Times:
    """Of several ways, timed in turns; a round is one call of each."""

    rounds: list[dict[str, float]]

    def ms(self, way: str) -> float:
        """Median in milliseconds."""
        return round(statistics.median(found[way] for found in self.rounds), 3)

    def ratio(self, way: str, to: str) -> float:
        """Median over the rounds: what disturbs a round disturbs both."""
        return round(statistics.median(found[way] / found[to] for found in self.rounds), 4)


def timed(bench: Bench, ways: Mapping[str, Callable[[], Any]], seconds: float) -> Times:
    """Warmed up, then in turns, every other round backwards, for about so many seconds."""
    rounds: list[dict[str, float]] = []
    for way in [] if bench.quick else [*ways.values()] * 3:
        way()
    start, fewest = time.monotonic(), 1 if bench.quick else FEWEST_ROUNDS
    while len(rounds) < fewest or (len(rounds) < MOST_ROUNDS and time.monotonic() - start < seconds):
        names = list(ways) if len(rounds) % 2 else list(reversed(ways))
        rounds.append({name: milliseconds(bench, ways[name]) for name in names})
    return Times(rounds)


def peak_bytes(bench: Bench, way: Callable[[], Any]) -> int:
    """The most that is allocated while `way` runs, over what was before; 0 on a CPU, which does not tell."""
    if not bench.cuda:
        way()
        return 0
    tidy(bench)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    way()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated() - before)


@contextmanager
def exact() -> Iterator[None]:
    """fp32 as it is written: no TF32, and algorithms of cuDNN that give the same twice."""
    places: list[Any] = [torch.backends.cudnn, torch.backends.cuda.matmul]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old names, but the only ones that keep old and new settings agreeing
        before, deterministic = [place.allow_tf32 for place in places], torch.backends.cudnn.deterministic
        try:
            for place in places:
                place.allow_tf32 = False
            torch.backends.cudnn.deterministic = True
            yield
        finally:
            torch.backends.cudnn.deterministic = deterministic
            for place, value in zip(places, before, strict=True):
                place.allow_tf32 = value


# --- networks ---


def perturbed(space: Space, bench: Bench, dtype: torch.dtype = torch.float32) -> Supernet:
    """The same weights every time, none of them 0, as training lays them out on the device."""
    supernet, generator = Supernet(space, seed=1), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in supernet.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    supernet.to(device=bench.device, dtype=dtype)
    supernet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return supernet


def plain_copy(supernet: Supernet, arch: Arch) -> nn.Sequential:
    """The child as an ordinary network with weights of its own, which normalises as a child in training does."""
    stored = dict(supernet.named_parameters())
    some = next(iter(stored.values()))
    network = plain(supernet.space, arch, baked=False).to(device=some.device, dtype=some.dtype)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.copy_(stored[name][part_of(stored[name].shape, parameter.shape)])
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            module.track_running_stats = False
            module.running_mean = module.running_var = module.num_batches_tracked = None
    return network


def gradients_of(supernet: Supernet) -> dict[str, Tensor]:
    return {name: p.grad.detach().double() for name, p in supernet.named_parameters() if p.grad is not None}


def gathered(supernet: Supernet, networks: Sequence[nn.Module]) -> dict[str, Tensor]:
    """The gradients of ordinary networks, added up where the supernet keeps their weights, in double precision."""
    stored, total = dict(supernet.named_parameters()), {}
    for network in networks:
        for name, parameter in network.named_parameters():
            if parameter.grad is not None:
                whole = total.setdefault(name, torch.zeros_like(stored[name], dtype=torch.float64))
                whole[part_of(whole.shape, parameter.shape)] += parameter.grad.double()
    return total


def difference(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """Length of the difference over the length of `wanted`, all tensors together; infinite where they are not of the same names."""
    if found.keys() != wanted.keys():
        return float("inf")
    apart = sum(float((found[name].double() - wanted[name].double()).square().sum()) for name in wanted)
    return float((apart / sum(float(value.double().square().sum()) for value in wanted.values())) ** 0.5)


def images_for(bench: Bench, space: Space, batch: int, resolution: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random normalised images, channels last, and labels."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(batch, space.family.in_channels, resolution, resolution, generator=generator)
    labels = torch.randint(space.definition.get("classes", 1000), (batch,), generator=generator)
    return images.to(bench.device).contiguous(memory_format=torch.channels_last), labels.to(bench.device)
