"""Every shipped space under the conformance suite of families."""

from __future__ import annotations

import pytest

from supernet.space import load_space
from tests.conformance.family import FamilySuite


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
class TestAttentiveNAS(FamilySuite):
    space = load_space("attentivenas")
    image_size = 48
