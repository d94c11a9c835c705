"""Are children of one supernet as good as the same networks trained alone? For the same epochs, images, order and recipe.

    python benchmarks/quality_cifar.py --data FOLDER [--seeds 2] [--epochs 12] [--ablation] [--table FILE] [--quick]

FOLDER holds CIFAR-10 as grids (`train-0.webp`, `train-1.webp`, `test.webp`: 100 x 100 images of 32 x 32, a thousand of each class in
turn) or `flowers-160.tar`; without --data, scikit-learn's digits. Of CIFAR-10, train-0 trains, train-1 is for choosing (the rates of
the networks alone, `--table`), the test images are for the tables. A network alone learns from labels only, at the best of `--rates`
by the choosing images; the supernet has one rate. Every finished piece lies in --work and is not done again. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from quality_data import Piece, Work, data_and_space
from torch import nn

import supernet.state
import supernet.train
from supernet import config
from supernet.arch import Arch
from supernet.blocks import initial
from supernet.calibrate import calibrate
from supernet.costs import Costs, arch_costs
from supernet.data.augment import Augment
from supernet.data.batches import Batch, TrainingBatches
from supernet.device import fitting_threads
from supernet.errors import InputError
from supernet.losses import label_loss, resized
from supernet.model import Supernet, plain
from supernet.optimizer import make_optimizer
from supernet.recipe import TrainConfig, parse_overrides
from supernet.run import Run, environment
from supernet.sandwich import Sampler, Sampling
from supernet.schedule import learning_rate
from supernet.space import Space
from supernet.step import normalised
from supernet.task import Classification
from supernet.train import train

Bits = NDArray[np.bool_]

RECIPE = {
    "epochs": 12, "batch_size": 128, "learning_rate": 0.02, "optimizer": "muon", "weight_decay": 0.05, "warmup_epochs": 1,
    "distillation": {"start": 0.3, "end": 0.8, "most": 0.5}, "augment": {"flip": 0.5, "shift": 0.125}, "calibration_images": 1024,
    "validate_epochs": 0,
}  # fmt: skip
SGD = {"optimizer": "sgd", "learning_rate": 0.2, "clip_norm": 2.0, "weight_decay": 5e-4}


@dataclass(frozen=True)
class Bench:
    """What is measured: a space, a recipe, images, and the folder of finished pieces."""

    work: Work
    space: Space
    recipe: TrainConfig
    data: str
    rates: tuple[float, ...]
    children: int
    test_images: int | None

    def run(self, name: str, seed: int, recipe: TrainConfig | None = None) -> Run:
        """The run of a supernet, made where it is not there."""
        return self.work.run(name, self.space, (recipe or self.recipe).model_copy(update={"seed": seed}), self.data)

    @property
    def archs(self) -> list[Arch]:
        """Smallest, some spread evenly over the logarithm of macs, largest."""
        space = self.space
        codes = space.sample_codes(4000, np.random.default_rng(3))
        macs = Costs(space).macs(codes)
        ends = [arch_costs(space, arch)["macs"] for arch in (space.smallest, space.largest)]
        between = np.geomspace(*ends, self.children)[1:-1]
        nearest = [int(np.abs(macs - wanted).argmin()) for wanted in between]
        return [space.smallest, *space.decode(codes[nearest]), space.largest]


# --- what touches the engine ------------------------------------------------------------------------------------------------------


def train_supernet(run: Run) -> dict[str, Any]:
    """Train to the end; cost in CPU seconds (after an interruption: of the rest) and macs of forward passes (a third of a step)."""
    before, batches = time.process_time(), batches_of(run)
    train(run)
    steps = run.recipe.epochs * batches.steps_per_epoch
    sampler = supernet.train.Sampler(run.space, run.recipe.children, Sampling(), run.recipe.seed)
    macs = sum(arch_costs(run.space, arch)["macs"] for step in range(steps) for _, (arch,) in sampler.children(step))
    return {"cpu_seconds": time.process_time() - before, "macs": macs * batches.batch_size, "steps": steps}


def batches_of(run: Run) -> TrainingBatches:
    """The batches that the supernet sees."""
    augment = Augment(**run.recipe.augment.model_dump())
    return TrainingBatches(
        run.dataset.source, run.dataset.splits.train, batch_size=run.recipe.batch_size, resolution=run.space.largest_resolution,
        augment=augment, seed=run.recipe.seed,
    )  # fmt: skip


def train_alone(run: Run, arch: Arch, rate: float, batches: Iterable[Batch] | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """The plain network of `arch`, from the same rule of initial values, on the same crops, with labels only."""
    space = run.space
    torch.manual_seed(run.recipe.seed)
    network, generator = plain(space, arch), torch.Generator().manual_seed(run.recipe.seed)
    for path, module in network.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            zero = f"{path}.{name}".endswith(space.family.zero_init)
            parameter.data = torch.zeros_like(parameter) if zero else initial(module, name, parameter.shape, generator)
    figures = train_network(run, network, space.resolution(arch), rate, batches=batches)
    return network, figures | {"macs": arch_costs(space, arch)["macs"] * figures["images"]}


def train_network(
    run: Run,
    network: nn.Module,
    resolution: int,
    rate: float,
    *,
    epochs: int | None = None,
    batches: Iterable[Batch] | None = None,
) -> dict[str, Any]:
    """Train any classifier in place by the run's recipe, at its own peak rate, with labels only, and calibrate it as children are.

    `batches`: those of the run, where they are at hand. Gives CPU seconds, the images shown, and the rate.
    """
    recipe, own = run.recipe, batches_of(run)
    steps, before = (epochs or recipe.epochs) * own.steps_per_epoch, time.process_time()
    network.to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    optimizer = make_optimizer(network, recipe)  # type: ignore[arg-type]
    mean, std = (torch.tensor(run.data[name]).view(1, -1, 1, 1) for name in ("mean", "std"))
    for step, (pixels, labels, _) in enumerate(own.batches(0, steps) if batches is None else batches):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(
                step, steps, peak=rate, warmup=round(recipe.warmup_epochs * own.steps_per_epoch), schedule=recipe.schedule,
                floor=recipe.floor,
            )  # fmt: skip
        images = resized(normalised(pixels, mean, std), resolution).contiguous(memory_format=torch.channels_last)
        optimizer.zero_grad()
        label_loss(network(images), labels, recipe.label_smoothing).backward()  # type: ignore[no-untyped-call]
        if recipe.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(network.parameters(), recipe.clip_norm)
        optimizer.step()
    pixels = torch.from_numpy(run.dataset.split("train").pixels(resolution, recipe.calibration_images))
    calibrate(network, (normalised(part.permute(0, 3, 1, 2), mean, std) for part in pixels.split(256) if len(part) == 256))
    return {"cpu_seconds": time.process_time() - before, "images": steps * own.batch_size, "rate": rate}


@contextmanager
def variant(name: str) -> Iterator[None]:
    """Change the engine for an ablation: no zero start of residual branches, or random children instead of the sandwich."""

    class Awake(Supernet):
        def __init__(self, space: Space, *, seed: int = 0) -> None:
            super().__init__(space, seed=seed)
            for key, parameter in self.named_parameters():
                if key.endswith(space.family.zero_init):
                    nn.init.ones_(parameter)

    class AtRandom(Sampler):
        def __init__(self, space: Space, children: int, sampling: Sampling, seed: int, *, ends: bool = True) -> None:
            super().__init__(space, children, sampling, seed, ends=False)

        def children(self, step: int) -> list[tuple[str, list[Arch]]]:
            drawn = super().children(step)  # the dearest of them teaches
            return sorted(drawn, key=lambda child: -arch_costs(self.space, child[1][0])["macs"])

    changes = {"no zero start": (supernet.state, "Supernet", Awake), "four at random": (supernet.train, "Sampler", AtRandom)}
    with mock.patch.object(*changes.get(name, (supernet.train, "Sampler", Sampler))):
        yield


def first(images: Any, most: int | None) -> Any:
    """The first `most` images of a split (any first images are a fair sample)."""
    if most is not None:
        images.indices = images.indices[:most]
    return images


# --- pieces -----------------------------------------------------------------------------------------------------------------------


def supernet_piece(
    bench: Bench, name: str, seed: int, archs: list[Arch], recipe: TrainConfig, change: str = ""
) -> tuple[Any, Bits]:
    """Train a supernet, and score `archs` on the test images; the figures, and a bit for every arch and image."""

    def compute() -> Piece:
        run = bench.run(name, seed, recipe)
        with variant(change):
            figures = train_supernet(run)
        evaluator, test = run.evaluator(), first(run.test_images(f"quality: {name}"), bench.test_images)
        return figures, {"bits": np.stack([evaluator.evaluate(arch, test) for arch in archs])}

    figures, arrays = bench.work.piece(name, compute)
    return figures, arrays["bits"]


def alone_piece(bench: Bench, number: int, arch: Arch, seed: int) -> tuple[Any, Bits]:
    """Train one network alone at every rate, keep the best by the choosing images, score it on the test images."""

    def compute() -> Piece:
        run, tried, best = bench.run(f"supernet-{seed}", seed), [], None
        evaluator, resolution = run.evaluator(), run.space.resolution(arch)
        for rate in bench.rates:
            with fitting_threads(arch_costs(run.space, run.space.largest)["macs"]):
                network, figures = train_alone(run, arch, rate * run.recipe.learning_rate)
            figures["choosing_top1"] = float(evaluator.scores(network, resolution, run.dataset.split("search_val")).mean())
            if best is None or figures["choosing_top1"] > best[1]["choosing_top1"]:
                best = (network, figures)
            tried.append(figures)
        assert best is not None
        test = first(run.test_images(f"quality: alone {number}"), bench.test_images)
        return {**best[1], "tried": tried}, {"bits": evaluator.scores(best[0], resolution, test)}

    figures, arrays = bench.work.piece(f"alone-{seed}-{number}", compute)
    return figures, arrays["bits"]


def table_piece(bench: Bench, path: Path, most: int | None, images: int) -> dict[str, Any]:
    """Score all archs of the space (or `most`, at random) on the choosing images and write them as one file."""
    run, space, archs_a_piece = bench.run("supernet-0", 0), bench.space, 64
    grid = np.stack(np.meshgrid(*(np.arange(len(d.choices)) for d in space.dimensions), indexing="ij"), -1)
    codes = np.unique(space.canonical(grid.reshape(-1, len(space.dimensions))), axis=0)
    if most is not None:
        codes = codes[np.sort(np.random.default_rng(7).permutation(len(codes))[:most])]
    evaluator, split = run.evaluator(), first(run.dataset.split("search_val"), images)
    parts, seconds = [], 0.0
    for start in range(0, len(codes), archs_a_piece):
        archs = space.decode(codes[start : start + archs_a_piece])

        def compute(archs: list[Arch] = archs) -> Piece:
            before = time.process_time()
            bits = np.stack([evaluator.evaluate(arch, split) for arch in archs])
            return {"cpu_seconds": time.process_time() - before}, {"packed": np.packbits(bits, axis=1)}

        figures, arrays = bench.work.piece(f"table-{len(codes)}-{len(split)}-{start:05d}", compute)
        parts.append(arrays["packed"])
        seconds += figures["cpu_seconds"]
    packed, costs = np.concatenate(parts), Costs(space)
    np.savez_compressed(
        path, codes=codes.astype(np.int16), macs=costs.macs(codes), params=costs.params(codes), packed=packed,
        images=np.array(len(split)), space=np.array(json.dumps(dict(space.definition))), recipe=np.array(run.recipe.model_dump_json()),
    )  # fmt: skip
    top1 = np.unpackbits(packed, axis=1, count=len(split)).mean(1)
    return {"archs": len(codes), "images": len(split), "cpu_seconds": round(seconds), "lowest": float(top1.min()),
            "highest": float(top1.max()), "megabytes": round(path.stat().st_size / 1e6, 2)}  # fmt: skip


# --- tables -----------------------------------------------------------------------------------------------------------------------


def main_table(bench: Bench, seeds: int) -> dict[str, Any]:
    """Children beside the same networks alone; differences are means over the seeds, their intervals those of the images."""
    archs, shared, alone, rates = bench.archs, [], [], []
    costs = {"supernet": {"cpu_seconds": 0.0, "macs": 0}, "alone": {"cpu_seconds": 0.0, "macs": 0}}
    for seed in range(seeds):
        figures, bits = supernet_piece(bench, f"supernet-{seed}", seed, archs, bench.recipe)
        pieces = [alone_piece(bench, number, arch, seed) for number, arch in enumerate(archs)]
        shared.append(bits)
        alone.append(np.stack([own for _, own in pieces]))
        rates.append([each["rate"] for each, _ in pieces])
        for which, spent in (("supernet", [figures]), ("alone", [each for each, _ in pieces])):
            for key in ("cpu_seconds", "macs"):
                costs[which][key] += sum(each[key] for each in spent) / seeds
    one, other = np.stack(shared).astype(float), np.stack(alone).astype(float)  # seeds, archs, images
    rows = []
    print(f"\n{'macs':>12}  supernet   alone  difference (95 % over images)   of each seed     rate alone")
    for number, arch in enumerate(archs):
        apart = (one - other)[:, number]
        mean, reach = apart.mean(), 1.96 * apart.mean(0).std(ddof=1) / apart.shape[1] ** 0.5
        row = {
            "macs": arch_costs(bench.space, arch)["macs"], "supernet_top1": float(one[:, number].mean()),
            "alone_top1": float(other[:, number].mean()), "difference": float(mean), "difference_low": float(mean - reach),
            "difference_high": float(mean + reach), "difference_of_seeds": [round(float(x), 4) for x in apart.mean(1)],
        }  # fmt: skip
        rows.append(row)
        each_seed = " ".join(f"{x:+.2%}" for x in row["difference_of_seeds"])
        tops = f"{row['supernet_top1']:8.2%}  {row['alone_top1']:6.2%}  {mean:+7.2%}"
        interval, used = f"({mean - reach:+.2%} to {mean + reach:+.2%})", " ".join(f"{each[number]:g}" for each in rates)
        print(f"{row['macs']:12,}  {tops} {interval:24} {each_seed:16} {used}")
    print(f"\nmean over the {len(rows)} networks: {np.mean([row['difference'] for row in rows]):+.2%}")
    for which, spent in costs.items():
        many = f"{bench.space.size:,} networks" if which == "supernet" else f"sum of {len(archs)} networks, at one rate each"
        print(f"{which:9} {spent['macs'] / 1e12:8.2f} tera-macs of forward passes, {spent['cpu_seconds']:7.0f} CPU s  ({many})")
    return {"children": rows, "costs": costs}


def ablation(bench: Bench, epochs: int) -> dict[str, Any]:
    """What each part of the method does to the smallest, a middle and the largest child."""
    archs = [bench.archs[0], bench.archs[len(bench.archs) // 2], bench.archs[-1]]
    soft, labels = {"start": 0.0, "end": 0.0, "most": 1.0}, {"start": 1.0, "end": 1.0, "most": 0.0}
    changes: dict[str, dict[str, Any]] = {
        "the recipe": {}, "labels only": {"distillation": labels}, "soft targets only": {"distillation": soft},
        "no zero start": {}, "four at random": {}, "sgd 0.2, clip 2": SGD, "sgd, soft targets": SGD | {"distillation": soft},
    }  # fmt: skip
    found: dict[str, Any] = {}
    reference: Bits | None = None
    print(f"\nablation, {epochs} epochs, seed 0; in brackets the paired difference to the recipe with its 95 % interval")
    for name, change in changes.items():
        recipe = TrainConfig.model_validate(bench.recipe.model_dump() | {"epochs": epochs} | change)
        _, bits = supernet_piece(bench, f"ablation-{epochs}-{'-'.join(name.split())}", 0, archs, recipe, name)
        reference = bits if reference is None else reference
        compared = [Classification().compare(mine, theirs) for mine, theirs in zip(bits, reference, strict=True)]
        differences = [[c.difference, c.low, c.high] for c in compared]
        found[name] = {"top1": [float(row.mean()) for row in bits], "difference": differences}
        print(f"{name:18}", "   ".join(f"{row.mean():.2%} ({c.difference:+.2%}, {c.low:+.2%} to {c.high:+.2%})"
                                       for row, c in zip(bits, compared, strict=True)), flush=True)  # fmt: skip
    return {"epochs": epochs, "variants": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="folder with CIFAR-10 grids or flowers-160.tar; digits where left out")
    parser.add_argument("--work", type=Path, help="folder of finished pieces; a fresh one where left out")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--children", type=int, default=6, help="networks that are also trained alone")
    parser.add_argument("--rates", type=float, nargs="+", default=[1.0, 2.0], help="alone: multiples of the recipe's rate")
    parser.add_argument("--set", action="append", default=[], help="change a key of the recipe: key=value")
    parser.add_argument("--ablation", type=int, nargs="?", const=6, metavar="EPOCHS")
    parser.add_argument("--table", type=Path, metavar="FILE", help="score every network of the space once and write them here")
    parser.add_argument("--table-images", type=int, default=5000)
    parser.add_argument("--quick", action="store_true", help="the same work, smaller")
    given = parser.parse_args()
    here, start = environment(), time.monotonic()
    if given.quick:
        given.epochs, given.children, given.rates, given.seeds = 2, 3, [1.0], 1
        given.ablation, given.table_images = given.ablation and 1, 500
    work = Work.at(given.work, "quality")
    data, space, changes = data_and_space(given.data, work.path / "data", 4000 if given.quick else None)
    value = RECIPE | changes | {"epochs": given.epochs}
    for key, new in parse_overrides(given.set).items():
        part, _, last = key.rpartition(".")
        value = value | ({part: value.get(part, {}) | {last: new}} if part else {last: new})
    recipe = config.parse(TrainConfig, value, "recipe")
    try:
        work.only_of([recipe.model_dump(mode="json"), space.key, given.rates, given.children, given.quick])
    except InputError as error:
        parser.error(str(error))
    bench = Bench(work, space, recipe, data, tuple(given.rates), given.children, 2000 if given.quick else None)
    print(f"{space.name}: {space.size:,} networks; recipe {json.dumps(recipe.model_dump(mode='json', exclude_defaults=True))}")
    versions = here["versions"]
    print(f"{here['processor']}, {here['cores']} cores; torch {versions['torch']}, timm {versions['timm']}", flush=True)
    result = {
        "benchmark": "quality_cifar",
        "data": space.name,
        "seeds": given.seeds,
        "epochs": given.epochs,
        "quick": given.quick,
    }
    result |= main_table(bench, given.seeds)
    if given.ablation:
        result["ablation"] = ablation(bench, given.ablation)
    if given.table:
        result["table"] = table_piece(bench, given.table, 64 if given.quick else None, given.table_images)
        print(f"\ntable: {result['table']}")
    print(f"\n{time.monotonic() - start:.0f} s")
    print(json.dumps(result | {"recipe": value, "processor": here["processor"], "cores": here["cores"], "versions": versions}))


if __name__ == "__main__":
    main()
