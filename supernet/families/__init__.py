"""The families of networks. A new one is one file here and one line in `FAMILIES`, or an entry point of another package."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from supernet.errors import InputError
from supernet.families import autoencoder, cell, mbconv, mlp, resnet, vit
from supernet.family import Family, FamilyConfig

ENTRY_POINTS = "nestling.families"
"""Group of entry points under which an installed package offers families: `name = "its_module:KIND"`."""


@dataclass(frozen=True, slots=True)
class FamilyKind:
    """How a space's YAML becomes a family: the model that checks it, and the constructor that takes the checked model."""

    config: type[FamilyConfig]
    make: Callable[[Any], Family]


FAMILIES: dict[str, FamilyKind] = {
    "autoencoder": FamilyKind(autoencoder.AutoencoderConfig, autoencoder.AutoencoderFamily),
    "cell": FamilyKind(cell.CellConfig, cell.CellFamily),
    "mbconv": FamilyKind(mbconv.MBConvConfig, mbconv.MBConvFamily),
    "resnet": FamilyKind(resnet.ResNetConfig, resnet.ResNetFamily),
    "vit": FamilyKind(vit.ViTConfig, vit.ViTFamily),
    "mlp": FamilyKind(mlp.MLPConfig, mlp.MLPFamily),
}
"""Name -> family. Code that is not installed as a package may add its own here before it loads a space."""


def families() -> dict[str, FamilyKind]:
    """Our own families, and those that installed packages offer. Raises `InputError` where one of these cannot be loaded."""
    return {**_installed(), **FAMILIES}


@cache
def _installed() -> dict[str, FamilyKind]:
    found = {}
    for point in entry_points(group=ENTRY_POINTS):
        try:
            kind = point.load()
        except Exception as error:
            raise InputError(
                f"the family {point.name!r} ({point.value}) cannot be loaded ({error}): repair or remove its package"
            ) from error
        if not isinstance(kind, FamilyKind):
            raise InputError(f"the family {point.name!r} ({point.value}) must be a FamilyKind, but is {type(kind).__name__}")
        found[point.name] = kind
    return found
