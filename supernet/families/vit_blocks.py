"""The blocks of vision transformers: patches to tokens, attention and MLP, classifier.

The queries, keys and values of a head lie side by side, so the leading slice of a weight is that of the first heads. Position
embeddings are kept as maps of the largest grid; a child at a smaller resolution reads them interpolated, and an extracted one
holds only its own.

Axes: N batch, C channels, H W space, T tokens, D embed_dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad, scaled_dot_product_attention

from supernet.blocks import Classifier
from supernet.family import BlockSpec
from supernet.operations import Constant, Operations, Value

HALF = (torch.float16, torch.bfloat16)
"""In which torch does not interpolate."""
EPSILON = 1e-6
"""Of every layer norm, as in the published vision transformers."""


class Linear(nn.Linear):
    """A linear layer that begins as those of the first vision transformer did.

    The fixed deviation of 0.02 of later ones suits widths near 768; children a tenth as wide hardly begin to learn with it.
    """

    def initial(self, parameter: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """Normal, variance 2 / (fan-in + fan-out) (Glorot and Bengio 2010)."""
        return torch.empty(shape).normal_(0, math.sqrt(2 / sum(shape)), generator=generator)


class PatchConv(nn.Conv2d):
    """A convolution without overlap: every patch of pixels becomes one token."""

    def __init__(self, in_channels: int, embed_dim: int, patch_size: int) -> None:
        super().__init__(in_channels, embed_dim, patch_size, stride=patch_size)

    def initial(self, parameter: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """Normal, variance 1 / fan-in: tokens of normalised pixels begin with a variance near 1."""
        return torch.empty(shape).normal_(0, math.sqrt(1 / shape[1:].numel()), generator=generator)


@dataclass(frozen=True, slots=True)
class EmbedSpec(BlockSpec):
    """Patches to tokens, positions, and the class token before them. `grid` is that of the largest resolution."""

    in_channels: int
    patch_size: int
    embed_dim: int
    grid: int
    class_token: bool

    def build(self, drop: float = 0.0) -> nn.Module:
        """A plain embedding; there is nothing to drop."""
        return Embed(self)

    def operations(self) -> Operations:
        """What `Embed.forward` does, in order."""
        ops, size, width = Operations(self.in_channels, self.in_size), self.in_size // self.patch_size, self.embed_dim
        x = ops.conv(ops.input, width, self.patch_size, stride=self.patch_size, bias=True, padding=0)
        x = ops.apply("Add", (x,), x.shape, params=width * size**2, constants=(Constant((width, size, size)),))
        x = ops.transpose(ops.reshape(x, width, size**2), 2, 1)
        if self.class_token:
            shape = (size**2 + 1, width)
            x = ops.apply("Pad", (x,), shape, constants=(Constant(integers=(0, 1, 0, 0, 0, 0)),), mode="constant")
            ops.apply("Add", (x,), shape, params=2 * width, constants=(Constant(shape),))
        return ops

    def bake(self, block: nn.Module) -> None:
        """Replace the positions of the largest grid by those of this block's."""
        assert isinstance(block, Embed)
        block.position = nn.Parameter(block.positions(self.in_size // self.patch_size).detach().clone())


class Embed(nn.Module):
    """The block of an `EmbedSpec`."""

    def __init__(self, spec: EmbedSpec) -> None:
        super().__init__()
        width = spec.embed_dim
        self.width = width
        self.patches = PatchConv(spec.in_channels, width, spec.patch_size)
        self.position = nn.Parameter(torch.zeros(width, spec.grid, spec.grid))
        self.class_token = nn.Parameter(torch.zeros(width)) if spec.class_token else None
        self.class_position = nn.Parameter(torch.zeros(width)) if spec.class_token else None

    def initial(self, parameter: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """Positions: normal, 0.5, so that beside tokens of variance 1 they are seen from the start. Class token: normal, 0.02."""
        return torch.empty(shape).normal_(0, 0.5 if parameter == "position" else 0.02, generator=generator)

    def positions(self, size: int) -> Tensor:
        """Position embeddings of a grid of `size`, shape (D, size, size): bicubic with antialiasing where it is a smaller one."""
        if self.position.shape[-1] == size:
            return self.position
        whole = self.position[None].float() if self.position.dtype in HALF else self.position[None]
        return interpolate(whole, (size, size), mode="bicubic", antialias=True)[0].to(self.position.dtype)

    def forward(self, images_nchw: Tensor) -> Tensor:
        """Tokens, shape (N, T, D); the class token is the first.

        It comes as a row of zeros to which its value is added: to repeat it for every image, the graph would have to ask for
        the size of the batch.
        """
        maps: Tensor = self.patches(images_nchw)
        size = int(maps.shape[-1])
        tokens = (maps + self.positions(size)).reshape(-1, self.width, size * size).transpose(2, 1)
        if self.class_token is None or self.class_position is None:
            return tokens
        first = (self.class_token + self.class_position)[None]
        return pad(tokens, (0, 0, 1, 0)) + pad(first, (0, 0, 0, size * size))


@dataclass(frozen=True, slots=True)
class LayerSpec(BlockSpec):
    """Attention and MLP, each after a norm and beside a shortcut."""

    embed_dim: int
    heads: int
    head_dim: int
    hidden: int
    qkv_bias: bool
    class_token: bool

    regulariser: ClassVar[str | None] = "drop_path"

    def build(self, drop: float = 0.0) -> nn.Module:
        """A plain layer; `drop` is the rate at which each residual branch is dropped per image."""
        return Layer(self, drop)

    def operations(self) -> Operations:
        """What `Layer.forward` does, in order."""
        tokens = self.in_size**2 + self.class_token
        ops = Operations.on(tokens, self.embed_dim)
        x = ops.add(ops.input, self._attention(ops, ops.layer_norm(ops.input, EPSILON)))
        y = ops.activation("gelu", ops.linear(ops.layer_norm(x, EPSILON), self.hidden))
        ops.add(x, ops.linear(y, self.embed_dim))
        return ops

    def _attention(self, ops: Operations, x: Value) -> Value:
        tokens, heads, width = x.shape[0], self.heads, self.head_dim
        qkv = ops.reshape(ops.linear(x, heads * 3 * width, bias=self.qkv_bias), tokens, heads, 3 * width)
        q, k, v = (
            ops.apply(
                "Slice", (qkv,), (tokens, heads, width),
                constants=tuple(Constant(integers=(number,)) for number in (at * width, (at + 1) * width, 3, 1)),
            )
            for at in range(3)
        )  # fmt: skip
        return ops.linear(ops.reshape(self._weighted(ops, q, k, v), tokens, heads * width), self.embed_dim)

    def _weighted(self, ops: Operations, q: Value, k: Value, v: Value) -> Value:
        scaled = ops.apply("Mul", (ops.transpose(q, 2, 1, 3),), (q.shape[1], q.shape[0], q.shape[2]), constants=(Constant(),))
        scores = ops.matmul(scaled, ops.transpose(k, 2, 3, 1))
        weights = ops.apply("Softmax", (scores,), scores.shape, axis=-1)
        return ops.transpose(ops.matmul(weights, ops.transpose(v, 2, 1, 3)), 2, 1, 3)


class Attention(nn.Module):
    """Multi-head self-attention. The outputs of `qkv` are ordered (head, {q, k, v}, head_dim): leading ones are the first heads'."""

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        self.heads, self.head_dim = spec.heads, spec.head_dim
        self.qkv = Linear(spec.embed_dim, spec.heads * 3 * spec.head_dim, bias=spec.qkv_bias)
        self.proj = Linear(spec.heads * spec.head_dim, spec.embed_dim)

    def forward(self, x_ntd: Tensor) -> Tensor:
        """Every token becomes a mixture of all; shape (N, T, D). What reads the graph sees both matrix products."""
        tokens, width = x_ntd.shape[1], self.head_dim
        qkv = self.qkv(x_ntd).reshape(-1, tokens, self.heads, 3 * width)
        q, k, v = (qkv.narrow(3, at * width, width) for at in range(3))
        if torch.compiler.is_exporting() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            scores = q.permute(0, 2, 1, 3) * width**-0.5 @ k.permute(0, 2, 3, 1)
            mixed = scores.softmax(-1) @ v.permute(0, 2, 1, 3)
        else:
            mixed = scaled_dot_product_attention(*(each.permute(0, 2, 1, 3) for each in (q, k, v)))
        output: Tensor = self.proj(mixed.permute(0, 2, 1, 3).reshape(-1, tokens, self.heads * width))
        return output


class Layer(nn.Module):
    """The block of a `LayerSpec`."""

    def __init__(self, spec: LayerSpec, drop: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(spec.embed_dim, EPSILON)
        self.attention = Attention(spec)
        self.norm2 = nn.LayerNorm(spec.embed_dim, EPSILON)
        self.expand = Linear(spec.embed_dim, spec.hidden)
        self.act = nn.GELU()
        self.project = Linear(spec.hidden, spec.embed_dim)
        self.drop = DropPath(drop) if drop else nn.Identity()

    def forward(self, x_ntd: Tensor) -> Tensor:
        """Attention, then MLP, each added to what it read."""
        x_ntd = x_ntd + self.drop(self.attention(self.norm1(x_ntd)))
        output: Tensor = x_ntd + self.drop(self.project(self.act(self.expand(self.norm2(x_ntd)))))
        return output


@dataclass(frozen=True, slots=True)
class HeadSpec(BlockSpec):
    """Norm, the class token or the mean of the patches, classifier."""

    embed_dim: int
    classes: int
    class_token: bool
    pool: Literal["token", "mean"]

    regulariser: ClassVar[str | None] = "dropout"

    def build(self, drop: float = 0.0) -> nn.Module:
        """A plain head; `drop` is the dropout rate before the classifier."""
        return Head(self, drop)

    def operations(self) -> Operations:
        """What `Head.forward` does, in order."""
        patches, width = self.in_size**2, self.embed_dim
        ops = Operations.on(patches + self.class_token, width)
        if self.pool == "token":
            x = ops.layer_norm(ops.reshape(_rows(ops, ops.input, 0, 1), width), EPSILON)
        else:
            x = ops.layer_norm(ops.input, EPSILON)
            x = _rows(ops, x, 1, patches) if self.class_token else x
            x = ops.apply("ReduceMean", (x,), (width,), constants=(Constant(integers=(1,)),), keepdims=0)
        ops.linear(x, self.classes)
        return ops


def _rows(ops: Operations, x: Value, first: int, count: int) -> Value:
    constants = tuple(Constant(integers=(number,)) for number in (first, first + count, 1, 1))
    return ops.apply("Slice", (x,), (count, x.shape[1]), constants=constants)


class Head(nn.Module):
    """The block of a `HeadSpec`."""

    def __init__(self, spec: HeadSpec, drop: float) -> None:
        super().__init__()
        self.pool, self.class_token = spec.pool, spec.class_token
        self.norm = nn.LayerNorm(spec.embed_dim, EPSILON)
        self.drop = nn.Dropout(drop) if drop else nn.Identity()
        self.classifier = Classifier(spec.embed_dim, spec.classes)

    def forward(self, x_ntd: Tensor) -> Tensor:
        """Logits, shape (N, classes)."""
        if self.pool == "token":
            features = self.norm(x_ntd.narrow(1, 0, 1).reshape(-1, x_ntd.shape[2]))
        else:
            tokens = self.norm(x_ntd)
            features = (tokens.narrow(1, 1, x_ntd.shape[1] - 1) if self.class_token else tokens).mean(1)
        logits: Tensor = self.classifier(self.drop(features))
        return logits
