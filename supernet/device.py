"""The device that computes: asked for by name, never guessed silently."""

from __future__ import annotations

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
