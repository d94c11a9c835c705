"""What every space must hold: costs that others count, archs in canonical form. Part of the suite of `deploy/conformance.py`."""

from __future__ import annotations

import itertools
from functools import cache
from typing import ClassVar

import numpy as np
import torch

from supernet.costs import Costs, arch_costs
from supernet.family import BlockSpec
from supernet.model import Supernet
from supernet.recount import recount
from supernet.space import Space


class SpaceSuite:
    """Properties of a space: costs and archs."""

    space: ClassVar[Space]
    fvcore_children: ClassVar[int] = 20
    """Children counted by fvcore in the quick test; the other takes 200."""

    # --- costs ---

    def test_macs_equal_fvcore(self) -> None:
        self._compare_with_fvcore(self.fvcore_children)

    def test_macs_equal_fvcore_for_200_children(self) -> None:
        self._compare_with_fvcore(200)

    def _compare_with_fvcore(self, children: int) -> None:
        rng = np.random.default_rng(11)
        archs = [self.space.smallest, self.space.largest, *(self.space.sample(rng) for _ in range(children))]
        for arch in dict.fromkeys(archs):
            costs = arch_costs(self.space, arch)
            assert {name: costs[name] for name in ("macs", "params")} == recount(self.space, arch), arch

    def test_costs_of_many_archs_equal_those_of_each(self) -> None:
        codes = self.space.sample_codes(50, np.random.default_rng(12))
        table = Costs(self.space).all(codes)
        for position, arch in enumerate(self.space.decode(codes)):
            assert {name: int(values[position]) for name, values in table.items()} == arch_costs(self.space, arch)

    def test_no_cost_falls_when_a_choice_grows_so_smallest_and_largest_are_the_ends(self) -> None:
        costs, rng = Costs(self.space), np.random.default_rng(13)
        codes = self.space.sample_codes(500, rng)
        ends = costs.all(self.space.encode([self.space.smallest, self.space.largest]))
        here = costs.all(codes)
        for name, values in here.items():
            assert (ends[name][0] <= values).all(), name
            assert (values <= ends[name][1]).all() or name not in self.space.family.bounded, name
        for column, dimension in enumerate(self.space.dimensions):
            if not dimension.ordered:
                continue
            grown = codes.copy()
            grown[:, column] = np.minimum(grown[:, column] + 1, len(dimension.choices) - 1)
            for name, values in costs.all(grown).items():
                assert (values >= here[name])[self.space.valid(grown)].all(), (dimension.name, name)

    # --- archs ---

    def test_equal_networks_have_equal_keys_and_different_ones_different(self) -> None:
        rng = np.random.default_rng(14)
        counts = [len(dimension.choices) for dimension in self.space.dimensions]
        raw = np.stack([rng.integers(count, size=300) for count in counts], axis=1)
        archs = self.space.decode(raw[self.space.valid(raw)])
        archs += [self.space.mutate(arch, rng, 0.0) for arch in archs]
        by_plan: dict[tuple, set[str]] = {}
        for arch in dict.fromkeys(archs):
            by_plan.setdefault(tuple(self.space.plan(arch).items()), set()).add(arch.key)
        assert all(len(keys) == 1 for keys in by_plan.values())
        assert len({key for keys in by_plan.values() for key in keys}) == len(by_plan)

    def test_a_choice_without_effect_changes_nothing_and_may_be_left_out(self) -> None:
        rng = np.random.default_rng(16)
        for arch in [self.space.smallest, *(self.space.sample(rng) for _ in range(20))]:
            codes = self.space.encode([arch])
            assert (self.space.canonical(codes) == codes).all() and self.space.contains(arch)
            dead = ~self.space._live(codes)[0]
            other = np.where(dead, [len(dimension.choices) - 1 for dimension in self.space.dimensions], codes)
            assert self.space.decode(other) == [arch]
            named = {name: choice for (name, choice), gone in zip(arch, dead, strict=True) if not gone}
            assert self.space.arch(named) == arch

    def test_whatever_is_drawn_is_a_network_in_its_canonical_form(self) -> None:
        rng = np.random.default_rng(17)
        parents = [self.space.sample(rng) for _ in range(20)]
        drawn = [*parents, *self.space.sample_apart(7, rng)]
        drawn += [self.space.mutate(arch, rng, 0.3) for arch in parents]
        drawn += [self.space.crossover(one, other, rng) for one, other in itertools.pairwise(parents)]
        assert all(self.space.contains(arch) for arch in drawn)
        assert self.space.size == 1 or all(self.space.mutate(arch, rng) != arch for arch in parents)

    def test_choices_without_order_take_turns(self) -> None:
        space = self.space
        unordered = [dimension for dimension in space.dimensions if not dimension.ordered]
        seen: dict[str, set] = {dimension.name: set() for dimension in unordered}
        rng = np.random.default_rng(18)
        for _ in range(30):
            for arch in space.sample_apart(2, rng):
                for dimension in unordered:
                    seen[dimension.name].add(arch[dimension.name])
        assert all(seen[dimension.name] == set(dimension.choices) for dimension in unordered)

    def test_every_stored_weight_belongs_to_some_child_and_zero_gamma_names_exist(self) -> None:
        fresh = Supernet(self.space)
        zeroed = [name for name, value in fresh.named_parameters() if name.endswith(self.space.family.zero_init)]
        assert bool(zeroed) == bool(self.space.family.zero_init)
        assert all(not fresh.get_parameter(name).any() for name in zeroed)
        missing = {name for name, _ in fresh.named_parameters()}
        rng = np.random.default_rng(15)
        for arch in [self.space.largest, self.space.smallest, *(self.space.sample(rng) for _ in range(200))]:
            missing -= {f"{slot}.{name}" for slot, spec in self.space.plan(arch).items() for name in _names(spec.geometry)}
        assert not missing


@cache
def _names(geometry: BlockSpec) -> list[str]:
    with torch.device("meta"):
        return [name for name, _ in geometry.build().named_parameters()]
