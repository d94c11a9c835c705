"""Profiles of real models on this machine: every family, int8, several threads. Errors are told, not asserted: machines are noisy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from deploy.latency import LatencyModel
from deploy.profiling import profile
from deploy.targets import Local
from supernet.costs import Costs
from supernet.space import load_space


@pytest.mark.parametrize(
    ("name", "target", "blocks"),
    [
        pytest.param("mlp", Local(precision="int8"), True, marks=pytest.mark.slow),
        pytest.param("cell", Local(threads=2), True, marks=pytest.mark.slow),
        *(
            pytest.param(name, target, blocks, marks=pytest.mark.nightly)
            for name, blocks in (("digits", True), ("cifar-resnet", True), ("cifar-vit", True), ("cell", True), ("mlp", True),
                                 ("autoencoder", True), ("attentivenas", False), ("autoformer-tiny", False))
            for target in (Local(), Local(precision="int8"), Local(threads=2))
        ),
    ],
)  # fmt: skip
def test_a_space_is_profiled(name: str, target: Local, blocks: bool, tmp_path: Path) -> None:
    space = load_space(name)
    model = profile(space, target, children=6, held_out=6, blocks=blocks)
    target.close()
    model.save(tmp_path / "model.json")
    again = LatencyModel.load(tmp_path / "model.json", space, target)
    codes = space.encode([space.smallest, space.largest, *(space.sample(np.random.default_rng(seed)) for seed in range(20))])
    found = again.on(Costs(space))(codes)
    assert np.isfinite(found).all() and found.min() > 0
    measured = {child.key: child.latency_ms for child in (*model.fitted, *model.held_out)}
    assert measured[space.largest.key] > measured[space.smallest.key]
    assert model.target["precision"] == target.precision and model.target["threads"] == target.threads
    print(f"{name} on {target.name}: {model.summary()}")
