"""What a run would take, told before it is begun; and its curves, drawn from its log."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from supernet import rehearse as rehearsing
from supernet.costs import arch_costs
from supernet.errors import InputError
from supernet.model import Supernet
from supernet.rehearse import memory, rehearse
from supernet.run import Run
from supernet.space import Space
from supernet.train import train


def test_a_rehearsal_counts_steps_and_work_and_times_a_few(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearsing, "STEPS", 3)
    found = rehearse(run)
    assert (found.steps, found.images_per_step, found.timed_steps) == (8, 9, 3)
    assert found.seconds == found.steps * found.seconds_per_step > 0
    ends = sum(arch_costs(run.space, arch)["macs"] for arch in (run.space.largest, run.space.smallest))
    random_ones = found.macs_per_step / (3 * 9) - ends
    assert (
        2 * arch_costs(run.space, run.space.smallest)["macs"]
        < random_ones
        < 2 * arch_costs(run.space, run.space.largest)["macs"]
    )
    json.dumps(found.as_dict(), allow_nan=False)
    assert not run.finished


def test_a_run_of_a_single_step_is_timed_too(run: Run) -> None:
    short = Run.create(
        run.path.parent / "short", run.space, run.recipe.model_copy(update={"epochs": 1, "batch_size": 36}), run.source
    )
    assert rehearse(short).timed_steps == 1


def test_memory_is_what_training_holds(run: Run, tiny_space: Space) -> None:
    found = memory(run, 9)
    weights = sum(parameter.nbytes for parameter in Supernet(tiny_space).parameters())
    assert (found["weights"], found["gradients"], found["optimizer"], found["average"]) == (weights, weights, weights, 0)
    assert found["images"] == 9 * 8 * 8 * 4
    assert memory(run, 18)["activations"] > 1.7 * found["activations"] > 0
    adam = run.recipe.model_copy(update={"optimizer": "adamw", "ema": 0.9, "micro_batch": 3})
    other = memory(Run.create(run.path.parent / "adam", run.space, adam, run.source), 9)
    assert 2 * weights <= other["optimizer"] < 2 * weights + 1000
    assert other["average"] == weights
    assert other["activations"] < 0.5 * found["activations"]


def test_activations_are_what_autograd_keeps(run: Run) -> None:
    """Against a network whose kept tensors can be counted by hand: a linear layer keeps its input, a relu its output."""
    layers = torch.nn.Sequential(torch.nn.Linear(10, 20), torch.nn.ReLU(), torch.nn.Linear(20, 5))
    kept = rehearsing._saved_bytes(layers, layers, torch.zeros(7, 10), False)  # type: ignore[arg-type]
    assert kept == 7 * (10 + 20) * 4  # the output of relu is the input of what follows, kept once


def test_curves_are_those_of_the_log(run: Run) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from supernet.board import Board

    lines = []
    board = Board(run.path)
    train(run, progress=lambda now: board.add(now.line) if now.line else None)
    board.close()
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]

    def curve(name: str) -> list[tuple[int, float]]:
        events = EventAccumulator(str(run.path / "tensorboard"))
        events.Reload()
        return [(event.step, event.value) for event in events.Scalars(name)]

    wanted = [(line["step"], line["children"]["smallest"]["loss"]) for line in lines]
    for _ in range(2):
        found = curve("loss/smallest")
        assert [step for step, _ in found] == [step for step, _ in wanted]
        assert [value for _, value in found] == pytest.approx([value for _, value in wanted])
        assert [step for step, _ in curve("validation/largest")] == [4, 8]
        Board(run.path).close()  # drawn again from the log alone


def test_without_tensorboard_the_error_says_what_to_install(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from supernet.board import Board

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(InputError, match=r"pip install 'nestling\[tensorboard\]'"):
        Board(run.path)
    assert not (run.path / "tensorboard").exists()


@pytest.mark.slow
def test_a_rehearsal_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearsing, "STEPS", 1)
    from typer.testing import CliRunner

    import nestling

    out = tmp_path / "never"
    found = CliRunner().invoke(nestling.app, ["train", "--data", "digits", "--out", str(out), "--dry-run", "--epochs", "1", "--json",
                                              "--set", "children=2", "--device", "cpu"])  # fmt: skip
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout)["steps"] == 17
    assert not out.exists()
