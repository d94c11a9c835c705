"""A budget: a bound on one cost of a child, written as text such as "latency_ms@pi4<=8", "macs<=300M" or "params>=1M"."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal

from supernet.config import nearest
from supernet.errors import InputError

_COUNTS: Mapping[str, int] = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}
_BYTES: Mapping[str, int] = {"KiB": 2**10, "MiB": 2**20, **_COUNTS}

METRICS: Mapping[str, Mapping[str, int]] = {
    "latency_ms": {"": 1},
    "macs": _COUNTS,
    "params": _COUNTS,
    "peak_memory_bytes": _BYTES,
    "model_size_bytes": _BYTES,
    "resident_bytes": _BYTES,
    "load_ms": {"": 1},
    "first_ms": {"": 1},
    "images_per_s": _COUNTS,
}
"""Metric -> the suffixes that its bound may carry and what each stands for; of equally short texts the first is written."""

WEIGHED = ("resident_bytes", "load_ms", "first_ms", "images_per_s")
"""What a process that runs the child holds at most, the time to load it and of its first inference, its throughput: no model tells."""
MEASURED = ("latency_ms", *WEIGHED)
"""Metrics that depend on a target; all others follow from the arch."""

_PARTS = re.compile(r"([^<>=≤≥]*)([<>=≤≥]{1,3})(.*)", re.DOTALL)
_NUMBER = re.compile(r"([+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z]*)")
_TARGET = re.compile(r"[A-Za-z0-9._-]{1,60}")
_LONGEST = 120  # characters; a budget is short, and the messages quote what was given
_HOW = 'a budget is written metric<=number, metric>=number or metric@target<=number, for example "latency_ms<=8"'


@dataclass(frozen=True, slots=True)
class Budget:
    """`metric <= bound`, or `metric >= bound` where `lower`; of one target, where a measured metric names it (None: the default one).

    The bound is positive and finite, in the unit of the metric's name (macs and params are counts). Raises `InputError` for an
    unknown metric, a bound that is no positive finite number, a target's name that is none, or a target of a metric without one.
    """

    metric: str
    bound: float
    target: str | None = None
    lower: bool = False

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            hint = nearest(self.metric, list(METRICS))
            raise InputError(f"a budget bounds one of {', '.join(METRICS)}, but got {_quoted(self.metric)}{hint}")
        if self.target is not None and self.metric not in MEASURED:
            raise InputError(f"{self.metric} is the same on every target, only {', '.join(MEASURED)} are of one: leave out "
                             f"{_quoted('@' + self.target)}")  # fmt: skip
        if self.target is not None and not _TARGET.fullmatch(self.target):
            raise InputError("a target's name is 1 to 60 letters, digits, dots, underscores and hyphens, but is "
                             f"{_quoted(self.target)}: write for example latency_ms@pi4<=8")  # fmt: skip
        if not (math.isfinite(self.bound) and self.bound > 0):
            raise InputError(f"the bound of {self.metric} must be a positive finite number, but is {self.bound}")

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read "metric<=number" or "metric>=number"; a measured metric may name a target ("latency_ms@pi4<=8").

        Spaces around the parts are allowed, and a suffix where `METRICS` knows one ("macs<=8M"). Raises `InputError` that says what is
        wrong with the text and how it is written.
        """
        parts = _PARTS.fullmatch(text) if len(text) <= _LONGEST else None
        if parts is None:
            raise InputError(f"{_HOW}, but got {_quoted(text)}")
        column, operator, bound = (part.strip() for part in parts.groups())
        if operator not in {"<=", ">="}:
            raise InputError(f"a budget is an upper or a lower bound: write <= or >= in place of {operator} in {_quoted(text)}")
        metric, at, target = (part.strip() for part in column.partition("@"))
        number = _bound(metric, bound) if metric in METRICS else math.nan  # else the constructor names the metrics
        return cls(metric, number, target if at else None, operator == ">=")

    @property
    def column(self) -> str:
        """Name of the cost that is bounded: the metric, or "latency_ms@pi4" where a target is named."""
        return self.metric if self.target is None else f"{self.metric}@{self.target}"

    def holds(self, value: float) -> bool:
        """Whether a child that costs `value` keeps the budget; a NaN does not."""
        return value >= self.bound if self.lower else value <= self.bound

    def holds_interval(self, low: float, high: float) -> bool:
        """Whether a child that costs between `low` and `high` keeps the budget wherever between them it lies."""
        return low <= high and self.holds(low if self.lower else high)

    def __str__(self) -> str:
        """Give the shortest text that `parse` reads back as the same budget."""
        texts = [f"{_shortest(self.bound / factor)}{suffix}" for suffix, factor in METRICS[self.metric].items()]
        exact = [text for text in texts if _is_exactly(self.metric, text, self.bound)]
        return f"{self.column}{'>=' if self.lower else '<='}{min(exact, key=len)}"


def parse_all(texts: Sequence[str]) -> tuple[Budget, ...]:
    """Budgets in the order given; one upper and one lower bound of a metric (on a target).

    Raises `InputError` for a text that is no budget, for two bounds of the same kind, and where a lower bound lies above the upper.
    """
    budgets: dict[tuple[str, bool], Budget] = {}
    for text in texts:
        budget = Budget.parse(text)
        same, other = budgets.get((budget.column, budget.lower)), budgets.get((budget.column, not budget.lower))
        if same is not None:
            kind, keep = ("lower", "larger") if budget.lower else ("upper", "smaller")
            raise InputError(
                f"a metric has one {kind} bound, but {budget.column} has two ({same} and {budget}): keep the {keep} one"
            )
        if other is not None and (budget.bound > other.bound if budget.lower else budget.bound < other.bound):
            least, most = (budget, other) if budget.lower else (other, budget)
            raise InputError(f"the lower bound of {budget.column} lies above the upper one ({least} and {most}), so no child meets "
                             "both: exchange or widen them")  # fmt: skip
        budgets[budget.column, budget.lower] = budget
    return tuple(budgets.values())


def parse_set(text: str) -> tuple[Budget, ...]:
    """Budgets that one child shall meet at once, with commas between them: "macs<=50M, params<=2M".

    Raises `InputError` as `parse_all` does, and where a part is empty.
    """
    return parse_all(text.split(","))


def foretold(budgets: Sequence[Budget]) -> tuple[Budget, ...]:
    """Those of costs that are known of any arch, counted or by a latency model, before it is measured."""
    return tuple(budget for budget in budgets if budget.metric not in WEIGHED)


def _bound(metric: str, text: str) -> float:
    """Multiply the number in front of the suffix by what the suffix stands for."""
    match = _NUMBER.fullmatch(text)
    if match is None:
        raise InputError(f"the bound of {metric} must be a positive finite number, but is {_quoted(text)}")
    number, suffix = match.groups()
    factors = METRICS[metric]
    if suffix not in factors:
        known = f"one of {', '.join(filter(None, factors))} or nothing" if len(factors) > 1 else "nothing"
        raise InputError(f"after the number of {metric} stands {known}, but got {_quoted(suffix)} in {_quoted(text)}")
    if not math.isfinite(float(number)):
        raise InputError(f"the bound of {metric} must be a positive finite number, but is {_quoted(text)}")
    return float(Decimal(number) * factors[suffix]) if float(number) else 0.0  # in decimals: 2.3K is 2300, not 2299.99...


def _is_exactly(metric: str, text: str, bound: float) -> bool:
    """Whether `text` reads as `bound`. Tiny and huge numbers divided by a suffix may not."""
    try:
        return _bound(metric, text) == bound
    except InputError:
        return False


def _shortest(number: float) -> str:
    """Write a float as its shortest decimal text: 8 and not 8.0, 1e+22 as it is."""
    return repr(number).removesuffix(".0")


def _quoted(text: str) -> str:
    """`text` as a Python literal (one line), cut where it is long."""
    return repr(text if len(text) <= _LONGEST else text[:_LONGEST] + "...")
