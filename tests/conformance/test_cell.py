"""Spaces of the family cell under the conformance suite of families."""

from __future__ import annotations

import pytest

from deploy.conformance import FamilySuite
from supernet.space import Space, load_space


@pytest.mark.nightly
class TestCell(FamilySuite):
    space = load_space("cell")


@pytest.mark.slow
class TestTiny(FamilySuite):
    """What the shipped space has not: 3 nodes, 2 stages, maps of 3 pixels, a stem without stride, widths no multiple of 8.

    No width below 8: there torch 2.14's weight gradient of a 1x1 convolution of stride 2 writes past its memory (docs/training.md).
    """

    fvcore_children = 5
    space = Space.from_definition({
        "format": 1, "name": "tiny-cell", "family": "cell", "in_channels": 1, "classes": 3, "resolution": [6, 10],
        "stem": {"width": [9, 11]}, "stages": 2, "depth": [1, 2], "nodes": 3, "head": {"width": 7},
    })  # fmt: skip


@pytest.mark.nightly
class TestFiveNodes(FamilySuite):
    """Ten edges in a cell, a stem that strides by 3; here some cells hold more memory than the teacher."""

    fvcore_children = 5
    space = Space.from_definition({
        "format": 1, "name": "five-nodes", "family": "cell", "in_channels": 2, "classes": 4, "resolution": [18, 24],
        "stem": {"width": [4, 6], "stride": 3}, "stages": 2, "depth": [2], "nodes": 5, "head": {"width": 9},
    })  # fmt: skip
