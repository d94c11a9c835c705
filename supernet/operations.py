"""What a block does, operator by operator: the one source of its macs, parameters and activation memory.

A block's `operations()` mirrors its `forward` line by line, as the exported graph runs it (batch norm folded into its
convolution, swish as sigmoid and product). Everything that counts a network is derived from these lists: `macs` and `params`
(`supernet/costs.py`), peak memory, and the features of a latency model (`deploy/latency.py`).
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

BYTES = 4  # fp32


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor of the graph, batch 1: `channels` maps of `size` x `size` pixels (size 1 for vectors)."""

    index: int
    channels: int
    size: int

    @property
    def elements(self) -> int:
        """Numbers in it."""
        return self.channels * self.size**2


@dataclass(frozen=True, slots=True)
class Operation:
    """One operator: what it reads and makes, its multiply-accumulates and its parameters.

    Convolutions and pools also say their window (`kernel_size`, `stride`, `groups`) and whether the exported graph adds a bias.
    """

    kind: str
    inputs: tuple[Value, ...]
    output: Value
    macs: int = 0
    params: int = 0
    kernel_size: int = 1
    stride: int = 1
    groups: int = 1
    bias: bool = False


@dataclass(slots=True)
class Operations:
    """Records a block's operators in the order in which they run.

    Counting rules (AttentiveNAS and timm agree on them): macs of convolutions, linear layers and matrix products only; biases,
    norms, activations and pooling are no macs. Parameters include the scale and shift of batch norm.
    """

    in_channels: int
    in_size: int
    listed: list[Operation] = field(default_factory=list)

    @property
    def input(self) -> Value:
        """The block's input."""
        return Value(0, self.in_channels, self.in_size)

    def conv(
        self,
        x: Value,
        out: int,
        kernel_size: int = 1,
        *,
        stride: int = 1,
        groups: int = 1,
        norm: bool = False,
        bias: bool = False,
    ) -> Value:
        """Convolution with "same" padding, followed by a (folded) batch norm where `norm`."""
        size = math.ceil(x.size / stride)
        weights = x.channels // groups * out * kernel_size**2
        params = weights + (2 * out if norm else 0) + (out if bias else 0)
        return self._add(
            "depthwise" if groups > 1 else "conv", (x,), out, size, macs=weights * size**2, params=params,
            kernel_size=kernel_size, stride=stride, groups=groups, bias=norm or bias,
        )  # fmt: skip

    def linear(self, x: Value, out: int) -> Value:
        """Fully connected layer with a bias."""
        return self._add("linear", (x,), out, 1, macs=x.elements * out, params=x.elements * out + out, bias=True)

    def swish(self, x: Value) -> Value:
        """`x * sigmoid(x)`, two operators in ONNX before opset 24."""
        return self.mul(x, self.pointwise("sigmoid", x))

    def pointwise(self, kind: str, x: Value) -> Value:
        """An operator that keeps the shape."""
        return self._add(kind, (x,), x.channels, x.size)

    def mean(self, x: Value) -> Value:
        """Average over the map."""
        return self._add("mean", (x,), x.channels, 1)

    def pool(self, x: Value, stride: int) -> Value:
        """Average pooling of `stride` x `stride` windows; a last partial window counts."""
        return self._add("pool", (x,), x.channels, math.ceil(x.size / stride), kernel_size=stride, stride=stride)

    def mul(self, x: Value, y: Value) -> Value:
        """Product, `y` broadcast over the map where it is a vector."""
        return self._add("mul", (x, y), x.channels, x.size)

    def add(self, x: Value, y: Value) -> Value:
        """Sum of two equal shapes."""
        return self._add("add", (x, y), x.channels, x.size)

    def _add(self, kind: str, inputs: tuple[Value, ...], channels: int, size: int, **details: Any) -> Value:
        output = Value(len(self.listed) + 1, channels, size)
        self.listed.append(Operation(kind, inputs, output, **details))
        return output


@dataclass(frozen=True, slots=True)
class BlockCost:
    """What one block costs at batch 1; sums over the blocks of a network, except the peak, whose maximum counts.

    `features` are what a latency model may use: for every kind of operator its number, macs and elements moved.
    """

    macs: int
    params: int
    peak_memory_bytes: int
    features: tuple[tuple[str, float], ...]


def cost_of(operations: Operations) -> BlockCost:
    """Count the recorded operators."""
    listed = operations.listed
    return BlockCost(
        macs=sum(op.macs for op in listed),
        params=sum(op.params for op in listed),
        peak_memory_bytes=peak_memory(listed),
        features=tuple(sorted(_features(listed).items())),
    )


def peak_memory(listed: list[Operation]) -> int:
    """Largest sum of live activations in bytes, fp32, batch 1, run in order without writing in place.

    A value lives from the operator that makes it to the last one that reads it, both included; the block's input from the start.
    A network is a chain of blocks joined by one tensor, so its peak is the largest peak of its blocks.
    """
    last_use = {value.index: position for position, op in enumerate(listed) for value in (*op.inputs, op.output)}
    live, peak = {op.index: op for op in listed[0].inputs}, 0
    for position, op in enumerate(listed):
        live[op.output.index] = op.output
        peak = max(peak, sum(value.elements for value in live.values()))
        live = {index: value for index, value in live.items() if last_use[index] > position}
    return peak * BYTES


def _features(listed: list[Operation]) -> Counter[str]:
    features: Counter[str] = Counter()
    for op in listed:
        kind = op.kind if op.macs else "other"
        features[f"{kind}.count"] += 1
        features[f"{kind}.macs"] += op.macs
        features[f"{kind}.elements"] += op.output.elements + sum(value.elements for value in op.inputs)
    return features
