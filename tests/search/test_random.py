"""Random search: what `Feasible.sample` draws, each once. The conformance suite is in test_strategies.py."""

from __future__ import annotations

import numpy as np

from search.budget import Budget
from search.feasible import Feasible
from search.strategies import Result
from search.strategies.random import Random
from supernet.costs import Costs
from supernet.space import load_space

SPACE = load_space("digits")
FEASIBLE = Feasible(SPACE, Costs(SPACE), (Budget("macs", 1e6),))


def test_it_learns_nothing() -> None:
    asked = []
    for sign in (1, -1):
        strategy = Random(SPACE, FEASIBLE, seed=0)
        first = strategy.ask(16)
        strategy.tell([Result(proposal.arch, float(sign * place), 100) for place, proposal in enumerate(first)])
        asked.append((first, strategy.ask(16)))
    assert asked[0] == asked[1]


def test_its_asks_are_spread_over_the_costs() -> None:
    archs = [proposal.arch for proposal in Random(SPACE, FEASIBLE, seed=0).ask(64)]
    macs = FEASIBLE.main_cost(SPACE.encode(archs))
    least = FEASIBLE.main_cost(SPACE.encode([SPACE.smallest]))[0]
    thirds = np.digitize(macs, np.geomspace(least, 1e6, 4)[1:-1])
    assert set(thirds) == {0, 1, 2} or (thirds >= 1).sum() > 32


def test_archs_of_one_ask_that_share_their_first_choices_follow_one_another() -> None:
    archs = [proposal.arch for proposal in Random(SPACE, FEASIBLE, seed=0).ask(64)]
    codes = SPACE.encode(archs).tolist()
    assert codes == sorted(codes)


def test_a_space_of_a_thousand_is_asked_for_whole() -> None:
    space = load_space("mlp")
    strategy = Random(space, Feasible(space, Costs(space), ()), seed=0)
    archs = []
    while asked := strategy.ask(100):
        archs += [proposal.arch for proposal in asked]
        assert len(archs) <= space.size
    assert len(set(archs)) == len(archs) == space.size
