"""The engine: strategies ask for children, the children race on growing numbers of images, the strategies are told.

Everything evaluated is in the store at once. What a strategy was told, and so what it asks, is written after every race, so a killed
search goes on as if it had not been: what was evaluated since is found in the store. A search with other budgets begins with
everything that earlier ones evaluated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from search import pareto
from search.budget import Budget
from search.feasible import Feasible
from search.known import Known
from search.racing import Race
from search.strategies import Proposal, Result, Strategy
from supernet.arch import Arch
from supernet.errors import InputError

REFERENCES = 32
"""Children that tell a race how hard its first images are."""
ENOUGH = 1_000
"""Images that tell good children from bad while a search explores: the best are scored on all of them in the end."""
FAILED = -1
"""Stands for the rung of a child that could not be evaluated."""


@dataclass(frozen=True, slots=True)
class Event:
    """Told to the caller as the search goes on: what it does, and children evaluated of how many (0: unknown)."""

    doing: str
    done: int
    total: int
    front: Sequence[Mapping[str, Any]] = ()
    """The best child of each zone so far: key, score, costs, stage, and whether none of these is cheaper and as good (`front`)."""


@dataclass(frozen=True, slots=True)
class Phase:
    """A strategy's turn: how it is made (of the archs to start from, the best so far), and how many children it may ask for."""

    name: str
    make: Callable[[Sequence[Arch]], Strategy]
    evaluations: int
    whole: bool = False
    """Whether its children, and the best so far, are scored on all images; else only on as many as tell good from bad."""


@dataclass
class Engine:
    """One search over one store. `zones` are sets of budgets: in each of them the best child is looked for."""

    identity: str
    known: Known
    feasible: Feasible
    zones: Sequence[tuple[Budget, ...]]
    phases: Sequence[Phase]
    batch: int
    progress: Callable[[Event], None]
    view: dict[Arch, int] = field(default_factory=dict)
    """Arch -> the rung that this search has seen it on, in the order in which strategies were told."""
    refused: Callable[[Sequence[Arch]], Mapping[Arch, str]] = lambda _: {}
    """Which archs are not to be evaluated after all, and why: asked before every race."""
    notes: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    """Key of a child that could not be evaluated -> why, as far as that is known."""
    _generation: int = 0
    _done: int = 0
    _unsaved: list[Result] = field(default_factory=list)
    """What the promotion before the polish found: saved with the next asks; a search killed before promotes again."""

    def __post_init__(self) -> None:
        self.race, self._top = Race(self.known.rungs), self.known.last

    def go(self) -> None:
        """Search until every strategy had its turn."""
        space, saved = self.known.space, self.known.store.search(self.identity)
        by_key = {arch.key: arch for arch in self.known.rows}
        state: dict[str, Any] = {}
        if saved is None:
            self.view = {arch: row.rung for arch, row in self.known.rows.items()}
            self._save({}, self.view)
        else:
            self.view = {by_key[key]: rung for _, key, rung in saved.told if key in by_key and rung != FAILED}
            self._generation, state = saved.generation, dict(saved.state)
            self.notes, self.failed = list(state.get("notes", [])), dict(state.get("failed", {}))
        if self._generation == 0:
            self._begin([space.smallest, space.largest])
        self._done = int(state.get("done", 0))
        for position, phase in enumerate(self.phases):
            if position >= int(state.get("phase", 0)):
                self._run(position, phase, state.get("strategy") if position == state.get("phase") else None)

    @property
    def total(self) -> int:
        """Children that the strategies may ask for."""
        return sum(phase.evaluations for phase in self.phases)

    def leader(self, zone: int) -> Arch | None:
        """The best child of a zone of those that came to the top rung and are not refused; of equals the cheapest."""
        whole = [arch for arch, rung in self.view.items() if rung >= self._top]
        if not whole:
            return None
        codes = self.known.space.encode(whole)
        inside = self._zones(codes)[:, zone]
        cost = self.feasible.main_cost(codes)
        ranked = [(-self.known.mean(whole[at], self._top), cost[at], at) for at in np.flatnonzero(inside)]
        return next((whole[at] for _, _, at in sorted(ranked) if not self.refused([whole[at]])), None)

    def score(self, arch: Arch) -> float:
        """A child's score as far as this search has seen it."""
        return self.known.score(arch, self.view[arch])

    def _begin(self, ends: Sequence[Arch]) -> None:
        """The ends of the space on all images; then what earlier searches left races on for the budgets of this one."""
        self.progress(Event("evaluating: extremes", 0, self.total))
        told = self._raced([Proposal(arch, "extremes") for arch in dict.fromkeys(ends)], protected=ends)
        failed = [result.arch.key for result in told if result.score is None]
        if failed:
            raise InputError(
                f"the smallest and the largest child are what all others are compared with, but {' and '.join(failed)} could not be "
                "evaluated: see why with `nestling evaluate RUN --arch largest`, and with --arch smallest"
            )
        self._climb(self.phases[0])
        told += self._promoted()
        self._save({"phase": 0, "done": 0, "strategy": None}, {result.arch: self._rung(result) for result in told})

    def _promoted(self) -> list[Result]:
        """Children below the top rung race on, for the zones as they are now."""
        archs = [arch for arch, rung in self.view.items() if rung < self._top]
        if not archs:
            return []
        meet = self.feasible.mask(self.known.space.encode(archs))
        proposals = [Proposal(arch, self.known.rows[arch].stage) for arch, meets in zip(archs, meet, strict=True) if meets]
        return self._raced(proposals) if proposals else []

    def _run(self, position: int, phase: Phase, state: dict[str, Any] | None) -> None:
        """One strategy's turn."""
        best = [arch for zone in range(len(self.zones)) if (arch := self.leader(zone)) is not None]
        self._climb(phase)
        if phase.whole and state is None and not (position and self.phases[position - 1].whole):
            self.progress(Event("evaluating: the best on all images", self._done, self.total, self._front()))
            proposals = [Proposal(arch, self.known.rows[arch].stage) for arch in dict.fromkeys(best)]
            self._unsaved = [*self._raced(proposals, protected=best), *self._promoted()]
        strategy = phase.make([arch for zone in range(len(self.zones)) if (arch := self.leader(zone)) is not None])
        before, noted = sum(earlier.evaluations for earlier in self.phases[:position]), list(self.notes)
        if state is not None:
            strategy.load_state(state)
        else:
            self._done = before
            strategy.tell([Result(arch, self.score(arch), self.known.rungs[rung].images, rung >= self._top)
                           for arch, rung in self.view.items()])  # fmt: skip
        while (left := before + phase.evaluations - self._done) > 0:
            asked = strategy.ask(min(self.batch, left))
            if not asked:
                break
            told = self._raced(asked)
            strategy.tell(told)
            self._done += len(asked)
            self.progress(Event(f"evaluating: {asked[-1].stage}", self._done, self.total, self._front()))
            self._save({"phase": position, "done": self._done, "strategy": strategy.state(), "notes": noted},
                       {result.arch: self._rung(result) for result in (*self._unsaved, *told)})  # fmt: skip
            self._unsaved = []
        self.notes = noted + [note for note in strategy.notes() if note not in noted]

    def _climb(self, phase: Phase) -> None:
        """Set the top rung: all images, or where these are many the last rung of at least `ENOUGH`."""
        enough = [at for at, rung in enumerate(self.known.rungs) if rung.images >= ENOUGH]
        self._top = self.known.last if phase.whole or not enough else enough[0]
        self.race = Race(self.known.rungs[: self._top + 1])

    def _raced(self, proposals: Sequence[Proposal], protected: Sequence[Arch] = ()) -> list[Result]:
        """Let children race in the zones that they belong to, against the best known there."""
        stages = {proposal.arch: proposal.stage for proposal in proposals}
        refused = self.refused([arch for arch in stages if arch not in protected])
        archs = [arch for arch in stages if arch not in refused]
        self.failed |= {arch.key: why for arch, why in refused.items()}
        if not archs:
            return [Result(arch, None, 0) for arch in stages]
        best = [self.leader(zone) for zone in range(len(self.zones))]

        def advance(some: list[Arch], rung: int) -> dict[Arch, NDArray[Any]]:
            return self.known.advance(some, rung, stages)

        leaders = [None if arch is None else self.known.on_first(arch, self._top) for arch in best]
        raced = self.race.run(
            archs, self._zones(self.known.space.encode(archs)), leaders, advance, protected, self._references(archs)
        )
        self.view |= {arch: one.rung for arch, one in raced.items()}
        reasons = self.known.advancing.failed if self.known.advancing else {}
        for arch in archs:
            if arch in raced:
                self.failed.pop(arch.key, None)
            else:
                self.failed[arch.key] = reasons.get(arch, "it was left out")
        images = [rung.images for rung in self.known.rungs]
        return [
            Result(arch, self.score(arch), images[raced[arch].rung], raced[arch].decided)
            if arch in raced
            else Result(arch, None, 0)
            for arch in stages
        ]

    def _references(self, archs: Sequence[Arch]) -> list[Callable[[int], NDArray[Any]]]:
        """Children of the top rung whose costs are nearest to those of `archs`."""
        whole = [arch for arch, rung in self.view.items() if rung >= self._top]
        if not whole:
            return []
        cost = self.feasible.main_cost(self.known.space.encode([*whole, *archs]))
        distance = np.abs(np.log(cost[: len(whole)] / np.median(cost[len(whole) :])))
        return [self.known.on_first(whole[at], self._top) for at in np.argsort(distance, kind="stable")[:REFERENCES]]

    def _front(self) -> list[dict[str, Any]]:
        archs = [arch for zone in range(len(self.zones)) if (arch := self.leader(zone)) is not None]
        archs = list(dict.fromkeys(archs))
        if not archs:
            return []
        rows, scores = [self.known.rows[arch] for arch in archs], [self.score(arch) for arch in archs]
        best = set(pareto.front(scores, self.feasible.main_cost(self.known.space.encode(archs))[:, None]))
        return [
            {"key": row.key, "score": score, **row.costs, "stage": row.stage, "front": place in best}
            for place, (row, score) in enumerate(zip(rows, scores, strict=True))
        ]

    def _zones(self, codes: NDArray[np.int64]) -> NDArray[np.bool_]:
        return self.feasible.zones(codes, self.zones) & self.feasible.mask(codes)[:, None]

    def _rung(self, result: Result) -> int:
        return FAILED if result.score is None else self.view[result.arch]

    def _save(self, state: dict[str, Any], told: dict[Arch, int]) -> None:
        generation = self._generation + 1 if state else 0
        state = {**state, "failed": self.failed} if state else state
        self.known.store.save_search(self.identity, generation, state, [(arch.key, rung) for arch, rung in told.items()])
        self._generation = generation
