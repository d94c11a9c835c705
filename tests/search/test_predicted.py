"""The predicted strategy: the loop, what happens while the gate is shut, and what it saves on a trained supernet's children."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from search.budget import Budget
from search.feasible import Feasible
from search.predictor import Gate
from search.strategies import Proposal, Result, Strategy
from search.strategies.predicted import FREELY, Predicted
from search.strategies.random import Random
from supernet.costs import Costs
from supernet.errors import InputError
from supernet.space import Space, load_space

SPACE = load_space("cifar-mbconv")
COSTS = Costs(SPACE)
FREE = Feasible(SPACE, COSTS, ())
TABLE = Path(__file__).parents[2] / "benchmarks/results/cifar_table.npz"
EFFECTS = np.random.default_rng(7).normal(size=len(SPACE.dimensions))
COUNTS = np.array([max(1, len(dimension.choices) - 1) for dimension in SPACE.dimensions])


def additive(proposal: Proposal) -> float:
    return float((SPACE.encode([proposal.arch])[0] / COUNTS) @ EFFECTS)


def luck(proposal: Proposal) -> float:
    return int(proposal.arch.key, 16) / 16**12


def played(strategy: Strategy, asks: int, score: Any, count: int = 16) -> list[list[Proposal]]:
    found = []
    for _ in range(asks):
        found.append(strategy.ask(count))
        strategy.tell([Result(each.arch, score(each), 100) for each in found[-1]])
    return found


def quick(feasible: Feasible = FREE, **settings: Any) -> Predicted:
    return Predicted(feasible.space, feasible, **{"seed": 0, "initial": 40, "models": ["ridge"], **settings})


def test_first_a_spread_then_what_the_predictor_likes_and_a_few_others() -> None:
    strategy = quick()
    rounds = played(strategy, 7, additive)
    stages = [[each.stage for each in asked] for asked in rounds]
    assert [len(asked) for asked in rounds] == [16, 16, 8, 16, 16, 16, 16]
    assert {stage for asked in stages[:3] for stage in asked} == {"spread"}
    for asked in stages[3:]:
        assert asked.count("predicted") == 14 and asked.count("spread") == 2
    assert len({each.arch for asked in rounds for each in asked}) == sum(map(len, rounds))
    assert strategy.notes() == [f"The predictor proposed in 4 of 4 rounds; last {strategy.why}"]
    assert strategy.why.startswith("used: tau within ±25 % macs is ")


def test_what_it_likes_is_better_than_what_random_archs_of_the_same_cost_are() -> None:
    rounds = played(quick(), 6, additive)
    spread = [each for asked in rounds for each in asked if each.stage == "spread"]
    liked = [each for asked in rounds for each in asked if each.stage == "predicted"]
    usual, values = [additive(each) for each in spread], [additive(each) for each in liked]
    assert np.mean(values) > np.mean(usual) + 1.5 * np.std(usual)


def test_proposals_lie_along_all_costs_and_apart() -> None:
    asked = played(quick(), 4, additive, 40)[-1]
    codes = SPACE.encode([each.arch for each in asked if each.stage == "predicted"])
    logs = np.log(COSTS.macs(codes))
    ends = np.log(COSTS.macs(SPACE.encode([SPACE.smallest, SPACE.largest])))
    assert len(np.unique(((logs - ends[0]) / (ends[1] - ends[0]) * 12).astype(int))) >= 6
    assert FREELY == 0.5
    differing = (codes[:, None] != codes[None]).sum(axis=-1) + 99 * np.eye(len(codes))
    assert differing.min() >= 2


def test_on_luck_alone_the_gate_is_shut_and_it_goes_on_at_random() -> None:
    strategy = quick()
    rounds = played(strategy, 6, luck)
    later = [each for asked in rounds[3:] for each in asked]
    assert {each.stage for each in later} == {"spread"}
    assert "not used: tau" in strategy.notes()[0]
    assert strategy.used == 0


@pytest.mark.slow
@pytest.mark.parametrize("score", [additive, luck])
@pytest.mark.parametrize("budget", [False, True])
def test_resumed_anywhere_it_goes_on_as_if_never_stopped(score: Any, budget: bool) -> None:
    feasible = Feasible(
        SPACE, COSTS, (Budget("macs", float(np.median(COSTS.macs(FREE.sample(99, np.random.default_rng(0)))))),)
    )
    feasible = feasible if budget else FREE
    models = ["forest"] if budget else ["ridge"]
    whole, resumed = (quick(feasible, initial=24, models=models) for _ in range(2))
    for _ in range(4):
        asked = whole.ask(12)
        assert asked == resumed.ask(12)
        assert feasible.mask(SPACE.encode([each.arch for each in asked])).all()
        whole.tell([Result(each.arch, score(each), 100) for each in asked])
        resumed = quick(feasible, initial=24, models=models)
        resumed.load_state(json.loads(json.dumps(whole.state(), allow_nan=False)))
        resumed.tell([])
        assert resumed.notes() == whole.notes()


def test_failures_and_told_archs_over_the_budget_do_not_reach_it() -> None:
    least, most = COSTS.macs(SPACE.encode([SPACE.smallest, SPACE.largest]))
    feasible = Feasible(SPACE, COSTS, (Budget("macs", float(round((least * most) ** 0.5))),))
    strategy = quick(feasible)
    others = SPACE.decode(SPACE.sample_codes(60, np.random.default_rng(5)))
    strategy.tell(
        [Result(arch, None if position % 3 == 0 else 0.5 + position / 100, 9) for position, arch in enumerate(others)]
    )
    asked = strategy.ask(16)
    assert len(asked) == 16
    assert feasible.mask(SPACE.encode([each.arch for each in asked])).all()
    assert not {each.arch for each in asked} & set(others)


@pytest.mark.parametrize("settings", [{"initial": 0}, {"models": []}])
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        quick(**settings)


@pytest.mark.parametrize("damage", [{"rounds": -1}, {"used": 9}, {"why": None}, {"rounds": "1"}])
def test_a_damaged_state_is_refused(damage: dict[str, Any]) -> None:
    strategy = quick()
    played(strategy, 1, luck)
    with pytest.raises(InputError, match="search anew"):
        quick().load_state({**strategy.state(), **damage})


# --- a trained supernet ---


@functools.cache
def table() -> tuple[Feasible, dict[str, float], Any, Any]:
    with np.load(TABLE) as found:
        space = Space.from_definition(json.loads(str(found["space"])))
        codes, macs = found["codes"].astype(np.int64), found["macs"]
        scores = np.unpackbits(found["packed"], axis=1)[:, : int(found["images"])].mean(axis=1)
    truth = {arch.key: float(score) for arch, score in zip(space.decode(codes), scores, strict=True)}
    return Feasible(space, Costs(space), ()), truth, macs, scores


def regret(make: Any, seed: int, evaluations: int) -> float:
    """How far the best found under five caps of macs stays behind the best there is, in points of top1, on average."""
    feasible, truth, macs, scores = table()
    strategy = make(feasible.space, feasible, seed=seed)
    rounds = played(strategy, evaluations // 16, lambda each: truth[each.arch.key])
    archs = [each.arch for asked in rounds for each in asked]
    cost, found = feasible.costs.macs(feasible.space.encode(archs)), np.array([truth[arch.key] for arch in archs])
    caps = np.geomspace(macs.min(), macs.max(), 6)[1:] * 1.000001
    return float(np.mean([scores[macs <= cap].max() - found[cost <= cap].max() for cap in caps])) * 100


@pytest.mark.nightly
def test_on_a_trained_supernet_it_beats_random_search_at_equal_evaluations() -> None:
    mine = [regret(Predicted, seed, 160) for seed in range(3)]
    usual = [regret(Random, seed, 160) for seed in range(3)]
    assert np.mean(mine) < 0.5 * np.mean(usual)
    assert all(one < other for one, other in zip(mine, usual, strict=True))


def test_the_gate_can_be_given() -> None:
    strategy = quick(gate=Gate(minimum=2))
    played(strategy, 4, additive)
    assert "at least 2 is asked for" in strategy.why


def test_where_nothing_meets_the_budgets_it_asks_for_nothing() -> None:
    most = COSTS.macs(SPACE.encode([SPACE.largest]))[0]
    strategy = quick(Feasible(SPACE, COSTS, (Budget("macs", float(most) + 1, lower=True),)), gate=Gate(minimum=-1, alpha=0.999))
    archs = SPACE.decode(SPACE.sample_codes(60, np.random.default_rng(5)))
    strategy.tell([Result(arch, additive(Proposal(arch, "")), 100) for arch in archs])
    assert strategy.ask(16) == []


def test_a_state_brings_its_seed_along() -> None:
    one, other = quick(models=["forest"]), quick(models=["forest"], seed=9)
    played(one, 3, additive)
    other.load_state(json.loads(json.dumps(one.state())))
    assert one.ask(16) == other.ask(16)
