"""What every family of networks must hold.

Subclass `FamilySuite`, name a space, and pytest runs all of it over that space:

    class TestMine(FamilySuite):
        space = load_space("my_space.yaml")

It needs pytest. `docs/new_family.md` walks through a family of one's own.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from deploy.conformance_space import SpaceSuite
from deploy.export import to_onnx
from deploy.runtimes.onnxruntime import OnnxRuntime
from supernet.arch import Arch
from supernet.calibrate import calibrate
from supernet.costs import arch_costs
from supernet.model import Supernet, plain
from supernet.slicing import part_of

BATCH = 4


class FamilySuite(SpaceSuite):
    """Properties of a space's family."""

    image_size: ClassVar[int | None] = None
    """Pixels of test images where the networks take any size; None: each arch's own resolution."""

    @pytest.fixture(autouse=True)
    def _seeded(self) -> Iterator[None]:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            yield

    @pytest.fixture
    def supernet(self) -> Supernet:
        """A supernet whose every weight matters: nothing is left at its initial 0."""
        net = Supernet(self.space, seed=1)
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for name, parameter in net.named_parameters():
                if name.endswith(self.space.family.zero_init) or name.endswith("bias"):
                    parameter.normal_(0.5, 0.1, generator=generator)
        return net

    @pytest.fixture(params=["smallest", "largest", 0, 1, 2], ids=lambda value: f"arch-{value}")
    def arch(self, request: pytest.FixtureRequest) -> Arch:
        return self.named(request.param)

    def named(self, name: str | int) -> Arch:
        if isinstance(name, str):
            return self.space.smallest if name == "smallest" else self.space.largest
        return self.space.sample(np.random.default_rng([name, 99]))

    def images(self, arch: Arch, batch: int = BATCH) -> Tensor:
        size = self.image_size or self.space.resolution(arch)
        return torch.randn(batch, self.space.family.in_channels, size, size, generator=torch.Generator().manual_seed(3))

    def labels(self) -> Tensor:
        return torch.arange(BATCH) % self.space.family.classes

    def loss(self, outputs: Tensor) -> Tensor:
        """Something to learn from `outputs`: classes where the family classifies, else any target."""
        if self.space.family.task == "classification":
            return cross_entropy(outputs, self.labels())
        return (outputs.float() - 1).square().mean() if outputs.dtype != torch.float64 else (outputs - 1).square().mean()

    def sliced(self, supernet: Supernet, arch: Arch) -> nn.Sequential:
        """The plain network with the child's part of each stored weight, made without the code under test but for the rule."""
        network = plain(self.space, arch, baked=False).to(next(supernet.parameters()).dtype)
        stored = dict(supernet.named_parameters())
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                parameter.copy_(stored[name][part_of(stored[name].shape, parameter.shape)])
        return network

    # --- children ---

    def test_child_equals_the_plain_network_built_from_its_slice(self, supernet: Supernet, arch: Arch) -> None:
        child, network, images = supernet.child(arch), self.sliced(supernet, arch), self.images(arch)
        assert [name for name, _ in child.named_parameters()] == [name for name, _ in network.named_parameters()]
        assert torch.equal(child(images), network(images))

    def test_gradients_equal_those_of_the_plain_network(self, supernet: Supernet, arch: Arch) -> None:
        supernet.double()  # kernels sum slices and whole tensors in another order: in fp64 that stays far below any real difference
        child, network, images = supernet.child(arch), self.sliced(supernet, arch), self.images(arch).double()
        for module in (child, network):
            self.loss(module(images)).backward()
        stored = dict(supernet.named_parameters())
        for name, parameter in network.named_parameters():
            whole = stored[name].grad
            assert whole is not None and parameter.grad is not None
            part = whole[part_of(whole.shape, parameter.shape)]
            torch.testing.assert_close(part, parameter.grad, rtol=1e-9, atol=1e-12, msg=name)

    @pytest.mark.parametrize("clear", ["never", "before", "between", "child", "to_zero"])
    def test_gradients_equal_autograd_through_functional_slicing(self, supernet: Supernet, arch: Arch, clear: str) -> None:
        child, images, stored = supernet.child(arch), self.images(arch), dict(supernet.named_parameters())
        expected = self._functional_gradients(supernet, arch, images)
        if clear != "never":  # something is there to be cleared
            self.loss(supernet.child(self.space.largest)(self.images(self.space.largest))).backward()
        if clear in {"before", "to_zero"}:
            supernet.zero_grad(set_to_none=clear == "before")
        loss = self.loss(child(images))
        if clear == "between":
            supernet.zero_grad()
        if clear == "child":  # clears the child's parts; the rest of each weight keeps what others left
            supernet.zero_grad()
            child.zero_grad()
        loss.backward()
        for name, parameter in stored.items():
            if name in expected:
                assert parameter.grad is not None and torch.equal(parameter.grad, expected[name]), name
            else:
                assert parameter.grad is None or (clear == "to_zero" and not parameter.grad.any()), name

    def _functional_gradients(self, supernet: Supernet, arch: Arch, images: Tensor) -> dict[str, Tensor]:
        stored = dict(supernet.named_parameters())
        network = self.sliced(supernet, arch)
        parts = {name: stored[name][part_of(stored[name].shape, p.shape)] for name, p in network.named_parameters()}
        loss = self.loss(torch.func.functional_call(network, parts, (images,)))
        found = torch.autograd.grad(loss, list(stored.values()), allow_unused=True)
        return {name: grad for name, grad in zip(stored, found, strict=True) if grad is not None}

    def test_gradients_outside_the_slice_are_exactly_zero_and_untouched_weights_have_none(self, supernet: Supernet) -> None:
        arch = self.space.smallest
        self.loss(supernet.child(arch)(self.images(arch))).backward()
        shapes = {name: parameter.shape for name, parameter in plain(self.space, arch, baked=False).named_parameters()}
        for name, parameter in supernet.named_parameters():
            if name not in shapes:
                assert parameter.grad is None, name
                continue
            assert parameter.grad is not None
            outside = torch.ones_like(parameter, dtype=torch.bool)
            outside[part_of(parameter.shape, shapes[name])] = False
            assert not parameter.grad[outside].any(), name

    def test_gradients_of_several_children_sum(self, supernet: Supernet) -> None:
        archs = [self.space.largest, self.space.smallest, self.named(0)]
        expected: dict[str, Tensor] = {}
        for arch in archs:
            for name, grad in self._functional_gradients(supernet, arch, self.images(arch)).items():
                expected[name] = expected[name] + grad if name in expected else grad
        for arch in archs:
            self.loss(supernet.child(arch)(self.images(arch))).backward()
        for name, parameter in supernet.named_parameters():
            assert (parameter.grad is None) == (name not in expected), name
            if parameter.grad is not None:
                torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("kind", ["sgd", "sgd-foreach", "sgd-fused", "adamw", "adamw-foreach", "adamw-fused"])
    def test_an_ordinary_optimizer_loop_treats_a_child_as_a_plain_module(self, supernet: Supernet, kind: str) -> None:
        arch = self.named(1)
        supernet.double()
        child, network, images = supernet.child(arch), self.sliced(supernet, arch), self.images(arch).double()
        name, _, how = kind.partition("-")
        options = {"foreach": how == "foreach", "fused": True if how == "fused" else None}
        made = {
            module: torch.optim.SGD(module.parameters(), 0.05, momentum=0.9, weight_decay=0.01, **options)
            if name == "sgd"
            else torch.optim.AdamW(module.parameters(), 1e-3, **options)
            for module in (supernet, network)
        }
        for _ in range(3):
            for module, optimizer in ((child, made[supernet]), (network, made[network])):
                optimizer.zero_grad()
                self.loss(module(images)).backward()
                optimizer.step()
        for (where, part), whole in zip(child.named_parameters(), network.parameters(), strict=True):
            torch.testing.assert_close(part, whole, rtol=1e-6, atol=1e-9, msg=where)

    def test_gradient_clipping_and_a_user_made_gradient_reach_the_store(self, supernet: Supernet) -> None:
        arch = self.named(0)
        child, images = supernet.child(arch), self.images(arch)
        self.loss(child(images)).backward()
        before = {name: p.grad.clone() for name, p in supernet.named_parameters() if p.grad is not None}
        for parameter in supernet.parameters():
            if parameter.grad is not None:
                parameter.grad = parameter.grad * 0.5  # a tensor that is not ours
        self.loss(child(images)).backward()
        for name, grad in before.items():
            torch.testing.assert_close(supernet.get_parameter(name).grad, grad * 1.5, rtol=1e-5, atol=1e-6)
        norm = torch.nn.utils.clip_grad_norm_(supernet.parameters(), 1e-3)
        assert norm > 1e-3
        total = torch.stack([p.grad.norm() for p in supernet.parameters() if p.grad is not None]).norm()
        torch.testing.assert_close(total, torch.tensor(1e-3), rtol=1e-3, atol=0)

    @pytest.mark.parametrize("change", ["deepcopy", "channels_last", "double", "assign", "submodule", "data", "ema", "bytes"])
    def test_children_follow_when_the_storage_moves(self, supernet: Supernet, change: str) -> None:
        arch = self.named(0)
        supernet.child(arch)  # bound before the change
        moved = self._changed(supernet, change)
        with torch.no_grad():
            for parameter in moved.parameters():
                parameter.mul_(1.25)  # children of the old storage would not see this
        images = self.images(arch).to(next(moved.parameters()).dtype)
        child, network = moved.child(arch), self.sliced(moved, arch).to(images.dtype)
        tolerance = {"channels_last": 1e-4}.get(change, 0.0)  # another kernel sums in another order
        torch.testing.assert_close(child(images), network(images), rtol=tolerance, atol=tolerance)
        if change in {"deepcopy", "ema"}:
            assert not torch.equal(supernet.child(arch)(self.images(arch)), child(images))
        self.loss(child(images)).backward()
        assert {n for n, p in moved.named_parameters() if p.grad is not None} == {n for n, _ in network.named_parameters()}

    def _changed(self, net: Supernet, change: str) -> Supernet:
        if change in {"deepcopy", "ema"}:
            copied = copy.deepcopy(net) if change == "deepcopy" else ModelEmaV3(net, decay=0.5).module
            assert isinstance(copied, Supernet)
            return copied.requires_grad_(True)
        if change == "channels_last":
            return net.to(memory_format=torch.channels_last)
        if change == "double":
            return net.double()
        if change == "assign":
            net.load_state_dict({name: value.clone() for name, value in net.state_dict().items()}, assign=True)
        if change == "submodule":
            next(net.children())._apply(lambda tensor: tensor.clone())
        if change == "data":
            for parameter in net.parameters():
                parameter.data = parameter.data.clone()
        if change == "bytes":
            net.load_state_dict(load_tensors(save_tensors(net.state_dict())))
        return net

    def test_exponential_moving_average_by_deepcopy_equals_the_formula(self, supernet: Supernet) -> None:
        average = ModelEmaV3(supernet, decay=0.75)
        old = {name: value.clone() for name, value in supernet.state_dict().items()}
        arch = self.named(2)
        optimizer = torch.optim.SGD(supernet.parameters(), 0.1)
        self.loss(supernet.child(arch)(self.images(arch))).backward()
        optimizer.step()
        average.update(supernet)
        for name, value in average.module.state_dict().items():
            torch.testing.assert_close(value, 0.75 * old[name] + 0.25 * supernet.state_dict()[name], rtol=1e-5, atol=1e-7)
        extracted = average.module.extract(arch)
        assert torch.equal(average.module.child(arch)(self.images(arch)), extracted(self.images(arch)))

    def test_bf16_autocast_treats_a_child_as_a_plain_module(self, supernet: Supernet, arch: Arch) -> None:
        child, network, images = supernet.child(arch), self.sliced(supernet, arch), self.images(arch)
        grads = []
        for module in (child, network):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                output = module(images)
            assert output.dtype == torch.bfloat16
            self.loss(output.float()).backward()
            grads.append((output, [p.grad for p in module.parameters()]))
        assert torch.equal(grads[0][0], grads[1][0])
        assert all(torch.equal(a, b) for a, b in zip(grads[0][1], grads[1][1], strict=True))

    def test_a_weight_changed_between_forward_and_backward_is_noticed(self, supernet: Supernet) -> None:
        arch = self.named(0)
        loss = self.loss(supernet.child(arch)(self.images(arch)))
        with torch.no_grad():
            for parameter in supernet.parameters():
                parameter.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    def test_blocks_are_bound_once_and_regularised_ones_apart(self, supernet: Supernet) -> None:
        arch = self.space.largest
        one, two = supernet.child(arch), supernet.child(arch)
        assert all(a is b for a, b in zip(one, two, strict=True))
        dropped = supernet.child(arch, dropout=0.5, drop_path=0.5)
        regularised = [spec.regulariser is not None for spec in self.space.plan(arch).values()]
        for position, (a, b, free) in enumerate(zip(one, dropped, regularised, strict=True)):
            assert position == 0 or (a is b) == (not free)  # the first block's drop path is 0
        images = self.images(arch)
        assert torch.equal(one(images), two(images))
        assert torch.equal(dropped(images), dropped(images)) == (not any(regularised))

    def test_a_frozen_supernet_has_children_without_gradients(self, supernet: Supernet) -> None:
        supernet.requires_grad_(False)
        assert not supernet.child(self.space.smallest)(self.images(self.space.smallest)).requires_grad

    def test_freezing_and_unfreezing_after_a_child_was_bound_is_followed(self, supernet: Supernet) -> None:
        arch = self.named(0)
        images, optimizer = self.images(arch), torch.optim.SGD(supernet.parameters(), 0.1, momentum=0.9)
        supernet.requires_grad_(False)
        assert not supernet.child(arch)(images).requires_grad
        supernet.requires_grad_(True)
        self.loss(supernet.child(arch)(images)).backward()
        used = {name for name, parameter in supernet.named_parameters() if parameter.grad is not None}
        assert used == {name for name, _ in plain(self.space, arch, baked=False).named_parameters()}
        frozen = supernet.get_parameter(sorted(used)[0])
        before = frozen.detach().clone()
        frozen.requires_grad_(False)
        optimizer.zero_grad()
        self.loss(supernet.child(arch)(images)).backward()
        optimizer.step()
        assert frozen.grad is None and torch.equal(frozen, before)

    def test_a_child_bound_within_an_inference_can_be_trained_afterwards(self, supernet: Supernet) -> None:
        arch = self.named(0)
        with torch.inference_mode():
            supernet.child(arch)(self.images(arch))
        self.loss(supernet.child(arch)(self.images(arch))).backward()
        assert all(
            supernet.get_parameter(name).grad is not None for name, _ in plain(self.space, arch, baked=False).named_parameters()
        )

    # --- extraction and export ---

    def test_extract_equals_child(self, supernet: Supernet, arch: Arch) -> None:
        child, extracted, images = supernet.child(arch), supernet.extract(arch), self.images(arch)
        assert torch.equal(child(images), extracted(images))
        assert all(parameter.is_contiguous() for parameter in extracted.parameters())
        kept = {name: value.clone() for name, value in supernet.state_dict().items()}
        with torch.no_grad():
            for parameter in extracted.parameters():
                parameter.zero_()
        assert all(torch.equal(value, kept[name]) for name, value in supernet.state_dict().items())

    @pytest.mark.parametrize("name", ["smallest", 1])
    def test_the_exported_child_has_the_counted_weights_and_agrees_with_torch_at_every_batch_size(
        self, supernet: Supernet, name: str | int
    ) -> None:
        arch = self.named(name)
        size, channels = self.space.resolution(arch), self.space.family.in_channels
        generator = torch.Generator().manual_seed(5)
        batches = [torch.randn(8, channels, size, size, generator=generator) for _ in range(2)]
        extracted = supernet.extract(arch)
        with torch.no_grad():
            for parameter in extracted.parameters():  # no two are equal: the exporter stores equal ones once
                parameter.mul_(1 + 0.1 * torch.rand(parameter.shape, generator=generator))
        network = calibrate(extracted, batches)
        model = to_onnx(network, channels=channels, resolution=size)
        weights = [tensor for tensor in model.graph.initializer if tensor.dims and tensor.data_type == onnx.TensorProto.FLOAT]
        assert sum(len(tensor.raw_data) for tensor in weights) == arch_costs(self.space, arch)["model_size_bytes"]
        run = OnnxRuntime().load(model.SerializeToString())
        for count in (1, 2, 5):
            images = batches[0][:count]
            with torch.no_grad():
                expected = network(images).numpy()
            found = run(images.numpy())
            assert found.shape == expected.shape and len(found) == count
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * max(1.0, float(np.abs(expected).max())))
