"""Relax: choices as probabilities, moved down the gradient of the frozen supernet's training loss, then made definite. Experimental."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import numpy as np
from torch import Tensor

from search.feasible import Feasible
from search.predictor import Values
from search.strategies.pool import Pooled, in_order, neighbours
from search.strategies.reinforce import loaded_logits, softmax
from supernet.arch import Arch
from supernet.errors import InputError
from supernet.family import Codes
from supernet.model import Supernet
from supernet.space import Space
from supernet.step import Resizer, StepConfig, losses_without_gradients
from supernet.task import Task

DRAWN_FOR_COST = 512
"""Archs that the gradient of the expected cost is taken over at a step; costs are closed-form, so these are cheap."""
DRAWN = 256
"""Archs drawn from each final policy, beside the neighbourhood of its mode."""


class Relaxable(Protocol):
    """What relax needs of a frozen supernet."""

    def losses(self, archs: Sequence[Arch], step: int) -> Values:
        """Loss of each child on the same training images, those of `step`, smaller is better; shape (archs,)."""
        ...


class FrozenSupernet:
    """Children of a supernet as they are trained, without gradients: on training batches, by the statistics of each batch.

    `batch` gives the images of a step, normalised and of the largest resolution, shape (N, C, H, W), and their labels, as the task
    has them. The batches should be as large as in training.
    """

    def __init__(
        self, supernet: Supernet, task: Task, batch: Callable[[int], tuple[Tensor, Tensor]], config: StepConfig | None = None
    ) -> None:
        self.supernet, self.task, self.batch, self.config = supernet, task, batch, config or StepConfig()

    def losses(self, archs: Sequence[Arch], step: int) -> Values:
        """The task's loss of each child to the labels, on the batch of `step`, shape (archs,)."""
        images, labels = self.batch(step)
        crops = Resizer(images)
        found = losses_without_gradients(self.supernet, archs, images, labels, self.task, self.config, crops)
        return found.double().cpu().numpy()


class Relax(Pooled):
    """Descends on E[loss] + `beta` E|cost / target - 1| over archs whose choices are drawn independently, by logits of every dimension.

    Archs are drawn by adding Gumbel noise to the logits and taking the largest (Gumbel-max), where Gumbel-softmax (Jang et al. 2017)
    would take a soft mixture: a child here is an ordinary network and cannot be mixed. The gradient needs no mixture either. Two archs
    whose noise differs in some dimensions only, on the same images, give 1/2 (loss - loss') (choice - choice') as an unbiased estimate
    in these dimensions (ProxylessNAS, Cai et al. 2019, section 3.2, samples two paths too); the cost's is a covariance over many draws.

    The descent is made once, at the first ask, for each of `targets` main costs: 2 `pairs` `steps` losses each. Then it proposes the
    mode of each, the mode's neighbours and draws, by their probability, and learns nothing from what it is told. Expect good starts
    for a local search, not the best child: training loss under batch statistics ranks children only roughly, and independent choices
    have no interactions. `beta` has the unit of the loss.
    """

    name: ClassVar[str] = "relax"
    experimental: ClassVar[bool] = True

    def __init__(
        self, space: Space, feasible: Feasible, *, seed: int, relaxable: Relaxable | None = None, steps: int = 100, pairs: int = 2,
        targets: int = 3, rate: float = 0.1, beta: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__(space, feasible, seed=seed)
        if relaxable is None:
            raise InputError(
                "relax needs the losses of a frozen supernet's children on training images: give it a relaxable, such as "
                "FrozenSupernet(supernet, task, batch)"
            )
        if min(steps, pairs, targets) < 1 or not (rate > 0 and beta >= 0):
            raise InputError(
                "relax needs at least 1 step, pair and target, rate > 0 and beta >= 0, but got "
                f"{steps}, {pairs}, {targets}, {rate} and {beta}: give more"
            )
        self.relaxable, self.steps, self.pairs, self.targets, self.rate, self.beta = (
            relaxable,
            steps,
            pairs,
            targets,
            rate,
            beta,
        )
        self.policies: list[list[Any]] = []
        self._counts = np.array([len(each.choices) for each in space.dimensions])
        self._offered = np.arange(self._counts.max()) < self._counts[:, None]

    def _propose(self, count: int, rng: np.random.Generator) -> tuple[Codes, list[str]]:
        if not self.policies:
            self.policies = [self._descended(target, rng) for target in self._targets(rng)]
        rows = [self._around(policy, rng) for policy in self.policies]
        turns = [row[turn] for turn in range(max(map(len, rows), default=0)) for row in rows if turn < len(row)]
        liked = self.pool.new(np.array(turns, dtype=np.int64).reshape(-1, len(self._counts)))[:count]
        codes = self.pool.new(np.concatenate([liked, self.pool.fresh(count, rng)]))[:count] if len(liked) < count else liked
        order = in_order(codes)
        return codes[order], ["relaxed" if position < len(liked) else "random" for position in order]

    def _targets(self, rng: np.random.Generator) -> list[float]:
        """Main costs in equal ratios over what archs within the budgets cost, the dearest included."""
        costs = self.feasible.main_cost(self.feasible.sample(DRAWN_FOR_COST, rng))
        return np.geomspace(costs.min(), costs.max(), self.targets + 1)[1:].tolist() if len(costs) and costs.min() > 0 else []

    def _descended(self, target: float, rng: np.random.Generator) -> list[Any]:
        """Logits after all steps of Adam."""
        logits = np.where(self._offered, 0.0, -np.inf)
        first, second = np.zeros(logits.shape), np.zeros(logits.shape)
        for step in range(self.steps):
            slope = self.gradient(logits, rng, step) + self.beta * self.cost_gradient(logits, rng, target)
            first, second = 0.9 * first + 0.1 * slope, 0.99 * second + 0.01 * slope**2
            moved = first / (1 - 0.9 ** (step + 1)) / (np.sqrt(second / (1 - 0.99 ** (step + 1))) + 1e-8)
            logits = logits - self.rate * moved
        return [row[:count] for row, count in zip(logits, self._counts, strict=True)]

    def gradient(self, logits: Values, rng: np.random.Generator, step: int) -> Values:
        """Unbiased estimate of the gradient of the expected loss, shape of `logits` (dimensions, most choices); -inf: not offered."""
        noise = rng.gumbel(size=(self.pairs, *logits.shape))
        apart = rng.random((self.pairs, len(logits))) < 0.5
        other = np.where(apart[..., None], rng.gumbel(size=noise.shape), noise)
        one, two = (logits + noise).argmax(axis=-1), (logits + other).argmax(axis=-1)
        networks = self.space.valid(self.space.canonical(one)) & self.space.valid(self.space.canonical(two))
        slope = np.zeros(logits.shape)
        if not networks.any():
            return slope
        one, two, apart = one[networks], two[networks], apart[networks]
        losses = self.relaxable.losses([*self.space.decode(one), *self.space.decode(two)], step)
        gaps = np.nan_to_num(losses[: len(one)] - losses[len(one) :], posinf=0.0, neginf=0.0)
        for a, b, dimensions, gap in zip(one, two, apart, gaps, strict=True):
            columns = np.flatnonzero(dimensions)
            slope[columns, a[columns]] += gap  # 1/2 from the pair, over the 1/2 with which a dimension differs
            slope[columns, b[columns]] -= gap
        return slope / len(one)

    def cost_gradient(self, logits: Values, rng: np.random.Generator, target: float) -> Values:
        """The same for the expected |cost / target - 1|."""
        codes = (logits + rng.gumbel(size=(DRAWN_FOR_COST, *logits.shape))).argmax(axis=-1)
        canonical = self.space.canonical(codes)
        networks = self.space.valid(canonical)
        if networks.sum() < 2:
            return np.zeros(logits.shape)
        codes, off = codes[networks], np.abs(self.feasible.main_cost(canonical[networks]) / target - 1)
        chosen = codes[..., None] == np.arange(logits.shape[1])
        return np.asarray(np.tensordot(off - off.mean(), chosen, axes=(0, 0)) / (len(off) - 1))

    def _around(self, policy: list[Any], rng: np.random.Generator) -> Codes:
        """The mode, its neighbours and draws, the most probable first."""
        mode = np.array([int(logits.argmax()) for logits in policy])
        drawn = np.stack([rng.choice(len(logits), size=DRAWN, p=softmax(logits)) for logits in policy], axis=1)
        codes = np.concatenate([mode[None], neighbours(self.space, mode), drawn])
        likely = np.sum([np.log(softmax(logits))[codes[:, column]] for column, logits in enumerate(policy)], axis=0)
        codes = self.space.canonical(codes[np.argsort(-likely, kind="stable")])
        return codes[self.space.valid(codes)]

    def _own_state(self) -> dict[str, Any]:
        return {"policies": [[logits.tolist() for logits in policy] for policy in self.policies]}

    def _load_own(self, state: Mapping[str, Any]) -> None:
        policies = state.get("policies")
        if not isinstance(policies, Sequence):
            raise InputError("the state of a search is damaged (no policies): search anew")
        self.policies = [loaded_logits(self.space, policy) for policy in policies]
