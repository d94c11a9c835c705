"""Costs of archs, exact and in closed form: one small table per group of slots that depend on the same dimensions, then a gather.

A slot depends on few dimensions, so its cost is a table over their choices, filled by asking the family for the block (there is no
second formula). The cost of a million archs is then a gather and a sum over integer codes; a maximum for peak memory.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from supernet.arch import Arch
from supernet.family import BlockSpec, variants
from supernet.operations import BlockCost, cost_of
from supernet.space import Codes, Space

METRICS = ("macs", "params", "peak_memory_bytes")
"""Known in closed form. `macs` are multiply-accumulates at batch 1 (what papers call FLOPs)."""

Table = tuple[tuple[int, ...], NDArray[Any]]


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
        self.feature_names = tuple(
            sorted({name for slot in _blocks(space) for spec in slot for name, _ in block_cost(spec).features})
        )
        self._macs = _tables(space, lambda cost: cost.macs, np.add)
        self._params = _tables(space, lambda cost: cost.params, np.add)
        self._peak = _tables(space, lambda cost: cost.peak_memory_bytes, np.maximum)
        self._features: dict[str, list[Table]] | None = None

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


def _blocks(space: Space) -> list[set[BlockSpec]]:
    return [
        {spec for _, spec in variants(slot, space.by_name, space.family) if spec is not None} for slot in space.family.slots
    ]


def _tables(space: Space, value: Callable[[BlockCost], float], join: np.ufunc) -> list[Table]:
    """Per group of slots with the same dimensions: their columns, and the joined values over the dimensions' choices."""
    order = {dimension.name: column for column, dimension in enumerate(space.dimensions)}
    counts = [len(dimension.choices) for dimension in space.dimensions]
    tables: dict[tuple[int, ...], NDArray[Any]] = {}
    for slot in space.family.slots:
        columns = tuple(order[name] for name in slot.dimensions)
        table = tables.setdefault(columns, np.zeros([counts[column] for column in columns], dtype=np.int64))
        for codes, spec in variants(slot, space.by_name, space.family):
            if spec is not None:
                table[codes] = join(table[codes], value(block_cost(spec)))
    return list(tables.items())


def _gather(tables: list[Table], codes: Codes, join: np.ufunc) -> NDArray[np.int64]:
    columns = np.ascontiguousarray(np.asarray(codes, dtype=np.int64).T)
    total = np.zeros(columns.shape[1], dtype=np.int64)
    for which, table in tables:
        flat = columns[which[0]]
        for column, count in zip(which[1:], table.shape[1:], strict=True):
            flat = flat * count + columns[column]
        join(total, table.ravel().take(flat), out=total)
    return total
