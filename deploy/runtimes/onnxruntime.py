"""ONNX Runtime on the CPU."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from deploy.runtimes import Session


@dataclass(frozen=True, slots=True)
class OnnxRuntime:
    """The CPU provider, all graph optimisations. One thread means the calling one."""

    @property
    def name(self) -> str:
        """Name and version."""
        return f"onnxruntime {onnxruntime.__version__}"

    def load(self, model: bytes, *, threads: int = 1) -> Session:
        """A session that computes with `threads` threads."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name

        def run(images_nchw: NDArray[np.float32]) -> NDArray[np.float32]:
            logits: NDArray[np.float32] = session.run(None, {name: images_nchw})[0]
            return logits

        return run
