"""Where a choice is made: once for the network, per stage, or per block. What the families of staged networks share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from supernet.arch import Choice

Level = Literal["network", "stage", "block"]
"""How far one choice reaches."""


def dimension_name(part: str, level: Level, stage: int, block: int = 0) -> str:
    """Name of the dimension that chooses `part`: `kernel_size`, `stage2.kernel_size` or `stage2_1.kernel_size`.

    Stages count from 1, blocks within a stage from 0, as their slots' names do.
    """
    return {"network": part, "stage": f"stage{stage}.{part}", "block": f"stage{stage}_{block}.{part}"}[level]


def shared(part: str, offered: Sequence[tuple[Choice, ...]]) -> tuple[Choice, ...]:
    """What the one dimension of the whole network offers: the list that all places offer, but for those with one fixed choice.

    Places are stages (for some parts also stem and head). Empty where every place is fixed. Raises `ValueError` where lists differ.
    """
    lists = list(dict.fromkeys(choices for choices in offered if len(choices) > 1))
    if len(lists) > 1:
        raise ValueError(
            f"{part} is chosen per network, so all lists of it must be equal or hold one choice, but two are {list(lists[0])} and "
            f"{list(lists[1])}: make them equal, or choose it per stage"
        )
    return lists[0] if lists else ()
