"""Costs of archs, exact and in closed form: one small table per group of slots that depend on the same dimensions, then a gather.

A slot depends on few dimensions, so its cost is a table over their choices, filled by asking the family for the block (there is no
second formula). The cost of a million archs is then a gather and a sum over integer codes; a maximum for peak memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from supernet.arch import Arch
from supernet.family import BlockSpec, Codes, Slot, block_cost, variants
from supernet.space import Space

METRICS = ("macs", "params", "peak_memory_bytes", "model_size_bytes")
"""Known in closed form, whole numbers.

`macs`: multiply-accumulates at batch 1 (what papers call FLOPs). `params`: with scale and shift of batch norms. `peak_memory_bytes`:
largest sum of live fp32 activations at batch 1. `model_size_bytes`: weights of the exported ONNX file, fp32, batch norm folded; the
file has the graph on top (some hundred bytes a node).
"""

MOST_ROWS = 20_000
"""Combinations of a group of slots that are all counted beforehand; beyond it (operations on many edges) as they are asked for."""


def arch_costs(space: Space, arch: Arch) -> dict[str, int]:
    """Every metric of `METRICS` of one arch."""
    return dict(zip(METRICS, space.costs(arch), strict=True))


class Costs:
    """Costs of many archs of a space at once. Building it fills the tables (a fraction of a second)."""

    def __init__(self, space: Space) -> None:
        self.space = space
        self.feature_names = tuple(sorted({name for spec in set(_covering(space)) for name, _ in block_cost(spec).features}))
        self._joins = {name: np.maximum if name == "peak_memory_bytes" else np.add for name in METRICS}
        counted = _tables(space, [(_counted(name), join) for name, join in self._joins.items()])
        self._counted = dict(zip(METRICS, counted, strict=True))
        self._features: list[list[_Table | _Sparse]] | None = None

    def of(self, metric: str, codes: Codes) -> NDArray[np.int64]:
        """One metric of `METRICS`, shape (archs,), of codes, shape (archs, dimensions)."""
        return _gather(self._counted[metric], codes, self._joins[metric])

    def macs(self, codes: Codes) -> NDArray[np.int64]:
        """Multiply-accumulates, shape (archs,)."""
        return self.of("macs", codes)

    def params(self, codes: Codes) -> NDArray[np.int64]:
        """Parameters (batch-norm scale and shift included), shape (archs,)."""
        return self.of("params", codes)

    def all(self, codes: Codes) -> dict[str, NDArray[np.int64]]:
        """Every metric of `METRICS`, each of shape (archs,)."""
        return {metric: self.of(metric, codes) for metric in METRICS}

    def features(self, codes: Codes) -> NDArray[np.float64]:
        """Number, macs and moved elements of every kind of operator (`feature_names`), shape (archs, features)."""
        if self._features is None:
            self._features = _tables(self.space, [(_feature(name), np.add) for name in self.feature_names])
        return np.stack([_gather(tables, codes, np.add) for tables in self._features], axis=1).astype(np.float64)

    def summed(self, value: Callable[[BlockSpec], float]) -> Callable[[Codes], NDArray[np.float64]]:
        """A function of codes that gives the sum of a value of every block, shape (archs,): one gather, whatever the value is."""
        (tables,) = _tables(self.space, [(value, np.add)], np.float64)
        return lambda codes: _gather(tables, codes, np.add, np.float64)


def _counted(name: str) -> Callable[[BlockSpec], float]:
    read = attrgetter(name)
    return lambda spec: read(block_cost(spec))


def _feature(name: str) -> Callable[[BlockSpec], float]:
    return lambda spec: dict(block_cost(spec).features).get(name, 0)


def _covering(space: Space) -> Iterator[BlockSpec]:
    for slot in space.family.slots:
        for choices in space.family.cover(slot):
            if slot.stands(choices):
                yield space.family.block(slot, choices)


Metric = tuple[Callable[[BlockSpec], float], np.ufunc]
"""What a block has of it, and how that is joined over blocks."""


def _tables(space: Space, metrics: Sequence[Metric], dtype: type[np.number[Any]] = np.int64) -> list[list[_Table | _Sparse]]:
    """For each metric, per group of slots with the same dimensions, the joined values over the dimensions' choices."""
    order = {dimension.name: column for column, dimension in enumerate(space.dimensions)}
    groups: dict[tuple[int, ...], list[Slot]] = {}
    for slot in space.family.slots:
        groups.setdefault(tuple(order[name] for name in slot.dimensions), []).append(slot)
    found: list[list[_Table | _Sparse]] = [[] for _ in metrics]
    for columns, slots in groups.items():
        counts = [len(space.dimensions[column].choices) for column in columns]
        if math.prod(counts) > MOST_ROWS:
            counted = _Counted(space, columns, slots, tuple(metrics), dtype)
            for position in range(len(metrics)):
                found[position].append(_Sparse(counted, position))
            continue
        values = np.zeros((len(metrics), *counts), dtype=dtype)
        for slot in slots:
            for codes, spec in variants(slot, space.by_name, space.family):
                if spec is not None:
                    for position, (value, join) in enumerate(metrics):
                        values[position, *codes] = join(values[position, *codes], value(spec))
        for position, table in enumerate(values):
            found[position].append(_Table(columns, table))
    return found


@dataclass(frozen=True)
class _Table:
    """All values of a group of slots."""

    columns: tuple[int, ...]
    values: NDArray[Any]

    def take(self, columns: NDArray[np.int64]) -> NDArray[Any]:
        flat = np.zeros(columns.shape[1], dtype=np.int64)
        for column, count in zip(self.columns, self.values.shape, strict=True):
            flat = flat * count + columns[column]
        return self.values.ravel().take(flat)


@dataclass(frozen=True)
class _Counted:
    """All metrics of a group of slots with too many combinations to list: counted as they are asked for, and kept."""

    space: Space
    columns: tuple[int, ...]
    slots: list[Slot]
    metrics: tuple[Metric, ...]
    dtype: type[np.number[Any]]
    known: dict[tuple[int, ...], tuple[float, ...]] = field(default_factory=dict)

    def of(self, codes: tuple[int, ...]) -> tuple[float, ...]:
        if codes not in self.known:
            dimensions = [self.space.dimensions[column] for column in self.columns]
            choices = {dimension.name: dimension.choices[code] for dimension, code in zip(dimensions, codes, strict=True)}
            blocks = [self.space.family.block(slot, choices) for slot in self.slots if slot.stands(choices)]
            self.known[codes] = tuple(
                join.reduce([value(block) for block in blocks]).item() if blocks else 0 for value, join in self.metrics
            )
        return self.known[codes]


@dataclass(frozen=True)
class _Sparse:
    """One metric of a group."""

    counted: _Counted
    position: int

    def take(self, columns: NDArray[np.int64]) -> NDArray[Any]:
        mine = columns[list(self.counted.columns)]
        order = np.lexsort(mine)  # equal rows come together, much faster than np.unique over rows
        new = np.ones(len(order), dtype=np.bool_)
        new[1:] = (mine[:, order[1:]] != mine[:, order[:-1]]).any(axis=0)
        rows = mine[:, order[new]].T.tolist()
        values = np.array([self.counted.of(tuple(row))[self.position] for row in rows], dtype=self.counted.dtype)
        found = np.empty(len(order), dtype=self.counted.dtype)
        found[order] = values[np.cumsum(new) - 1]
        return found


def _gather(
    tables: list[_Table | _Sparse], codes: Codes, join: np.ufunc, dtype: type[np.number[Any]] = np.int64
) -> NDArray[Any]:
    columns = np.ascontiguousarray(np.asarray(codes, dtype=np.int64).T)
    total = np.zeros(columns.shape[1], dtype=dtype)
    for table in tables:
        join(total, table.take(columns), out=total)
    return total
