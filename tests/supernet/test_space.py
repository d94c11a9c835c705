"""Spaces: their archs as values and as integers, and archs that people write."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supernet import config
from supernet.arch import Arch
from supernet.costs import Costs
from supernet.errors import InputError
from supernet.family import Family
from supernet.space import Space, load_space, read_arch

PUBLISHED = json.loads((Path(__file__).parent.parent / "golden" / "published_models.json").read_text())
SHIPPED = [load_space(name) for name in config.names("spaces")]
spaces = st.sampled_from(SHIPPED)
seeds = st.integers(0, 2**32)


def changes(one: Arch, other: Arch) -> int:
    return sum(a != b for a, b in zip(one, other, strict=True))


# --- integers ---


@settings(deadline=None)
@given(spaces, seeds, st.integers(0, 20))
def test_archs_as_integers_and_back_are_the_same(space: Space, seed: int, count: int) -> None:
    codes = space.sample_codes(count, np.random.default_rng(seed))
    archs = space.decode(codes)
    assert codes.shape == (count, len(space.dimensions))
    assert np.array_equal(space.encode(archs), codes)
    assert space.decode(space.encode(archs)) == archs


def test_no_archs_are_an_empty_matrix(tiny_space: Space) -> None:
    assert tiny_space.encode([]).shape == (0, len(tiny_space.dimensions))
    assert tiny_space.decode(tiny_space.encode([])) == []


def test_an_arch_of_another_space_cannot_be_encoded(tiny_space: Space) -> None:
    with pytest.raises((KeyError, ValueError)):
        tiny_space.encode([SHIPPED[0].largest])


def test_every_arch_of_a_small_space_is_there_once(tiny_space: Space) -> None:
    counts = [len(dimension.choices) for dimension in tiny_space.dimensions]
    codes = np.stack([axis.ravel() for axis in np.meshgrid(*map(np.arange, counts), indexing="ij")], axis=1)
    archs = tiny_space.decode(codes)
    assert len(archs) == tiny_space.size == 2**7
    assert len(set(archs)) == len({arch.key for arch in archs}) == tiny_space.size
    assert all(tiny_space.contains(arch) for arch in archs)
    costs = Costs(tiny_space).macs(codes)
    assert archs[int(costs.argmin())] == tiny_space.smallest
    assert archs[int(costs.argmax())] == tiny_space.largest


# --- samples ---


@settings(deadline=None)
@given(spaces, seeds, st.floats(0, 1))
def test_samples_mutants_and_crossings_stay_in_the_space(space: Space, seed: int, rate: float) -> None:
    rng = np.random.default_rng(seed)
    one, other = space.sample(rng), space.sample(rng)
    mutant, crossing = space.mutate(one, rng, rate), space.crossover(one, other, rng)
    assert all(space.contains(arch) for arch in (one, other, mutant, crossing))
    assert (mutant != one) == (space.size > 1)
    assert all(choice in {a, b} for (_, choice), (_, a), (_, b) in zip(crossing, one, other, strict=True))


@pytest.mark.slow
@settings(deadline=None)
@given(st.data(), seeds)
def test_a_mutant_differs_wherever_there_is_a_choice(
    definitions: st.SearchStrategy[Any], data: st.DataObject, seed: int
) -> None:
    space, rng = Space.from_definition(data.draw(definitions)), np.random.default_rng(seed)
    arch = space.sample(rng)
    for rate in (0.0, 0.1, 1.0):
        mutant = space.mutate(arch, rng, rate)
        assert space.contains(mutant)
        assert (mutant != arch) == (space.size > 1)
    free = sum(len(dimension.choices) > 1 for dimension in space.dimensions)
    assert changes(arch, space.mutate(arch, rng, 1.0)) == free
    assert changes(arch, space.mutate(arch, rng, 0.0)) == min(1, free)


def test_mutation_reaches_every_other_choice_alike(tiny: dict[str, Any]) -> None:
    tiny["resolution"] = [4, 5, 6, 7]
    space, rng = Space.from_definition(tiny), np.random.default_rng(0)
    arch = space.smallest
    drawn = [space.mutate(arch, rng, 1.0)["resolution"] for _ in range(900)]
    assert set(drawn) == {5, 6, 7}
    assert all(250 < drawn.count(choice) < 350 for choice in (5, 6, 7))


def test_samples_are_uniform(tiny_space: Space) -> None:
    codes = tiny_space.sample_codes(4000, np.random.default_rng(0))
    assert np.all(np.abs(codes.mean(axis=0) - 0.5) < 0.04)
    assert np.all(np.abs(np.corrcoef(codes.T) - np.eye(codes.shape[1])) < 0.07)


def test_the_same_generator_state_gives_the_same_archs() -> None:
    draw = [[space.sample(np.random.default_rng([7, 1])) for space in SHIPPED] for _ in range(2)]
    assert draw[0] == draw[1]


def test_crossing_an_arch_with_itself_changes_nothing(tiny_space: Space) -> None:
    arch = tiny_space.largest
    assert tiny_space.crossover(arch, arch, np.random.default_rng(0)) == arch


# --- ends ---


@pytest.mark.parametrize("space", SHIPPED, ids=lambda space: space.name)
def test_smallest_and_largest_take_the_first_and_last_of_every_dimension(space: Space) -> None:
    """Of every dimension with an order; of the others too, where the family does not say otherwise."""
    own = type(space.family).smallest is not Family.smallest
    dimensions = [dimension for dimension in space.dimensions if dimension.ordered or not own]
    assert [space.smallest[dimension.name] for dimension in dimensions] == [dimension.choices[0] for dimension in dimensions]
    assert [space.largest[dimension.name] for dimension in dimensions] == [dimension.choices[-1] for dimension in dimensions]
    assert space.largest_resolution == space.resolution(space.largest) == space.largest["resolution"]
    assert space.resolution(space.smallest) == space.smallest["resolution"]


@pytest.mark.slow
@pytest.mark.parametrize("space", SHIPPED, ids=lambda space: space.name)
def test_no_arch_costs_less_than_the_smallest_or_more_than_the_largest(space: Space) -> None:
    codes = space.sample_codes(2000, np.random.default_rng(3))
    ends = space.encode([space.smallest, space.largest])
    for values, (low, high) in zip(Costs(space).all(codes).values(), Costs(space).all(ends).values(), strict=True):
        assert low <= values.min()
        assert values.max() <= high


def test_sizes_are_those_of_the_spaces() -> None:
    """Resolution, stem, width x depth x kernel x expansion of every stage, head."""
    sizes = {space.name: space.size for space in SHIPPED}
    assert sizes["digits"] == 3 * 2 * (2 * 2) * (2 * 3 * 2 * 3) * (3 * 3 * 2 * 3) * 2
    stages = [2 * 2 * 2, 2 * 3 * 2 * 3, 2 * 4 * 2 * 3, 2 * 4 * 2 * 3, 3 * 6 * 2 * 3, 4 * 6 * 2, 2 * 2 * 2]
    assert sizes["attentivenas"] == 4 * 2 * math.prod(stages) * 2


def test_the_key_of_a_space_tells_classes_and_channels_but_not_the_order_of_keys(tiny: dict[str, Any]) -> None:
    key = Space.from_definition(tiny).key
    assert Space.from_definition(dict(reversed(tiny.items()))).key == key
    assert Space.from_definition(json.loads(json.dumps(Space.from_definition(tiny).definition))).key == key
    assert len({key, *(Space.from_definition({**tiny, **change}).key for change in ({"classes": 4}, {"in_channels": 3}))}) == 3


# --- archs that people write ---


def test_a_complete_choice_makes_an_arch_in_the_order_of_the_space(tiny_space: Space) -> None:
    arch = tiny_space.sample(np.random.default_rng(1))
    shuffled = dict(reversed(arch.as_dict().items()))
    assert tiny_space.arch(shuffled) == arch
    assert list(tiny_space.arch(shuffled)) == list(arch)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resolutoin": 6}, "paper: 'resolutoin' is no dimension of the space tiny. Did you mean 'resolution'?"),
        ({"colour": 6}, "paper: 'colour' is no dimension of the space tiny; it has \\['resolution', 'stem.width'"),
        ({"resolution": None}, "paper: a choice for 'resolution' is missing: add one of \\[6, 8\\]"),
        ({"resolution": 7}, "paper: resolution must be one of \\[6, 8\\], but got 7"),
        ({"resolution": "6"}, "paper: resolution must be one of \\[6, 8\\], but got '6'"),
        ({"resolution": [6]}, "paper: resolution must be one of \\[6, 8\\], but got \\[6\\]"),
        ({"stage1.depth": True}, "paper: stage1.depth must be one of \\[1, 2\\], but got True"),
    ],
)  # fmt: skip
def test_wrong_choices_are_named_with_the_remedy(tiny_space: Space, change: dict[str, object], message: str) -> None:
    choices = {**tiny_space.smallest.as_dict(), **change}
    with pytest.raises(InputError, match=message):
        tiny_space.arch({name: choice for name, choice in choices.items() if choice is not None}, "paper")


def test_a_space_contains_its_archs_and_no_others(tiny_space: Space) -> None:
    arch = tiny_space.smallest
    assert tiny_space.contains(arch)
    assert not tiny_space.contains(SHIPPED[0].smallest)
    assert not tiny_space.contains(Arch(arch.choices[1:]))
    assert not tiny_space.contains(Arch(arch.choices[::-1]))
    assert not tiny_space.contains(Arch((*arch.choices, ("more", 1))))
    assert not tiny_space.contains(Arch(tuple((name, float(choice)) for name, choice in arch)))
    assert not tiny_space.contains(Arch(tuple((name, True if choice == 1 else choice) for name, choice in arch)))
    assert not tiny_space.contains(Arch(()))


# --- files ---


@pytest.fixture
def write(tmp_path: Path) -> Callable[[object], str]:
    def write(value: object) -> str:
        path = tmp_path / "arch.json"
        path.write_text(value if isinstance(value, str) else json.dumps(value))
        return str(path)

    return write


@pytest.mark.parametrize("space", SHIPPED, ids=lambda space: space.name)
def test_our_own_form_is_read_alone_and_under_the_key_arch(space: Space, write: Callable[[object], str]) -> None:
    arch = space.sample(np.random.default_rng(5))
    assert read_arch(space, write(arch.as_dict())) == arch
    assert read_arch(space, write(arch.to_json())) == arch
    assert read_arch(space, write({"arch": arch.as_dict(), "space": space.name, "macs": 5})) == arch
    assert read_arch(space, "smallest") == space.smallest
    assert read_arch(space, "largest") == space.largest


@pytest.mark.parametrize("entry", PUBLISHED["models"], ids=lambda entry: entry["id"])
def test_an_entry_of_a_published_table_is_read(entry: dict[str, Any], write: Callable[[object], str]) -> None:
    space = load_space("attentivenas")
    arch = read_arch(space, write(entry))
    assert arch == read_arch(space, write({"arch": entry}))
    assert arch["resolution"] == entry["resolution"]
    assert [arch["stem.width"], *(arch[f"stage{n}.width"] for n in range(1, 8)), arch["head.width"]] == entry["width"]
    for name in ("depth", "kernel_size", "expand_ratio"):
        assert [arch[f"stage{n}.{name}"] for n in range(1, 8)] == entry[name]


def test_the_first_published_model_is_the_smallest_arch(write: Callable[[object], str]) -> None:
    space = load_space("attentivenas")
    assert read_arch(space, write(PUBLISHED["models"][0])) == space.smallest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": None}, "'depth' is missing: add it"),
        ({"resolution": None}, "'resolution' is missing"),
        ({"width": [16, 16]}, "'width' must be a list of 9 numbers for the space attentivenas, but got \\[16, 16\\]"),
        ({"kernel_size": 3}, "'kernel_size' must be a list of 7 numbers"),
        ({"kernel_size": [3, 3, 3, 3, 3, 3, [3]]}, "stage7.kernel_size must be one of \\[3, 5\\], but got \\[3\\]"),
        ({"expand_ratio": {"a": 1}}, "'expand_ratio' must be a list of 7 numbers"),
        ({"resolution": "192"}, "'resolution' must be a whole number of pixels, but got '192'"),
        ({"resolution": [192]}, "'resolution' must be a whole number of pixels"),
        ({"resolution": True}, "resolution must be one of"),
        ({"resolution": 193}, "resolution must be one of \\[192, 224, 256, 288\\], but got 193"),
        ({"depth": [9, 3, 3, 3, 3, 3, 1]}, "stage1.depth must be one of \\[1, 2\\], but got 9"),
    ],
)  # fmt: skip
def test_a_wrong_entry_of_a_table_is_named(change: dict[str, object], message: str, write: Callable[[object], str]) -> None:
    entry = {**PUBLISHED["models"][0], **change}
    path = write({key: value for key, value in entry.items() if value is not None})
    with pytest.raises(InputError, match=message):
        read_arch(load_space("attentivenas"), path)


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", "null", '{"resolution": 6, "resolution": 8}', '{"arch": 5}', "{}", "\0", '{"arch": {}}']
)
def test_a_damaged_file_is_an_input_error(tiny_space: Space, text: str, write: Callable[[object], str]) -> None:
    with pytest.raises(InputError):
        read_arch(tiny_space, write(text))


@pytest.mark.parametrize(
    "text", ["", "medium", "nowhere.json", ".", "\0", "x" * 5000, '{"resolution": 8, "stem.width": 8}' * 20]
)
def test_what_is_no_arch_says_what_one_is(tiny_space: Space, text: str) -> None:
    with pytest.raises(InputError, match="an arch is 'smallest', 'largest' or the path of a JSON file, but got"):
        read_arch(tiny_space, text)


def test_a_space_takes_classes_and_channels_from_the_data() -> None:
    space = load_space("digits", classes=7, in_channels=3)
    assert (space.family.classes, space.family.in_channels) == (7, 3)
    again = Space.from_definition(space.definition)
    assert (again.family.classes, again.family.in_channels, again.key) == (7, 3, space.key)
    assert load_space("digits").family.classes == 10


def test_an_unknown_space_is_named_with_the_nearest() -> None:
    with pytest.raises(InputError, match=r"spaces are named .*attentivenas.*but got 'digit'. Did you mean 'digits'?"):
        load_space("digit")


def test_too_many_channels_are_refused_by_name() -> None:
    with pytest.raises(InputError, match="in_channels: Input should be less than or equal to 4"):
        load_space("digits", in_channels=5)


def test_a_space_whose_smallest_network_is_not_the_cheapest_is_refused() -> None:
    """Width 128 into 128 needs no shortcut convolution, 80 into 128 does."""
    definition = {
        "name": "odd", "family": "mbconv", "resolution": [16], "stem": {"width": [80, 128], "stride": 1}, "classes": 3,
        "stages": [{"width": [128], "depth": [1], "kernel_size": [3], "expand_ratio": [1], "stride": 1}], "head": {"width": [16]},
    }  # fmt: skip
    with pytest.raises(InputError, match=r"it: stem\.width: 128 costs less than 80, so there is no smallest network"):
        Space.from_definition(definition, "it")


@pytest.mark.parametrize("changes", [{"resolution": [90_000]}, {"head": {"width": [100_000], "expand_ratio": 90_000}}])
def test_a_network_that_no_machine_holds_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(InputError, match="the largest network has at most"):
        Space.from_definition({**load_space("digits").definition, **changes})


def test_two_ratios_of_the_same_channels_are_refused() -> None:
    definition = {
        "name": "odd", "family": "mbconv", "resolution": [16], "stem": {"width": [8], "stride": 1}, "classes": 3,
        "stages": [{"width": [8], "depth": [1], "kernel_size": [3], "expand_ratio": [3, 3.3], "stride": 1}], "head": {"width": [16]},
    }  # fmt: skip
    with pytest.raises(InputError, match=r"stages\.0\.expand_ratio: 3 and 3\.3 both give 24 channels at width 8"):
        Space.from_definition(definition)
