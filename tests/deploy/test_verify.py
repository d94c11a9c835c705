"""Whatever is wrong with an export is found before it is shipped, or when it is verified again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from PIL import Image

from deploy import ship as shipping
from deploy.again import verify_again
from deploy.bundle import Bundle, write_manifest
from deploy.predict import file_of
from deploy.ship import ship
from deploy.verify import VerificationError, child_equals_extracted, compare, files_of
from search.found import Found
from supernet.errors import InputError
from supernet.run import Run

Change = Callable[[onnx.ModelProto], None]


def weight_of(model: onnx.ModelProto, ending: str) -> onnx.TensorProto:
    return next(tensor for tensor in model.graph.initializer if tensor.name.endswith(ending))


def replace_weight(model: onnx.ModelProto, ending: str, change: Callable[[Any], Any]) -> None:
    tensor = weight_of(model, ending)
    tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor).copy()).astype(np.float32), tensor.name))


def one_number(weights: Any) -> Any:
    weights.flat[0] += 0.5
    return weights


def nothing_but_nan(weights: Any) -> Any:
    return weights * np.nan


CHANGES: dict[str, Change] = {
    "one weight of the stem": lambda model: replace_weight(model, "stem.conv.weight", one_number),
    "one bias of the classifier": lambda model: replace_weight(model, "classifier.bias", one_number),
    "classes in another order": lambda model: replace_weight(model, "classifier.weight", lambda weights: weights[::-1]),
    "rounded to 8 bits": lambda model: replace_weight(
        model, "widen.0.weight", lambda weights: np.round(weights / np.abs(weights).max() * 127) / 127 * np.abs(weights).max()
    ),
    "no number any more": lambda model: replace_weight(model, "classifier.weight", nothing_but_nan),
}  # fmt: skip


FAST = ("one weight of the stem", "classes in another order", "no number any more")


@pytest.fixture(scope="module")
def exported(tiny_bundle: Bundle) -> onnx.ModelProto:
    """The chosen child as it was exported."""
    return onnx.load_model_from_string((tiny_bundle.path / "model.onnx").read_bytes())


@pytest.mark.parametrize(
    "change", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in CHANGES if name not in FAST)]
)
def test_an_export_that_computes_otherwise_is_not_shipped(
    searched_copy: Run, exported: onnx.ModelProto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(exported)
    CHANGES[change](model)
    monkeypatch.setattr(shipping, "to_onnx", lambda *_, **__: model)
    layers = {"one weight of the stem": "stem.conv", "one bias of the classifier": "head.classifier"}
    named = rf".*the first layer that differs is {layers[change]}" if change in layers else ""
    with pytest.raises(VerificationError, match=rf"ONNX Runtime d{named}"):
        ship(searched_copy, Found.load(searched_copy).best.arch, tmp_path / "bundle", split="confirm")
    assert [path.name for path in tmp_path.iterdir()] == ["searched"]


FACTS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "mean": lambda facts: {**facts["preprocessing"], "mean": [0.5]},
    "std": lambda facts: {**facts["preprocessing"], "std": [0.2]},
    "crop": lambda facts: {**facts["preprocessing"], "crop": 0.8},
}


@pytest.mark.parametrize("what", FACTS)
def test_a_manifest_that_prepares_images_otherwise_than_training_did_is_not_shipped(
    searched_copy: Run, exported: onnx.ModelProto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    facts = shipping._facts

    def wrong(*arguments: Any) -> dict[str, Any]:
        right = facts(*arguments)
        return {**right, "preprocessing": FACTS[what](right)}

    monkeypatch.setattr(shipping, "to_onnx", lambda *_, **__: exported)
    monkeypatch.setattr(shipping, "_facts", wrong)
    with pytest.raises(VerificationError):
        ship(searched_copy, Found.load(searched_copy).best.arch, tmp_path / "bundle", split="confirm")
    assert not (tmp_path / "bundle").exists()


def test_an_extraction_that_is_not_the_child_is_noticed(run_copy: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluator = run_copy.evaluator()
    extract = evaluator.supernet.extract

    def wrong(arch: Any) -> Any:
        network = extract(arch)
        with torch.no_grad():
            next(network.parameters())[0, 0, 0, 0] += 0.5
        return network

    images, difference = child_equals_extracted(evaluator, run_copy.space.largest)
    assert images == 64
    assert 0 <= difference < 1e-4
    monkeypatch.setattr(evaluator.supernet, "extract", wrong)
    with pytest.raises(VerificationError, match="extracted child differs"):
        child_equals_extracted(evaluator, run_copy.space.largest)


# --- comparing logits ---


def test_rounding_is_allowed_and_scales_with_the_logits() -> None:
    logits = np.array([[100.0, 1.0, 2.0], [0.0, 3.0, 1.0]], np.float32)
    assert compare(logits, logits) == (0.0, 1.0)
    difference, agreement = compare(logits, logits + np.float32(0.009))
    assert difference == pytest.approx(0.009, rel=1e-2)
    assert agreement == 1.0
    with pytest.raises(VerificationError, match="differs from torch by"):
        compare(logits, logits + np.float32(0.011))
    with pytest.raises(VerificationError, match="differs from torch by"):
        compare(logits / 100, logits / 100 + np.float32(0.00011))  # never less than 1e-4 in all


@pytest.mark.parametrize("odd", [np.nan, np.inf])
def test_what_is_no_number_is_never_equal(odd: float) -> None:
    logits = np.array([[1.0, 2.0]], np.float32)
    with pytest.raises(VerificationError):
        compare(logits, np.array([[1.0, odd]], np.float32))
    with pytest.raises(VerificationError):
        compare(np.array([[1.0, odd]], np.float32), logits)


def test_a_tie_may_be_decided_by_rounding_and_counts_as_a_disagreement() -> None:
    assert compare(np.array([[1.0, 1.00001]], np.float32), np.array([[1.00001, 1.0]], np.float32))[1] == 0.0


# --- files ---


def test_images_of_arrays_become_files_that_hold_the_same_pixels(run_copy: Run, tmp_path: Path) -> None:
    confirm = run_copy.dataset.split("confirm")
    files = files_of(confirm, tmp_path / "images")
    assert len(set(files)) == len(files) == len(confirm)
    for index, identity, file in zip(confirm.indices, confirm.identities, files, strict=True):
        assert file == file_of(identity, tmp_path / "images")
        assert np.array_equal(np.asarray(Image.open(file)), np.asarray(confirm.source.image(int(index))))
    written = {file: file.stat().st_mtime_ns for file in files}
    files_of(confirm, tmp_path / "images")
    assert {file: file.stat().st_mtime_ns for file in files} == written  # once is enough
    assert not list((tmp_path / "images").rglob(".*"))


def test_a_damaged_file_of_the_run_is_named(
    searched_copy: Run, exported: onnx.ModelProto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shipping, "to_onnx", lambda *_, **__: exported)
    arch = Found.load(searched_copy).best.arch
    confirm = searched_copy.dataset.split("confirm")
    file = files_of(confirm, searched_copy.path / "images")[0]
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(InputError, match=file.name):
        ship(searched_copy, arch, tmp_path / "bundle", split="confirm")
    assert not (tmp_path / "bundle").exists()


# --- verifying again ---


def test_an_honest_bundle_passes_every_proof(searched_copy: Run, tiny_bundle: Bundle) -> None:
    result = verify_again(tiny_bundle.path, searched_copy.path, searched_copy.path / "images")
    assert (result["hashes"], result["graph"], result["files"]) == ("ok", "ok", 5)
    assert result["agreement"] == 1.0
    assert result["top1"] == tiny_bundle.manifest["accuracy"]["top1"]
    assert result["confirm_top1"] == Found.load(searched_copy).best.confirm_score


def test_verifying_reads_no_test_image_of_the_run(searched_copy: Run, tiny_bundle: Bundle) -> None:
    before = searched_copy.test_reads
    verify_again(tiny_bundle.path, searched_copy.path, None)
    assert searched_copy.test_reads == before


def change_manifest(folder: Path, **changes: Any) -> None:
    value = json.loads((folder / "manifest.json").read_text())
    write_manifest(folder, {**value, **changes})


@pytest.mark.parametrize(
    "change", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in CHANGES if name not in FAST)]
)
def test_a_model_changed_after_export_fails_against_its_run(searched_copy: Run, bundle_copy: Path, change: str) -> None:
    model = onnx.load_model_from_string((bundle_copy / "model.onnx").read_bytes())
    CHANGES[change](model)
    (bundle_copy / "model.onnx").write_bytes(model.SerializeToString())
    change_manifest(bundle_copy)  # with hashes that fit
    with pytest.raises(VerificationError):
        verify_again(bundle_copy, searched_copy.path, None)


MANIFESTS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "classes in another order": lambda value: {"classes": value["classes"][::-1]},
    "another mean": lambda value: {"preprocessing": {**value["preprocessing"], "mean": [0.6]}},
    "another crop": lambda value: {"preprocessing": {**value["preprocessing"], "crop": 0.7}},
    "another arch": lambda value: {"arch": {**value["arch"], "stage2.kernel_size": 5}},
    "an arch of another resolution": lambda value: {"arch": {**value["arch"], "resolution": 16}},
    "no arch of the space": lambda value: {"arch": {**value["arch"], "resolution": 13}},
    "an arch that is none": lambda value: {"arch": ["resolution"]},
    "other weights": lambda value: {"training": {**value["training"], "weights_sha256": "0" * 64}},
    "no training": lambda value: {"training": None},
}  # fmt: skip


@pytest.mark.parametrize("change", MANIFESTS)
def test_a_manifest_changed_after_export_fails_against_its_run(
    searched_copy: Run, tiny_bundle: Bundle, bundle_copy: Path, change: str
) -> None:  # fmt: skip
    change_manifest(bundle_copy, **MANIFESTS[change](dict(tiny_bundle.manifest)))
    with pytest.raises((VerificationError, InputError)):
        verify_again(bundle_copy, searched_copy.path, None)


@pytest.mark.parametrize("change", ["classes in another order", "a mean far off"])
def test_a_changed_manifest_fails_on_the_images(
    searched_copy: Run, tiny_bundle: Bundle, bundle_copy: Path, change: str
) -> None:  # fmt: skip
    far_off = {"preprocessing": {**tiny_bundle.manifest["preprocessing"], "mean": [9.0]}}
    change_manifest(bundle_copy, **(far_off if "mean" in change else MANIFESTS[change](dict(tiny_bundle.manifest))))
    with pytest.raises(VerificationError, match=r"of 48 images are predicted otherwise than at export"):
        verify_again(bundle_copy, None, searched_copy.path / "images")


def test_a_folder_without_the_images_is_an_input_error(tiny_bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--images is the folder"):
        verify_again(tiny_bundle.path, None, tmp_path)


def test_what_is_no_run_is_an_input_error(tiny_bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a run directory"):
        verify_again(tiny_bundle.path, tmp_path, None)
