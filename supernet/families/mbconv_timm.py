"""timm's names of MobileNetV2/V3's and EfficientNet's weights, and ours."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from supernet.errors import InputError

BLOCK = re.compile(r"blocks\.(\d{1,3}\.\d{1,3})\.(.+)")
INVERTED = {"conv_pw": "expand.conv", "bn1": "expand.norm", "conv_dw": "depthwise.conv", "bn2": "depthwise.norm",
            "conv_pwl": "project.conv", "bn3": "project.norm"}  # fmt: skip
SEPARABLE = {"conv_dw": "depthwise.conv", "bn1": "depthwise.norm", "conv_pw": "project.conv", "bn2": "project.norm"}
"""A block without an expansion."""
GATE = {"se.conv_reduce": "gate.reduce", "se.conv_expand": "gate.expand"}
LAST = {"conv": "expand.conv", "bn1": "expand.norm"}
"""MobileNetV3's last "block", which is the first convolution of our head."""


def our_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of one of timm's networks of inverted residuals under our names.

    What has no counterpart is left out. Raises `InputError` where there are blocks of another kind. The state dict does not show
    how convolutions pad: timm's `tf_` networks pad otherwise, so their numbers come out other.
    """
    modules = dict.fromkeys(name.rpartition(".")[0] for name in state)
    blocks: dict[str, set[str]] = {}
    for found in filter(None, (BLOCK.fullmatch(module) for module in modules)):
        blocks.setdefault(found[1], set()).add(found[2])
    if "conv_stem" not in modules or not blocks:
        raise InputError("these are no weights of timm's mobilenetv3 or efficientnet: conv_stem and blocks.0.0 must be there")
    names = {"conv_stem": "stem.conv", "bn1": "stem.norm", "classifier": "head.classifier"}
    last = [place for place, parts in blocks.items() if parts == set(LAST)]
    names |= {"conv_head": "head.widen.0"} if last else {"conv_head": "head.expand.conv", "bn2": "head.expand.norm"}
    for place, parts in blocks.items():
        stage, _, block = place.partition(".")
        slot = "head" if place in last else f"stage{int(stage) + 1}_{block}"
        names |= {f"blocks.{place}.{part}": f"{slot}.{ours}" for part, ours in _kind(place, parts).items()}
    split = {name: name.rpartition(".") for name in state}
    return {f"{names[module]}.{leaf}": state[name] for name, (module, _, leaf) in split.items() if module in names}


def _kind(place: str, parts: set[str]) -> dict[str, str]:
    own = parts - set(GATE)
    kind = next((kind for kind in (INVERTED, SEPARABLE, LAST) if own == set(kind)), None)
    if kind is None:
        raise InputError(
            f"timm's blocks.{place} is no inverted residual (it has {', '.join(sorted(own)[:4])}): use a mobilenetv3_* or "
            "efficientnet_b* without fused or other blocks"
        )
    return {**kind, **GATE}
