"""Which part of a stored parameter a child uses. Children (by view), extraction (by copy) and their tests all ask here."""

from __future__ import annotations

from collections.abc import Sequence


def part_of(whole: Sequence[int], part: Sequence[int]) -> tuple[slice, ...]:
    """Index of a `part`-shaped piece within a tensor of shape `whole`: leading channels, the central window of a kernel.

    The first two axes are channels (out, in); the others are space. Raises `ValueError` where no such piece exists.
    """
    if len(whole) != len(part) or any(small > big for small, big in zip(part, whole, strict=True)):
        raise ValueError(f"a part must fit into the whole axis by axis, but got part {tuple(part)} of {tuple(whole)}")
    channels = [slice(0, small) for small in part[:2]]
    window = [_central(big, small) for big, small in zip(whole[2:], part[2:], strict=True)]
    return (*channels, *window)


def _central(big: int, small: int) -> slice:
    if (big - small) % 2:
        raise ValueError(f"a kernel of {small} has no centre within {big}: use all odd or all even sizes")
    return slice((big - small) // 2, (big + small) // 2)
