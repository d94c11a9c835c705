"""Optuna's samplers as strategies: what is rejected before evaluation, what they learn, and what of Optuna stays untouched."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
from typing import Any

import numpy as np
import pytest

from search.budget import Budget
from search.feasible import Feasible
from search.strategies import Proposal, Result
from search.strategies.optuna import MOST_REMEMBERED, SAMPLERS, Optuna
from supernet.costs import Costs
from supernet.errors import InputError
from supernet.space import load_space

optuna = pytest.importorskip("optuna")

SPACE = load_space("cifar-mbconv")
COSTS = Costs(SPACE)
FREE = Feasible(SPACE, COSTS, ())
ENDS = COSTS.macs(SPACE.encode([SPACE.smallest, SPACE.largest])).astype(float)
HALF = Feasible(SPACE, COSTS, (Budget("macs", float(round((ENDS[0] * ENDS[1]) ** 0.5))),))
EFFECTS = np.random.default_rng(3).normal(size=len(SPACE.dimensions))
STEPS = np.array([max(1, len(dimension.choices) - 1) for dimension in SPACE.dimensions])

cmaes = pytest.mark.skipif(importlib.util.find_spec("cmaes") is None, reason="cmaes is not installed")
every = pytest.mark.parametrize(
    "sampler", [pytest.param(each, marks={"cmaes": cmaes, "gp": pytest.mark.slow}.get(each, ())) for each in SAMPLERS]
)


def additive(proposal: Proposal) -> float:
    return float((SPACE.encode([proposal.arch])[0] / STEPS) @ EFFECTS)


def played(strategy: Optuna, asks: int, count: int = 6) -> list[list[Proposal]]:
    found = []
    for _ in range(asks):
        found.append(strategy.ask(count))
        strategy.tell([Result(each.arch, additive(each), 100) for each in found[-1]])
    return found


def begun(sampler: str, feasible: Feasible = HALF, told: int = 30, seed: int = 0) -> Optuna:
    """A strategy that was told so many random archs."""
    strategy = Optuna(SPACE, feasible, seed=seed, sampler=sampler)
    archs = SPACE.decode(feasible.sample(told, np.random.default_rng(9)))
    strategy.tell([Result(arch, additive(Proposal(arch, "")), 100) for arch in archs])
    return strategy


@every
def test_the_sampler_proposes_and_only_what_meets_the_budgets(sampler: str) -> None:
    strategy = begun(sampler)
    count = 2 if sampler == "gp" else 6
    asked = [each for asks in played(strategy, 3, count) for each in asks]
    assert HALF.mask(SPACE.encode([each.arch for each in asked])).all()
    assert len({each.arch for each in asked}) == len(asked) == 3 * count
    assert any(each.stage == sampler for each in asked)
    assert strategy.drawn >= sum(each.stage == sampler for each in asked) + strategy.infeasible + strategy.repeated
    assert strategy.notes()[0].startswith(f"Optuna's {sampler} made {strategy.drawn} proposals: {strategy.infeasible} outside")


@every
def test_a_budget_that_hardly_anything_meets_takes_bounded_tries_and_is_filled_up(sampler: str) -> None:
    feasible = Feasible(SPACE, COSTS, (Budget("macs", float(round(ENDS[0] * 1.1))),))
    strategy = begun(sampler, feasible, told=25)
    asked = strategy.ask(4)
    assert strategy.drawn <= 16
    assert strategy.infeasible > 0
    assert len(strategy.rejected) == (strategy.infeasible if sampler in {"tpe", "gp"} else 0)
    assert strategy.filled >= 1
    assert asked and feasible.mask(SPACE.encode([each.arch for each in asked])).all()


@pytest.mark.slow
@every
def test_resumed_it_goes_on_as_if_never_stopped(sampler: str) -> None:
    whole, resumed = begun(sampler), begun(sampler)
    for _ in range(3):
        count = 2 if sampler == "gp" else 5
        asked = whole.ask(count)
        assert asked == resumed.ask(count)
        whole.tell([Result(each.arch, additive(each), 100) for each in asked])
        resumed = Optuna(SPACE, HALF, seed=0, sampler=sampler)
        resumed.load_state(json.loads(json.dumps(whole.state(), allow_nan=False)))
        assert resumed.notes() == whole.notes()


@pytest.mark.slow
def test_tpe_learns_and_a_quasi_random_sequence_does_not() -> None:
    def later(sampler: str) -> float:
        return float(np.mean([additive(each) for asked in played(begun(sampler, FREE), 6)[2:] for each in asked]))

    usual = [additive(Proposal(arch, "")) for arch in SPACE.decode(FREE.sample(300, np.random.default_rng(1)))]
    assert later("tpe") > np.mean(usual) + 0.7 * np.std(usual)
    assert abs(later("qmc") - np.mean(usual)) < 0.7 * np.std(usual)


def test_a_quasi_random_sequence_fills_every_choice_evenly() -> None:
    strategy = Optuna(SPACE, FREE, seed=0, sampler="qmc")
    codes = SPACE.encode([each.arch for each in strategy.ask(64) if each.stage == "qmc"])
    assert len(codes) == 64
    for column, dimension in enumerate(SPACE.dimensions):
        shares = np.bincount(codes[:, column], minlength=len(dimension.choices)) / len(codes)
        assert abs(shares - 1 / len(dimension.choices)).max() < 0.1


def test_the_genetic_algorithm_gets_generations_and_both_objectives() -> None:
    strategy = begun("nsgaii", told=60)
    study = strategy._study(np.random.default_rng(0))
    assert [each.name for each in study.directions] == ["MAXIMIZE", "MINIMIZE"]
    key = next(key for key in study.trials[0].system_attrs if key.endswith("generation"))
    assert [trial.system_attrs[key] for trial in study.trials] == [place // 24 for place in range(60)]


def test_dimensions_without_order_are_categories_and_others_numbers() -> None:
    space = load_space("cell")
    made = Optuna(space, Feasible(space, Costs(space), ()), seed=0)._distributions
    for dimension in space.dimensions:
        if len(dimension.choices) == 1:
            assert dimension.name not in made
        else:
            kind = "IntDistribution" if dimension.ordered else "CategoricalDistribution"
            assert type(made[dimension.name]).__name__ == kind
    assert {type(each).__name__ for each in made.values()} == {"IntDistribution", "CategoricalDistribution"}


@pytest.mark.parametrize("sampler", ["tpe", "nsgaii", "qmc"])
def test_categories_and_archs_that_are_no_networks_are_handled(sampler: str) -> None:
    space = load_space("cell")
    feasible = Feasible(space, Costs(space), ())
    strategy = Optuna(space, feasible, seed=0, sampler=sampler)
    archs = space.decode(feasible.sample(30, np.random.default_rng(0)))
    strategy.tell([Result(arch, int(arch.key, 16) / 16**12, 10) for arch in archs])
    asked = strategy.ask(5)
    assert len(asked) == 5
    assert feasible.mask(space.encode([each.arch for each in asked])).all()


def test_optuna_is_left_as_it_was(capfd: pytest.CaptureFixture[str]) -> None:
    before = optuna.logging.get_verbosity()
    played(begun("tpe"), 2)
    assert optuna.logging.get_verbosity() == before
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("missing", ["optuna", "cmaes"])
def test_without_a_package_it_says_how_to_install_it(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    really = importlib.import_module

    def without(name: str, package: str | None = None) -> Any:
        if name == missing:
            raise ImportError(name)
        return really(name, package)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(InputError, match=f"run pip install {missing}") as caught:
        Optuna(SPACE, FREE, seed=0, sampler="cmaes")
    assert "\n" not in str(caught.value)


def test_an_unknown_sampler_is_refused() -> None:
    with pytest.raises(InputError, match="tpe, gp, nsgaii, cmaes, qmc"):
        Optuna(SPACE, FREE, seed=0, sampler="random")


@pytest.mark.parametrize("damage", [
    {"sampler": "gp"}, {"drawn": -1}, {"drawn": None}, {"rejected": [[[99] * len(SPACE.dimensions), 1.0]]}, {"rejected": [[[0], 1.0]]},
    {"rejected": [[[0] * len(SPACE.dimensions), math.nan]]}, {"rejected": [[[0] * len(SPACE.dimensions), 1.0]] * (MOST_REMEMBERED + 1)},
])  # fmt: skip
def test_a_damaged_state_is_refused(damage: dict[str, Any]) -> None:
    strategy = begun("tpe")
    with pytest.raises(InputError, match="search anew"):
        Optuna(SPACE, HALF, seed=0, sampler="tpe").load_state({**strategy.state(), **damage})
