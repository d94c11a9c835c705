"""The search: profile, propose, evaluate, store, measure the finalists, choose.

Everything that was evaluated stays in one SQLite file of the run, whatever the budget; a killed search, run again, repeats nothing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, StrictInt

from deploy.latency import LatencyModel, profile
from deploy.probe import probe
from deploy.targets import Latency, Local, Model, Target
from search import pareto
from search.budget import Budget, parse_all
from search.feasible import Feasible, refuse_impossible
from search.finalists import Bench, meets, pooled
from search.found import Child, Found
from search.store import Row, Store
from search.strategies.coarse_to_fine import CoarseToFine
from supernet import config
from supernet.arch import Arch
from supernet.config import Config
from supernet.costs import Costs
from supernet.errors import InputError
from supernet.evaluate import Evaluator
from supernet.run import Run
from supernet.space import Space

ROUNDS_OF_FINALISTS = 4


class SearchConfig(Config):
    """How much a search does; its YAML lies in `configs/search/`."""

    format: Literal[1] = 1
    name: str = "custom"
    coarse: Annotated[StrictInt, Field(ge=1)] = 24
    """Network-wide skeletons evaluated."""
    fine: Annotated[StrictInt, Field(ge=0)] = 24
    """Mutants evaluated."""
    parents: Annotated[StrictInt, Field(ge=1)] = 4
    batch: Annotated[StrictInt, Field(ge=1)] = 8
    mutation_rate: Annotated[float, Field(gt=0, le=1)] = 0.15
    finalists: Annotated[StrictInt, Field(ge=1)] = 5
    """Children exported and measured at a time."""
    profile_children: Annotated[StrictInt, Field(ge=8)] = 40
    """Children timed to fit the latency model."""
    seed: Annotated[StrictInt, Field(ge=0)] = 0


@dataclass(frozen=True, slots=True)
class Event:
    """Told to the caller as the search goes on: what it does, and children evaluated of how many."""

    doing: str
    done: int
    total: int


def load_search_config(name: str, overrides: Mapping[str, Any] | None = None) -> SearchConfig:
    """A shipped configuration by name, or a YAML file, with overrides. Raises `InputError`."""
    path = config.find("search", name)
    return config.parse(SearchConfig, {**config.read(path), **(overrides or {})}, str(path))


def search(
    run: Run, budgets: Sequence[str], *, settings: SearchConfig | None = None, target: Target | None = None, device: str = "cpu",
    progress: Callable[[Event], None] | None = None,
) -> Found:  # fmt: skip
    """The best child of a run that meets every budget on the target, by measurement; the outcome is also saved in the run.

    Raises `InputError` at once where even the smallest child misses a budget (with the smallest reachable value).
    """
    return _Search(
        run, parse_all(list(budgets)), settings or SearchConfig(), target or Local(), device, progress or (lambda _: None)
    ).go()


@dataclass
class _Search:
    run: Run
    budgets: tuple[Budget, ...]
    settings: SearchConfig
    target: Target
    device: str
    progress: Callable[[Event], None]
    notes: list[str] = field(default_factory=list)

    @property
    def space(self) -> Space:
        return self.run.space

    def go(self) -> Found:
        if not self.run.finished:
            raise InputError(
                f"{self.run.path} is not trained to its end: finish it with `nestling train --out {self.run.path} --resume`"
            )
        refuse_impossible(self.space, self.budgets, None)
        (self.run.path / "search").mkdir(exist_ok=True)
        feasible = Feasible(self.space, Costs(self.space), self.budgets, self._latency_model())
        evaluator = self.run.evaluator(self.device)
        with Store.open(self.run.path / "search" / "search.sqlite", identity=identity(self.run)) as store:
            self._evaluate(evaluator, store, feasible)
            rows = {self.space.arch(json.loads(row.arch)): row for row in store.rows()}  # of every search of this run so far
            found = self._choose(Bench(self.run, evaluator, store, self.target), feasible, rows)
        found.save()
        return found

    def _latency_model(self) -> LatencyModel | None:
        """Measured once per machine and space; only where a budget asks for it."""
        if not any(budget.metric == "latency_ms" for budget in self.budgets):
            return None
        self.progress(Event("timing the smallest child", 0, 0))
        refuse_impossible(self.space, self.budgets, smallest_latency_ms(self.space, self.target))
        return latency_model(self.run, self.target, self.settings, lambda doing: self.progress(Event(doing, 0, 0)))

    def _evaluate(self, evaluator: Evaluator, store: Store, feasible: Feasible) -> None:
        """Drive the strategy; children that the store knows are not evaluated again."""
        settings, split, task = self.settings, self.run.dataset.split("search_val"), self.run.task
        strategy = CoarseToFine(
            self.space, feasible, seed=settings.seed, coarse=settings.coarse, fine=settings.fine, parents=settings.parents,
            batch=settings.batch, mutation_rate=settings.mutation_rate,
        )  # fmt: skip
        done = 0
        while asked := strategy.ask():
            results = []
            for stage, arch in asked:
                row = store.get(arch.key)
                if row is None:
                    start = time.perf_counter()
                    scores = evaluator.evaluate(arch, split)
                    costs = {name: float(values[0]) for name, values in feasible.costs.all(self.space.encode([arch])).items()}
                    row = Row(arch.key, arch.to_json(), stage, task.estimate(scores).value, task.pack(scores), len(scores), costs,
                              time.perf_counter() - start)  # fmt: skip
                    store.add([row])
                results.append((arch, row.score))
                done += 1
                self.progress(Event(f"evaluating: {stage}", done, settings.coarse + settings.fine + 2))
            strategy.tell(results)

    def _choose(self, bench: Bench, feasible: Feasible, rows: dict[Arch, Row]) -> Found:
        """Measure finalists, the best first, until some meet the budgets; of those the best on search-val and confirm together.

        Children of equal score are ordered by cost, so of equals the cheapest wins.
        """
        archs = list(rows)
        costs = dict(zip(archs, feasible.main_cost(self.space.encode(archs)), strict=True))
        ranked = sorted((arch for arch in archs if feasible.admits(arch)), key=lambda arch: (-rows[arch].score, costs[arch]))
        if self.space.smallest not in ranked:
            ranked.append(self.space.smallest)  # it meets every budget, or `refuse_impossible` had spoken
        ends, measured, accepted = [self.space.smallest, self.space.largest], dict[str, Latency](), list[Arch]()
        for start in range(0, ROUNDS_OF_FINALISTS * self.settings.finalists, self.settings.finalists):
            group = ranked[start : start + self.settings.finalists]
            if start + self.settings.finalists >= ROUNDS_OF_FINALISTS * self.settings.finalists:
                group = [*group, self.space.smallest]
            self.progress(Event("measuring finalists", len(rows), len(rows)))
            measured |= bench.measure([*ends, *group])
            accepted = [
                arch for arch in dict.fromkeys(group) if meets(self.budgets, dict(rows[arch].costs), measured[arch.key])
            ]
            if accepted or not group:
                break
            self.notes.append(f"{len(group)} finalists missed the budget when measured; the next were tried")
        if not accepted:
            raise InputError(f"no evaluated child meets {', '.join(map(str, self.budgets))} by measurement; the smallest takes up to "
                             f"{measured[self.space.smallest.key].high:.4g} ms now: raise the budget")  # fmt: skip
        return self._outcome(bench, feasible, rows, accepted, measured)

    def _outcome(
        self, bench: Bench, feasible: Feasible, rows: dict[Arch, Row], accepted: list[Arch], measured: dict[str, Latency]
    ) -> Found:
        ends = [self.space.smallest, self.space.largest]
        confirmed = bench.confirm(list(dict.fromkeys([*accepted, *ends])))
        task = self.run.task
        searched = {arch: task.unpack(row.scores, row.images) for arch, row in rows.items()}
        archs = list(rows)
        table = feasible.table(self.space.encode(archs))
        main = dict(zip(archs, feasible.main_cost(self.space.encode(archs)), strict=True))
        final = {arch: pooled(searched[arch], confirmed[arch.key]) for arch in accepted}
        best = min(accepted, key=lambda arch: (-final[arch], main[arch]))
        children = {}
        for arch in dict.fromkeys([*accepted, *ends]):
            position = archs.index(arch)
            predicted = float(table["latency_ms"][position]) if "latency_ms" in table else None
            children[arch] = Child(
                self.run.path, arch, dict(rows[arch].costs), rows[arch].score, task.estimate(confirmed[arch.key]).value, predicted,
                measured[arch.key],
            )  # fmt: skip
        self._remark(
            task.compare(confirmed[best.key], confirmed[ends[1].key]).p_value if best != ends[1] else None,
            "largest child of the space",
        )
        others = [arch for arch in accepted if arch != best]
        if others:
            second = min(others, key=lambda arch: (-final[arch], main[arch]))
            self._remark(task.compare(confirmed[best.key], confirmed[second.key]).p_value, "second finalist")
        resolutions = {self.space.resolution(arch) for arch in archs}
        if task.own_images and len(resolutions) > 1:
            self.notes.append(
                f"every child is scored on images of its own resolution ({min(resolutions)} to {max(resolutions)} px here), so scores "
                "of different resolutions are not of the same images"
            )
        front = pareto.front([rows[arch].score for arch in archs], [[main[arch]] for arch in archs])
        return Found(
            self.run.path, tuple(str(budget) for budget in self.budgets), children[best], children[ends[0]], children[ends[1]],
            tuple(children[arch] for arch in accepted), tuple(archs[position].key for position in front), len(rows), tuple(self.notes),
            self.run.weights_hash,
        )  # fmt: skip

    def _remark(self, p_value: float | None, other: str) -> None:
        if p_value is not None:
            verdict = "no significant difference" if p_value >= 0.05 else "a significant difference"
            self.notes.append(f"chosen child and {other}: {verdict} on the confirm images (p = {p_value:.3g})")


def identity(run: Run) -> dict[str, str]:
    """What the rows of a store belong to: other weights, data or settings make other scores."""
    return {
        "task": run.task.name,
        "space": run.space.key,
        "weights": run.weights_hash,
        "data": str(run.data["fingerprint"]),
        "evaluation": json.dumps({"calibration_images": run.recipe.calibration_images, "crop": run.recipe.crop,
                                  "images": len(run.dataset.splits.search_val)}),
    }  # fmt: skip


def latency_model(run: Run, target: Target, settings: SearchConfig, progress: Callable[[str], None]) -> LatencyModel:
    """The latency model of the run's space on a target, measured where the run does not have it yet."""
    path = latency_file(run, target.fingerprint())
    if path.exists():
        return LatencyModel.load(path, run.space, target)
    path.parent.mkdir(exist_ok=True)
    model = profile(run.space, target, children=settings.profile_children, seed=settings.seed, progress=progress)
    model.save(path)
    return model


def latency_file(run: Run, fingerprint: Mapping[str, Any]) -> Path:
    """Where the latency model of a target lies in a run; another machine or runtime has another name."""
    return run.path / "search" / f"latency-{fingerprint['hash']}.json"


def smallest_latency_ms(space: Space, target: Target) -> float:
    """Upper end of the measured latency of the smallest child, in ms."""
    arch = space.smallest
    return target.measure([Model(probe(space, arch), space.family.in_channels, space.resolution(arch))])[0].high_ms
