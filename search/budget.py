"""A budget: an upper bound on one cost of a child, written as text such as "latency_ms<=8" or "macs<=300M"."""

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
}
"""Metric -> the suffixes that its bound may carry and what each stands for; of equally short texts the first is written."""

_PARTS = re.compile(r"([^<>=≤≥]*)([<>=≤≥]{1,3})(.*)", re.DOTALL)
_NUMBER = re.compile(r"([+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z]*)")
_LONGEST = 100  # characters; a budget is short, and the messages quote what was given


@dataclass(frozen=True, slots=True)
class Budget:
    """`metric <= bound`. The bound is positive and finite, in the unit of the metric's name (macs and params are counts).

    Raises `InputError` for an unknown metric or a bound that is no positive finite number.
    """

    metric: str
    bound: float

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            hint = nearest(self.metric, list(METRICS))
            raise InputError(f"a budget bounds one of {', '.join(METRICS)}, but got {_quoted(self.metric)}{hint}")
        if not (math.isfinite(self.bound) and self.bound > 0):
            raise InputError(f"the bound of {self.metric} must be a positive finite number, but is {self.bound}")

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read "metric<=number"; spaces around the parts are allowed, and a suffix where `METRICS` knows one ("macs<=8M").

        Raises `InputError` that says what is wrong with the text and how it is written.
        """
        parts = _PARTS.fullmatch(text) if len(text) <= _LONGEST else None
        if parts is None:
            raise InputError(f'a budget is written metric<=number, for example "latency_ms<=8", but got {_quoted(text)}')
        metric, operator, bound = (part.strip() for part in parts.groups())
        if operator != "<=":
            raise InputError(f"a budget is an upper bound: write <= in place of {operator} in {_quoted(text)}")
        if metric in METRICS:
            return cls(metric, _bound(metric, bound))
        return cls(metric, math.nan)  # the constructor names the metrics

    def holds(self, value: float) -> bool:
        """Whether a child that costs `value` keeps the budget; a NaN does not."""
        return value <= self.bound

    def __str__(self) -> str:
        """Give the shortest text that `parse` reads back as the same budget."""
        texts = [f"{_shortest(self.bound / factor)}{suffix}" for suffix, factor in METRICS[self.metric].items()]
        exact = [text for text in texts if _is_exactly(self.metric, text, self.bound)]
        return f"{self.metric}<={min(exact, key=len)}"


def parse_all(texts: Sequence[str]) -> tuple[Budget, ...]:
    """Budgets in the order given, one a metric.

    Raises `InputError` for a text that is no budget and for two budgets of one metric.
    """
    budgets: dict[str, Budget] = {}
    for text in texts:
        budget = Budget.parse(text)
        if budget.metric in budgets:
            first = budgets[budget.metric]
            raise InputError(
                f"a metric has one budget, but {budget.metric} has two ({first} and {budget}): keep the smaller one"
            )
        budgets[budget.metric] = budget
    return tuple(budgets.values())


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
