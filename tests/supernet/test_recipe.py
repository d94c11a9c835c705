"""Recipes: the shipped ones and a user's changes to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from supernet import config
from supernet.data.augment import Augment
from supernet.data.mix import Mix
from supernet.errors import InputError
from supernet.losses import Distillation
from supernet.recipe import TrainConfig, load_recipe, parse_overrides
from supernet.sandwich import Sampling

RECIPES = config.names("train")


@pytest.mark.parametrize("name", RECIPES)
def test_every_shipped_recipe_loads_under_its_own_name_and_survives_the_run_directory(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.source
    assert TrainConfig.model_validate(recipe.model_dump(mode="json")) == recipe
    assert_usable(recipe)


def assert_usable(recipe: TrainConfig) -> None:
    """What the parts of training make of the recipe's parts."""
    fade = recipe.distillation
    Augment(**recipe.augment.model_dump())
    Mix(**recipe.mix.model_dump())
    Sampling(**recipe.sampling.model_dump())
    Distillation(fade.kind, fade.temperature, fade.alpha_low, fade.alpha_high, fade.clip)


def test_the_published_recipe_says_what_was_published() -> None:
    recipe = load_recipe("attentivenas")
    assert (recipe.clip_value, recipe.clip_norm, recipe.sampling.rule, recipe.reduction) == (1.0, None, "best_up", "sum")
    assert (recipe.epochs, recipe.batch_size, recipe.learning_rate, recipe.weight_decay) == (360, 2048, 0.8, 1e-5)
    assert (recipe.distillation.start, recipe.distillation.end, recipe.distillation.most) == (0, 0, 1)


def test_overrides_change_what_they_name_and_nothing_else() -> None:
    changed = load_recipe("digits", {"epochs": 3, "augment.flip": 0.5, "distillation.end": 0.9, "name": "mine"})
    plain = load_recipe("digits").model_dump()
    plain["epochs"], plain["augment"]["flip"], plain["distillation"]["end"], plain["name"] = 3, 0.5, 0.9, "mine"
    assert changed.model_dump() == plain
    assert load_recipe("digits").epochs == 30


def test_a_recipe_of_ones_own_is_read_from_its_path(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("epochs: 2\nlearning_rate: 1e-5\nclip_norm: null\n")
    recipe = load_recipe(str(tmp_path / "mine.yaml"), {"optimizer": "adamw"})
    assert (recipe.learning_rate, recipe.clip_norm, recipe.optimizer, recipe.name) == (1e-5, None, "adamw", "custom")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"epoch": 3}, "recipe digits: epoch: unknown key. Did you mean 'epochs'?"),
        ({"augment.flipp": 1}, "recipe digits: augment.flipp: unknown key. Did you mean 'flip'?"),
        ({"colour": 1}, "recipe digits: colour: unknown key; known are \\["),
        ({"epochs.more": 1}, "epochs.more: 'epochs' holds no further keys: leave out what follows it"),
        ({"": 1}, "recipe digits: unknown key"),
        ({"..": 1}, "recipe digits: "),
        ({"augment": 1}, "augment: Input should be a valid dictionary"),
        ({"optimizer": "adamv"}, "optimizer: must be the name of an optimizer of timm whose state can be saved. Did you mean 'adam"),
        ({"optimizer": "lbfgs"}, "optimizer: must be the name of an optimizer of timm whose state can be saved"),
        ({"optimizer": "bnbadam"}, "optimizer: must be the name of an optimizer of timm whose state can be saved"),
        ({"optimizer": 5}, "optimizer: Input should be a valid string"),
        ({"epochs": 0}, "epochs: Input should be greater than or equal to 1 \\(got 0\\)"),
        ({"epochs": 2.5}, "epochs: Input should be a valid integer"),
        ({"epochs": "3"}, "epochs: Input should be a valid integer"),
        ({"epochs": True}, "epochs: Input should be a valid integer"),
        ({"epochs": 10**30}, "epochs: Input should be less than or equal to 1000000"),
        ({"epochs": None}, "epochs: Input should be a valid integer"),
        ({"batch_size": 1}, "batch_size: Input should be greater than or equal to 2"),
        ({"children": 0}, "children: Input should be greater than or equal to 1"),
        ({"children": 65}, "children: Input should be less than or equal to 64"),
        ({"learning_rate": 0}, "learning_rate: Input should be greater than 0"),
        ({"learning_rate": "fast"}, "learning_rate: Input should be a valid number"),
        ({"learning_rate": float("inf")}, "learning_rate: Input should be a finite number"),
        ({"learning_rate": True}, "learning_rate: must be a number, not true or false"),
        ({"label_smoothing": False}, "label_smoothing: must be a number, not true or false"),
        ({"label_smoothing": 1}, "label_smoothing: Input should be less than 1"),
        ({"momentum": -0.1}, "momentum: Input should be greater than or equal to 0"),
        ({"warmup_epochs": 1e308}, "warmup_epochs: Input should be less than or equal to 1000000"),
        ({"clip_norm": float("nan")}, "clip_norm: Input should be a finite number"),
        ({"clip_norm": 0}, "clip_norm: Input should be greater than 0"),
        ({"schedule": "step"}, "schedule: Input should be 'cosine' or 'exponential'"),
        ({"precision": "fp16"}, "precision: Input should be 'fp32' or 'bf16'"),
        ({"channels_last": "yes"}, "channels_last: Input should be a valid boolean"),
        ({"seed": -1}, "seed: Input should be greater than or equal to 0"),
        ({"seed": 2**63}, "seed: Input should be less than 9223372036854775808"),
        ({"crop": 0}, "crop: Input should be greater than 0"),
        ({"distillation.start": 0.7}, "distillation: start \\(0.7\\) must not lie after end \\(0.6\\): exchange them"),
        ({"distillation.most": 1.5}, "distillation.most: Input should be less than or equal to 1"),
        ({"augment.min_area": 0.001}, "augment.min_area: Input should be greater than or equal to 0.01"),
        ({"augment.shift": 0.6}, "augment.shift: Input should be less than or equal to 0.5"),
        ({"augment.flip": True}, "augment.flip: must be a number, not true or false"),
        ({"format": 2}, "format: Input should be 1"),
    ],
)  # fmt: skip
def test_what_a_recipe_cannot_say_is_named_with_the_remedy(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load_recipe("digits", overrides)
    assert "\n" not in str(caught.value)


def test_an_unknown_recipe_lists_what_there_is() -> None:
    with pytest.raises(
        InputError,
        match=f"recipes are named {', '.join(config.names('train'))} or are the path of a YAML file, but got 'cifra'",
    ):
        load_recipe("cifra")


numbers = st.one_of(
    st.integers(), st.floats(), st.booleans(), st.none(), st.text(max_size=4), st.sampled_from(["1e-5", "0", 0.01, 0.5, 180])
)
NESTED = ("augment", "distillation", "mix", "sampling", "guard")
FIELDS = [
    *(name for name in TrainConfig.model_fields if name not in {"optimizer", *NESTED}),
    *(f"{name}.{inner}" for name in NESTED for inner in TrainConfig.model_fields[name].annotation.model_fields),
]


@settings(deadline=None, max_examples=300)
@given(st.dictionaries(st.sampled_from(FIELDS), numbers, max_size=3))
def test_whatever_a_recipe_accepts_can_be_used_and_stored(overrides: dict[str, Any]) -> None:
    try:
        recipe = load_recipe("digits", overrides)
    except InputError as error:
        assert "\n" not in str(error)
        return
    assert_usable(recipe)
    assert TrainConfig.model_validate(yaml.safe_load(yaml.safe_dump(recipe.model_dump(mode="json")))) == recipe
    assert round(recipe.warmup_epochs * 1000) >= 0


# --- key=value ---


def test_values_of_overrides_are_read_as_yaml() -> None:
    texts = ["epochs=3", "augment.flip=0.5", "clip_norm=null", "channels_last=false", "name=a=b", " seed =7", "source="]
    assert parse_overrides(texts) == {
        "epochs": 3, "augment.flip": 0.5, "clip_norm": None, "channels_last": False, "name": "a=b", "seed": 7, "source": None
    }  # fmt: skip
    assert parse_overrides(["epochs=3", "epochs=4"]) == {"epochs": 4}
    assert load_recipe("digits", parse_overrides(["learning_rate=1e-3"])).learning_rate == 1e-3


@pytest.mark.parametrize("text", ["", "epochs", "=3", " =3", "epochs:3"])
def test_what_is_no_override_says_how_one_is_written(text: str) -> None:
    with pytest.raises(InputError, match="an override is written key=value, such as epochs=10, but got"):
        parse_overrides([text])


@pytest.mark.parametrize(
    "value", ["[1", "[1]", "{a: 1}", "&a [*a]", "!!python/name:os.system", "2020-13-45", "\0", "'", f"{'9' * 5000}", "[" * 5000]
)
def test_values_that_cannot_be_read_are_named(value: str) -> None:
    with pytest.raises(InputError, match="the value of "):
        parse_overrides([f"epochs={value}"])


@settings(deadline=None)
@given(st.text(max_size=12))
def test_any_text_is_an_override_or_an_input_error(text: str) -> None:
    try:
        load_recipe("digits", parse_overrides([text]))
    except InputError as error:
        assert str(error)
