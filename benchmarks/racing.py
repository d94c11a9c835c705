"""Racing against scoring every child on all images: forwards saved, and whether the final child is as good.

    python benchmarks/racing.py [--quick]

A search here is a number of batches of children that compete below one budget; the best child scored on all images so far leads,
and the last 32 so scored are references. A child costs the images that it is scored and calibrated on.

* synthetic: children with known true accuracies (standard deviation 1 point), 5,000 images whose difficulty all children share
  (8 % of the images discordant), calibration on 8,192 images.
* replay: 2,048 children of a trained supernet (`results/cifar_table.npz`) on 4,000 held-out images, in a random order of the images
  for every search; the children lie within 10 to 30 % below one of five budgets, in random order, in batches of 8, 16 or 32.
  The final child is tested against the winner on all images (one-sided exact McNemar test, 5 %).
* winner planted: the replay once more, with one child that on all images is significantly ahead (1 to 1.4 times the least such
  lead) of the best other one, in the last batch; the others are within three times that lead. How often is it dropped? This is what
  `Race.alpha` promises.

The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

from search.racing import Race
from search.rungs import Rung, calibration_spent, rungs
from search.statistics import significantly_worse
from supernet.run import environment

TABLE = Path(__file__).parent / "results" / "cifar_table.npz"
QUANTILES = (0.15, 0.3, 0.5, 0.8, 0.95)
REFERENCES = 32


@dataclass(frozen=True)
class Outcome:
    """A search: images forwarded if all children are scored on all and by the race, and the final children."""

    full_forwards: int
    forwards: int
    final: int
    winner: int
    lowest: list[int]
    """Children that ended on each rung."""


def raced(bits: NDArray[np.bool_], order: Sequence[int], batch: int, steps: tuple[Rung, ...], race: Race | None) -> Outcome:
    """Children (rows of `bits`) in this order; without a race by successive halving: the best quarter goes on."""
    leader, decided, forwards, ended = -1, list[int](), 0, [0] * len(steps)
    for start in range(0, len(order), batch):
        group = [int(child) for child in order[start : start + batch]]
        if race is None:
            reached = halved(bits, group, steps)
        else:
            outcome = race.run(  # children stand for archs
                group, np.ones((len(group), 1), dtype=bool), [None if leader < 0 else bits[leader]],
                lambda archs, rung: {child: bits[child][: steps[rung].images] for child in archs},
                references=[bits[child] for child in decided[-REFERENCES:]],
            )  # fmt: skip
            reached = {child: one.rung for child, one in outcome.items()}
        for rung in reached.values():
            forwards += steps[rung].images + calibration_spent(steps, rung)
            ended[rung] += 1
        decided += [child for child, rung in reached.items() if rung == len(steps) - 1]
        leader = max(decided, key=lambda child: bits[child].mean())
    winner = max(order, key=lambda child: bits[child].mean())
    full = len(order) * (steps[-1].images + steps[-1].calibration_images)
    return Outcome(full, forwards, leader, int(winner), ended)


def halved(bits: NDArray[np.bool_], group: list[int], steps: tuple[Rung, ...]) -> dict[int, int]:
    reached, running = dict.fromkeys(group, 0), group
    for rung in range(1, len(steps)):
        means = {child: bits[child][: steps[rung - 1].images].mean() for child in running}
        running = sorted(running, key=lambda child: -means[child])[: math.ceil(len(running) / 4)]
        reached |= dict.fromkeys(running, rung)
    return reached


def summary(title: str, outcomes: Sequence[Outcome], losses: NDArray[np.float64], worse: NDArray[np.bool_]) -> dict[str, float]:
    """Prints a line and gives its figures; loss in points of accuracy, with the 95 % interval over searches."""
    ratios = np.array([one.full_forwards / one.forwards for one in outcomes])
    total = sum(one.full_forwards for one in outcomes) / sum(one.forwards for one in outcomes)
    ended = np.sum([one.lowest for one in outcomes], axis=0)
    mean, reach = float(losses.mean()), 1.96 * float(losses.std(ddof=1)) / math.sqrt(len(losses))
    same = float(np.mean([one.final == one.winner for one in outcomes]))
    print(
        f"{title:42} {total:5.2f}x fewer forwards ({np.quantile(ratios, 0.05):.2f} to {np.quantile(ratios, 0.95):.2f}); "
        f"final child: the same {same:.0%}, not significantly worse {1 - worse.mean():.0%}, "
        f"loss {mean:.3f} points ({mean - reach:.3f} to {mean + reach:.3f}); ended on rungs {(ended / ended.sum()).round(3)}",
        flush=True,
    )
    return {
        "ratio": total,
        "not_worse": float(1 - worse.mean()),
        "same": same,
        "loss": mean,
        "low": mean - reach,
        "high": mean + reach,
    }


def synthetic(seeds: int, race_alpha: float | None) -> dict[str, float]:
    steps = rungs(5000, 8192)
    outcomes, losses, worse = [], [], []
    for seed in range(seeds):
        rng = np.random.default_rng([seed, 1])
        true = 0.7 + 0.01 * rng.standard_normal(160)
        ease = norm.ppf(true)[:, None] + math.sqrt(0.959) * rng.standard_normal(5000)
        bits = ease + math.sqrt(0.041) * rng.standard_normal((160, 5000)) > 0
        outcomes.append(raced(bits, range(160), 16, steps, race_alpha and Race(steps, race_alpha)))
        final, winner = outcomes[-1].final, outcomes[-1].winner
        losses.append(100 * (true[winner] - true[final]))
        worse.append(significantly_worse(bits[final], bits[winner]))
    name = f"race, alpha {race_alpha}" if race_alpha else "successive halving"
    return summary(f"synthetic: {name}", outcomes, np.array(losses), np.array(worse))


@dataclass(frozen=True)
class Table:
    """Children of a trained supernet: right or wrong on each image (children, images), and macs."""

    bits: NDArray[np.bool_]
    macs: NDArray[np.int64]

    @classmethod
    def read(cls) -> Table:
        """The committed one."""
        with np.load(TABLE, allow_pickle=False) as table:
            images = int(table["images"])
            return cls(np.unpackbits(table["packed"], axis=1, count=images).astype(bool), table["macs"])

    def replay(self, seeds: int, calibration: int, race_alpha: float | None) -> dict[str, float]:
        """Searches over children that were really trained."""
        steps = rungs(self.bits.shape[1], calibration)
        outcomes, losses, worse = [], [], []
        for seed in range(seeds):
            rng = np.random.default_rng([seed, 2])
            budget = np.quantile(self.macs, QUANTILES[seed % len(QUANTILES)])
            floor = budget * rng.choice([0.7, 0.8, 0.9])
            order = rng.permutation(np.flatnonzero((self.macs > floor) & (self.macs <= budget)))[:160]
            bits = self.bits[:, rng.permutation(self.bits.shape[1])]
            outcomes.append(raced(bits, order, int(rng.choice([8, 16, 32])), steps, race_alpha and Race(steps, race_alpha)))
            final, winner = bits[outcomes[-1].final], bits[outcomes[-1].winner]
            losses.append(100 * (winner.mean() - final.mean()))
            worse.append(significantly_worse(final, winner))
        name = f"race, alpha {race_alpha}" if race_alpha else "successive halving"
        return summary(f"replay: {name}, calibration {calibration}", outcomes, np.array(losses), np.array(worse))

    def planted(self, seeds: int, race_alpha: float | None) -> float:
        """Share of searches in which a child is dropped that on all images is significantly ahead of all others."""
        steps, dropped = rungs(self.bits.shape[1], 1024), 0
        means = self.bits.mean(1)
        for seed in range(seeds):
            rng = np.random.default_rng([seed, 3])
            order = np.empty(0, np.int64)
            while len(order) < 48:
                winner = int(rng.integers(len(means)))
                ahead, discordant = means[winner] - means, (self.bits != self.bits[winner]).mean(1)
                least = norm.isf(0.025) * np.sqrt(np.maximum(discordant - ahead**2, 1e-9) / self.bits.shape[1])
                others = np.flatnonzero((ahead > least) & (ahead < 3 * least))
                if (ahead[others] < 1.4 * least[others]).any() and len(others) >= 47:
                    order = np.append(rng.choice(others, 47, replace=False), winner)
            order[32:] = rng.permutation(order[32:])
            bits = self.bits[:, rng.permutation(self.bits.shape[1])]
            dropped += raced(bits, order, 16, steps, race_alpha and Race(steps, race_alpha)).final != winner
        name = f"race, alpha {race_alpha}" if race_alpha else "successive halving"
        share, reach = dropped / seeds, 1.96 * math.sqrt(max(dropped, 1) * (seeds - dropped)) / seeds**1.5
        print(f"{f'winner planted: {name}':42} dropped in {share:.1%} of {seeds} searches (+- {reach:.1%})", flush=True)
        return share


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the default alpha only")
    given = parser.parse_args()
    usual, table = Race(rungs(4000, 1024)).alpha, Table.read()
    alphas = [usual] if given.quick else [usual, 0.02, 0.05, 0.2, None]
    made, replayed, other, dropped = {}, {}, {}, {}
    for alpha in alphas:
        made[alpha] = synthetic(100, alpha)
        replayed[alpha] = table.replay(100, 1024, alpha)
        other[alpha] = table.replay(100, 8192, alpha)
        dropped[alpha] = table.planted(200 if given.quick else 400, alpha)
    here, found = environment(), replayed[usual]
    print(json.dumps({
        "benchmark": "racing", "alpha": usual, "seeds": 100,
        "forwards_ratio": round(found["ratio"], 3), "not_worse_fraction": found["not_worse"], "same_fraction": found["same"],
        "mean_loss_points": round(found["loss"], 4), "mean_loss_points_low": round(found["low"], 4),
        "mean_loss_points_high": round(found["high"], 4), "forwards_ratio_calibration_8192": round(other[usual]["ratio"], 3),
        "forwards_ratio_synthetic": round(made[usual]["ratio"], 3), "not_worse_fraction_synthetic": made[usual]["not_worse"],
        "mean_loss_points_synthetic": round(made[usual]["loss"], 4), "planted_winner_dropped": dropped[usual],
        "processor": here["processor"], "versions": here["versions"],
    }))  # fmt: skip


if __name__ == "__main__":
    main()
