"""Everything that a family must hold, tested over our own: `pytest test_vgg.py`."""

from pathlib import Path

import vgg  # noqa: F401  (makes the family known)

from deploy.conformance import FamilySuite
from supernet import load_space


class TestVGG(FamilySuite):
    space = load_space(str(Path(__file__).parent / "vgg.yaml"))
