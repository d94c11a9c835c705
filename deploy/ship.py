"""From a child of a run to a bundle: calibrate, export, verify on image files, convert, write. All or nothing."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from deploy import verify
from deploy.bundle import Bundle, being_written, refuse_foreign, write_manifest, write_model
from deploy.card import card
from deploy.export import INPUT, OPSET, to_onnx
from deploy.fold import folded
from deploy.formats import GATE_IMAGES, Converter, Wanted
from deploy.gate import Images, agreement
from deploy.layers import first_difference
from deploy.predict import FORMAT, OUTPUTS, Predictor
from deploy.targets import Latency, Model, Target, of_precision
from supernet import durable
from supernet.arch import Arch
from supernet.costs import arch_costs
from supernet.data.dataset import SplitImages
from supernet.errors import InputError
from supernet.evaluate import Evaluator
from supernet.run import Run, environment


def ship(
    run: Run, arch: Arch, out: Path, *, split: str = "test", evaluator: Evaluator | None = None,
    latencies: Sequence[Mapping[str, Any]] = (), wanted: Wanted | None = None, target: Target | None = None,
) -> Bundle:  # fmt: skip
    """Export a child and prove it; its accuracy is counted on `split` from image files, through ONNX Runtime.

    "test" is read and counted (`Run.test_images`); the other choice is "confirm". `latencies` are measurements for the manifest;
    `wanted` names further files; on `target` all of them are timed. Raises `InputError` for another split and for a place that holds
    anything but a bundle, `deploy.verify.VerificationError` where a file is not the child; nothing is left behind then.
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
    plain = folded(network).to(memory_format=torch.contiguous_format)
    model = to_onnx(network, channels=run.space.family.in_channels, resolution=resolution, output=OUTPUTS[run.task.name])
    confirm, judged = (Images(run.dataset.split(name), resolution, run.task, most)
                       for name, most in (("confirm", None), ("search_val", GATE_IMAGES)))  # fmt: skip
    converter = Converter(plain, model, images.preprocessing(resolution), evaluator, confirm, judged, wanted or Wanted())
    manifest = _facts(run, arch, images)
    manifest["latency"] = [dict(entry) for entry in latencies]
    with being_written(out) as draft:
        write_model(draft, model.SerializeToString(), manifest)
        child_images, child_difference = verify.child_equals_extracted(evaluator, arch)
        try:
            folding = verify.folded_equals_extracted(plain, network, converter.few)
            found = verify.onnx_equals_torch(Predictor(draft), network, resolution, images, run.path / "images", run.task)
        except verify.VerificationError as error:
            layer = first_difference(plain, model, converter.few, verify.TOLERANCE)
            raise verify.VerificationError(f"{error}; {layer}") from error
        parity = verify.Parity(
            child_images, child_difference, folding, len(images), found.difference, found.largest, found.agreement
        )
        manifest["parity"] = {**parity.as_dict(), "confirm": _confirmed(confirm, plain, converter)}
        manifest |= _converted(draft, converter, target)
        made = {
            each["precision"] for each in manifest["models"]
        }  # what a search measured of a file that was not made is left out
        manifest["latency"] = [each for each in manifest["latency"] if each["fingerprint"].get("precision", "fp32") in made]
        estimate = run.task.estimate(found.scores)
        manifest["accuracy"] = {
            "metric": run.task.metric, "split": split, "images": estimate.images, run.task.metric: estimate.value,
            "low": estimate.low, "high": estimate.high,
        }  # fmt: skip
        _write_images(draft / "images.json", run, images, found)
        durable.write_text(draft / "card.md", card(manifest, run.space))
        write_manifest(draft, manifest)
    return Bundle.open(out)


def _confirmed(confirm: Images, plain: nn.Module, converter: Converter) -> dict[str, Any]:
    """How far ONNX Runtime is from torch on the confirm images. Raises `VerificationError` beyond rounding."""

    def run(images: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.no_grad():
            outputs: NDArray[np.float32] = plain(torch.from_numpy(images)).numpy()
        return outputs

    known = confirm.outcome(run)
    found = agreement(confirm, known, converter.plain)
    if not found.difference <= verify.TOLERANCE * max(1.0, float(np.abs(known.outputs).max())):
        raise verify.VerificationError(
            f"ONNX Runtime differs from torch by {found.difference:.3g} in an output, on the confirm images; "
            + first_difference(plain, converter.model, converter.few, verify.TOLERANCE)
        )
    return found.as_dict()


def _converted(draft: Path, converter: Converter, target: Target | None) -> dict[str, Any]:
    """Write the further files; what the manifest says of all models, with their latencies on the target."""
    models: list[dict[str, Any]] = [{"file": "model.onnx", "precision": "fp32"}]
    for file in converter.files():
        durable.write_bytes(draft / file.name, file.data)
        models.append({"file": file.name, **file.facts})
    for each in models:
        each["size_bytes"] = (draft / each["file"]).stat().st_size
    if target is not None:
        timed = [each for each in models if "input" not in each]  # a runner makes up normalised images
        given = [Model((draft / each["file"]).read_bytes(), converter.preprocessing.channels, converter.preprocessing.resolution)
                 for each in timed]  # fmt: skip
        fingerprint, date = target.fingerprint(), datetime.datetime.now(datetime.UTC).date().isoformat()
        for each, timing in zip(timed, target.measure(given), strict=True):
            device = of_precision(fingerprint, each["precision"])
            latency = Latency(target.name, timing.latency_ms, timing.low_ms, timing.high_ms, device, date)
            each["latency"] = {**latency.as_dict(), "stable": timing.stable}
    found: dict[str, Any] = {"models": models}
    if converter.refused:
        found["refused"] = converter.refused
    if converter.mobile:
        found["mobile"] = converter.mobile
    return found


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
