"""The training loop: batches, steps, the log, checkpoints. The method itself is in `supernet/step.py`.

Everything random is a function of (seed, step), so a resumed run is bit-equal to an uninterrupted one on a CPU.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from timm.optim import create_optimizer_v2

from supernet import checkpoint, durable
from supernet.costs import arch_costs
from supernet.data.batches import Augment, TrainingBatches
from supernet.device import fitting_threads
from supernet.errors import InputError
from supernet.losses import ramp
from supernet.model import Supernet
from supernet.recipe import TrainConfig
from supernet.run import Run, load_weights
from supernet.sandwich import sandwich, step_rng
from supernet.schedule import learning_rate
from supernet.step import ChildResult, StepConfig, normalised, train_step
from supernet.warm import fill, record

SAVE_SECONDS = 300.0
"""Longest time between checkpoints; there is also one at the end of an epoch when the last is `SAVE_EPOCH_SECONDS` old."""
SAVE_EPOCH_SECONDS = 5.0
LOG_LINES = 400
"""About as many lines of metrics as a run writes."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Told to the caller after every step."""

    step: int
    steps: int
    line: dict[str, Any] | None
    """What was just logged, if anything."""


def train(run: Run, *, device: str = "cpu", workers: int = 0, progress: Callable[[Progress], None] | None = None) -> None:
    """Train the run's supernet to the end, from its newest whole checkpoint where there is one.

    Raises `InputError` when the loss is no longer finite, or another process trains this run. Checkpoints stay in any case.
    """
    largest = arch_costs(run.space, run.space.largest)["macs"]
    with durable.locked(run.path / "train.lock", f"the run {run.path}"), torch.random.fork_rng(), fitting_threads(largest):
        _Training(run, device, workers).go(progress or (lambda _: None))


class _Training:
    def __init__(self, run: Run, device: str, workers: int) -> None:
        self.run, self.recipe, self.device = run, run.recipe, device
        torch.manual_seed(self.recipe.seed)
        images = run.dataset.split("train")
        augment = Augment(**self.recipe.augment.model_dump())
        self.batches = TrainingBatches(
            images.source, run.dataset.splits.train, batch_size=self.recipe.batch_size, resolution=run.space.largest_resolution,
            augment=augment, seed=self.recipe.seed, workers=workers,
        )  # fmt: skip
        self.steps = self.recipe.epochs * self.batches.steps_per_epoch
        self.mean, self.std = (torch.tensor(run.data[name], device=device).view(1, -1, 1, 1) for name in ("mean", "std"))
        self.supernet = Supernet(run.space, seed=self.recipe.seed).to(device)
        if self.recipe.channels_last:
            self.supernet.to(memory_format=torch.channels_last)
        self.optimizer = make_optimizer(self.supernet, self.recipe)
        self.step = self._restore()

    def go(self, progress: Callable[[Progress], None]) -> None:
        saved, every = time.monotonic(), max(1, self.steps // LOG_LINES)
        for pixels, labels in self.batches.batches(self.step, self.steps):
            rate, results = self._one(pixels.to(self.device), labels.to(self.device))
            self.step += 1
            line = None
            if self.step % every == 0 or self.step == self.steps:
                line = self._log(rate, results)
            progress(Progress(self.step, self.steps, line))
            since = time.monotonic() - saved
            if since > SAVE_SECONDS or (self.step % self.batches.steps_per_epoch == 0 and since > SAVE_EPOCH_SECONDS):
                self._save()
                saved = time.monotonic()
        self._save()

    def _one(self, pixels: torch.Tensor, labels: torch.Tensor) -> tuple[float, list[ChildResult]]:
        recipe, step, per_epoch = self.recipe, self.step, self.batches.steps_per_epoch
        rate = learning_rate(
            step, self.steps, peak=recipe.learning_rate, warmup=round(recipe.warmup_epochs * per_epoch), schedule=recipe.schedule,
            floor=recipe.floor,
        )  # fmt: skip
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        fade = recipe.distillation
        config = StepConfig(
            soft_weight=fade.most * ramp(step / self.steps, fade.start, fade.end), label_smoothing=recipe.label_smoothing,
            dropout=recipe.dropout, drop_path=recipe.drop_path, bf16=recipe.precision == "bf16",
        )  # fmt: skip
        self.optimizer.zero_grad()
        rng = step_rng(recipe.seed, step)
        children = sandwich(self.run.space, recipe.children, rng)
        torch.manual_seed(int(rng.integers(2**63)))  # dropout of this step
        images = normalised(pixels, self.mean, self.std)
        results = train_step(self.supernet, children, images, labels, self.run.task, config)
        if recipe.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.supernet.parameters(), recipe.clip_norm)
        if self.device == "cpu" and not all(math.isfinite(float(result.loss)) for result in results):
            raise InputError(f"the loss is not finite at step {step + 1}: lower learning_rate (now {recipe.learning_rate}) or set "
                             "clip_norm, and start a new run; the checkpoints before it are whole")  # fmt: skip
        self.optimizer.step()
        return rate, results

    def _log(self, rate: float, results: list[ChildResult]) -> dict[str, Any]:
        roles: dict[str, list[ChildResult]] = {}
        for result in results:
            roles.setdefault(result.role, []).append(result)
        children = {}
        for role, group in roles.items():
            loss = sum(float(result.loss) for result in group) / len(group)
            if not math.isfinite(loss):
                raise InputError(f"the loss is not finite at step {self.step}: lower learning_rate or set clip_norm")
            score = sum(float(result.score) for result in group) / len(group)
            children[role] = {"loss": round(loss, 6), self.run.task.metric: round(score, 6)}
        epoch = self.step / self.batches.steps_per_epoch
        line = {"step": self.step, "epoch": round(epoch, 4), "learning_rate": rate, "children": children}
        durable.append_line(self.run.path / "metrics.jsonl", json.dumps(line))
        return line

    def _save(self) -> None:
        tensors, rest = checkpoint.optimizer_groups(self.optimizer)
        state = {"space": self.run.space.key, "optimizer": rest, "finished": self.step >= self.steps}
        groups = {"weights": self.supernet.state_dict(), "optimizer": tensors}
        if not all(bool(torch.isfinite(value).all()) for value in groups["weights"].values()):  # never over a good checkpoint
            raise InputError(f"the weights are not finite after step {self.step}: lower learning_rate (now "
                             f"{self.recipe.learning_rate}) or set clip_norm, and start a new run")  # fmt: skip
        checkpoint.save(self.run.checkpoints, checkpoint.Checkpoint(self.step, groups, state))

    def _restore(self) -> int:
        path = checkpoint.latest(self.run.checkpoints)
        log = self.run.path / "metrics.jsonl"
        if path is None:
            torn = checkpoint.all_of(self.run.checkpoints)
            if torn and any((path / "manifest.json").exists() for path in torn):
                raise InputError(
                    f"no checkpoint of {self.run.path} is whole ({checkpoint.verify(torn[-1])}): start a new run with another --out"
                )
            log.unlink(missing_ok=True)
            donor = self.run.donor
            if donor:
                record(self.run.path / "init", fill(self.supernet, donor))
            return 0
        saved = checkpoint.load(path)
        load_weights(self.supernet, saved)
        checkpoint.restore_optimizer(self.optimizer, saved.tensors["optimizer"], saved.state["optimizer"])
        lines = [
            line for line in durable.read_lines(log) if line["step"] <= saved.step
        ]  # the log never runs ahead of the weights
        durable.write_text(log, "".join(json.dumps(line) + "\n" for line in lines))
        return saved.step


def make_optimizer(supernet: Supernet, recipe: TrainConfig) -> torch.optim.Optimizer:
    """Timm's optimizer of that name; no weight decay on biases and norms."""
    optimizer: torch.optim.Optimizer = create_optimizer_v2(
        supernet, opt=recipe.optimizer, lr=recipe.learning_rate, weight_decay=recipe.weight_decay, momentum=recipe.momentum
    )
    return optimizer
