"""How exact the closed form is: every space against fvcore on its networks, and timm's networks against ours.

    python benchmarks/exactness.py [--quick] [--space NAME]

For each space: ends, and the largest difference of macs and params to fvcore's count over random children. For each space that holds a
network of timm: that network with random weights and statistics, copied in; outputs and macs side by side. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings

import numpy as np
import timm
import torch
from fvcore.nn import FlopCountAnalysis

from supernet import config
from supernet.costs import arch_costs
from supernet.donor import donor_of_state
from supernet.model import Supernet
from supernet.recount import OPERATORS, recount
from supernet.run import environment
from supernet.space import Space, load_space
from supernet.warm import fill

PARITY = {
    "efficientnet-b0": "efficientnet_b0", "mobilenetv3-large": "mobilenetv3_large_100", "resnet50d": "resnet50d",
    "vit-tiny": "vit_tiny_patch16_224",
}  # fmt: skip


def against_fvcore(space: Space, children: int) -> dict[str, object]:
    rng = np.random.default_rng(11)
    archs = dict.fromkeys([space.smallest, space.largest])
    for _ in range(20 * children):
        if len(archs) >= children + 2:
            break
        archs[space.sample(rng)] = None
    worst = {"macs": 0, "params": 0}
    for arch in archs:
        costs, counted = arch_costs(space, arch), recount(space, arch)
        worst = {name: max(worst[name], abs(costs[name] - counted[name])) for name in worst}
    ends = [arch_costs(space, arch) for arch in (space.smallest, space.largest)]
    return {"archs": float(space.size), "children": len(archs), **{f"{name}_difference": value for name, value in worst.items()},
            **{f"{which}_{name}": end[name] for which, end in zip(("smallest", "largest"), ends, strict=True)
               for name in ("macs", "params")}}  # fmt: skip


def against_timm(space: Space, name: str) -> dict[str, object]:
    """The network through the door that users take: a warm start of a supernet, whose child is that network."""
    torch.manual_seed(0)
    theirs = timm.create_model(name, pretrained=False).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in theirs.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1, generator=generator)
                module.running_var.uniform_(0.5, 1.5, generator=generator)
            for parameter in module.parameters(recurse=False):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    supernet = Supernet(space)
    size = theirs.pretrained_cfg["input_size"][-1]
    begun = fill(supernet, donor_of_state(space, name, theirs.state_dict(), size))
    ours, images = begun.network(supernet), torch.randn(4, 3, size, size, generator=generator)
    with torch.no_grad():
        expected, found = theirs(images), ours(images)
    costs = arch_costs(space, space.smallest)
    return {
        "timm": name, "difference": float((found - expected).abs().max() / expected.abs().max()), "macs": costs["macs"],
        "timm_macs": fvcore_macs(name, size), "params": costs["params"],
        "timm_params": sum(parameter.numel() for parameter in theirs.parameters()),
    }  # fmt: skip


def fvcore_macs(name: str, size: int) -> int:
    timm.layers.set_fused_attn(False)
    network = timm.create_model(name, pretrained=False).eval()
    timm.layers.set_fused_attn(True)
    analysis = FlopCountAnalysis(network, torch.zeros(1, 3, size, size)).unsupported_ops_warnings(False)
    by_operator = analysis.uncalled_modules_warnings(False).tracer_warnings("none").by_operator()
    return int(sum(by_operator[operator] for operator in OPERATORS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--space", action="append", help="only this one (may be repeated)")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    here, start = environment(), time.monotonic()
    spaces, parity = {}, {}
    for name in given.space or config.names("spaces"):
        space = load_space(name)
        row = spaces[name] = against_fvcore(space, 1 if given.quick else 200)
        print(
            f"{name:20} {row['archs']:9.3g} archs  macs {row['smallest_macs']:>13,} to {row['largest_macs']:>14,}  params "
            f"{row['smallest_params']:>11,} to {row['largest_params']:>11,}  worst difference to fvcore over {row['children']} "
            f"children: {row['macs_difference']} macs, {row['params_difference']} params",
            flush=True,
        )
        if name in PARITY:
            row = parity[name] = against_timm(space, PARITY[name])
            print(
                f"{'':20} timm {row['timm']}: largest difference {row['difference']:.2g} of the largest logit; macs {row['macs']:,} "
                f"here, {row['timm_macs']:,} there; params {row['params']:,} here, {row['timm_params']:,} there",
                flush=True,
            )
    print(
        f"{time.monotonic() - start:.0f} s; {here['processor']}; torch {here['versions']['torch']}, timm {here['versions']['timm']}"
    )
    print(json.dumps({"benchmark": "exactness", "seed": 11, "spaces": spaces, "parity": parity, "processor": here["processor"],
                      "versions": here["versions"]}))  # fmt: skip


if __name__ == "__main__":
    main()
