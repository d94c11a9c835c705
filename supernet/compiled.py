"""Children of fixed archs compiled by `torch.compile`; all others as they are.

In every step the largest and the smallest child come again with the same shapes, so compiling them once serves the whole run. Random
children would each be compiled for a single step, so they never are.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from supernet.arch import Arch
from supernet.errors import InputError
from supernet.model import Supernet


@dataclass(frozen=True, slots=True)
class _Compiled:
    blocks: tuple[nn.Module, ...]
    """Those that were compiled. As long as its bindings hold, a supernet gives the same ones again."""
    network: Callable[[Tensor], Tensor]

    def holds(self, child: nn.Sequential) -> bool:
        return all(mine is its for mine, its in zip(self.blocks, child, strict=True))


class CompiledChildren:
    """Gives the children of `supernet` as `Supernet.child` does, with its arguments: those of `archs` compiled.

    Compilation takes place at the first call of such a child (seconds to minutes), once for every arch, shape of the images and set
    of arguments; again, where the supernet's storage moved in between (`.to()`, `load_state_dict(assign=True)`). Gradients land in the
    supernet as ever. They differ from those without compilation by rounding, and dropout draws other numbers from the same generator.

    `archs` are the largest and the smallest where not given; `backend` and `options` go to `torch.compile`. Raises `InputError` for
    an arch that is not of the space.
    """

    def __init__(
        self,
        supernet: Supernet,
        archs: Sequence[Arch] | None = None,
        *,
        backend: str | Callable[..., Any] = "inductor",
        **options: Any,
    ) -> None:
        ends = (supernet.space.largest, supernet.space.smallest)
        self.supernet, self.archs = supernet, frozenset(ends if archs is None else archs)
        for arch in self.archs:
            if not supernet.space.contains(arch):
                raise InputError(
                    f"compiled children are archs of the space {supernet.space.name}, but got {arch}: choose another"
                )
        self._options: dict[str, Any] = {"backend": backend, "dynamic": False, **options}
        self._compiled: dict[Hashable, _Compiled] = {}

    def __call__(self, arch: Arch, **purpose: Any) -> Callable[[Tensor], Tensor]:
        """The child of `arch`; `purpose` are the arguments of `Supernet.child`."""
        child = self.supernet.child(arch, **purpose)
        if arch not in self.archs:
            return child
        key = (arch, tuple(sorted(purpose.items())))
        known = self._compiled.get(key)
        if known is None or not known.holds(child):
            known = self._compiled[key] = _Compiled(tuple(child), torch.compile(child, **self._options))
        return known.network
