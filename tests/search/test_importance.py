"""Importance of dimensions at equal cost: what was planted is found, and noise is called noise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from search import importance as module
from search.importance import importance, importance_of
from search.records import Row
from search.store import Store
from search.table import children
from supernet.costs import Costs
from supernet.errors import InputError
from supernet.space import Space, load_space

Values = NDArray[np.float64]


@pytest.fixture(scope="module")
def space() -> Space:
    return load_space("digits")


@pytest.fixture
def ridge(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the forest, which takes its time."""
    monkeypatch.setattr(module, "_MODELS", {"ridge regression": module._ridge})


def drawn(space: Space, count: int, seed: int = 0) -> tuple[NDArray[np.int64], Values, np.random.Generator]:
    """Different archs, costs that have nothing to do with them, and a generator."""
    rng = np.random.default_rng(seed)
    codes = np.unique(space.sample_codes(4 * count, rng), axis=0)
    return rng.permutation(codes)[:count], rng.uniform(1e6, 1e8, count), rng


def effect(space: Space, codes: NDArray[np.int64], name: str) -> Values:
    """Of a dimension, with a mean of 0 and a variance of 1."""
    column = [each.name for each in space.dimensions].index(name)
    values = codes[:, column].astype(np.float64)
    return (values - values.mean()) / values.std()


def choosable(space: Space) -> set[str]:
    return {each.name for each in space.dimensions if len(each.choices) > 1}


PLANTED = {"stem.width": 0.03, "resolution": 0.02, "stage1.depth": 0.012}


def planted(space: Space, codes: NDArray[np.int64]) -> Values:
    return np.sum([size * effect(space, codes, name) for name, size in PLANTED.items()], axis=0)


@pytest.mark.slow
@pytest.mark.usefixtures("ridge")
def test_planted_effects_are_ranked_rightly_with_their_shares_of_the_variance(space: Space) -> None:
    codes, costs, rng = drawn(space, 400)
    scores = 0.5 + 0.1 * np.log(costs) + planted(space, codes) + rng.normal(size=400) * 0.01
    found = importance(space, codes, scores, costs)
    assert [row.dimension for row in found.rows[:3]] == list(PLANTED)
    total = sum(size**2 for size in PLANTED.values()) + 0.01**2
    for row, size in zip(found.rows, PLANTED.values(), strict=False):
        assert row.low < size**2 / total < row.high
        assert row.share == pytest.approx(size**2 / total, abs=0.1)
        assert row.low > 0
    others = found.rows[3:]
    assert len(others) == len(choosable(space)) - 3
    assert max(abs(row.share) for row in others) < 0.02
    assert sum(row.low <= 0 for row in others) >= 0.8 * len(others)
    assert found.r2 == pytest.approx(1 - 0.01**2 / total, abs=0.05)
    assert (found.children, found.constant) == (400, ())
    assert found.why.startswith(f"Ridge regression explains {found.r2:.0%} of what the macs leave")


def test_a_dimension_that_matters_only_with_another_is_found(space: Space, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TREES", 20)
    codes, costs, rng = drawn(space, 300)
    both = np.sign(effect(space, codes, "stem.width")) * np.sign(effect(space, codes, "stage2.width"))
    found = importance(space, codes, 0.5 + 0.02 * both + rng.normal(size=300) * 0.002, costs)
    assert {row.dimension for row in found.rows[:2]} == {"stem.width", "stage2.width"}
    assert found.why.startswith("A random forest explains")


@pytest.mark.usefixtures("ridge")
def test_what_only_costs_matters_at_equal_cost_and_what_pays_its_cost_does_not(space: Space) -> None:
    """The score follows the macs, but for those that one stage spends: there they are wasted."""
    codes, _, rng = drawn(space, 400)
    macs = Costs(space).macs(codes).astype(np.float64)
    followed = importance(space, codes, 0.1 * np.log(macs) + rng.normal(size=400) * 0.01, macs)
    assert followed.rows == ()
    wasted = codes.copy()
    column = [each.name for each in space.dimensions].index("stage3.depth")
    wasted[:, column] = 0
    useful = Costs(space).macs(space.canonical(wasted)).astype(np.float64)
    found = importance(space, codes, 0.1 * np.log(useful) + rng.normal(size=400) * 0.002, macs)
    assert found.rows[0].dimension == "stage3.depth"


@pytest.mark.usefixtures("ridge")
def test_pure_noise_says_nothing(space: Space) -> None:
    said = 0
    for seed in range(15):
        codes, costs, rng = drawn(space, 100, seed)
        found = importance(space, codes, 0.5 + 0.1 * np.log(costs) + rng.normal(size=100) * 0.01, costs)
        said += bool(found.rows)
        assert found.r2 is not None
        assert found.r2 < 0.3
        if not found.rows:
            assert "10% are asked for at least: the rest may be noise" in found.why
    assert said <= 1


@pytest.mark.slow
def test_pure_noise_says_nothing_to_a_forest_either(space: Space) -> None:
    for seed in range(3):
        codes, costs, rng = drawn(space, 100, seed)
        assert importance(space, codes, rng.normal(size=100), costs).rows == ()


@pytest.mark.usefixtures("ridge")
def test_constant_dimensions_are_named_and_left_out(space: Space) -> None:
    codes, costs, _ = drawn(space, 200)
    codes[:, [0, 2]] = 0
    codes = np.unique(codes, axis=0)
    costs = costs[: len(codes)]
    scores = 0.02 * effect(space, codes, "stem.width")
    found = importance(space, codes, scores, costs)
    names = [each.name for each in space.dimensions]
    assert found.constant == (names[0], names[2]) == ("resolution", "stage1.width")
    assert found.rows[0].dimension == "stem.width"
    assert {row.dimension for row in found.rows} == choosable(space) - set(found.constant)


@pytest.mark.usefixtures("ridge")
@pytest.mark.parametrize(
    ("change", "why"),
    [
        ("few", "79 children were scored on the same images, at least 80 are needed"),
        ("none", "0 children were scored on the same images, at least 80 are needed"),
        ("one arch", "all children have the same choices"),
        ("one score", "all children have the same score"),
        ("cost alone", "the rest may be noise"),
    ],
)
def test_where_nothing_can_be_said_the_reason_is_given(space: Space, change: str, why: str) -> None:
    codes, costs, _ = drawn(space, 100)
    scores = planted(space, codes)
    if change in {"few", "none"}:
        kept = 79 if change == "few" else 0
        codes, costs, scores = codes[:kept], costs[:kept], scores[:kept]
    elif change == "one arch":
        codes[:] = codes[0]
    elif change == "one score":
        scores[:] = 0.5
    else:
        scores = 0.1 * np.log(costs)
    found = importance(space, codes, scores, costs)
    assert found.rows == ()
    assert why in found.why
    assert found.why.startswith("Nothing can be said of the dimensions: ")
    assert found.children == len(codes)


@pytest.mark.usefixtures("ridge")
@pytest.mark.parametrize("costs_are", ["equal", "two"])
def test_costs_that_hardly_differ_are_no_trouble(space: Space, costs_are: str) -> None:
    codes, costs, _ = drawn(space, 200)
    costs[:] = 1e6
    if costs_are == "two":
        costs[0] = 2e6
    found = importance(space, codes, planted(space, codes), costs)
    assert [row.dimension for row in found.rows[:2]] == ["stem.width", "resolution"]


@pytest.mark.usefixtures("ridge")
def test_the_same_input_gives_the_same_and_leaves_the_global_generator_alone(space: Space) -> None:
    codes, costs, _ = drawn(space, 120)
    before = np.random.get_state()[1].copy()  # type: ignore[index, union-attr]  # noqa: NPY002
    one, other = (importance(space, codes, planted(space, codes), costs) for _ in range(2))
    assert one == other
    assert (np.random.get_state()[1] == before).all()  # type: ignore[index]  # noqa: NPY002


@pytest.mark.usefixtures("ridge")
def test_of_very_many_children_some_are_drawn(space: Space, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST", 150)
    codes, costs, _ = drawn(space, 400)
    found = importance(space, codes, planted(space, codes), costs)
    assert (found.children, found.rows[0].dimension) == (150, "stem.width")


@pytest.mark.parametrize("name", ["cell", "autoformer-tiny"])
@pytest.mark.usefixtures("ridge")
def test_choices_without_an_order_and_blocks_that_may_not_stand(name: str) -> None:
    space = load_space(name)
    codes, costs, _ = drawn(space, 200)
    column = 1
    scores = np.isin(codes[:, column], codes[0, column]).astype(np.float64)
    found = importance(space, codes, scores, costs)
    assert found.rows[0].dimension == space.dimensions[column].name
    assert found.rows[0].share > 0.5


@pytest.mark.parametrize("mistake", ["scores", "costs", "nan", "zero"])
def test_mistakes_are_refused(space: Space, mistake: str) -> None:
    codes, costs, _ = drawn(space, 100)
    scores = planted(space, codes)
    if mistake == "nan":
        scores[3] = np.nan
    if mistake == "zero":
        costs[3] = 0
    with pytest.raises(InputError, match=r"one number a child|not finite, or a cost not above 0"):
        importance(space, codes, scores[:50] if mistake == "scores" else scores, costs[:50] if mistake == "costs" else costs)


@pytest.mark.usefixtures("ridge")
def test_of_a_store_the_children_of_most_images_count(space: Space, tmp_path: Path) -> None:
    codes, costs, rng = drawn(space, 260)
    archs, scores = space.decode(codes), planted(space, codes)
    scores[200:] = rng.normal(size=60)  # on few images
    rows: list[Any] = [
        Row(arch.key, json.dumps(arch.as_dict()), "fine", int(place < 200), b"", 64 if place < 200 else 8, score, {"macs": cost}, 1, 1)
        for place, (arch, score, cost) in enumerate(zip(archs, scores, costs, strict=True))
    ]  # fmt: skip
    with Store.open(tmp_path / "search.sqlite", identity={}) as store:
        store.add(rows)
        found = importance_of(space, children(store))
    assert found == importance(space, codes[:200], scores[:200], costs[:200])
    assert found.rows[0].dimension == "stem.width"
    assert importance_of(space, []).rows == ()
