"""The training loop: batches, steps, the log, checkpoints, and the way back from a step that went wrong.

The method itself is in `supernet/step.py`. Everything random is a function of (seed, step), so a resumed run is bit-equal to an
uninterrupted one on a CPU, and processes that train together draw the same children.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from supernet import checkpoint, durable
from supernet.arch import Arch
from supernet.compiled import CompiledChildren
from supernet.costs import arch_costs
from supernet.data.augment import Augment
from supernet.data.batches import Batch, TrainingBatches
from supernet.data.mix import Mix, mix_groups
from supernet.device import fitting_threads
from supernet.distributed import World, reduce_gradients
from supernet.errors import InputError
from supernet.guard import RATE, Guard, Rollbacks
from supernet.losses import Distillation, ramp
from supernet.norms import Statistics
from supernet.optimizer import limit_gradient
from supernet.run import Run
from supernet.sandwich import Sampler, Sampling, pick
from supernet.schedule import learning_rate
from supernet.state import State, cut_log, newest
from supernet.step import ChildResult, Resizer, StepConfig, losses_without_gradients, normalised, train_step
from supernet.validate import Looks

SAVE_SECONDS = 300.0
"""Longest time between checkpoints; there is also one at the end of an epoch when the last is `SAVE_EPOCH_SECONDS` old."""
SAVE_EPOCH_SECONDS = 5.0
LOG_LINES = 400
"""About as many lines of metrics as a run writes."""
DROPOUT, AFTER_ROLLBACK = 8, 9
"""Last words of the random streams' keys (`supernet.data.batches` has others)."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Told to the caller after every step."""

    step: int
    steps: int
    images: int
    """Of this step, over all processes."""
    line: dict[str, Any] | None = None
    """What was just logged, if anything."""
    events: tuple[str, ...] = ()
    """What went wrong at this step and what was done about it, a line each."""


def train(
    run: Run, *, device: str = "cpu", workers: int = 0, progress: Callable[[Progress], None] | None = None, world: World | None = None
) -> None:  # fmt: skip
    """Train the run's supernet to the end, from its newest whole checkpoint where there is one.

    In a job of several processes (`supernet.distributed.world`), every one of them calls this; one writes. Raises `InputError` when
    the loss is lost for good, or another process trains this run. Checkpoints stay in any case.
    """
    world = world or World(device=device)
    largest = arch_costs(run.space, run.space.largest)["macs"]
    lock = durable.locked(run.path / "train.lock", f"the run {run.path}") if world.main else nullcontext()
    with lock, torch.random.fork_rng(devices=_own_gpu(world.device)), fitting_threads(largest):
        _Training(run, world, workers).go(progress or (lambda _: None))


def _own_gpu(device: str) -> list[torch.device]:
    """The GPU of this process: torch would by default touch all that it sees."""
    where = torch.device(device)
    if where.type != "cuda":
        return []
    return [where if device.partition(":")[2] else torch.device("cuda", torch.cuda.current_device())]


class _Training:
    def __init__(self, run: Run, world: World, workers: int) -> None:
        self.run, self.recipe, self.world, self.workers, self.device = run, run.recipe, world, workers, world.device
        torch.manual_seed(self.recipe.seed)
        self.rollbacks = Rollbacks(run.path / "rollbacks.jsonl")
        self.mean, self.std = (torch.tensor(run.data[name], device=self.device).view(1, -1, 1, 1) for name in ("mean", "std"))
        self.mix = Mix(**self.recipe.mix.model_dump())
        self.chance = run.chance_loss
        self.looks = Looks(run, world)
        self.gradient_norm = 0.0
        self.best = -math.inf
        """Highest score of a checkpoint; only the main process, which saves, knows it."""
        self.unreadable: set[str] = set()
        self.events: list[str] = []
        self._begin()
        self.steps = self.recipe.epochs * self.batches.steps_per_epoch
        self._refuse_uneven()

    def _refuse_uneven(self) -> None:
        """Pieces of a batch must be equal: a small data set makes its batches smaller than the recipe's."""
        images, recipe = self.batches.batch_size // self.world.size, self.recipe
        pieces = {"bn_group": recipe.bn_group, "micro_batch": recipe.micro_batch}
        for name, size in pieces.items():
            if isinstance(size, int) and images % size:
                raise InputError(f"the {images} images of a step in each of {self.world.size} processes must be a multiple of {name} "
                                 f"({size}): change it, batch_size or the number of processes")  # fmt: skip

    def go(self, progress: Callable[[Progress], None]) -> None:
        while not self._to_the_end(progress):
            pass

    def _to_the_end(self, progress: Callable[[Progress], None]) -> bool:
        """Train until the end (True), or until the run has to go back (False)."""
        state, per_epoch, every = self.state, self.batches.steps_per_epoch, max(1, self.steps // LOG_LINES)
        saved = self.logged = time.monotonic()
        self.logged_step = state.step
        for batch in self.batches.batches(state.step, self.steps):
            rate, children = self._one(batch)
            last, look = state.step == self.steps, self.looks.due(state.step, self.steps, per_epoch)
            line = self._line(rate, children) if state.step % every == 0 or last or look else {}
            reason = state.guard.reason
            score = self._look(line) if look and reason is None else None
            self._write(line)  # before the checkpoint: what is beyond it is cut off when the run is taken up
            if reason is None:
                since, better = time.monotonic() - saved, score is not None and score > self.best
                due = since > SAVE_SECONDS or (state.step % per_epoch == 0 and since > SAVE_EPOCH_SECONDS)
                if last or ((due or better) and state.guard.good):
                    reason, saved = self._save(last, score), time.monotonic()
                    self.best = max(self.best, -math.inf if score is None else score)
            if last and reason is None and not state.guard.good:
                self.events.append(f"step {state.step}: the run ends on steps that were skipped, or on the loss of guessing")
            if reason is not None:
                self.events.append(self._back(reason))
            told, self.events = tuple(self.events), []
            progress(Progress(self.state.step, self.steps, self.batches.batch_size, line or None, told))
            if reason is not None:
                return False
        return True

    # --- a step ---

    def _one(self, batch: Batch) -> tuple[float, list[dict[str, Any]]]:
        """Make a step, or skip it where it is not finite; gives its rate, and what each child did."""
        self._note_unreadable(batch)
        recipe, state = self.recipe, self.state
        rate = self.rate * learning_rate(
            state.step, self.steps, peak=recipe.learning_rate, warmup=round(recipe.warmup_epochs * self.batches.steps_per_epoch),
            schedule=recipe.schedule, floor=recipe.floor,
        )  # fmt: skip
        images, targets = self._images(batch)
        results = self._gradients(images, targets)
        reduce_gradients(state.supernet, self.world)
        norm = limit_gradient(state.supernet, recipe)
        losses, scores, self.gradient_norm = self._numbers(results, norm)
        made = state.guard.watch(losses[0] if all(map(math.isfinite, losses)) else math.nan, self.gradient_norm)
        if made:
            state.update(rate)
        state.step += 1
        if not made:
            self.events.append(f"step {state.step}: the loss or the gradient is not finite; the step was skipped")
        metric = self.run.task.metric
        told = zip(results, losses, scores, strict=True)
        return rate, [{"role": result.role, "loss": loss, metric: score} for result, loss, score in told]

    def _numbers(self, results: list[ChildResult], norm: Tensor) -> tuple[list[float], list[float], float]:
        """Losses and scores, means over the processes, and the gradient's norm. The only wait for the device in a step."""
        numbers = torch.stack([*(result.loss for result in results), *(result.score for result in results)]).float()
        self.world.sum_(numbers)
        *found, gradient_norm = torch.cat([numbers / self.world.size, norm.float().view(1)]).tolist()
        return found[: len(results)], found[len(results) :], gradient_norm

    def _images(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Normalised and mixed images on the device, with their labels or the probabilities of mixed ones."""
        pixels, labels = (value.to(self.device, non_blocking=True) for value in (batch.images, batch.labels))
        images = normalised(pixels, self.mean, self.std)
        if not self.mix.on:
            return images, labels
        group = self.recipe.bn_group if isinstance(self.recipe.bn_group, int) else len(images)
        first = self.world.rank * len(images) // group
        classes = len(self.run.classes)
        return mix_groups(images, labels, classes, self.mix, (self.seed, self.state.step), group, first)

    def _config(self) -> StepConfig:
        recipe, fade = self.recipe, self.recipe.distillation
        group = recipe.bn_group if isinstance(recipe.bn_group, int) else None
        return StepConfig(
            soft_weight=fade.most * ramp(self.state.step / self.steps, fade.start, fade.end),
            distillation=Distillation(fade.kind, fade.temperature, fade.alpha_low, fade.alpha_high, fade.clip),
            label_smoothing=recipe.label_smoothing, dropout=recipe.dropout, drop_path=recipe.drop_path,
            regularise_all=recipe.regularise == "all", mean=recipe.reduction == "mean", bf16=recipe.precision == "bf16",
            statistics=Statistics(group, recipe.bn_group == "sync" and self.world.size > 1), share=1 / self.world.size,
            micro_batch=self.state.micro_batch,
        )  # fmt: skip

    def _gradients(self, images: Tensor, targets: Tensor) -> list[ChildResult]:
        """`train_step`; where memory does not suffice, the same step again in smaller pieces, and so from then on."""
        crops, state = Resizer(images), self.state
        while True:
            state.supernet.zero_grad()
            config = self._config()
            key = [self.seed, state.step, self.world.rank, DROPOUT]
            torch.manual_seed(int(np.random.default_rng(key).integers(2**63)))
            try:
                children = self._children(images, targets, config, crops)
                return train_step(
                    state.supernet, children, images, targets, self.run.task, config, crops=crops, child=self.child
                )
            except torch.OutOfMemoryError as error:
                self._make_smaller(len(images), config, error)
            torch.cuda.empty_cache()  # not above: there the error still holds the activations

    def _children(self, images: Tensor, targets: Tensor, config: StepConfig, crops: Resizer) -> list[tuple[str, Arch]]:
        """The children of the step; of several candidates, the one that the recipe's rule prefers on these images."""
        chosen = []
        for role, candidates in self.sampler.children(self.state.step):
            arch = candidates[0]
            if len(candidates) > 1:
                losses = losses_without_gradients(
                    self.state.supernet, candidates, images, targets, self.run.task, config, crops
                )
                self.world.sum_(losses)  # so that all processes prefer the same
                arch = pick(candidates, losses.tolist(), self.recipe.sampling.rule)
            chosen.append((role, arch))
        return chosen

    def _make_smaller(self, images: int, config: StepConfig, error: Exception) -> None:
        now, group = self.state.micro_batch or images, config.statistics.group or 1
        if config.statistics.synchronised or now % 2 or now // 2 % group or now // 2 < 2:
            raise InputError(
                f"{now} images at once need more memory than the device has, and cannot be halved (bn_group {self.recipe.bn_group}): "
                "lower batch_size in a new run, or continue with more processes"
            ) from error
        self.state.micro_batch = now // 2
        same = "" if group > 1 else ", over which batch norm takes its statistics (set bn_group to keep them the same)"
        self.events.append(f"step {self.state.step + 1}: out of memory; from here {now // 2} images go through at once{same}")

    # --- what is written ---

    def _line(self, rate: float, children: list[dict[str, Any]]) -> dict[str, Any]:
        """A line of the log; several children of a role are averaged. Images per second are since the last line."""
        now = time.monotonic()
        step = self.state.step
        speed = (step - self.logged_step) * self.batches.batch_size / max(now - self.logged, 1e-9)
        self.logged, self.logged_step = now, step
        roles: dict[str, list[dict[str, Any]]] = {}
        for child in children:
            roles.setdefault(child["role"], []).append(child)
        names = ("loss", self.run.task.metric)
        means = {
            role: {name: _number(sum(child[name] for child in group) / len(group)) for name in names}
            for role, group in roles.items()
        }
        epoch = round(step / self.batches.steps_per_epoch, 4)
        return {
            "step": step, "epoch": epoch, "learning_rate": rate, "gradient_norm": _number(self.gradient_norm),
            "skipped": self.state.guard.skipped, "images_per_s": round(speed, 1), "children": means,
        }  # fmt: skip

    def _look(self, line: dict[str, Any]) -> float:
        """Look at the ends of the space on held-out images; adds to the line, gives the mean of their scores."""
        found = self.looks.look(self.state.shown)
        line |= {"validation": {role: _number(score) for role, score in found.items()}}
        return sum(found.values()) / len(found)

    def _write(self, line: dict[str, Any]) -> None:
        if line and self.world.main:
            durable.append_line(self.run.path / "metrics.jsonl", json.dumps(line))

    def _note_unreadable(self, batch: Batch) -> None:
        new = [name for name in batch.unreadable if name not in self.unreadable]
        self.unreadable.update(new)
        self.events += [
            f"step {self.state.step + 1}: {name} cannot be read; another image of its class stands in for it" for name in new
        ]

    def _save(self, last: bool, score: float | None) -> str | None:
        """Write a checkpoint; where the weights are not worth one, why the run has to go back."""
        if not self.state.finite:  # of several processes, only the last step is saved at the same moment by all
            return "the weights are not finite" if last or self.world.size == 1 else None
        if self.world.main:
            self.state.save(finished=last, score=score)
        return None

    # --- where it begins, and begins again ---

    def _begin(self) -> None:
        """Weights, optimizer and all else as the newest whole checkpoint has them, or as a run begins."""
        recipe, run, back = self.recipe, self.run, len(self.rollbacks.all())
        self.seed = recipe.seed if not back else int(np.random.default_rng([recipe.seed, back, AFTER_ROLLBACK]).integers(2**62))
        self.rate = RATE**back
        self.batches = self._batches()
        sampling = Sampling(**recipe.sampling.model_dump())
        self.sampler = Sampler(run.space, recipe.children, sampling, self.seed, ends=recipe.sandwich)
        guard = Guard(self.chance, min(200, max(20, self.batches.steps_per_epoch // 4)), recipe.guard.skips)
        self.state = State(run, self.device, guard)
        self.child = CompiledChildren(self.state.supernet) if recipe.compile else None
        name = self.world.broadcast(newest(run) if self.world.main else None)
        if name is None:
            self.state.begin(write=self.world.main)
        else:
            self.state.take_up(name)
        if self.state.rollbacks > back:
            raise InputError(
                f"{self.rollbacks.path} tells of {back} rollbacks, but {name} was saved after {self.state.rollbacks}: restore it, or "
                "add a line {} for each that it lacks"
            )
        self.state.rollbacks = back
        if self.world.main:
            cut_log(run, self.state.step)
            self.best = checkpoint.best_score(run.checkpoints)
        self.world.barrier()

    def _batches(self) -> TrainingBatches:
        recipe, run = self.recipe, self.run
        return TrainingBatches(
            run.source, run.dataset.splits.train, batch_size=recipe.batch_size, resolution=run.space.largest_resolution,
            augment=Augment(**recipe.augment.model_dump()), seed=self.seed, workers=self.workers, repeats=recipe.repeats,
            balance=recipe.balance, rank=self.world.rank, ranks=self.world.size, pin=self.device.startswith("cuda"),
            skip_unreadable=recipe.skip_unreadable,
        )  # fmt: skip

    def _back(self, reason: str) -> str:
        """Go back to the last good checkpoint, with a lower rate and other draws; gives what to tell.

        Raises `InputError` where that was done often enough.
        """
        gone, at = self.rollbacks.all(), self.state.step
        if len(gone) >= self.recipe.guard.rollbacks:
            kept = checkpoint.latest(self.run.checkpoints)
            left = f"the last good checkpoint is {kept}" if kept is not None else "there is no checkpoint yet"
            raise InputError(
                f"step {at}: {reason}, after {len(gone)} rollbacks: lower learning_rate (now {self.recipe.learning_rate:g}, times "
                f"{self.rate:g} for the rollbacks) or set clip_norm, raise guard.rollbacks, and resume; {left}"
            )
        self.world.barrier()
        if self.world.main:
            good = checkpoint.latest(self.run.checkpoints)
            older = [path for path in checkpoint.all_of(self.run.checkpoints) if good is not None and path < good]
            if good is not None and older and any(line.get("to") == checkpoint.step_of(good) for line in gone):
                checkpoint.remove(good)  # it led here before
                good = checkpoint.latest(self.run.checkpoints)
            self.rollbacks.add(at, checkpoint.step_of(good) if good is not None else 0, reason)
        self.world.barrier()
        self._begin()
        return f"step {at}: {reason}; back to step {self.state.step}, at {self.rate:g} of the learning rate"


def _number(value: float) -> float | None:
    """Rounded for the log; None for what JSON has no number for."""
    return round(value, 6) if math.isfinite(value) else None
