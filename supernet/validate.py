"""Looks at how a run does, while it trains: its largest and smallest child, calibrated, on images held out from training."""

from __future__ import annotations

from dataclasses import replace

from supernet.distributed import World
from supernet.evaluate import Evaluator
from supernet.model import Supernet
from supernet.run import Run

IMAGES = 1000
"""Search-val images of a look, at most: a standard error of 1.6 points of top1 at worst, for little time."""
CALIBRATION_IMAGES = 512
LOOKS = 20
"""About so many a run, where the recipe does not say."""


class Looks:
    """The looks of a run; all processes of a job take part in each."""

    def __init__(self, run: Run, world: World) -> None:
        self.run, self.world = run, world
        self.evaluator: Evaluator | None = None
        every = run.recipe.validate_epochs
        self.every = max(1, round(run.recipe.epochs / LOOKS)) if every is None else every
        if self.every:
            split = run.dataset.split("search_val")
            self.images = replace(split, indices=split.indices[:IMAGES], _cache={})

    def due(self, step: int, steps: int, per_epoch: int) -> bool:
        """Whether there is a look after `step`: every so many epochs, and at the end."""
        return bool(self.every) and (step == steps or step % (self.every * per_epoch) == 0)

    def look(self, supernet: Supernet) -> dict[str, float]:
        """Mean score of the largest and the smallest child, by role."""
        run, images = self.run, min(CALIBRATION_IMAGES, self.run.recipe.calibration_images)
        if self.evaluator is None:
            self.evaluator = Evaluator(supernet, run.task, run.dataset.split("train"), images, world=self.world)
        evaluator = replace(self.evaluator, supernet=supernet)  # which keeps the decoded images
        ends = {"largest": run.space.largest, "smallest": run.space.smallest}
        return {role: float(evaluator.evaluate(arch, self.images).mean()) for role, arch in ends.items()}
