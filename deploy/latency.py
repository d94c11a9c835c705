"""A latency model of a space on a target: what every block takes, few whole children, and an error proven on children held out.

The latency of a child is a sum over its blocks: so much of what each block took when it was timed alone, so much for each node, and,
where it helps, so much for what its operators compute and move. The coefficients are fitted to whole children (`deploy/fit.py`); the
error is that on others. As with costs (`supernet/costs.py`) a million archs are predicted in a second. `deploy/profiling.py` measures.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploy.fit import BASE
from deploy.targets import Target, differing
from supernet import durable
from supernet.arch import Arch
from supernet.costs import Costs
from supernet.errors import InputError
from supernet.family import BlockSpec, Codes, block_cost, variants
from supernet.space import Space

FORMAT = 2
GATE = 0.05
"""Mean error on held-out children beyond which a model is not trusted: what matters is then measured directly."""
COVERAGE = 0.9
"""Chance that a child's latency lies within the predicted interval."""
MOST_BLOCKS = 4_000
"""Blocks of a space that are all timed; a space of more is modelled by its operators."""

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Whole:
    """A whole child that was timed, in ms; `predicted_ms` by a model that was not fitted to it."""

    choices: Mapping[str, Any]
    key: str
    predicted_ms: float
    latency_ms: float
    low_ms: float
    high_ms: float
    stable: bool


@dataclass(frozen=True)
class LatencyModel:
    """Predicts latency in ms at batch 1 on one target."""

    space_key: str
    target: Mapping[str, Any]
    """Fingerprint of the device: processor, runtime, threads, precision."""
    date: str
    coefficients: Mapping[str, float]
    """Of "constant", "block_ms" (the sum of the table), "nodes", "blocks", "macs" and operators' features (`Costs.feature_names`)."""
    blocks: Mapping[str, float]
    """What each block took alone, in ms, by `signature`; empty where the space has too many."""
    fitted: tuple[Whole, ...]
    """Smallest and largest child first."""
    held_out: tuple[Whole, ...]
    drift: float
    """How much slower the device was at its slowest than at its fastest while it was measured, a ratio."""
    minutes: float

    @property
    def mape(self) -> float:
        """Mean absolute relative error on held-out children, a fraction."""
        return float(np.mean(np.abs(self._ratios - 1)))

    @property
    def worst(self) -> float:
        """Largest relative error on a held-out child, a fraction."""
        return float(np.max(np.abs(self._ratios - 1)))

    @property
    def spearman(self) -> float:
        """Rank correlation of predicted and measured latencies of held-out children; 0 where it is not defined."""
        from scipy.stats import spearmanr

        if len(self.held_out) < 3 or min(np.ptp(self._predicted), np.ptp(self._measured)) == 0:
            return 0.0
        return float(spearmanr(self._predicted, self._measured).statistic)

    @property
    def spread(self) -> float:
        """Median width of the measured children's intervals (`Timing.high_ms`), a part of the latency."""
        return float(np.median([(child.high_ms - child.low_ms) / child.latency_ms for child in (*self.fitted, *self.held_out)]))

    @property
    def trusted(self) -> bool:
        """Whether the error is within the gate."""
        return self.mape <= GATE

    @cached_property
    def upper_factor(self) -> float:
        """A latency is at most this times the prediction, at `COVERAGE` for both ends together.

        Split conformal prediction (Vovk et al. 2005; Lei et al. 2018) of the logarithm of measured over predicted: it holds whatever
        the errors' distribution, for children like those held out.
        """
        errors = np.sort(np.abs(np.log(self._ratios)))
        rank = math.ceil((len(errors) + 1) * COVERAGE)
        return float(np.exp(errors[min(rank, len(errors)) - 1]))

    @property
    def lower_factor(self) -> float:
        """A latency is at least this times the prediction."""
        return 1 / self.upper_factor

    @property
    def smallest_ms(self) -> float:
        """Upper end of the measured latency of the smallest child."""
        return self.fitted[0].high_ms

    @property
    def largest_ms(self) -> float:
        """Upper end of the measured latency of the largest child; in a space of one arch that is the smallest."""
        return self.fitted[min(1, len(self.fitted) - 1)].high_ms

    def on(self, costs: Costs) -> Callable[[Codes], Floats]:
        """A function from codes, shape (archs, dimensions), to predicted latencies in ms, shape (archs,)."""
        summed, constant = costs.summed(self._value), self.coefficients["constant"]
        return lambda codes: np.maximum(constant + summed(codes), 1e-6)

    def predict(self, space: Space, arch: Arch) -> float:
        """Predicted latency of one arch in ms."""
        return max(1e-6, self.coefficients["constant"] + sum(self._value(spec) for spec in space.plan(arch).values()))

    def corrected(self, space: Space, measured: Mapping[Arch, tuple[float, float, float]]) -> LatencyModel:
        """This model moved to children that were measured since (latency and its ends, ms): their median error is taken out of it.

        One factor only: few children near one budget say nothing of the rest. The held-out errors are then those of the moved model.
        """
        ratios = [latency / self.predict(space, arch) for arch, (latency, _, _) in measured.items()]
        if not ratios:
            return self
        factor = float(np.exp(np.median(np.log(ratios)) * len(ratios) / (len(ratios) + 1)))
        moved = {name: factor * value for name, value in self.coefficients.items()}
        held = tuple(replace(child, predicted_ms=factor * child.predicted_ms) for child in self.held_out)
        return replace(self, coefficients=moved, held_out=held)

    def suspect(self, space: Space) -> str:
        """Of which operators the held-out children have more that are slower, or faster, than predicted; in words."""
        from scipy.stats import spearmanr

        costs = Costs(space)
        features = costs.features(space.encode([space.arch(dict(child.choices), "held out") for child in self.held_out]))
        strongest = (0.0, "")
        for column, name in enumerate(costs.feature_names):
            part = features[:, column] / np.maximum(self._predicted, 1e-9)
            if np.ptp(part) > 0 and np.ptp(self._ratios) > 0:
                strongest = max(
                    strongest, (float(spearmanr(part, self._ratios).statistic), name), key=lambda each: abs(each[0])
                )
        if not strongest[1]:
            return "no family of operators stands out"
        way = "slower" if strongest[0] > 0 else "faster"
        return f"children with more {strongest[1].replace('.', ' ')} are {way} than predicted (rank correlation {strongest[0]:.2f})"

    def summary(self) -> str:
        """The error in words."""
        made = f"{len(self.blocks)} blocks and {len(self.fitted)}" if self.blocks else f"{len(self.fitted)}"
        return (
            f"latency model of {made} whole children; on {len(self.held_out)} held-out children the mean error is {self.mape:.1%}, the "
            f"worst {self.worst:.1%}, rank correlation {self.spearman:.3f}"
        )

    def save(self, path: Path) -> None:
        """Write the model as JSON."""
        value = {"format": FORMAT, **{name: getattr(self, name) for name in self.__dataclass_fields__}}
        for part in ("fitted", "held_out"):
            value[part] = [{name: getattr(child, name) for name in Whole.__slots__} for child in value[part]]
        told = {name: getattr(self, name) for name in ("mape", "worst", "spearman", "spread", "upper_factor")}
        durable.write_json(path, {**value, "error": told})

    @classmethod
    def load(cls, path: Path, space: Space, target: Target | Mapping[str, Any] | None) -> LatencyModel:
        """Read a model. Raises `InputError` where it is damaged, or of another space or target (None: whatever target it is of).

        `target` may be a fingerprint, where the device itself is not at hand.
        """
        remedy = "move it away, then measure again"
        try:
            value = json.loads(path.read_text())
            if value.pop("format") != FORMAT:
                raise InputError(f"{path} has another format than {FORMAT}: {remedy}")
            value.pop("error")
            parts = {part: tuple(Whole(**child) for child in value[part]) for part in ("fitted", "held_out")}
            model = cls(**{**value, **parts})
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{path} cannot be read as a latency model ({error}): {remedy}") from error
        if not model._whole(space):
            raise InputError(f"{path} does not hold what a latency model of this space and version holds: {remedy}")
        model._refuse_other(path, space, target)
        return model

    def _refuse_other(self, path: Path, space: Space, target: Target | Mapping[str, Any] | None) -> None:
        if self.space_key != space.key:
            raise InputError(f"{path} was measured for another space ({self.space_key}, this is {space.name}): give that one's")
        here = target if isinstance(target, Mapping) or target is None else target.fingerprint()
        if here is not None and dict(self.target) != dict(here):
            raise InputError(f"{path} was measured elsewhere: {differing(self.target, here)}: measure here again")

    def _whole(self, space: Space) -> bool:
        """Whether every number is one, and none is missing."""
        children: Any = (*self.fitted, *self.held_out)  # of a file, so of any kind
        if not self.fitted or not self.held_out or not isinstance(self.target, dict):
            return False
        maps = (self.coefficients, self.blocks, *(child.choices for child in children))
        if not all(isinstance(each, dict) for each in maps) or not all(isinstance(child.key, str) for child in children):
            return False
        times = [getattr(child, name) for child in children for name in ("predicted_ms", "latency_ms", "low_ms", "high_ms")]
        positive = [*times, *self.blocks.values(), self.drift]
        numbers = [*positive, *self.coefficients.values(), self.minutes]
        if not all(type(number) in (int, float) and math.isfinite(number) for number in numbers) or min(positive) <= 0:
            return False
        known = {*BASE, "macs", *Costs(space).feature_names} if self.space_key == space.key else None
        return "constant" in self.coefficients and (known is None or self._fits(space, known))

    def _fits(self, space: Space, known: set[str]) -> bool:
        table = signatures(space) if self.blocks else {}
        return self.coefficients.keys() <= known and (
            not self.blocks or (table is not None and table.keys() <= self.blocks.keys())
        )

    def _value(self, spec: BlockSpec) -> float:
        """What a block adds, in ms."""
        features = ingredients(spec)
        block = self.coefficients.get("block_ms", 0.0)
        found = block * self.blocks[signature(spec)] if block else 0.0
        return found + sum(self.coefficients.get(name, 0.0) * value for name, value in features.items())

    @cached_property
    def _predicted(self) -> Floats:
        return np.array([child.predicted_ms for child in self.held_out])

    @cached_property
    def _measured(self) -> Floats:
        return np.array([child.latency_ms for child in self.held_out])

    @property
    def _ratios(self) -> Floats:
        return np.asarray(self._measured / self._predicted)


def signature(spec: BlockSpec) -> str:
    """A block's geometry and input size as a text: blocks of one signature take as long, wherever they stand."""
    return repr(spec)


def ingredients(spec: BlockSpec) -> dict[str, float]:
    """What a block has beside its own time: the number of nodes, its macs, and its operators' features."""
    features = dict(block_cost(spec).features)
    sums = {"nodes": ".count", "macs": ".macs"}
    totals = {total: float(sum(value for name, value in features.items() if name.endswith(end))) for total, end in sums.items()}
    return {"blocks": 1.0, **totals, **features}


def signatures(space: Space) -> dict[str, BlockSpec] | None:
    """Every distinct block of a space, by `signature`; None where there are more than `MOST_BLOCKS`."""
    found: dict[str, BlockSpec] = {}
    for spec in _blocks(space):
        if spec is None or len(found) > MOST_BLOCKS:
            return None
        found.setdefault(signature(spec), spec)
    return found


def _blocks(space: Space) -> Iterator[BlockSpec | None]:
    """Blocks of all slots; None where a slot has too many to list."""
    for slot in space.family.slots:
        if math.prod(len(space.by_name[name].choices) for name in slot.dimensions) > 5 * MOST_BLOCKS:
            yield None
            return
        yield from (spec for _, spec in variants(slot, space.by_name, space.family) if spec is not None)
