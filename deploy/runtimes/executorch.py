"""ExecuTorch with its XNNPACK kernels: what runs on phones, from a .pte file. An extra (`pip install nestling[executorch]`)."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from deploy.runtimes import Session
from supernet.errors import InputError

MOST_BATCH = 64
"""Memory for the activations is planned for so many images."""


def to_program(network: nn.Module, *, channels: int, resolution: int) -> bytes:
    """The content of a .pte file: `network`, put into evaluation mode, for 1 to `MOST_BATCH` images.

    Its input has the shape (N, channels, resolution, resolution). The conversion takes from seconds to a minute.
    Raises `InputError` where ExecuTorch is not installed.
    """
    try:
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower
    except ImportError as error:
        raise _missing(error) from error
    images = torch.zeros(2, channels, resolution, resolution)
    batch = torch.export.Dim("batch", min=1, max=MOST_BATCH)
    exported = torch.export.export(network.eval(), (images,), dynamic_shapes=({0: batch},))
    return bytes(to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()]).to_executorch().buffer)


@dataclass(frozen=True, slots=True)
class ExecuTorch:
    """XNNPACK on the CPU."""

    @property
    def name(self) -> str:
        """Name and version. Raises `InputError` where it is not installed."""
        try:
            return f"executorch {version('executorch')}"
        except PackageNotFoundError as error:
            raise _missing(error) from error

    def load(self, model: bytes, *, threads: int = 1) -> Session:
        """A session of a .pte file that computes with `threads` threads. They are the process's: the latest `load` says how many.

        Raises `InputError` where ExecuTorch is not installed.
        """
        try:
            from executorch.extension.pybindings import portable_lib
            from executorch.runtime import Runtime
        except ImportError as error:
            raise _missing(error) from error
        portable_lib._unsafe_reset_threadpool(threads)
        program: Any = Runtime.get().load_program(model)
        method = program.load_method("forward")

        def run(images_nchw: NDArray[np.float32]) -> NDArray[np.float32]:
            assert program is not None  # a method does not hold its program
            logits: NDArray[np.float32] = method.execute([torch.from_numpy(images_nchw)])[0].numpy().copy()
            return logits

        return run


def _missing(error: Exception) -> InputError:
    return InputError(f"ExecuTorch cannot be imported ({error}): install it with pip install nestling[executorch]")
