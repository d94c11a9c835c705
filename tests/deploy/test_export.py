"""The exported file: what is in it, what is not, and that it computes what the network does."""

from __future__ import annotations

import getpass
import re
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from deploy.export import INPUT, OPSET, OUTPUT, to_onnx
from deploy.runtimes.onnxruntime import OnnxRuntime
from supernet.arch import Arch
from supernet.space import Space, load_space

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def space() -> Space:
    return load_space("digits", classes=7)


@pytest.fixture(scope="module")
def network(space: Space, networks: Callable[[Space, Arch], nn.Module]) -> nn.Module:
    return networks(space, space.largest)


@pytest.fixture(scope="module")
def model(network: nn.Module) -> onnx.ModelProto:
    return to_onnx(network, channels=1, resolution=20)


def test_the_graph_holds_neither_batch_norm_nor_a_resize(model: onnx.ModelProto) -> None:
    assert not {node.op_type for node in model.graph.node} & {"BatchNormalization", "Resize"}
    assert not model.functions


def test_the_opset_is_the_one_that_the_manifest_names(model: onnx.ModelProto) -> None:
    assert OPSET == 20
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", OPSET)]


def test_inputs_and_outputs_are_named_with_a_free_batch(model: onnx.ModelProto) -> None:
    shapes = {}
    for value in (*model.graph.input, *model.graph.output):
        dims = value.type.tensor_type.shape.dim
        assert dims[0].dim_param and not dims[0].HasField("dim_value")
        shapes[value.name] = [dim.dim_value for dim in dims[1:]]
    assert shapes == {INPUT: [1, 20, 20], OUTPUT: [7]}


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_any_batch_computes_what_torch_computes(network: nn.Module, model: onnx.ModelProto, batch: int) -> None:
    images = torch.randn(batch, 1, 20, 20, generator=torch.Generator().manual_seed(batch))
    with torch.no_grad():
        expected = network(images).numpy()
    found = OnnxRuntime().load(model.SerializeToString())(images.numpy())
    assert found.shape == (batch, 7)
    np.testing.assert_allclose(found, expected, atol=1e-4 * max(1, float(np.abs(expected).max())))


def test_an_image_has_the_same_logits_whatever_stands_beside_it(model: onnx.ModelProto) -> None:
    session = OnnxRuntime().load(model.SerializeToString())
    images = np.random.default_rng(0).standard_normal((5, 1, 20, 20)).astype(np.float32)
    np.testing.assert_allclose(session(images)[3:4], session(images[3:4]), atol=1e-5)


def test_weights_lie_within_the_file(model: onnx.ModelProto) -> None:
    assert model.graph.initializer
    assert all(not onnx.external_data_helper.uses_external_data(tensor) for tensor in model.graph.initializer)


def test_nothing_in_the_file_names_the_machine_that_made_it(model: onnx.ModelProto) -> None:
    data = model.SerializeToString()
    here = {str(ROOT), str(Path.home()), sys.prefix, str(Path(torch.__file__).parent), "site-packages", ".py"}
    here |= {name for name in (getpass.getuser(), socket.gethostname()) if len(name) > 5}  # others may be there by chance
    for text in sorted(here):
        assert text.encode() not in data, text
    text = re.sub(rb"[^\x20-\x7e]+", b"\n", data)
    assert not re.search(rb"(?:^|[\s\"'(])/[a-z]{2,}/[A-Za-z0-9_.]{2,}/", text)
    assert model.producer_name == "nestling"


@pytest.mark.slow
def test_exporting_prints_nothing_changes_nothing_and_gives_the_same_bytes_again(
    network: nn.Module, model: onnx.ModelProto, capfd: pytest.CaptureFixture[str]
) -> None:
    before = {name: value.clone() for name, value in network.state_dict().items()}
    assert to_onnx(network, channels=1, resolution=20).SerializeToString() == model.SerializeToString()
    assert not network.training
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert capfd.readouterr() == ("", "")


def test_a_network_that_is_not_calibrated_is_refused(space: Space) -> None:
    from supernet.model import plain

    with pytest.raises(ValueError, match="calibrate"):
        to_onnx(plain(space, space.smallest), channels=1, resolution=12)
