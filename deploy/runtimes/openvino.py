"""OpenVINO on the CPU: reads the same ONNX file. An extra (`pip install nestling[openvino]`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploy.runtimes import Session
from supernet.errors import InputError


@dataclass(frozen=True, slots=True)
class OpenVino:
    """The CPU plugin, tuned for latency. It computes in threads of its own, also where it is told to use one."""

    @property
    def name(self) -> str:
        """Name and version. Raises `InputError` where it is not installed."""
        return f"openvino {str(_package().__version__).partition('-')[0]}"

    def load(self, model: bytes, *, threads: int = 1) -> Session:
        """A session that computes with `threads` threads, in fp32. Raises `InputError` where OpenVINO is not installed."""
        package = _package()
        core = package.Core()
        settings = {
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_PRECISION_HINT": "f32",
        }
        request = core.compile_model(core.read_model(model=model, weights=b""), "CPU", settings).create_infer_request()

        def run(images_nchw: NDArray[np.float32]) -> NDArray[np.float32]:
            logits: NDArray[np.float32] = request.infer([images_nchw])[0].copy()  # the request's own memory is written again
            return logits

        return run


def _package() -> Any:
    try:
        import openvino
    except ImportError as error:
        raise InputError(f"OpenVINO cannot be imported ({error}): install it with pip install nestling[openvino]") from error
    return openvino
