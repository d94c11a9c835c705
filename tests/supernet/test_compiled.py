"""Compiled children: the same gradients in the same places, and nothing compiled but the fixed archs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from supernet.arch import Arch
from supernet.compiled import CompiledChildren
from supernet.errors import InputError
from supernet.model import Supernet
from supernet.sandwich import sandwich, step_rng
from supernet.slicing import part_of
from supernet.space import Space
from supernet.step import StepConfig, train_step
from supernet.task import Classification

LABELS = torch.tensor([0, 1, 2, 2, 1, 0])


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def supernet(tiny_space: Space) -> Supernet:
    supernet, generator = Supernet(tiny_space, seed=1), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in supernet.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return supernet


def images_of(space: Space, arch: Arch) -> Tensor:
    size = space.resolution(arch)
    return torch.randn(6, 1, size, size, generator=torch.Generator().manual_seed(3))


class Counting:
    """A backend that runs what it is given as it is, and counts how often it is asked."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        self.graphs += 1
        return graph.forward


def gradients(supernet: Supernet, network: Callable[[Tensor], Tensor], arch: Arch) -> dict[str, Tensor]:
    supernet.zero_grad()
    outputs = network(images_of(supernet.space, arch))
    nn.functional.cross_entropy(outputs, LABELS).backward()  # type: ignore[no-untyped-call]
    return {name: p.grad.clone() for name, p in supernet.named_parameters() if p.grad is not None}


def check_gradients(supernet: Supernet, backend: str) -> None:
    """Over two steps: the compiled ends have the gradients of the ordinary ones, and zeros outside their part of the store."""
    space, compiled = supernet.space, CompiledChildren(supernet, backend=backend)
    stored = dict(supernet.named_parameters())
    for arch in (space.largest, space.smallest, space.largest):
        wanted = gradients(supernet, supernet.child(arch), arch)
        found = gradients(supernet, compiled(arch), arch)
        assert found.keys() == wanted.keys()
        shapes = {name: parameter.shape for name, parameter in supernet.child(arch).named_parameters()}
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-5)
            outside = gradient.clone()
            outside[part_of(stored[name].shape, shapes[name])] = 0
            assert not outside.any(), name
        assert any(gradient.abs().max() > 1e-3 for gradient in found.values())


@pytest.mark.slow
def test_compiled_ends_have_the_gradients_of_ordinary_children(supernet: Supernet) -> None:
    check_gradients(supernet, "aot_eager")


@pytest.mark.nightly
def test_ends_compiled_by_inductor_have_the_gradients_of_ordinary_children(supernet: Supernet) -> None:
    check_gradients(supernet, "inductor")


@pytest.mark.slow
def test_two_hundred_random_children_compile_nothing_beyond_the_ends(supernet: Supernet) -> None:
    space, backend, rng = supernet.space, Counting(), np.random.default_rng(4)
    compiled = CompiledChildren(supernet, backend=backend)
    for number in range(200):
        arch = space.sample(rng)
        if arch not in (space.largest, space.smallest):
            assert type(compiled(arch)) is nn.Sequential
        if number % 20 == 0:
            for each in (arch, space.largest, space.smallest):
                compiled(each)(images_of(space, each)).sum().backward()
    assert backend.graphs == 2


@pytest.mark.slow
def test_a_step_with_compiled_ends_is_the_step(supernet: Supernet) -> None:
    space, backend, found = supernet.space, Counting(), []
    for child in (None, CompiledChildren(supernet, backend=backend)):
        supernet.zero_grad()
        images = images_of(space, space.largest)
        train_step(supernet, sandwich(space, 4, step_rng(5, 0)), images, LABELS, Classification(), StepConfig(), child=child)
        found.append([p.grad.clone() for p in supernet.parameters() if p.grad is not None])
    assert backend.graphs == 2
    assert len(found[0]) == len(found[1])
    for ordinary, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, ordinary)


@pytest.mark.slow
def test_weights_that_moved_are_compiled_anew_and_not_remembered(supernet: Supernet) -> None:
    space, backend = supernet.space, Counting()
    compiled, images = CompiledChildren(supernet, [space.smallest], backend=backend), images_of(space, space.smallest)
    before = compiled(space.smallest)(images)
    moved = {name: 2 * value for name, value in supernet.state_dict().items()}
    supernet.load_state_dict(moved, assign=True)
    after = compiled(space.smallest)(images)
    torch.testing.assert_close(after, supernet.child(space.smallest)(images))
    assert not torch.allclose(after, before)
    with torch.no_grad():
        supernet.get_parameter("head.classifier.weight").mul_(3)  # in place: the same compiled child sees it
    graphs = backend.graphs
    torch.testing.assert_close(compiled(space.smallest)(images), supernet.child(space.smallest)(images))
    assert backend.graphs == graphs


@pytest.mark.slow
def test_each_purpose_has_a_compiled_child_of_its_own(supernet: Supernet) -> None:
    arch, compiled = supernet.space.smallest, CompiledChildren(supernet, backend=Counting())
    assert compiled(arch) is compiled(arch)
    assert compiled(arch, dropout=0.5) is not compiled(arch)
    assert compiled(arch, dropout=0.5) is compiled(arch, dropout=0.5)


def test_an_arch_of_another_space_is_refused(supernet: Supernet) -> None:
    with pytest.raises(InputError, match="archs of the space tiny"):
        CompiledChildren(supernet, [Arch((("width", 3),))])
