"""Strategies in spaces too large to list, where the truth is known: how far their best child is behind the best there is.

    python benchmarks/search_truth.py [--seeds 10] [--first-seed 10] [--children 64 256] [--quick]

The children are of real spaces with their real costs; what they would reach is made up: the logarithm of their macs, a preference
for each choice of each dimension and for each pair of choices of neighbouring dimensions, drawn anew for every seed and scaled so that
archs of the same macs spread by 0.6 points (a standard deviation). Whether an image is classified rightly depends on how hard it is,
the same for all children, and on chance. So scores are as noisy, and as alike between children, as those of networks; the engine,
its races and its rungs are the real ones (`search_replay.py`). The best there is comes from climbing on the truth itself from many
archs. Intervals: bootstrap over seeds and budgets. The last line is JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import time
from functools import cached_property, partial

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm
from search_cost import STRATEGIES, our_phases
from search_replay import replay

from search.budget import Budget
from search.feasible import Feasible
from search.rungs import rungs
from search.settings import SearchConfig
from search.strategies.pool import neighbours
from supernet.arch import Arch
from supernet.costs import Costs
from supernet.family import Codes
from supernet.run import environment
from supernet.space import Space, load_space

SPACES = ("attentivenas", "ofa-resnet50")
IMAGES, CALIBRATION = 5_000, 2_048
MIDDLE, SLOPE, SPREAD = 0.75, 0.04, 0.006
"""top1 of the middle of the space; what e times the macs add; how archs of the same macs differ."""
ALIKE = 0.9
"""Share of the variance over images that is the image's own: neighbouring children disagree on about every tenth image."""
SHARES = (0.25, 0.5, 0.75)
"""Budgets: so far, in logarithms, from the macs of the smallest child to those of the largest."""


class Truth:
    """What every child of a space does on every image, from a seed (`search_replay.Answers`)."""

    def __init__(self, space: Space, seed: int) -> None:
        self.space, self.seed, self.costs = space, seed, Costs(space)
        rng = np.random.default_rng([seed, 7])
        counts = [len(dimension.choices) for dimension in space.dimensions]
        self.alone = [rng.normal(size=count) for count in counts]
        self.pairs = [rng.normal(size=(one, other)) / 2 for one, other in itertools.pairwise(counts)]
        self.hard = rng.normal(size=IMAGES)
        some = Feasible(space, self.costs, (), None).sample(2_000, rng)
        logs, wanted = np.log(self.costs.macs(some)), self._preference(some)
        slope, offset = np.polyfit(logs, wanted, 1)
        self._middle, self._line = float(logs.mean()), (float(slope), float(offset))
        self._spread = float((wanted - slope * logs - offset).std())

    def _preference(self, codes: Codes) -> NDArray[np.float64]:
        columns = codes.T
        alone = sum(table[column] for table, column in zip(self.alone, columns, strict=True))
        return alone + sum(table[one, other] for table, one, other in zip(self.pairs, columns[:-1], columns[1:], strict=True))

    def top1(self, codes: Codes) -> NDArray[np.float64]:
        """What archs reach on infinitely many images, shape (archs,)."""
        logs = np.log(self.costs.macs(codes))
        own = (self._preference(codes) - self._line[0] * logs - self._line[1]) / self._spread
        return np.asarray(MIDDLE + SLOPE * (logs - self._middle) + SPREAD * own)

    def right_of(self, arch: Arch) -> NDArray[np.bool_]:
        """Which of `IMAGES` images, bools."""
        reached = float(self.top1(self.space.encode([arch]))[0])
        chance = np.random.default_rng([self.seed, int(arch.key, 16)]).normal(size=IMAGES)
        return np.asarray(ALIKE**0.5 * self.hard + (1 - ALIKE) ** 0.5 * chance < norm.ppf(reached))

    @cached_property
    def bounds(self) -> list[float]:
        """Macs of the budgets."""
        ends = np.log(self.costs.macs(self.space.encode([self.space.smallest, self.space.largest])).astype(float))
        return [float(np.exp(ends[0] + share * (ends[1] - ends[0]))) for share in SHARES]

    def best(self, bound: float) -> float:
        """top1 of the best arch within a budget that climbing finds, from 24 archs, by one dimension at a time."""
        feasible = Feasible(self.space, self.costs, (Budget("macs", bound),), None)
        found = feasible.sample(4_000, np.random.default_rng(self.seed))
        found = found[np.argsort(-self.top1(found))[:24]]
        ends = []
        for code in found:
            while True:
                near = self.space.canonical(neighbours(self.space, code))
                near = near[feasible.mask(near)]
                reached = self.top1(near)
                if reached.max() <= self.top1(code[None])[0]:
                    break
                code = near[reached.argmax()]  # noqa: PLW2901
            ends.append(float(self.top1(code[None])[0]))
        return max(ends)


def behind(truth: Truth, bound: float, best: float, strategy: str, children: int, seed: int) -> tuple[float, int]:
    """Points of top1 by which a search's best child within one budget misses the best; and the image-forwards spent."""
    usual = SearchConfig()
    steps = rungs(IMAGES, CALIBRATION, first=usual.first_rung, factor=usual.rung_factor)
    phases = partial(our_phases, seed, strategy, children, 0, 0)
    done = replay(truth, steps, phases, budgets=(Budget("macs", bound),))[-1]
    codes = truth.space.encode(done.whole)
    inside = [arch for arch, macs in zip(done.whole, truth.costs.macs(codes), strict=True) if macs <= bound]
    chosen = max(inside, key=lambda arch: float(truth.right_of(arch).mean()))
    return 100 * (best - float(truth.top1(truth.space.encode([chosen]))[0])), done.image_forwards


def interval(values: list[float]) -> tuple[float, float, float]:
    """Mean with its 95 % bootstrap interval."""
    drawn = np.random.default_rng(0).choice(values, (2_000, len(values))).mean(axis=1)
    return float(np.mean(values)), float(np.quantile(drawn, 0.025)), float(np.quantile(drawn, 0.975))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first-seed", type=int, default=10, help="nothing was chosen by looking at seeds of 10 and more")
    parser.add_argument("--children", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--spaces", nargs="+", default=list(SPACES))
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES))
    parser.add_argument("--quick", action="store_true", help="two seeds, one space, 64 children, four strategies")
    given = parser.parse_args()
    if given.quick:
        given.seeds, given.children, given.spaces, given.strategies = 2, [64], given.spaces[:1], given.strategies[:4]
    here, start, rows = environment(), time.process_time(), {}
    print(f"{here['processor']}, {given.seeds} seeds from {given.first_seed} on, three budgets each, {IMAGES} images")
    for name in given.spaces:
        space = load_space(name)
        truths = [Truth(space, seed) for seed in range(given.first_seed, given.first_seed + given.seeds)]
        cases = [(truth, bound, truth.best(bound)) for truth in truths for bound in truth.bounds]
        print(f"\n{name}: points of top1 behind the best, of the truth (mean, 95 %); image-forwards")
        for children in given.children:
            for strategy in given.strategies:
                found = [behind(truth, bound, best, strategy, children, truth.seed) for truth, bound, best in cases]
                middle, low, high = interval([points for points, _ in found])
                forwards = float(np.mean([images for _, images in found]))
                rows[f"{name} {children} {strategy}"] = {"behind": middle, "low": low, "high": high, "image_forwards": forwards}
                print(
                    f"{children:>5} children  {strategy:<16} {middle:.2f} ({low:.2f} to {high:.2f}) {forwards:>10,.0f}",
                    flush=True,
                )
    print(f"\n{time.process_time() - start:.0f} s of CPU time")
    print(json.dumps({"benchmark": "search_truth", "seeds": given.seeds, "rows": rows}))


if __name__ == "__main__":
    main()
