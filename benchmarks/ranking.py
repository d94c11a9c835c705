"""Does the supernet rank children as training each alone would? Kendall's tau-b and regret, overall and among children of equal cost.

    python benchmarks/ranking.py --data FOLDER [--work FOLDER] [--bands 3] [--in-band 4] [--epochs 12] [--seeds 2] [--quick]

FOLDER holds CIFAR-10 as grids, as `quality_cifar.py` takes it; without --data, scikit-learn's digits. The children lie in narrow bands
of macs (drawn at random within +-3 %), for a rank over all sizes says little that macs do not say. One supernet scores every child
(calibrated, search-val); every child is trained alone with the same images, crops, order and epochs, at one rate, and scored on the
same images. Seeds of the networks alone differ in initial values and order; their tau with each other is the most that can be hoped
for. Every finished piece lies in --work and is not done again. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch

import numpy as np
import torch
from numpy.typing import NDArray
from quality_cifar import RECIPE, batches_of, train_alone, train_supernet
from quality_data import Piece, Work, data_and_space

from supernet import config
from supernet.arch import Arch
from supernet.costs import Costs, arch_costs
from supernet.data.batches import Batch
from supernet.device import keep_memory
from supernet.errors import InputError
from supernet.recipe import TrainConfig
from supernet.run import Run, environment
from supernet.space import Space

REACH, DRAWN, RESAMPLES = 0.03, 4, 2000
Floats = NDArray[np.float64]
Interval = tuple[float, float, float]
"""A figure and the ends of its 95 % interval."""


def bands_of_children(space: Space, bands: int, in_band: int) -> list[list[Arch]]:
    """For each of `bands` costs, evenly spread over the logarithm of macs, `in_band` random children of that cost +-`REACH`.

    A smaller number of up to `DRAWN` in a band gives the first of a larger one.
    """
    rng, costs = np.random.default_rng(11), Costs(space)
    codes = np.unique(space.canonical(space.sample_codes(6000, rng)), axis=0)
    macs = costs.macs(codes)
    ends = [arch_costs(space, arch)["macs"] for arch in (space.smallest, space.largest)]
    chosen = []
    for wanted in np.geomspace(ends[0], ends[1], bands + 2)[1:-1]:
        off, drawn = np.abs(macs / wanted - 1), max(DRAWN, in_band)
        near = np.flatnonzero(off <= max(REACH, float(np.sort(off)[drawn - 1])))
        chosen.append(space.decode(codes[rng.choice(near, drawn, replace=False)[:in_band]]))
    return chosen


# --- pieces -----------------------------------------------------------------------------------------------------------------------


def supernet_piece(work: Work, run: Run, archs: Sequence[Arch]) -> tuple[dict[str, Any], NDArray[np.bool_]]:
    """Train the supernet and score every child on search-val; figures, and bits of shape (children, images)."""
    figures, _ = work.piece("supernet-trained", lambda: (train_supernet(run), {}))
    evaluator, split = run.evaluator(), run.dataset.split("search_val")
    scored = [work.piece(f"child-{a.key}", lambda a=a: ({}, {"bits": evaluator.evaluate(a, split)}))[1] for a in archs]  # type: ignore[misc]
    return figures, np.stack([arrays["bits"] for arrays in scored])


class Alone:
    """Networks trained alone on the batches of one seed, which are made once."""

    def __init__(self, work: Work, run: Run, rate: float) -> None:
        self.work, self.run, self.rate = work, run, rate * run.recipe.learning_rate
        self.batches: list[Batch] | None = None

    def piece(self, arch: Arch) -> tuple[dict[str, Any], NDArray[np.bool_]]:
        """Train one network alone and score it on search-val; figures, and bits of shape (images,)."""

        def compute() -> Piece:
            run, own = self.run, batches_of(self.run)
            self.batches = self.batches or list(own.batches(0, run.recipe.epochs * own.steps_per_epoch))
            network, figures = train_alone(run, arch, self.rate, self.batches)
            bits = run.evaluator().scores(network, run.space.resolution(arch), run.dataset.split("search_val"))
            print(f"  alone, seed {run.recipe.seed}, {arch_costs(run.space, arch)['macs']:,} macs: {bits.mean():.2%} of search-val, "
                  f"{figures['cpu_seconds']:.0f} CPU s", flush=True)  # fmt: skip
            return figures, {"bits": bits}

        figures, arrays = self.work.piece(f"alone-{self.run.recipe.seed}-{arch.key}", compute)
        return figures, arrays["bits"]


# --- statistics -------------------------------------------------------------------------------------------------------------------


def tau_b(one: Floats, other: Floats, pairs: NDArray[np.bool_]) -> float:
    """Kendall's tau-b of two lists of n scores, over the pairs of a symmetric mask (n, n); NaN where a list has only ties."""
    first, second = (np.sign(values[:, None] - values[None])[pairs] for values in (one, other))
    untied = np.sqrt(float(np.count_nonzero(first)) * float(np.count_nonzero(second)))
    return float((first * second).sum() / untied) if untied else float("nan")


def taus(one: Floats, other: Floats, band: NDArray[np.int64], rng: np.random.Generator) -> dict[str, Interval]:
    """Tau over all pairs and over the pairs within bands; `one` and `other`: scores of shape (children, images).

    Percentile bootstrap over images, the same for both, and over the children of each band.
    """
    everyone, images = np.arange(len(band)), one.shape[1]
    drawn: dict[str, list[float]] = {"all": [], "in_band": []}
    for resample in range(RESAMPLES + 1):
        children, weights = everyone, np.ones(images)
        if resample:
            children = np.concatenate(
                [rng.choice(own, len(own)) for own in (everyone[band == each] for each in np.unique(band))]
            )
            weights = rng.multinomial(images, weights / images).astype(float)
        first, second = (one @ weights)[children], (other @ weights)[children]
        same = band[children][:, None] == band[children][None]
        drawn["all"].append(tau_b(first, second, np.ones_like(same)))
        drawn["in_band"].append(tau_b(first, second, same))
    return {name: (found[0], *map(float, np.nanpercentile(found[1:], [2.5, 97.5]))) for name, found in drawn.items()}  # type: ignore[misc]


def regret(scores: Floats, alone: Floats, groups: Sequence[NDArray[np.int64]]) -> Interval:
    """Accuracy alone of the best alone less that of the child with the highest score, mean over groups; interval over images.

    Of accuracies alone that are noisy the best is overrated, so this errs on the high side.
    """
    lost = np.zeros(alone.shape[1])
    for own in groups:
        best, taken = own[alone[own].mean(1).argmax()], own[scores[own].argmax()]
        lost += (alone[best] - alone[taken]) / len(groups)
    reach = 1.96 * float(lost.std(ddof=1)) / len(lost) ** 0.5
    return float(lost.mean()), float(lost.mean()) - reach, float(lost.mean()) + reach


def statistics(shared: Floats, alone: Floats, macs: Floats, band: NDArray[np.int64]) -> dict[str, Any]:
    """All figures; `shared`: (children, images), `alone`: (seeds, children, images)."""
    rng, truth = np.random.default_rng(0), alone.mean(0)
    bands = [np.flatnonzero(band == each) for each in np.unique(band)]
    everyone, same = [np.arange(len(band))], band[:, None] == band[None]
    found: dict[str, Any] = {"supernet": taus(shared, truth, band, rng)}
    found["macs"] = {name: tau_b(macs, truth.mean(1), mask) for name, mask in (("all", np.ones_like(same)), ("in_band", same))}
    if len(alone) > 1:
        found["two seeds alone"] = taus(alone[0], alone[1], band, rng)
        found["supernet, one seed alone"] = [taus(shared, own, band, rng) for own in alone]
    found["regret"] = {
        "supernet": {"all": regret(shared.mean(1), truth, everyone), "in_band": regret(shared.mean(1), truth, bands)},
        "macs": {"all": regret(macs, truth, everyone), "in_band": regret(macs, truth, bands)},
        "at random, expected": {
            name: float(np.mean([truth[own].mean(1).max() - truth[own].mean() for own in groups]))
            for name, groups in (("all", everyone), ("in_band", bands))
        },
    }
    if len(alone) > 1:  # judged by one seed, chosen by the other one or by the supernet
        for name, choosers in (
            ("the other seed, judged by one", alone[::-1]),
            ("supernet, judged by one seed", (shared, shared)),
        ):
            found["regret"][name] = {
                where: float(np.mean([regret(c.mean(1), judge, groups)[0] for c, judge in zip(choosers, alone, strict=False)]))
                for where, groups in (("all", everyone), ("in_band", bands))
            }
    return found


# --- the table --------------------------------------------------------------------------------------------------------------------


def printed(value: Any, percent: bool = False) -> str:
    """A figure, with its interval where it has one."""
    one = "{:.2%}" if percent else "{:+.2f}"
    if isinstance(value, tuple | list):
        return f"{one.format(value[0])} ({one.format(value[1])} to {one.format(value[2])})"
    return one.format(value)


def show(rows: Sequence[dict[str, Any]], found: dict[str, Any]) -> None:
    """Print the children and the figures."""
    print(f"\nband {'macs':>10}  pixels  supernet  alone, of each seed")
    for row in rows:
        alone = "  ".join(f"{top1:.2%}" for top1 in row["alone_top1"])
        print(f"{row['band']:4} {row['macs']:10,}  {row['resolution']:6}  {row['supernet_top1']:8.2%}  {alone}")
    print(f"\n{'Kendall tau-b with networks trained alone (mean of seeds)':58} {'all pairs':26} within bands")
    for name in ("supernet", "macs", "two seeds alone"):
        if name in found:
            print(f"  {name:56} {printed(found[name]['all']):26} {printed(found[name]['in_band'])}")
    for number, each in enumerate(found.get("supernet, one seed alone", [])):
        print(f"  {f'supernet, against seed {number} only':56} {printed(each['all']):26} {printed(each['in_band'])}")
    print(f"\n{'Regret, in points of accuracy alone, when chosen by':58} {'of all':26} mean of the bands")
    for name, each in found["regret"].items():
        print(f"  {name:56} {printed(each['all'], True):26} {printed(each['in_band'], True)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="folder with CIFAR-10 grids or flowers-160.tar; digits where left out")
    parser.add_argument("--work", type=Path, help="folder of finished pieces; a fresh one where left out")
    parser.add_argument("--bands", type=int, default=3)
    parser.add_argument("--in-band", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--train-images", type=int, default=10_000)
    parser.add_argument("--rate", type=float, default=2.0, help="networks alone: multiple of the recipe's rate")
    parser.add_argument("--seeds", type=int, default=1, help="of the networks alone")
    parser.add_argument("--quick", action="store_true", help="the same work, smaller")
    given = parser.parse_args()
    if given.quick:
        given.bands, given.in_band, given.epochs, given.seeds = 2, 3, 2, 2
    here, start = environment(), time.monotonic()
    torch.set_num_threads(1)
    keep_memory()
    work = Work.at(given.work, "ranking")
    data, space, changes = data_and_space(given.data, work.path / "data", given.train_images)
    recipe = config.parse(TrainConfig, RECIPE | changes | {"epochs": given.epochs}, "recipe")
    try:
        work.only_of([recipe.model_dump(mode="json"), space.key, given.bands, given.rate, given.train_images])
    except InputError as error:
        parser.error(str(error))
    bands = bands_of_children(space, given.bands, given.in_band)
    archs, band = [arch for own in bands for arch in own], np.repeat(np.arange(given.bands), given.in_band)
    print(f"{space.name}: {space.size:,} networks, {len(archs)} of them also alone; recipe {json.dumps(RECIPE | changes)}, but "
          f"{given.epochs} epochs; rate alone {given.rate * recipe.learning_rate:g}")  # fmt: skip
    print(
        f"{here['processor']}, {here['cores']} cores; torch {here['versions']['torch']}, timm {here['versions']['timm']}",
        flush=True,
    )

    run = work.run("supernet", space, recipe, data)
    figures, shared = supernet_piece(work, run, archs)
    alone, spent = [], {"supernet": figures["cpu_seconds"], "alone": 0.0}
    for seed in range(given.seeds):  # of initial values and order; the images are divided by the run, so alike
        trained = Alone(work, replace(run, recipe=recipe.model_copy(update={"seed": seed})), given.rate)
        for arch in (
            arch for of_each_band in zip(*bands, strict=True) for arch in of_each_band
        ):  # a part of a run has all bands
            trained.piece(arch)
        pieces = [trained.piece(arch) for arch in archs]
        alone.append(np.stack([bits for _, bits in pieces]))
        spent["alone"] += sum(each["cpu_seconds"] for each, _ in pieces)
    macs = np.array([arch_costs(space, arch)["macs"] for arch in archs], float)
    one, other = shared.astype(float), np.stack(alone).astype(float)
    found = statistics(one, other, macs, band)
    rows = [{"band": int(band[n]), "macs": int(macs[n]), "resolution": space.resolution(arch), "arch": arch.as_dict(),
             "supernet_top1": float(one[n].mean()), "alone_top1": other[:, n].mean(1).tolist()}
            for n, arch in enumerate(archs)]  # fmt: skip
    show(rows, found)
    print(f"\n{one.shape[1]:,} search-val images; CPU seconds: {json.dumps({k: round(v) for k, v in spent.items()})}; "
          f"this start {time.monotonic() - start:.0f} s")  # fmt: skip
    tau, in_band, lost = found["supernet"]["all"], found["supernet"]["in_band"], found["regret"]["supernet"]
    print(json.dumps({
        "benchmark": "ranking", "data": space.name, "quick": given.quick, "tau": tau[0], "tau_low": tau[1], "tau_high": tau[2],
        "tau_in_band": in_band[0], "tau_in_band_low": in_band[1], "tau_in_band_high": in_band[2], "regret": lost["all"][0],
        "regret_in_band": lost["in_band"][0], "all": found, "children": rows, "cpu_seconds": spent, "seeds": given.seeds,
        "epochs": given.epochs, "versions": here["versions"],
    }))  # fmt: skip


if __name__ == "__main__":
    main()
