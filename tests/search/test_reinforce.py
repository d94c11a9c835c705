"""Reinforce: the policy's gradient, the reward, and that it learns where there is something simple to learn."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from search.budget import Budget
from search.feasible import Feasible
from search.strategies import Result
from search.strategies.reinforce import Reinforce, softmax
from supernet.costs import Costs
from supernet.errors import InputError
from supernet.space import load_space

SPACE = load_space("cifar-mbconv")
COSTS = Costs(SPACE)
FREE = Feasible(SPACE, COSTS, ())
EFFECTS = np.random.default_rng(3).normal(size=len(SPACE.dimensions))
STEPS = np.array([max(1, len(dimension.choices) - 1) for dimension in SPACE.dimensions])


def additive(codes: Any) -> Any:
    return (codes / STEPS) @ EFFECTS


def played(strategy: Reinforce, asks: int, count: int = 16) -> None:
    for _ in range(asks):
        asked = strategy.ask(count)
        scores = additive(SPACE.encode([each.arch for each in asked]))
        strategy.tell([Result(each.arch, float(score), 100) for each, score in zip(asked, scores, strict=True)])


def test_it_learns_which_choices_are_good() -> None:
    strategy = Reinforce(SPACE, FREE, seed=0)
    usual = additive(strategy._drawn(500, np.random.default_rng(0)))
    played(strategy, 25)
    learned = additive(strategy._drawn(500, np.random.default_rng(0)))
    assert learned.mean() > usual.mean() + usual.std()


def test_a_step_is_the_gradient_of_the_chosen_arch() -> None:
    """Times rate and advantage, the latter in units of its usual size."""
    strategy = Reinforce(SPACE, FREE, seed=0, rate=0.5)
    strategy.logits = [np.random.default_rng(column).normal(size=len(row)) for column, row in enumerate(strategy.logits)]
    strategy.baseline, strategy.size, strategy.learned = 1.0, 2.0, 5
    before = [row.copy() for row in strategy.logits]
    code, live = SPACE.encode([SPACE.largest])[0], np.arange(len(before)) % 2 == 0
    strategy._learn(code, live, 3.0)
    advantage, size = 2.0, 0.9 * 2.0 + 0.1 * 2.0
    for column, (old, new) in enumerate(zip(before, strategy.logits, strict=True)):
        slope = (np.arange(len(old)) == code[column]) - softmax(old)
        assert new == pytest.approx(old + live[column] * 0.5 * advantage / size * slope)
    assert strategy.baseline == pytest.approx(0.9 * 1.0 + 0.1 * 3.0)


def test_with_a_strong_cost_term_the_policy_keeps_near_the_target() -> None:
    ends = COSTS.macs(SPACE.encode([SPACE.smallest, SPACE.largest])).astype(float)
    feasible = Feasible(SPACE, COSTS, (Budget("macs", float(round(ends[1]))),))
    small = Feasible(SPACE, COSTS, (Budget("macs", float(round((ends[0] * ends[1]) ** 0.5))),))
    assert (Reinforce(SPACE, FREE, seed=0).target, Reinforce(SPACE, small, seed=0).target) == (None, small.budgets[0].bound)
    found = []
    for each in (feasible, small):
        strategy = Reinforce(SPACE, each, seed=0, beta=100.0)
        played(strategy, 25)
        found.append(np.median(COSTS.macs(strategy._drawn(300, np.random.default_rng(0)))))
    usual = np.median(COSTS.macs(SPACE.sample_codes(300, np.random.default_rng(0))))
    assert found[0] > usual
    assert 0.75 < found[1] / small.budgets[0].bound < 1.3


def test_choices_without_effect_learn_nothing() -> None:
    space = load_space("mlp")
    strategy = Reinforce(space, Feasible(space, Costs(space), ()), seed=0)
    depth = [dimension.name for dimension in space.dimensions].index("depth")
    shallow = space.sample_codes(200, np.random.default_rng(0))
    archs = list(dict.fromkeys(space.decode(shallow[shallow[:, depth] == 0])))
    strategy.tell([Result(arch, float(position), 9) for position, arch in enumerate(archs)])
    last = max(column for column, dimension in enumerate(space.dimensions) if dimension.name.endswith(".width"))
    assert (strategy.logits[last] == 0).all()
    assert (strategy.logits[depth] != 0).any()


@pytest.mark.parametrize("settings", [{"beta": -1}, {"rate": 0}, {"momentum": 1}, {"rate": float("nan")}])
def test_settings_that_cannot_be_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(InputError, match="reinforce needs"):
        Reinforce(SPACE, FREE, seed=0, **settings)


@pytest.mark.parametrize(
    "damage", [{"logits": [[0.0]]}, {"logits": None}, {"logits": [[float("nan")] * 9] * 15}, {"baseline": "x"}]
)
def test_a_damaged_state_is_refused(damage: dict[str, Any]) -> None:
    strategy = Reinforce(SPACE, FREE, seed=0)
    with pytest.raises(InputError, match="search anew"):
        strategy.load_state({**strategy.state(), **damage})
