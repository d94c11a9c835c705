"""The inverted-residual spaces of the papers, and one small space with all that they have, under the conformance suite."""

from __future__ import annotations

import pytest

from deploy.conformance import FamilySuite
from supernet.space import Space, load_space


@pytest.mark.slow
class TestAllAtOnce(FamilySuite):
    """Elastic activations and gates, a divisor, kernels and float expansions per block."""

    space = Space.from_definition({
        "format": 1, "name": "all-at-once", "family": "mbconv", "classes": 3, "in_channels": 1, "resolution": [6, 8],
        "channel_divisor": [8, 16, 32],
        "chosen_per": {"kernel_size": "block", "expand_ratio": "block", "activation": "stage", "squeeze_excite": "block"},
        "stem": {"width": [8, 16], "stride": 1, "activation": ["relu", "swish"]},
        "stages": [
            {"width": [8, 16], "depth": [1, 2], "kernel_size": [[1, 3, 5], [3]], "expand_ratio": [[1, 1.5], [2, 3.2, 4.5]], "stride": 2,
             "squeeze_excite": [[False, True], [True]], "activation": ["relu", "hard_swish", "swish"]},
        ],
        "head": {"expand_width": 24, "width": [16, 24], "bias": True, "activation": ["relu", "swish"]},
    })  # fmt: skip
    fvcore_children = 10


@pytest.mark.nightly
class TestIdentity(FamilySuite):
    """Identity shortcuts, EfficientNet's gate and head, kernels and activations per network."""

    space = Space.from_definition({
        "format": 1, "name": "identity", "family": "mbconv", "classes": 3, "in_channels": 3, "resolution": [7, 9],
        "gate": "efficientnet", "shortcut": "identity", "channel_divisor": 8,
        "chosen_per": {"kernel_size": "network", "activation": "network", "squeeze_excite": "network"},
        "stem": {"width": [12, 20], "stride": 1, "activation": ["relu", "swish"]},
        "stages": [
            {"width": [10, 18], "depth": [1, 3], "kernel_size": [3, 5], "expand_ratio": [2, 3.5], "stride": 2,
             "squeeze_excite": [False, True], "activation": ["relu", "swish"]},
            {"width": [32], "depth": [1, 2], "kernel_size": [3], "expand_ratio": [1, 2], "stride": 1,
             "squeeze_excite": True, "activation": "hard_swish"},
        ],
        "head": {"kind": "efficientnet", "width": [16, 24], "activation": ["relu", "swish"]},
    })  # fmt: skip


@pytest.mark.nightly
class TestBigNAS(FamilySuite):
    space = load_space("bignas")
    image_size = 48


@pytest.mark.nightly
class TestOFA(FamilySuite):
    space = load_space("ofa-mobilenetv3")
    image_size = 64


@pytest.mark.nightly
class TestWideOFA(FamilySuite):
    space = load_space("ofa-mobilenetv3-w1.2")
    image_size = 64


@pytest.mark.nightly
class TestEfficientNetB0(FamilySuite):
    space = load_space("efficientnet-b0")
    image_size = 64


@pytest.mark.nightly
class TestMobileNetV3Large(FamilySuite):
    space = load_space("mobilenetv3-large")
    image_size = 64
