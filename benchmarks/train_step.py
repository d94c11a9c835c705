"""One training step of a supernet: what sharing costs against the plain networks of its children, and against peers.

    python benchmarks/train_step.py [--quick] [--device cpu|cuda] [--bf16] [--families mbconv ofa resnet vit modelopt]

A step is zero_grad, the sandwich's archs, four children (largest, smallest, two random), resizing, losses, backward; no optimizer.
`plain` is the sum of the same four children as networks with contiguous weights of their own (channels last as ours, batch
statistics only, the same losses, images and resizing). All are timed in turns, over children of several steps: CPU time of the one
computing thread on a CPU, events on a GPU. Ratios are medians over the rounds with 95 % bootstrap intervals. The last line is JSON.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch

import numpy as np
import torch
from ofa_step import ModeloptStep, OfaStep, convolution_flops
from step_profile import allocated_peak, count, machine, shares
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from supernet.arch import Arch
from supernet.costs import arch_costs
from supernet.device import keep_memory
from supernet.losses import resized
from supernet.model import Supernet
from supernet.run import environment
from supernet.sandwich import sandwich, step_rng
from supernet.space import Space, load_space
from supernet.step import StepConfig, train_step
from supernet.task import Classification

SEED, STEPS, SMOOTHING = 17, 3, 0.1


@dataclass(frozen=True)
class Case:
    """A space and its batch: as it is measured, and where there is little time; `sizes` in place of the space's resolutions."""

    space: str
    batch: int
    quick: int
    rounds: int = 41
    sizes: tuple[int, ...] | None = None


CASES = {
    "cpu": {  # sizes at which a step takes about a second of one thread
        "mbconv": Case("cifar-mbconv", 64, 16, 25), "ofa": Case("ofa-mobilenetv3", 16, 4, 15, (96, 112, 128)),
        "resnet": Case("cifar-resnet", 64, 16), "vit": Case("cifar-vit", 64, 16, 31),
    },
    "cuda": {
        "mbconv": Case("attentivenas", 64, 16), "ofa": Case("ofa-mobilenetv3", 64, 16),
        "resnet": Case("ofa-resnet50", 64, 16), "vit": Case("autoformer-tiny", 64, 16),
    },
}  # fmt: skip
MODELOPT = {"cpu": (32, 64), "cuda": (128, 160)}  # batch and resolution

Ratio = tuple[float, float, float]


class Work:
    """A supernet, the children of some steps, their batch, and the same children as networks of their own."""

    def __init__(self, case: Case, device: str, quick: bool, bf16: bool) -> None:
        self.device, self.bf16, self.batch = device, bf16, case.quick if quick else case.batch
        self.space = load_space(case.space)
        if case.sizes:
            self.space = Space.from_definition({**self.space.definition, "resolution": list(case.sizes)})
        self.supernet = Supernet(self.space, seed=SEED).to(device).to(memory_format=torch.channels_last)
        generator, size, self.task = torch.Generator().manual_seed(SEED), self.space.largest_resolution, Classification()
        shape = (self.batch, self.space.family.in_channels, size, size)
        self.images = torch.randn(shape, generator=generator).to(device).contiguous(memory_format=torch.channels_last)
        self.labels = torch.randint(0, self.space.family.classes, (self.batch,), generator=generator).to(device)
        self.networks = {arch: plain_of(self.supernet, arch) for step in range(STEPS) for arch in self.archs(step)}

    def archs(self, step: int) -> list[Arch]:
        """The sandwich of a step."""
        return [arch for _, arch in sandwich(self.space, 4, step_rng(SEED, step))]

    def ours(self, step: int) -> list[Tensor]:
        """The step under test, by its public functions; losses of the children to the labels."""
        self.supernet.zero_grad()
        children = sandwich(self.space, 4, step_rng(SEED, step))
        config = StepConfig(soft_weight=1.0, label_smoothing=SMOOTHING, bf16=self.bf16)
        return [result.loss for result in train_step(self.supernet, children, self.images, self.labels, self.task, config)]

    def plain(self, step: int) -> list[Tensor]:
        """The same children, each a network of its own; their outputs."""
        outputs: list[Tensor] = []
        soft: Tensor | None = None
        for arch, images in zip(self.archs(step), self.crops(step), strict=True):
            network = self.networks[arch]
            network.zero_grad()
            with torch.autocast(self.device, dtype=torch.bfloat16, enabled=self.bf16):
                logits = network(images).float()
                if soft is None:
                    loss, soft = F.cross_entropy(logits, self.labels, label_smoothing=SMOOTHING), logits.detach().softmax(-1)
                else:
                    loss = -(soft * logits.log_softmax(-1)).sum(-1).mean()
            loss.backward()
            outputs.append(logits.detach())
        return outputs

    def crops(self, step: int, memory_format: torch.memory_format = torch.channels_last) -> list[Tensor]:
        """The images of each child, each resolution made once."""
        sizes = [self.space.resolution(arch) for arch in self.archs(step)]
        made = {size: resized(self.images, size).contiguous(memory_format=memory_format) for size in set(sizes)}
        return [made[size] for size in sizes]

    def same_work(self) -> None:
        """Both compute the same: with the same weights, the losses to the labels agree."""
        for ours, logits in zip(self.ours(0), self.plain(0), strict=True):
            torch.testing.assert_close(ours, F.cross_entropy(logits, self.labels), rtol=2e-2 if self.bf16 else 1e-3, atol=1e-3)


def plain_of(supernet: Supernet, arch: Arch) -> nn.Module:
    """The child as an ordinary network, which keeps no running statistics either (that would only make it slower)."""
    network = supernet.extract(arch).to(memory_format=torch.channels_last)
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            module.track_running_stats = False
            module.running_mean = module.running_var = module.num_batches_tracked = None
    return network


# --- clocks and statistics ---


def seconds(call: Callable[[], object], device: str) -> float:
    """CPU time of this thread, where alone the work is done; on a GPU the time between two events."""
    if device == "cpu":
        start = time.thread_time()
        call()
        return time.thread_time() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def in_turns(calls: dict[str, Callable[[int], object]], rounds: int, device: str) -> dict[str, np.ndarray]:
    """Seconds of every call, shape (rounds,): each round all of them, beginning with another one, at the step round % STEPS."""
    for step in range(STEPS):
        for call in calls.values():
            call(step)
    taken: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    gc.disable()
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            taken[name].append(seconds(partial(calls[name], number % STEPS), device))
        gc.collect(0)
    gc.enable()
    return {name: np.array(times) for name, times in taken.items()}


def ratio(ours: np.ndarray, theirs: np.ndarray) -> Ratio:
    """Median of the rounds' ratios and its 95 % interval (percentile bootstrap over rounds)."""
    ratios, rng = ours / theirs, np.random.default_rng(SEED)
    medians = np.median(ratios[rng.integers(0, len(ratios), (4000, len(ratios)))], axis=1)
    low, high = np.percentile(medians, [2.5, 97.5])
    return float(np.median(ratios)), float(low), float(high)


def written(value: Sequence[float]) -> str:
    return f"{value[0]:.3f} (95 % {value[1]:.3f} to {value[2]:.3f})"


# --- one family ---


def family_row(case: Case, device: str, quick: bool, bf16: bool) -> dict[str, object]:
    work = Work(case, device, quick, bf16)
    assembly = assembly_ms(work)
    work.same_work()
    calls: dict[str, Callable[[int], object]] = {"ours": work.ours, "plain": work.plain, "resize": work.crops}
    if case.space == "ofa-mobilenetv3":
        calls |= ofa_calls(work)
    taken = in_turns(calls, 9 if quick else case.rounds, device)
    against = {name: ratio(taken["ours"], taken[name]) for name in calls if name not in ("ours", "resize")}
    milliseconds = {name: float(np.median(times) * 1e3) for name, times in taken.items()}
    print(f"{case.space}, batch {work.batch} of {work.space.largest_resolution} pixels, {len(taken['ours'])} rounds; ms: "
          + ", ".join(f"{name} {value:.1f}" for name, value in milliseconds.items()), flush=True)  # fmt: skip
    for name, value in against.items():
        print(f"    ours / {name}: {written(value)}")
    optimizer = optimizer_ms(work, 9 if quick else 41)
    print(
        "    optimizer apart, SGD with momentum, ms: " + ", ".join(f"{name} {value:.2f}" for name, value in optimizer.items())
    )
    peak = peak_memory(work)
    print(
        f"    peak memory {peak[0] / 2**20:.1f} MiB, of the largest child alone {peak[1] / 2**20:.1f}: {peak[0] / peak[1]:.3f}"
    )
    print(f"    a child is assembled in {assembly['warm']:.3f} ms, with its blocks unbound in {assembly['cold']:.1f} ms")
    print(bound(work, milliseconds["ours"]), flush=True)
    return {
        "space": case.space, "batch": work.batch, "resolution": work.space.largest_resolution, "rounds": len(taken["ours"]),
        "milliseconds": milliseconds,
        "ratio_vs_plain": against.pop("plain"), **{f"ratio_vs_{name}": value for name, value in against.items()},
        "peak_bytes": peak[0], "peak_bytes_largest_child": peak[1], "ratio_peak_memory": peak[0] / peak[1],
        "child_assembly_ms": assembly["warm"], "child_assembly_cold_ms": assembly["cold"], "optimizer_ms": optimizer,
    }  # fmt: skip


def ofa_calls(work: Work) -> dict[str, Callable[[int], object]]:
    """The step of the package `ofa`, in both memory formats, if it is there."""
    calls: dict[str, Callable[[int], object]] = {}
    for name, memory_format in (("ofa", torch.contiguous_format), ("ofa_channels_last", torch.channels_last)):
        try:
            peer = OfaStep(memory_format, work.device)
        except ImportError as error:
            print(f'left out: ofa ({error}): pip install "nestling[bench]"')
            return {}
        for arch, images in zip(work.archs(0), work.crops(0), strict=True):
            wanted = convolution_flops(work.networks[arch], images)
            assert peer.convolution_flops(arch, images) == wanted, "ofa's subnet is not our child"

        def step(number: int, peer: OfaStep = peer) -> None:
            with torch.autocast(work.device, dtype=torch.bfloat16, enabled=work.bf16):
                peer.step(work.archs(number), work.crops(number, peer.memory_format), work.labels)

        calls[name] = step
    return calls


def assembly_ms(work: Work, archs: int = 300) -> dict[str, float]:
    """Median time of `supernet.child` of random archs, in ms of this thread: their blocks bound before, and not."""
    drawn = [work.space.sample(np.random.default_rng([SEED, number])) for number in range(archs)]
    cold = []
    for arch in drawn[:20]:
        fresh = copy.copy(work.supernet)  # the same weights, no ties
        cold.append(seconds(partial(fresh.child, arch), "cpu"))
    for arch in drawn:
        work.supernet.child(arch)
    warm = [seconds(partial(work.supernet.child, arch), "cpu") for arch in drawn]
    return {"warm": float(np.median(warm) * 1e3), "cold": float(np.median(cold) * 1e3)}


def optimizer_ms(work: Work, rounds: int) -> dict[str, float]:
    """Median time of SGD's step over the whole supernet, after a step's gradients; on copies of the weights."""
    work.ours(0)
    calls: dict[str, Callable[[int], object]] = {}
    for name in ("foreach", "fused"):
        weights = [parameter.detach().clone() for parameter in work.supernet.parameters()]
        for weight, parameter in zip(weights, work.supernet.parameters(), strict=True):
            weight.grad = None if parameter.grad is None else parameter.grad.clone()
        optimizer = torch.optim.SGD(weights, lr=1e-4, momentum=0.9, weight_decay=1e-5, **{name: True})
        calls[name] = lambda _, optimizer=optimizer: optimizer.step()
    return {name: float(np.median(times) * 1e3) for name, times in in_turns(calls, rounds, work.device).items()}


def peak_memory(work: Work) -> tuple[int, int]:
    """Peak of live bytes of our step, and of the largest child alone: weights, gradients and what the step allocates.

    The supernet's gradients stay allocated; an ordinary network's are made anew by every backward pass.
    """
    network, images = work.networks[work.space.largest], work.images

    def alone() -> None:
        with torch.autocast(work.device, dtype=torch.bfloat16, enabled=work.bf16):
            loss = F.cross_entropy(network(images).float(), work.labels, label_smoothing=SMOOTHING)
        loss.backward()

    shared, own = (sum(p.numel() * p.element_size() for p in module.parameters()) for module in (work.supernet, network))
    step = allocated_peak(lambda: work.ours(0), work.supernet.zero_grad, work.device)
    return 2 * shared + step, own + allocated_peak(alone, network.zero_grad, work.device)


def bound(work: Work, milliseconds: float) -> str:
    """What the step is made of, and what bounds it: counts against the rates of this machine."""
    counted, rates = count(lambda: work.ours(0)), machine(work.device)
    macs = 3 * work.batch * sum(arch_costs(work.space, arch)["macs"] for arch in work.archs(0))
    floors = {
        "arithmetic": macs / rates.macs, "bandwidth": counted.bytes / rates.bytes, "launches": counted.calls * rates.call
    }  # fmt: skip
    parts = shares(lambda: work.ours(0), work.device)
    return "\n".join([
        f"    a step: {macs / 1e9:.2f} GMAC (three times the forward passes'), {counted.bytes / 1e9:.2f} GB read and written by "
        f"{counted.calls} operators; {macs / milliseconds / 1e6:.1f} GMAC/s reached",
        f"    at this machine's rates ({rates.macs / 1e9:.0f} GMAC/s in products, {rates.bytes / 1e9:.1f} GB/s in copies, "
        f"{rates.call * 1e6:.1f} us a call): "
        + ", ".join(f"{name} {value * 1e3:.1f} ms ({value * 1e5 / milliseconds:.0f} %)" for name, value in floors.items()),
        "    share of operators' own time: " + ", ".join(f"{name} {share:.0%}" for name, share in parts.items()),
    ])  # fmt: skip


def modelopt_row(device: str, quick: bool) -> dict[str, object] | None:
    batch, resolution = MODELOPT[device]
    try:
        peer = ModeloptStep(batch // 4 if quick else batch, resolution, device)
    except (ImportError, AttributeError) as error:
        print(f'left out: nvidia-modelopt ({error}): pip install "nestling[bench]"')
        return None
    calls: dict[str, Callable[[int], object]] = {"modelopt": lambda _: peer.step(), "plain": lambda _: peer.plain_step()}
    taken = in_turns(calls, 9 if quick else 31, device)
    value = ratio(taken["modelopt"], taken["plain"])
    print(f"modelopt autonas on torchvision's mobilenet_v2, batch {len(peer.images)} of {resolution} pixels, four subnets: its step / "
          f"the same subnets exported: {written(value)}", flush=True)  # fmt: skip
    return {"batch": len(peer.images), "resolution": resolution, "ratio_vs_own_plain": value,
            "milliseconds": {name: float(np.median(times) * 1e3) for name, times in taken.items()}}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    keep_memory()  # as the command `train` does; for all that are compared
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--bf16", action="store_true", help="matrix work in bfloat16, in both")
    parser.add_argument("--families", nargs="+", choices=(*CASES["cpu"], "modelopt"), default=[*CASES["cpu"], "modelopt"])
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    here, start = environment(), time.monotonic()
    families: dict[str, dict[str, object]] = {}
    for name, case in CASES[given.device].items():
        if name in given.families:
            families[name] = family_row(case, given.device, given.quick, given.bf16)
    modelopt = modelopt_row(given.device, given.quick) if "modelopt" in given.families else None
    device = torch.cuda.get_device_name() if given.device == "cuda" else here["processor"]
    print(f"{time.monotonic() - start:.0f} s; {device}; torch {here['versions']['torch']}; seed {SEED}")
    print(json.dumps({
        "benchmark": "train_step", "seed": SEED, "device": given.device, "device_name": device, "bf16": given.bf16,
        "quick": given.quick, **worst(families), "families": families, "modelopt": modelopt, "versions": here["versions"],
    }))  # fmt: skip


def worst(families: dict[str, dict[str, object]]) -> dict[str, object]:
    """The headline: the least favourable family of each number, ratios as (median, low, high)."""
    rows = families.values()
    return {
        name: max((row[name] for row in rows if name in row), key=lambda value: value[-1] if isinstance(value, tuple) else value,
                  default=None)
        for name in ("ratio_vs_plain", "ratio_vs_ofa", "ratio_peak_memory", "child_assembly_ms")
    }  # fmt: skip


if __name__ == "__main__":
    main()
