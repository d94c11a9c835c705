"""The further files of a bundle: each is the child, or is not made, and says why."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from deploy import formats, gate, mobile
from deploy.bundle import Bundle
from deploy.formats import FORMATS, Wanted, wanted
from deploy.gate import Images, Outcome, agreement
from deploy.measure import models_of
from deploy.mobile import platform_of, to_ort, usability
from deploy.predict import Predictor
from deploy.ship import ship
from deploy.targets import Local
from deploy.verify import VerificationError
from search.found import Found
from supernet.errors import InputError
from supernet.run import Run
from supernet.task import task_named

FILES = {
    "model.onnx", "model.fixed.onnx", "model.pixels.onnx", "model.fp16.onnx", "model.int8.onnx", "model.ort", "model.int8.ort",
}  # fmt: skip


@pytest.fixture(scope="module")
def everything(tiny_searched: tuple[Run, Found], tmp_path_factory: pytest.TempPathFactory, fake: Any) -> Bundle:
    run, found = tiny_searched
    out = tmp_path_factory.mktemp("all") / "bundle"
    return ship(
        run, found.best.arch, out, split="confirm", wanted=Wanted(tuple(FORMATS), recipe="u8s7", most_loss=0.1), target=fake
    )


@pytest.fixture(scope="module")
def fake() -> Any:
    from tests.conftest import FakeTarget

    class Counting(FakeTarget):
        """Of .ort files, too, whose graph cannot be read."""

        def _timing(self, model: Any) -> Any:
            return super()._timing(model)

        def measure(self, models: Any, **options: Any) -> Any:
            readable = [each if each.data[4:8] != b"ORTM" else replace(each, data=models[0].data) for each in models]
            return super().measure(readable, **options)

    return Counting()


@pytest.mark.slow
def test_all_files_are_listed_with_their_proof(everything: Bundle, tiny_run: Run) -> None:
    listed = {each["file"]: each for each in everything.manifest["models"]}
    assert set(listed) == FILES
    assert set(everything.manifest["files"]) >= FILES
    assert "refused" not in everything.manifest
    confirm = len(tiny_run.dataset.split("confirm"))
    for name, each in listed.items():
        assert each["size_bytes"] == (everything.path / name).stat().st_size
        assert ("latency" in each) == (name != "model.pixels.onnx")
        assert "latency" not in each or each["latency"]["fingerprint"]["precision"] == each["precision"]
        if name == "model.onnx":
            continue
        parity = each["parity"]
        assert (parity["split"], parity["images"]) == ("confirm", confirm)
        exact = each["precision"] == "fp32"
        assert parity["change"] == 0 or not exact
        assert (parity["difference"] < 1e-4) == exact
    assert listed["model.int8.onnx"]["recipe"] == "u8s7"
    assert listed["model.int8.onnx"]["calibration_images"] > 0
    assert listed["model.ort"]["platform"] == "arm"
    assert everything.manifest["mobile"].keys() == {"NNAPI", "CoreML MLProgram", "CoreML NeuralNetwork"}
    confirmed = everything.manifest["parity"]["confirm"]
    assert confirmed["images"] == confirm and confirmed["agreement"] == 1 and confirmed["p_value"] == 1
    assert everything.manifest["parity"]["folded_difference"] < 1e-4
    json.dumps(everything.manifest, allow_nan=False)
    text = (everything.path / "card.md").read_text()
    for name in FILES:
        assert f"`{name}`" in text
    assert "CoreML MLProgram" in text and "u8s7" in text


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(FILES - {"model.pixels.onnx"}))
def test_every_file_predicts_by_the_script_of_the_bundle(everything: Bundle, tiny_run: Run, name: str) -> None:
    split = tiny_run.dataset.split("confirm")
    images = [split.source.image(int(index)) for index in split.indices[:12]]
    expected = Predictor(everything.path).predict(images)
    found = Predictor(everything.path, model=name).predict(images)
    np.testing.assert_allclose(found, expected, atol=1e-5 if "int8" not in name and "fp16" not in name else 0.35)


@pytest.mark.slow
def test_what_is_measured_takes_normalised_images_in_any_number(everything: Bundle) -> None:
    assert [name for name, _ in models_of(everything)] == ["model.fp16.onnx", "model.int8.onnx", "model.onnx"]


@pytest.mark.slow
def test_a_model_that_the_bundle_does_not_have_is_named(everything: Bundle) -> None:
    for name in ("model.tflite", "../model.onnx", "\x1b[2J"):
        with pytest.raises(ValueError, match=r"its models are model") as raised:
            Predictor(everything.path, model=name)
        assert str(raised.value).isprintable()
    with pytest.raises(ValueError, match=r"takes pixels .uint8., for programs of your own"):
        Predictor(everything.path, model="model.pixels.onnx")


@pytest.mark.slow
def test_what_rounding_may_not_cost_is_not_shipped_and_said(
    tiny_searched: tuple[Run, Found], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, found = tiny_searched
    spoiled = formats.int8.Quantiser.__call__

    def spoil(self: Any, attempt: Any) -> onnx.ModelProto:
        model = spoiled(self, attempt)
        for tensor in model.graph.initializer:
            if tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) == 2:
                tensor.CopyFrom(numpy_helper.from_array(np.zeros(tensor.dims, np.int8), tensor.name))
        return model

    monkeypatch.setattr(formats.int8.Quantiser, "__call__", spoil)
    monkeypatch.setattr(formats, "sensitivities", lambda network, images: [])
    bundle = ship(run, found.best.arch, tmp_path / "b", split="confirm", wanted=Wanted(("int8", "ort", "fp16"), most_loss=0.01))
    assert {each["file"] for each in bundle.manifest["models"]} == {"model.onnx", "model.fp16.onnx", "model.ort"}
    assert "none of 4 ways to quantise it loses at most 1.00 points" in bundle.manifest["refused"]["model.int8.onnx"]
    assert "model.int8.onnx` was not made" in (tmp_path / "b" / "card.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("where", ["fixed", "pixels", "ort"])
def test_a_file_that_computes_otherwise_fails_the_export_and_leaves_nothing(
    tiny_searched: tuple[Run, Found], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    run, found = tiny_searched

    def spoil(model: onnx.ModelProto) -> onnx.ModelProto:
        tensor = next(each for each in reversed(model.graph.initializer) if len(each.dims) == 2)
        tensor.CopyFrom(numpy_helper.from_array(np.float32(1.05) * numpy_helper.to_array(tensor), tensor.name))
        return model

    if where == "ort":
        monkeypatch.setattr(mobile, "to_ort", lambda model, platform: to_ort(spoil(model), platform))
    else:
        name = {"fixed": "fixed", "pixels": "from_pixels"}[where]
        whole: Callable[..., onnx.ModelProto] = getattr(formats, name)
        monkeypatch.setattr(formats, name, lambda *given, **more: spoil(whole(*given, **more)))
    with pytest.raises(VerificationError, match=r"differs from model\.onnx by"):
        ship(run, found.best.arch, tmp_path / "b", split="confirm", wanted=Wanted((where,)))
    assert list(tmp_path.iterdir()) == []


# --- pieces ---


def test_formats_and_bounds_that_are_none_are_refused() -> None:
    with pytest.raises(InputError, match="a format is onnx, fixed, pixels, fp16, int8, ort, but got 'tflite'"):
        wanted("onnx,tflite", None, None)
    for bound in (-0.1, float("nan"), float("inf")):
        with pytest.raises(InputError, match="0 or more"):
            wanted("int8", None, bound)
    assert wanted(" int8 ,, fixed", None, 0.01).formats == ("int8", "fixed")


def test_int8_and_ort_are_for_the_target(fake_target: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for machine, recipe, platform in (("aarch64", "s8s8", "arm"), ("x86_64", "u8s7", "amd64")):
        target = fake_target()
        facts = {**target.fingerprint(), "machine": machine}
        monkeypatch.setattr(type(target), "fingerprint", lambda self, facts=facts: facts)
        found = wanted("int8,ort", target, None)
        assert (found.recipe, found.platform) == (recipe, platform)
    assert wanted("ort", None, None).platform == "arm"
    monkeypatch.setattr(formats.int8, "flags_here", lambda: "avx512_vnni")
    monkeypatch.setattr(Local, "fingerprint", lambda self: {"machine": "x86_64"})
    assert wanted("int8", Local(), None).recipe == "u8s8"
    monkeypatch.setattr(formats.int8, "flags_here", lambda: "avx2")
    assert wanted("int8", Local(), None).recipe == "u8s7"


def test_platforms_are_two(exported: Any) -> None:
    assert [platform_of(machine) for machine in ("x86_64", "AMD64", "aarch64", "armv8l")] == ["amd64", "amd64", "arm", "arm"]
    with pytest.raises(InputError, match="arm or amd64"):
        to_ort(exported("digits", "smallest")[2], "riscv")


def test_an_ort_file_computes_the_same_and_one_for_arm_has_no_layout_of_x86(exported: Any) -> None:
    model = exported("digits", "smallest")[2]

    side = model.graph.input[0].type.tensor_type.shape.dim[3].dim_value
    images = np.random.default_rng(0).standard_normal((2, 1, side, side), dtype=np.float32)
    expected = formats.session(model.SerializeToString())(images)
    for platform in mobile.PLATFORMS:
        data = to_ort(model, platform)
        assert data[4:8] == b"ORTM"
        np.testing.assert_allclose(formats.session(data)(images), expected, atol=1e-4 * np.abs(expected).max())
        assert (b"ReorderInput" in data) == (platform == "amd64")
    assert onnxruntime.__version__


def test_phones_take_the_model_of_fixed_shapes_and_not_the_other(exported: Any) -> None:
    model = exported("digits", "smallest")[2]
    free, found = usability(model), usability(formats.fixed(model))
    assert {each["supported"] for each in free.values()} == {0}
    assert found["CoreML MLProgram"]["verdict"] == "YES"
    assert found["CoreML MLProgram"]["supported"] == found["CoreML MLProgram"]["nodes"] == len(formats.fixed(model).graph.node)


def test_agreement_is_counted(tiny_run: Run) -> None:
    images = Images(tiny_run.dataset.split("confirm"), 16, tiny_run.task)
    one = Outcome(np.eye(4, 3, dtype=np.float32) * 5, np.array([True, True, False, True]))
    other = Outcome(one.outputs[[0, 1, 2, 2]] + np.float32(0.01), np.array([True, True, False, False]))
    found = agreement(images, one, other)
    assert (found.images, found.score, found.change.difference) == (4, 0.5, -0.25)
    assert found.agreement == 0.75  # of rows of zeros the first class counts
    assert found.difference == pytest.approx(5.01) and found.relative == pytest.approx(5.01 / 5)
    broken = agreement(images, one, replace(other, outputs=np.full((4, 3), np.nan, np.float32)))
    assert broken.difference == float("inf")
    assert task_named("classification").metric == "top1"


def test_images_are_decoded_once_while_there_is_room(tiny_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    whole = gate.images_at
    monkeypatch.setattr(gate, "images_at", lambda *given: read.append(1) or whole(*given))
    monkeypatch.setattr(gate, "BATCH", 8)
    images = Images(tiny_run.dataset.split("search_val"), 16, tiny_run.task, most=20)
    first, again = ([pixels for pixels, _ in images.pixels()] for _ in range(2))
    assert [len(part) for part in first] == [8, 8, 4] and len(read) == 3
    assert all(np.array_equal(one, other) for one, other in zip(first, again, strict=True))
    assert sum(len(labels) for _, labels in images.pixels()) == 20
    monkeypatch.setattr(gate, "MOST_BYTES", 2 * first[0].nbytes)
    few = Images(images.split, 16, images.task, most=20)
    for _ in range(2):
        assert sum(len(part) for part, _ in few.pixels()) == 20
    assert len(read) == 3 + 3 + 1
