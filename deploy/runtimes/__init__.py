"""Runtimes that execute exported children, one file each behind this small protocol."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class Session(Protocol):
    """A loaded model."""

    def __call__(self, images_nchw: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits, shape (N, classes), of normalised images."""
        ...


class Runtime(Protocol):
    """Loads models."""

    @property
    def name(self) -> str:
        """Name and version, such as "onnxruntime 1.23.2"."""
        ...

    def load(self, model: bytes, *, threads: int = 1) -> Session:
        """A session that computes with `threads` threads."""
        ...
