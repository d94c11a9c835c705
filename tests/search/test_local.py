"""Local search: one step at a time, last stages first, up to where no step is better. See also test_strategies.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from search.budget import Budget
from search.feasible import Feasible
from search.strategies import Result
from search.strategies.local import COMPENSATIONS, Local
from search.strategies.pool import neighbours
from supernet.arch import Arch
from supernet.costs import Costs
from supernet.space import Space, load_space

SPACE = load_space("digits")
COSTS = Costs(SPACE)
LEAST, MOST = (float(macs) for macs in COSTS.macs(SPACE.encode([SPACE.smallest, SPACE.largest])))
LOOSE = Feasible(SPACE, COSTS, ())
TIGHT = Feasible(SPACE, COSTS, (Budget("macs", float(round((LEAST * MOST) ** 0.5))),))


def height(arch: Arch) -> float:
    """Larger is better, in every dimension alone."""
    return float(SPACE.encode([arch]).sum())


def climbed(strategy: Local, score: Callable[[Arch], float] = height, count: int = 8) -> dict[Arch, float]:
    """Score of all that it asked for, to its end."""
    found: dict[Arch, float] = {}
    for _ in range(500):
        asked = strategy.ask(count)
        if not asked:
            return found
        found |= {proposal.arch: score(proposal.arch) for proposal in asked}
        strategy.tell([Result(proposal.arch, found[proposal.arch], 100) for proposal in asked])
    raise AssertionError("it does not end")


def steps(one: Arch, other: Arch) -> int:
    return int((SPACE.encode([one]) != SPACE.encode([other])).sum())


def test_from_its_start_it_climbs_to_the_top_of_a_hill_without_valleys() -> None:
    found = climbed(Local(SPACE, LOOSE, seed=0, starts=[SPACE.smallest]))
    assert max(found, key=lambda arch: found[arch]) == SPACE.largest
    assert next(iter(found)) == SPACE.smallest


@pytest.mark.parametrize("feasible", [LOOSE, TIGHT])
@pytest.mark.parametrize("seed", range(3))
def test_at_its_end_no_neighbour_of_an_elite_is_unknown(feasible: Feasible, seed: int) -> None:
    score = lambda arch: int(arch.key, 16) / 16**12  # noqa: E731
    found = climbed(Local(SPACE, feasible, seed=seed, elites=3), score)
    for arch in sorted(found, key=lambda arch: -found[arch])[:3]:
        near = SPACE.canonical(neighbours(SPACE, SPACE.encode([arch])[0]))
        assert set(SPACE.decode(near[feasible.mask(near)])) <= set(found)


def test_every_ask_but_exchanges_is_one_step_from_a_known_arch() -> None:
    strategy = Local(SPACE, TIGHT, seed=0, starts=[SPACE.smallest])
    known = [proposal.arch for proposal in strategy.ask(8)]
    strategy.tell([Result(arch, height(arch), 100) for arch in known])
    for _ in range(30):
        asked = strategy.ask(4)
        for proposal in asked:
            nearest = min(steps(proposal.arch, arch) for arch in known)
            assert nearest == 1 if proposal.stage == "neighbour" else nearest <= 2
        known += [proposal.arch for proposal in asked]
        strategy.tell([Result(proposal.arch, height(proposal.arch), 100) for proposal in asked])


def test_the_last_stages_come_first() -> None:
    strategy = Local(SPACE, LOOSE, seed=0, starts=[SPACE.smallest])
    strategy.tell([Result(proposal.arch, 0.5, 100) for proposal in strategy.ask(8)])
    changed = [np.flatnonzero(code != SPACE.encode([SPACE.smallest])[0]).item()
               for code in SPACE.encode([proposal.arch for proposal in strategy.ask(100)])
               if (code != SPACE.encode([SPACE.smallest])[0]).any()]  # fmt: skip
    assert changed == sorted(changed, reverse=True)
    assert len(set(changed)) > 8


def test_it_moves_on_as_soon_as_a_neighbour_is_better() -> None:
    strategy = Local(SPACE, LOOSE, seed=0, starts=[SPACE.smallest])
    strategy.tell([Result(proposal.arch, 0.5, 100) for proposal in strategy.ask(8)])
    first = [proposal.arch for proposal in strategy.ask(2)]
    strategy.tell([Result(first[0], 0.6, 100), Result(first[1], 0.4, 100)])
    assert all(steps(proposal.arch, first[0]) == 1 for proposal in strategy.ask(4))


def test_an_arch_that_lost_its_race_is_no_place_to_move_to() -> None:
    strategy = Local(SPACE, LOOSE, seed=0, starts=[SPACE.smallest])
    strategy.tell([Result(proposal.arch, 0.5, 100) for proposal in strategy.ask(8)])
    first = [proposal.arch for proposal in strategy.ask(2)]
    strategy.tell([Result(first[0], 0.9, 10, decided=False), Result(first[1], 0.4, 100)])
    assert all(steps(proposal.arch, SPACE.smallest) == 1 for proposal in strategy.ask(4))


def test_one_of_two_moves_that_the_budget_allows_is_exchanged_for_the_better_one() -> None:
    """No single step leads from one to the other."""
    names = [dimension.name for dimension in SPACE.dimensions]
    one, other = names.index("stage3.width"), names.index("stage2.width")
    codes = np.repeat(SPACE.encode([SPACE.smallest]), 2, axis=0)
    codes[0, one], codes[1, other] = 1, 1
    start, goal = SPACE.decode(codes)
    feasible = Feasible(SPACE, COSTS, (Budget("macs", float(COSTS.macs(codes).max())),))
    strategy = Local(SPACE, feasible, seed=0, starts=[start], elites=1)
    found = climbed(strategy, lambda arch: {start: 0.5, goal: 0.9}.get(arch, 0.1))
    assert goal in found


def test_moves_over_the_budget_are_paid_for_by_a_second_one() -> None:
    strategy = Local(SPACE, TIGHT, seed=0, starts=[SPACE.smallest], elites=1)
    found = climbed(strategy)
    code = strategy.pool.codes[strategy.pool.ranked[0]]
    exchanges = strategy._exchanges(code, neighbours(SPACE, code))
    assert len(exchanges)
    assert TIGHT.mask(exchanges).all()
    assert ((exchanges != code).sum(axis=1) == 2).all()
    over = [row for row in neighbours(SPACE, code) if not TIGHT.mask(row[None])[0]]
    assert len(exchanges) <= COMPENSATIONS * len(over)
    assert set(SPACE.decode(exchanges)) <= set(found)


def test_without_starts_it_begins_at_random_within_the_budgets() -> None:
    strategy = Local(SPACE, TIGHT, seed=0, initial=10)
    asked = [*strategy.ask(6), *strategy.ask(6)]
    assert [proposal.stage for proposal in asked] == ["start"] * 10
    assert TIGHT.mask(SPACE.encode([proposal.arch for proposal in asked])).all()


def test_a_start_over_the_budget_is_left_out() -> None:
    strategy = Local(SPACE, TIGHT, seed=0, starts=[SPACE.largest, SPACE.smallest])
    assert [proposal.arch for proposal in strategy.ask(8)] == [SPACE.smallest]


@pytest.mark.parametrize("changes", [{}, {"resolution": [12, 16]}])
def test_neighbours_differ_in_one_dimension_and_are_all_there(
    small_space: Callable[..., Space], changes: dict[str, Any]
) -> None:
    for space in (small_space(**changes), SPACE):
        code = space.encode([space.largest])[0]
        near = neighbours(space, code)
        assert len(near) == sum(len(dimension.choices) - 1 for dimension in space.dimensions)
        assert ((near != code).sum(axis=1) == 1).all()
        assert len(np.unique(near, axis=0)) == len(near)
