"""The supernet: every weight once, at the largest shape that any child gives it; children are plain networks over views of it.

A child's parameters are leaf tensors that view the store, and their gradients are views of the store's gradients, so the forward
and backward passes of a child are exactly those of the plain network built at its size, and gradients of several children sum
up where their weights overlap. Nothing here has a mode, and what ties children to the store is a cache, never part of the state.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from supernet.arch import Arch
from supernet.blocks import initial
from supernet.family import BlockSpec
from supernet.norms import OF_BATCH, Statistics, normalising_by
from supernet.slicing import part_of
from supernet.space import Space

MOST_BOUND_BLOCKS = 10_000
"""Blocks kept ready; beyond it (a space with free choices in every block) the cache starts anew."""

MOST_TEMPLATES = 2_000
"""Blocks without values kept ready to be copied: some ten kilobytes each."""

LAYOUT_WARNING = "grad and param do not obey the gradient layout contract"
"""Views are not dense in memory, which autograd remarks upon once; it costs nothing here, since it adds in place."""


_CONTAINERS = (dict, list, set)


@dataclass(frozen=True, slots=True)
class _Binding:
    """A stored parameter as it was when a view of it was made; the view is good as long as this still holds."""

    owner: dict[str, Any]  # the `_parameters` of the module that holds it
    name: str
    whole: nn.Parameter
    address: int
    learns: bool

    def holds(self) -> bool:
        whole = self.whole
        return self.owner.get(self.name) is whole and whole.data_ptr() == self.address and whole.requires_grad == self.learns


@dataclass(frozen=True, slots=True)
class _Purpose:
    """What a block is bound for, beside its geometry: a bound block holds no mode."""

    drop: float
    statistics: Statistics


@dataclass(frozen=True, slots=True)
class GradientBuffer:
    """The gradients of all parameters of one device and dtype, to be summed over processes: `gather`, sum `flat`, `spread`."""

    flat: Tensor
    """The gradients, and behind them a number for each parameter, above 0 where it has a gradient; shape (numbers,)."""
    parts: list[tuple[nn.Parameter, Tensor]]
    """Each parameter with its part of `flat`, in the parameter's shape."""

    @property
    def _touched(self) -> Tensor:
        return self.flat[len(self.flat) - len(self.parts) :]

    def gather(self) -> None:
        """Make `flat` the gradients as they are now: zeros where a parameter has none, whatever an earlier step left."""
        for parameter, part in self.parts:
            if parameter.grad is None:
                part.zero_()
            elif parameter.grad is not part:
                part.copy_(parameter.grad)
        touched = [float(parameter.grad is not None) for parameter, _ in self.parts]
        self._touched.copy_(torch.tensor(touched, dtype=self.flat.dtype))

    def spread(self) -> None:
        """Make `flat` the gradients of its parameters; those that no process touched have none."""
        for (parameter, part), touched in zip(self.parts, self._touched.tolist(), strict=True):
            parameter.grad = part if touched else None


class Supernet(nn.Module):
    """All weights of a space.

    Its parameters behave like any module's (`optimizer.step()`, `zero_grad()`, `.to()`, `deepcopy`, `state_dict`, EMA); they are
    named `slot.path`, as they are in a child. A parameter that no child touched since `zero_grad()` has no gradient and is left
    alone by optimizers. Hooks on these parameters never fire (autograd sees the children's), so wrappers such as DDP do not see
    the gradients either, and `torch.autograd.grad` with respect to them finds none. Second-order gradients through a child
    (`create_graph=True`) do not reach the store. Binding a child filters autograd's remark on the memory layout of views
    (`LAYOUT_WARNING`) for the process.

    The initial values are drawn from a generator seeded with `seed`.
    """

    def __init__(self, space: Space, *, seed: int = 0) -> None:
        super().__init__()
        self.space = space
        generator = torch.Generator().manual_seed(seed)
        for slot in space.family.slots:
            geometries = {
                space.family.block(slot, choices).geometry for choices in space.family.cover(slot) if slot.stands(choices)
            }
            for name, (owner, shape) in _union([_on_meta(geometry) for geometry in sorted(geometries, key=repr)]).items():
                zero = name.endswith(space.family.zero_init)
                value = torch.zeros(shape) if zero else initial(owner, name.rpartition(".")[2], shape, generator)
                _register(self, f"{slot.name}.{name}", nn.Parameter(value))
        self._drop_bindings()

    def child(
        self, arch: Arch, *, dropout: float = 0.0, drop_path: float = 0.0, statistics: Statistics = OF_BATCH
    ) -> nn.Sequential:
        """The child as a plain network over views of the shared weights, normalising by the `statistics` of each batch.

        `dropout` is the rate before the classifier; `drop_path` that of the last block, from 0 at the first (linear, Huang et al.
        2016). Blocks are shared by all children that have them: set nothing on them (no `eval()`, no hooks), and calibrate and
        evaluate an extracted copy (`extract`). Ask for the child anew after the storage moved (`.to()`, `assign=True`): one that
        was made before keeps the old weights. Assembling a child whose blocks were bound before takes well under a millisecond.
        """
        plan = self.space.plan(arch)
        network = nn.Sequential()
        for position, (slot, spec) in enumerate(plan.items()):
            rate = {"dropout": dropout, "drop_path": drop_path * position / max(1, len(plan) - 1), None: 0.0}[spec.regulariser]
            network.add_module(slot, self._bound(slot, spec.geometry, _Purpose(rate, statistics)))
        return network

    def forward(self, images_nchw: Tensor, arch: Arch) -> Tensor:
        """Output of the child `arch`, as in training (batch statistics)."""
        output: Tensor = self.child(arch)(images_nchw)
        return output

    def extract(self, arch: Arch) -> nn.Sequential:
        """The child as a plain network with contiguous weights of its own, in training mode.

        Its batch-norm statistics are not set: calibrate it before `eval()` (`supernet.calibrate`). Same rule as `child`, by copy.
        """
        network = nn.Sequential()
        for slot, spec in self.space.plan(arch).items():
            network.add_module(slot, self.extract_block(slot, spec))
        return network

    def extract_block(self, slot: str, spec: BlockSpec) -> nn.Module:
        """One block of a child, as `extract` gives it: what stands in `slot` where a plan says `spec`."""
        block = _on_meta(spec.geometry)
        with torch.inference_mode(False), torch.no_grad():
            _copy_parts(block, self._modules.get(slot))
            spec.bake(block)
        return block

    def gradient_buffers(self) -> list[GradientBuffer]:
        """Where the gradients of all children are gathered: a buffer for each device and dtype of parameters."""
        if not self._flat_gradients:
            self._make_gradient_buffers()
        return self._flat_gradients

    def _bound(self, slot: str, geometry: BlockSpec, purpose: _Purpose) -> nn.Module:
        key = (slot, geometry, purpose)
        if key in self._blocks:
            block, bindings = self._blocks[key]
            if all(binding.holds() for binding in bindings):
                return block
            self._drop_bindings()  # storage moved behind our back (`p.data = ...`, a submodule's `.to()`), or was frozen
        elif len(self._blocks) >= MOST_BOUND_BLOCKS:
            self._drop_bindings()
        with torch.inference_mode(False):  # what is bound within an inference serves training as well
            self._blocks[key] = self._bind(slot, geometry, purpose)
        return self._blocks[key][0]

    def _bind(self, slot: str, geometry: BlockSpec, purpose: _Purpose) -> tuple[nn.Module, list[_Binding]]:
        warnings.filterwarnings("ignore", message=LAYOUT_WARNING)
        block, bindings = normalising_by(purpose.statistics, _on_meta(geometry, purpose.drop)), []
        for path, module in block.named_modules():
            _use_batch_statistics(module)
            for name, meta in list(module.named_parameters(recurse=False)):
                stored = ".".join(filter(None, (slot, path, name)))
                setattr(module, name, self._view(stored, meta.shape))
                owner = self.get_submodule(stored.rpartition(".")[0])._parameters
                whole = self.get_parameter(stored)
                bindings.append(_Binding(owner, name, whole, whole.data_ptr(), whole.requires_grad))
        return block, bindings

    def _view(self, name: str, shape: torch.Size) -> nn.Parameter:
        """A leaf over a part of the parameter `name`, whose gradient is the same part of that parameter's gradient."""
        whole, buffer = self.get_parameter(name), self._gradient(name)
        index = part_of(whole.shape, shape)
        part = nn.Parameter(whole.detach()[index], requires_grad=whole.requires_grad)  # detach keeps the version counter
        if whole.requires_grad:
            part.grad = buffer[index]
            part.register_hook(_tie(whole, buffer, part, part.grad))  # type: ignore[no-untyped-call]
        return part

    def _gradient(self, name: str) -> Tensor:
        """Where the gradient of `name` is gathered: a piece of one flat buffer, laid out in memory like the parameter."""
        if not self._gradients:
            self._make_gradient_buffers()
        return self._gradients[name]

    def _make_gradient_buffers(self) -> None:
        by_kind: dict[tuple[torch.device, torch.dtype], dict[str, nn.Parameter]] = {}
        for key, parameter in self.named_parameters():
            by_kind.setdefault((parameter.device, parameter.dtype), {})[key] = parameter
        for (device, dtype), parameters in by_kind.items():
            sizes = [p.numel() for p in parameters.values()]
            flat = torch.zeros(sum(sizes) + len(sizes), device=device, dtype=dtype)
            pieces = torch.split(flat[: sum(sizes)], sizes)
            for (key, parameter), piece in zip(parameters.items(), pieces, strict=True):
                self._gradients[key] = piece.as_strided(parameter.shape, parameter.stride(), piece.storage_offset())
            self._flat_gradients.append(GradientBuffer(flat, [(p, self._gradients[key]) for key, p in parameters.items()]))

    def _drop_bindings(self) -> None:
        self._blocks: dict[tuple[str, BlockSpec, _Purpose], tuple[nn.Module, list[_Binding]]] = {}
        self._gradients: dict[str, Tensor] = {}
        self._flat_gradients: list[GradientBuffer] = []

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """`.to()`, `.cuda()`, `.double()`: new storage, so children must be tied anew; gradients move with their parameters."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._drop_bindings()
        return self

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As any module's; `assign=True` brings new storage, so children must be tied anew."""
        result = super().load_state_dict(state_dict, strict, assign)
        self._drop_bindings()
        return result

    def __getstate__(self) -> dict[str, Any]:
        """`deepcopy` and pickle carry weights, not ties."""
        return {**self.__dict__, "_blocks": {}, "_gradients": {}, "_flat_gradients": []}


def plain(space: Space, arch: Arch, *, baked: bool = True) -> nn.Sequential:
    """The ordinary network of `arch`, freshly initialised by torch: what a child is compared with, and what extraction fills.

    Not `baked`, its parameters are those of a child: a position embedding, for one, is that of the largest resolution.
    """
    network = nn.Sequential()
    for slot, spec in space.plan(arch).items():
        network.add_module(slot, spec.geometry.build())
    return _baked(space, arch, network) if baked else network


def _baked(space: Space, arch: Arch, network: nn.Sequential) -> nn.Sequential:
    with torch.no_grad():
        for spec, block in zip(space.plan(arch).values(), network, strict=True):
            spec.bake(block)
    return network


def twin(spec: BlockSpec, block: nn.Module) -> nn.Module:
    """A module of its own over the parameters of the extracted `block`, its batch-norm statistics begun anew."""
    _, copyable = _template(spec.geometry, 0.0)
    copied = _copied(block) if copyable else copy.deepcopy(block, {id(part): part for part in block.parameters()})
    with torch.inference_mode(False), torch.no_grad():
        for module in copied.modules():
            _begin_statistics(module)
    return copied


def _tie(whole: nn.Parameter, buffer: Tensor, part: nn.Parameter, view: Tensor) -> Callable[[Tensor], None]:
    """A hook that runs just before autograd adds to `part.grad` and makes sure that this addition lands in `whole.grad`."""

    def tie(_: Tensor) -> None:
        if whole.grad is not buffer:
            if whole.grad is None:  # first touch since zero_grad()
                buffer.zero_()
            else:  # somebody put a gradient of their own there
                buffer.copy_(whole.grad)
            whole.grad = buffer
        if part.grad is not view:  # zero_grad() on the child itself
            if part.grad is None:
                view.zero_()
            else:
                view.copy_(part.grad)
            part.grad = view

    return tie


def _union(blocks: list[nn.Module]) -> dict[str, tuple[nn.Module, torch.Size]]:
    """Parameter name -> (a module that owns it, the smallest shape that holds it in every block)."""
    union: dict[str, tuple[nn.Module, torch.Size]] = {}
    for block in blocks:
        for path, module in block.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                full = ".".join(filter(None, (path, name)))
                before = union[full][1] if full in union else parameter.shape
                union[full] = (module, torch.Size(max(pair) for pair in zip(before, parameter.shape, strict=True)))
    return union


def _on_meta(geometry: BlockSpec, drop: float = 0.0) -> nn.Module:
    """The block with its shapes and no values, built once and copied: building takes longer than all else."""
    block, copyable = _template(geometry, drop)
    return _copied(block) if copyable else _built_on_meta(geometry, drop)


def _built_on_meta(geometry: BlockSpec, drop: float) -> nn.Module:
    with torch.device("meta"):
        return geometry.build(drop)


@lru_cache(maxsize=MOST_TEMPLATES)
def _template(geometry: BlockSpec, drop: float) -> tuple[nn.Module, bool]:
    """A block on the meta device, and whether `_copied` copies it wholly: modules stand in one place, attributes are values."""
    block = _built_on_meta(geometry, drop)
    modules = [module for _, module in block.named_modules(remove_duplicate=False)]
    return block, len(set(modules)) == len(modules) and all(_of_values(module) for module in modules)


def _of_values(module: nn.Module) -> bool:
    registries = vars(nn.Module()).keys()
    return all(name in registries or _is_value(value) for name, value in vars(module).items())


def _is_value(value: object) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_value, value))
    return value is None or isinstance(value, bool | int | float | complex | str | torch.dtype | type)


def _copied(module: nn.Module) -> nn.Module:
    """A module of its own, its submodules too, that holds the same parameters and buffers."""
    copied = module.__class__.__new__(module.__class__)
    copied.__dict__ = {name: value.copy() if isinstance(value, _CONTAINERS) else value for name, value in vars(module).items()}
    for name, child in module._modules.items():
        copied._modules[name] = None if child is None else _copied(child)
    return copied


def _copy_parts(block: nn.Module, stored: nn.Module | None) -> None:
    """Give `block` contiguous parameters of its own, parts of those `stored` at the same path, and statistics as torch begins them."""
    for name, shape in ((name, meta.shape) for name, meta in list(block._parameters.items()) if meta is not None):
        whole = cast(nn.Module, stored).get_parameter(name).detach()
        part = whole[part_of(whole.shape, shape)]
        block._parameters[name] = nn.Parameter(part.clone(memory_format=torch.contiguous_format))
    _begin_statistics(block)
    for name, child in block.named_children():
        _copy_parts(child, None if stored is None else stored._modules.get(name))  # without parameters it has no place


def _begin_statistics(module: nn.Module) -> None:
    if isinstance(module, _BatchNorm):
        module.running_mean, module.running_var = torch.zeros_like(module.weight), torch.ones_like(module.weight)
        module.num_batches_tracked = torch.zeros((), dtype=torch.int64, device=module.weight.device)


def _register(root: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Register under a dotted name, making plain containers on the way."""
    *path, last = name.split(".")
    for part in path:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    root.register_parameter(last, parameter)


def _use_batch_statistics(module: nn.Module) -> None:
    """One child's running statistics mean nothing to another, so a child over views keeps none."""
    if isinstance(module, _BatchNorm):
        module.track_running_stats = False
        module.running_mean = module.running_var = module.num_batches_tracked = None
