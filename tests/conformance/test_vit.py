"""Spaces of the family vit under the conformance suite of families."""

from __future__ import annotations

import pytest

from deploy.conformance import FamilySuite
from supernet.space import Space, load_space


@pytest.mark.slow
class TestTiny(FamilySuite):
    """What the shipped spaces have not: class token and several grids, choices of both kinds, no bias, widths no multiple of 8."""

    fvcore_children = 5
    space = Space.from_definition({
        "format": 1, "name": "tiny-vit", "family": "vit", "classes": 3, "in_channels": 2, "resolution": [4, 6, 10],
        "patch_size": 2, "embed_dim": [7, 10], "depth": [1, 2, 3], "heads": [1, 3], "mlp_ratio": [0.5, 1.3],
        "chosen_per": {"heads": "block", "mlp_ratio": "network"}, "head_dim": 5, "qkv_bias": False, "pool": "token",
    })  # fmt: skip


@pytest.mark.nightly
class TestCifarViT(FamilySuite):
    space = load_space("cifar-vit")


@pytest.mark.nightly
class TestViTTiny(FamilySuite):
    """A space of one child."""

    space = load_space("vit-tiny")


@pytest.mark.nightly
class TestAutoFormerTiny(FamilySuite):
    space = load_space("autoformer-tiny")


@pytest.mark.nightly
class TestAutoFormerSmall(FamilySuite):
    space = load_space("autoformer-small")


@pytest.mark.nightly
class TestAutoFormerBase(FamilySuite):
    space = load_space("autoformer-base")
