"""ExecuTorch gives what torch gives, and is timed by the runner; skipped where it is not installed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from deploy.runtimes.executorch import ExecuTorch, to_program
from deploy.targets import Local, Model
from supernet.space import load_space

pytest.importorskip("executorch", reason="ExecuTorch is not installed: pip install nestling[executorch]")
pytestmark = pytest.mark.filterwarnings("ignore")  # its own, at import


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("digits", marks=pytest.mark.slow),
        *(pytest.param(name, marks=pytest.mark.nightly) for name in ("cifar-mbconv", "cifar-resnet", "cifar-vit")),
    ],
)
def test_outputs_are_those_of_torch_and_it_is_timed_and_weighed(networks: Callable[..., Any], name: str) -> None:
    space = load_space(name)
    network, side, channels = networks(space, space.smallest), space.resolution(space.smallest), space.family.in_channels
    program = to_program(network, channels=channels, resolution=side)
    session = ExecuTorch().load(program)
    for count in (1, 5, 2):
        images = np.random.default_rng(count).standard_normal((count, channels, side, side), dtype=np.float32)
        with torch.no_grad():
            expected = network(torch.from_numpy(images)).numpy()
        assert np.abs(session(images) - expected).max() <= 1e-4 * max(1.0, float(np.abs(expected).max()))
    target, model = Local(runtime="executorch"), Model(program, channels, side)
    (timing,), (weight,) = target.measure([model], most_seconds=0.5), target.weigh([model], batch=3, seconds=0.1)
    assert target.fingerprint()["runtime"] == ExecuTorch().name
    target.close()
    assert timing.clock == "wall" and 0 < timing.low_ms <= timing.latency_ms
    assert weight.load_ms > 0 and weight.images_per_s > 0
