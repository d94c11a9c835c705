"""Mcts: the tree counts what it was told, descends where archs are good, and widens slowly."""

from __future__ import annotations

import math

import numpy as np
import pytest

from search.feasible import Feasible
from search.strategies import Result
from search.strategies.mcts import Mcts, Tree
from supernet.costs import Costs
from supernet.errors import InputError
from supernet.space import load_space

SPACE = load_space("cifar-mbconv")
FREE = Feasible(SPACE, Costs(SPACE), ())


def test_a_level_of_the_tree_is_a_stage() -> None:
    ends = Mcts(SPACE, FREE, seed=0).ends
    names = [dimension.name for dimension in SPACE.dimensions]
    assert ends[-1] == len(names)
    for end in ends[:-1]:
        assert names[end - 1].partition(".")[0] != names[end].partition(".")[0]
    inside = set(range(1, len(names))) - set(ends)
    assert all(names[column - 1].partition(".")[0] == names[column].partition(".")[0] for column in inside)


def test_visits_and_worth_are_sums_over_what_is_below() -> None:
    tree, rng = Tree([2, 3, 5]), np.random.default_rng(0)
    codes, worths = rng.integers(2, size=(40, 5)), rng.random(40)
    for code, worth in zip(codes, worths, strict=True):
        tree.add(code, worth)
    for end in (0, 2, 3, 5):
        for prefix in np.unique(codes[:, :end], axis=0):
            below = (codes[:, :end] == prefix).all(axis=1)
            assert tree.visits[prefix.tobytes()] == below.sum()
            assert tree.worth[prefix.tobytes()] == pytest.approx(worths[below].sum())
    assert len(tree.children[codes[0, :0].tobytes()]) == len(np.unique(codes[:, :2], axis=0))
    child, visits = codes[0, :2], 40
    mine = tree.visits[child.tobytes()]
    assert tree.bound(child, visits, 0.0) == pytest.approx(tree.worth[child.tobytes()] / mine)
    assert tree.bound(child, visits, 2.0) - tree.bound(child, visits, 0.0) == pytest.approx(2 * math.sqrt(math.log(41) / mine))


def test_it_descends_where_archs_are_good() -> None:
    """Only the first stages decide; later proposals have the good ones."""
    end = Mcts(SPACE, FREE, seed=0).ends[2]
    wanted = SPACE.encode([SPACE.largest])[0, :end]

    def likeness(codes: np.ndarray) -> np.ndarray:
        return (codes[:, :end] == wanted).sum(axis=1)

    strategy = Mcts(SPACE, FREE, seed=0)
    likes = []
    for _ in range(16):
        asked = strategy.ask(16)
        likes.append(likeness(SPACE.encode([each.arch for each in asked])))
        strategy.tell([Result(each.arch, float(like), 9) for each, like in zip(asked, likes[-1], strict=True)])
    assert {each.stage for each in asked} == {"tree"}
    assert np.mean(likes[-5:]) > np.mean(likes[0]) + 1.5 * np.std(likes[0])


def test_failures_are_worth_nothing_and_ranks_fill_the_rest() -> None:
    strategy = Mcts(SPACE, FREE, seed=0)
    archs = SPACE.decode(FREE.sample(5, np.random.default_rng(0)))
    scores = [0.1, None, 30.0, 0.2, float("nan")]
    strategy.tell([Result(arch, score, 9) for arch, score in zip(archs, scores, strict=True)])
    assert strategy._worths().tolist() == pytest.approx([1 / 3, 0, 1, 2 / 3, 0])


@pytest.mark.parametrize("settings", [{"exploration": -1}, {"widening": 0.9}, {"initial": 0}, {"exploration": float("nan")}])
def test_settings_that_cannot_be_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(InputError, match="mcts needs"):
        Mcts(SPACE, FREE, seed=0, **settings)  # type: ignore[arg-type]
