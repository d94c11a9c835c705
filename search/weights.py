"""What children weigh on a target: memory, time to load, first inference, throughput. No model foretells these: they are measured.

Where a budget bounds one, candidates are weighed before they are evaluated (`search.direct`), and refused by the best that was seen;
finalists are weighed as they are exported, and the budget then holds for the worst of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from deploy.far import Unable
from deploy.kit import Kit
from deploy.measure import Open
from deploy.probe import probe
from deploy.targets import Model, Target, Weight
from search.budget import WEIGHED, Budget
from search.records import PROBE, Weighed
from search.store import Store
from supernet.arch import Arch
from supernet.errors import InputError
from supernet.space import Space

BATCH = 8
"""Images at a time, of the throughput."""
SECONDS = 0.5
"""How long the throughput is measured."""
PROBINGS, SITTINGS = 2, 3
"""Times that a candidate, and a finalist, is weighed, each in a process of its own."""

Span = tuple[float, float, float]
"""Least, median and most of what was seen."""
Spans = Mapping[str, Span]
"""By metric, of `WEIGHED`."""


@dataclass
class Scales:
    """Weighs models of children on targets; what the store has is not weighed again. Raises `InputError`, as targets do.

    A model that a target cannot run (too little memory) has no weight; what the target said of it stands in `unable`.
    """

    space: Space
    store: Store | None
    """None: nothing is kept."""
    targets: Mapping[str | None, Target]
    unable: dict[Arch, str] = field(default_factory=dict)

    def probes(self, name: str | None, archs: Sequence[Arch]) -> dict[Arch, Spans]:
        """Of children as their operators alone tell (`deploy.probe`)."""
        return self._weigh(name, archs, lambda arch: probe(self.space, arch, self.targets[name].precision), PROBE, PROBINGS)

    def exported(self, name: str | None, archs: Sequence[Arch], model: Callable[[Arch], bytes]) -> dict[Arch, Spans]:
        """Of children as they are exported."""
        return self._weigh(name, archs, model, "", SITTINGS)

    def too_heavy(self, budget: Budget, archs: Sequence[Arch]) -> dict[Arch, str]:
        """Of these children, by their probes, those that miss a budget however quiet the target was, and by how much."""
        weights, found = self.probes(budget.target, archs), dict[Arch, str]()
        for arch in archs:
            if arch not in weights:
                found[arch] = f"cannot be weighed for {budget}: {self.unable[arch]}"
            elif not budget.holds(value := quietest(budget, weights[arch])):
                found[arch] = f"measured, its {budget.column} is {value:.4g}, and misses {budget}"
        return found

    def refuse_impossible(self, budgets: Sequence[Budget]) -> None:
        """Raise `InputError` where the smallest child is too heavy already, or a target cannot weigh."""
        for budget in budgets:
            if budget.metric not in WEIGHED:
                continue
            smallest = self.space.smallest
            weights = self.probes(budget.target, [smallest])
            if smallest not in weights:
                raise InputError(
                    f"the smallest child of the space {self.space.name} cannot be weighed: {self.unable[smallest]}"
                )
            value = quietest(budget, weights[smallest])
            rate = budget.metric == "images_per_s"  # of which the smallest has the most
            if budget.lower == rate and not budget.holds(value):
                end = "largest" if rate else "smallest"
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
        rows = self.store.weighed() if self.store else []
        known = {row.key: row for row in rows if (row.target, row.batch) == (where, BATCH)}
        for arch in dict.fromkeys(archs):
            if arch.key in known:
                continue
            sittings = self._sittings(target, arch, model(arch), times)
            if sittings:
                spans = {metric: span([getattr(sitting, metric) for sitting in sittings]) for metric in WEIGHED}
                known[arch.key] = Weighed(arch.key, where, BATCH, spans)
                if self.store:
                    self.store.add_weighed([known[arch.key]])
        return {
            arch: {metric: span(known[arch.key].spans[metric]) for metric in WEIGHED} for arch in archs if arch.key in known
        }

    def _sittings(self, target: Open, arch: Arch, data: bytes, times: int) -> list[Weight]:
        """The weights of one model; none where the target cannot run it."""
        given = [Model(data, self.space.family.in_channels, self.space.resolution(arch))]
        try:
            return [weight for _ in range(times) for weight in target.weigh(given, batch=BATCH, seconds=SECONDS)]
        except Unable as error:
            self.unable[arch] = str(error)
            return []


def quietest(budget: Budget, spans: Spans) -> float:
    """What a child weighs where nothing disturbs it: the most of a rate, the least of anything else."""
    return spans[budget.metric][2 if budget.metric == "images_per_s" else 0]


def span(values: Sequence[float]) -> Span:
    """Least, median and most."""
    return float(min(values)), float(np.median(values)), float(max(values))


def holds(budget: Budget, spans: Spans | None) -> bool:
    """Whether a child keeps a budget of `WEIGHED` wherever it was seen; one that could not be weighed keeps none."""
    if spans is None:
        return False
    low, _, high = spans[budget.metric]
    return budget.holds_interval(low, high)
