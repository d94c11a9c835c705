"""Evolution: sorting and crowding are NSGA-II's (pymoo is the oracle), and breeding keeps to the space. See also test_strategies.py."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from search.budget import Budget
from search.feasible import Feasible
from search.strategies import Result
from search.strategies.evolution import Evolution, crowding_distances, fronts, has_effect, mutated
from supernet.costs import Costs
from supernet.space import load_space

SPACE = load_space("digits")
FEASIBLE = Feasible(SPACE, Costs(SPACE), ())
objectives = st.tuples(st.integers(1, 30), st.integers(1, 4)).flatmap(
    lambda shape: arrays(np.int64, shape, elements=st.integers(-4, 4))
)


@given(objectives)
def test_fronts_are_those_of_pymoo(losses: NDArray[np.int64]) -> None:
    sorting = pytest.importorskip("pymoo.util.nds.non_dominated_sorting")
    wanted = np.empty(len(losses), dtype=np.int64)
    for number, front in enumerate(sorting.NonDominatedSorting(method="naive_non_dominated_sort").do(losses.astype(float))):
        wanted[front] = number
    assert fronts(losses.astype(float)).tolist() == wanted.tolist()


@given(objectives)
def test_no_arch_of_a_front_dominates_another_and_each_is_dominated_from_the_front_before(losses: NDArray[np.int64]) -> None:
    rank = fronts(losses.astype(float))
    dominates = (losses[:, None] <= losses[None]).all(axis=2) & (losses[:, None] < losses[None]).any(axis=2)
    for one in range(len(losses)):
        before = [rank[other] for other in range(len(losses)) if dominates[other, one]]
        assert rank[one] == (max(before) + 1 if before else 0)


@given(st.integers(2, 3).flatmap(lambda columns: arrays(np.int64, st.tuples(st.integers(3, 20), st.just(columns)),
                                                       elements=st.integers(-50, 50), unique=True)))  # fmt: skip
def test_crowding_is_that_of_pymoo(losses: NDArray[np.int64]) -> None:
    metrics = pytest.importorskip("pymoo.operators.survival.rank_and_crowding.metrics")
    wanted = metrics.calc_crowding_distance(losses.astype(float), filter_out_duplicates=False)
    assert crowding_distances(losses.astype(float)) / losses.shape[1] == pytest.approx(wanted)  # pymoo takes the mean


def test_crowding_of_equal_archs_is_finite_but_at_the_ends() -> None:
    found = crowding_distances(np.zeros((4, 2)))
    assert sorted(found.tolist())[:2] == [0, 0] and not np.isnan(found).any()


@pytest.mark.parametrize("space", ["digits", "mlp", "cell", "cifar-vit"])
@pytest.mark.parametrize("rate", [0.0, 0.1, 1.0])
def test_mutants_are_of_the_space_and_differ(space: str, rate: float) -> None:
    made = load_space(space)
    before = made.sample_codes(300, np.random.default_rng(0))
    after = mutated(made, before, np.random.default_rng(1), rate)
    assert (after >= 0).all() and (after < [len(dimension.choices) for dimension in made.dimensions]).all()
    valid = made.valid(after)
    assert valid.mean() > 0.3
    changed = (made.canonical(after[valid]) != before[valid]).any(axis=1)
    assert changed.all() if space != "cell" else changed.mean() > 0.9
    if rate == 0:
        effective = has_effect(made, before)
        assert (((after != before) & effective).sum(axis=1) == 1).all()


def test_a_choice_without_effect_is_known_as_such() -> None:
    space = load_space("mlp")
    codes = space.canonical(space.sample_codes(50, np.random.default_rng(0)))
    depth = codes[:, [each.name for each in space.dimensions].index("depth")]
    found = has_effect(space, codes)
    for layer in range(1, 5):
        column = [each.name for each in space.dimensions].index(f"layer{layer}.width")
        assert found[:, column].tolist() == (depth + 1 >= layer).tolist()


def told(strategy: Evolution, count: int, decided: bool = True) -> None:
    asked = strategy.ask(count)
    scores = [int(proposal.arch.key, 16) / 16**12 for proposal in asked]
    strategy.tell([Result(proposal.arch, score, 100, decided) for proposal, score in zip(asked, scores, strict=True)])


def test_the_population_is_the_best_fronts_of_all_that_was_told() -> None:
    strategy = Evolution(SPACE, FEASIBLE, seed=0, population=10)
    for _ in range(8):
        told(strategy, 10)
    pool = strategy.pool
    losses = np.stack([-pool.scores, pool.costs], axis=1)
    rank = fronts(losses)
    worst = rank[strategy.population].max()
    assert len(strategy.population) == 10
    assert set(np.flatnonzero(rank < worst)) <= set(strategy.population)


def test_telling_thousands_at_once_leaves_a_whole_first_front() -> None:
    strategy = Evolution(SPACE, FEASIBLE, seed=0, population=40)
    archs = SPACE.decode(np.unique(SPACE.sample_codes(3000, np.random.default_rng(0)), axis=0))
    strategy.tell([Result(arch, int(arch.key, 16) / 16**12, 100) for arch in archs])
    losses = np.stack([-strategy.pool.scores, strategy.pool.costs], axis=1)
    front = [row for row, loss in enumerate(losses) if not ((losses <= loss).all(axis=1) & (losses < loss).any(axis=1)).any()]
    assert len(front) <= 40
    assert set(front) <= set(strategy.population.tolist())


def test_archs_that_lost_their_race_are_parents_only_where_there_are_no_others() -> None:
    strategy = Evolution(SPACE, FEASIBLE, seed=0, population=8)
    told(strategy, 8, decided=False)
    assert len(strategy.population) == 8
    for _ in range(4):
        told(strategy, 8)
    assert strategy.pool.decided[strategy.population].all()


def test_several_costs_at_once() -> None:
    strategy = Evolution(SPACE, FEASIBLE, seed=0, population=12, costs=["macs", "params"])
    for _ in range(6):
        told(strategy, 12)
    rows = np.arange(len(strategy.pool))
    table = FEASIBLE.table(strategy.pool.codes)
    losses = np.stack([-strategy.pool.scores, table["macs"], table["params"]], axis=1)
    rank = fronts(losses)[rows]
    assert set(np.flatnonzero(rank < rank[strategy.population].max())) <= set(strategy.population)


def test_archs_over_the_budget_are_no_parents() -> None:
    feasible = Feasible(SPACE, FEASIBLE.costs, (Budget("macs", 1e6),))
    strategy = Evolution(SPACE, feasible, seed=0)
    strategy.tell([Result(SPACE.largest, 1.0, 100), Result(SPACE.smallest, 0.1, 100)])
    assert SPACE.decode(strategy.pool.codes[strategy.population]) == [SPACE.smallest]


@pytest.mark.parametrize("rows", [None, "01", [-1], [99], [0.5], [True]])
def test_a_damaged_population_is_refused(rows: object) -> None:
    strategy = Evolution(SPACE, FEASIBLE, seed=0)
    told(strategy, 8)
    with pytest.raises(ValueError, match="population"):
        Evolution(SPACE, FEASIBLE, seed=0).load_state(json.loads(json.dumps({**strategy.state(), "population": rows})))
