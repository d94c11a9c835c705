"""What is timed of a space so that a latency model can be made: every distinct block, and whole children spread over the costs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Container
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np

from deploy import runner
from deploy.latency import signatures
from deploy.probe import graph_of, probe
from deploy.targets import Model
from supernet.arch import Arch
from supernet.costs import Costs
from supernet.errors import InputError
from supernet.family import BlockSpec, Codes
from supernet.space import Space

CHILDREN, HELD_OUT = 20, 20
"""Whole children that a model is fitted to, and those that prove its error."""
ANCHOR = "anchor"


@dataclass(frozen=True)
class Job:
    """Something to be timed: a block or a whole child of a space, by a key that says which."""

    key: str
    model: Callable[[], Model]
    whole: bool = False


@dataclass(frozen=True)
class Plan:
    """What is timed of a space: the same, whenever it is asked for. Without `blocks`, or where these are too many, children alone."""

    space: Space
    children: int = CHILDREN
    held_out: int = HELD_OUT
    seed: int = 0
    blocks: bool = True
    precision: str = "fp32"

    def __post_init__(self) -> None:
        if self.children < 2 or self.held_out < 2:
            raise InputError(
                f"a latency model is fitted to 2 or more children and proven on 2 or more others, but got {self.children} and "
                f"{self.held_out}: {CHILDREN} and {HELD_OUT} are usual"
            )

    @cached_property
    def whole(self) -> list[Arch]:
        """The children: those that a model is fitted to come first."""
        return children_of(self.space, self.children + self.held_out, np.random.default_rng([self.seed, 6]))

    @cached_property
    def table(self) -> dict[str, BlockSpec]:
        """The blocks by `signature`."""
        return (signatures(self.space) or {}) if self.blocks else {}

    @property
    def about(self) -> dict[str, Any]:
        """What decides the children, and so the anchor; not whether blocks are timed too."""
        return {"space": self.space.key, "children": self.children, "held_out": self.held_out, "seed": self.seed}

    @property
    def anchor(self) -> Job:
        """The child that is in every group: the smallest, which costs the least time."""
        return Job(ANCHOR, partial(_child, self.space, self.space.smallest, self.precision), whole=True)

    def jobs(self) -> list[Job]:
        """All blocks and children, in an order that has nothing to do with what they are."""
        blocks = [Job(key, partial(_block, spec, self.precision)) for key, spec in self.table.items()]
        whole = [Job(arch.key, partial(_child, self.space, arch, self.precision), whole=True) for arch in self.whole]
        return sorted([*blocks, *whole], key=lambda job: hashlib.sha256(f"{self.seed} {job.key}".encode()).digest())

    def groups(self, known: Container[str] = ()) -> list[list[Job]]:
        """What is not known yet, blocks and children apart, in groups with room for the anchor; the groups' order is mixed."""
        left, size = [job for job in self.jobs() if job.key not in known], runner.AT_ONCE - 1
        kinds = [[job for job in left if job.whole == kind] for kind in (False, True)]
        parts = [jobs[start : start + size] for jobs in kinds for start in range(0, len(jobs), size)]
        return [parts[at] for at in np.random.default_rng(len(left)).permutation(len(parts))]


def children_of(space: Space, count: int, rng: np.random.Generator) -> list[Arch]:
    """Smallest, largest and archs at even steps of the macs' logarithm, without repetition; the ends first, the rest shuffled."""
    costs = Costs(space)
    ends = space.encode([space.smallest, space.largest])
    pool = np.unique(space.sample_codes(4096, rng), axis=0)
    low, high = (float(value) for value in np.log(costs.macs(ends)))
    pool_macs = np.log(costs.macs(pool))
    chosen: list[int] = []
    for goal in np.linspace(low, high, count)[1:-1]:
        order = np.argsort(abs(pool_macs - goal), kind="stable")
        chosen += [int(position) for position in order if position not in chosen][:1]
    codes: Codes = np.concatenate([ends, pool[rng.permutation(chosen)]]) if chosen else ends
    return list(dict.fromkeys(space.decode(codes)))


def _block(spec: BlockSpec, precision: str) -> Model:
    operations = spec.operations()
    return Model(graph_of([operations], precision), 0, 0, (1, *operations.input.shape))


def _child(space: Space, arch: Arch, precision: str) -> Model:
    return Model(probe(space, arch, precision), space.family.in_channels, space.resolution(arch))
