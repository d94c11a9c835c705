"""The training step as users of two other packages write it: `ofa` (MIT) and `nvidia-modelopt` (Apache-2.0). For train_step.py.

Both come with `pip install "nestling[bench]"`. Importing one that is not there raises `ImportError`, with a word on what is missing.
"""

from __future__ import annotations

import contextlib
import copy
import io
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from supernet.arch import Arch

STAGES, BLOCKS = range(2, 7), range(4)


class OfaStep:
    """The supernet `OFAMobileNetV3` of the space ofa-mobilenetv3, and one step of the same children by its own means.

    The largest learns from labels, the others from its soft targets and from labels, as `train_one_epoch` of that package does
    with its knowledge distillation (weight 1); the images of each child come at its resolution.
    """

    def __init__(self, memory_format: torch.memory_format, device: str) -> None:
        from ofa.imagenet_classification.elastic_nn.networks import OFAMobileNetV3
        from ofa.utils import cross_entropy_loss_with_soft_target

        torch.manual_seed(0)
        self.network = OFAMobileNetV3(dropout_rate=0, ks_list=[3, 5, 7], expand_ratio_list=[3, 4, 6], depth_list=[2, 3, 4])
        self.network.to(device).to(memory_format=memory_format).train()
        self.memory_format, self.soft_loss = memory_format, cross_entropy_loss_with_soft_target

    def activate(self, arch: Arch) -> None:
        """Switch the supernet to the subnet of `arch`."""
        choices = dict(arch)
        self.network.set_active_subnet(
            ks=[choices[f"stage{stage}_{block}.kernel_size"] for stage in STAGES for block in BLOCKS],
            e=[choices[f"stage{stage}_{block}.expand_ratio"] for stage in STAGES for block in BLOCKS],
            d=[choices[f"stage{stage}.depth"] for stage in STAGES],
        )

    def step(self, children: Sequence[Arch], images: Sequence[Tensor], labels: Tensor) -> None:
        """Gradients of one step; `images` are those of each child, in this network's memory format."""
        self.network.zero_grad()
        soft: Tensor | None = None
        for arch, crops in zip(children, images, strict=True):
            self.activate(arch)
            logits = self.network(crops)
            loss = F.cross_entropy(logits, labels)
            if soft is None:
                soft = logits.detach().softmax(1)
            else:
                loss = loss + self.soft_loss(logits, soft)
            loss.backward()

    def convolution_flops(self, arch: Arch, images: Tensor) -> int:
        """What the convolutions of a forward pass compute, to see that its subnet is our child."""
        self.activate(arch)
        return convolution_flops(self.network, images)


def convolution_flops(network: nn.Module, images: Tensor) -> int:
    """Flops of the convolutions of one forward pass."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(images)
    return int(counter.get_flop_counts()["Global"][torch.ops.aten.convolution])


class ModeloptStep:
    """`mobilenet_v2` of torchvision as a supernet of modelopt's `autonas`: four of its subnets in place, and exported as networks.

    Its users' step is one subnet, which the forward pass of a converted model draws by itself in training; its generator is seeded
    here before each, so that the exported networks are the same four. Cross entropy for all; memory format as they come.
    """

    def __init__(self, batch: int, resolution: int, device: str) -> None:
        import torchvision

        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            import modelopt.torch.nas as mtn
            from modelopt.torch.nas.utils import get_subnet_config, select
            from modelopt.torch.utils import random

            torch.manual_seed(0)
            self.reseed, generator = random._set_deterministic_seed, torch.Generator().manual_seed(0)
            self.images = torch.randn(batch, 3, resolution, resolution, generator=generator).to(device)
            self.labels = torch.randint(0, 100, (batch,), generator=generator).to(device)
            self.network = mtn.convert(torchvision.models.mobilenet_v2(num_classes=100).to(device), mode="autonas")
            self.plain = []
            for seed in self.seeds:
                self.reseed(seed)
                wanted = convolution_flops(self.network, self.images)
                subnet = copy.deepcopy(self.network)
                select(subnet, get_subnet_config(self.network, True))
                self.plain.append(mtn.export(subnet).train())
                assert convolution_flops(self.plain[-1], self.images) == wanted, "the exported network is not the subnet"

    seeds = (1, 2, 3, 4)

    def step(self) -> None:
        """Gradients of the four subnets, one after the other."""
        self.network.zero_grad()
        for seed in self.seeds:
            self._backward(self.network, seed)

    def plain_step(self) -> None:
        """Gradients of the exported networks."""
        for network, seed in zip(self.plain, self.seeds, strict=True):
            network.zero_grad()
            self._backward(network, seed)

    def _backward(self, network: nn.Module, seed: int) -> None:
        self.reseed(seed)
        F.cross_entropy(network(self.images), self.labels).backward()
