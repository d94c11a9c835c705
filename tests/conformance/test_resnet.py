"""Spaces of the family resnet under the conformance suite of families."""

from __future__ import annotations

import pytest

from deploy.conformance import FamilySuite
from supernet.space import Space, load_space


@pytest.mark.slow
class TestTiny(FamilySuite):
    """A deep stem that adds, odd maps, widths that may be equal at a change, choices per block and per stage, any activation."""

    fvcore_children = 5
    space = Space.from_definition({
        "format": 1, "name": "tiny-resnet", "family": "resnet", "classes": 3, "in_channels": 2, "resolution": [13, 18],
        "block": "bottleneck", "activation": ["relu", "hard_swish", "swish"],
        "chosen_per": {"expand_ratio": "block", "activation": "stage"},
        "stem": {"kind": "deep", "mid_width": [3, 5], "depth": [0, 1, 2], "residual": True, "width": [6, 10]},
        "stages": [
            {"width": [6, 10], "depth": [1, 2], "expand_ratio": [1.0, 2.5, 4.0], "stride": 1},
            {"width": [10, 15], "depth": [1, 3], "expand_ratio": [1.0], "stride": 2},
        ],
    })  # fmt: skip


@pytest.mark.nightly
class TestTinyBasic(FamilySuite):
    """A plain stem with a stride, a first block that is an identity, a stride of 3, choices for the whole network."""

    fvcore_children = 5
    space = Space.from_definition({
        "format": 1, "name": "tiny-basic", "family": "resnet", "classes": 4, "in_channels": 1, "resolution": [9, 16],
        "block": "basic", "activation": ["relu", "swish"], "chosen_per": {"expand_ratio": "network"},
        "stem": {"kind": "plain", "width": [8], "stride": 1},
        "stages": [
            {"width": [8], "depth": [2, 4], "expand_ratio": [0.5], "stride": 1},
            {"width": [12, 16], "depth": [1, 2], "expand_ratio": [0.7, 1.4], "stride": 3},
        ],
    })  # fmt: skip


@pytest.mark.nightly
class TestCifarResNet(FamilySuite):
    space = load_space("cifar-resnet")


@pytest.mark.nightly
class TestResNet50D(FamilySuite):
    """A space of one child."""

    space = load_space("resnet50d")
    image_size = 64


@pytest.mark.nightly
class TestOFAResNet50(FamilySuite):
    space = load_space("ofa-resnet50")
    image_size = 64
