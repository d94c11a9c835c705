"""The regression that is shipped goes the whole way: images to images, from training to the bundle and its report."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from PIL import Image
from scipy import stats

import nestling
from deploy.again import verify_again
from deploy.bundle import Bundle, write_manifest
from deploy.predict import check, file_of, report
from deploy.ship import ship
from deploy.verify import VerificationError
from search.commands import rows_of
from search.found import Found
from search.loop import Asked, search, smallest_latency_ms
from search.report.content import report_of
from search.settings import SearchConfig, load_search_config
from search.store import Store
from search.whole import Whole, walk
from supernet import durable
from supernet.errors import InputError
from supernet.run import Run
from supernet.samples import unpack
from supernet.start import start
from supernet.train import train
from tests.conftest import FakeTarget

pytestmark = pytest.mark.slow

SETTINGS = SearchConfig(
    strategy="coarse_to_fine",
    options={"coarse": 4},
    evaluations=7,
    random=2,
    polish=0,
    batch=3,
    finalists=2,
    profile_children=8,
    zones=2,
)

SMALL = {
    "format": 1, "name": "small-autoencoder", "family": "autoencoder", "resolution": [8],
    "stem": {"width": [8, 12]},
    "stages": [
        {"width": [12, 16], "depth": [1, 2], "decoder_depth": [1, 2], "kernel_size": [3]},
        {"width": [16, 24], "depth": [1, 2], "decoder_depth": [1], "kernel_size": [3]},
    ],
    "bottleneck": {"width": [2, 12]},
}  # fmt: skip


@pytest.fixture(scope="module")
def lines(easy_npz: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A small autoencoder of images of lines, trained for 15 epochs. Read only."""
    folder = tmp_path_factory.mktemp("autoencoder")
    (folder / "small.yaml").write_text(json.dumps(SMALL))
    overrides = {"batch_size": 24, "calibration_images": 64, "children": 3}
    begun = start(
        str(easy_npz), folder / "run", space=str(folder / "small.yaml"), recipe="autoencoder", epochs=15, overrides=overrides
    )
    train(begun.run)
    return begun.run


@pytest.fixture(scope="module")
def searched(lines: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Found]:
    """A copy of `lines` and the outcome of its search. Read only."""
    path = tmp_path_factory.mktemp("searched") / "lines"
    shutil.copytree(lines.path, path)
    run = Run.open(path)
    settings = SearchConfig(
        strategy="coarse_to_fine", options={"coarse": 3}, evaluations=5, random=0, polish=0, batch=2, finalists=1, zones=2
    )
    return run, search(run, Asked(("macs<=120K",), settings=settings, targets={None: FakeTarget()}))


@pytest.fixture(scope="module")
def bundle(searched: tuple[Run, Found], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The chosen child, exported. Read only."""
    run, found = searched
    assert found.best.latency is not None
    return ship(run, found.best.arch, tmp_path_factory.mktemp("bundle") / "lines", latencies=[found.best.latency.as_dict()])


def mean_image_psnr(run: Run, split: str, resolution: int = 8) -> float:
    """Mean PSNR of a predictor that always gives the mean training image."""
    made = run.dataset.split("train").pixels(resolution).mean(axis=0) / 255
    wanted = run.dataset.split(split).pixels(resolution) / 255
    return float((-10 * np.log10(((wanted - made) ** 2).mean(axis=(1, 2, 3)))).mean())


def test_a_run_learns_the_task_of_its_family(lines: Run) -> None:
    assert json.loads((lines.path / "config.json").read_text())["task"] == lines.task.name == "regression"
    logged = durable.read_lines(lines.path / "metrics.jsonl")
    assert all(set(child) == {"loss", "psnr_db"} for line in logged for child in line["children"].values())
    assert logged[-1]["children"]["largest"]["psnr_db"] > logged[0]["children"]["largest"]["psnr_db"] + 1


def test_a_reconstruction_is_better_than_the_mean_image(searched: tuple[Run, Found]) -> None:
    run, found = searched
    assert found.largest.confirm_score is not None and found.best.confirm_score is not None
    assert found.largest.confirm_score > mean_image_psnr(run, "confirm") + 1
    assert found.best.costs["macs"] <= 120_000


def test_a_score_of_the_search_is_the_mean_of_what_is_kept(searched: tuple[Run, Found]) -> None:
    run, found = searched
    with Store.existing(run.path / "search" / "search.sqlite") as store:
        rows = {row.key: unpack(row.samples, row.images, run.task.columns)["psnr_db"] for row in store.confirmed()}
    assert found.best.confirm_score == run.task.estimate(rows[found.best.key]).value
    p_value = float(stats.ttest_rel(rows[found.best.key].astype(float), rows[found.largest.key].astype(float)).pvalue)
    assert any(f"p = {p_value:.3g}" in note for note in found.notes)
    assert not any("own resolution" in note for note in found.notes)  # there is but one


def test_a_latency_budget_is_searched_by_probes_of_transposed_convolutions(
    lines: Run, tmp_path: Path, fake_target: Any, probes: None
) -> None:
    shutil.copytree(lines.path, tmp_path / "run")
    target = fake_target()
    ends = [smallest_latency_ms(lines.space, target)]
    found = search(
        Run.open(tmp_path / "run"),
        Asked((f"latency_ms<={1.01 * ends[0] + 0.0003}",), settings=SETTINGS, targets={None: target}),
    )
    assert found.best.latency is not None and found.best.latency.high <= 1.01 * ends[0] + 0.0003


def test_the_manifest_of_a_regression_says_so(bundle: Bundle, searched: tuple[Run, Found]) -> None:
    run, found = searched
    manifest = bundle.manifest
    assert (manifest["task"], manifest["classes"], bundle.task) == ("regression", [], "regression")
    assert manifest["output"] == {"name": "outputs", "shape": ["batch", 1, 8, 8], "type": "float32"}
    assert manifest["accuracy"]["metric"] == "psnr_db"
    parity = manifest["parity"]
    assert set(parity) == {
        "child_images", "child_difference", "folded_difference", "onnx_images", "onnx_difference", "largest_output",
        "relative_difference", "confirm",
    }  # fmt: skip
    assert 0 < parity["relative_difference"] == parity["onnx_difference"] / parity["largest_output"] < 1e-4
    listed = json.loads((bundle.path / "images.json").read_text())["images"]
    assert manifest["accuracy"]["psnr_db"] == pytest.approx(np.mean([row["psnr_db"] for row in listed]), rel=1e-12)
    by_torch = run.task.estimate(run.evaluator().evaluate(found.best.arch, run.test_images("test of the test"))).value
    assert manifest["accuracy"]["psnr_db"] == pytest.approx(by_torch, abs=1e-4)


def test_the_card_of_a_regression_tells_decibel_and_no_classes(bundle: Bundle) -> None:
    text = (bundle.path / "card.md").read_text()
    accuracy = bundle.manifest["accuracy"]
    assert f"| psnr_db | {accuracy['psnr_db']:.2f} dB (95 %: {accuracy['low']:.2f} dB to {accuracy['high']:.2f} dB)" in text
    assert "Classes" not in text and "logits" not in text and "classifier" not in text
    assert "python predict.py IMAGE... --out FOLDER" in text


def test_a_bundle_makes_images_as_the_network_does(bundle: Bundle, searched: tuple[Run, Found]) -> None:
    run, found = searched
    split, network = run.dataset.split("confirm"), run.evaluator().calibrated(found.best.arch)
    pictures = [run.source.image(int(index)) for index in split.indices[:5]]
    made = bundle.predict(pictures)
    inputs = torch.from_numpy(split.preprocessing(8)(pictures))
    with torch.no_grad():
        outputs = network(inputs).numpy()
    expected = np.clip(outputs * run.data["std"][0] + run.data["mean"][0], 0, 1).transpose(0, 2, 3, 1)
    np.testing.assert_allclose(made, expected, atol=1e-5)
    assert made.shape == (5, 8, 8, 1)
    assert bundle.predict([]).shape == (0, 8, 8, 1)


def test_the_script_of_a_bundle_writes_images_and_repeats_every_score(
    bundle: Bundle, searched: tuple[Run, Found], tmp_path: Path
) -> None:
    folder, images = Path(shutil.copytree(bundle.path, tmp_path / "shipped")), searched[0].path / "images"

    def script(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, folder / "predict.py", *map(str, arguments)]
        bare = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        return subprocess.run(command, cwd=tmp_path, env=bare, capture_output=True, text=True, check=False, timeout=60)

    done = script("--check", images)
    assert (done.returncode, done.stderr) == (0, "")
    result, accuracy = json.loads(done.stdout), bundle.manifest["accuracy"]
    assert (result["images"], result["differ"], result["same_as_manifest"]) == (accuracy["images"], [], True)
    assert result["psnr_db"] == pytest.approx(accuracy["psnr_db"], abs=1e-4)
    listed = json.loads((folder / "images.json").read_text())["images"][:2]
    files = [file_of(row["image"], images) for row in listed]
    done = script(*files, "--json", "--out", tmp_path / "made")
    assert (done.returncode, done.stderr) == (0, "")
    for line, row, file in zip(map(json.loads, done.stdout.splitlines()), listed, files, strict=True):
        assert line["image"] == str(file)
        assert line["psnr_db"] == pytest.approx(row["psnr_db"], abs=1e-4)
        pixels = np.asarray(Image.open(line["output"]))
        np.testing.assert_array_equal(pixels, np.round(bundle.predict([file])[0, :, :, 0] * 255).astype(np.uint8))
    plain = script(files[0])
    assert plain.stdout == f"{files[0]}: PSNR {listed[0]['psnr_db']:.2f} dB\n"
    Bundle.open(folder)  # nothing was written into it
    before = files[0].read_bytes()
    refused = script(files[0], "--out", files[0].parent)
    assert refused.returncode == 2 and "another folder" in refused.stderr
    assert files[0].read_bytes() == before


def test_a_file_of_the_check_that_changed_is_found(bundle: Bundle, searched: tuple[Run, Found], tmp_path: Path) -> None:
    images = Path(shutil.copytree(searched[0].path / "images", tmp_path / "images"))
    row = json.loads((bundle.path / "images.json").read_text())["images"][0]
    file = file_of(row["image"], images)
    pixels = np.asarray(Image.open(file)).copy()
    pixels[0, 0] ^= 64
    Image.fromarray(pixels).save(file)
    assert check(bundle.predictor, images).differ == [row["image"]]
    with pytest.raises(VerificationError, match=r"1 of .* images are predicted otherwise"):
        verify_again(bundle.path, None, images)


def test_a_bundle_is_verified_against_its_run_and_its_images(bundle: Bundle, searched: tuple[Run, Found]) -> None:
    run, found = searched
    result = verify_again(bundle.path, run.path, run.path / "images")
    assert result["confirm_psnr_db"] == pytest.approx(found.best.confirm_score, abs=1e-4)
    assert result["psnr_db"] == pytest.approx(bundle.manifest["accuracy"]["psnr_db"], abs=1e-4)
    assert "agreement" not in result


@pytest.mark.parametrize("change", ["weight", "task", "score", "classes"])
def test_a_changed_bundle_fails(bundle: Bundle, searched: tuple[Run, Found], tmp_path: Path, change: str) -> None:
    folder, run = Path(shutil.copytree(bundle.path, tmp_path / "bundle")), searched[0]
    manifest = json.loads((folder / "manifest.json").read_text())
    if change == "weight":
        model = onnx.load_model_from_string((folder / "model.onnx").read_bytes())
        tensor = next(tensor for tensor in model.graph.initializer if tensor.name.endswith("up1_0.0.weight"))
        values = numpy_helper.to_array(tensor).copy()
        values.flat[0] += 0.5
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
        (folder / "model.onnx").write_bytes(model.SerializeToString())
    elif change == "task":
        manifest["task"] = "classification"
    elif change == "score":
        manifest["accuracy"]["psnr_db"] += 1.0
    else:
        manifest["classes"] = ["cat"]
    write_manifest(folder, manifest)
    with pytest.raises((VerificationError, InputError)):
        verify_again(folder, run.path, run.path / "images")


@pytest.mark.parametrize("task", [3, None, [], "segmentation", {}])
def test_a_bundle_of_an_unknown_task_is_refused(bundle: Bundle, tmp_path: Path, task: object) -> None:
    folder = Path(shutil.copytree(bundle.path, tmp_path / "bundle"))
    write_manifest(folder, {**json.loads((folder / "manifest.json").read_text()), "task": task})
    with pytest.raises(InputError, match="of a task that this version does not know"):
        Bundle.open(folder)


@pytest.mark.parametrize("told", ["regression", None])
def test_a_bundle_of_before_there_were_tasks_is_a_classifier_and_none_can_pose_as_another(
    tiny_bundle: Bundle, tmp_path: Path, told: str | None
) -> None:
    folder = Path(shutil.copytree(tiny_bundle.path, tmp_path / "bundle"))
    manifest = {name: value for name, value in tiny_bundle.manifest.items() if name != "task"}
    write_manifest(folder, manifest if told is None else {**manifest, "task": told})
    picture = Image.fromarray(np.zeros((8, 8), np.uint8))
    if told is None:
        np.testing.assert_array_equal(Bundle.open(folder).predict(picture), tiny_bundle.predict(picture))
    else:
        with pytest.raises(InputError, match=r"the manifest describes .*outputs.* but model.onnx has .*logits"):
            Bundle.open(folder).predict(picture)


@pytest.mark.parametrize("row", [{"image": "x"}, {"image": "x", "psnr_db": "much"}, {"image": "x", "psnr_db": None}])
def test_a_damaged_list_of_scores_is_named(bundle: Bundle, tmp_path: Path, row: dict[str, object]) -> None:
    folder = Path(shutil.copytree(bundle.path, tmp_path / "bundle"))
    (folder / "images.json").write_text(json.dumps({"images": [row]}))
    write_manifest(folder, json.loads((folder / "manifest.json").read_text()))
    with pytest.raises(ValueError, match=r"images\.json is damaged"):
        check(Bundle.open(folder).predictor, tmp_path)


def test_images_made_of_files_of_the_same_name_lie_side_by_side(bundle: Bundle, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        Image.fromarray(np.full((8, 8), 99, np.uint8)).save(tmp_path / folder / "x.png")
    report(bundle.predictor, [str(tmp_path / folder / "x.png") for folder in ("a", "b")], 1, False, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["x-2.png", "x.png"]


def test_a_classifier_makes_no_images(tiny_bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--out is for models that make images"):
        report(tiny_bundle.predictor, ["x.png"], 1, False, tmp_path)


def test_the_report_of_a_regression_is_in_decibel(searched: tuple[Run, Found], tmp_path: Path) -> None:
    run, found = searched
    text = report_of(run, tmp_path / "report.html").read_text()
    body = text[: text.index("<script>")].replace("\u00a0", " ")
    assert f"{found.best.confirm_score:.2f} dB" in body
    assert "Training PSNR" in body and "PSNR against latency" in body
    assert "Mean squared error of normalised pixels" in body
    for word in ("top-1", "top1", "Accurac", "Cross entropy"):
        assert word not in body, word
    assert set(re.findall(r"[0-9.]+ %", body)) <= {"95 %"}  # of an interval; no score is a share


def test_the_command_line_tells_decibel(
    searched: tuple[Run, Found], bundle: Bundle, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    run, _ = searched
    for arguments in (
        ["evaluate", run.path, "--arch", "smallest", "--device", "cpu"],
        ["predict", bundle.path, first_image(run)],
    ):
        monkeypatch.setattr(sys, "argv", ["nestling", *map(str, arguments)])
        with contextlib.suppress(SystemExit):
            nestling.main()
        out = capsys.readouterr().out
        assert " dB" in out and "%" not in out
    rows = rows_of(Found.load(run), run.task.show)
    assert all(row["confirm"].endswith(" dB") and row["search_val"].endswith(" dB") for row in rows)


def first_image(run: Run) -> Path:
    return sorted((run.path / "images").rglob("*.png"))[0]


@pytest.mark.nightly  # the example whole_way and the demo go it with classifiers
def test_the_whole_way_on_digits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The shipped space and recipe: reconstructions far better than the mean image, and a larger budget is not worse."""
    settings = tmp_path / "small.yaml"
    settings.write_text(
        json.dumps(
            {
                "name": "small",
                "strategy": "coarse_to_fine",
                "options": {"coarse": 6},
                "evaluations": 10,
                "batch": 5,
                "finalists": 2,
            }
        )
    )
    out, budgets = tmp_path / "run", ("macs<=3M",)
    way = Whole(
        "digits", out, budgets, "autoencoder", "autoencoder", 6, {"batch_size": 48, "children": 3}, device="cpu",
        search=str(settings),
    )  # fmt: skip
    result = walk(way)
    run = Run.open(out)
    assert (result["task"], result["metric"]) == ("regression", "psnr_db")
    for name in ("chosen", "smallest", "largest"):
        assert result[name]["psnr_db_low"] < result[name]["psnr_db"] < result[name]["psnr_db_high"]
    resolution = run.space.resolution(Found.load(run).best.arch)
    assert result["chosen"]["macs"] <= 3e6
    assert result["chosen"]["psnr_db"] > mean_image_psnr(run, "confirm", resolution) + 3
    notes = result["notes"]
    assert any("own resolution" in note for note in notes)
    assert Bundle.open(out / "bundle").task == "regression"
    assert verify_again(out / "bundle", out, out / "images")["psnr_db"] == pytest.approx(result["chosen"]["psnr_db"], abs=1e-4)
    larger = search(run, Asked((), settings=load_search_config(str(settings)), targets={None: FakeTarget()}))
    assert larger.best.search_score >= Found.load(run).best.search_score - 0.2
    assert larger.largest.search_score > larger.smallest.search_score
    assert (out / "report.html").is_file()
