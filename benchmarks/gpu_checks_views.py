"""Convolutions over parts of larger weights on a GPU, as children have them: results, the copies cuDNN asks for, and time."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.gpu_checks_common import Bench, difference, exact, synchronise, timed
from supernet.slicing import part_of

CONVOLUTIONS = {  # shape of the stored weight, of the child's, and groups
    "1x1": ((256, 128, 1, 1), (192, 96, 1, 1), 1),
    "3x3": ((128, 96, 3, 3), (96, 80, 3, 3), 1),
    "3x3 of 5x5": ((128, 96, 5, 5), (96, 80, 3, 3), 1),
    "depthwise 3x3 of 7x7": ((256, 1, 7, 7), (192, 1, 3, 3), 192),
    "depthwise 5x5": ((256, 1, 5, 5), (192, 1, 5, 5), 192),
}
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
COPIES = ("copy", "nchwtonhwc", "nhwctonchw", "transpose", "contiguous", "converttensor", "clone")
"""What names of operators and kernels hold that only move data."""
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}


def views(bench: Bench) -> None:
    """Every kind of convolution, in both layouts and precisions, over a view and over a copy of it."""
    cases = {
        f"{name} {layout} {precision}": compare(bench, name, layout, precision)
        for name in CONVOLUTIONS for layout in LAYOUTS for precision in TOLERANCE
    }  # fmt: skip
    bench.figures |= {
        "cases": len(cases), "bit_equal": sum(case["error"] == 0 for case in cases.values()),
        "worst_error": {end: max(case["error"] for name, case in cases.items() if name.endswith(end)) for end in TOLERANCE},
        "worst_time_ratio": max(case["time_ratio"] for case in cases.values()),
        "most_copies_more": max(sum(case["copies_more"].values()) for case in cases.values()), "each": cases,
    }  # fmt: skip
    off = [name for name, case in cases.items() if not case["error"] <= TOLERANCE[name[-4:]]]
    bench.expect(not off, f"views and copies differ: {', '.join(off)}")


def compare(bench: Bench, name: str, layout: str, precision: str) -> dict[str, Any]:
    """One convolution: relative error of output and gradients, time over that of the copy, and operators that it has more of."""
    whole, part, groups = CONVOLUTIONS[name]
    generator = torch.Generator().manual_seed(3)
    batch, side = (2, 14) if bench.quick else (64, 28)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(bench.device).contiguous(memory_format=LAYOUTS[layout])

    stored, index = drawn(*whole), part_of(whole, part)
    images = drawn(batch, part[1] * groups, side, side)
    view, copy = nn.Parameter(stored[index]), nn.Parameter(stored[index].contiguous(memory_format=LAYOUTS[layout]))
    view.grad, copy.grad = torch.zeros_like(stored)[index], torch.zeros_like(copy)
    ways = {"view": _pass(bench, view, images, groups, precision), "copy": _pass(bench, copy, images, groups, precision)}
    with exact():
        results = {way: _cleared(ways[way], weight) for way, weight in (("view", view), ("copy", copy))}
    operators = {way: _operators(bench, call) for way, call in ways.items()}
    more = {
        key: count for key, count in (operators["view"] - operators["copy"]).items() if any(c in key.lower() for c in COPIES)
    }
    times = timed(bench, ways, 0.2)
    return {"error": difference(results["view"], results["copy"]), "time_ratio": times.ratio("view", "copy"),
            "copy_ms": times.ms("copy"), "copies_more": more}  # fmt: skip


def _pass(bench: Bench, weight: nn.Parameter, images: Tensor, groups: int, precision: str) -> Callable[[], dict[str, Tensor]]:
    """Forward and backward, as in a step: the gradient is added in place."""
    leaf = images.clone().requires_grad_()

    def call() -> dict[str, Tensor]:
        leaf.grad = None
        with torch.autocast(bench.device, dtype=torch.bfloat16, enabled=precision == "bf16"):
            outputs = F.conv2d(leaf, weight, padding=weight.shape[-1] // 2, groups=groups)
        outputs.float().square().mean().backward()  # type: ignore[no-untyped-call]
        assert leaf.grad is not None and weight.grad is not None
        return {"outputs": outputs.detach(), "of_images": leaf.grad, "of_weight": weight.grad}

    return call


def _cleared(call: Callable[[], dict[str, Tensor]], weight: nn.Parameter) -> dict[str, Tensor]:
    assert weight.grad is not None
    weight.grad.zero_()
    return {name: value.clone() for name, value in call().items()}


def _operators(bench: Bench, call: Callable[[], Any]) -> Counter[str]:
    """How often each operator and each kernel runs in one call."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if bench.cuda else [])]
    with silenced(), profile(activities=activities) as profiler:
        call()
        synchronise(bench)
    return Counter(event.name for event in profiler.events())


@contextmanager
def silenced() -> Iterator[None]:
    """Without what the profiler's library writes to the error output at every start and stop."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
