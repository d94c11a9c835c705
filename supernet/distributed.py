"""Several processes train or evaluate one supernet together, each on its share of the images: `torchrun` starts them.

Gradients of a step lie in one flat buffer (`supernet/model.py`), which is summed over the processes once a step. Hooks on the
supernet's parameters never fire, so `DistributedDataParallel` cannot do it; and it would reduce once a child.
"""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch import distributed as dist

from supernet.errors import InputError

if TYPE_CHECKING:
    from supernet.model import Supernet

TIMEOUT_S = 600.0
"""Longest wait for another process, in seconds; the environment variable `NESTLING_TIMEOUT_S` sets another."""

LEAVING_S = 3.0
"""How long a process that ends with an error of its own may take to say it, after `torchrun` told it to end."""

LOST = re.compile(r"connection|timed out|timeout|broken pipe|socket|remote (process|worker)|NCCL", re.IGNORECASE)
"""What torch's backends say when the other end is gone; they raise plain `RuntimeError`s."""


RESUME = (
    "look for its message, then start the same command again (a training: `nestling train --resume --out RUN`), on any number of "
    "processes"
)
ENDED = f"nestling: ended by SIGTERM, which torchrun sends when another process of this job ended: {RESUME}\n"


class ProcessLost(InputError):
    """Another process of this job ended, or does not answer."""


@dataclass(frozen=True)
class World:
    """The processes of this job, as one of them sees it: its `rank` 0..`size` - 1 and its device. Alone by default.

    Every process must call the same methods in the same order. All raise `ProcessLost` when another one ended.
    """

    rank: int = 0
    size: int = 1
    device: str = "cpu"

    @property
    def main(self) -> bool:
        """Whether this process writes files and speaks to people."""
        return self.rank == 0

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum over the processes, in place; the same bits in all of them. `tensor` is dense and has the same shape everywhere."""
        return self._together(summed_, tensor)

    def gather(self, data: bytes) -> list[bytes]:
        """What every process gave, in the order of ranks; lengths may differ."""
        if self.size == 1:
            return [data]
        lengths = torch.zeros(self.size, dtype=torch.int64, device=self.device)
        lengths[self.rank] = len(data)
        ends = self.sum_(lengths).cumsum(0).tolist()
        joined = torch.zeros(ends[-1], dtype=torch.uint8, device=self.device)
        joined[ends[self.rank] - len(data) : ends[self.rank]] = _bytes(data).to(self.device)
        whole = self.sum_(joined).cpu().numpy().tobytes()
        return [whole[start:end] for start, end in zip([0, *ends], ends, strict=False)]

    def broadcast(self, value: Any) -> Any:
        """The main process's `value`: of a tensor (same shape everywhere, filled in place), or of what JSON can say.

        Of the latter every process, the main one too, gets what comes back from JSON; what the others give is ignored.
        """
        if isinstance(value, Tensor):
            return self._together(_broadcast, value)
        data = json.dumps(value).encode() if self.main else b""
        return json.loads(self.gather(data)[0])

    def barrier(self) -> None:
        """Wait until every process is here."""
        self.sum_(torch.zeros(1, device=self.device)).tolist()

    def _together(self, operation: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
        """Do it in place, on this process's device: NCCL takes tensors of its GPU only."""
        if self.size > 1:
            there = tensor.to(self.device)
            operation(there)
            if there is not tensor:
                tensor.copy_(there)
        return tensor

    def share(self, count: int) -> range:
        """Which of `count` things are this process's: runs of as equal length as can be, in the order of ranks."""
        return range(self.rank * count // self.size, (self.rank + 1) * count // self.size)


ALONE = World()


@contextmanager
def world(device: str = "cpu") -> Iterator[World]:
    """Join the other processes that `torchrun` started, until the end; without `torchrun`, `World(device=device)` and no more.

    `device` is "cpu" (gloo) or "cuda" (NCCL, one process a GPU: that of LOCAL_RANK). Raises `InputError` for an environment that
    is incomplete, more processes than GPUs, or processes that do not meet within the timeout.
    """
    if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
        yield World(device=device)
        return
    rank, size = _number("RANK"), _number("WORLD_SIZE")
    where, timeout = f"{_variable('MASTER_ADDR')}:{_variable('MASTER_PORT')}", _timeout()
    gpu = _own_gpu() if device == "cuda" else None
    try:
        with _peers():
            dist.init_process_group(
                "gloo" if gpu is None else "nccl", timeout=timeout, rank=rank, world_size=size, device_id=gpu
            )
    except ProcessLost as error:
        raise ProcessLost(
            f"the {size} processes of this job did not meet at {where} ({_in_short(error.__cause__)}): start all of them by torchrun"
        ) from error
    well = False
    try:
        with _last_words():
            if gpu is None:
                yield World(rank, size, device)
            else:
                with torch.cuda.device(gpu):
                    yield World(rank, size, str(gpu))
        well = True
    except dist.DistError as error:  # of NCCL, which tells late
        raise _lost(error) from error
    finally:
        if well or gpu is None:  # NCCL would wait here for those that an error ended
            dist.destroy_process_group()


@contextmanager
def _last_words() -> Iterator[None]:
    """Meanwhile, on SIGTERM say what to do and end at once: `torchrun` sends it to the others as soon as a process ended.

    A thread does so, for this one may be waiting for a device or another process, and then hears no signal. Where an error ends
    this process already, that has its own words.
    """
    if threading.current_thread() is not threading.main_thread():  # others may not handle signals
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    leaving = threading.Event()

    def listen() -> None:
        while number := os.read(reader, 1):
            if number[0] == signal.SIGTERM:
                if leaving.is_set():
                    time.sleep(LEAVING_S)
                else:
                    os.write(2, ("\n" * os.isatty(2) + ENDED).encode())  # below the progress
                os._exit(128 + signal.SIGTERM)
        os.close(reader)

    threading.Thread(target=listen, daemon=True).start()
    handler, before = signal.signal(signal.SIGTERM, lambda *_: None), signal.set_wakeup_fd(writer)
    try:
        yield
    except BaseException:
        leaving.set()
        raise
    signal.set_wakeup_fd(before)
    signal.signal(signal.SIGTERM, handler)
    os.close(writer)  # which ends the thread


def reduce_gradients(supernet: Supernet, world: World) -> None:
    """Sum the supernet's gradients over the processes: one reduction for each device and dtype of parameters.

    A parameter that a child of any process touched has a gradient everywhere; one that none touched has none.
    """
    if world.size > 1:
        for buffer in supernet.gradient_buffers():
            buffer.gather()
            world.sum_(buffer.flat)
            buffer.spread()


def processes() -> int:
    """How many processes this one has joined, itself included."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def summed_(tensor: Tensor) -> Tensor:
    """Sum over the processes, in place."""
    with _peers():
        dist.all_reduce(tensor)
    return tensor


def _broadcast(tensor: Tensor) -> Tensor:
    with _peers():
        dist.broadcast(tensor, 0)
    return tensor


def gathered(tensor: Tensor) -> Tensor:
    """The `tensor` of every process, along a new first axis; the same shape everywhere."""
    result = tensor.new_empty(processes() * tensor.numel())
    gather = getattr(
        dist, "all_gather_single", dist.all_gather_into_tensor
    )  # the name since torch 2.14, which warns of the other
    with _peers():
        gather(result, tensor.flatten())
    return result.view(-1, *tensor.shape)


@contextmanager
def _peers() -> Iterator[None]:
    """Says in plain words that another process is gone; other errors pass."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or LOST.search(str(error)):
            raise _lost(error) from error
        raise


def _lost(error: BaseException) -> ProcessLost:
    return ProcessLost(f"another process of this job ended or does not answer ({_in_short(error)}): {RESUME}")


def _in_short(error: BaseException | None) -> str:
    """First sentence of torch's message, without the place in its source."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return re.sub(r"^\[\S+:\d+\] ", "", line).split(". ")[0].rstrip(".")


def _variable(name: str) -> str:
    value = os.environ.get(name)
    if not value:
        raise InputError(f"a process of several needs the environment that torchrun sets, but {name} is not set: start by torchrun, or "
                         "unset RANK and WORLD_SIZE to run alone")  # fmt: skip
    return value


def _number(name: str) -> int:
    value = _variable(name)
    if not value.isdecimal():
        raise InputError(f"the environment variable {name} is a number, but is {value!r}: start by torchrun, which sets it")
    return int(value)


def _timeout() -> timedelta:
    value = os.environ.get("NESTLING_TIMEOUT_S", str(TIMEOUT_S))
    try:
        seconds = timedelta(seconds=float(value))
    except (ValueError, OverflowError):
        seconds = timedelta(0)
    if seconds <= timedelta(0):
        raise InputError(
            f"NESTLING_TIMEOUT_S is a number of seconds above 0, but is {value!r}: set one, or unset it ({TIMEOUT_S:.0f})"
        )
    return seconds


def _own_gpu() -> torch.device:
    here, gpus = _number("LOCAL_WORLD_SIZE"), torch.cuda.device_count()
    if here > gpus:
        raise InputError(f"each process needs a GPU of its own, but {here} run on this machine and torch sees {gpus} here: "
                         f"give torchrun --nproc-per-node {max(1, gpus)}")  # fmt: skip
    return torch.device("cuda", _number("LOCAL_RANK"))


def _bytes(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.zeros(0, dtype=torch.uint8)
