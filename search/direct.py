"""What no model foretells is measured before a candidate is evaluated: latencies where the model is not trusted, and all weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from deploy.latency import LatencyModel
from deploy.probe import probe
from deploy.targets import Model, Target
from search.budget import WEIGHED, Budget
from search.records import PROBE, Measurement
from search.store import Store
from search.weights import Scales
from supernet.arch import Arch
from supernet.space import Space


@dataclass
class Direct:
    """Measures candidates on the targets that budgets name and no model foretells. What the store has is not measured again.

    What is timed is the child's probe, which has its operators (`deploy/probe.py`), so nothing is calibrated or exported for it.
    """

    space: Space
    store: Store
    budgets: Sequence[Budget]
    targets: Mapping[str | None, Target]
    models: Mapping[str | None, LatencyModel]
    _known: dict[tuple[str, str], Measurement] = field(default_factory=dict)

    @property
    def bounds(self) -> list[Budget]:
        """Of all budgets those that candidates are measured for."""
        timed = [b for b in self.budgets if b.metric == "latency_ms" and not self.models[b.target].trusted]
        return timed + [b for b in self.budgets if b.metric in WEIGHED]

    def refused(self, archs: Sequence[Arch]) -> dict[Arch, str]:
        """Archs that miss a budget when measured, and by how much."""
        found: dict[Arch, str] = {}
        for budget in self.bounds:
            if budget.metric in WEIGHED:
                found |= Scales(self.space, self.store, self.targets).too_heavy(budget, archs)
                continue
            times = self._times(self.targets[budget.target], archs)
            for arch in archs:
                row = times[arch]
                if not budget.holds_interval(row.latency_ms_low, row.latency_ms_high):
                    found[arch] = (
                        f"measured, it takes {row.latency_ms_low:.4g} to {row.latency_ms_high:.4g} ms, and misses {budget}"
                    )
        return found

    def _times(self, target: Target, archs: Sequence[Arch]) -> dict[Arch, Measurement]:
        fingerprint = target.fingerprint()
        name = f"{PROBE}{target.name}:{fingerprint['hash']}"
        if not self._known:
            self._known = {(row.key, row.target): row for row in self.store.measurements()}
        todo = [arch for arch in dict.fromkeys(archs) if (arch.key, name) not in self._known]
        if todo:
            channels = self.space.family.in_channels
            models = [Model(probe(self.space, arch, target.precision), channels, self.space.resolution(arch)) for arch in todo]
            rows = [
                Measurement(arch.key, name, timing.latency_ms, timing.low_ms, timing.high_ms,
                            {"fingerprint": fingerprint, "stable": timing.stable, "why": timing.why, "samples": timing.samples})
                for arch, timing in zip(todo, target.measure(models), strict=True)
            ]  # fmt: skip
            self.store.add_measurements(rows)
            self._known |= {(row.key, row.target): row for row in rows}
        return {arch: self._known[arch.key, name] for arch in archs}
