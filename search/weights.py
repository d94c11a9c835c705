"""What children weigh on a target: memory, time to load, first inference, throughput. No model foretells these: they are measured.

Where a budget bounds one, candidates are weighed before they are evaluated (`search.direct`), each once; finalists several times as
they are exported, and the budget then holds for the worst of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from deploy.kit import Kit
from deploy.measure import Open
from deploy.probe import probe
from deploy.targets import Model, Target
from search.budget import WEIGHED, Budget
from search.records import PROBE, Weighed
from search.store import Store
from supernet.arch import Arch
from supernet.errors import InputError
from supernet.space import Space

BATCH = 8
"""Images at a time, of the throughput."""
AT_ONCE = 8
"""Children that are weighed before the store is told."""
SITTINGS = 3
"""Times that a finalist is weighed, each in a process of its own."""

Span = tuple[float, float, float]
"""Least, median and most of what was seen."""
Spans = Mapping[str, Span]
"""By metric, of `WEIGHED`."""


@dataclass(frozen=True)
class Scales:
    """Weighs models of children on targets; what the store has is not weighed again. Raises `InputError`, as targets do."""

    space: Space
    store: Store
    targets: Mapping[str | None, Target]

    def probes(self, name: str | None, archs: Sequence[Arch]) -> dict[Arch, Spans]:
        """Of children as their operators alone tell (`deploy.probe`): once each, the smallest as often as a finalist."""
        times = SITTINGS if list(archs) == [self.space.smallest] else 1
        return self._weigh(name, archs, lambda arch: probe(self.space, arch, self.targets[name].precision), PROBE, times)

    def exported(self, name: str | None, archs: Sequence[Arch], model: Callable[[Arch], bytes]) -> dict[Arch, Spans]:
        """Of children as they are exported, several times."""
        return self._weigh(name, archs, model, "", SITTINGS)

    def too_heavy(self, budget: Budget, archs: Sequence[Arch]) -> dict[Arch, str]:
        """Of these children, by their probes, those whose median misses a budget, and by how much."""
        weights = self.probes(budget.target, archs)
        found = {arch: weights[arch][budget.metric][1] for arch in archs}
        return {
            arch: f"measured, its {budget.column} is {value:.4g}, and misses {budget}"
            for arch, value in found.items()
            if not budget.holds(value)
        }

    def refuse_impossible(self, budgets: Sequence[Budget]) -> None:
        """Raise `InputError` where the smallest child is too heavy already, or a target cannot weigh."""
        for budget in budgets:
            if budget.metric not in WEIGHED:
                continue
            low, _, high = self.probes(budget.target, [self.space.smallest])[self.space.smallest][budget.metric]
            rate = budget.metric == "images_per_s"  # of which the smallest has the most
            if budget.lower == rate and not budget.holds(high if rate else low):
                end, value = ("largest", high) if rate else ("smallest", low)
                raise InputError(f"no child of the space {self.space.name} meets {budget}: the smallest child's {budget.column}, the "
                                 f"{end} reachable, is {value:.4g}: move the bound or choose another space")  # fmt: skip

    def _weigh(
        self, name: str | None, archs: Sequence[Arch], model: Callable[[Arch], bytes], what: str, times: int
    ) -> dict[Arch, Spans]:  # fmt: skip
        target = self.targets[name]
        if isinstance(target, Kit) or not isinstance(target, Open):
            raise InputError(
                f"{target.name} tells latencies alone: bound {', '.join(WEIGHED)} on this machine or one behind ssh"
            )
        where = f"{what}{target.name}:{target.fingerprint()['hash']}"
        known = {row.key: row for row in self.store.weighed() if (row.target, row.batch) == (where, BATCH)}
        left = [arch for arch in dict.fromkeys(archs) if arch.key not in known]
        for start in range(0, len(left), AT_ONCE):  # what was weighed is kept when the rest fails
            todo, channels = left[start : start + AT_ONCE], self.space.family.in_channels
            models = [Model(model(arch), channels, self.space.resolution(arch)) for arch in todo]
            sittings = [target.weigh(models, batch=BATCH) for _ in range(times)]
            rows = [
                Weighed(arch.key, where, BATCH, {metric: span([getattr(sitting[at], metric) for sitting in sittings])
                                                 for metric in WEIGHED})
                for at, arch in enumerate(todo)
            ]  # fmt: skip
            self.store.add_weighed(rows)
            known |= {row.key: row for row in rows}
        return {arch: {metric: span(known[arch.key].spans[metric]) for metric in WEIGHED} for arch in archs}


def span(values: Sequence[float]) -> Span:
    """Least, median and most."""
    return float(min(values)), float(np.median(values)), float(max(values))


def holds(budget: Budget, spans: Spans) -> bool:
    """Whether a child keeps a budget of `WEIGHED` wherever it was seen."""
    low, _, high = spans[budget.metric]
    return budget.holds_interval(low, high)
