"""Children that are judged in no time: their scores follow from their arch, their latency from their operators."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from deploy.probe import probe
from deploy.targets import Model
from search.evaluate import Spent
from search.finalists import Bench
from search.rungs import Rung
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
    """(key, split) of every evaluation; of the search-val split also the rung, as "search_val 0"."""
    dies_after: int | None = None
    """Evaluations until the process "dies"."""

    def samples(self, space: Space, arch: Arch, split: SplitImages) -> dict[str, Any]:
        """What a child does on all images of a split."""
        rng = np.random.default_rng([int(arch.key, 16), len(split.name)])
        wrong = (rng.random(len(split)) >= self.quality(space, arch)).astype(np.uint16)
        return {"rank": wrong, "predicted": wrong, "loss": wrong.astype(np.float16)}

    def ask(self, arch: Arch, where: str) -> None:
        """Remember that a child is evaluated."""
        self.asked.append((arch.key, where))

    def live(self) -> None:
        """Die when it is time."""
        if self.dies_after is not None and len(self.asked) >= self.dies_after:
            raise KeyboardInterrupt

    @property
    def keys(self) -> list[str]:
        """Children evaluated on search-val, in order."""
        return [key for key, where in self.asked if where == "search_val 0"]


class Judging:
    """A `search.evaluate.Advancing` of a judge."""

    failed: Mapping[Arch, str] = MappingProxyType({})

    def __init__(self, judge: Judge, evaluator: Any, split: SplitImages, rungs: Sequence[Rung]) -> None:
        self.judge, self.space, self.split, self.rungs, self.spent = judge, evaluator.supernet.space, split, rungs, Spent()

    def advance(self, archs: Sequence[Arch], rung: int) -> dict[Arch, Any]:
        self.judge.live()
        first, last = self.rungs[rung - 1].images if rung else 0, self.rungs[rung].images
        found = {}
        for arch in archs:
            self.judge.ask(arch, f"search_val {rung}")
            whole = self.judge.samples(self.space, arch, self.split)
            found[arch] = {name: column[first:last] for name, column in whole.items()}
            self.spent = replace(self.spent, image_forwards=self.spent.image_forwards + last - first)
        return found


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

    def samples(evaluator: Evaluator, network: Any, resolution: int, split: SplitImages) -> Any:
        made.live()
        made.ask(network, split.name)
        return made.samples(evaluator.supernet.space, network, split)

    monkeypatch.setattr("search.loop.SharedEvaluator", lambda *given: Judging(made, *given))
    monkeypatch.setattr(Evaluator, "calibrated", lambda evaluator, arch: arch)
    monkeypatch.setattr(Evaluator, "samples", samples)
    monkeypatch.setattr(Run, "supernet", lambda run, device="cpu": SimpleNamespace(space=run.space))
    return made
