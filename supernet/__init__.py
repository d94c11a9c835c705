"""The shared weights: spaces, archs, blocks, children, data, training.

Public names are loaded when they are first used, so that importing this package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from supernet.arch import Arch as Arch
    from supernet.costs import Costs as Costs
    from supernet.costs import arch_costs as arch_costs
    from supernet.errors import InputError as InputError
    from supernet.model import Supernet as Supernet
    from supernet.space import Space as Space
    from supernet.space import load_space as load_space

_HOMES = {
    "Arch": "arch",
    "Costs": "costs",
    "InputError": "errors",
    "Space": "space",
    "Supernet": "model",
    "arch_costs": "costs",
    "load_space": "space",
}

__all__ = ["Arch", "Costs", "InputError", "Space", "Supernet", "arch_costs", "load_space"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"supernet.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'supernet' has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
