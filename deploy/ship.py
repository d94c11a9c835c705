"""From a child of a run to a bundle: calibrate, export, verify on image files, write. All or nothing."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deploy import verify
from deploy.bundle import Bundle, being_written, refuse_foreign, write_manifest, write_model
from deploy.card import card
from deploy.export import INPUT, OPSET, to_onnx
from deploy.predict import FORMAT, OUTPUTS, Predictor
from supernet import durable
from supernet.arch import Arch
from supernet.costs import arch_costs
from supernet.data.dataset import SplitImages
from supernet.errors import InputError
from supernet.evaluate import Evaluator
from supernet.run import Run, environment


def ship(
    run: Run, arch: Arch, out: Path, *, split: str = "test", evaluator: Evaluator | None = None,
    latencies: Sequence[Mapping[str, Any]] = (),
) -> Bundle:  # fmt: skip
    """Export a child and prove it; its accuracy is counted on `split` from image files, through ONNX Runtime.

    "test" is read and counted (`Run.test_images`); the other choice is "confirm". `latencies` are measurements for the manifest.
    Raises `InputError` for another split and for a place that holds anything but a bundle, `deploy.verify.VerificationError` where
    the exported model is not the child; nothing is left behind then.
    """
    if split not in {"test", "confirm"}:
        raise InputError(
            f"the accuracy of a bundle is of the split test or confirm, which no search compares on, but got {split!r}"
        )
    if run.task.name not in OUTPUTS:
        raise InputError(
            f"bundles are of the tasks {', '.join(OUTPUTS)}, but {run.path} learnt {run.task.name}: use its children from Python"
        )
    refuse_foreign(out)  # before the test split is read
    evaluator = evaluator or run.evaluator()
    images = run.test_images(f"export of {arch.key}") if split == "test" else run.dataset.split(split)
    resolution = run.space.resolution(arch)
    network = evaluator.calibrated(arch).cpu()
    model = to_onnx(network, channels=run.space.family.in_channels, resolution=resolution, output=OUTPUTS[run.task.name])
    manifest = _facts(run, arch, images)
    manifest["latency"] = [dict(entry) for entry in latencies]
    with being_written(out) as draft:
        write_model(draft, model.SerializeToString(), manifest)
        child_images, child_difference = verify.child_equals_extracted(evaluator, arch)
        found = verify.onnx_equals_torch(Predictor(draft), network, resolution, images, run.path / "images", run.task)
        parity = verify.Parity(child_images, child_difference, len(images), found.difference, found.largest, found.agreement)
        manifest["parity"] = parity.as_dict()
        estimate = run.task.estimate(found.scores)
        manifest["accuracy"] = {
            "metric": run.task.metric, "split": split, "images": estimate.images, run.task.metric: estimate.value,
            "low": estimate.low, "high": estimate.high,
        }  # fmt: skip
        _write_images(draft / "images.json", run, images, found)
        durable.write_text(draft / "card.md", card(manifest, run.space))
        write_manifest(draft, manifest)
    return Bundle.open(out)


def shipped_already(run: Run, arch: Arch, out: Path, latencies: Sequence[Mapping[str, Any]] = ()) -> Bundle | None:
    """The bundle at `out`, where it is whole and of this very child, weights and latencies; else None."""
    try:
        bundle = Bundle.open(out)
        same = (bundle.fact("key"), bundle.fact("training", "weights_sha256")) == (arch.key, run.weights_hash)
        bundle.fact("accuracy", run.task.metric)
    except InputError:
        return None
    return bundle if same and bundle.manifest.get("latency") == [dict(entry) for entry in latencies] else None


def _facts(run: Run, arch: Arch, images: SplitImages) -> dict[str, Any]:
    resolution, channels = run.space.resolution(arch), run.space.family.in_channels
    image = [channels, resolution, resolution]
    made = [len(run.classes)] if run.task.name == "classification" else image
    return {
        "format": FORMAT,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "key": arch.key,
        "arch": arch.as_dict(),
        "space": dict(run.space.definition),
        **arch_costs(run.space, arch),
        "task": run.task.name,
        "classes": classes_of(run),
        "input": {"name": INPUT, "shape": ["batch", *image], "type": "float32", "layout": "NCHW"},
        "output": {"name": OUTPUTS[run.task.name], "shape": ["batch", *made], "type": "float32"},
        "opset": OPSET,
        "precision": "fp32",
        "preprocessing": images.preprocessing(resolution).as_dict(),
        "training": {
            "recipe": run.recipe.model_dump(mode="json"),
            "weights_sha256": run.weights_hash,
            "data_fingerprint": run.data["fingerprint"],
            "data": Path(run.data["name"]).name,
            "calibration_images": min(run.recipe.calibration_images, len(run.dataset.splits.train)),
            "test_reads": run.test_reads,
        },
        "versions": environment()["versions"],
        "latency": [],
        "files": {},
    }


def classes_of(run: Run) -> list[str]:
    """Class names in the order of a bundle's outputs; none where nothing is classified, whatever the data has."""
    return list(run.classes) if run.task.name == "classification" else []


def _write_images(path: Path, run: Run, images: SplitImages, found: verify.FromFiles) -> None:
    """Every image with its label and prediction, or with its score where nothing is classified."""
    rows: list[dict[str, Any]]
    if found.classes is None:
        rows = [
            {"image": identity, run.task.metric: float(score)}
            for identity, score in zip(images.identities, found.scores, strict=True)
        ]
    else:
        rows = [
            {"image": identity, "label": run.classes[label], "predicted": run.classes[guess]}
            for identity, label, guess in zip(images.identities, images.labels, found.classes, strict=True)
        ]
    durable.write_json(path, {"format": 1, "split": images.name, "images": rows})
