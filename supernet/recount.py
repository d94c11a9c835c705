"""An independent count of an arch's macs and parameters: fvcore on the network itself. Slow; the proof of `supernet/costs.py`."""

from __future__ import annotations

import warnings

import torch

from supernet.arch import Arch
from supernet.model import plain
from supernet.space import Space

OPERATORS = ("conv", "linear", "addmm", "matmul", "bmm", "einsum")
"""What has multiply-accumulates; fvcore's total also counts norms and pooling, which are none."""


def recount(space: Space, arch: Arch) -> dict[str, int]:
    """`macs` of convolution, linear and matrix-product operators and `params`, counted by fvcore at batch 1."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fvcore imports and traces through what torch calls deprecated
        from fvcore.nn import FlopCountAnalysis

        size = space.resolution(arch)
        network, images = plain(space, arch).eval(), torch.zeros(1, space.family.in_channels, size, size)
        analysis = FlopCountAnalysis(network, images).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        by_operator = analysis.tracer_warnings("none").by_operator()
    params = sum(parameter.numel() for parameter in network.parameters())
    return {"macs": int(sum(by_operator[name] for name in OPERATORS)), "params": params}
