"""Archs as values: their JSON and their keys."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supernet.arch import Arch, Choice
from supernet.space import Space

scalars = st.one_of(st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text(max_size=5))
mappings = st.dictionaries(st.text(max_size=5), scalars, max_size=6)


@given(mappings)
def test_json_gives_back_every_choice_with_its_type(choices: dict[str, Choice]) -> None:
    arch = Arch(tuple(choices.items()))
    back = json.loads(arch.to_json())
    assert back == arch.as_dict() == choices
    assert {name: type(value) for name, value in back.items()} == {name: type(value) for name, value in choices.items()}


@given(mappings, st.randoms(use_true_random=False))
def test_the_order_of_the_dimensions_changes_neither_json_nor_key(choices: dict[str, Choice], random: Any) -> None:
    items = list(choices.items())
    shuffled = random.sample(items, len(items))
    assert Arch(tuple(shuffled)).to_json() == Arch(tuple(items)).to_json()
    assert Arch(tuple(shuffled)).key == Arch(tuple(items)).key


@given(mappings, mappings)
def test_different_choices_have_different_keys(one: dict[str, Choice], other: dict[str, Choice]) -> None:
    typed_one, typed_other = ({name: (type(v), v) for name, v in choices.items()} for choices in (one, other))
    if typed_one != typed_other:
        assert Arch(tuple(one.items())).key != Arch(tuple(other.items())).key


@pytest.mark.slow
@settings(deadline=None)
@given(st.data())
def test_in_a_space_keys_are_equal_exactly_where_archs_are(definitions: st.SearchStrategy[Any], data: st.DataObject) -> None:
    space = Space.from_definition(data.draw(definitions))
    one, other = (space.sample(np.random.default_rng(data.draw(st.integers(0, 3)))) for _ in range(2))
    assert (one.key == other.key) == (one == other) == (one.to_json() == other.to_json())
    assert (hash(one) == hash(other)) or one != other


def test_one_and_one_point_nought_and_true_have_three_keys() -> None:
    assert len({Arch((("a", value),)).key for value in (1, 1.0, True, "1")}) == 4


def test_a_key_is_stable_for_ever() -> None:
    """Keys name files and rows: a change of this number orphans every stored result."""
    arch = Arch((("resolution", 192), ("width", 16)))
    assert arch.to_json() == '{"resolution":192,"width":16}'
    assert arch.key == "efdc57ad5851"


def test_a_dimension_is_read_by_its_name() -> None:
    arch = Arch((("a", 1), ("b", False)))
    assert arch["b"] is False
    assert list(arch) == [("a", 1), ("b", False)]
    with pytest.raises(KeyError, match="c"):
        arch["c"]


def test_an_arch_cannot_be_changed() -> None:
    arch = Arch((("a", 1),))
    with pytest.raises(dataclasses.FrozenInstanceError):
        arch.choices = ()  # type: ignore[misc]
