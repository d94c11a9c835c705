"""Coarse to fine: the grid, what of it is asked for, the zones, and groups that change one stage. See also test_strategies.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from search.budget import Budget
from search.feasible import Feasible
from search.strategies import Proposal, Result
from search.strategies.coarse_to_fine import LEVELS, CoarseToFine, kind_of, network_wide
from supernet.arch import Arch
from supernet.costs import Costs, arch_costs
from supernet.space import Space, load_space

SPACE = load_space("digits")
COSTS = Costs(SPACE)
WIDE = load_space("cifar-mbconv")
WIDE_COSTS = Costs(WIDE)


def luck(arch: Arch) -> float:
    """A score that follows from the arch alone."""
    return int(arch.key, 16) / 16**12


def strategy(space: Space = SPACE, budgets: tuple[Budget, ...] = (), **settings_: Any) -> CoarseToFine:
    costs = COSTS if space is SPACE else WIDE_COSTS
    return CoarseToFine(space, Feasible(space, costs, budgets), **{"seed": 0, **settings_})


def played(
    made: CoarseToFine, asks: int, count: int = 8, score: Callable[[Arch], float] = luck
) -> list[list[Proposal]]:  # fmt: skip
    found = []
    for _ in range(asks):
        found.append(made.ask(count))
        made.tell([Result(proposal.arch, score(proposal.arch), 100) for proposal in found[-1]])
    return found


def of_stage(rounds: list[list[Proposal]], stage: str) -> list[Arch]:
    return [proposal.arch for asked in rounds for proposal in asked if proposal.stage == stage]


def differing(one: Arch, other: Arch) -> set[str]:
    return {name for name, choice in one if other[name] != choice}


# --- coarse ---


def test_first_the_ends_of_the_space_then_skeletons_then_mutants() -> None:
    rounds = played(strategy(coarse=20), 10)
    stages = [proposal.stage for asked in rounds for proposal in asked]
    assert stages == sorted(stages, key=["extremes", "coarse", "fine"].index)
    assert of_stage(rounds, "extremes") == [SPACE.smallest, SPACE.largest]
    assert 18 <= stages.count("coarse") <= 20  # the ends of the space may be among the 20
    grid = set(SPACE.decode(network_wide(SPACE, np.random.default_rng(0))))
    assert set(of_stage(rounds, "coarse")) <= grid


def test_an_end_over_the_budget_is_not_asked_for() -> None:
    rounds = played(strategy(budgets=(Budget("macs", 1e6),)), 3)
    assert of_stage(rounds, "extremes") == [SPACE.smallest]


def test_half_of_the_skeletons_lie_next_to_the_budget() -> None:
    budget = Budget("macs", 1e6)
    grid = network_wide(SPACE, np.random.default_rng(0))
    within = np.sort([macs for macs in COSTS.macs(grid) if macs <= budget.bound])[::-1]
    asked = of_stage(played(strategy(budgets=(budget,), coarse=20), 5), "coarse")
    macs = sorted((arch_costs(SPACE, arch)["macs"] for arch in asked), reverse=True)
    assert macs[:10] == within[:10].tolist()
    assert macs[-1] < 2 * within[-1]  # the smallest itself was asked for before


def test_of_several_budgets_each_has_skeletons_next_to_it() -> None:
    budgets = (Budget("macs", 1e6), Budget("params", 3e4))
    feasible = Feasible(SPACE, COSTS, budgets)
    grid = network_wide(SPACE, np.random.default_rng(0))
    grid = grid[feasible.mask(grid)]
    asked = set(of_stage(played(strategy(budgets=budgets, coarse=20), 5), "coarse"))
    for cost in (COSTS.macs, COSTS.params):
        nearest = SPACE.decode(grid[np.argsort(-cost(grid), kind="stable")[:5]])
        assert set(nearest) <= asked


def test_skeletons_that_are_known_are_not_asked_for_again() -> None:
    whole = of_stage(played(strategy(), 6), "coarse")
    made = strategy()
    made.tell([Result(arch, luck(arch), 100) for arch in whole[:10]])
    assert of_stage(played(made, 6), "coarse") == whole[10:]


# --- fine ---


def test_a_group_changes_one_stage_and_at_most_one_dimension_more() -> None:
    """Two mutants of a group differ in one stage only; all of a group differ from a known arch in that and one dimension."""
    made = strategy(WIDE, (Budget("macs", 6e6),), group=8)
    known = [proposal.arch for asked in played(made, 5) for proposal in asked]
    for _ in range(12):
        asked = [proposal.arch for proposal in made.ask(8)]
        groups: list[list[Arch]] = []
        for arch in asked:  # groups follow one another; a new one begins where the stage is another
            together = [differing(arch, other) for other in (groups[-1] if groups else [])]
            if together and len({name.rpartition(".")[0] for names in together for name in names}) == 1:
                groups[-1].append(arch)
            else:
                groups.append([arch])
        assert len(groups) <= 4
        for group in groups:
            for arch in group:
                stages = min(
                    (differing(arch, other) for other in known),
                    key=lambda names: len({name.rpartition(".")[0] for name in names}),
                )
                assert len({name.rpartition(".")[0] for name in stages}) <= 2
        known += asked
        made.tell([Result(arch, luck(arch), 100) for arch in asked])


def test_later_stages_come_more_often() -> None:
    made = strategy(WIDE)
    played(made, 5)
    chosen: list[int] = []
    variants = made._variants

    def spied(parent: Any, stage: Any, rng: Any) -> Any:
        chosen.append(int(stage[-1]))
        return variants(parent, stage, rng)

    made._variants = spied  # type: ignore[method-assign]
    parents, rng = made._parents(), np.random.default_rng(0)
    for _ in range(300):
        made._group(parents, 8, rng)
    middle = len(WIDE.dimensions) / 2
    assert sum(column > middle for column in chosen) > 1.5 * sum(column <= middle for column in chosen)


def test_mutants_are_of_the_best() -> None:
    wanted = SPACE.largest.as_dict()

    def likeness(arch: Arch) -> float:
        return sum(arch[name] == choice for name, choice in wanted.items())

    rounds = played(strategy(bands=1, zones=1, parents=1), 20, score=likeness)
    coarse = [likeness(arch) for arch in of_stage(rounds, "coarse")]
    fine = [likeness(arch) for arch in of_stage(rounds, "fine")]
    assert np.mean(fine) > np.mean(coarse) + 3
    assert max(fine) >= len(wanted) - 1


# --- zones ---


def zones_of(made: CoarseToFine) -> list[list[tuple[float, list[Arch]]]]:
    return [[(ceiling, SPACE.decode(made.pool.codes[rows])) for ceiling, rows in zones] for zones in made._parents()]


def test_each_ceiling_has_zones_that_share_out_what_lies_under_it() -> None:
    made = strategy(zones=3, bands=4)
    played(made, 12)
    archs, costs = SPACE.decode(made.pool.codes), made.pool.costs
    bands = zones_of(made)
    assert len(bands) == 4
    ceilings = [zones[0][0] for zones in bands]
    assert ceilings == sorted(ceilings, reverse=True) and ceilings[0] == np.inf
    for zones in bands:
        members = [arch for _, zone in zones for arch in zone]
        assert sorted(members, key=hash) == sorted(
            (arch for arch, cost in zip(archs, costs, strict=True) if cost <= zones[0][0]), key=hash
        )
        assert 2 <= len(zones) <= 3
        for _, zone in zones:
            assert [luck(arch) for arch in zone] == sorted(map(luck, zone), reverse=True)
        heads = [luck(zone[0]) for _, zone in zones]
        assert heads == sorted(heads, reverse=True)


def test_all_zones_have_their_turn_the_best_most_often() -> None:
    made = strategy(zones=3, bands=4)
    played(made, 12)
    bands = made._parents()
    turns = []
    for made.turn in range(120):
        zone = made._zone(bands)
        turns.append(
            next((band, place) for band, zones in enumerate(bands) for place, each in enumerate(zones) if each is zone)
        )
    counts = {each: turns.count(each) for each in turns}
    assert set(counts) == {(band, place) for band, zones in enumerate(bands) for place in range(len(zones))}
    assert sum(count for (band, _), count in counts.items() if band == 0) == 60
    for band in range(4):
        places = [counts[band, place] for place in range(len(bands[band]))]
        assert places[0] == max(places)


def test_parents_are_not_over_their_ceiling_and_neither_are_mutants() -> None:
    made = strategy(bands=3)
    played(made, 5)
    bands = made._parents()
    rng = np.random.default_rng(0)
    for turn in range(40):
        made.turn = turn
        ceiling, _ = made._zone(bands)
        mutants = made._group(bands, 8, rng)
        assert (made.feasible.main_cost(mutants) <= ceiling).all() if len(mutants) else True


# --- the grid ---


def test_the_grid_sets_each_kind_of_dimension_to_one_level_throughout() -> None:
    grid = network_wide(SPACE, np.random.default_rng(0))
    counts = [len(dimension.choices) for dimension in SPACE.dimensions]
    kinds = [kind_of(dimension.name) for dimension in SPACE.dimensions]
    assert len(np.unique(grid, axis=0)) == len(grid)
    assert (grid >= 0).all() and (grid < counts).all()
    for kind in set(kinds):
        columns = [column for column, name in enumerate(kinds) if name == kind and counts[column] > 1]
        heights = grid[:, columns] / (np.array([counts[column] for column in columns]) - 1)
        assert len(np.unique(heights.round(9), axis=0)) <= LEVELS
        for row in heights:
            assert row.max() - row.min() <= 0.5  # a level in the middle is rounded where there is no middle
    for end in (SPACE.smallest, SPACE.largest):
        assert (grid == SPACE.encode([end])).all(axis=1).any()


def test_a_grid_that_is_too_large_is_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    from search.strategies import coarse_to_fine

    monkeypatch.setattr(coarse_to_fine, "MOST_GRID", 10)
    grids = [network_wide(SPACE, np.random.default_rng(seed)) for seed in (0, 0, 1)]
    assert np.array_equal(grids[0], grids[1])
    assert not np.array_equal(grids[0], grids[2])
    assert 1 < len(grids[0]) <= 10
    assert (grids[0] < [len(dimension.choices) for dimension in SPACE.dimensions]).all()


def test_the_grid_of_a_single_arch_is_that_arch(small_space: Callable[..., Space]) -> None:
    assert network_wide(small_space(), np.random.default_rng(0)).tolist() == [[0] * len(small_space().dimensions)]
