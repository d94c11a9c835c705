"""Children evaluated by the actors of a Ray cluster: a local one, or one that runs on many machines. Extra: `nestling[ray]`.

Actors take chunks of neighbouring children as they become free. The chunk of an actor that dies goes to others, child by child, and
another actor takes its place. Ray pickles what goes between its own processes; nothing of it is kept in files.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import subprocess
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from search.actor import Build, Holder, Order, packed, shared
from search.evaluate import Spent
from search.processes import Cuts, Part
from search.trie import ordered
from supernet.arch import Arch
from supernet.errors import InputError
from supernet.run import Run
from supernet.samples import unpack

if TYPE_CHECKING:
    from search.rungs import Rung
    from supernet.samples import Samples

INSTALL = 'Ray is not installed: pip install "nestling[ray]"'
FORMS = "--workers is ray, ray:ACTORS, ray://HOST:PORT or ray://HOST:PORT/ACTORS"
TRIES = 3
"""Workers that a child may end before it is given up."""
CHUNKS, MORE_MACS = 4, 0.1
"""Chunks a worker at most: more of them balance better, but neighbours that go apart share nothing; and what this may cost."""
START_S = 300.0
"""Longest wait for the first actor of a cluster, in seconds."""
ENDING_S = 30.0
"""Longest wait for a process of the local Ray to end, in seconds."""
STORE_BYTES = 256 * 2**20
"""Memory of a local Ray for what actors share, beyond the weights."""


@dataclass(frozen=True, slots=True)
class Workers:
    """Where actors run, and how many: as many as fit where `actors` is None. A local Ray where `address` is None."""

    address: str | None = None
    actors: int | None = None

    @classmethod
    def parse(cls, text: str) -> Workers:
        """Read `ray`, `ray:ACTORS`, `ray://HOST:PORT` or `ray://HOST:PORT/ACTORS`. Raises `InputError`."""
        parts = re.fullmatch(r"ray(?::(?P<local>\d{1,6})|(?P<address>://[^/\s]+:\d+)(?:/(?P<there>\d{1,6}))?)?", text)
        if parts is None:
            raise InputError(f"{FORMS}, but got {text[:100]!r}")
        count = parts["local"] or parts["there"]
        if count is not None and int(count) < 1:
            raise InputError(f"--workers needs at least 1 actor, but got {text!r}")
        return cls(f"ray{parts['address']}" if parts["address"] else None, int(count) if count else None)


LOCAL = Workers()


@dataclass
class _Chunk:
    """Children that go to one worker, and the worker that knows them from the rung below."""

    at: tuple[int, ...]
    home: int | None = None


@dataclass
class _Worker:
    """An actor, what it does now (a reference to what comes of it), and with which chunk; None: it opens the run."""

    actor: Any
    doing: Any
    chunk: _Chunk | None = None
    ready: bool = False


class RayEvaluator:
    """An `Advancing` over the actors of a Ray cluster; a context manager, which ends them.

    The local Ray that it starts serves no dashboard and sends no usage statistics; its ports are open to who has Ray's token of this
    user (`~/.ray/auth_token`, which Ray makes). Where the environment variable RAY_ADDRESS names a cluster, or this process has joined
    one, that is used. Raises `InputError` where Ray is not installed, no cluster answers or no actor can open the run.
    """

    def __init__(
        self, run: Run, split: str, rungs: Sequence[Rung], workers: Workers = LOCAL, *, device: str = "cpu", threads: int = 1,
        build: Build = shared, told: Callable[[str], None] | None = None,
    ) -> None:  # fmt: skip
        self.run, self.rungs, self.device, self.threads = run, tuple(rungs), device, threads
        self.told = told or (lambda _: None)
        self.spent = Spent()
        """What was spent on results that came back; what a killed actor did is not known."""
        self.busy_s = 0.0
        """CPU time of the worker that took longest, of all calls: about what one takes where every worker has a core to itself."""
        self.failed: dict[Arch, str] = {}
        """Children that could not be evaluated, and why."""
        self._home: dict[Arch, int] = {}
        self._lost_in_a_row = 0
        self._workers: dict[int, _Worker] = {}
        self._open = contextlib.ExitStack()
        with self._open:
            files = packed(run)
            self._ray, count = self._open.enter_context(_joined(workers, device, threads, len(files["weights"])))
            self._open.callback(self._stop)
            kept = self._ray.put(files)
            self._order = Order(run.path.resolve(), run.weights_hash, split, self.rungs, device, threads, build, kept)
            for number in range(count):
                self._hire(number)
            self._open = self._open.pop_all()  # nothing went wrong: it stays open

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the actors, and the local Ray."""
        self._open.close()

    def advance(self, archs: Sequence[Arch], rung: int) -> dict[Arch, Samples]:
        """What each arch does on the images that `rung` adds, in the order of `archs`; those that fail are left out (`failed`).

        Raises `InputError` where no actor can evaluate at all.
        """
        if not self._workers:
            raise InputError("the Ray workers were let go when the last evaluation ended with an error: search again")
        row = ordered(self.run.space, list(dict.fromkeys(archs)))
        try:
            parts = self._all(row, rung)
        except ConnectionError as error:
            self.close()
            raise InputError(f"the Ray cluster answers no more ({error}): search again, what is in the store stays") from error
        except BaseException:
            self.close()  # actors that are at work would answer a question that nobody asks any more
            raise
        return self._result(archs, row, rung, parts)

    def _all(self, row: Sequence[Arch], rung: int) -> list[Part]:
        """Hand out chunks until every child of `row` has an outcome."""
        waiting, tries, parts = self._chunks(row), [0] * len(row), list[Part]()
        seconds = dict.fromkeys(self._workers, 0.0)
        while waiting or any(worker.chunk for worker in self._workers.values()):
            self._hand_out(waiting, row, rung)
            for number in self._finished():
                worker = self._workers[number]
                chunk, part = worker.chunk, self._outcome(number)
                if chunk is None:
                    continue
                if part is not None:
                    parts.append(part)
                    seconds[number] += part.seconds
                    self._home |= dict.fromkeys((row[at] for at in chunk.at), number)
                    continue
                for at in chunk.at:
                    tries[at] += 1
                again = [at for at in chunk.at if tries[at] < TRIES]
                waiting[:0] = [_Chunk((at,)) for at in again]  # alone, so that one that ends workers ends no others' work
                given_up = {at: f"{TRIES} workers ended while they evaluated it" for at in chunk.at if at not in again}
                parts.append(Part(failed=given_up))
        self.busy_s += max(seconds.values())
        return parts

    def _chunks(self, row: Sequence[Arch]) -> list[_Chunk]:
        """Runs of neighbours that are known to the same worker, of about equal macs."""
        chunks = []
        for home in sorted({self._home.get(arch, -1) for arch in row}):
            known = [at for at, arch in enumerate(row) if self._home.get(arch, -1) == home]
            owner, cuts = home if home in self._workers else None, Cuts(self.run.space, [row[at] for at in known])
            fewest = len(self._workers) if owner is None else 1
            most = cuts.macs(cuts.into(fewest)) * (1 + MORE_MACS)
            options = [cuts.into(fewest * times) for times in range(1, CHUNKS + 1)]
            runs = [run for run in options if cuts.macs(run) <= most][-1]
            chunks += [_Chunk(tuple(known[place] for place in run), owner) for run in runs if run]
        return chunks

    def _hand_out(self, waiting: list[_Chunk], row: Sequence[Arch], rung: int) -> None:
        """Give every free worker a chunk: one that it knows, one that none knows, else of the worker with most to do."""
        for number, worker in self._workers.items():
            if not waiting:
                return
            if not worker.ready or worker.chunk is not None:
                continue
            homes = [chunk.home for chunk in waiting]
            wanted = next((home for home in (number, None) if home in homes), max(homes, key=homes.count))
            worker.chunk = waiting.pop(homes.index(wanted))
            worker.doing = worker.actor.advance.remote({at: row[at].as_dict() for at in worker.chunk.at}, rung)

    def _finished(self) -> list[int]:
        """Workers that opened the run, finished a chunk or ended; waits for one."""
        doing = {worker.doing: number for number, worker in self._workers.items() if worker.doing is not None}
        done, _ = self._ray.wait(list(doing), num_returns=1, timeout=START_S)
        if not done and not any(worker.ready for worker in self._workers.values()):
            raise InputError(f"no Ray worker began within {START_S:.0f} seconds (each needs {self.threads} cores): see with `ray "
                             "status` what the cluster does")  # fmt: skip
        return [doing[reference] for reference in done]

    def _outcome(self, number: int) -> Part | None:
        """What became of the worker's job, which it then has no more; None where the worker ended, and another took its place."""
        from ray.exceptions import RayError, RayTaskError

        worker = self._workers[number]
        try:
            result = self._ray.get(worker.doing)
        except RayTaskError:  # of our own code
            raise
        except RayError as error:
            self._replace(number, " ".join(str(error).split()))
            return None
        self._lost_in_a_row = 0
        worker.doing = worker.chunk = None
        problem = result.fatal if isinstance(result, Part) else result
        if problem:
            raise InputError(f"a Ray worker cannot evaluate: {problem}")
        worker.ready = True
        return result if isinstance(result, Part) else Part()

    def _replace(self, number: int, reason: str) -> None:
        """Start another actor in the place of one that ended."""
        worker = self._workers[number]
        self._home = {arch: home for arch, home in self._home.items() if home != number}
        with contextlib.suppress(Exception):  # it is gone already, mostly
            self._ray.kill(worker.actor)
        if not worker.ready:
            self._lost_in_a_row += 1
            if self._lost_in_a_row >= TRIES * len(self._workers):
                raise InputError(f"Ray workers end before they opened the run ({reason[-300:]}): see the logs of the cluster")
        self.told("a Ray worker ended; its children are evaluated elsewhere, and another worker starts")
        self._hire(number)

    def _hire(self, number: int) -> None:
        gpus = {"num_gpus": 1} if self.device == "cuda" else {}
        actor = self._ray.remote(Holder).options(num_cpus=self.threads, **gpus).remote(self._order)
        self._workers[number] = _Worker(actor, actor.open.remote())

    def _stop(self) -> None:
        for worker in self._workers.values():
            with contextlib.suppress(Exception):
                self._ray.kill(worker.actor)
        self._workers.clear()

    def _result(self, archs: Sequence[Arch], row: Sequence[Arch], rung: int, parts: Sequence[Part]) -> dict[Arch, Samples]:
        self.spent = sum((part.spent for part in parts), self.spent)
        images, task = self.rungs[rung].images - (self.rungs[rung - 1].images if rung else 0), self.run.task
        found = {row[at]: unpack(data, images, task.columns) for part in parts for at, data in part.packed.items()}
        self.failed |= {row[at]: reason for part in parts for at, reason in part.failed.items()}
        return {arch: found[arch] for arch in archs if arch in found}


@contextmanager
def _joined(workers: Workers, device: str, threads: int, weights_bytes: int) -> Iterator[tuple[Any, int]]:
    """Ray, connected, and the number of actors; disconnected again afterwards, where it was not connected before."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    try:
        import ray
    except ImportError as error:
        raise InputError(INSTALL) from error
    if ray.is_initialized():
        yield ray, workers.actors or _fitting(ray, device, threads)
        return
    local = workers.address is None and os.environ.get("RAY_ADDRESS", "local") in {"", "local"}
    actors = workers.actors or max(1, (os.cpu_count() or 1) // threads)
    options: dict[str, Any] = {"address": workers.address or "auto"}
    if local:
        options = {"address": "local", "num_cpus": actors * threads, "include_dashboard": False,
                   "object_store_memory": STORE_BYTES + weights_bytes}  # fmt: skip
    with _quiet(ray):
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings(
                    "ignore", message="Ray Client connection timed out", category=UserWarning
                )  # it raises, too
                ray.init(**options, log_to_driver=False, configure_logging=False)
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            there = workers.address or os.environ.get("RAY_ADDRESS")
            where = "a local Ray cannot start" if local else f"no Ray cluster answers at {there}"
            raise InputError(f"{where} ({' '.join(str(error).split())[:300]}): check it with `ray status`") from error
        try:
            yield ray, actors if local else workers.actors or _fitting(ray, device, threads)
        finally:
            _shut_down(ray)


def _shut_down(ray: Any) -> None:
    """Leave Ray; of a local one, wait until its processes are gone, which it does not do itself on a busy machine."""
    node = getattr(ray._private.worker, "_global_node", None)
    listed = getattr(node, "all_processes", {}).values()  # those that this process started
    processes = [info.process for infos in listed for info in infos]
    ray.shutdown()
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(ENDING_S)


def _fitting(ray: Any, device: str, threads: int) -> int:
    """How many actors a cluster has room for."""
    resources = ray.cluster_resources()
    room = resources.get("GPU", 0) if device == "cuda" else resources.get("CPU", 0) / threads
    if room < 1:
        needs = f"{threads} cores" + (" and a GPU" if device == "cuda" else "")
        raise InputError(f"the Ray cluster has no room for a worker, which needs {needs}: ask for less, or add machines")
    return int(room)


@contextmanager
def _quiet(ray: Any) -> Iterator[None]:
    """Ray's remarks go to its log, not to standard output; its handler of SIGTERM goes with it."""
    logger, module = logging.getLogger("ray"), ray._private.worker
    level, shown = logger.level, getattr(module, "print_to_stdstream", None)
    main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM)
    logger.setLevel(logging.ERROR)
    if shown is not None:  # what raylets say of workers that ended
        module.print_to_stdstream = lambda data, *_, **__: logger.info("%s", data)
    try:
        yield
    finally:
        logger.setLevel(level)
        if shown is not None:
            module.print_to_stdstream = shown
        if main and handler is not None:
            signal.signal(signal.SIGTERM, handler)
