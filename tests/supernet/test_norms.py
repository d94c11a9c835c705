"""Batch norms over groups and over processes, against plain ones. What several real processes do is in `test_distributed.py`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from supernet import norms
from supernet.model import Supernet
from supernet.norms import BatchNorm, Statistics, grouped_batch_norm, normalising_by
from supernet.space import Space


def draws(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (x * torch.linspace(1, 3, len(x), dtype=x.dtype).view(-1, *[1] * (x.ndim - 1))).to(dtype)


def norm_of(kind: type[nn.BatchNorm1d | nn.BatchNorm2d], channels: int) -> nn.BatchNorm1d | nn.BatchNorm2d:
    norm = kind(channels).double()
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(-1, 2, channels))
        norm.bias.copy_(torch.linspace(3, -1, channels))
    return norm


def outputs_and_gradients(network: Callable[[Tensor], Tensor], parameters: list[Tensor], x: Tensor) -> list[Tensor]:
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = network(x)
    return [y, *torch.autograd.grad((y * y.detach().sin()).sum(), [x, *parameters])]


KINDS = [(nn.BatchNorm1d, (12, 5)), (nn.BatchNorm1d, (12, 5, 7)), (nn.BatchNorm2d, (12, 5, 3, 4))]


@pytest.mark.parametrize(("kind", "shape"), KINDS)
@pytest.mark.parametrize("group", [3, 4, 12])
def test_each_group_is_normalised_as_by_a_plain_norm_alone(
    kind: type[nn.BatchNorm2d], shape: tuple[int, ...], group: int
) -> None:
    norm = norm_of(kind, 5)
    grouped = BatchNorm(norm, Statistics(group=group))
    parameters: list[Tensor] = [norm.weight, norm.bias]
    found = outputs_and_gradients(grouped, parameters, draws(*shape))
    parts = [outputs_and_gradients(norm, parameters, part) for part in draws(*shape).split(group)]
    y, x, weight, bias = zip(*parts, strict=True)
    for one, other in zip(found, [torch.cat(y), torch.cat(x), sum(weight), sum(bias)], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_a_group_of_the_whole_batch_is_a_plain_norm_bit_for_bit() -> None:
    norm = norm_of(nn.BatchNorm2d, 5)
    wanted = norm(draws(12, 5, 3, 4))
    assert torch.equal(BatchNorm(norm, Statistics(group=12))(draws(12, 5, 3, 4)), wanted)
    assert not torch.equal(BatchNorm(norm, Statistics(group=6))(draws(12, 5, 3, 4)), wanted)


def test_the_layout_in_memory_stays() -> None:
    x = draws(6, 4, 3, 3).contiguous(memory_format=torch.channels_last)
    y = grouped_batch_norm(x, None, None, 1e-5, 2)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, grouped_batch_norm(x.contiguous(), None, None, 1e-5, 2))


@pytest.mark.parametrize(("kind", "shape"), KINDS)
def test_synchronised_alone_is_a_plain_norm_bit_for_bit(kind: type[nn.BatchNorm2d], shape: tuple[int, ...]) -> None:
    norm = norm_of(kind, 5)
    assert torch.equal(BatchNorm(norm, Statistics(synchronised=True))(draws(*shape)), norm(draws(*shape)))


@pytest.fixture
def as_if_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if another process had the same images: twice of everything has the same mean and variance."""
    monkeypatch.setattr(norms, "processes", lambda: 2)
    monkeypatch.setattr(norms, "gathered", lambda tensor: torch.stack([tensor, tensor]))
    monkeypatch.setattr(norms, "summed_", lambda tensor: tensor.mul_(2))


@pytest.mark.usefixtures("as_if_twice")
@pytest.mark.parametrize(("kind", "shape"), KINDS)
def test_the_formulas_of_a_synchronised_norm(kind: type[nn.BatchNorm2d], shape: tuple[int, ...]) -> None:
    norm = norm_of(kind, 5)
    parameters: list[Tensor] = [norm.weight, norm.bias]
    found = outputs_and_gradients(BatchNorm(norm, Statistics(synchronised=True)), parameters, draws(*shape))
    for one, other in zip(found, outputs_and_gradients(norm, parameters, draws(*shape)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures("as_if_twice")
def test_a_synchronised_norm_without_scale_and_shift() -> None:
    norm = nn.BatchNorm2d(5, affine=False).double()
    found = outputs_and_gradients(BatchNorm(norm, Statistics(synchronised=True)), [], draws(12, 5, 3, 4))
    for one, other in zip(found, outputs_and_gradients(norm, [], draws(12, 5, 3, 4)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures("as_if_twice")
def test_under_bf16_autocast_statistics_are_in_fp32() -> None:
    """Means of 300 are exact to 1 in bf16: normalised in it, these maps would be noise."""
    norm = nn.BatchNorm2d(5)
    x = (300 + 2 * draws(12, 5, 3, 4)).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = [BatchNorm(norm, statistics)(x) for statistics in (Statistics(synchronised=True), Statistics(group=12))]
    assert {y.dtype for y in found} == {torch.bfloat16}
    wanted = nn.BatchNorm2d(5).double()(x.double())
    for y in found:
        torch.testing.assert_close(y.double(), wanted, rtol=0.01, atol=0.01)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"group": 0}, "a group of batch statistics has at least 1 image, but got 0"),
        ({"group": -4}, "but got -4"),
        ({"group": 4, "synchronised": True}, "batch statistics are of groups or synchronised, but got both"),
    ],
)  # fmt: skip
def test_impossible_statistics_are_refused(given: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Statistics(**given)  # type: ignore[arg-type]


@pytest.mark.parametrize("images", [5, 3, 1])
def test_a_batch_that_does_not_divide_is_refused(images: int) -> None:
    with pytest.raises(ValueError, match=f"divided into groups of 4 images for batch statistics, but has {images}"):
        grouped_batch_norm(draws(images, 2, 3, 3), None, None, 1e-5, 4)


def test_norms_are_found_at_every_depth_and_nothing_else_is_changed() -> None:
    inner = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.LayerNorm(4))
    network = nn.Sequential(nn.Linear(3, 4), inner, nn.BatchNorm1d(4))
    kept = [network[0], inner[0], inner[2]]
    names = [name for name, _ in network.named_parameters()]
    assert normalising_by(Statistics(), network) is network
    assert [type(inner[1]), type(network[2])] == [nn.BatchNorm1d] * 2
    assert normalising_by(Statistics(group=2), network) is network
    assert [type(inner[1]), type(network[2])] == [BatchNorm] * 2
    assert all(one is other for one, other in zip([network[0], inner[0], inner[2]], kept, strict=True))
    assert [name for name, _ in network.named_parameters()] == names
    assert isinstance(normalising_by(Statistics(group=2), nn.BatchNorm2d(3)), BatchNorm)


# --- children ---


def images(space: Space, count: int = 8) -> Tensor:
    return draws(count, 1, space.largest_resolution, space.largest_resolution)


def trained(space: Space) -> Supernet:
    supernet, generator = Supernet(space).double(), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in supernet.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return supernet


def test_by_default_a_child_has_torchs_own_norms(tiny_space: Space) -> None:
    child = Supernet(tiny_space).child(tiny_space.largest)
    found = {type(module) for module in child.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)}
    assert nn.BatchNorm2d in found
    assert found <= {nn.BatchNorm1d, nn.BatchNorm2d}


def test_children_of_several_statistics_stand_side_by_side(tiny_space: Space) -> None:
    supernet, arch, x = trained(tiny_space), tiny_space.largest, images(tiny_space)
    before = supernet.child(arch)
    wanted = before(x)
    grouped = supernet.child(arch, statistics=Statistics(group=4))
    outputs = torch.cat([before(part) for part in x.split(4)])
    torch.testing.assert_close(grouped(x), outputs, rtol=1e-10, atol=1e-10)
    assert (grouped(x) - wanted).abs().max() > 1e-3
    assert torch.equal(before(x), wanted)
    assert all(one is other for one, other in zip(supernet.child(arch), before, strict=True))
    again = supernet.child(arch, statistics=Statistics(group=4))
    assert all(one is other for one, other in zip(again, grouped, strict=True))


def test_gradients_of_groups_are_those_of_the_groups_one_after_another(tiny_space: Space) -> None:
    one, other, x = trained(tiny_space), trained(tiny_space), images(tiny_space)
    for arch in (tiny_space.largest, tiny_space.smallest):
        F.cross_entropy(one.child(arch, statistics=Statistics(group=2))(x), torch.arange(8) % 3).backward()
        for number, part in enumerate(x.split(2)):
            (F.cross_entropy(other.child(arch)(part), (torch.arange(2) + 2 * number) % 3) / 4).backward()
    found, wanted = (
        {name: p.grad for name, p in supernet.named_parameters() if p.grad is not None} for supernet in (one, other)
    )
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-8, atol=1e-10)


def test_an_extracted_child_has_plain_norms_whatever_was_bound(tiny_space: Space) -> None:
    supernet = Supernet(tiny_space)
    supernet.child(tiny_space.largest, statistics=Statistics(group=2))
    assert not any(isinstance(module, BatchNorm) for module in supernet.extract(tiny_space.largest).modules())
