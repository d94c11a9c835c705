"""A warm start: a supernet filled with the weights of a trained network, be it timm's, a file's or another supernet's.

Names are mapped by the family (`Family.from_timm`); shapes by the rule of children: a small tensor becomes the part of the stored one
that a child of that shape uses. So if the network is a child of the space, that child *is* the network from the start, and its
batch-norm statistics are kept as those of its arch. What a network brings replaces the zero start of its residual branches too;
what it does not bring keeps its fresh values (extra blocks begin as identities).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from supernet import checkpoint, config, durable
from supernet.arch import Arch
from supernet.blocks import Classifier
from supernet.costs import block_cost
from supernet.errors import InputError
from supernet.family import BlockSpec, Slot, variants
from supernet.model import Supernet, plain
from supernet.slicing import part_of
from supernet.space import Space

TIMM = "timm:"
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True)
class Donor:
    """Trained weights under the names of a space's own children."""

    source: str
    tensors: Mapping[str, Tensor]
    nested: bool = False
    """Whether a leading part of a tensor means something by itself: true of another supernet's, not of an ordinary network's."""
    resolution: int | None = None
    """Pixels of a side of the images that it was trained on, where known."""


@dataclass(frozen=True)
class WarmStart:
    """What was taken from a donor, and what was not."""

    source: str
    arch: Arch | None
    """The child of the space that the donor is; None where it is none."""
    taken: Mapping[str, int]
    """Parameter -> numbers filled."""
    left: Mapping[str, str]
    """Tensor of the donor -> why it was not taken."""
    stored: int
    """Numbers in the supernet."""
    statistics: Mapping[str, Tensor]
    """Batch-norm statistics of `arch`, under the names of its state dict; empty without an arch."""

    def network(self, supernet: Supernet) -> nn.Sequential:
        """The donor as a child of the filled supernet, with its own statistics, in evaluation mode.

        Raises `InputError` where the donor is no child of the space.
        """
        if self.arch is None:
            raise InputError(f"{self.source} is no child of the space {supernet.space.name}: calibrate a child instead")
        network = supernet.extract(self.arch)
        network.load_state_dict({**network.state_dict(), **self.statistics})
        return network.eval()

    def told(self) -> list[str]:
        """What was taken and what not, for people."""
        filled = sum(self.taken.values())
        lines = [
            f"warm start from {self.source}: {len(self.taken)} tensors taken, {filled:,} of the supernet's {self.stored:,} weights"
        ]
        reasons: dict[str, list[str]] = {}
        for name, reason in self.left.items():
            reasons.setdefault(reason, []).append(name)
        for reason, names in reasons.items():
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            lines.append(f"not taken: {shown}: {reason}")
        if self.arch is not None:
            kept = "its batch-norm statistics are kept" if self.statistics else "it has no batch-norm statistics"
            lines.append(f"it is the child {self.arch.key} of the space; {kept}")
        else:
            lines.append(
                "it is no child of the space, so its batch-norm statistics are not kept (children are calibrated anyway)"
            )
        return lines


def fill(supernet: Supernet, donor: Donor) -> WarmStart:
    """Copy what fits from `donor` into the supernet's weights, in place. Raises `InputError` where nothing fits."""
    stored, fixed = dict(supernet.named_parameters()), _fixed_axes(supernet.space)
    given = {name: value for name, value in donor.tensors.items() if not name.endswith(STATISTICS)}
    family = supernet.space.family
    parameters = {
        name: family.fitted(name, value, stored[name].shape) if name in stored else value for name, value in given.items()
    }
    taken, left = {}, {}
    for name, value in parameters.items():
        reason = _misfit(name, value, stored, fixed, donor.nested)
        if reason:
            left[name] = reason
            continue
        whole = stored[name].detach()
        part = torch.Size(min(pair) for pair in zip(whole.shape, value.shape, strict=True))
        whole[part_of(whole.shape, part)] = value[part_of(value.shape, part)].to(whole)
        taken[name] = part.numel()
    if not taken:
        raise InputError(f"nothing of {donor.source} fits into the space {supernet.space.name}: use a network of its family "
                         f"({supernet.space.family.config.family}), no wider and no deeper than the space")  # fmt: skip
    same = all(parameters[name] is value for name, value in given.items())  # what was interpolated is another network
    arch = _child(supernet.space, parameters, stored, fixed, left, donor.resolution) if same and not donor.nested else None
    statistics = {name: value for name, value in donor.tensors.items() if name.endswith(STATISTICS)} if arch else {}
    return WarmStart(donor.source, arch, taken, left, sum(value.numel() for value in stored.values()), statistics)


def _child(
    space: Space, parameters: Mapping[str, Tensor], stored: Mapping[str, Tensor], fixed: Mapping[str, tuple[int, str]],
    left: Mapping[str, str], resolution: int | None,
) -> Arch | None:  # fmt: skip
    """The arch that the donor is, but for other classes or image channels; None where it is none."""
    if not left.keys() <= fixed.keys():
        return None
    shapes = {name: value.shape for name, value in parameters.items()}
    for name in left:
        axis = fixed[name][0]
        shapes[name] = torch.Size([*shapes[name][:axis], stored[name].shape[axis], *shapes[name][axis + 1 :]])
    return arch_of(space, shapes, resolution)


def _misfit(
    name: str, value: Tensor, stored: Mapping[str, Tensor], fixed: Mapping[str, tuple[int, str]], nested: bool
) -> str | None:
    """Why a tensor cannot be taken, or None."""
    if name not in stored:
        return "the space has no such part"
    whole = stored[name].shape
    if len(value.shape) != len(whole):
        return f"it has {len(value.shape)} axes, the space's {len(whole)}"
    if name in fixed:
        axis, what = fixed[name]
        if value.shape[axis] != whole[axis]:
            return f"it is for {value.shape[axis]} {what}, the space has {whole[axis]}"
    pairs = list(zip(whole, value.shape, strict=True))
    if any((big - small) % 2 for big, small in pairs[2:]):
        return f"its kernel {tuple(value.shape[2:])} has another centre than the space's {tuple(whole[2:])}"
    if not nested and any(small > big for big, small in pairs):
        return "it is larger than the space's largest"
    if not bool(torch.isfinite(value).all()):
        return "it holds numbers that are not finite"
    return None


def _fixed_axes(space: Space) -> dict[str, tuple[int, str]]:
    """Parameter -> (axis, what it counts), where a part would mean something else: classes, and channels of the images."""
    network = plain(space, space.largest, baked=False)
    found: dict[str, tuple[int, str]] = {}
    for path, module in network.named_modules():
        if isinstance(module, Classifier):
            found |= {f"{path}.weight": (0, "classes"), f"{path}.bias": (0, "classes")}
    first = next(name for name, _ in network.named_children())
    for path, module in network.named_modules():
        if path.split(".")[0] == first and isinstance(module, nn.Conv2d) and module.in_channels == space.family.in_channels:
            return {**found, f"{path}.weight": (1, "image channels")}
    return found


def arch_of(space: Space, shapes: Mapping[str, torch.Size], resolution: int | None = None) -> Arch | None:
    """The arch whose network has exactly these parameters (name -> shape); None where there is none.

    Choices that shapes do not show (activations) are the last ones offered; the resolution is `resolution` if it is offered.
    """
    by_slot: dict[str, dict[str, torch.Size]] = {}
    for name, shape in shapes.items():
        slot, _, path = name.partition(".")
        by_slot.setdefault(slot, {})[path] = shape
    if not by_slot.keys() <= {slot.name for slot in space.family.slots}:
        return None
    open_: dict[str, list[int]] = {dimension.name: list(range(len(dimension.choices))) for dimension in space.dimensions}
    for place in space.family.slots:
        possible = [codes for codes, fits in _fitting(space, place, by_slot.get(place.name)) if fits]
        for position, name in enumerate(place.dimensions):
            allowed = {codes[position] for codes in possible}
            open_[name] = [code for code in open_[name] if code in allowed]
    if not all(open_.values()):
        return None
    chosen: dict[str, object] = {dimension.name: dimension.choices[open_[dimension.name][-1]] for dimension in space.dimensions}
    if "resolution" in chosen and resolution in space.by_name["resolution"].choices:
        chosen["resolution"] = resolution
    try:
        arch = space.arch(chosen)
    except InputError:
        return None
    found = {name: parameter.shape for name, parameter in plain(space, arch, baked=False).named_parameters()}
    return arch if found == dict(shapes) else None


def _fitting(space: Space, slot: Slot, wanted: Mapping[str, torch.Size] | None) -> list[tuple[tuple[int, ...], bool]]:
    """Codes of the slot's choices, and whether they give a block of the wanted shapes (None: no block)."""
    known: dict[BlockSpec, bool] = {}
    found = []
    for codes, spec in variants(slot, space.by_name, space.family):
        if spec is None or wanted is None:
            found.append((codes, spec is None and wanted is None))
            continue
        geometry = spec.geometry
        if geometry not in known:
            known[geometry] = _may_fit(spec, wanted) and _shapes(geometry) == wanted
        found.append((codes, known[geometry]))
    return found


def _may_fit(spec: BlockSpec, wanted: Mapping[str, torch.Size]) -> bool:
    """A quick look: equal numbers of parameters (which only blocks that are baked count otherwise)."""
    return type(spec).bake is not BlockSpec.bake or block_cost(spec).params == sum(shape.numel() for shape in wanted.values())


def _shapes(geometry: BlockSpec) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: value.shape for name, value in geometry.build().named_parameters()}


def read_donor(space: Space, source: str) -> Donor:
    """What `source` names: `timm:NAME`, the path of a safetensors file, or the directory of a run.

    timm's weights are fetched by timm, where they are not in its cache. Raises `InputError` where there is nothing to take.
    """
    if source.startswith(TIMM):
        return _from_timm(space, source.removeprefix(TIMM))
    path = Path(source).expanduser()
    if (path / "config.json").is_file():
        newest = checkpoint.latest(path / "checkpoints")
        if newest is None:
            raise InputError(f"{path} has no whole checkpoint to start from: train it first")
        return Donor(source, checkpoint.load(newest).tensors["weights"], nested=True)
    if not config.is_file(path):
        raise InputError(f"--init is timm:NAME, a safetensors file or the directory of a run, but got {source[:200]!r}")
    return donor_of_state(space, source, read_tensors(path))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises `InputError` where it is none."""
    try:
        return load_tensors(path.read_bytes())
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as safetensors ({error}): weights are taken from .safetensors files only; pickled "
                         "ones (.pt, .pth, .bin) are never opened: convert them where you trust them") from error  # fmt: skip


def donor_of_state(space: Space, source: str, state: Mapping[str, Tensor], resolution: int | None = None) -> Donor:
    """A state dict under our own names (an extracted child's) or timm's."""
    slots = {slot.name for slot in space.family.slots}
    if state and {name.split(".")[0] for name in state} <= slots:
        return Donor(source, state, resolution=resolution)
    return Donor(source, space.family.from_timm(state), resolution=resolution)


def _from_timm(space: Space, name: str) -> Donor:
    import timm

    known = timm.list_models()
    if name.partition(".")[0] not in known:
        raise InputError(f"timm has no network {name!r}{config.nearest(name, known)}")
    try:
        network = timm.create_model(name, pretrained=True)
    except Exception as error:  # whatever the network or the hub may say
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"timm could not fetch the weights of {name!r} ({reason}): connect, or give a safetensors file"
        ) from error
    size: Any = getattr(network, "pretrained_cfg", {}).get("input_size", [None])[-1]
    return donor_of_state(space, TIMM + name, network.state_dict(), size)


def save_donor(folder: Path, donor: Donor) -> dict[str, Any]:
    """Keep a donor in `folder`, so that a run needs its source no more; returns what its config remembers of it."""
    folder.mkdir(parents=True, exist_ok=True)
    data = save_tensors({name: value.detach().cpu().contiguous() for name, value in donor.tensors.items()})
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
    return Donor(str(remembered["source"]), read_tensors(path), bool(remembered["nested"]), remembered["resolution"])


def record(folder: Path, start: WarmStart) -> None:
    """Write what was taken (`init.json`) and the statistics of the donor's arch (`statistics.safetensors`)."""
    value = {"format": 1, "source": start.source, "arch": start.arch.as_dict() if start.arch else None,
             "taken": dict(start.taken), "left": dict(start.left), "stored": start.stored}  # fmt: skip
    if start.statistics:
        durable.write_bytes(folder / "statistics.safetensors", save_tensors(dict(start.statistics)))
    durable.write_text(folder / "init.json", json.dumps(value, indent=1) + "\n")
