"""Which children learn at a step."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import numpy as np
import pytest
import torch

from supernet.arch import Arch
from supernet.costs import Costs, arch_costs
from supernet.errors import InputError
from supernet.sandwich import Bins, Rule, Sampler, Sampling, pick, sandwich, step_rng
from supernet.space import Space, load_space

DIGITS = load_space("digits")
ATTENTIVE: list[Rule] = ["best_up", "worst_up"]


@pytest.mark.parametrize(
    ("children", "roles"),
    [
        (1, ["largest"]),
        (2, ["largest", "smallest"]),
        (3, ["largest", "smallest", "random"]),
        (5, ["largest", "smallest", *["random"] * 3]),
    ],
)
def test_the_largest_teaches_first_then_the_smallest_then_random_ones(children: int, roles: list[str]) -> None:
    chosen = sandwich(DIGITS, children, step_rng(0, 0))
    assert [role for role, _ in chosen] == roles
    assert chosen[0][1] == DIGITS.largest
    assert all(arch == DIGITS.smallest for role, arch in chosen if role == "smallest")
    assert all(DIGITS.contains(arch) for _, arch in chosen)


def test_the_same_seed_and_step_choose_the_same_children_and_others_do_not() -> None:
    keys = {(seed, step): sandwich(DIGITS, 6, step_rng(seed, step)) for seed in (0, 1) for step in (0, 1, 2)}
    assert all(sandwich(DIGITS, 6, step_rng(*key)) == chosen for key, chosen in keys.items())
    assert len({tuple(chosen) for chosen in keys.values()}) == 6


def test_a_step_chooses_the_same_children_whatever_went_before() -> None:
    later = [sandwich(DIGITS, 4, step_rng(3, step)) for step in range(10)][7]
    assert sandwich(DIGITS, 4, step_rng(3, 7)) == later


def test_random_children_reach_every_choice(tiny_space: Space) -> None:
    seen = {pair for step in range(40) for _, arch in sandwich(tiny_space, 3, step_rng(0, step))[2:] for pair in arch}
    assert seen == {(dimension.name, choice) for dimension in tiny_space.dimensions for choice in dimension.choices}


# --- bins ---


@pytest.fixture(scope="module")
def bins() -> Bins:
    return Bins(DIGITS, seed=0, bins=16, pool=20_000)


def bin_of(space: Space, arch: Arch, count: int) -> int:
    low, high, here = (arch_costs(space, each)["macs"] for each in (space.smallest, space.largest, arch))
    return min(count - 1, (here - low) * count // (high - low))


def test_the_histogram_is_that_of_random_archs_and_members_lie_in_their_bin(bins: Bins) -> None:
    other = DIGITS.sample_codes(20_000, np.random.default_rng(99))
    low, high = (arch_costs(DIGITS, each)["macs"] for each in (DIGITS.smallest, DIGITS.largest))
    expected = np.histogram(Costs(DIGITS).macs(other), bins=16, range=(low, high))[0] / 20_000
    np.testing.assert_allclose(bins.histogram, expected, atol=0.015)  # 4 standard errors of a share of a half
    assert bins.histogram.sum() == pytest.approx(1)
    found = [bins.members(number) for number in range(16)]
    assert [bool(members) for members in found] == [share > 0 for share in bins.histogram]
    assert all(bin_of(DIGITS, arch, 16) == number for number, members in enumerate(found) for arch in members[:20])
    archs = list(itertools.chain(*found))
    assert len(set(archs)) == len(archs), "an arch is a member once, however often it was drawn"
    assert all(DIGITS.contains(arch) for arch in archs[::500])


def test_candidates_are_different_archs_of_one_bin_and_bins_come_as_often_as_in_the_space(bins: Bins) -> None:
    seen = np.zeros(16)
    rng = np.random.default_rng(1)
    for _ in range(400):
        archs = bins.candidates(3, rng)
        assert len(set(archs)) == 3
        numbers = {bin_of(DIGITS, arch, 16) for arch in archs}
        assert len(numbers) == 1
        seen[numbers.pop()] += 1 / 400
    np.testing.assert_allclose(seen, bins.histogram, atol=0.08)


def test_a_candidate_alone_is_a_random_arch() -> None:
    """An arch that the space draws more often (choices without effect) is a candidate more often."""
    space = load_space("mlp")
    counts: dict[Arch, int] = {}
    rng, pool = np.random.default_rng(2), Bins(space, seed=3, bins=1, pool=20_000)
    for _ in range(4000):
        (arch,) = pool.candidates(1, rng)
        counts[arch] = counts.get(arch, 0) + 1
    shallow = [arch for arch in counts if arch["depth"] == min(space.by_name["depth"].choices)]
    share = len(space.by_name["depth"].choices)
    assert sum(counts[arch] for arch in shallow) / 4000 == pytest.approx(1 / share, abs=0.04)


def test_the_pool_follows_from_the_seed() -> None:
    one, same, other = (set(Bins(DIGITS, seed, bins=1, pool=100).members(0)) for seed in (0, 0, 1))
    assert one == same != other


def test_a_space_with_fewer_archs_than_candidates_gives_what_it_has() -> None:
    one = Bins(load_space("vit-tiny"), seed=0)
    assert one.candidates(3, np.random.default_rng(0)) == [one.space.largest]
    assert one.histogram.tolist() == [1.0] + [0.0] * 63
    few = Bins(load_space("mlp"), seed=0, bins=400, pool=5000)
    found = [few.candidates(50, np.random.default_rng(seed)) for seed in range(40)]
    assert 1 <= min(len(archs) for archs in found) < 50
    assert all(len(set(archs)) == len(archs) for archs in found)


# --- the sampler ---


@pytest.mark.parametrize("children", [1, 2, 3, 5])
def test_without_a_rule_the_children_are_those_of_the_sandwich(children: int) -> None:
    sampler = Sampler(DIGITS, children, Sampling(), seed=7)
    for step in (0, 1, 50):
        expected = sandwich(DIGITS, children, step_rng(7, step))
        assert sampler.children(step) == [(role, [arch]) for role, arch in expected]
    assert "bins" not in vars(sampler), "no pool was made"


@pytest.mark.parametrize("rule", ATTENTIVE)
@pytest.mark.parametrize("children", [1, 2, 3, 5])
def test_a_rule_gives_candidates_for_the_random_children_only(rule: Rule, children: int) -> None:
    sampler = Sampler(DIGITS, children, Sampling(rule, candidates=4, bins=8), seed=7)
    chosen = sampler.children(3)
    assert [role for role, _ in chosen] == ["largest", "smallest", *["random"] * 3][:children]
    assert [archs for _, archs in chosen[:2]] == [[DIGITS.largest], [DIGITS.smallest]][:children]
    for _, archs in chosen[2:]:
        assert len(set(archs)) == 4
        assert len({bin_of(DIGITS, arch, 8) for arch in archs}) == 1
    assert ("bins" in vars(sampler)) == (children > 2)


@pytest.mark.parametrize("rule", ["uniform", *ATTENTIVE])
def test_without_ends_all_children_are_random(rule: Rule) -> None:
    sampler = Sampler(DIGITS, 4, Sampling(rule), seed=0, ends=False)
    chosen = sampler.children(0)
    assert [role for role, _ in chosen] == ["random"] * 4
    assert len({archs[0] for _, archs in chosen}) == 4
    assert {len(archs) for _, archs in chosen} == {1 if rule == "uniform" else 3}


@pytest.mark.parametrize("rule", ["uniform", *ATTENTIVE])
def test_the_children_follow_from_seed_and_step_alone(rule: Rule) -> None:
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]  # noqa: NPY002
    one, other = (Sampler(DIGITS, 4, Sampling(rule), seed=11) for _ in range(2))
    forwards = [one.children(step) for step in range(6)]
    backwards = [other.children(step) for step in reversed(range(6))][::-1]
    assert forwards == backwards
    assert len({tuple(archs) for children in forwards for _, archs in children[2:]}) == 12
    assert Sampler(DIGITS, 4, Sampling(rule), seed=12).children(0) != forwards[0]
    assert torch.equal(state[0], torch.get_rng_state())
    assert state[1:] == (random.getstate(), np.random.get_state()[1].tolist())  # type: ignore[index]  # noqa: NPY002


def test_choices_without_order_still_take_turns_under_the_uniform_rule() -> None:
    space = load_space("cell")
    column, dimension = next((i, each) for i, each in enumerate(space.dimensions) if not each.ordered)
    children = len(dimension.choices) + 2
    for step in range(5):
        chosen = Sampler(space, children, Sampling(), seed=0).children(step)[2:]
        codes = space.encode([archs[0] for _, archs in chosen])[:, column]
        assert len(set(codes.tolist())) >= len(dimension.choices) - 1  # a turn is lost where it has no effect


def test_best_up_and_worst_up_pull_apart_what_is_trained() -> None:
    """Where loss falls with macs, best-up trains larger networks than uniform draws, worst-up smaller ones, within one bin's width."""
    mean: dict[Rule, float] = {}
    low, high = (arch_costs(DIGITS, each)["macs"] for each in (DIGITS.smallest, DIGITS.largest))
    for rule in ATTENTIVE:
        sampler = Sampler(DIGITS, 6, Sampling(rule, candidates=5, bins=4), seed=0)
        drawn = [archs for step in range(60) for _, archs in sampler.children(step)[2:]]
        macs = [{arch: arch_costs(DIGITS, arch)["macs"] for arch in archs} for archs in drawn]
        picked = [own[pick(archs, [-own[arch] for arch in archs], rule)] for archs, own in zip(drawn, macs, strict=True)]
        assert all(value == (max if rule == "best_up" else min)(own.values()) for value, own in zip(picked, macs, strict=True))
        mean[rule] = float(np.mean(picked))
    assert 0 < mean["best_up"] - mean["worst_up"] < (high - low) / 4


# --- pick ---


A, B, C = (Arch((("depth", depth),)) for depth in (1, 2, 3))


@pytest.mark.parametrize(
    ("losses", "best", "worst"),
    [
        ([2.0, 1.0, 3.0], B, C),
        ([1.0, 1.0, 1.0], A, A),
        ([math.nan, 1.0, 3.0], B, A),
        ([2.0, math.inf, math.nan], A, B),
        ([math.nan, math.nan, math.nan], A, A),
        ([-math.inf, 0.0, 1.0], A, C),
    ],
)
def test_the_lowest_or_the_highest_loss_is_picked(losses: list[float], best: Arch, worst: Arch) -> None:
    assert pick([A, B, C], losses, "best_up") == best
    assert pick([A, B, C], losses, "worst_up") == worst


def test_one_candidate_needs_no_loss_and_others_need_one_each() -> None:
    assert pick([A], [], "uniform") == pick([A], [], "best_up") == A
    for losses, rule in (([1.0, 2.0], "uniform"), ([1.0], "best_up"), ([], "worst_up")):
        with pytest.raises(ValueError, match=f"{rule} cannot choose among 2 candidates with {len(losses)} losses"):
            pick([A, B], losses, rule)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="among 0 candidates"):
        pick([], [], "best_up")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rule": "best"}, "sampling.rule is one of"),
        ({"candidates": 0}, "sampling.candidates is at least 1"),
        ({"bins": 0}, "bins"),
    ],
)
def test_numbers_without_a_meaning_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Sampling(**change)


def test_there_is_a_child() -> None:
    with pytest.raises(InputError, match="children is at least 1, not 0"):
        Sampler(DIGITS, 0, Sampling(), seed=0)
