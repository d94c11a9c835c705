"""What is done to an exported graph changes what it takes and gives, not what it computes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from deploy.formats import one_by_one, session, softmax
from deploy.graph import PIXELS, PROBABILITIES, fixed, from_pixels, halved, pool_whole_maps
from supernet.arch import Arch
from supernet.preprocess import Preprocessing
from supernet.space import Space

Exported = Callable[[str, "str | int"], tuple[Space, Arch, onnx.ModelProto]]
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("cifar-vit", "cifar-resnet")]
FAMILIES = ["digits", "mlp", "cell", *SLOW]


def images_for(model: onnx.ModelProto, count: int) -> np.ndarray:
    shape = [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim[1:]]
    return np.random.default_rng(0).standard_normal((count, *shape), dtype=np.float32)


def shape_of(value: onnx.ValueInfoProto) -> list[int | str]:
    return [dim.dim_value or dim.dim_param for dim in value.type.tensor_type.shape.dim]


@pytest.mark.parametrize("name", FAMILIES)
def test_of_fixed_shapes_every_shape_is_known_and_the_outputs_are_the_same(exported: Exported, name: str) -> None:
    model = exported(name, "smallest")[2]
    found = fixed(model)
    assert shape_of(found.graph.input[0])[0] == shape_of(found.graph.output[0])[0] == 1
    assert not found.graph.value_info and not model.graph.value_info
    for value in (*onnx.shape_inference.infer_shapes(found, strict_mode=True).graph.value_info, *found.graph.output):
        assert all(type(size) is int for size in shape_of(value)), value.name
    images = images_for(model, 3)
    np.testing.assert_allclose(
        one_by_one(session(found.SerializeToString()))(images), session(model.SerializeToString())(images), rtol=1e-4, atol=1e-4
    )
    with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument):
        session(found.SerializeToString())(images)
    assert shape_of(model.graph.input[0])[0] != 1  # the model that was given is as it was


@pytest.mark.parametrize("name", FAMILIES)
def test_from_pixels_it_gives_the_probabilities_of_the_normalised_images(exported: Exported, name: str) -> None:
    model = exported(name, "smallest")[2]
    _, channels, side, _ = shape_of(model.graph.input[0])
    assert isinstance(channels, int) and isinstance(side, int)
    prepared = Preprocessing(side, mean=(0.3,) * channels, std=(0.2, 0.25, 0.3)[:channels])
    pixels = np.random.default_rng(0).integers(0, 256, (5, side, side, channels), dtype=np.uint8)
    found = from_pixels(model, prepared, probabilities=True)
    assert (found.graph.input[0].name, found.graph.output[0].name) == (PIXELS, PROBABILITIES)
    assert found.graph.input[0].type.tensor_type.elem_type == TensorProto.UINT8
    expected = softmax(session(model.SerializeToString())(prepared.normalise(pixels)))
    np.testing.assert_allclose(session(found.SerializeToString())(pixels), expected, atol=2e-5)
    np.testing.assert_allclose(expected.sum(1), 1, rtol=1e-5)


def test_of_a_regression_pixels_come_out_as_they_go_in(exported: Exported) -> None:
    model = exported("autoencoder", "smallest")[2]
    _, channels, side, _ = shape_of(model.graph.input[0])
    assert isinstance(channels, int) and isinstance(side, int)
    prepared = Preprocessing(side, mean=(0.4,) * channels, std=(0.2,) * channels)
    pixels = np.stack([np.asarray(Image.effect_noise((side, side), 40))] * channels, -1)[None]
    found = session(from_pixels(model, prepared, probabilities=False).SerializeToString())(pixels)
    plain = session(model.SerializeToString())(prepared.normalise(pixels))
    assert found.shape == pixels.shape
    np.testing.assert_allclose(found, np.clip(plain * 0.2 + 0.4, 0, 1).transpose(0, 2, 3, 1), atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_half_precision_halves_the_file_and_keeps_its_input(exported: Exported, name: str) -> None:
    model = exported(name, "largest")[2]
    found = halved(model)
    stored = {tensor.data_type for tensor in found.graph.initializer if len(tensor.dims) > 1}
    assert TensorProto.FLOAT not in stored
    assert len(found.SerializeToString()) < 0.65 * len(model.SerializeToString())
    images = images_for(model, 2)
    expected, outputs = session(model.SerializeToString())(images), session(found.SerializeToString())(images)
    assert outputs.dtype == np.float32
    assert np.abs(outputs - expected).max() < 0.02 * max(1, np.abs(expected).max())


def mean_of(axes: list[int], keepdims: int, rank: int = 4) -> onnx.ModelProto:
    shape = [2, 3, 4, 5][:rank]
    made = [1 if at in [axis % rank for axis in axes] else size for at, size in enumerate(shape)]
    if not keepdims:
        made = [size for at, size in enumerate(shape) if at not in [axis % rank for axis in axes]]
    graph = helper.make_graph(
        [helper.make_node("ReduceMean", ["x", "axes"], ["y"], keepdims=keepdims)], "mean",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)], [helper.make_tensor_value_info("y", TensorProto.FLOAT, made)],
        [numpy_helper.from_array(np.array(axes, np.int64), "axes")],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.mark.parametrize(("axes", "keepdims", "rank", "pooled"), [
    ([2, 3], 1, 4, True), ([-1, -2], 1, 4, True), ([3, 2], 1, 4, True), ([2, 3], 0, 4, False), ([1, 2], 1, 4, False),
    ([3], 1, 4, False),
    ([1], 1, 3, False), ([1, 2], 1, 3, False),
])  # fmt: skip
def test_only_a_mean_over_the_whole_map_becomes_a_pool(axes: list[int], keepdims: int, rank: int, pooled: bool) -> None:
    model = mean_of(axes, keepdims, rank)
    x = np.random.default_rng(0).standard_normal([2, 3, 4, 5][:rank], dtype=np.float32)
    expected = session(model.SerializeToString())(x)
    pool_whole_maps(model.graph)
    onnx.checker.check_model(model, full_check=True)
    assert [node.op_type for node in model.graph.node] == ["GlobalAveragePool" if pooled else "ReduceMean"]
    assert len(model.graph.initializer) == (0 if pooled else 1)
    np.testing.assert_allclose(session(model.SerializeToString())(x), expected, rtol=1e-5)
