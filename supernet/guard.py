"""Whether a run still learns: steps that are not finite, and a loss that returns to chance, send it back to its last good checkpoint.

Supernets collapse in mid-training, days into a run (the loss jumps to that of guessing and stays). What is watched is the largest
child's own loss to its targets, never the surrogate that students learn from. The state is saved with a checkpoint, so a resumed
run decides as an uninterrupted one.
"""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from supernet import durable

LEARNT = 0.9
"""Fraction of the loss of guessing below which a run has begun to learn."""
DOUBTFUL = 0.95
"""Fraction of it above which the weights of a run that had learnt are not saved."""
LOST = 0.99
"""Fraction of it above which such a run has collapsed."""
CAP = 2.0
"""A step's loss counts for at most so many times that of guessing: one bad batch is no collapse."""
SURE = 4.0
"""Standard errors by which a mean has to lie below that of guessing, before a run counts as one that has learnt."""
LATEST = 5
"""Steps whose mean says how the weights are right now."""
RATE = 0.5
"""What each rollback does to the learning rate."""


@dataclass
class Guard:
    """Watches one run. `chance` is the loss of guessing; a run is judged by its last `horizon` steps."""

    chance: float
    horizon: int
    most_skips: int
    recent: list[float] = field(default_factory=list)
    """Losses of the last `horizon` steps that were made."""
    spread: float = 0.0
    """Largest standard deviation of the losses of `horizon` steps so far."""
    lowest: float | None = None
    """Of the means over `horizon` steps, each with `SURE` standard errors added."""
    skips_in_a_row: int = 0
    skipped: int = 0
    """Steps skipped since the run began."""

    def watch(self, loss: float, gradient_norm: float) -> bool:
        """Take in a step; whether it may be made: False where its loss or gradient is not finite."""
        if not (math.isfinite(loss) and math.isfinite(gradient_norm)):
            self.skips_in_a_row += 1
            self.skipped += 1
            return False
        self.skips_in_a_row = 0
        self.recent = [*self.recent, min(loss, CAP * self.chance)][-self.horizon :]
        if self.mean is not None:
            self.spread = max(self.spread, float(np.std(self.recent)))
            surely = self.mean + SURE * self.spread / math.sqrt(self.horizon)
            self.lowest = surely if self.lowest is None else min(self.lowest, surely)
        return True

    @property
    def mean(self) -> float | None:
        """Mean loss of the last `horizon` steps; None before there were as many."""
        return statistics.fmean(self.recent) if len(self.recent) == self.horizon else None

    @property
    def reason(self) -> str | None:
        """Why the run has to go back, or None."""
        if self.skips_in_a_row >= self.most_skips:
            return f"the loss or the gradient of {self.skips_in_a_row} steps in a row was not finite"
        if self.learnt and self.mean is not None and self.mean >= LOST * self.chance:
            return (
                f"the loss of the largest child returned to that of guessing ({self.mean:.3g}, it had been {self.lowest:.3g})"
            )
        return None

    @property
    def learnt(self) -> bool:
        """Whether the loss was ever clearly below that of guessing."""
        return self.lowest is not None and self.lowest <= LEARNT * self.chance

    @property
    def good(self) -> bool:
        """Whether the weights are worth keeping: nothing is being skipped, and what was learnt is still there."""
        doubtful = self.learnt and statistics.fmean(self.recent[-LATEST:]) > DOUBTFUL * self.chance
        return self.skips_in_a_row == 0 and not doubtful

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        kept = ("recent", "spread", "lowest", "skips_in_a_row", "skipped")
        return {name: value for name, value in asdict(self).items() if name in kept}

    def restore(self, state: dict[str, Any]) -> None:
        """Inverse of `state`."""
        for name in self.state():
            setattr(self, name, state[name])
        self.recent = self.recent[-self.horizon :]  # of a run that was extended, say


@dataclass(frozen=True)
class Rollbacks:
    """How often a run went back, in a file of its own: a checkpoint that is loaded again must not forget it."""

    path: Path

    def all(self) -> list[dict[str, Any]]:
        """Every rollback: the step it happened at, the step it went back to, why."""
        return durable.read_lines(self.path)

    def add(self, at: int, to: int, reason: str) -> None:
        """Write one down, durably, before anything is done about it."""
        lines = [*self.all(), {"at": at, "to": to, "reason": reason}]
        durable.write_text(self.path, "".join(json.dumps(line) + "\n" for line in lines))
