"""What a space can reach: ways from its smallest arch to its largest, moves towards budgets, and budgets that no child can meet.

Costs are known in closed form, so thousands of archs are looked at in the time that one evaluation takes; nothing here is repeated
until it succeeds, every search has a fixed number of rounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from search.budget import MEASURED, Budget, foretold
from supernet.costs import Costs, arch_costs
from supernet.errors import InputError
from supernet.family import Codes
from supernet.space import Space

if TYPE_CHECKING:
    from search.feasible import Feasible

SMALL = 20_000
"""Combinations of choices that are all looked at; where there are more, some are drawn."""
HALVINGS = 9
"""Of a way, to find where a bound begins or ceases to hold."""
STARTS = 256
ROUNDS = 60
"""Archs that are moved towards budgets in search of one that meets them all, and how often each is moved."""

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Ways:
    """Ways from the smallest arch through a random one to the largest. Choices only grow on them, and so do the costs.

    A place on a way is a number from 0 (the smallest) through 1 (the random arch) to 2 (the largest). Every dimension grows within a
    random part of either half, so that ways through one arch differ too. (Choices without an order change once in either half.)
    """

    stops: Codes
    """Shape (3, ways, dimensions)."""
    begin: Floats
    end: Floats
    """Where in either half each dimension grows, shape (2, ways, dimensions)."""
    ordered: Bools

    @classmethod
    def draw(cls, space: Space, count: int, rng: np.random.Generator) -> Ways:
        """`count` random ways."""
        ends = space.encode([space.smallest, space.largest])
        through = space.sample_codes(count, rng)
        stops = np.stack([np.broadcast_to(ends[0], through.shape), through, np.broadcast_to(ends[1], through.shape)])
        between = np.sort(rng.random((2, 2, *through.shape)), axis=0)
        ordered = np.array([dimension.ordered for dimension in space.dimensions])
        return cls(stops, between[0], np.maximum(between[1], between[0] + 1e-6), ordered)

    def at(self, places: Floats) -> Codes:
        """The archs at one place of every way, shape (ways, dimensions); they may be no networks where choices have no order."""
        codes: Codes = self.stops[0]
        for half in (0, 1):
            grown = ((places[:, None] - half - self.begin[half]) / (self.end[half] - self.begin[half])).clip(0, 1)
            grown = np.where(self.ordered, grown, grown >= 0.5)
            codes = codes + np.floor(grown * (self.stops[half + 1] - self.stops[half]) + 0.5).astype(np.int64)
        return codes

    def edge(self, meets: Callable[[Codes], Bools], inside: float, outside: float) -> Floats:
        """The last place, from `inside` on towards `outside`, at which the arch of each way `meets`, shape (ways,).

        It is `inside` where none does.
        """
        holds, fails = (np.full(self.stops.shape[1], place) for place in (inside, outside))
        holds = np.where(meets(self.at(fails)), fails, holds)
        for _ in range(HALVINGS):
            middle = (holds + fails) / 2
            there = meets(self.at(middle))
            holds, fails = np.where(there, middle, holds), np.where(there, fails, middle)
        return holds


def every_code(space: Space) -> Codes | None:
    """All combinations of choices, networks or not, shape (archs, dimensions); None where there are more than `SMALL`."""
    counts = [len(dimension.choices) for dimension in space.dimensions]
    return np.indices(counts).reshape(len(counts), -1).T if math.prod(counts) <= SMALL else None


def excess(costs: Iterable[tuple[Budget, Floats]]) -> Floats:
    """How far archs are outside of budgets: the ratio of cost and bound, as a logarithm, summed over the budgets; 0 where all hold."""
    total: Floats = np.zeros(1)
    for budget, values in costs:
        beyond = (np.log(np.maximum(values, 1e-12)) - math.log(budget.bound)) * (-1 if budget.lower else 1)
        holds = values >= budget.bound if budget.lower else values <= budget.bound
        total = total + np.where(holds, 0.0, np.maximum(beyond, 1e-12))
    return total


def walk(
    space: Space, outside: Callable[[Codes], Floats], codes: Codes, rng: np.random.Generator, rounds: int = ROUNDS
) -> Iterator[tuple[Codes, Floats]]:
    """Move archs at random, never further outside; gives them and how far `outside` they are, first where they start.

    What is inside wanders about in there. Shapes (archs, dimensions) and (archs,).
    """
    here, far = codes, outside(codes)
    yield here, far
    for _ in range(rounds):
        there = _moved(space, here, rng)
        then = outside(there)
        better = then <= far
        here, far = np.where(better[:, None], there, here), np.where(better, then, far)
        yield here, far


def _moved(space: Space, codes: Codes, rng: np.random.Generator) -> Codes:
    """Another choice, the next or the one before where they have an order, in one to three dimensions of each arch."""
    counts = np.array([len(dimension.choices) for dimension in space.dimensions])
    ordered = np.array([dimension.ordered for dimension in space.dimensions])
    order = rng.random(codes.shape) + (counts == 1)  # those that cannot change come last
    most = np.partition(order, min(2, codes.shape[1] - 1), axis=1)[:, : min(3, codes.shape[1])]
    moves = rng.integers(most.shape[1], size=len(codes))
    chosen = order <= np.sort(most, axis=1)[np.arange(len(codes)), moves][:, None]
    by_one = np.clip(codes + rng.choice([-1, 1], size=codes.shape), 0, counts - 1)
    return np.where(chosen, np.where(ordered, by_one, rng.integers(counts, size=codes.shape)), codes)


def refuse_impossible(
    space: Space,
    budgets: Sequence[Budget],
    smallest_latency_ms: Mapping[str | None, float] | float | None = None,
    feasible: Feasible | None = None,
) -> None:
    """Raise `InputError` with the nearest reachable values where no child meets the budgets.

    One bound alone is decided exactly: no arch costs less than the smallest, and none more than the largest in the costs that
    `Family.bounded` names (a test holds this for every family). Whether lower and upper bounds can be met together is searched for,
    which is no proof, and said so. Latencies count once they are known: `smallest_latency_ms` is the measured upper end of the
    smallest child by target (a number: of the default one), the models of `feasible` predict those of all others.
    """
    measured: Mapping[str | None, float | None] = (
        smallest_latency_ms if isinstance(smallest_latency_ms, Mapping) else {None: smallest_latency_ms}
    )
    least, most = (arch_costs(space, arch) for arch in (space.smallest, space.largest))
    budgets = foretold(budgets)  # of what a child weighs, `search.weights` says whether it can be
    for budget in budgets:
        least_here = measured.get(budget.target) if budget.metric in MEASURED else least[budget.metric]
        if not budget.lower and least_here is not None and not budget.holds(least_here):
            raise InputError(f"no child of the space {space.name} meets {budget}: the smallest reachable {budget.column} is "
                             f"{_shown(budget, least_here)}: raise the budget or choose a smaller space")  # fmt: skip
        if budget.lower and budget.metric in space.family.bounded and not budget.holds(most[budget.metric]):
            raise InputError(f"no child of the space {space.name} meets {budget}: the largest reachable {budget.column} is "
                             f"{_shown(budget, most[budget.metric])}: lower the budget or choose a larger space")  # fmt: skip
    known = [budget for budget in budgets if budget.metric in least or (feasible and budget.target in feasible.models)]
    met_by_largest = all(budget.metric in most and budget.holds(most[budget.metric]) for budget in known)
    if any(budget.lower for budget in known) and not met_by_largest:
        _refuse_conflict(space, known, feasible)


def _refuse_conflict(space: Space, budgets: Sequence[Budget], feasible: Feasible | None) -> None:
    """Search for an arch that meets all budgets; raise `InputError` with the nearest where there is none."""
    from search.feasible import Feasible  # it builds upon this module

    here = Feasible(space, feasible.costs if feasible else Costs(space), tuple(budgets), feasible.models if feasible else None)
    rng, everything = np.random.default_rng([0, 5]), every_code(space)
    starts = here.near(Ways.draw(space, STARTS, rng), rng) if everything is None else everything
    nearest, far, seen = space.encode([space.smallest])[0], np.inf, 0
    for codes, outside in walk(space, here.outside, starts, rng, ROUNDS if everything is None else 0):
        seen += len(codes)
        best = int(outside.argmin())
        if outside[best] == 0:
            return
        if outside[best] < far:
            nearest, far = codes[best], outside[best]
    columns = dict.fromkeys(budget.column for budget in budgets)
    table = here.table(nearest[None])
    costs = [f"{column} {_shown(next(b for b in budgets if b.column == column), table[column][0])}" for column in columns]
    how = f"of {seen:,} looked at, no proof" if everything is None else "of all"
    raise InputError(f"no child of the space {space.name} found that meets {' and '.join(map(str, budgets))}: the nearest has "
                     f"{' and '.join(costs)} ({how}): move the bounds to there")  # fmt: skip


def _shown(budget: Budget, value: float) -> str:
    return f"{value:.4g}" if budget.metric in MEASURED else f"{value:.0f}"
