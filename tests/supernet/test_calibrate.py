"""Batch-norm statistics of one child: measured on a copy, and on nothing else."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from supernet.arch import Arch
from supernet.calibrate import calibrate
from supernet.data.dataset import SplitImages
from supernet.distributed import World
from supernet.evaluate import Evaluator
from supernet.model import Supernet
from supernet.run import Run
from supernet.space import Space
from supernet.task import Classification


def batches(count: int, size: int = 5, resolution: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [2 + 3 * torch.randn(size, 1, resolution, resolution, generator=generator) for _ in range(count)]


def norms(network: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]


def trained(space: Space) -> Supernet:
    """A supernet whose every weight has moved."""
    supernet, generator = Supernet(space), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in supernet.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return supernet


def test_statistics_are_the_mean_over_equal_batches() -> None:
    """The first norm sees the convolution of each batch; so does this test."""
    network = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4))
    given = batches(3)
    with torch.no_grad():
        seen = [network[0](batch) for batch in given]
    calibrate(network, given)
    norm = norms(network)[0]
    torch.testing.assert_close(norm.running_mean, torch.stack([x.mean((0, 2, 3)) for x in seen]).mean(0))
    torch.testing.assert_close(norm.running_var, torch.stack([x.var((0, 2, 3), correction=1) for x in seen]).mean(0))


def test_every_norm_behind_another_sees_what_batch_statistics_gave_it(tiny_space: Space) -> None:
    """Norms use their batch's own statistics while they are measured, so on one batch training and evaluation agree (up to n - 1)."""
    network = trained(tiny_space).extract(tiny_space.largest)
    batch = batches(1, size=400)
    wanted = network.train()(batch[0]).detach()
    found = calibrate(network, batch)(batch[0]).detach()
    torch.testing.assert_close(found, wanted, rtol=0.02, atol=0.02)


def test_the_order_of_the_batches_does_not_matter(tiny_space: Space) -> None:
    supernet, given = trained(tiny_space), batches(4)
    one, other = (calibrate(supernet.extract(tiny_space.smallest), order) for order in (given, given[::-1]))
    for a, b in zip(norms(one), norms(other), strict=True):
        torch.testing.assert_close(a.running_mean, b.running_mean)
        torch.testing.assert_close(a.running_var, b.running_var)


def test_earlier_statistics_and_modes_are_forgotten_and_momentum_comes_back(tiny_space: Space) -> None:
    supernet, given = trained(tiny_space), batches(2)
    fresh, used = supernet.extract(tiny_space.largest), supernet.extract(tiny_space.largest)
    for number, norm in enumerate(norms(used)):
        norm.momentum = 0.01 * (number + 1)
    used(100 + batches(1)[0])
    used.eval()
    used[0].train()
    assert calibrate(used, given) is used
    calibrate(fresh, given)
    assert not any(module.training for module in used.modules())
    assert [norm.momentum for norm in norms(used)] == pytest.approx([0.01 * (n + 1) for n in range(len(norms(used)))])
    for a, b in zip(norms(fresh), norms(used), strict=True):
        assert torch.equal(a.running_mean, b.running_mean)  # type: ignore[arg-type]
        assert torch.equal(a.running_var, b.running_var)  # type: ignore[arg-type]


def test_an_evaluated_network_gives_an_image_the_same_answer_alone_and_in_company(tiny_space: Space) -> None:
    network = calibrate(trained(tiny_space).extract(tiny_space.largest), batches(2))
    images = batches(1)[0]
    torch.testing.assert_close(network(images)[:1], network(images[:1]))


def test_dropout_is_off_while_statistics_are_measured() -> None:
    network = nn.Sequential(nn.Dropout(0.9), nn.BatchNorm2d(1))
    given = batches(2)
    calibrate(network, given)
    torch.testing.assert_close(norms(network)[0].running_mean, torch.stack([x.mean((0, 2, 3)) for x in given]).mean(0))


def test_no_gradients_and_no_weights_are_touched(tiny_space: Space) -> None:
    network = trained(tiny_space).extract(tiny_space.largest)
    before = {name: parameter.clone() for name, parameter in network.named_parameters()}
    calibrate(network, batches(2))
    for name, parameter in network.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None


def test_the_supernet_and_other_children_stay_as_they_were(tiny_space: Space) -> None:
    supernet, archs = trained(tiny_space), [tiny_space.smallest, tiny_space.largest]
    state = copy.deepcopy(supernet.state_dict())
    images = batches(1)[0]
    children = [supernet.child(arch)(images).detach() for arch in archs]
    first = calibrate(supernet.extract(archs[0]), batches(2))
    statistics = copy.deepcopy(first.state_dict())
    calibrate(supernet.extract(archs[1]), [10 * batch for batch in batches(3)])
    assert supernet.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in supernet.state_dict().items())
    assert all(torch.equal(value, statistics[name]) for name, value in first.state_dict().items())
    assert all(torch.equal(supernet.child(arch)(images), was) for arch, was in zip(archs, children, strict=True))


def test_no_batches_are_an_error(tiny_space: Space) -> None:
    with pytest.raises(ValueError, match="calibration needs at least one batch of training images, but got none"):
        calibrate(Supernet(tiny_space).extract(tiny_space.smallest), [])


def test_momentum_comes_back_also_after_an_error(tiny_space: Space) -> None:
    network = Supernet(tiny_space).extract(tiny_space.smallest)
    for wrong in ([], [torch.zeros(2, 3, 8, 8)]):
        with pytest.raises((ValueError, RuntimeError)):
            calibrate(network, wrong)
        assert {norm.momentum for norm in norms(network)} == {0.1}


# --- evaluation, which calibrates every child for itself ---


@pytest.fixture
def evaluator(run: Run) -> Evaluator:
    return Evaluator(trained(run.space), run.task, run.dataset.split("train"), calibration_images=30, batch_size=4)


def archs_of(space: Space) -> list[Arch]:
    return [space.smallest, space.largest]


def test_the_score_of_a_child_does_not_depend_on_whom_was_scored_before(evaluator: Evaluator, run: Run) -> None:
    split, (one, other) = run.dataset.split("search_val"), archs_of(run.space)
    alone = evaluator.evaluate(one, split)
    evaluator.evaluate(other, split)
    assert (evaluator.evaluate(one, split) == alone).all()
    assert alone.shape == (len(split),)
    assert alone.dtype == bool


def test_scores_are_in_the_splits_order_whatever_the_batch(evaluator: Evaluator, run: Run) -> None:
    split = run.dataset.split("confirm")
    for arch in archs_of(run.space):
        network, resolution = evaluator.calibrated(arch), run.space.resolution(arch)
        preprocessing = split.preprocessing(resolution)
        images = [split.source.image(int(index)) for index in split.indices]
        one_by_one = [network(torch.from_numpy(preprocessing([image]))).argmax().item() for image in images]
        assert evaluator.scores(network, resolution, split).tolist() == (split.labels == one_by_one).tolist()


def test_calibration_sees_training_images_at_the_childs_resolution_in_equal_batches(
    evaluator: Evaluator, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Size] = []

    def spy(network: nn.Module, given: list[Tensor], world: World) -> nn.Module:
        taken = list(given)
        seen.extend(batch.shape for batch in taken)
        return calibrate(network, taken, world)

    monkeypatch.setattr("supernet.evaluate.calibrate", spy)
    monkeypatch.setattr("supernet.evaluate.CALIBRATION_BATCH", 8)
    evaluator.calibrated(run.space.smallest)
    assert seen == [(8, 1, 6, 6)] * 3  # 30 images are 3 whole batches of 8


def test_calibration_takes_no_more_images_than_there_are(run: Run) -> None:
    train: SplitImages = run.dataset.split("train")
    many = Evaluator(trained(run.space), Classification(), train, calibration_images=10_000)
    all_of_them = Evaluator(trained(run.space), Classification(), train, calibration_images=len(train))
    one, other = (evaluator.calibrated(run.space.largest) for evaluator in (many, all_of_them))
    assert all(torch.equal(a.running_var, b.running_var) for a, b in zip(norms(one), norms(other), strict=True))  # type: ignore[arg-type]
