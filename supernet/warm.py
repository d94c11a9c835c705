"""A warm start: a supernet filled with the weights of a trained network (`supernet/donor.py`).

Names are mapped by the family (`Family.from_timm`); shapes by the rule of children: a small tensor becomes the part of the stored one
that a child of that shape uses. So if the network is a child of the space, that child *is* the network from the start (but for position
embeddings, which are interpolated where the grid differs), and its batch-norm statistics are kept as those of its arch. What a network
brings replaces the zero start of its residual branches too, block by block; what it does not bring keeps its fresh values.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from supernet import durable
from supernet.arch import Arch
from supernet.costs import MOST_ROWS
from supernet.donor import Donor
from supernet.errors import InputError
from supernet.family import BlockSpec, Slot, block_cost, variants
from supernet.model import Supernet, plain
from supernet.slicing import part_of
from supernet.space import Space

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
LEAST_TAKEN = 0.1
"""Share of a donor's weights below which it is hardly of use, and most likely the wrong network."""


@dataclass(frozen=True)
class WarmStart:
    """What was taken from a donor, and what was not."""

    source: str
    arch: Arch | None
    """The child of the space that the donor is; None where it is none, or shapes alone leave several."""
    taken: Mapping[str, int]
    """Parameter -> numbers filled."""
    left: Mapping[str, str]
    """Tensor of the donor -> why it was not taken."""
    stored: int
    """Numbers in the supernet."""
    statistics: Mapping[str, Tensor]
    """Batch-norm statistics of `arch`, under the names of its state dict; empty without an arch."""
    proven: bool = False
    """Whether the outputs of donor and child were compared; else only shapes were."""

    def network(self, supernet: Supernet) -> nn.Sequential:
        """The donor as a child of the filled supernet, with its own statistics, in evaluation mode; what was left out is fresh.

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
        count = f"{len(self.taken)} tensors taken, {filled:,} of the supernet's {self.stored:,} weights"
        lines, reasons = [f"warm start from {self.source}: {count}"], dict[str, list[str]]()
        for name, reason in sorted(self.left.items()):
            reasons.setdefault(reason, []).append(ascii(name)[1:-1][:80])
        for reason, names in reasons.items():
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            lines.append(f"not taken: {shown}: {reason}")
        if self.arch is None:
            return [*lines, "it cannot be told to be one child of the space; children are calibrated as always"]
        how = "by its outputs" if self.proven else "by its shapes; see that activations and pooling agree too"
        kept = "; its batch-norm statistics are kept" if self.statistics else ""
        return [*lines, f"it is the child {self.arch.key} of the space ({how}){kept}"]


def fill(supernet: Supernet, donor: Donor) -> WarmStart:
    """Copy what fits from `donor` into the supernet's weights, in place. Raises `InputError` where hardly anything fits."""
    space, stored = supernet.space, dict(supernet.named_parameters())
    given = {name: value for name, value in donor.tensors.items() if not name.endswith(STATISTICS)}
    fitting = _Fitting(space, stored, donor.nested)
    parameters = {name: fitting.fitted(name, value) for name, value in given.items()}
    left = fitting.left_out(parameters)
    numbers = sum(value.numel() for value in given.values())
    taken = {name: fitting.part(name, value).numel() for name, value in parameters.items() if name not in left}
    if sum(taken.values()) < LEAST_TAKEN * numbers or not taken:
        raise InputError(f"hardly anything of {donor.source} fits into the space {space.name} ({sum(taken.values()):,} of {numbers:,} "
                         f"weights): use a network of its family ({space.family.config.family}) and layout, no wider and no deeper "
                         "than the space")  # fmt: skip
    for name in taken:
        whole, value, part = stored[name].detach(), parameters[name], fitting.part(name, parameters[name])
        whole[part_of(whole.shape, part)] = value[part_of(value.shape, part)].to(whole)
    same = all(parameters[name] is value for name, value in given.items())  # what was interpolated is another network
    arch = fitting.child(parameters, left, donor.resolution) if same and not donor.nested else None
    if arch is not None and donor.outputs is not None and not _is_the_donor(space, arch, donor):
        arch = None
    statistics = _statistics(space, arch, donor) if arch is not None else {}
    count = sum(value.numel() for value in stored.values())
    return WarmStart(donor.source, arch, taken, left, count, statistics, arch is not None and donor.outputs is not None)


def _statistics(space: Space, arch: Arch, donor: Donor) -> dict[str, Tensor]:
    """The donor's batch-norm statistics, where all of them are there and sound; else none."""
    wanted = {name: value for name, value in plain(space, arch).state_dict().items() if name.endswith(STATISTICS[:2])}
    found = {name: donor.tensors[name] for name in wanted if name in donor.tensors}
    sound = all(
        value.shape == wanted[name].shape and value.is_floating_point() and bool(torch.isfinite(value).all())
        and (name.endswith("mean") or bool((value >= 0).all()))
        for name, value in found.items()
    )  # fmt: skip
    return found if sound and found.keys() == wanted.keys() else {}


def _is_the_donor(space: Space, arch: Arch, donor: Donor) -> bool:
    """Whether the child makes of the donor's images what the donor makes of them (what shapes do not show may differ)."""
    assert donor.outputs is not None
    images, expected = donor.outputs
    same = {**space.definition, "classes": int(expected.shape[-1]), "in_channels": int(images.shape[1])}
    network = plain(Space.from_definition(same), arch)
    network.load_state_dict(donor.tensors, strict=False)
    with torch.no_grad():
        found = network.eval()(images)
    return bool((found - expected).abs().max() <= 1e-3 * expected.abs().max())


class _Fitting:
    """What of a donor fits into the stored parameters of a space."""

    def __init__(self, space: Space, stored: Mapping[str, Tensor], nested: bool) -> None:
        self.space, self.stored, self.nested = space, stored, nested
        self.fixed = _fixed_axes(space)

    def fitted(self, name: str, value: Tensor) -> Tensor:
        """What the family makes of it (interpolated positions), where it holds numbers at all."""
        sound = name in self.stored and value.is_floating_point() and bool(value.numel())
        return self.space.family.fitted(name, value, self.stored[name].shape) if sound else value

    def part(self, name: str, value: Tensor) -> torch.Size:
        """Shape of what both have."""
        return torch.Size(min(pair) for pair in zip(self.stored[name].shape, value.shape, strict=True))

    def left_out(self, parameters: Mapping[str, Tensor]) -> dict[str, str]:
        """Name -> why it is not taken. Residual branches keep their zero start where a block is not taken whole."""
        left = {name: reason for name, value in parameters.items() if (reason := self._misfit(name, value))}
        broken = {name.partition(".")[0] for name in left if name not in self.fixed}
        for name in parameters:
            if name not in left and name.endswith(self.space.family.zero_init) and name.partition(".")[0] in broken:
                left[name] = "it stays 0, since the rest of its block does not fit"
        return left

    def _misfit(self, name: str, value: Tensor) -> str | None:
        if name not in self.stored:
            return "the space has no such part"
        whole = self.stored[name].shape
        if not value.is_floating_point() or not value.numel():
            return f"it holds no weights ({str(value.dtype).removeprefix('torch.')}, shape {tuple(value.shape)})"
        if len(value.shape) != len(whole):
            return f"it has {len(value.shape)} axes, the space's {len(whole)}"
        if name in self.fixed:
            axis, what = self.fixed[name]
            if value.shape[axis] != whole[axis]:
                return f"it is for {value.shape[axis]} {what}, the space has {whole[axis]}"
        pairs = list(zip(whole, value.shape, strict=True))
        if any((big - small) % 2 for big, small in pairs[2:]):
            return f"its kernel {tuple(value.shape[2:])} has another centre than the space's {tuple(whole[2:])}"
        if not self.nested and any(small > big for big, small in pairs):
            return "it is larger than the space's largest"
        if not bool(torch.isfinite(value.to(self.stored[name].dtype)).all()):
            return "it holds numbers that are not finite"
        return None

    def child(self, parameters: Mapping[str, Tensor], left: Mapping[str, str], resolution: int | None) -> Arch | None:
        """The arch that the donor is, but for other classes or image channels; None where it is none."""
        if not left.keys() <= self.fixed.keys():
            return None
        shapes = {name: value.shape for name, value in parameters.items()}
        for name in left:
            axis = self.fixed[name][0]
            shapes[name] = torch.Size([*shapes[name][:axis], self.stored[name].shape[axis], *shapes[name][axis + 1 :]])
        return arch_of(self.space, shapes, resolution)


def _fixed_axes(space: Space) -> dict[str, tuple[int, str]]:
    """Parameter -> (axis, what it counts), where a part would mean something else: classes, and what the images bring."""
    network = plain(space, space.largest, baked=False)
    found: dict[str, tuple[int, str]] = {}
    first = next(name for name, _ in network.named_children())
    for path, module in network.named_modules():
        counts = getattr(module, "counts", None)
        if counts is not None:
            found |= {f"{path}.weight": (0, str(counts)), f"{path}.bias": (0, str(counts))}
        if path.partition(".")[0] == first and isinstance(module, nn.Conv2d) and module.in_channels == space.family.in_channels:
            found.setdefault(f"{path}.weight", (1, "image channels"))
        if path.partition(".")[0] == first and isinstance(module, nn.Linear):
            found.setdefault(f"{path}.weight", (1, "pixels"))
    return found


def arch_of(space: Space, shapes: Mapping[str, torch.Size], resolution: int | None = None) -> Arch | None:
    """The arch whose network has exactly these parameters (name -> shape); None where there is none, or several.

    The resolution, which shapes do not show, is `resolution` if it is offered, else the largest.
    """
    if any(math.prod(len(space.by_name[name].choices) for name in slot.dimensions) > MOST_ROWS for slot in space.family.slots):
        return None  # operations on many edges: shapes hardly tell them apart
    by_slot: dict[str, dict[str, torch.Size]] = {}
    for name, shape in shapes.items():
        slot, _, path = name.partition(".")
        by_slot.setdefault(slot, {})[path] = shape
    if not by_slot.keys() <= {slot.name for slot in space.family.slots}:
        return None
    left: dict[str, list[int]] = {dimension.name: list(range(len(dimension.choices))) for dimension in space.dimensions}
    for place in space.family.slots:
        possible = [codes for codes, fits in _fitting(space, place, by_slot.get(place.name)) if fits]
        for position, name in enumerate(place.dimensions):
            allowed = {codes[position] for codes in possible}
            left[name] = [code for code in left[name] if code in allowed]
    return _the_one(space, left, shapes, resolution) if all(left.values()) else None


def _the_one(
    space: Space, left: Mapping[str, list[int]], shapes: Mapping[str, torch.Size], resolution: int | None
) -> Arch | None:
    """The arch of the choices that are left, if it has these shapes and is the only one."""
    chosen: dict[str, object] = {dimension.name: dimension.choices[left[dimension.name][-1]] for dimension in space.dimensions}
    if "resolution" in chosen and resolution in space.by_name["resolution"].choices:
        chosen["resolution"] = resolution
    several = [(name, code) for name, codes in left.items() if name != "resolution" for code in codes[:-1]]
    try:
        arch = space.arch(chosen)
        others = [space.arch({**chosen, name: space.by_name[name].choices[code]}) for name, code in several]
    except InputError:
        return None
    found = {name: parameter.shape for name, parameter in plain(space, arch, baked=False).named_parameters()}
    return arch if found == dict(shapes) and all(other == arch for other in others) else None


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


def record(folder: Path, start: WarmStart) -> None:
    """Write what was taken (`init.json`) and the statistics of the donor's arch (`statistics.safetensors`)."""
    value = {"format": 1, "source": start.source, "arch": start.arch.as_dict() if start.arch else None, "proven": start.proven,
             "taken": dict(start.taken), "left": dict(start.left), "stored": start.stored}  # fmt: skip
    if start.statistics:
        durable.write_bytes(folder / "statistics.safetensors", save_tensors(dict(start.statistics)))
    durable.write_text(folder / "init.json", json.dumps(value, indent=1) + "\n")
