"""What a search's file holds a row of: a child that was evaluated, its result on the confirm split, a latency measured, its weight."""

from __future__ import annotations

import dataclasses
import json
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, ClassVar, TypeVar


def now() -> str:
    """Give the time in UTC, ISO 8601, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


@dataclass(frozen=True, slots=True)
class Row:
    """A child evaluated on the first `images` of the search split, up to this `rung` of its race.

    `arch` is its canonical JSON, `stage` the strategy's that asked for it, `samples` what the task packed of every image, and `score`
    the value of the task's default metric on these images (larger is better). `macs_spent` and `seconds` are all that evaluating it
    took up to this rung.
    """

    TABLE: ClassVar[str] = "children"
    KEYS: ClassVar[tuple[str, ...]] = ("key",)
    CONFLICT: ClassVar[str] = "DO UPDATE SET {excluded} WHERE excluded.rung > children.rung"

    key: str
    arch: str
    stage: str
    rung: int
    samples: bytes
    images: int
    score: float
    costs: Mapping[str, float]
    macs_spent: float
    seconds: float
    created: str = dataclasses.field(default_factory=now)


@dataclass(frozen=True, slots=True)
class Confirmed:
    """A child's result on the confirm split; `samples` and `score` as a `Row`'s."""

    TABLE: ClassVar[str] = "confirmed"
    KEYS: ClassVar[tuple[str, ...]] = ("key",)
    CONFLICT: ClassVar[str] = "DO NOTHING"

    key: str
    samples: bytes
    score: float
    images: int


@dataclass(frozen=True, slots=True)
class Measurement:
    """A child's latency measured on a target: the estimate and the interval around it, milliseconds; `detail` is JSON."""

    TABLE: ClassVar[str] = "measurements"
    KEYS: ClassVar[tuple[str, ...]] = ("key", "target")
    CONFLICT: ClassVar[str] = "DO NOTHING"

    key: str
    target: str
    latency_ms: float
    latency_ms_low: float
    latency_ms_high: float
    detail: Mapping[str, Any]
    created: str = dataclasses.field(default_factory=now)


@dataclass(frozen=True, slots=True)
class Weighed:
    """What a child weighed on a target, at batch `batch`; `spans`: least, median and most of each metric of `search.budget.WEIGHED`."""

    TABLE: ClassVar[str] = "weights"
    KEYS: ClassVar[tuple[str, ...]] = ("key", "target", "batch")
    CONFLICT: ClassVar[str] = "DO NOTHING"

    key: str
    target: str
    batch: int
    spans: Mapping[str, Any]
    created: str = dataclasses.field(default_factory=now)


PROBE = "probe on "
"""Stands before a target's name where a child's probe was measured (`deploy.probe`), not its export."""

Record = TypeVar("Record", Row, Confirmed, Measurement, Weighed)

_COLUMN: Mapping[str, Callable[[Any], object]] = {
    "str": str,
    "bytes": bytes,
    "float": float,
    "int": operator.index,
    "Mapping[str, float]": lambda costs: json.dumps({name: float(cost) for name, cost in costs.items()}, allow_nan=False),
    "Mapping[str, Any]": lambda detail: json.dumps(detail, allow_nan=False),
}
"""Declared type of a field -> what SQLite is given (it would store a numpy integer as a blob of bytes)."""


def encoded(record: Row | Confirmed | Measurement | Weighed) -> tuple[object, ...]:
    """Give the values of a record's columns. Raises `ValueError` for NaN, which SQLite and JSON do not know."""
    values = tuple(_COLUMN[str(field.type)](getattr(record, field.name)) for field in dataclasses.fields(record))
    if any(isinstance(value, float) and math.isnan(value) for value in values):
        raise ValueError(f"a number of child {record.key} is NaN: leave a child that has no score out of the store")
    return values
