"""int8 probes: their graphs are those that static quantisation makes of the child, but for the numbers."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from deploy.int8_probe import quantised
from deploy.probe import graph_of, probe
from supernet.space import load_space

SPACES = ["digits", "mlp", "autoencoder", "cell",
          *(pytest.param(name, marks=pytest.mark.slow) for name in ("cifar-vit", "cifar-resnet")),
          pytest.param("attentivenas", marks=pytest.mark.nightly)]  # fmt: skip


class Images:
    """Random images, for ranges."""

    def __init__(self, model: onnx.ModelProto) -> None:
        given = model.graph.input[0]
        shape = [part.dim_value or 1 for part in given.type.tensor_type.shape.dim]
        self.batches: Iterator[Any] = iter(
            [{given.name: np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)} for seed in range(2)]
        )

    def get_next(self) -> Any:
        return next(self.batches, None)


def by_library(model: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    """What ONNX Runtime's static quantisation makes of a model, by channel, as somebody ships it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

        onnx.save(model, folder / "fp32.onnx")
        quantize_static(
            folder / "fp32.onnx", folder / "int8.onnx", Images(model), quant_format=QuantFormat.QDQ, per_channel=True,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
        )  # fmt: skip
    return onnx.load(folder / "int8.onnx")


def shape_of(model: onnx.ModelProto) -> tuple[Counter[Any], Counter[Any]]:
    """Operators with their attributes, and the shapes and types of what is stored."""
    nodes = Counter(
        (node.op_type, len(node.input), tuple(sorted(each.SerializeToString() for each in node.attribute)))
        for node in model.graph.node
    )
    return nodes, Counter((tuple(each.dims), each.data_type) for each in model.graph.initializer)


@pytest.mark.parametrize("end", ["smallest", "largest"])
@pytest.mark.parametrize("name", SPACES)
def test_a_probe_is_the_graph_that_static_quantisation_makes(name: str, end: str, tmp_path: Path) -> None:
    space = load_space(name)
    arch = getattr(space, end)
    model = onnx.load_model_from_string(probe(space, arch))
    nodes, stored = shape_of(onnx.load_model_from_string(probe(space, arch, "int8")))
    wanted, kept = shape_of(by_library(model, tmp_path))
    assert nodes == wanted
    assert stored == kept


@pytest.mark.parametrize("name", ["digits", "mlp", "autoencoder"])
def test_it_runs(name: str) -> None:
    space = load_space(name)
    data = probe(space, space.smallest, "int8")
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    given = session.get_inputs()[0]
    images = np.zeros([1, *given.shape[1:]], np.float32)
    (found,) = session.run(None, {given.name: images})
    assert np.isfinite(found).all()


def test_every_block_can_be_quantised_alone() -> None:
    space = load_space("digits")
    for spec in space.plan(space.largest).values():
        data = graph_of([spec.operations()], "int8")
        onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])


def test_the_model_that_is_given_stays_as_it_is() -> None:
    space = load_space("digits")
    model = onnx.load_model_from_string(probe(space, space.smallest))
    before = model.SerializeToString()
    quantised(model)
    assert model.SerializeToString() == before
