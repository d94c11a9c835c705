"""What a search costs: macs of calibration and evaluation until its front is within 1 % of the best known.

    python benchmarks/search_cost.py [--table FILE] [--seeds 20] [--quick]

Replayed over a table of 2,048 children of a trained supernet, each scored once on 4,000 images (`quality_cifar.py --table`), with the
engine as it is (`search_replay.py`). Rival: the procedure that the field uses, an evolution (population 100, as in OFA's published
code; over score and macs at once, so that one run gives a front) in which every candidate is calibrated by itself on 8,192 training
images and scored on all images; it may stop after any 25 children. Ours is the shipped search with 20 zones, asked for more and more
children; what it hands out are the children scored on all images. Done is who has 99 % of the hypervolume (top1 over the logarithm of
macs) of the whole table, above guessing. Measured above the worst child instead, 1 % are 0.04 points of top1, a twentieth of what
4,000 images can tell apart: what is reached there is told too. Then the strategies at an equal number of children: the best child
within three budgets, searched for on half of the images and scored on the other half (the best score of many on the same images is
mostly luck). Intervals: bootstrap over seeds. The last line is JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch

import numpy as np
from search_replay import Step, Table, interval, replay

from search.budget import Budget
from search.engine import Phase
from search.feasible import Feasible
from search.rungs import Rung, rungs
from search.settings import SearchConfig
from search.strategies.registry import make
from search.wanted import caps
from supernet.run import environment

FIELD_CALIBRATION, POPULATION, FIELD_BATCH, MOST = 8_192, 100, 25, 2_000
STRATEGIES = ("random", "predicted", "coarse_to_fine", "evolution", "local", "optuna:tpe", "optuna:nsgaii", "reinforce", "mcts")
ZONES, GOAL = 20, 0.99
CHILDREN = (16, 32, 48, 64, 80, 96, 112, 128, 160, 192, 256, 384, 512)
"""How many our search is asked for, until it is done."""


def field_phases(seed: int, feasible: Feasible) -> Sequence[Phase]:
    """Evolution alone."""
    options = {"population": POPULATION, "greed": 0.0}
    return [Phase("evolution", lambda _: make("evolution", feasible.space, feasible, seed=seed, **options), MOST)]


def our_phases(seed: int, strategy: str, evaluations: int, polish: int, random: int, feasible: Feasible) -> Sequence[Phase]:
    """As a search runs them."""
    space = feasible.space
    return [
        Phase("random", lambda _: make("random", space, feasible, seed=seed), random),
        Phase(strategy, lambda _: make(strategy, space, feasible, seed=seed), evaluations),
        Phase("polish", lambda starts: make("local", space, feasible, seed=seed, starts=starts), polish, whole=True),
    ]


def zones_of(count: int, seed: int, feasible: Feasible) -> Sequence[tuple[Budget, ...]]:
    """The whole range, and bounds within it."""
    return [(), *((cap,) for cap in caps(feasible, count, np.random.default_rng([seed, 3])))]


def field(table: Table, seed: int, worst: float) -> Step:
    """The field's procedure, until it is done."""
    alone = (Rung(table.right.shape[1], FIELD_CALIBRATION),)
    return replay(table, alone, partial(field_phases, seed), batch=FIELD_BATCH, shared=False,
                  until=lambda step: table.hypervolume(step.whole, worst) >= GOAL)[-1]  # fmt: skip


def ours(table: Table, steps: Sequence[Rung], seed: int, worst: float, strategy: str, sizes: Sequence[int]) -> Step:
    """The smallest of our searches that is done; the largest where none is."""
    usual = SearchConfig()
    for children in sizes:
        phases = partial(our_phases, seed, strategy, children, 0, usual.random)
        done = replay(table, steps, phases, zones=partial(zones_of, ZONES, seed), batch=usual.batch)[-1]
        if table.hypervolume(done.whole, worst) >= GOAL:
            break
    return done


def bill(
    table: Table, seeds: int, strategy: str, worst: float, say: Callable[[str], None], sizes: Sequence[int] = CHILDREN
) -> dict[str, float]:
    """Macs of both until they are done, seed by seed."""
    images, usual = table.right.shape[1], SearchConfig()
    steps = rungs(images, table.calibration_images, first=usual.first_rung, factor=usual.rung_factor)
    plain = (Rung(images, table.calibration_images),)
    found = [(field(table, seed, worst), ours(table, steps, seed, worst, strategy, sizes),
              ours(table, plain, seed, worst, strategy, sizes)) for seed in range(seeds)]  # fmt: skip
    say(f"\n{strategy}; hypervolume above top1 {worst:.3f}: macs until 99 % of the best known (median of {seeds} seeds, 95 %)")
    for name, column in (("field", 0), ("ours", 1), ("ours without races", 2)):
        each = [row[column] for row in found]
        reached = [table.hypervolume(step.whole, worst) for step in each]
        middle, low, high = interval([step.macs for step in each])
        children, whole = np.median([step.evaluated for step in each]), np.median([len(step.whole) for step in each])
        say(f"{name:<19} {middle:.3g} ({low:.3g} to {high:.3g}), {children:.0f} children, {whole:.0f} on all images, "
            f"{sum(part >= GOAL for part in reached)} of {seeds} done (the least reached {min(reached):.3f})")  # fmt: skip
    ratio, low, high = interval([row[0].macs / row[1].macs for row in found])
    say(f"field / ours: {ratio:.1f} ({low:.1f} to {high:.1f})")
    done = sum(table.hypervolume(row[1].whole, worst) >= GOAL for row in found) / seeds
    return {"ratio": ratio, "low": low, "high": high, "done": done}


def strategies(
    table: Table, seeds: int, evaluations: int, names: Sequence[str], say: Callable[[str], None]
) -> dict[str, dict[str, float]]:
    """Each strategy at an equal number of children, searching on half of the images: top1 of its best child on the other half."""
    usual, half = SearchConfig(), table.images // 2
    seen, unseen = replace(table, right=table.right[:, :half]), table.right[:, half:].mean(axis=1)
    steps = rungs(half, table.calibration_images, first=usual.first_rung, factor=usual.rung_factor)
    bounds = np.quantile(table.macs, (0.2, 0.5, 0.8))
    limits = ", ".join(f"{bound / 1e6:.2f} M" for bound in bounds)
    all_ = np.mean([unseen[max(np.flatnonzero(table.macs <= bound), key=lambda row: seen.top1[row])] for bound in bounds])
    say(
        f"\n{evaluations} children each, three budgets ({limits} macs), {seeds} seeds; searched on {half} images, scored on the others"
    )
    say(f"(all children of the space evaluated, the best on the {half} images taken: {all_:.2%})")
    say(f"{'strategy':<16} {'top1 on other images':>30} {'image-forwards':>15} {'children/s, strategy and race':>30}")
    found: dict[str, dict[str, float]] = {}
    for name in names:
        reached, forwards, rates = [], [], []
        for seed, bound in itertools.product(range(seeds), bounds):
            start = time.process_time()
            phases = partial(our_phases, seed, name, evaluations, 0, 0)
            done = replay(seen, steps, phases, budgets=(Budget("macs", float(bound)),))[-1]
            seconds = time.process_time() - start
            inside = [row for arch in done.whole if table.macs[row := table.place[arch]] <= bound]
            reached.append(unseen[max(inside, key=lambda row: seen.top1[row])])
            forwards.append(done.image_forwards)
            rates.append(done.evaluated / seconds)
        by_seed = np.reshape(reached, (seeds, len(bounds))).mean(axis=1)
        drawn = np.random.default_rng(0).choice(by_seed, (2000, seeds)).mean(axis=1)
        middle, low, high = float(by_seed.mean()), float(np.quantile(drawn, 0.025)), float(np.quantile(drawn, 0.975))
        found[name] = {"top1": middle, "low": low, "high": high, "image_forwards": float(np.mean(forwards)),
                       "children_per_s": float(np.median(rates))}  # fmt: skip
        say(f"{name:<16} {f'{middle:.2%} ({low:.2%} to {high:.2%})':>30} {np.mean(forwards):>15,.0f} {np.median(rates):>30.0f}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, default=Path(__file__).parent / "results" / "cifar_table.npz")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--strategy", default=SearchConfig().strategy, help="of the bill")
    parser.add_argument("--quick", action="store_true", help="two seeds, three strategies, nothing above the worst child")
    given = parser.parse_args()
    seeds = 2 if given.quick else given.seeds
    table, here = Table.read(given.table), environment()
    print(
        f"{here['processor']}, torch {here['versions']['torch']}; {len(table.archs)} children, {table.right.shape[1]} images, "
        f"{seeds} seeds"
    )
    start = time.process_time()
    guessing = bill(table, seeds, given.strategy, 0.1, print)
    paper = bill(table, seeds, "coarse_to_fine", 0.1, print)
    strict = None if given.quick else bill(table, min(seeds, 3), given.strategy, float(table.top1.min()), print, (128, 512))
    names = STRATEGIES[:3] if given.quick else STRATEGIES
    rows = strategies(table, min(seeds, 5), 64 if given.quick else 128, names, print)
    print(f"\n{time.process_time() - start:.0f} s of CPU time")
    print(
        json.dumps(
            {
                "bill_ratio": guessing["ratio"],
                "bill_ratio_low": guessing["low"],
                "bill_ratio_high": guessing["high"],
                "bill_done": guessing["done"],
                "coarse_to_fine": paper,
                "above_worst": strict,
                "strategies": rows,
            }
        )
    )


if __name__ == "__main__":
    main()
