"""What a training step is made of: counted operators and bytes, the rates of the machine, allocations. For train_step.py."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

KINDS = {
    "convolutions": ("conv",), "products": ("addmm", "mm", "bmm", "matmul", "linear", "attention"), "norms": ("norm",),
    "activations": ("silu", "hardswish", "hardsigmoid", "relu", "gelu", "sigmoid", "threshold"),
    "copies": ("copy", "clone", "contiguous", "fill", "zero"), "gradients added": ("add_", "AccumulateGrad"), "resizing": ("upsample",),
}  # fmt: skip


@dataclass
class Counted:
    """Operators that compute (views do not), and the bytes if each reads its inputs and writes its outputs once."""

    calls: int
    bytes: int


class _Traffic(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if not func.is_view and not func.overloadpacket.__name__.startswith(("empty", "new_empty", "detach")):
            tensors = [leaf for leaf in tree_leaves((args, kwargs, output)) if isinstance(leaf, torch.Tensor)]
            self.calls += 1
            self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return output


def count(call: Callable[[], object]) -> Counted:
    with _Traffic() as traffic:
        call()
    return Counted(traffic.calls, traffic.bytes)


@dataclass
class Rates:
    """Multiply-accumulates, bytes, and seconds a call: what this device does at best in one thread."""

    macs: float
    bytes: float
    call: float


def machine(device: str) -> Rates:
    matrix, small = torch.randn(1024, 1024, device=device), torch.zeros(1, device=device)
    large = torch.zeros(2**25, device=device)
    other = torch.empty_like(large)
    return Rates(
        macs=1024**3 / _best(lambda: matrix @ matrix, device), bytes=2 * 4 * 2**25 / _best(lambda: other.copy_(large), device),
        call=_best(lambda: [small.add_(1) for _ in range(1000)], device) / 1000,
    )  # fmt: skip


def _best(call: Callable[[], object], device: str) -> float:
    times = []
    for _ in range(12):
        start = time.thread_time() if device == "cpu" else time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append((time.thread_time() if device == "cpu" else time.perf_counter()) - start)
    return min(times)


def _profiled(call: Callable[[], object], device: str, **options: bool) -> profile:
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with profile(activities=activities, **options) as recorded:
        call()
    return recorded


def shares(call: Callable[[], object], device: str) -> dict[str, float]:
    """Kind of operator -> part of all operators' own time on the device, largest first."""
    totals: dict[str, float] = {}
    for event in _profiled(call, device).key_averages():
        own = event.self_cpu_time_total if device == "cpu" else event.self_device_time_total
        kind = next((kind for kind, parts in KINDS.items() if any(part in event.key for part in parts)), "other")
        totals[kind] = totals.get(kind, 0.0) + own
    return {kind: own / sum(totals.values()) for kind, own in sorted(totals.items(), key=lambda item: -item[1])}


def allocated_peak(call: Callable[[], object], prepare: Callable[[], object], device: str) -> int:
    """Most bytes that are allocated at once during a second `call`, beyond those after `prepare`."""
    call()
    prepare()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    recorded = _profiled(call, device, profile_memory=True)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    live = peak = 0
    for event in sorted((event for event in events if event["name"] == "[memory]"), key=lambda event: float(event["ts"])):
        live += event["args"]["Bytes"]
        peak = max(peak, live)
    return peak
