"""Checks of one training step on a GPU: against ordinary networks, over views, compiled, as a graph; the optimizer; evaluation."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu_checks_common import (
    Bench,
    difference,
    exact,
    gathered,
    gradients_of,
    images_for,
    peak_bytes,
    perturbed,
    plain_copy,
    synchronise,
    tidy,
    timed,
)  # fmt: skip
from supernet import optimizer as optimizers
from supernet.arch import Arch
from supernet.model import Supernet, plain
from supernet.recipe import load_recipe
from supernet.sandwich import sandwich, step_rng
from supernet.space import Space, load_space
from supernet.step import StepConfig, train_step
from supernet.task import Classification

task = Classification()
AS_GOOD = 3.0
"""A step may be so many times as far from double precision as ordinary networks are: both are rounding alone."""

Children = list[tuple[str, Arch]]


def children_of(space: Space, resolution: int | None) -> Children:
    """Four children as a step draws them, all at one resolution where it is given."""
    drawn = sandwich(space, 4, step_rng(0, 0))
    if resolution is None or "resolution" not in space.by_name:
        return drawn
    return [(role, space.arch({**arch.as_dict(), "resolution": resolution})) for role, arch in drawn]


def step_of_ours(
    supernet: Supernet, children: Children, images: Tensor, labels: Tensor, config: StepConfig
) -> Callable[[], Any]:
    def step() -> None:
        supernet.zero_grad()
        train_step(supernet, children, images, labels, task, config)

    return step


def step_of_plain(
    supernet: Supernet, children: Children, networks: dict[Arch, nn.Module], images: Tensor, labels: Tensor, config: StepConfig
) -> Callable[[], Any]:
    """The very same step, but every child is an ordinary network with weights and gradients of its own."""

    def step() -> None:
        for network in networks.values():
            network.zero_grad()
        train_step(supernet, children, images, labels, task, config, child=lambda arch, **_: networks[arch])

    return step


def step_check(bench: Bench, name: str, resolution: int | None, batches: Sequence[int]) -> None:
    space = load_space(name)
    children = children_of(space, resolution)[slice(1, 3) if bench.quick else slice(4)]  # the largest is slow on a CPU
    side = resolution or space.largest_resolution
    exactness(bench, space, children, side)
    for batch in [2] if bench.quick else batches:
        try:
            speed(bench, space, children, side, batch)
            memory(bench, space, children, side, batch)
            return
        except torch.OutOfMemoryError:
            bench.figures["did_not_fit"] = batch
        tidy(bench)  # only here, outside: the error holds what it was raised among


def exactness(bench: Bench, space: Space, children: Children, side: int) -> None:
    """Gradients in double precision equal those of ordinary networks; in fp32 and bf16 both are about as far from these."""
    images, labels = images_for(bench, space, 2 if bench.quick else 16, side)
    archs = [arch for _, arch in children]
    with exact():
        supernet = perturbed(space, bench, torch.float64)
        reference = _gradients(supernet, children, archs, images.double(), labels, StepConfig())
        bench.figures["double_error"] = difference(reference[0], reference[1])
        bench.expect(bench.figures["double_error"] < 1e-9, "gradients in double precision are not those of plain networks")
        supernet = perturbed(space, bench)
        for precision in ("fp32",) if bench.quick and side > 100 else ("fp32", "bf16"):
            config = StepConfig(bf16=precision == "bf16")
            ours, plains = _gradients(supernet, children, archs, images, labels, config)
            errors = [difference(found, reference[1]) for found in (ours, plains)]
            bench.figures[f"{precision}_error"], bench.figures[f"{precision}_error_of_plain"] = errors
            bench.expect(errors[0] <= AS_GOOD * errors[1] + 1e-6, f"{precision} gradients are further off than plain networks'")


def _gradients(
    supernet: Supernet, children: Children, archs: list[Arch], images: Tensor, labels: Tensor, config: StepConfig
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Of the supernet, and of ordinary networks in its place; on one device, but in the memory of neither's next step."""
    networks: dict[Arch, nn.Module] = {arch: plain_copy(supernet, arch) for arch in archs}
    step_of_ours(supernet, children, images, labels, config)()
    step_of_plain(supernet, children, networks, images, labels, config)()
    return {name: value.clone() for name, value in gradients_of(supernet).items()}, gathered(supernet, list(networks.values()))


def speed(bench: Bench, space: Space, children: Children, side: int, batch: int) -> None:
    """A step against the same step of ordinary networks; and with the optimizer, what it makes of images in a second."""
    images, labels = images_for(bench, space, batch, side)
    supernet = perturbed(space, bench)
    networks: dict[Arch, nn.Module] = {arch: plain_copy(supernet, arch) for _, arch in children}
    recipe = load_recipe("cifar").model_copy(update={"learning_rate": 1e-6})
    optimizer = optimizers.make_optimizer(supernet, recipe)
    for precision in ("fp32",) if bench.quick else ("fp32", "bf16"):
        config = StepConfig(bf16=precision == "bf16")
        ours = step_of_ours(supernet, children, images, labels, config)

        def whole(ours: Callable[[], Any] = ours) -> None:
            ours()
            optimizers.limit_gradient(supernet, recipe)
            optimizer.step()

        ways = {"ours": ours, "plain": step_of_plain(supernet, children, networks, images, labels, config), "whole": whole}
        times = timed(bench, ways, 6)
        bench.figures |= {
            f"{precision}_ms": times.ms("ours"), f"{precision}_time_ratio": times.ratio("ours", "plain"),
            f"{precision}_images_per_s": round(1000 * batch / times.ms("whole"), 1),
        }  # fmt: skip
    bench.figures["batch"] = batch


def memory(bench: Bench, space: Space, children: Children, side: int, batch: int) -> None:
    """Peak of a step in fp32, weights and gradients included, over that of the largest child alone as an ordinary network."""
    if not bench.cuda or bench.quick:
        bench.figures["memory"] = "skipped on cpu or quick"
        return
    images, labels = images_for(bench, space, batch, side)

    def ours() -> None:
        step_of_ours(perturbed(space, bench), children, images, labels, StepConfig())()

    def alone() -> None:
        network = plain(space, children[0][1], baked=False).to(bench.device)
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        task.label_loss(network(images), labels).backward()  # type: ignore[no-untyped-call]

    peaks = {"peak_bytes": peak_bytes(bench, ours), "peak_bytes_of_largest_alone": peak_bytes(bench, alone)}
    ratio = round(peaks["peak_bytes"] / peaks["peak_bytes_of_largest_alone"], 4)
    bench.figures |= peaks | {"memory_ratio": ratio}
    bench.expect(ratio < 1.5, f"a step takes {ratio} times the memory of its largest child alone")


def step_attentivenas(bench: Bench) -> None:
    """The space of AttentiveNAS at 224 px."""
    step_check(bench, "attentivenas", 192 if bench.quick else 224, (128, 64, 16))


def step_cifar(bench: Bench) -> None:
    """The space for CIFAR, children at resolutions of their own."""
    step_check(bench, "cifar-mbconv", None, (512, 128))


def step_autoformer(bench: Bench) -> None:
    """AutoFormer-tiny, a transformer: linear layers over views."""
    step_check(bench, "autoformer-tiny", None, (128, 64, 16))


# --- compiled, and as a graph ---


MOST_COMPILE_SECONDS = 50
"""If fp32 took longer, bf16 is left out."""


def compiled(bench: Bench) -> None:
    """The largest and the smallest child by torch.compile: same gradients, no compilation after the first step, time."""
    from torch._dynamo.utils import counters

    space = load_space("digits" if bench.quick else "cifar-mbconv")
    children = children_of(space, None)[:2]
    images, labels = images_for(bench, space, 8 if bench.quick else 128, space.largest_resolution)
    eager, supernet = perturbed(space, bench), perturbed(space, bench)
    child, sgd = _compiled_ends(bench, supernet), torch.optim.SGD(supernet.parameters(), lr=1e-4)
    torch._dynamo.reset()
    for precision in ("fp32",) if bench.quick else ("fp32", "bf16"):
        config = StepConfig(bf16=precision == "bf16")
        plain_step = step_of_ours(eager, children, images, labels, config)

        def compiled_step(config: StepConfig = config) -> None:
            supernet.zero_grad()
            train_step(supernet, children, images, labels, task, config, child=child)

        with exact():
            start = time.monotonic()
            compiled_step()
            synchronise(bench)
            bench.figures[f"{precision}_compile_s"] = round(time.monotonic() - start, 1)
            plain_step()
            error = bench.figures[f"{precision}_error"] = difference(gradients_of(supernet), gradients_of(eager))
            bench.expect(error < (1e-3 if precision == "fp32" else 0.2), f"compiled children give other {precision} gradients")
            before = counters["stats"]["unique_graphs"]
            times = timed(bench, {"compiled": compiled_step, "eager": plain_step}, 5)
            sgd.step()
            compiled_step()  # after weights have changed
        bench.figures |= {
            f"{precision}_compiled_ms": times.ms("compiled"), f"{precision}_time_ratio": times.ratio("compiled", "eager"),
            f"{precision}_recompiled": counters["stats"]["unique_graphs"] - before,
        }  # fmt: skip
        bench.expect(bench.figures[f"{precision}_recompiled"] == 0, "what was compiled once is compiled again")
        sgd.zero_grad()
        supernet.load_state_dict(eager.state_dict())
        if time.monotonic() - start > MOST_COMPILE_SECONDS:
            break
    bench.figures |= {"graphs": counters["stats"]["unique_graphs"], "graph_breaks": sum(counters["graph_break"].values())}


def _compiled_ends(bench: Bench, supernet: Supernet) -> Callable[..., Any]:
    from supernet.compiled import CompiledChildren

    bench.figures["backend"] = "aot_eager" if bench.quick else "inductor"
    return CompiledChildren(supernet, backend=bench.figures["backend"])


def graph(bench: Bench) -> None:
    """The largest child's forward and backward pass as a CUDA graph: its gradients land in the same place at every replay."""
    bench.need_cuda()
    space = load_space("cifar-mbconv")
    eager, static = perturbed(space, bench), perturbed(space, bench)
    images, labels = images_for(bench, space, 128, space.largest_resolution)
    with exact():
        replay, fixed_images = _captured(static, images, labels)
        fresh, _ = images_for(bench, space, 128, space.largest_resolution, seed=5)
        fixed_images.copy_(fresh)

        def once() -> None:
            eager.zero_grad()
            task.label_loss(eager.child(space.largest)(fresh), labels).backward()  # type: ignore[no-untyped-call]

        once()
        replay()
        synchronise(bench)
        bench.figures["error"] = difference(gradients_of(static), gradients_of(eager))
        times = timed(bench, {"graph": replay, "eager": once}, 5)
    bench.expect(bench.figures["error"] < 1e-4, "a replayed graph gives other gradients")
    bench.figures |= {"graph_ms": times.ms("graph"), "eager_ms": times.ms("eager"), "time_ratio": times.ratio("graph", "eager")}


def _captured(supernet: Supernet, images: Tensor, labels: Tensor) -> tuple[Callable[[], None], Tensor]:
    """A function that replays a step of the largest child from cleared gradients, and the images that it reads."""
    network, fixed = supernet.child(supernet.space.largest), images.clone(memory_format=torch.preserve_format)
    graph_, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()

    def forward_and_backward() -> None:
        task.label_loss(network(fixed), labels).backward()  # type: ignore[no-untyped-call]

    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # ties the gradients as well: what ties them must not be part of the graph
            forward_and_backward()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph_, stream=stream):
        forward_and_backward()
    gradients = [buffer.flat for buffer in supernet.gradient_buffers()]

    def replay() -> None:
        for flat in gradients:
            flat.zero_()
        graph_.replay()

    return replay, fixed


# --- the optimizer, and evaluation ---


def fused_optimizer(bench: Bench) -> None:
    """The optimizer of a run, which is one kernel on a GPU, against torch's plain one; gradients clipped in both."""
    space, makers = load_space("cifar-mbconv"), {}
    children = children_of(space, None)
    images, labels = images_for(bench, space, 4 if bench.quick else 64, space.largest_resolution)
    for name in ("sgd", "adamw"):
        recipe = load_recipe("cifar").model_copy(update={"optimizer": name, "learning_rate": 1e-3, "clip_norm": 1.0})
        weights = []
        for fused in (True, False):
            supernet = perturbed(space, bench)
            made = optimizers.make_optimizer(supernet, recipe)
            makers[name, fused] = made.param_groups[0].get("fused")
            if not fused:
                for group in made.param_groups:
                    group |= {"fused": False, "foreach": False}
            start = {key: value.detach().clone() for key, value in supernet.named_parameters()}
            torch.manual_seed(0)
            with exact():
                for count in (4, 2, 3):  # not every step touches the same weights
                    step_of_ours(supernet, children[:count], images, labels, StepConfig())()
                    optimizers.limit_gradient(supernet, recipe)
                    made.step()
            weights.append({key: value.detach() - start[key] for key, value in supernet.named_parameters()})
        bench.figures[f"{name}_error"] = difference(*weights)
        bench.expect(
            bench.figures[f"{name}_error"] < (1e-3 if name == "sgd" else 0.1), f"{name} does something else when fused"
        )
    bench.figures["fused"] = makers["sgd", True]
    bench.expect(not bench.cuda or bool(makers["sgd", True]), "the optimizer of a GPU run is not fused")


def evaluation(bench: Bench) -> None:
    """Calibrated and scored on the device and on the CPU: the same statistics, outputs and scores."""
    import numpy as np

    from supernet.data.arrays import ArraySource
    from supernet.data.dataset import SplitImages
    from supernet.evaluate import Evaluator

    space, count = load_space("cifar-mbconv"), 64 if bench.quick else 512
    pixels = np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3)).astype(np.uint8)
    source = ArraySource("made", [str(number) for number in range(10)], np.arange(count) % 10, [""] * count, pixels)
    split = SplitImages("train", source, np.arange(count), 1.0, (0.5,) * 3, (0.25,) * 3)
    errors, same = [], []
    for arch in (space.smallest, space.largest):
        found = []
        for device in (bench.device, "cpu"):
            evaluator = Evaluator(perturbed(space, Bench(device, bench.quick, bench.folder)), task, split, count)
            with exact():
                network = evaluator.calibrated(arch)
                scores = evaluator.scores(network, space.resolution(arch), split)
            found.append(({name: value.cpu() for name, value in network.named_buffers() if value.is_floating_point()}, scores))
        errors.append(difference(found[0][0], found[1][0]))
        same.append(float((found[0][1] == found[1][1]).mean()))
    bench.figures |= {"statistics_error": max(errors), "same_scores": min(same)}
    bench.expect(max(errors) < 1e-3 and min(same) > 0.97, "a child calibrated on the device is not that of the CPU")
