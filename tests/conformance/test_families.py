"""Every shipped space under the conformance suite of families."""

from __future__ import annotations

import pytest

from deploy.conformance import FamilySuite
from supernet.space import Space, load_space


class TestDigits(FamilySuite):
    space = load_space("digits")


@pytest.mark.nightly
class TestCifarMBConv(FamilySuite):
    space = load_space("cifar-mbconv")


@pytest.mark.nightly
class TestPhotoMBConv(FamilySuite):
    space = load_space("photo-mbconv")
    image_size = 48


@pytest.mark.slow
class TestOdd(FamilySuite):
    """What the shipped spaces do not have: odd sizes, a stride of 3, kernels up to 7, single choices, widths no multiple of 8."""

    space = Space.from_definition({
        "format": 1, "name": "odd", "family": "mbconv", "classes": 3, "in_channels": 3, "resolution": [15, 17, 23],
        "stem": {"width": [6, 10], "stride": 1},
        "stages": [
            {"width": [10], "depth": [1], "kernel_size": [1, 3, 7], "expand_ratio": [1, 2], "stride": 3},
            {"width": [10, 13], "depth": [1, 4], "kernel_size": [5], "expand_ratio": [3], "stride": 2, "squeeze_excite": True},
        ],
        "head": {"expand_ratio": 1, "width": [20]},
    })  # fmt: skip


@pytest.mark.nightly
class TestAttentiveNAS(FamilySuite):
    space = load_space("attentivenas")
    image_size = 48
