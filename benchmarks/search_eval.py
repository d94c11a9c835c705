"""Evaluating many children: what sharing blocks and images gives against each child alone, and how many images calibrate.

    python benchmarks/search_eval.py [--quick] [--device cpu|cuda] [--data FOLDER ...] [--work FOLDER]

`alone` is one child after another: extract, calibrate on as many images, score (`supernet.evaluate`); `shared` all at once
(`search.evaluate`). Ideal is what the plans say: macs of all children / macs of the trie's nodes. The data pass: unrelated children
on JPEG files, where alone each child's images are read, decoded and resized for it, as a data loader per child does. A FOLDER holds
`flowers-160.tar` or CIFAR-10 as grids; parts without their data are left out. Timed in turns: CPU time of the process, which computes
with one thread; on a GPU wall time. Ratios are medians over rounds with 95 % bootstrap intervals. The last line is JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch

import numpy as np
import torch
from quality_data import Work, data_and_space
from scipy.stats import kendalltau
from torch import Tensor
from torch.nn import functional as F

from search.evaluate import SharedEvaluator
from search.rungs import Rung
from search.trie import macs_alone, macs_shared
from supernet.arch import Arch
from supernet.data.arrays import ArraySource
from supernet.data.dataset import SplitImages
from supernet.data.sources import open_source
from supernet.evaluate import Evaluator
from supernet.model import Supernet
from supernet.recipe import load_recipe
from supernet.run import environment
from supernet.space import Space, load_space
from supernet.task import Classification
from supernet.train import train

SEED = 23
MEAN, STD = (0.45, 0.45, 0.45), (0.25, 0.25, 0.25)
RECIPE = {"batch_size": 128, "learning_rate": 0.02, "optimizer": "muon", "weight_decay": 0.05, "warmup_epochs": 1,
          "augment": {"flip": 0.5, "shift": 0.125}, "validate_epochs": 0}  # fmt: skip
Ratio = tuple[float, float, float]


@dataclass(frozen=True)
class Case:
    """A space at sizes where a child takes a fraction of a second; `stage` is the one whose neighbours are evaluated."""

    space: str
    sizes: tuple[int, ...]
    stage: str
    children: int
    batch: int
    images: int


CASES = (
    Case("attentivenas", (96, 112, 128, 144), "stage6", 24, 32, 64),
    Case("cifar-mbconv", (), "stage3", 24, 64, 128),
)


class Exact(Classification):
    """Keeps the cross entropy in double precision, to compare."""

    columns: ClassVar[Mapping[str, str]] = {"loss": "<f8"}

    def samples(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """`loss`, fp64."""
        return {"loss": F.cross_entropy(outputs.double(), targets, reduction="none")}


# --- clocks and statistics ---


def seconds(call: Callable[[], object], device: str) -> float:
    """CPU time of the process; on a GPU wall time with nothing left to do."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    gc.collect()
    start = clock()
    call()
    if device != "cpu":
        torch.cuda.synchronize()
    return clock() - start


def in_turns(calls: dict[str, Callable[[], object]], rounds: int, device: str) -> dict[str, np.ndarray]:
    """Seconds of every call, shape (rounds,), each round beginning with another; one round beforehand does not count."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for number in range(rounds + 1):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            taken[name].append(seconds(calls[name], device))
    return {name: np.array(times[1:]) for name, times in taken.items()}


def ratio(one: np.ndarray, other: np.ndarray) -> Ratio:
    """Median of the rounds' ratios and its 95 % interval (percentile bootstrap over rounds)."""
    ratios, rng = one / other, np.random.default_rng(SEED)
    medians = np.median(ratios[rng.integers(0, len(ratios), (4000, len(ratios)))], axis=1)
    low, high = np.percentile(medians, [2.5, 97.5])
    return float(np.median(ratios)), float(low), float(high)


def written(value: Sequence[float]) -> str:
    return f"{value[0]:.2f} (95 % {value[1]:.2f} to {value[2]:.2f})"


# --- prefixes ---


def random_images(name: str, count: int, size: int, seed: int) -> SplitImages:
    rng = np.random.default_rng([SEED, seed])
    pixels, labels = rng.integers(0, 256, (count, size, size, 3), dtype=np.uint8), np.arange(count) % 10
    source = ArraySource(name, [str(number) for number in range(10)], labels, [""] * count, pixels)
    return SplitImages(name, source, np.arange(count), 1.0, MEAN, STD)


def neighbours(space: Space, parent: Arch, stage: str, count: int) -> list[Arch]:
    """The child and others that differ from it within one stage."""
    rng, found = np.random.default_rng([SEED, 1]), {parent: None}
    own = [dimension for dimension in space.dimensions if dimension.name.startswith(f"{stage}.")]
    for _ in range(100 * count):
        if len(found) == count:
            break
        codes = {dimension.name: dimension.choices[rng.integers(len(dimension.choices))] for dimension in own}
        found[space.decode(space.encode([Arch(tuple((parent.as_dict() | codes).items()))]))[0]] = None
    return list(found)


def mutants(space: Space, count: int) -> list[Arch]:
    """Of four parents, each dimension changed with a probability of 0.05."""
    rng = np.random.default_rng([SEED, 2])
    parents = [space.sample(rng) for _ in range(4)]
    found = dict.fromkeys(parents)
    while len(found) < count:
        found[space.mutate(parents[len(found) % 4], rng, 0.05)] = None
    return list(found)


def prefixes(case: Case, device: str, rounds: int, quick: bool) -> dict[str, Any]:
    """Neighbours and mutants of a space with random weights: ideal and realised ratio."""
    space, batch, images = load_space(case.space, classes=10), case.batch, case.images
    if case.sizes:
        space = Space.from_definition({**space.definition, "resolution": list(case.sizes)})
    children = case.children // 2 if quick else case.children
    supernet = Supernet(space, seed=SEED).to(device)
    split = random_images("search_val", images, space.largest_resolution, 1)
    evaluator = Evaluator(supernet, Exact(), random_images("train", batch, space.largest_resolution, 2), batch, batch)
    parent = space.sample(np.random.default_rng([SEED, 0]))
    sets = {"local": neighbours(space, parent, case.stage, children), "mutation": mutants(space, children)}
    print(f"{case.space} at {list(case.sizes) or 'its'} pixels, {batch} images calibrate (in one batch), {images} are scored")
    row: dict[str, Any] = {"space": case.space, "sizes": case.sizes, "calibration_images": batch, "images": images}
    differences = []
    with mock.patch("supernet.evaluate.CALIBRATION_BATCH", batch), mock.patch("search.evaluate.CALIBRATION_BATCH", batch):
        for kind, archs in sets.items():
            found: dict[str, dict[Arch, Any]] = {}

            def alone(archs: list[Arch] = archs, found: dict[str, Any] = found) -> None:
                found["alone"] = {
                    arch: evaluator.samples(evaluator.calibrated(arch), space.resolution(arch), split) for arch in archs
                }

            def shared(archs: list[Arch] = archs, found: dict[str, Any] = found) -> None:
                found["shared"] = SharedEvaluator(evaluator, split, [Rung(images, batch)]).advance(archs, 0)

            taken = in_turns({"alone": alone, "shared": shared}, rounds, device)
            ideal, realised = macs_alone(space, archs) / macs_shared(space, archs), ratio(taken["alone"], taken["shared"])
            difference = max(np.abs(found["alone"][arch]["loss"] - found["shared"][arch]["loss"]).max() for arch in archs)
            differences.append(float(difference))
            per_child = {name: float(np.median(times) / len(archs) * 1e3) for name, times in taken.items()}
            print(f"    {kind}: {len(archs)} children, ideal {ideal:.2f}, realised {written(realised)}, {realised[0] / ideal:.0%} "
                  f"of it; a child {per_child['alone']:.0f} ms alone, {per_child['shared']:.0f} ms shared; "
                  f"losses differ by at most {difference:.1e}", flush=True)  # fmt: skip
            row |= {
                f"ideal_{kind}": ideal,
                f"realised_{kind}": realised,
                f"ms_{kind}": per_child,
                f"children_{kind}": len(archs),
            }
    return {**row, "max_abs_difference": max(differences)}


# --- the data pass ---


def data_pass(folder: Path, work: Work, device: str, rounds: int, quick: bool) -> dict[str, Any]:
    """Random children on JPEG files of flowers."""
    name, space, _ = data_and_space(str(folder), work.path, None)
    source = open_source(name)
    children, calibrating, scored = (6, 128, 256) if quick else (16, 256, 512)
    indices = np.random.default_rng(SEED).permutation(len(source))

    def split(name: str, start: int, stop: int) -> SplitImages:
        return SplitImages(name, source, indices[start:stop], 1.0, MEAN, STD)

    def evaluator() -> Evaluator:
        return Evaluator(supernet, Exact(), split("train", 0, calibrating), calibrating)

    supernet, rng = Supernet(space, seed=SEED).to(device), np.random.default_rng([SEED, 3])
    archs = list(dict.fromkeys(space.sample(rng) for _ in range(children)))

    def alone() -> None:
        for arch in archs:
            fresh = evaluator()
            fresh.samples(
                fresh.calibrated(arch), space.resolution(arch), split("search_val", calibrating, calibrating + scored)
            )

    def decoded_once() -> None:
        fresh, images = evaluator(), split("search_val", calibrating, calibrating + scored)
        for arch in archs:
            fresh.samples(fresh.calibrated(arch), space.resolution(arch), images)

    def shared() -> None:
        images = split("search_val", calibrating, calibrating + scored)
        SharedEvaluator(evaluator(), images, [Rung(scored, calibrating)]).advance(archs, 0)

    taken = in_turns({"alone": alone, "decoded_once": decoded_once, "shared": shared}, rounds, device)
    speedup, on_top = ratio(taken["alone"], taken["shared"]), ratio(taken["decoded_once"], taken["shared"])
    ideal = macs_alone(space, archs) / macs_shared(space, archs)
    print(f"flowers-160, {len(archs)} random children of {space.name}, {calibrating} images calibrate, {scored} are scored: "
          f"{written(speedup)} of each child with a data pass of its own; {written(on_top)} of each alone on images decoded once "
          f"(prefixes of these children: ideal {ideal:.2f})", flush=True)  # fmt: skip
    return {"children": len(archs), "speedup": speedup, "without_decoding": on_top, "ideal_prefixes": ideal}


# --- how many images calibrate ---


def calibrating(data: Path | None, work: Work, device: str, quick: bool) -> dict[str, Any]:
    """Accuracy of children of a trained supernet by the images that calibrate, against all training images."""
    name, space, changes = data_and_space(None if data is None else str(data), work.path, None)
    epochs, children, most = (2, 4, 500) if quick else (4, 12, 5000)
    recipe = load_recipe("digits", {**RECIPE, **changes, "epochs": epochs})
    run = work.run("calibrating", space, recipe, name)
    if not run.finished:
        train(run, device=device)
    split, whole = run.dataset.split("search_val"), run.evaluator(device)
    split = replace(split, indices=split.indices[:most], _cache={})
    rng = np.random.default_rng([SEED, 4])
    archs = list(dict.fromkeys([space.smallest, space.largest, *(space.sample(rng) for _ in range(children - 2))]))
    counts = [count for count in (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384) if count < len(whole.train)]
    top1: dict[int, np.ndarray] = {}
    for count in [*counts, min(16384, len(whole.train))]:
        batch = min(count, 256)
        with mock.patch("supernet.evaluate.CALIBRATION_BATCH", batch):
            one = replace(whole, calibration_images=count)
            top1[count] = np.array([one.evaluate(arch, split).mean() for arch in archs])
    last = top1.pop(max(top1))
    noise = float(np.mean(np.sqrt(last * (1 - last) / len(split))))
    print(f"{space.name} trained for {epochs} epochs on {name.rpartition('/')[2]}: top1 of {len(archs)} children "
          f"{last.min():.1%} to {last.max():.1%} on {len(split)} images, calibrated on {min(16384, len(whole.train))}; "
          f"standard error of one {noise:.2%}")  # fmt: skip
    rows = {}
    for count, found in top1.items():
        change = found - last
        tau = float(kendalltau(found, last).statistic)
        rows[count] = {
            "mean": float(change.mean()),
            "spread": float(change.std(ddof=1)),
            "most": float(np.abs(change).max()),
            "tau": tau,
        }
        print(f"    {count:6d} images: top1 differs by {change.mean():+.2%} on average, {change.std(ddof=1):.2%} from child to child, "
              f"at most {np.abs(change).max():.2%}; Kendall tau {tau:.3f}", flush=True)  # fmt: skip
    return {"space": space.name, "children": len(archs), "images": len(split), "standard_error": noise, "by_images": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--data", type=Path, nargs="*", default=[])
    parser.add_argument("--work", type=Path)
    parser.add_argument("--parts", nargs="*", default=["prefixes", "data", "calibrating"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    start, rounds = time.perf_counter(), 3 if args.quick else 9
    work = Work.at(args.work, "search-eval")
    flowers = next((folder for folder in args.data if (folder / "flowers-160.tar").exists()), None)
    cifar = next((folder for folder in args.data if (folder / "train-0.webp").exists()), None)
    cases = [prefixes(case, args.device, rounds, args.quick) for case in CASES] if "prefixes" in args.parts else []
    passed = data_pass(flowers, work, args.device, rounds, args.quick) if flowers and "data" in args.parts else None
    calibrated = calibrating(cifar, work, args.device, args.quick) if "calibrating" in args.parts else None
    versions = environment()
    first = cases[0] if cases else {}
    print(f"{time.perf_counter() - start:.0f} s; {versions['processor']}; torch {torch.__version__}; seed {SEED}")
    result = {
        "benchmark": "search_eval", "seed": SEED, "device": args.device, "quick": args.quick,
        **{key: first.get(key) for key in ("ideal_local", "realised_local", "ideal_mutation", "realised_mutation")},
        "speedup_unrelated": passed["speedup"] if passed else None,
        "max_abs_difference": max((case["max_abs_difference"] for case in cases), default=None),
        "cases": cases, "data_pass": passed, "calibrating": calibrated, "versions": versions.get("versions", versions),
    }  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
