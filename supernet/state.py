"""All of a training run that a checkpoint holds: weights, optimizer, moving average, guard; how it is saved and taken up."""

from __future__ import annotations

import json
import math

import torch
from timm.utils import ModelEmaV3

from supernet import checkpoint, durable
from supernet.errors import InputError
from supernet.guard import Guard
from supernet.model import Supernet
from supernet.optimizer import make_optimizer
from supernet.run import Run, load_weights
from supernet.warm import fill, record


class State:
    """The state after `step` steps. At first, that of a run that begins: see `begin` and `take_up`."""

    def __init__(self, run: Run, device: str, guard: Guard) -> None:
        self.run, self.recipe, self.guard = run, run.recipe, guard
        self.step = 0
        self.rollbacks = 0
        """How often the run had gone back when this state was reached."""
        self.micro_batch = self.recipe.micro_batch
        """Images that go through a child at once; less than the recipe says where memory did not suffice."""
        self.supernet = Supernet(run.space, seed=self.recipe.seed).to(device)
        if self.recipe.channels_last:
            self.supernet.to(memory_format=torch.channels_last)
        self.optimizer = make_optimizer(self.supernet, self.recipe)
        self.average: ModelEmaV3 | None = None

    @property
    def shown(self) -> Supernet:
        """The weights that children are taken from: the moving average, where the recipe keeps one."""
        shown: Supernet = self.average.module if self.average is not None else self.supernet
        return shown

    @property
    def finite(self) -> bool:
        """Whether all weights are numbers."""
        return all(bool(torch.isfinite(value).all()) for value in self.supernet.state_dict().values())

    def update(self, rate: float) -> None:
        """Step the optimizer with the gradients that are there, and the average with it."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        if self.average is not None:
            self.average.update(self.supernet, step=self.step)

    def begin(self, *, write: bool) -> None:
        """The weights of the run's donor, where it has one; `write` down what was taken from it."""
        donor = self.run.donor
        if donor:
            filled = fill(self.supernet, donor)
            if write:
                record(self.run.path / "init", filled)
        self._begin_average()

    def save(self, *, finished: bool, score: float | None) -> None:
        """Write a checkpoint; `score` is what the looks at held-out images gave at this step, by which the best is kept."""
        tensors, rest = checkpoint.optimizer_groups(self.optimizer)
        groups = {"weights": self.supernet.state_dict(), "optimizer": tensors}
        if self.average is not None:
            groups["ema"] = self.average.module.state_dict()
        state = {
            "space": self.run.space.key, "optimizer": rest, "finished": finished, "epochs": self.recipe.epochs,
            "guard": self.guard.state(), "rollbacks": self.rollbacks, "micro_batch": self.micro_batch,
            "micro_batch_asked": self.recipe.micro_batch, "score": score,
        }  # fmt: skip
        checkpoint.save(self.run.checkpoints, checkpoint.Checkpoint(self.step, groups, state), keep=self.recipe.keep)

    def take_up(self, name: str) -> None:
        """Become what the checkpoint `name` of the run holds; keys that the recipe may change are as it says now."""
        saved = checkpoint.load(self.run.checkpoints / name)
        load_weights(self.supernet, saved)
        self._begin_average()
        if self.average is not None:
            self.average.module.load_state_dict(saved.tensors["ema"])
        decays = [group["weight_decay"] for group in self.optimizer.param_groups]
        checkpoint.restore_optimizer(self.optimizer, saved.tensors["optimizer"], saved.state["optimizer"])
        for group, decay in zip(self.optimizer.param_groups, decays, strict=True):
            group["weight_decay"] = decay
        self.guard.restore(saved.state["guard"])
        self.rollbacks = saved.state.get("rollbacks", 0)
        if self.recipe.micro_batch == saved.state["micro_batch_asked"]:
            self.micro_batch = saved.state["micro_batch"]
        self.step = saved.step

    def _begin_average(self) -> None:
        if self.recipe.ema is not None:
            self.average = ModelEmaV3(self.supernet, decay=self.recipe.ema, use_warmup=True)


def newest(run: Run) -> str | None:
    """Name of a run's newest whole checkpoint. Raises `InputError` where there are some and none is whole."""
    path = checkpoint.latest(run.checkpoints)
    if path is not None:
        return path.name
    torn = [path for path in checkpoint.all_of(run.checkpoints) if (path / "manifest.json").exists()]
    if torn:
        raise InputError(
            f"no checkpoint of {run.path} is whole ({checkpoint.verify(torn[-1])}): start a new run with another --out"
        )
    return None


def cut_log(run: Run, step: int) -> None:
    """Leave out the lines of the log that are beyond `step`: it never runs ahead of the weights."""
    log = run.path / "metrics.jsonl"
    lines = [line for line in durable.read_lines(log) if _step(line) <= step]
    if log.exists() or lines:
        durable.write_text(log, "".join(json.dumps(line) + "\n" for line in lines))


def _step(line: object) -> float:
    """The step of a line of the log; beyond all where it was damaged."""
    step = line.get("step") if isinstance(line, dict) else None
    return step if isinstance(step, int) else math.inf
