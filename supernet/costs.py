"""Costs of archs, exact and in closed form: one small table per group of slots that depend on the same dimensions, then a gather.

A slot depends on few dimensions, so its cost is a table over their choices, filled by asking the family for the block (there is no
second formula). The cost of a million archs is then a gather and a sum over integer codes; a maximum for peak memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from supernet.arch import Arch
from supernet.family import BlockSpec, Codes, Slot, block_cost, variants
from supernet.operations import BlockCost
from supernet.space import Space

METRICS = ("macs", "params", "peak_memory_bytes")
"""Known in closed form. `macs` are multiply-accumulates at batch 1 (what papers call FLOPs)."""

MOST_ROWS = 20_000
"""Combinations of a group of slots that are all counted beforehand; beyond it (operations on many edges) as they are asked for."""


def arch_costs(space: Space, arch: Arch) -> dict[str, int]:
    """`macs`, `params` and `peak_memory_bytes` of one arch at batch 1."""
    return dict(zip(METRICS, space.costs(arch), strict=True))


class Costs:
    """Costs of many archs of a space at once. Building it fills the tables (a fraction of a second)."""

    def __init__(self, space: Space) -> None:
        self.space = space
        self.feature_names = tuple(sorted({name for spec in set(_covering(space)) for name, _ in block_cost(spec).features}))
        self._macs, self._params, self._peak = _tables(space, (
            (lambda cost: cost.macs, np.add), (lambda cost: cost.params, np.add), (lambda cost: cost.peak_memory_bytes, np.maximum)
        ))  # fmt: skip
        self._features: list[list[_Table | _Sparse]] | None = None

    def macs(self, codes: Codes) -> NDArray[np.int64]:
        """Multiply-accumulates, shape (archs,), of codes, shape (archs, dimensions)."""
        return _gather(self._macs, codes, np.add)

    def params(self, codes: Codes) -> NDArray[np.int64]:
        """Parameters (batch-norm scale and shift included), shape (archs,)."""
        return _gather(self._params, codes, np.add)

    def peak_memory_bytes(self, codes: Codes) -> NDArray[np.int64]:
        """Largest sum of live fp32 activations at batch 1, shape (archs,)."""
        return _gather(self._peak, codes, np.maximum)

    def all(self, codes: Codes) -> dict[str, NDArray[np.int64]]:
        """Every metric of `METRICS`, each of shape (archs,)."""
        return {"macs": self.macs(codes), "params": self.params(codes), "peak_memory_bytes": self.peak_memory_bytes(codes)}

    def features(self, codes: Codes) -> NDArray[np.float64]:
        """Number, macs and moved elements of every kind of operator (`feature_names`), shape (archs, features)."""
        if self._features is None:
            self._features = _tables(self.space, [(_feature(name), np.add) for name in self.feature_names])
        return np.stack([_gather(tables, codes, np.add) for tables in self._features], axis=1).astype(np.float64)


def _feature(name: str) -> Callable[[BlockCost], float]:
    return lambda cost: dict(cost.features).get(name, 0)


def _covering(space: Space) -> Iterator[BlockSpec]:
    for slot in space.family.slots:
        for choices in space.family.cover(slot):
            if slot.stands(choices):
                yield space.family.block(slot, choices)


Metric = tuple[Callable[[BlockCost], float], np.ufunc]
"""What is read off a block's cost, and how it is joined over blocks."""


def _tables(space: Space, metrics: Sequence[Metric]) -> list[list[_Table | _Sparse]]:
    """For each metric, per group of slots with the same dimensions, the joined values over the dimensions' choices."""
    order = {dimension.name: column for column, dimension in enumerate(space.dimensions)}
    groups: dict[tuple[int, ...], list[Slot]] = {}
    for slot in space.family.slots:
        groups.setdefault(tuple(order[name] for name in slot.dimensions), []).append(slot)
    found: list[list[_Table | _Sparse]] = [[] for _ in metrics]
    for columns, slots in groups.items():
        counts = [len(space.dimensions[column].choices) for column in columns]
        if math.prod(counts) > MOST_ROWS:
            counted = _Counted(space, columns, slots, tuple(metrics))
            for position in range(len(metrics)):
                found[position].append(_Sparse(counted, position))
            continue
        values = np.zeros((len(metrics), *counts), dtype=np.int64)
        for slot in slots:
            for codes, spec in variants(slot, space.by_name, space.family):
                if spec is not None:
                    for position, (value, join) in enumerate(metrics):
                        values[position, *codes] = join(values[position, *codes], value(block_cost(spec)))
        for position, table in enumerate(values):
            found[position].append(_Table(columns, table))
    return found


@dataclass(frozen=True)
class _Table:
    """All values of a group of slots."""

    columns: tuple[int, ...]
    values: NDArray[np.int64]

    def take(self, columns: NDArray[np.int64]) -> NDArray[np.int64]:
        flat = np.zeros(columns.shape[1], dtype=np.int64)
        for column, count in zip(self.columns, self.values.shape, strict=True):
            flat = flat * count + columns[column]
        found: NDArray[np.int64] = self.values.ravel().take(flat)
        return found


@dataclass(frozen=True)
class _Counted:
    """All metrics of a group of slots with too many combinations to list: counted as they are asked for, and kept."""

    space: Space
    columns: tuple[int, ...]
    slots: list[Slot]
    metrics: tuple[Metric, ...]
    known: dict[tuple[int, ...], tuple[int, ...]] = field(default_factory=dict)

    def of(self, codes: tuple[int, ...]) -> tuple[int, ...]:
        if codes not in self.known:
            dimensions = [self.space.dimensions[column] for column in self.columns]
            choices = {dimension.name: dimension.choices[code] for dimension, code in zip(dimensions, codes, strict=True)}
            blocks = [block_cost(self.space.family.block(slot, choices)) for slot in self.slots if slot.stands(choices)]
            self.known[codes] = tuple(
                int(join.reduce([value(block) for block in blocks])) if blocks else 0 for value, join in self.metrics
            )
        return self.known[codes]


@dataclass(frozen=True)
class _Sparse:
    """One metric of a group."""

    counted: _Counted
    position: int

    def take(self, columns: NDArray[np.int64]) -> NDArray[np.int64]:
        mine = columns[list(self.counted.columns)]
        order = np.lexsort(mine)  # equal rows come together, much faster than np.unique over rows
        new = np.ones(len(order), dtype=np.bool_)
        new[1:] = (mine[:, order[1:]] != mine[:, order[:-1]]).any(axis=0)
        rows = mine[:, order[new]].T.tolist()
        values = np.array([self.counted.of(tuple(row))[self.position] for row in rows], dtype=np.int64)
        found = np.empty(len(order), dtype=np.int64)
        found[order] = values[np.cumsum(new) - 1]
        return found


def _gather(tables: list[_Table | _Sparse], codes: Codes, join: np.ufunc) -> NDArray[np.int64]:
    columns = np.ascontiguousarray(np.asarray(codes, dtype=np.int64).T)
    total = np.zeros(columns.shape[1], dtype=np.int64)
    for table in tables:
        join(total, table.take(columns), out=total)
    return total
