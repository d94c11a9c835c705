"""What every strategy must do, whatever its idea: the conformance suite of `search.strategies.Strategy`."""

from __future__ import annotations

import functools
import importlib.util
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search.budget import Budget
from search.feasible import Feasible
from search.strategies import Proposal, Result, Strategy
from search.strategies.registry import STRATEGIES, make, strategy_named
from supernet.arch import Arch
from supernet.costs import Costs
from supernet.errors import InputError
from supernet.family import Codes
from supernet.space import Space, load_space

OWN = ("random", "coarse_to_fine", "evolution", "local")
"""Those whose asks cost milliseconds; of the others only the small spaces are tried."""
LEARNING = ("coarse_to_fine", "evolution", "local")
SPACES = ("digits", "cifar-mbconv", "attentivenas", "cell", "mlp", "one")
SMALL = ("digits", "mlp", "one")
BUDGETS = ("none", "tight", "smallest", "lower", "two")
QUICK = {"optuna:gp": 10, "optuna:tpe": 20}
"""Archs told at most in the longer tests, where more would take seconds."""

ONE = {
    "name": "one", "family": "mbconv", "resolution": [12], "stem": {"width": [8], "stride": 1},
    "stages": [{"width": [8], "depth": [1], "kernel_size": [3], "expand_ratio": [2], "stride": 2, "squeeze_excite": True}],
    "head": {"expand_ratio": 2, "width": [16]}, "classes": 3, "in_channels": 1,
}  # fmt: skip


def marks(name: str, space: str = "") -> list[pytest.MarkDecorator]:
    found = []
    if importlib.util.find_spec(f"search.strategies.{STRATEGIES[name][0]}") is None:
        found.append(pytest.mark.skip("not written yet"))
    packages = ["optuna"] * name.startswith("optuna") + ["cmaes"] * name.endswith("cmaes")
    found += [pytest.mark.skip(f"needs {package}") for package in packages if importlib.util.find_spec(package) is None]
    if name not in OWN:  # some take a second and more for each arch
        found.append(pytest.mark.slow if name in {"predicted", "optuna:tpe", "reinforce", "mcts"} else pytest.mark.nightly)
    elif space in {"cifar-mbconv", "attentivenas", "cell"}:
        found.append(pytest.mark.slow)
    return found


every = pytest.mark.parametrize("name", [pytest.param(name, marks=marks(name)) for name in STRATEGIES])


class Losses:
    """What `relax` needs of a supernet."""

    def losses(self, archs: Sequence[Arch], step: int) -> np.ndarray[Any, Any]:
        return np.array([luck(arch) for arch in archs])


NEEDS: dict[str, dict[str, Any]] = {"relax": {"relaxable": Losses(), "steps": 5}}
"""Settings that a strategy cannot do without."""


@functools.cache
def costs_of(space: str) -> Costs:
    return Costs(Space.from_definition(ONE) if space == "one" else load_space(space))


@functools.cache
def feasible_of(space: str, budget: str = "none") -> Feasible:
    costs = costs_of(space)
    ends = costs.space.encode([costs.space.smallest, costs.space.largest])
    least, most = (float(macs) for macs in costs.macs(ends))
    params = [float(count) for count in costs.params(ends)]
    budgets = {
        "none": (),
        "tight": (Budget("macs", least * 1.2),),
        "smallest": (Budget("macs", least),),
        "lower": (Budget("macs", (least + most) / 2, lower=True), Budget("macs", most)),
        "two": (Budget("macs", (least * most) ** 0.5), Budget("params", (params[0] * params[1]) ** 0.5)),
    }[budget]
    return Feasible(costs.space, costs, budgets)


def luck(arch: Arch) -> float:
    """A score that follows from the arch alone."""
    return int(arch.key, 16) / 16**12


def results(proposals: Sequence[Proposal], score: Callable[[Arch], float | None] = luck) -> list[Result]:
    return [Result(each.arch, score(each.arch), 100) for each in proposals]


def made(name: str, feasible: Feasible, seed: int = 0, **settings_: Any) -> Strategy:
    return make(name, feasible.space, feasible, seed=seed, **NEEDS.get(name, {}), **settings_)


def played(strategy: Strategy, asks: int, count: int = 8) -> list[list[Proposal]]:
    found = []
    for _ in range(asks):
        found.append(strategy.ask(count))
        strategy.tell(results(found[-1]))
    return found


def flat(rounds: Sequence[Sequence[Proposal]]) -> list[Arch]:
    return [proposal.arch for asked in rounds for proposal in asked]


def sound(feasible: Feasible, archs: Sequence[Arch]) -> None:
    """Different archs of the space within the budgets."""
    assert len(set(archs)) == len(archs)
    assert all(feasible.space.contains(arch) for arch in archs)
    if archs:
        assert feasible.mask(feasible.space.encode(archs)).all()


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize(("name", "space"), [
    pytest.param(name, space, marks=marks(name, space)) for name in STRATEGIES for space in (SPACES if name in OWN else SMALL)
])  # fmt: skip
def test_asks_are_new_archs_of_the_space_within_the_budgets(name: str, space: str, budget: str) -> None:
    feasible = feasible_of(space, budget)
    strategy = made(name, feasible)
    rounds = played(strategy, 5)
    assert all(len(asked) <= 8 for asked in rounds)
    sound(feasible, flat(rounds))
    if space == "one" or (budget == "smallest" and space not in {"cell", "mlp"}):  # there several cost as little
        assert flat(rounds) == [feasible.space.smallest]
    else:
        assert len(flat(rounds)) >= (3 if budget == "smallest" else 5)
    assert all(proposal.stage for asked in rounds for proposal in asked)


@every
@pytest.mark.parametrize("changes", [{}, {"resolution": [12, 16]}, {"width": [8, 16], "depth": [1, 2]}])
def test_a_small_space_comes_to_an_end_and_stays_there(
    small_space: Callable[..., Space], name: str, changes: dict[str, Any]
) -> None:
    space = small_space(**changes)
    feasible = Feasible(space, Costs(space), ())
    strategy = made(name, feasible)
    rounds = played(strategy, space.size + 3, 3)
    sound(feasible, flat(rounds))
    assert 1 <= len(flat(rounds)) <= space.size
    assert rounds[-3:] == [[], [], []]
    if name != "local":
        assert len(flat(rounds)) == space.size


@every
def test_it_follows_from_the_seed(name: str) -> None:
    feasible = feasible_of("digits", "two")
    one, same, other = (played(made(name, feasible, seed), 5) for seed in (0, 0, 1))
    assert one == same
    assert one != other


@every
def test_global_generators_are_left_alone(name: str) -> None:
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    played(made(name, feasible_of("digits")), 3)
    assert np.array_equal(before, np.random.get_state()[1])  # noqa: NPY002


@every
@pytest.mark.parametrize("budget", ["none", "two"])
def test_resumed_all_the_time_it_goes_on_as_if_never_stopped(name: str, budget: str) -> None:
    feasible = feasible_of("digits", budget)

    def resumed(strategy: Strategy) -> Strategy:
        new = made(name, feasible)
        new.load_state(json.loads(json.dumps(strategy.state(), allow_nan=False)))
        return new

    asks = 4 if name in QUICK else 8
    whole, strategy = played(made(name, feasible), asks), made(name, feasible)
    for number in range(asks):
        asked = strategy.ask(8)
        assert asked == whole[number]
        strategy = resumed(strategy)  # between ask and tell
        strategy.tell(results(asked))
        strategy = resumed(strategy)


@every
def test_resumed_once_it_goes_on_as_if_never_stopped(name: str) -> None:
    feasible = feasible_of("mlp")
    strategy, stopped = made(name, feasible), made(name, feasible)
    played(strategy, 2)
    stopped.load_state(json.loads(json.dumps(strategy.state(), allow_nan=False)))
    assert played(stopped, 2) == played(strategy, 2)


@every
def test_what_it_is_told_decides_what_it_asks_next(name: str) -> None:
    if name in {"random", "optuna:qmc", "relax"}:
        pytest.skip("it learns nothing")
    feasible = feasible_of("digits")
    space = feasible.space
    effects = np.random.default_rng(0).normal(size=len(space.dimensions))

    def score(arch: Arch) -> float:  # a predictor must be able to learn it
        return float(space.encode([arch])[0] @ effects)

    def after(sign: int) -> list[Arch]:
        strategy, found = made(name, feasible), []
        for _ in range(8):
            asked = strategy.ask(8)
            found += [proposal.arch for proposal in asked]
            strategy.tell(results(asked, lambda arch: sign * score(arch)))
        return found

    assert after(1) != after(-1)


# --- faults ---


@every
@pytest.mark.parametrize("score", [None, float("nan"), float("inf")])
def test_archs_that_all_fail_stop_nothing(name: str, score: float | None) -> None:
    feasible = feasible_of("digits", "two")
    strategy, archs = made(name, feasible), []
    for _ in range(5):
        asked = strategy.ask(8)
        archs += [proposal.arch for proposal in asked]
        strategy.tell([Result(proposal.arch, score, 0) for proposal in asked])
    sound(feasible, archs)
    assert len(archs) >= 8
    json.dumps(strategy.state(), allow_nan=False)


@every
def test_archs_that_are_never_told_back_stop_nothing(name: str) -> None:
    feasible = feasible_of("digits", "two")
    strategy = made(name, feasible)
    for _ in range(4):
        sound(feasible, [proposal.arch for proposal in strategy.ask(8)])
    strategy.tell([])
    strategy.ask(8)


@every
def test_what_another_search_evaluated_is_not_asked_for_again(name: str) -> None:
    feasible = feasible_of("mlp", "two")
    others = feasible.space.decode(np.unique(feasible.space.sample_codes(600, np.random.default_rng(3)), axis=0))
    strategy = made(name, feasible)
    strategy.tell([Result(arch, luck(arch), 100) for arch in others[: QUICK.get(name, len(others))]])
    archs = flat(played(strategy, 3))
    sound(feasible, archs)
    assert not set(archs) & set(others[: QUICK.get(name, len(others))])


@every
def test_duplicates_and_archs_over_the_budget_are_taken(name: str) -> None:
    feasible = feasible_of("digits", "tight")
    strategy = made(name, feasible)
    asked = strategy.ask(8)
    told = results(asked)
    strategy.tell([*told, *told, Result(feasible.space.largest, 1.0, 100), Result(feasible.space.largest, None, 100)])
    strategy.tell([Result(result.arch, 0.5, 200, False) for result in told])
    archs = flat(played(strategy, 3))
    sound(feasible, archs)
    assert not set(archs) & {feasible.space.largest, *(result.arch for result in told)}


@every
def test_archs_that_all_lost_their_race_stop_nothing(name: str) -> None:
    feasible = feasible_of("digits", "two")
    strategy, archs = made(name, feasible), []
    for _ in range(5):
        asked = strategy.ask(8)
        archs += [proposal.arch for proposal in asked]
        strategy.tell([Result(proposal.arch, luck(proposal.arch), 10, False) for proposal in asked])
    sound(feasible, archs)
    assert len(archs) >= 32 or name == "local"


@every
def test_an_arch_of_another_space_is_refused(name: str) -> None:
    strategy = made(name, feasible_of("digits"))
    for other in ("mlp", "cifar-mbconv"):
        with pytest.raises(InputError, match="space digits") as caught:
            strategy.tell([Result(costs_of(other).space.smallest, 0.5, 100)])
        assert "\n" not in str(caught.value)


@every
@pytest.mark.parametrize("damage", [
    lambda state: {}, lambda state: {**state, "format": 2}, lambda state: {**state, "strategy": "other"},
    lambda state: {**state, "space": "0" * 12}, lambda state: {**state, "asks": -1}, lambda state: {**state, "pool": None},
    lambda state: {**state, "pool": {**state["pool"], "scores": []}},
    lambda state: {**state, "pool": {**state["pool"], "codes": [[9]]}},
    lambda state: {**state, "pool": {**state["pool"], "codes": [[99] * 15]}},
    lambda state: {**state, "pool": {**state["pool"], "scores": ["many"] * 8}},
    lambda state: {**state, "pool": {**state["pool"], "asked": state["pool"]["codes"]}},
])  # fmt: skip
def test_a_damaged_state_is_refused(name: str, damage: Callable[[dict[str, Any]], Any]) -> None:
    feasible = feasible_of("digits")
    strategy = made(name, feasible)
    played(strategy, 1)
    with pytest.raises(InputError, match="search anew") as caught:
        made(name, feasible).load_state(damage(strategy.state()))
    assert "\n" not in str(caught.value)


@every
@pytest.mark.parametrize("count", [0, -1])
def test_it_is_asked_for_an_arch_at_least(name: str, count: int) -> None:
    with pytest.raises(InputError, match="at least 1"):
        made(name, feasible_of("digits")).ask(count)


@every
def test_it_says_what_it_is(name: str) -> None:
    strategy = made(name, feasible_of("digits"))
    assert name.startswith(strategy.name)
    assert strategy.experimental is (name in {"reinforce", "mcts", "relax"})
    assert all(isinstance(note, str) for note in strategy.notes())


@settings(max_examples=10, deadline=None)
@given(data=st.data(), name=st.sampled_from(OWN), seed=st.integers(0, 2**32))
def test_whatever_happens_asks_stay_sound_and_a_resume_changes_nothing(data: st.DataObject, name: str, seed: int) -> None:
    feasible = feasible_of("digits", data.draw(st.sampled_from(["none", "tight", "two", "lower"])))
    strategy, resumed = made(name, feasible, seed), made(name, feasible, seed)
    seen: list[Arch] = []
    for _ in range(data.draw(st.integers(1, 5))):
        count = data.draw(st.integers(1, 20))
        asked = strategy.ask(count)
        assert asked == resumed.ask(count)
        assert len(asked) <= count
        sound(feasible, [proposal.arch for proposal in asked])
        assert not {proposal.arch for proposal in asked} & set(seen)
        told = []
        for proposal in asked:
            score = data.draw(st.one_of(st.none(), st.sampled_from([0.0, 0.5]), st.floats(0, 1)))
            told += data.draw(st.integers(0, 2)) * [Result(proposal.arch, score, 100, data.draw(st.booleans()))]
        strategy.tell(told)
        seen += [result.arch for result in told]
        resumed = made(name, feasible)
        resumed.load_state(json.loads(json.dumps(strategy.state())))


# --- what it is good for ---


class Hilly:
    """A score that adds up over the dimensions with falling returns, and over pairs of them: some go together, some do not."""

    def __init__(self, space: Space, seed: int) -> None:
        rng = np.random.default_rng([seed, 99])
        self.steps = np.maximum(1, np.array([len(dimension.choices) for dimension in space.dimensions]) - 1)
        self.gains, self.bends = rng.gamma(2, 1, len(self.steps)), rng.uniform(0.4, 1, len(self.steps))
        pairs = (len(self.steps),) * 2
        self.pairs = rng.normal(0, 0.6, pairs) * (rng.random(pairs) < 0.3)

    def __call__(self, codes: Codes) -> np.ndarray[Any, Any]:
        heights = (codes / self.steps) ** self.bends - 0.5
        return heights @ self.gains + np.einsum("ai,ij,aj->a", heights, self.pairs, heights)


SEEDS, ASKS, COUNT = 8, 12, 16


@functools.cache
def outcome(name: str) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """After 192 evaluations under a budget in the lower half: the best true score, and the mean height of the front over the costs.

    Both (seeds,), in standard deviations of random archs.
    """
    space = costs_of("cifar-mbconv").space
    least, most = costs_of("cifar-mbconv").macs(space.encode([space.smallest, space.largest]))
    feasible = Feasible(space, costs_of("cifar-mbconv"), (Budget("macs", float(round(least**0.6 * most**0.4))),))
    ceilings = np.geomspace(least * 1.2, feasible.budgets[0].bound, 50)
    best, front = [], []
    for seed in range(SEEDS):
        score, strategy = Hilly(space, seed), made(name, feasible, seed)
        spread = score(feasible.sample(500, np.random.default_rng(seed))).std()
        scores, macs = score(space.encode([space.smallest])), np.array([least])
        for _ in range(ASKS):
            asked = strategy.ask(COUNT)
            codes = space.encode([proposal.arch for proposal in asked])
            told = score(codes)
            strategy.tell([Result(each.arch, value, 100) for each, value in zip(asked, told.tolist(), strict=True)])
            scores, macs = np.concatenate([scores, told]), np.concatenate([macs, costs_of("cifar-mbconv").macs(codes)])
        assert len(scores) == ASKS * COUNT + 1
        best.append(scores.max() / spread)
        front.append(np.mean([scores[macs <= ceiling].max() for ceiling in ceilings]) / spread)
    return np.array(best), np.array(front)


def clearly_ahead(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any], margin: float) -> None:
    """By the margin on average, and by two standard errors of the paired differences."""
    ahead = one - other
    assert ahead.mean() > max(margin, 2 * ahead.std(ddof=1) / len(ahead) ** 0.5), ahead


@pytest.mark.slow
@pytest.mark.parametrize("name", LEARNING)
def test_the_best_beats_random_search_at_equal_evaluations(name: str) -> None:
    clearly_ahead(outcome(name)[0], outcome("random")[0], 0.15)


@pytest.mark.parametrize("name", ["coarse_to_fine", "evolution"])
def test_the_front_beats_random_search_at_equal_evaluations(name: str) -> None:
    clearly_ahead(outcome(name)[1], outcome("random")[1], 0.15)


# --- the registry ---


@pytest.mark.parametrize(
    ("given_", "meant"), [("evolutoin", "evolution"), ("optuna:tpee", "optuna:tpe"), ("", None), ("Random", "random")]
)
def test_an_unknown_name_is_refused_with_the_nearest(given_: str, meant: str | None) -> None:
    with pytest.raises(InputError, match=f"Did you mean '{meant}'" if meant else "a strategy is one of") as caught:
        strategy_named(given_)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "setting", "message"), [
    ("evolution", {"poplation": 9}, "Did you mean 'population'"), ("random", {"elites": 9}, "has no settings"),
    ("predicted", {"initial": "abc"}, "right type"), ("predicted", {"models": 3}, "right type"),
    ("evolution", {"population": 1}, "at least 2"), ("coarse_to_fine", {"zones": 0}, "zones of at least 1"),
    ("local", {"elites": 0}, "at least 1"), ("evolution", {"mutation": 2}, "from 0 to 1"),
    ("evolution", {"costs": ["mac"]}, "Did you mean 'macs'"),
])  # fmt: skip
def test_a_setting_that_cannot_be_is_refused(name: str, setting: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        made(name, feasible_of("digits"), **setting)
    assert "\n" not in str(caught.value)


def test_what_a_name_stands_for_cannot_be_set_again() -> None:
    pytest.importorskip("optuna")
    with pytest.raises(InputError, match="got 'sampler'"):
        made("optuna:tpe", feasible_of("digits"), sampler="gp")
