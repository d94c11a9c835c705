"""From what was evaluated to the outcome: finalists are measured and confirmed, and one is chosen for each set of budgets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from deploy.kit import Kit
from deploy.latency import GATE
from search import pareto
from search.budget import WEIGHED, Budget, foretold
from search.engine import Engine, Event
from search.feasible import Feasible
from search.finalists import Bench, Latencies, Verdict, Weights, judge, meets
from search.found import Answer, Child, Found
from search.known import Known
from search.settings import SearchConfig
from search.statistics import compare
from search.trie import macs_alone
from search.wanted import Wanted
from search.weights import Scales
from supernet.arch import Arch
from supernet.errors import InputError

ROUNDS_OF_FINALISTS = 4


@dataclass
class Choice:
    """From what was evaluated to the outcome."""

    bench: Bench
    known: Known
    feasible: Feasible
    engine: Engine
    wanted: Sequence[Wanted]
    budgets: tuple[Budget, ...]
    settings: SearchConfig
    measured: dict[str, Latencies] = field(default_factory=dict)
    weighed: dict[str, Weights] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.run, self.space, self.notes = self.bench.run, self.bench.run.space, list(self.engine.notes)
        self.archs = [arch for arch, rung in self.engine.view.items() if rung == self.known.last]
        codes = self.space.encode(self.archs)
        self.table, self.cost = self.feasible.table(codes), dict(zip(self.archs, self.feasible.main_cost(codes), strict=True))
        self.scores = {arch: self.engine.score(arch) for arch in self.archs}

    def go(self) -> Found:
        """Find a child for everything wanted, and tell how sure that is."""
        answers = [answer for want in self.wanted if (answer := self._answer(want)) is not None]
        ends = [self.space.smallest, self.space.largest]
        self._measure(ends)
        confirmed = self.bench.confirm(ends)
        best = answers[0].child.arch
        if best != ends[1]:
            values = self.bench.confirm([best, ends[1]])
            p_value = compare(values[best], values[ends[1]]).p_value
            verdict = "no significant difference" if p_value >= 0.05 else "a significant difference"
            self.notes.append(
                f"chosen child and largest child of the space: {verdict} on the confirm images (p = {p_value:.3g})"
            )
        all_of_best = (*self.budgets, *self.wanted[0].budgets)
        if best != ends[0] and self._meets(all_of_best, ends[0]):
            self._against_smallest(best, ends[0])
        self._against_random(best)
        self._remark_failed()
        self._remark_latency()
        self._remark_speed()
        self._remark_front(answers)
        self._remark_resolutions()
        front = pareto.front([self.scores[arch] for arch in self.archs], [[self.cost[arch]] for arch in self.archs])
        smallest, largest = (self._child(arch, float(confirmed[arch].mean())) for arch in ends)
        return Found(
            self.run.path, tuple(map(str, self.budgets)), self.bench.objective.name, tuple(answers), smallest, largest,
            tuple(self.archs[position].key for position in front), len(self.known.rows), self._spent(), tuple(self.notes),
            self.run.weights_hash, self.settings.precision,
        )  # fmt: skip

    def _answer(self, want: Wanted) -> Answer | None:
        """The child for one set of budgets: of the finalists that meet them by measurement, as the confirm images say."""
        budgets = (*self.budgets, *want.budgets)
        accepted = self._accepted(want, budgets)
        if not accepted:
            return None
        confirmed = self.bench.confirm(accepted)
        verdict = judge(accepted, confirmed, {arch: self._final_cost(arch) for arch in accepted}, self.settings.seed)
        finalists = {arch: self._child(arch, float(confirmed[arch].mean(dtype=np.float64)), verdict) for arch in accepted}
        if len(verdict.tied) > 1:
            self.notes.append(
                f"{want.name}: no significant difference between {len(verdict.tied)} of {len(accepted)} finalists on "
                f"{len(confirmed[accepted[0]])} confirm images; the cheapest of these finalists was chosen"
            )
        return Answer(
            want.name, tuple(map(str, budgets)), finalists[verdict.chosen], tuple(finalists.values()),
            tuple(arch.key for arch in verdict.tied), {arch.key: value for arch, value in verdict.p_values.items()},
        )  # fmt: skip

    def _accepted(self, want: Wanted, budgets: Sequence[Budget]) -> list[Arch]:
        """Finalists that meet the budgets when measured: the best first, in rounds, until some do.

        Children of equal score are ordered by cost. What is measured corrects the latency models for the next round. The smallest
        child is the last resort.
        """
        tried: set[Arch] = set()
        for last in [*[False] * (ROUNDS_OF_FINALISTS - 1), True]:
            smallest = [self.space.smallest] if last and self.space.smallest in self.scores else []
            group = list(dict.fromkeys([*self._light(self._ranked(want, tried), budgets), *smallest]))
            self.engine.progress(Event("measuring finalists", self.engine.total, self.engine.total))
            self._measure(group)
            tried |= set(group)
            accepted = [arch for arch in group if self._meets(budgets, arch)]
            if accepted or (last and not group):
                return self._or_refuse(want, budgets, accepted)
            if group:
                self.notes.append(
                    f"{len(group)} finalists missed the budget when measured{'' if last else '; the next were tried'}"
                )
            self._correct()
        return self._or_refuse(want, budgets, [])

    def _light(self, archs: Sequence[Arch], budgets: Sequence[Budget]) -> list[Arch]:
        """The first `finalists` that are not too heavy, as far as their probes tell."""
        bounds, found = [budget for budget in budgets if budget.metric in WEIGHED], list[Arch]()
        if not bounds:
            return list(archs[: self.settings.finalists])
        scales = Scales(self.space, self.bench.store, self.bench.targets)
        for start in range(0, len(archs), self.settings.finalists):
            part = archs[start : start + self.settings.finalists]
            heavy = {arch for budget in bounds for arch in scales.too_heavy(budget, part)}
            found += [arch for arch in part if arch not in heavy]
            if len(found) >= self.settings.finalists:
                break
        return found[: self.settings.finalists]

    def _measure(self, archs: Sequence[Arch]) -> None:
        """Latencies of those that were not measured yet, and their weights where a budget bounds one."""
        new = [arch for arch in archs if arch.key not in self.measured]
        self.measured |= self.bench.measure(new)
        self.weighed |= self.bench.weigh(new, self._scales)

    @property
    def _scales(self) -> list[str | None]:
        """The targets that budgets over weights name."""
        every = (*self.budgets, *(budget for want in self.wanted for budget in want.budgets))
        return list(dict.fromkeys(budget.target for budget in every if budget.metric in WEIGHED))

    def _meets(self, budgets: Sequence[Budget], arch: Arch) -> bool:
        return meets(budgets, self.known.rows[arch].costs, self.measured[arch.key], self.weighed[arch.key])

    def _ranked(self, want: Wanted, tried: set[Arch]) -> list[Arch]:
        """Children within the budgets as far as that is foretold, that were not tried yet; the best first."""
        codes = self.space.encode(self.archs)
        admitted = self.feasible.mask(codes) & self.feasible.zones(codes, [foretold(want.budgets)])[:, 0]
        inside = [arch for arch, meets_ in zip(self.archs, admitted, strict=True) if meets_ and arch not in tried]
        return sorted(inside, key=lambda arch: (-self.scores[arch], self.cost[arch]))

    def _correct(self) -> None:
        """Move the latency models to what was measured."""
        models = {
            name: model.corrected(self.space, {
                arch: (each.latency_ms, each.low, each.high)
                for arch in self.archs if (each := self.measured.get(arch.key, {}).get(name)) is not None
            })
            for name, model in self.bench.models.items()
        }  # fmt: skip
        self.feasible = replace(self.feasible, latency=models)

    def _or_refuse(self, want: Wanted, budgets: Sequence[Budget], accepted: list[Arch]) -> list[Arch]:
        """A search without its best child is an error; without one of the others, a remark."""
        if accepted:
            return accepted
        problem = f"no evaluated child meets {', '.join(map(str, budgets))} by measurement"
        if want.name != "best":
            self.notes.append(f"{want.name}: {problem}")
            return []
        latencies = self.bench.measure([self.space.smallest])[self.space.smallest.key]
        timed = [b for b in budgets if b.metric == "latency_ms"]
        least = f"; the smallest takes up to {latencies[timed[0].target].high:.4g} ms now" if timed else ""
        raise InputError(f"{problem}{least}: move the bound")

    def _final_cost(self, arch: Arch) -> float:
        """The main cost, measured where it is a latency."""
        main = self.feasible.main
        return self.measured[arch.key][main.target].latency_ms if main.metric == "latency_ms" else float(self.cost[arch])

    def _child(self, arch: Arch, confirm_score: float, verdict: Verdict | None = None) -> Child:
        predicted = float(self.table["latency_ms"][self.archs.index(arch)]) if "latency_ms" in self.table else None
        estimate = verdict.estimates[arch] if verdict else None
        return Child(
            self.run.path, arch, dict(self.known.rows[arch].costs), self.scores[arch], confirm_score, predicted,
            {f"latency_ms@{name}" if name else "latency_ms": latency for name, latency in self.measured[arch.key].items()}, estimate,
            {f"{metric}@{name}" if name else metric: span
             for name, spans in self.weighed[arch.key].items() for metric, span in spans.items()},
        )  # fmt: skip

    def _against_smallest(self, best: Arch, smallest: Arch) -> None:
        """Whether the confirm images show that the search gained anything over the cheapest child there is."""
        values = self.bench.confirm([best, smallest])
        result = compare(values[best], values[smallest])
        if result.low <= 0:
            show = self.bench.objective.show
            self.notes.append(
                f"on {len(values[best])} confirm images the chosen child ({show(float(values[best].mean()))}) is not shown better "
                f"than the smallest child of the space ({show(float(values[smallest].mean()))}, p = {result.p_value:.3g}): "
                "`--arch smallest` exports that"
            )

    def _against_random(self, best: Arch) -> None:
        """What random children within the budgets reached: the baseline of every search."""
        drawn = [arch for arch in self.engine.view if self.known.rows[arch].stage == "random"]
        drawn = [arch for arch, meets_ in zip(drawn, self.feasible.mask(self.space.encode(drawn)), strict=True) if meets_]
        if not drawn:
            return
        luckiest = max(drawn, key=lambda arch: (self.engine.score(arch), arch.key))
        values, show = self.bench.confirm([best, luckiest]), self.bench.objective.show
        one, other = values[best], values[luckiest]
        result = compare(one, other)
        self.notes.append(
            f"best of the {len(drawn)} random children known within the budgets: {show(float(other.mean()))} on {len(other)} confirm "
            f"images, the chosen child {show(float(one.mean()))} (p = {result.p_value:.3g})"
        )

    def _remark_failed(self) -> None:
        if failed := self.engine.failed:
            some = ", ".join(f"{key} ({why})" for key, why in list(failed.items())[:3])
            more = f", and {len(failed) - 3} more" if len(failed) > 3 else ""
            self.notes.append(f"could not be evaluated and were left out: {some}{more}")

    def _remark_latency(self) -> None:
        for name, model in self.bench.models.items():
            target = self.bench.targets[name]
            how = "" if model.trusted else f"; above {GATE:.0%}, so candidates were measured before they were evaluated"
            self.notes.append(f"{target.name}: {model.summary()}{how}")
            if isinstance(target, Kit):
                self.notes.append(
                    f"latencies on {target.name} are predictions: export the child, then `nestling measure BUNDLE` there"
                )

    def _remark_speed(self) -> None:
        """Whether the machine was another one, so to speak, when the finalists were measured than when the model was."""
        for name, model in self.bench.models.items():
            timed = [arch for arch in self.archs if name in self.measured.get(arch.key, {})]
            ratios = [self.measured[arch.key][name].latency_ms / model.predict(self.space, arch) for arch in timed]
            if ratios and not model.lower_factor <= (ratio := float(np.median(ratios))) <= model.upper_factor:
                self.notes.append(
                    f"{self.bench.targets[name].name}: what was measured is {ratio:.2f} times what the latency model predicts "
                    f"(median of {len(ratios)} children): the device is {'slower' if ratio > 1 else 'faster'} than when it was "
                    "profiled; measured values count"
                )

    def _remark_front(self, answers: Sequence[Answer]) -> None:
        parts = [answer.child.key for answer in answers if answer.name.startswith("front ")]
        if len(set(parts)) < len(parts):
            self.notes.append(
                f"{len(set(parts))} different children for {len(parts)} parts of the range of costs: in some the images show no gain "
                "over a cheaper child"
            )

    def _remark_resolutions(self) -> None:
        resolutions = {self.space.resolution(arch) for arch in self.archs}
        if self.run.task.own_images and len(resolutions) > 1:
            self.notes.append(
                f"every child is scored on images of its own resolution ({min(resolutions)} to {max(resolutions)} px here), so scores "
                "of different resolutions are not of the same images"
            )

    def _spent(self) -> dict[str, float]:
        rows, last = self.known.rows, self.known.rungs[-1]
        return {
            "macs": sum(row.macs_spent for row in rows.values()),
            "macs_alone": float(macs_alone(self.space, list(rows))) * (last.images + last.calibration_images),
            "seconds": sum(row.seconds for row in rows.values()),
        }
