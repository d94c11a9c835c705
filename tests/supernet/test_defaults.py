"""What is chosen for data not seen before: space, recipe, epochs."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from supernet import config, defaults
from supernet.costs import Costs
from supernet.recipe import load_recipe
from supernet.sandwich import sandwich, step_rng
from supernet.space import Space, load_space


@pytest.mark.parametrize(
    ("image_size", "images", "device"),
    [
        (1, 2, "cpu"),
        (16, 1797, "cuda"),
        (17, 60_000, "cpu"),
        (64, 10**9, "cuda"),
        (200, 2, "cuda"),
        (4000, 10**9, "cpu"),
        (200, 10**6, "cuda"),
    ],
)
def test_whatever_is_chosen_is_shipped_and_says_why(image_size: int, images: int, device: str) -> None:
    name, why = defaults.space_for(image_size, images, device)
    assert str(image_size) in why
    recipe = load_recipe(defaults.recipe_for(name))
    epochs = defaults.epochs_for(load_space(name), images, device, recipe.children)
    assert defaults.LEAST_EPOCHS <= epochs <= defaults.MOST_EPOCHS
    assert type(epochs) is int


def test_every_shipped_space_has_its_recipe_and_others_have_one_too(tiny_space: Space) -> None:
    used = {defaults.recipe_for(name) for name in config.names("spaces")}
    assert used | {"alphanet"} == set(config.names("train"))  # that one is asked for by name
    assert defaults.recipe_for(tiny_space.name) in config.names("train")
    assert defaults.RECIPES.keys() == set(config.names("spaces"))
    assert defaults.MOST_SEEN.keys() == set(defaults.RECIPES.values())


def test_the_space_follows_the_size_of_the_images_and_the_big_one_needs_a_gpu() -> None:
    def chosen(image_size: int, images: int, device: str) -> str:
        return defaults.space_for(image_size, images, device)[0]

    assert [chosen(size, 1000, "cpu") for size in (8, 16, 17, 64, 65, 300)] == [
        "digits", "digits", "cifar-mbconv", "cifar-mbconv", "photo-mbconv", "photo-mbconv"
    ]  # fmt: skip
    assert chosen(224, 1_281_167, "cuda") == "attentivenas"
    assert {chosen(224, 1_281_167, "cpu"), chosen(224, 1000, "cuda"), chosen(160, 10**6, "cuda")} == {"photo-mbconv"}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_more_images_or_more_children_never_mean_more_epochs_nor_a_gpu_fewer(tiny_space: Space, device: str) -> None:
    space = tiny_space
    epochs = [defaults.epochs_for(space, images, device, 4) for images in (10, 100, 1000, 10**4, 10**5, 10**7)]
    assert all(a >= b for a, b in itertools.pairwise(epochs))
    assert defaults.epochs_for(space, 5000, device, 9) <= defaults.epochs_for(space, 5000, device, 2)
    assert defaults.epochs_for(space, 5000, "cuda", 4) >= defaults.epochs_for(space, 5000, "cpu", 4)


@pytest.mark.parametrize("children", [1, 2, 5])
def test_the_work_of_a_step_is_that_of_its_children(tiny_space: Space, children: int) -> None:
    """Forward and backward of all; random children cost what they cost on average."""
    costs = Costs(tiny_space)
    steps = [[arch for _, arch in sandwich(tiny_space, children, step_rng(1, step))] for step in range(1000)]
    mean = sum(int(costs.macs(tiny_space.encode(archs)).sum()) for archs in steps) / len(steps)
    assert defaults.training_macs(tiny_space, children) == pytest.approx(3 * mean, rel=0.03)


def test_choosing_draws_from_no_shared_generator(tiny: dict[str, Any]) -> None:
    space = Space.from_definition(tiny)
    assert defaults.training_macs(space, 4) == defaults.training_macs(space, 4)
