"""Which children learn at a step: a pure function of the seed and the step, so that ranks and resumed runs agree."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import numpy as np

from supernet.arch import Arch
from supernet.costs import Costs
from supernet.errors import InputError
from supernet.space import Space

Rule = Literal["uniform", "best_up", "worst_up"]
POOL = 100_000
"""Archs that attentive sampling draws from: 3 MB of the space of AttentiveNAS. A run trains no others but the ends."""
POOL_STREAM = 11
"""Last word of the key of the pool's random stream, so that no other has the same key."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the random children are chosen. Raises `InputError` for numbers without a meaning.

    "uniform": every choice uniform. "best_up" and "worst_up" (AttentiveNAS, Wang et al. 2021, arXiv 2011.09011, section 3): of so many
    `candidates` of about equal macs the one with the lowest or the highest loss on the step's images. "About equal" is: in the same
    of `bins` bins of equal width between the smallest and the largest network.
    """

    rule: Rule = "uniform"
    candidates: int = 3
    bins: int = 64

    def __post_init__(self) -> None:
        if self.rule not in get_args(Rule):
            raise InputError(f"sampling.rule is one of {list(get_args(Rule))}, not {self.rule!r}")
        for name in ("candidates", "bins"):
            if getattr(self, name) < 1:
                raise InputError(f"sampling.{name} is at least 1, not {getattr(self, name)}")


def step_rng(seed: int, step: int) -> np.random.Generator:
    """The generator of one step."""
    return np.random.default_rng([seed, step])


def sandwich(space: Space, children: int, rng: np.random.Generator) -> list[tuple[str, Arch]]:
    """Role and arch of each child: the largest (it teaches, so it comes first), the smallest, then random ones.

    The sandwich rule (Yu & Huang 2019; BigNAS uses two random children). Two children are largest and smallest, one the largest.
    Where choices have no order (operations, activations), the random children take turns, so that each choice gets trained.
    """
    ends = _ends(space, children)
    return [*ends, *(("random", arch) for arch in space.sample_apart(children - len(ends), rng))]


def _ends(space: Space, children: int) -> list[tuple[str, Arch]]:
    return [("largest", space.largest), ("smallest", space.smallest)][:children]


class Bins:
    """A pool of random archs in bins of about equal macs, made once a run: a pure function of space, seed, `bins` and `pool`.

    The pool is drawn as random children are, so its histogram over the bins is the space's own. Raises `InputError` as
    `Space.sample_codes` does.
    """

    def __init__(self, space: Space, seed: int, bins: int = 64, pool: int = POOL) -> None:
        self.space = space
        drawn = space.sample_codes(pool, np.random.default_rng([seed, 0, 0, POOL_STREAM]))
        most = max(len(dimension.choices) for dimension in space.dimensions)
        rows = np.ascontiguousarray(drawn.astype(np.min_scalar_type(most)))
        whole = rows.view(np.dtype((np.void, rows.itemsize * rows.shape[1]))).ravel()  # a row as one value: sorted much faster
        _, first, counts = np.unique(whole, return_index=True, return_counts=True)
        codes = rows[first]
        costs = Costs(space)
        low, high = costs.macs(space.encode([space.smallest, space.largest])).tolist()
        bin_of = ((costs.macs(codes) - low) * bins // max(1, high - low)).clip(0, bins - 1)
        order = np.argsort(bin_of, kind="stable")
        self._codes, self._times = codes[order], counts[order]
        self._starts = np.searchsorted(bin_of[order], np.arange(bins + 1))
        self.histogram = np.bincount(bin_of, weights=counts, minlength=bins) / pool
        """Share of random archs in each bin, (bins,)."""

    def members(self, number: int) -> list[Arch]:
        """The different archs of the pool in one bin."""
        return self.space.decode(self._codes[self._starts[number] : self._starts[number + 1]])

    def candidates(self, count: int, rng: np.random.Generator) -> list[Arch]:
        """So many different archs of one bin, or all that it has; the bin is drawn from the histogram."""
        number = rng.choice(len(self.histogram), p=self.histogram)
        start, end = self._starts[number : number + 2]
        share = self._times[start:end] / self._times[start:end].sum()
        chosen = rng.choice(end - start, size=min(count, end - start), replace=False, p=share)
        return self.space.decode(self._codes[start + chosen])


class Sampler:
    """The children of every step: a pure function of `(seed, step)`.

    With `ends` they are those of `sandwich`, else all of them are random and the first one teaches. Under "uniform" choices without
    order take turns among a step's children; under the other rules they are drawn like any other. Raises `InputError` where there
    is no child.
    """

    def __init__(self, space: Space, children: int, sampling: Sampling, seed: int, *, ends: bool = True) -> None:
        if children < 1:
            raise InputError(f"children is at least 1, not {children}")
        self.space, self.sampling, self.seed = space, sampling, seed
        self.ends = _ends(space, children) if ends else []
        self.random = children - len(self.ends)

    @cached_property
    def bins(self) -> Bins:
        """What candidates are drawn from; not made unless asked for."""
        return Bins(self.space, self.seed, self.sampling.bins)

    def children(self, step: int) -> list[tuple[str, list[Arch]]]:
        """Role and candidates of each child, one of which is to learn (`pick`); the only one, except where the rule compares."""
        rng = step_rng(self.seed, step)
        if self.sampling.rule == "uniform":
            drawn = [[arch] for arch in self.space.sample_apart(self.random, rng)]
        else:
            drawn = [self.bins.candidates(self.sampling.candidates, rng) for _ in range(self.random)]
        return [*((role, [arch]) for role, arch in self.ends), *(("random", archs) for archs in drawn)]


def pick(candidates: Sequence[Arch], losses: Sequence[float], rule: Rule) -> Arch:
    """The candidate that learns: that of the lowest loss ("best_up") or the highest ("worst_up"), the first among equals.

    A loss that is no number counts as the highest. Ranks pick the same one only if they compare the same losses: take their mean
    first. A single candidate needs no loss; raises `ValueError` where there are others and not a loss for each.
    """
    if len(candidates) == 1:
        return candidates[0]
    if rule == "uniform" or not candidates or len(losses) != len(candidates):
        raise ValueError(f"{rule} cannot choose among {len(candidates)} candidates with {len(losses)} losses")
    ranked = [math.inf if math.isnan(loss) else loss for loss in losses]
    wanted = min(ranked) if rule == "best_up" else max(ranked)
    return candidates[ranked.index(wanted)]
