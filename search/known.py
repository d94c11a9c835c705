"""All that is known of the children of a run: what the store has, and what is evaluated when it is asked for."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from search.evaluate import Advancing
from search.objective import Objective, objective_named, on_first
from search.records import Row
from search.rungs import Rung
from search.store import Store
from supernet.arch import Arch
from supernet.costs import Costs
from supernet.run import Run
from supernet.samples import Samples, pack, unpack
from supernet.space import Space
from supernet.task import Task

AT_ONCE = 32
"""Children evaluated between two writes to the store: what a killed search loses at most."""


class Known:
    """Children and what they did on the images of a split, by rungs. A child that was at a rung is not evaluated there again."""

    def __init__(
        self, space: Space, task: Task, store: Store, advancing: Advancing | None, rungs: Sequence[Rung], costs: Costs,
        objective: Objective, labels: NDArray[np.int64], classes: int,
    ) -> None:  # fmt: skip
        self.space, self.task, self.store, self.advancing, self.rungs, self.costs = space, task, store, advancing, rungs, costs
        self.objective, self.labels, self.classes = objective, labels, classes
        self.rows: dict[Arch, Row] = {
            space.arch(json.loads(row.arch), f"{store.path}: child {row.key}"): row for row in store.rows()
        }
        self._metric = objective_named(None, task)
        self._values: dict[tuple[Arch, int], NDArray[Any]] = {}

    @property
    def last(self) -> int:
        """The rung of all images."""
        return len(self.rungs) - 1

    def rung(self, arch: Arch) -> int:
        """The highest rung that a child was at; -1 where it is unknown."""
        return self.rows[arch].rung if arch in self.rows else -1

    def samples(self, arch: Arch, rung: int) -> Samples:
        """What a child did on the images of a rung and those below."""
        row, images = self.rows[arch], self.rungs[rung].images
        return {name: column[:images] for name, column in unpack(row.samples, row.images, self.task.columns).items()}

    def values(self, arch: Arch, rung: int) -> NDArray[Any]:
        """The objective's value of every image of a rung and those below, shape (images,); their mean is the score there."""
        if (arch, rung) not in self._values:
            labels = self.labels[: self.rungs[rung].images]
            self._values[arch, rung] = self.objective.values(self.samples(arch, rung), labels, self.classes)
        return self._values[arch, rung]

    def on_first(self, arch: Arch, rung: int) -> Callable[[int], NDArray[Any]]:
        """The objective's values on the first n images, as a function of n, of a child that was at a rung."""
        images = self.rungs[rung].images
        return on_first(self.objective, self.samples(arch, rung), self.labels[:images], self.classes)

    def score(self, arch: Arch, rung: int) -> float:
        """A child's score, comparable between rungs: on fewer images than all, its paired difference to the largest child counts.

        (The largest child's mean is a control variate: what the first images have in common is taken out.)
        """
        own, anchor = self.mean(arch, rung), self.space.largest
        if rung == self.last or self.rung(anchor) < self.last:
            return own
        return self.mean(anchor, self.last) + own - self.mean(anchor, rung)

    def mean(self, arch: Arch, rung: int) -> float:
        """Of its values at a rung."""
        return float(self.values(arch, rung).mean(dtype=np.float64))

    def advance(self, archs: Sequence[Arch], rung: int, stages: Mapping[Arch, str]) -> dict[Arch, NDArray[Any]]:
        """`values` of these children at a rung, after evaluating what is missing; those that cannot be evaluated are left out.

        `stages` says where each is from; it is written with the child.
        """
        missing = [arch for arch in archs if self.rung(arch) < rung]
        for start in range(0, len(missing), AT_ONCE):
            part = missing[start : start + AT_ONCE]
            for step in range(rung + 1):
                behind = [arch for arch in part if self.rung(arch) == step - 1]
                if behind:
                    self._evaluate(behind, step, stages)
        return {arch: self.values(arch, rung) for arch in archs if self.rung(arch) >= rung}

    def _evaluate(self, archs: Sequence[Arch], rung: int, stages: Mapping[Arch, str]) -> None:
        """One step up for children that are all on the rung below."""
        assert self.advancing is not None, "evaluation needs something that evaluates"
        start, before = time.perf_counter(), self.advancing.spent.macs
        found = self.advancing.advance(archs, rung)
        if not found:
            return
        seconds, macs = (time.perf_counter() - start) / len(found), (self.advancing.spent.macs - before) / len(found)
        table = self.costs.all(self.space.encode(list(found)))
        rows = []
        for position, (arch, added) in enumerate(found.items()):
            old = self.rows.get(arch)
            samples = _joined(unpack(old.samples, old.images, self.task.columns), added) if old else added
            rows.append(Row(
                arch.key, arch.to_json(), old.stage if old else stages[arch], rung, pack(samples, self.task.columns),
                self.rungs[rung].images, self._score(samples), {name: float(values[position]) for name, values in table.items()},
                macs + (old.macs_spent if old else 0), seconds + (old.seconds if old else 0),
            ))  # fmt: skip
        self.store.add(rows)
        self.rows |= dict(zip(found, rows, strict=True))

    def _score(self, samples: Samples) -> float:
        """Mean of the task's own metric, whatever the objective."""
        labels = self.labels[: len(next(iter(samples.values())))]
        return float(self._metric.values(samples, labels, self.classes).mean(dtype=np.float64))


def scores_of(run: Run, store: Store, objective: Objective) -> dict[Arch, float]:
    """Every child of a store with its score, made comparable (`Known.score`), in the order of evaluation."""
    steps = [Rung(*step) for step in json.loads(store.identity["evaluation"])["rungs"]]
    labels = run.dataset.split("search_val").labels
    known = Known(run.space, run.task, store, None, steps, Costs(run.space), objective, labels, len(run.classes))
    return {arch: known.score(arch, row.rung) for arch, row in known.rows.items()}


def _joined(one: Samples, other: Samples) -> Mapping[str, NDArray[Any]]:
    """The samples of two runs of images, one behind the other."""
    return {name: np.concatenate([one[name], other[name]]) for name in one}
