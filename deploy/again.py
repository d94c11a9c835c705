"""Verifying a bundle after its export, as far as what is at hand allows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import torch

from deploy import verify
from deploy.bundle import Bundle
from deploy.fold import folded
from deploy.predict import check
from deploy.ship import classes_of
from supernet.costs import arch_costs
from supernet.errors import InputError
from supernet.run import Run


def verify_again(path: Path, run: Path | None, images: Path | None) -> dict[str, Any]:
    """What was checked, with figures. Hashes and graph always; with `run` the proof of the export; with `images` each prediction.

    Raises `InputError` for a damaged bundle or another run's, `deploy.verify.VerificationError` where a proof fails.
    """
    bundle = Bundle.open(path)
    for name in bundle.manifest["files"]:
        if name.endswith(".onnx"):
            _check_graph(bundle.path / name)
    result: dict[str, Any] = {"bundle": str(path), "files": len(bundle.manifest["files"]), "hashes": "ok", "graph": "ok"}
    if run is not None:
        result |= _against_run(bundle, Run.open(run))
    if images is not None:
        try:
            done = check(bundle.predictor, images)
        except ValueError as error:
            raise InputError(f"{error}; --images is the folder that the names in images.json are relative to") from error
        if done.differ:
            raise verify.VerificationError(
                f"{len(done.differ)} of {done.images} images are predicted otherwise than at export, first {done.differ[0]}"
            )
        metric = str(bundle.fact("accuracy", "metric"))
        if not done.is_the_manifests(dict(bundle.manifest)):
            raise verify.VerificationError(
                f"{metric} is {done.score:.6g} on {done.images} images, but the manifest says {bundle.fact('accuracy')}"
            )
        result |= {"images": done.images, metric: done.score}
    return result


def _check_graph(path: Path) -> None:
    try:
        onnx.checker.check_model(onnx.load_model_from_string(path.read_bytes()), full_check=True)
    except Exception as error:  # protobuf and onnx share no base class for a damaged file
        reason = " ".join(str(error).split())
        raise InputError(f"{path} is no valid ONNX model ({reason}): export the child again") from error


def _against_run(bundle: Bundle, run: Run) -> dict[str, Any]:
    """Repeat the proof on the confirm images (the test split is not read again)."""
    if bundle.fact("training", "weights_sha256") != run.weights_hash:
        raise InputError(f"{bundle.path} was exported from other weights than {run.path} has now: give the run that it is from")
    if bundle.task != run.task.name:
        raise verify.VerificationError(f"{bundle.path} is of the task {bundle.task}, but {run.path} learnt {run.task.name}")
    if bundle.classes != classes_of(run):
        raise verify.VerificationError(f"the classes of {bundle.path} are not those of {run.path} in their order")
    evaluator, choices = run.evaluator(), bundle.fact("arch")
    if not isinstance(choices, Mapping):
        raise InputError(f"{bundle.path}: the arch in the manifest is damaged: export the child again")
    arch = run.space.arch(choices, str(bundle.path))
    confirm = run.dataset.split("confirm")
    expected = {
        "key": arch.key,
        **arch_costs(run.space, arch),
        "preprocessing": confirm.preprocessing(run.space.resolution(arch)).as_dict(),
    }
    wrong = [name for name, value in expected.items() if bundle.fact(name) != json.loads(json.dumps(value))]
    if wrong:
        raise verify.VerificationError(f"the manifest of {bundle.path} says another {wrong[0]} than {run.path} has")
    resolution, network = run.space.resolution(arch), evaluator.calibrated(arch)
    child_images, child_difference = verify.child_equals_extracted(evaluator, arch)
    pixels = evaluator.train.pixels(resolution, verify.CHILD_IMAGES)
    images = torch.from_numpy(confirm.preprocessing(resolution).normalise(pixels))
    folding = verify.folded_equals_extracted(folded(network), network, images)
    found = verify.onnx_equals_torch(bundle.predictor, network, resolution, confirm, run.path / "images", run.task)
    parity = verify.Parity(
        child_images, child_difference, folding, len(confirm), found.difference, found.largest, found.agreement
    )
    return {**parity.as_dict(), f"confirm_{run.task.metric}": run.task.estimate(found.scores).value}
