"""Ways and moves through a space, and that impossible budgets are refused with what can be reached."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.profiling import profile
from search.budget import MEASURED, METRICS, Budget
from search.feasible import Feasible
from search.reach import ROUNDS, STARTS, Ways, every_code, excess, refuse_impossible, walk
from supernet.costs import Costs, arch_costs
from supernet.errors import InputError
from supernet.space import Space, load_space

SPACE = load_space("digits")
COSTS = Costs(SPACE)
CELL = load_space("cell")
CLOSED = [metric for metric in METRICS if metric not in MEASURED]
ENDS = {metric: [arch_costs(SPACE, arch)[metric] for arch in (SPACE.smallest, SPACE.largest)] for metric in CLOSED}


# --- ways ---


def test_a_way_leads_from_the_smallest_arch_through_a_random_one_to_the_largest() -> None:
    for space in (SPACE, CELL):
        ways = Ways.draw(space, 50, np.random.default_rng(0))
        smallest, through, largest = (ways.at(np.full(50, place)) for place in (0.0, 1.0, 2.0))
        assert set(space.decode(smallest)) == {space.smallest}
        assert set(space.decode(largest)) == {space.largest}
        assert np.array_equal(space.canonical(through), space.sample_codes(50, np.random.default_rng(0)))


def test_costs_never_fall_along_a_way() -> None:
    ways, before = Ways.draw(SPACE, 50, np.random.default_rng(0)), None
    for place in np.linspace(0, 2, 101):
        codes = ways.at(np.full(50, place))
        assert (codes >= 0).all()
        assert (codes < [len(dimension.choices) for dimension in SPACE.dimensions]).all()
        costs = COSTS.all(codes)
        assert before is None or all((costs[metric] >= before[metric]).all() for metric in CLOSED)
        before = costs


def test_ways_are_walked_in_many_small_steps_and_in_different_orders() -> None:
    ways = Ways.draw(SPACE, 50, np.random.default_rng(0))
    different = [{ways.at(np.full(50, place))[way].tobytes() for place in np.linspace(0, 2, 101)} for way in range(50)]
    assert np.mean([len(each) for each in different]) > len(SPACE.dimensions)
    early = ways.at(np.full(50, 0.5))
    assert len({row.tobytes() for row in early}) > 40


def test_the_edge_is_the_last_place_that_meets() -> None:
    ways = Ways.draw(SPACE, 200, np.random.default_rng(0))
    bound = np.median(COSTS.macs(SPACE.sample_codes(200, np.random.default_rng(1))))
    below = ways.edge(lambda codes: COSTS.macs(codes) <= bound, 0.0, 2.0)
    above = ways.edge(lambda codes: COSTS.macs(codes) >= bound, 2.0, 0.0)
    assert (COSTS.macs(ways.at(below)) <= bound).all()
    assert (COSTS.macs(ways.at(above)) >= bound).all()
    assert (COSTS.macs(ways.at(np.minimum(below + 2 / 2**9, 2))) > bound).all()
    assert (ways.edge(lambda codes: np.ones(len(codes), dtype=np.bool_), 0.0, 2.0) == 2).all()
    assert (ways.edge(lambda codes: np.zeros(len(codes), dtype=np.bool_), 0.0, 2.0) == 0).all()


# --- moves ---


def test_excess_is_the_ratio_to_the_bound_as_a_logarithm() -> None:
    values = np.array([50.0, 100.0, 200.0])
    np.testing.assert_allclose(excess([(Budget("macs", 100), values)]), [0, 0, np.log(2)])
    np.testing.assert_allclose(excess([(Budget("macs", 100, lower=True), values)]), [np.log(2), 0, 0])
    both = [(Budget("macs", 100), values), (Budget("params", 400, lower=True), values)]
    np.testing.assert_allclose(excess(both), np.log([8, 4, 4]))


@given(st.floats(min_value=0, exclude_min=True, allow_infinity=False), st.floats(0, 1e300), st.booleans())
def test_excess_is_zero_just_where_the_budget_holds(bound: float, value: float, lower: bool) -> None:
    budget = Budget("macs", bound, lower=lower)
    (found,) = excess([(budget, np.array([value]))])
    assert np.isfinite(found)
    assert (found == 0) == budget.holds(value)


@pytest.mark.parametrize("space", [SPACE, CELL], ids=lambda space: space.name)
def test_a_walk_never_leads_further_outside_and_often_inside(space: Space) -> None:
    macs = [arch_costs(space, arch)["macs"] for arch in (space.smallest, space.largest)]
    feasible = Feasible(space, Costs(space), (Budget("macs", (macs[0] * macs[1]) ** 0.5), Budget("params", 1e4, lower=True)))
    steps = list(walk(space, feasible.outside, space.sample_codes(60, np.random.default_rng(0)), np.random.default_rng(1), 20))
    assert len(steps) == 21
    for (_, before), (codes, after) in itertools.pairwise(steps):
        assert (after <= before).all()
        assert np.array_equal(after, feasible.outside(codes))
    assert (steps[-1][1] == 0).sum() > max(40, (steps[0][1] == 0).sum())
    assert (steps[-1][0] != steps[-2][0]).any()  # what is inside goes on


def test_every_code_of_a_small_space_is_listed_and_of_a_large_one_none(small_space: Callable[..., Space]) -> None:
    space = small_space(width=[8, 16], depth=[1, 2], kernel_size=[3, 5])
    codes = every_code(space)
    assert codes is not None
    assert len({arch.key for arch in space.decode(codes)}) == space.size
    assert every_code(SPACE) is None


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


@pytest.mark.parametrize("metric", CLOSED)
def test_the_largest_reachable_value_is_named_and_is_reachable(metric: str) -> None:
    most = ENDS[metric][1]
    with pytest.raises(InputError, match=rf"meets {metric}>=.*largest reachable {metric} is {most}: lower the budget"):
        refuse_impossible(SPACE, [Budget(metric, most + 1, lower=True)])
    refuse_impossible(SPACE, [Budget(metric, most, lower=True)])
    refuse_impossible(SPACE, [Budget(each, ENDS[each][1], lower=True) for each in CLOSED])  # the largest meets them all


def test_every_target_has_its_smallest_latency() -> None:
    budgets = [Budget("latency_ms", 1.0), Budget("latency_ms", 1.0, "pi4")]
    refuse_impossible(SPACE, budgets, {None: 0.5, "pi4": 1.0})
    refuse_impossible(SPACE, budgets, {None: 0.5})
    with pytest.raises(InputError, match=r"meets latency_ms@pi4<=1: the smallest reachable latency_ms@pi4 is 1\.5: raise"):
        refuse_impossible(SPACE, budgets, {None: 0.5, "pi4": 1.5})


def between(metric: str, share: float) -> float:
    return float(round(ENDS[metric][0] * (ENDS[metric][1] / ENDS[metric][0]) ** share))


CONFLICTS = [
    (Budget("macs", between("macs", 0.9), lower=True), Budget("params", between("params", 0.1))),
    (Budget("params", between("params", 0.9), lower=True), Budget("macs", between("macs", 0.1))),
    (Budget("macs", between("macs", 0.6), lower=True), Budget("peak_memory_bytes", between("peak_memory_bytes", 0.05))),
]


@pytest.mark.parametrize("budgets", CONFLICTS, ids=lambda budgets: " and ".join(map(str, budgets)))
def test_bounds_that_no_child_meets_together_are_refused_with_the_nearest(budgets: tuple[Budget, ...]) -> None:
    for budget in budgets:
        refuse_impossible(SPACE, [budget])  # each alone is reachable
    with pytest.raises(InputError, match=r"found that meets .* and .*: the nearest has .*, no proof\): move") as raised:
        refuse_impossible(SPACE, budgets)
    message = str(raised.value)
    assert "\n" not in message
    assert all(str(budget) in message for budget in budgets)
    named = {metric: float(value) for metric, value in re.findall(r"(\w+) (\d+)(?= and| \()", message.split("nearest has")[1])}
    assert set(named) == {budget.metric for budget in budgets}
    drawn = Feasible(SPACE, COSTS, ()).sample(5000, np.random.default_rng(0))
    table = COSTS.all(drawn)
    random = excess([(budget, table[budget.metric].astype(float)) for budget in budgets]).min()
    nearest = excess([(budget, np.array([named[budget.metric]])) for budget in budgets])[0]
    assert 0 < nearest <= random
    moved = [replace(budget, bound=named[budget.metric] * (0.97 if budget.lower else 1.03)) for budget in budgets]
    refuse_impossible(SPACE, moved)  # what is named is reachable


def test_bounds_that_few_children_meet_together_are_not_refused() -> None:
    """One that is drawn and just meets them, though hardly any other does."""
    for code in SPACE.sample_codes(5, np.random.default_rng(2)):
        costs = {metric: float(values[0]) for metric, values in COSTS.all(code[None]).items()}
        refuse_impossible(SPACE, [Budget("macs", costs["macs"] * 0.98, lower=True), Budget("params", costs["params"] * 1.02)])


def test_a_band_between_two_archs_is_refused() -> None:
    macs = ENDS["macs"][0]
    with pytest.raises(InputError, match=r"the nearest has macs \d+ \("):
        refuse_impossible(SPACE, [Budget("macs", macs + 1, lower=True), Budget("macs", macs + 2)])


def test_in_a_small_space_all_archs_decide(small_space: Callable[..., Space]) -> None:
    space = small_space(width=[8, 16, 24], depth=[1, 2], kernel_size=[3, 5])
    codes = every_code(space)
    assert codes is not None
    macs = np.unique(Costs(space).macs(codes))
    low, high = macs[len(macs) // 2 : len(macs) // 2 + 2].tolist()
    with pytest.raises(InputError, match=rf"the nearest has macs ({low}|{high}) \(of all\)"):
        refuse_impossible(space, [Budget("macs", low + 0.5, lower=True), Budget("macs", high - 0.5)])
    refuse_impossible(space, [Budget("macs", low + 0.5, lower=True), Budget("macs", high)])


def test_two_upper_bounds_are_decided_by_the_smallest_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("search.reach.walk", None)  # nothing is searched for
    refuse_impossible(SPACE, [Budget(metric, ENDS[metric][0]) for metric in CLOSED])


def test_predicted_latencies_count_once_there_is_a_model(fake_target: Any) -> None:
    model = profile(SPACE, fake_target(), children=6, held_out=6, blocks=False)
    budgets = [Budget("latency_ms", 5.0, lower=True), Budget("macs", ENDS["macs"][1])]
    refuse_impossible(SPACE, budgets)  # not known yet
    refuse_impossible(SPACE, budgets, {None: 0.02})
    with pytest.raises(
        InputError, match=r"found that meets latency_ms>=5 and macs<=.*: the nearest has latency_ms 0\.0\d+ and macs \d+"
    ):
        refuse_impossible(SPACE, budgets, {None: 0.02}, Feasible(SPACE, COSTS, (), model))
    fine = [Budget("latency_ms", 0.02, lower=True), Budget("macs", ENDS["macs"][1])]
    refuse_impossible(SPACE, fine, {None: 0.02}, Feasible(SPACE, COSTS, (), model))


def test_the_search_looks_at_a_fixed_number_of_archs() -> None:
    with pytest.raises(InputError) as raised:
        refuse_impossible(SPACE, CONFLICTS[0])
    assert f"of {STARTS * (ROUNDS + 1):,} looked at" in str(raised.value)


def test_the_same_budgets_get_the_same_answer() -> None:
    messages = set()
    for _ in range(2):
        with pytest.raises(InputError) as raised:
            refuse_impossible(SPACE, CONFLICTS[1])
        messages.add(str(raised.value))
    assert len(messages) == 1
