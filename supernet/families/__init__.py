"""The families of networks. A new one is one file here and one line in `FAMILIES`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from supernet.families import mbconv
from supernet.family import Family, FamilyConfig


@dataclass(frozen=True, slots=True)
class FamilyKind:
    """How a space's YAML becomes a family: the model that checks it, and the constructor that takes the checked model."""

    config: type[FamilyConfig]
    make: Callable[[Any], Family]


FAMILIES: dict[str, FamilyKind] = {"mbconv": FamilyKind(mbconv.MBConvConfig, mbconv.MBConvFamily)}
