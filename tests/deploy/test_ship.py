"""Shipping a child: the whole story in the manifest, the test images counted, and all of it or nothing."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from deploy import ship as shipping
from deploy.bundle import Bundle
from deploy.card import card, front_matter, plain
from deploy.ship import ship
from search.found import Found
from supernet import durable
from supernet.arch import Arch
from supernet.costs import METRICS, arch_costs
from supernet.errors import InputError
from supernet.run import Run

HOSTILE = (
    "<script>alert(1)</script>", "a|b|c", "`code` ```", "line\nbreak\r\n# heading", "[link](javascript:alert(1))", "![x](http://x)",
    "\udcff\udcfe", "\u202eright to left", "", "  ", "é 漢字", "x" * 500, "../../etc/passwd", "{{7*7}}", "%s %n", "- item\n- item",
)  # fmt: skip


@pytest.fixture
def quick(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """The chosen child's graph from its bundle instead of another export (which takes a second)."""
    import onnx

    model = onnx.load_model_from_string((tiny_bundle.path / "model.onnx").read_bytes())
    monkeypatch.setattr(shipping, "to_onnx", lambda *_, **__: model)


@pytest.fixture
def best(tiny_found: Found) -> Arch:
    return tiny_found.best.arch


def listing(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_manifest_tells_the_whole_story(tiny_bundle: Bundle, tiny_searched: tuple[Run, Found]) -> None:
    run, found = tiny_searched
    manifest, best = tiny_bundle.manifest, found.best
    assert set(manifest) == {
        "format", "created", "key", "arch", "space", "macs", "params", "peak_memory_bytes", "model_size_bytes",
        "classes", "input", "output",
        "opset",
        "precision", "preprocessing", "training", "versions", "latency", "files", "parity", "accuracy",
        "task", "models",
    }  # fmt: skip
    assert (manifest["key"], manifest["arch"]) == (best.key, best.arch.as_dict())
    assert {name: manifest[name] for name in METRICS} == arch_costs(run.space, best.arch)
    assert manifest["space"] == dict(run.space.definition)
    assert manifest["task"] == "classification"
    assert manifest["classes"] == ["bar", "rail", "slash"]
    assert manifest["training"]["weights_sha256"] == run.weights_hash
    assert manifest["training"]["recipe"] == run.recipe.model_dump(mode="json")
    assert manifest["training"]["data"] == "lines.npz"
    assert best.latency is not None
    assert manifest["latency"] == [best.latency.as_dict()]
    assert manifest["preprocessing"] == {
        "resolution": run.space.resolution(best.arch), "crop": 1.0, "mean": run.data["mean"], "std": run.data["std"],
    }  # fmt: skip
    assert manifest["parity"]["onnx_images"] == manifest["accuracy"]["images"] == 48
    assert manifest["parity"]["agreement"] == 1.0


def test_the_card_begins_with_what_model_hubs_read(tiny_bundle: Bundle) -> None:
    _, front, text = (tiny_bundle.path / "card.md").read_text().split("---\n", 2)
    found = yaml.safe_load(front)
    assert (found["library_name"], found["pipeline_tag"]) == ("onnx", "image-classification")
    (result,) = found["model-index"][0]["results"]
    assert result["metrics"] == [{"type": "accuracy", "value": tiny_bundle.manifest["accuracy"]["top1"]}]
    assert result["dataset"]["split"] == "test"
    assert text.startswith("\n# Child")
    hostile = {**tiny_bundle.manifest, "training": {**tiny_bundle.manifest["training"], "data": "a: b\n---\n!!python/object:x"}}
    assert yaml.safe_load("\n".join(front_matter(hostile)[1:-2]))["model-index"][0]["results"][0]["dataset"]["type"].startswith(
        "a: b"
    )


def test_the_accuracy_is_that_of_the_listed_predictions(tiny_bundle: Bundle, tiny_searched: tuple[Run, Found]) -> None:
    run, _ = tiny_searched
    listed = json.loads((tiny_bundle.path / "images.json").read_text())
    right = [row["label"] == row["predicted"] for row in listed["images"]]
    accuracy = tiny_bundle.manifest["accuracy"]
    assert (accuracy["metric"], accuracy["split"], listed["split"]) == ("top1", "test", "test")
    assert accuracy["top1"] == sum(right) / len(right)
    assert accuracy["low"] < accuracy["top1"] <= accuracy["high"]
    labels = {run.source.identity(int(index)): run.classes[run.source.labels[index]] for index in run.dataset.splits.test}
    assert {row["image"]: row["label"] for row in listed["images"]} == labels


def test_nothing_in_a_bundle_names_the_machine_that_made_it(tiny_bundle: Bundle, tiny_searched: tuple[Run, Found]) -> None:
    run, _ = tiny_searched
    for name, content in listing(tiny_bundle.path).items():
        for text in (str(run.path), str(tiny_bundle.path), str(Path.home()), str(Path(shipping.__file__).parent)):
            assert text.encode() not in content, name


def test_each_export_with_test_images_is_one_counted_read(quick: None, searched_copy: Run, best: Arch, tmp_path: Path) -> None:
    before = searched_copy.test_reads
    first = ship(searched_copy, best, tmp_path / "bundle")
    second = ship(searched_copy, best, tmp_path / "bundle")
    assert [bundle.manifest["training"]["test_reads"] for bundle in (first, second)] == [before + 1, before + 2]
    assert searched_copy.test_reads == before + 2
    lines = durable.read_lines(searched_copy.path / "test_reads.jsonl")
    assert lines[-1]["purpose"] == f"export of {best.key}"


def test_an_export_with_confirm_images_reads_no_test_image(quick: None, searched_copy: Run, best: Arch, tmp_path: Path) -> None:
    before = searched_copy.test_reads
    bundle = ship(searched_copy, best, tmp_path / "bundle", split="confirm")
    assert bundle.manifest["accuracy"]["split"] == "confirm"
    assert searched_copy.test_reads == bundle.manifest["training"]["test_reads"] == before


@pytest.mark.parametrize("split", ["train", "search_val", "", "Test", "all"])
def test_an_accuracy_on_images_that_the_search_saw_is_refused(
    searched_copy: Run, best: Arch, tmp_path: Path, split: str
) -> None:
    with pytest.raises(InputError, match="test or confirm"):
        ship(searched_copy, best, tmp_path / "bundle", split=split)
    assert not (tmp_path / "bundle").exists()


def test_a_place_that_is_refused_costs_no_read_of_the_test_split(searched_copy: Run, best: Arch, tmp_path: Path) -> None:
    (tmp_path / "place").mkdir()
    (tmp_path / "place" / "thesis.tex").write_text("x")
    before = searched_copy.test_reads
    with pytest.raises(InputError, match="choose another place"):
        ship(searched_copy, best, tmp_path / "place")
    assert searched_copy.test_reads == before
    assert listing(tmp_path / "place") == {"thesis.tex": b"x"}


def test_a_run_that_was_not_trained_is_refused(run_copy: Run, best: Arch, tmp_path: Path) -> None:
    shutil.rmtree(run_copy.checkpoints)
    with pytest.raises(InputError, match="train it first"):
        ship(run_copy, best, tmp_path / "bundle")


@pytest.mark.parametrize("when", ["model.onnx", "images.json", "card.md", "manifest.json"])
def test_a_full_disk_is_named_and_the_old_bundle_stays(
    quick: None, searched_copy: Run, best: Arch, bundle_copy: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    before, write = listing(bundle_copy.parent / "bundle"), durable.write_bytes

    def full(path: Path, data: bytes) -> None:
        if path.name == when:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, data)

    monkeypatch.setattr(durable, "write_bytes", full)
    with pytest.raises(OSError, match="No space left on device"):
        ship(searched_copy, best, bundle_copy, split="confirm")
    assert listing(bundle_copy) == before
    assert sorted(path.name for path in bundle_copy.parent.iterdir()) == ["bundle", "searched"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_place_that_cannot_be_written_is_named_and_the_old_bundle_stays(
    quick: None, searched_copy: Run, best: Arch, bundle_copy: Path, tmp_path: Path
) -> None:
    sealed = tmp_path / "sealed"
    sealed.mkdir()
    shutil.move(bundle_copy, sealed / "bundle")
    before = listing(sealed)
    sealed.chmod(0o500)
    try:
        with pytest.raises(OSError, match="sealed"):
            ship(searched_copy, best, sealed / "bundle", split="confirm")
        assert listing(sealed) == before
    finally:
        sealed.chmod(0o700)


def test_a_new_export_replaces_the_old_one(quick: None, searched_copy: Run, best: Arch, bundle_copy: Path) -> None:
    bundle = ship(searched_copy, best, bundle_copy, split="confirm")
    assert bundle.manifest["accuracy"]["split"] == "confirm"
    assert sorted(path.name for path in bundle_copy.parent.iterdir()) == ["bundle", "searched"]


# --- the card ---


def lines_without_code(text: str) -> list[str]:
    """The lines of a card with inline code taken out."""
    return [re.sub(r"`[^`]*`", "", line) for line in text.splitlines()]


def test_a_card_shows_the_figures_of_the_manifest(tiny_bundle: Bundle) -> None:
    text = (tiny_bundle.path / "card.md").read_text()
    manifest = tiny_bundle.manifest
    for shown in (manifest["key"], f"{manifest['macs']:,}", f"{manifest['params']:,}", "`bar`, `rail`, `slash`", "48 images"):
        assert shown in text
    assert f"{manifest['latency'][0]['latency_ms']:.4g} ms" in text


@pytest.mark.parametrize("name", HOSTILE)
def test_a_class_name_cannot_leave_its_place_on_the_card(tiny_bundle: Bundle, tiny_run: Run, name: str) -> None:
    usual = card(tiny_bundle.manifest, tiny_run.space)
    text = card({**tiny_bundle.manifest, "classes": ["bar", name, "slash"]}, tiny_run.space)
    text.encode()
    assert len(text.splitlines()) == len(usual.splitlines())
    assert "<" not in text
    assert text.count("`") == usual.count("`")
    assert lines_without_code(text)[-1] == lines_without_code(usual)[-1] == ", , "


@pytest.mark.parametrize("name", HOSTILE)
def test_the_name_of_a_target_cannot_leave_its_cell(tiny_bundle: Bundle, tiny_run: Run, name: str) -> None:
    usual = card(tiny_bundle.manifest, tiny_run.space)
    entry = dict(tiny_bundle.manifest["latency"][0])
    entry |= {"target": name, "date": name, "fingerprint": {**entry["fingerprint"], "processor": name, "runtime": name}}
    text = card({**tiny_bundle.manifest, "latency": [entry]}, tiny_run.space)
    assert len(text.splitlines()) == len(usual.splitlines())
    assert text.count("|") == usual.count("|")
    assert "<" not in text and text.count("`") == usual.count("`")


def test_plain_text_stays_plain() -> None:
    assert plain("a  b\n c") == "a b c"
    assert plain("é 漢字") == "é 漢字"


def test_a_bundle_of_hostile_class_names_is_whole(
    quick: None, searched_copy: Run, best: Arch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from deploy.predict import report

    hostile: tuple[str, ...] = ("<script>alert(1)</script>", "a|b`c\nd", "\udcff")
    run = replace(searched_copy, data={**searched_copy.data, "classes": list(hostile)})
    bundle = ship(run, best, tmp_path / "bundle", split="confirm")
    assert tuple(bundle.classes) == hostile
    assert tuple(Bundle.open(tmp_path / "bundle").classes) == hostile
    predicted: set[str] = {row["predicted"] for row in json.loads((bundle.path / "images.json").read_text())["images"]}
    assert predicted <= set(hostile)
    file = next((run.path / "images").rglob("*.png"))
    report(bundle.predictor, [str(file)], 3, as_json=True)
    assert {entry["class"] for entry in json.loads(capsys.readouterr().out)["classes"]} == set(hostile)


@pytest.mark.slow
def test_a_child_without_a_measured_latency_is_shipped_without_one(
    quick: None, searched_copy: Run, best: Arch, tmp_path: Path
) -> None:
    bundle = ship(searched_copy, best, tmp_path / "bundle", split="confirm")
    assert bundle.manifest["latency"] == []
    assert "latency" not in (bundle.path / "card.md").read_text()
