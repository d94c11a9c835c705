"""A search from its budgets to its outcome: profile, search, measure the finalists, confirm, choose.

Everything that was evaluated stays in one SQLite file of the run, whatever the budgets; a killed search, run again, repeats nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from deploy.kit import Kit
from deploy.latency import LatencyModel
from deploy.probe import probe
from deploy.profiling import profile
from deploy.targets import Local, Model, Target
from search.budget import WEIGHED, foretold
from search.choice import Choice
from search.direct import Direct
from search.engine import Engine, Event, Phase
from search.evaluate import Advancing, SharedEvaluator
from search.feasible import Feasible
from search.finalists import Bench
from search.found import Found
from search.known import Known
from search.objective import Objective, fingerprint, objective_named
from search.reach import refuse_impossible
from search.rungs import Rung, rungs
from search.settings import SearchConfig
from search.store import Store, store_path
from search.strategies import Strategy
from search.strategies.registry import make
from search.wanted import Wanted, caps, parse_budgets, wanted
from search.weights import Scales
from supernet.arch import Arch
from supernet.costs import Costs
from supernet.errors import InputError
from supernet.evaluate import Evaluator
from supernet.run import Run
from supernet.space import Space
from supernet.step import normalised

if TYPE_CHECKING:
    from search.strategies.relax import Relaxable

MOST_FRONT = 100
"""Children that one search can be asked for, spread over the costs."""
RELAXED_BATCH = 128
"""Training images that a loss of the strategy relax is of."""


@dataclass(frozen=True)
class Asked:
    """What a search is asked for."""

    budgets: tuple[str, ...] = ()
    """Every child found meets all of them."""
    children: tuple[str, ...] = ()
    """For each text such as "macs<=50M, params<=2M", the best child that meets these too."""
    front: int = 0
    """Children to be found for bounds of the main cost, spread over its range."""
    settings: SearchConfig = field(default_factory=SearchConfig)
    targets: Mapping[str | None, Target] = field(default_factory=lambda: {None: Local()})
    """Where latency is measured, by name; None is that of budgets that name none."""
    objective: Objective | None = None
    """An objective of the user's own, in place of the settings'."""
    latency: Mapping[str | None, Path] = field(default_factory=dict)
    """Latency models that were measured before, by target; the others are measured, or found in the run."""


def search(
    run: Run, asked: Asked | Sequence[str] = (), *, device: str = "cpu", progress: Callable[[Event], None] | None = None,
    advancing: Advancing | None = None,
) -> Found:  # fmt: skip
    """The best children of a run for the budgets, latencies by measurement; the outcome is also saved in the run.

    `asked` may be the budgets alone. `advancing` evaluates children, where that is not this process alone. Raises `InputError` at once
    where no child can meet a budget (with the nearest reachable value).
    """
    whole = asked if isinstance(asked, Asked) else Asked(tuple(asked))
    return _Search(run, whole, device, progress or (lambda _: None), advancing).go()


@dataclass
class _Search:
    run: Run
    asked: Asked
    device: str
    progress: Callable[[Event], None]
    advancing: Advancing | None

    def __post_init__(self) -> None:
        self.settings, self.space = self.asked.settings, self.run.space
        if self.asked.targets.get(None) == Local():  # the default
            here = Local(precision=self.settings.precision)
            self.asked = replace(self.asked, targets={**self.asked.targets, None: here})
        self.budgets, self.wanted = parse_budgets(self.asked.budgets), list(wanted(self.asked.children))
        self.objective = self.asked.objective or objective_named(self.settings.objective, self.run.task)
        self.bounds = (*self.budgets, *(budget for want in self.wanted for budget in want.budgets))
        self.timed = {budget.target for budget in self.bounds if budget.metric == "latency_ms"}
        self.weighed = {budget.target for budget in self.bounds if budget.metric in WEIGHED}
        if not 0 <= self.asked.front <= MOST_FRONT:
            raise InputError(f"a front has 0 to {MOST_FRONT} children, but got {self.asked.front}")
        other = [target.name for target in self.asked.targets.values() if target.precision != self.settings.precision]
        if other:
            raise InputError(f"the search is for {self.settings.precision} children, but {other[0]} times others: give "
                             f"--precision for all, and no target a precision of its own")  # fmt: skip
        unknown = [name for name in (*self.timed, *self.weighed) if name not in self.asked.targets]
        if unknown:
            given = ", ".join(name for name in self.asked.targets if name) or "none"
            raise InputError(f"a measured budget is of a target that is given with --target, but {unknown[0]!r} was not given "
                             f"(given: {given}): add --target {unknown[0]}=local")  # fmt: skip

    def go(self) -> Found:
        if not self.run.finished:
            raise InputError(
                f"{self.run.path} is not trained to its end: finish it with `nestling train --out {self.run.path} --resume`"
            )
        self._refuse_impossible({}, self._feasible({}))
        self._strategy(self._feasible({}), None)  # a name or an option that is none ends here
        (self.run.path / "search").mkdir(exist_ok=True)
        self._refuse_too_heavy()
        feasible = self._feasible(self._latency_models())
        front = self._front(feasible)
        evaluator = self.run.evaluator(self.device)
        with self._store() as store:
            known = self._known(store, feasible.costs, evaluator)
            direct = Direct(self.space, store, self.budgets, self.asked.targets, feasible.models)
            engine = self._engine(known, feasible, front, evaluator, direct)
            engine.go()
            bench = Bench(
                self.run, evaluator, store, self.asked.targets, self.objective, feasible.models, self.settings.precision
            )
            found = Choice(bench, known, feasible, engine, self.wanted, self.budgets, self.settings).go()
        found.save()
        return found

    def _refuse_too_heavy(self) -> None:
        """Of what children weigh, what none can meet, before anything else is measured."""
        if self.weighed:
            with self._store() as store:
                Scales(self.space, store, self.asked.targets).refuse_impossible(self.bounds)

    def _store(self) -> Store:
        return Store.open(store_path(self.run.path, self.settings.precision), identity=identity(self.run, self.settings))

    def _known(self, store: Store, costs: Costs, evaluator: Evaluator) -> Known:
        split = self.run.dataset.split("search_val")
        steps = steps_of(self.run, self.settings)
        advancing = self.advancing or SharedEvaluator(evaluator, split, steps)
        return Known(
            self.space, self.run.task, store, advancing, steps, costs, self.objective, split.labels, len(self.run.classes)
        )

    def _refuse_impossible(self, latencies: Mapping[str | None, float], feasible: Feasible) -> None:
        for want in self.wanted:
            refuse_impossible(self.space, (*self.budgets, *want.budgets), latencies, feasible)

    def _feasible(self, models: Mapping[str | None, LatencyModel]) -> Feasible:
        return Feasible(self.space, self.costs, foretold(self.budgets), models)

    @cached_property
    def costs(self) -> Costs:
        return Costs(self.space)

    def _latency_models(self) -> dict[str | None, LatencyModel]:
        """Measured once per machine and space; only where a budget asks for it."""
        if not self.timed:
            return {}
        timed = {name: self.asked.targets[name] for name in sorted(self.timed, key=lambda name: name or "")}
        models = {name: self._given(name, target) for name, target in timed.items() if name in self.asked.latency}
        least = {name: model.smallest_ms for name, model in models.items()}
        self.progress(Event("timing the smallest child", 0, 0))
        for name, target in timed.items():
            if name not in models:
                refuse_unreachable(name, target)
                least[name] = smallest_latency_ms(self.space, target)
        self._refuse_impossible(least, self._feasible({}))
        for name, target in timed.items():
            if name not in models:
                models[name] = latency_model(self.run, target, self.settings, lambda doing: self.progress(Event(doing, 0, 0)))
        self._refuse_impossible(least, self._feasible(models))
        return models

    def _given(self, name: str | None, target: Target) -> LatencyModel:
        """The model of a file that the user gave; of the target, where that is one that can be asked."""
        path = self.asked.latency[name]
        return LatencyModel.load(path, self.space, None if isinstance(target, Kit) else target)

    def _front(self, feasible: Feasible) -> list[Wanted]:
        """The caps of the main cost that children are wanted for."""
        count = self.asked.front
        found = caps(feasible, count, np.random.default_rng([self.settings.seed, 3]))
        return [Wanted(f"front {number} of {count}", (cap,)) for number, cap in enumerate(found, 1)]

    def _within(self, want: Wanted, feasible: Feasible) -> Feasible:
        """Of what meets the budgets the part that is wanted."""
        budgets = foretold((*self.budgets, *want.budgets))
        return Feasible(self.space, self.costs, budgets, feasible.models) if want.budgets else feasible

    def _strategy(self, feasible: Feasible, evaluator: Evaluator | None) -> Strategy:
        """What the settings name; without an evaluator only to see whether they are right."""
        settings, more = self.settings, dict[str, Any]()
        if settings.strategy == "relax":
            more["relaxable"] = frozen(evaluator, settings.seed) if evaluator else object()
        return make(settings.strategy, self.space, feasible, seed=settings.seed, **settings.options, **more)

    def _for(self, want: Wanted, feasible: Feasible, evaluator: Evaluator, starts: Sequence[Arch]) -> Strategy:
        return self._strategy(self._within(want, feasible), evaluator)

    def _polish(self, want: Wanted, feasible: Feasible, starts: Sequence[Arch]) -> Strategy:
        return make("local", self.space, self._within(want, feasible), seed=self.settings.seed, starts=starts)

    def _engine(
        self, known: Known, feasible: Feasible, front: list[Wanted], evaluator: Evaluator, direct: Direct
    ) -> Engine:  # fmt: skip
        settings, own = self.settings, list(self.wanted)
        self.wanted += front
        zones = [foretold(want.budgets) for want in self.wanted]
        if not front:
            zones += [(cap,) for cap in caps(feasible, settings.zones, np.random.default_rng([settings.seed, 3]))]
        phases = [
            Phase("random", lambda _: make("random", self.space, feasible, seed=settings.seed), settings.random),
            *(Phase(f"{settings.strategy}: {want.name}", partial(self._for, want, feasible, evaluator), many)
              for want, many in zip(own, shares(settings.evaluations, len(own)), strict=True)),
            *(Phase(f"polish: {want.name}", partial(self._polish, want, feasible), many, whole=True)
              for want, many in zip(self.wanted, shares(settings.polish, len(self.wanted)), strict=True)),
        ]  # fmt: skip
        told = json.dumps({
            "zones": [[str(budget) for budget in zone] for zone in zones], "budgets": list(map(str, self.budgets)),
            "objective": [self.objective.name, fingerprint(self.objective)],
            "settings": settings.model_dump(mode="json", exclude={"name", "finalists"}),
            "targets": {str(name): str(feasible.models[name].target["hash"] if name in self.timed
                                       else self.asked.targets[name].fingerprint()["hash"]) for name in self.timed | self.weighed},
        }, sort_keys=True)  # fmt: skip
        return Engine(hashlib.sha256(told.encode()).hexdigest()[:16], known, feasible, zones, phases, settings.batch,
                      self.progress, refused=direct.refused if direct.bounds else lambda _: {})  # fmt: skip


def shares(total: int, parts: int) -> list[int]:
    """`total` in equal parts, the first ones larger by one where it does not divide."""
    return [total // parts + (at < total % parts) for at in range(parts)]


def frozen(evaluator: Evaluator, seed: int) -> Relaxable:
    """Losses of a run's children on the images that they are calibrated by, for strategies that descend on them."""
    from search.strategies.relax import FrozenSupernet

    supernet, train = evaluator.supernet, evaluator.train
    pixels = train.pixels(supernet.space.largest_resolution, evaluator.calibration_images)
    device = next(supernet.parameters()).device
    mean, std = (torch.tensor(value, device=device).view(1, -1, 1, 1) for value in (train.mean, train.std))

    def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = np.random.default_rng([seed, step]).permutation(len(pixels))[:RELAXED_BATCH]
        images = normalised(torch.from_numpy(pixels[chosen]).to(device).permute(0, 3, 1, 2), mean, std)
        return images, torch.from_numpy(train.labels[chosen]).to(device)

    return FrozenSupernet(supernet, evaluator.task, batch)


def steps_of(run: Run, settings: SearchConfig) -> tuple[Rung, ...]:
    """The rungs of a search of a run."""
    images, train = len(run.dataset.splits.search_val), len(run.dataset.splits.train)
    calibration = min(train, settings.calibration_images or run.recipe.calibration_images)
    first = settings.first_rung if settings.race else images
    return rungs(images, calibration, first=first, factor=settings.rung_factor, precision=settings.precision)


def identity(run: Run, settings: SearchConfig) -> dict[str, str]:
    """What the rows of a store belong to: other weights, data or rungs make other scores."""
    return {
        "task": run.task.name,
        "space": run.space.key,
        "weights": run.weights_hash,
        "data": str(run.data["fingerprint"]),
        "evaluation": json.dumps({
            "crop": run.recipe.crop, "images": len(run.dataset.splits.search_val),
            "rungs": [[step.images, step.calibration_images] for step in steps_of(run, settings)],
            **({"precision": settings.precision} if settings.precision != "fp32" else {}),
        }),
    }  # fmt: skip


def latency_model(run: Run, target: Target, settings: SearchConfig, progress: Callable[[str], None]) -> LatencyModel:
    """The latency model of the run's space on a target, measured where the run does not have it yet."""
    path = latency_file(run, target.fingerprint())
    if path.exists():
        return LatencyModel.load(path, run.space, target)
    path.parent.mkdir(exist_ok=True)
    log = path.with_suffix(".log")
    for blocks in (False, True):  # seconds suffice for most; the table of blocks takes minutes
        model = profile(run.space, target, children=settings.profile_children - settings.profile_children // 2,
                        held_out=settings.profile_children // 2, seed=settings.seed, blocks=blocks, log=log,
                        progress=progress)  # fmt: skip
        if model.trusted:
            break
    model.save(path)
    log.unlink(missing_ok=True)
    return model


def latency_file(run: Run, fingerprint: Mapping[str, Any]) -> Path:
    """Where the latency model of a target lies in a run; another machine or runtime has another name."""
    return run.path / "search" / f"latency-{fingerprint['hash']}.json"


def refuse_unreachable(name: str | None, target: Target) -> None:
    """Raise `InputError` for a target that only its kit's results tell of, and none were given."""
    if isinstance(target, Kit):
        called = f"{name}=" if name else ""
        raise InputError(f"{target.name} is measured by a kit: write one with `nestling profile RUN --target kit --out kit.zip`, run "
                         f"it there, import its results, then give --latency {called}FILE")  # fmt: skip


def smallest_latency_ms(space: Space, target: Target) -> float:
    """Upper end of the measured latency of the smallest child, in ms."""
    arch = space.smallest
    return target.measure([Model(probe(space, arch, target.precision), space.family.in_channels, space.resolution(arch))])[
        0
    ].high_ms
