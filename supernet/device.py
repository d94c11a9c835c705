"""What computes: the device, asked for by name and never guessed silently, and the number of threads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from supernet.errors import InputError

DEVICES = ("auto", "cpu", "cuda")


def choose(name: str) -> str:
    """Give "cpu" or "cuda"; "auto" is the GPU where there is one. Raises `InputError` for a GPU that is not there."""
    import torch

    if name not in DEVICES:
        raise InputError(f"a device is one of {', '.join(DEVICES)}, but got {name!r}")
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("torch sees no CUDA device here: use --device cpu, or install a torch with CUDA and a driver")
    return name


SMALL_MACS = 20_000_000
"""Largest child below which one thread is as fast as several: handing out the work takes as long as doing it."""


@contextmanager
def fitting_threads(largest_macs: int) -> Iterator[None]:
    """Compute with one thread where the networks are small, with torch's own number else; restores that number.

    On a busy machine, several threads that wait for each other at every small operator are slower by far than one.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1 if largest_macs < SMALL_MACS else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h


def keep_memory() -> bool:
    """Let the C library keep freed memory for the next step, for the rest of the process; whether it does (glibc alone can).

    By default every large tensor is mapped anew and freed to the system, and the system clears each of its pages again: a tenth and
    more of the CPU time of a step. The process then keeps its peak of memory until it ends.
    """
    import ctypes

    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
