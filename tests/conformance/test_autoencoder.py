"""Spaces of the family autoencoder under the conformance suite of families."""

from __future__ import annotations

import pytest

from deploy.conformance import FamilySuite
from supernet.space import Space, load_space


@pytest.mark.nightly
class TestAutoencoder(FamilySuite):
    space = load_space("autoencoder")


@pytest.mark.slow
class TestTiny(FamilySuite):
    """What the shipped space has not: one stage, three channels, widths no multiple of 8, kernels of 1 and 7, a map of 1 pixel."""

    fvcore_children = 5
    space = Space.from_definition({
        "format": 1, "name": "tiny-autoencoder", "family": "autoencoder", "in_channels": 3, "resolution": [8, 12],
        "stem": {"width": [3, 6]},
        "stages": [
            {"width": [5, 8], "depth": [1, 2], "decoder_depth": [1, 3], "kernel_size": [1, 3, 7]},
            {"width": [4, 9], "depth": [2, 3], "decoder_depth": [2], "kernel_size": [3]},
        ],
        "bottleneck": {"width": [1, 7]},
    })  # fmt: skip
