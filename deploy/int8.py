"""int8 graphs for latency: the operators that static quantisation by ONNX Runtime makes of a graph, with scales of no meaning.

Accuracy needs ranges measured on images; time does not. So no image is run here, and a graph takes milliseconds instead of seconds.
"""

from __future__ import annotations

import logging
import warnings

import numpy as np
import onnx

RANGE = (np.float32(-4.0), np.float32(4.0))
"""Of every activation."""


def quantised(model: onnx.ModelProto) -> onnx.ModelProto:
    """An int8 copy of a model: QDQ, weights per channel in int8, activations in uint8, as x86 with VNNI and arm64 run fastest."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the modules that are imported
        from onnxruntime.quantization import CalibrationMethod, QuantType
        from onnxruntime.quantization.calibrate import TensorsData
        from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
        from onnxruntime.quantization.registry import QDQRegistry

    shaped = onnx.shape_inference.infer_shapes(model)
    names = [each.name for each in (*shaped.graph.input, *shaped.graph.value_info, *shaped.graph.output)]
    ranges = TensorsData(CalibrationMethod.MinMax, dict.fromkeys(names, RANGE))
    quantizer = QDQQuantizer(
        shaped, per_channel=True, reduce_range=False, weight_qType=QuantType.QInt8, activation_qType=QuantType.QUInt8,
        tensors_range=ranges, nodes_to_quantize=[], nodes_to_exclude=[], op_types_to_quantize=list(QDQRegistry),
        extra_options={"DedicatedQDQPair": False},
    )  # fmt: skip
    level = logging.root.level
    logging.disable(logging.WARNING)
    try:
        quantizer.quantize_model()
    finally:
        logging.disable(logging.NOTSET)
        logging.root.setLevel(level)
    found: onnx.ModelProto = quantizer.model.model
    return found
