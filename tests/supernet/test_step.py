"""One step of the method: its gradients against those of plain networks, one loss at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from supernet import losses
from supernet.arch import Arch
from supernet.losses import SOFT, Distillation
from supernet.model import Supernet
from supernet.norms import Statistics
from supernet.preprocess import Preprocessing
from supernet.sandwich import sandwich, step_rng
from supernet.slicing import part_of
from supernet.space import Space
from supernet.step import Resizer, StepConfig, losses_without_gradients, normalised, train_step
from supernet.task import Classification

Gradients = dict[str, Tensor]
task = Classification()


@pytest.fixture
def supernet(tiny_space: Space) -> Supernet:
    """In double precision, with every weight (also those that start at 0) away from 0."""
    supernet, generator = Supernet(tiny_space, seed=1).double(), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in supernet.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return supernet


@pytest.fixture
def images() -> Tensor:
    return torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


LABELS = torch.tensor([0, 1, 2, 2, 1, 0])


def children_of(space: Space, count: int = 4) -> list[tuple[str, Arch]]:
    return sandwich(space, count, step_rng(5, 0))


def resized(images: Tensor, resolution: int) -> Tensor:
    return F.interpolate(images, size=resolution, mode="bicubic", antialias=True)


def add_to(total: Gradients, supernet: Supernet, network: nn.Module) -> None:
    """Add the gradients of a plain network to those of the store, where its weights lie."""
    stored = dict(supernet.named_parameters())
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None
        whole = total.setdefault(name, torch.zeros_like(stored[name]))
        whole[part_of(whole.shape, parameter.shape)] += parameter.grad


def expected(supernet: Supernet, children: list[tuple[str, Arch]], images: Tensor, config: StepConfig) -> Gradients:
    """The rule written out: every child a plain copy, every loss by itself, the gradients summed."""
    total: Gradients = {}
    soft: Tensor | None = None
    for _, arch in children:
        network = supernet.extract(arch)
        outputs = network(resized(images, supernet.space.resolution(arch)))
        if soft is None:
            loss = F.cross_entropy(outputs.float(), LABELS, label_smoothing=config.label_smoothing)
            soft = outputs.detach().float().softmax(-1)
        else:
            to_labels = F.cross_entropy(outputs.float(), LABELS)
            to_teacher = -(soft * outputs.float().log_softmax(-1)).sum(-1).mean()
            loss = (1 - config.soft_weight) * to_labels + config.soft_weight * to_teacher
        loss.backward()  # type: ignore[no-untyped-call]
        add_to(total, supernet, network)
    return total


def gradients(supernet: Supernet) -> Gradients:
    return {name: parameter.grad.clone() for name, parameter in supernet.named_parameters() if parameter.grad is not None}


def assert_equal(found: Gradients, wanted: Gradients) -> None:
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("soft_weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_step_adds_up_the_gradients_of_every_childs_own_loss(
    supernet: Supernet, images: Tensor, soft_weight: float, count: int
) -> None:
    config, children = StepConfig(soft_weight=soft_weight, label_smoothing=0.1), children_of(supernet.space, count)
    train_step(supernet, children, images, LABELS, task, config)
    found = gradients(supernet)
    assert_equal(found, expected(supernet, children, images, config))
    assert any(gradient.abs().max() > 1e-3 for gradient in found.values())


def test_a_weight_that_no_child_uses_has_no_gradient(supernet: Supernet, images: Tensor) -> None:
    train_step(supernet, [("largest", supernet.space.smallest)], images, LABELS, task, StepConfig())
    named = dict(supernet.named_parameters())
    assert named["stage1_1.project.conv.weight"].grad is None
    depthwise = named["stage1_0.depthwise.conv.weight"].grad
    assert depthwise is not None
    assert depthwise[:8, :, 1:4, 1:4].abs().max() > 0
    assert depthwise[8:].abs().max() == 0
    assert depthwise[:, :, 0].abs().max() == 0


def test_the_teacher_gets_no_gradient_from_what_it_teaches(supernet: Supernet, images: Tensor) -> None:
    """The soft targets carry no graph, and the loss of the largest is that to the labels alone."""
    seen: list[Tensor] = []

    class Spy(Classification):
        def student_loss(
            self, outputs: Tensor, targets: Tensor, soft: Tensor, weight: float, distillation: Distillation = SOFT
        ) -> Tensor:
            seen.append(soft)
            assert not soft.requires_grad
            return super().student_loss(outputs, targets, soft, weight, distillation) * 0  # what is left is the teacher's own

    train_step(supernet, children_of(supernet.space), images, LABELS, Spy(), StepConfig())
    found = gradients(supernet)
    wanted = expected(supernet, children_of(supernet.space, 1), images, StepConfig())
    assert_equal({name: gradient for name, gradient in found.items() if name in wanted}, wanted)
    assert len(seen) == 3
    assert all(soft is seen[0] for soft in seen)  # computed once


def test_steps_without_clearing_in_between_add_up(supernet: Supernet, images: Tensor) -> None:
    children = children_of(supernet.space)
    train_step(supernet, children, images, LABELS, task, StepConfig())
    once = gradients(supernet)
    train_step(supernet, children, images, LABELS, task, StepConfig())
    assert_equal(gradients(supernet), {name: 2 * gradient for name, gradient in once.items()})
    supernet.zero_grad()
    train_step(supernet, children, images, LABELS, task, StepConfig())
    assert_equal(gradients(supernet), once)


def test_a_step_moves_no_weights_and_leaves_images_and_labels(supernet: Supernet, images: Tensor) -> None:
    before = [value.clone() for value in (*supernet.parameters(), images, LABELS)]
    train_step(supernet, children_of(supernet.space), images, LABELS, task, StepConfig(dropout=0.5, drop_path=0.5))
    assert all(torch.equal(a, b) for a, b in zip(before, (*supernet.parameters(), images, LABELS), strict=True))


# --- what every child is given ---


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What each child was asked for with, and the images it saw."""
    calls: list[dict[str, Any]] = []
    child = Supernet.child

    def spy(self: Supernet, arch: Arch, **rates: float) -> Callable[[Tensor], Tensor]:
        network = child(self, arch, **rates)

        def forward(images: Tensor) -> Tensor:
            calls.append({"arch": arch, "rates": rates, "images": images})
            return network(images)

        return forward

    monkeypatch.setattr(Supernet, "child", spy)
    return calls


@pytest.mark.slow
def test_every_child_sees_the_same_crops_at_its_own_resolution(
    supernet: Supernet, images: Tensor, calls: list[dict[str, Any]]
) -> None:
    children = children_of(supernet.space, 8)
    train_step(supernet, children, images, LABELS, task, StepConfig())
    assert [call["arch"] for call in calls] == [arch for _, arch in children]
    assert {call["images"].shape[-1] for call in calls} == {6, 8}
    for call in calls:
        resolution = supernet.space.resolution(call["arch"])
        assert call["images"].shape == (6, 1, resolution, resolution)
        torch.testing.assert_close(call["images"], images if resolution == 8 else resized(images, 6))


@pytest.mark.parametrize("everybody", [False, True])
def test_the_largest_is_regularised_and_the_others_only_when_asked(
    supernet: Supernet, images: Tensor, calls: list[dict[str, Any]], everybody: bool
) -> None:
    config = StepConfig(dropout=0.3, drop_path=0.2, regularise_all=everybody)
    train_step(supernet, children_of(supernet.space), images, LABELS, task, config)
    rates = [(call["rates"]["dropout"], call["rates"]["drop_path"]) for call in calls]
    assert rates == [(0.3, 0.2), *[(0.3, 0.2) if everybody else (0.0, 0.0)] * 3]


# --- divided ---


@pytest.mark.parametrize("statistics", [Statistics(group=2), Statistics(group=3)])
def test_micro_batches_give_the_gradient_of_the_whole(supernet: Supernet, images: Tensor, statistics: Statistics) -> None:
    """With equal groups under batch norm; 3 does not divide the micro-batch of 2, and is an error."""
    children = children_of(supernet.space)
    whole = StepConfig(soft_weight=0.4, label_smoothing=0.1, statistics=statistics)
    results = train_step(supernet, children, images, LABELS, task, whole)
    wanted = gradients(supernet)
    supernet.zero_grad()
    if statistics.group == 3:
        with pytest.raises(ValueError, match="groups of 3 images"):
            train_step(supernet, children, images, LABELS, task, replace(whole, micro_batch=2))
        return
    again = train_step(supernet, children, images, LABELS, task, replace(whole, micro_batch=2))
    assert_equal(gradients(supernet), wanted)
    for one, other in zip(results, again, strict=True):
        torch.testing.assert_close(one.loss, other.loss)
        torch.testing.assert_close(one.score, other.score)


def test_without_groups_micro_batches_are_normalised_by_themselves(supernet: Supernet, images: Tensor) -> None:
    children = children_of(supernet.space, 1)
    train_step(supernet, children, images, LABELS, task, StepConfig(micro_batch=2))
    parts = gradients(supernet)
    supernet.zero_grad()
    train_step(supernet, children, images, LABELS, task, StepConfig(statistics=Statistics(group=2)))
    assert_equal(parts, gradients(supernet))


def test_processes_weigh_their_images_by_their_share_and_a_mean_divides_by_the_children(
    supernet: Supernet, images: Tensor
) -> None:
    children = children_of(supernet.space)
    train_step(supernet, children, images, LABELS, task, StepConfig())
    whole = gradients(supernet)
    for config, factor in ((StepConfig(share=0.25), 0.25), (StepConfig(mean=True), 0.25)):
        supernet.zero_grad()
        train_step(supernet, children, images, LABELS, task, config)
        assert_equal(gradients(supernet), {name: factor * gradient for name, gradient in whole.items()})


def test_losses_of_candidates_are_theirs_and_leave_no_gradient(supernet: Supernet, images: Tensor) -> None:
    archs = [arch for _, arch in children_of(supernet.space)]
    config = StepConfig(share=0.5)
    found = losses_without_gradients(supernet, archs, images, LABELS, task, config, Resizer(images))
    for loss, arch in zip(found, archs, strict=True):
        outputs = supernet.extract(arch)(resized(images, supernet.space.resolution(arch))).detach()
        torch.testing.assert_close(loss, 0.5 * losses.label_loss(outputs, LABELS))
    assert not gradients(supernet)


@pytest.mark.parametrize("rates", [{"dropout": 0.9}, {"drop_path": 0.9}])
def test_regularisation_changes_the_largest_and_follows_torchs_generator(
    supernet: Supernet, images: Tensor, rates: dict[str, float]
) -> None:
    def stepped(seed: int, **rates: float) -> Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return train_step(supernet, children_of(supernet.space, 1), images, LABELS, task, StepConfig(**rates))[0].loss

    plain = stepped(0)
    assert torch.equal(stepped(1), plain)
    assert not torch.equal(stepped(0, **rates), plain)
    assert torch.equal(stepped(0, **rates), stepped(0, **rates))
    assert len({float(stepped(seed, **rates)) for seed in range(6)}) > 1


def test_the_results_are_each_childs_loss_to_the_labels_and_score(supernet: Supernet, images: Tensor) -> None:
    children = children_of(supernet.space)
    results = train_step(supernet, children, images, LABELS, task, StepConfig(soft_weight=1.0, label_smoothing=0.2))
    assert [result.role for result in results] == ["largest", "smallest", "random", "random"]
    for result, (_, arch) in zip(results, children, strict=True):
        outputs = supernet.extract(arch)(resized(images, supernet.space.resolution(arch))).detach()
        torch.testing.assert_close(result.loss, losses.label_loss(outputs, LABELS))
        assert float(result.score) == pytest.approx(float((outputs.argmax(-1) == LABELS).double().mean()))
        assert not result.loss.requires_grad


def test_bf16_gives_nearly_the_same_gradients_in_fp32(tiny_space: Space, images: Tensor) -> None:
    supernet, children = Supernet(tiny_space, seed=1), children_of(tiny_space)
    train_step(supernet, children, images.float(), LABELS, task, StepConfig())
    exact = gradients(supernet)
    supernet.zero_grad()
    train_step(supernet, children, images.float(), LABELS, task, StepConfig(bf16=True))
    found = gradients(supernet)
    assert found.keys() == exact.keys()
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}
    ours, theirs = (torch.cat([values[name].flatten() for name in sorted(exact)]) for values in (found, exact))
    assert F.cosine_similarity(ours, theirs, dim=0) > 0.98
    assert not torch.equal(ours, theirs)


# --- images ---


def test_a_resolution_is_made_once_and_the_largest_not_at_all(images: Tensor) -> None:
    crops = Resizer(images)
    assert crops.at(8) is images
    assert crops.at(6) is crops.at(6)
    torch.testing.assert_close(crops.at(6), resized(images, 6))


def test_normalised_images_are_those_of_deployment() -> None:
    pixels_nhwc = torch.arange(2 * 5 * 5 * 3, dtype=torch.uint8).reshape(2, 5, 5, 3)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    columns = [torch.tensor(values).view(1, 3, 1, 1) for values in (mean, std)]
    ours = normalised(pixels_nhwc.permute(0, 3, 1, 2), *columns)
    assert ours.dtype == torch.float32
    assert ours.is_contiguous(memory_format=torch.channels_last)
    deployed = Preprocessing(5, 1.0, mean, std).normalise(pixels_nhwc.numpy())
    torch.testing.assert_close(ours, torch.from_numpy(deployed), rtol=0, atol=1e-6)
