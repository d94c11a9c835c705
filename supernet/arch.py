"""An arch: one child of a space, as a frozen value."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass

Choice = int | float | str | bool
"""What a dimension offers: a JSON scalar."""


@dataclass(frozen=True, slots=True)
class Arch:
    """A choice for every dimension of a space, in the space's order. Made by `Space.arch`, which checks it."""

    choices: tuple[tuple[str, Choice], ...]

    def __getitem__(self, dimension: str) -> Choice:
        for name, choice in self.choices:
            if name == dimension:
                return choice
        raise KeyError(dimension)

    def __iter__(self) -> Iterator[tuple[str, Choice]]:
        return iter(self.choices)

    def as_dict(self) -> dict[str, Choice]:
        """Dimension name -> choice; what the JSON files hold."""
        return dict(self.choices)

    def to_json(self) -> str:
        """Canonical JSON: sorted names, no spaces. Equal archs have equal text."""
        return json.dumps(self.as_dict(), sort_keys=True, separators=(",", ":"))

    @property
    def key(self) -> str:
        """12 hexadecimal digits of the canonical JSON's SHA-256; names files and rows."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:12]
