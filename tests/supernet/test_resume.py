"""A run taken up with changes: what may change does and is recorded, what may not is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from supernet import durable
from supernet.errors import InputError
from supernet.recipe import EXTENDABLE, FROZEN, MUTABLE, OnResume, TrainConfig, on_resume
from supernet.resume import change
from supernet.run import Run
from supernet.train import train


def test_every_key_of_a_recipe_says_once_what_may_become_of_it() -> None:
    for name, field in TrainConfig.model_fields.items():
        assert sum(isinstance(rule, OnResume) for rule in field.metadata) == 1, name
    assert on_resume("epochs") is EXTENDABLE
    assert on_resume("guard.skips") is MUTABLE
    assert on_resume("augment.flip") is FROZEN
    assert {on_resume(name) for name in ("seed", "batch_size", "children", "optimizer", "distillation", "ema")} == {FROZEN}


def config_of(run: Run) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run.path / "config.json").read_text())
    return found


def test_what_may_change_is_changed_and_recorded(run: Run) -> None:
    changed, told = change(run, {"learning_rate": 0.01, "guard.skips": 3, "epochs": 5, "label_smoothing": 0.1})
    assert (changed.recipe.learning_rate, changed.recipe.guard.skips, changed.recipe.epochs) == (0.01, 3, 5)
    assert told == ("learning_rate: 0.1 until now, 0.01 from step 0", "guard.skips: 10 until now, 3 from step 0",
                    "epochs: 2 until now, 5 from step 0")  # fmt: skip
    assert config_of(run)["changes"] == [
        {"step": 0, "key": "learning_rate", "from": 0.1, "to": 0.01},
        {"step": 0, "key": "guard.skips", "from": 10, "to": 3},
        {"step": 0, "key": "epochs", "from": 2, "to": 5},
    ]
    assert Run.open(run.path).recipe == changed.recipe


def test_values_that_are_as_they_were_change_nothing(run: Run) -> None:
    before = (run.path / "config.json").read_bytes()
    same, told = change(run, {"seed": 0, "epochs": 2, "augment.flip": 0.0, "learning_rate": "1e-1", "momentum": "9e-1"})
    assert (same, told) == (run, ())
    assert (run.path / "config.json").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "seed stays as it was when the run began: it is 0 in .*; leave it out, or start a new run with 1"),
        ({"augment.flip": 0.5}, "augment.flip stays as it was when the run began: it is 0.0"),
        ({"learning_rate": 0.2, "batch_size": 6}, "batch_size stays as it was"),
        ({"epochs": 1}, "epochs may only grow when a run is taken up: it is 2 in .*, and 1 is less"),
        ({"epoch": 3}, "epoch: unknown key. Did you mean 'epochs'?"),
        ({"guard.skip": 3}, "guard.skip: unknown key. Did you mean 'skips'?"),
        ({"epochs.more": 3}, "epochs.more: unknown key"),
        ({"learning_rate": -1}, "learning_rate: Input should be greater than 0"),
        ({"epochs": "many"}, "epochs: Input should be a valid integer"),
        ({"micro_batch": 2}, "batch_size \\(9\\) must be a multiple of micro_batch \\(2\\)"),
    ],
)  # fmt: skip
def test_what_may_not_change_is_named_and_nothing_is_written(run: Run, changes: dict[str, Any], message: str) -> None:
    before = (run.path / "config.json").read_bytes()
    with pytest.raises(InputError, match=message) as raised:
        change(run, changes)
    assert "\n" not in str(raised.value)
    assert (run.path / "config.json").read_bytes() == before


def test_a_run_that_is_being_trained_is_not_changed(run: Run) -> None:
    with durable.locked(run.path / "train.lock", "the run"), pytest.raises(InputError, match="is in use by another process"):
        change(run, {"learning_rate": 0.01})
    assert "changes" not in config_of(run)


def test_a_finished_run_that_is_extended_is_unfinished_and_goes_on(run: Run) -> None:
    train(run)
    assert run.finished
    longer, _ = change(run, {"epochs": 3})
    assert not longer.finished
    steps: list[int] = []
    train(longer, progress=lambda now: steps.append(now.step))
    assert steps == [9, 10, 11, 12]
    assert Run.open(run.path).finished


def test_another_weight_decay_and_rate_hold_from_there_on(run: Run, tmp_path: Path) -> None:
    train(run)
    changed, _ = change(run, {"epochs": 3, "weight_decay": 0.25, "learning_rate": 0.02})
    rates: list[float] = []

    def progress(now: Any) -> None:
        if now.line:
            rates.append(now.line["learning_rate"])

    train(changed, progress=progress)
    assert 0 < max(rates) <= 0.02
    newest = sorted(changed.checkpoints.iterdir())[-1]
    groups = json.loads((newest / "state.json").read_text())["optimizer"]["groups"]
    assert {group["weight_decay"] for group in groups} == {0.0, 0.25}
