"""The exported child against timm's own export of the same network, in ONNX Runtime: latency as a ratio, ours over theirs.

    python benchmarks/export_latency.py [--networks resnet50d ...] [--quick]

Four spaces hold one child that timm has, with the same weights here. Theirs is exported by `timm.utils.onnx.onnx_export` as its script
does. One thread, batch 1, CPU time of that thread; a round times both in turn, in random order; the ratio is the median over rounds of
that round's, its interval a bootstrap over rounds. Also export time and size of every file of ours. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import timm
import torch
from numpy.typing import NDArray

from deploy.export import to_onnx
from deploy.formats import one_by_one, session
from deploy.graph import fixed, halved, quiet
from deploy.mobile import to_ort
from supernet.model import plain
from supernet.run import environment
from supernet.space import Space, load_space

NETWORKS = {
    "efficientnet-b0": "efficientnet_b0", "mobilenetv3-large": "mobilenetv3_large_100", "resnet50d": "resnet50d",
    "vit-tiny": "vit_tiny_patch16_224",
}  # fmt: skip
"""Space -> timm's name."""


def theirs(name: str, images: torch.Tensor) -> tuple[torch.nn.Module, bytes]:
    """The network of timm, with weights that are not those of initialisation alone, and its export."""
    from timm.utils.onnx import onnx_export

    torch.manual_seed(0)
    network = timm.create_model(name, exportable=True).eval()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    with tempfile.TemporaryDirectory() as folder, quiet():
        path = Path(folder) / "theirs.onnx"
        onnx_export(network, str(path), example_input=images, check=False)
        return network, path.read_bytes()


def times(
    runs: dict[str, Callable[[Any], Any]], images: NDArray[np.float32], rounds: int, seconds: float
) -> dict[str, NDArray[Any]]:
    """CPU time of a call of each, in ms, by round."""
    rng, taken = np.random.default_rng(0), {name: list[float]() for name in runs}
    for run in runs.values():
        for _ in range(3):
            run(images)
    end = time.monotonic() + seconds
    while len(next(iter(taken.values()))) < rounds or time.monotonic() < end:
        for name in rng.permutation(list(runs)):
            start = time.thread_time()
            runs[name](images)
            taken[name].append(1e3 * (time.thread_time() - start))
    return {name: np.array(values) for name, values in taken.items()}


def ratio(ours: NDArray[Any], other: NDArray[Any]) -> dict[str, float]:
    """Median over rounds of ours over theirs, with a 95 % bootstrap interval."""
    each = ours / other
    drawn = np.median(np.random.default_rng(0).choice(each, (2_000, len(each))), axis=1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return {"ratio": float(np.median(each)), "ratio_low": float(low), "ratio_high": float(high),
            "ratio_of_least": float(ours.min() / other.min())}  # fmt: skip


def exported(space: Space, network: torch.nn.Module) -> tuple[onnx.ModelProto, float]:
    """Our export of the space's child with their weights, and the seconds it took."""
    ours = plain(space, space.largest).eval()
    ours.load_state_dict(space.family.from_timm(network.state_dict()))
    begun = time.perf_counter()
    model = to_onnx(ours, channels=3, resolution=space.resolution(space.largest))
    return model, time.perf_counter() - begun


def compared(name: str, rounds: int, seconds: float) -> dict[str, Any]:
    """One network."""
    space = load_space(name)
    side = space.resolution(space.largest)
    images = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    network, data = theirs(NETWORKS[name], images)
    model, export_seconds = exported(space, network)
    still = fixed(model)
    files = {"onnx": model.SerializeToString(), "fixed": still.SerializeToString(), "fp16": halved(model).SerializeToString(),
             "ort": to_ort(still, "amd64")}  # fmt: skip
    runs = {"theirs": session(data), **{key: session(files[key]) for key in ("onnx", "fixed", "ort")}}
    outputs = {key: one_by_one(run)(images.numpy()) for key, run in runs.items()}
    taken = times(runs, images.numpy(), rounds, seconds)
    found: dict[str, Any] = {**ratio(taken["onnx"], taken["theirs"]), "rounds": len(taken["onnx"]),
             "theirs_ms": float(np.median(taken["theirs"])), "export_seconds": export_seconds,
             "bytes": {"theirs": len(data), **{key: len(value) for key, value in files.items()}},
             "difference": float(np.abs(outputs["onnx"] - outputs["theirs"]).max() / np.abs(outputs["theirs"]).max()),
             "others": {key: ratio(taken[key], taken["theirs"]) for key in ("fixed", "ort")}}  # fmt: skip
    others = ", ".join(f"{key} {value['ratio']:.3f}" for key, value in found["others"].items())
    print(
        f"{name}: {found['ratio']:.3f} ({found['ratio_low']:.3f} to {found['ratio_high']:.3f}) of timm's {found['theirs_ms']:.2f} ms, "
        f"{found['rounds']} rounds; {others}; outputs differ by {found['difference']:.1e}; export {export_seconds:.1f} s; "
        f"bytes {found['bytes']}", flush=True,
    )  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--quick", action="store_true", help="one network, few rounds")
    given = parser.parse_args()
    names, rounds, seconds = (["mobilenetv3-large"], 20, 3.0) if given.quick else (given.networks, 200, 30.0)
    here = environment()
    print(f"{here['processor']}; {here['versions']}; seed 0")
    networks = {name: compared(name, rounds, seconds) for name in names}
    print(json.dumps({"benchmark": "export_latency", "networks": networks}))


if __name__ == "__main__":
    main()
