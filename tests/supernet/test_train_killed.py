"""Real processes that train and are ended by SIGKILL at random moments, also while they save: nothing is lost, bit for bit."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from supernet import checkpoint
from supernet.data.sources import open_source
from supernet.recipe import TrainConfig
from supernet.run import Run
from supernet.space import Space

KILLS = 20


def work(path: str) -> None:
    """What the process does: train as a resume does, saving all the time."""
    from supernet import train as training

    training.SAVE_SECONDS = 0.01
    training.train(Run.open(Path(path)))


@pytest.fixture(scope="module")
def processes() -> Any:
    """Processes that have torch loaded already, and nothing else of this one."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["supernet.train"])
    return context


@pytest.fixture(scope="module")
def begin(
    tmp_path_factory: pytest.TempPathFactory, tiny_space: Space, recipe: TrainConfig, save_images: Callable[..., Path]
) -> Callable[[str], Run]:
    folder = tmp_path_factory.mktemp("killed")
    source = open_source(str(save_images(folder / "images.npz")))
    longer = recipe.model_copy(update={"epochs": 30, "ema": 0.99, "validate_epochs": 5})
    return lambda name: Run.create(folder / name, tiny_space, longer, source)


def left(run: Run) -> dict[str, bytes]:
    """All that a run leaves which does not depend on time."""
    newest = checkpoint.latest(run.checkpoints)
    assert newest is not None
    log = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    for line in log:
        del line["images_per_s"]
    return {
        "log": json.dumps(log).encode(),
        **{file.name: file.read_bytes() for file in newest.iterdir() if file.name != "manifest.json"},
    }


def saving(run: Run) -> bool:
    """Whether a checkpoint is being written right now."""
    return any(not (path / "manifest.json").exists() for path in checkpoint.all_of(run.checkpoints))


@pytest.mark.slow
def test_a_run_killed_twenty_times_is_bit_equal_to_one_that_was_not(processes: Any, begin: Callable[[str], Run]) -> None:
    straight, killed = begin("straight"), begin("killed")
    process = processes.Process(target=work, args=(str(straight.path),))
    process.start()
    process.join()
    assert process.exitcode == 0

    moments, during_a_save, steps = random.Random(7), 0, [0]
    for kill in range(KILLS):
        process = processes.Process(target=work, args=(str(killed.path),))
        process.start()
        _wait_until_it_goes_on(killed, process, steps[-1] + moments.randrange(4))
        deadline = time.monotonic() + 5
        if kill % 2:
            while not saving(killed) and process.is_alive() and time.monotonic() < deadline:
                pass
        else:
            time.sleep(moments.uniform(0, 0.02))
        assert process.is_alive(), "the run ended before it was killed often enough: give it more epochs"
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        during_a_save += saving(killed)
        newest = checkpoint.latest(killed.checkpoints)
        steps.append(checkpoint.step_of(newest) if newest is not None else 0)
    assert steps == sorted(steps)  # what was saved once was never lost
    assert steps[-1] > 0
    assert during_a_save >= 3

    process = processes.Process(target=work, args=(str(killed.path),))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert left(killed) == left(straight)


def _wait_until_it_goes_on(run: Run, process: Any, step: int) -> None:
    """Until the log is beyond the checkpoint that the process took up."""
    log = run.path / "metrics.jsonl"
    while process.is_alive():
        lines = log.read_bytes().split(b"\n")[:-1] if log.exists() else []
        if lines and json.loads(lines[-1])["step"] > step:
            return
        time.sleep(0.001)
