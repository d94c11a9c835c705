"""Which children learn at a step."""

from __future__ import annotations

import pytest

from supernet.sandwich import sandwich, step_rng
from supernet.space import Space, load_space

DIGITS = load_space("digits")


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
