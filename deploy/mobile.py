"""For phones: ONNX Runtime's own format, and what its checker says of NNAPI and CoreML."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import onnx
import onnxruntime

from deploy.graph import quiet
from supernet.errors import InputError

PLATFORMS = ("arm", "amd64")
"""What an .ort file is optimised for: a layout of channels that x86 runs twice as fast is left out for arm, which lacks it."""


def platform_of(machine: str) -> str:
    """The platform of a processor, as `platform.machine` names it."""
    return "amd64" if machine.lower() in ("x86_64", "amd64") else "arm"


def to_ort(model: onnx.ModelProto, platform: str) -> bytes:
    """The model in ONNX Runtime's format, optimised for a platform; builds without an ONNX parser read it."""
    if platform not in PLATFORMS:
        raise InputError(f"an .ort file is for {' or '.join(PLATFORMS)}, but got {platform!r}")
    with quiet(), tempfile.TemporaryDirectory() as folder:
        from onnxruntime.tools.convert_onnx_models_to_ort import OptimizationStyle, convert_onnx_models_to_ort

        path = Path(folder) / "model.onnx"
        onnx.save(model, path)
        onnxruntime.set_default_logger_severity(3)  # it warns that a file for amd64 is for amd64
        try:
            convert_onnx_models_to_ort(path, optimization_styles=[OptimizationStyle.Fixed], target_platform=platform)
        finally:
            onnxruntime.set_default_logger_severity(2)
        return path.with_suffix(".ort").read_bytes()


def usability(model: onnx.ModelProto) -> dict[str, dict[str, Any]]:
    """What ONNX Runtime's checker says of a model of fixed shapes, by execution provider.

    `partitions` is into how many pieces the graph falls, `supported` how many of `nodes` the provider takes, `verdict` YES, MAYBE
    or NO, `unsupported` the operators that it does not take.
    """
    with quiet():
        from onnxruntime.tools.mobile_helpers.usability_checker import check_coreml_partitions, check_nnapi_partitions

        shaped = onnx.shape_inference.infer_shapes(model)
        found = {
            "NNAPI": check_nnapi_partitions(shaped, True),
            "CoreML MLProgram": check_coreml_partitions(shaped, True, "coreml_supported_mlprogram_ops.md"),
            "CoreML NeuralNetwork": check_coreml_partitions(shaped, True, "coreml_supported_neuralnetwork_ops.md"),
        }
    return {
        name: {"partitions": int(each.num_partitions), "supported": int(each.num_supported_nodes), "nodes": int(each.num_nodes),
               "verdict": each.suitability().name, "unsupported": sorted(each.unsupported_ops)}
        for name, each in found.items()
    }  # fmt: skip
