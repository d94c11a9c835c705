"""Spaces of the family mlp under the conformance suite of families."""

from __future__ import annotations

from typing import Any

import pytest

from deploy.conformance import FamilySuite
from supernet.space import Space, load_space

TINY: dict[str, Any] = {
    "format": 1, "name": "tiny-mlp", "family": "mlp", "in_channels": 2, "classes": 3, "resolution": 5, "depth": [1, 3],
    "width": [6, 9, 11], "activation": ["relu", "swish"],
}  # fmt: skip


@pytest.mark.nightly
class TestMLP(FamilySuite):
    space = load_space("mlp")


@pytest.mark.slow
class TestPerBlock(FamilySuite):
    """Widths layer by layer, no multiples of 8, depth 2 left out."""

    fvcore_children = 5
    space = Space.from_definition({**TINY, "chosen_per": {"width": "block"}})


@pytest.mark.nightly
class TestPerNetwork(FamilySuite):
    space = Space.from_definition(TINY)
