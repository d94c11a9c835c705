"""A calibrated child as one ONNX file: batch norm folded, dynamic batch, no resize in the graph."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

import onnx
import torch
from torch import nn

from deploy.fold import folded
from deploy.graph import forget_shapes, pool_whole_maps

OPSET = 20
INPUT, OUTPUT = "images", "logits"


def to_onnx(network: nn.Module, *, channels: int, resolution: int, output: str = OUTPUT) -> onnx.ModelProto:
    """Export a calibrated network in evaluation mode.

    Input `images`: fp32, shape (batch, channels, resolution, resolution), normalised. Output `output`: fp32, (batch, classes) of
    a classifier.
    Raises `ValueError` where batch norm is left over, and what torch raises where an operator has no ONNX form.
    """
    plain = folded(network).to(device="cpu", memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    example = torch.zeros(2, channels, resolution, resolution)  # a batch of 1 would be baked in
    with _quiet():
        program = torch.onnx.export(
            plain, (example,), dynamo=True, opset_version=OPSET, input_names=[INPUT], output_names=[output],
            dynamic_shapes=({0: torch.export.Dim("batch")},), external_data=False, verbose=False,
        )  # fmt: skip
    assert program is not None
    model = program.model_proto
    left = [node.op_type for node in model.graph.node if node.op_type in {"BatchNormalization", "Resize"}]
    if left:
        raise ValueError(f"an exported child holds neither batch norm nor a resize, but the graph has {left[0]}")
    pool_whole_maps(model.graph)
    forget_shapes(model)
    _strip(model)
    onnx.checker.check_model(model, full_check=True)
    return model


def _strip(model: onnx.ModelProto) -> None:
    """Leave out what names files and lines of the exporting machine."""
    for node in model.graph.node:
        del node.metadata_props[:]
    del model.graph.metadata_props[:]
    for value in (*model.graph.value_info, *model.graph.input, *model.graph.output, *model.graph.initializer):
        del value.metadata_props[:]
    model.producer_name = "nestling"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter prints and warns about its own internals, which its users can do nothing about."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
