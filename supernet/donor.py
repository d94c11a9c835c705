"""Trained weights to begin with, under the names of a space's own children: timm's, a file's or another supernet's."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from supernet import checkpoint, config, durable
from supernet.errors import InputError
from supernet.space import Space

TIMM = "timm:"


@dataclass(frozen=True)
class Donor:
    """Trained weights under the names of a space's own children."""

    source: str
    tensors: Mapping[str, Tensor]
    nested: bool = False
    """Whether a leading part of a tensor means something by itself: true of another supernet's, not of an ordinary network's."""
    resolution: int | None = None
    """Pixels of a side of the images that it was trained on, where known."""
    outputs: tuple[Tensor, Tensor] | None = None
    """Images, shape (N, C, H, W), and what the donor makes of them, where it can be asked: the proof that a child is the donor."""


def named(source: str) -> str:
    """`source` as a run remembers it: paths in full."""
    return source if source.startswith(TIMM) else str(Path(source).expanduser().resolve())


def read_donor(space: Space, source: str) -> Donor:
    """What `source` names: `timm:NAME`, the path of a safetensors file, or the directory of a run.

    timm's weights are fetched by timm, where they are not in its cache. Raises `InputError` where there is nothing to take.
    """
    if source.startswith(TIMM):
        return _from_timm(space, source.removeprefix(TIMM))
    path = Path(named(source))
    if (path / "config.json").is_file():
        return _from_run(space, path)
    if path.is_dir() or not config.is_file(path):
        what = "a directory without a run" if path.is_dir() else "no such file"
        raise InputError(f"--init is timm:NAME, a safetensors file or the directory of a run, but {source[:200]!r} is {what}")
    return donor_of_state(space, str(path), read_tensors(path))


def _from_run(space: Space, path: Path) -> Donor:
    file, chosen = path / "config.json", checkpoint.latest(path / "checkpoints")
    if chosen is None:
        raise InputError(f"{path} has no whole checkpoint to start from: train it first")
    asked = config.read(file)
    theirs = Space.from_definition(asked.get("space", {}), f"{file}: space").family
    ours = space.family
    for what, one, other in (("family", theirs.config.family, ours.config.family), ("layout", theirs.layout, ours.layout)):
        if one != other:
            raise InputError(
                f"{path} has the {what} {one}, the space {space.name} {other}: its weights mean something else there"
            )
    recipe = asked.get("recipe")
    if isinstance(recipe, dict) and recipe.get("use") == "best":
        chosen = checkpoint.best(path / "checkpoints") or chosen
    tensors = checkpoint.load(chosen).tensors
    return Donor(str(path), tensors.get("ema", tensors["weights"]), nested=True)  # what its children are taken from


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises `InputError` where it is none."""
    try:
        return load_tensors(path.read_bytes())
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as safetensors ({error}): weights are taken from .safetensors files only; pickled "
                         "ones (.pt, .pth, .bin) are never opened: convert them where you trust them") from error  # fmt: skip


def donor_of_state(space: Space, source: str, state: Mapping[str, Tensor], resolution: int | None = None) -> Donor:
    """A state dict under our own names (an extracted child's) or timm's. Raises `InputError` where it is neither."""
    slots = {slot.name for slot in space.family.slots}
    if state and {name.partition(".")[0] for name in state} <= slots:
        return Donor(source, state, resolution=resolution)
    try:
        return Donor(source, space.family.from_timm(state), resolution=resolution)
    except (ArithmeticError, LookupError, TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{source} does not hold the weights of a network that the family {space.family.config.family} can read "
                         f"({type(error).__name__}): give a state dict of timm's, or of a child") from error  # fmt: skip


def donor_of_network(space: Space, source: str, network: nn.Module) -> Donor:
    """A network of timm's, in evaluation mode; what it makes of some images travels along."""
    cfg: Any = getattr(network, "pretrained_cfg", {})
    channels, *_, size = cfg.get("input_size", (3, None))
    donor = donor_of_state(space, source, network.state_dict(), size)
    if size is None:
        return donor
    images = torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return replace(donor, outputs=(images, network(images)))


def _from_timm(space: Space, name: str) -> Donor:
    import timm

    known = timm.list_models()
    if name.partition(".")[0] not in known:
        raise InputError(f"timm has no network {name!r}{config.nearest(name, known)}")
    try:
        with _hub():
            network = timm.create_model(name, pretrained=True).eval()
    except Exception as error:  # whatever the network or the hub may say
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"timm could not fetch the weights of {name!r} ({reason}): connect, or give a safetensors file"
        ) from error
    return donor_of_network(space, TIMM + name, network)


@contextlib.contextmanager
def _hub() -> Iterator[None]:
    """Quiet, and without a minute of retries where the hub cannot be reached at all (its cache is used then)."""
    import huggingface_hub

    constants, logger = huggingface_hub.constants, logging.getLogger("huggingface_hub")
    before, level = constants.HF_HUB_OFFLINE, logger.level
    try:
        logger.setLevel(logging.ERROR)
        try:
            socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443)
        except OSError:
            constants.HF_HUB_OFFLINE = True
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
        logger.setLevel(level)


def save_donor(folder: Path, donor: Donor) -> dict[str, Any]:
    """Keep a donor in `folder`, so that a run needs its source no more; returns what its config remembers of it."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().cpu().contiguous() for name, value in donor.tensors.items()}
    if donor.outputs is not None:
        tensors |= dict(zip(OUTPUTS, donor.outputs, strict=True))
    data = save_tensors(tensors)
    durable.write_bytes(folder / "weights.safetensors", data)
    return {
        "source": donor.source,
        "nested": donor.nested,
        "resolution": donor.resolution,
        "sha256": hashlib.sha256(data).hexdigest(),
    }


def load_donor(folder: Path, remembered: Mapping[str, Any]) -> Donor:
    """Inverse of `save_donor`. Raises `InputError` where the file changed since."""
    path = folder / "weights.safetensors"
    if not path.is_file() or durable.sha256(path) != remembered.get("sha256"):
        raise InputError(f"{path} is missing or was changed since the run began: start a new run")
    tensors = read_tensors(path)
    images, outputs = (tensors.pop(name, None) for name in OUTPUTS)
    return Donor(
        str(remembered["source"]), tensors, bool(remembered["nested"]), remembered["resolution"],
        (images, outputs) if images is not None and outputs is not None else None,
    )  # fmt: skip


OUTPUTS = ("donor_images", "donor_outputs")
"""Names under which `Donor.outputs` are kept beside the weights."""
