"""Which children learn at a step: a pure function of the seed and the step, so that ranks and resumed runs agree."""

from __future__ import annotations

import numpy as np

from supernet.arch import Arch
from supernet.space import Space


def step_rng(seed: int, step: int) -> np.random.Generator:
    """The generator of one step."""
    return np.random.default_rng([seed, step])


def sandwich(space: Space, children: int, rng: np.random.Generator) -> list[tuple[str, Arch]]:
    """Role and arch of each child: the largest (it teaches, so it comes first), the smallest, then random ones.

    The sandwich rule (Yu & Huang 2019; BigNAS uses two random children). Two children are largest and smallest, one the largest.
    Where choices have no order (operations, activations), the random children take turns, so that each choice gets trained.
    """
    chosen = [("largest", space.largest), ("smallest", space.smallest)][:children]
    return [*chosen, *(("random", arch) for arch in space.sample_apart(max(0, children - 2), rng))]
