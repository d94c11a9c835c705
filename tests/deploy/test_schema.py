"""The published schema of a bundle's manifest: what is written fits it, and what is damaged does not."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from deploy.bundle import Bundle
from deploy.formats import FORMATS, Wanted
from deploy.ship import ship
from search.found import Found
from supernet.run import Run

SCHEMA: dict[str, Any] = json.loads((Path(__file__).parents[2] / "docs" / "manifest.schema.json").read_text(encoding="utf-8"))
MISSING = object()
HASH = "0" * 64


@pytest.fixture
def manifest(tiny_bundle: Bundle) -> dict[str, Any]:
    """That of a classifier, to be damaged."""
    return copy.deepcopy(dict(tiny_bundle.manifest))


@pytest.fixture
def all_kinds(manifest: dict[str, Any]) -> dict[str, Any]:
    """With one more model, and all that is optional."""
    parity = manifest["parity"]["confirm"]
    latency = {**manifest["latency"][0], "stable": True}
    tried = [{"operators": "all", "calibration": "minmax", "fp32_layers": 0, "change": 0.0, "low": -0.1, "high": 0.1}]
    manifest["models"] += [
        {"file": "model.int8.onnx", "precision": "int8", "recipe": "u8s7", "operators": "all", "calibration": "minmax",
         "calibration_images": 64, "fp32_layers": [], "tried": tried, "parity": parity, "size_bytes": 1, "latency": latency},
        {"file": "model.pixels.onnx", "precision": "fp32", "input": {"name": "pixels", "type": "uint8", "layout": "NHWC"},
         "output": "probabilities", "parity": parity, "size_bytes": 1},
        {"file": "model.ort", "precision": "fp32", "batch": 1, "platform": "arm", "parity": parity, "size_bytes": 1},
    ]  # fmt: skip
    manifest["refused"] = {"model.fp16.onnx": "it loses too much"}
    manifest["mobile"] = {"NNAPI": {"partitions": 1, "supported": 2, "nodes": 2, "verdict": "YES", "unsupported": []}}
    return manifest


def regression(manifest: dict[str, Any]) -> dict[str, Any]:
    """What an image-to-image network has instead: scores in dB, no classes."""
    confirm = {name: value for name, value in manifest["parity"]["confirm"].items() if name != "agreement"} | {"score": 23.4}
    parity = {name: value for name, value in manifest["parity"].items() if name not in ("largest_logit", "agreement")}
    return {
        **manifest, "task": "regression", "classes": [],
        "output": {"name": "outputs", "shape": manifest["input"]["shape"], "type": "float32"},
        "parity": {**parity, "largest_output": 2.5, "confirm": confirm},
        "models": [{**each, "parity": confirm} if "parity" in each else each for each in manifest["models"]],
        "accuracy": {"metric": "psnr_db", "split": "test", "images": 48, "psnr_db": 23.4, "low": 22.9, "high": 23.9},
    }  # fmt: skip


def errors(manifest: Any) -> list[str]:
    return [f"{list(error.absolute_path)}: {error.message}" for error in Draft202012Validator(SCHEMA).iter_errors(manifest)]


def changed(value: dict[str, Any], path: tuple[str | int, ...], to: Any) -> dict[str, Any]:
    """A copy with another value at `path`, or with none."""
    found = copy.deepcopy(value)
    place: Any = found
    for step in path[:-1]:
        place = place[step]
    if to is MISSING:
        del place[path[-1]]
    else:
        place[path[-1]] = to
    return found


def undescribed(schema: Any, path: str = "") -> list[str]:
    """Properties that nothing is said of, by themselves or by what they refer to."""
    if isinstance(schema, list):
        return [name for each in schema for name in undescribed(each, path)]
    if not isinstance(schema, dict):
        return []
    found = [
        name
        for key, value in schema.items()
        if key not in ("then", "else", "if")
        for name in undescribed(value, f"{path}/{key}")
    ]
    silent = [name for name, value in schema.get("properties", {}).items() if not says(value)]
    return found + [f"{path}/{name}" for name in silent if not path.endswith(("/contains", "/classified"))]


def says(schema: dict[str, Any]) -> bool:
    name = schema.get("$ref", "").rpartition("/")[2]
    return "description" in schema or "description" in SCHEMA["$defs"].get(name, {})


def test_the_schema_is_one_and_says_what_everything_is() -> None:
    Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["$schema"] == Draft202012Validator.META_SCHEMA["$id"]
    assert SCHEMA["properties"]["format"]["const"] == 1
    assert undescribed(SCHEMA) == []


def test_a_manifest_fits(manifest: dict[str, Any]) -> None:
    assert errors(manifest) == []
    assert set(manifest) == set(SCHEMA["required"])


def test_a_manifest_with_all_that_is_optional_fits(all_kinds: dict[str, Any]) -> None:
    assert errors(all_kinds) == []


def test_a_newer_writer_may_add(manifest: dict[str, Any]) -> None:
    assert errors({**manifest, "novelty": {"of": "tomorrow"}}) == []


def test_scores_of_a_regression_are_no_fractions(all_kinds: dict[str, Any]) -> None:
    assert errors(regression(all_kinds)) == []
    assert errors({**regression(all_kinds), "task": "classification"})
    assert errors(changed(regression(all_kinds), ("accuracy", "psnr_db"), 101.0))
    assert errors(changed(regression(all_kinds), ("accuracy", "psnr_db"), MISSING))


@pytest.mark.parametrize("name", SCHEMA["required"])
def test_nothing_may_be_missing(manifest: dict[str, Any], name: str) -> None:
    assert any(f"'{name}' is a required property" in error for error in errors(changed(manifest, (name,), MISSING)))


DAMAGES: dict[str, tuple[tuple[str | int, ...], Any]] = {
    "another format": (("format",), 2),
    "a format as text": (("format",), "1"),
    "no format": (("format",), None),
    "another task": (("task",), "detection"),
    "a date without a time": (("created",), "2026-01-01"),
    "a key that is none": (("key",), "best"),
    "no choices": (("arch",), {}),
    "a choice of choices": (("arch", "resolution"), [12, 16]),
    "a number as text": (("macs",), "1000"),
    "a number with a fraction": (("params",), 1.5),
    "negative parameters": (("params",), -1),
    "negative memory": (("peak_memory_bytes",), -1),
    "negative weights": (("model_size_bytes",), -4),
    "classes that are numbers": (("classes",), [0, 1, 2]),
    "a classifier without classes": (("classes",), []),
    "an input of another layout": (("input", "layout"), "NHWC"),
    "an input of two channels": (("input", "shape"), ["batch", 2, 12, 12]),
    "an input of three axes": (("input", "shape"), ["batch", 1, 12]),
    "an output of one axis": (("output", "shape"), ["batch"]),
    "an output of four axes": (("output", "shape"), ["batch", 1, 12, 12]),
    "logits of another name": (("output", "name"), "outputs"),
    "no operators": (("opset",), 0),
    "a crop of nothing": (("preprocessing", "crop"), 0),
    "a crop beyond the image": (("preprocessing", "crop"), 1.1),
    "two means": (("preprocessing", "mean"), [0.5, 0.5]),
    "a standard deviation of 0": (("preprocessing", "std"), [0.0]),
    "an unknown preparation": (("preprocessing", "flip"), True),
    "a resolution of 0": (("preprocessing", "resolution"), 0),
    "training without its weights": (("training", "weights_sha256"), MISSING),
    "negative reads": (("training", "test_reads"), -1),
    "a version as a number": (("versions", "nestling"), 1.0),
    "a latency that is negative": (("latency", 0, "latency_ms"), -0.1),
    "a latency without a device": (("latency", 0, "fingerprint"), MISSING),
    "a latency of nobody knows what": (("latency", 0, "fingerprint", "runtime"), MISSING),
    "a hash that is too short": (("files", "model.onnx"), HASH[1:]),
    "a hash that is too long": (("files", "model.onnx"), HASH + "0"),
    "a hash with a line's end": (("files", "model.onnx"), HASH + "\n"),
    "a hash in capitals": (("files", "model.onnx"), "A" * 64),
    "no hash": (("files", "model.onnx"), None),
    "no model": (("files", "model.onnx"), MISSING),
    "a name with a slash": (("files", "more/model.onnx"), HASH),
    "a name with a backslash": (("files", "more\\model.onnx"), HASH),
    "a name that leads out": (("files", ".."), HASH),
    "a name without letters": (("files", ""), HASH),
    "a name with a line's end": (("files", "model.onnx\n"), HASH),
    "a name that is too long": (("files", "x" * 101), HASH),
    "a difference that is negative": (("parity", "onnx_difference"), -1e-6),
    "an agreement above 1": (("parity", "agreement"), 1.01),
    "a classifier without agreement": (("parity", "agreement"), MISSING),
    "a proof without its largest logit": (("parity", "largest_logit"), MISSING),
    "a proof without the confirm images": (("parity", "confirm"), MISSING),
    "a score above 1": (("parity", "confirm", "score"), 1.01),
    "a probability above 1": (("parity", "confirm", "p_value"), 1.01),
    "no models": (("models",), []),
    "models without model.onnx": (("models", 0), {"file": "model.fixed.onnx", "precision": "fp32", "size_bytes": 1}),
    "a model of negative size": (("models", 1, "size_bytes"), -1),
    "a model without a size": (("models", 1, "size_bytes"), MISSING),
    "a model of another precision": (("models", 1, "precision"), "int4"),
    "a model without proof": (("models", 1, "parity"), MISSING),
    "a model in a folder": (("models", 1, "file"), "more/model.int8.onnx"),
    "a model's score above 1": (("models", 1, "parity", "score"), 98.3),
    "a model's score as text": (("models", 1, "parity", "score"), "98 %"),
    "a model's latency that may be anything": (("models", 1, "latency", "stable"), MISSING),
    "an unknown recipe": (("models", 1, "recipe"), "u4s4"),
    "nothing tried": (("models", 1, "tried"), []),
    "an attempt without a change": (("models", 1, "tried", 0, "change"), MISSING),
    "pixels of another type": (("models", 2, "input", "type"), "float32"),
    "an unknown platform": (("models", 3, "platform"), "riscv"),
    "a batch of 0": (("models", 3, "batch"), 0),
    "a refusal without words": (("refused", "model.fp16.onnx"), None),
    "an unknown verdict": (("mobile", "NNAPI", "verdict"), "PERHAPS"),
    "an accuracy above 1": (("accuracy", "top1"), 98.3),
    "an accuracy below 0": (("accuracy", "top1"), -0.01),
    "an accuracy as text": (("accuracy", "top1"), "0.98"),
    "an interval above 1": (("accuracy", "high"), 1.2),
    "an accuracy of nothing": (("accuracy", "images"), 0),
    "an accuracy of images that were searched on": (("accuracy", "split"), "search_val"),
    "a metric of another task": (("accuracy", "metric"), "psnr_db"),
    "no accuracy": (("accuracy", "top1"), MISSING),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damages_are_seen(all_kinds: dict[str, Any], name: str) -> None:
    path, to = DAMAGES[name]
    assert errors(changed(all_kinds, path, to))


@pytest.mark.parametrize("value", [None, [], "manifest", 1])
def test_a_manifest_is_a_table(value: Any) -> None:
    assert errors(value)


@pytest.mark.slow
def test_a_manifest_of_all_formats_fits(tiny_searched: tuple[Run, Found], tmp_path: Path) -> None:
    run, found = tiny_searched
    wanted = Wanted(tuple(FORMATS), recipe="u8s7", most_loss=0.1)
    bundle = ship(run, found.best.arch, tmp_path / "bundle", split="confirm", wanted=wanted)
    written = json.loads((bundle.path / "manifest.json").read_text(encoding="utf-8"))
    assert errors(written) == []
    assert {"mobile"} == set(written) - set(SCHEMA["required"])
    assert len(written["models"]) == 7
