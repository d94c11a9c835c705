"""Relax: its gradients are those of the expectations, and it finds what the losses favour, within the budgets."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from search.budget import Budget
from search.feasible import Feasible
from search.predictor import Values
from search.strategies import Result
from search.strategies.reinforce import softmax
from search.strategies.relax import FrozenSupernet, Relax
from supernet.arch import Arch
from supernet.costs import Costs
from supernet.errors import InputError
from supernet.model import Supernet
from supernet.space import Space, load_space
from supernet.step import resized
from supernet.task import TASKS

SPACE = load_space("digits")
COSTS = Costs(SPACE)
FREE = Feasible(SPACE, COSTS, ())
STEPS = np.array([max(1, len(dimension.choices) - 1) for dimension in SPACE.dimensions])
EFFECTS = np.random.default_rng(3).normal(size=len(SPACE.dimensions))


@dataclass
class Additive:
    """Losses that add up over the choices, with noise that all archs of a step share."""

    space: Space = SPACE
    bad: float | None = None
    steps: list[int] = field(default_factory=list)

    def losses(self, archs: Sequence[Arch], step: int) -> Values:
        self.steps.append(step)
        codes = self.space.encode(archs)
        found = -(codes / STEPS) @ EFFECTS + np.random.default_rng(step).normal()
        return np.where(np.arange(len(found)) == 0, self.bad, found) if self.bad is not None else found


def relaxed(feasible: Feasible = FREE, **settings: Any) -> Relax:
    return Relax(feasible.space, feasible, **{"seed": 0, "relaxable": Additive(), "steps": 60, **settings})


def every_arch() -> Any:
    return np.stack([each.ravel() for each in np.indices([len(dimension.choices) for dimension in SPACE.dimensions])], axis=1)


@pytest.mark.parametrize("which", ["loss", "cost"])
def test_gradients_are_those_of_the_expectations(which: str) -> None:
    strategy = relaxed(pairs=100)
    logits = np.where(strategy._offered, 0.5 * np.random.default_rng(1).normal(size=strategy._offered.shape), -np.inf)
    target = 0.7 * COSTS.macs(SPACE.encode([SPACE.largest]))[0]
    rng = np.random.default_rng(2)
    if which == "loss":
        value = lambda codes: -(codes / STEPS) @ EFFECTS  # noqa: E731
        draws = [strategy.gradient(logits, rng, step) for step in range(40)]
    else:
        value = lambda codes: np.abs(COSTS.macs(SPACE.canonical(codes)) / target - 1)  # noqa: E731
        draws = [strategy.cost_gradient(logits, rng, target) for _ in range(40)]
    mean, error = np.mean(draws, axis=0), np.std(draws, axis=0) / np.sqrt(len(draws))
    codes, chances = every_arch(), np.float64(1)
    for column in range(len(SPACE.dimensions)):
        chances = chances * softmax(logits[column])[codes[:, column]]
    values = value(codes) - chances @ value(codes)
    for column, dimension in enumerate(SPACE.dimensions):
        exact = np.bincount(
            codes[:, column], chances * values, len(dimension.choices)
        )  # by definition of the softmax's gradient
        assert (np.abs(mean[column, : len(exact)] - exact) < 5 * error[column, : len(exact)] + 1e-6).all(), dimension.name


def test_without_a_cost_term_it_finds_the_best_arch() -> None:
    strategy = relaxed(beta=0.0, targets=1, steps=150)
    best = SPACE.decode((EFFECTS > 0)[None] * STEPS[None])[0]
    asked = strategy.ask(8)
    found = [additive_gain(each.arch) for each in asked]
    assert asked[0].stage == "relaxed"
    assert max(found) > additive_gain(best) - 0.1 * np.abs(EFFECTS).sum()


def additive_gain(arch: Arch) -> float:
    return float((SPACE.encode([arch])[0] / STEPS) @ EFFECTS)


def test_targets_lie_along_the_costs_within_the_budgets() -> None:
    least, most = COSTS.macs(SPACE.encode([SPACE.smallest, SPACE.largest])).astype(float)
    feasible = Feasible(SPACE, COSTS, (Budget("macs", float(round((least * most) ** 0.5))),))
    strategy = relaxed(feasible, beta=30.0, steps=100)
    asked = strategy.ask(12)
    assert feasible.mask(SPACE.encode([each.arch for each in asked])).all()
    assert len(strategy.policies) == 3
    modes = SPACE.canonical(np.array([[int(row.argmax()) for row in policy] for policy in strategy.policies]))
    macs = COSTS.macs(modes)
    assert macs[0] < macs[1] < macs[2] < 1.3 * feasible.budgets[0].bound


def test_the_descent_is_made_once_and_is_part_of_the_state() -> None:
    judge = Additive()
    whole = relaxed(relaxable=judge)
    first = whole.ask(5)
    assert judge.steps == list(range(60)) * 3
    whole.tell([Result(each.arch, 0.5, 9) for each in first])
    never = Additive()
    resumed = relaxed(relaxable=never)
    resumed.load_state(json.loads(json.dumps(whole.state(), allow_nan=False)))
    assert whole.ask(5) == resumed.ask(5)
    assert never.steps == [] and len(judge.steps) == 180


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_losses_that_are_not_finite_teach_nothing(bad: float) -> None:
    strategy = relaxed(relaxable=Additive(bad=bad))
    assert len(strategy.ask(5)) == 5
    assert all(np.isfinite(row).all() for policy in strategy.policies for row in policy)


def test_without_losses_it_says_what_is_needed() -> None:
    with pytest.raises(InputError, match=r"relax needs the losses .* FrozenSupernet") as caught:
        Relax(SPACE, FREE, seed=0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("settings", [{"steps": 0}, {"pairs": 0}, {"targets": 0}, {"rate": 0}, {"beta": -1}])
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="relax needs at least"):
        relaxed(**settings)


@pytest.mark.parametrize("damage", [{"policies": None}, {"policies": [[[0.0]]]}, {"policies": 3}])
def test_a_damaged_state_is_refused(damage: dict[str, Any]) -> None:
    strategy = relaxed()
    with pytest.raises(InputError, match="search anew"):
        relaxed().load_state({**strategy.state(), **damage})


def test_losses_of_a_frozen_supernet_are_those_of_its_children_in_training() -> None:
    supernet, rng = Supernet(SPACE), torch.Generator().manual_seed(0)
    task, side = TASKS["classification"].of((1.0,)), SPACE.largest_resolution
    channels, classes = SPACE.family.in_channels, SPACE.family.classes
    batches = [
        (torch.randn(16, channels, side, side, generator=rng), torch.randint(classes, (16,), generator=rng)) for _ in range(2)
    ]
    frozen = FrozenSupernet(supernet, task, lambda step: batches[step % 2])
    archs = [SPACE.smallest, SPACE.largest]
    before = {name: value.clone() for name, value in supernet.state_dict().items()}
    for step in range(3):
        found = frozen.losses(archs, step)
        images, labels = batches[step % 2]
        for arch, loss in zip(archs, found, strict=True):
            with torch.no_grad():
                outputs = supernet(resized(images, SPACE.resolution(arch)) if SPACE.resolution(arch) != side else images, arch)
            assert loss == pytest.approx(float(torch.nn.functional.cross_entropy(outputs, labels)), rel=1e-5)
    assert all(torch.equal(before[name], value) for name, value in supernet.state_dict().items())
    assert all(parameter.grad is None for parameter in supernet.parameters())
    assert len(Relax(SPACE, FREE, seed=0, relaxable=frozen, steps=2, targets=1).ask(3)) == 3
