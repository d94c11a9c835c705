"""Children evaluated by all processes of a job that `torchrun` started, each its part; the main process alone searches.

    with spread(world, evaluator, run, rungs) as advancing:
        if advancing is not None:  # the main process; the others evaluate within `spread` until it is done
            search(advancing)

Nothing but JSON and packed samples goes between processes.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from search.evaluate import Spent, in_short
from search.trie import Trie, macs_alone, ordered
from supernet.arch import Arch
from supernet.distributed import TIMEOUT_S, ProcessLost, World
from supernet.errors import InputError
from supernet.samples import Samples, pack, unpack
from supernet.task import Task

if TYPE_CHECKING:
    from search.evaluate import Advancing
    from search.rungs import Rung
    from supernet.space import Space

AWAKE_S = 60.0
"""How often the others hear of a main process that does something else for long, in seconds; a fifth of a shorter timeout."""


class Searched(Protocol):
    """What of a run the processes need (`supernet.run.Run` has it)."""

    @property
    def space(self) -> Space: ...  # noqa: D102

    @property
    def task(self) -> Task: ...  # noqa: D102

    @property
    def weights_hash(self) -> str: ...  # noqa: D102


@dataclass
class Part:
    """What one worker made of the children that it was given, by their positions."""

    packed: dict[int, bytes] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)
    spent: Spent = field(default_factory=Spent)
    fatal: str = ""
    """What is wrong with the run or the machine, where no child can be evaluated."""
    seconds: float = 0.0
    """CPU time that the worker took."""

    def to_bytes(self) -> bytes:
        """A line of JSON, then the samples one after another."""
        sizes = {position: len(data) for position, data in self.packed.items()}
        spent = [self.spent.macs, self.spent.image_forwards, self.spent.calibration_forwards]
        head = json.dumps({"sizes": sizes, "failed": self.failed, "spent": spent, "fatal": self.fatal,
                           "seconds": self.seconds})  # fmt: skip
        return b"\n".join([head.encode(), b"".join(self.packed.values())])

    @classmethod
    def from_bytes(cls, data: bytes) -> Part:
        """Inverse of `to_bytes`."""
        line, _, rest = data.partition(b"\n")
        head, start, packed = json.loads(line), 0, {}
        for position, size in head["sizes"].items():
            packed[int(position)] = rest[start : start + size]
            start += size
        failed = {int(position): reason for position, reason in head["failed"].items()}
        return cls(packed, failed, Spent(*head["spent"]), head["fatal"], head["seconds"])


def attempt(evaluator: Advancing, archs: Mapping[int, Arch], rung: int, task: Task) -> Part:
    """Advance children (position -> arch). One that raises an error is tried alone, and alone is said to have failed."""
    before, begin, part = evaluator.spent, time.process_time(), Part()
    try:
        found, reasons = _tried(evaluator, list(archs.values()), rung)
    except (InputError, OSError) as error:
        part.fatal = " ".join(str(error).split()) or type(error).__name__
        found, reasons = {}, {}
    for position, arch in archs.items():
        if arch in found:
            part.packed[position] = pack(found[arch], task.columns)
        elif not part.fatal:
            part.failed[position] = reasons.get(arch, "it could not be evaluated")
    part.spent, part.seconds = difference(evaluator.spent, before), time.process_time() - begin
    return part


def _tried(evaluator: Advancing, archs: Sequence[Arch], rung: int) -> tuple[dict[Arch, Samples], dict[Arch, str]]:
    """What was found, and why not all was."""
    try:
        found = dict(evaluator.advance(archs, rung))
        return found, dict(evaluator.failed)
    except (InputError, OSError):
        raise
    except Exception as error:
        if len(archs) == 1:
            return {}, {archs[0]: in_short(error)}
    one_by_one = [_tried(evaluator, [arch], rung) for arch in archs]
    found = {arch: samples for each, _ in one_by_one for arch, samples in each.items()}
    return found, {arch: reason for _, each in one_by_one for arch, reason in each.items()}


def pieces(space: Space, archs: Sequence[Arch], count: int) -> list[range]:
    """`archs`, in the order of `search.trie.ordered`, cut into `count` runs, the dearest as cheap as can be; some may be empty.

    The cost of a run are the macs of its trie. The same in every process.
    """
    return Cuts(space, archs).into(count)


class Cuts:
    """Where a row of neighbours is cut, at what cost: what two runs have in common is computed twice."""

    def __init__(self, space: Space, archs: Sequence[Arch]) -> None:
        trie = Trie(space)
        self.alone = [macs_alone(space, [arch]) for arch in archs]
        self.more = [trie.add(arch) for arch in archs]  # than the arch before; what is shared, is shared with that one

    def into(self, count: int) -> list[range]:
        """`count` runs, the last ones maybe empty, so that the dearest is as cheap as can be."""
        low, high = max(self.alone, default=0), sum(self.alone)
        while low < high:
            middle = (low + high) // 2
            if len(self._within(middle)) <= count:
                high = middle
            else:
                low = middle + 1
        runs = self._within(low)
        return runs + [range(len(self.alone), len(self.alone))] * (count - len(runs))

    def macs(self, runs: Sequence[range]) -> int:
        """For an image, of all runs."""
        return sum(self.alone[run[0]] + sum(self.more[at] for at in run[1:]) for run in runs if run)

    def _within(self, most: int) -> list[range]:
        """As few runs as can be of which none has more macs, but where an arch alone has."""
        runs, start, macs = list[range](), 0, 0
        for at, (alone, more) in enumerate(zip(self.alone, self.more, strict=True)):
            if at > start and macs + more > most:
                runs.append(range(start, at))
                start = at
            macs = alone if at == start else macs + more
        return [*runs, range(start, len(self.alone))] if self.alone else []


def difference(after: Spent, before: Spent) -> Spent:
    """What was spent meanwhile."""
    return Spent(
        after.macs - before.macs,
        after.image_forwards - before.image_forwards,
        after.calibration_forwards - before.calibration_forwards,
    )


class ProcessEvaluator:
    """An `Advancing` that gives every process of a job its part. `advance` is called in the main process; the others `serve`.

    All raise `ProcessLost` when another process ended.
    """

    def __init__(self, world: World, evaluator: Advancing, space: Space, task: Task, rungs: Sequence[Rung]) -> None:
        self.world, self.evaluator, self.space, self.task, self.rungs = world, evaluator, space, task, rungs
        self.spent = Spent()
        self.busy_s = 0.0
        """CPU time of the process that took longest, of all calls: about what one takes where every process has a core to itself."""
        self.failed: dict[Arch, str] = {}
        """Children that could not be evaluated, and why."""
        self._turn = threading.Lock()
        self._lost: ProcessLost | None = None

    def advance(self, archs: Sequence[Arch], rung: int) -> dict[Arch, Samples]:
        """What each arch does on the images that `rung` adds, in the order of `archs`; those that fail are left out (`failed`).

        Raises `InputError` where a process cannot evaluate at all.
        """
        if not archs:
            return {}
        row = ordered(self.space, list(dict.fromkeys(archs)))
        with self._turn:
            if self._lost:
                raise self._lost
            self.world.broadcast({"codes": self.space.encode(row).tolist(), "rung": rung})
            parts = self._gathered(row, rung)
        self.spent = sum((part.spent for part in parts), self.spent)
        self.busy_s += max(part.seconds for part in parts)
        fatal = next((part.fatal for part in parts if part.fatal), "")
        if fatal:
            raise InputError(fatal)
        images = self.rungs[rung].images - (self.rungs[rung - 1].images if rung else 0)
        found = {row[at]: unpack(data, images, self.task.columns) for part in parts for at, data in part.packed.items()}
        self.failed |= {row[at]: reason for part in parts for at, reason in part.failed.items()}
        return {arch: found[arch] for arch in archs if arch in found}

    def serve(self) -> None:
        """Evaluate what the main process hands out, until it ends; `SystemExit` where an error ended it, which it has told."""
        while True:
            said = self.world.broadcast(None)
            if "end" in said:
                if said["end"]:
                    raise SystemExit(said["end"])
                return
            if "codes" in said:
                self._gathered(self.space.decode(said["codes"]), said["rung"])

    def end(self, code: int = 0) -> None:
        """Let the other processes go; they end with this exit code where it is not 0."""
        with self._turn:
            if not self._lost:
                self.world.broadcast({"end": code})

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Meanwhile tell the others that this process is there, whatever else it does: they wait no longer than the timeout."""
        over, period = threading.Event(), min(AWAKE_S, float(os.environ.get("NESTLING_TIMEOUT_S", TIMEOUT_S)) / 5)

        def beat() -> None:
            while not over.wait(period):
                with self._turn:
                    if over.is_set() or self._lost:
                        return
                    try:
                        self.world.broadcast({})
                    except ProcessLost as error:
                        self._lost = error

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
        thread.join()

    def _gathered(self, row: Sequence[Arch], rung: int) -> list[Part]:
        """The parts of all processes, in the order of ranks."""
        own = pieces(self.space, row, self.world.size)[self.world.rank]
        part = attempt(self.evaluator, {at: row[at] for at in own}, rung, self.task) if own else Part()
        return [Part.from_bytes(data) for data in self.world.gather(part.to_bytes())]


@contextmanager
def spread(world: World, evaluator: Advancing, run: Searched, rungs: Sequence[Rung]) -> Iterator[Advancing | None]:
    """What the main process advances children with: all processes of `world`, each with an `evaluator` that is alone (no `world`).

    In the other processes it evaluates first, until the main process leaves the block, and gives None: the block then has nothing
    left to do. Alone, it gives the `evaluator` itself. Where an error ends the main process, which tells it, the others end with it by
    `SystemExit`. Raises `InputError` where the processes have other weights, `ProcessLost` where one ended.
    """
    if world.size == 1:
        yield evaluator
        return
    _refuse_others(world, run.weights_hash)
    together = ProcessEvaluator(world, evaluator, run.space, run.task, rungs)
    if not world.main:
        together.serve()
        yield None
        return
    try:
        with together.awake():
            yield together
    except (ProcessLost, KeyboardInterrupt):  # the others are gone, or torchrun ends them
        raise
    except BaseException:
        together.end(2)
        raise
    together.end()


def _refuse_others(world: World, weights: str) -> None:
    """All see the same weights, or the main process says that they do not."""
    hashes = [data.decode() for data in world.gather(weights.encode())]
    other = next((rank for rank, found in enumerate(hashes) if found != hashes[0]), None)
    if other is None:
        return
    if not world.main:
        raise SystemExit(2)
    raise InputError(
        f"every process needs the same weights, but process 0 has {hashes[0][:12]} and process {other} {hashes[other][:12]}: "
        "wait until training is over, and give all of them the same run directory"
    )
