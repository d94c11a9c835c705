"""Which archs meet the budgets; and that impossible ones are named with what can be reached."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.latency import LatencyModel, profile
from search.budget import METRICS, Budget
from search.feasible import Feasible, refuse_impossible
from supernet.costs import Costs, arch_costs
from supernet.errors import InputError
from supernet.space import Space, load_space

SPACE = load_space("digits")
COSTS = Costs(SPACE)
CLOSED = [metric for metric in METRICS if metric != "latency_ms"]
ENDS = {metric: [arch_costs(SPACE, arch)[metric] for arch in (SPACE.smallest, SPACE.largest)] for metric in CLOSED}


@pytest.fixture
def model(fake_target: Any) -> LatencyModel:
    return profile(SPACE, fake_target(), children=12)


def some_archs(count: int = 200, seed: int = 0) -> Any:
    return np.concatenate(
        [SPACE.encode([SPACE.smallest, SPACE.largest]), SPACE.sample_codes(count, np.random.default_rng(seed))]
    )


def test_the_table_holds_the_costs_of_each_arch() -> None:
    codes = some_archs(20)
    table = Feasible(SPACE, COSTS, ()).table(codes)
    assert set(table) == set(CLOSED)
    for position, arch in enumerate(SPACE.decode(codes)):
        assert {metric: table[metric][position] for metric in CLOSED} == arch_costs(SPACE, arch)


@given(
    st.dictionaries(st.sampled_from(CLOSED), st.floats(0, 1), max_size=3),
    st.integers(0, 10),
)
def test_an_arch_is_admitted_when_every_cost_is_within_its_budget(shares: dict[str, float], seed: int) -> None:
    budgets = tuple(
        Budget(metric, max(1.0, ENDS[metric][0] + share * (ENDS[metric][1] - ENDS[metric][0])))
        for metric, share in shares.items()
    )
    feasible, codes = Feasible(SPACE, COSTS, budgets), some_archs(30, seed)
    mask = feasible.mask(codes)
    for meets, arch in zip(mask, SPACE.decode(codes), strict=True):
        costs = arch_costs(SPACE, arch)
        assert meets == all(costs[budget.metric] <= budget.bound for budget in budgets) == feasible.admits(arch)


@pytest.mark.parametrize("metric", CLOSED)
def test_a_cost_that_is_just_the_bound_is_within_it(metric: str) -> None:
    for arch in (SPACE.smallest, SPACE.largest):
        cost = arch_costs(SPACE, arch)[metric]
        assert Feasible(SPACE, COSTS, (Budget(metric, cost),)).admits(arch)
        assert not Feasible(SPACE, COSTS, (Budget(metric, cost - 0.5),)).admits(arch)


def test_a_predicted_latency_counts_with_its_upper_end(model: LatencyModel) -> None:
    cautious = replace(model, upper_factor=1.5)
    codes = some_archs()
    predicted = cautious.predict(COSTS.features(codes))
    bound = float(np.median(predicted))
    feasible = Feasible(SPACE, COSTS, (Budget("latency_ms", bound),), cautious)
    assert np.array_equal(feasible.mask(codes), predicted * 1.5 <= bound)
    assert np.array_equal(feasible.table(codes)["latency_ms"], predicted)  # the table itself is not inflated


def test_all_budgets_hold_at_once(model: LatencyModel) -> None:
    codes = some_archs()
    latency, params = Budget("latency_ms", 0.02), Budget("params", 4e4)
    both = Feasible(SPACE, COSTS, (latency, params), model).mask(codes)
    each = [Feasible(SPACE, COSTS, (budget,), model).mask(codes) for budget in (latency, params)]
    assert np.array_equal(both, each[0] & each[1])
    assert 0 < both.sum() < min(mask.sum() for mask in each)


def test_cheaper_means_the_metric_of_the_first_budget_or_macs(model: LatencyModel) -> None:
    codes = some_archs(5)
    for budgets, metric in (
        ((), "macs"),
        ((Budget("params", 1e5), Budget("macs", 1e6)), "params"),
        ((Budget("latency_ms", 1),), "latency_ms"),
    ):
        feasible = Feasible(SPACE, COSTS, budgets, model)
        assert np.array_equal(feasible.main_cost(codes), feasible.table(codes)[metric])


def test_no_archs_at_all_are_no_error(model: LatencyModel) -> None:
    none = SPACE.encode([])
    feasible = Feasible(SPACE, COSTS, (Budget("latency_ms", 1), Budget("macs", 1e6)), model)
    assert feasible.mask(none).shape == feasible.main_cost(none).shape == (0,)


# --- impossible budgets ---


@pytest.mark.parametrize("metric", CLOSED)
def test_the_smallest_reachable_value_is_named_and_is_reachable(metric: str) -> None:
    least = ENDS[metric][0]
    with pytest.raises(
        InputError, match=rf"meets {metric}<=.*smallest reachable {metric} is {least}: raise the budget"
    ) as raised:
        refuse_impossible(SPACE, [Budget(metric, least - 1)], None)
    named = re.search(r"is (\d+): raise", str(raised.value))
    assert named is not None
    refuse_impossible(SPACE, [Budget(metric, float(named[1]))], None)


def test_the_latency_of_the_smallest_child_decides_once_it_was_measured() -> None:
    refuse_impossible(SPACE, [Budget("latency_ms", 0.001)], None)  # not known yet
    refuse_impossible(SPACE, [Budget("latency_ms", 0.02)], 0.02)
    with pytest.raises(InputError, match=r"smallest reachable latency_ms is 0\.02346"):
        refuse_impossible(SPACE, [Budget("latency_ms", 0.02)], 0.0234567)


def test_one_impossible_budget_of_several_is_enough() -> None:
    with pytest.raises(InputError, match="params"):
        refuse_impossible(SPACE, [Budget("macs", 1e9), Budget("params", 1)], None)


def test_no_arch_is_cheaper_than_the_smallest(small_space: Callable[..., Space]) -> None:
    for space in (SPACE, load_space("attentivenas"), small_space(width=[8, 16], depth=[1, 2], kernel_size=[3, 5])):
        costs = Costs(space).all(space.sample_codes(3000, np.random.default_rng(1)))
        for metric in CLOSED:
            assert costs[metric].min() >= arch_costs(space, space.smallest)[metric]
