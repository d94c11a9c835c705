"""Searches replayed over a table of what every child of a space did on every image: the real engine, evaluation by look-up.

The macs charged are those that a live search would spend: images and calibration images through the nodes that the children of one
call share (`search/trie.py`), continued from the rung below. The table was scored by statistics of all
calibration images: that lower rungs have fewer is charged for, but what it costs in accuracy is not seen.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from search import pareto
from search.budget import Budget
from search.engine import Engine, Phase
from search.evaluate import Spent
from search.feasible import Feasible
from search.known import Known
from search.objective import objective_named
from search.rungs import Rung, calibration_spent
from search.store import Store
from search.trie import macs_alone, macs_shared
from supernet.arch import Arch
from supernet.costs import Costs
from supernet.samples import Samples
from supernet.space import Space
from supernet.task import Classification


@dataclass(frozen=True)
class Table:
    """`right` says which of the images each child classifies rightly, shape (children, images)."""

    space: Space
    archs: list[Arch]
    right: NDArray[np.bool_]
    macs: NDArray[np.int64]
    calibration_images: int

    @classmethod
    def read(cls, path: Path, children: int | None = None) -> Table:
        """A file of `quality_cifar.py --table`."""
        with np.load(path, allow_pickle=False) as saved:
            space = Space.from_definition(json.loads(str(saved["space"])))
            right = np.unpackbits(saved["packed"], axis=1, count=int(saved["images"])).astype(bool)
            calibration = json.loads(str(saved["recipe"]))["calibration_images"]
            archs = space.decode(saved["codes"].astype(np.int64))
            return cls(space, archs[:children], right[:children], saved["macs"][:children], calibration)

    @property
    def images(self) -> int:
        """How many each child was scored on."""
        return self.right.shape[1]

    def right_of(self, arch: Arch) -> NDArray[np.bool_]:
        """Which images a child classifies rightly, shape (images,)."""
        return self.right[self.place[arch]]

    @cached_property
    def place(self) -> dict[Arch, int]:
        """Arch -> its row."""
        return {arch: row for row, arch in enumerate(self.archs)}

    @cached_property
    def top1(self) -> NDArray[np.float64]:
        """Of each child on all images: the truth that a search can at best find."""
        return self.right.mean(axis=1)

    def hypervolume(self, archs: Sequence[Arch], worst: float) -> float:
        """Area between the front of some children (top1 over log macs) and the corner of the dearest child at `worst`.

        As a fraction of that of all children.
        """
        return self._area([self.place[arch] for arch in archs], worst) / self._area(range(len(self.archs)), worst)

    def _area(self, rows: Any, worst: float) -> float:
        if not len(rows):
            return 0.0
        cost, score, rows = np.log(self.macs.astype(float)), self.top1, np.asarray(rows)
        chosen = rows[pareto.front(score[rows], cost[rows][:, None])]
        return float(((score[chosen] - worst) * np.diff(np.append(cost[chosen], cost.max()))).sum())


class Answers(Protocol):
    """What every child does on every image, known without a network."""

    @property
    def space(self) -> Space:
        """Of the children."""
        ...

    def right_of(self, arch: Arch) -> NDArray[np.bool_]:
        """Which images a child classifies rightly, shape (images,)."""
        ...


class Replay:
    """Evaluation of children by look-up (`search.evaluate.Advancing`). With `shared` False, every child pays for itself alone."""

    def __init__(self, table: Answers, rungs: Sequence[Rung], *, shared: bool = True) -> None:
        self.table, self.rungs, self.shared, self.spent = table, rungs, shared, Spent()
        self.failed: dict[Arch, str] = {}

    def advance(self, archs: Sequence[Arch], rung: int) -> dict[Arch, Samples]:
        """What the table says."""
        here, below = self.rungs[rung], self.rungs[rung - 1] if rung else Rung(0, 0)
        images = here.images - below.images
        calibration = calibration_spent(self.rungs, rung) - (calibration_spent(self.rungs, rung - 1) if rung else 0)
        macs = (macs_shared if self.shared else macs_alone)(self.table.space, archs)
        before = self.spent
        self.spent = Spent(
            before.macs + macs * (images + calibration), before.image_forwards + images * len(archs),
            before.calibration_forwards + calibration * len(archs),
        )  # fmt: skip
        return {arch: self._samples(self.table.right_of(arch)[below.images : here.images]) for arch in archs}

    def _samples(self, right: NDArray[np.bool_]) -> Samples:
        wrong = (~right).astype(np.uint16)
        return {"rank": wrong, "predicted": np.zeros_like(wrong), "loss": np.zeros(len(right), np.float16)}


@dataclass(frozen=True)
class Step:
    """A replayed search after one of its races."""

    macs: int
    image_forwards: int
    evaluated: int
    whole: tuple[Arch, ...]
    """The children scored on all images."""


def replay(
    table: Answers, rungs: Sequence[Rung], phases: Callable[[Feasible], Sequence[Phase]], *, budgets: Sequence[Budget] = (),
    zones: Callable[[Feasible], Sequence[tuple[Budget, ...]]] = lambda _: [()], batch: int = 16, shared: bool = True,
    until: Callable[[Step], bool] = lambda _: False,
) -> list[Step]:  # fmt: skip
    """Search with the engine; a step after every race, the last one that which `until` ended, if any."""
    feasible = Feasible(table.space, Costs(table.space), tuple(budgets), {})
    advancing, task = Replay(table, rungs, shared=shared), Classification()
    steps: list[Step] = []

    class Enough(Exception):
        pass

    with tempfile.TemporaryDirectory() as folder, Store.open(Path(folder) / "search.sqlite", identity={}) as store:
        labels = np.zeros(rungs[-1].images, np.int64)
        known = Known(table.space, task, store, advancing, rungs, feasible.costs, objective_named(None, task), labels, 10)
        engine = Engine("replay", known, feasible, zones(feasible), phases(feasible), batch, lambda _: note())

        def note() -> None:
            whole = tuple(arch for arch, rung in engine.view.items() if rung == known.last)
            spent = advancing.spent
            steps.append(Step(spent.macs, spent.image_forwards, len(engine.view), whole))
            if until(steps[-1]):
                raise Enough

        try:
            engine.go()
            note()
        except Enough:
            pass
    return steps


def interval(values: Any, seed: int = 0) -> tuple[float, float, float]:
    """Median with its 95 % bootstrap interval."""
    numbers = np.asarray(values, dtype=float)
    drawn = np.median(np.random.default_rng(seed).choice(numbers, (2000, len(numbers))), axis=1)
    return float(np.median(numbers)), float(np.quantile(drawn, 0.025)), float(np.quantile(drawn, 0.975))
