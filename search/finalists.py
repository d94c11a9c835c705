"""The last round: finalists are exported, measured on the targets and confirmed on images that the search never saw."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from deploy import int8
from deploy.export import to_onnx
from deploy.formats import session
from deploy.gate import Images
from deploy.kit import Kit
from deploy.latency import LatencyModel
from deploy.targets import Latency, Model, Target
from search.budget import WEIGHED, Budget
from search.objective import Objective, objective_named
from search.records import Confirmed, Measurement
from search.statistics import compare, confidence_set, holm, shrunk
from search.store import Store
from search.weights import Scales, Spans, holds
from supernet.arch import Arch
from supernet.data.dataset import SplitImages
from supernet.evaluate import Evaluator
from supernet.run import Run
from supernet.samples import Samples, pack, unpack
from supernet.task import Estimate

Latencies = Mapping[str | None, Latency]
"""Name of the target (None: the one that is not named) -> a child's latency there."""
Weights = Mapping[str | None, Spans]
"""Likewise, what it weighs there."""


@dataclass(frozen=True)
class Bench:
    """Measures and confirms children of a run; what the store has is not done again."""

    run: Run
    evaluator: Evaluator
    store: Store
    targets: Mapping[str | None, Target]
    objective: Objective
    models: Mapping[str | None, LatencyModel]
    """What is known of the targets that nothing here reaches (kits)."""
    precision: str = "fp32"
    """int8: what is measured and confirmed is the quantised child."""
    _quantised: dict[Arch, onnx.ModelProto] = field(default_factory=dict)

    @property
    def _metric(self) -> Objective:
        """The task's own, whose mean is kept with a row whatever the search is for."""
        return objective_named(None, self.run.task)

    def measure(self, archs: Sequence[Arch]) -> dict[str, Latencies]:
        """Latencies of the really exported children on every target, all timed in turn in one go; by key."""
        each = {
            name: self._foretold(name, archs) if isinstance(target, Kit) else self._measured(target, archs)
            for name, target in self.targets.items()
            if name in self.models or not isinstance(target, Kit)
        }
        return {arch.key: {name: latencies[arch.key] for name, latencies in each.items()} for arch in archs}

    def weigh(self, archs: Sequence[Arch], names: Collection[str | None]) -> dict[str, Weights]:
        """What the really exported children weigh on the targets of these names that can run them; by key."""
        scales = Scales(self.run.space, self.store, self.targets)
        each = {name: scales.exported(name, archs, lambda arch: self._exported(arch).data) for name in names}
        return {arch.key: {name: weights[arch] for name, weights in each.items() if arch in weights} for arch in archs}

    def _foretold(self, name: str | None, archs: Sequence[Arch]) -> dict[str, Latency]:
        """Predictions, for a target that only a kit reaches; their intervals are the model's."""
        model, found = self.models[name], {}
        for arch in archs:
            ms = model.predict(self.run.space, arch)
            ends = ms * model.lower_factor, ms * model.upper_factor
            found[arch.key] = Latency(f"{self.targets[name].name}, predicted", ms, *ends, model.target, model.date)
        return found

    def _measured(self, target: Target, archs: Sequence[Arch]) -> dict[str, Latency]:
        fingerprint = target.fingerprint()
        name = f"{target.name}:{fingerprint['hash']}"
        known = {row.key: row for row in self.store.measurements() if row.target == name}
        todo = [arch for arch in dict.fromkeys(archs) if arch.key not in known]
        if todo:
            timings = target.measure([self._exported(arch) for arch in todo])
            rows = [
                Measurement(arch.key, name, timing.latency_ms, timing.low_ms, timing.high_ms,
                            {"fingerprint": fingerprint, "samples": timing.samples, "stable": timing.stable, "why": timing.why,
                             "p95_ms": timing.p95_ms,
                             "wall_median_ms": timing.wall_median_ms, "clock": timing.clock})
                for arch, timing in zip(todo, timings, strict=True)
            ]  # fmt: skip
            self.store.add_measurements(rows)
            known |= {row.key: row for row in rows}
        return {
            arch.key: Latency(
                target.name, row.latency_ms, row.latency_ms_low, row.latency_ms_high, fingerprint, row.created[:10]
            )
            for arch in archs
            for row in [known[arch.key]]
        }

    def confirm(self, archs: Sequence[Arch]) -> dict[Arch, NDArray[Any]]:
        """The objective's values on the confirm split, each of shape (images,)."""
        task, split = self.run.task, self.run.dataset.split("confirm")
        known = {row.key: row for row in self.store.confirmed()}
        found = {}
        for arch in archs:
            if arch.key in known:
                samples = unpack(known[arch.key].samples, known[arch.key].images, task.columns)
            else:
                samples = self._samples(arch, split)
            values = self.objective.values(samples, split.labels, len(self.run.classes))
            if arch.key not in known:
                score = float(self._metric.values(samples, split.labels, len(self.run.classes)).mean(dtype=np.float64))
                self.store.add_confirmed([Confirmed(arch.key, pack(samples, task.columns), score, len(split))])
            found[arch] = values
        return found

    def _samples(self, arch: Arch, split: SplitImages) -> Samples:
        """What a child does on every image of a split: in torch, or, quantised, in ONNX Runtime."""
        resolution = self.run.space.resolution(arch)
        if self.precision == "fp32":
            return self.evaluator.samples(self.evaluator.calibrated(arch), resolution, split)
        return Images(split, resolution, self.run.task).samples(session(self._exported(arch).data))

    def _exported(self, arch: Arch) -> Model:
        space, resolution = self.run.space, self.run.space.resolution(arch)
        if arch in self._quantised:
            model = self._quantised[arch]
        else:
            model = to_onnx(self.evaluator.calibrated(arch), channels=space.family.in_channels, resolution=resolution)
            if self.precision == "int8":
                batches, recipe = int8.calibration_batches(self.evaluator.train, resolution), int8.recipe_here()
                model = self._quantised[arch] = int8.Quantiser(model, batches, recipe)(int8.Attempt())
        return Model(model.SerializeToString(), space.family.in_channels, resolution)


def meets(budgets: Sequence[Budget], costs: Mapping[str, float], latencies: Latencies, weights: Weights | None = None) -> bool:
    """Whether a measured child meets every budget; what was measured counts with the worse end of its interval."""
    return all(
        holds(budget, (weights or {}).get(budget.target))
        if budget.metric in WEIGHED
        else budget.holds_interval(latencies[budget.target].low, latencies[budget.target].high)
        if budget.metric == "latency_ms"
        else budget.holds(costs[budget.metric])
        for budget in budgets
    )


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the confirm images say of the finalists: who is chosen, who cannot be told from the best, and how good each is."""

    chosen: Arch
    tied: tuple[Arch, ...]
    """The confidence set, at 95 %: the finalists that may be the best. The chosen one is the cheapest of them."""
    estimates: Mapping[Arch, Estimate]
    """Shrunken: what a finalist is to be expected to reach on other images (`search.statistics.shrunk`)."""
    p_values: Mapping[Arch, float]
    """Of "as good as the chosen one" on the confirm images, two-sided, adjusted by Holm over the finalists."""


def judge(finalists: Sequence[Arch], values: Mapping[Arch, NDArray[Any]], cost: Mapping[Arch, float], seed: int) -> Verdict:
    """Choose by values on fresh images, shape (images,) each: the cheapest of those that may be the best."""
    together = np.stack([values[arch] for arch in finalists])
    may_be_best = confidence_set(together, np.random.default_rng([seed, 11]))
    tied = [arch for arch, may in zip(finalists, may_be_best, strict=True) if may]
    chosen = min(tied, key=lambda arch: (cost[arch], -float(values[arch].mean())))
    others = [arch for arch in finalists if arch != chosen]
    adjusted = holm([compare(values[arch], values[chosen]).p_value for arch in others])
    estimates = dict(zip(finalists, shrunk(together), strict=True))
    return Verdict(chosen, tuple(tied), estimates, dict(zip(others, map(float, adjusted), strict=True)))
