"""What children have in common, against counting it by hand and pair by pair."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search.trie import Trie, macs_alone, macs_shared, ordered, output_bytes
from supernet.arch import Arch
from supernet.costs import arch_costs
from supernet.family import BlockSpec, block_cost
from supernet.space import Space

SPACE = Space.from_definition({
    "format": 1, "name": "tiny", "family": "mbconv", "resolution": [6, 8], "stem": {"width": [8, 16], "stride": 1},
    "stages": [{"width": [8, 16], "depth": [1, 3], "kernel_size": [3, 5], "expand_ratio": [1, 2], "stride": 2}],
    "head": {"expand_ratio": 2, "width": [16, 24]}, "classes": 3, "in_channels": 1,
})  # fmt: skip
EVERYTHING: dict[str, Any] = {"most_weight_bytes": 10**9, "most_held_bytes": 10**9}


def path(arch: Arch) -> tuple[tuple[str, BlockSpec], ...]:
    return tuple(SPACE.plan(arch).items())


def drawn(seed: int, count: int) -> list[Arch]:
    rng = np.random.default_rng(seed)
    parent = SPACE.sample(rng)
    return [parent, *(SPACE.mutate(parent, rng, 0.2) if i % 2 else SPACE.sample(rng) for i in range(count))]


def prefixes(archs: list[Arch]) -> set[tuple[tuple[str, BlockSpec], ...]]:
    return {path(arch)[:length] for arch in archs for length in range(1, len(path(arch)) + 1)}


def in_common(one: Arch, other: Arch) -> int:
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(path(one), path(other), strict=False)))


many = pytest.mark.parametrize(("seed", "count"), [(0, 0), (1, 3), (2, 12), (3, 40)])


@many
def test_shared_macs_are_those_of_the_different_prefixes(seed: int, count: int) -> None:
    archs = drawn(seed, count)
    assert macs_shared(SPACE, archs) == sum(block_cost(prefix[-1][1]).macs for prefix in prefixes(archs))
    assert macs_alone(SPACE, archs) == sum(arch_costs(SPACE, arch)["macs"] for arch in archs)
    assert len(list(Trie(SPACE, archs).nodes())) == len(prefixes(archs))


def test_a_head_is_all_that_two_heads_do_not_share() -> None:
    narrow, wide = (SPACE.arch({**SPACE.largest.as_dict(), "head.width": width}) for width in (16, 24))
    head = block_cost(SPACE.plan(narrow)["head"]).macs
    assert macs_shared(SPACE, [narrow, wide]) == macs_shared(SPACE, [wide]) + head
    assert macs_alone(SPACE, [narrow, wide]) == macs_alone(SPACE, [wide]) + arch_costs(SPACE, narrow)["macs"]


def test_children_of_different_resolutions_share_nothing() -> None:
    archs = [SPACE.arch({**SPACE.largest.as_dict(), "resolution": size}) for size in (6, 8)]
    assert macs_shared(SPACE, archs) == macs_alone(SPACE, archs)


@many
def test_what_is_missing_is_what_adding_brings(seed: int, count: int) -> None:
    trie, before = Trie(SPACE), 0
    for arch in drawn(seed, count):
        missing = trie.missing(arch)
        assert trie.add(arch) == missing
        assert trie.macs == before + missing
        before += missing
        assert trie.missing(arch) == 0


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 100), st.integers(0, 20))
def test_in_order_neighbours_share_all_that_can_be_shared(seed: int, count: int) -> None:
    """Of an order in which equal prefixes lie together, the sum of what neighbours do not share is the number of nodes."""
    archs = drawn(seed, count)
    found = ordered(SPACE, archs)
    assert sorted(found, key=str) == sorted(archs, key=str)
    new = [len(path(found[0]))] + [len(path(b)) - in_common(a, b) for a, b in itertools.pairwise(found)]
    assert sum(new) == len(prefixes(archs))
    sizes = [SPACE.resolution(arch) for arch in found]
    assert sizes == sorted(sizes)


def test_nothing_is_an_empty_trie() -> None:
    assert ordered(SPACE, []) == []
    assert macs_shared(SPACE, []) == macs_alone(SPACE, []) == 0
    assert Trie(SPACE).groups(**EVERYTHING) == []


# --- groups ---


@many
def test_groups_are_the_order_cut_into_pieces_of_one_resolution(seed: int, count: int) -> None:
    trie = Trie(SPACE, drawn(seed, count))
    for limits in (
        EVERYTHING,
        {"most_weight_bytes": 60_000, "most_held_bytes": 9000},
        {"most_weight_bytes": 0, "most_held_bytes": 0},
    ):
        groups = trie.groups(**limits)
        assert [arch for group in groups for arch in group] == trie.archs
        assert all(len({SPACE.resolution(arch) for arch in group}) == 1 for group in groups)
    assert len(trie.groups(**EVERYTHING)) == len({SPACE.resolution(arch) for arch in trie.archs})
    assert all(len(set(group)) == 1 for group in groups)  # where nothing fits, each is alone


def weight_bytes(group: list[Arch]) -> int:
    return sum(4 * block_cost(spec).params for _, spec in {step for arch in group for step in path(arch)})


def held_bytes(group: list[Arch]) -> int:
    """Most that waits: on any path, the outputs of nodes behind which several nodes follow."""
    together = prefixes(group)
    parting = {prefix for prefix in together if sum(other[:-1] == prefix for other in together) > 1}
    return max(
        sum(output_bytes(path(arch)[length - 1][1]) for length in range(1, len(path(arch))) if path(arch)[:length] in parting)
        for arch in group
    )


@many
def test_groups_keep_the_limits(seed: int, count: int) -> None:
    trie = Trie(SPACE, drawn(seed, count))
    for weights, held in ((60_000, 10**9), (10**9, 5000), (80_000, 9000)):
        for group in trie.groups(most_weight_bytes=weights, most_held_bytes=held):
            assert len(set(group)) == 1 or (weight_bytes(group) <= weights and held_bytes(group) <= held)


def test_groups_are_cut_only_where_they_must_be() -> None:
    archs = [arch for arch in drawn(3, 40) if SPACE.resolution(arch) == 8]
    trie = Trie(SPACE, archs)
    most = held_bytes(archs)
    assert len(trie.groups(most_weight_bytes=weight_bytes(archs), most_held_bytes=most)) == 1
    assert len(trie.groups(most_weight_bytes=weight_bytes(archs), most_held_bytes=most - 1)) == 2
    assert len(trie.groups(most_weight_bytes=weight_bytes(archs) - 1, most_held_bytes=most)) == 2


def test_what_a_block_gives() -> None:
    plan = SPACE.plan(SPACE.largest)
    assert output_bytes(plan["stem"]) == 4 * 16 * 8 * 8
    assert output_bytes(plan["stage1_1"]) == 4 * 16 * 4 * 4
    assert output_bytes(plan["head"]) == 4 * 3
