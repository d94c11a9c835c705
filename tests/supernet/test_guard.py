"""The guard of a run: what it lets pass, what it calls lost, and that its decisions survive a resume."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from supernet.guard import Guard, Rollbacks

CHANCE = math.log(10)


def guard(horizon: int = 5, skips: int = 3) -> Guard:
    return Guard(CHANCE, horizon, skips)


def after(losses: list[float], **settings: int) -> Guard:
    found = guard(**settings)
    for loss in losses:
        found.watch(loss, 1.0)
    return found


@pytest.mark.parametrize(
    ("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf), (-math.inf, 0.0)]
)
def test_a_step_that_is_not_finite_is_not_made_and_is_counted(loss: float, norm: float) -> None:
    found = guard()
    assert found.watch(1.0, 1.0)
    assert not found.watch(loss, norm)
    assert (found.skipped, found.skips_in_a_row, found.reason) == (1, 1, None)
    assert found.watch(1.0, 1.0)
    assert (found.skipped, found.skips_in_a_row) == (1, 0)


def test_a_run_of_skipped_steps_is_a_reason_to_go_back_and_single_ones_are_not() -> None:
    found = guard(skips=3)
    for loss in (math.nan, math.nan, 1.0) * 5:
        found.watch(loss, 1.0)
        assert found.reason is None
    for _ in range(3):
        found.watch(math.nan, 1.0)
    assert found.reason == "the loss or the gradient of 3 steps in a row was not finite"
    assert found.skipped == 13


def test_a_loss_that_returns_to_chance_is_lost_and_says_what_it_had_been() -> None:
    learnt = after([1.0] * 20)
    assert learnt.reason is None
    assert learnt.good
    for step in range(5):
        assert learnt.reason is None, step
        learnt.watch(CHANCE + 0.1, 1.0)
    assert learnt.reason == "the loss of the largest child returned to that of guessing (2.4, it had been 1)"


def test_a_run_that_never_learnt_is_left_in_peace() -> None:
    """A hard task begins at chance, and may stay there for long."""
    assert after([CHANCE * 1.05] * 500).reason is None
    assert after([CHANCE * 0.93] * 100 + [CHANCE * 1.1] * 100).reason is None


def test_a_few_good_batches_are_not_learning_yet() -> None:
    """The first bounce of a warm-up."""
    assert after([0.5 * CHANCE, *[CHANCE] * 50], horizon=20).reason is None


@pytest.mark.parametrize("spikes", [1, 5, 15])
def test_a_spike_of_a_few_steps_is_no_collapse(spikes: int) -> None:
    found = after([0.5] * 100, horizon=20)
    for _ in range(spikes):
        found.watch(CHANCE, 1.0)
    assert found.reason is None


def test_one_batch_of_any_loss_is_no_collapse() -> None:
    found = after([0.3] * 200, horizon=200)
    found.watch(1e30, 1.0)
    assert found.reason is None


def test_noise_about_chance_is_not_taken_for_learning(rng: np.random.Generator) -> None:
    """Rare classes and small batches: the mean of a few batches is often well below that of guessing, and comes back."""
    found = Guard(0.2, 20, 3)
    for loss in rng.choice([0.05, 0.5], size=3000, p=[2 / 3, 1 / 3]):
        found.watch(float(loss), 1.0)
        assert found.reason is None


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(5)


def test_what_is_doubtful_is_not_saved_long_before_it_is_lost() -> None:
    found = after([1.0] * 50, horizon=20)
    assert found.good
    saved = []
    while found.reason is None:
        found.watch(CHANCE, 1.0)
        saved.append(found.good)
    assert len(saved) == 20
    assert saved == sorted(saved, reverse=True)
    assert sum(saved) <= 4
    found = after([1.0] * 50, horizon=20)
    found.watch(math.nan, 1.0)
    assert not found.good
    found.watch(1.0, 1.0)
    assert found.good
    assert after([CHANCE] * 50).good  # what never learnt has nothing to lose


def test_a_hard_task_that_hovers_near_chance_is_saved() -> None:
    found = after([CHANCE * 0.89] * 50, horizon=20)
    for loss in (0.93, 0.9, 0.94, 0.91, 0.92) * 10:
        found.watch(CHANCE * loss, 1.0)
        assert found.good
        assert found.reason is None


@given(st.lists(st.sampled_from([0.5, 1.0, 2.3, 2.5, math.nan]), max_size=60), st.integers(0, 60))
def test_a_restored_guard_decides_as_one_that_went_on(losses: list[float], cut: int) -> None:
    straight, first, resumed = guard(), guard(), guard()
    for loss in losses:
        straight.watch(loss, 1.0)
    for loss in losses[:cut]:
        first.watch(loss, 1.0)
    resumed.restore(json.loads(json.dumps(first.state(), allow_nan=False)))
    for loss in losses[cut:]:
        resumed.watch(loss, 1.0)
    assert resumed == straight


def test_rollbacks_are_remembered_in_order(tmp_path: Path) -> None:
    rollbacks = Rollbacks(tmp_path / "rollbacks.jsonl")
    assert rollbacks.all() == []
    rollbacks.add(100, 80, "one")
    rollbacks.add(90, 0, "two")
    assert rollbacks.all() == [{"at": 100, "to": 80, "reason": "one"}, {"at": 90, "to": 0, "reason": "two"}]
