"""Children that are judged in no time: their scores follow from their arch, their latency from their operators."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from deploy.probe import probe
from deploy.targets import Model
from search.finalists import Bench
from supernet.arch import Arch
from supernet.costs import arch_costs
from supernet.data.dataset import SplitImages
from supernet.evaluate import Evaluator
from supernet.run import Run
from supernet.space import Space


def by_size(space: Space, arch: Arch) -> float:
    """Accuracy that grows with the macs, from 0.5 to 0.95."""
    macs = [math.log(arch_costs(space, which)["macs"]) for which in (space.smallest, arch, space.largest)]
    return 0.5 + 0.45 * (macs[1] - macs[0]) / max(macs[2] - macs[0], 1e-9)


@dataclass
class Judge:
    """Stands in for evaluation: each image is right with the chance that `quality` gives the child."""

    quality: Callable[[Space, Arch], float] = by_size
    asked: list[tuple[str, str]] = field(default_factory=list)
    """(key, split) of every evaluation."""
    dies_after: int | None = None
    """Evaluations until the process "dies"."""

    def __call__(self, space: Space, arch: Arch, split: SplitImages) -> Any:
        if self.dies_after is not None and len(self.asked) >= self.dies_after:
            raise KeyboardInterrupt
        self.asked.append((arch.key, split.name))
        rng = np.random.default_rng([int(arch.key, 16), len(split.name)])
        return rng.random(len(split)) < self.quality(space, arch)

    @property
    def keys(self) -> list[str]:
        """Children evaluated on search-val, in order."""
        return [key for key, split in self.asked if split == "search_val"]


@pytest.fixture
def probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Finalists are measured as probes, which take as long as their exports, and are made in milliseconds."""

    def probed(bench: Bench, arch: Arch) -> Model:
        return Model(probe(bench.run.space, arch), bench.run.space.family.in_channels, bench.run.space.resolution(arch))

    monkeypatch.setattr(Bench, "_exported", probed)


@pytest.fixture
def judge(probes: None, monkeypatch: pytest.MonkeyPatch) -> Judge:
    """Evaluation by `Judge`, which needs no weights, and probes in place of exports."""
    made = Judge()

    def judged(evaluator: Evaluator, arch: Arch, split: SplitImages) -> Any:
        return made(evaluator.supernet.space, arch, split)

    monkeypatch.setattr(Evaluator, "evaluate", judged)
    monkeypatch.setattr(Run, "supernet", lambda run, device="cpu": SimpleNamespace(space=run.space))
    return made
