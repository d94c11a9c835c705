"""The learning rate as a function of the step: nothing to save, nothing to lose."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["cosine", "exponential"]


def learning_rate(step: int, steps: int, *, peak: float, warmup: int, schedule: Schedule, floor: float) -> float:
    """Rate at `step` (0-based) of `steps`: linear warm-up to `peak`, then decay, never below `floor * peak`.

    "exponential" is BigNAS's exponential decay with constant ending: it reaches the floor at three quarters of the run and stays
    there, so that small children go on learning while the largest no longer overfits (section 3.2 of arXiv 2003.11142).
    "cosine" ends at the floor with the last step.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - 1 - warmup)
    if schedule == "cosine":
        return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))
    lowest = max(floor, 1e-3)  # an exponential never reaches 0
    return peak * max(lowest, math.pow(lowest, done / 0.75))
