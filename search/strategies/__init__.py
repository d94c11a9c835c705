"""Strategies propose archs and are told how good they were. They see no model, no device and no file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from supernet.arch import Arch


class Strategy(Protocol):
    """Ask and tell. Deterministic: told the same, it asks the same, so a killed search is resumed by telling it everything again."""

    def ask(self) -> list[tuple[str, Arch]]:
        """The next archs to evaluate, each with the name of the stage that proposes it; empty when the strategy is done."""
        ...

    def tell(self, results: Sequence[tuple[Arch, float]]) -> None:
        """Scores (larger is better) of the archs last asked for."""
        ...
