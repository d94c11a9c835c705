"""Costs of archs, exact and in closed form: one small table per group of slots that depend on the same dimensions, then a gather.

A slot depends on few dimensions, so its cost is a table over their choices, filled by asking the family for the block (there is no
second formula). The cost of a million archs is then a gather and a sum over integer codes; a maximum for peak memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from supernet.arch import Arch
from supernet.family import BlockSpec, Codes, Slot, variants
from supernet.operations import BlockCost, cost_of
from supernet.space import Space

METRICS = ("macs", "params", "peak_memory_bytes")
"""Known in closed form. `macs` are multiply-accumulates at batch 1 (what papers call FLOPs)."""

MOST_ROWS = 20_000
"""Combinations of a group of slots that are all counted beforehand; beyond it (operations on many edges) as they are asked for."""


@lru_cache(maxsize=100_000)
def block_cost(spec: BlockSpec) -> BlockCost:
    """Cost of one block at batch 1."""
    return cost_of(spec.operations())


def arch_costs(space: Space, arch: Arch) -> dict[str, int]:
    """`macs`, `params` and `peak_memory_bytes` of one arch at batch 1."""
    blocks = [block_cost(spec) for spec in space.plan(arch).values()]
    return {
        "macs": sum(block.macs for block in blocks),
        "params": sum(block.params for block in blocks),
        "peak_memory_bytes": max(block.peak_memory_bytes for block in blocks),
    }


class Costs:
    """Costs of many archs of a space at once. Building it fills the tables (a fraction of a second)."""

    def __init__(self, space: Space) -> None:
        self.space = space
        self.feature_names = tuple(sorted({name for spec in set(_covering(space)) for name, _ in block_cost(spec).features}))
        self._macs = _tables(space, lambda cost: cost.macs, np.add)
        self._params = _tables(space, lambda cost: cost.params, np.add)
        self._peak = _tables(space, lambda cost: cost.peak_memory_bytes, np.maximum)
        self._features: dict[str, list[_Table | _Sparse]] | None = None

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
            self._features = {name: _tables(self.space, _feature(name), np.add) for name in self.feature_names}
        return np.stack([_gather(self._features[name], codes, np.add) for name in self.feature_names], axis=1).astype(
            np.float64
        )


def _feature(name: str) -> Callable[[BlockCost], float]:
    return lambda cost: dict(cost.features).get(name, 0)


def _covering(space: Space) -> Iterator[BlockSpec]:
    for slot in space.family.slots:
        for choices in space.family.cover(slot):
            if slot.stands(choices):
                yield space.family.block(slot, choices)


def _tables(space: Space, value: Callable[[BlockCost], float], join: np.ufunc) -> list[_Table | _Sparse]:
    """Per group of slots with the same dimensions: their columns, and the joined values over the dimensions' choices."""
    order = {dimension.name: column for column, dimension in enumerate(space.dimensions)}
    groups: dict[tuple[int, ...], list[Slot]] = {}
    for slot in space.family.slots:
        groups.setdefault(tuple(order[name] for name in slot.dimensions), []).append(slot)
    found: list[_Table | _Sparse] = []
    for columns, slots in groups.items():
        counts = [len(space.dimensions[column].choices) for column in columns]
        if math.prod(counts) > MOST_ROWS:
            found.append(_Sparse(space, columns, slots, value, join))
            continue
        table = np.zeros(counts, dtype=np.int64)
        for slot in slots:
            for codes, spec in variants(slot, space.by_name, space.family):
                if spec is not None:
                    table[codes] = join(table[codes], value(block_cost(spec)))
        found.append(_Table(columns, table))
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
class _Sparse:
    """Values of a group of slots with too many combinations to list: counted as they are asked for, and kept."""

    space: Space
    columns: tuple[int, ...]
    slots: list[Slot]
    value: Callable[[BlockCost], float]
    join: np.ufunc
    known: dict[tuple[int, ...], int] = field(default_factory=dict)

    def take(self, columns: NDArray[np.int64]) -> NDArray[np.int64]:
        rows, inverse = np.unique(columns[list(self.columns)].T, axis=0, return_inverse=True)
        values = np.array([self._of(tuple(row)) for row in rows.tolist()], dtype=np.int64)
        return values[inverse.ravel()]

    def _of(self, codes: tuple[int, ...]) -> int:
        if codes not in self.known:
            dimensions = [self.space.dimensions[column] for column in self.columns]
            choices = {dimension.name: dimension.choices[code] for dimension, code in zip(dimensions, codes, strict=True)}
            values = [
                self.value(block_cost(self.space.family.block(slot, choices))) for slot in self.slots if slot.stands(choices)
            ]
            self.known[codes] = int(self.join.reduce(values)) if values else 0
        return self.known[codes]


def _gather(tables: list[_Table | _Sparse], codes: Codes, join: np.ufunc) -> NDArray[np.int64]:
    columns = np.ascontiguousarray(np.asarray(codes, dtype=np.int64).T)
    total = np.zeros(columns.shape[1], dtype=np.int64)
    for table in tables:
        join(total, table.take(columns), out=total)
    return total
