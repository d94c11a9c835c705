"""Many children on the same images at once: what they have in common is computed, calibrated and kept once.

Children that agree on resolution and first blocks are one path of a trie up to where they part (`search.trie`). Batch norms
normalise by the batch while they are calibrated, and their statistics depend on nothing behind them, so both belong to a node,
whoever passes through it: every child gets what it gets alone (`supernet.evaluate`), to float tolerance.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from deploy.simulate import Simulation
from search.rungs import Rung
from search.trie import Node, Trie
from supernet.arch import Arch
from supernet.costs import arch_costs
from supernet.data.dataset import SplitImages
from supernet.device import fitting_threads
from supernet.errors import InputError
from supernet.evaluate import CALIBRATION_BATCH, Evaluator
from supernet.model import twin
from supernet.samples import Samples

GIB = 2**30
Kept = TypeVar("Kept")


@dataclass(frozen=True, slots=True)
class Spent:
    """What evaluations took: `macs` really computed; images through a child, `image_forwards` scored and `calibration_forwards`."""

    macs: int = 0
    image_forwards: int = 0
    calibration_forwards: int = 0

    def __add__(self, other: Spent) -> Spent:
        return Spent(
            self.macs + other.macs,
            self.image_forwards + other.image_forwards,
            self.calibration_forwards + other.calibration_forwards,
        )


class Advancing(Protocol):
    """Whatever can bring children to a rung: here, on other machines, or from a table."""

    @property
    def spent(self) -> Spent:
        """Since it was made."""
        ...

    @property
    def failed(self) -> Mapping[Arch, str]:
        """The archs that could not be evaluated, and why, since it was made."""
        ...

    def advance(self, archs: Sequence[Arch], rung: int) -> dict[Arch, Samples]:
        """What each arch does on the images that `rung` adds; an arch that failed is left out."""
        ...


def in_short(error: Exception) -> str:
    """An error as the reason of a failed arch, at most 300 characters."""
    return f"{type(error).__name__}: {error}"[:300]


@dataclass(frozen=True, slots=True)
class Limits:
    """Bytes that may be kept or used at once, each for itself. Whatever they are, the results are the same."""

    images: int = 2 * GIB
    """Decoded images, of each split; beyond it they are decoded each time."""
    held: int = 2 * GIB
    """Activations that wait where paths part."""
    weights: int = GIB
    """Different blocks of the children that are walked through at once; and as much again of blocks kept for later."""
    statistics: int = GIB // 4
    """Statistics of nodes, kept for later."""

    @classmethod
    def of(cls, device: torch.device) -> Limits:
        """On a GPU, fractions of its memory."""
        if device.type != "cuda":
            return cls()
        whole = torch.cuda.get_device_properties(device).total_memory
        return cls(whole // 8, whole // 4, whole // 16, whole // 64)


class SharedEvaluator:
    """Brings children of a supernet from rung to rung, many at a time. The weights must not change meanwhile.

    Calibrates on the evaluator's training images in batches of `CALIBRATION_BATCH`, as it does, and scores on `split`. It takes no
    part in a job of several processes: each has one of its own, and its own archs. Raises `InputError` for rungs that do not grow
    or are beyond the split.
    """

    def __init__(
        self, evaluator: Evaluator, split: SplitImages, rungs: Sequence[Rung], *, limits: Limits | None = None
    ) -> None:
        counts = [0, *(rung.images for rung in rungs)]
        if not rungs or any(more <= fewer for fewer, more in itertools.pairwise(counts)) or counts[-1] > len(split):
            raise InputError(f"rungs add images up to those of the split, {len(split)}, but got {counts[1:]}: give other rungs")
        if not len(evaluator.train) or min(rung.calibration_images for rung in rungs) < 1:
            raise InputError("calibration needs at least 1 training image, but there is none: give more images")
        self.evaluator, self.split, self.rungs = evaluator, split, tuple(rungs)
        weight = next(evaluator.supernet.parameters())
        self.limits = limits or Limits.of(weight.device)
        self.failed: dict[Arch, str] = {}
        """Children that could not be evaluated, and why."""
        self._spent = Spent()
        self._train, self._scored = (_Images(images, weight.device, self.limits.images) for images in (evaluator.train, split))
        self._labels = torch.from_numpy(split.labels[: counts[-1]]).to(weight.device)
        self._weights: _Bounded[nn.Module] = _Bounded(self.limits.weights)
        self._statistics: _Bounded[Tensor] = _Bounded(self.limits.statistics)

    @property
    def spent(self) -> Spent:
        """Since it was made; macs and calibration are those of the nodes that really ran."""
        return self._spent

    def advance(self, archs: Sequence[Arch], rung: int) -> dict[Arch, Samples]:
        """What each arch does on the images that `rung` adds, by the statistics of the rung's calibration images.

        Calibration goes on from what is kept of a lower rung. An arch that fails is left out, and `failed` says why; the others are
        not touched by it. Raises `InputError` for images that cannot be read.
        """
        space = self.evaluator.supernet.space
        batch = max(CALIBRATION_BATCH, self.evaluator.batch_size)
        groups = Trie(space, dict.fromkeys(archs)).groups(
            most_weight_bytes=self.limits.weights, most_held_bytes=self.limits.held // batch
        )
        found: dict[Arch, Samples] = {}
        with torch.inference_mode(), fitting_threads(arch_costs(space, space.largest)["macs"]):
            for group in groups:
                found |= self._together(Trie(space, group), rung)
        return {arch: found[arch] for arch in dict.fromkeys(archs) if arch in found}

    def _together(self, trie: Trie, rung: int) -> dict[Arch, Samples]:
        """`advance` of archs of one resolution."""
        walk = _Walk(trie, self.failed)
        for node in trie.nodes():  # parents first
            if node.parent is None or node.parent in walk.blocks:
                with walk.failing(node):
                    walk.blocks[node] = self._block(node, walk.blocks[node.parent].name if node.parent else b"", rung)
        try:
            self._calibrate(walk, *self._calibration(rung))
            if self.rungs[rung].precision == "int8":
                self._quantise(walk, *self._calibration(rung))
            return self._score(walk, rung)
        finally:
            self._spent += Spent(walk.macs)

    def _calibration(self, rung: int) -> tuple[int, int]:
        """Images of a batch, and batches, of a rung: as `Evaluator.calibrated` takes them."""
        images = min(self.rungs[rung].calibration_images, len(self.evaluator.train))
        size = min(CALIBRATION_BATCH, images)
        return size, images // size

    def _block(self, node: Node, before: bytes, rung: int) -> _Block:
        """The block of a node behind the path `before`, with the statistics of as many batches of the rung as are known."""
        whole = self._weights.get(node.block)
        if whole is None:
            whole = self.evaluator.supernet.extract_block(node.slot, node.spec).to(memory_format=torch.channels_last)
            self._weights.keep(node.block, whole, sum(part.nbytes for part in whole.parameters()))
        block = _Block(_name(before, node), twin(node.spec, whole))
        size, batches = self._calibration(rung)
        counts = {count for lower in range(rung + 1) for own, count in [self._calibration(lower)] if own == size}
        for count in sorted(counts, reverse=True) if block.norms else ():
            known = self._statistics.get((block.name, size, count)) if count <= batches else None
            if known is not None:
                block.begin_with(known, count)
                break
        return block

    def _calibrate(self, walk: _Walk, size: int, batches: int) -> None:
        """Bring the statistics of every node to those of `batches`; what has them runs only to feed what lacks them."""
        seen = {node: block.seen if block.norms else batches for node, block in walk.blocks.items()}
        lacking, on_path = dict[Node, int](), dict[Node, int]()  # the first batch that a node behind, or before, has not seen
        for node in walk.blocks:
            on_path[node] = min(seen[node], on_path[node.parent] if node.parent else batches)
        for node in reversed(walk.blocks):
            lacking[node] = min([seen[node], *(lacking[after] for after in node.after.values() if after in lacking)])
        for number in range(min(lacking.values(), default=batches), batches):
            pixels = self._train.pixels(walk.resolution, number * size, (number + 1) * size, batches * size)
            runs = {node for node, first in lacking.items() if first <= number}
            walk.through(self.evaluator.prepared(pixels), runs, batch=number)
        passed = sum(len(node.archs) * (batches - first) for node, first in on_path.items())
        self._spent += Spent(calibration_forwards=passed * size)
        for node, block in walk.blocks.items():
            if seen[node] < block.seen:
                statistics = block.statistics()
                self._statistics.keep((block.name, size, batches), statistics, statistics.nbytes)

    def _quantise(self, walk: _Walk, size: int, batches: int) -> None:
        """From here on, all blocks round to 8 bits, by the ranges of the first calibration batch."""
        pixels = self._train.pixels(walk.resolution, 0, size, batches * size)
        with ExitStack() as observing:
            for block in walk.blocks.values():
                observing.enter_context(block.observing())
            walk.through(self.evaluator.prepared(pixels), walk.blocks)
        for node, block in walk.blocks.items():
            with walk.failing(node):
                block.round()
        self._spent += Spent(calibration_forwards=size * sum(len(node.archs) for node in walk.blocks))

    def _score(self, walk: _Walk, rung: int) -> dict[Arch, Samples]:
        start, stop = self.rungs[rung - 1].images if rung else 0, self.rungs[rung].images
        task, parts = self.evaluator.task, defaultdict[Node, list[dict[str, Tensor]]](list)
        for begin in range(start, stop, self.evaluator.batch_size):
            end = min(begin + self.evaluator.batch_size, stop)
            images = self.evaluator.prepared(self._scored.pixels(walk.resolution, begin, end, stop))
            targets = task.targets(images, self._labels[begin:end])

            def at_end(node: Node, outputs: Tensor, targets: Tensor = targets) -> None:
                parts[node].append(task.samples(outputs, targets))

            walk.through(images, walk.blocks, at_end=at_end)
        found: dict[Arch, Samples] = {
            arch: {name: torch.cat([part[name] for part in parts[node]]).cpu().numpy() for name in task.columns}
            for node in walk.blocks
            for arch in node.archs
        }
        self._spent += Spent(image_forwards=len(found) * (stop - start))
        return found


class _Block:
    """The block of a node, ready to run."""

    def __init__(self, name: bytes, module: nn.Module) -> None:
        self.name, self.module, self.seen = name, module.eval(), 0
        self._simulation: Simulation | None = None
        self.norms = [part for part in module.modules() if isinstance(part, _BatchNorm)]
        for norm in self.norms:
            norm.num_batches_tracked = None  # with a momentum it has no use

    def __call__(self, x: Tensor, batch: int | None) -> Tensor:
        """Outputs by its statistics; of calibration batch number `batch`, by that batch's own, which it learns if it is its next."""
        if batch is None or not self.norms:
            scored: Tensor = self.module(x)
            return scored
        learns = batch == self.seen
        for norm in self.norms:  # a momentum of 1 / n makes the n-th batch weigh as much as those before: the mean of all
            norm.training, norm.track_running_stats, norm.momentum = True, learns, 1 / (batch + 1)
        outputs: Tensor = self.module(x)
        for norm in self.norms:
            norm.training, norm.track_running_stats = False, True
        self.seen += learns
        return outputs

    @contextmanager
    def observing(self) -> Iterator[None]:
        """Note the ranges of what weighted layers read while the block runs."""
        self._simulation = Simulation(self.module)
        with self._simulation.observing():
            yield

    def round(self) -> None:
        """Round to 8 bits in weighted layers, from here on."""
        assert self._simulation is not None
        self._simulation.begin_rounding()

    def statistics(self) -> Tensor:
        """A copy, shape (numbers,)."""
        return torch.cat(self._buffers())

    def begin_with(self, statistics: Tensor, seen: int) -> None:
        """Go on from those of `seen` batches."""
        self.seen, buffers = seen, self._buffers()
        for buffer, known in zip(buffers, torch.split(statistics, [len(buffer) for buffer in buffers]), strict=True):
            buffer.copy_(known)

    def _buffers(self) -> list[Tensor]:
        return [value for norm in self.norms for value in (norm.running_mean, norm.running_var) if value is not None]


class _Walk:
    """A trie whose roots are of one resolution, with the blocks of its nodes, parents first; those of failed nodes are missing."""

    def __init__(self, trie: Trie, failed: dict[Arch, str]) -> None:
        self.roots, self.failed = list(trie.roots.values()), failed
        self.resolution = self.roots[0].spec.in_size
        self.blocks: dict[Node, _Block] = {}
        self.macs = 0

    @contextmanager
    def failing(self, node: Node) -> Iterator[None]:
        """What goes wrong here ends the archs behind `node` and no others; errors of the user's input pass."""
        try:
            yield
        except InputError:
            raise
        except Exception as error:
            for behind in node.below():
                self.blocks.pop(behind, None)
                self.failed.update((arch, in_short(error)) for arch in behind.archs)

    def through(
        self,
        images: Tensor,
        runs: Collection[Node],
        *,
        batch: int | None = None,
        at_end: Callable[[Node, Tensor], None] | None = None,
    ) -> None:
        """Run `images` through the nodes `runs`, depth first: only activations that are needed later wait.

        `batch` is the number of a calibration batch; `at_end` takes the outputs of nodes where archs end.
        """
        waiting = [(root, images) for root in reversed(self.roots) if root in runs and root in self.blocks]
        while waiting:
            node, x = waiting.pop()
            with self.failing(node):
                outputs = self.blocks[node](x, batch)
                self.macs += node.macs * len(x)
                if at_end is not None and node.archs:
                    at_end(node, outputs)
                after = reversed(node.after.values())
                waiting.extend((each, outputs) for each in after if each in runs and each in self.blocks)


class _Images:
    """Pixels of a split on the device, at each resolution decoded once while there is room."""

    def __init__(self, split: SplitImages, device: torch.device, most_bytes: int) -> None:
        self.split, self.device, self.most_bytes = split, device, most_bytes
        self._held: dict[int, Tensor] = {}

    def pixels(self, resolution: int, start: int, stop: int, end: int) -> Tensor:
        """Images `start` to `stop`, uint8, shape (images, H, W, C), of which those up to `end` will be asked for next."""
        held = self._held.get(resolution)
        if held is None or len(held) < stop:
            held = self._held[resolution] = self._grown(held, resolution, end)
        if stop <= len(held):
            return held[start:stop]
        return torch.cat([held[start:stop], self._decoded(resolution, max(start, len(held)), stop)])

    def _grown(self, held: Tensor | None, resolution: int, end: int) -> Tensor:
        held = self._decoded(resolution, 0, 0) if held is None else held
        room = self.most_bytes - sum(other.nbytes for other in self._held.values())
        more = min(end - len(held), max(0, room) // (resolution**2 * len(self.split.mean)))
        return torch.cat([held, self._decoded(resolution, len(held), len(held) + more)]) if more else held

    def _decoded(self, resolution: int, start: int, stop: int) -> Tensor:
        if start == stop:
            return torch.empty(0, resolution, resolution, len(self.split.mean), dtype=torch.uint8, device=self.device)
        part = replace(self.split, indices=self.split.indices[start:stop], _cache={})
        return torch.from_numpy(part.pixels(resolution)).to(self.device)


class _Bounded(Generic[Kept]):
    """Things by name; those that were not asked for the longest go when there are too many bytes."""

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes, self.bytes = most_bytes, 0
        self._kept: OrderedDict[Hashable, tuple[Kept, int]] = OrderedDict()

    def get(self, name: Hashable) -> Kept | None:
        """None where it is not here any more."""
        if name not in self._kept:
            return None
        self._kept.move_to_end(name)
        return self._kept[name][0]

    def keep(self, name: Hashable, value: Kept, size: int) -> None:
        """Of `size` bytes; it may go at once."""
        self.bytes += size - self._kept.pop(name, (None, 0))[1]
        self._kept[name] = value, size
        while self.bytes > self.most_bytes:
            _, (_, gone) = self._kept.popitem(last=False)
            self.bytes -= gone


def _name(before: bytes, node: Node) -> bytes:
    """Of a path: that of its parent and its last block."""
    return hashlib.blake2b(before + repr(node.block).encode(), digest_size=16).digest()
