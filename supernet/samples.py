"""What a child did on every image, and how that is kept: columns of numbers, packed into bytes that damage cannot pass through."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Samples = Mapping[str, NDArray[Any]]
"""What a child did on every image: columns of shape (N,), in the split's order. Those of two runs of images join end to end."""
Columns = Mapping[str, str]
"""The columns that a task keeps: name -> NumPy's dtype, little-endian."""


def pack(samples: Samples, columns: Columns) -> bytes:
    """Samples as few bytes: about 2.5 an image for a classifier's.

    All first bytes of a column's numbers, then all second ones, which zlib makes much smaller than numbers one by one.
    """
    planes = [np.ascontiguousarray(samples[name], dtype).view(np.uint8) for name, dtype in columns.items()]
    widths = [np.dtype(dtype).itemsize for dtype in columns.values()]
    turned = [plane.reshape(-1, width).T.tobytes() for plane, width in zip(planes, widths, strict=True)]
    return zlib.compress(b"".join(turned), 1)


def unpack(packed: bytes, images: int, columns: Columns) -> Samples:
    """Inverse of `pack`; never makes more than the bytes that `images` images have.

    Raises `ValueError` where the bytes are damaged or of another number of images.
    """
    dtypes = {name: np.dtype(dtype) for name, dtype in columns.items()}
    size = images * sum(dtype.itemsize for dtype in dtypes.values())
    unzip = zlib.decompressobj()
    try:
        whole = unzip.decompress(packed, max(0, size) + 1)
    except zlib.error as error:
        raise ValueError(f"samples of {images} images are damaged ({error})") from error
    if len(whole) != size or not unzip.eof or unzip.unused_data:
        raise ValueError(f"samples of {images} images take {size} bytes, but there are other bytes, or more, or fewer")
    samples, start = {}, 0
    for name, dtype in dtypes.items():
        planes = np.frombuffer(whole, np.uint8, images * dtype.itemsize, start).reshape(dtype.itemsize, images)
        samples[name] = np.ascontiguousarray(planes.T).view(dtype).reshape(images).astype(dtype.newbyteorder("="), copy=False)
        start += planes.size
    return samples
