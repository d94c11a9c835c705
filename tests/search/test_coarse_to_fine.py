"""The strategy: what it asks is new, within the space and the budgets, follows from the seed, and comes to an end."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search.budget import Budget
from search.feasible import Feasible
from search.strategies.coarse_to_fine import LEVELS, CoarseToFine, network_wide
from supernet.arch import Arch
from supernet.costs import Costs, arch_costs
from supernet.space import Space, load_space

SPACE = load_space("digits")
COSTS = Costs(SPACE)
MACS = [arch_costs(SPACE, arch)["macs"] for arch in (SPACE.smallest, SPACE.largest)]
Asked = list[tuple[str, Arch]]


def luck(arch: Arch) -> float:
    """A score that follows from the arch alone."""
    return int(arch.key, 16) / 16**12


def strategy(space: Space = SPACE, budgets: Sequence[Budget] = (), **settings_: Any) -> CoarseToFine:
    costs = COSTS if space is SPACE else Costs(space)
    return CoarseToFine(space, Feasible(space, costs, tuple(budgets)), **{"seed": 0, **settings_})


def played(made: CoarseToFine, score: Callable[[Arch], float] = luck, rounds: int = 200) -> list[Asked]:
    """All rounds of asking and telling until it asks for nothing."""
    found = []
    while asked := made.ask():
        found.append(asked)
        made.tell([(arch, score(arch)) for _, arch in asked])
        assert len(found) < rounds, "it does not end"
    return found


def flat(rounds: list[Asked]) -> list[Arch]:
    return [arch for asked in rounds for _, arch in asked]


@settings(max_examples=10, deadline=None)
@given(
    share=st.floats(0, 1), seed=st.integers(0, 2**31), coarse=st.integers(1, 30), fine=st.integers(0, 30), parents=st.integers(1, 6),
    batch=st.integers(1, 12), rate=st.floats(0.01, 1),
)  # fmt: skip
def test_what_is_asked_is_new_and_meets_the_budgets(
    share: float, seed: int, coarse: int, fine: int, parents: int, batch: int, rate: float
) -> None:
    budget = Budget("macs", MACS[0] + share * (MACS[1] - MACS[0]))
    made = strategy(
        budgets=[budget], seed=seed, coarse=coarse, fine=fine, parents=parents, batch=batch, mutation_rate=rate
    )  # fmt: skip
    rounds = played(made)
    archs = flat(rounds)
    assert len(set(archs)) == len(archs)
    assert all(SPACE.contains(arch) for arch in archs)
    assert rounds[0] == [("extremes", SPACE.smallest), ("extremes", SPACE.largest)]
    for stage, arch in itertools.chain(*rounds[1:]):
        assert stage in {"coarse", "fine"}
        assert arch_costs(SPACE, arch)["macs"] <= budget.bound
    stages = [stage for asked in rounds for stage, _ in asked]
    assert stages == sorted(stages, key=["extremes", "coarse", "fine"].index)
    assert stages.count("coarse") <= coarse and stages.count("fine") <= fine
    assert all(len(asked) <= batch for asked in rounds if asked[0][0] == "fine")


def test_a_loose_budget_gets_all_that_was_asked_for() -> None:
    stages = [stage for asked in played(strategy(coarse=20, fine=13, batch=5)) for stage, _ in asked]
    assert stages.count("coarse") >= 18  # the ends of the space may be among the 20
    assert stages.count("fine") == 13


@pytest.mark.parametrize("seed", [0, 1])
def test_told_the_same_it_asks_the_same(seed: int) -> None:
    budget = [Budget("macs", 8e5)]
    assert played(strategy(budgets=budget, seed=seed)) == played(strategy(budgets=budget, seed=seed))
    assert played(strategy(budgets=budget, seed=seed)) != played(strategy(budgets=budget, seed=seed + 1))


def test_what_it_is_told_decides_what_it_asks_next() -> None:
    assert flat(played(strategy())) != flat(played(strategy(), lambda arch: -luck(arch)))


def test_a_strategy_that_is_told_again_goes_on_where_it_was_killed() -> None:
    whole = played(strategy())
    for killed_after in range(len(whole)):
        made = strategy()
        for asked in whole[:killed_after]:
            assert made.ask() == asked
            made.tell([(arch, luck(arch)) for _, arch in asked])
        assert played(made) == whole[killed_after:]


def test_mutants_are_of_the_best() -> None:
    wanted = SPACE.largest.as_dict()

    def likeness(arch: Arch) -> float:
        return sum(arch[name] == choice for name, choice in wanted.items())

    rounds = played(strategy(fine=120, batch=10, parents=2), likeness)
    coarse = max(likeness(arch) for stage, arch in itertools.chain(*rounds[1:]) if stage == "coarse" and arch != SPACE.largest)
    fine = [likeness(arch) for stage, arch in itertools.chain(*rounds) if stage == "fine"]
    assert np.mean(fine) > coarse - 4
    assert max(fine) >= len(wanted) - 1


def test_half_of_the_skeletons_lie_next_to_the_budget() -> None:
    budget = Budget("macs", 1e6)
    grid = network_wide(SPACE, np.random.default_rng(0))
    within = np.sort([macs for macs in COSTS.macs(grid) if macs <= budget.bound])[::-1]
    (asked,) = [asked for asked in played(strategy(budgets=[budget], coarse=20, fine=0)) if asked[0][0] == "coarse"]
    macs = sorted((arch_costs(SPACE, arch)["macs"] for _, arch in asked), reverse=True)
    assert macs[:10] == within[:10].tolist()
    assert macs[-1] < 2 * within[-1]  # the smallest itself was asked for before


# --- few archs ---


@pytest.mark.parametrize(
    "changes", [{}, {"resolution": [12, 16]}, {"head": [16, 32]}, {"width": [8, 16], "depth": [1, 2]}, {"depth": [1, 2, 3]}]
)
@pytest.mark.parametrize("settings_", [{}, {"coarse": 1, "fine": 50, "batch": 1}, {"coarse": 50, "fine": 0}, {"parents": 50}])
def test_a_small_space_is_asked_for_whole_and_then_it_ends(
    small_space: Callable[..., Space], changes: dict[str, Any], settings_: dict[str, Any]
) -> None:
    space = small_space(**changes)
    archs = flat(played(strategy(space, **settings_)))
    assert len(set(archs)) == len(archs) <= space.size
    if settings_.get("fine", 24):
        assert len(archs) == space.size


@pytest.mark.parametrize("settings_", [{}, {"coarse": 1, "batch": 1}])
def test_a_budget_that_admits_only_the_smallest_asks_for_no_other(settings_: dict[str, Any]) -> None:
    made = strategy(budgets=[Budget("macs", MACS[0])], **settings_)
    assert played(made) == [[("extremes", SPACE.smallest), ("extremes", SPACE.largest)]]


def test_a_budget_that_admits_nothing_ends_after_the_ends_of_the_space() -> None:
    assert len(flat(played(strategy(budgets=[Budget("macs", 1)])))) == 2


def test_it_stays_ended() -> None:
    made = strategy(coarse=2, fine=2)
    played(made)
    assert [made.ask(), made.ask()] == [[], []]


# --- the grid ---


def test_the_grid_sets_each_kind_of_dimension_to_one_level_throughout() -> None:
    grid = network_wide(SPACE, np.random.default_rng(0))
    counts = [len(dimension.choices) for dimension in SPACE.dimensions]
    kinds = [dimension.name.rpartition(".")[2] for dimension in SPACE.dimensions]
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
