"""Strategies propose archs and are told how good they were. They see no model, no device and no file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from supernet.arch import Arch


@dataclass(frozen=True, slots=True)
class Proposal:
    """An arch that a strategy wants to know more of, and the stage of the strategy that wants it."""

    arch: Arch
    stage: str


@dataclass(frozen=True, slots=True)
class Result:
    """What became of an arch: its score (larger is better), or None where it could not be evaluated.

    `decided` is False where the race ended early for it, being significantly worse than a rival of its cost: its score then rests on
    fewer `images`, and was made comparable by its paired difference to a child that was scored on all.
    """

    arch: Arch
    score: float | None
    images: int
    decided: bool = True


class Strategy(Protocol):
    """Ask and tell. Told the same, it asks the same; its `state`, loaded into a new one, makes it go on as if never stopped.

    Every ask is of distinct archs that are networks, meet the budgets and were not told before.
    """

    name: ClassVar[str]
    experimental: ClassVar[bool]

    def ask(self, count: int) -> list[Proposal]:
        """At most `count` archs to evaluate next, in an order in which neighbours share blocks; empty when it has no more."""
        ...

    def tell(self, results: Sequence[Result]) -> None:
        """What became of archs, whether it asked for them or another search did; one told again replaces what was told before."""
        ...

    def state(self) -> dict[str, Any]:
        """All that it remembers, as JSON values."""
        ...

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Remember what `state` gave. Raises `InputError` where it is of another strategy or space, or damaged."""
        ...

    def notes(self) -> list[str]:
        """Remarks for the report, such as why a predictor was not used."""
        ...
