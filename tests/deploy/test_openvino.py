"""OpenVINO gives what ONNX Runtime gives, and is timed by the runner like it; skipped where it is not installed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from deploy import runner
from deploy.runtimes.onnxruntime import OnnxRuntime
from deploy.runtimes.openvino import OpenVino
from deploy.targets import Local, Model
from supernet.errors import InputError

openvino = pytest.importorskip("openvino", reason="OpenVINO is not installed: pip install nestling[openvino]")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, which, threads",
    [("cifar-mbconv", 3, 1), ("cifar-resnet", 3, 2), ("cifar-vit", 3, 1), ("cifar-vit", "smallest", 2)],
)
def test_outputs_are_those_of_onnx_runtime(exported: Callable[..., Any], name: str, which: str | int, threads: int) -> None:
    space, arch, graph = exported(name, which)
    model, side = graph.SerializeToString(), space.resolution(arch)
    images = np.random.default_rng(0).standard_normal((5, space.family.in_channels, side, side), dtype=np.float32)
    expected = OnnxRuntime().load(model)(images)
    session = OpenVino().load(model, threads=threads)
    scale = max(1.0, float(np.abs(expected).max()))
    for batch in (images, images[:1], images):  # and again after another batch
        assert np.abs(session(batch) - expected[: len(batch)]).max() <= 1e-4 * scale
    timed = runner._openvino(model, [images], threads)()
    assert np.abs(next(iter(timed.values())) - expected).max() <= 1e-4 * scale


@pytest.mark.slow
def test_it_is_timed_by_the_wall_clock_and_weighed(exported: Callable[..., Any]) -> None:
    space, arch, graph = exported("cifar-mbconv", "smallest")
    target = Local(runtime="openvino")
    model = Model(graph.SerializeToString(), space.family.in_channels, space.resolution(arch))
    (timing,) = target.measure([model], most_seconds=0.5)
    (weight,) = target.weigh([model], batch=3, seconds=0.1)
    device = target.fingerprint()
    target.close()
    assert (timing.clock, device["clock"], target.name) == ("wall", "least wall time", "local:threads=1,runtime=openvino")
    assert device["runtime"] == OpenVino().name
    assert 0 < timing.low_ms <= timing.latency_ms <= timing.wall_median_ms
    assert weight.load_ms > 0 and weight.images_per_s > 0 and weight.resident_bytes > weight.added_bytes > 0


def test_a_model_that_it_cannot_read_is_one_line() -> None:
    target = Local(runtime="openvino")
    with pytest.raises(InputError, match="openvino cannot run a model") as raised:
        target.measure([Model(b"no model", 1, 8)])
    target.close()
    assert "\n" not in str(raised.value)
