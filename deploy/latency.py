"""A latency model of a space on a target: few whole children are measured, all others predicted, and the error is measured too.

Latency is modelled as a sum over operators: so much for each call, each multiply-accumulate and each number moved, by kind of
operator; the coefficients are fitted without negative values to relative errors. The features come from the same tables as the
costs (`supernet/costs.py`), so a million archs are predicted in a second.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from deploy.probe import probe
from deploy.targets import Model, Target
from supernet import durable
from supernet.costs import Costs
from supernet.errors import InputError
from supernet.family import Codes
from supernet.space import Space

FORMAT = 1
CHILDREN = 40
"""Whole children measured to fit a model."""
UPPER = 0.8
"""Quantile of the error that a prediction is raised by while searching. Finalists are measured: a miss costs one more export."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class LatencyModel:
    """Predicts latency in ms at batch 1 on one target. `error` is of children left out of the fit, one at a time."""

    space_key: str
    target: Mapping[str, Any]
    feature_names: tuple[str, ...]
    coefficients: tuple[float, ...]
    measured: tuple[tuple[str, float, float, float], ...]
    """Arch key, predicted (left out of the fit), measured, upper end of the measured interval; all in ms."""
    smallest_ms: float
    """Upper end of the measured latency of the smallest child."""
    largest_ms: float
    upper_factor: float
    """Latencies are at most this times the prediction for most (`UPPER`) left-out children."""

    @property
    def mape(self) -> float:
        """Mean absolute relative error on left-out children, a fraction."""
        return float(np.mean([abs(predicted / measured - 1) for _, predicted, measured, _ in self.measured]))

    @property
    def lower_factor(self) -> float:
        """Latencies are at least this times the prediction for most (`UPPER`) left-out children; it follows from `measured`."""
        ratios = [measured / predicted for _, predicted, measured, _ in self.measured if predicted > 0]
        return min(1.0, float(np.quantile(ratios, 1 - UPPER, method="lower"))) if ratios else 0.0

    def predict(self, features: Floats) -> Floats:
        """Latency in ms, shape (archs,), from `Costs.features`."""
        found: Floats = _design(features) @ np.array(self.coefficients)
        return found

    def to_json_dict(self) -> dict[str, Any]:
        """For the file."""
        return {"format": FORMAT, **{name: getattr(self, name) for name in self.__dataclass_fields__}, "mape": self.mape}

    def save(self, path: Path) -> None:
        """Write the model as JSON."""
        durable.write_json(path, self.to_json_dict())

    @classmethod
    def load(cls, path: Path, space: Space, target: Target | None) -> LatencyModel:
        """Read a model. Raises `InputError` where it is damaged, or of another space or target (None: whatever target it is of)."""
        try:
            value = json.loads(path.read_text())
            if value.pop("format") != FORMAT:
                raise InputError(f"{path} has another format than {FORMAT}: measure again (remove the file)")
            value.pop("mape")
            model = cls(**{**value, "feature_names": tuple(value["feature_names"]), "coefficients": tuple(value["coefficients"]),
                           "measured": tuple(tuple(row) for row in value["measured"])})  # fmt: skip
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"{path} cannot be read as a latency model ({error}): remove it, it is then measured again"
            ) from error
        if model.space_key != space.key or (target is not None and model.target != target.fingerprint()):
            raise InputError(f"{path} was measured for another space, machine, runtime or number of threads: remove it, it is then "
                             "measured again")  # fmt: skip
        if model.feature_names != Costs(space).feature_names or not model._whole():
            raise InputError(
                f"{path} does not hold what a latency model of this version holds: remove it, it is then measured again"
            )
        return model

    def _whole(self) -> bool:
        """Whether every number is one, and none is missing."""
        rows: Any = self.measured  # of a file, so of any kind
        if not rows or not all(len(row) == 4 and isinstance(row[0], str) for row in rows):
            return False
        bounds = [self.smallest_ms, self.largest_ms, self.upper_factor]
        numbers = [*self.coefficients, *bounds, *(number for row in rows for number in row[1:])]
        whole = all(type(number) in (int, float) and 0 <= number < math.inf for number in numbers)
        return whole and len(self.coefficients) == len(self.feature_names) + 1


def profile(
    space: Space, target: Target, *, children: int = CHILDREN, seed: int = 0, progress: Callable[[str], None] | None = None
) -> LatencyModel:
    """Measure smallest, largest and random children spread over the range of macs, and fit a model to them."""
    costs = Costs(space)
    codes = _spread(space, costs, children, np.random.default_rng([seed, 6]))
    archs = space.decode(codes)
    if progress:
        progress(f"timing {len(archs)} children on {target.name}")
    models = [Model(probe(space, arch), space.family.in_channels, space.resolution(arch)) for arch in archs]
    timings = target.measure(models)
    features, times = costs.features(codes), np.array([timing.median_ms for timing in timings])
    left_out = np.array([_leave_one_out(features, times, position) for position in range(len(times))])
    ratios = np.sort(times / left_out)
    return LatencyModel(
        space_key=space.key,
        target=target.fingerprint(),
        feature_names=costs.feature_names,
        coefficients=tuple(float(value) for value in _fit(features, times)),
        measured=tuple(
            (arch.key, float(guess), timing.median_ms, timing.high_ms)
            for arch, guess, timing in zip(archs, left_out, timings, strict=True)
        ),
        smallest_ms=timings[0].high_ms,
        largest_ms=timings[min(1, len(timings) - 1)].high_ms,  # in a space of one arch it is the smallest
        upper_factor=float(max(1.0, np.quantile(ratios, UPPER, method="higher"))),
    )


def _spread(space: Space, costs: Costs, count: int, rng: np.random.Generator) -> Codes:
    """Codes of smallest, largest and archs at even steps of the macs' logarithm, without repetition."""
    ends = space.encode([space.smallest, space.largest])
    pool = space.sample_codes(4096, rng)
    low, high = (float(value) for value in np.log(costs.macs(ends)))
    pool_macs = np.log(costs.macs(pool))
    chosen: list[int] = []
    for goal in np.linspace(low, high, count)[1:-1]:
        for position in np.argsort(abs(pool_macs - goal)):
            if position not in chosen:
                chosen.append(int(position))
                break
    return np.unique(np.concatenate([ends, pool[chosen]]), axis=0)[_ends_first(np.concatenate([ends, pool[chosen]]))]


def _ends_first(codes: Codes) -> NDArray[np.int64]:
    """Positions, among the sorted unique rows of `codes`, of its first two rows, then of all others."""
    unique, inverse = np.unique(codes, axis=0, return_inverse=True)
    first = list(dict.fromkeys(int(position) for position in inverse.ravel()))
    assert len(first) == len(unique)
    return np.array(first)


def _design(features: Floats) -> Floats:
    return np.column_stack([np.ones(len(features)), features])


def _fit(features: Floats, times: Floats) -> Floats:
    """Coefficients >= 0 that minimise the sum of squared relative errors."""
    design = _design(features) / times[:, None]
    scale = np.maximum(design.max(axis=0), 1e-30)
    found: Floats = nnls(design / scale, np.ones(len(times)))[0] / scale
    return found


def _leave_one_out(features: Floats, times: Floats, position: int) -> float:
    keep = np.arange(len(times)) != position
    if not keep.any():
        return float(times[position])
    return float((_design(features[position : position + 1]) @ _fit(features[keep], times[keep]))[0])
