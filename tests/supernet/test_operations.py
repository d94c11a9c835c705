"""Counting by hand: what the recorded operators must add up to."""

from __future__ import annotations

import pytest

from supernet.families.mbconv import HeadSpec, MBConvSpec, StemSpec
from supernet.operations import Operations, cost_of


def test_a_strided_convolution_costs_what_the_hand_counts() -> None:
    cost = cost_of(StemSpec(in_channels=3, width=16, stride=2, in_size=224).operations())
    assert cost.macs == 112 * 112 * 16 * 3 * 9 == 5_419_008
    assert cost.params == 16 * 3 * 9 + 2 * 16


@pytest.mark.parametrize(("size", "stride", "out"), [(224, 2, 112), (7, 2, 4), (1, 2, 1), (5, 3, 2), (8, 1, 8), (9, 4, 3)])
def test_a_stride_leaves_the_ceiling_of_the_size(size: int, stride: int, out: int) -> None:
    ops = Operations(3, size)
    assert ops.conv(ops.input, 4, 3, stride=stride).size == ops.pool(ops.input, stride).size == out


@pytest.mark.parametrize(
    ("options", "macs", "params"),
    [
        ({}, 16 * 8 * 12, 8 * 12),
        ({"bias": True}, 16 * 8 * 12, 8 * 12 + 12),
        ({"norm": True}, 16 * 8 * 12, 8 * 12 + 24),
        ({"kernel_size": 5}, 25 * 16 * 8 * 12, 25 * 8 * 12),
        ({"kernel_size": 3, "groups": 4}, 9 * 16 * 2 * 12, 9 * 2 * 12),
    ],
)
def test_convolutions(options: dict[str, int], macs: int, params: int) -> None:
    ops = Operations(8, 4)
    ops.conv(ops.input, 12, **options)  # type: ignore[arg-type]
    cost = cost_of(ops)
    assert (cost.macs, cost.params) == (macs, params)


def test_what_multiplies_no_weights_costs_no_macs() -> None:
    ops = Operations(8, 4)
    ops.add(ops.swish(ops.input), ops.mul(ops.input, ops.mean(ops.pool(ops.input, 1))))
    assert (cost_of(ops).macs, cost_of(ops).params) == (0, 0)


def test_a_block_without_expansion_with_gate_stride_and_new_width() -> None:
    """8 -> 16 channels, 4 -> 2 pixels a side, kernel 3; the gate has 8 channels within (a quarter, but at least 8)."""
    spec = MBConvSpec(in_width=8, width=16, kernel_size=3, stride=2, expand_ratio=1, squeeze_excite=True, in_size=4)
    cost = cost_of(spec.operations())
    depthwise, gate, project, shortcut = 4 * 8 * 9, 8 * 8 + 8 * 8, 4 * 8 * 16, 4 * 8 * 16
    assert cost.macs == depthwise + gate + project + shortcut == 1440
    assert cost.params == (72 + 16) + (64 + 8 + 64 + 8) + (128 + 32) + 128 == 520


def test_a_block_without_expansion_keeps_a_width_that_is_no_multiple_of_eight() -> None:
    spec = MBConvSpec(in_width=20, width=20, kernel_size=3, stride=1, expand_ratio=1, squeeze_excite=False, in_size=4)
    assert spec.expanded == 20
    assert cost_of(spec.operations()).macs == 16 * (20 * 9 + 20 * 20)


def test_an_expansion_is_rounded_to_a_multiple_of_eight() -> None:
    spec = MBConvSpec(in_width=9, width=9, kernel_size=3, stride=1, expand_ratio=2, squeeze_excite=False, in_size=4)
    assert spec.expanded == 24  # 18 -> 16 would lose more than a tenth
    assert cost_of(spec.operations()).macs == 16 * (9 * 24 + 24 * 9 + 24 * 9)


def test_the_head_by_hand() -> None:
    cost = cost_of(HeadSpec(in_width=4, expand_ratio=3, width=20, classes=10, in_size=2).operations())
    assert cost.macs == 4 * 4 * 12 + 12 * 20 + 20 * 10
    assert cost.params == (4 * 12 + 24) + 12 * 20 + (20 * 10 + 10)


def test_live_memory_of_a_block_with_expansion() -> None:
    """8 channels, expanded to 16, 4 x 4 pixels: the input has 128 numbers, the wide maps 256.

    The dearest moment is either product of a swish: the block's input, the map, its sigmoid and the product.
    """
    spec = MBConvSpec(in_width=8, width=8, kernel_size=3, stride=1, expand_ratio=2, squeeze_excite=False, in_size=4)
    assert cost_of(spec.operations()).peak_memory_bytes == 4 * (128 + 3 * 256)


def test_live_memory_where_the_input_is_what_weighs() -> None:
    """The block of 1440 macs above, step by step: what lives while each operator runs, in numbers."""
    spec = MBConvSpec(in_width=8, width=16, kernel_size=3, stride=2, expand_ratio=1, squeeze_excite=True, in_size=4)
    x, y, out, vector = 8 * 16, 8 * 4, 16 * 4, 8
    swish, gate, gated, project = x + 3 * y, x + y + 2 * vector, x + 2 * y + vector, x + y + out
    pool, shortcut, add = x + out + y, out + y + out, 3 * out
    assert (swish, gate, gated, project, pool, shortcut, add) == (224, 176, 200, 224, 224, 160, 192)
    assert cost_of(spec.operations()).peak_memory_bytes == 4 * 224


def test_a_value_dies_after_its_last_reader() -> None:
    ops = Operations(1, 10)
    x = ops.pointwise("relu", ops.input)
    for _ in range(5):
        x = ops.pointwise("relu", x)
    assert cost_of(ops).peak_memory_bytes == 4 * 200

    held = Operations(1, 10)
    first = x = held.pointwise("relu", held.input)
    for _ in range(5):
        x = held.pointwise("relu", x)
    held.add(first, x)
    assert cost_of(held).peak_memory_bytes == 4 * 300


def test_features_count_kinds_macs_and_moved_elements() -> None:
    ops = Operations(2, 3)
    ops.linear(ops.flatten(ops.mean(ops.conv(ops.input, 4))), 5)
    features = dict(cost_of(ops).features)
    assert features == {
        "conv.count": 1, "conv.macs": 9 * 2 * 4, "conv.elements": 18 + 36,
        "linear.count": 1, "linear.macs": 20, "linear.elements": 4 + 5,
        "other.count": 2, "other.macs": 0, "other.elements": 36 + 4 + 4 + 4,
    }  # fmt: skip
