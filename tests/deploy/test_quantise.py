"""int8: what the gate lets pass, and that it is ONNX Runtime's own quantisation."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest

from deploy.formats import session
from deploy.int8 import RECIPES, Attempt, Quantiser, choose, recipe_for
from deploy.layers import weighted_nodes
from supernet.arch import Arch
from supernet.errors import InputError
from supernet.space import Space
from supernet.task import Comparison

Exported = Callable[[str, "str | int"], tuple[Space, Arch, onnx.ModelProto]]


def batches_for(model: onnx.ModelProto, count: int = 2) -> list[np.ndarray]:
    shape = [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim[1:]]
    return [np.random.default_rng(seed).standard_normal((8, *shape), dtype=np.float32) for seed in range(count)]


@pytest.mark.parametrize(("machine", "flags", "recipe"), [
    ("x86_64", "flags : fpu avx2 avx512_vnni", "u8s8"), ("x86_64", "flags : fpu avx2", "u8s7"), ("AMD64", "avx_vnni", "u8s8"),
    ("aarch64", "", "s8s8"), ("arm64", "avx", "s8s8"), ("armv7l", "", "s8s8"),
])  # fmt: skip
def test_the_recipe_follows_the_processor(machine: str, flags: str, recipe: str) -> None:
    assert recipe_for(machine, flags) == recipe


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("attempt", [Attempt(), Attempt("weighted"), Attempt("weighted", "percentile")])
def test_weights_are_int8_by_channel_and_outputs_stay_close(exported: Exported, recipe: str, attempt: Attempt) -> None:
    model = exported("digits", "smallest")[2]
    batches = batches_for(model)
    found = Quantiser(model, batches, recipe)(attempt)
    onnx.checker.check_model(found, full_check=True)
    stored = {tensor.name: tensor for tensor in found.graph.initializer}
    weights = [node for node in found.graph.node if node.op_type == "DequantizeLinear" and node.input[0] in stored]
    by_channel = [
        node for node in weights if len(stored[node.input[1]].dims) and stored[node.input[0]].data_type == onnx.TensorProto.INT8
    ]
    assert len(by_channel) == len(weighted_nodes(model))
    kinds = {stored[node.input[2]].data_type for node in found.graph.node if node.op_type == "QuantizeLinear"}
    assert kinds == {onnx.TensorProto.INT8 if recipe == "s8s8" else onnx.TensorProto.UINT8}
    if recipe == "u8s7":
        assert max(np.abs(onnx.numpy_helper.to_array(stored[node.input[0]]).astype(int)).max() for node in by_channel) <= 64
    if recipe != "u8s8":  # whose products may overflow on this processor
        images = batches[0]
        expected, outputs = (session(each.SerializeToString())(images) for each in (model, found))
        assert np.abs(outputs - expected).mean() < 0.2 * np.abs(expected - expected.mean(0)).mean() + 0.05


def test_kept_layers_stay_in_fp32(exported: Exported) -> None:
    model = exported("digits", "smallest")[2]
    kept = tuple(node.name for node in weighted_nodes(model)[:3])
    found = Quantiser(model, batches_for(model), "u8s8")(Attempt("weighted", kept=kept))
    stored = {tensor.name: tensor.data_type for tensor in found.graph.initializer}
    nodes = {node.name: node for node in found.graph.node}
    assert all(stored[nodes[name].input[1]] == onnx.TensorProto.FLOAT for name in kept)
    assert sum(kind == onnx.TensorProto.INT8 for kind in stored.values()) >= len(weighted_nodes(model)) - 3


def test_ranges_are_taken_once_and_from_all_batches(exported: Exported) -> None:
    model = exported("digits", "smallest")[2]
    batches = batches_for(model)
    quantiser = Quantiser(model, [batches[0], 50 * batches[1]], "u8s8")
    wide = quantiser._ranges("minmax")["images"].range_value
    assert float(np.max(wide[1])) == pytest.approx(float(max(batches[0].max(), 50 * batches[1].max())))
    assert quantiser._ranges("minmax") is quantiser._ranges("minmax")


def test_what_cannot_be_is_refused(exported: Exported) -> None:
    model = exported("digits", "smallest")[2]
    with pytest.raises(InputError, match="an int8 recipe is u8s8, u8s7, s8s8, but got 'int4'"):
        Quantiser(model, batches_for(model), "int4")
    with pytest.raises(InputError, match="at least one training image"):
        Quantiser(model, [], "u8s8")


# --- the choice ---


def chosen(
    losses: dict[Attempt, float], most_loss: float = 0.005, names: int = 10, unconfirmed: dict[Attempt, float] | None = None
) -> tuple[Attempt | None, list[Attempt]]:  # fmt: skip
    """The choice where each attempt loses what it is said to; others lose 1."""
    asked: list[Attempt] = []

    def make(attempt: Attempt) -> onnx.ModelProto:
        asked.append(attempt)
        return onnx.ModelProto()

    def change(model: onnx.ModelProto) -> Comparison:
        return Comparison(-losses.get(asked[-1], 1.0), -1, 1, 1.0)

    def confirm(model: onnx.ModelProto) -> Comparison:
        return Comparison(-(unconfirmed or {}).get(asked[-1], 0.0), -1, 1, 1.0)

    found = choose(make, change, confirm, most_loss, lambda: [f"n{number}" for number in range(names)])
    assert all((each.confirmed is not None) == (each.change.difference >= -most_loss) for each in found.tried)
    assert [each.attempt for each in found.tried] == asked
    assert (found.model is None) == (found.attempt is None)
    return found.attempt, asked


def test_the_first_that_holds_is_taken_and_no_other_is_made() -> None:
    assert chosen({Attempt(): 0.005}) == (Attempt(), [Attempt()])
    found, asked = chosen({Attempt("weighted"): 0.004, Attempt("weighted", "percentile"): 0.0})
    assert found == Attempt("weighted")
    assert asked == [Attempt(), Attempt(calibration="percentile"), Attempt("weighted")]


def test_the_most_sensitive_layers_go_first_with_the_better_ranges_at_most_half_of_them() -> None:
    best = Attempt("weighted", "percentile")
    four = Attempt("weighted", "percentile", ("n0", "n1", "n2", "n3"))
    found, asked = chosen({best: 0.1, four: 0.0})
    assert found == four
    assert [len(each.kept) for each in asked] == [0, 0, 0, 0, 1, 2, 4]
    found, asked = chosen({best: 0.1})
    assert found is None and len(asked[-1].kept) == 4


def test_what_is_not_confirmed_is_followed_by_the_next() -> None:
    weighted = Attempt("weighted")
    found, asked = chosen({Attempt(): 0.0, weighted: 0.0}, unconfirmed={Attempt(): 0.006})
    assert found == weighted
    assert asked == [Attempt(), Attempt(calibration="percentile"), weighted]


def test_a_gain_passes_any_gate_and_an_exact_bound_holds() -> None:
    assert chosen({Attempt(): -0.01}, most_loss=0.0)[0] == Attempt()
    assert chosen({Attempt(): 0.5}, most_loss=0.5)[0] == Attempt()
