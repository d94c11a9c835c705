"""What a block does, operator by operator: the one source of its macs, parameters, memory and size.

A block's `operations()` mirrors its `forward` line by line, as the exported graph runs it (batch norm folded into its
convolution, swish as sigmoid and product). Everything that counts a network is derived from these lists: `macs` and `params`
(`supernet/costs.py`), peak memory, the size of the exported weights, the features of a latency model (`deploy/latency.py`) and the
graphs that are timed (`deploy/probe.py`). What has no method of its own here is recorded with `apply`, by its ONNX name.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

BYTES = 4  # fp32


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor of the graph, batch 1, its shape without the batch: (channels, size, size), (tokens, width) or (width,)."""

    index: int
    shape: tuple[int, ...]

    @property
    def channels(self) -> int:
        """Channels of maps; the first axis."""
        return self.shape[0]

    @property
    def size(self) -> int:
        """Pixels of a side of maps; the last axis."""
        return self.shape[-1]

    @property
    def elements(self) -> int:
        """Numbers in it."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Constant:
    """What an operator reads beside activations: weights of this `shape`, or the integers themselves."""

    shape: tuple[int, ...] = ()
    integers: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Operation:
    """One operator of the exported graph: what it reads and makes, its multiply-accumulates and its parameters.

    `kind` groups operators for latency models; `onnx`, `attributes` and `constants` say how the graph writes it.
    """

    kind: str
    onnx: str
    inputs: tuple[Value, ...]
    output: Value
    macs: int = 0
    params: int = 0
    attributes: tuple[tuple[str, Any], ...] = ()
    constants: tuple[Constant, ...] = ()

    @property
    def weights(self) -> int:
        """Numbers that the exported file stores for it; the integers and single numbers of an operator are part of the graph."""
        return sum(math.prod(constant.shape) for constant in self.constants if constant.shape)


@dataclass(slots=True)
class Operations:
    """Records a block's operators in the order in which they run. `Operations(channels, size)` begins with maps.

    Counting rules (AttentiveNAS, timm and fvcore agree on them): macs of convolutions, linear layers and matrix products only
    (attention's two products among them); biases, norms, activations and pooling are no macs. Parameters include the scale and
    shift of norms.
    """

    in_channels: int
    in_size: int | None = None
    """None: the input is a vector of `in_channels` numbers."""
    in_shape: tuple[int, ...] | None = None
    """The whole shape, where the input is neither maps nor a vector (see `on`)."""
    listed: list[Operation] = field(default_factory=list)

    @classmethod
    def on(cls, *shape: int) -> Operations:
        """Begin with an input of any shape (batch left out), such as (tokens, width)."""
        return cls(shape[0], in_shape=shape)

    @property
    def input(self) -> Value:
        """The block's input."""
        maps = (self.in_channels,) if self.in_size is None else (self.in_channels, self.in_size, self.in_size)
        return Value(0, self.in_shape or maps)

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
        padding: int | None = None,
    ) -> Value:
        """Convolution with "same" padding (or `padding` pixels a side), followed by a (folded) batch norm where `norm`."""
        pad = kernel_size // 2 if padding is None else padding
        size = (x.size + 2 * pad - kernel_size) // stride + 1
        weight = (out, x.channels // groups, kernel_size, kernel_size)
        return self._conv("Conv", x, out, size, weight, size, pad, stride, groups, norm, bias)

    def conv_transpose(self, x: Value, out: int, stride: int = 2, *, norm: bool = False, bias: bool = False) -> Value:
        """Transposed convolution that makes every pixel `stride` x `stride` pixels (a kernel of the stride's size)."""
        weight = (x.channels, out, stride, stride)
        return self._conv("ConvTranspose", x, out, x.size * stride, weight, x.size, 0, stride, 1, norm, bias)

    def _conv(
        self, onnx: str, x: Value, out: int, size: int, weight: tuple[int, ...], at: int, pad: int, stride: int, groups: int,
        norm: bool, bias: bool,
    ) -> Value:  # fmt: skip
        constants = (Constant(weight), *([Constant((out,))] if norm or bias else []))
        kind = {"Conv": "depthwise" if groups > 1 else "conv", "ConvTranspose": "conv_transpose"}[onnx]
        return self.apply(
            onnx, (x,), (out, size, size), kind=kind, macs=math.prod(weight) * at**2, constants=constants,
            params=math.prod(weight) + (2 * out if norm else 0) + (out if bias else 0),
            kernel_shape=weight[2:], strides=(stride, stride), pads=(pad,) * 4, group=groups,
        )  # fmt: skip

    def linear(self, x: Value, out: int, *, bias: bool = True, norm: bool = False) -> Value:
        """Fully connected layer over the last axis; of vectors one operator, of tokens a product and a sum."""
        width, last = x.shape[-1], (*x.shape[:-1], out)
        params, macs = width * out + (out if bias else 0) + (2 * out if norm else 0), x.elements * out
        if len(x.shape) == 1:
            constants = (Constant((out, width)), *([Constant((out,))] if bias or norm else []))
            return self.apply("Gemm", (x,), last, kind="linear", macs=macs, params=params, constants=constants, transB=1)
        y = self.apply("MatMul", (x,), last, kind="linear", macs=macs, params=params, constants=(Constant((width, out)),))
        return self.apply("Add", (y,), last, constants=(Constant((out,)),)) if bias or norm else y

    def matmul(self, x: Value, y: Value) -> Value:
        """Product of two activations over their last two axes: attention's."""
        shape = (*x.shape[:-1], y.shape[-1])
        return self.apply("MatMul", (x, y), shape, kind="matmul", macs=math.prod(shape) * x.shape[-1])

    def layer_norm(self, x: Value, epsilon: float = 1e-5) -> Value:
        """Layer norm over the last axis, with scale and shift."""
        width = x.shape[-1]
        constants = (Constant((width,)), Constant((width,)))
        return self.apply("LayerNormalization", (x,), x.shape, params=2 * width, constants=constants, epsilon=epsilon, axis=-1)

    def activation(self, name: str, x: Value) -> Value:
        """An activation by its name in `supernet.blocks.ACTIVATIONS`."""
        if name == "swish":
            return self.swish(x)
        return self.apply({"relu": "Relu", "hard_swish": "HardSwish", "gelu": "Gelu"}[name], (x,), x.shape)

    def swish(self, x: Value) -> Value:
        """`x * sigmoid(x)`, two operators in ONNX before opset 24."""
        return self.mul(x, self.pointwise("sigmoid", x))

    def pointwise(self, kind: str, x: Value) -> Value:
        """A gate or activation that is one operator: relu, sigmoid, hard_sigmoid."""
        if kind == "hard_sigmoid":
            return self.apply("HardSigmoid", (x,), x.shape, alpha=1 / 6)
        return self.apply({"relu": "Relu", "sigmoid": "Sigmoid"}[kind], (x,), x.shape)

    def flatten(self, x: Value) -> Value:
        """All numbers as one vector."""
        return self.reshape(x, x.elements)

    def reshape(self, x: Value, *shape: int) -> Value:
        """The same numbers in another shape (batch left out)."""
        return self.apply("Reshape", (x,), shape, constants=(Constant(integers=(-1, *shape)),), allowzero=1)

    def transpose(self, x: Value, *axes: int) -> Value:
        """Axes in another order; they count from 1, since the batch (0) stays first."""
        return self.apply("Transpose", (x,), tuple(x.shape[axis - 1] for axis in axes), perm=(0, *axes))

    def mean(self, x: Value) -> Value:
        """Average over the map, kept as a map of one pixel."""
        return self.apply("GlobalAveragePool", (x,), (x.channels, 1, 1))

    def pool(self, x: Value, stride: int) -> Value:
        """Average pooling of `stride` x `stride` windows; a last partial window counts."""
        size = math.ceil(x.size / stride)
        window = (stride, stride)
        return self.apply("AveragePool", (x,), (x.channels, size, size), kernel_shape=window, strides=window, ceil_mode=1)

    def mul(self, x: Value, y: Value) -> Value:
        """Product, `y` broadcast over the map where it is a vector."""
        return self.apply("Mul", (x, y), x.shape)

    def add(self, x: Value, y: Value) -> Value:
        """Sum of two equal shapes."""
        return self.apply("Add", (x, y), x.shape)

    def apply(
        self, onnx: str, inputs: Sequence[Value], shape: tuple[int, ...], *, kind: str = "other", macs: int = 0, params: int = 0,
        constants: tuple[Constant, ...] = (), **attributes: Any,
    ) -> Value:  # fmt: skip
        """Any ONNX operator with one output of `shape` (batch left out), as the exporter writes it."""
        output = Value(len(self.listed) + 1, tuple(shape))
        self.listed.append(Operation(kind, onnx, tuple(inputs), output, macs, params, tuple(attributes.items()), constants))
        return output


@dataclass(frozen=True, slots=True)
class BlockCost:
    """What one block costs at batch 1; sums over the blocks of a network, except the peak, whose maximum counts.

    `features` are what a latency model may use: for every kind of operator its number, macs and elements moved.
    """

    macs: int
    params: int
    peak_memory_bytes: int
    model_size_bytes: int
    features: tuple[tuple[str, float], ...]


def cost_of(operations: Operations) -> BlockCost:
    """Count the recorded operators."""
    listed = operations.listed
    return BlockCost(
        macs=sum(op.macs for op in listed),
        params=sum(op.params for op in listed),
        peak_memory_bytes=peak_memory(listed),
        model_size_bytes=BYTES * sum(op.weights for op in listed),
        features=tuple(sorted(_features(listed).items())),
    )


def peak_memory(listed: list[Operation]) -> int:
    """Largest sum of live activations in bytes, fp32, batch 1, run in order without writing in place.

    A value lives from the operator that makes it to the last one that reads it, both included; the block's input from the start.
    A network is a chain of blocks joined by one tensor, so its peak is the largest peak of its blocks.
    """
    last_use = {value.index: position for position, op in enumerate(listed) for value in (*op.inputs, op.output)}
    live, peak = {value.index: value for op in listed for value in op.inputs if value.index == 0}, 0
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
