"""Optuna's samplers as strategies, in memory: "optuna:tpe", "optuna:gp", "optuna:nsgaii", "optuna:cmaes" and "optuna:qmc".

Every ask builds a study anew from all that was told, and a sampler from (seed, number of asks): so the state is what was told, and
nothing is pickled. Infeasible proposals are told to the study at once and are never evaluated; known ones are passed over, and where
that leaves too few, their unknown neighbours and random archs within the budgets fill up.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from search.feasible import Feasible
from search.strategies.pool import Pooled, in_order, neighbours
from supernet.errors import InputError
from supernet.family import Codes
from supernet.space import Space

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial

SAMPLERS: Mapping[str, int] = {"tpe": 10, "gp": 10, "nsgaii": 24, "cmaes": 20, "qmc": 0}
"""Sampler -> scored archs that it begins with, which are drawn within the budgets."""
LEARNING = ("tpe", "gp")
"""Samplers that learn from infeasible proposals: tpe by their distance from the budgets, gp (which takes twice as long over a
constraint) as scores as bad as the worst."""
TRIES: Mapping[str, int] = {"gp": 2}
"""Proposals of a sampler for each arch asked for; 4 if not here. Then neighbours of known proposals and random archs fill up."""
MOST_REMEMBERED = 100
"""Infeasible proposals that later asks still know of."""
MOST_FITTED: Mapping[str, int] = {"gp": 200}
"""Archs at most that a sampler is fitted to, half of them the best and half the latest: a Gaussian process takes time by their cube."""


class Optuna(Pooled):
    """Asks a sampler of Optuna, in which ordered dimensions are whole numbers and others categories.

    `tpe`, `gp` and `cmaes` seek the best score within the budgets (`gp` up to a few hundred archs), `nsgaii` the front of score and
    main cost in generations of 24, `qmc` fills the space evenly and learns nothing. `cmaes` begins at each ask from the distribution
    of the best tenth of what was told (warm start, Nomura et al. 2021), and draws choices without order at random.

    Raises `InputError` for an unknown sampler, or where a package is not installed.
    """

    name: ClassVar[str] = "optuna"

    def __init__(self, space: Space, feasible: Feasible, *, seed: int, sampler: str = "tpe") -> None:
        super().__init__(space, feasible, seed=seed)
        if sampler not in SAMPLERS:
            raise InputError(
                f'the samplers of Optuna are {", ".join(SAMPLERS)}, but got {sampler!r}: write for example "optuna:tpe"'
            )
        _require("optuna", sampler)
        if sampler == "cmaes":
            _require("cmaes", sampler)
        self.sampler = sampler
        self.rejected: list[tuple[list[int], float]] = []
        self.drawn = self.infeasible = self.repeated = self.filled = 0
        self._distributions = self._made_distributions()
        self._sequence: Study | None = None  # of qmc, which alone goes on where it was

    def _made_distributions(self) -> dict[str, BaseDistribution]:
        from optuna.distributions import CategoricalDistribution, IntDistribution

        return {
            each.name: IntDistribution(0, len(each.choices) - 1) if each.ordered else CategoricalDistribution(range(len(each.choices)))
            for each in self.space.dimensions if len(each.choices) > 1
        }  # fmt: skip

    def _used(self) -> dict[str, BaseDistribution]:
        """The distributions that the sampler can take: of cmaes those of numbers, two at least."""
        from optuna.distributions import IntDistribution

        every = self._distributions
        return {name: each for name, each in every.items() if self.sampler != "cmaes" or isinstance(each, IntDistribution)}

    def _propose(self, count: int, rng: np.random.Generator) -> tuple[Codes, list[str]]:
        if len(self.pool.ranked) < SAMPLERS[self.sampler] or len(self._used()) < (2 if self.sampler == "cmaes" else 1):
            codes = self.pool.fresh(count, rng)
            return codes[in_order(codes)], ["start"] * len(codes)
        with _quiet():
            liked, known = self._asked(count, rng)
        codes = liked
        if len(liked) < count:
            around = [row for code in rng.permutation(known) for row in rng.permutation(neighbours(self.space, code))[:count]]
            codes = self.pool.new(np.concatenate([liked, *(row[None] for row in around), self.pool.fresh(count, rng)]))[:count]
        self.filled += len(codes) - len(liked)
        order = in_order(codes)
        return codes[order], [self.sampler if position < len(liked) else "filled up" for position in order]

    def _asked(self, count: int, rng: np.random.Generator) -> tuple[Codes, Codes]:
        """New archs within the budgets, `count` of them unless the tries run out, and known ones that were proposed."""
        from optuna.trial import TrialState

        study = self._resumed() if self.sampler == "qmc" else self._study(rng)
        found, known = self.pool.codes[:0], self.pool.codes[:0]
        for _ in range(TRIES.get(self.sampler, 4) * count):
            if len(found) >= count:
                break
            trial = study.ask(self._distributions)
            self.drawn += 1
            raw = np.array([[trial.params.get(each.name, 0) for each in self.space.dimensions]], dtype=np.int64)
            code = self.space.canonical(raw)
            if not self.feasible.mask(code)[0]:
                self.infeasible += 1
                if self.sampler in LEARNING:
                    outside = float(np.clip(self.feasible.outside(code)[0], 1e-6, 10.0))
                    self.rejected = [*self.rejected, (code[0].tolist(), outside)][-MOST_REMEMBERED:]
                    if self.sampler == "tpe":
                        trial.set_constraint("budgets", outside)
                    study.tell(trial, self._worst())
                    continue
            elif len(more := self.pool.new(np.concatenate([found, code]))) > len(found):
                found = more
                continue
            else:
                self.repeated += 1
                known = np.concatenate([known, code])
            study.tell(trial, state=TrialState.FAIL)
        return found, np.unique(known, axis=0)

    def _study(self, rng: np.random.Generator) -> Study:
        """All that was told, in its order, under a sampler with a seed of this ask."""
        import optuna
        from optuna.study import StudyDirection
        from optuna.trial import TrialState, create_trial

        rows = self._fitted()
        codes, scores, costs = self.pool.codes[rows], self.pool.scores[rows], self.pool.costs[rows]
        both = self.sampler == "nsgaii"
        trials = []
        key = _generation_key() if both else ""
        tree = self.sampler == "tpe"
        for place, (code, score, cost) in enumerate(zip(codes, scores, costs, strict=True)):
            trials.append(create_trial(
                state=TrialState.COMPLETE, values=[float(score), float(cost)] if both else [float(score)], params=self._params(code),
                distributions=self._distributions, constraints={"budgets": 0.0} if tree else None,
                system_attrs={key: place // SAMPLERS["nsgaii"]} if both else None,
            ))  # fmt: skip
        for code, outside in self.rejected:
            trials.append(create_trial(
                state=TrialState.COMPLETE, value=self._worst(), params=self._params(code), distributions=self._distributions,
                constraints={"budgets": outside} if tree else None,
            ))  # fmt: skip
        seed = int(rng.integers(2**31))
        directions = [StudyDirection.MAXIMIZE, StudyDirection.MINIMIZE][: 1 + both]
        study = optuna.create_study(sampler=_sampler(self.sampler, seed, self._sources(codes, scores)), directions=directions)
        study.add_trials(trials)
        return study

    def _sources(self, codes: Codes, scores: NDArray[np.float64]) -> list[FrozenTrial]:
        """What cmaes begins from: the same trials without what it cannot take."""
        from optuna.trial import create_trial

        used = self._used()
        return [
            create_trial(value=float(score), params={name: value for name, value in self._params(code).items() if name in used},
                         distributions=used)
            for code, score in zip(codes, scores, strict=True) if self.sampler == "cmaes"
        ]  # fmt: skip

    def _worst(self) -> float:
        """The lowest score within the budgets."""
        return float(self.pool.scores[self.pool.ranked].min())

    def _fitted(self) -> list[int]:
        """Rows of what was scored within the budgets, in their order, as many as the sampler can take."""
        ranked = self.pool.ranked
        most = MOST_FITTED.get(self.sampler, len(ranked))
        return sorted(
            {*ranked[: most // 2].tolist(), *np.sort(ranked)[-most // 2 :].tolist()} if len(ranked) > most else ranked.tolist()
        )

    def _resumed(self) -> Study:
        """The study of a quasi-random sequence, after as many draws as were made."""
        import optuna
        from optuna.trial import create_trial

        if self._sequence is None:
            sampler = optuna.samplers.QMCSampler(scramble=True, seed=self.seed, warn_independent_sampling=False)
            self._sequence = optuna.create_study(sampler=sampler)
            nothing = self._params([0] * len(self.space.dimensions))
            self._sequence.add_trial(
                create_trial(value=0.0, params=nothing, distributions=self._distributions)
            )  # says what is drawn
            for _ in range(self.drawn):
                self._sequence.ask(self._distributions)
        return self._sequence

    def _params(self, code: Any) -> dict[str, int]:
        return {each.name: int(value) for each, value in zip(self.space.dimensions, code, strict=True) if len(each.choices) > 1}

    def notes(self) -> list[str]:
        """What became of the sampler's proposals."""
        return [
            f"Optuna's {self.sampler} made {self.drawn} proposals: {self.infeasible} outside of the budgets and {self.repeated} known "
            f"ones were rejected before evaluation, and {self.filled} neighbours of known ones or random archs filled up"
        ]

    def _own_state(self) -> dict[str, Any]:
        counts = {"drawn": self.drawn, "infeasible": self.infeasible, "repeated": self.repeated, "filled": self.filled}
        return {"sampler": self.sampler, **counts, "rejected": [[code, outside] for code, outside in self.rejected]}

    def _load_own(self, state: Mapping[str, Any]) -> None:
        if state.get("sampler") != self.sampler:
            given = str(state.get("sampler"))[:100]
            raise InputError(f"the state of a search must have sampler {self.sampler!r}, but has {given!r}: search anew")
        sizes = [len(each.choices) for each in self.space.dimensions]
        try:
            counts = [int(state[name]) for name in ("drawn", "infeasible", "repeated", "filled")]
            rejected = [([int(each) for each in code], float(outside)) for code, outside in state["rejected"]]
            whole = all(all(0 <= a < b for a, b in zip(code, sizes, strict=True)) and 0 < far <= 10 for code, far in rejected)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"the state of a search is damaged ({error}): search anew") from error
        if not whole or min(counts) < 0 or len(rejected) > MOST_REMEMBERED:
            raise InputError("the state of a search is damaged (rejected archs that are not of this space): search anew")
        self.drawn, self.infeasible, self.repeated, self.filled = counts
        self.rejected, self._sequence = rejected, None


def _sampler(name: str, seed: int, sources: list[FrozenTrial]) -> BaseSampler:
    from optuna import samplers

    if name == "tpe":
        return samplers.TPESampler(seed=seed, n_startup_trials=0)
    if name == "gp":
        return samplers.GPSampler(seed=seed, n_startup_trials=0, warn_independent_sampling=False)
    if name == "nsgaii":
        return samplers.NSGAIISampler(seed=seed, population_size=SAMPLERS["nsgaii"])
    return samplers.CmaEsSampler(seed=seed, source_trials=sources, warn_independent_sampling=False)


def _generation_key() -> str:
    """Under what name NSGA-II keeps the generation of a trial."""
    import optuna
    from optuna.distributions import IntDistribution

    study = optuna.create_study(sampler=optuna.samplers.NSGAIISampler(seed=0))
    study.ask({"any": IntDistribution(0, 1)})
    return next(key for key in study.trials[0].system_attrs if key.endswith("generation"))


def _require(package: str, sampler: str) -> None:
    import importlib

    try:
        importlib.import_module(package)
    except ImportError as error:
        raise InputError(
            f"optuna:{sampler} needs the package {package}, which is not installed: run pip install {package}"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Optuna's messages on new studies and on what is experimental; its verbosity is then as before."""
    from optuna import logging
    from optuna.exceptions import ExperimentalWarning

    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            yield
    finally:
        logging.set_verbosity(verbosity)
