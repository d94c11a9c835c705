"""Is a supernet worth it? Off-the-shelf networks against our children that are no slower, trained on the same images for as long.

    python benchmarks/worth_it.py --data FOLDER [--work FOLDER] [--epochs 5] [--rates 1 2] [--networks ...] [--quick]

FOLDER holds CIFAR-10 as grids, as `quality_cifar.py` takes it; without --data, scikit-learn's digits. Timm's networks begin with
random weights and learn from labels by the recipe of the supernet (images, order, crops, epochs, optimizer, schedule), each at the
best of `--rates` by search-val. They get the largest resolution of our space; "stride 1" is the same network whose stem keeps that
resolution. "pruned" is the trained resnet18 with half of its channels taken by torch-pruning, and half as many epochs on top.

One supernet stands against all. Both sides are ONNX files that are measured in turns. A baseline meets the child with the best
search-val top1 among those not slower, and the fastest child that is as good on search-val. Only networks that stand in the table
see test images. Every finished piece lies in --work and is not done again. The last line is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from quality_cifar import RECIPE, train_network, train_supernet
from quality_data import CIFAR_SPACE, Piece, Work, data_and_space
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from deploy.export import OPSET, to_onnx
from deploy.targets import Local, Model
from deploy.timing import Timing
from supernet import config
from supernet.arch import Arch
from supernet.costs import Costs, arch_costs
from supernet.device import keep_memory
from supernet.durable import write_json
from supernet.errors import InputError
from supernet.recipe import TrainConfig
from supernet.run import Run, environment
from supernet.space import Space
from supernet.task import Classification

Bits = NDArray[np.bool_]
SPACE = {
    **CIFAR_SPACE, "name": "cifar-worth", "source": "our own, 31,104 networks of 0.2 to 11 million macs", "resolution": [16, 24, 32],
    "stages": [
        {"width": [16], "depth": [1], "kernel_size": [3], "expand_ratio": [2, 4], "stride": 1},
        {"width": [24, 32], "depth": [1, 2, 3], "kernel_size": [3, 5], "expand_ratio": [2, 4], "stride": 2},
        {"width": [40, 64, 96], "depth": [1, 2, 3, 4], "kernel_size": [3, 5], "expand_ratio": [2, 4, 6], "stride": 2,
         "squeeze_excite": True},
    ],
    "head": {"expand_ratio": 3, "width": [64, 128, 256]},
}  # fmt: skip
KEPT, PRUNED = 0.5, "resnet18, pruned"
NETWORKS = {
    "mobilenetv3_small_100": ("mobilenetv3_small_100", False), "resnet18": ("resnet18", False), PRUNED: ("resnet18", False),
    "mobilenetv3_small_100, stride 1": ("mobilenetv3_small_100", True),
    "mobilenetv3_large_100": ("mobilenetv3_large_100", False), "efficientnet_lite0": ("efficientnet_lite0", False),
    "mobilenetv3_large_100, stride 1": ("mobilenetv3_large_100", True), "efficientnet_lite0, stride 1": ("efficientnet_lite0", True),
}  # fmt: skip
"""Timm's name, and whether the stem keeps the resolution."""
MARGIN = 0.97
"""Children are chosen a little below the limit, so that they still keep it when they are measured again."""


@dataclass(frozen=True)
class Contender:
    """A trained network as it is compared: scores on search-val and test, its file, and what it took."""

    name: str
    search: Bits
    test: Bits
    onnx: Model
    macs: int
    spent: dict[str, float]


# --- baselines --------------------------------------------------------------------------------------------------------------------


class Baselines:
    """Off-the-shelf networks, trained by the run's recipe on its images."""

    def __init__(self, work: Work, run: Run, rates: Sequence[float]) -> None:
        self.work, self.run, self.rates = work, run, rates
        self.channels, self.pixels = run.space.family.in_channels, run.space.largest_resolution
        self.example = torch.zeros(1, self.channels, self.pixels, self.pixels)

    def untrained(self, name: str) -> nn.Module:
        """The network with its initial weights; the pruned one with those that are left of the trained resnet18."""
        if name == PRUNED:
            return pruned(self.trained("resnet18")[0], self.example)
        model, keeps = NETWORKS[name]
        torch.manual_seed(self.run.recipe.seed)
        network: nn.Module = timm.create_model(model, num_classes=len(self.run.classes), in_chans=self.channels)
        if keeps:
            stem = network.conv_stem
            assert isinstance(stem, nn.Conv2d)
            stem.stride = (1, 1)
        return network

    def trial(self, name: str, rate: float) -> Piece:
        """Train at one rate: figures, and the weights as arrays."""

        def compute() -> Piece:
            network, recipe = self.untrained(name), self.run.recipe
            epochs = max(1, recipe.epochs // 2) if name == PRUNED else recipe.epochs
            figures = train_network(self.run, network, self.pixels, rate * recipe.learning_rate, epochs=epochs)
            figures["macs_trained"] = macs_of(network, self.example) * figures["images"]
            figures["top1"] = float(self.scores(network, "search_val").mean())
            print(f"  {name}, {epochs} epochs at {figures['rate']:g}: {figures['top1']:.2%} of search-val, "
                  f"{figures['cpu_seconds']:.0f} CPU s", flush=True)  # fmt: skip
            return figures, {key: value.numpy() for key, value in network.state_dict().items()}

        return self.work.piece(f"trial-{name.replace(', ', '-').replace(' ', '-')}-{rate:g}", compute)

    def trained(self, name: str) -> tuple[nn.Module, dict[str, Any]]:
        """The network at its best rate, and what it took at that one and at all."""
        trials = [self.trial(name, rate) for rate in self.rates]
        figures, weights = max(trials, key=lambda trial: trial[0]["top1"])
        network = self.untrained(name)
        network.load_state_dict({key: torch.from_numpy(value) for key, value in weights.items()})
        spent = {key: figures[key] for key in ("cpu_seconds", "macs_trained", "rate")}
        spent["cpu_seconds_all"] = sum(each["cpu_seconds"] for each, _ in trials)
        if name == PRUNED:
            before = self.trained("resnet18")[1]
            spent = {key: value if key == "rate" else value + before[key] for key, value in spent.items()}
        return network.eval(), spent

    def contender(self, name: str) -> Contender:
        """The trained network as it is compared."""
        network, spent = self.trained(name)

        def compute() -> Piece:
            data = np.frombuffer(exported(network, self.example), np.uint8)
            return {}, {"search": self.scores(network, "search_val"), "test": self.scores(network, "test"), "onnx": data}

        label = f"baseline-{name.replace(', ', '-').replace(' ', '-')}-{spent['rate']:g}"
        _, arrays = self.work.piece(label, compute)
        model = Model(arrays["onnx"].tobytes(), self.channels, self.pixels)
        return Contender(name, arrays["search"], arrays["test"], model, macs_of(network, self.example), spent)

    def scores(self, network: nn.Module, split: str) -> Bits:
        """Whether each image of a split is right."""
        images = self.run.test_images("worth_it: baseline") if split == "test" else self.run.dataset.split(split)
        return self.run.evaluator().scores(network.to(memory_format=torch.channels_last), self.pixels, images)


def pruned(network: nn.Module, example: torch.Tensor) -> nn.Module:
    """Take `KEPT` of the channels of every layer but the classifier, those of the largest weights (torch-pruning, group magnitude)."""
    import torch_pruning  # type: ignore[import-untyped]

    pruner = torch_pruning.pruner.BasePruner(
        network, example, importance=torch_pruning.importance.GroupMagnitudeImportance(), pruning_ratio=1 - KEPT, round_to=8,
        ignored_layers=[network.get_submodule("fc")],
    )  # fmt: skip
    pruner.step()
    return network


def exported(network: nn.Module, example: torch.Tensor) -> bytes:
    """The network by torch's own exporter, which folds batch norm; raises `ValueError` where the file computes something else."""
    network = network.eval().to(memory_format=torch.contiguous_format)
    images = torch.randn((2, *example.shape[1:]), generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            network, (images,), dynamo=True, opset_version=OPSET, input_names=["images"], external_data=False, verbose=False,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )  # fmt: skip
    assert program is not None
    data: bytes = program.model_proto.SerializeToString()
    with torch.no_grad():
        off = np.abs(Local().runtime.load(data)(images.numpy()) - network(images).numpy()).max()
    if off > 1e-2:
        raise ValueError(f"the exported network is off by {off}")
    return data


def macs_of(network: nn.Module, example: torch.Tensor) -> int:
    """Multiply-accumulates of one image."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.eval()(example)
    return int(counter.get_total_flops()) // 2


# --- our side ---------------------------------------------------------------------------------------------------------------------


def candidates(space: Space, count: int) -> list[Arch]:
    """About `count` archs spread evenly over the logarithm of macs, both ends among them.

    From a pool, half of it random, half with one relative setting (of width, depth, ...) for all stages.
    """
    rng, kinds = np.random.default_rng(5), [dimension.name.rpartition(".")[2] for dimension in space.dimensions]
    sizes = np.array([len(dimension.choices) for dimension in space.dimensions])
    alike = np.array([[at[kind] for kind in kinds] for at in ({kind: rng.random() for kind in kinds} for _ in range(4000))])
    codes = np.concatenate([space.sample_codes(4000, rng), (alike * sizes).astype(np.int64)])
    codes = np.unique(space.canonical(codes[space.valid(codes)]), axis=0)
    macs = Costs(space).macs(codes)
    ends = [arch_costs(space, arch)["macs"] for arch in (space.smallest, space.largest)]
    chosen = [
        int(rng.choice(np.abs(macs / wanted - 1).argsort()[:10])) for wanted in np.geomspace(ends[0], ends[1], count)[1:-1]
    ]
    return list(dict.fromkeys([space.smallest, *space.decode(codes[chosen]), space.largest]))


def children(work: Work, run: Run, archs: Sequence[Arch]) -> list[Contender]:
    """Every candidate calibrated, scored on search-val and exported; test scores come later, for the chosen ones."""
    evaluator, split = run.evaluator(), run.dataset.split("search_val")
    found = []
    for arch in archs:
        resolution, before = run.space.resolution(arch), time.process_time()

        def compute(arch: Arch = arch, resolution: int = resolution, before: float = before) -> Piece:
            network = evaluator.calibrated(arch)
            data = to_onnx(network, channels=run.space.family.in_channels, resolution=resolution).SerializeToString()
            bits = evaluator.scores(network, resolution, split)
            return {"cpu_seconds": time.process_time() - before}, {"search": bits, "onnx": np.frombuffer(data, np.uint8)}

        figures, arrays = work.piece(f"child-{arch.key}", compute)
        model = Model(arrays["onnx"].tobytes(), run.space.family.in_channels, resolution)
        costs = arch_costs(run.space, arch)
        found.append(Contender(arch.key, arrays["search"], np.zeros(0, bool), model, costs["macs"], figures))
    return found


Picked = Callable[[Sequence[Contender], Sequence[Timing]], int | None]


def best_within(most_ms: float) -> Picked:
    """Choose the candidate with the best search-val top1 among those not slower than this."""

    def pick(found: Sequence[Contender], timings: Sequence[Timing]) -> int | None:
        fast = [number for number, timing in enumerate(timings) if timing.latency_ms <= MARGIN * most_ms]
        return max(fast, key=lambda number: found[number].search.mean(), default=None)

    return pick


def fastest_as_good(baseline: Bits) -> Picked:
    """Choose the fastest candidate whose search-val top1 is at least the baseline's."""

    def pick(found: Sequence[Contender], timings: Sequence[Timing]) -> int | None:
        good = [number for number, each in enumerate(found) if each.search.mean() >= baseline.mean()]
        return min(good, key=lambda number: timings[number].latency_ms, default=None)

    return pick


# --- the table --------------------------------------------------------------------------------------------------------------------


def rows_of(
    run: Run, baselines: Sequence[Contender], found: Sequence[Contender], archs: Sequence[Arch], most_seconds: float
) -> list[dict[str, Any]]:
    """Choose children by a first measurement of all, and compare by a second one of the chosen, all interleaved."""
    timings = Local().measure([each.onnx for each in (*baselines, *found)], most_seconds=most_seconds)
    own = timings[len(baselines) :]
    chosen = [(best_within(timing.latency_ms)(found, own), fastest_as_good(each.search)(found, own))
              for each, timing in zip(baselines, timings[: len(baselines)], strict=True)]  # fmt: skip
    numbers = sorted({number for pair in chosen for number in pair if number is not None})
    again = Local().measure(
        [*(each.onnx for each in baselines), *(found[number].onnx for number in numbers)], most_seconds=most_seconds
    )
    test, evaluator = run.test_images("worth_it: children"), run.evaluator()
    ours = {
        number: summary(found[number], evaluator.evaluate(archs[number], test), timing)
        for number, timing in zip(numbers, again[len(baselines) :], strict=True)
    }
    rows = []
    for baseline, timing, pair in zip(baselines, again[: len(baselines)], chosen, strict=True):
        row: dict[str, Any] = {"baseline": summary(baseline, baseline.test, timing) | baseline.spent}
        for name, number in zip(("child", "fastest_as_good"), pair, strict=True):
            row[name] = None if number is None else against(ours[number], row["baseline"])
        rows.append(row)
    for each in (row[name] for row in rows for name in row if row[name] is not None):
        each.pop("bits", None)
    return rows


def for_report(rows: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """What the report of the supernet's run shows of them (`rivals.json`)."""
    found = []
    for row in rows:
        rival, child = row["baseline"], row["child"]
        ours = (
            {} if child is None else {"child at most as slow": f"{child['name']}: {child['top1']:.2%} at {child['latency_ms']:.4g} ms",
                                      "difference": f"{child['difference']:+.2%} (p = {child['p_value']:.2g}): {child['verdict']}"}
        )  # fmt: skip
        found.append(
            {"network": rival["name"], "top1": f"{rival['top1']:.2%}", "latency": f"{rival['latency_ms']:.4g} ms", **ours}
        )
    return found


def summary(one: Contender, bits: Bits, timing: Timing) -> dict[str, Any]:
    """A side of a row."""
    top1 = Classification().estimate(bits)
    return {"name": one.name, "macs": one.macs, "resolution": one.onnx.resolution, "top1": top1.value, "top1_low": top1.low,
            "top1_high": top1.high, "latency_ms": timing.latency_ms, "latency_low": timing.low_ms, "latency_high": timing.high_ms,
            "bytes": len(one.onnx.data), "bits": bits}  # fmt: skip


def against(child: dict[str, Any], baseline: dict[str, Any]) -> dict[str, Any]:
    """A child beside a baseline, with the paired comparison of both on the same test images."""
    paired = Classification().compare(child["bits"], baseline["bits"])
    verdict = "no difference shown" if paired.p_value >= 0.05 else "better" if paired.difference > 0 else "worse"
    return child | {"difference": paired.difference, "difference_low": paired.low, "difference_high": paired.high,
                    "p_value": paired.p_value, "verdict": verdict,
                    "latency_ratio": child["latency_ms"] / baseline["latency_ms"]}  # fmt: skip


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print the rows: a baseline, the best child that is not slower, the fastest that is as good on search-val."""
    print(f"\n{'':34} {'top1 (95 %)':26} {'ms (95 %)':22} {'macs':>11}  px  difference (95 %), exact McNemar")
    for row in rows:
        for name, title in (("baseline", ""), ("child", "  best child not slower"), ("fastest_as_good", "  fastest as good")):
            side = row[name]
            if side is None:
                print(f"{title:34} none")
                continue
            figures = f"{interval(side, 'top1', '.2%'):26} {interval(side, 'latency', '.3f'):22} {side['macs']:11,}"
            print(f"{title or side['name']:34} {figures}  {side['resolution']:2}", end="\n" if name == "baseline" else "  ")
            if name != "baseline":
                print(f"{interval(side, 'difference', '+.2%')}, p {side['p_value']:.2g}: {side['verdict']}; "
                      f"{side['latency_ratio']:.2f} of the latency")  # fmt: skip


def interval(side: dict[str, Any], name: str, form: str) -> str:
    """A figure and the ends of its interval."""
    value = side["latency_ms" if name == "latency" else name]
    return f"{value:{form}} ({side[f'{name}_low']:{form}} to {side[f'{name}_high']:{form}})"


def show_cost(rows: Sequence[dict[str, Any]], ours: dict[str, float], candidates: int) -> None:
    """Print what both sides took to train."""
    print(f"\nTraining cost, CPU seconds (macs of forward passes): our supernet with all its children {ours['train']:.0f} "
          f"({ours['train_macs'] / 1e12:.2f}T); scoring and exporting {candidates} candidates {ours['choose']:.0f}")  # fmt: skip
    for each in (row["baseline"] for row in rows):
        print(f"  {each['name']}: {each['cpu_seconds']:.0f} ({each['macs_trained'] / 1e12:.2f}T) at its best rate, {each['rate']:g}; "
              f"{each['cpu_seconds_all']:.0f} with all rates tried")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="folder with CIFAR-10 grids or flowers-160.tar; digits where left out")
    parser.add_argument("--work", type=Path, help="folder of finished pieces; a fresh one where left out")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--train-images", type=int, default=10_000)
    parser.add_argument("--rates", type=float, nargs="+", default=[1.0, 2.0], help="baselines: multiples of the recipe's rate")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS)[:6])
    parser.add_argument("--candidates", type=int, default=40, help="children that are scored and measured")
    parser.add_argument("--quick", action="store_true", help="the same work, smaller")
    given = parser.parse_args()
    if given.quick:
        given.epochs, given.rates, given.candidates, given.networks = 1, [1.0], 6, list(NETWORKS)[:3]
    if PRUNED in given.networks and not find_spec("torch_pruning"):
        print('left out: the pruned network (there is no torch-pruning): pip install "nestling[bench]"')
        given.networks.remove(PRUNED)
    here, start = environment(), time.monotonic()
    torch.set_num_threads(1)
    keep_memory()
    work = Work.at(given.work, "worth-it")
    data, space, changes = data_and_space(given.data, work.path / "data", given.train_images)
    if space.name == CIFAR_SPACE["name"]:
        space = Space.from_definition(SPACE)
    recipe = config.parse(TrainConfig, RECIPE | changes | {"epochs": given.epochs}, "recipe")
    try:
        work.only_of([recipe.model_dump(mode="json"), space.key, given.train_images])
    except InputError as error:
        parser.error(str(error))
    print(f"{space.name}: {space.size:,} networks; recipe {json.dumps(RECIPE | changes)}, but {given.epochs} epochs; baselines at "
          f"{', '.join(f'{rate * recipe.learning_rate:g}' for rate in given.rates)}")  # fmt: skip
    print(
        f"{here['processor']}, {here['cores']} cores; torch {here['versions']['torch']}, timm {here['versions']['timm']}",
        flush=True,
    )

    run = work.run("supernet", space, recipe, data)
    figures, _ = work.piece("supernet-trained", lambda: (train_supernet(run), {}))
    print(f"  supernet, {given.epochs} epochs at {recipe.learning_rate:g}: {figures['cpu_seconds']:.0f} CPU s", flush=True)
    off_the_shelf = Baselines(work, run, given.rates)
    for rate in given.rates:  # every network at one rate before any at the next: a run that is stopped has something to show
        for name in given.networks:
            if name != PRUNED:
                off_the_shelf.trial(name, rate)
    baselines = [off_the_shelf.contender(name) for name in given.networks]
    archs = candidates(space, given.candidates)
    found = children(work, run, archs)
    rows = rows_of(run, baselines, found, archs, 3 if given.quick else 30)
    show(rows)
    write_json(run.path / "rivals.json", {"format": 1, "rows": for_report(rows)})
    spent = {
        "train": figures["cpu_seconds"],
        "train_macs": figures["macs"],
        "choose": sum(each.spent["cpu_seconds"] for each in found),
    }
    show_cost(rows, spent, len(archs))
    target = Local().fingerprint()
    print(f"latency: batch 1, fp32, {target['runtime']}, {target['threads']} thread, {target['clock']}")
    print(f"{len(baselines[0].test):,} test images; this start {time.monotonic() - start:.0f} s")
    print(json.dumps({
        "benchmark": "worth_it", "data": space.name, "quick": given.quick, "epochs": given.epochs, "rows": rows, "ours": spent,
        "candidates": len(archs), "rates": given.rates, "target": target, "versions": here["versions"],
    }))  # fmt: skip


if __name__ == "__main__":
    main()
