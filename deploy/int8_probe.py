"""int8 graphs for latency: the operators that static quantisation by ONNX Runtime makes of a graph, with scales of no meaning.

Accuracy needs ranges measured on images; time does not, so no image is run here. ONNX Runtime quantises channels one by one in Python,
most of the time that it takes: here it quantises whole tensors, and their one scale is then given to every channel. A test holds that
the graph is that of quantisation by channel but for the numbers.
"""

from __future__ import annotations

import numpy as np
import onnx

from deploy.graph import forget_shapes, quiet

RANGE = (np.float32(-4.0), np.float32(4.0))
"""Of every activation."""


def quantised(model: onnx.ModelProto) -> onnx.ModelProto:
    """An int8 copy of a model: QDQ, weights per channel in int8, activations in uint8, as x86 with VNNI and arm64 run fastest."""
    with quiet():  # the modules that are imported warn, too
        from onnxruntime.quantization import CalibrationMethod, QuantType
        from onnxruntime.quantization.calibrate import TensorsData
        from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
        from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry

    shaped = onnx.shape_inference.infer_shapes(model)
    names = [each.name for each in (*shaped.graph.input, *shaped.graph.value_info, *shaped.graph.output)]
    ranges = TensorsData(CalibrationMethod.MinMax, dict.fromkeys(names, RANGE))
    quantizer = QDQQuantizer(
        shaped, per_channel=False, reduce_range=False, weight_qType=QuantType.QInt8, activation_qType=QuantType.QUInt8,
        tensors_range=ranges, nodes_to_quantize=[], nodes_to_exclude=[], op_types_to_quantize=[*{*QLinearOpsRegistry, *QDQRegistry}],
        extra_options={"DedicatedQDQPair": False},
    )  # fmt: skip
    with quiet():
        quantizer.quantize_model()
    found: onnx.ModelProto = quantizer.model.model
    forget_shapes(found)
    _by_channel(found.graph)
    return found


def _by_channel(graph: onnx.GraphProto) -> None:
    """Give every channel of what was quantised as a whole tensor, weights and biases, a scale and a zero point of its own."""
    stored = {tensor.name: tensor for tensor in graph.initializer}
    taking = {name: node for node in graph.node for name in node.input}
    for node in graph.node:
        if node.op_type != "DequantizeLinear" or node.input[0] not in stored:
            continue
        tensor, user = stored[node.input[0]], taking[node.output[0]]
        axis = _axis(user, tensor)
        if axis is None:
            continue
        node.attribute.append(onnx.helper.make_attribute("axis", axis))
        for name in node.input[1:]:
            one = onnx.numpy_helper.to_array(stored[name])
            stored[name].CopyFrom(onnx.numpy_helper.from_array(np.full(tensor.dims[axis], one), name))


def _axis(user: onnx.NodeProto, tensor: onnx.TensorProto) -> int | None:
    """The axis of the output channels in a weight or bias that `user` takes; None where ONNX Runtime quantises it as a whole."""
    if user.op_type not in ("Conv", "ConvTranspose", "Gemm", "MatMul") or not tensor.dims:
        return None
    if len(tensor.dims) == 1:
        return 0 if tensor.dims[0] > 1 else None
    if user.op_type == "Conv":
        return 0
    if user.op_type == "ConvTranspose":
        return 1
    transposed = any(each.name == "transB" and each.i for each in user.attribute)
    return 0 if transposed else len(tensor.dims) - 1
