"""Which archs meet the budgets, and random archs that do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy.latency import LatencyModel
from deploy.profiling import profile
from search.budget import MEASURED, METRICS, Budget
from search.feasible import Cost, Feasible
from search.reach import every_code
from supernet.costs import Costs, arch_costs
from supernet.errors import InputError
from supernet.space import Space, load_space

SPACE = load_space("digits")
COSTS = Costs(SPACE)
CLOSED = [metric for metric in METRICS if metric not in MEASURED]
ENDS = {metric: [arch_costs(SPACE, arch)[metric] for arch in (SPACE.smallest, SPACE.largest)] for metric in CLOSED}


@pytest.fixture
def model(fake_target: Any) -> LatencyModel:
    return profile(SPACE, fake_target(), children=12, held_out=12, blocks=False)


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


@settings(max_examples=30)
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
    cautious = off_by(model, 1.04)
    codes = some_archs()
    predicted = cautious.on(COSTS)(codes)
    bound = float(np.median(predicted))
    feasible = Feasible(SPACE, COSTS, (Budget("latency_ms", bound),), cautious)
    assert np.array_equal(feasible.mask(codes), predicted * cautious.upper_factor <= bound)
    assert np.array_equal(feasible.table(codes)["latency_ms"], predicted)  # the table itself is not inflated


def test_all_budgets_hold_at_once(model: LatencyModel) -> None:
    codes = some_archs()
    latency, params = Budget("latency_ms", 0.02), Budget("params", 4e4)
    both = Feasible(SPACE, COSTS, (latency, params), model).mask(codes)
    each = [Feasible(SPACE, COSTS, (budget,), model).mask(codes) for budget in (latency, params)]
    assert np.array_equal(both, each[0] & each[1])
    assert 0 < both.sum() < min(mask.sum() for mask in each)


@settings(max_examples=50)
@given(st.sampled_from(CLOSED), st.floats(0, 1), st.floats(0, 1))
def test_a_lower_bound_admits_what_costs_at_least_that(metric: str, one: float, other: float) -> None:
    low, high = (max(1.0, ENDS[metric][0] + share * (ENDS[metric][1] - ENDS[metric][0])) for share in sorted((one, other)))
    codes = some_archs(50)
    costs = COSTS.of(metric, codes)
    mask = Feasible(SPACE, COSTS, (Budget(metric, low, lower=True), Budget(metric, high))).mask(codes)
    assert np.array_equal(mask, (low <= costs) & (costs <= high))


def test_a_predicted_latency_counts_with_its_lower_end_against_a_lower_bound(model: LatencyModel) -> None:
    unsure = off_by(model, 1.04)
    assert unsure.lower_factor == pytest.approx(1 / 1.04)
    codes = some_archs()
    predicted = unsure.on(COSTS)(codes)
    bound = float(np.median(predicted))
    feasible = Feasible(SPACE, COSTS, (Budget("latency_ms", bound, lower=True),), unsure)
    assert np.array_equal(feasible.mask(codes), predicted * unsure.lower_factor >= bound)


def test_nothing_is_added_to_predictions_that_are_not_trusted(model: LatencyModel) -> None:
    """Candidates are measured then (`search/direct.py`), and an interval of tens of percent would leave out most of them."""
    wide = off_by(model, 1.5)
    codes = some_archs()
    bound = float(np.median(wide.on(COSTS)(codes)))
    assert not wide.trusted
    assert np.array_equal(
        Feasible(SPACE, COSTS, (Budget("latency_ms", bound),), wide).mask(codes), wide.on(COSTS)(codes) <= bound
    )


def off_by(model: LatencyModel, factor: float) -> LatencyModel:
    """The same model, but all held-out children are slower by a factor."""
    return replace(model, held_out=tuple(replace(child, latency_ms=factor * child.predicted_ms) for child in model.held_out))


def slower(model: LatencyModel) -> LatencyModel:
    """A model of a device that takes ten times as long."""
    return replace(model, coefficients={name: 10 * value for name, value in model.coefficients.items()})


def test_every_target_has_its_model_and_its_column(model: LatencyModel) -> None:
    slow = slower(model)
    codes = some_archs()
    budgets = (Budget("latency_ms", 0.02), Budget("latency_ms", 0.15, "pi4"))
    feasible = Feasible(SPACE, COSTS, budgets, {None: model, "pi4": slow})
    table = feasible.table(codes)
    assert set(table) == {*CLOSED, "latency_ms", "latency_ms@pi4"}
    np.testing.assert_allclose(table["latency_ms@pi4"], 10 * table["latency_ms"])
    each = [Feasible(SPACE, COSTS, (budget,), {None: model, "pi4": slow}).mask(codes) for budget in budgets]
    assert np.array_equal(feasible.mask(codes), each[0] & each[1])
    assert each[0].sum() > each[1].sum() > 0
    assert feasible.upper_factor(budgets[1]) == slow.upper_factor
    assert feasible.upper_factor(Cost("macs")) == 1


def test_a_latency_without_a_model_is_told(model: LatencyModel) -> None:
    for latency, known in (
        (None, "none"),
        ({}, "none"),
        (model, "latency_ms"),
        ({None: model, "b": model}, "latency_ms, latency_ms@b"),
    ):
        feasible = Feasible(SPACE, COSTS, (Budget("latency_ms", 1, "pi4"),), latency)
        with pytest.raises(
            InputError, match=f"latency_ms@pi4 is known only with a latency model .* models of {known}: measure"
        ):
            feasible.mask(some_archs(1))


def test_zones_are_further_budgets() -> None:
    codes, bounds = some_archs(), np.quantile(COSTS.macs(some_archs()), [0.2, 0.5, 0.8])
    feasible = Feasible(SPACE, COSTS, (Budget("params", 6e4),))
    sets: list[tuple[Budget, ...]] = [(), *((Budget("macs", float(bound)),) for bound in bounds),
                                      (Budget("macs", float(bounds[0]), lower=True), Budget("model_size_bytes", 2e5))]  # fmt: skip
    zones = feasible.zones(codes, sets)
    assert zones.shape == (len(codes), 5)
    assert zones.dtype == np.bool_
    for number, budgets in enumerate(sets):
        assert np.array_equal(zones[:, number], Feasible(SPACE, COSTS, (*feasible.budgets, *budgets)).mask(codes))
    assert 0 < zones[:, 1].sum() < zones[:, 2].sum() < zones[:, 3].sum() <= zones[:, 0].sum()
    assert feasible.zones(codes, []).shape == (len(codes), 0)
    assert feasible.zones(SPACE.encode([]), sets).shape == (0, 5)


def test_cheaper_means_the_cost_of_the_first_upper_bound(model: LatencyModel) -> None:
    codes = some_archs(5)
    more = Budget("params", 1e3, lower=True)
    for budgets, column in (
        ((), "macs"),
        ((Budget("params", 1e5), Budget("macs", 1e6)), "params"),
        ((more, Budget("macs", 1e6)), "macs"),
        ((more,), "params"),
        ((Budget("latency_ms", 1),), "latency_ms"),
        ((Budget("latency_ms", 1, "pi4"),), "latency_ms@pi4"),
    ):
        feasible = Feasible(SPACE, COSTS, budgets, {None: model, "pi4": model})
        assert feasible.main.column == column
        assert np.array_equal(feasible.main_cost(codes), feasible.table(codes)[column])


@settings(max_examples=50)
@given(st.lists(st.tuples(st.sampled_from(CLOSED), st.floats(0, 1), st.booleans()), max_size=3))
def test_archs_are_outside_of_budgets_just_where_they_miss_them(shares: list[tuple[str, float, bool]]) -> None:
    feasible, codes = Feasible(SPACE, COSTS, tuple(at(SPACE, *each) for each in shares)), some_archs(50)
    assert np.array_equal(feasible.outside(codes) == 0, feasible.mask(codes))
    assert (feasible.outside(codes) >= 0).all()


def test_no_archs_at_all_are_no_error(model: LatencyModel) -> None:
    none = SPACE.encode([])
    feasible = Feasible(SPACE, COSTS, (Budget("latency_ms", 1), Budget("macs", 1e6)), model)
    assert feasible.mask(none).shape == feasible.main_cost(none).shape == (0,)


# --- random archs within the budgets ---


def at(space: Space, metric: str, share: float, lower: bool = False) -> Budget:
    """A bound at a share of the way from the smallest to the largest arch, in logarithms."""
    ends = [arch_costs(space, arch)[metric] for arch in (space.smallest, space.largest)]
    return Budget(metric, ends[0] * (ends[1] / ends[0]) ** share, lower=lower)


BIG = load_space("attentivenas")
BIG_COSTS = Costs(BIG)
LOOSE = [
    "",
    "macs<.5",
    "macs<.2",
    "macs>.95",
    "macs<.9 macs>.8",
    "macs<.3 params<.2",
    "params<.7 macs>.4",
    "macs<.3 peak_memory_bytes<.2 macs>.1",
]


def read(space: Space, text: str) -> tuple[Budget, ...]:
    """Budgets at shares of the range: "macs<.5"."""
    parts = [part.replace("<", " <").replace(">", " >").split() for part in text.split()]
    return tuple(at(space, metric, float(bound[1:]), bound[0] == ">") for metric, bound in parts)


@pytest.mark.parametrize("text", LOOSE)
def test_many_different_archs_that_meet_the_budgets_are_drawn(text: str) -> None:
    feasible = Feasible(BIG, BIG_COSTS, read(BIG, text))
    codes = feasible.sample(500, np.random.default_rng(0))
    assert len(codes) == len({row.tobytes() for row in codes}) == 500
    assert feasible.mask(codes).all()
    assert np.array_equal(BIG.canonical(codes), codes)
    assert all(BIG.contains(arch) for arch in BIG.decode(codes[:20]))


@pytest.mark.parametrize("text", ["macs<.2", "params<.2", "macs<.3 params<.2", "macs<.2 model_size_bytes<.3"])
def test_archs_drawn_under_a_tight_budget_are_spread_over_what_it_leaves(text: str) -> None:
    """Every quarter of the range that the costs could have, in logarithms, holds some."""
    feasible = Feasible(BIG, BIG_COSTS, read(BIG, text))
    codes = feasible.sample(500, np.random.default_rng(0))
    least, most = np.log(feasible.main_cost(BIG.encode([BIG.smallest]))[0]), np.log(feasible.budgets[0].bound)
    share = (np.log(feasible.main_cost(codes)) - least) / (most - least)
    counts = np.histogram(share, bins=4, range=(0, 1))[0]
    assert counts[:3].min() >= 40
    for column, dimension in enumerate(BIG.dimensions):  # nothing is lost by always starting at the smallest
        assert len(np.unique(codes[:, column])) >= min(2, len(dimension.choices))


@pytest.mark.parametrize("name", ["attentivenas", "digits"])
def test_a_budget_that_only_one_arch_meets_gives_that_arch(name: str) -> None:
    space, costs = (BIG, BIG_COSTS) if name == "attentivenas" else (SPACE, COSTS)
    for budget, only in ((at(space, "macs", 0), space.smallest), (at(space, "macs", 1, lower=True), space.largest)):
        bound = arch_costs(space, only)["macs"]
        found = Feasible(space, costs, (replace(budget, bound=bound),)).sample(100, np.random.default_rng(0))
        assert space.decode(found) == [only]


def test_budgets_that_no_arch_meets_give_none() -> None:
    for text in ("macs>.9 params<.1", "params>.9 macs<.1"):
        assert Feasible(BIG, BIG_COSTS, read(BIG, text)).sample(100, np.random.default_rng(0)).shape == (0, len(BIG.dimensions))
    assert Feasible(BIG, BIG_COSTS, (Budget("macs", 1),)).sample(100, np.random.default_rng(0)).shape == (
        0,
        len(BIG.dimensions),
    )


def test_narrow_budgets_are_found_too() -> None:
    """A thousandth of the range; one uniform draw in some hundred lies there, and none for the second."""
    for text in ("macs<.5 macs>.499", "macs<.9 macs>.899"):
        feasible = Feasible(BIG, BIG_COSTS, read(BIG, text))
        codes = feasible.sample(100, np.random.default_rng(0))
        assert len(codes) > 60
        assert feasible.mask(codes).all()


@pytest.mark.parametrize("name", ["cell", "mlp", "autoencoder", "cifar-vit", "cifar-resnet"])
@pytest.mark.parametrize("text", ["macs<.3", "params<.3 macs>.1"])
def test_every_family_has_archs_to_draw(name: str, text: str) -> None:
    space = load_space(name)
    feasible = Feasible(space, Costs(space), read(space, text))
    codes = feasible.sample(30, np.random.default_rng(0))
    assert 0 < len(codes) <= 30
    assert feasible.mask(codes).all()
    assert space.valid(codes).all()
    assert len({row.tobytes() for row in codes}) == len(codes)
    assert np.array_equal(space.canonical(codes), codes)


def test_of_a_small_space_all_archs_within_the_budgets_are_drawn(small_space: Callable[..., Space]) -> None:
    space = small_space(width=[8, 16, 24], depth=[1, 2], kernel_size=[3, 5])
    costs, every = Costs(space), space.canonical(every_code(space))
    macs = costs.macs(every)
    feasible = Feasible(space, costs, (Budget("macs", float(np.median(macs))),))
    expected = {row.tobytes() for row in every[macs <= np.median(macs)]}
    found = feasible.sample(10**6, np.random.default_rng(0))
    assert {row.tobytes() for row in found} == expected
    assert len(found) == len(expected) > 4
    few = [feasible.sample(4, np.random.default_rng(seed)) for seed in (0, 0, 1)]
    assert [len(codes) for codes in few] == [4, 4, 4]
    assert np.array_equal(few[0], few[1])
    assert not np.array_equal(few[0], few[2])


@pytest.mark.parametrize("text", LOOSE)
def test_what_is_drawn_follows_from_the_generator_alone(text: str) -> None:
    drawn = [Feasible(BIG, BIG_COSTS, read(BIG, text)).sample(50, np.random.default_rng(seed)) for seed in (0, 0, 1)]
    assert np.array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[0], drawn[2])


def test_drawing_none_gives_none() -> None:
    assert Feasible(BIG, BIG_COSTS, read(BIG, "macs<.1")).sample(0, np.random.default_rng(0)).shape == (0, len(BIG.dimensions))


def test_archs_are_drawn_within_predicted_latencies_too(model: LatencyModel) -> None:
    slow = slower(model)
    low, high = np.quantile(model.on(COSTS)(some_archs()), [0.01, 0.05])
    budgets = (Budget("latency_ms", float(high) * 1.1), Budget("latency_ms", 9 * float(low), "pi4", lower=True))
    feasible = Feasible(SPACE, COSTS, budgets, {None: model, "pi4": slow})
    codes = feasible.sample(50, np.random.default_rng(0))
    assert len(codes) > 10
    assert feasible.mask(codes).all()


def test_the_work_is_bounded_whatever_the_budgets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted in archs whose costs are looked at, for 100 archs that are wanted."""
    looked: list[int] = []
    of = Costs.of
    monkeypatch.setattr(Costs, "of", lambda costs, metric, codes: looked.append(len(codes)) or of(costs, metric, codes))
    for text in [*LOOSE, "macs<0", "macs>1", "macs>.9 params<.1", "macs<.5 macs>.49999"]:
        looked.clear()
        feasible = Feasible(BIG, BIG_COSTS, read(BIG, text))
        feasible.sample(100, np.random.default_rng(0))
        assert sum(looked) <= 20_000 * max(1, len(feasible.budgets))
