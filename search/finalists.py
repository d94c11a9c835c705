"""The last round: finalists are exported, measured on the target and confirmed on images that the search never saw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from deploy.export import to_onnx
from deploy.targets import Latency, Model, Target
from search.budget import Budget
from search.store import Confirmed, Measurement, Store
from supernet.arch import Arch
from supernet.evaluate import Evaluator
from supernet.run import Run
from supernet.task import Scores


@dataclass(frozen=True)
class Bench:
    """Measures and confirms children of a run; what the store has is not done again."""

    run: Run
    evaluator: Evaluator
    store: Store
    target: Target

    def measure(self, archs: Sequence[Arch]) -> dict[str, Latency]:
        """Latency of the really exported children, all timed in turn in one go; key -> latency."""
        fingerprint = self.target.fingerprint()
        name = f"{self.target.name}:{fingerprint['hash']}"
        known = {row.key: row for row in self.store.measurements() if row.target == name}
        todo = [arch for arch in dict.fromkeys(archs) if arch.key not in known]
        if todo:
            timings = self.target.measure([self._exported(arch) for arch in todo])
            rows = [
                Measurement(arch.key, name, timing.median_ms, timing.low_ms, timing.high_ms,
                            {"fingerprint": fingerprint, "samples": timing.samples, "stable": timing.stable, "p95_ms": timing.p95_ms,
                             "wall_median_ms": timing.wall_median_ms, "clock": timing.clock})
                for arch, timing in zip(todo, timings, strict=True)
            ]  # fmt: skip
            self.store.add_measurements(rows)
            known |= {row.key: row for row in rows}
        return {
            arch.key: Latency(
                self.target.name, row.latency_ms, row.latency_ms_low, row.latency_ms_high, fingerprint, row.created[:10]
            )
            for arch in archs
            for row in [known[arch.key]]
        }

    def confirm(self, archs: Sequence[Arch]) -> dict[str, Scores]:
        """Scores on the confirm split, key -> shape (images,)."""
        task, split = self.run.task, self.run.dataset.split("confirm")
        known = {row.key: task.unpack(row.scores, row.images) for row in self.store.confirmed()}
        for arch in archs:
            if arch.key not in known:
                scores = self.evaluator.evaluate(arch, split)
                self.store.add_confirmed([Confirmed(arch.key, task.pack(scores), task.estimate(scores).value, len(scores))])
                known[arch.key] = scores
        return {arch.key: known[arch.key] for arch in archs}

    def _exported(self, arch: Arch) -> Model:
        space = self.run.space
        model = to_onnx(self.evaluator.calibrated(arch), channels=space.family.in_channels, resolution=space.resolution(arch))
        return Model(model.SerializeToString(), space.family.in_channels, space.resolution(arch))


def meets(budgets: Sequence[Budget], costs: dict[str, float], latency: Latency) -> bool:
    """Whether a measured child meets every budget; a latency counts with the upper end of its interval."""
    return all(budget.holds(latency.high if budget.metric == "latency_ms" else costs[budget.metric]) for budget in budgets)


def pooled(search_scores: Scores, confirm_scores: Scores) -> float:
    """Mean score over both splits. Finalists lead on search-val partly by luck; the confirm images are fresh."""
    return float(np.concatenate([search_scores, confirm_scores]).mean(dtype=np.float64))
