"""The blocks of the family cell: stem, cells whose edges choose their operations, head.

Axes: N batch, C channels, H W space.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

from torch import Tensor, nn

from supernet.blocks import Classifier, ConvNorm, Downsample
from supernet.errors import InputError
from supernet.family import BlockSpec
from supernet.operations import BlockCost, Operations, Value, cost_of

OPERATIONS = ("none", "skip", "conv_1x1", "conv_3x3", "avg_pool_3x3")
"""What an edge can be; "none" must be the first, since it is what a choice without effect becomes."""
KERNELS = {"conv_1x1": 1, "conv_3x3": 3}
NO_PATH = "a cell has no path from its input to its output: choose other operations than none along one path, such as skip"
UNIT = 1 << 20
"""A width at which the terms of a count in width and its square can be told apart (`CellSpec.cost`)."""


@lru_cache
def pairs(nodes: int) -> tuple[tuple[int, int], ...]:
    """Edges (from, to) of a cell, in the order in which they run: by the node that they lead to."""
    return tuple((source, target) for target in range(1, nodes) for source in range(target))


@dataclass(frozen=True, slots=True)
class Step:
    """A step of a cell: an operation of an edge, or "relu", "widen", "add"."""

    name: str
    reads: tuple[int, ...]
    """Values: 0 is the cell's input, the others are what the steps make, counted from 1."""
    path: tuple[str, ...] = ()
    """Where its module is within `Cell.edges`; empty for relu and add."""
    reduces: bool = False
    """Whether it halves the map."""


@lru_cache(maxsize=50_000)
def steps_of(nodes: int, edges: tuple[str, ...], reduction: bool) -> tuple[Step, ...]:
    """A cell step by step, in the order in which it runs; nothing is computed twice. The last step makes the output."""
    steps: list[Step] = []
    known: dict[tuple[str, tuple[int, ...]], int] = {}

    def step(name: str, *reads: int, path: tuple[str, ...] = (), reduces: bool = False, weights: bool = False) -> int:
        if weights or (name, reads) not in known:
            steps.append(Step(name, reads, path, reduces))
            known[name, reads] = len(steps)
        return known[name, reads]

    values = {0: 0}
    for (source, target), name in zip(pairs(nodes), edges, strict=True):
        if name == "none":
            continue
        y, path, reduces = values[source], (f"{source}_{target}", name), reduction and source == 0
        if name in KERNELS:
            y = step(name, step("relu", y), path=path, reduces=reduces, weights=True)
        elif reduces:
            y = step("widen", step(name, y, path=(*path, "pool"), reduces=True), path=(*path, "widen"), weights=True)
        elif name != "skip":
            y = step(name, y, path=path)
        values[target] = step("add", values[target], y) if target in values else y
    return tuple(steps)


@dataclass(frozen=True, slots=True)
class StemSpec(BlockSpec):
    """3x3 convolution, norm."""

    in_channels: int
    width: int
    stride: int

    def build(self, drop: float = 0.0) -> nn.Module:
        """A plain stem; there is nothing to drop."""
        return ConvNorm(self.in_channels, self.width, 3, stride=self.stride)

    def operations(self) -> Operations:
        """What it does, in order."""
        ops = Operations(self.in_channels, self.in_size)
        ops.conv(ops.input, self.width, 3, stride=self.stride, norm=True)
        return ops


@dataclass(frozen=True, slots=True)
class CellSpec(BlockSpec):
    """A cell with the operations of its edges in the order of `pairs`; edges without effect are "none"."""

    in_width: int
    nodes: int
    edges: tuple[str, ...]
    reduction: bool

    @property
    def width(self) -> int:
        """Channels of every node but the first."""
        return self.in_width * (2 if self.reduction else 1)

    def build(self, drop: float = 0.0) -> nn.Module:
        """A plain cell; there is nothing to drop. Raises `InputError` where no path leads through it."""
        return Cell(self)

    def operations(self) -> Operations:
        """What `Cell.forward` does, in order."""
        ops = Operations(self.in_width, self.in_size)
        values = [ops.input]
        for step in steps_of(self.nodes, self.edges, self.reduction):
            values.append(self._operation(ops, step, [values[index] for index in step.reads]))
        return ops

    def _operation(self, ops: Operations, step: Step, read: list[Value]) -> Value:
        x, stride = read[0], 2 if step.reduces else 1
        if step.name == "add":
            return ops.add(*read)
        if step.name == "relu":
            return ops.pointwise("relu", x)
        if step.name == "skip":
            return ops.pool(x, 2)
        if step.name == "avg_pool_3x3":
            size = (x.size - 1) // stride + 1
            return ops.apply("AveragePool", (x,), (x.channels, size, size), kernel_shape=(3, 3), strides=(stride, stride),
                             pads=(1,) * 4, ceil_mode=0)  # fmt: skip
        return ops.conv(x, self.width, KERNELS.get(step.name, 1), stride=stride, norm=True)

    def cost(self) -> BlockCost:
        """As `operations` counts it, once for all widths and sizes.

        With width C and S pixels a side of the output, macs are a C^2 S^2, activations a C S^2, parameters and their size
        a C^2 + b C. The factors are read off a cell of one output pixel whose width is a power of 2 above every factor.
        """
        if self.reduction and self.in_size % 2:
            return cost_of(self.operations())  # the input is no multiple of the output
        unit = _unit_cost(self.nodes, self.edges, self.reduction)
        pixels, width = (self.in_size // (2 if self.reduction else 1)) ** 2, self.in_width
        (square, single), (square_bytes, single_bytes) = (divmod(n, UNIT**2) for n in (unit.params, unit.model_size_bytes))
        scale = {"count": (1, 1), "macs": (width**2 * pixels, UNIT**2), "elements": (width * pixels, UNIT)}
        features = []
        for name, value in unit.features:
            factor, by = scale[name.rpartition(".")[2]]
            features.append((name, int(value) // by * factor))
        return BlockCost(
            macs=unit.macs // UNIT**2 * width**2 * pixels,
            params=square * width**2 + single // UNIT * width,
            peak_memory_bytes=unit.peak_memory_bytes // UNIT * width * pixels,
            model_size_bytes=square_bytes * width**2 + single_bytes // UNIT * width,
            features=tuple(features),
        )


@lru_cache(maxsize=50_000)
def _unit_cost(nodes: int, edges: tuple[str, ...], reduction: bool) -> BlockCost:
    return cost_of(CellSpec(UNIT, nodes, edges, reduction, in_size=2 if reduction else 1).operations())


class Cell(nn.Module):
    """The block of a `CellSpec`; only the chosen operations are there, as `edges.FROM_TO.OPERATION`."""

    def __init__(self, spec: CellSpec) -> None:
        super().__init__()
        chosen = [(*pair, name) for pair, name in zip(pairs(spec.nodes), spec.edges, strict=True) if name != "none"]
        if not chosen:
            raise InputError(NO_PATH)
        self.steps = steps_of(spec.nodes, spec.edges, spec.reduction)
        self.edges = nn.ModuleDict()
        for source, target, name in chosen:
            in_width, reduces = spec.in_width if source == 0 else spec.width, spec.reduction and source == 0
            self.edges[f"{source}_{target}"] = nn.ModuleDict({name: _edge(name, in_width, spec.width, reduces)})

    def forward(self, x_nchw: Tensor) -> Tensor:
        """Step by step; the last value is the output."""
        values = [x_nchw]
        for step in self.steps:
            read = [values[index] for index in step.reads]
            if step.name == "add":
                values.append(read[0] + read[1])
            elif step.name == "relu":
                values.append(read[0].relu())
            else:
                module: Any = self.edges
                for part in step.path:
                    module = module[part]
                values.append(module(read[0]))
        return values[-1]


def _edge(name: str, in_width: int, width: int, reduces: bool) -> nn.Module:
    stride = 2 if reduces else 1
    if name in KERNELS:
        return ConvNorm(in_width, width, KERNELS[name], stride=stride)
    if not reduces:
        return nn.Identity() if name == "skip" else nn.AvgPool2d(3, 1, 1, count_include_pad=False)
    pool = Downsample(2) if name == "skip" else nn.AvgPool2d(3, 2, 1, count_include_pad=False)
    return nn.ModuleDict({"pool": pool, "widen": ConvNorm(in_width, width)})


@dataclass(frozen=True, slots=True)
class HeadSpec(BlockSpec):
    """Relu, 1x1 convolution, norm, relu, pooling, classifier."""

    in_width: int
    width: int
    classes: int

    regulariser: ClassVar[str | None] = "dropout"

    def build(self, drop: float = 0.0) -> nn.Module:
        """A plain head; `drop` is the dropout rate before the classifier."""
        return nn.Sequential(OrderedDict(
            relu=nn.ReLU(), widen=ConvNorm(self.in_width, self.width, act=nn.ReLU()), pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(), drop=nn.Dropout(drop) if drop else nn.Identity(), classifier=Classifier(self.width, self.classes),
        ))  # fmt: skip

    def operations(self) -> Operations:
        """What it does, in order."""
        ops = Operations(self.in_width, self.in_size)
        x = ops.conv(ops.pointwise("relu", ops.input), self.width, norm=True)
        ops.linear(ops.flatten(ops.mean(ops.pointwise("relu", x))), self.classes)
        return ops
