"""What children have in common: those of equal resolution and equal first blocks share activations and statistics (a trie of plans).

A node is a block behind a certain chain of blocks. What a child does up to a node depends on nothing else, so the macs of a set of
children are those of the nodes of their trie, each counted once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from supernet.arch import Arch
from supernet.family import BlockSpec, block_cost
from supernet.operations import BYTES
from supernet.space import Space


@dataclass(slots=True, eq=False)
class Node:
    """A block behind the blocks of its ancestors."""

    slot: str
    spec: BlockSpec
    """With `in_size`, so that children of different resolutions have no node in common."""
    parent: Node | None = None
    after: dict[tuple[str, BlockSpec], Node] = field(default_factory=dict)
    """The nodes right behind it."""
    archs: list[Arch] = field(default_factory=list)
    """Those that end here."""

    @property
    def block(self) -> tuple[str, BlockSpec]:
        """What decides its weights."""
        return self.slot, self.spec

    @property
    def macs(self) -> int:
        """Of its block, for one image."""
        return block_cost(self.spec).macs

    def below(self) -> Iterator[Node]:
        """Itself and all nodes behind it, depth first, in the order in which they came."""
        waiting = [self]
        while waiting:
            node = waiting.pop()
            yield node
            waiting.extend(reversed(node.after.values()))


class Trie:
    """The nodes of some archs of a space."""

    def __init__(self, space: Space, archs: Iterable[Arch] = ()) -> None:
        self.space = space
        self.roots: dict[tuple[str, BlockSpec], Node] = {}
        for arch in archs:
            self.add(arch)

    def add(self, arch: Arch) -> int:
        """Macs per image of the nodes that `arch` brings."""
        after, node, brought = self.roots, None, 0
        for step in self.space.plan(arch).items():
            if step not in after:
                after[step] = Node(*step, node)
                brought += after[step].macs
            node = after[step]
            after = node.after
        assert node is not None, "a plan has a block"
        node.archs.append(arch)
        return brought

    def missing(self, arch: Arch) -> int:
        """Macs per image of the blocks of `arch` that are no nodes yet: what evaluating it with the others would cost."""
        after, missing = self.roots, 0
        for step in self.space.plan(arch).items():
            if step in after:
                after = after[step].after
            else:
                after, missing = {}, missing + block_cost(step[1]).macs
        return missing

    def nodes(self) -> Iterator[Node]:
        """All, depth first; resolutions come one after another, the smallest first."""
        for root in sorted(self.roots.values(), key=lambda node: node.spec.in_size):
            yield from root.below()

    @property
    def macs(self) -> int:
        """Of all nodes, for one image."""
        return sum(node.macs for node in self.nodes())

    @property
    def archs(self) -> list[Arch]:
        """So ordered that neighbours share as many of their first blocks as any order can give them."""
        return [arch for node in self.nodes() for arch in node.archs]

    def groups(self, *, most_weight_bytes: int, most_held_bytes: int) -> list[list[Arch]]:
        """The archs in runs of their order, each of one resolution, that can be walked through depth first within these bytes.

        `most_weight_bytes`: fp32 parameters of the different blocks of a group. `most_held_bytes`: per image, the outputs that wait
        at the nodes where paths part. A single arch is a group whatever it takes.
        """
        groups: list[list[Arch]] = []
        path: list[Node] = []  # to the arch before
        held, weights = _Held(), dict[tuple[str, BlockSpec], int]()
        for node in self.nodes():
            if not node.archs:
                continue
            before, path = path, _path(node)
            shared = _common(before, path)
            if shared:
                held.part(shared, output_bytes(path[shared - 1].spec))
            weights.update((new.block, _weight_bytes(new.spec)) for new in path[shared:])
            fits = sum(weights.values()) <= most_weight_bytes and held.most <= most_held_bytes
            if not groups or not fits or before[0].spec.in_size != path[0].spec.in_size:
                groups.append([])
                held, weights = _Held(), {each.block: _weight_bytes(each.spec) for each in path}
            groups[-1].extend(node.archs)
        return groups


class _Held:
    """Most bytes of outputs that wait at once where paths part, in a walk whose paths become known one after another."""

    def __init__(self) -> None:
        self._parting: list[tuple[int, int, int]] = []  # on the last path: depth, bytes, most that wait further on

    def part(self, depth: int, size: int) -> None:
        """The next path leaves the last one behind `depth` blocks, whose output has `size` bytes."""
        beyond = 0
        while self._parting and self._parting[-1][0] > depth:
            _, own, further = self._parting.pop()
            beyond = own + max(further, beyond)
        if self._parting and self._parting[-1][0] == depth:
            beyond = max(beyond, self._parting.pop()[2])
        self._parting.append((depth, size, beyond))

    @property
    def most(self) -> int:
        """On any path so far."""
        total = 0
        for _, own, further in reversed(self._parting):
            total = own + max(further, total)
        return total


def macs_alone(space: Space, archs: Iterable[Arch]) -> int:
    """Macs of one image through each arch by itself."""
    return sum(block_cost(spec).macs for arch in archs for spec in space.plan(arch).values())


def macs_shared(space: Space, archs: Iterable[Arch]) -> int:
    """Macs of one image through the trie of the archs: what is left of `macs_alone` where nothing is done twice."""
    return Trie(space, archs).macs


def ordered(space: Space, archs: Sequence[Arch]) -> list[Arch]:
    """The same archs, so ordered that neighbours share as many of their first blocks as any order can give them."""
    return Trie(space, archs).archs


@lru_cache(maxsize=100_000)
def output_bytes(spec: BlockSpec) -> int:
    """What a block gives for one image, in fp32."""
    operations = spec.operations()
    return BYTES * (operations.listed[-1].output if operations.listed else operations.input).elements


def _weight_bytes(spec: BlockSpec) -> int:
    return BYTES * block_cost(spec).params


def _path(node: Node) -> list[Node]:
    path = [node]
    while path[-1].parent is not None:
        path.append(path[-1].parent)
    return path[::-1]


def _common(one: list[Node], other: list[Node]) -> int:
    """How many of their first nodes are the same."""
    count = 0
    for first, second in zip(one, other, strict=False):
        if first is not second:
            break
        count += 1
    return count
