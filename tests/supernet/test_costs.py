"""Costs of many archs at once against the archs one by one, and against the networks themselves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from deploy.fold import folded
from supernet import config
from supernet.costs import METRICS, Costs, arch_costs, block_cost
from supernet.model import plain
from supernet.operations import Constant, Operations, cost_of
from supernet.space import Space, load_space

SHIPPED = [Costs(load_space(name)) for name in config.names("spaces")]


def counted_macs(network: nn.Module, images: torch.Tensor) -> int:
    """Macs of the convolutions and linear layers, counted while the network runs."""
    macs = 0

    def count(module: nn.Module, _: object, output: torch.Tensor) -> None:
        nonlocal macs
        macs += output[0].numel() * module.weight[0].numel()

    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)
    with torch.no_grad():
        network.eval()(images)
    return macs


@settings(deadline=None)
@given(st.sampled_from(SHIPPED), st.integers(0, 2**32))
def test_many_at_once_cost_the_same_as_one_by_one(costs: Costs, seed: int) -> None:
    codes = costs.space.sample_codes(5, np.random.default_rng(seed))
    at_once = costs.all(codes)
    assert tuple(at_once) == METRICS
    for position, arch in enumerate(costs.space.decode(codes)):
        assert {name: int(values[position]) for name, values in at_once.items()} == arch_costs(costs.space, arch)


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(st.data())
def test_any_valid_space_builds_networks_that_cost_what_is_counted(
    definitions: st.SearchStrategy[dict[str, Any]], data: st.DataObject
) -> None:
    """Also where widths are no multiples of 8, maps shrink to a pixel and strides are 3 or 4."""
    space = Space.from_definition(data.draw(definitions))
    arch = space.sample(np.random.default_rng(data.draw(st.integers(0, 9))))
    network, size = plain(space, arch), space.resolution(arch)
    costs = arch_costs(space, arch)
    assert costs["params"] == sum(parameter.numel() for parameter in network.parameters())
    assert costs["macs"] == counted_macs(network, torch.zeros(1, space.family.in_channels, size, size))
    at_once = Costs(space).all(space.encode([arch]))
    assert {name: int(values[0]) for name, values in at_once.items()} == costs


@settings(deadline=None, max_examples=20)
@given(st.data())
def test_the_size_is_that_of_the_weights_without_batch_norm(
    definitions: st.SearchStrategy[dict[str, Any]], data: st.DataObject
) -> None:
    """In fp32. (That it is the size of the exported weights is part of every family's conformance.)"""
    space = Space.from_definition(data.draw(definitions))
    arch = space.sample(np.random.default_rng(data.draw(st.integers(0, 9))))
    network = folded(plain(space, arch).eval())
    assert arch_costs(space, arch)["model_size_bytes"] == 4 * sum(parameter.numel() for parameter in network.parameters())


def test_integers_and_single_numbers_of_an_operator_are_no_weights() -> None:
    ops = Operations(8, 4)
    ops.conv(ops.input, 16, 3, bias=True)
    x = ops.reshape(ops.input, 8, 16)
    ops.apply("Mul", (x,), x.shape, constants=(Constant(),))
    ops.layer_norm(x)
    assert [op.weights for op in ops.listed] == [8 * 16 * 9 + 16, 0, 0, 32]
    assert cost_of(ops).model_size_bytes == 4 * (8 * 16 * 9 + 16 + 32)


@pytest.mark.parametrize(
    "costs", [c for c in SHIPPED if c.space.name in {"digits", "cell", "cifar-vit"}], ids=lambda costs: costs.space.name
)
def test_a_sum_of_a_value_of_every_block_is_what_the_features_give(costs: Costs) -> None:
    rng = np.random.default_rng(3)
    weights = dict(zip(costs.feature_names, rng.random(len(costs.feature_names)), strict=True))
    codes = costs.space.sample_codes(20, rng)
    found = costs.summed(lambda spec: sum(weights[name] * value for name, value in block_cost(spec).features))(codes)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, costs.features(codes) @ list(weights.values()), rtol=1e-12)


@pytest.mark.slow
@settings(deadline=None, max_examples=30)
@given(st.sampled_from(SHIPPED), st.integers(0, 2**32))
def test_features_add_up_to_the_macs_and_to_the_number_of_operators(costs: Costs, seed: int) -> None:
    codes = costs.space.sample_codes(4, np.random.default_rng(seed))
    features, names = costs.features(codes), costs.feature_names
    macs = [position for position, name in enumerate(names) if name.endswith(".macs")]
    counts = [position for position, name in enumerate(names) if name.endswith(".count")]
    assert np.array_equal(features[:, macs].sum(axis=1), costs.macs(codes))
    operators = [
        sum(len(spec.operations().listed) for spec in costs.space.plan(arch).values()) for arch in costs.space.decode(codes)
    ]
    assert features[:, counts].sum(axis=1).tolist() == operators


def test_features_are_those_of_the_blocks() -> None:
    costs = SHIPPED[0]
    arch = costs.space.sample(np.random.default_rng(0))
    total = dict.fromkeys(costs.feature_names, 0.0)
    for spec in costs.space.plan(arch).values():
        for name, value in block_cost(spec).features:
            total[name] += value
    assert costs.features(costs.space.encode([arch]))[0].tolist() == list(total.values())


def test_costs_are_exact_integers_and_features_floats() -> None:
    costs = SHIPPED[0]
    codes = costs.space.sample_codes(3, np.random.default_rng(0))
    assert {values.dtype for values in costs.all(codes).values()} == {np.dtype(np.int64)}
    assert {values.shape for values in costs.all(codes).values()} == {(3,)}
    assert costs.features(codes).dtype == np.float64
    assert costs.features(codes).shape == (3, len(costs.feature_names))
    assert all(type(value) is int for value in arch_costs(costs.space, costs.space.smallest).values())


@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.uint16, np.int64])
def test_codes_of_any_integer_type_cost_the_same(dtype: type) -> None:
    costs = SHIPPED[0]
    codes = costs.space.sample_codes(9, np.random.default_rng(1))
    assert np.array_equal(costs.macs(codes.astype(dtype)), costs.macs(codes))
    assert np.array_equal(costs.macs(np.asfortranarray(codes)), costs.macs(codes))


def test_no_archs_cost_nothing_and_break_nothing() -> None:
    for costs in SHIPPED:
        codes = costs.space.encode([])
        assert all(values.shape == (0,) and values.dtype == np.int64 for values in costs.all(codes).values())
        assert costs.features(codes).shape == (0, len(costs.feature_names))


def test_costing_does_not_change_the_codes() -> None:
    costs = SHIPPED[0]
    codes = costs.space.sample_codes(9, np.random.default_rng(1))
    before = codes.copy()
    costs.all(codes)
    costs.features(codes)
    assert np.array_equal(codes, before)


def test_peak_memory_is_that_of_the_hungriest_block() -> None:
    space = SHIPPED[0].space
    blocks = [block_cost(spec).peak_memory_bytes for spec in space.plan(space.largest).values()]
    assert arch_costs(space, space.largest)["peak_memory_bytes"] == max(blocks) < sum(blocks)
