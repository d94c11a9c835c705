"""What a strategy remembers, the archs it asked for and what became of those it was told of, as JSON; and what all strategies share.

Archs are rows of canonical integer codes here, so that thousands are checked at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from search.feasible import Feasible
from search.strategies import Proposal, Result
from supernet.errors import InputError
from supernet.family import Codes
from supernet.space import Space

FORMAT = 1
SMALL = 20_000
"""Combinations of choices that are all listed where random draws bring nothing new."""
_DRAWS = 4  # calls to `Feasible.sample` for one ask
_RELATIVES = 64  # known archs whose neighbours are looked at when those draws bring nothing new


class Pool:
    """Every arch that was asked for or told, and the results, in the order in which they came.

    `codes` is (archs, dimensions); `scores` (NaN where the evaluation failed), `images`, `decided`, `admitted` (meets the budgets)
    and `costs` (the main cost) are (archs,). Archs that were asked for and not told back are only known.
    """

    def __init__(self, space: Space, feasible: Feasible) -> None:
        self.space, self.feasible = space, feasible
        self._names = tuple(dimension.name for dimension in space.dimensions)
        self._known: dict[bytes, int] = {}  # codes -> row, -1 where it was only asked for
        self._clear()

    def __len__(self) -> int:
        """How many were told."""
        return len(self.scores)

    @property
    def size(self) -> int:
        """How many were told or asked for."""
        return len(self._known)

    def _clear(self) -> None:
        self._known.clear()
        self.codes: Codes = np.zeros((0, len(self._names)), dtype=np.int64)
        self.scores, self.costs = np.zeros(0), np.zeros(0)
        self.images = np.zeros(0, dtype=np.int64)
        self.decided, self.admitted = np.zeros(0, dtype=np.bool_), np.zeros(0, dtype=np.bool_)
        self.__dict__.pop("ranked", None)

    def tell(self, results: Sequence[Result]) -> NDArray[np.intp]:
        """Remember results and give their rows. One told again replaces what was told before; scores that are not finite are failures.

        Raises `InputError` for an arch of another space.
        """
        codes = self._encoded(results)
        rows: list[int] = []
        fresh: list[int] = []
        for position, code in enumerate(codes):
            key = code.tobytes()
            if self._known.get(key, -1) < 0:
                self._known[key] = len(self) + len(fresh)
                fresh.append(position)
            rows.append(self._known[key])
        self._grow(codes[fresh])
        for row, result in zip(rows, results, strict=True):
            finite = result.score is not None and math.isfinite(result.score)
            self.scores[row] = result.score if finite else math.nan
            self.images[row], self.decided[row] = result.images, result.decided
        self.__dict__.pop("ranked", None)
        return np.unique(np.array(rows, dtype=np.intp))

    def _encoded(self, results: Sequence[Result]) -> Codes:
        for result in results:
            if tuple(name for name, _ in result.arch) != self._names:
                raise self._foreign(result)
        try:
            return self.space.canonical(self.space.encode([result.arch for result in results]))
        except KeyError:
            raise self._foreign(next(result for result in results if not self.space.contains(result.arch))) from None

    def _foreign(self, result: Result) -> InputError:
        return InputError(
            f"results are of archs of the space {self.space.name}, but got {result.arch.to_json()[:200]}: tell only what belongs to it"
        )

    def _grow(self, codes: Codes) -> None:
        if not len(codes):
            return
        self.codes = np.concatenate([self.codes, codes])
        self.scores = np.concatenate([self.scores, np.full(len(codes), math.nan)])
        self.images = np.concatenate([self.images, np.zeros(len(codes), dtype=np.int64)])
        self.decided = np.concatenate([self.decided, np.zeros(len(codes), dtype=np.bool_)])
        self.admitted = np.concatenate([self.admitted, self.feasible.mask(codes)])
        self.costs = np.concatenate([self.costs, rounded(self.feasible.main_cost(codes))])

    @cached_property
    def ranked(self) -> NDArray[np.intp]:
        """Rows of the archs that were scored and meet the budgets, best first: decided ones, by score, the cheaper of equals."""
        rows = np.flatnonzero(self.admitted & ~np.isnan(self.scores))
        return rows[np.lexsort((self.costs[rows], -self.scores[rows], ~self.decided[rows]))]

    def asked(self, codes: Codes) -> None:
        """These were asked for."""
        for code in codes:
            self._known.setdefault(code.tobytes(), -1)

    def new(self, codes: Codes) -> Codes:
        """Those of `codes`, canonical, each once and in order, that are neither told nor asked for, and meet the budgets."""
        codes = self.space.canonical(codes)
        seen: dict[bytes, int] = {}
        for position, code in enumerate(codes):
            key = code.tobytes()
            if key not in self._known:
                seen.setdefault(key, position)
        codes = codes[list(seen.values())]
        return codes[self.feasible.mask(codes)] if len(codes) else codes

    def fresh(self, count: int, rng: np.random.Generator) -> Codes:
        """At most `count` new archs at random, shape (archs, dimensions). Fewer only where hardly any is left; of a small space all."""
        found = self.codes[:0]
        for _ in range(_DRAWS):
            before = len(found)
            found = self.new(np.concatenate([found, self.feasible.sample(max(32, 2 * count), rng)]))
            if len(found) >= count:
                return found[rng.permutation(len(found))[:count]]
            if len(found) == before:
                break
        counts = [len(dimension.choices) for dimension in self.space.dimensions]
        if math.prod(counts) <= SMALL:
            rest = self.new(np.indices(counts).reshape(len(counts), -1).T)
        else:
            known = self.codes[self.admitted]
            some = known[rng.permutation(len(known))[:_RELATIVES]]
            rest = self.new(np.concatenate([found[:0], *(neighbours(self.space, code) for code in some)]))
        return self.new(np.concatenate([found, rest[rng.permutation(len(rest))]]))[:count]

    def state(self) -> dict[str, Any]:
        """All of it as JSON values."""
        waiting = [np.frombuffer(key, dtype=np.int64).tolist() for key, row in self._known.items() if row < 0]
        return {
            "codes": self.codes.tolist(), "scores": [None if math.isnan(score) else score for score in self.scores.tolist()],
            "images": self.images.tolist(), "decided": self.decided.tolist(), "asked": waiting,
        }  # fmt: skip

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Forget what it holds and take `state`. Raises `InputError` where that is damaged; the pool is then empty."""
        self._clear()
        try:
            codes, waiting = self._whole(state["codes"]), self._whole(state["asked"])
            scores = [math.nan if score is None else float(score) for score in state["scores"]]
            images, decided = [int(count) for count in state["images"]], [bool(value) for value in state["decided"]]
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise InputError(f"the state of a search is damaged ({error}): search anew") from error
        keys = [code.tobytes() for code in (*codes, *waiting)]
        if not len(codes) == len(scores) == len(images) == len(decided) or len(set(keys)) < len(keys):
            raise InputError("the state of a search is damaged (its columns do not fit together): search anew")
        self._grow(codes)
        self._known = {key: row if row < len(codes) else -1 for row, key in enumerate(keys)}
        self.scores[:], self.images[:], self.decided[:] = scores, images, decided

    def _whole(self, rows: Any) -> Codes:
        """Codes out of a file."""
        codes = np.array(rows)
        if not codes.size:
            return self.codes[:0]
        counts = [len(dimension.choices) for dimension in self.space.dimensions]
        if (
            codes.ndim != 2
            or codes.shape[1] != len(counts)
            or codes.dtype.kind != "i"
            or (codes < 0).any()
            or (codes >= counts).any()
        ):
            raise ValueError("archs that are not of this space")
        if (self.space.canonical(codes) != codes).any():
            raise ValueError("archs that are not in their canonical form")
        return codes.astype(np.int64)


class Pooled:
    """Ask and tell over a `Pool`. A strategy adds `_propose`, and what else it remembers as `_own_state` and `_load_own`."""

    name: ClassVar[str]
    experimental: ClassVar[bool] = False

    def __init__(self, space: Space, feasible: Feasible, *, seed: int) -> None:
        self.space, self.feasible, self.seed, self.asks = space, feasible, seed, 0
        self.pool = Pool(space, feasible)

    def ask(self, count: int) -> list[Proposal]:
        """At most `count` archs to evaluate next, neighbours that share blocks together; empty when it has no more."""
        if count < 1:
            raise InputError(f"a strategy is asked for at least 1 arch, but got {count}: ask for more")
        rng = np.random.default_rng([self.seed, *self.name.encode(), self.asks])
        self.asks += 1
        codes, stages = self._propose(count, rng)
        self.pool.asked(codes)
        return [Proposal(arch, stage) for arch, stage in zip(self.space.decode(codes), stages, strict=True)]

    def _propose(self, count: int, rng: np.random.Generator) -> tuple[Codes, list[str]]:
        """At most `count` of what `Pool.new` gives, and the stage of each."""
        raise NotImplementedError

    def tell(self, results: Sequence[Result]) -> None:
        """What became of archs, whether it asked for them or not; one told again replaces what was told before."""
        self.pool.tell(results)

    def notes(self) -> list[str]:
        """No remarks."""
        return []

    def state(self) -> dict[str, Any]:
        """All that it remembers, as JSON values."""
        own = {"format": FORMAT, "strategy": self.name, "space": self.space.key, "seed": self.seed, "asks": self.asks}
        return {**own, "pool": self.pool.state(), **self._own_state()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Remember what `state` gave. Raises `InputError` where it is of another strategy or space, or damaged."""
        wanted = {"format": FORMAT, "strategy": self.name, "space": self.space.key}
        for key, value in wanted.items():
            if state.get(key) != value:
                raise InputError(
                    f"the state of a search must have {key} {value!r}, but has {str(state.get(key))[:100]!r}: search anew"
                )
        numbers = [state.get("seed"), state.get("asks")]
        if any(type(number) is not int or number < 0 for number in numbers) or not isinstance(state.get("pool"), Mapping):
            raise InputError("the state of a search is damaged (no seed, no count of asks or no pool): search anew")
        self.pool.load_state(state["pool"])
        self._load_own(state)
        self.seed, self.asks = state["seed"], state["asks"]

    def _own_state(self) -> dict[str, Any]:
        return {}

    def _load_own(self, state: Mapping[str, Any]) -> None:
        """Nothing to do."""


def neighbours(space: Space, codes: NDArray[np.int64]) -> Codes:
    """All codes that differ from one row of codes in one dimension: the last dimensions, hence the last blocks, first.

    Of a dimension the nearest choices come first. Shape (neighbours, dimensions); some may be no network, or the same one.
    """
    found = []
    for column in reversed(range(len(space.dimensions))):
        others = np.delete(np.arange(len(space.dimensions[column].choices)), codes[column])
        others = others[np.argsort(np.abs(others - codes[column]), kind="stable")]
        rows = np.repeat(codes[None], len(others), axis=0)
        rows[:, column] = others
        found.append(rows)
    return np.concatenate(found)


def in_order(codes: Codes) -> NDArray[np.intp]:
    """Positions that sort codes by their first dimensions, so that archs which share their first blocks follow one another."""
    return np.lexsort(codes.T[::-1])


def rounded(costs: NDArray[np.float64]) -> NDArray[np.float64]:
    """Costs in single precision: a predicted latency differs in its last digits with the number of archs predicted at once."""
    return costs.astype(np.float32).astype(np.float64)
